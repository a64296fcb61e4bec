"""What the kernels compute, in torch: the reference of their tests, used where there are no kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.model.activation_quant import MIN_SCALE
from rarefy.runtime.packed_formats import PANEL_BITS, ConvTiles, Csr, Packed, QuantizedPanels
from rarefy.runtime.packing import unpack

LOST_STEPS = 254  # of what rounding to int8 loses, as csrc/kernel_table.h
INT16_INPUT_STEPS = 8191  # of the largest input, likewise
ACTIVATIONS: dict[str | None, Any] = {  # in the order of csrc/rarefy.h
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def rounded(x: Tensor, packed: Packed, by_blocks: bool = False) -> Tensor:
    """Return inputs as the kernel of a weight sees them: bf16 as such, for int16 each row in 8,191 steps, for int8 and
    less in 127, each of them in 254 with two terms; single values meet them as they are.

    by_blocks: whether inputs of 4- to 6-bit weights have 127 steps for each 32 in place of two terms, as on AVX-512
    (`bindings.scales_blocks`).
    """
    kind = (
        "fp32"
        if isinstance(packed, Csr) or (isinstance(packed, QuantizedPanels) and packed.fp32_inputs)
        else packed.kind
    )
    if kind == "bf16":
        return x.bfloat16().float()
    if kind in PANEL_BITS or kind == "int16":
        two_terms = isinstance(packed, QuantizedPanels) and packed.two_terms
        if by_blocks and two_terms and kind != "int8":
            return _rounded_by_blocks(x)
        step = x.abs().amax(-1, keepdim=True) / (INT16_INPUT_STEPS if kind == "int16" else 127)
        step = torch.where(step > MIN_SCALE, step, 1.0)
        steps = x * (1 / step)
        codes = steps.round()
        if two_terms:
            return (codes + ((steps - codes) * LOST_STEPS).round() / LOST_STEPS) * step
        return codes * step
    return x


def _rounded_by_blocks(x: Tensor) -> Tensor:
    """Return inputs rounded in 127 steps of the largest of each 32."""
    blocks = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=MIN_SCALE)
    return ((blocks * (1 / step)).round() * step).flatten(-2)[..., : x.shape[-1]]


def run(
    packed: Packed,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return act(x W^T + bias + residual), fp32 [N, O], for x [N, C], or a convolution of x [N, C, height, width].
    O(O C) to unpack and O(N O C) to multiply.

    >>> from rarefy.runtime.packing import pack_bitmask
    >>> run(pack_bitmask(torch.tensor([[0.0, 2.0]])), torch.tensor([[5.0, 3.0]])).tolist()
    [[6.0]]
    """
    if isinstance(packed, ConvTiles):
        options: Any = (packed.stride, packed.padding, packed.dilation, packed.groups)
        y = F.conv2d(x.float(), unpack(packed), bias, *options)
    else:
        y = F.linear(rounded(x.float(), packed), unpack(packed), bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual)
