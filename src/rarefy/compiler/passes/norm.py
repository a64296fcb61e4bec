"""Passes for LayerNorm and RMSNorm, also where a model writes them as formulas, and for norms of each head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    aten,
    dtype_of,
    insert_before,
    is_node,
    replace_node,
    replace_uses,
    same,
    shape,
)
from rarefy.compiler.passes.matchers import args_of_pair, only_user


def convert_norm(exported: ExportedGraph, node: Node) -> None:
    """Convert LayerNorm and RMSNorm over the last dimension."""
    centered = node.target is aten.layer_norm.default
    if (not centered and node.target is not aten.rms_norm.default) or dtype_of(node) != torch.float32:
        return
    x, dims, *rest = node.args
    defaults: tuple[Any, ...] = (None, None, 1e-5) if centered else (None, torch.finfo(torch.float32).eps)
    values = [*rest, *defaults[len(rest) :]]
    gamma, bias, eps = (
        values[:3] if centered else (values[0], None, values[1] if values[1] is not None else defaults[1])
    )
    if len(dims) == 1 and all(c is None or c.name in exported.constants for c in (gamma, bias)):
        replace_node(exported, node, ops.norm, x, gamma, bias, eps, centered, 1)


def fuse_layer_norm(exported: ExportedGraph, node: Node) -> None:
    """Fuse (x - mean) / sqrt(variance + eps), with its gain and bias, into one norm."""
    for centered, variance, eps in _over_roots(node):
        x = _centered_input(centered)
        if x is not None and _is_variance(variance, x):
            absorb_norm_affine(exported, replace_node(exported, node, ops.norm, x, None, None, eps, True, 1))
            return


def _over_roots(node: Node) -> Iterator[tuple[Any, Node, float]]:
    """Yield each (x, y, eps) so that a node is x / sqrt(y + eps)."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or dtype_of(node) != torch.float32 or node.kwargs:
        return
    is_quotient = node.target is aten.div.Tensor
    for x, factor in (node.args, node.args[::-1])[: 1 if is_quotient else 2]:
        root = _sqrt_argument(factor) if is_quotient else _rsqrt_argument(factor)
        y, eps = args_of_pair(root, aten.add.Tensor)
        if is_node(x) and is_node(y) and isinstance(eps, float | int):
            yield x, y, float(eps)


def _sqrt_argument(node: Any) -> Any:
    """Return y if a node is sqrt(y), else None."""
    matches = is_node(node) and node.target is aten.sqrt.default
    return node.args[0] if matches or args_of_pair(node, aten.pow.Tensor_Scalar)[1] == 0.5 else None


def _rsqrt_argument(node: Any) -> Any:
    """Return y if a node is 1 / sqrt(y), else None."""
    if args_of_pair(node, aten.pow.Tensor_Scalar)[1] == -0.5:
        return node.args[0]
    if is_node(node) and node.target is aten.reciprocal.default:
        return _sqrt_argument(node.args[0])
    return node.args[0] if is_node(node) and node.target is aten.rsqrt.default else None


def _centered_input(node: Any) -> Any:
    """Return x if a node is x - mean(x) over features, else None."""
    if not is_node(node) or node.target is not aten.sub.Tensor or node.kwargs:
        return None
    x, mean = node.args
    matches = is_node(x) and is_node(mean) and mean.target is aten.mean.dim and mean.args[0] is x
    return x if matches and not mean.kwargs and _over_features(mean, x) else None


def _over_features(mean: Node, x: Node) -> bool:
    """Return whether a mean is over the last dimension of x, which stays as a size of 1."""
    return list(mean.args[1]) in ([-1], [len(shape(x)) - 1]) and bool((*mean.args, False)[2])


def _is_variance(node: Any, x: Node) -> bool:
    """Return whether a node is the biased variance of x over features."""
    if not is_node(node):
        return False
    if node.target in (aten.var.correction, aten.var.dim):
        options = {n: v for n, v in zip(("dim", "unbiased", "keepdim"), node.args[1:])} | node.kwargs
        biased = options.get("correction") == 0 or options.get("unbiased") is False
        last = list(options.get("dim") or ()) in ([-1], [len(shape(x)) - 1])
        return node.args[0] is x and biased and last and bool(options.get("keepdim"))
    if node.target is not aten.mean.dim or node.kwargs or not _over_features(node, x):
        return False
    power = node.args[0]
    if power.target is aten.pow.Tensor_Scalar:
        return power.args[1] == 2 and _centered_input(power.args[0]) is x
    return power.target is aten.mul.Tensor and all(_centered_input(a) is x for a in power.args)


def absorb_norm_affine(exported: ExportedGraph, node: Node) -> None:
    """Absorb a constant factor of a norm as its gain, and a constant summand after it as its bias."""
    for argument, target in ((1, aten.mul.Tensor), (2, aten.add.Tensor)):
        user = only_user(node)
        if user is None or user.target is not target or len(user.args) != 2 or user.kwargs:
            continue
        c = user.args[1] if user.args[0] is node else user.args[0]
        if is_node(c) and c.name in exported.constants and shape(c) == tuple(shape(node)[-1:]):
            args = list(node.args)
            args[argument] = c
            new = replace_node(exported, user, ops.norm, *args)
            exported.graph.erase_node(node)
            node = new


def fuse_rms_norm(exported: ExportedGraph, node: Node) -> None:
    """Fuse x / sqrt(mean(x^2) + eps), with its gain, into one norm."""
    for x, mean, eps in _over_roots(node):
        if mean.target is aten.mean.dim and _over_features(mean, x) and _is_square(mean.args[0], x):
            absorb_norm_affine(exported, replace_node(exported, node, ops.norm, x, None, None, eps, False, 1))
            return


def _is_square(node: Any, x: Node) -> bool:
    if args_of_pair(node, aten.pow.Tensor_Scalar) == (x, 2):
        return True
    return args_of_pair(node, aten.mul.Tensor) == (x, x)


def fuse_head_norm(exported: ExportedGraph, node: Node) -> None:
    """Turn a norm of each head, after a view into heads, into a norm of groups of features before the view."""
    if node.target is not ops.norm or node.args[5] != 1:
        return
    v, *rest = node.args
    if v.target not in VIEWS or len(shape(v)) != 4 or len(shape(v.args[0])) != 3:
        return
    x, heads, head_dim = v.args[0], *shape(v)[2:]
    if same(shape(x)[:2], shape(v)[:2]):
        new = insert_before(exported, node, ops.norm, x, *rest[:4], heads)
        replace_uses(exported, node, insert_before(exported, node, aten.unflatten.int, new, 2, [heads, head_dim]))
