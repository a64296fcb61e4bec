"""The formats of packed weights that kernels read: plain tensors and a few numbers.

W      [O, C]        a weight: outputs, inputs
lane   32 bits       the weights in one 32-bit lane of a vector: 1 fp32, 2 bf16 or int16, or 4 int8 weights of a row
panel  4 x 64        four outputs by 64 inputs of a bitmask
tile   4 x block     four outputs by a block of lanes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import FormatError

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int16": torch.int16}
LANE = {"fp32": 1, "bf16": 2, "int8": 4, "int16": 2}
DTYPES = ("fp32", "bf16", "int8", "int4", "int5", "int6", "int16")  # rarefy_dtype of csrc/rarefy.h
PROGRAM_KINDS = ("int16",)  # that programs alone multiply
ROW_KINDS = tuple(k for k in LANE if k not in PROGRAM_KINDS)  # of `Bitmask` and `Csr`, whose kernels read rows
PANEL_BITS = {"int8": 8, "int4": 4, "int5": 5, "int6": 6}  # of a code, by the kind of `QuantizedPanels`
PADDING = 64  # bytes that a kernel may read past the last value
BLOCK_OUTPUTS = BLOCK_LANES = 16  # of a block of `Dense` that is not in fp32
MAX_BLOCK = 65535  # lanes of a block: columns are 16-bit numbers
MAX_INT8_INPUTS = (1 << 31) // (
    255 * 127
)  # of an int8 weight: sums of products of 0..255 and -127..127 must fit 32 bits
MAX_INT16_SUM = ((1 << 31) - 1) // 8191  # magnitudes of codes in int16 that are summed at once: inputs have 8,191 steps
INT16_COLUMNS = 1024  # of a dense weight in int16 that are summed at once
MAX_INT16_INPUTS = 1 << 11  # of convolutions and sparse weights, whose rows are: with more, codes would have few steps
MAX_CSR_INPUTS = 1 << 16
MAX_STRIDE = 8  # of a convolution
MAX_DENSE_STRIDE = 64  # of a dense one in fp32, as patches of images have
CACHE_BLOCK = 128  # lanes of a block whose inputs stay in the L1 cache
SLAB = 128  # outputs that `Sell` sorts together
MIN_SHARED = 2.5  # mean number of four outputs with a value at the same input, from which tiles are faster
CONV_BLOCK = 192  # lanes of a convolution that are gathered at once
MIN_ZEROS_SPARSE = (0.37, 0.52)  # share of zeros from which skipping them is faster: blocks of four, others
MIN_ZEROS_WINOGRAD = (0.56, 0.64)  # the same for convolutions that run on Winograd's algorithm otherwise


@dataclass(frozen=True, eq=False)
class Bitmask:
    """Bit masks and nonzero values, panel by panel: for small batches, which are limited by memory bandwidth.

    int4 values are nibbles (value + 8, low nibble first) with a scale for 64 inputs; each row of a panel starts at a
    byte."""

    shape: tuple[int, int]
    kind: str
    masks: Tensor  # int64 [O / 4, col_blocks, 4]: bit j of word w is input 64 w + j
    starts: Tensor  # int64 [O / 4]: where the values of four outputs begin
    values: Tensor  # [k + padding]; of a panel row by row; bytes for int4
    scales: Tensor | None = None  # int8: fp32 [O]; int4: bf16 [O / 4, col_blocks, 4]
    row_sums: Tensor | None = None  # int8: int32 [O], sum of values; int4: fp32 [O], sum of values times scales


@dataclass(frozen=True, eq=False)
class Csr:
    """Nonzero values, row after row, and their columns: for small batches at high sparsity. Inputs stay fp32."""

    shape: tuple[int, int]
    kind: str
    starts: Tensor  # int64 [O + 1]: where the values of a row begin
    columns: Tensor  # int16 [k], read as unsigned
    values: Tensor  # [k]
    scales: Tensor | None = None  # int8: fp32 [O]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Nonzero lanes, four outputs at a time, sorted by which of the four have them: for larger batches."""

    shape: tuple[int, int]
    kind: str
    block: int  # lanes of a block
    counts: Tensor  # int16 [O / 4, blocks, 16]: columns of each pattern
    starts: Tensor  # int64 [O / 4, blocks, 2]: where columns and values of a tile begin
    columns: Tensor  # int16 [k], read as unsigned: lanes within the block
    values: Tensor  # int32 [n]: lanes
    scales: Tensor | None = None
    row_sums: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sell:
    """Nonzero lanes, two outputs with about as many side by side (SELL-C-sigma, Kreutzer et al. 2014): for larger
    batches, where outputs share few inputs. In each block of lanes, the outputs of a slab of 128 are sorted by their
    number of values."""

    shape: tuple[int, int]
    kind: str
    block: int  # lanes of a block
    starts: Tensor  # int64 [slabs, blocks]: where the pairs of values of a block begin
    counts: Tensor  # int16 [slabs, blocks, 64]: pairs of values of two outputs
    order: Tensor  # uint8 [slabs, blocks, 128]: which outputs of the slab these are
    columns: Tensor  # int16 [n, 2], read as unsigned: lanes within the block
    values: Tensor  # int32 [n, 2]: lanes; where one output has fewer, zeros
    scales: Tensor | None = None
    row_sums: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense weight, for few zeros. Runs in programs only. fp32: four outputs interleaved. Others: blocks of 16
    outputs by 16 lanes, as AMX reads them."""

    shape: tuple[int, int]
    kind: str
    values: Tensor  # fp32 [O / 4, C, 4], or int32 [O / 16, lanes / 16, 16, 16]: lanes; padded with zeros
    scales: Tensor | None = None  # int8, int16: fp32 [O]
    row_sums: Tensor | None = None  # int8: int32 [O]


@dataclass(frozen=True, eq=False)
class ConvTiles:
    """A convolution's weight [O, I, rows, columns] as `Tiles`, with `order` as `Sell`, without `counts` as `Dense`.

    The outputs of each group are padded to fours; lanes are (input of a group, kernel row, kernel column), int8 lanes
    of four inputs each. `Dense` and int8 need one group, and run in programs only."""

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
    row_sums: Tensor | None = None

    @property
    def matrix(self) -> Tiles | Sell | Dense:
        """Return the matrix that the kernel reads."""
        O, I, *kernel = self.shape
        if self.counts is None or self.starts is None or self.columns is None:
            each = LANE.get(self.kind, 1)
            inputs = -(-I // each) * each * kernel[0] * kernel[1]
            return Dense((O, inputs), self.kind, self.values, self.scales, self.row_sums)
        rows = self.groups * (-(-O // self.groups // 4) * 4)
        each = LANE.get(self.kind, 1)
        shape = rows, -(-I // each) * each * kernel[0] * kernel[1]
        last = self.columns, self.values, self.scales, self.row_sums
        if self.order is not None:
            return Sell(shape, self.kind, self.block, self.starts, self.counts, self.order, *last)
        return Tiles(shape, self.kind, self.block, self.counts, self.starts, *last)


@dataclass(frozen=True, eq=False)
class QuantizedPanels:
    """Dense codes of 4, 5, 6 or 8 bits, in panels of four outputs by 64 inputs: small batches of quantized weights.

    int8 and int4: one row after the other, nibbles with the low one first. int5 and int6: the low four bits as int4,
    then the high bits of all rows, whose byte i belongs to inputs 2 i and 2 i + 1. Of int5, row r has bits 2 r (the
    even input) and 2 r + 1 of 32 bytes. Of int6, rows 0 and 2 have 32 bytes, the first one bits 0-1 (the even input)
    and 2-3, the second one 4-5 and 6-7; rows 1 and 3 have the next 32."""

    shape: tuple[int, int]
    kind: str  # of PANEL_BITS; codes of less than 8 bits are stored plus a zero point
    fp32_inputs: bool  # inputs stay fp32; else each row of them is quantized to int8
    scale_groups: int  # scales of a row in a panel: 0 (row_scales only), 1, or 2 of 32 inputs each
    values: Tensor  # uint8 [O / 4, col_blocks, 4, 8 bytes for each bit of a code]
    row_sums: Tensor  # fp32 [O], sum of values times `scales`
    scales: Tensor | None = None  # bf16 [O / 4, col_blocks, 4, scale_groups]
    zeros: Tensor | None = None  # uint8, zero points, shaped like scales; None: int4 8, int5 16, int6 32
    row_scales: Tensor | None = None  # fp32 [O], one scale for a whole row
    two_terms: bool = False  # what rounding the inputs loses is quantized to int8 as well
    zero_bits: int = 0  # 3: zero points in eighths, W = (8 code - zero) x scale; int4 and int5, in groups of 32


Packed = Bitmask | Csr | Tiles | ConvTiles | QuantizedPanels | Sell | Dense
FORMATS: dict[str, type] = {
    "bitmask": Bitmask,
    "csr": Csr,
    "tiles": Tiles,
    "convolution": ConvTiles,
    "panels": QuantizedPanels,
    "sell": Sell,
    "fours": Dense,
}


def skips_zeros(packed: Packed) -> bool:
    """Return whether kernels leave out the zeros of a packed weight. O(1)."""
    matrix = packed.matrix if isinstance(packed, ConvTiles) else packed
    return isinstance(matrix, Bitmask | Csr | Tiles | Sell)


# in files, these fields have the names of version 0.1
FILE_NAMES = {"row_sums": "sums", "row_scales": "whole", "fp32_inputs": "exact", "scale_groups": "parts"}
CODE_ORDER = "pairs"  # how files say that codes of 5 and 6 bits lie as in `QuantizedPanels`
_FIELDS = {in_file: field for field, in_file in FILE_NAMES.items()}


def to_tensors(packed: Packed) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the format's name with the numbers of a packed weight, and its tensors, by their names in files."""
    fields = {FILE_NAMES.get(n, n): v for n, v in vars(packed).items()}
    tensors = {n: v for n, v in fields.items() if isinstance(v, Tensor)}
    numbers = {n: v for n, v in fields.items() if n not in tensors and v is not None}
    for name in ("two_terms", "zero_bits"):
        if not numbers.get(name):  # as files of earlier versions
            numbers.pop(name, None)
    if numbers["kind"] in ("int5", "int6"):
        numbers["order"] = CODE_ORDER
    return {"format": next(k for k, v in FORMATS.items() if type(packed) is v), **numbers}, tensors


def from_tensors(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packed:
    """Return the packed weight that `to_tensors` took apart; lists from JSON become tuples again."""
    if metadata.get("order") != (CODE_ORDER if metadata.get("kind") in ("int5", "int6") else None):
        raise FormatError(
            "an earlier version wrote this: its codes of 5 and 6 bits lie in another order; compile the model again"
            if "order" not in metadata
            else f"unexpected order {metadata['order']!r} of the codes"
        )
    numbers = {n: tuple(v) if isinstance(v, list) else v for n, v in metadata.items() if n not in ("format", "order")}
    return FORMATS[metadata["format"]](**{_FIELDS.get(n, n): v for n, v in {**numbers, **tensors}.items()})
