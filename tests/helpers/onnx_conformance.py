"""The ONNX project's own tests of single operators (the package `onnx` makes them), run through our importer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from rarefy.common.errors import ModelError
from rarefy.onnx.convert import convert
from rarefy.onnx.dtypes import DTYPES, to_array, to_tensor
from rarefy.onnx.load import to_graph

OTHER_DOMAINS = ("ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training")
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
TOLERANCES = {"float16": (1e-3, 1e-3), "bfloat16": (2e-2, 1e-6)}  # relative and absolute; others (1e-3, 1e-6)


@dataclass(frozen=True)
class Case:
    """A test: an operator on some inputs, with its outputs.

    Attributes:
        name: the name that ONNX gives it.
        operator: the operator whose test it is; of a test of an operator's definition by others the first of those.
        model: the model.
        data: pairs of inputs and outputs.
        rtol: the relative tolerance.
        atol: the absolute tolerance.
    """

    name: str
    operator: str
    model: Any
    data: Any
    rtol: float
    atol: float

    @property
    def expanded(self) -> bool:
        """Whether it is an operator's definition by other operators."""
        return "_expanded" in self.name


def collect() -> list[Case]:
    """Return the tests of tensors of numbers, without random operators and training."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)  # type: ignore[arg-type]
    return [Case(c.name, _operator(c), c.model, c.data_sets, c.rtol, c.atol) for c in cases if _counts(c.name, c.model)]


def _operator(case: Any) -> str:
    nodes = case.model.graph.node
    return nodes[0].op_type if len(nodes) else "none"


def _counts(name: str, model: Any) -> bool:
    """Whether a test is of tensors of numbers and neither random nor of training."""
    values = [*model.graph.input, *model.graph.output]
    tensors = all(v.type.HasField("tensor_type") for v in values)
    numbers = tensors and all(v.type.tensor_type.elem_type != TensorProto.STRING for v in values)
    operators = {n.op_type for n in model.graph.node}
    sequences = any(o.startswith(("Sequence", "Optional")) or o.endswith("Sequence") for o in operators)
    sequences = sequences and "ReverseSequence" not in operators
    other = any(n.domain in OTHER_DOMAINS for n in model.graph.node) or operators & set(RANDOM)
    return numbers and not sequences and not other and "training" not in name and "train" not in name.split("_")


def has_torch_types(case: Case) -> bool:
    """Whether torch has the types of all inputs and outputs: it has no integers or floats of 4 bits and less."""
    return all(v.type.tensor_type.elem_type in DTYPES for v in [*case.model.graph.input, *case.model.graph.output])


def outcome(case: Case) -> tuple[str, str]:
    """Return "passed", "refused" or "wrong", and why."""
    try:
        graph = to_graph(onnx.ModelProto.FromString(case.model.SerializeToString()))
        module = convert(graph).eval()
        for inputs, outputs in case.data:
            with torch.no_grad():
                results = module(*(to_tensor(_array(i)) for i in inputs))
            results = [results] if isinstance(results, torch.Tensor) else list(results)
            if len(results) != len(outputs):
                return "wrong", f"{len(results)} outputs, expected {len(outputs)}"
            for result, expected in zip(results, outputs):
                if problem := _difference(to_array(result), _array(expected), case):
                    return "wrong", problem
    except ModelError as error:
        return "refused", str(error)
    return "passed", ""


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def _difference(result: np.ndarray, expected: np.ndarray, case: Case) -> str:
    """How an output differs from what is expected; empty if it does not."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{result.dtype}{list(result.shape)}, expected {expected.dtype}{list(expected.shape)}"
    kind = str(expected.dtype)
    if expected.dtype.kind in "iub" and "float" not in kind:
        return "" if np.array_equal(result, expected) else "other integers"
    rtol, atol = TOLERANCES.get(kind, (1e-3, 1e-6))
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    close = np.isclose(
        result.astype(wide), expected.astype(wide), max(case.rtol, rtol), max(case.atol, atol), equal_nan=True
    )
    return "" if close.all() else f"{(~close).sum()} of {close.size} elements differ"
