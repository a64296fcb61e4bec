"""Run ONNX files in ONNX Runtime and, where it is installed, in OpenVINO, and compare the outputs with a model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.common.errors import ModelError, first_line
from rarefy.model.compare import relative_distance
from rarefy.model.rounding_noise import is_excused
from rarefy.onnx.verify import SMALLEST, TOLERANCE

Feeds = Mapping[str, Tensor]
Run = Callable[[Feeds], list[Tensor]]
MODEL = "the exported model"
THREADS = {"threads spin": True, "threads sleep": False}  # settings of ONNX Runtime: whether they wait in loops


def compare_with_runtimes(
    path: Path,
    calls: Sequence[tuple[str, Feeds, Sequence[Tensor]]],
    quantized: str,
    noise: Callable[[str], float] = lambda label: 0.0,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare the outputs of a file with those of the model that it was written from.

    Args:
        path: the file.
        calls: what the inputs are, inputs by name, and the model's outputs.
        quantized: how activations are quantized: "", "static" or "dynamic".
        noise: how far rounding errors move the model's own outputs for a call, by what the inputs are; twice as much
            is allowed.

    Returns:
        A row for each runtime and call, and notes: on OpenVINO where it does not agree, and on excused differences.

    Raises:
        ModelError: ONNX Runtime does not run the file, or its outputs differ.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    run = _started(onnx_runtime, path, "ONNX Runtime")
    for label, feeds, expected in calls:
        difference = _difference(run, feeds, expected, quantized, f"ONNX Runtime with {label}")
        rows.append({"runtime": "ONNX Runtime", "inputs": label, "difference": difference})
        if difference <= TOLERANCE[quantized]:
            continue
        if quantized and is_excused(difference, noise(label)):
            notes.append(
                f"outputs in ONNX Runtime with {label} differ from torch's by {difference:.0%}, about as much as "
                "rounding errors of the inputs move the model's own: judge it on data"
            )
            continue
        raise ModelError(
            f"outputs of {MODEL} in ONNX Runtime with {label} differ from torch's by {difference:.2g}, "
            f"at most {TOLERANCE[quantized]:g} is allowed; verify=False writes it unseen"
        )
    if find_spec("openvino") is None:
        return rows, notes
    try:
        run = _started(open_vino, path, "OpenVINO")
        for label, feeds, expected in calls:
            difference = _difference(run, feeds, expected, quantized, f"OpenVINO with {label}")
            rows.append({"runtime": "OpenVINO", "inputs": label, "difference": difference})
    except ModelError as error:
        return rows, [*notes, str(error)]
    worst = max((r["difference"] for r in rows if r["runtime"] == "OpenVINO"), default=0.0)
    if worst <= TOLERANCE[quantized]:
        return rows, notes
    return rows, [*notes, f"outputs of {MODEL} in OpenVINO differ from torch's by {worst:.2g}"]


def session_of(path: Path) -> Any:
    """Return a session of ONNX Runtime, with its optimizations and exact sums."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI, sums of codes overflow
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # weights alone: sums in fp32
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_for_timing(
    path: Path,
    threads: int,
    exact_sums: bool = False,
    spinning: bool = False,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> Any:
    """Return a session of ONNX Runtime.

    Args:
        path: the file.
        threads: their number.
        exact_sums: on CPUs without VNNI its 8-bit sums overflow; this prevents it, for 13 % of the time (AVX2).
        spinning: its default: threads wait in loops for 50 ms after a call, which slows an engine that is next.
        sizes: of named dimensions of the inputs, which are fixed.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    options.add_session_config_entry("session.x64quantprecision", "1" if exact_sums else "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_runtime(path: Path) -> Run:
    """Return a function that runs a file in ONNX Runtime."""
    session = session_of(path)

    def run(feeds: Feeds) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(y)) for y in session.run(None, {n: t.numpy() for n, t in feeds.items()})]

    return run


def open_vino(path: Path) -> Run:
    """Return a function that runs a file in OpenVINO, in fp32 where the file does not say otherwise."""
    import openvino  # type: ignore[import-not-found]

    core: Any = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(feeds: Feeds) -> list[Tensor]:
        results = compiled({n: t.numpy() for n, t in feeds.items()})
        return [torch.from_numpy(np.array(results[output])) for output in compiled.outputs]

    return run


def _started(start: Callable[[Path], Run], path: Path, runtime: str) -> Run:
    try:
        return start(path)
    except Exception as error:  # its own classes
        raise ModelError(f"{runtime} cannot read {MODEL}: {first_line(error)}") from None


def _difference(run: Run, feeds: Feeds, expected: Sequence[Tensor], quantized: str, where: str) -> float:
    """Return the largest relative distance of the outputs; infinity for other shapes."""
    try:
        outputs = run(feeds)
    except Exception as error:  # its own classes
        raise ModelError(f"{MODEL} fails in {where}: {first_line(error)}") from None
    if len(outputs) != len(expected):
        raise ModelError(f"{MODEL} has {len(outputs)} outputs in {where}, torch {len(expected)}")
    norm, floor = (2, 1e-12) if quantized else (math.inf, SMALLEST)
    pairs = zip(outputs, expected)
    return max((relative_distance(a, b.to(a.dtype), norm=norm, floor=floor) for a, b in pairs), default=0.0)
