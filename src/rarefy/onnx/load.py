"""Load ONNX files as torch modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch  # noqa: F401 (for the example of the docstring)
from torch import nn

from rarefy.common.errors import ModelError
from rarefy.model.signature import Signature, set_signature_
from rarefy.onnx import fusions, layout, qdq
from rarefy.onnx import graph as onnx_graph
from rarefy.onnx.convert import convert
from rarefy.onnx.graph import Graph
from rarefy.onnx.read import inline_functions, read, set_input_shapes_
from rarefy.onnx.shape_inference import infer_kinds
from rarefy.onnx.signature import parameters_of, signature_of
from rarefy.onnx.verify import named_example, verify

PASSES = (
    qdq.expand_qlinear,
    qdq.fuse_integer_ops,
    onnx_graph.fold_constants,
    qdq.dequantize_weights,
    onnx_graph.fold_constants,
    qdq.fake_quantize_activations,
    onnx_graph.remove_identities,
    fusions.fuse_gelu,
    fusions.fuse_layer_norm,
    layout.fold_transposes,
    onnx_graph.remove_identities,
)


def from_onnx(path: str | Path, *, shapes: Mapping[str, Sequence[int]] | None = None, example: Any = None) -> nn.Module:
    """Return the model of an ONNX file as a module in evaluation mode, verified against ONNX Runtime.

    The module takes the file's inputs in their order or by their names, and returns the file's outputs: a tensor, or a
    list of them. Compiled, it takes and returns numpy arrays by these names, see `Compiled.run`.

    Matrix products with constant weights become Linear layers, lookups Embedding, decomposed norms and GELUs LayerNorm
    and GELU, convolutions Conv; where the file records the modules that it was traced from, layers have their names.
    Integer operators, QuantizeLinear and DequantizeLinear become quantized weights and activations as `quantize_` makes
    them, so `save` stores their codes and `accelerate_` runs them; dynamic activation scales become one for each row.
    Zeros stay zeros: `adopt_` makes masks of them. Operators from version 7 on are supported.
    Needs the extra [onnx]. Reads nothing outside the file's folder. O(weights), and one call of both.

    Args:
        path: the ONNX file.
        shapes: fixed shapes of inputs whose dimensions the file leaves dynamic; what depends on them is then computed
            once, here.
        example: inputs for the comparison: a tensor, a tuple of tensors, or a dict by the names of the inputs; random
            by default, with 0 and 1 for integers.

    Returns:
        The module. Its outputs equal those of ONNX Runtime up to rounding: 1e-3 of the largest; with quantized
        activations 5 % of the norm, and 50 % with dynamic ones, which get finer scales here. A warning says if ONNX
        Runtime could run no random input.

    Raises:
        ContainerError: there is no such file, or it is not an ONNX file.
        ModelError: operators without a torch module, by name; outputs that differ; a missing package.

    Example:
        >>> import tempfile
        >>> from rarefy.onnx.export import export_onnx
        >>> file = export_onnx(nn.Linear(4, 2), torch.randn(1, 4), tempfile.mkdtemp() + "/net.onnx")
        >>> from_onnx(file)(torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """
    model = read(path)
    path = Path(path)
    set_input_shapes_(model, path, shapes)
    return to_module(model, path, example, shapes or {})


def to_module(
    model: Any,
    path: str | Path,
    example: Any = None,
    shapes: Mapping[str, Sequence[int]] = MappingProxyType({}),
    signature: Signature | None = None,
) -> nn.Module:
    """Return the module of a model that `read` returned; see `from_onnx`.

    Args:
        model: the model, which is changed.
        path: its file.
        example: inputs for the comparison.
        shapes: shapes that `set_input_shapes_` has set.
        signature: its signature, if that is known.
    """
    signature = signature or signature_of(model)
    graph, named = to_graph(model), named_example([i.name for i in signature.inputs], example, path)
    try:
        module = convert(graph, named).eval()
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    set_signature_(module, parameters_of(module, signature))
    verify(module, path, example, shapes, _activation_kind(graph))
    return module


def to_graph(model: Any) -> Graph:
    """Return a model's graph after all passes."""
    model = inline_functions(model)
    graph = onnx_graph.read_graph(model, infer_kinds(model))
    for run_pass in PASSES:
        graph.nodes = list(run_pass(graph))
    onnx_graph.remove_unused(graph)
    return graph


def _activation_kind(graph: Graph) -> str:
    """Return how activations are quantized: "" (not at all), "static" or "dynamic"."""
    if not graph.quantized:
        return ""
    return "dynamic" if any(i.scale is None for i in graph.quantized.values()) else "static"
