"""Bind the inputs and attributes of an ONNX node to the parameters of its function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError, first_line
from rarefy.onnx.dtypes import stored_array
from rarefy.onnx.operators.shape import MAX_ELEMENTS
from rarefy.onnx.operators.signature import Function, Signature, signature_of
from rarefy.onnx.operators.table import FUSED_OPERATORS, OPERATORS

RANDOM = ("Bernoulli", "Dropout")
HINTS = ("consumed_inputs",)  # attributes without a meaning


def node_label(node: Any) -> str:
    """Return the name of a node for messages."""
    return node.name or next((o for o in node.output if o), node.op_type)


def operator_name(node: Any) -> str:
    """Return the operator of a node with its domain, if that is not ONNX's."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def function_of(node: Any) -> Function | None:
    """Return the function of a node's operator, None for an unknown one."""
    if node.domain in ("", "ai.onnx"):
        return OPERATORS.get(node.op_type, FUSED_OPERATORS.get(node.op_type))
    return FUSED_OPERATORS.get(node.op_type) if node.domain == "com.microsoft" else None


def attributes_of(node: Any) -> dict[str, Any]:
    """Return the attributes of a node as numbers, strings and tuples; of an array of one number, that and its type."""
    from onnx import helper

    values: dict[str, Any] = {}
    for item in node.attribute:
        value = helper.get_attribute_value(item)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, list | tuple) or hasattr(value, "append"):
            value = tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value)
        elif item.HasField("t"):
            array = stored_array(item.t, f"{node_label(node)}: {item.name} is damaged")
            if array.size != 1:
                raise ModelError(f"{node_label(node)}: {item.name} holds {array.size} numbers, one is read")
            values["dtype"], value = item.t.data_type, array.reshape(-1)[0].item()
        values[item.name] = value
    return values


def options(node: Any, function: Function, opset: int) -> dict[str, Any]:
    """Return the attributes that a function takes, with the version and the number of outputs if it asks for them."""
    signature, values = signature_of(function), attributes_of(node)
    unknown = [n for n in values if n not in (*signature.attributes, *signature.inputs, *HINTS)]
    if unknown:
        raise ModelError(f"{node_label(node)}: the attribute {unknown[0]!r} of {operator_name(node)} is not supported")
    values = {n: v for n, v in values.items() if n not in HINTS}
    if "opset" in signature.attributes:
        values["opset"] = opset
    if "outputs" in signature.attributes:
        values["outputs"] = len(node.output)
    return values


def check_count(node: Any, signature: Signature, count: int, attributes: dict[str, Any]) -> None:
    """Raise ModelError for a node with too many inputs, or too few."""
    if not signature.variadic and count > len(signature.inputs):
        raise ModelError(f"{node_label(node)}: {operator_name(node)} with {count} inputs is not supported")
    missing = [n for n in signature.inputs[count : signature.required] if n not in attributes]
    if missing:
        raise ModelError(f"{node_label(node)}: {operator_name(node)} needs its input {missing[0]!r}")


def evaluate(node: Any, inputs: Sequence[Tensor | None], opset: int) -> tuple[Tensor, ...] | None:
    """Return the outputs of a node whose inputs are constants; None for unknown operators and too large outputs."""
    function = function_of(node)
    if function is None or node.op_type in RANDOM:
        return None
    signature, named = signature_of(function), options(node, function, opset)
    inputs = list(inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    check_count(node, signature, len(inputs), named)
    arguments: list[Any] = []
    for i, value in enumerate(inputs):
        name = signature.inputs[i] if i < len(signature.inputs) else ""
        if value is not None and name in signature.tuples:
            arguments.append(tuple(value.reshape(-1).tolist()))
        elif value is not None and name in signature.numbers and value.numel() == 1 and value.dim() < 2:
            arguments.append(value.item() if _is_plain(node) else value)
        else:
            arguments.append(value)
    try:
        if not _fits(function, arguments, named):
            return None
        result = function(*arguments, **named)
    except ModelError as error:
        raise ModelError(f"{node_label(node)}: {error}") from None
    except Exception as error:  # whatever torch raises where shapes do not fit
        message = f"{node_label(node)}: {operator_name(node)} of constants fails: {first_line(error)}"
        raise ModelError(message) from error
    results = result if isinstance(result, tuple) else (result,)
    return tuple(r.contiguous() if isinstance(r, Tensor) else r for r in results)


def _is_plain(node: Any) -> bool:
    """Return whether numbers may stand for tensors of one number: not where they decide the type of the output."""
    return node.op_type not in ("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Range")


def _fits(function: Function, arguments: list[Any], named: dict[str, Any]) -> bool:
    """Return whether the outputs are small enough to be computed, as far as shapes are known without computing."""
    size = sum(a.numel() for a in arguments if isinstance(a, Tensor))
    try:
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        result = function(*meta, **named)
    except ModelError:
        raise
    except Exception:  # torch cannot tell, or the function reads values
        return size <= MAX_ELEMENTS
    results = result if isinstance(result, tuple) else (result,)
    return sum(r.numel() for r in results if isinstance(r, torch.Tensor)) <= max(MAX_ELEMENTS, 2 * size)
