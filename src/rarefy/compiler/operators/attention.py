"""Attention, rotary position embeddings, and attention that reads and writes a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.spec import Call, OpSpec
from rarefy.compiler.program import Program
from rarefy.compiler.step_structs import Attention
from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import DTYPES

Pair = tuple[int, int]
INT8_ISAS = ("avx512", "avx2")  # where attention in int8 is faster than in fp32
MAX_HEADS_TOGETHER = 4  # of csrc/kernel_table.h
CACHE_ADDRESS = 1 << 50  # where a cache's addresses begin, to order the steps that touch it


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, kv_heads: int, scale: float, causal: bool,
    precision: str | None = None,
) -> Tensor:  # fmt: skip
    """Return softmax(q k^T scale + mask) v head by head, [batch, tokens, heads * head_dim].

    q is [batch, tokens, heads * head_dim], k and v are [batch, keys, kv_heads * head_dim]: fewer heads of keys and
    values serve several heads of queries each, and there may be more or fewer keys than queries, unless it is causal.
    With precision "bf16" products are those of numbers rounded to bf16, on CPUs that multiply them faster than fp32.
    With "int8" they may also be those of codes: queries and keys with a scale for each token of a head, values with one
    for each feature of the keys that padding does not hide, weights of the softmax in steps of 1/255 (1/127 on AVX2).
    Causal attention is not in int8: later tokens would round the values that earlier ones read.
    """
    if precision is not None:
        q, k, v = (t.bfloat16().float() for t in (q, k, v))
    return _attend(q, k, v, mask, heads, kv_heads, scale, causal)


def product_type(precision: str | None, causal: bool = False) -> str:
    """Return the type in which attention of a precision multiplies with the kernels in use."""
    if precision is not None and bindings.multiplies_bf16():
        return "bf16"
    return "int8" if precision == "int8" and not causal and bindings.isa() in INT8_ISAS else "fp32"


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, heads: int, kv_heads: int, scale: float, causal: bool
) -> Tensor:
    per_head = [t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads))]
    grouped = heads != kv_heads
    y = F.scaled_dot_product_attention(*per_head, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)


def additive_mask(mask: Tensor) -> Tensor:
    """Return a boolean mask (True: attend) as one that is added to scores, fp32; expanded dimensions stay expanded."""
    if mask.dtype != torch.bool:
        return mask.float()
    compact = mask[tuple(slice(0, 1) if s == 0 else slice(None) for s in mask.stride())]
    if compact.shape[-2] > 1 and _same_for_all_queries(compact):
        compact = compact[..., :1, :]  # the same for all queries
    return torch.zeros(compact.shape, dtype=torch.float32).masked_fill_(~compact, float("-inf")).expand(mask.shape)


def _same_for_all_queries(mask: Tensor) -> bool:
    words = mask.view(torch.int64) if mask.is_contiguous() and not mask.shape[-1] % 8 else mask  # compares faster
    return bool((words[..., :1, :] == words).all())


def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Return rotary position embeddings (Su et al. 2021, eq. 34) of x [batch, tokens, heads * head_dim].

    The first half of each head's features is rotated with its second half; cos and sin are [batch, tokens, head_dim].
    """
    y = x.unflatten(-1, (heads, -1))
    first, second = y.chunk(2, -1)
    return (y * cos[..., None, :] + torch.cat([-second, first], -1) * sin[..., None, :]).flatten(-2)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Any, slots: Pair, heads: int, kv_heads: int, scale: float, window: int
) -> Tensor:
    """Append keys and values to a `Cache`; return causal attention to all of its tokens, or the last `window` of them.

    slots are the features of the cache before this layer's keys and before its values; the shapes are those of
    `attention`. A window of 0 reads all tokens.
    """
    keys, values = (cache.append(slot, t) for slot, t in zip(slots, (k, v)))
    return _attend(q, keys, values, _visible(cache, q.shape[1], window), heads, kv_heads, scale, False)


def capped_cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Any, slots: Pair, heads: int, kv_heads: int, scale: float, window: int,
    cap: float,
) -> Tensor:  # fmt: skip
    """Return what `cached_attention` does with scores s replaced by cap tanh(s / cap), as Gemma 2 has it."""
    return _changed_scores(
        q, k, v, cache, slots, heads, kv_heads, window, lambda scores: cap * torch.tanh(scores * (scale / cap))
    )


def alibi_cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Any, slots: Pair, heads: int, kv_heads: int, scale: float, window: int,
    max_bias: float,
) -> Tensor:  # fmt: skip
    """Return what `cached_attention` does with linear position biases (ALiBi; Press et al. 2022, section 3).

    The score of a key n tokens before the query falls by n times the head's slope, see `alibi_slopes`.
    """

    def biased(scores: Tensor) -> Tensor:
        tokens, keys = scores.shape[-2:]
        distance = torch.arange(keys) - cache.past - torch.arange(tokens)[:, None]
        slopes = alibi_slopes(heads, max_bias).view(1, kv_heads, -1, 1, 1)
        return scores * scale + slopes * distance

    return _changed_scores(q, k, v, cache, slots, heads, kv_heads, window, biased)


def alibi_slopes(heads: int, max_bias: float) -> Tensor:
    """Return how much the scores of each head fall for each token between query and key.

    2^n heads have slopes in equal ratios, the last one 2^-max_bias. More heads have slopes between those.

    >>> alibi_slopes(4, 8.0).tolist(), alibi_slopes(3, 4.0).tolist()
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.25, 0.0625, 0.5])
    """
    power = 1 << (heads.bit_length() - 1)
    steps = [h + 1.0 if h < power else h - power + 0.5 for h in range(heads)]
    return torch.tensor([2 ** (-max_bias * s / power) for s in steps], dtype=torch.float32)


def _changed_scores(
    q: Tensor, k: Tensor, v: Tensor, cache: Any, slots: Pair, heads: int, kv_heads: int, window: int,
    change: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Return `cached_attention` with scores [batch, kv_heads, heads of each, tokens, keys] that `change` returns for
    products of queries and keys."""
    keys, values = (cache.append(slot, t) for slot, t in zip(slots, (k, v)))
    query, key, value = (
        t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (keys, kv_heads), (values, kv_heads))
    )
    scores = change(query.unflatten(1, (kv_heads, -1)) @ key[:, :, None].transpose(-1, -2))
    mask = _visible(cache, q.shape[1], window)
    scores.masked_fill_(~(mask if mask.dim() == 2 else mask[:, :, None]), float("-inf"))
    return (scores.softmax(-1) @ value[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2)


def _visible(cache: Any, tokens: int, window: int) -> Tensor:
    """Return which tokens of a cache the next ones see, bool [tokens, keys] or [batch, 1, tokens, keys]."""
    query = cache.past + torch.arange(tokens)[:, None]
    key = torch.arange(cache.past + tokens)
    visible = (key <= query) & ((key > query - window) if window else True)
    if cache.starts is not None:
        start = cache.starts[:, None, None]
        visible = visible & ((key >= start) | (query < start))
    return visible if visible.dim() == 2 else visible[:, None]


def _lower_attention(p: Program, node: Node) -> None:
    q, k, v, mask, heads, kv_heads, scale, causal, precision = node.args
    out = p.make(node)
    a = Attention(
        batch=p.shape(node)[0],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=out.features // heads,
        queries=p.shape(node)[1],
        keys=p.shape(k)[1],
        seq_stride=out.tokens.seq_stride,
        kv_seq_stride=p.values[k].tokens.seq_stride,
        scale=scale,
        causal=int(causal),
        dtype=DTYPES.index(product_type(precision, causal)),
    )
    values = {n: p.use(p.values[x]) for n, x in zip("qkv", (q, k, v))} | {"out": p.use(out)}
    p.attentions.append((a, values))
    if mask is not None:
        p.masks.append((mask, a))
    p.step("attention", out, attention=addressof(a), **values)


def _lower_rope(p: Program, node: Node) -> None:
    x, cos, sin, heads = node.args
    out = p.make(node)
    angles = {"cos": p.use(p.values[cos]), "sin": p.use(p.values[sin])}
    p.step("rope", out, x=p.use(p.values[x]), out=p.use(out), heads=heads, **angles)


def _lower_cached_attention(p: Program, node: Node) -> None:
    q, k, v, _, slots, heads, kv_heads, scale, window, *change = node.args
    out = p.make(node)
    head_dim = out.features // heads
    a = Attention(
        batch=p.shape(node)[0],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        queries=p.shape(node)[1],
        seq_stride=out.tokens.seq_stride,
        cache=addressof(p.cache),
        k_offset=slots[0],
        v_offset=slots[1],
        window=window,
        scale=scale,
        causal=1,
        heads_together=heads_together(prod(p.shape(node)[:2]), heads, kv_heads),
        dtype=DTYPES.index("bf16" if bindings.scales_blocks(rows=False) and _reads_codes(p) else "fp32"),
    )
    if change:
        setattr(a, "cap" if node.target is capped_cached_attention else "max_bias", change[0])
    values = {"q": p.use(p.values[q]), "out": p.use(out)}
    p.attentions.append((a, values))
    spans = [(CACHE_ADDRESS + s, CACHE_ADDRESS + s + kv_heads * head_dim) for s in slots]
    for i, x in enumerate((k, v)):
        value = p.use(p.values[x])
        p.step("kv_store", value, [(*spans[i], True)], x=value, attention=addressof(a), store_values=i)
    p.use(p.values[q])
    p.step("attention", out, [(*s, False) for s in spans], attention=addressof(a), **values)


def heads_together(tokens: int, heads: int, kv_heads: int) -> int:
    """Return how many heads that read the same keys a thread computes together: as many as leave work for all.

    >>> heads_together(64, 9, 3), heads_together(1, 4, 4)
    (3, 1)
    """
    group = heads // kv_heads
    together = min(group, MAX_HEADS_TOGETHER)
    while together > 1 and tokens * kv_heads * -(-group // together) < 2 * torch.get_num_threads():
        together //= 2
    return together


def _reads_codes(p: Program) -> bool:
    """Return whether a program has weights whose inputs are rounded anyway."""
    return any(getattr(k.held[0], "two_terms", False) for k in p.kernels.values())


def _attention_fits(call: Call) -> bool:
    mask, heads, kv_heads, _, causal = call.node.args[3:8]
    q, k, v = call.shapes
    if len(q) != 3 or k != v or len(k) != 3 or k[0] != q[0] or heads % kv_heads or q[2] % heads or not q[2]:
        return False
    if not k[1] or (causal and k[1] != q[1]):
        return False
    if k[2] != q[2] // heads * kv_heads:
        return False
    if mask is None:
        return True
    if mask not in call.masks or call.masks[mask].dim() > 4:
        return False
    sizes = (1,) * (4 - call.masks[mask].dim()) + tuple(call.masks[mask].shape)
    return all(n in (1, s) for n, s in zip(sizes, (q[0], heads, q[1], k[1])))


def _rope_fits(call: Call) -> bool:
    x, cos, sin = call.shapes
    head_dim, rest = divmod(x[-1], call.node.args[3])
    return not rest and head_dim > 0 and not head_dim % 2 and cos == sin == (*x[:-1], head_dim)


def _cached_attention_fits(call: Call) -> bool:
    """Raise unless keys and values have as many features as their slots of the cache."""
    (keys_at, values_at), heads, kv_heads = call.node.args[4:7]
    q, k, v = call.shapes
    features = values_at - keys_at
    whole_heads = len(q) == 3 and features > 0 and not features % kv_heads and not heads % kv_heads
    return whole_heads and k == v == (*q[:2], features) and q[2] == heads * (features // kv_heads)


CACHED_ATTENTION = OpSpec(
    reference=cached_attention,
    arguments=("tensor", "tensor", "tensor", "cache", "slots", "count", "count", "number", "window"),
    lower=_lower_cached_attention,
    fits=_cached_attention_fits,
    heavy=True,
    whole_sequences=True,
)
CACHED = (cached_attention, capped_cached_attention, alibi_cached_attention)  # which read and write a KV cache

OPERATORS = (
    OpSpec(
        reference=attention,
        arguments=("tensor", "tensor", "tensor", "mask?", "count", "count", "number", "flag", "precision?"),
        lower=_lower_attention,
        fits=_attention_fits,
        heavy=True,
        few_tokens=False,
        whole_sequences=True,
    ),
    OpSpec(reference=additive_mask, arguments=("tensor",)),
    OpSpec(reference=rope, arguments=("tensor", "tensor", "tensor", "count"), lower=_lower_rope, fits=_rope_fits),
    CACHED_ATTENTION,
    replace(CACHED_ATTENTION, reference=capped_cached_attention, arguments=(*CACHED_ATTENTION.arguments, "number")),
    replace(CACHED_ATTENTION, reference=alibi_cached_attention, arguments=(*CACHED_ATTENTION.arguments, "max_bias")),
)
