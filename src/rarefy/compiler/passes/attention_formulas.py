"""Passes that find softmax(q k^T scale + mask) v where a model or an exporter writes it out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    aten,
    dtype_of,
    insert_before,
    is_node,
    keep_layer,
    replace_uses,
    same,
    shape,
)
from rarefy.compiler.passes.kv_attention import CACHED_ATTENTION
from rarefy.compiler.passes.matchers import SDPA, constant_of, scaled_by_number, swaps
from rarefy.compiler.passes.window_mask import window_mask


def split_merged_heads(exported: ExportedGraph, node: Node) -> None:
    """Turn a transpose of [batch * heads, tokens, head_dim], between two views, into one of [batch, heads, ...]."""
    swapped: Any = node.args[0] if node.target in VIEWS else None
    if not is_node(swapped) or len(shape(node)) != 4 or len(shape(swapped)) != 3 or not swaps(swapped, 1, 2):
        return
    merged: Any = swapped.args[0]
    x = merged.args[0] if merged.target in VIEWS else None
    if is_node(x) and len(shape(x)) == 4 and same(shape(x)[-2:], shape(merged)[-2:]):
        (batch, heads, tokens, head_dim) = shape(x)
        if same(shape(node), (batch, heads, head_dim, tokens)):
            replace_uses(exported, node, insert_before(exported, node, aten.transpose.int, x, 2, 3))


def fuse_sdpa(exported: ExportedGraph, node: Node) -> None:
    """Fuse softmax(q k^T scale + mask) v, written as separate calls, into scaled_dot_product_attention."""
    if node.target is not aten.matmul.default or len(shape(node)) != 4 or dtype_of(node) != torch.float32:
        return
    p, v = node.args
    probabilities = _without_nan(exported, p)
    softmax = probabilities.target is aten.softmax.int and probabilities.args[1] in (-1, 3)
    if not softmax or len(p.users) != 1 or len(probabilities.users) != (1 if p is probabilities else 2):
        return  # others read the probabilities too
    scores, mask, scale = probabilities.args[0], None, 1.0
    if (windows := window_mask(exported, node, scores)) is not None:
        scores, mask = windows
    elif scores.target is aten.add.Tensor and len(scores.users) == 1 and not scores.kwargs:
        scores, mask = scores.args
        if not is_node(mask) or dtype_of(mask) != torch.float32 or not same(shape(scores), shape(probabilities)):
            return
    if scores.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(scores.args[1], float | int):
        scale = scores.args[1] if scores.target is aten.mul.Tensor else 1 / scores.args[1]
        scores = scores.args[0] if len(scores.users) == 1 else None
    if scores is None or scores.target is not aten.matmul.default or len(scores.users) != 1:
        return
    q, keys = scores.args
    if len(shape(q)) != 4 or len(shape(keys)) != 4 or not same(shape(scores)[:2], shape(v)[:2]):
        return
    if not same(shape(q)[:2], shape(v)[:2]) or not same(shape(keys)[:2], shape(v)[:2]):
        return
    scale *= _take_scales(exported, q, keys)
    q, keys = scores.args
    with exported.graph.inserting_before(node):
        options = {"scale": float(scale), **({} if mask is None else {"attn_mask": mask})}
        new = exported.graph.call_function(SDPA, (q, _transposed_keys(exported, node, keys), v), options)
    new.meta["val"] = node.meta["val"]
    keep_layer(new, node)
    replace_uses(exported, node, new)


def _without_nan(exported: ExportedGraph, x: Node) -> Node:
    """Return the probabilities inside where(isnan(p), 0, p), which exporters write for rows that see nothing."""
    if x.target is not aten.where.self or len(x.users) != 1:
        return x
    condition, zero, p = x.args
    known = constant_of(exported, zero)
    is_zero = isinstance(known, Tensor) and known.numel() == 1 and not bool(known)
    return p if is_zero and condition.target is aten.isnan.default and condition.args[0] is p else x


def _take_scales(exported: ExportedGraph, *operands: Node) -> float:
    """Remove numbers that multiply queries and keys; return their product."""
    product = 1.0
    for x in operands:
        match = scaled_by_number(x)
        if match is not None:
            scaling, number = match
            product *= number
            replace_uses(exported, scaling, scaling.args[0])
    return product


def _transposed_keys(exported: ExportedGraph, before: Node, keys: Node) -> Node:
    """Return keys [batch, heads, tokens, head_dim] for [batch, heads, head_dim, tokens]."""
    x: Any = keys.args[0] if keys.args else None
    if swaps(keys, 2, 3):
        return x
    if keys.target is aten.permute.default and list(keys.args[1]) == [0, 2, 3, 1]:
        return insert_before(exported, before, aten.transpose.int, x, 1, 2)
    if keys.target in VIEWS and swaps(x, 1, 2) and same(shape(keys)[2:], shape(x)[1:]):  # heads were split off later
        *leading, features, tokens = keys.args[1]  # type: ignore[misc]
        return insert_before(exported, before, aten.reshape.default, x.args[0], [*leading, tokens, features])
    return insert_before(exported, before, aten.transpose.int, keys, 2, 3)


def fold_attention_scale(exported: ExportedGraph, node: Node) -> None:
    """Fold a number that multiplies queries or keys into the attention's scale."""
    if node.target not in (SDPA, CACHED_ATTENTION):
        return
    number = _take_scales(exported, *node.args[:2])
    if number == 1:
        return
    if node.target is CACHED_ATTENTION:
        node.args = (*node.args[:3], node.args[3] * number, *node.args[4:])
    else:
        scale = node.kwargs.get("scale")
        scale = shape(node.args[0])[3] ** -0.5 if scale is None else scale
        node.kwargs = {**node.kwargs, "scale": scale * number}


def group_repeated_heads(exported: ExportedGraph, node: Node) -> None:
    """Let several heads of queries read one head of keys and values, where a model repeats those for each of them."""
    if node.target is not SDPA or node.kwargs.get("enable_gqa"):
        return
    q, k, v, *rest = node.args
    keys, values = _before_repeat(k), _before_repeat(v)
    if keys is not None and values is not None and same(shape(keys)[:3], shape(values)[:3]):
        node.args = (q, keys, values, *rest)
        node.kwargs = {**node.kwargs, "enable_gqa": True}


def _before_repeat(x: Node) -> Node | None:
    """Return [batch, kv_heads, tokens, head_dim] of which each head was repeated in place, or None.

    The pattern is unsqueeze, expand, view.
    """
    expanded: Any = x.args[0] if x.target in (*VIEWS, aten.flatten.using_ints) else None
    if not is_node(expanded) or expanded.target is not aten.expand.default or len(shape(expanded)) != 5:
        return None
    single = expanded.args[0]
    source = single.args[0] if single.target is aten.unsqueeze.default and single.args[1] in (2, -3) else None
    if source is None or len(shape(source)) != 4 or len(shape(x)) != 4:
        return None
    batch, heads, *rest = shape(source)
    repeated = shape(expanded)
    in_place = same((batch, heads, *rest), (*repeated[:2], *repeated[3:]))
    return source if in_place and same(shape(x), (batch, heads * repeated[2], *rest)) else None
