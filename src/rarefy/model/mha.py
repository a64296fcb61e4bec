"""`nn.MultiheadAttention` with heads of any size.

torch's class divides its width by the number of heads, so it can lose neither heads nor width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def without_mha_fastpath() -> Iterator[None]:
    """Disable torch's fused attention operator, which hides the single operations and their dimensions."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class PrunableMultiheadAttention(nn.MultiheadAttention):
    """The same weights under the same names and the same call, with any number of heads of any size.

    in_proj_weight [3 h d, E], out_proj.weight [E, h d], for h heads of size d and inputs of E features. Attention
    scores are divided by the square root of the original head size.

    >>> old = nn.MultiheadAttention(8, 4, batch_first=True).eval()
    >>> new, x = PrunableMultiheadAttention.from_mha(old), torch.randn(2, 5, 8)
    >>> torch.allclose(new(x, x, x)[0], old(x, x, x)[0], atol=1e-6)
    True
    """

    scale: float  # type: ignore[assignment]

    @classmethod
    def supports(cls, module: Any) -> bool:
        """Return whether a module is torch's attention with one width and no extra keys."""
        plain = type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim
        return plain and module.bias_k is None and not module.add_zero_attn

    @classmethod
    def from_mha(cls, old: nn.MultiheadAttention) -> PrunableMultiheadAttention:
        """Return an attention that shares the weights of `old`."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        for name, value in vars(old).items():
            if name not in ("_parameters", "_modules", "_buffers"):
                new.__dict__[name] = value
        new._parameters, new._modules, new._buffers = dict(old._parameters), dict(old._modules), dict(old._buffers)
        new._qkv_same_embed_dim = False  # torch's layers then leave the computation to this class
        new.scale = old.head_dim**-0.5
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what torch's class returns: outputs, and attention weights if requested."""
        unbatched, self_attention = query.dim() == 2, query is key and key is value
        if unbatched or not self.batch_first:
            query, key, value = (t.unsqueeze(0) if unbatched else t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._projected(query, key, value, self_attention)
        mask = _mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, self.dropout, self.training) @ v
            returned_weights = weights.mean(1) if average_attn_weights else weights
        else:
            dropout = self.dropout if self.training else 0.0
            causal = is_causal and key_padding_mask is None
            out = F.scaled_dot_product_attention(
                q, k, v, None if causal else mask, dropout, is_causal=causal, scale=self.scale
            )
            returned_weights = None
        y = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if unbatched:
            return y[0], None if returned_weights is None else returned_weights[0]
        return (y if self.batch_first else y.transpose(0, 1)), returned_weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, self_attention: bool) -> list[Tensor]:
        """Return queries, keys and values [batch, heads, length, head size]."""
        W, b = self.in_proj_weight, self.in_proj_bias
        if self_attention:
            parts = F.linear(query, W, b).chunk(3, -1)
        else:
            biases = (None,) * 3 if b is None else b.chunk(3)
            parts = [F.linear(x, w, c) for x, w, c in zip((query, key, value), W.chunk(3), biases)]
        return [p.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in parts]


def _mask(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Return what is added to attention scores; True and -inf exclude a key."""

    def additive(m: Tensor) -> Tensor:
        return torch.zeros_like(m, dtype=q.dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m

    if mask is not None:
        mask = additive(mask)
        mask = mask.unflatten(0, (len(q), -1)) if mask.dim() == 3 else mask
    if padding is not None:
        padding = additive(padding).reshape(len(q), 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def replace_mha_(model: nn.Module, names: Any = None) -> dict[str, tuple[nn.Module, str, nn.Module]]:
    """Replace torch's attention modules (all, or those named) where possible; return {name: (parent, attribute,
    old)}.
    """
    replaced = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if (names is None or name in names) and PrunableMultiheadAttention.supports(module) and name:
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            replaced[name] = owner, leaf, module
            setattr(owner, leaf, PrunableMultiheadAttention.from_mha(module))  # type: ignore[arg-type]
    return replaced
