"""Matchers that several passes use."""

from __future__ import annotations

from typing import Any

from torch import fx

from rarefy.compiler.fx_utils import VIEWS, Node, aten, same, shape


def swaps_heads_and_tokens(x: Node) -> bool:
    """Return whether a node swaps dimensions 1 and 2, heads and tokens, of four."""
    if x.target is aten.permute.default:
        return list(x.args[1]) == [0, 2, 1, 3]
    return x.target is aten.transpose.int and sorted(d % 4 for d in x.args[1:]) == [1, 2]


def before_head_split(x: Any) -> Any:
    """Return the value [batch, tokens, features] that was split into [batch, heads, tokens, head_dim], or None."""
    if not swaps_heads_and_tokens(x):
        return None
    v = x.args[0]
    if v.target not in (*VIEWS, aten.unflatten.int) or len(shape(v)) != 4 or len(shape(v.args[0])) != 3:
        return None
    return v.args[0] if same(shape(v)[:2], shape(v.args[0])[:2]) else None


def args_of_pair(node: Any, target: Any) -> tuple[Any, Any]:
    """Return both arguments of a call of an operator, (None, None) for anything else."""
    matches = isinstance(node, fx.Node) and node.target is target and len(node.args) == 2
    return (node.args[0], node.args[1]) if matches else (None, None)


def only_user(node: Any) -> Any:
    """Return the only node that reads a node, None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
