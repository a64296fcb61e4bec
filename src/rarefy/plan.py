"""A dry run: which layers a recipe means and what size to expect, with nothing computed."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rarefy import recipe as recipes
from rarefy.errors import RarefyError
from rarefy.model.select import Layer, all_layers, select
from rarefy.proof.report import Report
from rarefy.prune.pattern import Pattern, check_sparsity, parse
from rarefy.prune.stage import refuse_impossible

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def forecast(model: nn.Module, plan: recipes.Recipe) -> Report:
    """Return a row a layer that the recipe would prune, and the expected bytes, from a model or its skeleton.

    Raises what the run would raise for selectors and patterns. O(modules).
    """
    found: dict[str, tuple[Layer, Pattern, float]] = {}
    width: int | None = None
    for number, stage in enumerate(plan.stages, 1):
        prune = stage.prune if isinstance(stage, recipes.Train) else stage
        if isinstance(prune, recipes.Prune | recipes.Gradual):
            pattern = parse(prune.pattern)
            sparsity, _ = check_sparsity(pattern, prune.sparsity, prune.scope)
            try:
                chosen = select(model, prune.layers, prune.ignore)
                refuse_impossible(chosen, pattern)
            except RarefyError as error:
                raise type(error)(f"{error} [recipe {plan.name}, stage {number}]") from None
            found.update({l.full_name: (l, pattern, sparsity) for l in chosen})
        elif isinstance(stage, recipes.Cast):
            width = BYTES[stage.dtype]
    rows: list[dict[str, Any]] = []
    for name, (layer, pattern, sparsity) in found.items():
        size = layer.original.numel()
        dense = size * layer.original.element_size()
        rows.append(
            {
                "layer": name,
                "shape": "x".join(map(str, layer.original.shape)),
                "pattern": str(pattern),
                "asked": sparsity,
                "bytes": dense,
                "expected": _expected(
                    size, pattern, sparsity, width or layer.original.element_size(), plan.save.format
                ),
            }
        )
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    before = sum(t.numel() * t.element_size() for t in tensors)
    widths = ((t, width if width and t.is_floating_point() else t.element_size()) for t in tensors)
    rest = sum(t.numel() * w for t, w in widths) - sum(
        l.original.numel() * (width or l.original.element_size()) for l, _, _ in found.values()
    )
    after = rest + sum(r["expected"] for r in rows)
    summary = {
        "layers": f"{len(rows)} of {len(all_layers(model))}",
        "bytes now": before,
        "bytes expected": after,
        "ratio expected": after / max(before, 1),
    }
    return Report(f"dry run of {plan.name}: nothing computed", tuple(rows), summary)


def _expected(size: int, pattern: Pattern, sparsity: float, width: int, format: str) -> int:
    """Bytes of one weight in the recipe's format, or in the smallest that fits its pattern."""
    kept = math.ceil(size * (1 - sparsity))
    values, mask = kept * width, math.ceil(size / 8)
    known = {
        "dense": size * width,
        "dense+mask": size * width + mask,
        "bitmask": values + mask,
        "csr": values + 2 * kept,
        "csc": values + 2 * kept,
    }
    if pattern.kind == "block":
        known["bsr"] = values + 2 * kept // (pattern.a * pattern.b)
    if pattern.kind == "nm":
        bits = min(pattern.b, pattern.a * (pattern.b - 1).bit_length())
        known["nm"] = values + math.ceil(size / pattern.b * bits / 8)
    return known.get(format, min(known.values()))
