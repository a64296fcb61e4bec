"""Measure the speed of several models alternately: forward passes, prefill and decoding."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from rarefy.common.report import Report
from rarefy.evaluation import profiling
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, on_device
from rarefy.pipeline.engine_evaluation import token_rates
from rarefy.recipe.schema import Evaluate
from rarefy.runtime.accelerate import accelerate_


def accelerated_copy(evaluate: Evaluate, model: nn.Module, held_out: Any, progress: bool) -> tuple[nn.Module, Report]:
    """Return a copy of the model whose layers skip zeros where that is faster, and a report of it."""
    twin, batch = copy.deepcopy(model), next(iter(held_out))
    batch_sizes = evaluate.latency.batch if evaluate.latency else ()
    sizes = {1, evaluate.decode.prompt} if evaluate.decode else {1}
    for size in batch_sizes:
        inputs = _inputs(batch, size)
        sizes.add(max(t.numel() if t.dim() == 2 and not t.is_floating_point() else size for t in inputs))
    report = accelerate_(twin, sorted(sizes), resize_batch(batch, max((1, *batch_sizes))), progress=progress)
    sparse, resident = report.summary["layers that run sparse"], report.summary["bytes in memory after"]
    note = (
        f"'skipping zeros': {sparse} layers run sparse by accelerate_, where faster here; {resident:,} bytes in memory"
    )
    return twin, replace(report, rows=(), notes=(note,))


def _inputs(batch: Any, size: int) -> list[Tensor]:
    """Return the tensors of a batch of that size that a model is called with."""
    resized = resize_batch(batch, size)
    return tensors_in(resized[0] if isinstance(resized, tuple) else resized)


def measure_speed(
    evaluate: Evaluate, models: Mapping[str, nn.Module], held_out: Any, progress: bool
) -> tuple[Mapping[str, Any], ...]:
    """Return a row for each kind of call, with the medians of all models by name."""
    rows: list[Mapping[str, Any]] = []
    if evaluate.decode:
        d = evaluate.decode
        rates = token_rates(models, prompt=d.prompt, new=d.new, repeats=d.repeats, progress=progress)
        for kind, what in (("prefill", f"prefill of {d.prompt}"), ("decode", f"decode of {d.new}, batch 1")):
            sides = {side: {**r[kind], "median": r[kind]["tokens_per_second"]} for side, r in rates.items()}
            rows.append({"what": what, "unit": "tokens/s", **sides})
    if evaluate.latency:
        for size in evaluate.latency.batch:
            example = resize_batch(next(iter(held_out)), size)
            runs = {side: partial(call, m, on_device(m, example)) for side, m in models.items()}
            times = profiling.compare(runs, repeats=evaluate.latency.repeats, progress=progress)
            sides = {k: {n: 1000 * v for n, v in t.to_dict().items() if n != "repeats"} for k, t in times.items()}
            rows.append({"what": f"forward, batch {size}", "unit": "ms", **sides})
    return tuple(rows)


def resize_batch(batch: Any, size: int) -> Any:
    """Repeat or cut a batch to `size` samples.

    What is no tensor stays as it is, and so do tensors whose first dimension is not that of most: a mask [L, L], a
    table of positions.

    >>> import torch
    >>> [len(t) for t in resize_batch((torch.ones(4, 6), torch.ones(4), torch.ones(6, 6)), 1)]
    [1, 1, 6]
    """
    sizes = Counter(len(t) for t in tensors_in(batch) if t.dim() and len(t))
    return _resized(batch, size, max(sizes, key=sizes.__getitem__, default=0))


def _resized(batch: Any, size: int, samples: int) -> Any:
    """Return a batch in which tensors of so many samples have `size`."""
    if isinstance(batch, Tensor):
        if not batch.dim() or len(batch) != samples:
            return batch
        return batch.repeat(-(-size // samples), *[1] * (batch.dim() - 1))[:size]
    if hasattr(batch, "keys"):
        return {k: _resized(v, size, samples) for k, v in batch.items()}
    return tuple(_resized(v, size, samples) for v in batch) if isinstance(batch, tuple | list) else batch
