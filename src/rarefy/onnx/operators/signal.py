"""Fourier transforms and windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rarefy.onnx.dtypes import dtype_of
from rarefy.onnx.operators.shape import check_elements
from rarefy.onnx.operators.signature import Number, axis_of


def _complex(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is the real part, or the real and the imaginary part."""
    return x[..., 0] if x.shape[-1] == 1 else torch.complex(x[..., 0].contiguous(), x[..., 1].contiguous())


def dft(
    x: Tensor, dft_length: Number | None = None, axis: Number | None = None, *, inverse: int = 0, onesided: int = 0,
    opset: int = 20,
) -> Tensor:  # fmt: skip
    along = (-2 if opset >= 20 else 1) if axis is None else int(axis)
    dim = axis_of(along, x.dim())
    n = None if dft_length is None else int(dft_length)
    value = _complex(x)
    if inverse and onesided:
        count = 2 * (value.shape[dim] - 1) if n is None else n
        return torch.fft.irfft(value.to(torch.complex64) if value.dtype == torch.float32 else value, count, dim)[
            ..., None
        ]
    result = torch.fft.ifft(value, n, dim) if inverse else torch.fft.fft(value, n, dim)
    if onesided:
        result = result.narrow(dim, 0, result.shape[dim] // 2 + 1)
    return torch.view_as_real(result).to(x.dtype)


def stft(
    signal: Tensor, frame_step: Number, window: Tensor | None = None, frame_length: Number | None = None, *,
    onesided: int = 1,
) -> Tensor:  # fmt: skip
    """Transform overlapping frames of [batch, length, 1 or 2]."""
    length = len(window) if frame_length is None and window is not None else int(frame_length or signal.shape[1])
    frames = _complex(signal).unfold(1, length, int(frame_step))
    frames = frames if window is None else frames * window
    result = torch.fft.fft(frames)
    result = result[..., : length // 2 + 1] if onesided else result
    return torch.view_as_real(result).to(signal.dtype)


def window(name: str, size: Number, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """Return a window: a sum of cosines."""
    count = int(size)
    check_elements([count], name)
    terms = {
        "HannWindow": (0.5, 0.5),
        "HammingWindow": (25 / 46, 21 / 46),
        "BlackmanWindow": (0.42, 0.5, 0.08),
    }[name]
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / (count if periodic else max(count - 1, 1)))
    value = sum((-1) ** i * a * torch.cos(i * angle) for i, a in enumerate(terms))
    return torch.as_tensor(value).to(dtype_of(output_datatype, name))


def mel_weight_matrix(
    num_mel_bins: Number, dft_length: Number, sample_rate: Number, lower_edge_hertz: Number, upper_edge_hertz: Number,
    *, output_datatype: int = 1,
) -> Tensor:  # fmt: skip
    """Return the triangular filters [dft_length / 2 + 1, bins] between frequencies equally spaced in mel."""
    bins, spectrum = int(num_mel_bins), int(dft_length) // 2 + 1
    check_elements([bins, spectrum], "MelWeightMatrix")
    low, high = (2595 * math.log10(1 + float(f) / 700) for f in (lower_edge_hertz, upper_edge_hertz))
    mels = torch.arange(bins + 2, dtype=torch.float64) * ((high - low) / (bins + 2)) + low
    hertz = 700 * (10 ** (mels / 2595) - 1)
    edges = torch.floor((int(dft_length) + 1) * hertz / int(sample_rate)).to(torch.int64)
    out = torch.zeros(spectrum, bins, dtype=torch.float64)
    for i in range(bins):
        left, centre, right = edges[i : i + 3].tolist()
        if centre == left:
            out[centre, i] = 1
        for j in range(left, centre + 1 if centre > left else centre):
            out[j, i] = (j - left) / (centre - left)
        for j in range(centre, right) if right > centre else ():
            out[j, i] = (right - j) / (right - centre)
    return out.to(dtype_of(output_datatype, "MelWeightMatrix"))
