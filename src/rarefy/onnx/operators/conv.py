"""Convolutions with weights that are computed, or integers, or of forms that no torch module has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.onnx.operators.signature import Ints, require

CONV = (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def window_pads(
    sizes: Any, kernel: Any, strides: Any, dilations: Any, pads: Any, auto_pad: str = "NOTSET"
) -> list[tuple[int, int]]:
    """Return how many elements are padded before and after each spatial axis.

    Args:
        sizes: of the spatial axes.
        kernel: its sizes.
        strides: of each axis, or None.
        dilations: of each axis, or None.
        pads: all befores, then all afters, or None.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
    """
    n = len(kernel)
    require(auto_pad in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"), f"auto_pad: {auto_pad!r} is not known")
    if not auto_pad.startswith("SAME"):
        pads = (0,) * (2 * n) if pads is None or auto_pad == "VALID" else pads
        return [(pads[i], pads[i + n]) for i in range(n)]
    strides, dilations, sides = strides or (1,) * n, dilations or (1,) * n, []
    for size, k, s, d in zip(sizes, kernel, strides, dilations):
        total = ((size + s - 1) // s - 1) * s + (k - 1) * d + 1 - size
        total = torch.sym_max(total, 0)
        less = total // 2
        sides.append((less, total - less) if auto_pad == "SAME_UPPER" else (total - less, less))
    return sides


def torch_pads(sides: Any) -> list[int]:
    """Return pads in the order of torch.nn.functional.pad."""
    return [n for side in reversed(sides) for n in side]


def padded(x: Tensor, sides: Any, value: float = 0) -> tuple[Tensor, list[int]]:
    """Return x, padded where torch's operators cannot, and the padding that they are told."""
    if all(a == b for a, b in sides):
        return x, [a for a, _ in sides]
    return F.pad(x, torch_pads(sides), value=value), [0] * len(sides)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, auto_pad: str = "NOTSET", dilations: Ints | None = None,
    group: int = 1, kernel_shape: Ints | None = None, pads: Ints | None = None, strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    n = x.dim() - 2
    require(0 < n < 4, f"Conv of {n} spatial dimensions is not supported")
    sides = window_pads(x.shape[2:], weight.shape[2:], strides, dilations, pads, auto_pad)
    x, padding = padded(x, sides)
    return CONV[n - 1](x, weight, bias, strides or 1, padding, dilations or 1, group)


def same_pad(x: Tensor, *, auto_pad: str, kernel: Ints, strides: Ints, dilations: Ints) -> Tensor:
    """Pad the spatial axes so that a convolution returns ceil(size / stride)."""
    sides = window_pads(x.shape[2:], kernel, strides, dilations, None, auto_pad)
    return F.pad(x, torch_pads(sides))


def conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, auto_pad: str = "NOTSET", dilations: Ints | None = None,
    group: int = 1, kernel_shape: Ints | None = None, output_padding: Ints | None = None,
    output_shape: Ints | None = None, pads: Ints | None = None, strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    n = x.dim() - 2
    require(0 < n < 4, f"ConvTranspose of {n} spatial dimensions is not supported")
    s, d, extra = strides or (1,) * n, dilations or (1,) * n, output_padding or (0,) * n
    full = [s[i] * (x.shape[2 + i] - 1) + (weight.shape[2 + i] - 1) * d[i] + 1 + extra[i] for i in range(n)]
    if output_shape is not None:
        totals = [a - b for a, b in zip(full, output_shape[-n:])]
    elif auto_pad.startswith("SAME"):
        totals = [a - x.shape[2 + i] * s[i] for i, a in enumerate(full)]
    else:
        totals = None
    if totals is None:
        sides = window_pads(x.shape[2:], weight.shape[2:], s, d, pads, auto_pad)
    elif auto_pad == "SAME_UPPER":
        sides = [(t // 2, t - t // 2) for t in totals]
    else:
        sides = [(t - t // 2, t // 2) for t in totals]
    if all(a == b >= 0 for a, b in sides):
        return CONV_TRANSPOSE[n - 1](x, weight, bias, s, [a for a, _ in sides], extra, group, d)
    y = CONV_TRANSPOSE[n - 1](x, weight, bias, s, 0, 0, group, d)
    y = F.pad(y, torch_pads([(0, e) for e in extra]))
    if bias is not None and any(extra):
        require(all(e <= b for e, (_, b) in zip(extra, sides)), "ConvTranspose pads its output")
    return F.pad(y, torch_pads([(-a, -b) for a, b in sides]))


def deform_conv(
    x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *,
    dilations: Ints | None = None, group: int = 1, kernel_shape: Ints | None = None, offset_group: int = 1,
    pads: Ints | None = None, strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    """Convolve images at places that are moved by offsets, read by bilinear interpolation."""
    require(x.dim() == 4, "DeformConv is supported for images alone")
    (N, C, H, W), (kh, kw), (oh, ow) = x.shape, weight.shape[2:], offset.shape[2:]
    (sh, sw), (dh, dw), begin = strides or (1, 1), dilations or (1, 1), pads or (0, 0, 0, 0)
    moved = offset.reshape(N, offset_group, kh * kw, 2, oh, ow)
    rows = (torch.arange(oh) * sh - begin[0])[None, :, None] + (torch.arange(kh) * dh).repeat_interleave(kw)[
        :, None, None
    ]
    columns = (torch.arange(ow) * sw - begin[1])[None, None] + (torch.arange(kw) * dw).repeat(kh)[:, None, None]
    y, z = moved[:, :, :, 0] + rows, moved[:, :, :, 1] + columns  # [N, groups, taps, oh, ow]
    grid = torch.stack([(2 * z + 1) / W - 1, (2 * y + 1) / H - 1], -1).reshape(N * offset_group, kh * kw * oh, ow, 2)
    image = x.reshape(N * offset_group, C // offset_group, H, W)
    taps = F.grid_sample(image, grid.to(x.dtype), align_corners=False).reshape(N, offset_group, -1, kh * kw, oh, ow)
    if mask is not None:
        taps = taps * mask.reshape(N, offset_group, 1, kh * kw, oh, ow)
    taps = taps.reshape(N, group, C // group * kh * kw, oh * ow)
    kernel = weight.reshape(group, weight.shape[0] // group, -1)
    out = torch.einsum("goc,ngcp->ngop", kernel, taps).reshape(N, -1, oh, ow)
    return out if bias is None else out + bias[:, None, None]
