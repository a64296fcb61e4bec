"""How far outputs of a compiled model may be from the model's, and which layers lose most in 8 bits."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.common.errors import DataError
from rarefy.compiler import ops
from rarefy.compiler.calibrate import calls_of, in_torch
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.operators.fake_quantize import rounds_values
from rarefy.model.compare import relative_distance

# largest relative distance of outputs from the model's; of models that round values, which a sum in another order may
# round to the next code, layer by layer
TOLERANCE = {None: 1e-3, "fp32": 1e-3, "bf16": 0.1, "int16": 0.03, "int8": 0.2}
ROUNDED_TOLERANCE = 0.1
FAR = 0.1  # relative distance in 8 bits from which there is a warning
SHOWN_LAYERS = 3
MAX_CODE = 127
PACKAGE = str(Path(__file__).parents[1])  # of the frames that a warning passes over


def check_max_error(max_error: float | None) -> None:
    """Raise DataError unless a limit is a positive number, or None."""
    if max_error is not None and (isinstance(max_error, bool) or not max_error > 0):
        raise DataError(f"max_error: expected a number above 0, such as 0.3, got {max_error!r}")


def tolerance(exported: ExportedGraph, precision: str | None = None, max_error: float | None = None) -> float:
    """Return the largest relative distance that outputs of a graph may have from the model's."""
    if max_error is not None:
        return max_error
    return max(TOLERANCE[precision], ROUNDED_TOLERANCE if rounds_values(exported) else 0.0)


def warn_of_error(error: float, advice: str) -> None:
    """Warn at the caller's line that outputs in 8 bits are far from the model's on the example."""
    text = f"outputs differ by {error:.0%} on the example, less than {FAR:.0%} is usual: measure the quality on data. "
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text + advice, stacklevel=level)


def advice(compiled: Compiled, example: Any, weights: Mapping[str, Tensor], calibrated: bool) -> str:
    """Return which layers lose most in 8 bits, and what helps. A call in torch.

    Args:
        compiled: the compiled model.
        example: the example's arguments and keywords.
        weights: the dense weights and constants, by the names of their placeholders.
        calibrated: whether scales of inputs come from calibration data.
    """
    losses = layer_losses(compiled, compiled.leaves(*example), weights)
    layers = sorted(losses, key=losses.__getitem__, reverse=True)[:SHOWN_LAYERS]
    worst = ", ".join(f"{n} ({losses[n]:.1%})" for n in layers)
    where = f"Layers that lose most: {worst}; per_layer={{{layers[0]!r}: 'int16'}} or ignore= keeps one exact. "
    data = "an example like the batches of calibrate=" if calibrated else "calibrate= with typical inputs"
    return f"{where if layers else ''}What helps: {data}, precision='int16' or 'bf16'; max_error= accepts more"


def layer_losses(compiled: Compiled, leaves: list[Any], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative distance that rounding to 8 bits causes in the outputs of each layer alone, by its name."""
    exported = compiled.exported
    graph = in_torch(replace(exported, constants=dict(weights)), compiled.input_specs)
    losses: dict[str, float] = {}
    with torch.no_grad():
        for node, lookup in calls_of(graph, leaves):
            if _runs_in_8_bits(node, compiled.kernels):
                name = exported.layers.get(node) or node.name
                losses[name] = max(losses.get(name, 0.0), _loss(node, compiled.kernels[node], lookup))
    return losses


def _runs_in_8_bits(node: Any, kernels: Mapping[Node, Any]) -> bool:
    kernel = kernels.get(node)
    return kernel is not None and node.target in (ops.linear, ops.conv2d) and kernel.held[0].kind == "int8"


def _loss(node: Node, kernel: Any, lookup: Any) -> float:
    """Return how far a layer's outputs move where weights and inputs are rounded as its kernel rounds them."""
    args = fx.map_arg(node.args, lookup)
    x, weight, *rest = args
    if kernel.input_grid is None:
        inputs = _rounded(x.flatten(1) if node.target is ops.conv2d else x).view_as(x)
    else:
        inputs = kernel.input_grid(x)
    rounded = node.target(inputs, _rounded(weight.flatten(1)).view_as(weight), *rest)
    return relative_distance(rounded, node.target(*args))


def _rounded(rows: Tensor) -> Tensor:
    """Return rows rounded to 8 bits, with a scale for each."""
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) / MAX_CODE
    return (rows / scale).round() * scale
