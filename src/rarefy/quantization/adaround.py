"""Learned rounding: choose for each weight whether it rounds up or down, to preserve the outputs of whole blocks.

AutoRound (Cheng 2024, eq. 3 and 5), trained by the sign of the gradient:

    W~ = s clip(round(W / s + V)),   s = a s0,   V in [-1/2, 1/2],   a in [1/2, 1]

Each block trains on inputs from the rounded blocks before it. The last batch is held out: its error selects the best
state, and rounding to nearest is one of the candidates.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rarefy.calibration.sequential import (
    Block,
    BlockStep,
    calibrate_sequentially,
    find_blocks,
    layer_groups,
    with_block_steps,
)
from rarefy.common.errors import ModelError
from rarefy.common.progress import track
from rarefy.model import distributed
from rarefy.model.layers import Layer
from rarefy.model.masks import get_mask
from rarefy.model.quant_grid import Grid, broadcast_scales, split_blocks
from rarefy.prune.layerwise import check_solvable
from rarefy.prune.reconstruction import block_error, block_loss, channel_axis
from rarefy.prune.solver_config import in_bf16, passes
from rarefy.quantization.config import QuantizeConfig, QuantizedWeight
from rarefy.quantization.grids import fit_grid

EVALUATIONS = 10  # of the held-out error


def learn_rounding_(
    model: nn.Module,
    chosen: Sequence[Layer],
    config: QuantizeConfig,
    shapes: Mapping[str, tuple[int, ...]],
    data: Iterable[Any],
    progress: bool = False,
) -> tuple[dict[str, dict[str, Any]], list[QuantizedWeight]]:
    """Round the selected layers in place, block by block; return their report rows and their grids.

    A row holds the held-out error of the layer's block before and after. Layers outside of blocks are rounded to
    nearest. O(steps x three passes of a block).
    """
    solver = config.solver
    assert solver is not None
    data = data if isinstance(data, list | tuple) else list(data)
    first = check_solvable(chosen, data, "solver round")
    rows: dict[str, dict[str, Any]] = {}
    quantized: dict[str, QuantizedWeight] = {}
    with distributed.replicated_data(), passes(solver):
        groups = with_block_steps(
            layer_groups(model, first, chosen, dense=True), _blocks_of(model, chosen, solver.blocks)
        )
        with closing(calibrate_sequentially(model, data, groups, dense=True)) as stops:
            for stop in track(stops, "learning to round", progress, len(groups)):
                if isinstance(stop, BlockStep) and stop.calls:
                    with torch.autocast("cpu", enabled=False):
                        _learn(stop, config, shapes, rows, quantized)
    for layer in chosen:
        if layer.full_name not in quantized:
            weight = layer.weight.detach()
            grid = fit_grid(weight, shapes[layer.full_name], config)
            rows[layer.full_name], quantized[layer.full_name] = {}, (grid, grid.snap(weight), None)
    return rows, [quantized[l.full_name] for l in chosen]


def _blocks_of(model: nn.Module, chosen: Sequence[Layer], names: str | None) -> list[Block]:
    """Return the blocks to train. Raises ModelError for a model without blocks."""
    try:
        return find_blocks(model, chosen, names)
    except ModelError as error:
        message = str(error).replace("to reconstruct: leave reconstruct out", "to train: use solver='obs'")
        raise ModelError(message) from None


class LearnedRounding:
    """A weight with trainable rounding offsets V and scale factors a."""

    def __init__(self, layer: Layer, grid: Grid):
        self.layer, self.grid = layer, grid
        self.W = layer.weight.detach().float()
        self.V = torch.zeros_like(self.W).requires_grad_()
        self.a = torch.ones_like(grid.scale, dtype=torch.float32).requires_grad_()
        self.best = (self.V.detach().clone(), self.a.detach().clone())

    def weight(self) -> Tensor:
        """Return the rounded weight, with gradients for V and a."""
        low, high = self.grid.range
        scale = broadcast_scales(self.grid.scale.float() * self.a)
        zero = 0 if self.grid.zero is None else broadcast_scales(self.grid.zero.float())
        x = split_blocks(self.W, self.grid.scale.shape) / scale + split_blocks(self.V, self.grid.scale.shape)
        code = (x + (x.round() - x).detach() + zero).clamp(low, high) - zero
        code = torch.where(split_blocks(self.W, self.grid.scale.shape) == 0, 0.0, code)  # zeros stay zero
        return (code * scale).reshape(self.W.shape).to(self.layer.original.dtype)

    @torch.no_grad()
    def step(self, V: Tensor | None, a: Tensor | None, lr: float) -> None:
        """Take a step against the signs of the gradients."""
        if V is not None and a is not None:
            self.V.sub_(lr * V.sign()).clamp_(-0.5, 0.5)
            self.a.sub_(lr * a.sign()).clamp_(0.5, 1.0)

    @torch.no_grad()
    def done(self) -> tuple[Grid, Tensor]:
        """Return the grid and the rounded weight of the best state."""
        V, a = self.best
        scale = (self.grid.scale.float() * a).to(self.grid.scale.dtype)
        self.grid = Grid(self.grid.bits, scale, self.grid.zero)
        self.a.fill_(1.0)
        self.V.copy_(V)
        weight = self.weight()
        return self.grid, torch.where(weight == 0, 0.0, self.grid.snap(weight))


def _learn(
    end: BlockStep,
    config: QuantizeConfig,
    shapes: Mapping[str, tuple[int, ...]],
    rows: dict[str, dict[str, Any]],
    quantized: dict[str, QuantizedWeight],
) -> None:
    """Train the rounding of one block and write its weights."""
    started, solver = time.perf_counter(), config.solver
    assert solver is not None and solver.steps is not None
    module, layers = end.block.module, end.block.layers
    names = {id(p): n for n, p in module.named_parameters()}
    roundings = {
        names[id(l.original)]: LearnedRounding(l, fit_grid(l.weight.detach(), shapes[l.full_name], config))
        for l in layers
    }

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, {n: r.weight() for n, r in roundings.items()}, args, kwargs)

    train, held, bf16 = end.calls[:-1] or end.calls, end.calls[-1:], in_bf16(solver)
    axis = channel_axis(module)
    start = best = block_error(run, held, bf16, axis)
    tensors = [t for r in roundings.values() for t in (r.V, r.a)]
    rate = solver.lr or 1 / solver.steps
    for step in range(solver.steps):
        with torch.enable_grad():
            loss = block_loss(run, train[step % len(train)], bf16, axis)
            grads = torch.autograd.grad(loss, tensors, allow_unused=True)
        lr = rate * (1 - step / solver.steps)
        for i, r in enumerate(roundings.values()):
            r.step(grads[2 * i], grads[2 * i + 1], lr)
        if (step + 1) % max(1, solver.steps // EVALUATIONS) == 0:
            error = block_error(run, held, bf16, axis)
            if error < best:
                best = error
                for r in roundings.values():
                    r.best = r.V.detach().clone(), r.a.detach().clone()
    seconds = (time.perf_counter() - started) / len(layers)
    for r in roundings.values():
        grid, weight = r.done()
        mask = get_mask(r.layer)
        with torch.no_grad():
            r.layer.original.copy_(weight if mask is None else torch.where(mask, weight, r.layer.original))
        quantized[r.layer.full_name] = grid, weight, None
        rows[r.layer.full_name] = {"nearest": start, "error": best, "seconds": seconds}
    end.changed = True
