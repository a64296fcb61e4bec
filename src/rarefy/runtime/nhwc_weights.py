"""Dense int8 weights of convolutions for images in NHWC order: blocks of 16 inputs of 4 bytes by 16 outputs."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from rarefy.runtime.huge_pages import allocate
from rarefy.runtime.packed_formats import ConvTiles

BLOCK_BYTES = 64  # inputs of a block
_LOCK = Lock()


@dataclass(frozen=True)
class NhwcWeight:
    """A convolution's weight for NHWC images, and how its blocks lie in an output's inputs.

    Attributes:
        values: int32 [outputs / 16, blocks, 16, 16], four int8 codes each.
        factors: fp32 [outputs padded to 64], the scales of the codes.
        row_sums: int32, sums of the codes of each output, padded likewise.
        segment_bytes: length of a run of inputs that is contiguous in an image: a kernel row, or one pixel where the
            kernel is dilated.
        num_segments: runs of an output.
        tight: the runs follow each other, which needs fewer blocks than a run of its own for each.
    """

    values: Tensor
    factors: Tensor
    row_sums: Tensor
    segment_bytes: int
    num_segments: int
    tight: bool

    @property
    def segment_stride(self) -> int:
        """Bytes from one run to the next where they are copied together."""
        return self.segment_bytes if self.tight else -(-self.segment_bytes // BLOCK_BYTES) * BLOCK_BYTES

    def block_lanes(self) -> list[int]:
        """Return how many of the 16 lanes of each block exist."""
        lanes = [self.segment_bytes // 4] * self.num_segments
        return [min(16, n - i) for n in ([sum(lanes)] if self.tight else lanes) for i in range(0, n, 16)]


def pack_nhwc(packed: ConvTiles) -> NhwcWeight:
    """Return a dense int8 convolution's weight for NHWC images. O(weights).

    >>> from rarefy.runtime.packing import pack_conv
    >>> pack_nhwc(pack_conv(torch.randn(8, 5, 3, 3), "int8", dense=True)).values.shape
    torch.Size([1, 2, 16, 16])
    """
    O, I, rows, columns = packed.shape
    assert packed.scales is not None and packed.row_sums is not None
    lanes = packed.values.transpose(1, 2).flatten(2).flatten(0, 1)  # [O or more, lanes or more]
    used = -(-I // 4) * rows * columns
    codes = lanes[:O, :used].contiguous().view(torch.int8).view(O, -1, rows * columns, 4).transpose(1, 2)
    per_row = packed.dilation[1] == 1
    segments = codes.reshape(O, rows if per_row else rows * columns, -1)
    _, num_segments, segment_bytes = segments.shape
    tight = -(-num_segments * segment_bytes // BLOCK_BYTES) < num_segments * -(-segment_bytes // BLOCK_BYTES)
    if tight:
        segments = segments.flatten(1)[:, None]
    padded = torch.nn.functional.pad(segments, (0, -segments.shape[-1] % BLOCK_BYTES, 0, 0, 0, -O % 16))
    blocks = padded.contiguous().view(torch.int32).view(-1, 16, padded[0].numel() // BLOCK_BYTES, 16)
    values = allocate(blocks.numel() * 4).view(torch.int32).view(len(blocks), blocks.shape[2], 16, 16)
    values.copy_(blocks.permute(0, 2, 3, 1))
    padding = (0, -O % 64)
    factors = torch.nn.functional.pad(packed.scales[:O], padding)
    row_sums = torch.nn.functional.pad(packed.row_sums[:O], padding)
    return NhwcWeight(values, factors, row_sums, segment_bytes, num_segments, tight)


def weight_of(kernel: Any) -> NhwcWeight:
    """Return a convolution's weight for NHWC images, made once by whichever thread comes first. O(weights)."""
    with _LOCK:
        kernel.nhwc = kernel.nhwc or pack_nhwc(kernel.held[0])
        return kernel.nhwc
