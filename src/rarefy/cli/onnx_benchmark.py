"""Time an ONNX file on the engine, in ONNX Runtime and in OpenVINO, and compare their outputs: `rarefy bench FILE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rarefy.cli import onnx_files
from rarefy.common.errors import ModelError, first_line
from rarefy.common.report import Report, three_digits
from rarefy.compiler.compile import compile
from rarefy.compiler.executor import Compiled
from rarefy.evaluation import profiling
from rarefy.evaluation.example_inputs import random_inputs
from rarefy.evaluation.streams import compare_streams
from rarefy.model.compare import relative_distance
from rarefy.model.forward import describe_batch
from rarefy.model.signature import get_signature
from rarefy.onnx.runtimes import THREADS, session_for_timing

REFERENCE = "ONNX Runtime"
SECONDS, REPEATS = 3.0, (10, 200)  # of timing of one engine; at least and at most that many calls
ROUNDS = 5  # turns of an engine that several streams call
SMALLEST = 5e-4  # a reference whose largest entry is smaller is compared absolutely, as `from_onnx` does

Feed = Mapping[str, np.ndarray]
Run = Callable[[], Sequence[Any]]  # returns all outputs
Key = tuple[str, str]  # the name of an engine, and its setting


@dataclass(frozen=True)
class Engine:
    """How an engine runs a file.

    Attributes:
        name: what the report calls it.
        make: returns a function for each of n streams, each of which may use that many threads.
        is_ours: a compiled model of Rarefy, whose errors are raised.
        setting: one of several, of which the fastest counts.
    """

    name: str
    make: Callable[[int, int], list[Run]]
    is_ours: bool = False
    setting: str = ""


def bench_file(
    net: nn.Module,
    path: Path,
    precision: str | None,
    sizes: tuple[int | None, int | None],
    against: tuple[str, Compiled] | None,
    streams: int,
    repeats: int | None,
    progress: bool,
) -> Report:
    """Return a report with a row for each engine: time of a call, samples per second, and how far its outputs are from
    those of ONNX Runtime.

    Args:
        net: the module of the file, which `onnx_files.load` returned.
        path: the file.
        precision: of a second compiled model, beside the one in fp32.
        sizes: the values of --tokens and --batch.
        against: the name of a compiled model, and the model.
        streams: how many threads call each engine at once; they share the cores.
        repeats: number of timed calls; by default as many as take a few seconds.
        progress: show a progress bar.
    """
    signature: Any = get_signature(net)
    example = onnx_files.example(signature, *sizes, default_batch=1)
    tokens, batch = sizes[0] or onnx_files.TOKENS, sizes[1] or 1
    feed = {n: t.numpy() for n, t in random_inputs(signature, tokens, batch).items()}
    threads = max(1, torch.get_num_threads() // streams)
    with profiling.threads(threads):  # what is chosen by timing is chosen for as many
        engines = _engines(net, example, path, feed, precision, against)
        runs, notes = _ready(engines, streams, threads)
        outputs = {name: each[0]() for (name, _), each in runs.items()}
        differences = {n: _difference(n, outputs[n], outputs[REFERENCE]) for n in outputs if n != REFERENCE}
        not_finite = [n for n, difference in differences.items() if difference is None]
        times = _times(runs, streams, repeats, progress)
    samples = next((len(a) for a in feed.values() if a.ndim), 1)
    rows = [_row(n, *times[n], samples, times[REFERENCE][1][1], differences.get(n)) for n in outputs]
    machine = profiling.machine()
    summary = {
        "inputs": ", ".join(f"{n} {describe_batch(torch.from_numpy(a))}" for n, a in feed.items()),
        "streams": f"{streams}, each of {threads} threads" if streams > 1 else "1",
        "cpu": machine["cpu"],
        "threads": threads * streams if streams > 1 else machine["threads"],
        "load": machine["load"],
    }
    notes += [f"{n} has NaN or infinity where {REFERENCE} has none, or none where it has" for n in not_finite]
    notes += ["inputs are random numbers: differences on real ones may be smaller or larger"]
    return Report(f"bench {path}", tuple(rows), summary, tuple(notes), tuple(map(_printed, rows)))


def _engines(
    net: nn.Module,
    example: Any,
    path: Path,
    feed: Feed,
    precision: str | None,
    against: tuple[str, Compiled] | None,
) -> list[Engine]:
    """Return the engines that are compared, in the order of the report."""
    makers: dict[str, Callable[[], Compiled]] = {"Rarefy": partial(compile, net, example)}
    if precision not in (None, "fp32"):
        makers[f"Rarefy, {precision}"] = partial(compile, net, example, precision=precision)
    if against is not None:
        makers[against[0]] = partial(_same, against[1])
    engines = [Engine(name, partial(_compiled_streams, make, feed), True) for name, make in makers.items()]
    for setting, spins in THREADS.items():
        engines.append(Engine(REFERENCE, partial(_onnxruntime_streams, path, feed, spins), setting=setting))
    engines.append(Engine("OpenVINO", partial(_openvino_streams, path, feed, "f32")))
    if precision == "bf16" and profiling.native_bf16():
        engines.append(Engine("OpenVINO, bf16", partial(_openvino_streams, path, feed, "bf16")))
    return engines


def _ready(engines: Sequence[Engine], streams: int, threads: int) -> tuple[dict[Key, list[Run]], list[str]]:
    """Return the functions of all engines that run the file, each called once, and why others do not.

    Raises:
        RarefyError: if ours or ONNX Runtime does not run it.
    """
    runs: dict[Key, list[Run]] = {}
    notes: list[str] = []
    for engine in engines:
        try:
            calls = engine.make(streams, threads)
            for run in calls:
                run()
        except Exception as error:  # of other engines: their own classes
            if engine.is_ours:
                raise
            missing = isinstance(error, ImportError)
            reason = "is not installed" if missing else f"does not run the file: {first_line(error)}"
            if engine.name == REFERENCE:
                raise ModelError(f"{engine.name} {reason}") from None
            notes.append(f"{engine.name} {reason}")
        else:
            runs[engine.name, engine.setting] = calls
    return runs, notes


def _same(compiled: Compiled) -> Compiled:
    return compiled


def _compiled_streams(make: Callable[[], Compiled], feed: Feed, streams: int, threads: int) -> list[Run]:
    """Return a function for each stream that calls a compiled model; its threads are those of the calling thread."""
    compiled = make()

    def run() -> Sequence[Any]:
        if torch.get_num_threads() != threads:  # a thread of a stream
            torch.set_num_threads(threads)
        return compiled.run(None, feed)

    return [run] * streams


def _onnxruntime_streams(path: Path, feed: Feed, spins: bool, streams: int, threads: int) -> list[Run]:
    sessions = [session_for_timing(path, threads, spinning=spins) for _ in range(streams)]
    return [partial(session.run, None, feed) for session in sessions]


def _openvino_streams(path: Path, feed: Feed, precision: str, streams: int, threads: int) -> list[Run]:
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    network = core.read_model(str(path))
    network.reshape({n: list(a.shape) for n, a in feed.items()})
    settings = {
        "INFERENCE_NUM_THREADS": threads * streams,
        "NUM_STREAMS": streams,
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = core.compile_model(network, "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(streams)]
    return [partial(_openvino_outputs, r, feed) for r in requests]


def _openvino_outputs(request: Any, feed: Feed) -> Sequence[Any]:
    return list(request.infer(feed, share_inputs=True, share_outputs=True).values())


def _difference(name: str, outputs: Sequence[Any], expected: Sequence[Any]) -> float | None:
    """Return the largest distance of an output from the expected one, relative to its largest entry; None where one has
    NaN or infinity that the other has not.

    Raises:
        ModelError: for outputs of other shapes.
    """
    if [np.shape(a) for a in outputs] != [np.shape(a) for a in expected]:
        shapes = [", ".join("x".join(map(str, np.shape(a))) for a in each) for each in (outputs, expected)]
        raise ModelError(f"{name} returns {shapes[0]}, {REFERENCE} {shapes[1]}: they are other models")
    pairs = [[torch.from_numpy(np.array(a)) for a in pair] for pair in zip(outputs, expected)]
    distance = max(relative_distance(a, b, norm=math.inf, floor=SMALLEST) for a, b in pairs)
    return distance if math.isfinite(distance) else None


def _times(
    runs: Mapping[Key, list[Run]], streams: int, repeats: int | None, progress: bool
) -> dict[str, tuple[str, tuple[profiling.Times, float]]]:
    """Return for each engine its fastest setting, and with it quartiles of seconds, and calls per second."""
    return profiling.fastest_settings(_times_of_settings(runs, streams, repeats, progress), lambda t: 1 / t[1])


def _times_of_settings(
    runs: Mapping[Key, list[Run]], streams: int, repeats: int | None, progress: bool
) -> dict[Key, tuple[profiling.Times, float]]:
    pause = profiling.PAUSE  # for threads that spin
    alone = {name: each[0] for name, each in runs.items()}
    if streams > 1:
        return compare_streams(runs, seconds=SECONDS / ROUNDS, rounds=ROUNDS, progress=progress, pause=pause)
    if repeats is None:
        slowest = max(t.median for t in profiling.compare(alone, repeats=2, warmup=1).values())
        repeats = round(min(max(SECONDS / (2 * slowest + pause), REPEATS[0]), REPEATS[1]))
    times = profiling.compare(alone, repeats=repeats, progress=progress, pause=pause)
    return {name: (t, 1 / t.median) for name, t in times.items()}


def _row(
    name: str,
    setting: str,
    times: tuple[profiling.Times, float],
    samples: int,
    reference: float,
    difference: float | None,
) -> dict[str, Any]:
    quartiles, rate = times
    return {
        "of": name,
        "setting": setting,
        "unit": "ms",
        "median": 1e3 * quartiles.median,
        "low": 1e3 * quartiles.low,
        "high": 1e3 * quartiles.high,
        "repeats": quartiles.repeats,
        "samples_per_second": samples * rate,
        "speed": rate / reference,
        "difference": difference,
    }


def _printed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as it is printed."""
    return {
        "engine": ", ".join(filter(None, (row["of"], row["setting"]))),
        "ms a call": three_digits(row["median"]),
        "quartiles": f"{three_digits(row['low'])} to {three_digits(row['high'])}",
        "samples/s": three_digits(row["samples_per_second"]),
        "speed": f"{row['speed']:.2f}x",
        "difference": "-" if row["difference"] is None else f"{row['difference']:.1e}",
    }
