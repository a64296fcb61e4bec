"""What a cut can be asked for, and what it refuses before it has seen a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rarefy.common.errors import DataError, ModelError, unknown
from rarefy.model import lowrank_modules
from rarefy.model.forward import check_batches
from rarefy.model.layers import all_layers
from rarefy.model.masks import masks as attached
from rarefy.model.quant_grid import attached_grid, recorded_grids
from rarefy.structured import budget as plan
from rarefy.structured.compensation import REPAIRS
from rarefy.structured.importance import REDUCTIONS, UNIT_SCORES

RENAMED_KINDS = {"head of a group": "query_head", "head dimension": "head_dim"}
KINDS = ("channel", "neuron", "head", "query_head", "head_dim", "group")
LAYER_SCORES = ("similarity", "loss", "random")
BUDGETS = ("keep", "parameters", "flops", "latency")


@dataclass(frozen=True)
class Ask:
    """What `cut_` was asked for, checked."""

    units: tuple[str, ...]
    budget: str
    target: float
    score: str
    reduce: str
    scope: str
    min_keep: float
    round_to: int
    steps: int
    seed: int


def check_cut(
    *, units: Any, keep: Any, parameters: Any, flops: Any, latency: Any, score: Any, reduce: Any, scope: Any,
    min_keep: Any, round_to: Any, steps: Any, repair: Any,
) -> None:  # fmt: skip
    """Raise ModelError for what `cut_` would refuse without having seen a model."""
    budgets: dict[str, Any] = dict(zip(BUDGETS, (keep, parameters, flops, latency)))
    if "layer" in ((units,) if isinstance(units, str) else units):
        check_layers(units, budgets, score, for_units(reduce, scope, min_keep, round_to, steps, repair))
    else:
        asked_of(units, budgets, score or "magnitude", reduce, scope, min_keep, round_to, steps, 0)
        _names(repair)


def for_units(reduce: Any, scope: Any, min_keep: Any, round_to: Any, steps: Any, repair: Any) -> dict[str, bool]:
    """Which options were given that blocks know nothing of."""
    return {
        "reduce": reduce != "sum", "scope": scope != "layer", "min_keep": min_keep != 0, "round_to": round_to != 1,
        "steps": steps != 1, "repair": repair is not True,
    }  # fmt: skip


def check_unmasked(model: nn.Module, whole: bool = False, doing: str = "cut") -> None:
    """Raise ModelError for a model with masks or grids, which would not fit what a cut leaves; where `whole` layers go,
    grids that are only noted stay with those that remain."""
    if attached(model):
        raise ModelError("masks are still attached: fold_ the model first")
    for layer in all_layers(model):
        if attached_grid(layer.module, layer.param) is not None or (recorded_grids(layer.module) and not whole):
            raise ModelError(f"{layer.full_name} is quantized already: {doing} first, then quantize")
    made = next(iter(lowrank_modules.factor_records(model)), None)
    if made is not None:
        raise ModelError(f"{made} is made of factors: {doing} first, then factorize")


def check_layer_score(score: Any) -> None:
    """Raise ModelError for what is no score of blocks."""
    if score not in LAYER_SCORES:
        raise ModelError(unknown("score of layers", str(score), LAYER_SCORES))


def check_fraction(name: str, value: Any) -> None:
    """Raise ModelError for what is no fraction that something can be cut to."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ModelError(f"{name} is a fraction above 0 and at most 1, got {value!r}")


def check_repeatable(data: Any) -> None:
    """Raise DataError for what are no batches, or such as can be run through once only."""
    check_batches(data)
    if isinstance(data, Iterator):
        raise DataError("data is run through more than once: give a list or a DataLoader, not an iterator")


def check_layers(units: Any, budgets: Mapping[str, Any], score: Any, others: Mapping[str, bool]) -> None:
    """Raise ModelError for what has no meaning where whole blocks go."""
    if not isinstance(units, str) and tuple(units) != ("layer",):
        raise ModelError("layers are cut by themselves: units='layer'")
    if score is not None:
        check_layer_score(score)
    for name, value in budgets.items():
        if value is not None and name != "keep":
            raise ModelError(f"layers go whole: give keep, not {name}")
    for name, given in others.items():
        if given:
            raise ModelError(f"{name} has no effect on layers")


def asked_of(
    units: Any, budgets: Mapping[str, Any], score: Any, reduce: Any, scope: Any, min_keep: Any, round_to: Any,
    steps: Any, seed: int,
) -> Ask:  # fmt: skip
    """Return what is asked for, checked. Raises ModelError."""
    kinds = (units,) if isinstance(units, str) else tuple(units)
    for kind in kinds:
        if kind in RENAMED_KINDS:
            raise ModelError(f"units {kind!r} is called {RENAMED_KINDS[kind]!r} now")
        if kind not in KINDS:
            raise ModelError(unknown("units", str(kind), (*KINDS, "layer")))
    for what, got, allowed in (
        ("score", score, UNIT_SCORES),
        ("reduce", reduce, REDUCTIONS),
        ("scope", scope, plan.SCOPES),
    ):
        if got not in allowed:
            raise ModelError(unknown(what, str(got), allowed))
    if reduce != "sum" and score in ("obs", "median", "random"):
        raise ModelError(f"reduce has no effect: score {score} is one number a unit")
    given = {k: v for k, v in budgets.items() if v is not None} or {"keep": 0.5}
    if len(given) > 1:
        raise ModelError(f"{' and '.join(given)} are given: a cut has one budget")
    [(budget, target)] = given.items()
    check_fraction(budget, target)
    if isinstance(min_keep, bool) or not isinstance(min_keep, int | float) or not 0 <= min_keep <= 1:
        raise ModelError(f"min_keep is a fraction from 0 to 1, got {min_keep!r}")
    for what, n in (("round_to", round_to), ("steps", steps)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ModelError(f"{what} is a whole number from 1 up, got {n!r}")
    return Ask(kinds, budget, float(target), score, reduce, scope, float(min_keep), round_to, steps, seed)


def _names(repair: Any) -> tuple[str, ...]:
    asked = REPAIRS if repair is True else () if repair is False else (repair,) if isinstance(repair, str) else repair
    for name in asked:
        if name not in REPAIRS:
            raise ModelError(unknown("repair", str(name), REPAIRS))
    return tuple(asked)


def repairs_of(repair: Any, data: Any, loss: Any, ask: Ask) -> tuple[str, ...]:
    """Return the repairs that there is data for. Raises ModelError or DataError: no effect, no data."""
    asked = _names(repair)
    needs = UNIT_SCORES[ask.score].needs
    if loss is not None and needs != "gradient":
        raise ModelError(f"loss has no effect: score {ask.score} takes no gradients")
    if data is None:
        if needs:
            raise DataError(f"score {ask.score} needs data: give batches")
        if asked and repair is not True:
            raise DataError(f"repair {', '.join(asked)} needs data: give batches")
        return ()
    check_repeatable(data)
    if not asked and not needs:
        raise DataError(f"data has no effect: nothing is repaired, and score {ask.score} reads weights alone")
    return tuple(asked)
