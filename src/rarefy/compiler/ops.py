"""The words of a compiled graph: what the native plan knows, each as a function that torch runs too, which is
its oracle and serves where there are no kernels.

x      [batch, tokens, features], or [tokens, features], or [features]; w [outputs, features]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.runtime.reference import ACTIVATIONS

Pair = tuple[int, int]


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, more: Tensor | None = None, act: str | None = None
) -> Tensor:
    """Return act(x w^T + bias + more)."""
    y = F.linear(x, w, bias)
    return ACTIVATIONS[act](y if more is None else y + more)


def conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None, more: Tensor | None, act: str | None, stride: Pair, padding: Pair,
    dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    """Return act(x [images, inputs, height, width] convolved with w + bias + more)."""
    y = F.conv2d(x, w, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[act](y if more is None else y + more)


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the largest of the pixels of x [images, features, height, width] that a kernel takes together."""
    return F.max_pool2d(x, kernel, stride, padding, dilation)


def global_avg_pool(x: Tensor) -> Tensor:
    """Return means over pixels, [images, features]."""
    return x.mean((2, 3))


def embedding(ids: Tensor, w: Tensor) -> Tensor:
    """Return rows of w."""
    return F.embedding(ids, w)


def norm(x: Tensor, gain: Tensor | None, bias: Tensor | None, least: float, centred: bool, groups: int = 1) -> Tensor:
    """Return LayerNorm over features, or, not centred, RMSNorm; of each of `groups` of features by itself."""
    x = x.unflatten(-1, (groups, -1))
    y = F.layer_norm(x, x.shape[-1:], gain, bias, least) if centred else F.rms_norm(x, x.shape[-1:], gain, least)
    return (y if centred or bias is None else y + bias).flatten(-2)


def add(x: Tensor, more: Tensor, act: str | None = None) -> Tensor:
    """Return act(x + more)."""
    return ACTIVATIONS[act](x + more)


def mul(x: Tensor, more: Tensor, act: str | None = None) -> Tensor:
    """Return act(x) more, as gated networks do."""
    return ACTIVATIONS[act](x) * more


def activation(x: Tensor, act: str) -> Tensor:
    """Return act(x)."""
    return ACTIVATIONS[act](x)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, kv_heads: int, scale: float, causal: bool
) -> Tensor:
    """Return softmax(q k^T scale + mask) v, [batch, tokens, heads x width], head by head; keys and values may have
    fewer heads, each for several of the queries'."""
    apart = [t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads))]
    y = F.scaled_dot_product_attention(
        *apart, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
    )
    return y.transpose(1, 2).flatten(2)


def additive_mask(mask: Tensor) -> Tensor:
    """Return a mask of what counts as a mask to be added, fp32; what was expanded stays so."""
    if mask.dtype != torch.bool:
        return mask.float()
    small = mask[tuple(slice(0, 1) if s == 0 else slice(None) for s in mask.stride())]
    if small.shape[-2] > 1 and bool((small[..., :1, :] == small).all()):
        small = small[..., :1, :]  # the same for all queries
    return torch.zeros(small.shape).masked_fill_(~small, float("-inf")).expand(mask.shape)


def rope(x: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> Tensor:
    """Return rotary positions (Su et al. 2021, eq. 34): of each head, the first half of its features turned with the
    second by angles whose cosines and sines [batch, tokens, features of a head] are given."""
    y = x.unflatten(-1, (heads, -1))
    a, b = y.chunk(2, -1)
    return (y * cosine[..., None, :] + torch.cat([-b, a], -1) * sine[..., None, :]).flatten(-2)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Any, before: Pair, heads: int, kv_heads: int, scale: float, window: int
) -> Tensor:
    """Keep keys and values in a `Cache`, behind so many features of it, and return causal attention to all that is
    there: to the last `window` tokens, if that is not 0."""
    keys, values = (cache.keep(at, t) for at, t in zip(before, (k, v)))
    query = cache.past + torch.arange(q.shape[1])[:, None]
    key = torch.arange(keys.shape[1])
    seen = (key <= query) & ((key > query - window) if window else True)
    if cache.starts is not None:
        start = cache.starts[:, None, None]
        seen = seen & ((key >= start) | (query < start))
    mask = seen if seen.dim() == 2 else seen[:, None]
    apart = [t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (keys, kv_heads), (values, kv_heads))]
    y = F.scaled_dot_product_attention(*apart, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads)
    return y.transpose(1, 2).flatten(2)
