"""How long a layer takes in each format at each sparsity: what planners choose by."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.evaluation.profiling import machine, resident_bytes
from rarefy.model.layers import Layer, Selector, select
from rarefy.model.sparsity_pattern import Pattern, check_sparsity, masks_at, parse
from rarefy.runtime import bindings
from rarefy.runtime.autotune import check_plain, check_sizes, why_dense
from rarefy.runtime.candidates import Clock, inputs_of, ways_of
from rarefy.runtime.fusion_analysis import observe
from rarefy.runtime.sparse_layers import geometry

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
PATTERNS = ("unstructured", "4x1")


def latency_table(
    model: nn.Module,
    batch: Sequence[int] = (1, 16, 128),
    example: Any = None,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    patterns: Sequence[str] = PATTERNS,
    layers: Selector = None,
    ignore: Selector = None,
    repeats: int = 11,
    progress: bool = False,
) -> Report:
    """Return, for every distinct shape of layer, seconds of a call: dense, and in each format at each sparsity.

    batch, example    as in `accelerate_`
    A row: layers (the first of this shape), count (how many there are), shape, numbers, format, pattern, sparsity,
    batch, and seconds (median), low, high (quartiles). N:M patterns have one sparsity, their own. Weights are random;
    the model is left as it is. Raises ModelError, SelectorError, PatternError.
    O(shapes x patterns x sparsities x ways x calls).

    >>> rows = latency_table(nn.Sequential(nn.Linear(64, 64)), (1,), sparsities=(0.9,), patterns=("4x1",)).rows
    >>> rows[0]["format"], rows[0]["shape"], rows[0]["seconds"] > 0
    ('dense', '64x64', True)
    """
    check_sizes(batch, repeats)
    wanted = [(p, s) for p in map(parse, patterns) for s in _sparsities(p, sparsities)]
    for pattern, sparsity in wanted:
        check_sparsity(pattern, sparsity, None)
    chosen = select(model, layers, ignore)
    check_plain(chosen)
    images = {} if example is None else observe(model, [l.module for l in chosen], example).images
    alike: dict[str, list[Layer]] = {}
    for layer in chosen:
        image = images.get(id(layer.module))
        if why_dense(layer, 1.0, None if example is None else image is not None) is None:
            how = () if image is None else (image.shape[1:], *geometry(layer.module).values())
            alike.setdefault(str((list(layer.weight.shape), layer.weight.dtype, how)), []).append(layer)
    clock = Clock.of(repeats, resident_bytes(model))
    rows: list[dict[str, Any]] = []
    for same in track(list(alike.values()), "timing layers", progress, len(alike)):
        image = images.get(id(same[0].module))
        sizes = sorted(set(batch)) if image is None else sorted({1, len(image)})
        inputs = {n: inputs_of(same[0].weight, n, image) for n in sizes}
        rows += [{**_about(same), **row} for row in _times(same[0].module, wanted, inputs, clock)]
    here: Mapping[str, Any] = machine()
    told = {"cpu": here["cpu"], "threads": here["threads"], "instruction set": bindings.isa() or "none"}
    return Report("latency", tuple(rows), {**told, "load": here["load"]})


def _about(same: Sequence[Layer]) -> dict[str, Any]:
    weight = same[0].weight
    shape, numbers = "x".join(map(str, weight.shape)), str(weight.dtype).removeprefix("torch.")
    return {"layers": same[0].full_name, "count": len(same), "shape": shape, "numbers": numbers}


def _times(
    dense: Any, wanted: Sequence[tuple[Pattern, float]], inputs: Mapping[int, torch.Tensor], clock: Clock
) -> list[dict[str, Any]]:
    """Rows of one layer: dense once for each number of inputs, and each way of each pattern and sparsity."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for pattern, sparsity in wanted:
        module = copy.deepcopy(dense)
        module.weight.data = _random(module.weight, pattern, sparsity)
        ways, build = ways_of(module)
        layers = {n: build({1: w}) for n, w in ways.items()}
        for size, x in inputs.items():
            for name, t in clock.times(dense, layers, x).items():
                about = (name, "", 0.0, size) if name == "dense" else (name, str(pattern), sparsity, size)
                row = dict(zip(("format", "pattern", "sparsity", "batch"), about))
                rows.setdefault(about, {**row, "seconds": t.median, "low": t.low, "high": t.high})
    return list(rows.values())


def _sparsities(pattern: Pattern, asked: Sequence[float]) -> Sequence[float]:
    return asked if pattern.fixed_sparsity is None else (pattern.fixed_sparsity,)


def _random(weight: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """A weight of this shape and type with random zeros in the pattern."""
    score = torch.rand(1, 1, len(weight), weight[0].numel())
    mask = masks_at([score], pattern, sparsity, "layer")[0].reshape(weight.shape)
    return torch.randn(weight.shape).to(weight.dtype) * mask
