"""Attention and rotary embeddings, of ONNX and as ONNX Runtime fuses them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.onnx.dtypes import dtype_of
from rarefy.onnx.operators.signature import require


def split_heads(x: Tensor, count: int) -> Tensor:
    """Split [batch, length, heads * size] into [batch, heads, length, size]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Join [batch, heads, length, size] to [batch, length, heads * size]."""
    return x.transpose(1, 2).flatten(2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, past_key: Tensor | None = None,
    past_value: Tensor | None = None, nonpad_kv_seqlen: Tensor | None = None, *, is_causal: int = 0,
    kv_num_heads: int | None = None, q_num_heads: int | None = None, qk_matmul_output_mode: int = 0,
    scale: float | None = None, softcap: float = 0.0, softmax_precision: int | None = None,
    left_window_size: int = -1, right_window_size: int = -1, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return attention's output; with several outputs also all keys and values so far, and the scores."""
    flat = q.dim() == 3
    if flat:
        require(q_num_heads and kv_num_heads, "Attention on three dimensions needs the numbers of its heads")
        q, k, v = split_heads(q, q_num_heads or 1), split_heads(k, kv_num_heads or 1), split_heads(v, kv_num_heads or 1)
    k = k if past_key is None else torch.cat([past_key, k], 2)
    v = v if past_value is None else torch.cat([past_value, v], 2)
    offset: Any = 0 if past_key is None else past_key.shape[2]
    if nonpad_kv_seqlen is not None:
        offset = (nonpad_kv_seqlen.to(torch.int64) - q.shape[2]).reshape(-1, 1, 1, 1)
    windows = (left_window_size, 0 if is_causal else right_window_size)
    bias = _bias(q, k, attn_mask, nonpad_kv_seqlen, windows, bool(is_causal), right_window_size, offset)
    simple = outputs == 1 and not softcap and softmax_precision is None and nonpad_kv_seqlen is None
    if (simple and (attn_mask is None or attn_mask.dtype != torch.bool) and bias is not None) or (
        simple and bias is None
    ):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        y = y if bias is None else torch.where(_masked(bias), 0.0, y)
        return join_heads(y) if flat else y
    y, scores = _scored(q, k, v, bias, scale, softcap, softmax_precision, qk_matmul_output_mode)
    y = join_heads(y) if flat else y
    return y if outputs == 1 else (y, k, v, scores)[:outputs]


def _masked(bias: Tensor) -> Tensor:
    """Return the rows that may read nothing."""
    return torch.isneginf(bias.amax(-1, keepdim=True))


def _bias(
    q: Tensor, k: Tensor, mask: Tensor | None, lengths: Tensor | None, windows: tuple[int, int], causal: bool,
    right: int, offset: Any,
) -> Tensor | None:  # fmt: skip
    """Return what is added to the scores: minus infinity where nothing is read."""
    queries, keys = q.shape[2], k.shape[2]
    bias = None
    if mask is not None:
        bias = torch.where(mask, 0.0, -math.inf).to(q.dtype) if mask.dtype == torch.bool else mask
        if mask.shape[-1] != keys:
            bias = F.pad(bias, (0, keys - mask.shape[-1]), value=-math.inf)
    limits = []
    ahead = torch.arange(keys) - torch.arange(queries)[:, None]  # of each key from its query, but for the offset
    if causal:
        limits.append(ahead <= offset)
    if windows[0] >= 0:
        limits.append(ahead >= offset - windows[0])
    if right >= 0:
        limits.append(ahead <= offset + right)
    if lengths is not None:
        limits.append(torch.arange(keys) < lengths.to(torch.int64).reshape(-1, 1, 1, 1))
    for limit in limits:
        part = torch.where(limit, 0.0, -math.inf).to(q.dtype)
        bias = part if bias is None else bias + part
    return bias


def _scored(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, softcap: float, precision: int | None,
    mode: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return attention, and the scores after a step of `mode`: 0 the product, 1 capped, 2 with the bias, 3 softmax."""
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    steps = [(q * root) @ (k * root).transpose(-1, -2)]
    steps.append(torch.tanh(steps[0] / softcap) * softcap if softcap else steps[0])
    steps.append(steps[1] if bias is None else steps[1] + bias)
    wide = steps[2] if precision is None else steps[2].to(dtype_of(precision, "Attention"))
    weights = torch.softmax(wide, -1)
    if bias is not None:
        weights = torch.where(_masked(bias), 0.0, weights)
    steps.append(weights.to(q.dtype))
    return steps[3] @ v, steps[mode]


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, *, interleaved: int = 0,
    num_heads: int = 0, rotary_embedding_dim: int = 0,
) -> Tensor:  # fmt: skip
    """Rotate pairs of elements by the angle of their position."""
    flat = x.dim() == 3
    parts = x.unflatten(-1, (num_heads, -1)) if flat else x.transpose(1, 2)  # [batch, length, heads, size]
    size = rotary_embedding_dim or parts.shape[-1]
    turned, rest = parts[..., :size], parts[..., size:]
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    y = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    y = torch.cat([y, rest], -1)
    return y.flatten(2) if flat else y.transpose(1, 2)


def rotary_of_onnxruntime(
    x: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor, *, interleaved: int = 0, num_heads: int = 0,
    rotary_embedding_dim: int = 0, scale: float = 1.0, is_packed_batching: int = 0,
) -> Tensor:  # fmt: skip
    """Rotate as com.microsoft's operator does: one position for all batches is where they begin."""
    require(not is_packed_batching and scale == 1.0, "RotaryEmbedding of packed batches is not supported")
    if position_ids.numel() == 1:
        length = x.shape[1] if x.dim() == 3 else x.shape[2]
        position_ids = (position_ids.reshape(1, 1) + torch.arange(length)).expand(x.shape[0], -1)
    count = num_heads
    if x.dim() == 3 and not count:
        count = x.shape[-1] // (rotary_embedding_dim or 2 * cos.shape[-1])
    return rotary_embedding(
        x, cos, sin, position_ids, interleaved=interleaved, num_heads=count, rotary_embedding_dim=rotary_embedding_dim
    )


def fused_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, mask_index: Tensor | None = None,
    past: Tensor | None = None, attention_bias: Tensor | None = None, *, num_heads: int, unidirectional: int = 0,
    qkv_hidden_sizes: Any = None, scale: float | None = None, mask_filter_value: float = -10000.0, do_rotary: int = 0,
    past_present_share_buffer: int = 0, rotary_embedding_dim: int = 0, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return com.microsoft.Attention: inputs are projected to queries, keys and values, then attended to."""
    require(not do_rotary and not past_present_share_buffer, "com.microsoft.Attention with rotation is not supported")
    sizes = list(qkv_hidden_sizes) if qkv_hidden_sizes else [weight.shape[1] // 3] * 3
    mixed = x @ weight
    mixed = mixed if bias is None else mixed + bias
    q, k, v = (split_heads(part, num_heads) for part in mixed.split(sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y = _attend(q, k, v, mask_index, attention_bias, bool(unidirectional), scale, mask_filter_value)
    return join_heads(y) if outputs == 1 else (join_heads(y), torch.stack([k, v]))


def multi_head_attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None, attention_bias: Tensor | None = None, past_key: Tensor | None = None,
    past_value: Tensor | None = None, *, num_heads: int, scale: float | None = None, unidirectional: int = 0,
    mask_filter_value: float = -10000.0, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return com.microsoft.MultiHeadAttention of projected queries, keys and values."""
    require(k is not None and v is not None and q.dim() == 3, "MultiHeadAttention on packed inputs is not supported")
    assert k is not None and v is not None
    if bias is not None:
        require(k.dim() == 3, "MultiHeadAttention with a bias on parted keys is not supported")
        b = bias.split([q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = q + b[0], k + b[1], v + b[2]
    q = split_heads(q, num_heads)
    k, v = (x if x.dim() == 4 else split_heads(x, num_heads) for x in (k, v))
    k = k if past_key is None else torch.cat([past_key, k], 2)
    v = v if past_value is None else torch.cat([past_value, v], 2)
    y = join_heads(_attend(q, k, v, key_padding_mask, attention_bias, bool(unidirectional), scale, mask_filter_value))
    return y if outputs == 1 else (y, k, v)[:outputs]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float | None,
    filter_value: float,
) -> Tensor:  # fmt: skip
    """Attend with ONNX Runtime's masks: lengths [batch], keys [batch, keys], pairs [batch, queries, keys]."""
    keys = k.shape[2]
    if mask is not None:
        require(mask.dim() in (1, 2, 3), f"a mask of {mask.dim()} dimensions is not supported")
        if mask.dim() == 1:
            require(mask.shape[0] == q.shape[0], "a mask of starts and ends is not supported")
            attended = torch.arange(keys) < mask[:, None]
        else:
            attended = mask != 0
        attended = attended[:, None] if mask.dim() == 3 else attended[:, None, None]
        part = torch.where(attended, 0.0, filter_value).to(q.dtype)
        bias = part if bias is None else bias + part
    if causal:
        allowed = torch.arange(keys) <= torch.arange(q.shape[2])[:, None] + (keys - q.shape[2])
        part = torch.where(allowed, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        bias = part if bias is None else (bias + part).clamp(min=torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale or None)
