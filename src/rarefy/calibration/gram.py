"""Gram matrices of layer inputs: H = X X^T, [G, C, C] for G groups and C columns of the weight read as [G, O, C].

C = kernel positions x inputs of a group, kernel positions first, as `rarefy.model.layout` orders a weight. A transposed
convolution is read as the matrix that multiplies each input, before the outputs overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.model import distributed
from rarefy.model.layers import Layer

MIRROR_COLUMNS = 256  # columns mirrored at a time
MIN_SPLIT_COLUMNS = 192  # up to this size a diagonal block is computed whole
PLAIN_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
MIN_CORRELATION = 0.1  # of inputs with those of the dense model
ROWS = 2048  # input vectors per product, so that their fp32 copy stays small


@dataclass
class Gram:
    """Sums over calibration tokens. They are additive, so those of several processes may be summed."""

    H: Tensor | None = None  # [G, C, C]; the upper triangle alone until `finish`
    cross: Tensor | None = None  # [G, C, C] (X - X') X'^T, where X are the dense model's inputs
    tokens: float = 0.0
    held_out: Gram | None = None  # the sums of one batch, which are included and can be subtracted to test on it

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add inputs [G, tokens, C], and the dense model's inputs at the same tokens. O(G tokens C^2 / 2)."""
        G, n, C = x.shape
        if self.H is None:
            self.H = x.new_zeros(G, C, C, dtype=torch.float32)
        if dense is not None and self.cross is None:
            self.cross = x.new_zeros(G, C, C, dtype=torch.float32)
        for rows in range(0, n, ROWS):
            part = x[:, rows : rows + ROWS].float()
            _add_upper(self.H, part)
            if dense is not None:
                assert self.cross is not None
                self.cross.baddbmm_((dense[:, rows : rows + ROWS].float() - part).transpose(1, 2), part)
        self.tokens += n

    def copy(self) -> Gram:
        """Return a copy of the sums so far."""
        assert self.H is not None
        return Gram(self.H.clone(), None if self.cross is None else self.cross.clone(), self.tokens)

    @property
    def diagonal(self) -> Tensor:
        """Return the sums of squared inputs, [G, C]."""
        assert self.H is not None
        return self.H.diagonal(dim1=-2, dim2=-1)

    def finalize(self) -> Gram:
        """Return the mean over tokens with both triangles filled. The sums are overwritten."""
        assert self.H is not None
        H, n, C = self.H, max(self.tokens, 1), self.H.shape[-1]
        for a in range(0, C, MIRROR_COLUMNS):  # in place: these are the largest tensors of a wide layer
            b = min(a + MIRROR_COLUMNS, C)
            H[:, a:b, a:b] = H[:, a:b, a:b].triu() + H[:, a:b, a:b].triu(1).transpose(-2, -1)
            H[:, b:, a:b] = H[:, a:b, b:].transpose(-2, -1)
        held = None if self.held_out is None else self.held_out.finalize()
        return Gram(H.div_(n), None if self.cross is None else self.cross.div_(n), self.tokens, held)


def all_reduce_gram(gram: Gram | None, layer: Layer, dense: bool) -> Gram | None:
    """Return the sums over all processes for one layer, or None if no process has any. Sends O(C^2)."""
    tokens = distributed.all_reduce_number(0.0 if gram is None else gram.tokens)
    if not tokens:
        return None
    shape, local_gram = _shape(layer), gram or Gram()
    H = distributed.all_reduce_tensor(local_gram.H, shape)
    cross = distributed.all_reduce_tensor(local_gram.cross, shape) if dense else None
    held_out = None
    if dense and distributed.all_reduce_number(float(local_gram.held_out is not None)):
        held_out = all_reduce_gram(local_gram.held_out, layer, dense)
    return Gram(H, cross, tokens, held_out)


def identity_gram(layer: Layer) -> Gram:
    """Return the Gram matrix of a layer whose inputs are not known: all weights count the same."""
    G, C, _ = _shape(layer)
    return Gram(torch.eye(C, dtype=torch.float32, device=layer.original.device).repeat(G, 1, 1))


def _shape(layer: Layer) -> tuple[int, int, int]:
    """Return the shape of a layer's Gram matrices, [G, C, C]."""
    G, K, _, I = layer.layout.shape
    C = K * I if layer.layout.kind == "conv" else I
    return G, C, C


def _add_upper(H: Tensor, x: Tensor) -> None:
    """H += x^T x in its upper triangle, by recursive halves, so that little below the diagonal is computed."""
    C = H.shape[-1]
    if C <= MIN_SPLIT_COLUMNS:
        H.baddbmm_(x.transpose(1, 2), x)
        return
    half = C // 2
    H[:, :half, half:].baddbmm_(x[..., :half].transpose(1, 2), x[..., half:])
    _add_upper(H[:, :half, :half], x[..., :half])
    _add_upper(H[:, half:, half:], x[..., half:])


def input_signature(layer: Layer, module: nn.Module) -> tuple[Any, ...]:
    """Return what layers with the same input tensor must agree in for their Gram matrices to be equal."""
    G, K, _, I = layer.layout.shape
    if layer.layout.kind == "conv":
        m: Any = module
        return (G, K, I, m.kernel_size, m.stride, m.padding, m.dilation, m.padding_mode)
    return (G, 1, I)


def input_columns(layer: Layer, module: Any, x: Any, mask: Tensor | None) -> Tensor:
    """Return a layer's input as [G, tokens, C] without padding, which `mask` [batch, length] marks. O(G tokens C)."""
    G, _, _, I = layer.layout.shape
    if layer.layout.kind == "experts":
        return _pad_and_stack(x)
    if isinstance(x, tuple):  # query, key and value of an attention
        return _pad_and_stack([token_rows(t, mask, module.batch_first) for t in x])
    if layer.layout.kind == "conv":
        return _unfold(module, padded_input(module, x))
    if layer.layout.kind == "conv-transposed":
        x = x if x.dim() == len(module.kernel_size) + 2 else x[None]
        return x.reshape(len(x), G, I, -1).permute(1, 0, 3, 2).reshape(G, -1, I)
    batch_first = getattr(module, "batch_first", True)
    return token_rows(x, mask, batch_first)[None]


def are_same_tokens(rows: Tensor, dense: Tensor) -> bool:
    """Return whether inputs [G, tokens, C] can be those of the dense model at the same tokens.

    A router or a detector may pick others, of which there may be equally many: then inputs are not correlated.
    O(G tokens C).

    >>> x = torch.randn(1, 1000, 8)
    >>> are_same_tokens(x, 2 * x + 1), are_same_tokens(x, x.roll(1, 1)), are_same_tokens(x, x[:, 1:])
    (True, False, False)
    """
    if rows.shape != dense.shape:
        return False
    rows, dense = (x.float() - x.float().mean(1, keepdim=True) for x in (rows, dense))
    return bool(2 * (rows * dense).sum() >= MIN_CORRELATION * (rows.square().sum() + dense.square().sum()))


def padding_mask(batch: Any) -> Tensor | None:
    """Return the attention mask of a batch as bool, usually [texts, tokens]; None without one."""
    mask = batch.get("attention_mask") if hasattr(batch, "keys") else None
    return None if mask is None else mask.bool()


def token_rows(x: Tensor, mask: Tensor | None, batch_first: bool = True) -> Tensor:
    """Return [tokens, width] without the padding that `mask` [batch, length] marks, if the shapes agree."""
    if mask is not None and not batch_first and x.dim() == 3:
        x = x.transpose(0, 1)
    rows = x.reshape(-1, x.shape[-1])
    matches = x.shape[:2] == mask.shape if mask is not None and x.dim() == 3 else False
    is_flat = mask is not None and x.dim() == 2 and len(x) == mask.numel()
    return rows[mask.flatten().bool()] if mask is not None and (matches or is_flat) else rows


def _pad_and_stack(parts: list[Tensor]) -> Tensor:
    """Stack matrices of different lengths; rows of zeros add nothing to a Gram matrix."""
    longest = max(len(p) for p in parts)
    return torch.stack([F.pad(p, (0, 0, 0, longest - len(p))) for p in parts])


def padded_input(m: Any, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Return a convolution's input [N, C, *spatial] with its padding.

    A subclass may pad inside its forward (TensorFlow's "same"): what `sizes` of the output need beyond the module's own
    padding is added, the larger half on the right.
    """
    n = len(m.kernel_size)
    x = x if x.dim() == n + 2 else x[None]
    if sizes is None and type(m).forward not in PLAIN_FORWARDS:
        with torch.no_grad():
            sizes = type(m).forward(m, x[:1]).shape[2:]
    mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
    x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
    for d, size in enumerate(sizes or ()):
        missing = (size - 1) * m.stride[d] + m.dilation[d] * (m.kernel_size[d] - 1) + 1 - x.shape[2 + d]
        if missing > 0:
            x = F.pad(x, [0, 0] * (n - 1 - d) + [missing // 2, missing - missing // 2])
    return x


def _unfold(m: Any, x: Tensor) -> Tensor:
    """Return [N, groups x I, *spatial] as [groups, windows, kernel positions x I]: a view of windows, copied once."""
    n = len(m.kernel_size)
    for d in range(n):
        x = x.unfold(2 + d, m.dilation[d] * (m.kernel_size[d] - 1) + 1, m.stride[d])
    x = x[(..., *(slice(None, None, step) for step in m.dilation))]  # [N, C, *out, *kernel]
    N, C = x.shape[:2]
    x = x.reshape(N, m.groups, C // m.groups, *x.shape[2:])
    order = (1, 0, *range(3, 3 + n), *range(3 + n, 3 + 2 * n), 2)
    return x.permute(order).reshape(m.groups, N * math.prod(x.shape[3 : 3 + n]), -1)
