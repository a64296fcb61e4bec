"""Random weights on quantization grids, as the kernels of `QuantizedPanels` read them."""

import torch

from rarefy.model.quant_grid import OffsetGrid
from rarefy.quantization.config import QuantizeOptions, resolve_options
from rarefy.quantization.grids import fit_grid

GRIDS = [
    ("int8", None, True), ("int4", None, True), ("int4", 32, True), ("int4", 64, True), ("int4", 32, False),
    ("int4", None, False), ("int3", "tensor", True), ("int5", 32, True), ("int4", 128, False), ("int2", 96, True),
    ("int6", 32, True), ("int6", 64, True), ("int6", None, True), ("int5", "tensor", True), ("int7", 32, True),
    ("int5", 32, False), ("int6", 64, False),
]  # fmt: skip
TWO_TERM_GRIDS = [
    ("int8", None, True), ("int8", 32, True), ("int8", 64, True), ("int6", 32, True), ("int6", None, True),
    ("int5", 96, True), ("int4", None, False), ("int4", 32, False), ("int4", 64, True), ("int4", 96, False),
    ("int4", None, True), ("int5", 32, False), ("int5", None, False), ("int6", 64, False), ("int4", 32, None),
    ("int5", 32, None),
]  # fmt: skip


def on_grid(O, C, weights, group, symmetric):
    """Return random weights and their grid; `symmetric` None: with minimums, as in GGUF files."""
    if symmetric is None:
        scale = torch.rand(O, C // group) + 0.5
        grid = OffsetGrid(int(weights[3]), scale, 31 * scale * torch.rand(O, C // group))
        codes = torch.randint(0, 1 << grid.bits, (O, C // group, group))
        scale, zero = (t.float() for t in grid.eighths())
        return (scale[..., None] * (8 * codes - zero[..., None])).reshape(O, C), grid
    config = resolve_options(QuantizeOptions(weights=weights, group=group, symmetric=symmetric))
    shape = (1, 1) if group == "tensor" else (O, 1 if group is None else C // group)
    W = torch.randn(O, C) + (0 if symmetric else 0.5)
    grid = fit_grid(W, shape, config)
    return grid.snap(W), grid
