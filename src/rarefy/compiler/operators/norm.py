"""LayerNorm and RMSNorm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.spec import Call, OpSpec
from rarefy.compiler.program import Program


def norm(x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, centered: bool, groups: int = 1) -> Tensor:
    """Return LayerNorm of x [.., features], or RMSNorm if it is not centered. Each of `groups` equal groups of features
    is normalized by itself; gamma and bias are [features of a group]."""
    x = x.unflatten(-1, (groups, -1))
    y = F.layer_norm(x, x.shape[-1:], gamma, bias, eps) if centered else F.rms_norm(x, x.shape[-1:], gamma, eps)
    return (y if centered or bias is None else y + bias).flatten(-2)


def _lower(p: Program, node: Node) -> None:
    x, gamma, bias, eps, centered, groups = node.args
    source, out = p.use(p.values[x]), p.make(node)
    weights = {"gamma": p.constant(gamma), "bias": p.constant(bias)}
    p.step("norm", out, x=source, out=p.use(out), **weights, eps=eps, subtract_mean=int(centered), groups=groups)


def _affine(call: Call) -> list[Tensor]:
    return [call.constants[c.name] for c in call.node.args[1:3] if c is not None]


def _fits(call: Call) -> bool:
    width, rest = divmod(call.shapes[0][-1], call.node.args[5])
    return width > 0 and not rest and all(tuple(c.shape) == (width,) for c in _affine(call))


def _check_weights(call: Call) -> None:
    shapes = {tuple(c.shape) for c in _affine(call)}
    if len(shapes) > 1 or any(len(s) != 1 for s in shapes):
        raise ValueError(f"expected gamma and bias to be vectors of one length, got shapes {sorted(shapes)}")


OPERATORS = (
    OpSpec(
        reference=norm,
        arguments=("tensor", "constant?", "constant?", "number", "flag", "count"),
        lower=_lower,
        fits=_fits,
        per_row=True,
        check_weights=_check_weights,
    ),
)
