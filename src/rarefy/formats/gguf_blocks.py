"""Blocks of 32 weights as GGUF files store them: from codes on a quantization grid, and back.

Q8_0  fp16 scale, 32 codes of 8 bits;                     W = scale x code
Q4_0  fp16 scale, 32 codes of 4 bits, low halves first;   W = scale x (code - 8)
Q4_1  fp16 scale, fp16 minimum, 32 codes of 4 bits;       W = scale x code + minimum
Q5_0, Q5_1  as Q4_0 and Q4_1, with 5 bits, from 16 on
Q4_K, Q5_K  8 groups of 32; scales and minimums of 6 bits, each times a number of the block in fp16
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.model.quant_grid import Grid, OffsetGrid

BLOCK = 32
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q4_K": 144, "Q5_K": 176}  # of a block
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


def to_grid(kind: str, blocks: Tensor) -> Grid | OffsetGrid | None:
    """Return the grid of a weight that is stored as blocks [O, bytes of a row], in groups of 32.

    None for Q6_K, whose groups have 16 weights, for types of floating point, for codes that the grid of 8 bits does not
    have, and for negative scales or minimums that kernels do not hold. O(O C).

    >>> to_grid("Q8_0", from_grid("Q8_0", torch.full((1, 32), -1.0), Grid(8, torch.tensor([[0.5]])))).scale
    tensor([[0.5000]])
    """
    if kind not in BYTES:
        return None
    parts = blocks.reshape(len(blocks), -1, BYTES[kind])
    if kind in OFFSET:
        bits, scales_of = OFFSET[kind]
        return _offset_grid(bits, *scales_of(parts))
    bits = SYMMETRIC[kind]
    scale = _half(parts[..., :2])
    if kind == "Q8_0" and bool((parts[..., 2:].contiguous().view(torch.int8) == -128).any()):
        return None
    middle, negative = 1 << bits - 1, scale < 0  # codes of negative scales are counted from the other end
    flips = kind != "Q8_0" and bool(negative.any())
    zero = torch.where(negative, middle - 1, middle).to(torch.uint8) if flips else None
    return Grid(bits, torch.where(scale == 0, 1.0, scale.abs()), zero)


def _half(parts: Tensor) -> Tensor:
    """Return numbers in fp16, two bytes each, as fp32 [..]."""
    return parts.contiguous().view(torch.float16).squeeze(-1).float()


def _block_minimums(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and negated minimums of blocks of Q4_1 or Q5_1 [O, blocks, bytes]."""
    return _half(parts[..., :2]), -_half(parts[..., 2:4])


def _nested_minimums(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and negated minimums of groups of 32 of blocks of Q4_K or Q5_K [O, blocks, bytes].

    8 scales and 8 minimums of 6 bits lie in 12 bytes: the first four of either in the low bits of bytes 0 to 3 and 4 to
    7, the others in nibbles of bytes 8 to 11, with their two high bits in those of the first ones.
    """
    low, middle, high = (parts[..., k : k + 4] for k in (4, 8, 12))
    scales = torch.cat([low & 63, high & 15 | low >> 6 << 4], -1)
    minimums = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], -1)
    by_group = zip((parts[..., :2], parts[..., 2:4]), (scales, minimums))
    scale, minimum = ((_half(by)[..., None] * codes).flatten(1) for by, codes in by_group)
    return scale, minimum


def _offset_grid(bits: int, scale: Tensor, minimum: Tensor) -> OffsetGrid | None:
    """Return the grid of scales and minimums, or None where kernels do not hold them."""
    flat = scale == 0  # all weights of the group are its minimum, whatever their codes
    scale = torch.where(flat, torch.where(minimum == 0, 1.0, minimum), scale)
    grid = OffsetGrid(bits, scale, minimum)
    return grid if grid.fits else None


OFFSET = {
    "Q4_1": (4, _block_minimums),
    "Q5_1": (5, _block_minimums),
    "Q4_K": (4, _nested_minimums),
    "Q5_K": (5, _nested_minimums),
}
SYMMETRIC = {"Q8_0": 8, "Q5_0": 5, "Q4_0": 4}  # bits


def _by_block(small: Tensor, O: int, groups: int) -> Tensor:
    """Expand scales or zero points [1 or O, groups of a grid] to [O, blocks of a row]."""
    return small.expand(O, -1).repeat_interleave(groups // small.shape[1], 1).contiguous()
