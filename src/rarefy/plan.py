"""What a recipe means for a model before it is run: its layers, what cannot be, what size to expect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from rarefy import recipe as recipes
from rarefy.errors import RarefyError, RecipeError
from rarefy.model.select import Layer, all_layers
from rarefy.proof.report import Report
from rarefy.prune.pattern import Pattern, check_sparsity, parse
from rarefy.prune.stage import asked, check_ask, chosen_layers

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@contextmanager
def naming(plan: recipes.Recipe, number: int) -> Iterator[None]:
    """Add the stage to what an error says."""
    try:
        yield
    except RarefyError as error:
        raise type(error)(f"{error} [recipe {plan.name}, stage {number}]") from None


def targets(
    model: nn.Module, plan: recipes.Recipe, memory: int | None = None, work: Path | None = None
) -> Iterator[tuple[int, list[Layer], Pattern, float]]:
    """Yield the number of each stage that prunes, its layers, its pattern, its sparsity.

    Raises what the run would raise for selectors, patterns, options and memory, with the stage named. O(modules).
    """
    if memory is not None:
        _check_lean(plan)
    for number, stage in enumerate(plan.stages, 1):
        with naming(plan, number):
            if isinstance(stage, recipes.Prune):
                s = stage
                how, ask = asked(s.pattern, s.score, s.sparsity, s.solver, s.allocate, s.scope, s.reduce)
                check_ask(how, ask, memory if how else None, work if how else None)
                found = chosen_layers(model, s.layers, s.ignore, ask.plan), ask.plan, ask.sparsity
            elif isinstance(stage, recipes.Train) and stage.prune:
                s = stage.prune
                pattern = parse(s.pattern)
                sparsity, _ = check_sparsity(pattern, s.sparsity, s.scope)
                found = chosen_layers(model, s.layers, s.ignore, pattern), pattern, sparsity
            else:
                continue
        yield number, *found


def _check_lean(plan: recipes.Recipe) -> None:
    """Raise RecipeError for what needs the whole model in memory."""
    for number, stage in enumerate(plan.stages, 1):
        if not isinstance(stage, recipes.Prune) or stage.solver is None:
            what = "a prune stage without solver" if isinstance(stage, recipes.Prune) else type(stage).__name__.lower()
            raise RecipeError(f"{what} holds all weights in memory: run it without memory [stage {number}]")
    if plan.evaluate and (plan.evaluate.latency or plan.evaluate.decode):
        raise RecipeError("timing holds the model twice in memory: leave evaluate.latency and decode out, or memory")


def forecast(model: nn.Module, plan: recipes.Recipe, memory: int | None = None) -> Report:
    """Return a row a layer that the recipe would prune, and the expected bytes, from a model or its skeleton.

    Raises what the run would raise for selectors, patterns and options. O(modules).
    """
    parts = targets(model, plan, memory, None if memory is None else Path())
    found = {l.full_name: (l, pattern, sparsity) for _, chosen, pattern, sparsity in parts for l in chosen}
    casts = [BYTES[stage.dtype] for stage in plan.stages if isinstance(stage, recipes.Cast)]
    width = casts[-1] if casts else None
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
