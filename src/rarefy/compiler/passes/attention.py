"""Passes for the ways in which models write attention: one linear layer for queries, keys and values, the layout of
nn.MultiheadAttention, heads split from features and joined again."""

from __future__ import annotations

import operator
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
    keep_layer,
    replace_node,
    replace_uses,
    same,
    shape,
)
from rarefy.compiler.passes.linear import linear_of_rows
from rarefy.compiler.passes.matchers import SDPA, before_head_split, only_user, swaps_heads_and_tokens


def split_qkv_view(exported: ExportedGraph, node: Node) -> None:
    """Give queries, keys and values linear layers of their own where a view splits the outputs of one.

    The pattern is linear, view to 5 dimensions, permute, then unbind or select.
    """
    match = _qkv_part(node)
    if match is None:
        return
    y, sizes, dims, part = match
    rows = torch.arange(shape(y)[-1]).view(sizes).select(dims[0] - 2, part).flatten()
    new = linear_of_rows(exported, node, y, rows)
    heads = insert_before(exported, node, aten.unflatten.int, new, 2, [sizes[5 - dims[0] - 2], sizes[2]])
    if dims[2] != 1:
        heads = insert_before(exported, node, aten.transpose.int, heads, 1, 2)
    replace_uses(exported, node, heads)


def _qkv_part(node: Node) -> tuple[Node, tuple[int, ...], list[int], int] | None:
    """Match one of queries, keys and values.

    Returns:
        The linear layer, the sizes into which a view splits its outputs, the order of the permuted dimensions, and
        which part the node takes; None for any other node.
    """
    if node.target is operator.getitem and node.args[0].target is aten.unbind.int:
        unbind, part = node.args[0], node.args[1]
        if (*unbind.args, 0)[1] != 0 or len(unbind.args[0].users) != 1:
            return None
        permuted = unbind.args[0]
    elif node.target is aten.select.int and node.args[1] == 0:
        permuted, part = node.args[0], node.args[2]
        if any(u.target is not aten.select.int or u.args[1] != 0 for u in permuted.users):
            return None
    else:
        return None
    if permuted.target is not aten.permute.default or permuted.args[0].target not in VIEWS:
        return None
    view, dims = permuted.args[0], list(permuted.args[1])
    y, sizes = view.args[0], shape(view)[2:]
    if len(dims) != 5 or len(view.users) != 1 or len(y.users) != 1 or not all(isinstance(s, int) for s in sizes):
        return None
    by_part = dims[0] in (2, 3) and dims[1:] in ([0, 5 - dims[0], 1, 4], [0, 1, 5 - dims[0], 4])
    if not by_part or y.target is not ops.linear or y.args[3] is not None or part < 0:
        return None
    return (y, sizes, dims, part) if len(shape(y)) == 3 and same(shape(y)[:2], shape(view)[:2]) else None


def split_mha_in_proj(exported: ExportedGraph, node: Node) -> None:
    """Give queries, keys and values of nn.MultiheadAttention's in_proj linear layers of their own.

    The pattern is unflatten, unsqueeze, transpose, squeeze, select.
    """
    if node.target is not aten.select.int or node.args[1] != 0:
        return
    chain, y = [], node.args[0]
    for target in (aten.squeeze.dim, aten.transpose.int, aten.unsqueeze.default):
        if y.target is not target:
            return
        chain.append(sorted(d % 5 for d in y.args[1:]))
        y = y.args[0]
    split, y = y, y.args[0] if y.args else y
    if chain != [[3], [0, 3], [0]] or split.target not in (*VIEWS, aten.unflatten.int) or len(shape(split)) != 4:
        return
    if y.target is ops.linear and y.args[3] is None and len(y.users) == 1 and same(shape(y)[:-1], shape(split)[:2]):
        parts, features = shape(split)[2:]
        rows = torch.arange(parts * features)[node.args[2] % parts * features :][:features]
        replace_uses(exported, node, linear_of_rows(exported, node, y, rows))


def make_mha_batch_first(exported: ExportedGraph, node: Node) -> None:
    """Change nn.MultiheadAttention, which computes on [tokens, batch, features], to [batch, tokens, features]."""
    permuted = only_user(node)
    if node.target is not SDPA or permuted is None:
        return
    sources: list[Any] = [_tokens_first(x) for x in node.args[:3]]
    if None in sources or permuted.target is not aten.permute.default or list(permuted.args[1]) != [2, 0, 1, 3]:
        return
    flat = only_user(permuted)
    y = only_user(flat) if flat is not None and flat.target in VIEWS else None
    view = only_user(y) if y is not None and y.target is ops.linear and y.args[3] is None else None
    if y is None or view is None or view.target not in VIEWS or len(shape(view)) != 3:
        return
    (batch, _, tokens, _), (_, heads, _, head_dim) = node.args[0].args[1], shape(node.args[0])
    qkv = []
    for source, x in zip(sources, list(node.args[:3])):
        rows = _batch_first(exported, node, source)
        split = insert_before(exported, node, aten.unflatten.int, rows, 2, [shape(x)[1], head_dim])
        qkv.append(insert_before(exported, node, aten.transpose.int, split, 1, 2))
    node.args = (*qkv, *node.args[3:])
    joined = insert_before(exported, permuted, aten.transpose.int, node, 1, 2)
    with exported.graph.inserting_before(permuted):
        rows = exported.graph.call_function(aten.reshape.default, (joined, [batch, tokens, heads * head_dim]))
        new = exported.graph.call_function(ops.linear, (rows, *y.args[1:]))
    rows.meta["val"] = joined.meta["val"].flatten(2)
    new.meta["val"] = view.meta["val"].transpose(0, 1)
    keep_layer(new, y)
    for user in list(view.users):
        if _swaps_batch_and_tokens(user):
            replace_uses(exported, user, new)
    if view.users:
        view.replace_all_uses_with(insert_before(exported, view, aten.transpose.int, new, 0, 1))


def _tokens_first(x: Node) -> Node | None:
    """Return [tokens, batch, features] from which view, transpose, view made x [batch, heads, tokens, head_dim]."""
    swapped = x.args[0] if x.target in VIEWS and len(shape(x)) == 4 else None
    inner = swapped.args[0] if swapped is not None and _swaps_batch_and_tokens(swapped) else None
    source = inner.args[0] if inner is not None and inner.target in VIEWS and len(shape(inner)) == 3 else None
    if source is None or len(shape(source)) != 3:
        return None
    (tokens, batch, features), (b, heads, n, head_dim) = shape(source), shape(x)
    return source if same((tokens, batch), (n, b)) and features == heads * head_dim else None


def _swaps_batch_and_tokens(x: Node) -> bool:
    return x.target is aten.transpose.int and sorted(x.args[1:]) == [0, 1] and len(shape(x)) == 3


def _batch_first(exported: ExportedGraph, before: Node, source: Node) -> Node:
    """Return [batch, tokens, features] for a node [tokens, batch, features], computed by a linear layer where that is
    one."""
    if source.target is ops.linear and _swaps_batch_and_tokens(source.args[0]) and source.args[3] is None:
        with exported.graph.inserting_before(before):
            new = exported.graph.call_function(ops.linear, (source.args[0].args[0], *source.args[1:]))
        new.meta["val"] = source.meta["val"].transpose(0, 1)
        keep_layer(new, source)
        return new
    return insert_before(exported, before, aten.transpose.int, source, 0, 1)


def fuse_attention(exported: ExportedGraph, node: Node) -> None:
    """Fuse splitting [batch, tokens, features] into heads, attention, and joining the heads."""
    if node.target is not SDPA or dtype_of(node) != torch.float32:
        return
    swapped = only_user(node)
    sources = [before_head_split(x) for x in node.args[:3]]
    if swapped is None or None in sources or not swaps_heads_and_tokens(swapped):
        return
    joined = only_user(swapped)
    if (
        joined is None
        or joined.target not in (*VIEWS, aten.flatten.using_ints)
        or not same(shape(joined), shape(sources[0]))
    ):
        return
    options = attention_options(exported, node)
    if options is not None and shape(node.args[2])[3] == shape(node.args[0])[3]:
        replace_node(exported, joined, ops.attention, *sources, *options, None)
        exported.graph.erase_node(swapped)
        exported.graph.erase_node(node)


def attention_options(exported: ExportedGraph, node: Node) -> tuple[Any, int, int, float, bool] | None:
    """Return mask, heads, heads of keys and values, scale and whether it is causal, of an attention that the engine
    has, where values have as many features as queries; None for others."""
    q, k, _, *rest = node.args
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest)) | node.kwargs
    heads, kv_heads, head_dim = shape(q)[-3], shape(k)[-3], shape(q)[-1]
    if options.get("dropout_p", 0.0) or not same(shape(k)[:-3], shape(q)[:-3]):
        return None
    causal = options.get("is_causal", False)
    if causal and not same(shape(k)[-2:-1], shape(q)[-2:-1]):
        return None
    if heads % kv_heads or (heads != kv_heads and not node.kwargs.get("enable_gqa")):
        return None
    mask, scale = options.get("attn_mask"), node.kwargs.get("scale")
    mask = None if mask is None else _additive(exported, mask)
    return mask, heads, kv_heads, head_dim**-0.5 if scale is None else scale, causal


def _additive(exported: ExportedGraph, mask: Node) -> Node:
    """Return a mask as one that is added to scores, computed once for all layers."""
    known = next((u for u in mask.users if u.target is ops.additive_mask), None)
    if known is not None:
        return known
    with exported.graph.inserting_after(mask if mask.op != "placeholder" else exported.inputs[-1]):
        new = exported.graph.call_function(ops.additive_mask, (mask,))
    new.meta["val"] = mask.meta["val"].float()
    return new
