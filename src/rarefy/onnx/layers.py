"""Torch layers for ONNX operators with constant weights: what can be pruned, cut, quantized and trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.onnx.modules import Operator, Recurrent
from rarefy.onnx.operators.conv import same_pad, window_pads
from rarefy.onnx.operators.shape import pad

CONV: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


@dataclass(frozen=True)
class Site:
    """An operator that may become a layer.

    Attributes:
        arrays: its inputs that are constants; None for the others.
        present: which of its inputs there are.
        attributes: its attributes.
        rank: the number of dimensions of its first input, None if the file does not tell.
        opset: the version of the operators.
        outputs: the number of its outputs.
    """

    arrays: Sequence[Tensor | None]
    present: Sequence[bool]
    attributes: dict[str, Any]
    rank: int | None
    opset: int
    outputs: int

    def array(self, i: int) -> Tensor | None:
        """Return a constant input, None if it is missing or no constant."""
        return self.arrays[i] if i < len(self.arrays) else None

    def has(self, i: int) -> bool:
        """Return whether there is an input."""
        return i < len(self.present) and self.present[i]

    def floats(self, i: int, dims: int | None = None) -> Tensor | None:
        """Return a constant input of floats, of a number of dimensions if one is asked for."""
        array = self.array(i)
        fits = array is not None and array.is_floating_point() and (dims is None or array.dim() == dims)
        return array if fits else None

    def get(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)


@dataclass(frozen=True)
class Layer:
    """A torch layer for an operator.

    Attributes:
        module: the layer.
        weight: the place of its weight among the operator's inputs.
        transposed: whether the layer's weight is the transposed one.
        inputs: the places of the inputs that it is called with.
        before: what pads its input.
        scaled: whether the layer's weight is the constant times a number.
    """

    module: nn.Module
    weight: int = 1
    transposed: bool = False
    inputs: tuple[int, ...] = (0,)
    before: nn.Module | None = None
    scaled: bool = False


def parameter(values: Tensor) -> nn.Parameter:
    """Return values as a parameter of its own memory, in one piece."""
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))


def linear_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a Linear layer of weights [outputs, inputs]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    return layer


def matmul(site: Site) -> Layer | None:
    weight = site.floats(1, 2)
    return None if weight is None else Layer(linear_layer(weight.T, None), transposed=True)


def gemm(site: Site) -> Layer | None:
    weight, bias, alpha, beta = site.floats(1, 2), site.array(2), site.get("alpha", 1.0), site.get("beta", 1.0)
    if weight is None or site.get("transA", 0) or (bias is None and site.has(2)):
        return None
    turned = not site.get("transB", 0)
    weight = weight.T if turned else weight
    if bias is not None:
        if bias.numel() not in (1, weight.shape[0]) or bias.shape[-1:] not in ((), (1,), (weight.shape[0],)):
            return None
        bias = bias.reshape(-1).expand(weight.shape[0]) * beta
    return Layer(linear_layer(weight * alpha if alpha != 1 else weight, bias), 1, turned, scaled=alpha != 1)


def embedding(site: Site) -> Layer | None:
    table = site.floats(0, 2)
    if table is None or site.get("axis", 0):
        return None
    layer = nn.Embedding(table.shape[0], table.shape[1], device="meta")
    layer.weight = parameter(table)
    return Layer(layer, 0, inputs=(1,))


def conv(site: Site) -> Layer | None:
    weight, bias = site.floats(1), site.floats(2, 1)
    if weight is None or not 3 <= weight.dim() <= 5 or (bias is None and site.has(2)):
        return None
    n, kernel, groups = weight.dim() - 2, tuple(weight.shape[2:]), site.get("group", 1)
    strides, dilations = site.get("strides", (1,) * n), site.get("dilations", (1,) * n)
    auto, padding, before = site.get("auto_pad", "NOTSET"), (0,) * n, None
    if auto.startswith("SAME"):
        constants = {"auto_pad": auto, "kernel": kernel, "strides": strides, "dilations": dilations}
        before = Operator("SamePad", same_pad, constants)
        if set(strides) == {1} and all((k - 1) * d % 2 == 0 for k, d in zip(kernel, dilations)):
            padding, before = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilations)), None
    else:
        sides = window_pads((0,) * n, kernel, strides, dilations, site.get("pads", None), auto)
        if all(a == b for a, b in sides):
            padding = tuple(a for a, _ in sides)
        else:
            pads = (0, 0, *(a for a, _ in sides), 0, 0, *(b for _, b in sides))
            before = Operator("Pad", pad, {"pads": pads})
    layer = CONV[n - 1](
        weight.shape[1] * groups, weight.shape[0], kernel, strides, padding, dilations, groups, bias is not None,
        device="meta",
    )  # fmt: skip
    return Layer(_filled(layer, weight, bias), before=before)


def conv_transpose(site: Site) -> Layer | None:
    weight, bias = site.floats(1), site.floats(2, 1)
    if weight is None or not 3 <= weight.dim() <= 5 or (bias is None and site.has(2)):
        return None
    n, kernel, groups = weight.dim() - 2, tuple(weight.shape[2:]), site.get("group", 1)
    auto, pads = site.get("auto_pad", "NOTSET"), site.get("pads", (0,) * (2 * n))
    strides, extra = site.get("strides", (1,) * n), site.get("output_padding", (0,) * n)
    dilations = site.get("dilations", (1,) * n)
    fits = all(e < s or e < d for e, s, d in zip(extra, strides, dilations))
    if "output_shape" in site.attributes or auto.startswith("SAME") or pads[:n] != pads[n:] or not fits:
        return None
    padding = (0,) * n if auto == "VALID" else pads[:n]
    layer = CONV_TRANSPOSE[n - 1](
        weight.shape[0], weight.shape[1] * groups, kernel, strides, padding, extra, groups, bias is not None,
        dilations, device="meta",
    )  # fmt: skip
    return Layer(_filled(layer, weight, bias))


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    return layer


def batch_norm(site: Site) -> Layer | None:
    arrays = [site.floats(i, 1) for i in range(1, 5)]
    kind = BATCH_NORM.get(site.rank or 0)
    if kind is None or any(a is None for a in arrays) or site.get("training_mode", 0) or site.outputs > 1:
        return None
    scale, bias, mean, var = (a for a in arrays if a is not None)
    layer = kind(len(scale), site.get("epsilon", 1e-5), dtype=scale.dtype)
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    return Layer(_filled(layer, scale, bias))


def layer_norm(site: Site) -> Layer | None:
    scale, bias, axis = site.floats(1), site.floats(2), site.get("axis", -1)
    last = scale is not None and (axis == -scale.dim() or (site.rank is not None and axis == site.rank - scale.dim()))
    if scale is None or not last or site.outputs > 1 or (bias is None and site.has(2)):
        return None
    if bias is not None and bias.shape != scale.shape:
        return None
    layer = nn.LayerNorm(list(scale.shape), site.get("epsilon", 1e-5), bias=bias is not None, dtype=scale.dtype)
    return Layer(_filled(layer, scale, bias))


def group_norm(site: Site) -> Layer | None:
    scale, bias = site.floats(1, 1), site.floats(2, 1)
    if scale is None or bias is None or site.opset < 21:
        return None
    layer = nn.GroupNorm(site.get("num_groups", 1), len(scale), site.get("epsilon", 1e-5), dtype=scale.dtype)
    return Layer(_filled(layer, scale, bias))


def instance_norm(site: Site) -> Layer | None:
    scale, bias, kind = site.floats(1, 1), site.floats(2, 1), INSTANCE_NORM.get(site.rank or 0)
    if scale is None or bias is None or kind is None:
        return None
    layer = kind(len(scale), site.get("epsilon", 1e-5), affine=True, dtype=scale.dtype)
    return Layer(_filled(layer, scale, bias))


def prelu(site: Site) -> Layer | None:
    slope = site.floats(1)
    if slope is None:
        return None
    old = site.opset < 7 and slope.dim() == 1
    of_channels = old or (slope.dim() == (site.rank or 0) - 1 and slope.numel() == slope.shape[0])
    if slope.numel() > 1 and not of_channels:
        return None
    layer = nn.PReLU(slope.numel(), dtype=slope.dtype)
    layer.weight = parameter(slope.reshape(-1))
    return Layer(layer)


def gelu(site: Site) -> Layer | None:
    form = site.get("approximate", "none")
    return Layer(nn.GELU(form), weight=-1) if form in ("none", "tanh") else None


RECURRENT: dict[str, tuple[Any, tuple[int, ...], tuple[str, ...]]] = {
    "LSTM": (nn.LSTM, (0, 2, 3, 1), ("Sigmoid", "Tanh", "Tanh")),  # ONNX's gates iofc, torch's ifco
    "GRU": (nn.GRU, (1, 0, 2), ("Sigmoid", "Tanh")),  # zrh, and rzh
    "RNN": (nn.RNN, (0,), ("Tanh",)),
}


def recurrent(kind: str, site: Site) -> Layer | None:
    """Return a recurrent layer for one without sequence lengths, peepholes, clipping or unusual activations."""
    layer, gates, activations = RECURRENT[kind]
    w, r, b = (site.floats(i) for i in (1, 2, 3))
    states = (5, 6) if kind == "LSTM" else (5,)
    direction, names = site.get("direction", "forward"), site.get("activations", activations)
    odd = site.get("layout", 0) or site.get("input_forget", 0) or "clip" in site.attributes or direction == "reverse"
    odd = odd or (kind == "GRU" and not site.get("linear_before_reset", 0)) or site.has(4) or site.has(7)
    if w is None or r is None or odd or (b is None and site.has(3)) or tuple(names) != activations * w.shape[0]:
        return None
    if len({site.has(s) for s in states}) > 1:
        return None
    size = r.shape[-1]
    module: Any = layer(w.shape[-1], size, bidirectional=w.shape[0] == 2, bias=b is not None, dtype=w.dtype)

    def ordered(t: Tensor) -> Tensor:
        return torch.cat([t.split(size)[g] for g in gates])

    for d in range(w.shape[0]):
        suffix = "_l0_reverse" if d else "_l0"
        setattr(module, f"weight_ih{suffix}", parameter(ordered(w[d])))
        setattr(module, f"weight_hh{suffix}", parameter(ordered(r[d])))
        if b is not None:
            first, second = b[d].chunk(2)
            setattr(module, f"bias_ih{suffix}", parameter(ordered(first)))
            setattr(module, f"bias_hh{suffix}", parameter(ordered(second)))
    inputs = (0, *states) if site.has(states[0]) else (0,)
    return Layer(Recurrent(module, site.outputs), weight=-1, inputs=inputs)


LAYERS: dict[str, Callable[[Site], Layer | None]] = {
    "BatchNormalization": batch_norm,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gather": embedding,
    "Gelu": gelu,
    "Gemm": gemm,
    "GroupNormalization": group_norm,
    "GRU": lambda site: recurrent("GRU", site),
    "InstanceNormalization": instance_norm,
    "LSTM": lambda site: recurrent("LSTM", site),
    "LayerNormalization": layer_norm,
    "MatMul": matmul,
    "PRelu": prelu,
    "RNN": lambda site: recurrent("RNN", site),
}
