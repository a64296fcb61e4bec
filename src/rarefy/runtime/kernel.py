"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import FormatError, unknown
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
from rarefy.runtime.packed_formats import (
    KINDS,
    LANE,
    MOST_BYTES_IN_A_SUM,
    MOST_STRIDE,
    PAST,
    SLAB,
    Bitmask,
    ConvTiles,
    Csr,
    Dense,
    Packed,
    Panels,
    Sell,
    Tiles,
)

MOST_TOGETHER = 16  # weights of one call
_FIELDS = {"sums": "row_sums", "whole": "row_scales"}  # names of a packed weight's tensors in the C interface


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
        # aliases: what is swapped under a buffer by `.data =` must not take its memory along
        kept: dict[str, Any] = {n: v.detach() if isinstance(v, Tensor) else v for n, v in vars(packed).items()}
        packed = type(packed)(**kept)
        _check(packed, bias)
        self.held, self.image = (packed, bias), isinstance(packed, ConvTiles)
        self.call: Any = None
        self.squares: Any = None  # once a plan has asked for them
        self.shape: Any = packed.shape
        matrix = packed.matrix if isinstance(packed, ConvTiles) else packed
        self.alone = "weights as they are" if isinstance(matrix, Dense) else None
        if self.image and packed.kind != "fp32":
            self.alone = f"convolutions in {packed.kind}"
        rows, inputs = matrix.shape
        fields: dict[str, Any] = {
            _FIELDS.get(n, n): t.data_ptr() for n, t in vars(matrix).items() if isinstance(t, Tensor)
        }
        fields |= {"rows": rows, "dtype": _KINDS[packed.kind], "act": ACTIVATIONS.index(activation)}
        fields["bias"] = None if bias is None else bias.data_ptr()
        if isinstance(packed, Bitmask):
            self.about: Any = _Bitmask(cols=inputs, col_blocks=-(-inputs // 64), **fields)
            self.call = library.rarefy_run_bitmask
            room = len(packed.values) - PAST // packed.values.element_size()
            wrong = library.rarefy_check_bitmask(byref(self.about), room)
        elif isinstance(packed, Panels):
            how = {"scale_groups": packed.parts, "fp32_inputs": int(packed.exact)}
            self.about = _Quantized(cols=inputs, col_blocks=-(-inputs // 64), **how, **fields)
            self.call = library.rarefy_run_quantized
            wrong = library.rarefy_check_quantized(byref(self.about), packed.values.numel())
        elif isinstance(packed, Dense):
            self.about, wrong = _Dense(cols=inputs, **fields), 0
        elif isinstance(packed, Csr):
            self.about, self.call = _Csr(inputs=inputs, **fields), library.rarefy_run_csr
            wrong = library.rarefy_check_csr(byref(self.about), len(packed.values))
        else:
            lanes = -(-inputs // LANE.get(packed.kind, 4))
            sorted_ = isinstance(matrix, Sell)
            made: Any
            if isinstance(matrix, Dense):
                made, counted = _Dense(cols=inputs, **fields), [0, 0]
            else:
                made = (_Sell if sorted_ else _Tiles)(inputs=inputs, lanes=lanes, block=matrix.block, **fields)  # type: ignore[union-attr]
                counted = [len(matrix.values)] if sorted_ else [len(matrix.columns), len(matrix.values)]  # type: ignore[union-attr]
            self.about, name = made, "sell" if sorted_ else "tiles"
            if isinstance(packed, ConvTiles):
                self.inner, self.about, name = made, _convolution(packed, made), "conv"
                counted = [0, *counted][-2:]
            self.call = getattr(library, f"rarefy_run_{name}")
            wrong = getattr(library, f"rarefy_check_{name}")(byref(self.about), *counted)
        if wrong:
            raise FormatError(f"the packed {type(packed).__name__.lower()} of shape {list(packed.shape)} is damaged")
        self.at = byref(self.about)

    def tensors(self) -> list[Tensor]:
        """Return what it holds in memory. O(1)."""
        more = () if self.squares is None else (self.squares.values,)
        return [t for t in (*vars(self.held[0]).values(), self.held[1], *more) if isinstance(t, Tensor)]

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return act(x W^T + bias + residual), fp32 [..., O], for x [..., C]; for x [N, C, height, width] its
        convolution. The residual is fp32 of the output's shape."""
        if self.alone:
            raise FormatError(f"{self.alone} run in plans alone: rarefy.compile makes them")
        if self.image:
            return self._convolve(self.held[0], x, residual)
        *lead, C = x.shape
        O, inputs = self.shape
        x, apart = _as_read(x, inputs)
        y, N = x.new_empty((*lead, O)), x.numel() // C
        more = None if residual is None else _like(y, residual)
        if N and self.call(self.at, x.data_ptr(), apart, None if more is None else more.data_ptr(), y.data_ptr(), O, N):
            raise MemoryError(f"no memory to run a layer of {O} outputs on {N} inputs")
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of panels, fp32 [..., C], for whole numbers [...]; IndexError for one that is not there.
        O(ids C)."""
        if not ids.is_cpu or ids.is_floating_point() or ids.is_complex():
            raise FormatError(f"rows are asked for by whole numbers on the CPU, got {ids.dtype} on {ids.device}")
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(*ids.shape, self.shape[1], dtype=torch.float32, device="cpu")
        if library().rarefy_dequantize_rows(self.at, ids.data_ptr(), ids.numel(), out.data_ptr()):
            raise IndexError(f"a weight of {self.shape[0]} rows has not all of {int(ids.min())} to {int(ids.max())}")
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
                f"{C} channels of {image[0]}x{image[1]} are more than the kernel counts, 2^31 with padding"
            )
        if min(out) < 1:
            raise FormatError(f"a kernel of {kernel[0]}x{kernel[1]} does not run over images of {image[0]}x{image[1]}")
        x = x.float().contiguous()
        y = torch.empty(N, O, *out, dtype=torch.float32, device="cpu")
        more = None if residual is None else _like(y, residual)
        if N and self.call(self.at, x.data_ptr(), *image, None if more is None else more.data_ptr(), y.data_ptr(), N):
            raise MemoryError(f"no memory to run a convolution of {O} outputs on {N} images")
        return y


def fit_together(kernels: Sequence[Any]) -> bool:
    """Return whether one call can run these."""
    if not 1 <= len(kernels) <= MOST_TOGETHER or not all(isinstance(k, Kernel) for k in kernels):
        return False
    alike = {(type(k.held[0]), k.held[0].kind, k.shape[1], getattr(k.held[0], "exact", None)) for k in kernels}
    return len(alike) == 1 and type(kernels[0].held[0]) in FORMATS[: FORMATS.index(Dense)]


class Together:
    """Weights of one format and kind that the same inputs are multiplied by, in one call: inputs are packed once, and
    threads start once."""

    def __init__(self, kernels: Sequence[Kernel]):
        if not fit_together(kernels):
            raise FormatError(f"one call runs up to {MOST_TOGETHER} matrices of one format, kind and number of inputs")
        self.kernels, self.shape = tuple(kernels), kernels[0].shape
        self.about = (c_void_p * len(kernels))(*(addressof(k.about) for k in kernels))
        self.format = FORMATS.index(type(kernels[0].held[0]))
        self.outputs, self.pointers = [k.shape[0] for k in kernels], c_void_p * len(kernels)
        self.call = _open()[0].rarefy_run_grouped

    def run(self, x: Tensor) -> list[Tensor]:
        """Return what each kernel would."""
        *lead, C = x.shape
        x, apart = _as_read(x, self.shape[1])
        ys, N = [x.new_empty((*lead, O)) for O in self.outputs], x.numel() // C
        to = self.pointers(*(y.data_ptr() for y in ys))
        if N and self.call(self.format, self.about, len(ys), x.data_ptr(), apart, to, N):
            raise MemoryError(f"no memory to run layers of {self.outputs} outputs on {N} inputs")
        return ys


def _as_read(x: Tensor, inputs: int) -> tuple[Tensor, int]:
    """Inputs as the kernels read them, and how many floats lie from one row to the next."""
    C = x.shape[-1]
    if inputs != C:
        raise FormatError(f"the weight has {inputs} inputs, x has {C}")
    if not x.is_cpu:
        raise FormatError(f"the kernels run on the CPU, x is on {x.device}")
    if x.dtype is not torch.float32:
        x = x.float()
    if x.is_contiguous():
        return x, C
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return x.contiguous(), C


def _like(y: Tensor, residual: Tensor) -> Tensor:
    if residual.shape != y.shape or residual.dtype != y.dtype or not residual.is_cpu:
        got = f"{str(residual.dtype).removeprefix('torch.')} {list(residual.shape)} on {residual.device}"
        raise FormatError(f"the residual is fp32 {list(y.shape)} on the CPU, got {got}")
    return residual.contiguous()


def _convolution(packed: ConvTiles, weight: Any) -> Conv:
    O, inputs, *kernel = packed.shape
    pairs = {"kernel": kernel, **{n: getattr(packed, n) for n in ("stride", "padding", "dilation")}}
    arrays: dict[str, Any] = {n: (c_int64 * 2)(*v) for n, v in pairs.items()}
    if isinstance(weight, _Dense):
        fields = {n: getattr(weight, n) for n in ("rows", "bias", "dtype", "act")}
        arrays |= {"dense": weight.values}
        weight = _Tiles(inputs=weight.cols, lanes=weight.cols, block=packed.block, **fields)
    if isinstance(weight, _Sell):
        fields = ("rows", "inputs", "lanes", "block", "scales", "row_sums", "bias", "dtype", "act")
        same = {n: getattr(weight, n) for n in fields}
        arrays |= {"sell": addressof(weight)}
        weight = _Tiles(**same)
    each = -(-inputs // LANE[packed.kind])
    return Conv(weight=weight, groups=packed.groups, outputs=O // packed.groups, inputs=each, **arrays)


def _check_plain(packed: Packed) -> None:
    """Raise FormatError for sizes that a kernel could not count with."""
    numbers: dict[str, tuple[Any, int, int]] = {"shape": (packed.shape, 1, 1 << 31)}
    if isinstance(packed, Tiles | ConvTiles | Sell):
        numbers["block"] = ((packed.block,), 1, 1 << 16)
    if isinstance(packed, ConvTiles):
        numbers |= {"groups": ((packed.groups,), 1, 1 << 31), "stride": (packed.stride, 1, MOST_STRIDE)}
        numbers |= {"padding": (packed.padding, 0, 1 << 20), "dilation": (packed.dilation, 1, 1 << 20)}
    wide = {"shape": 4 if isinstance(packed, ConvTiles) else 2, "block": 1, "groups": 1}
    for name, (values, least, most) in numbers.items():
        right = isinstance(values, tuple) and len(values) == wide.get(name, 2)
        if not right or any(type(v) is not int or not least <= v <= most for v in values):
            raise FormatError(f"{name}: whole numbers from {least} to {most} are expected, got {values!r}")
    known = ("int8", "int4") if isinstance(packed, Panels) else _KINDS if isinstance(packed, Bitmask) else tuple(LANE)
    if isinstance(packed, Dense) or (isinstance(packed, ConvTiles) and packed.counts is None):
        known = ("fp32",)
    if packed.kind not in known:
        raise FormatError(unknown("kind", str(packed.kind), known))
    if isinstance(packed, Panels) and (type(packed.exact) is not bool or packed.parts not in (0, 1, 2)):
        raise FormatError(f"panels: exact is True or False, parts 0 to 2, got {packed.exact!r}, {packed.parts!r}")
    grouped = isinstance(packed, ConvTiles) and packed.groups > 1
    if grouped and packed.counts is None:  # type: ignore[union-attr]
        raise FormatError("weights as they are are of one group, got more")
    known = ("fp32",) if grouped else ("fp32", "int8")
    if isinstance(packed, ConvTiles) and (packed.shape[0] % packed.groups or packed.kind not in known):
        raise FormatError(f"no kernel for {packed.shape[0]} outputs in {packed.groups} groups of {packed.kind}")
    inputs = packed.matrix.shape[1] if isinstance(packed, ConvTiles) else packed.shape[1]
    if packed.kind == "int8" and inputs > MOST_BYTES_IN_A_SUM:
        raise FormatError(f"sums of {inputs} products of bytes do not fit 32 bits")


def _check(packed: Packed, bias: Tensor | None) -> None:
    """Raise FormatError unless every tensor has the type, shape and layout that the kernels read without asking."""
    _check_plain(packed)
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
    elif isinstance(packed, Panels):
        cell = (fours, -(-C // 64), 4)
        want |= {"values": (torch.uint8, (*cell, 64 if packed.kind == "int8" else 32)), "sums": (torch.float32, (O,))}
        want |= {"scales": (torch.bfloat16, (*cell, packed.parts))} if packed.parts else {}
        want |= {} if packed.zeros is None else {"zeros": (torch.uint8, (*cell, packed.parts))}
        want |= {} if packed.whole is None else {"whole": (torch.float32, (O,))}
    elif isinstance(packed, Csr):
        k = packed.columns.numel() if isinstance(packed.columns, Tensor) else None
        want |= {
            "starts": (torch.int64, (O + 1,)),
            "columns": (torch.int16, (k,)),
            "values": (KINDS[packed.kind], (k,)),
        }
    elif isinstance(matrix, Dense):
        want |= {"values": (torch.float32, (fours, C, 4))}
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
    if packed.kind == "int4" and not isinstance(packed, Panels):
        want |= {"scales": (torch.bfloat16, (fours, -(-C // 64), 4)), "sums": (torch.float32, (O,))}
    if packed.kind == "int8" and not isinstance(packed, Panels):
        want |= {"scales": (torch.float32, (O,))}
        want |= {} if isinstance(packed, Csr) else {"sums": (torch.int32, (O,))}
    given = {n: t for n, t in vars(packed).items() if isinstance(t, Tensor)} | ({} if bias is None else {"bias": bias})
    want |= {} if bias is None else {"bias": (torch.float32, (outputs,))}
    for name in {**want, **given}:
        dtype, shape = want.get(name, (None, ()))
        t = given.get(name)
        if t is None or dtype is None:
            raise FormatError(f"{name}: the kernels expect {'nothing' if t is not None else dtype} here")
        fits = t.dtype == dtype and t.dim() == len(shape)
        if not fits or any(s is not None and s != n for s, n in zip(shape, t.shape)):
            got = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise FormatError(f"{name}: the kernels expect {dtype} {list(shape)}, got {got}")
        if not t.is_contiguous() or t.device.type != "cpu":
            raise FormatError(f"{name}: the kernels read contiguous tensors on the CPU")
    if isinstance(packed, Bitmask) and len(packed.values) * packed.values.element_size() < PAST:
        raise FormatError(f"values: {PAST} bytes lie past the last value, got {packed.values.nbytes} in all")
