"""The words of a compiled graph: what the native plan knows, each as a function that torch runs too, which is
its oracle and serves where there are no kernels.

x      [batch, tokens, features], or [tokens, features], or [features]; w [outputs, features]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.runtime.reference import ACTIVATIONS

Pair = tuple[int, int]


def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, more: Tensor | None = None, act: str | None = None
) -> Tensor:
    """Return act(x w^T + bias + more)."""
    y = F.linear(x, w, bias)
    return ACTIVATIONS[act](y if more is None else y + more)


def convolution(
    x: Tensor, w: Tensor, bias: Tensor | None, more: Tensor | None, act: str | None, stride: Pair, padding: Pair,
    dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    """Return act(x [images, inputs, height, width] convolved with w + bias + more)."""
    y = F.conv2d(x, w, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[act](y if more is None else y + more)


def norm(x: Tensor, gain: Tensor | None, bias: Tensor | None, least: float, centred: bool) -> Tensor:
    """Return LayerNorm over features, or, not centred, RMSNorm."""
    if centred:
        return F.layer_norm(x, x.shape[-1:], gain, bias, least)
    y = F.rms_norm(x, x.shape[-1:], gain, least)
    return y if bias is None else y + bias


def add(x: Tensor, more: Tensor, act: str | None = None) -> Tensor:
    """Return act(x + more)."""
    return ACTIVATIONS[act](x + more)


def times(x: Tensor, more: Tensor, act: str | None = None) -> Tensor:
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


def additive(mask: Tensor) -> Tensor:
    """Return a mask of what counts as a mask to be added, fp32; what was expanded stays so."""
    if mask.dtype != torch.bool:
        return mask.float()
    small = mask[tuple(slice(0, 1) if s == 0 else slice(None) for s in mask.stride())]
    if small.shape[-2] > 1 and bool((small[..., :1, :] == small).all()):
        small = small[..., :1, :]  # the same for all queries
    return torch.zeros(small.shape).masked_fill_(~small, float("-inf")).expand(mask.shape)
