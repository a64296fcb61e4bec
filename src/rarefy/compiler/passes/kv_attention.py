"""Rules for what models write out in many ATen calls where the engine has one word: RMSNorm, rotary positions, norms of
heads, attention to what was kept."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import VIEWS, ExportedGraph, Node, aten, insert_before, same, shape
from rarefy.compiler.passes.matchers import split

_LIBRARY = torch.library.Library("rarefy", "FRAGMENT")
_LIBRARY.define("recall(Tensor q, Tensor k, Tensor v, float scale, int window) -> Tensor")


def _recall(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])  # only its shape counts: a word takes its place


_LIBRARY.impl("recall", _recall, "CompositeExplicitAutograd")
RECALL = torch.ops.rarefy.recall.default


def convert_cached_attention(t: ExportedGraph, node: Node) -> None:
    """rarefy::recall of queries, keys and values in heads: the word, behind the layers before it in the cache."""
    if node.target is not RECALL:
        return
    q, k, v, scale, window = node.args
    many, few, width = shape(q)[1], shape(k)[1], shape(q)[3]
    cache = next((n for n in t.graph.nodes if n.op == "placeholder" and n.name == "cache"), None)
    if cache is None:
        with t.graph.inserting_before(next(iter(t.graph.nodes))):
            cache = t.graph.placeholder("cache")
    flat = [split(x) for x in (q, k, v)]
    joined = [
        y
        if y is not None
        else insert_before(t, node, aten.flatten.using_ints, insert_before(t, node, aten.transpose.int, x, 1, 2), 2)
        for y, x in zip(flat, (q, k, v))
    ]
    before = t.kept, t.kept + few * width
    t.kept += few * (width + shape(v)[3])
    args = (*joined, cache, before, many, few, scale, window)
    with t.graph.inserting_before(node):
        new = t.graph.call_function(ops.cached_attention, args)
    new.meta["val"] = node.meta["val"].flatten(2)
    for user in list(node.users):
        if user.target in VIEWS and same(shape(user), shape(new)):
            user.replace_all_uses_with(new)
            t.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(insert_before(t, node, aten.unflatten.int, new, 2, [many, shape(v)[3]]))
    t.graph.erase_node(node)
