"""Options of `prune_`, and the solver and sparsity target that they mean."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rarefy.common.errors import PatternError
from rarefy.common.options import Fraction, Names, OneOf, Options, at
from rarefy.model import sparsity_pattern as patterns
from rarefy.model.layers import Selector
from rarefy.prune import allocation as allocate_
from rarefy.prune.scores import SCORES
from rarefy.prune.solver_config import Solver, SolverField, SparsityTarget, resolve

UNIFORM = "take 'uniform' (shell: pass --set allocate=uniform)"


class PruneOptions(Options):
    """Prune weights in one step, without training. See `rarefy.prune_`."""

    error = PatternError

    pattern: str = Field(
        default="unstructured",
        description="where zeros may be: unstructured, N:M (N kept of M) such as 2:4, blocks RxC such as 4x1, row (= "
        "channel), column",
    )
    score: Annotated[str, OneOf(SCORES)] | None = Field(
        default=None,
        description="how weights are ranked; some scores need data, gradient scores also labels or a loss. By default "
        "wanda with calibration data, magnitude without, or the solver's own criterion",
    )
    sparsity: Fraction | None = Field(default=None, description="fraction of zeros; an N:M pattern determines it")
    per_layer: dict[str, Fraction] | None = Field(
        default=None, description="instead of sparsity: the fraction of zeros of each layer to prune, by its full name"
    )
    solver: SolverField | None = Field(
        default=None, description="move the remaining weights so that layer outputs on the data are preserved"
    )
    allocate: Annotated[str, OneOf(allocate_.ALLOCATIONS, "allocation")] | None = Field(
        default=None, description="how the sparsity is distributed over layers; by default uniform"
    )
    scope: Annotated[str, OneOf(patterns.SCOPES)] | None = Field(
        default=None, description="where scores compete; by default what the paper of the score does"
    )
    reduce: Annotated[str, OneOf(patterns.REDUCTIONS)] | None = Field(
        default=None, description="how a unit of several weights is scored; by default mean"
    )
    layers: Names | None = Field(
        default=None, description="selectors of the layers to prune; by default all but embeddings and head"
    )
    ignore: Names | None = Field(default=None, description="selectors of layers to leave as they are")

    @model_validator(mode="after")
    def _check_combination(self) -> PruneOptions:
        if self.per_layer is not None:
            self._check_per_layer()
        with at("pattern"):
            pattern = patterns.parse_pattern(self.pattern)
            patterns.check_sparsity(pattern, self.wanted, None)
        with at("scope"):
            patterns.check_sparsity(pattern, self.wanted, self.scope)
        with at("reduce"):
            patterns.make_masks([], pattern, None if pattern.kind == "nm" else self.wanted, reduce=self.reduce)
        with at("solver"):
            solver, target = resolve_options(self)
            if solver is not None and target.score is None and (target.scope == "global" or self.reduce is not None):
                idle = "scope 'global'" if target.scope == "global" else f"reduce={self.reduce!r}"
                raise PatternError(
                    f"solver {solver.name} ranks weights block by block: {idle} has no effect without a score"
                )
        with at("allocate"):
            if target.allocate != "uniform" and (pattern.kind == "nm" or target.scope == "global"):
                subject = f"pattern {pattern}" if pattern.kind == "nm" else "scope 'global'"
                raise PatternError(
                    f"{subject} determines every layer's sparsity: allocate={self.allocate!r} has no effect, {UNIFORM}"
                )
        return self

    def _check_per_layer(self) -> None:
        """Raise for options that have no effect where the sparsity of each layer is given."""
        for name in ("sparsity", "allocate", "layers", "ignore"):
            if getattr(self, name) is not None:
                with at(name):
                    raise PatternError(f"{name} has no effect: per_layer gives the layers and their sparsity")
        for reason, wrong in (
            ("per_layer is empty: expected names of layers with their sparsity", not self.per_layer),
            ("per_layer fixes every layer's sparsity: scope 'global' has no effect", self.scope == "global"),
            ("an N:M pattern determines every layer's sparsity: give layers, not per_layer", ":" in self.pattern),
        ):
            if wrong:
                with at("per_layer"):
                    raise PatternError(reason)

    @property
    def wanted(self) -> float | None:
        """Return the fraction of zeros; of `per_layer` the mean."""
        each = self.per_layer
        return sum(each.values()) / len(each) if each else self.sparsity

    @property
    def selected(self) -> Selector:
        """Return the selectors of the layers to prune."""
        return self.layers if self.per_layer is None else tuple(self.per_layer)


def resolve_options(options: PruneOptions, seed: int = 0) -> tuple[Solver | None, SparsityTarget]:
    """Return the solver and the sparsity target of options, with defaults filled in."""
    pattern = patterns.parse_pattern(options.pattern)
    solver = None if options.solver is None else resolve(options.solver)
    score = options.score or ("magnitude" if solver is None else "wanda" if solver.name == "refit" else None)
    sparsity, scope = patterns.check_sparsity(pattern, options.wanted, options.scope or default_scope(pattern, score))
    allocate = options.allocate or "uniform"
    seed = seed if allocate == "search" else 0
    each = dict(options.per_layer or {})
    return solver, SparsityTarget(pattern, sparsity, each, scope, score, options.reduce, allocate, seed)


def ranks_by_inputs(options: PruneOptions) -> bool:
    """Return whether weights are ranked by wanda where there is data: no score is given, and no solver.

    Units of whole rows and columns are ranked as without data.
    """
    kinds = ("unstructured", "nm", "block")
    return options.score is None and options.solver is None and patterns.parse_pattern(options.pattern).kind in kinds


def default_scope(plan: patterns.Pattern, score: str | None) -> str | None:
    """Return the scope that the score's paper uses, where the pattern leaves one to choose."""
    if score is None or plan.kind in ("nm", "row", "column"):
        return None
    return SCORES[score].scope
