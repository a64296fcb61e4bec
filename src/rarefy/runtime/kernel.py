"""Run one packed weight, or several that have the same inputs, on a compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import FormatError, unknown
from rarefy.model.activation_quant import ActivationQuant
from rarefy.runtime.bindings import (
    _KINDS,
    ACTIVATIONS,
    FORMATS,
    Conv,
    _Bitmask,
    _Csr,
    _Dense,
    _open,
    _Quantized,
    _Sell,
    _Tiles,
    library,
)
from rarefy.runtime.int16_codes import check_sums
from rarefy.runtime.native_calls import address
from rarefy.runtime.packed_formats import (
    BLOCK_LANES,
    BLOCK_OUTPUTS,
    KINDS,
    LANE,
    MAX_DENSE_STRIDE,
    MAX_INT8_INPUTS,
    MAX_STRIDE,
    PADDING,
    PANEL_BITS,
    PROGRAM_KINDS,
    ROW_KINDS,
    SLAB,
    Bitmask,
    ConvTiles,
    Csr,
    Dense,
    Packed,
    QuantizedPanels,
    Sell,
    Tiles,
)

MAX_GROUPED = 16  # weights of one call


class Kernel:
    """A packed weight with its bias and activation, ready to be called by `run`; checked once, here.

    Holds the tensors whose addresses it has taken. Raises FormatError for tensors that do not fit together.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None, activation: str | None = None):
        library, why = _open()
        if library is None:
            raise FormatError(str(why))
        if activation not in ACTIVATIONS:
            raise FormatError(unknown("activation", str(activation), [str(a) for a in ACTIVATIONS]))
        if bias is not None:
            bias = bias.detach().float().contiguous()
        # aliases: a buffer's memory must stay alive when `.data =` replaces it
        aliases: dict[str, Any] = {n: v.detach() if isinstance(v, Tensor) else v for n, v in vars(packed).items()}
        packed = type(packed)(**aliases)
        check_packed(packed, bias)
        self.held, self.is_conv = (packed, bias), isinstance(packed, ConvTiles)
        self.call: Any = None
        self.input_grid: ActivationQuant | None = None  # static, of int8 inputs in programs
        self.residual_grid: ActivationQuant | None = None  # likewise, of the residual of a convolution
        self.nhwc: Any = None  # its weight for NHWC images, once a program needs it
        self.winograd: Any = None  # its transformed weight, once a program needs it
        self.shape: Any = packed.shape
        matrix = packed.matrix if isinstance(packed, ConvTiles) else packed
        self.program_only = "dense weights" if isinstance(matrix, Dense) else None
        if self.is_conv and packed.kind != "fp32":
            self.program_only = f"convolutions in {packed.kind}"
        if packed.kind in PROGRAM_KINDS:
            self.program_only = f"weights in {packed.kind}"
        rows, inputs = matrix.shape
        fields: dict[str, Any] = {n: t.data_ptr() for n, t in vars(matrix).items() if isinstance(t, Tensor)}
        fields |= {"rows": rows, "dtype": _KINDS[packed.kind], "act": ACTIVATIONS.index(activation)}
        fields["bias"] = None if bias is None else bias.data_ptr()
        if isinstance(packed, Bitmask):
            self.struct: Any = _Bitmask(cols=inputs, col_blocks=-(-inputs // 64), **fields)
            self.call = library.rarefy_run_bitmask
            count = len(packed.values) - PADDING // packed.values.element_size()
            wrong = library.rarefy_check_bitmask(byref(self.struct), count)
        elif isinstance(packed, QuantizedPanels):
            options = {n: int(getattr(packed, n)) for n in ("scale_groups", "fp32_inputs", "two_terms", "zero_bits")}
            self.struct = _Quantized(cols=inputs, col_blocks=-(-inputs // 64), **options, **fields)
            self.call = library.rarefy_run_quantized
            wrong = library.rarefy_check_quantized(byref(self.struct), packed.values.numel())
        elif isinstance(packed, Dense):
            self.struct, wrong = _Dense(cols=inputs, **fields), 0
        elif isinstance(packed, Csr):
            self.struct, self.call = _Csr(inputs=inputs, **fields), library.rarefy_run_csr
            wrong = library.rarefy_check_csr(byref(self.struct), len(packed.values))
        else:
            lanes = -(-inputs // LANE.get(packed.kind, 4))
            sorted_ = isinstance(matrix, Sell)
            struct: Any
            if isinstance(matrix, Dense):
                struct, counted = _Dense(cols=inputs, **fields), [0, 0]
            else:
                struct = (_Sell if sorted_ else _Tiles)(inputs=inputs, lanes=lanes, block=matrix.block, **fields)  # type: ignore[union-attr]
                counted = [len(matrix.values)] if sorted_ else [len(matrix.columns), len(matrix.values)]  # type: ignore[union-attr]
            self.struct, name = struct, "sell" if sorted_ else "tiles"
            if isinstance(packed, ConvTiles):
                self.inner, self.struct, name = struct, _conv_struct(packed, struct), "conv"
                counted = [0, *counted][-2:]
            self.call = getattr(library, f"rarefy_run_{name}")
            wrong = getattr(library, f"rarefy_check_{name}")(byref(self.struct), *counted)
        if packed.kind == "int16" and isinstance(matrix, Dense):
            check_sums(matrix, whole=self.is_conv)
        if wrong:
            raise FormatError(f"the packed {type(packed).__name__.lower()} of shape {list(packed.shape)} is damaged")
        self.at = byref(self.struct)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that it holds in memory. O(1)."""
        extra = [t.values for t in (self.winograd, self.nhwc) if t is not None]
        return [t for t in (*vars(self.held[0]).values(), self.held[1], *extra) if isinstance(t, Tensor)]

    def tensors_read(self) -> list[Tensor]:
        """Return the tensors that a call reads; a convolution's weight is packed again for NHWC images. O(1)."""
        repacked = self.winograd or self.nhwc
        if repacked is None:
            return self.tensors()
        return [repacked.values, *([] if self.held[1] is None else [self.held[1]])]

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return act(x W^T + bias + residual), fp32 [..., O], for x [..., C]; for x [N, C, height, width] its
        convolution. The residual is fp32 of the output's shape."""
        if self.program_only:
            raise FormatError(f"{self.program_only} run in compiled programs only: use rarefy.compile")
        if self.is_conv:
            return self._convolve(self.held[0], x, residual)
        *lead, C = x.shape
        O, inputs = self.shape
        x, row_stride = _fp32_rows(x, inputs)
        y, N = x.new_empty((*lead, O)), x.numel() // C
        added = None if residual is None else _check_residual(y, residual)
        if N and self.call(
            self.at, address(x), row_stride, None if added is None else address(added), address(y), O, N
        ):
            raise MemoryError(f"no memory to run a layer of {O} outputs on {N} inputs")
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of a quantized weight, fp32 [..., C], for ids [...]; IndexError for one out of range."""
        if not ids.is_cpu or ids.is_floating_point() or ids.is_complex():
            raise FormatError(f"ids must be integers on the CPU, got {ids.dtype} on {ids.device}")
        ids = ids.to(torch.int64).resolve_neg().contiguous()
        out = torch.empty(*ids.shape, self.shape[1], dtype=torch.float32, device="cpu")
        if library().rarefy_dequantize_rows(self.at, address(ids), ids.numel(), address(out)):
            raise IndexError(f"expected ids from 0 to {self.shape[0] - 1}, got {int(ids.min())} to {int(ids.max())}")
        return out

    def _convolve(self, packed: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        if x.dim() != 4:
            raise FormatError(f"the kernel convolves [images, channels, height, width], x is {list(x.shape)}")
        N, C, *image = x.shape
        O, inputs, *kernel = packed.shape
        if inputs * packed.groups != C:
            raise FormatError(f"the weight has {inputs * packed.groups} inputs, x has {C}")
        if x.device.type != "cpu":
            raise FormatError(f"the kernels run on the CPU, x is on {x.device}")
        sizes = zip(image, packed.padding, packed.dilation, kernel, packed.stride)
        out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sizes]
        padded = [size + 2 * p + 8 for size, p in zip(image, packed.padding)]
        if C * padded[0] * padded[1] >= 1 << 31:
            raise FormatError(
                f"{C} channels of {image[0]}x{image[1]} are more than the kernels support: 2^31 with padding"
            )
        if min(out) < 1:
            raise FormatError(f"a kernel of {kernel[0]}x{kernel[1]} does not run over images of {image[0]}x{image[1]}")
        x = x.float().resolve_neg().contiguous()
        y = torch.empty(N, O, *out, dtype=torch.float32, device="cpu")
        added = None if residual is None else _check_residual(y, residual)
        if N and self.call(self.at, address(x), *image, None if added is None else address(added), address(y), N):
            raise MemoryError(f"no memory to run a convolution of {O} outputs on {N} images")
        return y


def can_group(kernels: Sequence[Any]) -> bool:
    """Return whether one call can run these kernels."""
    if not 1 <= len(kernels) <= MAX_GROUPED or not all(isinstance(k, Kernel) and not k.program_only for k in kernels):
        return False
    inputs = ("fp32_inputs", "two_terms")
    formats = {
        (type(k.held[0]), k.held[0].kind, k.shape[1], *(getattr(k.held[0], n, None) for n in inputs)) for k in kernels
    }
    return len(formats) == 1 and type(kernels[0].held[0]) in FORMATS[: FORMATS.index(Dense)]


class GroupedKernels:
    """Kernels of one format and kind that multiply the same inputs, in one call: inputs are packed once, and threads
    start once."""

    def __init__(self, kernels: Sequence[Kernel]):
        if not can_group(kernels):
            raise FormatError(f"one call runs up to {MAX_GROUPED} matrices of one format, kind and number of inputs")
        self.kernels, self.shape = tuple(kernels), kernels[0].shape
        self.structs = (c_void_p * len(kernels))(*(addressof(k.struct) for k in kernels))
        self.format = FORMATS.index(type(kernels[0].held[0]))
        self.outputs, self.pointers = [k.shape[0] for k in kernels], c_void_p * len(kernels)
        self.call = _open()[0].rarefy_run_grouped

    def run(self, x: Tensor) -> list[Tensor]:
        """Return what each kernel would."""
        *lead, C = x.shape
        x, row_stride = _fp32_rows(x, self.shape[1])
        ys, N = [x.new_empty((*lead, O)) for O in self.outputs], x.numel() // C
        to = self.pointers(*map(address, ys))
        if N and self.call(self.format, self.structs, len(ys), address(x), row_stride, to, N):
            raise MemoryError(f"no memory to run layers of {self.outputs} outputs on {N} inputs")
        return ys


def _fp32_rows(x: Tensor, inputs: int) -> tuple[Tensor, int]:
    """Return inputs in fp32 with contiguous rows, and the number of floats from one row to the next."""
    C = x.shape[-1]
    if inputs != C:
        raise FormatError(f"the weight has {inputs} inputs, x has {C}")
    if not x.is_cpu:
        raise FormatError(f"the kernels run on the CPU, x is on {x.device}")
    x = x.float().resolve_neg()
    if x.is_contiguous():
        return x, C
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return x.contiguous(), C


def _check_residual(y: Tensor, residual: Tensor) -> Tensor:
    if residual.shape != y.shape or residual.dtype != y.dtype or not residual.is_cpu:
        got = f"{str(residual.dtype).removeprefix('torch.')} {list(residual.shape)} on {residual.device}"
        raise FormatError(f"the residual is fp32 {list(y.shape)} on the CPU, got {got}")
    return residual.resolve_neg().contiguous()


def _conv_struct(packed: ConvTiles, weight: Any) -> Conv:
    O, inputs, *kernel = packed.shape
    pairs = {"kernel": kernel, **{n: getattr(packed, n) for n in ("stride", "padding", "dilation")}}
    arrays: dict[str, Any] = {n: (c_int64 * 2)(*v) for n, v in pairs.items()}
    if isinstance(weight, _Dense):
        fields = {n: getattr(weight, n) for n in ("rows", "scales", "row_sums", "bias", "dtype", "act")}
        arrays |= {"dense": weight.values}
        lanes = weight.cols // LANE[packed.kind]
        weight = _Tiles(inputs=weight.cols, lanes=lanes, block=packed.block, **fields)
    if isinstance(weight, _Sell):
        fields = ("rows", "inputs", "lanes", "block", "scales", "row_sums", "bias", "dtype", "act")
        same = {n: getattr(weight, n) for n in fields}
        arrays |= {"sell": addressof(weight)}
        weight = _Tiles(**same)
    each = -(-inputs // LANE[packed.kind])
    return Conv(weight=weight, groups=packed.groups, outputs=O // packed.groups, inputs=each, **arrays)


def _check_numbers(packed: Packed) -> None:
    """Raise FormatError for sizes and numbers that no kernel supports."""
    numbers: dict[str, tuple[Any, int, int]] = {"shape": (packed.shape, 1, 1 << 31)}
    if isinstance(packed, Tiles | ConvTiles | Sell):
        numbers["block"] = ((packed.block,), 1, 1 << 16)
    if isinstance(packed, ConvTiles):
        max_stride = MAX_DENSE_STRIDE if packed.counts is None and packed.kind == "fp32" else MAX_STRIDE
        numbers |= {"groups": ((packed.groups,), 1, 1 << 31), "stride": (packed.stride, 1, max_stride)}
        numbers |= {"padding": (packed.padding, 0, 1 << 20), "dilation": (packed.dilation, 1, 1 << 20)}
    lengths = {"shape": 4 if isinstance(packed, ConvTiles) else 2, "block": 1, "groups": 1}
    for name, (values, low, high) in numbers.items():
        right = isinstance(values, tuple) and len(values) == lengths.get(name, 2)
        if not right or any(type(v) is not int or not low <= v <= high for v in values):
            raise FormatError(f"{name}: expected whole numbers from {low} to {high}, got {values!r}")
    known = (
        PANEL_BITS
        if isinstance(packed, QuantizedPanels)
        else (*ROW_KINDS, *(("int4",) if isinstance(packed, Bitmask) else ()))
        if isinstance(packed, Bitmask | Csr)
        else tuple(LANE)
    )
    if isinstance(packed, ConvTiles) and packed.counts is None:
        known = ("fp32", "int8", "int16")
    if packed.kind not in known:
        raise FormatError(unknown("kind", str(packed.kind), known))
    if isinstance(packed, QuantizedPanels) and (
        type(packed.fp32_inputs) is not bool or packed.scale_groups not in (0, 1, 2)
    ):
        raise FormatError(
            "expected fp32_inputs True or False and scale_groups 0 to 2, got "
            f"{packed.fp32_inputs!r} and {packed.scale_groups!r}"
        )
    if isinstance(packed, QuantizedPanels) and (
        type(packed.two_terms) is not bool or (packed.two_terms and packed.fp32_inputs)
    ):
        raise FormatError(f"two_terms: expected False, or True for int8 inputs, got {packed.two_terms!r}")
    if isinstance(packed, QuantizedPanels) and (type(packed.zero_bits) is not int or packed.zero_bits not in (0, 3)):
        raise FormatError(f"zero_bits: expected 0, or 3 for zero points in eighths, got {packed.zero_bits!r}")
    grouped = isinstance(packed, ConvTiles) and packed.groups > 1
    matrix_is_dense = isinstance(packed, ConvTiles) and packed.counts is None
    if grouped and packed.counts is None:  # type: ignore[union-attr]
        raise FormatError("dense weights of convolutions need one group")
    known = ("fp32",) if grouped else ("fp32", "int8", "int16") if matrix_is_dense else ("fp32", "int8")
    if isinstance(packed, ConvTiles) and (packed.shape[0] % packed.groups or packed.kind not in known):
        raise FormatError(f"no kernel for {packed.shape[0]} outputs in {packed.groups} groups of {packed.kind}")
    inputs = packed.matrix.shape[1] if isinstance(packed, ConvTiles) else packed.shape[1]
    if packed.kind == "int8" and inputs > MAX_INT8_INPUTS:
        raise FormatError(f"sums of {inputs} int8 products do not fit 32 bits")


def check_packed(packed: Packed, bias: Tensor | None) -> None:
    """Raise FormatError unless every tensor has the dtype, shape and layout that the kernels rely on."""
    _check_numbers(packed)
    outputs = packed.shape[0]
    matrix: Any = packed.matrix if isinstance(packed, ConvTiles) else packed
    O, C = matrix.shape
    fours, lanes = -(-O // 4), -(-C // LANE.get(packed.kind, 4))
    want: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {}
    if isinstance(packed, Bitmask):
        want |= {
            "masks": (torch.int64, (fours, -(-C // 64), 4)),
            "starts": (torch.int64, (fours,)),
            "values": (KINDS.get(packed.kind, torch.uint8), (None,)),
        }
    elif isinstance(packed, QuantizedPanels):
        cell = (fours, -(-C // 64), 4)
        want |= {
            "values": (torch.uint8, (*cell, 8 * PANEL_BITS[packed.kind])),
            "row_sums": (torch.float32, (O,)),
        }
        want |= {"scales": (torch.bfloat16, (*cell, packed.scale_groups))} if packed.scale_groups else {}
        zeros = packed.kind != "int8" and packed.zeros is not None
        want |= {"zeros": (torch.uint8, (*cell, packed.scale_groups))} if zeros else {}
        want |= {} if packed.row_scales is None else {"row_scales": (torch.float32, (O,))}
    elif isinstance(packed, Csr):
        k = packed.columns.numel() if isinstance(packed.columns, Tensor) else None
        want |= {
            "starts": (torch.int64, (O + 1,)),
            "columns": (torch.int16, (k,)),
            "values": (KINDS[packed.kind], (k,)),
        }
    elif isinstance(matrix, Dense):
        blocks = -(-O // BLOCK_OUTPUTS), -(-lanes // BLOCK_LANES)
        in_blocks = (torch.int32, (*blocks, BLOCK_OUTPUTS, BLOCK_LANES))
        want |= {"values": (torch.float32, (fours, C, 4)) if packed.kind == "fp32" else in_blocks}
    elif isinstance(matrix, Sell):
        cell = (-(-O // SLAB), -(-lanes // matrix.block))
        n = len(matrix.values) if isinstance(matrix.values, Tensor) and matrix.values.dim() else None
        want |= {"starts": (torch.int64, cell), "counts": (torch.int16, (*cell, SLAB // 2))}
        want |= {"order": (torch.uint8, (*cell, SLAB))}
        want |= {"columns": (torch.int16, (n, 2)), "values": (torch.int32, (n, 2))}
    else:
        blocks = -(-lanes // matrix.block)
        want |= {
            "counts": (torch.int16, (fours, blocks, 16)),
            "starts": (torch.int64, (fours, blocks, 2)),
            "columns": (torch.int16, (None,)),
            "values": (torch.int32, (None,)),
        }
    if packed.kind == "int4" and not isinstance(packed, QuantizedPanels):
        want |= {"scales": (torch.bfloat16, (fours, -(-C // 64), 4)), "row_sums": (torch.float32, (O,))}
    if packed.kind in ("int8", "int16") and not isinstance(packed, QuantizedPanels):
        want |= {"scales": (torch.float32, (O,))}
        want |= {"row_sums": (torch.int32, (O,))} if packed.kind == "int8" and not isinstance(packed, Csr) else {}
    tensors = {n: t for n, t in {**vars(packed), "bias": bias}.items() if isinstance(t, Tensor)}
    want |= {} if bias is None else {"bias": (torch.float32, (outputs,))}
    for name in {**want, **tensors}:
        dtype, shape = want.get(name, (None, ()))
        t = tensors.get(name)
        if t is None or dtype is None:
            raise FormatError(f"{name}: the kernels expect {'no such tensor' if t is not None else dtype}")
        fits = t.dtype == dtype and t.dim() == len(shape)
        if not fits or any(s is not None and s != n for s, n in zip(shape, t.shape)):
            got = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise FormatError(f"{name}: the kernels expect {dtype} {list(shape)}, got {got}")
        if not t.is_contiguous() or t.device.type != "cpu":
            raise FormatError(f"{name}: the kernels read contiguous tensors on the CPU")
    if isinstance(packed, Bitmask) and len(packed.values) * packed.values.element_size() < PADDING:
        raise FormatError(
            f"values: {PADDING} bytes of padding must follow the last value, got {packed.values.nbytes} in all"
        )
