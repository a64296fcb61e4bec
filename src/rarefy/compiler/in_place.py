"""Elementwise operators of torch that write over their input, as models do with `inplace=True`: export makes copies of
them, whose fresh memory costs more than the operator where images are large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import Node, aten, is_node
from rarefy.compiler.passes.conv import CONVOLUTIONS, TRANSPOSED
from rarefy.runtime.reference import ACTIVATIONS

OVERWRITE: dict[str, Callable[[Tensor], Tensor]] = {  # the other activations have no such form
    "relu": torch.relu_,
    "silu": partial(F.silu, inplace=True),
    "relu6": partial(F.relu6, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}
# operators whose output is memory of its own
FRESH = {*CONVOLUTIONS, *TRANSPOSED, ops.conv2d, ops.linear, ops.add, aten.add.Tensor, aten.linear.default}


def activate_(x: Tensor, act: str) -> Tensor:
    """Return act(x), written over x where that exists.

    >>> x = torch.tensor([-1.0, 2.0])
    >>> activate_(x, "relu") is x, x
    (True, tensor([0., 2.]))
    """
    return (OVERWRITE if act in OVERWRITE else ACTIVATIONS)[act](x)


def add_(x: Tensor, residual: Tensor, act: str | None = None) -> Tensor:
    """Return act(x + residual), written over x where their shapes and types agree."""
    same = x.shape == residual.shape and x.dtype == residual.dtype
    y = x.add_(residual) if same else x + residual
    return y if act is None else activate_(y, act)


FORMS: dict[Any, Callable[..., Tensor]] = {
    ops.activation: activate_,
    ops.add: add_,
    aten.relu.default: torch.relu_,
}


def overwriting(schedule: Sequence[Any], ended: Sequence[Sequence[Node]]) -> dict[Node, Callable[..., Tensor]]:
    """Return what runs instead for calls of torch whose first input is memory of its own that nothing else reads.

    Args:
        schedule: the calls of a compiled model.
        ended: for each call, the values that no later call reads.
    """
    by_torch = {call for call in schedule if is_node(call)}
    functions = {}
    for call, last in zip(schedule, ended, strict=True):
        if not is_node(call) or call.target not in FORMS or call.kwargs:
            continue
        x = call.args[0]
        if x in by_torch and x in last and len(x.users) == 1 and call.args.count(x) == 1 and x.target in FRESH:
            functions[call] = FORMS[call.target]
    return functions
