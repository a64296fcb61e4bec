"""The forms of weights that kernels read: plain tensors, and what is told of them.

W      [O, C]        a weight: outputs, inputs
lane   32 bits       what one 32-bit place of a vector multiplies: 1 fp32, 2 bf16 or 4 int8 weights in a row
panel  4 x 64        four outputs by 64 inputs of a bitmask
tile   4 x block     four outputs by a block of lanes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
LANE = {"fp32": 1, "bf16": 2, "int8": 4}
PAST = 64  # bytes that a kernel may read past the last value
BLOCK = 65535  # lanes of a block at most: columns are counted in 16 bits
MOST_BYTES_IN_A_SUM = (1 << 31) // (255 * 127)  # inputs of an int8 product: an input in 0..255 times a weight
MOST_COLUMNS = 1 << 16  # of a `Csr`
MOST_STRIDE = 8  # of a convolution
NEAR = 128  # lanes of a block whose inputs stay in the first cache
SLAB = 128  # outputs among which pairs are found
SHARED = 2.5  # outputs of four that have a value at the same input, in the mean: from there on tiles are faster
CONV_BLOCK = 192  # lanes of a convolution that are brought together at once
LEAST_ZEROS = (0.37, 0.52)  # from which weights are multiplied by faster without: zeros that come in fours, and others
LEAST_ZEROS_OF_SQUARES = (0.56, 0.64)  # the same of convolutions by squares of outputs


@dataclass(frozen=True, eq=False)
class Bitmask:
    """Masks in bits and the values that are not zero, panel by panel: for small batches, which wait for memory.

    int4 values are nibbles (value + 8, the lower first) with a scale for 64 inputs, and each row of a panel begins with
    a byte."""

    shape: tuple[int, int]
    kind: str
    masks: Tensor  # int64 [O / 4, words, 4]: bit j of word w is input 64 w + j
    starts: Tensor  # int64 [O / 4]: where the values of four outputs begin
    values: Tensor  # [k + padding]; of a panel row by row; bytes for int4
    scales: Tensor | None = None  # int8: fp32 [O]; int4: bf16 [O / 4, words, 4]
    sums: Tensor | None = None  # int8: int32 [O], of values; int4: fp32 [O], of values times scales


@dataclass(frozen=True, eq=False)
class Csr:
    """Values that are not zero, row after row, and their columns: for small batches at high sparsity. int8 values meet
    inputs in fp32."""

    shape: tuple[int, int]
    kind: str
    starts: Tensor  # int64 [O + 1]: where the values of a row begin
    columns: Tensor  # int16 [k], read as unsigned
    values: Tensor  # [k]
    scales: Tensor | None = None  # int8: fp32 [O]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Lanes that are not zero, four outputs at a time, sorted by which of the four have them: for larger batches."""

    shape: tuple[int, int]
    kind: str
    block: int  # lanes of a block
    counts: Tensor  # int16 [O / 4, blocks, 16]: columns of each pattern
    starts: Tensor  # int64 [O / 4, blocks, 2]: where columns and values of a tile begin
    columns: Tensor  # int16 [k], read as unsigned: lanes within the block
    values: Tensor  # int32 [n]: lanes
    scales: Tensor | None = None
    sums: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sell:
    """Lanes that are not zero, two outputs of about as many side by side (SELL-C-sigma, Kreutzer et al. 2014): for
    larger batches, where outputs share few inputs. Slabs of 128 outputs; in each block of lanes they come sorted by how
    many values they have there."""

    shape: tuple[int, int]
    kind: str
    block: int  # lanes of a block
    starts: Tensor  # int64 [slabs, blocks]: where the pairs of values of a block begin
    counts: Tensor  # int16 [slabs, blocks, 64]: pairs of values of two outputs
    order: Tensor  # uint8 [slabs, blocks, 128]: which outputs of the slab these are
    columns: Tensor  # int16 [n, 2], read as unsigned: lanes within the block
    values: Tensor  # int32 [n, 2]: lanes; where one output has fewer, zeros
    scales: Tensor | None = None
    sums: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dense:
    """A weight as it is, where zeros are few: four outputs side by side. In plans alone."""

    shape: tuple[int, int]
    kind: str  # fp32
    values: Tensor  # [O / 4, C, 4], the outputs padded to fours


@dataclass(frozen=True, eq=False)
class ConvTiles:
    """A convolution's weight [O, I, rows, columns] as `Tiles`, or, with `order`, as `Sell`: outputs of a group, padded
    to fours, after those of the one before; lanes are (input of a group, kernel row, kernel column), in int8 of four
    inputs each. Without counts it is `Dense`. That and int8 are of one group, and run in plans alone."""

    shape: tuple[int, int, int, int]
    groups: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    block: int
    values: Tensor
    counts: Tensor | None = None
    starts: Tensor | None = None
    columns: Tensor | None = None
    kind: str = "fp32"
    order: Tensor | None = None  # of one group
    scales: Tensor | None = None
    sums: Tensor | None = None

    @property
    def matrix(self) -> Tiles | Sell | Dense:
        """The matrix that the kernel runs through."""
        O, I, *kernel = self.shape
        if self.counts is None or self.starts is None or self.columns is None:
            return Dense((O, I * kernel[0] * kernel[1]), self.kind, self.values)
        rows = self.groups * (-(-O // self.groups // 4) * 4)
        each = LANE.get(self.kind, 1)
        shape = rows, -(-I // each) * each * kernel[0] * kernel[1]
        last = self.columns, self.values, self.scales, self.sums
        if self.order is not None:
            return Sell(shape, self.kind, self.block, self.starts, self.counts, self.order, *last)
        return Tiles(shape, self.kind, self.block, self.counts, self.starts, *last)


@dataclass(frozen=True, eq=False)
class Panels:
    """Whole numbers of few bits without gaps, four outputs by 64 inputs at a time: small batches, weights on a grid.

    exact   inputs as they are in fp32; else each row of them in 127 steps"""

    shape: tuple[int, int]
    kind: str  # int8, or int4: nibbles, the lower first, which mean themselves less a zero
    exact: bool
    parts: int  # scales of 64 inputs: 0 (one for the whole row), 1, or 2 of 32 inputs each
    values: Tensor  # uint8 [O / 4, words, 4, 64 or 32]
    sums: Tensor  # fp32 [O]: of numbers times scales
    scales: Tensor | None = None  # bf16 [O / 4, words, 4, parts]
    zeros: Tensor | None = None  # uint8, of nibbles, as scales lie; None = 8
    whole: Tensor | None = None  # fp32 [O]: the scale of a whole row


Packed = Bitmask | Csr | Tiles | ConvTiles | Panels | Sell | Dense
FORMATS: dict[str, type] = {
    "bitmask": Bitmask,
    "csr": Csr,
    "tiles": Tiles,
    "convolution": ConvTiles,
    "panels": Panels,
    "sell": Sell,
    "fours": Dense,
}


def to_tensors(packed: Packed) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the format's name with the numbers of a packed weight, and its tensors."""
    tensors = {n: v for n, v in vars(packed).items() if isinstance(v, Tensor)}
    numbers = {n: v for n, v in vars(packed).items() if n not in tensors and v is not None}
    return {"format": next(k for k, v in FORMATS.items() if type(packed) is v), **numbers}, tensors


def from_tensors(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packed:
    """Return the packed weight that `to_tensors` took apart; lists from JSON become tuples again."""
    numbers = {n: tuple(v) if isinstance(v, list) else v for n, v in metadata.items() if n != "format"}
    return FORMATS[metadata["format"]](**numbers, **tensors)
