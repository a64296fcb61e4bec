"""Options of solvers, and the sparsity target of a call of `prune_`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from rarefy.common.errors import PatternError, unknown
from rarefy.common.options import Fraction, OneOf, Options, options_or_name
from rarefy.evaluation.profiling import native_bf16
from rarefy.model import sparsity_pattern as patterns
from rarefy.prune.scores import SCORES

SOLVER_NAMES = ("obs", "admm", "refit", "round", "rtn")  # of all functions; each has its own checks


class Solver(Options):
    """Set options of a solver of `prune_` or `quantize_`. None selects the default of the solver.

    Defaults are damping 0.01, block 128 (obs), refits 6, reconstruct 0 and its lr 1e-3, steps 10 (admm), asymmetric 0
    (0.5 where weights are quantized to fewer than 8 bits). Of the solver round they are steps 200 and lr 1 / steps.

    Example:
        >>> Solver(name="obs", block=64).block
        64
        >>> Solver(name="obs", damping=-1)
        Traceback (most recent call last):
        rarefy.common.errors.PatternError: damping: expected a number between 0 and 10, got -1
    """

    error = PatternError

    name: Annotated[str, OneOf(SOLVER_NAMES, "solver")] = Field(
        description="`obs` (SparseGPT, GPTQ), `admm` (ALPS, then conjugate gradients), `refit` (conjugate gradients on "
        "a scored mask); for quantize also `round` (AutoRound)"
    )
    damping: float | None = Field(default=None, ge=0, le=10, description="times mean(diag(H)), added to the diagonal")
    asymmetric: Fraction | None = Field(
        default=None,
        description="how far targets move towards the dense model's outputs on its own inputs, as a share of what is "
        "best on a held-out batch; 0.5 by default where weights are quantized to fewer than 8 bits, else 0",
    )
    bf16: bool | None = Field(
        default=None, description="run forward passes in bf16 on CPUs that support it, else in fp32"
    )
    block: int | None = Field(default=None, ge=1, le=1 << 20, description="obs: columns whose mask is chosen together")
    steps: int | None = Field(default=None, ge=1, le=10_000, description="admm: iterations; round: steps of learning")
    refits: int | None = Field(
        default=None, ge=0, le=10_000, description="admm, refit: conjugate gradient steps once the mask is fixed"
    )
    reconstruct: int | None = Field(
        default=None, ge=0, le=1000, description="passes in which each block learns the dense block's outputs"
    )
    lr: float | None = Field(default=None, gt=0, le=1, description="learning rate of reconstruct and of round (cosine)")
    blocks: str | None = Field(
        default=None,
        description="names of modules that learn as one, globs separated by |; by default the members of the model's "
        "outermost lists of equal modules",
    )


if TYPE_CHECKING:
    SolverField = str | Solver | Mapping[str, Any]
else:
    SolverField = options_or_name(Solver)


@dataclass(frozen=True)
class SparsityTarget:
    """Which zeros are wanted."""

    pattern: patterns.Pattern
    sparsity: float
    each: Mapping[str, float]  # sparsity by layer name, once it is known
    scope: str
    score: str | None = None  # None: the solver's own criterion (refit: wanda)
    reduce: str | None = None
    allocate: str = "uniform"  # how `each` is found
    seed: int = 0  # of that search

    @property
    def needs_all_layers(self) -> bool:
        """Return whether masks need all layers before the first is solved."""
        if self.score is None:
            return False
        seeded = self.score == "random"  # one sequence of numbers for all layers
        return seeded or self.scope == "global" or self.reduce is not None or bool(SCORES[self.score].needs - {"input"})

    def key(self) -> dict[str, Any]:
        """Return the fields under the names that saved states of runs have."""
        return {"plan" if name == "pattern" else name: value for name, value in asdict(self).items()}


COMMON: dict[str, Any] = {
    "damping": 0.01,
    "asymmetric": 0.0,
    "bf16": False,
    "reconstruct": 0,
    "lr": 1e-3,
    "blocks": None,
}
SOLVERS: dict[str, dict[str, Any]] = {
    "obs": {**COMMON, "block": 128},
    "admm": {**COMMON, "steps": 10, "refits": 6},
    "refit": {**COMMON, "refits": 6},
}


LINES = ("row", "column")  # patterns whose units cross all blocks of columns
PAPERS = {"sparsegpt": "obs", "obc": "obs", "alps": "admm", "pcg": "refit"}


def as_solver(solver: str | Solver | Mapping[str, Any]) -> Solver:
    """Return the solver options for a name or a dict."""
    if isinstance(solver, Solver):
        return solver
    # a plain name is not checked yet: the caller's error lists the solvers of its own
    return Solver(**solver) if isinstance(solver, Mapping) else Solver.model_construct(name=solver)


def resolve(solver: str | Solver | Mapping[str, Any]) -> Solver:
    """Return a solver with its defaults filled in; PatternError for an unknown one or an option it does not have.

    >>> resolve("obs").block
    128
    """
    solver = as_solver(solver)
    if solver.name not in SOLVERS:
        meant = PAPERS.get(solver.name.lower())
        hint = f"unknown solver {solver.name!r} (did you mean {meant!r}?)"
        raise PatternError(hint if meant else unknown("solver", solver.name, SOLVERS))
    defaults = SOLVERS[solver.name]
    options = check_options(solver, defaults)
    for name in ("lr", "blocks"):
        if options.get(name) is not None and not options.get("reconstruct"):
            raise PatternError(f"solver {solver.name}: {name}={options[name]!r} has no effect without reconstruct")
    return Solver(name=solver.name, **(defaults | options))


def check_options(solver: Solver, allowed: Collection[str]) -> dict[str, Any]:
    """Return the options that are set; PatternError for one that this solver does not have."""
    options = {name: value for name, value in solver.model_dump(exclude={"name"}).items() if value is not None}
    idle = [name for name in options if name not in allowed]
    if idle:
        raise PatternError(f"solver {solver.name} has no {', '.join(idle)}; it has {', '.join(allowed)}")
    return options


def passes(solver: Solver) -> AbstractContextManager[Any]:
    """Return the precision in which a solver runs the model."""
    # no cache: it would keep the weights of the first pass for as long as the context lasts
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if in_bf16(solver) else nullcontext()


def in_bf16(solver: Solver) -> bool:
    """Return whether a solver's passes run in bf16 here."""
    return bool(solver.bf16) and native_bf16()
