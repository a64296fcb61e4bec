"""The kernels that can run a layer. `autotune` times them and chooses; nothing is timed or replaced here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.model.activation_quant import get_activation_quant
from rarefy.model.layers import Layer
from rarefy.model.quant_grid import Grid, recorded_grids
from rarefy.runtime import bindings
from rarefy.runtime.pack_panels import pack_quantized
from rarefy.runtime.packed_formats import CACHE_BLOCK, KINDS, MAX_CSR_INPUTS, MAX_STRIDE, Packed
from rarefy.runtime.packing import pack_bitmask, pack_conv, pack_csr, pack_sell, pack_tiles
from rarefy.runtime.sparse_layers import Sparse, SparseConv, SparseLinear, geometry

MAX_SMALL_BATCH = 32  # inputs of a call up to which kernels for small batches are tried
MIN_ZEROS = 0.1  # share of zeros below which no kernel skips them
MIN_ZEROS_CSR = 0.6  # share of zeros from which CSR is tried
DTYPES = {dtype: kind for kind, dtype in KINDS.items() if dtype.is_floating_point}  # of a weight that kernels take


@dataclass(frozen=True, eq=False)
class Candidate:
    """A kernel that can run a layer.

    Attributes:
        name: the kernel, as reports and the tuning cache call it.
        packed: the layer's weight in the kernel's format.
        max_batch: calls with more inputs are not for this kernel; None: no limit.
    """

    name: str
    packed: Packed
    max_batch: int | None = None


def list_candidates(module: Any, precision: str | None = None) -> tuple[Candidate, ...]:
    """Return the kernels that can run a Linear or a convolution, its weight packed for each. O(weights) each.

    Args:
        module: the dense layer.
        precision: "int8" quantizes weights and inputs of Linear layers to 8 bits; None keeps the weight's own.
    """
    if not isinstance(module, nn.Linear):
        return _convolution_candidates(module)
    weight, grid = module.weight.detach(), grid_of(module)
    int8_inputs = get_activation_quant(module) is not None  # these kernels quantize inputs in the same way
    precision = "int8" if int8_inputs else precision
    zeros = float((weight == 0).float().mean())
    kind = precision or DTYPES[weight.dtype]
    sparse = grid is None or zeros >= MIN_ZEROS
    candidates = []
    if grid is not None and why_not_quantized(weight, grid) is None:
        candidates.append(Candidate("panels", pack_quantized(weight, grid, precision is None)))
    if zeros >= MIN_ZEROS_CSR and weight.shape[1] <= MAX_CSR_INPUTS and not int8_inputs:
        candidates.append(Candidate("csr", pack_csr(weight, kind, grid), MAX_SMALL_BATCH))
    if sparse:
        candidates.append(Candidate("bitmask", pack_bitmask(weight, kind, grid), MAX_SMALL_BATCH))
    if sparse or precision is not None:
        candidates.append(Candidate("sell", pack_sell(weight, kind, grid=grid)))
        candidates.append(Candidate("tiles", pack_tiles(weight, kind, grid=grid)))
    return tuple(candidates)


def _convolution_candidates(module: Any) -> tuple[Candidate, ...]:
    weight, options = as_images(module.weight.detach()), geometry(module)
    tiles = Candidate("convolution", pack_conv(weight, **options))
    if module.groups > 1:
        return (tiles,)
    return Candidate("convolution, sell", pack_conv(weight, **options, block=CACHE_BLOCK, sell=True)), tiles


def build_layer(module: Any, weights: Mapping[int, Packed | Tensor], activation: str | None = None) -> Sparse:
    """Return the layer that replaces a dense one.

    Args:
        module: the dense layer.
        weights: the packed (or dense) weight by the smallest batch that it serves.
        activation: the name of an activation that is fused into the layer.
    """
    if isinstance(module, nn.Linear):
        return SparseLinear(weights, module.bias, activation, get_activation_quant(module) is not None)
    return SparseConv(weights, like=module, activation=activation)


def why_dense(layer: Layer, zeros: float, reached: bool | None) -> str | None:
    """Return why no kernel can run a layer faster than torch does, or None.

    Args:
        layer: the layer.
        zeros: the share of its weights that are zero.
        reached: whether the example calls the layer; None without an example.
    """
    module: Any = layer.module
    is_conv = is_convolution(module)
    if bindings.missing() is not None:
        return bindings.missing()
    if layer.param != "weight" or not (is_conv or type(module).forward is nn.Linear.forward):
        return f"no kernel for {type(module).__name__} yet"
    if layer.weight.dtype not in DTYPES or layer.weight.device.type != "cpu":
        return f"{layer.weight.dtype} on {layer.weight.device.type}"
    grid = grid_of(module) if layer.param == "weight" else None
    if zeros < MIN_ZEROS and (grid is None or (why := why_not_quantized(layer.weight, grid)) is not None):
        return f"{zeros:.2%} zeros" + ("" if grid is None else f", {why}")
    return _why_dense_convolution(module, reached) if is_conv else None


def _why_dense_convolution(conv: Any, reached: bool | None) -> str | None:
    if conv.weight.dtype != torch.float32:
        return f"no kernel for convolutions in {str(conv.weight.dtype).removeprefix('torch.')} yet"
    if conv.weight.shape[1] == 1 and conv.groups > 1:
        return "it is depthwise"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or max(conv.stride) > MAX_STRIDE:
        return f"no kernel for padding {conv.padding} of {conv.padding_mode}, stride {conv.stride}"
    if not reached:
        return "the example does not reach it" if reached is False else "give an example: its image size is not known"
    return None


def why_not_quantized(weight: Tensor, grid: Grid) -> str | None:
    """Return why no kernel reads a quantized weight as it is, or None."""
    if weight.dim() != 2:
        return "no kernel for quantized convolutions yet"
    group = weight.shape[1] // grid.scale.shape[1]
    if grid.scale.shape[0] not in (1, len(weight)):
        return f"no kernel for scales of {len(weight) // grid.scale.shape[0]} outputs"
    if grid.scale.shape[1] > 1 and group % 32:
        return f"no kernel for groups of {group} inputs"
    return "no kernel for asymmetric codes of more than 6 bits" if grid.zero is not None and grid.bits > 6 else None


def grid_of(module: Any) -> Grid | None:
    """Return the quantization grid of a layer's weight, as recorded with it, if the weight still matches it."""
    grid = recorded_grids(module).get("weight")
    return grid if isinstance(grid, Grid) and grid.contains(module.weight.detach()) else None


def is_convolution(module: Any) -> bool:
    """Return whether a module computes a plain convolution, not a subclass with a forward of its own."""
    return any(
        isinstance(module, c) and type(module).forward is c.forward and type(module)._conv_forward is c._conv_forward
        for c in (nn.Conv1d, nn.Conv2d)
    )


def as_images(weight: Tensor) -> Tensor:
    """Return a Conv1d's weight as one of images that are one pixel high; others as they are."""
    return weight.unsqueeze(2) if weight.dim() == 3 else weight
