"""What a recipe means for a model before it is run: its layers, what cannot be, what size to expect."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.common.errors import ModelError, RarefyError, RecipeError
from rarefy.common.report import Report
from rarefy.model.layers import Layer, all_layers, select_layers
from rarefy.model.lowrank_modules import max_ranks, num_factor_weights, why_not_factorizable
from rarefy.model.quant_grid import scale_shape
from rarefy.model.sparsity_pattern import Pattern
from rarefy.prune.prune import asked, check_ask, chosen_layers
from rarefy.quantization.config import Ask
from rarefy.quantization.config import asked as asked_values
from rarefy.recipe import parser as recipes
from rarefy.train.sparsity_config import Movement, resolve_config

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Target:
    """What a stage works on: zeros of a pattern, numbers of few bits, fewer weights."""

    number: int
    layers: list[Layer]
    pattern: Pattern | None = None
    sparsity: float = 0.0
    few: Few | None = None
    left: Callable[[Layer], int] | None = None  # weights of a layer's factors


@dataclass(frozen=True)
class Few:
    """Numbers of few bits: in words, and the bytes of a layer's scales or table."""

    words: str
    bits: int
    own: Callable[[Layer], int]


@contextmanager
def naming(plan: recipes.Recipe, number: int) -> Iterator[None]:
    """Add the stage to what an error says."""
    try:
        yield
    except RarefyError as error:
        raise type(error)(f"{error} [recipe {plan.name}, stage {number}]") from None


def targets(
    model: nn.Module, plan: recipes.Recipe, memory: int | None = None, resume_dir: Path | None = None
) -> Iterator[Target]:
    """Yield what each stage that prunes or quantizes works on.

    Raises what the run would raise for selectors, patterns, options and memory, with the stage named. O(modules).
    """
    if memory is not None:
        _check_lean(plan)
    found: Target | None
    had: dict[int, str] = {}  # what a stage before has made of a weight
    for number, stage in enumerate(plan.stages, 1):
        with naming(plan, number):
            if isinstance(stage, recipes.Prune):
                s = stage
                how, ask = asked(s.pattern, s.score, s.sparsity, s.solver, s.allocate, s.scope, s.reduce)
                check_ask(how, ask, memory if how else None, resume_dir if how else None)
                chosen = chosen_layers(model, s.layers, s.ignore, ask.plan)
                found = Target(number, chosen, ask.plan, ask.sparsity)
            elif isinstance(stage, recipes.Train) and stage.prune:
                s, ask = stage.prune, resolve_config(stage.prune)
                soft = isinstance(s, Movement) and s.penalty is not None  # how many zeros it finds, nobody knows yet
                chosen = chosen_layers(model, s.layers, s.ignore, ask.pattern)
                found = Target(number, chosen, ask.pattern, 0.0 if soft else ask.sparsity)
            elif isinstance(stage, recipes.Quantize):
                found = _on_grid(model, number, stage)
            elif isinstance(stage, recipes.Share):
                few = Few(f"{1 << stage.bits} values", stage.bits, partial(_table_bytes, stage.bits, stage.group))
                found = Target(number, select_layers(model, stage.layers, stage.ignore), few=few)
            elif isinstance(stage, recipes.Factorize):
                found = Target(number, select_layers(model, stage.layers, stage.ignore), left=partial(_factors, stage))
            else:
                found = None
            if isinstance(stage, recipes.Train) and stage.quantize:
                if found is not None:
                    _note(found, stage, had)
                    yield found
                found = _on_grid(model, number, stage.quantize)
            if found is not None:
                _note(found, stage, had)
        if found is not None:
            yield found


def _note(target: Target, stage: Any, had: dict[int, str]) -> None:
    """Raise ModelError where what a stage before has made of a weight is in the way; remember what this one makes."""
    beside = isinstance(stage, recipes.Factorize) and stage.beside
    for layer in target.layers:
        before, name = had.get(id(layer.original)), layer.full_name
        if before == "grid" and target.few is not None:
            raise ModelError(f"{name} is quantized or shared by an earlier stage already: one of them a layer")
        if before == "grid" and isinstance(stage, recipes.Prune) and stage.solver is not None:
            raise ModelError(f"{name} lies on a grid by then, which a solver's weights would leave: prune first")
        if before is not None and target.left is not None and not beside:
            what = "lies on a grid" if before == "grid" else "has zeros"
            raise ModelError(f"{name} {what} by then, which factors would not keep: factorize first, or beside: true")
        if target.few is not None:
            had[id(layer.original)] = "grid"
        elif target.pattern is not None:
            had.setdefault(id(layer.original), "zeros")


def _on_grid(model: nn.Module, number: int, stage: recipes.Quantize) -> Target:
    ask = asked_values(**stage.options())
    if ask.pattern is None:
        chosen = select_layers(model, stage.layers, stage.ignore)
    else:
        chosen = chosen_layers(model, stage.layers, stage.ignore, ask.pattern)
    for layer in chosen:
        scale_shape(layer, ask.group)
    return Target(number, chosen, ask.pattern, ask.sparsity, Few(ask.words, ask.bits, partial(_scales, ask)))


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
    found: dict[str, Target] = {}
    for target in targets(model, plan, memory, None if memory is None else Path()):
        for layer in target.layers:
            before = found.get(layer.full_name, Target(0, [layer]))
            zeros = target if target.pattern is not None else before
            few, left = target.few or before.few, target.left or before.left
            found[layer.full_name] = Target(0, [layer], zeros.pattern, zeros.sparsity, few, left)
    casts = [BYTES[stage.dtype] for stage in plan.stages if isinstance(stage, recipes.Cast)]
    width = casts[-1] if casts else None
    rows: list[dict[str, Any]] = []
    for name, target in found.items():
        layer, pattern, few = target.layers[0], target.pattern, target.few
        size, each = layer.original.numel(), width or layer.original.element_size()
        left = size if target.left is None else min(size, target.left(layer))
        expected = _expected(left, pattern, target.sparsity, few.bits if few else 8 * each, plan.save.format)
        rows.append(
            {
                "layer": name,
                "shape": "x".join(map(str, layer.original.shape)),
                "pattern": str(pattern or "-"),
                "asked": target.sparsity,
                "grid": few.words if few else "-",
                "weights left": left,
                "bytes": size * layer.original.element_size(),
                "expected": expected + (few.own(layer) if few else 0),
            }
        )
    idle = [] if any(t.few for t in found.values()) else ["grid"]
    idle += [] if any(t.left for t in found.values()) else ["weights left"]
    rows = [{k: v for k, v in r.items() if k not in idle} for r in rows]
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    before = sum(t.numel() * t.element_size() for t in tensors)
    widths = ((t, width if width and t.is_floating_point() else t.element_size()) for t in tensors)
    rest = sum(t.numel() * w for t, w in widths) - sum(
        t.layers[0].original.numel() * (width or t.layers[0].original.element_size()) for t in found.values()
    )
    after = rest + sum(r["expected"] for r in rows)
    summary = {
        "layers": f"{len(rows)} of {len(all_layers(model))}",
        "bytes now": before,
        "bytes expected": after,
        "ratio expected": after / max(before, 1),
    }
    return Report(f"dry run of {plan.name}: nothing computed", tuple(rows), summary, tuple(_not_counted(plan)))


def _not_counted(plan: recipes.Recipe) -> Iterator[str]:
    """What a dry run says besides its table."""
    for number, s in enumerate(plan.stages, 1):
        if isinstance(s, recipes.Tie):
            yield f"stage {number} ties blocks, which are stored once: fewer bytes than that"
        if isinstance(s, recipes.Factorize) and s.beside:
            yield f"stage {number} puts factors beside layers: more bytes than that"
        if isinstance(s, recipes.Train):
            parts = [f"{s.epochs} epochs by {s.optimizer.name} at {s.optimizer.lr:g}"]
            parts += [f"zeros by {getattr(s.prune, 'method', '')}"] if s.prune else []
            parts += [f"taught by {s.distill.teacher or 'the model as it was'}"] if s.distill else []
            parts += [f"{s.quantize.weights} from {s.quantize.start:.0%} on"] if s.quantize else []
            yield f"stage {number} trains {', '.join(parts)}"


def _scales(grid: Ask, layer: Layer) -> int:
    """Bytes of a layer's scales and codes of zero."""
    width = (2 if isinstance(grid.group, int) else 4) + (not grid.symmetric)
    return math.prod(scale_shape(layer, grid.group)) * width


def _table_bytes(bits: int, group: str | None, layer: Layer) -> int:
    """Bytes of a layer's codebook."""
    return math.prod(scale_shape(layer, group)) * 4 << bits


def _factors(stage: recipes.Factorize, layer: Layer) -> int:
    """Weights of a layer's factors, as far as they can be told without its weights: at most as many as it has."""
    size = layer.original.numel()
    if why_not_factorizable(layer.module, stage.beside) is not None or layer.param != "weight":
        return size
    if stage.beside and stage.rank:
        return size  # and the thin ones beside it
    if stage.rank is not None and len(most := max_ranks(layer.module)) == 1:
        return num_factor_weights(layer.module, [min(stage.rank, *most)])
    return size if stage.keep is None else int(stage.keep * size)


def _expected(size: int, pattern: Pattern | None, sparsity: float, bits: int, format: str) -> int:
    """Bytes of one weight in the recipe's format, or in the smallest that fits its pattern."""
    kept = math.ceil(size * (1 - sparsity))
    values, mask = math.ceil(kept * bits / 8), math.ceil(size / 8)
    known = {
        "dense": math.ceil(size * bits / 8),
        "dense+mask": math.ceil(size * bits / 8) + mask,
        "bitmask": values + mask,
        "csr": values + 2 * kept,
        "csc": values + 2 * kept,
    }
    if pattern is not None and pattern.kind == "block":
        known["bsr"] = values + 2 * kept // (pattern.a * pattern.b)
    if pattern is not None and pattern.kind == "nm":
        index = min(pattern.b, pattern.a * (pattern.b - 1).bit_length())
        known["nm"] = values + math.ceil(size / pattern.b * index / 8)
    return known.get(format, min(known.values()))
