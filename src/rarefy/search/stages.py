"""The stages of a recipe that do what a search has chosen, and their names after whole layers have gone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.pipeline.sensitivity import GROUP
from rarefy.search.deploy import Variant
from rarefy.search.space import BITS, BLOCK, CUTS, RANK, SOLVER, Amounts, Part, bits_at

CAST = {"cast": {"dtype": "fp32"}}  # of a model that is in fp32 it changes nothing
NUMBER = re.compile(r"[0-9]+$")  # at the end of a block's name


def stages_of(
    amounts: Amounts, parts: Sequence[Part], variant: Variant, scores: Mapping[str, str], has_data: bool
) -> list[dict[str, Any]]:
    """Return the stages of a choice; a cast to fp32, which changes nothing, where there is none.

    Whole layers go first, so that all that follows is fitted to what is left of the model.

    Args:
        amounts: what is done to each part.
        parts: all parts.
        variant: the precision, with its own last stages.
        scores: by method the score of units, from `space.cut_score`.
        has_data: whether there is calibration data.
    """
    dropped = [p.name for p in parts if p.method == BLOCK and amounts.get(p.key)]
    by_method: dict[str, dict[str, Any]] = {}
    for part in parts:
        amount = amounts.get(part.key, 0.0)
        if amount and part.method != BLOCK:
            left = part.units_left(amount) if part.method in CUTS else amount
            by_method.setdefault(part.method, {})[renumbered(part.name, dropped)] = left
    stages: list[dict[str, Any]] = [{"cut": {"units": BLOCK, "layers": dropped}}] if dropped else []
    for method, chosen in by_method.items():
        if method in CUTS:
            stages.append({"cut": {"units": method, "counts": chosen, "score": scores[method]}})
        else:
            stages += weight_stages(method, chosen, has_data)
    stages += variant.stages(list(by_method.get(BITS, ())))
    return stages or [CAST]


def weight_stages(method: str, amounts: Mapping[str, float], has_data: bool) -> list[dict[str, Any]]:
    """Return the stages that prune, factorize or quantize these layers."""
    levels = sorted(set(amounts.values()))
    names = {level: [n for n, a in amounts.items() if a == level] for level in levels}
    if method == BITS:  # in one pass
        solver = {"solver": dict(SOLVER)} if has_data else {}
        common = max(levels, key=lambda v: len(names[v]))
        other = {n: f"int{bits_at(v)}" for n, v in amounts.items() if v != common}
        layers = {"layers": list(amounts), **({"per_layer": other} if other else {})}
        return [{"quantize": {"weights": f"int{bits_at(common)}", "group": GROUP, **layers, **solver}}]
    if method == RANK:
        return [{"factorize": {"keep": round(1 - level, 4), "layers": names[level]}} for level in levels]
    solver = {"solver": "admm"} if has_data else {"score": "magnitude"}
    return [{"prune": {"pattern": method, "per_layer": dict(amounts), **solver}}]


def renumbered(name: str, dropped: Sequence[str]) -> str:
    """Return the name of a layer or group after blocks have gone from the lists before it.

    >>> renumbered("layers.4.attention", ["layers.1", "layers.3", "layers.5"])
    'layers.2.attention'
    >>> renumbered("layers.layer_4.attention", ["layers.layer_1"])
    'layers.layer_3.attention'
    """
    for stack in dict.fromkeys(block.rpartition(".")[0] for block in dropped):
        prefix = f"{stack}." if stack else ""
        own, _, rest = name.removeprefix(prefix).partition(".")
        number = NUMBER.search(own)
        if name.startswith(prefix) and number is not None:
            gone = [int(NUMBER.search(b)[0]) for b in dropped if b.rpartition(".")[0] == stack]  # type: ignore[index]
            fewer = int(number[0]) - sum(n < int(number[0]) for n in gone)
            name = f"{prefix}{own[: number.start()]}{fewer}" + (f".{rest}" if rest else "")
    return name
