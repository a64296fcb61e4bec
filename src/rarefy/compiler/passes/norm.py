"""Passes that recognize LayerNorm and RMSNorm, also where a model writes them out, and norms of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    aten,
    insert_before,
    is_node,
    kind_of,
    replace_node,
    same,
    shape,
)
from rarefy.compiler.passes.matchers import args_of_pair


def convert_norm(t: ExportedGraph, node: Node) -> None:
    """LayerNorm and RMSNorm over the last dimension."""
    centred = node.target is aten.layer_norm.default
    if (not centred and node.target is not aten.rms_norm.default) or kind_of(node) != torch.float32:
        return
    x, over, *rest = node.args
    usual: tuple[Any, ...] = (None, None, 1e-5) if centred else (None, torch.finfo(torch.float32).eps)
    given = [*rest, *usual[len(rest) :]]
    gain, bias, least = given[:3] if centred else (given[0], None, given[1] if given[1] is not None else usual[1])
    if len(over) == 1 and all(c is None or c.name in t.constants for c in (gain, bias)):
        replace_node(t, node, ops.norm, x, gain, bias, least, centred, 1)


def fuse_layer_norm(t: ExportedGraph, node: Node) -> None:
    """(x - mean) / sqrt(variance + least), its gain and its bias behind it."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or kind_of(node) != torch.float32 or node.kwargs:
        return
    for away, by in (node.args, node.args[::-1])[: 1 if node.target is aten.div.Tensor else 2]:
        root = aten.sqrt.default if node.target is aten.div.Tensor else aten.rsqrt.default
        if not is_node(by) or by.target is not root or by.args[0].target is not aten.add.Tensor:
            continue
        x, (spread, least) = _from_mean(away), by.args[0].args
        if x is not None and not is_node(least) and _variance(spread, x):
            absorb_norm_affine(t, replace_node(t, node, ops.norm, x, None, None, float(least), True, 1))
            return


def _from_mean(node: Any) -> Any:
    """x of x - mean(x) over features, None of anything else."""
    if not is_node(node) or node.target is not aten.sub.Tensor or node.kwargs:
        return None
    x, m = node.args
    fits = is_node(x) and is_node(m) and m.target is aten.mean.dim and m.args[0] is x
    return x if fits and not m.kwargs and over_features(m, x) else None


def over_features(node: Node, x: Node) -> bool:
    """Whether a mean is over the last dimension, which stays."""
    return list(node.args[1]) in ([-1], [len(shape(x)) - 1]) and bool((*node.args, False)[2])


def _variance(node: Any, x: Node) -> bool:
    if not is_node(node):
        return False
    if node.target in (aten.var.correction, aten.var.dim):
        how = {n: v for n, v in zip(("dim", "unbiased", "keepdim"), node.args[1:])} | node.kwargs
        whole = how.get("correction") == 0 or how.get("unbiased") is False
        last = list(how.get("dim") or ()) in ([-1], [len(shape(x)) - 1])
        return node.args[0] is x and whole and last and bool(how.get("keepdim"))
    if node.target is not aten.mean.dim or node.kwargs or not over_features(node, x):
        return False
    square = node.args[0]
    if square.target is aten.pow.Tensor_Scalar:
        return square.args[1] == 2 and _from_mean(square.args[0]) is x
    return square.target is aten.mul.Tensor and all(_from_mean(a) is x for a in square.args)


def absorb_norm_affine(t: ExportedGraph, node: Node) -> None:
    """A constant that alone multiplies a norm is its gain, what is added then its bias."""
    for place, target in ((1, aten.mul.Tensor), (2, aten.add.Tensor)):
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or user.target is not target or len(user.args) != 2 or user.kwargs:
            continue
        c = user.args[1] if user.args[0] is node else user.args[0]
        if is_node(c) and c.name in t.constants and shape(c) == tuple(shape(node)[-1:]):
            args = list(node.args)
            args[place] = c
            new = replace_node(t, user, ops.norm, *args)
            t.graph.erase_node(node)
            node = new


def fuse_rms_norm(t: ExportedGraph, node: Node) -> None:
    """x rsqrt(mean(x^2) + least), and its gain behind it."""
    if node.target is not aten.mul.Tensor or kind_of(node) != torch.float32:
        return
    for x, by in (node.args[:2], node.args[1::-1]):
        if not isinstance(by, fx.Node) or by.target is not aten.rsqrt.default:
            continue
        mean, least = args_of_pair(by.args[0], aten.add.Tensor)
        if mean is None or isinstance(least, fx.Node) or mean.target is not aten.mean.dim:
            continue
        if not over_features(mean, x) or not _squares(mean.args[0], x):
            continue
        absorb_norm_affine(t, replace_node(t, node, ops.norm, x, None, None, float(least), False, 1))
        return


def _squares(node: Any, x: Node) -> bool:
    if args_of_pair(node, aten.pow.Tensor_Scalar) == (x, 2):
        return True
    return args_of_pair(node, aten.mul.Tensor) == (x, x)


def fuse_head_norm(t: ExportedGraph, node: Node) -> None:
    """A norm of each head's features: view, norm. Becomes a norm of groups, and a view behind it."""
    if node.target is not ops.norm or node.args[5] != 1:
        return
    v, *rest = node.args
    if v.target not in VIEWS or len(shape(v)) != 4 or len(shape(v.args[0])) != 3:
        return
    x, many, width = v.args[0], *shape(v)[2:]
    if same(shape(x)[:2], shape(v)[:2]):
        new = insert_before(t, node, ops.norm, x, *rest[:4], many)
        node.replace_all_uses_with(insert_before(t, node, aten.unflatten.int, new, 2, [many, width]))
        t.graph.erase_node(node)
