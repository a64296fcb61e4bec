"""State-space operators: linear attention and convolutions that carry a state from call to call."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.onnx.operators.attention import join_heads, split_heads
from rarefy.onnx.operators.signature import require

RULES = ("linear", "gated", "delta", "gated_delta")


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, past_state: Tensor | None = None, *,
    activation: str = "none", outputs: int = 1,
) -> Any:  # fmt: skip
    """Convolve each channel [batch, channels, length] with what came before; the second output is the new state."""
    require(activation in ("none", "silu", "swish"), f"the activation {activation!r} is not supported")
    reach = weight.shape[2] - 1
    x = F.pad(x, (reach, 0)) if past_state is None else torch.cat([past_state, x], 2)
    y = F.conv1d(x, weight, bias, groups=x.shape[1])
    y = y if activation == "none" else F.silu(y)
    return y if outputs == 1 else (y, x.narrow(2, x.shape[2] - reach, reach))


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, past_state: Tensor | None = None, decay: Tensor | None = None,
    beta: Tensor | None = None, *, q_num_heads: int, kv_num_heads: int, chunk_size: int = 64, scale: float = 0.0,
    update_rule: str = "gated_delta", outputs: int = 1,
) -> Any:  # fmt: skip
    """Return attention by a state [batch, heads, key size, value size] that each step decays, corrects and adds to."""
    require(update_rule in RULES, f"the update rule {update_rule!r} is not supported")
    require((decay is not None) == ("gated" in update_rule), f"the rule {update_rule} and the input decay do not fit")
    require((beta is not None) == ("delta" in update_rule), f"the rule {update_rule} and the input beta do not fit")
    q, k, v = (split_heads(x.float(), n) for x, n in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads)))
    factor = scale or 1 / math.sqrt(q.shape[-1])
    state = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if past_state is None else past_state.float()
    gates = None if decay is None else split_heads(decay.float(), kv_num_heads).exp()
    strengths = None if beta is None else split_heads(beta.float(), beta.shape[-1])
    steps = []
    for t in range(q.shape[2]):
        added = v[:, :, t]
        if gates is not None:
            state = state * gates[:, :, t, :, None]
        if strengths is not None:
            added = strengths[:, :, t] * (added - torch.einsum("bhdm,bhd->bhm", state, k[:, :, t]))
        state = state + k[:, :, t, :, None] * added[:, :, None]
        wide = state.repeat_interleave(q_num_heads // kv_num_heads, 1)
        steps.append(factor * torch.einsum("bhd,bhdm->bhm", q[:, :, t], wide))
    y = join_heads(torch.stack(steps, 2)).to(query.dtype)
    return y if outputs == 1 else (y, state.to(query.dtype if past_state is None else past_state.dtype))
