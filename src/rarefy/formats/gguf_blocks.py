"""Blocks of 32 weights as GGUF files store them: Q8_0, Q4_0 and Q4_1, from codes on a quantization grid and back.

Q8_0  fp16 scale, 32 codes of 8 bits;                     W = scale x code
Q4_0  fp16 scale, 32 codes of 4 bits, low halves first;   W = scale x (code - 8)
Q4_1  fp16 scale, fp16 minimum, 32 codes of 4 bits;       W = scale x code + minimum
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.model.quant_grid import Grid

BLOCK = 32
NEGATIVE = 7  # zero point of a grid whose codes are 15 - those of Q4_0, because scales of Q4_0 may be negative
MIN_SCALE, MAX_SCALE = 2.0**-14, 65504.0  # scales that fp16 holds with all its bits


def holds(kind: str, grid: Grid, shape: tuple[int, ...]) -> bool:
    """Return whether blocks of a kind ("Q8_0", "Q4_0", "Q4_1") hold the codes of a grid without rounding them.

    >>> holds("Q4_0", Grid(4, torch.ones(1, 2)), (8, 64)), holds("Q4_0", Grid(8, torch.ones(1, 2)), (8, 64))
    (True, False)
    """
    scales = grid.scale.float()
    if len(shape) != 2 or scales.dim() != 2 or shape[1] % BLOCK or (shape[1] // scales.shape[1]) % BLOCK:
        return False
    if not bool(((scales >= MIN_SCALE) & (scales <= MAX_SCALE)).all()):
        return False
    if kind == "Q4_1":
        return grid.bits <= 4
    if kind == "Q4_0" and grid.zero is not None:
        return grid.bits == 4 and bool(((grid.zero == 8) | (grid.zero == NEGATIVE)).all())
    return grid.zero is None and grid.bits <= (4 if kind == "Q4_0" else 8)


def from_grid(kind: str, weight: Tensor, grid: Grid) -> Tensor:
    """Return a weight [O, C] on a grid as blocks, uint8 [O, bytes of a row]. Only scales are rounded, to fp16. O(O C).

    >>> blocks = from_grid("Q8_0", torch.full((1, 32), -1.0), Grid(8, torch.tensor([[0.5]])))
    >>> blocks[0, :2].view(torch.float16).item(), blocks[0, 2:].view(torch.int8)[0].item()
    (0.5, -2)
    """
    O, C = weight.shape
    groups = C // BLOCK
    codes = grid.codes(weight).reshape(O, groups, BLOCK)
    scale = _by_block(grid.scale.float(), O, groups)
    if kind == "Q4_0" and grid.zero is not None:
        sign = torch.where(_by_block(grid.zero, O, groups) == NEGATIVE, -1, 1)
        scale, codes = scale * sign, codes * sign[..., None]
    head = scale.half()[..., None].view(torch.uint8)
    if kind == "Q8_0":
        return torch.cat([head, codes.to(torch.int8).view(torch.uint8)], -1).reshape(O, -1)
    if kind == "Q4_1":
        low = torch.full_like(scale, 8) if grid.zero is None else _by_block(grid.zero.float(), O, groups)
        minimum = (-scale * low).half()[..., None].view(torch.uint8)
        head, codes = torch.cat([head, minimum], -1), codes.float() + low[..., None]
    else:
        codes = codes + 8
    codes = codes.to(torch.uint8)
    return torch.cat([head, codes[..., :16] | codes[..., 16:] << 4], -1).reshape(O, -1)


def to_grid(kind: str, blocks: Tensor) -> Grid | None:
    """Return the grid of a weight that is stored as blocks of Q8_0 or Q4_0 [O, bytes of a row].

    None for other kinds, and for codes that the grid of 8 bits does not have. O(O C).

    >>> to_grid("Q8_0", from_grid("Q8_0", torch.full((1, 32), -1.0), Grid(8, torch.tensor([[0.5]])))).scale
    tensor([[0.5000]])
    """
    if kind not in ("Q8_0", "Q4_0"):
        return None
    parts = blocks.reshape(len(blocks), -1, 34 if kind == "Q8_0" else 18)
    scale = parts[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    if kind == "Q8_0" and bool((parts[..., 2:].contiguous().view(torch.int8) == -128).any()):
        return None
    zero = torch.where(scale < 0, NEGATIVE, 8).to(torch.uint8) if kind == "Q4_0" and bool((scale < 0).any()) else None
    return Grid(8 if kind == "Q8_0" else 4, torch.where(scale == 0, 1.0, scale.abs()), zero)


def _by_block(small: Tensor, O: int, groups: int) -> Tensor:
    """Expand scales or zero points [1 or O, groups of a grid] to [O, blocks of a row]."""
    return small.expand(O, -1).repeat_interleave(groups // small.shape[1], 1).contiguous()
