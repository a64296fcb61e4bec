"""Weights on a quantization grid (integer codes times a scale) or in a codebook, as data and as parametrizations.

    W      weight in its stored shape
    c      integer codes, W = c x scale; c = 0 exactly where W = 0
    scale  as many dimensions as W, each size divides W's: [1, 1] per tensor, [O, 1] per output, [O, I / 128] per group
    zero   zero point: the code of 0 if codes run from 0 to 2^bits - 1 (asymmetric); None for symmetric codes

0 is on every grid, so a masked weight stays zero. A grid is attached as a parametrization, which rounds what an
optimizer makes of the weight beneath (gradients pass straight through), or recorded beside a plain weight by `fold_`
and `load`. A record is valid only while the weight is on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.common.errors import ModelError
from rarefy.model.layers import Layer
from rarefy.model.parametrize import attach_

BITS = range(2, 9)
EIGHTHS = 8  # steps of a zero point between two codes
NOTE = "rarefy_grids"


@dataclass(frozen=True, eq=False)
class Grid:
    """Integer codes of `bits` bits. Symmetric codes start at -2^(bits - 1); those of 8 bits at -127, as kernels need.

    >>> grid = Grid(4, torch.tensor([[0.5]]))
    >>> grid.codes(torch.tensor([[0.8, -9.0, 0.0]])).tolist(), grid.snap(torch.tensor([[0.8, -9.0, 0.0]])).tolist()
    ([[2, -8, 0]], [[1.0, -4.0, 0.0]])
    """

    bits: int
    scale: Tensor
    zero: Tensor | None = None

    @property
    def range(self) -> tuple[int, int]:
        """Return the smallest and the largest code, before `zero` is subtracted."""
        half = 1 << (self.bits - 1)
        if self.zero is not None:
            return 0, 2 * half - 1
        return (-half if self.bits < 8 else 1 - half), half - 1

    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes c of a weight, int16 in its shape. O(n)."""
        return self._nearest(weight).to(torch.int16).reshape(weight.shape)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights W of codes c. O(n)."""
        c = split_blocks(codes.float(), self.scale.shape)
        return (c * broadcast_scales(self.scale.float(), codes.device)).reshape(codes.shape).to(dtype)

    def snap(self, weight: Tensor) -> Tensor:
        """Return the nearest point of the grid for each weight. O(n)."""
        scale = broadcast_scales(self.scale.float(), weight.device)
        return self._nearest(weight).mul_(scale).reshape(weight.shape).to(weight.dtype)

    def in_range(self, weight: Tensor) -> Tensor:
        """Return where weights are within the range of the grid, bool."""
        low, high = self.range
        steps, _ = self._steps(weight)
        return ((steps >= low) & (steps <= high)).reshape(weight.shape)

    def contains(self, weight: Tensor) -> bool:
        """Return whether every weight is a point of the grid."""
        if not scale_fits(self.scale.shape, weight.shape):
            return False
        return torch.equal(self.snap(weight), weight)

    def expand(self, small: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Expand a tensor of the shape of scales to the shape of weights."""
        halves = [n for s, d in zip(small.shape, shape) for n in (s, d // s)]
        return broadcast_scales(small).expand(halves).reshape(shape)

    def map(self, do: Callable[[Tensor], Tensor]) -> Grid:
        """Return the grid with a function applied to its tensors."""
        return Grid(self.bits, do(self.scale), None if self.zero is None else do(self.zero))

    def _steps(self, weight: Tensor) -> tuple[Tensor, Tensor | int]:
        """Return the nearest codes, in blocks and not limited to the range, and the zero points."""
        blocks = split_blocks(weight.detach().float(), self.scale.shape)
        zero = 0 if self.zero is None else broadcast_scales(self.zero.float(), weight.device)
        return (blocks / broadcast_scales(self.scale.float(), weight.device)).round_().add_(zero), zero

    def _nearest(self, weight: Tensor) -> Tensor:
        """Return the codes of a weight less their zero points, in fp32 and in blocks."""
        steps, zero = self._steps(weight)
        return steps.clamp_(*self.range).sub_(zero)


@dataclass(frozen=True, eq=False)
class OffsetGrid:
    """Codes from 0 on, with a minimum for each group: W = scale x code - minimum, as GGUF files store weights.

    Kernels alone use it, with zero points in eighths of a scale. 0 need not be on it, so weights that are pruned or
    trained have a `Grid`.

    >>> grid = OffsetGrid(4, torch.tensor([[0.5]]), torch.tensor([[1.3]]))
    >>> grid.codes(torch.tensor([[-1.3, 0.7]])).tolist(), [t.tolist() for t in grid.eighths()]
    ([[0, 4]], [[[0.0625]], [[21]]])
    """

    bits: int
    scale: Tensor  # [O, groups], above 0
    minimum: Tensor  # likewise

    @property
    def fits(self) -> bool:
        """Return whether all zero points fit their bytes: from 0 to 31.8 scales."""
        scale, zero = self._eighths()
        return bool(((zero >= 0) & (zero < 256) & scale.isfinite() & (scale > 0)).all())

    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes of a weight, int16 in its shape. O(n)."""
        blocks = split_blocks(weight.detach().float(), self.scale.shape) + broadcast_scales(self.minimum.float())
        codes = (blocks / broadcast_scales(self.scale.float())).round_().clamp_(0, (1 << self.bits) - 1)
        return codes.to(torch.int16).reshape(weight.shape)

    def eighths(self) -> tuple[Tensor, Tensor]:
        """Return an eighth of each scale, bf16, and the zero points as multiples of it, uint8."""
        scale, zero = self._eighths()
        return scale, zero.to(torch.uint8)

    def map(self, do: Callable[[Tensor], Tensor]) -> OffsetGrid:
        """Return the grid with a function applied to its tensors."""
        return OffsetGrid(self.bits, do(self.scale), do(self.minimum))

    def _eighths(self) -> tuple[Tensor, Tensor]:
        scale = (self.scale.float() / EIGHTHS).bfloat16()
        return scale, (self.minimum.float() / scale.float()).round()


@dataclass(frozen=True, eq=False)
class Codebook:
    """2^bits values for all weights, or for each block of them; the first value is 0.

    table  [*blocks, 2^bits], with blocks in the shape of a grid's scales

    >>> book = Codebook(2, torch.tensor([[[0.0, -1.0, 0.25, 2.0]]]))
    >>> book.codes(torch.tensor([[0.1, 1.9, -5.0]])).tolist(), book.snap(torch.tensor([[0.1, 1.9, -5.0]])).tolist()
    ([[0, 3, 1]], [[0.0, 2.0, -1.0]])
    """

    bits: int
    table: Tensor

    def codes(self, weight: Tensor) -> Tensor:
        """Return the index of the nearest value for each weight, uint8. O(n bits)."""
        blocks = self.table.shape[:-1]
        table, order = self.table.float().to(weight.device).flatten(0, -2).sort(-1)
        rows = block_rows(weight.detach().float(), blocks)
        midpoints = (table[:, 1:] + table[:, :-1]) / 2
        indices = order.gather(1, torch.searchsorted(midpoints.contiguous(), rows.contiguous()))
        return from_block_rows(indices.to(torch.uint8), blocks, tuple(weight.shape))

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights W of indices. O(n)."""
        blocks = self.table.shape[:-1]
        table = self.table.to(codes.device, dtype).flatten(0, -2)
        return from_block_rows(table.gather(1, block_rows(codes, blocks).long()), blocks, tuple(codes.shape))

    def snap(self, weight: Tensor) -> Tensor:
        """Return the nearest value of the table for each weight. O(n bits)."""
        return self.values(self.codes(weight), weight.dtype)

    def in_range(self, weight: Tensor) -> Tensor:
        """Return where a weight receives a gradient: everywhere."""
        return torch.ones_like(weight, dtype=torch.bool)

    def contains(self, weight: Tensor) -> bool:
        """Return whether every weight is one of the values."""
        if not scale_fits(tuple(self.table.shape[:-1]), tuple(weight.shape)):
            return False
        return torch.equal(self.snap(weight), weight)

    def map(self, do: Callable[[Tensor], Tensor]) -> Codebook:
        """Return the codebook with a function applied to its table."""
        return Codebook(self.bits, do(self.table))


def block_rows(weight: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Return a weight as [blocks, weights of a block], with blocks in the shape of scales. O(n)."""
    n, halves = len(blocks), split_blocks(weight, blocks)
    return halves.permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2)).reshape(math.prod(blocks), -1)


def from_block_rows(rows: Tensor, blocks: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return the weight of `block_rows`: its inverse."""
    n = len(blocks)
    tall = rows.reshape(*blocks, *(d // b for b, d in zip(blocks, shape)))
    return tall.permute([k for d in range(n) for k in (d, n + d)]).reshape(shape).contiguous()


WeightGrid = Grid | Codebook


def scale_fits(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether scales of that shape can belong to a weight of that shape.

    >>> scale_fits((4, 2), (4, 128)), scale_fits((4, 3), (4, 128))
    (True, False)
    """
    return len(scale) == len(shape) and all(s > 0 and n % s == 0 for s, n in zip(scale, shape))


def split_blocks(weight: Tensor, scale: tuple[int, ...]) -> Tensor:
    """Return a weight with every dimension split into (scales, weights of one scale)."""
    return weight.reshape([n for s, d in zip(scale, weight.shape) for n in (s, d // s)])


def broadcast_scales(scale: Tensor, device: Any = None) -> Tensor:
    """Return scales in a shape that broadcasts to what `split_blocks` returns."""
    return scale.reshape([n for s in scale.shape for n in (s, 1)]).to(device)


class GridParametrization(nn.Module):
    """Parametrization: the nearest grid points of a weight; gradients pass where weights are within the range."""

    scale: Tensor
    zero: Tensor | None

    def __init__(self, grid: Grid):
        super().__init__()
        self.bits = grid.bits
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero)

    @property
    def grid(self) -> Grid:
        """Return the grid that weights are rounded to."""
        return Grid(self.bits, self.scale, self.zero)

    def forward(self, weight: Tensor) -> Tensor:
        grid = self.grid
        snapped = grid.snap(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return snapped
        through = torch.where(grid.in_range(weight), weight, weight.detach())
        return StraightThrough.apply(through, snapped)  # type: ignore[return-value]  # x + (snapped - x) would not be exact

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GridParametrization:
        before = self.scale
        super()._apply(fn, recurse)
        self.scale = before.to(self.scale.device)  # casting the scale would change the grid
        return self


class CodebookParametrization(nn.Module):
    """Parametrization: codebook values at fixed indices.

    Gradients go to the values; the underlying weight is not used.
    """

    index: Tensor

    def __init__(self, book: Codebook, weight: Tensor, trains: bool = True):
        super().__init__()
        self.trains = trains  # whether the underlying weight was trainable; it has no gradient while this is attached
        self.bits = book.bits
        self.register_buffer("index", book.codes(weight))
        self.table = nn.Parameter(book.table.detach().clone(), trains)

    @property
    def grid(self) -> Codebook:
        return Codebook(self.bits, self._table().detach())

    def forward(self, weight: Tensor) -> Tensor:
        return Codebook(self.bits, self._table()).values(self.index, weight.dtype)

    def _table(self) -> Tensor:
        return torch.cat([torch.zeros_like(self.table[..., :1]), self.table[..., 1:]], -1)  # 0 stays 0


GRID_PARAMETRIZATIONS = (GridParametrization, CodebookParametrization)


class StraightThrough(torch.autograd.Function):
    """Straight-through estimator: returns the second argument, passes the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def get_grid(layer: Layer) -> WeightGrid | None:
    """Return the grid of a layer's weight, attached or recorded, or None if it has none or has left it."""
    live = attached_grid(layer.module, layer.param)
    if live is not None:
        return live
    noted = recorded_grids(layer.module).get(layer.param)
    return noted if noted is not None and noted.contains(layer.weight.detach()) else None


def attached_grid(module: nn.Module, param: str) -> WeightGrid | None:
    """Return the grid or codebook that is attached as a parametrization, or None."""
    if not parametrize.is_parametrized(module, param):
        return None
    grids = [p for p in getattr(module.parametrizations, param) if isinstance(p, GRID_PARAMETRIZATIONS)]  # type: ignore[union-attr]
    return grids[0].grid if grids else None


def recorded_grids(module: nn.Module) -> dict[str, WeightGrid]:
    """Return {parameter name: grid} as recorded beside a module's plain weights."""
    return module.__dict__.get(NOTE, {})


def record_grid_(module: nn.Module, param: str, grid: WeightGrid | None) -> None:
    """Record the grid of a plain weight; None removes the record."""
    grids = {k: g for k, g in recorded_grids(module).items() if k != param} | ({} if grid is None else {param: grid})
    module.__dict__.pop(NOTE, None)
    if grids:
        module.__dict__[NOTE] = grids


def set_grid_(layer: Layer, grid: WeightGrid) -> None:
    """Attach a grid or a codebook to the weight of a layer, at every owner. O(n)."""
    if attached_grid(layer.module, layer.param) is not None:
        raise ModelError(f"{layer.full_name} is already quantized: call rarefy.fold_ before quantizing it again")
    weight = layer.original
    grid = grid.map(lambda t: t.to(weight.device))
    if isinstance(grid, Grid):
        shared: nn.Module = GridParametrization(grid)
    else:
        shared = CodebookParametrization(grid, layer.weight.detach(), weight.requires_grad)
        weight.requires_grad_(False)
    for _, module, param in layer.owners:
        record_grid_(module, param, None)
        attach_(module, param, shared)


def scale_shape(layer: Layer, group: int | str | None) -> tuple[int, ...]:
    """Return the shape of a layer's scales: per output (None), per `group` of inputs, or one in all ("tensor").

    Raises ModelError if the group size does not divide the inputs.

    >>> from rarefy.model.layers import all_layers
    >>> scale_shape(all_layers(nn.Linear(64, 8))[0], 32), scale_shape(all_layers(nn.Conv2d(4, 6, 3))[0], None)
    ((8, 2), (6, 1, 1, 1))
    """
    stored = tuple(layer.original.shape)
    if group == "tensor":
        return (1,) * len(stored)
    _, _, _, I = layer.layout.shape
    if isinstance(group, int) and I % group:
        divisors = [g for g in range(2, I + 1) if I % g == 0]
        hint = f": {', '.join(map(str, sorted(divisors, key=lambda g: abs(g - group))[:3]))} would" if divisors else ""
        raise ModelError(
            f"{layer.full_name}: a group of {group} does not divide its {I} inputs{hint}; or ignore the layer"
        )
    order, kernel = layer.layout.order, range(1, len(layer.layout.order) - 2)
    sizes = list(layer.layout.split)
    sizes[order[-1]] = I // group if isinstance(group, int) else 1
    for k in kernel:
        if group is None:
            sizes[order[k]] = 1
    shape, remaining_sizes, remaining_split = [], sizes, list(layer.layout.split)
    for n in stored:  # a stored dimension consists of one or more of the split ones
        count = next(
            i
            for i in range(1, len(remaining_split) + 1)
            if math.prod(remaining_split[:i]) == n and _ends(remaining_split, i, stored, shape)
        )
        shape.append(math.prod(remaining_sizes[:count]))
        remaining_sizes, remaining_split = remaining_sizes[count:], remaining_split[count:]
    return tuple(shape)


def _ends(split: list[int], count: int, stored: tuple[int, ...], shape: list[int]) -> bool:
    """Return whether the remaining split dimensions make up the remaining stored ones."""
    return math.prod(split[count:]) == math.prod(stored[len(shape) + 1 :]) and (
        len(split) - count >= len(stored) - len(shape) - 1
    )
