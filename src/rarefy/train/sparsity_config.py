"""What can be asked of training: the ways in which zeros come into a model while it learns.

Progress runs from 0 to 1 over the whole training; `start`, `end` and the like are places on that way. Every plan is
words and numbers, so a recipe holds it as it is (`prune: {method: rigl, sparsity: 0.9}`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rarefy.common.errors import PatternError, unknown
from rarefy.model import sparsity_pattern as patterns
from rarefy.model.sparsity_pattern import Pattern, check_sparsity, parse_pattern
from rarefy.prune.prune import default_scope
from rarefy.prune.scores import SCORES
from rarefy.train.sparsity_schedule import MAX_STEPS, sparsities

Words = str | Sequence[str] | None
ALLOCATIONS = ("uniform", "erk")


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What all ways have in common: how much, in which pattern, in which layers."""

    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: str | None = None
    layers: Words = None
    ignore: Words = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScheduledConfig(SparsityConfig):
    """What rises from `first` in `steps` steps by a schedule, while training runs from `start` to `end` of its way."""

    schedule: str = "cubic"
    steps: int = 10
    first: float = 0.0
    start: float = 0.0
    end: float = 0.7


@dataclass(frozen=True, kw_only=True)
class Gradual(ScheduledConfig):
    """Prune in `steps` steps while training runs from `start` to `end` of its way; scores are computed anew each time
    (Zhu & Gupta 2017).

    `ends` gives other final sparsities to the layers that selectors name. `regrow` lets a masked weight come back where
    its score has become better than a kept one's.

    >>> Gradual(sparsity=0.9, ends={"fc": 0.5}).schedule
    'cubic'
    """

    method: Literal["gradual"] = "gradual"
    score: str = "magnitude"
    reduce: str | None = None
    regrow: bool = False
    ends: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Movement(ScheduledConfig):
    """Keep the weights that training moves away from zero: S falls by dL/dw w at every step (Sanh 2020, eq. 3).

    Masked weights gather scores too and may come back. With `penalty` the count is not given but found ("soft"): a
    weight stays while sigmoid(S) is over `threshold`, and `penalty` pulls every S down; S then moves by `rate` a step.
    """

    method: Literal["movement"] = "movement"
    steps: int = 20
    start: float = 0.1
    penalty: float | None = None
    threshold: float = 0.1
    rate: float = 0.01


@dataclass(frozen=True, kw_only=True)
class SecondOrder(ScheduledConfig):
    """Prune what the loss's curvature says is least missed, and let the kept weights make up for it (oBERT, Kurtic
    2022): the inverse of an empirical Fisher matrix in blocks, from `gradients` gradients, anew at each of `steps`.
    """

    method: Literal["second-order"] = "second-order"
    block: int = 50
    gradients: int = 256
    damp: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Rigl(SparsityConfig):
    """Sparse from `start` on; `steps` times until `end`, the least weights go and as many come back, at zero, where
    the loss's gradient is greatest (RigL, Evci 2020): `drop` of them at first, falling to none by a cosine.
    """

    method: Literal["rigl"] = "rigl"
    steps: int = 20
    start: float = 0.0
    end: float = 0.75
    drop: float = 0.3
    allocate: str = "uniform"


@dataclass(frozen=True, kw_only=True)
class Alternate(SparsityConfig):
    """Sparse and dense phases in turn, `cycles` of both between `start` and `end`, then sparse (AC/DC, Peste 2021)."""

    method: Literal["alternate"] = "alternate"
    cycles: int = 4
    start: float = 0.1
    end: float = 0.75


@dataclass(frozen=True, kw_only=True)
class Admm(SparsityConfig):
    """Train all weights, pulled ever more to their sparse projection Z, renewed `steps` times; cut to it at `end`
    (ADMM; ELSA 2026): at each step W -= p (W - Z + U), where all p come to `pull`.

    `weigh` projects by the optimizer's second moments, v (W + U)^2, instead of by magnitude.
    """

    method: Literal["admm"] = "admm"
    steps: int = 50
    start: float = 0.0
    end: float = 0.7
    pull: float = 5.0
    weigh: bool = False


@dataclass(frozen=True, kw_only=True)
class Rewind(SparsityConfig):
    """Train, prune by magnitude, go back, train again: `rounds` times (lottery tickets, Frankle 2019).

    Weights go back to what they were at `to` of the first round, and so does the learning rate; `weights: false` only
    the learning rate (Renda 2020). Each of the `rounds + 1` trainings has the same share of the whole.
    """

    method: Literal["rewind"] = "rewind"
    schedule: str = "exponential"
    rounds: int = 3
    to: float = 0.05
    weights: bool = True


SPARSITY_CONFIGS: dict[str, type[SparsityConfig]] = {
    "gradual": Gradual, "movement": Movement, "second-order": SecondOrder, "rigl": Rigl, "alternate": Alternate,
    "admm": Admm, "rewind": Rewind,
}  # fmt: skip


@dataclass(frozen=True)
class ResolvedConfig:
    """A plan with what follows from it filled in."""

    pattern: Pattern
    sparsity: float
    scope: str


def resolve_config(plan: SparsityConfig) -> ResolvedConfig:
    """Return what a plan comes to; PatternError for what is impossible or would have no effect.

    >>> resolve_config(Gradual(pattern="2:4")).sparsity
    0.5
    """
    if not isinstance(plan, tuple(SPARSITY_CONFIGS.values())):
        raise PatternError(f"prune is a plan such as rarefy.Gradual(sparsity=0.9), got {plan!r}")
    pattern = parse_pattern(plan.pattern)
    if isinstance(plan, Gradual) and (not isinstance(plan.score, str) or plan.score not in SCORES):
        raise PatternError(unknown("score", plan.score, SCORES))
    usual = default_scope(pattern, plan.score if isinstance(plan, Gradual) else "magnitude")
    sparsity: float | None = plan.sparsity
    if isinstance(plan, Movement) and plan.penalty is not None:
        _check_soft(plan, pattern)
        sparsity = 1.0
    if isinstance(plan, Gradual) and plan.reduce is not None:
        patterns.make_masks([], pattern, None if pattern.kind == "nm" else sparsity, reduce=plan.reduce)
    last, scope = check_sparsity(pattern, sparsity, plan.scope or usual)
    _check_way(plan)
    if isinstance(plan, ScheduledConfig):
        sparsities(plan.schedule, last, plan.steps, plan.first)
    if isinstance(plan, Rewind):
        sparsities(plan.schedule, last, plan.rounds)
    if isinstance(plan, Gradual):
        if plan.regrow and "gradient" in SCORES[plan.score].needs:
            raise PatternError(f"score {plan.score!r} sees no gradient beneath a mask: regrow would have no effect")
        _check_ends(plan, pattern, scope)
    if isinstance(plan, Rigl):
        if plan.allocate not in ALLOCATIONS:
            raise PatternError(unknown("allocation", plan.allocate, ALLOCATIONS))
        if pattern.kind == "nm" and plan.allocate != "uniform":
            raise PatternError(f"pattern {pattern} decides every layer's sparsity itself: allocate has no effect")
        if scope == "global":
            raise PatternError("rigl drops and grows layer by layer: scope 'global' has no effect; allocate spreads")
    return ResolvedConfig(pattern, last, scope)


def _check_way(plan: SparsityConfig) -> None:
    start, end = getattr(plan, "start", 0.0), getattr(plan, "end", 1.0)
    if 0 <= end < start <= 1:
        raise PatternError(f"pruning starts at {start} and ends at {end}: start comes first")
    if not 0 <= start <= end <= 1:
        raise PatternError(f"pruning starts and ends within training, 0..1, got {start} to {end}")
    for name, low, high in (("drop", 0, 1), ("threshold", 0, 1), ("to", 0, 1), ("pull", 0, 100), ("rate", 0, 1)):
        value = getattr(plan, name, None)
        if value is not None and not low <= value <= high:
            raise PatternError(f"{name} lies between {low} and {high}, got {value!r}")
    for name in ("steps", "cycles", "rounds", "gradients", "block"):
        value = getattr(plan, name, None)
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_STEPS
        if value is not None and not whole:
            raise PatternError(f"{name} is a whole number from 1 to {MAX_STEPS:,}, got {value!r}")
    if isinstance(plan, Alternate) and plan.start == plan.end:
        raise PatternError(f"phases lie between start and end, got {plan.start} for both")
    if isinstance(plan, SecondOrder) and not plan.damp > 0:
        raise PatternError(f"damp is greater than 0, got {plan.damp!r}")


def _check_soft(plan: Movement, pattern: Pattern) -> None:
    if plan.sparsity is not None:
        raise PatternError("movement finds the sparsity by its penalty: leave sparsity out, or penalty")
    if pattern.kind == "nm":
        raise PatternError(f"pattern {pattern} decides the sparsity: penalty has no effect, leave it out")
    if plan.scope is not None:
        raise PatternError("movement with a penalty compares each weight with the threshold: scope has no effect")
    if not plan.penalty or plan.penalty < 0:
        raise PatternError(f"penalty is greater than 0, got {plan.penalty!r}")


def _check_ends(plan: Gradual, pattern: Pattern, scope: str) -> None:
    if plan.ends is None:
        return
    if pattern.kind == "nm" or scope == "global":
        what = f"pattern {pattern}" if pattern.kind == "nm" else "scope 'global'"
        raise PatternError(f"{what} decides every layer's sparsity itself: ends has no effect")
    for words, end in plan.ends.items():
        if not isinstance(end, int | float) or not plan.first <= end <= 1:
            raise PatternError(f"ends: {words!r} ends between first ({plan.first:g}) and 1, got {end!r}")
        sparsities(plan.schedule, float(end), plan.steps, plan.first)


ELSEWHERE = {"acdc": "alternate", "ac/dc": "alternate", "obert": "second-order", "elsa": "admm", "gmp": "gradual",
             "lottery": "rewind", "magnitude": "gradual"}  # fmt: skip


def config_class(method: str) -> type[SparsityConfig]:
    """Return the plan that a method's name means; PatternError with the nearest name."""
    if method in SPARSITY_CONFIGS:
        return SPARSITY_CONFIGS[method]
    if method == "constant":
        raise PatternError("masks stay as they are when prune is left out: there is no method 'constant'")
    here = ELSEWHERE.get(str(method).lower())
    if here is not None:
        raise PatternError(f"unknown method {method!r}; {method} is called {here!r} here")
    raise PatternError(unknown("method", method, SPARSITY_CONFIGS))
