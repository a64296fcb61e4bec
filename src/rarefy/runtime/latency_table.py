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
from rarefy.model.layers import Layer, Selector, select_layers
from rarefy.model.sparsity_pattern import Pattern, check_sparsity, masks_at_sparsity, parse_pattern
from rarefy.runtime import bindings
from rarefy.runtime.accelerate import check_batches, check_plain
from rarefy.runtime.autotune import Autotuner, example_inputs
from rarefy.runtime.candidates import build_layer, list_candidates, why_dense
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
    """Return the seconds of a call for every distinct shape of layer: dense, and with each kernel at each sparsity.

    Weights are random; the model is left as it is. Costs the calls of all kernels for each shape, pattern and sparsity.

    Args:
        model: the model, on the CPU.
        batch: numbers of inputs in a call of a Linear layer that are timed.
        example: what the model can be called with; convolutions need it, and are timed at its image sizes.
        sparsities: shares of zeros; an N:M pattern has its own.
        patterns: sparsity patterns, such as "unstructured" or "4x1".
        layers: names or classes of the layers; all by default.
        ignore: names or classes of layers to leave out.
        repeats: timings of each kernel, alternating.
        progress: show a progress bar.

    Returns:
        A report with one row for each time: layers (the first of this shape), count (how many there are), shape,
        numbers (dtype), format, pattern, sparsity, batch, seconds (median), low and high (quartiles).

    Raises:
        ModelError: an argument is wrong, or masks are attached.
        SelectorError: `layers` or `ignore` matches no layer.
        PatternError: a pattern or sparsity is wrong.

    Example:
        >>> rows = latency_table(nn.Sequential(nn.Linear(64, 64)), (1,), sparsities=(0.9,), patterns=("4x1",)).rows
        >>> rows[0]["format"], rows[0]["shape"], rows[0]["seconds"] > 0
        ('dense', '64x64', True)
    """
    check_batches(batch, repeats)
    cases = [(p, s) for p in map(parse_pattern, patterns) for s in _sparsities(p, sparsities)]
    for pattern, sparsity in cases:
        check_sparsity(pattern, sparsity, None)
    chosen = select_layers(model, layers, ignore)
    check_plain(chosen)
    images = {} if example is None else observe(model, [l.module for l in chosen], example).images
    alike = _by_shape(chosen, images, example is not None)
    tuner = Autotuner.for_model(repeats, resident_bytes(model))
    rows: list[dict[str, Any]] = []
    for same in track(alike, "timing layers", progress, len(alike)):
        image = images.get(id(same[0].module))
        batches = sorted(set(batch)) if image is None else sorted({1, len(image)})
        inputs = {n: example_inputs(same[0].weight, n, image) for n in batches}
        rows += [{**_shape_columns(same), **row} for row in _times(same[0].module, cases, inputs, tuner)]
    cpu: Mapping[str, Any] = machine()
    summary = {"cpu": cpu["cpu"], "threads": cpu["threads"], "instruction set": bindings.isa() or "none"}
    return Report("latency", tuple(rows), {**summary, "load": cpu["load"]})


def _by_shape(chosen: Sequence[Layer], images: Mapping[int, torch.Tensor], has_example: bool) -> list[list[Layer]]:
    """Return the layers that kernels can run, those that take the same time together."""
    alike: dict[str, list[Layer]] = {}
    for layer in chosen:
        image = images.get(id(layer.module))
        if why_dense(layer, 1.0, image is not None if has_example else None) is None:
            options = () if image is None else (image.shape[1:], *geometry(layer.module).values())
            alike.setdefault(str((list(layer.weight.shape), layer.weight.dtype, options)), []).append(layer)
    return list(alike.values())


def _shape_columns(same: Sequence[Layer]) -> dict[str, Any]:
    weight = same[0].weight
    shape, numbers = "x".join(map(str, weight.shape)), str(weight.dtype).removeprefix("torch.")
    return {"layers": same[0].full_name, "count": len(same), "shape": shape, "numbers": numbers}


def _times(
    dense: Any, cases: Sequence[tuple[Pattern, float]], inputs: Mapping[int, torch.Tensor], tuner: Autotuner
) -> list[dict[str, Any]]:
    """Return the rows of one layer: dense once for each batch, and each kernel for each pattern and sparsity."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for pattern, sparsity in cases:
        module = copy.deepcopy(dense)
        module.weight.data = _random(module.weight, pattern, sparsity)
        layers = {c: build_layer(module, {1: c.packed}) for c in list_candidates(module)}
        for batch, x in inputs.items():
            for name, t in tuner.time(dense, layers, x).items():
                key = (name, "", 0.0, batch) if name == "dense" else (name, str(pattern), sparsity, batch)
                row = dict(zip(("format", "pattern", "sparsity", "batch"), key))
                rows.setdefault(key, {**row, "seconds": t.median, "low": t.low, "high": t.high})
    return list(rows.values())


def _sparsities(pattern: Pattern, sparsities: Sequence[float]) -> Sequence[float]:
    return sparsities if pattern.fixed_sparsity is None else (pattern.fixed_sparsity,)


def _random(weight: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """Return a weight of this shape and dtype with random zeros in the pattern."""
    score = torch.rand(1, 1, len(weight), weight[0].numel(), dtype=torch.float32)
    mask = masks_at_sparsity([score], pattern, sparsity, "layer")[0].reshape(weight.shape)
    return torch.randn(weight.shape, dtype=torch.float32).to(weight.dtype) * mask
