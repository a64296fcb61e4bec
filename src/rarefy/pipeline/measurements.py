"""Measure a model before and after a recipe, and build the receipt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.checkpoint.save import pack
from rarefy.checkpoint.tensor_slots import aliases
from rarefy.common.report import Report
from rarefy.evaluation import profiling
from rarefy.evaluation.quality import Metric, measured
from rarefy.evaluation.receipt import Receipt
from rarefy.formats.quantized_encodings import label
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import all_layers
from rarefy.model.masks import folded_state
from rarefy.pipeline.engine_evaluation import EngineModule, resident_bytes, skips_zeros
from rarefy.recipe.schema import Evaluate, Recipe

EXECUTED_DENSE = "stored sparse, executed dense: no speed-up is claimed for the zeros"
ENGINE_DENSE = "the zeros make files smaller, not the engine faster: too few to skip, so the kernels run dense"
EAGER = "eager torch, fp32"
EXECUTED_WIDE = "stored in few bits, computed in the model's own numbers: no speed-up is claimed for the bits"


def state_of(
    model: nn.Module, metric: Metric | None, held_out: Any, engine: EngineModule | None = None
) -> dict[str, Any]:
    """Measure what a receipt has of one side, before or after.

    Args:
        model: the model in eager torch.
        metric: what is measured, or None.
        held_out: the evaluation batches; of pairs, the first side is what operations are counted on.
        engine: the model on the engine, where quality and memory are those of the engine.
    """
    out: dict[str, Any] = {
        "memory": profiling.resident_bytes(model) if engine is None else resident_bytes(engine.engine),
        "dense_bytes": sum(t.numel() * t.element_size() for t in _stored(model).values()),
        "sparsity": _model_sparsity(model),
    }
    if metric is not None:
        (_, out["quality"]), *out["more"] = measured(metric, engine or model).items()
        out["higher_is_better"] = metric.higher_is_better
        out["batches"] = len(held_out) if hasattr(held_out, "__len__") else None
        example = on_device(model, next(iter(callable_batches(held_out))))
        with evaluating(model):
            out["flops"] = profiling.flops(model, lambda: call(model, example))
    return out


def callable_batches(held_out: Any) -> Any:
    """Return batches that a model can be called with: both sides of pairs (queries, texts), others as they are."""
    first = next(iter(held_out), None)
    pairs = isinstance(first, tuple | list) and len(first) == 2 and all(hasattr(side, "keys") for side in first)
    return [side for pair in held_out for side in pair] if pairs else held_out


def packed_bytes(model: nn.Module, format: str) -> dict[str, Any]:
    """Return the exact bytes of every stored tensor, by name, dense and in the save format."""
    dense, packed, formats = {}, {}, {}
    state = _stored(model)
    for name, p in pack(model, state, format):
        dense[name], packed[name], formats[name] = state[name].numel() * state[name].element_size(), p.nbytes, label(p)
    return {"dense": dense, "packed": packed, "formats": formats}


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a saved model has, tied ones once."""
    tied = aliases(model)
    return {n: t for n, t in folded_state(model) if n not in tied}


def _model_sparsity(model: nn.Module) -> float:
    zeros = total = 0
    for layer in all_layers(model):
        zeros += layer.original.numel() - int(torch.count_nonzero(layer.weight))
        total += layer.original.numel()
    return zeros / max(total, 1)


def layer_rows(reports: list[Report]) -> list[dict[str, Any]]:
    """Return one row for each pruned layer, from the last stage that changed it."""
    last_rows = {r["layer"]: r for report in reports if report.title == "pruned" for r in report.rows}
    return [dict(r) for r in last_rows.values()]


def receipt_of(
    recipe: Recipe,
    model: nn.Module,
    before: dict[str, Any],
    after: dict[str, Any],
    rows: list[dict[str, Any]],
    speed: tuple[Mapping[str, Any], ...],
    reports: list[Report],
    seconds: float,
    engine: EngineModule | None = None,
    samples: tuple[Mapping[str, Any], ...] = (),
    runtimes: tuple[Mapping[str, Any], ...] = (),
) -> Receipt:
    """Return the receipt of a run: bytes, quality, zeros and speed before and after, and a row for each layer."""
    disk = packed_bytes(model, recipe.save.format)
    dense, packed, formats = (disk[k] for k in ("dense", "packed", "formats"))
    rows = [row for row in rows if _name_of(row["layer"], packed)]
    for row in rows:
        name = _name_of(row["layer"], packed)
        row.update(format=formats[name], bytes=packed[name], dense_bytes=dense[name])
    first, now = before["dense_bytes"], sum(packed.values())
    e, quality, flops = recipe.evaluate, {}, {}
    if e:
        quality = _quality(e, before, after)
        flops = {"what": "one evaluation batch", "before": before["flops"], "after": after["flops"]}
    weights = sum(_entries(r["shape"]) for r in rows)
    zeros = weights - sum(r["kept"] for r in rows)
    target = sum(r["asked"] * _entries(r["shape"]) for r in rows) / max(weights, 1)
    sparsity = {
        "asked": target,
        "achieved": zeros / max(weights, 1),
        "weights": weights,
        "zeros": zeros,
        "model_before": before["sparsity"],
        "model_after": after["sparsity"],
        "layers": rows,
    }
    notes = [n for r in reports for n in r.notes]
    notes += _evaluation_notes(recipe, before)
    notes += ["bytes on disk are those before LZMA"] if recipe.save.compress else []
    if engine is not None:
        notes += [ENGINE_DENSE] if zeros and not skips_zeros(engine.engine) else []
    elif not any(r.title == "accelerated" for r in reports):
        notes += [EXECUTED_DENSE] if any(not f.endswith("dense") for f in formats.values()) else []
        notes += [EXECUTED_WIDE] if any(":" in f for f in formats.values()) else []
    return Receipt(
        name=recipe.name,
        quality=quality,
        disk={"before": first, "after": now, "same_precision": sum(dense.values())},
        memory={"before": before["memory"], "after": after["memory"], "peak_rss": profiling.peak_rss()},
        sparsity=sparsity if rows else {},
        speed=speed,
        flops=flops,
        stages=tuple(r.to_dict() for r in reports if r.title != "pruned"),
        samples=samples,
        runtimes=runtimes,
        settings={
            "seed": recipe.seed,
            "seconds": seconds,
            "machine": profiling.machine(),
            **({} if engine is None else {"runs": {"before": EAGER, "after": engine_name(recipe)}}),
        },
        notes=tuple(notes),
    )


def _quality(evaluate: Evaluate, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quality before and after as a receipt has it."""
    change = (after["quality"] - before["quality"]) / max(abs(before["quality"]), 1e-12)
    loss, allowed = -change if after["higher_is_better"] else change, evaluate.max_degradation
    more = {name: {"before": value, "after": dict(after["more"])[name]} for name, value in before["more"]}
    return {
        "metric": evaluate.metric,
        "before": before["quality"],
        "after": after["quality"],
        "change": change,
        "allowed": allowed,
        "passed": None if allowed is None else loss <= allowed,
        **({"more": more} if more else {}),
    }


def _evaluation_notes(recipe: Recipe, before: Mapping[str, Any]) -> list[str]:
    e, count = recipe.evaluate, before.get("batches")
    if e is None or count is None:
        return []
    batches = "1 batch" if count == 1 else f"{count} batches"
    return [f"{e.metric} was measured on {batches}" + (", all of the data" if e.samples is None else "")]


def engine_name(recipe: Recipe) -> str:
    precision = recipe.evaluate.precision if recipe.evaluate else None
    return "Rarefy's engine" + (f", {precision}" if precision else "")


def _name_of(layer: str, stored: Mapping[str, Any]) -> str | None:
    """Return the name under which a layer's weight is stored; None for a factorized layer."""
    names = (f"{layer}.weight".lstrip("."), layer, f"{layer}.base.weight")
    return next((n for n in names if n in stored), None)


def _entries(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))
