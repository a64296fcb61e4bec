"""The pass for attention that reads and extends a KV cache, and the torch operator that represents it in an export."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    aten,
    insert_before,
    keep_layer,
    replace_uses,
    same,
    shape,
)
from rarefy.compiler.passes.matchers import before_head_split

_LIBRARY = torch.library.Library("rarefy", "FRAGMENT")
_LIBRARY.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, float scale, int window, float cap, float max_bias) -> Tensor"
)


def _shape_only(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, cap: float, max_bias: float) -> Tensor:
    """Return a tensor of the output's shape: the pass below replaces the operator before it is called."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


_LIBRARY.impl("cached_attention", _shape_only, "CompositeExplicitAutograd")
CACHED_ATTENTION = torch.ops.rarefy.cached_attention.default


def convert_cached_attention(exported: ExportedGraph, node: Node) -> None:
    """Convert rarefy::cached_attention of queries, keys and values in heads; its slots of the cache follow those of the
    layers before it. A cap of 0 is none, and so is a max_bias of 0."""
    if node.target is not CACHED_ATTENTION:
        return
    q, k, v, scale, window, cap, max_bias = node.args
    heads, kv_heads, head_dim = shape(q)[1], shape(k)[1], shape(q)[3]
    rows = [_joined(exported, node, x) for x in (q, k, v)]
    slots = exported.cache_features, exported.cache_features + kv_heads * head_dim
    exported.cache_features += kv_heads * (head_dim + shape(v)[3])
    args = (*rows, _cache(exported), slots, heads, kv_heads, scale, window)
    with exported.graph.inserting_before(node):
        if cap:
            new = exported.graph.call_function(ops.capped_cached_attention, (*args, cap))
        elif max_bias:
            new = exported.graph.call_function(ops.alibi_cached_attention, (*args, max_bias))
        else:
            new = exported.graph.call_function(ops.cached_attention, args)
    new.meta["val"] = node.meta["val"].flatten(2)
    keep_layer(new, node)
    for user in list(node.users):
        if user.target in VIEWS and same(shape(user), shape(new)):
            replace_uses(exported, user, new)
    if node.users:
        node.replace_all_uses_with(insert_before(exported, node, aten.unflatten.int, new, 2, [heads, shape(v)[3]]))
    exported.graph.erase_node(node)


def _cache(exported: ExportedGraph) -> Node:
    """Return the placeholder of the KV cache."""
    first = next(iter(exported.graph.nodes))
    known = next((n for n in exported.graph.nodes if n.op == "placeholder" and n.name == "cache"), None)
    if known is not None:
        return known
    with exported.graph.inserting_before(first):
        return exported.graph.placeholder("cache")


def _joined(exported: ExportedGraph, before: Node, x: Node) -> Node:
    """Return [batch, tokens, features] for heads [batch, heads, tokens, head_dim]."""
    source = before_head_split(x)
    if source is not None:
        return source
    swapped = insert_before(exported, before, aten.transpose.int, x, 1, 2)
    return insert_before(exported, before, aten.flatten.using_ints, swapped, 2)
