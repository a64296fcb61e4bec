"""The operator that swaps tokens and features, as layers that mix tokens need it."""

from __future__ import annotations

from math import prod

from torch import Tensor

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.spec import Call, OpSpec, Shape
from rarefy.compiler.program import Program, Value


def swap_features(x: Tensor) -> Tensor:
    """Return x [batch, tokens, features] as [batch, features, tokens]."""
    return x.transpose(1, 2)


def _lower(p: Program, node: Node) -> None:
    """Add the steps that write the value row by row, and read that with features first."""
    source = p.values[node.args[0]]
    rows = Value(source.tokens, source.features, len(p.steps), False, size=prod(p.shape(node)))
    p.every.append(rows)
    p.step("unpack", source, x=p.use(source), out=p.use(rows))
    out, (batch, tokens, _) = p.make(node), p.shape(node)
    stride = out.tokens.columns // batch  # sequences may be stored as one
    fields = {"batch": batch, "tokens": tokens, "seq_stride": stride, "channels_first": 1}
    p.step("pack", out, x=p.use(rows), out=p.use(out), **fields)


def _fits(call: Call) -> bool:
    return len(call.shapes[0]) == 3 and 0 not in call.shapes[0]


def _out_shape(call: Call) -> Shape:
    batch, tokens, features = call.shapes[0]
    return batch, features, tokens


OPERATORS = (
    OpSpec(
        reference=swap_features,
        arguments=("tensor",),
        lower=_lower,
        fits=_fits,
        out_shape=_out_shape,
        few_tokens=False,
    ),
)
