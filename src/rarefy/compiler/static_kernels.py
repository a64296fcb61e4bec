"""Kernels in 8 bits for calibration data: static scales of their inputs, and weights rounded for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rarefy.compiler import ops
from rarefy.compiler.calibrate import in_torch, input_grids, quantized_operands, reads_static_codes, round_input
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.rounding import rounded_weights


def calibrated_kernels(
    exported: ExportedGraph,
    specs: Sequence[Any],
    kernels: dict[Node, Any],
    depthwise: Sequence[Node],
    batches: Sequence[Any],
    solver: str,
    select: Callable[..., dict[Node, Any]],
) -> dict[Node, Any]:
    """Return kernels on static scales of their inputs where these are faster than those found in each call, with
    weights rounded for the data; round the inputs of depthwise convolutions, which have no kernels.

    Args:
        exported: the graph; rounded weights replace its constants.
        specs: of its inputs.
        kernels: those with scales found in each call; they are taken apart.
        depthwise: depthwise convolutions in 8 bits.
        batches: calibration data.
        solver: "obs" or "rtn", see `compile`.
        select: `select_kernels` of the graph; takes grids of weights that are already rounded.
    """
    nodes = [n for n, k in kernels.items() if n.target in (ops.linear, ops.conv2d) and k.held[0].kind == "int8"]
    nodes = [n for n in nodes if kernels[n].input_grid is None]
    static = [n for n in nodes if reads_static_codes(n)]
    grids = input_grids(in_torch(exported, specs), [*static, *depthwise], batches)
    for node in depthwise:
        round_input(exported, node, grids[node.args[0]])
    weights = rounded_weights(in_torch(exported, specs), nodes, grids, batches) if solver == "obs" else {}
    exported.constants.update({name: weight for name, (weight, _) in weights.items()})
    if weights:
        kernels.clear()  # the memory of weights that are packed again
        kernels = select(grids={name: grid for name, (_, grid) in weights.items()})
    for node in static:
        value, *residual = quantized_operands(node)
        kernels[node].input_grid = grids[value]
        kernels[node].residual_grid = grids[residual[0]] if residual else None
    return kernels
