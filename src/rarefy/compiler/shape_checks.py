"""Whether words fit the sizes that they meet: asked before a native call runs words of a graph that came from a file.

A graph that was exported fits by its making. One from a file may say anything, and a plan counts on sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError
from rarefy.compiler import conv_lowering, ops
from rarefy.compiler.fx_utils import Node
from rarefy.runtime.packed_formats import MOST_STRIDE

Size = tuple[int, ...]


def check(
    nodes: Sequence[Node], inputs: Mapping[Node, Tensor], kernels: Mapping[Node, Any], constants: Mapping[str, Tensor]
) -> None:
    """Raise ModelError unless words fit their inputs, and these are fp32. O(words)."""
    for node, t in inputs.items():
        if t.dtype != torch.float32 or not t.is_cpu or t.layout != torch.strided or not t.dim():
            got = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise ModelError(f"the saved graph does not fit together: {node.name} is {got}, fp32 rows are expected")
    masks = {n.args[3] for n in nodes if n.target is ops.attention}
    known: dict[Node, Size] = {n: tuple(t.shape) for n, t in inputs.items() if n not in masks}
    for node in nodes:
        sizes = [known.get(a) for a in _values(node)]
        fits = None not in sizes and FITS[node.target](node, sizes, kernels, inputs, constants)
        if not fits:
            raise ModelError(f"the saved graph does not fit together: {node.name} is a word on sizes {sizes}")
        known[node] = _made(node, sizes[0], kernels, constants)


def _made(node: Node, first: Any, kernels: Mapping[Node, Any], constants: Mapping[str, Tensor]) -> Size:
    """The sizes of what a word gives."""
    if node.target is ops.linear:
        return (*first[:-1], kernels[node].shape[0])
    if node.target is ops.conv2d:
        return _convolved(node, first, _weight(node, kernels, constants))
    if node.target is ops.max_pool2d:
        return (*first[:2], *conv_lowering.out_sizes(first[2:], *node.args[1:]))
    return first[:2] if node.target is ops.global_avg_pool else first


def _weight(node: Node, kernels: Mapping[Node, Any], constants: Mapping[str, Tensor]) -> Size:
    return tuple(kernels[node].shape if node in kernels else constants[node.args[1].name].shape)


def _convolved(node: Node, first: Any, weight: Size) -> Size:
    stride, padding, dilation = node.args[5:8]
    return (first[0], weight[0], *conv_lowering.out_sizes(first[2:], weight[2:], stride, padding, dilation))


def _convolution(node: Node, sizes: Any, kernels: Mapping[Node, Any], _: Any, constants: Mapping[str, Tensor]) -> bool:
    x, *more = sizes
    weight = _weight(node, kernels, constants)
    if len(x) != 4 or len(weight) != 4 or x[1] != weight[1] * node.args[8] or 0 in x:
        return False
    if node in kernels:  # which has strides of its own
        packed = kernels[node].held[0]
        if (packed.stride, packed.padding, packed.dilation) != tuple(tuple(a) for a in node.args[5:8]):
            return False
    out = _convolved(node, x, weight)
    bias = node.args[2]
    fits = bias is None or tuple(constants[bias.name].shape) == weight[:1]
    return min(out) > 0 and more in ([], [out]) and fits


def _pool(node: Node, sizes: Any, *_: Any) -> bool:
    kernel, stride, padding, dilation = node.args[1:]
    (x,) = sizes
    if len(x) != 4 or 0 in x or max(stride) > MOST_STRIDE or any(2 * p > k for p, k in zip(padding, kernel)):
        return False
    return min(kernel) > 0 and min(conv_lowering.out_sizes(x[2:], kernel, stride, padding, dilation)) > 0


def _average(_: Node, sizes: Any, *__: Any) -> bool:
    return len(sizes[0]) == 4 and 0 not in sizes[0]


def _values(node: Node) -> list[Node]:
    """The values that a word is about, without weights and masks."""
    places = {ops.linear: (0, 3), ops.norm: (0,), ops.activation: (0,), ops.attention: (0, 1, 2)}
    places |= {ops.rope: (0, 1, 2), ops.conv2d: (0, 3), ops.max_pool2d: (0,)}
    places |= {ops.global_avg_pool: (0,), ops.cached_attention: (0, 1, 2)}
    found = [node.args[i] for i in places.get(node.target, (0, 1))]
    return [a for a in found if a is not None]


def _product(node: Node, sizes: Any, kernels: Mapping[Node, Any], *_: Any) -> bool:
    x, *more = sizes
    return x[-1] == kernels[node].shape[1] and more in ([], [(*x[:-1], kernels[node].shape[0])])


def _norm(node: Node, sizes: Any, _: Any, __: Any, constants: Mapping[str, Tensor]) -> bool:
    given = [constants[c.name] for c in node.args[1:3] if c is not None]
    each, rest = divmod(sizes[0][-1], node.args[5])
    return each > 0 and not rest and all(tuple(c.shape) == (each,) for c in given)


def _rotate(node: Node, sizes: Any, *_: Any) -> bool:
    x, cosine, sine = sizes
    width, rest = divmod(x[-1], node.args[3])
    return not rest and width > 0 and not width % 2 and cosine == sine == (*x[:-1], width)


def _alike(_: Node, sizes: Any, *__: Any) -> bool:
    return len(set(sizes)) == 1


def _attention(node: Node, sizes: Any, _: Any, inputs: Mapping[Node, Tensor], __: Any) -> bool:
    mask, heads, kv_heads = node.args[3:6]
    q, k, v = sizes
    if len(q) != 3 or k != v or k[:2] != q[:2] or heads % kv_heads or q[2] % heads or not q[2]:
        return False
    if k[2] != q[2] // heads * kv_heads:
        return False
    if mask is None:
        return True
    if mask not in inputs or inputs[mask].dim() > 4:
        return False
    m = (1,) * (4 - inputs[mask].dim()) + tuple(inputs[mask].shape)
    return all(n in (1, s) for n, s in zip(m, (q[0], heads, q[1], q[1])))


def _recall(node: Node, sizes: Any, *_: Any) -> bool:
    """Whether keys and values are as many and as wide as their places in the cache, [batch, tokens, features] all."""
    (at, after), heads, kv_heads = node.args[4:7]
    q, k, v = sizes
    kept = after - at
    wide = len(q) == 3 and kept > 0 and not kept % kv_heads and not heads % kv_heads
    return wide and k == v == (*q[:2], kept) and q[2] == heads * (kept // kv_heads)


FITS: dict[Any, Callable[..., bool]] = {
    ops.linear: _product,
    ops.norm: _norm,
    ops.add: _alike,
    ops.mul: _alike,
    ops.activation: _alike,
    ops.attention: _attention,
    ops.rope: _rotate,
    ops.conv2d: _convolution,
    ops.max_pool2d: _pool,
    ops.global_avg_pool: _average,
    ops.cached_attention: _recall,
}
