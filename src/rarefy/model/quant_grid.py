"""Weights that lie on a grid: whole numbers times a scale. The grid, and the parametrization that keeps weights on it.

    W      as stored
    c      whole numbers, W = c x scale; c = 0 exactly where W = 0
    scale  as many dimensions as W, each size divides W's: [1, 1] one for all, [O, 1] one an output, [O, I / 128] groups
    zero   the code that means 0 where codes run from 0 to 2^bits - 1 (asymmetric); None: they lie around 0

Zero is a point of every grid, so what a mask has zeroed stays zero, by construction. A grid is live as a
parametrization, which rounds whatever an optimizer makes of the weight beneath (gradients go straight through), or
noted beside a plain weight, as `fold_` and `load` leave it; a note counts only as long as the weight lies on it.
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
NOTE = "rarefy_grids"


@dataclass(frozen=True, eq=False)
class Grid:
    """Codes of `bits` bits; symmetric ones run from -2^(bits - 1) up, those of 8 bits from -127, as kernels want.

    >>> grid = Grid(4, torch.tensor([[0.5]]))
    >>> grid.codes(torch.tensor([[0.8, -9.0, 0.0]])).tolist(), grid.snap(torch.tensor([[0.8, -9.0, 0.0]])).tolist()
    ([[2, -8, 0]], [[1.0, -4.0, 0.0]])
    """

    bits: int
    scale: Tensor
    zero: Tensor | None = None

    @property
    def range(self) -> tuple[int, int]:
        """The least and the greatest code, before `zero` is taken off."""
        half = 1 << (self.bits - 1)
        if self.zero is not None:
            return 0, 2 * half - 1
        return (-half if self.bits < 8 else 1 - half), half - 1

    def codes(self, weight: Tensor) -> Tensor:
        """Return c, int16, in the weight's shape. O(n)."""
        return self._round(weight)[0].to(torch.int16).reshape(weight.shape)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W of codes c. O(n)."""
        c = split_blocks(codes.float(), self.scale.shape)
        return (c * broadcast_scales(self.scale.float(), codes.device)).reshape(codes.shape).to(dtype)

    def snap(self, weight: Tensor) -> Tensor:
        """Return each weight's nearest point of the grid. O(n)."""
        c, _ = self._round(weight)
        return (c * broadcast_scales(self.scale.float(), weight.device)).reshape(weight.shape).to(weight.dtype)

    def in_range(self, weight: Tensor) -> Tensor:
        """Return where weights lie within the grid's ends, bool."""
        return self._round(weight)[1].reshape(weight.shape)

    def contains(self, weight: Tensor) -> bool:
        """Whether every weight is a point of the grid."""
        if not scale_fits(self.scale.shape, weight.shape):
            return False
        return torch.equal(self.snap(weight), weight)

    def expand(self, small: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor in the shape of scales as one in the shape of weights."""
        halves = [n for s, d in zip(small.shape, shape) for n in (s, d // s)]
        return broadcast_scales(small).expand(halves).reshape(shape)

    def map(self, do: Callable[[Tensor], Tensor]) -> Grid:
        """Return the grid with its tensors changed."""
        return Grid(self.bits, do(self.scale), None if self.zero is None else do(self.zero))

    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.range
        x = (
            split_blocks(weight.detach().float(), self.scale.shape)
            / broadcast_scales(self.scale.float(), weight.device)
        ).round_()
        zero = 0 if self.zero is None else broadcast_scales(self.zero.float(), weight.device)
        return (x + zero).clamp_(low, high) - zero, (x + zero >= low) & (x + zero <= high)


@dataclass(frozen=True, eq=False)
class Codebook:
    """2^bits values for all weights, or for each block of them; the first is 0.

    table  [*blocks, 2^bits], blocks as the shape of a grid's scales

    >>> book = Codebook(2, torch.tensor([[[0.0, -1.0, 0.25, 2.0]]]))
    >>> book.codes(torch.tensor([[0.1, 1.9, -5.0]])).tolist(), book.snap(torch.tensor([[0.1, 1.9, -5.0]])).tolist()
    ([[0, 3, 1]], [[0.0, 2.0, -1.0]])
    """

    bits: int
    table: Tensor

    def codes(self, weight: Tensor) -> Tensor:
        """Return the index of each weight's nearest value, uint8. O(n bits)."""
        blocks = self.table.shape[:-1]
        table, order = self.table.float().to(weight.device).flatten(0, -2).sort(-1)
        rows = block_rows(weight.detach().float(), blocks)
        middle = (table[:, 1:] + table[:, :-1]) / 2
        found = order.gather(1, torch.searchsorted(middle.contiguous(), rows.contiguous()))
        return _from_block_rows(found.to(torch.uint8), blocks, tuple(weight.shape))

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W of indices. O(n)."""
        blocks = self.table.shape[:-1]
        table = self.table.to(codes.device, dtype).flatten(0, -2)
        return _from_block_rows(table.gather(1, block_rows(codes, blocks).long()), blocks, tuple(codes.shape))

    def snap(self, weight: Tensor) -> Tensor:
        """Return each weight's nearest value of the table. O(n bits)."""
        return self.values(self.codes(weight), weight.dtype)

    def in_range(self, weight: Tensor) -> Tensor:
        """Return where a weight's gradient passes: everywhere."""
        return torch.ones_like(weight, dtype=torch.bool)

    def contains(self, weight: Tensor) -> bool:
        """Whether every weight is one of the values."""
        if not scale_fits(tuple(self.table.shape[:-1]), tuple(weight.shape)):
            return False
        return torch.equal(self.snap(weight), weight)

    def map(self, do: Callable[[Tensor], Tensor]) -> Codebook:
        """Return the codebook with its table changed."""
        return Codebook(self.bits, do(self.table))


def block_rows(weight: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Return a weight as [blocks, weights of one], blocks in the shape of scales. O(n)."""
    n, halves = len(blocks), split_blocks(weight, blocks)
    return halves.permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2)).reshape(math.prod(blocks), -1)


def _from_block_rows(rows: Tensor, blocks: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The inverse of `block_rows`, in the weight's shape."""
    n = len(blocks)
    tall = rows.reshape(*blocks, *(d // b for b, d in zip(blocks, shape)))
    return tall.permute([k for d in range(n) for k in (d, n + d)]).reshape(shape).contiguous()


WeightGrid = Grid | Codebook


def scale_fits(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether scales of that shape can belong to a weight of that shape.

    >>> scale_fits((4, 2), (4, 128)), scale_fits((4, 3), (4, 128))
    (True, False)
    """
    return len(scale) == len(shape) and all(s > 0 and n % s == 0 for s, n in zip(scale, shape))


def split_blocks(weight: Tensor, scale: tuple[int, ...]) -> Tensor:
    """Return a weight with every dimension split into (scales, weights of one)."""
    return weight.reshape([n for s, d in zip(scale, weight.shape) for n in (s, d // s)])


def broadcast_scales(scale: Tensor, device: Any = None) -> Tensor:
    """Return scales so that they broadcast to what `split_blocks` returns."""
    return scale.reshape([n for s in scale.shape for n in (s, 1)]).to(device)


class GridParametrization(nn.Module):
    """Parametrization: weight -> its nearest points of a grid; gradients pass where weights lie within its ends."""

    scale: Tensor
    zero: Tensor | None

    def __init__(self, grid: Grid):
        super().__init__()
        self.bits = grid.bits
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero)

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.scale, self.zero)

    def forward(self, weight: Tensor) -> Tensor:
        grid = self.grid
        snapped = grid.snap(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return snapped
        through = torch.where(grid.in_range(weight), weight, weight.detach())
        return StraightThrough.apply(through, snapped)  # type: ignore[return-value]  # x + (snapped - x) would round

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GridParametrization:
        before = self.scale
        super()._apply(fn, recurse)
        self.scale = before.to(self.scale.device)  # a scale of fewer bits would be another grid
        return self


class CodebookParametrization(nn.Module):
    """Parametrization: the values of a codebook at fixed places; its gradient goes to the values, and the weight
    beneath plays no part."""

    index: Tensor

    def __init__(self, book: Codebook, weight: Tensor, trains: bool = True):
        super().__init__()
        self.trains = trains  # whether the weight beneath did, which has no gradient from here on
        self.bits = book.bits
        self.register_buffer("index", book.codes(weight))
        self.table = nn.Parameter(book.table.detach().clone(), trains)

    @property
    def grid(self) -> Codebook:
        return Codebook(self.bits, self._table().detach())

    def forward(self, weight: Tensor) -> Tensor:
        return Codebook(self.bits, self._table()).values(self.index, weight.dtype)

    def _table(self) -> Tensor:
        return torch.cat([torch.zeros_like(self.table[..., :1]), self.table[..., 1:]], -1)  # zero stays


GRID_PARAMETRIZATIONS = (GridParametrization, CodebookParametrization)


class StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient going to the first."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def get_grid(layer: Layer) -> WeightGrid | None:
    """Return the grid of a layer's weight, live or noted, or None; a note that its weight has left does not count."""
    live = attached_grid(layer.module, layer.param)
    if live is not None:
        return live
    noted = recorded_grids(layer.module).get(layer.param)
    return noted if noted is not None and noted.contains(layer.weight.detach()) else None


def attached_grid(module: nn.Module, param: str) -> WeightGrid | None:
    """Return the grid or codebook of a parametrization, or None."""
    if not parametrize.is_parametrized(module, param):
        return None
    found = [p for p in getattr(module.parametrizations, param) if isinstance(p, GRID_PARAMETRIZATIONS)]  # type: ignore[union-attr]
    return found[0].grid if found else None


def recorded_grids(module: nn.Module) -> dict[str, WeightGrid]:
    """Return {parameter: grid} as noted beside a module's plain weights."""
    return module.__dict__.get(NOTE, {})


def record_grid_(module: nn.Module, param: str, grid: WeightGrid | None) -> None:
    """Note the grid of a plain weight, or that it has none."""
    left = {k: g for k, g in recorded_grids(module).items() if k != param} | ({} if grid is None else {param: grid})
    module.__dict__.pop(NOTE, None)
    if left:
        module.__dict__[NOTE] = left


def set_grid_(layer: Layer, grid: WeightGrid) -> None:
    """Keep the weight of a layer on a grid, or in a codebook, from here on, at every owner. O(n)."""
    if attached_grid(layer.module, layer.param) is not None:
        raise ModelError(f"{layer.full_name} lies on a grid already: rarefy.fold_ the model before quantizing it anew")
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
    """Return the shape of a layer's scales: one an output (None), one for a `group` of inputs, or one in all
    ("tensor"). Raises ModelError where the group does not divide the inputs.

    >>> from rarefy.model.layers import all_layers
    >>> scale_shape(all_layers(nn.Linear(64, 8))[0], 32), scale_shape(all_layers(nn.Conv2d(4, 6, 3))[0], None)
    ((8, 2), (6, 1, 1, 1))
    """
    stored = tuple(layer.original.shape)
    if group == "tensor":
        return (1,) * len(stored)
    _, _, _, I = layer.layout.shape
    if isinstance(group, int) and I % group:
        near = [g for g in range(2, I + 1) if I % g == 0]
        hint = f": {', '.join(map(str, sorted(near, key=lambda g: abs(g - group))[:3]))} would" if near else ""
        raise ModelError(
            f"{layer.full_name}: a group of {group} does not divide its {I} inputs{hint}; or ignore the layer"
        )
    order, kernel = layer.layout.order, range(1, len(layer.layout.order) - 2)
    sizes = list(layer.layout.split)
    sizes[order[-1]] = I // group if isinstance(group, int) else 1
    for k in kernel:
        if group is None:
            sizes[order[k]] = 1
    out, rest, whole = [], sizes, list(layer.layout.split)
    for n in stored:  # several of the split dimensions lie in one that is stored
        taken = next(i for i in range(1, len(whole) + 1) if math.prod(whole[:i]) == n and _ends(whole, i, stored, out))
        out.append(math.prod(rest[:taken]))
        rest, whole = rest[taken:], whole[taken:]
    return tuple(out)


def _ends(whole: list[int], taken: int, stored: tuple[int, ...], out: list[int]) -> bool:
    """Whether what is left of the split dimensions makes up what is left of the stored ones."""
    return math.prod(whole[taken:]) == math.prod(stored[len(out) + 1 :]) and (
        len(whole) - taken >= len(stored) - len(out) - 1
    )
