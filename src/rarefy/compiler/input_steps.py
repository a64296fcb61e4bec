"""Steps of a program that prepare an operator's input: quantize it, or pad an image into planes.

An image [batch, channels, height, width] is stored in a program as tokens, one per pixel. A kernel that reads several
pixels at once reads planes: the image with its padding, cut so that a position of the kernel is a shift of its start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import Structure, addressof, c_int64, c_void_p
from dataclasses import replace
from typing import Any

import torch

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.program import Program, Value
from rarefy.model.activation_quant import ActivationQuant
from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import DTYPES, LANE

WIDTH_OF_TERMS = (1, 2, 2, 3)  # of int8 inputs in one term, in two, or with scales for 32: times that of codes alone
OVERREAD = 16  # floats that a kernel may read past the last plane
MAX_PLANE_FLOATS = 1 << 31  # offsets are 32 bits


class Indirection(Structure):
    """rarefy_indirection of csrc/rarefy.h: where a convolution reads an image."""

    _fields_ = [("conv", c_void_p), ("height", c_int64), ("width", c_int64), ("offsets", c_void_p)]


def out_sizes(sizes: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...]:
    """Return height and width of a convolution's or a pool's output for an image of these sizes."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation)
    )


def conv_geometry(kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """Return the native description of a convolution of one channel, without weights."""
    pairs: Mapping[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return bindings.Conv(groups=1, outputs=1, inputs=1, **{n: (c_int64 * 2)(*v) for n, v in pairs.items()})


def quantize_input(
    p: Program, x: Node, precision: str, per_image: bool = False, two_terms: int = 0
) -> tuple[Value, Value | None]:
    """Return a value in a kernel's precision and its scales, computed once for all operators that read it so.

    bf16 has no scales. In int8 and int16 there is a scale for each token or pixel, or one for each image, whose pixels
    a convolution sums. With two terms (1), or a scale for each 32 inputs (2 or 3), an input takes more
    than 8 bits.
    """
    key = x, precision + " per image" * per_image + (f" terms {two_terms}" if two_terms else "")
    if key not in p.quantized and precision != "fp32" and not per_image and not two_terms:
        written = p.codes(p.values[x], precision)
        if written is not None:
            p.quantized[key] = written
    if key not in p.quantized:
        source = p.values[x]
        if p.decode:
            lanes = -(-source.features // 64) * 64 // LANE[precision]
        else:
            lanes = -(-source.features // LANE[precision]) if per_image else p.code_lanes(source, precision)
        one_scale = precision != "bf16" and two_terms < 2  # for all inputs of a token: only then their largest is read
        absmax = p.absmax(source) if one_scale and not p.decode else None
        if per_image:
            absmax_source, absmax = source if absmax is None else absmax, p.new_like(source, 1)
            p.step("image_absmax", absmax_source, x=p.use(absmax_source), out=p.use(absmax))
        fields = {"dtype": DTYPES.index(precision), "per_image": int(per_image), "two_terms": two_terms}
        codes, scales = p.new_like(source, WIDTH_OF_TERMS[two_terms] * lanes), p.new_like(source, 1)
        extra = {} if absmax is None else {"in_absmax": p.use(absmax), "absmax_rows": absmax.features}
        p.step("convert", source, x=p.use(source), out=p.use(codes), out_scales=p.use(scales), **fields, **extra)
        p.quantized[key] = codes, scales
    return p.quantized[key]


def quantize_static(p: Program, x: Node, grid: ActivationQuant) -> tuple[Value, dict[str, Any]]:
    """Return a value's int8 codes with one scale for all, made once, and the numbers of a step that reads them.

    They are written by the step that computes the value, where that can; else by a step of their own.
    """
    assert grid.scale is not None
    scale, zero = grid.scale, grid.zero - 128
    key = x, f"int8 {scale} {zero}"
    if key not in p.quantized:
        source = p.unrounded.get(p.values[x], p.values[x])
        codes = p.static_codes(source, scale, zero)
        if codes is None:
            codes = p.new_like(source, p.code_lanes(source, "int8"))
            fields = {"dtype": DTYPES.index("int8"), "codes_scale": scale, "codes_zero": zero}
            p.step("convert", source, x=p.use(source), out=p.use(codes), **fields)
        p.quantized[key] = codes, None
    return p.quantized[key][0], {"in_scale": scale, "in_zero": zero}


def pad_planes(
    p: Program, x: Node, conv: Any, fill: float, codes: Value | None = None, zero: int = 0
) -> tuple[Value, Indirection]:
    """Return an image's planes for a kernel, made once for all operators that read it so, and how to read them.

    conv is the kernel's geometry, fill the number in the padding, codes the image where it was quantized, zero its code
    of zero.
    """
    batch, features, height, width = p.shape(x)
    features = features if codes is None else -(-features // LANE["int8"])
    floats = bindings.library().rarefy_padded_image_floats(conv, height, width) // conv.inputs
    geometry = (tuple(getattr(conv, n)) for n in ("kernel", "stride", "padding", "dilation"))
    key = (x, codes is None, zero, fill, *geometry)
    if batch * features * floats >= MAX_PLANE_FLOATS:
        raise MemoryError(
            f"{batch} images of {features} channels of {height} x {width} exceed {MAX_PLANE_FLOATS:,} padded numbers"
        )
    offsets = torch.empty(conv.inputs * conv.kernel[0] * conv.kernel[1], dtype=torch.int32)
    bindings.library().rarefy_indirection_offsets(conv, height, width, offsets.data_ptr())
    image = Indirection(addressof(conv), height, width, offsets.data_ptr())
    p.held += [image, offsets, conv]
    if key not in p.planes:
        p.planes[key] = _new_planes(p, x, image, fill, codes, zero, batch * features * floats + OVERREAD)
    return p.use(p.planes[key]), image


def _new_planes(
    p: Program, x: Node, image: Indirection, fill: float, codes: Value | None, zero: int, floats: int
) -> Value:
    source = p.values.get(x) if codes is None else codes
    tokens = p.image_tokens(x) if source is None else source
    features = p.shape(x)[1] if codes is None else -(-p.shape(x)[1] // LANE["int8"])
    planes = Value(tokens.tokens, features, len(p.steps), False, size=floats)
    p.every.append(planes)
    fields: dict[str, Any] = {"channels_first": 1}
    if source is not None:
        fields = {"x": p.use(source), "dtype": DTYPES.index("fp32" if codes is None else "int8"), "in_zero": zero}
    else:  # read from the program's input as it is
        p.raw[x].append(len(p.steps))
    over = tokens if codes is None else replace(tokens, features=features)
    p.step("pad_planes", over, out=p.use(planes), indirection=addressof(image), pad_value=fill, **fields)
    return planes


def matrix_fields(conv: Any) -> dict[str, int]:
    """Return the fields of a step that say where the matrix of a convolution's kernel is, and its format."""
    return {"weight": addressof(conv.inner), "format": bindings.FORMATS.index(type(conv.held[0].matrix))}
