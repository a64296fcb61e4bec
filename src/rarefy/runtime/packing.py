"""Pack weights into the formats that kernels read, and unpack them. pack_panels.py has those of quantized panels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import FormatError, unknown
from rarefy.formats.bitpacking import pack_bits, unpack_bits
from rarefy.model.quant_grid import Grid
from rarefy.runtime.int16_codes import int16_codes
from rarefy.runtime.pack_panels import padded, unpack_panels
from rarefy.runtime.packed_formats import (
    BLOCK_LANES,
    BLOCK_OUTPUTS,
    CACHE_BLOCK,
    CONV_BLOCK,
    INT16_COLUMNS,
    KINDS,
    LANE,
    MAX_BLOCK,
    MAX_CSR_INPUTS,
    MAX_INT8_INPUTS,
    PADDING,
    SLAB,
    Bitmask,
    ConvTiles,
    Csr,
    Dense,
    Packed,
    QuantizedPanels,
    Sell,
    Tiles,
)


def stored(weight: Tensor, kind: str, grid: Grid | None = None) -> tuple[Tensor, Tensor | None]:
    """Return W in the dtype of `kind` and, for int8 and int16, the scale of each output: in int8 that of the grid if it
    has one for each output, else the largest magnitude over 127; in int16 see `int16_codes`."""
    if kind not in KINDS:
        raise FormatError(unknown("kind", kind, KINDS))
    if kind == "int8" and weight.dim() == 2 and weight.shape[1] > MAX_INT8_INPUTS:
        raise FormatError(f"sums of {weight.shape[1]} int8 products do not fit 32 bits: at most {MAX_INT8_INPUTS}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise FormatError(f"expected a matrix, got a weight of shape {list(weight.shape)}")
    if kind == "int16":
        return int16_codes(weight.detach().float(), weight.shape[1], None if grid is None else grid.scale[:, 0])
    if kind != "int8":
        return weight.detach().to(KINDS[kind]).contiguous(), None
    W = weight.detach().float()
    if grid is not None and grid.zero is None and grid.scale.shape[1] == 1:
        return grid.codes(W).to(torch.int8), grid.scale.float().expand(len(W), 1)[:, 0].contiguous()
    scales = W.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (W / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def pack_bitmask(weight: Tensor, kind: str = "fp32", grid: Grid | None = None) -> Bitmask:
    """Return W [O, C] as `Bitmask`. O(O C).

    >>> packed = pack_bitmask(torch.tensor([[0.0, 2.0, 0.0, 3.0]]))
    >>> packed.masks[0, 0].tolist(), packed.values[:2].tolist()
    ([10, 0, 0, 0], [2.0, 3.0])
    """
    if kind == "int4":
        return _pack_nibbles(weight)
    V, scales = stored(weight, kind, grid)
    O, C = V.shape
    col_blocks = -(-C // 64)
    panels = padded(V, 4, 64).reshape(-1, 4, col_blocks, 64).transpose(1, 2).contiguous()
    nonzero = panels != 0
    counts = nonzero.sum((1, 2, 3))
    values = torch.cat([panels[nonzero], panels.new_zeros(PADDING // V.element_size())])
    masks = pack_bits(nonzero).view(torch.int64).reshape(-1, col_blocks, 4)
    return Bitmask((O, C), kind, masks, counts.cumsum(0) - counts, values, scales, _row_sums(V, scales))


def _pack_nibbles(weight: Tensor) -> Bitmask:
    W, _ = stored(weight, "fp32")
    O, C = W.shape
    col_blocks = -(-C // 64)
    panels = padded(W, 4, 64).reshape(-1, 4, col_blocks, 64).transpose(1, 2)  # [fours, col_blocks, 4, 64]
    scales = (panels.abs().amax(-1) / 7).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    V = (panels / scales.float()[..., None]).round().clamp(-7, 7)
    nonzero = V != 0
    counts = nonzero.sum(-1)
    ends = ((counts + 1) // 2).flatten().cumsum(0).reshape(counts.shape)
    starts = ends - (counts + 1) // 2
    index = (2 * starts[..., None] + nonzero.cumsum(-1) - 1)[nonzero]
    nibbles = torch.zeros(2 * (int(ends[-1, -1, -1]) + PADDING), dtype=torch.uint8)
    nibbles[index] = (V[nonzero] + 8).to(torch.uint8)
    values = nibbles[0::2] | nibbles[1::2] << 4
    masks = pack_bits(nonzero).view(torch.int64).reshape(-1, col_blocks, 4)
    sums = (V.sum(-1) * scales.float()).sum(1).flatten()[:O].contiguous()
    return Bitmask((O, C), "int4", masks, starts[:, 0, 0].contiguous(), values, scales, sums)


def _unpack_nibbles(packed: Bitmask) -> Tensor:
    O, C = packed.shape
    nonzero = unpack_bits(packed.masks.reshape(-1).view(torch.uint8), packed.masks.numel() * 64)
    nonzero = nonzero.reshape(*packed.masks.shape, 64)
    bytes_ = (nonzero.sum(-1) + 1) // 2
    starts = (bytes_.flatten().cumsum(0) - bytes_.flatten()).reshape(bytes_.shape)
    index = (2 * starts[..., None] + nonzero.cumsum(-1) - 1)[nonzero]
    nibbles = torch.stack([packed.values & 15, packed.values >> 4], -1).flatten()
    W = torch.zeros(nonzero.shape, dtype=torch.float32)
    W[nonzero] = nibbles[index].float() - 8
    scales: Any = packed.scales
    return (W * scales.float()[..., None]).transpose(1, 2).reshape(-1, nonzero.shape[1] * 64)[:O, :C]


def pack_csr(weight: Tensor, kind: str = "fp32", grid: Grid | None = None) -> Csr:
    """Return W [O, C] as `Csr`. O(O C).

    >>> packed = pack_csr(torch.tensor([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 4.0, 0.0]]))
    >>> packed.starts.tolist(), packed.columns.tolist(), packed.values.tolist()
    ([0, 2, 3], [1, 3, 2], [2.0, 3.0, 4.0])
    """
    V, scales = stored(weight, kind, grid)
    if V.shape[1] > MAX_CSR_INPUTS:
        raise FormatError(f"CSR columns are 16-bit numbers: at most {MAX_CSR_INPUTS} inputs, got {V.shape[1]}")
    nonzero = V != 0
    ends = nonzero.sum(1).cumsum(0)
    columns = nonzero.nonzero()[:, 1].to(torch.int16)
    return Csr((V.shape[0], V.shape[1]), kind, torch.cat([ends.new_zeros(1), ends]), columns, V[nonzero], scales)


def pack_tiles(weight: Tensor, kind: str = "fp32", block: int | None = None, grid: Grid | None = None) -> Tiles:
    """Return W [O, C] as `Tiles` with `block` lanes of inputs to a block: 128 where many fp32 weights are left that do
    not come in fours, else by default all. O(O C log block).

    >>> packed = pack_tiles(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    >>> packed.counts[0, 0].nonzero().flatten().tolist(), packed.columns.tolist()  # patterns 0b10, 0b11
    ([2, 3], [0, 1])
    """
    V, scales = stored(weight, kind, grid)
    O, C = V.shape
    each = LANE[kind]
    lanes = -(-C // each)
    if block is None:
        block = CACHE_BLOCK if kind == "fp32" and _is_compute_bound(V) else MAX_BLOCK
    block = _block(block, lanes)
    full = padded(V, 4, block * each)
    parts = full.reshape(len(full) // 4, 4, -1, block, each).transpose(1, 2)  # [tiles, blocks, 4, block, each]
    nonzero = (parts != 0).any(-1).transpose(2, 3)  # [tiles, blocks, block, 4]
    lane_values = parts.flatten().view(torch.int32).reshape(parts.shape[:-1]).transpose(2, 3)
    pattern = (nonzero * torch.tensor([1, 2, 4, 8], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    order = pattern.masked_fill(pattern == 0, 16).sort(stable=True)
    counts = torch.stack([(pattern == p).sum(-1) for p in range(16)], -1)
    counts[..., 0] = 0
    index = order.indices[..., None].expand(-1, -1, -1, 4)
    in_order = nonzero.gather(2, index)
    columns = order.indices[order.values < 16].to(torch.int16)
    ends = torch.stack([counts.sum(-1), in_order.sum((-1, -2))], -1).flatten(0, 1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1, 2), ends])[: len(ends)].reshape(*counts.shape[:2], 2)
    values = lane_values.gather(2, index)[in_order]
    return Tiles((O, C), kind, block, counts.to(torch.int16), starts, columns, values, scales, _row_sums(V, scales))


def pack_sell(weight: Tensor, kind: str = "fp32", block: int = CACHE_BLOCK, grid: Grid | None = None) -> Sell:
    """Return W [O, C] as `Sell` with `block` lanes of inputs to a block. O(O C log block).

    >>> packed = pack_sell(torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 3.0]]))
    >>> packed.order[0, 0, :4].tolist(), packed.counts[0, 0, :2].tolist(), packed.columns.tolist()
    ([1, 3, 0, 2], [0, 2], [[1, 0], [0, 1]])
    """
    V, scales = stored(weight, kind, grid)
    O, C = V.shape
    each = LANE[kind]
    lanes = -(-C // each)
    block = _block(block, lanes)
    full = padded(V, SLAB, block * each)
    parts = full.view(torch.int32).reshape(-1, SLAB, full.shape[1] // each // block, block).transpose(1, 2)
    nonzero = (full.reshape(len(full), -1, each) != 0).any(-1)  # as parts: [slabs, blocks, 128, block]
    nonzero = nonzero.reshape(-1, SLAB, parts.shape[1], block).transpose(1, 2)
    count = nonzero.sum(-1)
    real = torch.arange(len(full)).reshape(-1, 1, SLAB) < O + O % 2
    order = torch.where(real, count, block + 1).sort(dim=-1, stable=True).indices
    counts = count.gather(-1, order).unflatten(-1, (-1, 2)).amax(-1)
    rows = order[..., None].expand(-1, -1, -1, block)
    nonzero, parts = nonzero.gather(2, rows), parts.gather(2, rows)
    first = nonzero.to(torch.uint8).sort(
        dim=-1, descending=True, stable=True
    )  # lanes with a value before those without
    has_value = first.values.bool()
    columns = torch.where(has_value, first.indices, 0).unflatten(2, (-1, 2)).transpose(-1, -2)  # [.., 64, block, 2]
    values = torch.where(has_value, parts.gather(-1, first.indices), 0).unflatten(2, (-1, 2)).transpose(-1, -2)
    used = torch.arange(block) < counts[..., None]
    ends = counts.sum(-1).flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])[: len(ends)].reshape(counts.shape[:2])
    tensors = (starts, counts.to(torch.int16), order.to(torch.uint8), columns[used].to(torch.int16), values[used])
    return Sell((O, C), kind, block, *tensors, scales, _row_sums(V, scales))


def _unpack_sell(packed: Sell) -> Tensor:
    """Return the weight with padding, [O or more, C or more]."""
    slabs, blocks = packed.starts.shape
    counts = packed.counts.long().flatten() & 0xFFFF
    lanes = torch.zeros(slabs * blocks * SLAB, packed.block, dtype=torch.int32)
    row_index = (torch.arange(slabs * blocks)[:, None] * SLAB + packed.order.flatten(0, 1).long()).reshape(-1, 2)
    rows, columns = row_index.repeat_interleave(counts, 0), packed.columns.long() & 0xFFFF
    stored = packed.values != 0
    lanes[rows[stored], columns[stored]] = packed.values[stored]
    lanes = lanes.reshape(slabs, blocks, SLAB, packed.block).transpose(1, 2)
    return lanes.flatten().view(KINDS[packed.kind]).reshape(slabs * SLAB, -1)


def _is_compute_bound(V: Tensor) -> bool:
    """Return whether products keep up with inputs from the L1 cache: measured, from 35 % nonzeros on."""
    nonzero = padded(V != 0, 4, 1).view(-1, 4, V.shape[1])
    density, columns = float(nonzero.float().mean()), float(nonzero.any(1).float().mean())
    return 0.35 < density < 0.75 * columns


def pack_conv(
    weight: Tensor,
    kind: str = "fp32",
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    block: int = CONV_BLOCK,
    sell: bool = False,
    dense: bool = False,
    grid: Grid | None = None,
) -> ConvTiles:
    """Return a convolution's W [O, I, rows, columns] as `ConvTiles`, of tiles or, for one group, `Sell` or, in int8,
    `Dense`.
    O(weights log block).

    >>> packed = pack_conv(torch.tensor([[[[0.0, 2.0]]], [[[1.0, 3.0]]]]), padding=(0, 1))
    >>> packed.columns.tolist(), unpack(packed)[:, 0, 0].tolist()
    ([0, 1], [[0.0, 2.0], [1.0, 3.0]])
    """
    if weight.dim() != 4 or 0 in weight.shape or groups < 1 or len(weight) % groups:
        raise FormatError(f"no convolution of {groups} groups has a weight of shape {list(weight.shape)}")
    O, I, rows, columns = weight.shape
    if (sell or kind != "fp32") and groups > 1:
        raise FormatError(f"{'SELL' if sell else kind} needs a convolution of one group, got {groups}")
    each = LANE.get(kind, 1)
    full: Any = weight.new_zeros(groups, -(-O // groups // 4) * 4, -(-I // each) * each, rows * columns)
    full[:, : O // groups, :I] = weight.detach().reshape(groups, O // groups, I, -1)
    W = full.float().unflatten(2, (-1, each)).transpose(-1, -2).flatten(2).flatten(0, 1)
    if grid is not None:  # outputs are padded
        grid = replace(grid, scale=padded(grid.scale, 4, 1).clamp(min=torch.finfo(torch.float32).tiny / 127))
    if dense:
        matrix: Any = _pack_lanes(
            W[:O], kind, None if grid is None else replace(grid, scale=grid.scale[:O]), W.shape[1]
        )
    else:
        matrix = (pack_sell if sell else pack_tiles)(W, kind, block, grid)
    tensors: dict[str, Any] = {n: t for n, t in vars(matrix).items() if isinstance(t, Tensor)}
    geometry = (groups, stride, padding, dilation, block if dense else matrix.block)
    return ConvTiles((O, I, rows, columns), *geometry, kind=kind, **tensors)


def pack_dense(weight: Tensor, kind: str = "fp32", grid: Grid | None = None, **options: Any) -> Dense | ConvTiles:
    """Return W [O, C] as `Dense`, or a convolution's W [O, I, rows, columns] as `ConvTiles` without tiles; `options`
    are its stride, padding and dilation. O(weights).

    >>> pack_dense(torch.tensor([[1.0, 2], [3, 4]])).values.tolist()
    [[[1.0, 3.0, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0]]]
    """
    if kind != "fp32":
        return _pack_lanes(weight, kind, grid, INT16_COLUMNS)
    values, _ = stored(weight.flatten(1), "fp32")
    values = padded(values, 4, 1).unflatten(0, (-1, 4)).transpose(1, 2).contiguous()
    if weight.dim() == 2:
        return Dense((weight.shape[0], weight.shape[1]), "fp32", values)
    O, I, rows, columns = weight.shape
    return ConvTiles((O, I, rows, columns), 1, **options, block=CACHE_BLOCK, values=values)


def _pack_lanes(weight: Tensor, kind: str, grid: Grid | None, columns: int) -> Dense:
    """Return a dense weight that is not in fp32; in int16, sums of so many columns fit 32 bits."""
    if kind == "int16" and grid is None:
        V, scales = int16_codes(weight.detach().float(), columns)
    else:
        V, scales = stored(weight, kind, grid)
    O, C = V.shape
    each = LANE[kind]
    full = padded(V, BLOCK_OUTPUTS, BLOCK_LANES * each)
    blocks = full.reshape(-1, BLOCK_OUTPUTS, full.shape[1] // each // BLOCK_LANES, BLOCK_LANES * each).transpose(1, 2)
    values = blocks.contiguous().view(torch.int32)
    return Dense((O, C), kind, values, scales, _row_sums(V, scales))


def unpack(packed: Packed) -> Tensor:
    """Return a packed weight dequantized to fp32 [O, C], or a convolution's shape. O(O C)."""
    if isinstance(packed, ConvTiles):
        (O, I, *kernel), groups = packed.shape, packed.groups
        W = unpack(packed.matrix).reshape(groups, packed.matrix.shape[0] // groups, -1, *kernel, LANE[packed.kind])
        return W.movedim(-1, 3).flatten(2, 3)[:, : O // groups, :I].reshape(packed.shape)
    if isinstance(packed, QuantizedPanels):
        return unpack_panels(packed)
    if isinstance(packed, Dense) and packed.kind != "fp32":
        O, C = packed.shape
        W = packed.values.transpose(1, 2).contiguous().view(KINDS[packed.kind])
        W = W.reshape(len(packed.values) * BLOCK_OUTPUTS, -1)[:O, :C].float()
        return W if packed.scales is None else W * packed.scales[:, None]
    if isinstance(packed, Dense):
        rows = packed.values.transpose(1, 2).flatten(0, 1)[: packed.shape[0]]
        return rows.clone(memory_format=torch.contiguous_format)
    if packed.kind == "int4":
        return _unpack_nibbles(packed)  # type: ignore[arg-type]
    (O, C), dtype = packed.shape, KINDS[packed.kind]
    if isinstance(packed, Csr):
        W = torch.zeros(O, C, dtype=dtype)
        W[torch.arange(O).repeat_interleave(packed.starts.diff()), packed.columns.long() & 0xFFFF] = packed.values
    elif isinstance(packed, Bitmask):
        col_blocks = packed.masks.shape[1]
        nonzero = unpack_bits(packed.masks.reshape(-1).view(torch.uint8), packed.masks.numel() * 64)
        full = torch.zeros(nonzero.shape, dtype=dtype)
        full[nonzero] = packed.values[: int(nonzero.sum())]
        W = full.reshape(-1, col_blocks, 4, 64).transpose(1, 2).reshape(-1, col_blocks * 64)
    elif isinstance(packed, Sell):
        W = _unpack_sell(packed)
    else:
        tiles, blocks = packed.counts.shape[:2]
        counts = packed.counts.long() & 0xFFFF
        pattern = torch.arange(16).expand(tiles, blocks, 16).reshape(-1).repeat_interleave(counts.reshape(-1))
        block = torch.arange(tiles * blocks).repeat_interleave(counts.sum(-1).reshape(-1))
        has_value = (pattern[:, None] >> torch.arange(4) & 1).bool()
        lanes = torch.zeros(tiles * blocks, packed.block, 4, dtype=torch.int32)
        rows = torch.zeros(len(pattern), 4, dtype=torch.int32)
        rows[has_value] = packed.values
        lanes[block, packed.columns.long() & 0xFFFF] = rows
        lanes = lanes.reshape(tiles, blocks, packed.block, 4).permute(0, 3, 1, 2)
        W = lanes.flatten().view(dtype).reshape(tiles * 4, -1)
    W = W[:O, :C].float()
    return W if packed.scales is None else W * packed.scales[:, None]


def shared(tiles: Tiles | ConvTiles) -> float:
    """Return how many of four outputs have a value at the same input on average: high for blocks of zeros."""
    return len(tiles.values) / max(1, len(tiles.columns))  # type: ignore[arg-type]


def nbytes(packed: Packed) -> int:
    """Return the bytes of all tensors together."""
    return sum(t.nbytes for t in vars(packed).values() if isinstance(t, Tensor))


def _block(block: int, lanes: int) -> int:
    """Return the lanes of a block, at most all of them."""
    block = min(lanes or 1, block, MAX_BLOCK)
    if block < 1:
        raise FormatError(f"a block has at least one lane, got {block}")
    return block


def _row_sums(V: Tensor, scales: Tensor | None) -> Tensor | None:
    """Return the sums of int8 weights, by which kernels correct for inputs without a sign."""
    return None if scales is None or V.dtype != torch.int8 else V.sum(1, dtype=torch.int32)
