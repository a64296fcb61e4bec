"""The result of a recipe in other runtimes: exported to ONNX, its quality and times there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from rarefy.common.errors import RecipeError, first_line
from rarefy.common.extras import install
from rarefy.evaluation import profiling
from rarefy.evaluation.quality import Metric
from rarefy.model import hf
from rarefy.model.batches import count_samples
from rarefy.model.forward import call, evaluating, without_targets
from rarefy.onnx.engines import Callee, Started, feed_of, nesting_of, onnx_runtime, openvino, quietly, settings_note
from rarefy.onnx.export import export_onnx
from rarefy.pipeline.speed import resize_batch
from rarefy.recipe.schema import Evaluate

REPEATS = 20  # timed calls, where the recipe does not say
STARTERS: dict[str, tuple[str, Callable[[Path], Started]]] = {  # by the names of recipes
    "onnxruntime": ("ONNX Runtime", onnx_runtime),
    "openvino": ("OpenVINO", openvino),
}
IN_EXTRA = ("onnxscript", "onnxruntime")  # packages of the extra onnx


def check_runtimes(evaluate: Evaluate | None, model: nn.Module) -> None:
    """Raise RecipeError where runtimes cannot be measured: for language models, and without their packages."""
    if evaluate is None or not evaluate.runtimes:
        return
    if hf.is_causal_lm(model):
        raise RecipeError("evaluate.runtimes has no effect on language models, whose cache ONNX files do not have")
    missing = [p for p in ("onnxscript", *evaluate.runtimes) if find_spec(p) is None]
    if missing:
        extra = [install("onnx")] if set(missing) & {*IN_EXTRA} else []
        others = [f"pip install {p}" for p in missing if p not in IN_EXTRA]
        raise RecipeError(f"evaluate.runtimes needs {', '.join(missing)}: {' and '.join([*extra, *others])}")


def measured_runtimes(
    model: nn.Module,
    evaluate: Evaluate,
    metric: Metric,
    held_out: Any,
    subject: tuple[str, nn.Module],
    quality: float,
) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Measure a compressed model in other runtimes, all timed in turns with what the receipt measured.

    Args:
        model: the model, masks folded.
        evaluate: names the runtimes, the batch sizes and the number of timed calls.
        metric: how good a model is.
        held_out: the evaluation batches; the first one is the example.
        subject: the name and the model that the receipt measured.
        quality: of that model.

    Returns:
        Rows of runtime, quality, milliseconds and the fastest setting, that of the subject first; and notes on settings
        and on runtimes that do not run the model.
    """
    example = without_targets(next(iter(held_out)))
    sizes = evaluate.latency.batch if evaluate.latency else (count_samples(example),)
    repeats = evaluate.latency.repeats if evaluate.latency else REPEATS
    rows: list[dict[str, Any]] = [{"runtime": subject[0], "quality": quality, "milliseconds": {}, "settings": {}}]
    started: dict[str, Started] = {}
    notes: list[str] = []
    with TemporaryDirectory() as place, evaluating(model), evaluating(subject[1]):
        try:
            spec = nesting_of(model, example)
            file = export_onnx(model, example, Path(place) / "model.onnx", verify=False).path
        except Exception as error:  # the exporter has its own classes
            return (), (f"other runtimes were not measured: {first_line(error)}",)
        for name, start in (STARTERS[r] for r in evaluate.runtimes):
            try:
                with quietly():
                    started[name] = start(file)
                    value = metric.measure(Callee(model, started[name].run, spec))
                rows.append({"runtime": name, "quality": value, "milliseconds": {}, "settings": {}})
            except Exception as error:  # runtimes have their own classes
                started.pop(name, None)
                notes.append(f"{name} does not run the model: {first_line(error)}")
        for size in sizes:
            inputs = resize_batch(example, size)
            runs: dict[tuple[str, str], Callable[[], Any]] = {(subject[0], ""): partial(call, subject[1], inputs)}
            for name in started:
                try:
                    with quietly():
                        calls = started[name].fixed(feed_of(model, inputs))
                        for run in calls.values():
                            run()
                    runs |= {(name, setting): run for setting, run in calls.items()}
                except Exception as error:
                    notes.append(f"{name} does not run batch {size}: {first_line(error)}")
            every = profiling.compare(runs, repeats=repeats, pause=profiling.PAUSE)
            times = profiling.fastest_settings(every, lambda t: t.median)
            for row in (r for r in rows if r["runtime"] in times):
                row["settings"][str(size)], t = times[row["runtime"]]
                row["milliseconds"][str(size)] = {"median": 1e3 * t.median, "low": 1e3 * t.low, "high": 1e3 * t.high}
    notes += [note for row in rows for note in settings_note(row["runtime"], row["settings"])]
    return tuple(rows), tuple(notes)
