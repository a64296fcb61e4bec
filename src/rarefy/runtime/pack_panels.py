"""Pack quantized weights into panels, and unpack them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import FormatError
from rarefy.model.quant_grid import EIGHTHS, Grid, OffsetGrid
from rarefy.runtime.packed_formats import PANEL_BITS, QuantizedPanels

PIECE = 1 << 22  # weights of a large matrix that are packed at a time, to save memory


def pack_quantized(
    weight: Tensor, grid: Grid | OffsetGrid, fp32_inputs: bool = True, two_terms: bool = False
) -> QuantizedPanels:
    """Return a weight [O, C] that is quantized on `grid` as `QuantizedPanels`. O(O C).

    Args:
        weight: the dequantized weight.
        grid: its codes, scales and zero points; minimums need two terms.
        fp32_inputs: whether kernels leave inputs in fp32; else they quantize each row of them to int8.
        two_terms: whether they also quantize what that loses; for int8 inputs.

    Raises:
        FormatError: no kernel reads scales of these groups, or these zero points or minimums.

    >>> packed = pack_quantized(torch.tensor([[1.0, -2.0]]), Grid(4, torch.tensor([[0.5]])))
    >>> packed.kind, packed.row_scales.tolist(), packed.row_sums.tolist(), unpack_panels(packed).tolist()
    ('int4', [0.5], [-2.0], [[1.0, -2.0]])
    """
    if isinstance(grid, OffsetGrid):
        return _pack_offset(weight, grid, two_terms and not fp32_inputs)
    O, C = weight.shape
    rows, groups = grid.scale.shape
    kind, group = f"int{max(grid.bits, 4) if grid.bits <= 6 else 8}", C // groups
    if rows not in (1, O) or (groups > 1 and group % 32) or (grid.zero is not None and kind == "int8"):
        problem = f"groups of {group} inputs" if groups > 1 and group % 32 else "asymmetric codes of more than 6 bits"
        problem = problem if rows in (1, O) else f"scales of {O // rows} outputs"
        raise FormatError(f"no kernel for {problem}")
    c, col_blocks = grid.codes(weight), -(-C // 64)
    scale_groups = 0 if groups == 1 and grid.zero is None else 1 if group % 64 == 0 or groups == 1 else 2
    scale = grid.scale.float().expand(O, groups)
    row_scales = scale[:, 0].contiguous() if groups == 1 else None
    scales = zeros = None
    by = torch.ones(O, 1, dtype=torch.float32)
    if scale_groups:
        each = 64 // scale_groups
        index = (torch.arange(col_blocks * scale_groups) * each).clamp(max=C - 1) // group
        by = scale[:, index] if row_scales is None else torch.ones(O, len(index), dtype=torch.float32)
        zero = None if grid.zero is None else grid.zero.expand(O, groups)[:, index]
        scales = _panel_cells(by.bfloat16(), col_blocks, 0.0)
        zeros = None if zero is None else _panel_cells(zero, col_blocks, 8)
        by = by.bfloat16().float().repeat_interleave(each, 1)[:, :C]
    row_sums = (c.float() * by).sum(1)
    if kind != "int8":
        middle = 1 << PANEL_BITS[kind] - 1
        zero = middle if grid.zero is None else grid.expand(grid.zero.to(torch.int16), (O, C))
        last = middle if grid.zero is None else grid.zero.expand(O, groups)[:, -1:].to(torch.int16)
        values = _code_cells(c + zero, PANEL_BITS[kind], last, middle)
    else:
        values = padded(c.to(torch.int8), 4, 64).reshape(-1, 4, col_blocks, 64).transpose(1, 2).contiguous()
        values = values.view(torch.uint8)
    tensors = values, row_sums, scales, zeros, row_scales
    return QuantizedPanels((O, C), kind, fp32_inputs, scale_groups, *tensors, two_terms=two_terms)


def _pack_offset(weight: Tensor, grid: OffsetGrid, two_terms: bool) -> QuantizedPanels:
    """Return a weight whose groups of 32 inputs have minimums: zero points in eighths of a scale."""
    O, C = weight.shape
    if grid.scale.shape != (O, C // 32) or C % 32 or grid.bits not in (4, 5) or not two_terms:
        raise FormatError("no kernel for minimums but of 4 and 5 bits in groups of 32, with inputs in two terms")
    if not grid.fits:
        raise FormatError("no kernel for minimums above zero, or lower than zero by more than 31.8 scales")
    scale, zero = grid.eighths()
    codes, col_blocks = grid.codes(weight), -(-C // 64)
    steps = (codes * EIGHTHS).float() - zero.float().repeat_interleave(32, 1)
    row_sums = (steps * scale.float().repeat_interleave(32, 1)).sum(1)
    scales, zeros = (padded(t, 1, 2 * col_blocks) for t in (scale, zero))
    cells = _panel_cells(scales, col_blocks, 0.0), _panel_cells(zeros, col_blocks, 0)
    values = _code_cells(codes, grid.bits, 0, 0)
    return QuantizedPanels((O, C), f"int{grid.bits}", False, 2, values, row_sums, *cells, two_terms=True, zero_bits=3)


def _code_cells(codes: Tensor, bits: int, columns: Any, rows: int) -> Tensor:
    """Return codes [O, C] from 0 on as cells of `QuantizedPanels`, padded: columns with `columns`, rows with `rows`."""
    O, C = codes.shape
    full: Any = torch.full((-(-O // 4) * 4, -(-C // 64) * 64), rows, dtype=torch.int16)
    full[:O] = columns
    full[:O, :C] = codes
    cells = full.to(torch.uint8).reshape(-1, 4, full.shape[1] // 64, 64).transpose(1, 2)
    return _packed_codes(cells, bits).contiguous()


def _high_bits(bits: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return the first bit of each row's even and odd columns in the bytes of high bits [4, 1, 2], and the dimensions
    of codes [.., rows / 2, 2, 32, 2] that share a byte."""
    row, odd = torch.arange(4)[:, None, None], torch.arange(2)
    if bits == 5:
        return 2 * row + odd, (-4, -3, -1)
    return 4 * (row // 2) + 2 * odd, (-4, -1)


def _packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes [.., 4, 64] of 4 to 6 bits, uint8, as `QuantizedPanels` stores them, [.., 4, 8 bits]."""
    pairs = codes.unflatten(-1, (32, 2))
    low = (pairs[..., 0] & 15) | pairs[..., 1] << 4
    if bits == 4:
        return low
    first, together = _high_bits(bits)
    shifted = ((pairs >> 4) << first.to(torch.uint8)).unflatten(-3, (2, 2))
    high = shifted.sum(together, dtype=torch.uint8)
    return torch.cat([low.flatten(-2), high.flatten(codes.dim() - 2)], -1).unflatten(-1, (4, 8 * bits))


def _unpacked_codes(values: Tensor, bits: int) -> Tensor:
    """Return the codes [.., 4, 64] that `_packed_codes` packed."""
    if bits == 4:
        return torch.stack([values & 15, values >> 4], -1).flatten(-2)
    panels = values.flatten(-2)
    low = panels[..., :128].unflatten(-1, (4, 32))
    high = panels[..., 128:].unflatten(-1, (1, 1, 32) if bits == 5 else (1, 2, 32))
    of_rows = high.expand(*high.shape[:-3], 2, 2, 32).flatten(-3, -2)[..., None]
    high = of_rows >> _high_bits(bits)[0].to(torch.uint8) & (1 << bits - 4) - 1
    return (torch.stack([low & 15, low >> 4], -1) | high << 4).flatten(-2)


def join_rows(pieces: Sequence[QuantizedPanels]) -> QuantizedPanels:
    """Return the packed weight of all rows from those of pieces, all but the last of a multiple of four rows. O(bytes).

    >>> rows = pack_quantized(torch.ones(4, 2), Grid(8, torch.ones(4, 1)))
    >>> join_rows([rows, rows]).shape
    (8, 2)
    """
    first, shape = pieces[0], (sum(p.shape[0] for p in pieces), pieces[0].shape[1])
    values = {f.name: [getattr(p, f.name) for p in pieces] for f in fields(first)}
    joined = {n: torch.cat(parts) for n, parts in values.items() if isinstance(parts[0], Tensor)}
    return replace(first, shape=shape, **joined)


def _panel_cells(small: Tensor, col_blocks: int, rest: float) -> Tensor:
    """[O, col_blocks x scale_groups] -> [O / 4, col_blocks, 4, scale_groups]."""
    O = len(small)
    full = small.new_full((-(-O // 4) * 4, small.shape[1]), rest)
    full[:O] = small
    return full.reshape(len(full) // 4, 4, col_blocks, -1).transpose(1, 2).contiguous()


def unpack_panels(packed: QuantizedPanels) -> Tensor:
    """Return the weight [O, C] dequantized to fp32. O(O C)."""
    O, C = packed.shape
    col_blocks = packed.values.shape[1]
    if packed.kind == "int8":
        W = packed.values.view(torch.int8).float()
    else:
        bits = PANEL_BITS[packed.kind]
        zero: Any = 1 << bits - 1
        if packed.zeros is not None:
            zero = packed.zeros.float().repeat_interleave(64 // packed.scale_groups, -1)
        W = _unpacked_codes(packed.values, bits).float() * (1 << packed.zero_bits) - zero
    if packed.scales is not None:
        W = W * packed.scales.float().repeat_interleave(64 // packed.scale_groups, -1)
    W = W.transpose(1, 2).reshape(-1, col_blocks * 64)[:O, :C]
    return W if packed.row_scales is None else W * packed.row_scales[:, None]


def padded(V: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix with zeros behind it, up to multiples of rows and columns."""
    O, C = V.shape
    full: Any = V.new_zeros(-(-O // rows) * rows, -(-C // columns) * columns)
    full[:O, :C] = V
    return full
