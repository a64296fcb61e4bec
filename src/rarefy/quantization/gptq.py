"""GPTQ (Frantar 2023): second-order rounding in one pass through the model, layer by layer.

Each layer is rounded on the inputs that it gets from layers rounded before it. With `asymmetric`, its targets move
towards what the layer returns in the dense model, which runs alongside (GPTAQ, Li 2025). With a pattern, zeros are
chosen in the same pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.sequential import GroupStep, LayerGroup, calibrate_sequentially, layer_groups
from rarefy.common.errors import ModelError
from rarefy.common.progress import track
from rarefy.model.layers import Layer
from rarefy.model.layout import layout
from rarefy.model.masks import get_mask
from rarefy.model.quant_grid import Grid, split_blocks
from rarefy.prune import solvers
from rarefy.prune.layerwise import check_solvable, fixed_mask, inverse_factor_of, mask_choosers, target_of
from rarefy.prune.matrices import to_matrix, to_stored
from rarefy.prune.solver_config import SparsityTarget, passes
from rarefy.quantization.config import QuantizeConfig, QuantizedWeight
from rarefy.quantization.grids import check_finite, fit_grid, fit_scales
from rarefy.quantization.scale_fitting import FITS


def gptq_(
    model: nn.Module,
    chosen: Sequence[Layer],
    configs: Mapping[str, QuantizeConfig],
    shapes: Mapping[str, tuple[int, ...]],
    data: Iterable[Any],
    progress: bool = False,
) -> tuple[dict[str, dict[str, Any]], list[QuantizedWeight]]:
    """Round the selected layers in place; return their report rows (relative error, damping, seconds) and their grids.

    Each layer is rounded on the inputs from layers rounded before it, as its own entry of `configs` says. The solver is
    the same for all, except for `asymmetric`. One forward pass and the solver; with `asymmetric` a dense pass too.
    """
    solver = configs[chosen[0].full_name].solver
    assert solver is not None
    data = data if isinstance(data, list | tuple) else list(data)
    names, chosen = [l.full_name for l in chosen], [_as_output_head(l) for l in chosen]
    first = check_solvable(chosen, data, f"solver {solver.name}")
    rows: dict[str, dict[str, Any]] = {}
    quantized: dict[str, QuantizedWeight] = {}
    with passes(solver):
        groups = layer_groups(model, first, chosen, dense=True)
        dense = any(_is_corrected(layer, group, configs) for group in groups[1:] for layer in group.layers)
        with closing(calibrate_sequentially(model, data, groups, dense=dense)) as stops:
            for stop in track(stops, "rounding by obs", progress, len(groups)):
                assert isinstance(stop, GroupStep)
                with torch.autocast("cpu", enabled=False):
                    for layer in stop.group.layers:
                        name = layer.full_name
                        rows[name], quantized[name] = _solve(layer, stop, configs[name], shapes)
    return rows, [quantized[n] for n in names]


def _is_corrected(layer: Layer, group: LayerGroup, configs: Mapping[str, QuantizeConfig]) -> bool:
    """Return whether a layer makes up for errors of earlier ones: its inputs must be known of the dense model too."""
    solver = configs[layer.full_name].solver
    return group.has_dense_inputs and solver is not None and bool(solver.asymmetric)


def _as_output_head(layer: Layer) -> Layer:
    """Return an embedding that is the output head too as that head, whose inputs the solver needs; others as they are.

    The name stays.
    """
    heads = [o for o in layer.owners if isinstance(o[1], nn.Linear)]
    if not heads or not any(isinstance(module, nn.Embedding) for _, module, _ in layer.owners):
        return layer
    head_layout = layout(heads[0][1], heads[0][2])
    assert head_layout is not None
    return replace(layer, param=heads[0][2], owners=(heads[0],), layout=head_layout)


def _solve(
    layer: Layer, stop: GroupStep, config: QuantizeConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], QuantizedWeight]:
    """Round one layer; return its report row and its quantized weight."""
    start, H, solver = time.perf_counter(), stop.gram.H, config.solver
    assert H is not None and solver is not None and solver.damping is not None and solver.block is not None
    W = to_matrix(layer, layer.weight.detach().float())
    if not torch.isfinite(W).all():
        raise ModelError(f"{layer.full_name}: NaN or inf in its weights")
    wanted = target = target_of(W, H, stop.gram, solver)
    if layer is stop.group.layers[-1]:  # large matrices that nothing needs any more
        stop.gram.cross = stop.gram.held_out = None
    U, damping = inverse_factor_of([layer], H, solver.damping)
    columns, shape = _importance(layer, H), tuple(layer.original.shape)
    mask, new_mask = get_mask(layer), None
    if config.pattern is None:
        keep = torch.ones_like(W, dtype=torch.bool) if mask is None else to_matrix(layer, mask)
        edges = _edges(W.shape[-1], config)
    else:  # choose the mask, refit the weights to it, then round: this has the least error
        prune = SparsityTarget(config.pattern, config.sparsity, {layer.full_name: config.sparsity}, "layer")
        choose, parts = mask_choosers([layer], prune, {})
        edges = parts[0].edges(_block(config))
        target, keep = solvers.obs(target, U, choose, edges)
        target = solvers.refit(target, wanted, solvers.damped(H, damping), keep)
        new_mask = to_stored(layer, keep, shape)
    column_grid = ColumnGrid(layer, torch.where(keep, target, 0.0), config, shapes[layer.full_name], columns)
    rounded, _ = solvers.obs(target, U, fixed_mask(keep), edges, column_grid)
    grid = column_grid.grid()
    weight = to_stored(layer, rounded, shape).to(layer.original.dtype)
    # casting to the weight's dtype may have moved it off the grid
    weight = torch.where(weight == 0, 0.0, grid.snap(weight))
    weight = check_finite(layer, grid, weight)
    del column_grid, rounded
    zeros = W.new_zeros(1).expand_as(W)
    error, energy = (solvers.squared_errors(w, wanted, H).sum() for w in (to_matrix(layer, weight.float()), zeros))
    stop.weights[layer.full_name] = weight
    row = {"error": float(error / energy.clamp(min=1e-30)), "damping": damping, "seconds": time.perf_counter() - start}
    return row, (grid, weight, new_mask)


def _block(config: QuantizeConfig) -> int:
    """Return the columns of a block: whole groups."""
    assert config.solver is not None and config.solver.block is not None
    if not isinstance(config.group, int):
        return config.solver.block
    return max(1, config.solver.block // config.group) * config.group


def _edges(columns: int, config: QuantizeConfig) -> list[int]:
    """Return the block boundaries of that many columns."""
    step = _block(config)
    return [*range(0, columns, step), columns]


def _importance(layer: Layer, H: Tensor) -> Tensor:
    """Return the error weight of each column, [G, 1, C]; inputs that are always zero have a small one."""
    d = H.diagonal(dim1=-2, dim2=-1)
    return (d + 1e-3 * d.mean(-1, keepdim=True) + 1e-12)[:, None]


class ColumnGrid:
    """The quantization grid of a layer, one column of its matrix [G, O, C] at a time.

    Scales of input groups are fitted when the group is reached, on weights that hold the propagated errors of earlier
    groups. All other scales are fitted on the original weights.
    """

    def __init__(self, layer: Layer, W: Tensor, config: QuantizeConfig, shape: tuple[int, ...], columns: Tensor):
        self.layer, self.config, self.shape, self.columns = layer, config, shape, columns
        whole = to_stored(layer, W, tuple(layer.original.shape))
        weigh = to_stored(layer, columns.expand_as(W), tuple(layer.original.shape))
        grid = fit_grid(whole, shape, config, weigh)
        self.group = config.group if isinstance(config.group, int) else 0
        self.scale = to_matrix(layer, grid.expand(grid.scale.float(), whole.shape)).clone()
        self.zero = None if grid.zero is None else to_matrix(layer, grid.expand(grid.zero.float(), whole.shape)).clone()
        self.low, self.high = grid.range

    def begin(self, W: Tensor, mask: Tensor, first: int) -> None:
        """Fit the scales of the group that starts at column `first`; see `rarefy.prune.solvers.ColumnQuantizer`."""
        G, n, O = W.shape
        X = torch.where(mask, W, 0.0).transpose(1, 2).reshape(G * O, n)  # zero is a point of every grid
        weigh = self.columns[..., first : first + n].expand(G, O, n).reshape(G * O, n)
        scale, zero = fit_scales(FITS[self.config.fit], X, self.config, weigh)
        self.scale[..., first : first + n] = scale.float().reshape(G, O, 1)
        if self.zero is not None and zero is not None:
            self.zero[..., first : first + n] = zero.float().reshape(G, O, 1)

    def __call__(self, w: Tensor, column: int) -> Tensor:
        """Round a column to the grid; see `rarefy.prune.solvers.ColumnQuantizer`."""
        scale = self.scale[..., column]
        zero = 0 if self.zero is None else self.zero[..., column]
        return ((w / scale).round() + zero).clamp(self.low, self.high).sub(zero) * scale

    def grid(self) -> Grid:
        """Return the grid in the shape in which the layer stores its weight."""
        fields = [self._first(self.scale)] + ([] if self.zero is None else [self._first(self.zero)])
        scale = fields[0].bfloat16() if isinstance(self.config.group, int) else fields[0]
        return Grid(self.config.bits, scale, fields[1].to(torch.uint8) if len(fields) > 1 else None)

    def _first(self, full: Tensor) -> Tensor:
        """Return one entry of each block, whose entries are all equal."""
        halves = split_blocks(to_stored(self.layer, full, tuple(self.layer.original.shape)), self.shape)
        for dim in reversed(range(1, halves.dim(), 2)):
            halves = halves.select(dim, 0)
        return halves.contiguous()
