"""The dense model in ONNX Runtime and OpenVINO: its quality and times there, beside the models of a search.

Each engine that is installed runs it at its best settings: torch's number of threads, sizes fixed where it is faster
with them, and 8 bits calibrated on the data of the search. ONNX Runtime is timed with threads that spin after a call,
and with those that sleep; the faster counts. Spinning ones fall asleep in a pause between calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn

from rarefy.common.errors import first_line
from rarefy.evaluation.profiling import PAUSE, fastest_settings, native_bf16
from rarefy.evaluation.quality import Metric
from rarefy.model import hf
from rarefy.model.batches import count_samples
from rarefy.model.forward import call, without_targets
from rarefy.onnx.engines import (
    Callee,
    Feed,
    Started,
    feed_of,
    has_attention,
    nesting_of,
    onnx_runtime,
    openvino,
    quietly,
    settings_note,
)
from rarefy.onnx.export import export_onnx
from rarefy.onnx.runtimes import THREADS
from rarefy.pipeline.speed import resize_batch
from rarefy.search.deploy import SECONDS, times_in_turns

SAMPLES = 128  # at most, for calibration
NO_TIME = "their part of the time is over"
PACKAGES = ("onnxscript", "onnxruntime", "openvino", "nncf")


def measured_engines(
    dense: nn.Module,
    example: Any,
    data: Sequence[Any],
    metric: Metric,
    batches: Sequence[str],
    ours: Any,
    has_time: Callable[[float], bool] = lambda seconds: True,
) -> dict[str, Any]:
    """Measure the dense model in the other engines.

    Args:
        dense: the model.
        example: what it can be called with.
        data: batches to calibrate 8 bits with; without any, only fp32 and bf16 are measured.
        metric: how good a model is.
        batches: batch sizes that are timed.
        ours: the dense model, compiled, whose calls take turns with the others.
        has_time: whether a step of so many seconds fits into the time; what does not is left out.

    Returns:
        "rows", each with name, quality, milliseconds (quartiles for each batch), times as fast as ours and the fastest
        setting; and "notes" on engines that do not run the model, or that there was no time for, and on settings.
    """
    if hf.is_causal_lm(dense):
        return {"rows": [], "notes": ["other engines are not measured on language models"]}
    missing = missing_packages()
    notes = [f"other engines need packages that are not installed: {', '.join(missing)}"] if missing else []
    example, rows, started, longest = without_targets(example), dict[str, Any](), dict[str, Started](), 0.0
    with TemporaryDirectory() as place:
        try:
            spec = nesting_of(dense, example)
            file = export_onnx(dense, example, Path(place) / "model.onnx", verify=False).path
            feeds = [feed_of(dense, without_targets(b)) for b in _first(data, SAMPLES)]
        except Exception as error:  # the exporter has its own classes
            return {"rows": [], "notes": [*notes, f"other engines are not measured: {first_line(error)}"]}
        for name, start in _makers(file, feeds).items():
            if not has_time(longest):
                notes.append(f"{name} was not measured: {NO_TIME}")
                continue
            began = time.perf_counter()
            try:
                with quietly():
                    started[name] = start()
                    quality = metric.measure(Callee(dense, started[name].run, spec))
                rows[name] = {"name": name, "quality": quality, "milliseconds": {}, "speedup": {}, "settings": {}}
            except Exception as error:  # engines have their own classes
                notes.append(f"{name} does not run the model: {first_line(error)}")
            longest = max(longest, time.perf_counter() - began)
        for batch in batches if rows else ():
            if not has_time(SECONDS * (len(THREADS) * len(rows) + 1)):
                notes.append(f"other engines were not timed at batch {batch}: {NO_TIME}")
                continue
            _add_times(rows, notes, started, dense, resize_batch(example, int(batch)), batch, ours)
    notes += [note for name, row in rows.items() for note in settings_note(name, row["settings"])]
    return {"rows": list(rows.values()), "notes": notes}


def missing_packages() -> list[str]:
    """Return the packages of other engines that are not installed."""
    return [name for name in PACKAGES if not find_spec(name)]


def _add_times(
    rows: dict[str, Any], notes: list[str], started: Mapping[str, Started], dense: nn.Module, inputs: Any, batch: str,
    ours: Any,
) -> None:  # fmt: skip
    """Add the times at a batch size to the rows; an engine that fails loses its row, and a note says so."""
    runs: dict[tuple[str, str], Callable[[], Any]] = {("ours", ""): partial(call, ours, inputs)}
    for name in list(rows):
        try:
            with quietly():
                calls = started[name].fixed(feed_of(dense, inputs))
                for run in calls.values():
                    run()
            runs |= {(name, setting): run for setting, run in calls.items()}
        except Exception as error:
            notes.append(f"{name} does not run batch {batch}: {first_line(error)}")
            del rows[name]
    try:
        times = fastest_settings(times_in_turns(runs, PAUSE), lambda t: t["median"])
    except Exception as error:
        notes.append(f"other engines could not be timed at batch {batch}: {first_line(error)}")
        rows.clear()
    for name, row in rows.items():
        row["settings"][batch], row["milliseconds"][batch] = times[name]
        row["speedup"][batch] = times["ours"][1]["median"] / times[name][1]["median"]


def _first(data: Sequence[Any], samples: int) -> Iterator[Any]:
    """Yield batches of about so many samples in all."""
    for batch in data:
        if samples <= 0:
            return
        yield batch
        samples -= count_samples(batch)


def _makers(file: Path, feeds: Sequence[Feed]) -> dict[str, Callable[[], Started]]:
    """Return what starts each engine, in each precision, that is installed."""
    makers: dict[str, Callable[[], Started]] = {}
    if find_spec("onnxruntime"):
        makers["ONNX Runtime, fp32"] = partial(onnx_runtime, file)
        if feeds:
            makers["ONNX Runtime, int8"] = lambda: onnx_runtime(_in_8_bits(file, feeds))
    if find_spec("openvino"):
        makers["OpenVINO, fp32"] = partial(openvino, file, "f32")
        best = "bf16" if native_bf16() else "f32"
        if native_bf16():
            makers["OpenVINO, bf16"] = partial(openvino, file, best)
        if feeds and find_spec("nncf"):
            makers["OpenVINO, int8"] = partial(_openvino_int8, file, best, feeds)
    return makers


def _in_8_bits(file: Path, feeds: Sequence[Feed]) -> Path:
    """Return a file in ONNX Runtime's 8 bits: of texts with activations rounded in each call, which is faster there and
    loses less; of all else with ranges of the calibration data."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    out = file.with_suffix(".int8.onnx")
    common: dict[str, Any] = {"per_channel": True, "weight_type": quantization.QuantType.QInt8}
    if _reads_texts(feeds):
        quantization.quantize_dynamic(str(file), str(out), **common)
        return out
    prepared = str(file.with_suffix(".prepared.onnx"))
    quant_pre_process(str(file), prepared, skip_symbolic_shape=True)
    common["activation_type"] = quantization.QuantType.QUInt8
    quantization.quantize_static(prepared, str(out), _reader(feeds), **common)
    return out


def _reads_texts(feeds: Sequence[Feed]) -> bool:
    return any(np.issubdtype(a.dtype, np.integer) for a in feeds[0].values())


def _reader(feeds: Sequence[Feed]) -> Any:
    """Return batches as ONNX Runtime reads them for calibration."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict[str, Any]:
            return next(self.left, None)  # type: ignore[return-value]

    return Reader()


def _openvino_int8(file: Path, precision: str, feeds: Sequence[Feed]) -> Started:
    """Return OpenVINO with a file in 8 bits, found on calibration data; all else has the precision."""
    return openvino(file, precision, lambda network: _calibrated(network, feeds, has_attention(file)))


def _calibrated(network: Any, feeds: Sequence[Feed], is_transformer: bool) -> Any:
    """Return a network in the 8 bits of NNCF, OpenVINO's own tool."""
    import nncf  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"subset_size": len(feeds)}
    if is_transformer:
        options["model_type"] = nncf.ModelType.TRANSFORMER
    return nncf.quantize(network, nncf.Dataset(list(feeds)), **options)
