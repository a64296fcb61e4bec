"""Rules for what models write out in many ATen calls where the engine has one word: RMSNorm, rotary positions, norms of
heads, attention to what was kept."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.compiler import ops
from rarefy.compiler.export import split
from rarefy.compiler.fx_utils import VIEWS, Node, Traced, added, aten, kind_of, new_constant, put, same, shape
from rarefy.engine.formulas import gained, over_features

_LIBRARY = torch.library.Library("rarefy", "FRAGMENT")
_LIBRARY.define("recall(Tensor q, Tensor k, Tensor v, float scale, int window) -> Tensor")


def _recall(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])  # only its shape counts: a word takes its place


_LIBRARY.impl("recall", _recall, "CompositeExplicitAutograd")
RECALL = torch.ops.rarefy.recall.default

MOST_FOLDED = 1 << 26  # numbers of a constant that is made of others


FILLED = {  # calls that take of their first argument its type alone
    aten.new_zeros.default: 0.0, aten.zeros_like.default: 0.0, aten.new_ones.default: 1.0, aten.ones_like.default: 1.0,
}  # fmt: skip


def constants(t: Traced, node: Node) -> None:
    """What follows from constants alone is one, and so is what is filled with zeros or ones."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not node.all_input_nodes or not str(value.numel()).isdigit():
        return
    if node.target in FILLED and value.numel() <= MOST_FOLDED:
        filled = torch.full([int(s) for s in value.shape], FILLED[node.target]).to(value.dtype)
        node.replace_all_uses_with(new_constant(t, f"{node.name}_known", filled))
        t.graph.erase_node(node)
        return
    if getattr(node.target, "tags", ()) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return
    if value.numel() > MOST_FOLDED or any(n.name not in t.constants for n in node.all_input_nodes):
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: t.constants[n.name])
    made = new_constant(t, f"{node.name}_known", node.target(*args, **kwargs))
    node.replace_all_uses_with(made)
    t.graph.erase_node(node)


def embedding(t: Traced, node: Node) -> None:
    """Rows of a constant weight."""
    if node.target is aten.embedding.default and kind_of(node) == torch.float32 and node.args[0].name in t.constants:
        put(t, node, ops.embedding, node.args[1], node.args[0])


def _pair(node: Any, target: Any) -> tuple[Any, Any]:
    """The two arguments of a call, (None, None) of anything else."""
    found = isinstance(node, fx.Node) and node.target is target and len(node.args) == 2
    return (node.args[0], node.args[1]) if found else (None, None)


def rms(t: Traced, node: Node) -> None:
    """x rsqrt(mean(x^2) + least), and its gain behind it."""
    if node.target is not aten.mul.Tensor or kind_of(node) != torch.float32:
        return
    for x, by in (node.args[:2], node.args[1::-1]):
        if not isinstance(by, fx.Node) or by.target is not aten.rsqrt.default:
            continue
        mean, least = _pair(by.args[0], aten.add.Tensor)
        if mean is None or isinstance(least, fx.Node) or mean.target is not aten.mean.dim:
            continue
        if not over_features(mean, x) or not _squares(mean.args[0], x):
            continue
        gained(t, put(t, node, ops.norm, x, None, None, float(least), False, 1))
        return


def _squares(node: Any, x: Node) -> bool:
    if _pair(node, aten.pow.Tensor_Scalar) == (x, 2):
        return True
    return _pair(node, aten.mul.Tensor) == (x, x)


def pieces(t: Traced, node: Node) -> None:
    """A piece of a product's outputs is a product with a piece of its weight: queries, keys and values in one."""
    y, start, end = _piece(node)
    if y is None or y.target is not ops.product or y.args[3] is not None:
        return
    node.replace_all_uses_with(product_of(t, node, y, torch.arange(start, end)))
    t.graph.erase_node(node)


def product_of(t: Traced, before: Node, y: Node, rows: Tensor) -> Node:
    """Return the product of some of the rows of a product's weight and bias, of the same inputs, before a node."""
    x, *weights, _, act = y.args
    w, bias = (
        None if n is None else new_constant(t, f"{before.name}_{part}", t.constants[n.name][rows])
        for n, part in zip(weights, ("weight", "bias"))
    )
    with t.graph.inserting_before(before):
        new = t.graph.call_function(ops.product, (x, w, bias, None, act))
    new.meta["val"] = y.meta["val"][..., : len(rows)]
    return new


def _piece(node: Node) -> tuple[Any, int, int]:
    """Of which node's last dimension this is a piece, from where to where, if all that read it take pieces."""
    if node.target is aten.slice.Tensor and _last(node.args[0], node.args[1]):
        y = node.args[0]
        whole = all(u.target is aten.slice.Tensor and _last(y, u.args[1]) and len(u.args) == 4 for u in y.users)
        start, end = node.args[2:] if len(node.args) == 4 else (None, None)
        if whole and isinstance(start, int) and isinstance(end, int) and 0 <= start < end:
            return y, start, min(end, shape(y)[-1])
        return None, 0, 0
    cut = node.args[0] if node.target is operator.getitem else None
    if not isinstance(cut, fx.Node) or cut.target not in (aten.split.Tensor, aten.chunk.default, SPLIT):
        return None, 0, 0
    y, dim = cut.args[0], (*cut.args, 0)[2]
    if not isinstance(y, fx.Node) or len(y.users) != 1 or not _last(y, dim):
        return None, 0, 0
    widths = [v.shape[-1] for v in cut.meta["val"]]
    start = sum(widths[: node.args[1]])
    return y, start, start + widths[node.args[1]]


SPLIT = aten.split_with_sizes.default


def _last(y: Any, dim: Any) -> bool:
    return dim in (-1, len(shape(y)) - 1)


def heads(t: Traced, node: Node) -> None:
    """A norm of each head's features: view, norm. Becomes a norm of groups, and a view behind it."""
    if node.target is not ops.norm or node.args[5] != 1:
        return
    v, *rest = node.args
    if v.target not in VIEWS or len(shape(v)) != 4 or len(shape(v.args[0])) != 3:
        return
    x, many, width = v.args[0], *shape(v)[2:]
    if same(shape(x)[:2], shape(v)[:2]):
        new = added(t, node, ops.norm, x, *rest[:4], many)
        node.replace_all_uses_with(added(t, node, aten.unflatten.int, new, 2, [many, width]))
        t.graph.erase_node(node)


def rotation(t: Traced, node: Node) -> None:
    """x cos + cat(-x's second half, its first) sin, of x that was split into heads."""
    a, b = _pair(node, aten.add.Tensor)
    for plain, turned in ((a, b), (b, a)):
        for x, cosine in _either(plain):
            for halves, sine in _either(turned):
                y = split(x)
                if y is not None and _turned(halves, x) and _angles(cosine, x) and _angles(sine, x):
                    many, width = shape(x)[1], shape(x)[3]
                    new = added(t, node, ops.rotate, y, cosine.args[0], sine.args[0], many)
                    back = added(t, node, aten.unflatten.int, new, 2, [many, width])
                    node.replace_all_uses_with(added(t, node, aten.transpose.int, back, 1, 2))
                    t.graph.erase_node(node)
                    return


def _either(node: Any) -> list[tuple[Any, Any]]:
    a, b = _pair(node, aten.mul.Tensor)
    return [] if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) else [(a, b), (b, a)]


def _turned(node: Node, x: Node) -> bool:
    """cat([-x[half:], x[:half]])"""
    if node.target is not aten.cat.default or len(node.args[0]) != 2 or (*node.args, 0)[1] not in (-1, 3):
        return False
    back, front = node.args[0]
    if back.target is not aten.neg.default or any(n.target is not aten.slice.Tensor for n in (back.args[0], front)):
        return False
    half, last = shape(x)[3] // 2, back.args[0]
    return (
        front.args == (x, 3, 0, half)
        and last.args[:3] == (x, 3, half)
        and last.args[3] >= 2 * half
        and len(last.args) == 4
    )


def _angles(node: Node, x: Node) -> bool:
    """[batch, 1, tokens, features of a head], out of [batch, tokens, features of a head]."""
    if node.target is not aten.unsqueeze.default or node.args[1] != 1 or kind_of(node) != torch.float32:
        return False
    small, whole = shape(node.args[0]), shape(x)
    return len(small) == 3 and same(small, (whole[0], whole[2], whole[3]))


def recalled(t: Traced, node: Node) -> None:
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
        y if y is not None else added(t, node, aten.flatten.using_ints, added(t, node, aten.transpose.int, x, 1, 2), 2)
        for y, x in zip(flat, (q, k, v))
    ]
    before = t.kept, t.kept + few * width
    t.kept += few * (width + shape(v)[3])
    args = (*joined, cache, before, many, few, scale, window)
    with t.graph.inserting_before(node):
        new = t.graph.call_function(ops.recall, args)
    new.meta["val"] = node.meta["val"].flatten(2)
    for user in list(node.users):
        if user.target in VIEWS and same(shape(user), shape(new)):
            user.replace_all_uses_with(new)
            t.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(added(t, node, aten.unflatten.int, new, 2, [many, shape(v)[3]]))
    t.graph.erase_node(node)


KEEPING = (ops.product, ops.norm, ops.add, ops.times, ops.activation)  # whose outputs lie as their inputs do


def between_views(t: Traced, node: Node) -> None:
    """Words between two views, the second of which takes back the first, need neither."""
    if node.target not in VIEWS or not isinstance(node.args[0], fx.Node) or node.args[0].target not in KEEPING:
        return
    inside: dict[Node, None] = {}
    if not _inside(node.args[0], shape(node)[:-1], inside) or shape(node)[-1] != shape(node.args[0])[-1]:
        return
    last = node.args[0]
    if any(u not in inside and u is not node for n in inside for u in n.users) or len(last.users) != 1:
        return
    made: dict[Node, Node] = {}
    for old in (n for n in list(t.graph.nodes) if n in inside):  # in the graph's order
        places = _tensors(old)
        args = [made.get(a, a.args[0]) if i in places and a is not None else a for i, a in enumerate(old.args)]
        with t.graph.inserting_before(node):
            made[old] = t.graph.call_function(old.target, tuple(args))
        first: Any = args[0]
        x = first.meta["val"]
        made[old].meta["val"] = x.new_empty((*x.shape[:-1], shape(old)[-1]))
    node.replace_all_uses_with(made[last])
    t.graph.erase_node(node)


def _tensors(node: Node) -> tuple[int, ...]:
    """Which arguments of a word are values."""
    return {ops.product: (0, 3), ops.add: (0, 1), ops.times: (0, 1)}.get(node.target, (0,))


def _inside(node: Node, lead: tuple[Any, ...], inside: dict[Node, None]) -> bool:
    """Gather the words that lead from views of values with this lead to a node; False where there is another way."""
    inside[node] = None
    for x in (node.args[i] for i in _tensors(node)):
        if x is None or x in inside:
            continue
        if x.target in KEEPING and len(inside) < MOST_INSIDE:
            if not _inside(x, lead, inside):
                return False
        elif x.target not in VIEWS or shape(x)[-1] != shape(x.args[0])[-1] or not same(shape(x.args[0])[:-1], lead):
            return False
    return True


MOST_INSIDE = 64  # words
