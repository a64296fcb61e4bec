"""Dense weights of convolutions for images in NHWC order: blocks of 16 lanes of 4 bytes by 16 outputs, where a lane is
four int8 inputs, two in int16 or one in fp32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rarefy.runtime.huge_pages import allocate
from rarefy.runtime.packed_formats import ConvTiles
from rarefy.runtime.packing import unpack

LANES = 16  # of a block
BLOCK_BYTES = 4 * LANES
_LOCK = Lock()
_GROUPED = WeakTensorKeyDictionary()  # by the convolution's weight, then its groups


@dataclass(frozen=True)
class NhwcWeight:
    """A convolution's weight for NHWC images, and how its blocks lie in an output's inputs.

    Attributes:
        values: int32 [outputs / 16, blocks, 16, 16], four int8 codes, two in int16 or one fp32 number each.
        factors: fp32 [outputs padded to 64], the scales of the codes; None for fp32.
        row_sums: int32, sums of the codes of each output, padded likewise; None for fp32 and int16.
        segment_bytes: length of a run of inputs that is contiguous in an image: a kernel row, or one pixel where the
            kernel is dilated. In int16 the images are in fp32.
        num_segments: runs of an output.
        tight: the runs follow each other, which needs fewer blocks than a run of its own for each; of codes alone.
    """

    values: Tensor
    factors: Tensor | None
    row_sums: Tensor | None
    segment_bytes: int
    num_segments: int
    tight: bool

    @property
    def in_int16(self) -> bool:
        """Return whether products are in int16."""
        return self.factors is not None and self.row_sums is None

    @property
    def segment_stride(self) -> int:
        """Return the bytes from one run to the next where they are copied together."""
        return self.segment_bytes if self.tight else -(-self.segment_bytes // BLOCK_BYTES) * BLOCK_BYTES

    def block_lanes(self) -> list[int]:
        """Return how many of the 16 lanes of each block exist."""
        lanes = [self.segment_bytes // 4] * self.num_segments
        if self.in_int16:
            lanes = [-(-sum(lanes) // 2)]
        return [min(16, n - i) for n in ([sum(lanes)] if self.tight else lanes) for i in range(0, n, 16)]


def pack_nhwc(packed: ConvTiles) -> NhwcWeight:
    """Return a dense convolution's weight of one group for NHWC images. O(weights).

    >>> from rarefy.runtime.packing import pack_conv
    >>> pack_nhwc(pack_conv(torch.randn(8, 5, 3, 3), "int8", dense=True)).values.shape
    torch.Size([1, 2, 16, 16])
    """
    O, I, rows, columns = packed.shape
    per_row = packed.dilation[1] == 1
    if packed.kind == "int16":
        factors = torch.nn.functional.pad(packed.scales[:O], (0, -O % 64))  # type: ignore[index]
        runs = rows if per_row else rows * columns
        return NhwcWeight(_blocks(_int16_lanes(packed)), factors, None, 4 * I * rows * columns // runs, runs, True)
    lanes = _fp32_lanes(packed) if packed.scales is None else _code_lanes(packed)
    segments = lanes.reshape(O, rows if per_row else rows * columns, -1)
    _, num_segments, length = segments.shape
    tight = packed.scales is not None and -(-num_segments * length // LANES) < num_segments * -(-length // LANES)
    if tight:  # lanes of fp32 that do not exist cost nothing
        segments = segments.flatten(1)[:, None]
    values = _blocks(segments)
    if packed.scales is None or packed.row_sums is None:
        return NhwcWeight(values, None, None, 4 * length, num_segments, tight)
    padding = (0, -O % 64)
    factors = torch.nn.functional.pad(packed.scales[:O], padding)
    row_sums = torch.nn.functional.pad(packed.row_sums[:O], padding)
    return NhwcWeight(values, factors, row_sums, 4 * length, num_segments, tight)


def pack_winograd(transformed: Tensor) -> NhwcWeight:
    """Return the 16 products of Winograd's algorithm, fp32 [16, outputs, inputs], for NHWC images. O(weights).

    The values have a first dimension of 16 more than those of `pack_nhwc`.
    """
    count, O, I = transformed.shape
    padded = torch.nn.functional.pad(transformed, (0, 0, 0, -O % 16)).flatten(0, 1)
    values = _blocks(padded[:, None].contiguous().view(torch.int32))
    return NhwcWeight(values.unflatten(0, (count, -1)), None, None, 4 * I, 1, False)


def merged_groups(outputs: int, groups: int) -> int:
    """Return how many groups of a convolution are computed as one, so that their outputs fill vectors of 16.

    >>> merged_groups(128, 32), merged_groups(120, 3), merged_groups(30, 2)
    (4, 2, 2)
    """
    return min(groups, 16 // gcd(outputs // groups, 16))


def grouped_weight(weight: Tensor, groups: int) -> NhwcWeight:
    """Return a grouped fp32 convolution's weight [outputs, inputs of a group, rows, columns] for NHWC images, made
    once.

    Each kernel position is a segment. Some groups together have a block-diagonal weight; those that are missing in the
    last ones are zeros. An input that is infinite or NaN makes NaN of all outputs that are computed together.
    O(weights).
    """
    with _LOCK:
        packed: dict[int, NhwcWeight] = _GROUPED.get(weight) or {}
        if groups not in packed:
            packed[groups] = _pack_groups(weight, groups)
            _GROUPED[weight] = packed
        return packed[groups]


def _pack_groups(weight: Tensor, groups: int) -> NhwcWeight:
    O, I, rows, columns = weight.shape
    merged = merged_groups(O, groups)
    padded = torch.nn.functional.pad(weight.detach().float().flatten(1), (0, 0, 0, -groups % merged * (O // groups)))
    each = padded.view(-1, merged, O // groups, I, rows * columns)
    full = each.new_zeros(len(each), merged, O // groups, merged, I, rows * columns)
    for i in range(merged):
        full[:, i, :, i] = each[:, i]
    lanes = full.reshape(-1, merged * I, rows * columns).transpose(1, 2).contiguous().view(torch.int32)
    return NhwcWeight(_blocks(lanes), None, None, 4 * merged * I, rows * columns, False)


def _code_lanes(packed: ConvTiles) -> Tensor:
    """Return int8 codes, four in each int32 [outputs, kernel positions, inputs / 4]."""
    O, I, rows, columns = packed.shape
    lanes = packed.values.transpose(1, 2).flatten(2).flatten(0, 1)  # [O or more, lanes or more]
    used = -(-I // 4) * rows * columns
    codes = lanes[:O, :used].contiguous().view(torch.int8).view(O, -1, rows * columns, 4).transpose(1, 2)
    return codes.contiguous().view(torch.int32)[..., 0]


def _fp32_lanes(packed: ConvTiles) -> Tensor:
    """Return fp32 numbers as int32 [outputs, kernel positions, inputs]."""
    return unpack(packed).flatten(2).transpose(1, 2).contiguous().view(torch.int32)


def _int16_lanes(packed: ConvTiles) -> Tensor:
    """Return codes in int16, two in each int32 [outputs, 1, lanes]: kernel positions one after the other."""
    codes = unpack(replace(packed, scales=None)).permute(0, 2, 3, 1).flatten(1).to(torch.int16)
    return torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(torch.int32)[:, None]


def _blocks(segments: Tensor) -> Tensor:
    """Return lanes [outputs, segments, lanes] in blocks, padded with zeros, in memory for kernels."""
    O = len(segments)
    padded = torch.nn.functional.pad(segments, (0, -segments.shape[-1] % LANES, 0, 0, 0, -O % 16))
    blocks = padded.contiguous().view(-1, 16, padded[0].numel() // LANES, LANES)
    values = allocate(blocks.numel() * 4).view(torch.int32).view(len(blocks), blocks.shape[2], LANES, 16)
    return values.copy_(blocks.permute(0, 2, 3, 1))


def weight_of(kernel: Any) -> NhwcWeight:
    """Return a convolution's weight for NHWC images, made once by whichever thread comes first. O(weights)."""
    with _LOCK:
        kernel.nhwc = kernel.nhwc or pack_nhwc(kernel.held[0])
        return kernel.nhwc
