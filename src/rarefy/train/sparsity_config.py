"""Options of sparsity in training: the ways in which zeros come into a model while it learns.

Progress runs from 0 to 1 over the whole training; `start` and `end` are points of it. In a recipe `method` chooses the
class: `prune: {method: rigl, sparsity: 0.9}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rarefy.common.errors import PatternError, unknown
from rarefy.common.options import Fraction, Names, OneOf, Options, at
from rarefy.model.sparsity_pattern import REDUCTIONS, SCOPES, Pattern, check_sparsity, make_masks, parse_pattern
from rarefy.prune.prune import default_scope
from rarefy.prune.scores import SCORES
from rarefy.train.sparsity_schedule import MAX_STEPS, SCHEDULES, sparsities

ALLOCATIONS = ("uniform", "erk")
Count = Annotated[int, Field(ge=1, le=MAX_STEPS)]


class SparsityConfig(Options):
    """What all methods have in common: how many zeros, in which pattern, in which layers."""

    error = PatternError

    sparsity: Fraction | None = Field(None, description="final fraction of zeros; an N:M pattern determines it")
    pattern: str = Field("unstructured", description="where zeros may be, as in prune")
    scope: Annotated[str, OneOf(SCOPES)] | None = Field(None, description="where scores compete, as in prune")
    layers: Names | None = Field(None, description="selectors of layers; by default all but embeddings and head")
    ignore: Names | None = Field(None, description="selectors of layers to leave as they are")
    seed: int | None = Field(
        None, ge=0, le=(1 << 32) - 1, description="of random choices; by default that of the training"
    )

    @model_validator(mode="after")
    def _check_all(self) -> SparsityConfig:
        with at("pattern"):
            pattern = parse_pattern(self.pattern)
        self._check_before(pattern)
        with at("pattern"):
            check_sparsity(pattern, self._final_sparsity(), None)
        with at("scope"):
            resolved = resolve_config(self)
        self._check_method(resolved)
        return self

    def _final_sparsity(self) -> float | None:
        return self.sparsity

    def _check_before(self, pattern: Pattern) -> None:
        """Raise for what contradicts a sparsity."""
        start, end = getattr(self, "start", 0.0), getattr(self, "end", 1.0)
        if end < start:
            with at("start"):
                raise PatternError(f"pruning starts at {start} and ends at {end}: start comes first")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        """Raise for options of a method that contradict each other."""


class ScheduledConfig(SparsityConfig):
    """Methods whose sparsity rises from `first` in `steps` steps by a schedule, from `start` to `end` of training."""

    schedule: Annotated[str, OneOf(SCHEDULES)] = Field("cubic", description="how the sparsity rises")
    steps: Count = Field(10, description="number of pruning steps")
    first: Fraction = Field(0.0, description="sparsity from which the schedule rises")
    start: Fraction = Field(0.0, description="progress of training at which pruning starts")
    end: Fraction = Field(0.7, description="progress of training at which pruning ends")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        with at("schedule" if self.schedule == "exponential" and self.first <= resolved.sparsity else "first"):
            sparsities(self.schedule, resolved.sparsity, self.steps, self.first)


class Gradual(ScheduledConfig):
    """Prune in `steps` steps, with new scores in each (Zhu & Gupta 2017).

    Example:
        >>> Gradual(sparsity=0.9, ends={"fc": 0.5}).schedule
        'cubic'
    """

    method: Literal["gradual"] = Field("gradual", description="in steps, by any score")
    score: Annotated[str, OneOf(SCORES)] = Field("magnitude", description="how weights are ranked")
    reduce: Annotated[str, OneOf(REDUCTIONS)] | None = Field(
        None, description="how a unit of several weights is scored; by default mean"
    )
    regrow: bool = Field(False, description="let a masked weight return where its score is better than a kept one's")
    ends: dict[str, float] | None = Field(None, description="other final sparsities, by selector of layers")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        super()._check_method(resolved)
        pattern = resolved.pattern
        if self.reduce is not None:
            with at("reduce"):
                sparsity = None if pattern.kind == "nm" else resolved.sparsity
                make_masks([], pattern, sparsity, reduce=self.reduce)
        if self.regrow and "gradient" in SCORES[self.score].needs:
            with at("regrow"):
                raise PatternError(f"score {self.score!r} sees no gradient beneath a mask: regrow would have no effect")
        if self.ends is not None:
            with at("ends"):
                self._check_ends(self.ends, resolved)

    def _check_ends(self, ends: dict[str, float], resolved: ResolvedConfig) -> None:
        if resolved.pattern.kind == "nm" or resolved.scope == "global":
            subject = f"pattern {resolved.pattern}" if resolved.pattern.kind == "nm" else "scope 'global'"
            raise PatternError(f"{subject} determines every layer's sparsity: ends has no effect")
        for selector, end in ends.items():
            if not self.first <= end <= 1:
                raise PatternError(f"ends: {selector!r} ends between first ({self.first:g}) and 1, got {end!r}")
            sparsities(self.schedule, float(end), self.steps, self.first)


class Movement(ScheduledConfig):
    """Keep the weights that training moves away from zero: S falls by dL/dw w at every step (Sanh 2020, eq. 3).

    Masked weights have scores too and may return. With `penalty` the sparsity is not given but found: a weight stays
    while sigmoid(S) is above `threshold`, and `penalty` pulls every S down; S then moves by `rate` a step.
    """

    method: Literal["movement"] = Field("movement", description="keeps what training moves away from zero")
    steps: Count = Field(20, description="number of pruning steps")
    start: Fraction = Field(0.1, description="progress of training at which pruning starts")
    penalty: float | None = Field(None, gt=0, description="instead of a sparsity: how hard scores are pulled down")
    threshold: Fraction = Field(0.1, description="with penalty: sigmoid of the score above which a weight stays")
    rate: Fraction = Field(0.01, description="with penalty: how far a score moves in a step")

    def _final_sparsity(self) -> float | None:
        return self.sparsity if self.penalty is None else 1.0

    def _check_before(self, pattern: Pattern) -> None:
        super()._check_before(pattern)
        if self.penalty is None:
            return
        if self.sparsity is not None:
            with at("sparsity"):
                raise PatternError("movement finds the sparsity by its penalty: leave sparsity out, or penalty")
        if pattern.kind == "nm":
            with at("pattern"):
                raise PatternError(f"pattern {pattern} determines the sparsity: penalty has no effect, leave it out")
        if self.scope is not None:
            with at("scope"):
                raise PatternError(
                    "movement with a penalty compares each weight with the threshold: scope has no effect"
                )


class SecondOrder(ScheduledConfig):
    """Prune what the curvature of the loss ranks lowest, and let the remaining weights compensate (oBERT, Kurtic 2022).

    The inverse of an empirical Fisher matrix in blocks, from `gradients` gradients, is renewed at each step.
    """

    method: Literal["second-order"] = Field("second-order", description="by blocks of an empirical Fisher matrix")
    block: Count = Field(50, description="size of the blocks of the Fisher matrix")
    gradients: Count = Field(256, description="gradients that the Fisher matrix is estimated from")
    damp: float = Field(0.01, gt=0, description="added to the diagonal of the Fisher matrix")


class Rigl(SparsityConfig):
    """Train sparse from `start` on; at each step drop the smallest weights and grow as many at zero where the gradient
    of the loss is largest (RigL, Evci 2020): the fraction `drop` at first, falling to none by a cosine."""

    method: Literal["rigl"] = Field("rigl", description="sparse throughout: drops by magnitude, grows by gradient")
    steps: Count = Field(20, description="how often weights are dropped and grown")
    start: Fraction = Field(0.0, description="progress of training from which it is sparse")
    end: Fraction = Field(0.75, description="progress of training after which the masks stay")
    drop: Fraction = Field(0.3, description="fraction of the weights that is dropped at first")
    allocate: Annotated[str, OneOf(ALLOCATIONS, "allocation")] = Field(
        "uniform", description="how the sparsity is distributed over layers"
    )

    def _check_method(self, resolved: ResolvedConfig) -> None:
        if resolved.pattern.kind == "nm" and self.allocate != "uniform":
            with at("allocate"):
                text = f"pattern {resolved.pattern} determines every layer's sparsity: allocate has no effect"
                raise PatternError(text)
        if resolved.scope == "global":
            with at("scope"):
                raise PatternError(
                    "rigl drops and grows layer by layer: scope 'global' has no effect; allocate distributes"
                )


class Alternate(SparsityConfig):
    """Alternate sparse and dense phases, `cycles` of both from `start` to `end`, then sparse (AC/DC, Peste 2021)."""

    method: Literal["alternate"] = Field("alternate", description="dense and sparse phases in turn")
    cycles: Count = Field(4, description="how many sparse and dense phases")
    start: Fraction = Field(0.1, description="progress of training at which the first sparse phase starts")
    end: Fraction = Field(0.75, description="progress of training after which it stays sparse")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        if self.start == self.end:
            with at("start"):
                raise PatternError(f"phases lie between start and end, got {self.start} for both")


class Admm(SparsityConfig):
    """Train all weights, pulled ever more to their sparse projection Z, and cut to it at `end` (ADMM; ELSA 2026).

    At each step W -= p (W - Z + U), where all p together amount to `pull`; Z is renewed `steps` times.
    """

    method: Literal["admm"] = Field("admm", description="all weights train, pulled to their sparse projection")
    steps: Count = Field(50, description="how often the projection is renewed")
    start: Fraction = Field(0.0, description="progress of training at which the pull starts")
    end: Fraction = Field(0.7, description="progress of training at which weights are cut to the projection")
    pull: float = Field(5.0, ge=0, le=100, description="how hard weights are pulled, summed over training")
    weigh: bool = Field(False, description="project by the optimizer's second moments, not by magnitude")


class Rewind(SparsityConfig):
    """Train, prune by magnitude, go back, train again: `rounds` times (lottery tickets, Frankle 2019).

    Weights and learning rate return to what they were at `to` of the first round. Each of the `rounds + 1` trainings
    has the same share of the whole.
    """

    method: Literal["rewind"] = Field("rewind", description="prune, go back to early weights, train again")
    schedule: Annotated[str, OneOf(SCHEDULES)] = Field("exponential", description="how the sparsity rises")
    rounds: Count = Field(3, description="how often weights are pruned")
    to: Fraction = Field(0.05, description="progress of the first round to which weights return")
    weights: bool = Field(True, description="false: only the learning rate returns (Renda 2020)")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        with at("schedule"):
            sparsities(self.schedule, resolved.sparsity, self.rounds)


SPARSITY_CONFIGS: dict[str, type[SparsityConfig]] = {
    "gradual": Gradual, "movement": Movement, "second-order": SecondOrder, "rigl": Rigl, "alternate": Alternate,
    "admm": Admm, "rewind": Rewind,
}  # fmt: skip


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration with its defaults filled in."""

    pattern: Pattern
    sparsity: float
    scope: str


def resolve_config(config: SparsityConfig) -> ResolvedConfig:
    """Return a configuration with its defaults filled in; PatternError for another object.

    >>> resolve_config(Gradual(pattern="2:4")).sparsity
    0.5
    """
    if not isinstance(config, tuple(SPARSITY_CONFIGS.values())):
        raise PatternError(f"prune is a plan such as rarefy.Gradual(sparsity=0.9), got {config!r}")
    pattern = parse_pattern(config.pattern)
    usual_scope = default_scope(pattern, getattr(config, "score", "magnitude"))
    sparsity, scope = check_sparsity(pattern, config._final_sparsity(), config.scope or usual_scope)
    return ResolvedConfig(pattern, sparsity, scope)


ELSEWHERE = {"acdc": "alternate", "ac/dc": "alternate", "obert": "second-order", "elsa": "admm", "gmp": "gradual",
             "lottery": "rewind", "magnitude": "gradual"}  # fmt: skip


def config_class(method: str) -> type[SparsityConfig]:
    """Return the plan that a method's name means; PatternError with the nearest name."""
    if method in SPARSITY_CONFIGS:
        return SPARSITY_CONFIGS[method]
    if method == "constant":
        raise PatternError("masks stay as they are when prune is left out: there is no method 'constant'")
    name = ELSEWHERE.get(str(method).lower())
    if name is not None:
        raise PatternError(f"unknown method {method!r}; {method} is called {name!r} here")
    raise PatternError(unknown("method", method, SPARSITY_CONFIGS))
