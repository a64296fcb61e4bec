"""Whether a module gives what ONNX Runtime gives for the file that it was made of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError, first_line
from rarefy.model.forward import describe_batch

SIZES = (8, 32, 64, 224)  # tried in turn for dimensions that a file leaves open, after 2 for the first
NEAR = {"": 1e-3, "static": 0.05, "dynamic": 0.5}  # of the largest; of the norm where activations are rounded
HALF = 0.02  # of the largest, for floats of 16 bits
NOISE = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
WHOLE = {f"tensor({n})": n for n in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")}


@torch.no_grad()
def prove(module: nn.Module, path: Any, example: Any, shapes: Mapping[str, Sequence[int]], coded: str) -> None:
    """ModelError where outputs are others than those of ONNX Runtime, or it does not run the file; a warning where
    noise cannot be run. A call of both."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, one a kind of trouble
        raise ModelError(f"{path}: ONNX Runtime does not run this file: {first_line(error)}") from None
    why = ""
    for feeds in _tried(session.get_inputs(), example, shapes, path):
        try:
            want = session.run(None, feeds)
        except Exception as error:
            why = first_line(error)
            continue
        return _same(module, feeds, want, [o.name for o in session.get_outputs()], path, coded)
    if example is not None:
        raise ModelError(f"{path}: ONNX Runtime does not run the example: {why}")
    warnings.warn(
        f"{path}: not compared with ONNX Runtime, which noise of no size would run ({why}): give example=", stacklevel=3
    )


def _tried(
    inputs: Sequence[Any], example: Any, shapes: Mapping[str, Sequence[int]], path: Path
) -> list[dict[str, np.ndarray]]:
    names = [i.name for i in inputs]
    if example is not None:
        given = (
            example
            if isinstance(example, dict)
            else dict(zip(names, example if isinstance(example, tuple) else (example,)))
        )
        if set(given) != set(names) or not all(isinstance(t, Tensor) for t in given.values()):
            raise ModelError(f"{path} takes tensors {', '.join(names)}; example holds {describe_batch(example)}")
        return [{n: t.numpy() for n, t in given.items()}]
    if any(i.type not in NOISE and i.type not in WHOLE for i in inputs):
        return []
    return [{i.name: _noise(i, shapes.get(i.name, i.shape), size) for i in inputs} for size in SIZES]


def _noise(of: Any, dims: Sequence[Any], size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = [n if isinstance(n, int) and n > 0 else 2 if d == 0 else size for d, n in enumerate(dims)]
    if of.type in NOISE:
        return rng.standard_normal(shape).astype(NOISE[of.type])
    return rng.integers(0, 2, shape).astype(WHOLE[of.type])


def _same(
    module: nn.Module, feeds: dict[str, np.ndarray], want: Sequence[Any], names: Sequence[str], path: Path, coded: str
) -> None:
    try:
        got = module(*(torch.from_numpy(a.copy()) for a in feeds.values()))
    except Exception as error:  # whatever torch raises where shapes do not fit
        raise ModelError(
            f"{path}: the module made of it raises where ONNX Runtime runs: {first_line(error)}"
        ) from error
    found = [got] if isinstance(got, Tensor) else list(got)
    if len(found) != len(want):
        raise ModelError(f"{path}: the module made of it has {len(found)} outputs, ONNX Runtime {len(want)}")
    for name, ours, theirs in zip(names, found, want):
        said = f"{path}: output {name} of the module made of it is not what ONNX Runtime gives"
        if tuple(ours.shape) != theirs.shape or str(ours.dtype).removeprefix("torch.") != str(theirs.dtype):
            there = f"{theirs.dtype} {'x'.join(map(str, theirs.shape))}"
            raise ModelError(f"{said}: {describe_batch(ours)}, where that gives {there}")
        off = _apart(ours, torch.from_numpy(np.asarray(theirs)), coded)
        if not off <= (HALF if ours.dtype in (torch.float16, torch.bfloat16) and not coded else NEAR[coded]):
            raise ModelError(f"{said}: off by {off:.2g}, so some operator is read wrongly")


def _apart(ours: Tensor, theirs: Tensor, coded: str) -> float:
    """How far outputs are apart: of the largest, of the norm where codes are rounded; the share of whole numbers."""
    if ours.numel() == 0:
        return 0.0
    if not theirs.is_floating_point():
        return float((ours != theirs).double().mean())
    a, b = ours.double(), theirs.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a.nan_to_num(posinf=0, neginf=0), b.nan_to_num(posinf=0, neginf=0)
    if coded:
        return float((a - b).norm() / b.norm().clamp(min=1e-12))
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
