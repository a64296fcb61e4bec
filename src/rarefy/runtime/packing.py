"""Weights packed as kernels read them, and unpacked, without a loop over entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import FormatError, unknown
from rarefy.formats.bitpacking import pack_bits, unpack_bits
from rarefy.model.quant_grid import Grid
from rarefy.runtime.packed_formats import (
    BLOCK,
    CONV_BLOCK,
    KINDS,
    LANE,
    MOST_BYTES_IN_A_SUM,
    MOST_COLUMNS,
    NEAR,
    PAST,
    SLAB,
    Bitmask,
    ConvTiles,
    Csr,
    Dense,
    Packed,
    Panels,
    Sell,
    Tiles,
)


def stored(weight: Tensor, kind: str, grid: Grid | None = None) -> tuple[Tensor, Tensor | None]:
    """Return W in the numbers of `kind`, and int8's scale of each output: that of the grid where W lies on one with a
    scale for each output, else the largest magnitude over 127."""
    if kind not in KINDS:
        raise FormatError(unknown("kind", kind, KINDS))
    if kind == "int8" and weight.dim() == 2 and weight.shape[1] > MOST_BYTES_IN_A_SUM:
        raise FormatError(
            f"sums of {weight.shape[1]} products of bytes do not fit 32 bits: at most {MOST_BYTES_IN_A_SUM}"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise FormatError(f"kernels multiply by matrices, got a weight of shape {list(weight.shape)}")
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
    words = -(-C // 64)
    panels = _padded(V, 4, 64).reshape(-1, 4, words, 64).transpose(1, 2).contiguous()
    hit = panels != 0
    counts = hit.sum((1, 2, 3))
    values = torch.cat([panels[hit], panels.new_zeros(PAST // V.element_size())])
    masks = pack_bits(hit).view(torch.int64).reshape(-1, words, 4)
    return Bitmask((O, C), kind, masks, counts.cumsum(0) - counts, values, scales, _sums(V, scales))


def _pack_nibbles(weight: Tensor) -> Bitmask:
    W, _ = stored(weight, "fp32")
    O, C = W.shape
    words = -(-C // 64)
    panels = _padded(W, 4, 64).reshape(-1, 4, words, 64).transpose(1, 2)  # [fours, words, 4, 64]
    scales = (panels.abs().amax(-1) / 7).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    V = (panels / scales.float()[..., None]).round().clamp(-7, 7)
    hit = V != 0
    counts = hit.sum(-1)
    ends = ((counts + 1) // 2).flatten().cumsum(0).reshape(counts.shape)
    starts = ends - (counts + 1) // 2
    place = (2 * starts[..., None] + hit.cumsum(-1) - 1)[hit]
    nibbles = torch.zeros(2 * (int(ends[-1, -1, -1]) + PAST), dtype=torch.uint8)
    nibbles[place] = (V[hit] + 8).to(torch.uint8)
    values = nibbles[0::2] | nibbles[1::2] << 4
    masks = pack_bits(hit).view(torch.int64).reshape(-1, words, 4)
    sums = (V.sum(-1) * scales.float()).sum(1).flatten()[:O].contiguous()
    return Bitmask((O, C), "int4", masks, starts[:, 0, 0].contiguous(), values, scales, sums)


def _unpack_nibbles(packed: Bitmask) -> Tensor:
    O, C = packed.shape
    hit = unpack_bits(packed.masks.reshape(-1).view(torch.uint8), packed.masks.numel() * 64)
    hit = hit.reshape(*packed.masks.shape, 64)
    bytes_ = (hit.sum(-1) + 1) // 2
    starts = (bytes_.flatten().cumsum(0) - bytes_.flatten()).reshape(bytes_.shape)
    place = (2 * starts[..., None] + hit.cumsum(-1) - 1)[hit]
    nibbles = torch.stack([packed.values & 15, packed.values >> 4], -1).flatten()
    W = torch.zeros(hit.shape)
    W[hit] = nibbles[place].float() - 8
    scales: Any = packed.scales
    return (W * scales.float()[..., None]).transpose(1, 2).reshape(-1, hit.shape[1] * 64)[:O, :C]


def pack_panels(weight: Tensor, grid: Grid, exact: bool = True) -> Panels:
    """Return W [O, C], which lies on `grid`, as `Panels`; FormatError where its scales lie in a way that kernels do not
    read. O(O C).

    >>> packed = pack_panels(torch.tensor([[1.0, -2.0]]), Grid(4, torch.tensor([[0.5]])))
    >>> packed.kind, packed.whole.tolist(), packed.sums.tolist(), unpack(packed).tolist()
    ('int4', [0.5], [-2.0], [[1.0, -2.0]])
    """
    O, C = weight.shape
    rows, groups = grid.scale.shape
    nibbles, many = grid.bits <= 4, C // groups
    if rows not in (1, O) or (groups > 1 and many % 32) or (grid.zero is not None and not nibbles):
        how = f"groups of {many} inputs" if groups > 1 and many % 32 else "asymmetric codes of more than 4 bits"
        how = how if rows in (1, O) else f"scales of {O // rows} outputs"
        raise FormatError(f"no kernel for {how}")
    c, words = grid.codes(weight), -(-C // 64)
    parts = 0 if groups == 1 and grid.zero is None else 1 if many % 64 == 0 or groups == 1 else 2
    scale = grid.scale.float().expand(O, groups)
    whole = scale[:, 0].contiguous() if groups == 1 else None
    scales = zeros = None
    by = torch.ones(O, 1)
    if parts:
        each = 64 // parts
        place = (torch.arange(words * parts) * each).clamp(max=C - 1) // many
        by = torch.ones(O, words * parts) if whole is not None else scale[:, place]
        zero = None if grid.zero is None else grid.zero.expand(O, groups)[:, place]
        scales = _panel_cells(by.bfloat16(), words, 0.0)
        zeros = None if zero is None else _panel_cells(zero, words, 8)
        by = by.bfloat16().float().repeat_interleave(each, 1)[:, :C]
    sums = (c.float() * by).sum(1)
    if nibbles:
        zero = 8 if grid.zero is None else grid.expand(grid.zero.to(torch.int16), (O, C))
        full: Any = torch.full((-(-O // 4) * 4, words * 64), 8, dtype=torch.int16)
        if zeros is not None:
            full[:O] = grid.zero.expand(O, groups)[:, -1:].to(torch.int16)  # type: ignore[union-attr]
        full[:O, :C] = c + zero
        cells = full.to(torch.uint8).reshape(-1, 4, words, 64).transpose(1, 2)
        values = cells[..., 0::2] | cells[..., 1::2] << 4
    else:
        values = (
            _padded(c.to(torch.int8), 4, 64).reshape(-1, 4, words, 64).transpose(1, 2).contiguous().view(torch.uint8)
        )
    return Panels((O, C), "int4" if nibbles else "int8", exact, parts, values.contiguous(), sums, scales, zeros, whole)


def _panel_cells(small: Tensor, words: int, rest: float) -> Tensor:
    """[O, words x parts] -> [O / 4, words, 4, parts]."""
    O = len(small)
    full = small.new_full((-(-O // 4) * 4, small.shape[1]), rest)
    full[:O] = small
    return full.reshape(len(full) // 4, 4, words, -1).transpose(1, 2).contiguous()


def _unpack_panels(packed: Panels) -> Tensor:
    O, C = packed.shape
    words = packed.values.shape[1]
    if packed.kind == "int8":
        W = packed.values.view(torch.int8).float()
    else:
        zero: Any = 8 if packed.zeros is None else packed.zeros.float().repeat_interleave(64 // packed.parts, -1)
        W = torch.stack([packed.values & 15, packed.values >> 4], -1).flatten(-2).float() - zero
    if packed.scales is not None:
        W = W * packed.scales.float().repeat_interleave(64 // packed.parts, -1)
    W = W.transpose(1, 2).reshape(-1, words * 64)[:O, :C]
    return W if packed.whole is None else W * packed.whole[:, None]


def pack_csr(weight: Tensor, kind: str = "fp32", grid: Grid | None = None) -> Csr:
    """Return W [O, C] as `Csr`. O(O C).

    >>> packed = pack_csr(torch.tensor([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 4.0, 0.0]]))
    >>> packed.starts.tolist(), packed.columns.tolist(), packed.values.tolist()
    ([0, 2, 3], [1, 3, 2], [2.0, 3.0, 4.0])
    """
    V, scales = stored(weight, kind, grid)
    if V.shape[1] > MOST_COLUMNS:
        raise FormatError(f"columns are counted in 16 bits: at most {MOST_COLUMNS} inputs, got {V.shape[1]}")
    hit = V != 0
    ends = hit.sum(1).cumsum(0)
    columns = hit.nonzero()[:, 1].to(torch.int16)
    return Csr((V.shape[0], V.shape[1]), kind, torch.cat([ends.new_zeros(1), ends]), columns, V[hit], scales)


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
        block = NEAR if kind == "fp32" and _crowded(V) else BLOCK
    block = _block(block, lanes)
    full = _padded(V, 4, block * each)
    parts = full.reshape(len(full) // 4, 4, -1, block, each).transpose(1, 2)  # [tiles, blocks, 4, block, each]
    hit = (parts != 0).any(-1).transpose(2, 3)  # [tiles, blocks, block, 4]
    words = parts.flatten().view(torch.int32).reshape(parts.shape[:-1]).transpose(2, 3)
    pattern = (hit * torch.tensor([1, 2, 4, 8], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    order = pattern.masked_fill(pattern == 0, 16).sort(stable=True)
    counts = torch.stack([(pattern == p).sum(-1) for p in range(16)], -1)
    counts[..., 0] = 0
    index = order.indices[..., None].expand(-1, -1, -1, 4)
    kept = hit.gather(2, index)
    columns = order.indices[order.values < 16].to(torch.int16)
    ends = torch.stack([counts.sum(-1), kept.sum((-1, -2))], -1).flatten(0, 1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1, 2), ends])[: len(ends)].reshape(*counts.shape[:2], 2)
    values = words.gather(2, index)[kept]
    return Tiles((O, C), kind, block, counts.to(torch.int16), starts, columns, values, scales, _sums(V, scales))


def pack_sell(weight: Tensor, kind: str = "fp32", block: int = NEAR, grid: Grid | None = None) -> Sell:
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
    full = _padded(V, SLAB, block * each)
    parts = full.view(torch.int32).reshape(-1, SLAB, full.shape[1] // each // block, block).transpose(1, 2)
    hit = (full.reshape(len(full), -1, each) != 0).any(-1)  # as parts: [slabs, blocks, 128, block]
    hit = hit.reshape(-1, SLAB, parts.shape[1], block).transpose(1, 2)
    count = hit.sum(-1)
    there = torch.arange(len(full)).reshape(-1, 1, SLAB) < O + O % 2
    order = torch.where(there, count, block + 1).sort(dim=-1, stable=True).indices
    counts = count.gather(-1, order).unflatten(-1, (-1, 2)).amax(-1)
    rows = order[..., None].expand(-1, -1, -1, block)
    hit, parts = hit.gather(2, rows), parts.gather(2, rows)
    first = hit.to(torch.uint8).sort(dim=-1, descending=True, stable=True)  # lanes with a value before those without
    kept = first.values.bool()
    columns = torch.where(kept, first.indices, 0).unflatten(2, (-1, 2)).transpose(-1, -2)  # [.., 64, block, 2]
    values = torch.where(kept, parts.gather(-1, first.indices), 0).unflatten(2, (-1, 2)).transpose(-1, -2)
    used = torch.arange(block) < counts[..., None]
    ends = counts.sum(-1).flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])[: len(ends)].reshape(counts.shape[:2])
    made = (starts, counts.to(torch.int16), order.to(torch.uint8), columns[used].to(torch.int16), values[used])
    return Sell((O, C), kind, block, *made, scales, _sums(V, scales))


def _unpack_sell(packed: Sell) -> Tensor:
    """Its lanes as numbers, [O or more, C or more]."""
    slabs, blocks = packed.starts.shape
    counts = packed.counts.long().flatten() & 0xFFFF
    words = torch.zeros(slabs * blocks * SLAB, packed.block, dtype=torch.int32)
    place = (torch.arange(slabs * blocks)[:, None] * SLAB + packed.order.flatten(0, 1).long()).reshape(-1, 2)
    rows, columns = place.repeat_interleave(counts, 0), packed.columns.long() & 0xFFFF
    kept = packed.values != 0
    words[rows[kept], columns[kept]] = packed.values[kept]
    lanes = words.reshape(slabs, blocks, SLAB, packed.block).transpose(1, 2)
    return lanes.flatten().view(KINDS[packed.kind]).reshape(slabs * SLAB, -1)


def _crowded(V: Tensor) -> bool:
    """Whether products keep up with inputs from the first cache: measured, from 35 % of the weights on."""
    hit = _padded(V != 0, 4, 1).view(-1, 4, V.shape[1])
    left, columns = float(hit.float().mean()), float(hit.any(1).float().mean())
    return 0.35 < left < 0.75 * columns


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
) -> ConvTiles:
    """Return a convolution's W [O, I, rows, columns] as `ConvTiles`, of tiles or, for one group, `Sell`.
    O(weights log block).

    >>> packed = pack_conv(torch.tensor([[[[0.0, 2.0]]], [[[1.0, 3.0]]]]), padding=(0, 1))
    >>> packed.columns.tolist(), unpack(packed)[:, 0, 0].tolist()
    ([0, 1], [[0.0, 2.0], [1.0, 3.0]])
    """
    if weight.dim() != 4 or 0 in weight.shape or groups < 1 or len(weight) % groups:
        raise FormatError(f"no convolution of {groups} groups has a weight of shape {list(weight.shape)}")
    O, I, rows, columns = weight.shape
    if (sell or kind != "fp32") and groups > 1:
        raise FormatError(f"{'pairs of rows' if sell else kind} are for convolutions of one group, got {groups}")
    each = LANE.get(kind, 1)
    full: Any = weight.new_zeros(groups, -(-O // groups // 4) * 4, -(-I // each) * each, rows * columns)
    full[:, : O // groups, :I] = weight.detach().reshape(groups, O // groups, I, -1)
    W = full.float().unflatten(2, (-1, each)).transpose(-1, -2).flatten(2).flatten(0, 1)
    made = (pack_sell if sell else pack_tiles)(W, kind, block)
    how = (groups, stride, padding, dilation, made.block)
    parts: dict[str, Any] = {n: t for n, t in vars(made).items() if isinstance(t, Tensor)}
    return ConvTiles((O, I, rows, columns), *how, kind=kind, **parts)


def pack_dense(weight: Tensor, **how: Any) -> Dense | ConvTiles:
    """Return W [O, C] as `Dense`, or a convolution's [O, I, rows, columns] with its `stride`, `padding` and `dilation`
    as `ConvTiles` without tiles. O(weights).

    >>> pack_dense(torch.tensor([[1.0, 2], [3, 4]])).values.tolist()
    [[[1.0, 3.0, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0]]]
    """
    values, _ = stored(weight.flatten(1), "fp32")
    values = _padded(values, 4, 1).unflatten(0, (-1, 4)).transpose(1, 2).contiguous()
    if weight.dim() == 2:
        return Dense((weight.shape[0], weight.shape[1]), "fp32", values)
    O, I, rows, columns = weight.shape
    return ConvTiles((O, I, rows, columns), 1, **how, block=NEAR, values=values)


def unpack(packed: Packed) -> Tensor:
    """Return what the kernels multiply by as fp32 [O, C] (or a convolution's shape): int8 values times their scales.
    O(O C)."""
    if isinstance(packed, ConvTiles):
        (O, I, *kernel), groups = packed.shape, packed.groups
        W = unpack(packed.matrix).reshape(groups, packed.matrix.shape[0] // groups, -1, *kernel, LANE[packed.kind])
        return W.movedim(-1, 3).flatten(2, 3)[:, : O // groups, :I].reshape(packed.shape)
    if isinstance(packed, Panels):
        return _unpack_panels(packed)
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
        words = packed.masks.shape[1]
        hit = unpack_bits(packed.masks.reshape(-1).view(torch.uint8), packed.masks.numel() * 64)
        full = torch.zeros(hit.shape, dtype=dtype)
        full[hit] = packed.values[: int(hit.sum())]
        W = full.reshape(-1, words, 4, 64).transpose(1, 2).reshape(-1, words * 64)
    elif isinstance(packed, Sell):
        W = _unpack_sell(packed)
    else:
        tiles, blocks = packed.counts.shape[:2]
        counts = packed.counts.long() & 0xFFFF
        pattern = torch.arange(16).expand(tiles, blocks, 16).reshape(-1).repeat_interleave(counts.reshape(-1))
        place = torch.arange(tiles * blocks).repeat_interleave(counts.sum(-1).reshape(-1))
        kept = (pattern[:, None] >> torch.arange(4) & 1).bool()
        words = torch.zeros(tiles * blocks, packed.block, 4, dtype=torch.int32)
        rows = torch.zeros(len(pattern), 4, dtype=torch.int32)
        rows[kept] = packed.values
        words[place, packed.columns.long() & 0xFFFF] = rows
        lanes = words.reshape(tiles, blocks, packed.block, 4).permute(0, 3, 1, 2)
        W = lanes.flatten().view(dtype).reshape(tiles * 4, -1)
    W = W[:O, :C].float()
    return W if packed.scales is None else W * packed.scales[:, None]


def shared(tiles: Tiles | ConvTiles) -> float:
    """Return how many of four outputs have a value at the same input, in the mean: what blocks of zeros change."""
    return len(tiles.values) / max(1, len(tiles.columns))  # type: ignore[arg-type]


def nbytes(packed: Packed) -> int:
    """Return the bytes of all tensors together."""
    return sum(t.nbytes for t in vars(packed).values() if isinstance(t, Tensor))


def _block(block: int, lanes: int) -> int:
    """Lanes of a block, of so many in all."""
    block = min(lanes or 1, block, BLOCK)
    if block < 1:
        raise FormatError(f"a block has at least one lane, got {block}")
    return block


def _padded(V: Tensor, rows: int, columns: int) -> Tensor:
    O, C = V.shape
    full: Any = V.new_zeros(-(-O // rows) * rows, -(-C // columns) * columns)
    full[:O, :C] = V
    return full


def _sums(V: Tensor, scales: Tensor | None) -> Tensor | None:
    return None if scales is None else V.sum(1, dtype=torch.int32)
