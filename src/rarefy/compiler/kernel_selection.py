"""Choose the kernel of each linear layer and convolution: a packed format, from the number and place of zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.operators import fake_quantize
from rarefy.compiler.weight_grids import grid_of_largest, int8_grid
from rarefy.model.quant_grid import Grid
from rarefy.runtime import bindings, winograd
from rarefy.runtime.huge_pages import HugePageBuffer
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.pack_panels import PIECE, join_rows, pack_quantized
from rarefy.runtime.packed_formats import (
    CACHE_BLOCK,
    CONV_BLOCK,
    LANE,
    MAX_DENSE_STRIDE,
    MAX_INT8_INPUTS,
    MAX_INT16_INPUTS,
    MAX_STRIDE,
    MIN_SHARED,
    MIN_ZEROS_SPARSE,
    MIN_ZEROS_WINOGRAD,
    ConvTiles,
    Dense,
    Packed,
    QuantizedPanels,
    Sell,
    Tiles,
    skips_zeros,
)
from rarefy.runtime.packing import (
    pack_conv,
    pack_dense,
    pack_sell,
    pack_tiles,
    shared,
    unpack,
)

# share of zero lanes (2 bf16 or int16, or 4 int8 inputs) from which skipping them is faster, without and with AMX
MIN_ZERO_LANES = {"bf16": (0.2, 0.94), "int16": (0.2, 0.2), "int8": (0.15, 0.88)}
BITS = {"int8": 8, "int16": 16}  # of codes with a scale for each output
ATTENTION_PRECISIONS = ("bf16", "int8")  # beside fp32
MIN_PACKED_EMBEDDING = 1 << 20  # weights from which an embedding is kept in 8 bits beside layers in 8 bits
MIN_INT16_OUTPUTS = 24  # of a convolution in int16: its inputs are rounded in each call
MIN_INT16_TAPS = 64  # inputs of an output of such a convolution: each sum is scaled
MIN_GROUPED_ZEROS = 0.4  # fraction of zeros from which a kernel beats torch's dense grouped convolution


@dataclass(frozen=True)
class EmbeddingKernel:
    """An embedding whose weight is packed, as that of a linear layer that shares it or for itself."""

    kernel: Kernel
    input_grid = residual_grid = None

    @property
    def held(self) -> tuple[QuantizedPanels, None]:
        """The packed weight, and None for the bias, as `Kernel.held` is for linear layers."""
        return self.kernel.held[0], None  # type: ignore[return-value]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that it holds in memory."""
        return self.kernel.tensors()

    def run(self, ids: Tensor, _: None = None) -> Tensor:
        """Return the rows of the weight for ids [..], [.., features]."""
        return self.kernel.rows(ids)


def select_kernels(
    exported: ExportedGraph,
    pack: Callable[[Tensor, Node, Grid | None], Any],
    precision_of: Callable[[Node], str | None] = lambda _: None,
    grids: Mapping[str, Grid] = MappingProxyType({}),
    read: Callable[[Tensor], Tensor] = lambda t: t,
    hold: Callable[[str, Callable[[], Any]], Any] | None = None,
) -> dict[Node, Any]:
    """Return the kernels of all linear layers, convolutions and tied embeddings; {} where there is no native library.

    Args:
        exported: the graph after all passes.
        pack: packs a linear layer's weight; it is given the weight, the layer's node, and its int8 grid where it has
            one and the model rounds the inputs to 8 bits too.
        precision_of: of the node of a convolution, an embedding or attention: None for fp32, "bf16", "int16" or "int8".
        grids: of weights in 8 bits that are already rounded, by their placeholders.
        read: returns the values of an embedding's weight where constants are placeholders.
        hold: stores the packed weight of a linear layer or embedding: it is given the name of the weight and a function
            that packs it. By default in huge pages.
    """
    if bindings.missing() is not None:
        return {}
    kernels: dict[Node, Any] = {}
    packed: dict[tuple[str, bool], Any] = {}
    rows: dict[str, QuantizedPanels | None] = {}  # of embeddings
    memory = HugePageBuffer()
    hold = hold or (lambda _, pack: None if (form := pack()) is None else memory.hold(form))
    for node in exported.graph.nodes:
        if node.target not in (ops.linear, ops.conv2d):
            continue
        x, w, bias, _, act, *_ = node.args
        inputs, weight = fake_quantize.grid_of(x), exported.constants[w.name]
        grid = grids.get(w.name) or (None if inputs is None else int8_grid(weight))
        key = w.name, grid is not None
        if node.target is ops.conv2d:
            form = pack_conv_node(exported, node, precision_of(node), grid)
            form = None if form is None else memory.hold(form)
        elif key in packed:
            form = packed[key]
        else:
            form = packed[key] = hold(w.name, partial(pack, weight, node, grid))
        if form is not None:
            kernels[node] = Kernel(form, _copy_of(exported, bias), act)
            if inputs is not None and reads_static_codes(form):
                kernels[node].input_grid = inputs
    for node in exported.graph.nodes:
        if node.target is ops.attention and (precision := precision_of(node)) in ATTENTION_PRECISIONS:
            node.args = (*node.args[:-1], precision)
    for node in exported.graph.nodes:
        if node.target is not ops.embedding:
            continue
        name = node.args[1].name
        form = packed.get((name, False))  # of a linear layer that shares the weight
        if not isinstance(form, QuantizedPanels) and precision_of(node) == "int8":
            if name not in rows:
                rows[name] = _packed_embedding(name, exported.constants[name], read, hold)
            form = rows[name]
        if isinstance(form, QuantizedPanels):
            kernels[node] = EmbeddingKernel(Kernel(form))
    return kernels


def _packed_embedding(name: str, weight: Tensor, read: Callable[[Tensor], Tensor], hold: Any) -> Any:
    """Return a large embedding's weight in int8, with a scale for each row; None for others."""
    if weight.dim() != 2 or weight.numel() < MIN_PACKED_EMBEDDING:
        return None

    def pack() -> QuantizedPanels | None:
        values = read(weight)
        if not values.isfinite().all():
            return None
        rows = values.split(max(PIECE // values.shape[1] // 4 * 4, 4))
        return join_rows([pack_quantized(w.float(), grid_of_largest(w), fp32_inputs=False) for w in rows])

    return hold(name, pack)


def compact(kernels: Mapping[Node, Any]) -> dict[Node, Any]:
    """Return the same kernels with packed weights of linear layers and embeddings in new memory, so that the memory of
    others can be freed.

    O(bytes of the packed weights). Nodes that share a packed weight share it afterwards.
    """
    memory, moved, new = HugePageBuffer(), {}, dict(kernels)
    for node, kernel in kernels.items():
        form = kernel.held[0]
        if node.target in (ops.linear, ops.embedding) and id(form) not in moved:
            moved[id(form)] = memory.hold(form)
    for node, kernel in kernels.items():
        if node.target is ops.embedding:
            new[node] = EmbeddingKernel(Kernel(moved[id(kernel.held[0])]))
        if node.target is ops.linear:
            new[node] = Kernel(moved[id(kernel.held[0])], kernel.held[1], node.args[4])
            new[node].input_grid, new[node].residual_grid = kernel.input_grid, kernel.residual_grid
    return new


def _copy_of(exported: ExportedGraph, bias: Node | None) -> Tensor | None:
    return None if bias is None else exported.constants[bias.name].clone()


def reads_static_codes(packed: Packed) -> bool:
    """Return whether the kernel of a packed weight can read int8 inputs with one scale for all, in programs."""
    return packed.kind == "int8" and isinstance(packed, Dense | Tiles | Sell | ConvTiles)


def pack_for_batches(weight: Tensor, precision: str | None, grid: Grid | None = None) -> Any:
    """Return a linear layer's packed weight [outputs, inputs] for many rows of input at once; on an int8 grid, its
    codes."""
    if grid is not None:
        return pack_lanes(weight, "int8", bindings.isa() == "amx", grid)
    if precision is None and is_nearly_dense(weight):
        return pack_dense(weight)
    if precision is not None:
        return pack_lanes(weight, precision, amx=bindings.isa() == "amx")
    return pack_sparse(weight)


def pack_sparse(weight: Tensor, **options: Any) -> Tiles | Sell:
    """Return a weight [outputs, inputs] without its zeros, in the faster of two formats; options are of both."""
    packed = pack_tiles(weight, **options)
    return pack_sell(weight, **options) if shared(packed) < MIN_SHARED else packed


def pack_lanes(weight: Tensor, kind: str, amx: bool, grid: Grid | None = None) -> Dense | Tiles | Sell:
    """Return a weight [outputs, inputs] in bf16, int16 or int8, dense if that is faster on CPUs with or without AMX."""
    wide = kind == "int16" and weight.shape[1] > MAX_INT16_INPUTS
    if wide or zero_lanes(weight, kind) < MIN_ZERO_LANES[kind][amx]:
        return pack_dense(weight, kind, grid)  # type: ignore[return-value]
    return pack_sparse(weight, kind=kind, grid=grid)


def repack(packed: Packed, amx: bool) -> Packed:
    """Return the same weight of bf16 or int8 in the format for CPUs with or without AMX; others as they are.

    Files have the format for CPUs without AMX, which leaves zeros out.
    """
    if isinstance(packed, ConvTiles):
        if packed.kind != "int8":
            return packed
    elif not isinstance(packed, Dense | Tiles | Sell) or packed.kind not in ("bf16", "int8"):
        return packed
    weight = unpack(packed)
    sparse = zero_lanes(weight.movedim(1, -1), packed.kind) >= MIN_ZERO_LANES[packed.kind][amx]
    return packed if sparse == skips_zeros(packed) else in_other_format(packed, weight)


def in_other_format(packed: Any, weight: Tensor) -> Packed:
    """Return a packed weight, which is also given unpacked, with its zeros multiplied where they are skipped, and
    skipped where they are multiplied. Convolutions have one group."""
    grid = None if packed.scales is None else Grid(BITS[packed.kind], packed.scales[: len(weight), None])
    if not isinstance(packed, ConvTiles):
        return (pack_dense if skips_zeros(packed) else pack_sparse)(weight, kind=packed.kind, grid=grid)
    geometry: Any = {n: getattr(packed, n) for n in ("stride", "padding", "dilation")}
    if not skips_zeros(packed):
        return pack_sparse_conv(weight, packed.kind, **geometry, block=CACHE_BLOCK, grid=grid)
    if packed.kind == "fp32":
        return pack_dense(weight, **geometry)
    return pack_conv(weight, packed.kind, **geometry, block=CACHE_BLOCK, grid=grid, dense=True)


def pack_int8_conv(weight: Tensor, geometry: Any, amx: bool, grid: Grid | None = None) -> ConvTiles:
    """Return a convolution's weight of one group in 8 bits, dense if that is faster on CPUs with or without AMX."""
    geometry = {**geometry, "block": CACHE_BLOCK, "grid": grid}
    if zero_lanes(weight.movedim(1, -1), "int8") < MIN_ZERO_LANES["int8"][amx]:
        return pack_conv(weight, "int8", **geometry, dense=True)
    return pack_sparse_conv(weight, "int8", **geometry)


def pack_sparse_conv(weight: Tensor, kind: str, **options: Any) -> ConvTiles:
    """Return a convolution's weight of one group without its zeros, in the faster of two formats."""
    form = pack_conv(weight, kind, **options)
    return pack_conv(weight, kind, **options, sell=True) if shared(form) < MIN_SHARED else form


def zero_lanes(weight: Tensor, kind: str) -> float:
    """Return the share of lanes that are zero, which kernels skip: of two inputs in bf16 and int16, of four in int8."""
    padded = torch.nn.functional.pad(weight != 0, (0, -weight.shape[-1] % LANE[kind]))
    return 1 - float(padded.unflatten(-1, (-1, LANE[kind])).any(-1).float().mean())


def is_nearly_dense(weight: Tensor, min_zeros: tuple[float, float] = MIN_ZEROS_SPARSE) -> bool:
    """Return whether a weight has too few zeros for a sparse kernel to beat a dense one.

    min_zeros are the least fractions of zeros where nonzeros come in blocks of 4 outputs, and where they do not.
    """
    W = weight.flatten(1)
    nonzero = torch.nn.functional.pad(W != 0, (0, 0, 0, -len(W) % 4)).view(-1, 4, W.shape[1])
    per_block = float(nonzero.sum()) / max(1.0, float(nonzero.any(1).sum()))
    return 1 - float(nonzero.sum()) / W.numel() < min_zeros[per_block < MIN_SHARED]


def fits_int16(weight: Tensor, groups: int) -> bool:
    """Return whether a convolution is faster in int16: a dense one with enough outputs and inputs for each rounding."""
    fits = MIN_INT16_TAPS <= weight[0].numel() <= MAX_INT16_INPUTS and len(weight) >= MIN_INT16_OUTPUTS
    return fits and groups == 1 and is_nearly_dense(weight)


def pack_conv_node(exported: ExportedGraph, node: Node, precision: str | None, grid: Grid | None = None) -> Any:
    """Return the packed weight of a convolution, in 8 bits only for one group, by default if it is on a grid.

    Returns:
        None where torch or a depthwise step runs it: with few zeros in several groups, or with a very large stride.
        Strides above 8 have dense kernels in fp32 alone.
    """
    w, (stride, padding, dilation, groups) = node.args[1], node.args[5:]
    weight = exported.constants[w.name]
    zeros = float((weight == 0).float().mean())
    if max(stride) > (MAX_DENSE_STRIDE if groups == 1 else MAX_STRIDE):
        return None
    if groups > 1 and (zeros < MIN_GROUPED_ZEROS or weight.shape[1] == 1):
        return None
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    overflows = -(-weight.shape[1] // 4) * 4 * weight[0, 0].numel() > MAX_INT8_INPUTS  # of a sum of int8
    int8 = precision == "int8" or grid is not None
    kind = "int8" if int8 and groups == 1 and not overflows else "fp32"
    sizes = exported.image_sizes.get(node, ())
    by_winograd = winograd.fits(tuple(weight.shape), tuple(stride), tuple(dilation), sizes)
    min_zeros = MIN_ZEROS_WINOGRAD if by_winograd else MIN_ZEROS_SPARSE
    large = max(stride) > MAX_STRIDE
    if precision == "int16" and grid is None and not by_winograd and fits_int16(weight, groups) and not large:
        return pack_conv(weight, precision, **geometry, block=CACHE_BLOCK, dense=True)
    if groups == 1 and (large or (kind == "fp32" and is_nearly_dense(weight, min_zeros))):
        return pack_dense(weight, stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))
    if kind == "int8":
        return pack_int8_conv(weight, geometry, bindings.isa() == "amx", grid)
    if groups > 1:
        return pack_conv(weight, kind, **geometry, block=CONV_BLOCK)
    return pack_sparse_conv(weight, kind, **geometry, block=CACHE_BLOCK)
