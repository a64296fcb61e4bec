"""Rules for the ways in which models write attention: queries, keys and values of one product, nn.MultiheadAttention's
layout, softmax(q k^T) v in single calls, scales outside."""

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
    insert_before,
    is_node,
    kind_of,
    replace_node,
    same,
    shape,
)
from rarefy.compiler.passes.kv_attention import RECALL
from rarefy.compiler.passes.linear import linear_of_rows
from rarefy.compiler.passes.matchers import split, turns

SDPA = aten.scaled_dot_product_attention.default


def split_qkv_view(t: ExportedGraph, node: Node) -> None:
    """One of queries, keys and values, which a view splits a product's outputs into, is a product of its own."""
    found = _part(node)
    if found is None:
        return
    y, sizes, dims, i = found
    order = torch.arange(shape(y)[-1]).view(sizes)
    rows = order.select(dims[0] - 2, i).flatten()
    new = linear_of_rows(t, node, y, rows)
    wide = insert_before(t, node, aten.unflatten.int, new, 2, [sizes[5 - dims[0] - 2], sizes[2]])
    node.replace_all_uses_with(insert_before(t, node, aten.transpose.int, wide, 1, 2) if dims[2] != 1 else wide)
    t.graph.erase_node(node)


def _part(node: Node) -> tuple[Node, tuple[int, ...], list[int], int] | None:
    """The product, how a view splits its outputs, the order that these are turned to, and which part a node takes."""
    if node.target is operator.getitem and node.args[0].target is aten.unbind.int:
        cut, i = node.args[0], node.args[1]
        if (*cut.args, 0)[1] != 0 or len(cut.args[0].users) != 1:
            return None
        turned = cut.args[0]
    elif node.target is aten.select.int and node.args[1] == 0:
        turned, i = node.args[0], node.args[2]
        if any(u.target is not aten.select.int or u.args[1] != 0 for u in turned.users):
            return None
    else:
        return None
    if turned.target is not aten.permute.default or turned.args[0].target not in VIEWS or len(turned.args[1]) != 5:
        return None
    view, dims = turned.args[0], list(turned.args[1])
    y, sizes = view.args[0], shape(view)[2:]
    whole = len(view.users) == 1 and len(y.users) == 1 and all(isinstance(s, int) for s in sizes)
    apart = dims[0] in (2, 3) and dims[1:] in ([0, 5 - dims[0], 1, 4], [0, 1, 5 - dims[0], 4])
    if not whole or not apart or y.target is not ops.linear or y.args[3] is not None or i < 0:
        return None
    return (y, sizes, dims, i) if len(shape(y)) == 3 and same(shape(y)[:2], shape(view)[:2]) else None


def split_mha_in_proj(t: ExportedGraph, node: Node) -> None:
    """A third of the product in nn.MultiheadAttention: unflatten, unsqueeze, transpose, squeeze, select."""
    if node.target is not aten.select.int or node.args[1] != 0:
        return
    chain, at = [], node.args[0]
    for target in (aten.squeeze.dim, aten.transpose.int, aten.unsqueeze.default, aten.unflatten.int):
        if at.target is not target:
            return
        chain.append((*at.args[1:],))
        at = at.args[0]
    squeezed, turned, grown, (dim, (many, each)) = chain
    usual = squeezed == (-2,) and turned == (0, -2) and grown == (0,) and dim in (-1, 2)
    if usual and at.target is ops.linear and at.args[3] is None and len(at.users) == 1 and len(shape(at)) == 3:
        rows = torch.arange(many * each)[node.args[2] * each :][:each]
        node.replace_all_uses_with(linear_of_rows(t, node, at, rows))
        t.graph.erase_node(node)


def make_mha_batch_first(t: ExportedGraph, node: Node) -> None:
    """nn.MultiheadAttention, which computes with tokens before batches: batches first, so that all of it is words."""
    if node.target is not SDPA or len(node.users) != 1:
        return
    found: list[Any] = [_tokens_first(x) for x in node.args[:3]]
    turned = next(iter(node.users))
    if None in found or turned.target is not aten.permute.default or list(turned.args[1]) != [2, 0, 1, 3]:
        return
    flat = _only_user(turned)
    y = _only_user(flat) if flat is not None and flat.target in VIEWS else None
    view = _only_user(y) if y is not None and y.target is ops.linear and y.args[3] is None else None
    if y is None or view is None or view.target not in VIEWS or len(shape(view)) != 3:
        return
    (batch, _, tokens, _), (_, many, _, width) = node.args[0].args[1], shape(node.args[0])
    inner = []
    for p, x in zip(found, list(node.args[:3])):
        wide = insert_before(t, node, aten.unflatten.int, _batch_first(t, node, p), 2, [shape(x)[1], width])
        inner.append(insert_before(t, node, aten.transpose.int, wide, 1, 2))
    node.args = (*inner, *node.args[3:])
    joined = insert_before(t, turned, aten.transpose.int, node, 1, 2)
    with t.graph.inserting_before(turned):
        rows = t.graph.call_function(aten.reshape.default, (joined, [batch, tokens, many * width]))
        new = t.graph.call_function(ops.linear, (rows, *y.args[1:]))
    rows.meta["val"] = joined.meta["val"].flatten(2)
    new.meta["val"] = view.meta["val"].transpose(0, 1)
    for user in list(view.users):
        if _flips(user):
            user.replace_all_uses_with(new)
            t.graph.erase_node(user)
    if view.users:
        view.replace_all_uses_with(insert_before(t, view, aten.transpose.int, new, 0, 1))


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _tokens_first(x: Node) -> Node | None:
    """[tokens, batch, features], of which [batch, heads, tokens, width] was made by view, transpose, view."""
    turned = x.args[0] if x.target in VIEWS and len(shape(x)) == 4 else None
    inner = turned.args[0] if turned is not None and _flips(turned) else None
    source = inner.args[0] if inner is not None and inner.target in VIEWS and len(shape(inner)) == 3 else None
    if source is None or len(shape(source)) != 3:
        return None
    (tokens, batch, features), (b, many, n, width) = shape(source), shape(x)
    return source if same((tokens, batch), (n, b)) and features == many * width else None


def _flips(x: Node) -> bool:
    return x.target is aten.transpose.int and sorted(x.args[1:]) == [0, 1] and len(shape(x)) == 3


def _batch_first(t: ExportedGraph, before: Node, p: Node) -> Node:
    """[batch, tokens, features] of [tokens, batch, features], before a product where there is one."""
    if p.target is ops.linear and _flips(p.args[0]) and p.args[3] is None:
        with t.graph.inserting_before(before):
            new = t.graph.call_function(ops.linear, (p.args[0].args[0], *p.args[1:]))
        new.meta["val"] = p.meta["val"].transpose(0, 1)
        return new
    return insert_before(t, before, aten.transpose.int, p, 0, 1)


def fuse_sdpa(t: ExportedGraph, node: Node) -> None:
    """softmax(q k^T scale + mask) v in calls of its own is one."""
    if node.target is not aten.matmul.default or len(shape(node)) != 4 or kind_of(node) != torch.float32:
        return
    chances, v = node.args
    if chances.target is not aten.softmax.int or len(chances.users) != 1 or chances.args[1] not in (-1, 3):
        return
    scores, mask, scale = chances.args[0], None, 1.0
    if scores.target is aten.add.Tensor and len(scores.users) == 1 and not scores.kwargs:
        scores, mask = scores.args
        if not is_node(mask) or kind_of(mask) != torch.float32 or not same(shape(scores), shape(chances)):
            return
    if scores.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(scores.args[1], float | int):
        scale = scores.args[1] if scores.target is aten.mul.Tensor else 1 / scores.args[1]
        scores = scores.args[0] if len(scores.users) == 1 else None
    if scores is None or scores.target is not aten.matmul.default or len(scores.users) != 1:
        return
    q, across = scores.args
    if len(shape(q)) != 4 or len(shape(across)) != 4 or not same(shape(scores)[:2], shape(v)[:2]):
        return
    if not same(shape(q)[:2], shape(v)[:2]) or not same(shape(across)[:2], shape(v)[:2]):
        return
    with t.graph.inserting_before(node):
        how = {"scale": float(scale), **({} if mask is None else {"attn_mask": mask})}
        new = t.graph.call_function(SDPA, (q, _back(t, node, across), v), how)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    t.graph.erase_node(node)


def _back(t: ExportedGraph, before: Node, across: Node) -> Node:
    """Keys [batch, heads, tokens, width] of [batch, heads, width, tokens]."""
    x = across.args[0] if across.args else None
    if across.target is aten.transpose.int and sorted(d % 4 for d in across.args[1:]) == [2, 3]:
        return x
    if across.target is aten.permute.default and list(across.args[1]) == [0, 1, 3, 2]:
        return x
    if across.target is aten.permute.default and list(across.args[1]) == [0, 2, 3, 1]:
        return insert_before(t, before, aten.transpose.int, x, 1, 2)
    return insert_before(t, before, aten.transpose.int, across, 2, 3)


def fold_attention_scale(t: ExportedGraph, node: Node) -> None:
    """Queries or keys times a number: that goes into the scale."""
    if node.target not in (SDPA, RECALL):
        return
    for x in node.args[:2]:
        by = _number(x)
        if by is None:
            continue
        at, number = by
        if node.target is RECALL:
            node.args = (*node.args[:3], node.args[3] * number, *node.args[4:])
        else:
            before = node.kwargs.get("scale")
            width = shape(node.args[0])[3]
            node.kwargs = {**node.kwargs, "scale": (width**-0.5 if before is None else before) * number}
        at.replace_all_uses_with(at.args[0])
        t.graph.erase_node(at)


def _number(x: Node) -> tuple[Node, float] | None:
    """The call that multiplies by a number what is then only turned and viewed, and the number."""
    while len(x.users) == 1:
        if x.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(x.args[1], float | int):
            return x, x.args[1] if x.target is aten.mul.Tensor else 1 / x.args[1]
        if not turns(x) and x.target not in (*VIEWS, aten.unflatten.int):
            return None
        x = x.args[0]
    return None


def fuse_attention(t: ExportedGraph, node: Node) -> None:
    """[batch, tokens, features] split into heads, attention, and joined again."""
    if node.target is not aten.scaled_dot_product_attention.default or kind_of(node) != torch.float32:
        return
    q, k, v, *rest = node.args
    usual = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest)) | node.kwargs
    mask, drop, causal = (usual.get(n, d) for n, d in (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False)))
    if drop or len(node.users) != 1:
        return
    apart = [split(x) for x in (q, k, v)]
    turned = next(iter(node.users))
    if any(s is None for s in apart) or not turns(turned):
        return
    joined = next(iter(turned.users)) if len(turned.users) == 1 else None
    heads, kv_heads, width = shape(q)[1], shape(k)[1], shape(q)[3]
    if joined is None or joined.target not in VIEWS or not same(shape(joined), shape(apart[0])) or shape(v)[3] != width:
        return
    if not same(shape(k)[:1] + shape(k)[2:3], shape(q)[:1] + shape(q)[2:3]):
        return  # keys of other tokens than the queries'
    if heads % kv_heads or (heads != kv_heads and not node.kwargs.get("enable_gqa")):
        return
    scale = node.kwargs.get("scale")
    if mask is not None:
        made = next((u for u in mask.users if u.target is ops.additive_mask), None)
        if made is None:
            with t.graph.inserting_after(mask if mask.op != "placeholder" else t.inputs[-1]):
                made = t.graph.call_function(ops.additive_mask, (mask,))
            made.meta["val"] = mask.meta["val"].float()
        mask = made
    scale = width**-0.5 if scale is None else scale
    replace_node(t, joined, ops.attention, *apart, mask, heads, kv_heads, scale, causal)
    t.graph.erase_node(turned)
    t.graph.erase_node(node)
