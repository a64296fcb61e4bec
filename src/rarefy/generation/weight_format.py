"""The format of a decoder's weight: panels of quantized weights, or a bitmask where leaving zeros out is faster."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rarefy.compiler import tuning
from rarefy.evaluation.profiling import compare
from rarefy.model.quant_grid import Grid, OffsetGrid
from rarefy.runtime import tuning_cache
from rarefy.runtime.autotune import FLUSH_BYTES, SAME_SPEED
from rarefy.runtime.candidates import MIN_ZEROS, why_not_quantized
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.pack_panels import pack_quantized
from rarefy.runtime.packing import pack_bitmask

TIMED_SHAPE, REPEATS = (2048, 1024), 15
BITMASK, PANELS = "bitmask", "panels"


def pack_weight(weight: Tensor, precision: str | None, grid: Grid | OffsetGrid | None, rounded: bool) -> Any:
    """Return a packed weight [outputs, inputs].

    Panels hold a weight that is quantized, or that "int8" quantizes to 8 bits. A bitmask holds all others, and those
    with one scale for each output and so many zeros that it is faster on this machine. With scales of groups, or zero
    points, all weights are multiplied.

    Args:
        weight: in fp32.
        precision: of the decoder.
        grid: that the weight is on, or None.
        rounded: whether the model itself rounds the layer's inputs to 8 bits. Else inputs of panels have two terms in
            "int8", or scales of blocks.
    """
    exact, two_terms = precision != "int8", precision == "int8" and not rounded
    if isinstance(grid, OffsetGrid):
        if two_terms:
            return pack_quantized(weight, grid, False, True)
        grid = None
    if grid is not None and (not _kernels_hold(grid, precision) or why_not_quantized(weight, grid) is not None):
        grid = None
    if grid is None and exact:
        return pack_bitmask(weight, precision or "fp32")
    zeros = float((weight == 0).float().mean())
    scaled_by_row = grid is None or (grid.scale.shape[1] == 1 and grid.zero is None)
    bits = 8 if grid is None else grid.bits
    if zeros >= MIN_ZEROS and scaled_by_row and skipping_zeros_is_faster(precision, bits, zeros, two_terms):
        return pack_bitmask(weight, precision or "fp32", grid)
    return pack_quantized(weight, _eight_bits(weight) if grid is None else grid, exact, two_terms)


def skipping_zeros_is_faster(precision: str | None, bits: int, zeros: float, two_terms: bool) -> bool:
    """Return whether one token is multiplied faster by a bitmask than by panels of so many bits with so many zeros.

    Measured once on a machine for each tenth of zeros, on random weights that come from memory; the tuning cache keeps
    it. Panels round inputs more finely, so a bitmask has to be a tenth faster. Cost: half a second. Without kernels, or
    with RAREFY_TUNE=0 in the environment, nothing is timed and it is True.
    """
    if not tuning.is_enabled():
        return True
    file, tenths = tuning_cache.default_file(), int(10 * zeros)
    key = f"zeros of a decoder {precision} {bits} {tenths} {two_terms}"
    known = tuning_cache.read(file).get(key, {})
    if known.keys() != {1} or known[1][0] not in (BITMASK, PANELS):
        seconds = _seconds(precision, bits, tenths / 10, two_terms)
        gain = seconds[PANELS] / seconds[BITMASK]
        known = {1: (BITMASK if gain > SAME_SPEED else PANELS, gain)}
        tuning_cache.write(file, {key: known})
    return known[1][0] == BITMASK


def _seconds(precision: str | None, bits: int, zeros: float, two_terms: bool) -> dict[str, float]:
    """Return the seconds of a product with one input, by format."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(TIMED_SHAPE, generator=generator, dtype=torch.float32)
    weight[torch.rand(TIMED_SHAPE, generator=generator, dtype=torch.float32) < zeros] = 0
    grid = Grid(bits, weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1))
    weight = grid.snap(weight)
    packed = {
        BITMASK: pack_bitmask(weight, precision or "fp32", grid),
        PANELS: pack_quantized(weight, grid, precision != "int8", two_terms),
    }
    x = torch.randn(1, TIMED_SHAPE[1], generator=generator, dtype=torch.float32)
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32)
    runs = {name: partial(Kernel(p).run, x) for name, p in packed.items()}
    return {n: t.median for n, t in compare(runs, repeats=REPEATS, warmup=2, before=flush.sum).items()}


def _eight_bits(weight: Tensor) -> Grid:
    """Return the grid that "int8" rounds a weight to: a scale for each output."""
    return Grid(8, (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny))


def _kernels_hold(grid: Grid, precision: str | None) -> bool:
    """Return whether kernels hold a grid's scales of groups, in bf16, closely enough: exactly, or for up to 6 bits in
    "int8", where bf16 adds little to the rounding that is there."""
    exact = grid.scale.shape[1] == 1 or torch.equal(grid.scale.bfloat16().float(), grid.scale.float())
    return exact or (precision == "int8" and grid.bits <= 6)
