"""Models in bf16 and fp16: a copy in fp32 is compiled, whose inputs and outputs are converted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError, first_line
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import aten
from rarefy.compiler.input_checks import InputSpec

PRECISION_OF: dict[torch.dtype, str | None] = {torch.float32: None, torch.bfloat16: "bf16", torch.float16: None}


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of a model's floating-point parameters; ModelError where they have several, or another one."""
    dtypes = {n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()}
    first = next(iter(dtypes), None)
    if first is None:
        return torch.float32
    other = next((n for n, dtype in dtypes.items() if dtype != dtypes[first]), first)
    names = [f"{n} is {str(dtypes[n]).removeprefix('torch.')}" for n in (other, first)]
    if other != first:
        raise ModelError(f"the engine needs a model of one type, but {' and '.join(names)}: call model.float() first")
    if dtypes[first] not in PRECISION_OF:
        raise ModelError(f"the engine needs a model in fp32, bf16 or fp16, but {names[0]}: call model.float() first")
    return dtypes[first]


def precision_to_run(precision: str | None, dtype: torch.dtype) -> str | None:
    """Return the precision in which a model of a dtype runs, None for fp32; without a given one, that of the model.

    >>> precision_to_run(None, torch.bfloat16), precision_to_run("fp32", torch.bfloat16)
    ('bf16', None)
    """
    return PRECISION_OF[dtype] if precision is None else None if precision == "fp32" else precision


def copy_in_fp32(model: nn.Module) -> nn.Module:
    """Return a copy of a model in fp32. Shared parameters stay shared. O(parameters)."""
    new: dict[int, Any] = {}
    for p in model.parameters():
        new[id(p)] = nn.Parameter(_in_fp32(p.detach()), p.requires_grad)
    for b in model.buffers():
        new[id(b)] = _in_fp32(b)
    try:
        return copy.deepcopy(model, new)
    except Exception as error:  # raised by whatever the model holds
        name = type(model).__name__
        raise ModelError(f"{name} cannot be copied to fp32: call float() first ({first_line(error)})") from error


def in_fp32(arguments: Any) -> Any:
    """Return arguments, nested, with all bf16 and fp16 tensors in fp32."""
    return pytree.tree_map_only(Tensor, _in_fp32, arguments)


def _in_fp32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in PRECISION_OF else t


def dtypes_of(values: Any) -> list[torch.dtype | None]:
    """Return the types of nested tensors in order, None for what is no tensor."""
    return [t.dtype if isinstance(t, Tensor) else None for t in pytree.tree_leaves(values)]


def convert_ends(compiled: Compiled, inputs: Sequence[Any], outputs: Sequence[Any], dtype: torch.dtype) -> None:
    """Let a compiled model take inputs and return outputs of other types.

    Args:
        compiled: a compiled model in fp32.
        inputs: the type of each input, in the graph's order.
        outputs: the type of each output.
        dtype: of outputs in fp32, where there are other outputs than the graph's.
    """
    graph = compiled.exported.graph
    for i, (node, wanted) in enumerate(zip(compiled.exported.inputs, inputs)):
        spec = compiled.input_specs[i]
        if not isinstance(spec, InputSpec) or wanted == spec.dtype:
            continue
        compiled.input_specs[i] = replace(spec, dtype=wanted)
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            converted = graph.call_function(aten.to.dtype, (node, spec.dtype))
        node.replace_all_uses_with(converted, delete_user_cb=lambda user, new=converted: user is not new)
    (end,) = (n for n in graph.nodes if n.op == "output")
    values = end.args[0]
    if len(outputs) != len(values):
        outputs = [dtype] * len(values)
    new = []
    for value, wanted in zip(values, outputs):
        if isinstance(value, fx.Node) and wanted in PRECISION_OF and wanted != torch.float32:
            with graph.inserting_before(end):
                value = graph.call_function(aten.to.dtype, (value, wanted))
        new.append(value)
    end.args = (tuple(new),)
    compiled.reschedule()
