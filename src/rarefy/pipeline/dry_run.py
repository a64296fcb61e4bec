"""Dry run of a recipe: the layers that it changes, errors that the run would raise, and the expected size."""

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
from rarefy.prune.options import PruneOptions, resolve_options
from rarefy.prune.prune import check_layer_names, check_memory, chosen_layers
from rarefy.quantization import config as quantization
from rarefy.quantization.config import QuantizeConfig, QuantizeOptions
from rarefy.quantization.quantize import layers_to_quantize
from rarefy.recipe.schema import (
    STAGE_NAMES,
    CastOptions,
    FactorizeStage,
    Recipe,
    ShareStage,
    StageOptions,
    TieOptions,
    TrainStage,
)
from rarefy.train.sparsity_config import Movement, resolve_config

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Target:
    """What a stage does to a layer: zeros of a pattern, quantized weights or factors."""

    number: int
    layers: list[Layer]
    pattern: Pattern | None = None
    sparsity: float = 0.0
    grid: FewBits | None = None
    factors: Callable[[Layer], int] | None = None  # weights of a layer's factors


@dataclass(frozen=True)
class FewBits:
    """Quantized weights: a description, and the bytes of a layer's scales or table."""

    description: str
    bits: int
    overhead: Callable[[Layer], int]


@contextmanager
def stage_in_errors(recipe: Recipe, number: int) -> Iterator[None]:
    """Add the number of the stage to the message of an error."""
    try:
        yield
    except RarefyError as error:
        raise type(error)(f"{error} [recipe {recipe.name}, stage {number}]") from None


def targets(
    model: nn.Module, recipe: Recipe, memory: int | None = None, resume_dir: Path | None = None
) -> Iterator[Target]:
    """Yield the target of each stage that prunes, quantizes or factorizes.

    Raises what the run would raise for selectors, patterns and memory, with the stage named. O(modules).
    """
    if memory is not None:
        _check_memory(recipe)
    earlier: dict[int, str] = {}  # what a stage before has made of a weight
    for number, stage in enumerate(recipe.stages, 1):
        with stage_in_errors(recipe, number):
            stage_targets = list(_targets_of(model, number, stage, memory, resume_dir))
            for target in stage_targets:
                _check_earlier(target, stage, earlier)
        yield from stage_targets


def _targets_of(
    model: nn.Module, number: int, stage: StageOptions, memory: int | None, resume_dir: Path | None
) -> Iterator[Target]:
    """Yield what one stage works on."""
    if isinstance(stage, PruneOptions):
        solver, target = resolve_options(stage)
        check_memory(solver, target, memory if solver else None, resume_dir if solver else None)
        layers = chosen_layers(model, stage.selected, stage.ignore, target.pattern)
        if stage.per_layer is None:
            yield Target(number, layers, target.pattern, target.sparsity)
        else:
            check_layer_names(stage.per_layer, layers)
            yield from (Target(number, [l], target.pattern, stage.per_layer[l.full_name]) for l in layers)
    elif isinstance(stage, QuantizeOptions):
        yield from _quantized(model, number, stage)
    elif isinstance(stage, ShareStage):
        overhead = partial(_table_bytes, stage.bits, stage.group)
        grid = FewBits(f"{1 << stage.bits} values", stage.bits, overhead)
        yield Target(number, select_layers(model, stage.layers, stage.ignore), grid=grid)
    elif isinstance(stage, FactorizeStage):
        yield Target(number, select_layers(model, stage.layers, stage.ignore), factors=partial(_factors, stage))
    elif isinstance(stage, TrainStage):
        if stage.prune:
            resolved = resolve_config(stage.prune)
            soft = isinstance(stage.prune, Movement) and stage.prune.penalty is not None  # it finds the sparsity itself
            layers = chosen_layers(model, stage.prune.layers, stage.prune.ignore, resolved.pattern)
            yield Target(number, layers, resolved.pattern, 0.0 if soft else resolved.sparsity)
        if stage.quantize:
            yield from _quantized(model, number, stage.quantize)


def _check_earlier(target: Target, stage: StageOptions, earlier: dict[int, str]) -> None:
    """Raise ModelError if this stage cannot process what an earlier stage left of a weight; record the new state."""
    beside = isinstance(stage, FactorizeStage) and stage.beside
    for layer in target.layers:
        before, name = earlier.get(id(layer.original)), layer.full_name
        if before == "grid" and target.grid is not None:
            raise ModelError(
                f"{name} is already quantized or shared by an earlier stage: do only one of them per layer"
            )
        if before == "grid" and isinstance(stage, PruneOptions) and stage.solver is not None:
            raise ModelError(f"{name} is already quantized at this stage, and a solver changes weights: prune first")
        if before is not None and target.factors is not None and not beside:
            state = "is already quantized" if before == "grid" else "has zeros"
            raise ModelError(
                f"{name} {state} at this stage, and factors would lose that: factorize first, or set beside: true"
            )
        if target.grid is not None:
            earlier[id(layer.original)] = "grid"
        elif target.pattern is not None:
            earlier.setdefault(id(layer.original), "zeros")


def _quantized(model: nn.Module, number: int, stage: QuantizeOptions) -> Iterator[Target]:
    """Yield a target for each number of bits."""
    layers = layers_to_quantize(model, stage, quantization.resolve_options(stage))
    configs = quantization.layer_configs(stage, layers)
    for config in dict.fromkeys(configs.values()):
        same = [l for l in layers if configs[l.full_name] == config]
        for layer in same:
            scale_shape(layer, config.group)
        grid = FewBits(config.description, config.bits, partial(_scale_bytes, config))
        yield Target(number, same, config.pattern, config.sparsity, grid)


def _check_memory(recipe: Recipe) -> None:
    """Raise RecipeError for stages and timings that need the whole model in memory."""
    for number, stage in enumerate(recipe.stages, 1):
        if not isinstance(stage, PruneOptions) or stage.solver is None:
            name = STAGE_NAMES[type(stage)]
            name = "a prune stage without solver" if name == "prune" else name
            raise RecipeError(f"{name} needs all weights in memory: leave memory out [stage {number}]")
    if recipe.evaluate and (recipe.evaluate.latency or recipe.evaluate.decode):
        raise RecipeError(
            "timing needs two copies of the model in memory: leave out evaluate.latency and decode, or memory"
        )


def forecast(model: nn.Module, recipe: Recipe, memory: int | None = None) -> Report:
    """Return a row a layer that the recipe would change, and the expected bytes, from a model or its skeleton.

    Raises what the run would raise for selectors and patterns. O(modules).
    """
    by_layer: dict[str, Target] = {}
    for target in targets(model, recipe, memory, None if memory is None else Path()):
        for layer in target.layers:
            before = by_layer.get(layer.full_name, Target(0, [layer]))
            zeros = target if target.pattern is not None else before
            grid, factors = target.grid or before.grid, target.factors or before.factors
            by_layer[layer.full_name] = Target(0, [layer], zeros.pattern, zeros.sparsity, grid, factors)
    casts = [BYTES[stage.dtype] for stage in recipe.stages if isinstance(stage, CastOptions)]
    width = casts[-1] if casts else None
    rows = [_row(name, target, width, recipe.save.format) for name, target in by_layer.items()]
    unused = [] if any(t.grid for t in by_layer.values()) else ["grid"]
    unused += [] if any(t.factors for t in by_layer.values()) else ["weights left"]
    rows = [{k: v for k, v in r.items() if k not in unused} for r in rows]
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    before = sum(t.numel() * t.element_size() for t in tensors)
    widths = ((t, width if width and t.is_floating_point() else t.element_size()) for t in tensors)
    rest = sum(t.numel() * w for t, w in widths) - sum(
        t.layers[0].original.numel() * (width or t.layers[0].original.element_size()) for t in by_layer.values()
    )
    after = rest + sum(r["expected"] for r in rows)
    summary = {
        "layers": f"{len(rows)} of {len(all_layers(model))}",
        "bytes now": before,
        "bytes expected": after,
        "ratio expected": after / max(before, 1),
    }
    return Report(f"dry run of {recipe.name}: nothing computed", tuple(rows), summary, tuple(_not_counted(recipe)))


def _row(name: str, target: Target, width: int | None, format: str) -> dict[str, Any]:
    """Return the row of a layer; `width`: bytes of a number after the casts of the recipe."""
    layer, grid = target.layers[0], target.grid
    size, each = layer.original.numel(), width or layer.original.element_size()
    count = size if target.factors is None else min(size, target.factors(layer))
    expected = _expected(count, target.pattern, target.sparsity, grid.bits if grid else 8 * each, format)
    return {
        "layer": name,
        "shape": "x".join(map(str, layer.original.shape)),
        "pattern": str(target.pattern or "-"),
        "asked": target.sparsity,
        "grid": grid.description if grid else "-",
        "weights left": count,
        "bytes": size * layer.original.element_size(),
        "expected": expected + (grid.overhead(layer) if grid else 0),
    }


def _not_counted(recipe: Recipe) -> Iterator[str]:
    """Return notes on what the table of a dry run leaves out."""
    for number, s in enumerate(recipe.stages, 1):
        if isinstance(s, TieOptions):
            yield f"stage {number} ties blocks, which are stored once: the saved bytes are fewer"
        if isinstance(s, FactorizeStage) and s.beside:
            yield f"stage {number} adds factors beside layers: the saved bytes are more"
        if isinstance(s, TrainStage):
            parts = [f"{s.epochs} epochs by {s.optimizer.name} at {s.optimizer.lr:g}"]
            parts += [f"pruned by {getattr(s.prune, 'method', '')}"] if s.prune else []
            parts += [f"distilled from {s.distill.teacher or 'the original model'}"] if s.distill else []
            if s.quantize:
                bits = dict.fromkeys([s.quantize.weights, *(s.quantize.per_layer or {}).values()])
                parts.append(f"{' and '.join(bits)} from {s.quantize.start:.0%} on")
            yield f"stage {number} trains {', '.join(parts)}"


def _scale_bytes(config: QuantizeConfig, layer: Layer) -> int:
    """Return the bytes of a layer's scales and codes of zero."""
    width = (2 if isinstance(config.group, int) else 4) + (not config.symmetric)
    return math.prod(scale_shape(layer, config.group)) * width


def _table_bytes(bits: int, group: str | None, layer: Layer) -> int:
    """Return the bytes of a layer's codebook."""
    return math.prod(scale_shape(layer, group)) * 4 << bits


def _factors(stage: FactorizeStage, layer: Layer) -> int:
    """Return an upper bound on the weights of a layer's factors; the exact number depends on its values."""
    size = layer.original.numel()
    if why_not_factorizable(layer.module, stage.beside) is not None or layer.param != "weight":
        return size
    if stage.beside and stage.rank:
        return size  # and the thin ones beside it
    if stage.rank is not None and len(ranks := max_ranks(layer.module)) == 1:
        return num_factor_weights(layer.module, [min(stage.rank, *ranks)])
    return size if stage.keep is None else int(stage.keep * size)


def _expected(size: int, pattern: Pattern | None, sparsity: float, bits: int, format: str) -> int:
    """Return the bytes of one weight in the recipe's format, or in the smallest that fits its pattern."""
    nonzeros = math.ceil(size * (1 - sparsity))
    values, mask = math.ceil(nonzeros * bits / 8), math.ceil(size / 8)
    formats = {
        "dense": math.ceil(size * bits / 8),
        "dense+mask": math.ceil(size * bits / 8) + mask,
        "bitmask": values + mask,
        "csr": values + 2 * nonzeros,
        "csc": values + 2 * nonzeros,
    }
    if pattern is not None and pattern.kind == "block":
        formats["bsr"] = values + 2 * nonzeros // (pattern.a * pattern.b)
    if pattern is not None and pattern.kind == "nm":
        index = min(pattern.b, pattern.a * (pattern.b - 1).bit_length())
        formats["nm"] = values + math.ceil(size / pattern.b * index / 8)
    return formats.get(format, min(formats.values()))
