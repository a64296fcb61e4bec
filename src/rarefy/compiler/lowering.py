"""Words as steps of a plan."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from typing import Any

import torch

from rarefy.compiler import conv_lowering, ops
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.program import NT, Attention, Program, Value
from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import Bitmask, Panels

CACHED = 1 << 50  # where the addresses of a cache begin, for the order of steps


def _product(p: Program, node: Node) -> None:
    x, _, _, more, _ = node.args
    kernel = p.kernels[node]
    packed = kernel.held[0]
    source, extra = p.values[x], {} if more is None else {"residual": p.values[more]}
    kind = _numbers(packed, p.few)
    if kind == "int8" or (p.few and (kind != "fp32" or source.features % 64)):
        source, extra["in_scales"] = conv_lowering.converted(p, x, kind)
    if isinstance(packed, Panels) and kind == "int8" and not p.few:
        p.held.append(packed.sums.to(torch.int32))
        extra["row_sums"] = p.held[-1].data_ptr()
    out = p.make(node)
    places = {n: p.use(v) if isinstance(v, Value) else v for n, v in extra.items()}
    how = {"weight": addressof(kernel.about), "format": bindings.FORMATS.index(type(packed))}
    p.step("linear", out, x=p.use(source), out=p.use(out), **how, **places)


def _numbers(packed: Any, few: bool) -> str:
    """What a kernel takes its inputs in. What is unfolded to fp32 for many tokens takes them as they are."""
    if isinstance(packed, Panels):
        return "fp32" if packed.exact or (packed.parts and not few) else "int8"
    if isinstance(packed, Bitmask) and not few:
        return "int8" if packed.kind == "int8" else "fp32"
    return "int8" if packed.kind == "int4" else packed.kind


def _norm(p: Program, node: Node) -> None:
    x, gain, bias, least, centred, groups = node.args
    v, out = p.use(p.values[x]), p.make(node)
    weights = {"gamma": p.constant(gain), "bias": p.constant(bias)}
    p.step("norm", out, x=v, out=p.use(out), **weights, eps=least, subtract_mean=int(centred), groups=groups)


def _pair(p: Program, node: Node) -> None:
    x, *rest = node.args
    more, act = (None, rest[0]) if node.target is ops.activation else rest
    out = p.make(node)
    extra = {} if more is None else {"other": p.use(p.values[more])}
    op = "mul" if node.target is ops.mul else "add"
    p.step(op, out, x=p.use(p.values[x]), out=p.use(out), act=bindings.ACTIVATIONS.index(act), **extra)


def _attention(p: Program, node: Node) -> None:
    q, k, v, mask, heads, kv_heads, scale, causal = node.args
    out = p.make(node)
    t = out.tokens
    a = Attention(
        batch=p.shape(node)[0],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=out.features // heads,
        queries=p.shape(node)[1],
        keys=p.shape(k)[1],
        seq_stride=t.apart,
        scale=scale,
        causal=int(causal),
    )
    places = {n: p.use(p.values[x]) for n, x in zip("qkv", (q, k, v))} | {"out": p.use(out)}
    p.attends.append((a, places))
    if mask is not None:
        p.masks.append((mask, a))
    p.step("attention", out, attention=addressof(a), **places)


def _rotate(p: Program, node: Node) -> None:
    x, cosine, sine, heads = node.args
    out = p.make(node)
    angles = {"cos": p.use(p.values[cosine]), "sin": p.use(p.values[sine])}
    p.step("rope", out, x=p.use(p.values[x]), out=p.use(out), heads=heads, **angles)


def _recall(p: Program, node: Node) -> None:
    q, k, v, _, before, heads, kv_heads, scale, window = node.args
    out = p.make(node)
    width, tokens = out.features // heads, out.tokens
    a = Attention(
        batch=p.shape(node)[0],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        queries=p.shape(node)[1],
        seq_stride=tokens.apart,
        cache=addressof(p.kept),
        k_offset=before[0],
        v_offset=before[1],
        window=window,
        scale=scale,
        causal=1,
    )
    a.k_stride = a.v_stride = kv_heads * width * NT
    places = {"q": p.use(p.values[q]), "out": p.use(out)}
    p.attends.append((a, places))
    kept = [(CACHED + b, CACHED + b + kv_heads * width) for b in before]
    for flag, x in enumerate((k, v)):
        value = p.use(p.values[x])
        p.step("kv_store", value, x=value, attention=addressof(a), store_values=flag, kept=[(*kept[flag], True)])
    p.use(p.values[q])
    p.step("attention", out, attention=addressof(a), kept=[(*k, False) for k in kept], **places)


LOWER: dict[Any, Callable[[Program, Node], None]] = {
    ops.linear: _product, ops.norm: _norm, ops.add: _pair, ops.mul: _pair, ops.activation: _pair,
    ops.attention: _attention, ops.rope: _rotate, ops.cached_attention: _recall, ops.conv2d: conv_lowering.convolution,
    ops.max_pool2d: conv_lowering.pool, ops.global_avg_pool: conv_lowering.average,
}  # fmt: skip
