"""Compare the outputs of a converted module with those of ONNX Runtime."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rarefy.common.errors import ModelError, first_line
from rarefy.model.compare import relative_distance
from rarefy.model.forward import describe_batch

SIZES = (8, 32, 64, 224)  # tried for dynamic dimensions; 2 for the first dimension
MAX_ELEMENTS = 1 << 25  # of all values of a small model on random inputs, which a damaged file may make huge
MANY_WEIGHTS = 1 << 20  # from which a model is not small
TOLERANCE = {
    "": 1e-3,
    "static": 0.05,
    "dynamic": 0.5,
}  # of the largest output; of the norm if activations are quantized
TOLERANCE_16_BIT = 0.02  # of the largest output
SMALLEST = 5e-4  # outputs below are compared absolutely: ONNX Runtime's sigmoid of -40 has an error of 1e-7
FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
INTEGERS = {
    f"tensor({n})": n for n in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
}


@torch.no_grad()
def verify(module: nn.Module, path: Any, example: Any, shapes: Mapping[str, Sequence[int]], quantized: str) -> None:
    """Raise ModelError unless the outputs are those of ONNX Runtime; warn if ONNX Runtime runs no random input.

    Args:
        module: the converted module.
        path: the ONNX file.
        example: inputs; random numbers by default, 0 and 1 for integers.
        shapes: shapes of inputs by name.
        quantized: how activations are quantized: "", "static" or "dynamic"; decides the tolerance.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, one a kind of trouble
        raise ModelError(f"{path}: ONNX Runtime does not run this file: {first_line(error)}") from None
    why, failed = "", ""
    inputs = session.get_inputs()
    for sizes in [{}] if example is not None else _candidate_sizes(inputs, shapes):
        if example is None and (count := _elements(module, inputs, sizes)) > MAX_ELEMENTS:
            why = f"its values would have {count:,} elements"
            continue
        named = named_example([i.name for i in inputs], example, path)
        feeds = {n: t.numpy() for n, t in named.items()} or {i.name: _random_input(i, sizes[i.name]) for i in inputs}
        try:
            expected = session.run(None, feeds)
        except Exception as error:
            why = first_line(error)
            continue
        try:
            outputs = module(*(torch.from_numpy(a.copy()) for a in feeds.values()))
        except Exception as error:  # whatever torch raises where shapes do not fit, as for images that are too small
            failed = first_line(error)
            continue
        return _compare(outputs, expected, [o.name for o in session.get_outputs()], path, quantized)
    if failed:
        sizes = "" if example is not None else "; give sizes that the model is made for: example= or shapes="
        raise ModelError(f"{path}: the converted module raises an error where ONNX Runtime runs: {failed}{sizes}")
    if example is not None:
        raise ModelError(f"{path}: ONNX Runtime does not run the example: {why}")
    warnings.warn(
        f"{path}: not compared with ONNX Runtime, which runs no random input ({why}): give example=", stacklevel=3
    )


def _candidate_sizes(inputs: Sequence[Any], shapes: Mapping[str, Sequence[int]]) -> list[dict[str, list[int]]]:
    """Return shapes of random inputs that are tried in turn."""
    if any(i.type not in FLOATS and i.type not in INTEGERS for i in inputs):
        return []
    dims = {i.name: shapes.get(i.name, i.shape) for i in inputs}
    return [
        {
            name: [n if isinstance(n, int) and n > 0 else 2 if d == 0 else size for d, n in enumerate(shape)]
            for name, shape in dims.items()
        }
        for size in SIZES
    ]


def _elements(module: nn.Module, inputs: Sequence[Any], sizes: Mapping[str, Sequence[int]]) -> int:
    """Return how many elements all values of a small model have together, as far as that depends on no values.

    0 for a model with many weights, whose values are expected to be large. O(operators).
    """
    tensors = {n: t.to("meta") for n, t in [*module.named_parameters(), *module.named_buffers()]}
    if sum(t.numel() for t in tensors.values()) > MANY_WEIGHTS:
        return 0
    types = {i.name: i.type.removeprefix("tensor(").removesuffix(")") for i in inputs}
    dtypes = {"float": torch.float32, "double": torch.float64}
    with _Counter() as counter, suppress(Exception):  # whatever torch raises where values are needed
        types_of = {n: dtypes.get(k, getattr(torch, k, None)) for n, k in types.items()}
        feeds = tuple(torch.empty(sizes[n], dtype=t, device="meta") for n, t in types_of.items())
        functional_call(module, tensors, feeds)
    return counter.elements


class _Counter(TorchDispatchMode):
    """A context that counts the elements of what operators return."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


def named_example(names: Sequence[str], example: Any, path: Any) -> dict[str, Tensor]:
    """Return an example by the names of the inputs; ModelError if it does not hold a tensor for each."""
    if example is None:
        return {}
    tensors = (
        example
        if isinstance(example, dict)
        else dict(zip(names, example if isinstance(example, tuple) else (example,)))
    )
    if set(tensors) != set(names) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ModelError(f"{path} takes tensors {', '.join(names)}; example holds {describe_batch(example)}")
    return tensors


def _random_input(tensor: Any, shape: Sequence[int]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if tensor.type in FLOATS:
        return rng.standard_normal(shape).astype(FLOATS[tensor.type])
    return rng.integers(0, 2, shape).astype(INTEGERS[tensor.type])


def _compare(outputs: Any, expected: Sequence[Any], names: Sequence[str], path: Path, quantized: str) -> None:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if len(outputs) != len(expected):
        raise ModelError(f"{path}: the converted module has {len(outputs)} outputs, ONNX Runtime {len(expected)}")
    for name, ours, theirs in zip(names, outputs, expected):
        differs = f"{path}: output {name} of the converted module differs from ONNX Runtime"
        if tuple(ours.shape) != theirs.shape or str(ours.dtype).removeprefix("torch.") != str(theirs.dtype):
            dtype_and_shape = f"{theirs.dtype} {'x'.join(map(str, theirs.shape))}"
            raise ModelError(f"{differs}: {describe_batch(ours)}, expected {dtype_and_shape}")
        norm = 2 if quantized else math.inf
        distance = relative_distance(
            ours, torch.from_numpy(np.asarray(theirs)), norm=norm, floor=1e-12 if quantized else SMALLEST
        )
        half = ours.dtype in (torch.float16, torch.bfloat16) and not quantized
        if not distance <= (TOLERANCE_16_BIT if half else TOLERANCE[quantized]):
            raise ModelError(f"{differs}: by {distance:.2g}, so an operator is converted wrongly")
