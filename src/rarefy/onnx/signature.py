"""The inputs and outputs that an ONNX file declares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from rarefy.common.errors import ModelError
from rarefy.model.signature import ModelInput, Signature
from rarefy.onnx.dtypes import dtype_of

MAX_CASTS = 4  # between an input and the embedding that reads it


def signature_of(model: Any) -> Signature:
    """Return the signature of an ONNX model; ModelError for inputs that are not tensors."""
    held = {i.name for i in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name in held:
            continue
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"the input {value.name} is no tensor")
        tensor = value.type.tensor_type
        dtype = dtype_of(tensor.elem_type, f"the input {value.name}")
        dims = tuple(d.dim_value if d.dim_value > 0 else d.dim_param for d in tensor.shape.dim)
        known = dims if tensor.HasField("shape") else None
        num_values = 256 if dtype == torch.uint8 else 2
        inputs.append(ModelInput(value.name, value.name, dtype, known, num_values))
    return Signature(tuple(inputs), tuple(o.name for o in model.graph.output))


def parameters_of(module: fx.GraphModule, signature: Signature) -> Signature:
    """Return a signature with the parameters of the converted module, and the rows of embeddings that read inputs."""
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [
        replace(i, parameter=str(node.target), num_values=_num_rows(module, node, MAX_CASTS) or i.num_values)
        for i, node in zip(signature.inputs, nodes)
    ]
    return replace(signature, inputs=tuple(inputs))


def _num_rows(module: fx.GraphModule, node: fx.Node, depth: int) -> int | None:
    """Return the number of rows of the embedding that reads a value, directly or converted."""
    for user in node.users:
        layer = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(layer, nn.Embedding):
            return layer.num_embeddings
        if len(user.all_input_nodes) == 1 and depth:
            rows = _num_rows(module, user, depth - 1)
            if rows is not None:
                return rows
    return None
