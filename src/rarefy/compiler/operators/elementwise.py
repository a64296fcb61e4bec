"""Sums, products and activations of tensors of one shape."""

from __future__ import annotations

from torch import Tensor

from rarefy.compiler import nhwc_channels
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.spec import ELEMENTWISE, OpSpec
from rarefy.compiler.program import Program
from rarefy.runtime import bindings
from rarefy.runtime.reference import ACTIVATIONS


def add(x: Tensor, residual: Tensor, act: str | None = None) -> Tensor:
    """Return act(x + residual)."""
    return ACTIVATIONS[act](x + residual)


def mul(x: Tensor, factor: Tensor, act: str | None = None) -> Tensor:
    """Return act(x) * factor, as gated networks do."""
    return ACTIVATIONS[act](x) * factor


def activation(x: Tensor, act: str) -> Tensor:
    """Return act(x)."""
    return ACTIVATIONS[act](x)


def _lower_add(p: Program, node: Node) -> None:
    x, residual, act = node.args
    if not nhwc_channels.lower_map(p, node, x, act, residual):
        _lower(p, node, "add", x, residual, act)


def _lower_mul(p: Program, node: Node) -> None:
    _lower(p, node, "mul", *node.args)


def _lower_activation(p: Program, node: Node) -> None:
    x, act = node.args
    if not nhwc_channels.lower_map(p, node, x, act):
        _lower(p, node, "add", x, None, act)


def _lower(p: Program, node: Node, step: str, x: Node, other: Node | None, act: str | None) -> None:
    out = p.make(node)
    extra = {} if other is None else {"other": p.use(p.values[other])}
    p.step(step, out, x=p.use(p.values[x]), out=p.use(out), act=bindings.ACTIVATIONS.index(act), **extra)


OPERATORS = (
    OpSpec(reference=add, arguments=("tensor", "tensor", "act"), lower=_lower_add, layout=ELEMENTWISE, per_row=True),
    OpSpec(reference=mul, arguments=("tensor", "tensor", "act"), lower=_lower_mul, layout=ELEMENTWISE, per_row=True),
    OpSpec(
        reference=activation, arguments=("tensor", "act"), lower=_lower_activation, layout=ELEMENTWISE, per_row=True
    ),
)
