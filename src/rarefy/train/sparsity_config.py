"""Configurations of sparse training: one class for each method that prunes a model while it trains.

Training progress runs from 0 to 1; `start` and `end` are values of it. In a recipe, `method` selects the class:
`prune: {method: rigl, sparsity: 0.9}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rarefy.common.errors import PatternError, unknown
from rarefy.common.options import Fraction, Names, OneOf, Options, at
from rarefy.model.sparsity_pattern import REDUCTIONS, SCOPES, Pattern, check_sparsity, make_masks, parse_pattern
from rarefy.prune.options import default_scope
from rarefy.prune.scores import SCORES
from rarefy.train.sparsity_schedule import MAX_STEPS, SCHEDULES, sparsities

ALLOCATIONS = ("uniform", "erk")
Count = Annotated[int, Field(ge=1, le=MAX_STEPS)]


class SparsityConfig(Options):
    """Fields of all methods: the sparsity, its pattern, and the layers that are pruned."""

    error = PatternError

    sparsity: Fraction | None = Field(default=None, description="final fraction of zeros; an N:M pattern determines it")
    pattern: str = Field(default="unstructured", description="sparsity pattern, as in prune")
    scope: Annotated[str, OneOf(SCOPES)] | None = Field(
        default=None, description="weights whose scores are compared, as in prune"
    )
    layers: Names | None = Field(
        default=None, description="selectors of layers; by default all but embeddings and head"
    )
    ignore: Names | None = Field(default=None, description="selectors of layers to leave as they are")
    seed: int | None = Field(
        default=None, ge=0, le=(1 << 32) - 1, description="of random choices; by default that of the training"
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
        """Raise PatternError for fields that contradict each other, before the sparsity is checked."""
        start, end = getattr(self, "start", 0.0), getattr(self, "end", 1.0)
        if end < start:
            with at("start"):
                raise PatternError(f"expected start <= end, got start {start} and end {end}")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        """Raise PatternError for fields of a method that contradict each other."""


class ScheduledConfig(SparsityConfig):
    """Fields of methods that raise the sparsity by a schedule, from `first` at `start` to its final value at `end`."""

    schedule: Annotated[str, OneOf(SCHEDULES)] = Field(default="cubic", description="how the sparsity rises")
    steps: Count = Field(default=10, description="number of pruning steps")
    first: Fraction = Field(default=0.0, description="sparsity from which the schedule rises")
    start: Fraction = Field(default=0.0, description="progress of training at which pruning starts")
    end: Fraction = Field(default=0.7, description="progress of training at which pruning ends")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        with at("schedule" if self.schedule == "exponential" and self.first <= resolved.sparsity else "first"):
            sparsities(self.schedule, resolved.sparsity, self.steps, self.first)


class Gradual(ScheduledConfig):
    """Raise the sparsity in `steps` steps and compute the scores anew at each step (Zhu & Gupta 2017).

    Example:
        >>> Gradual(sparsity=0.9, ends={"fc": 0.5}).schedule
        'cubic'
    """

    method: Literal["gradual"] = Field(default="gradual", description="raise the sparsity in steps, by any score")
    score: Annotated[str, OneOf(SCORES)] = Field(default="magnitude", description="how weights are ranked")
    reduce: Annotated[str, OneOf(REDUCTIONS)] | None = Field(
        default=None, description="how scores of a block's weights are combined; default: mean"
    )
    regrow: bool = Field(default=False, description="unmask weights whose scores exceed those of active weights")
    ends: dict[str, float] | None = Field(default=None, description="final sparsity of single layers, by selector")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        super()._check_method(resolved)
        pattern = resolved.pattern
        if self.reduce is not None:
            with at("reduce"):
                sparsity = None if pattern.kind == "nm" else resolved.sparsity
                make_masks([], pattern, sparsity, reduce=self.reduce)
        if self.regrow and "gradient" in SCORES[self.score].needs:
            with at("regrow"):
                raise PatternError(f"regrow has no effect with score {self.score!r}: masked weights have no gradient")
        if self.ends is not None:
            with at("ends"):
                self._check_ends(self.ends, resolved)

    def _check_ends(self, ends: dict[str, float], resolved: ResolvedConfig) -> None:
        if resolved.pattern.kind == "nm" or resolved.scope == "global":
            subject = f"pattern {resolved.pattern}" if resolved.pattern.kind == "nm" else "scope 'global'"
            raise PatternError(f"ends has no effect: {subject} determines the sparsity of every layer")
        for selector, end in ends.items():
            if not self.first <= end <= 1:
                raise PatternError(
                    f"ends: expected a sparsity between first ({self.first:g}) and 1 for {selector!r}, got {end!r}"
                )
            sparsities(self.schedule, float(end), self.steps, self.first)


class Movement(ScheduledConfig):
    """Prune weights that training moves toward zero (movement pruning, Sanh 2020).

    The score S of a weight w decreases by (dL/dw) w at each step (eq. 3). Masked weights have scores and can become
    active again. With `penalty`, the sparsity follows from the training: weights with sigmoid(S) above `threshold`
    stay active, and the penalty lowers all scores. `rate` is then the learning rate of S.

    Example:
        >>> import rarefy
        >>> import torch
        >>> model = torch.nn.Linear(8, 2)
        >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))] * 10
        >>> rarefy.fit_(model, data, prune=rarefy.Movement(sparsity=0.5, steps=2)).rows[-1]["sparsity"]
        0.5
    """

    method: Literal["movement"] = Field(default="movement", description="prune weights that move toward zero")
    steps: Count = Field(default=20, description="number of pruning steps")
    start: Fraction = Field(default=0.1, description="progress of training at which pruning starts")
    penalty: float | None = Field(
        default=None, gt=0, description="strength with which all scores are lowered; replaces sparsity"
    )
    threshold: Fraction = Field(default=0.1, description="with penalty: sigmoid(score) above which a weight is active")
    rate: Fraction = Field(default=0.01, description="with penalty: learning rate of the scores")

    def _final_sparsity(self) -> float | None:
        return self.sparsity if self.penalty is None else 1.0

    def _check_before(self, pattern: Pattern) -> None:
        super()._check_before(pattern)
        if self.penalty is None:
            return
        if self.sparsity is not None:
            with at("sparsity"):
                raise PatternError("sparsity has no effect with penalty, which determines it: leave one of them out")
        if pattern.kind == "nm":
            with at("pattern"):
                raise PatternError(
                    f"penalty has no effect: pattern {pattern} determines the sparsity; leave penalty out"
                )
        if self.scope is not None:
            with at("scope"):
                raise PatternError(
                    "scope has no effect with penalty: each weight is compared with the threshold; leave scope out"
                )


class SecondOrder(ScheduledConfig):
    """Prune the weights whose removal increases the loss least, and update the others (oBERT, Kurtic 2022).

    Each step computes the inverse of a block-diagonal empirical Fisher matrix from `gradients` gradients. `calibrate`
    gives the batches for these gradients.

    Example:
        >>> import rarefy
        >>> import torch
        >>> model = torch.nn.Linear(8, 2)
        >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))] * 10
        >>> report = rarefy.fit_(model, data, prune=rarefy.SecondOrder(sparsity=0.5, steps=2), calibrate=data)
        >>> report.rows[-1]["sparsity"]
        0.5
    """

    method: Literal["second-order"] = Field(
        default="second-order", description="rank weights by an empirical Fisher matrix"
    )
    block: Count = Field(default=50, description="size of the blocks of the Fisher matrix")
    gradients: Count = Field(default=256, description="number of gradients for the Fisher matrix")
    damp: float = Field(default=0.01, gt=0, description="damping: added to the diagonal of the Fisher matrix")


class Rigl(SparsityConfig):
    """Train at constant sparsity and move the mask during training (RigL, Evci 2020).

    Each of the `steps` updates masks the smallest active weights and activates as many where the gradient is largest.
    New weights start at zero. The updated fraction starts at `drop` and falls to zero on a cosine.

    Example:
        >>> import rarefy
        >>> import torch
        >>> model = torch.nn.Linear(8, 2)
        >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))] * 10
        >>> rarefy.fit_(model, data, prune=rarefy.Rigl(sparsity=0.5, steps=2)).rows[-1]["sparsity"]
        0.5
    """

    method: Literal["rigl"] = Field(
        default="rigl", description="constant sparsity: drop by magnitude, grow by gradient"
    )
    steps: Count = Field(default=20, description="number of mask updates")
    start: Fraction = Field(default=0.0, description="progress of training at which weights are first masked")
    end: Fraction = Field(default=0.75, description="progress of training after which the masks stay")
    drop: Fraction = Field(default=0.3, description="fraction of active weights that the first update drops")
    allocate: Annotated[str, OneOf(ALLOCATIONS, "allocation")] = Field(
        default="uniform", description="how the sparsity is distributed over layers"
    )

    def _check_method(self, resolved: ResolvedConfig) -> None:
        if resolved.pattern.kind == "nm" and self.allocate != "uniform":
            with at("allocate"):
                text = f"allocate has no effect: pattern {resolved.pattern} determines the sparsity of every layer"
                raise PatternError(text)
        if resolved.scope == "global":
            with at("scope"):
                raise PatternError(
                    "rigl updates each layer's mask separately: use allocate='erk' instead of scope='global'"
                )


class Alternate(SparsityConfig):
    """Alternate between sparse and dense training phases (AC/DC, Peste 2021).

    There are `cycles` pairs of phases of equal length between `start` and `end`. After `end` the model stays sparse.

    Example:
        >>> import rarefy
        >>> import torch
        >>> model = torch.nn.Linear(8, 2)
        >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))] * 10
        >>> rarefy.fit_(model, data, prune=rarefy.Alternate(sparsity=0.5, cycles=2)).rows[-1]["sparsity"]
        0.5
    """

    method: Literal["alternate"] = Field(default="alternate", description="alternate sparse and dense phases")
    cycles: Count = Field(default=4, description="number of pairs of a sparse and a dense phase")
    start: Fraction = Field(default=0.1, description="progress of training at which the first sparse phase starts")
    end: Fraction = Field(default=0.75, description="progress of training at which the final sparse phase starts")

    def _check_method(self, resolved: ResolvedConfig) -> None:
        if self.start == self.end:
            with at("start"):
                raise PatternError(f"expected start < end for the phases, got {self.start} for both")


class Admm(SparsityConfig):
    """Train all weights with a growing penalty on their distance to a sparse projection Z (ADMM; ELSA 2026).

    Each training step subtracts p (W - Z + U) from W; U is the scaled dual variable. The p of all steps sum to `pull`.
    Z and U are updated `steps` times. At `end` the weights are masked as Z is.

    Example:
        >>> import rarefy
        >>> import torch
        >>> model = torch.nn.Linear(8, 2)
        >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))] * 10
        >>> rarefy.fit_(model, data, prune=rarefy.Admm(sparsity=0.5, steps=2)).rows[-1]["sparsity"]
        0.5
    """

    method: Literal["admm"] = Field(default="admm", description="penalize the distance to a sparse projection")
    steps: Count = Field(default=50, description="number of updates of the projection")
    start: Fraction = Field(default=0.0, description="progress of training at which the penalty starts")
    end: Fraction = Field(default=0.7, description="progress of training at which weights are masked")
    pull: float = Field(default=5.0, ge=0, le=100, description="strength of the penalty, summed over training")
    weigh: bool = Field(default=False, description="weight the projection by the optimizer's second moments")


class Rewind(SparsityConfig):
    """Train, prune by magnitude, reset the remaining weights and train again (lottery tickets, Frankle 2019).

    Weights and learning rate are reset to their values at progress `to` of the first round. Pruning happens `rounds`
    times, so training has `rounds + 1` parts of equal length.

    Example:
        >>> import rarefy
        >>> import torch
        >>> model = torch.nn.Linear(8, 2)
        >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))] * 10
        >>> rarefy.fit_(model, data, prune=rarefy.Rewind(sparsity=0.5, rounds=2)).rows[-1]["sparsity"]
        0.5
    """

    method: Literal["rewind"] = Field(default="rewind", description="prune, reset to early weights, train again")
    schedule: Annotated[str, OneOf(SCHEDULES)] = Field(default="exponential", description="how the sparsity rises")
    rounds: Count = Field(default=3, description="number of pruning rounds")
    to: Fraction = Field(default=0.05, description="progress of the first round to which weights are reset")
    weights: bool = Field(default=True, description="false: reset the learning rate only (Renda 2020)")

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
        raise PatternError(f"prune: expected a configuration such as rarefy.Gradual(sparsity=0.9), got {config!r}")
    pattern = parse_pattern(config.pattern)
    usual_scope = default_scope(pattern, getattr(config, "score", "magnitude"))
    sparsity, scope = check_sparsity(pattern, config._final_sparsity(), config.scope or usual_scope)
    return ResolvedConfig(pattern, sparsity, scope)


ELSEWHERE = {"acdc": "alternate", "ac/dc": "alternate", "obert": "second-order", "elsa": "admm", "gmp": "gradual",
             "lottery": "rewind", "magnitude": "gradual"}  # fmt: skip


def config_class(method: str) -> type[SparsityConfig]:
    """Return the configuration class of a method; raise PatternError with the nearest name for an unknown one."""
    if method in SPARSITY_CONFIGS:
        return SPARSITY_CONFIGS[method]
    if method == "constant":
        raise PatternError("there is no method 'constant': leave prune out to keep the masks unchanged")
    name = ELSEWHERE.get(str(method).lower())
    if name is not None:
        raise PatternError(f"unknown method {method!r}; {method} is called {name!r} here")
    raise PatternError(unknown("method", method, SPARSITY_CONFIGS))
