"""Matchers that several passes use."""

from __future__ import annotations

from typing import Any

from torch import fx

from rarefy.compiler.fx_utils import VIEWS, Node, aten, same, shape


def turns(x: Node) -> bool:
    """Whether heads and tokens change places."""
    if x.target is aten.permute.default:
        return list(x.args[1]) == [0, 2, 1, 3]
    return x.target is aten.transpose.int and sorted(d % 4 for d in x.args[1:]) == [1, 2]


def split(x: Any) -> Any:
    """Return what was split into heads, [batch, tokens, features], or None."""
    if not turns(x):
        return None
    v = x.args[0]
    if v.target not in (*VIEWS, aten.unflatten.int) or len(shape(v)) != 4 or len(shape(v.args[0])) != 3:
        return None
    return v.args[0] if same(shape(v)[:2], shape(v.args[0])[:2]) else None


def args_of_pair(node: Any, target: Any) -> tuple[Any, Any]:
    """The two arguments of a call, (None, None) of anything else."""
    found = isinstance(node, fx.Node) and node.target is target and len(node.args) == 2
    return (node.args[0], node.args[1]) if found else (None, None)
