"""Second-order rounding of weights to 8 bits on calibration data (GPTQ, Frantar 2023), on the compiler's graph.

Rounding each weight to the nearest code changes a layer's outputs more than it must: errors of weights that are read
together add up. Here each rounding error is made up for by the weights that are not rounded yet, as far as the layer's
inputs on the data allow. Scales are the same, and so is the time of a call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.calibrate import calls_of
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.weight_grids import grid_of_largest, int8_grid
from rarefy.model.activation_quant import ActivationQuant
from rarefy.model.forward import split_example
from rarefy.model.quant_grid import Grid
from rarefy.prune import solvers

DAMPING = 0.01  # of the mean diagonal of a Gram matrix
MAX_INPUTS = 5120  # of an output: a Gram matrix of 100 MB; layers with more are rounded to the nearest
MAX_GRAM_BYTES = 1 << 29  # of the Gram matrices of one pass through the data
ROWS, ROWS_PER_INPUT = 4096, 3  # inputs of so many outputs are read, or so many times a row's length
CHUNK = 2048  # of these rows at once
BLOCK = 128  # columns that are rounded together


class ColumnGrid:
    """Rounds columns [1, outputs] of a weight to a grid; see `prune.solvers.ColumnQuantizer`."""

    group = 0

    def __init__(self, grid: Grid):
        self.grid = grid  # with a scale for each output

    def begin(self, W: Tensor, mask: Tensor, first: int) -> None:
        """Do nothing: scales are fixed."""

    def __call__(self, w: Tensor, column: int) -> Tensor:
        """Return a column on the grid."""
        return self.grid.snap(w.T).T


@torch.no_grad()
def rounded_weights(
    graph: Compiled, nodes: Collection[Node], grids: Mapping[Node, ActivationQuant], batches: Sequence[Any]
) -> dict[str, tuple[Tensor, Grid]]:
    """Return {placeholder: (weight on its grid, grid)} of linear layers and convolutions of one group.

    A scale for each output comes from its largest weight. Zeros stay zeros; a weight that lies on a grid already stays.
    Left out are weights that other operators read too, very wide ones, and those with NaN or inf. Costs a pass through
    the data for each 512 MB of Gram matrices, and O(outputs inputs^2 + inputs^3) a layer.

    Args:
        graph: the graph without kernels.
        nodes: the operators. Weights that several of them share are rounded for all their inputs.
        grids: of values whose inputs are rounded too.
        batches: what the model is called with.
    """
    nodes, readers = set(nodes), dict[str, list[Node]]()
    for node in (n for n in graph.exported.graph.nodes if n in nodes):
        if all(user in nodes for user in node.args[1].users):
            readers.setdefault(node.args[1].name, []).append(node)
    weights = {name: graph.exported.constants[name].float() for name in readers}
    result = {name: (w, grid) for name, w in weights.items() if (grid := int8_grid(w)) is not None}
    todo = [n for n, w in weights.items() if n not in result and w[0].numel() <= MAX_INPUTS and w.isfinite().all()]
    for names in _passes({n: weights[n] for n in todo}):
        for name, H in _gram_matrices(graph, {n: readers[n] for n in names}, grids, batches).items():
            if (solved := _round(weights[name], H)) is not None:
                result[name] = solved
    return result


def _passes(weights: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of weights whose Gram matrices fit together."""
    names, used = list[str](), 0
    for name, weight in weights.items():
        size = 4 * weight[0].numel() ** 2
        if names and used + size > MAX_GRAM_BYTES:
            yield names
            names, used = [], 0
        names, used = [*names, name], used + size
    if names:
        yield names


def _gram_matrices(
    graph: Compiled, readers: Mapping[str, list[Node]], grids: Mapping[Node, ActivationQuant], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Return X^T X of the inputs X [rows, inputs] of each weight, of rows that are drawn at random."""
    named = {node: name for name, nodes in readers.items() for node in nodes}
    H: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(0)
    for batch in batches:
        for node, lookup in calls_of(graph, graph.leaves(*split_example(batch))):
            if (name := named.get(node)) is None:
                continue
            x, grid = lookup(node.args[0]), grids.get(node.args[0])
            n = graph.exported.constants[name][0].numel()
            wanted = -(-max(ROWS, ROWS_PER_INPUT * n) // len(batches))
            x, kernel = x if grid is None else grid(x), graph.exported.constants[name].shape[2:]
            gram = H.setdefault(name, torch.zeros(n, n, dtype=torch.float32))
            for rows in _rows(node, x, kernel, wanted, random):
                gram.addmm_(rows.T, rows)
    return H


def _rows(node: Node, x: Tensor, kernel: Sequence[int], wanted: int, random: torch.Generator) -> Iterator[Tensor]:
    """Yield the inputs of at most so many outputs, in the order of a flattened weight, some at a time."""
    if node.target is ops.linear:
        rows = x.reshape(-1, x.shape[-1]).float()
        for drawn in _draw(len(rows), wanted, random):
            yield rows[drawn]
        return
    stride, padding, dilation = node.args[5:8]
    x = F.pad(x.float(), (padding[1], padding[1], padding[0], padding[0]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    height, width = ((n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride))
    for drawn in _draw(len(x) * height * width, wanted, random):
        image, at = drawn // (height * width), drawn % (height * width)
        starts = at // width * stride[0], at % width * stride[1]
        down, across = (s[:, None] + d * torch.arange(k) for s, d, k in zip(starts, dilation, kernel))
        patches = x[image[:, None, None], :, down[:, :, None], across[:, None, :]]  # [rows, kernel, channels]
        yield patches.permute(0, 3, 1, 2).flatten(1)


def _draw(total: int, wanted: int, random: torch.Generator) -> tuple[Tensor, ...]:
    """Return numbers below `total`, each once where so many are wanted, in chunks."""
    every = torch.arange(total) if total <= wanted else torch.randint(total, (wanted,), generator=random)
    return every.split(CHUNK)


def _round(weight: Tensor, H: Tensor) -> tuple[Tensor, Grid] | None:
    """Return a weight on the grid of its largest weights, and the grid; None where the inputs allow no solution."""
    W = weight.flatten(1)
    grid = grid_of_largest(W)
    keep = (W != 0)[None]
    try:
        U, _ = solvers.inverse_factor(H[None], DAMPING)
    except ArithmeticError:
        return None
    edges = [*range(0, W.shape[1], BLOCK), W.shape[1]]
    rounded, _ = solvers.obs(W[None], U, lambda _, a, b: keep[..., a:b], edges, ColumnGrid(grid))
    return rounded[0].view_as(weight), grid
