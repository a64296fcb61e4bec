"""Fake quantization: values rounded to 8-bit codes with one scale for all, as models have it that come quantized."""

from __future__ import annotations

from torch import Tensor

from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.operators.spec import ELEMENTWISE, OpSpec
from rarefy.compiler.program import Program, is_depthwise
from rarefy.model.activation_quant import ActivationQuant


def fake_quantize(x: Tensor, scale: float, zero: int) -> Tensor:
    """Return the numbers that 8-bit codes of x stand for; zero is the code of 0, from 0 to 255."""
    return ActivationQuant(8, scale, zero)(x)


def grid_of(node: Node) -> ActivationQuant | None:
    """Return the grid on which a node's output is by fake quantization, None for another node."""
    return ActivationQuant(8, *node.args[1:]) if node.target is fake_quantize else None


def rounds_values(exported: ExportedGraph) -> bool:
    """Return whether a graph rounds values to 8 bits by itself."""
    return any(n.target is fake_quantize for n in exported.graph.nodes)


def _lower(p: Program, node: Node) -> None:
    x, scale, zero = node.args
    if all(_reads_codes(p, node, user) for user in node.users):
        if x in p.values:  # else a max pool wrote its codes alone
            p.values[node] = p.values[x]
        return
    source = p.values[x]
    out = p.make(node)
    p.unrounded[out] = source
    p.step("fake_quantize", out, x=p.use(source), out=p.use(out), codes_scale=scale, codes_zero=zero - 128)


def _reads_codes(p: Program, node: Node, user: Node) -> bool:
    """Return whether an operator of a program reads the codes of a value, and nothing else of it."""
    kernel = p.kernels.get(user)
    if p.runs_on_nhwc(user):  # as its input, on the same grid, or as its residual, or as both
        if kernel is None:
            return is_depthwise(user, p.constants) and grid_of(user.args[0]) is not None
        return kernel.held[0].kind == "int8" and (node is not user.args[0] or kernel.input_grid == grid_of(node))
    if p.decode or user not in p.nodes or kernel is None or node in user.args[1:]:
        return False
    return kernel.input_grid == grid_of(node)


OPERATORS = (
    OpSpec(
        reference=fake_quantize,
        arguments=("tensor", "scale", "zero_point"),
        lower=_lower,
        layout=ELEMENTWISE,
        per_row=True,
    ),
)
