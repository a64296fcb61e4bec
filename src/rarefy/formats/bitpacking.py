"""Bits and small codes in bytes, the least significant first."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20  # codes that are packed at once, a multiple of 8


def pack_bits(bits: Tensor) -> Tensor:
    """Return bools of any shape as uint8 [ceil(n / 8)], the first bool in the lowest bit: O(n).

    >>> pack_bits(torch.tensor([True, True, False, False, False, False, False, False, True])).tolist()
    [3, 1]
    """
    n = bits.numel()
    padded = torch.zeros(-(-n // 8) * 8, dtype=torch.bool, device=bits.device)
    padded[:n] = bits.reshape(-1)
    # eight bytes of 0 or 1 as one int64: this factor moves byte i to bit 56 + i, and no two terms overlap
    return (padded.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """Return the first `n` bits of uint8 `packed` as bool [n]: O(n).

    >>> unpack_bits(torch.tensor([3], dtype=torch.uint8), 4).tolist()
    [True, True, False, False]
    """
    bits = torch.arange(256, device=packed.device)[:, None] >> torch.arange(8, device=packed.device) & 1
    table = bits.to(torch.bool).view(torch.int64).flatten()
    return table.index_select(0, packed.to(torch.int32)).view(torch.bool)[:n]


def pack_codes(u: Tensor, bits: int) -> Tensor:
    """Return uint8 codes below 2^bits as a stream of bits, uint8 [ceil(n bits / 8)]. O(n).

    >>> pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    if bits == 8:
        return u.contiguous()
    if 8 % bits == 0:
        per_byte = 8 // bits
        full = torch.nn.functional.pad(u, (0, -len(u) % per_byte)).view(-1, per_byte)
        return (full << (torch.arange(per_byte, dtype=torch.uint8) * bits)).sum(1, dtype=torch.uint8)
    shifts = torch.arange(bits, dtype=torch.uint8)
    return torch.cat([pack_bits(part[:, None] >> shifts & 1) for part in u.split(CHUNK)] or [u])


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the first `n` codes of a stream, uint8 [n]. O(n)."""
    if bits == 8:
        return packed[:n]
    if 8 % bits == 0:
        shifts = torch.arange(8 // bits, dtype=torch.uint8) * bits
        return (packed[:, None] >> shifts & ((1 << bits) - 1)).flatten()[:n]
    weights, step, out = 1 << torch.arange(bits, dtype=torch.uint8), CHUNK * bits // 8, []
    for a in range(0, len(packed), step):
        part = unpack_bits(packed[a : a + step], min(CHUNK, n - len(out) * CHUNK) * bits)
        out.append((part.view(-1, bits) * weights).sum(1, dtype=torch.uint8))
    return torch.cat(out) if out else packed[:0]
