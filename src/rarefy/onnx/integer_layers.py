"""Layers on quantized weights, in the operators that ONNX has for codes: for torch's exporter alone.

Static activations: QuantizeLinear and DequantizeLinear before the layer, and a DequantizeLinear of the weight's codes,
which ONNX Runtime and OpenVINO fuse with the layer. Dynamic ones: DynamicQuantizeLinear, then MatMulInteger or
ConvInteger on the codes. An exported operator returns zeros when it is called outside of an export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.model.activation_quant import ActivationQuant, get_activation_quant, set_activation_quant_
from rarefy.model.layers import all_layers
from rarefy.model.layout import CONV, is_hf_conv1d
from rarefy.model.quant_grid import Grid, block_rows, from_block_rows, get_grid
from rarefy.onnx.modules import FakeQuantize


def use_integer_operators_(model: nn.Module) -> str:
    """Let the layers of a folded model compute by ONNX's operators on codes.

    Returns:
        How activations are quantized: "" (not at all), "static" or "dynamic".
    """
    kinds = {""}
    weights: dict[tuple[nn.Module, str], QuantizedWeight] = {}
    for layer in all_layers(model):
        grid = get_grid(layer)
        if isinstance(grid, Grid):
            weight = QuantizedWeight.of(layer.weight.detach(), grid)
            weights |= {(module, param): weight for _, module, param in layer.owners}
    for module in list(model.modules()):
        quant = module.inputs if isinstance(module, FakeQuantize) else get_activation_quant(module)
        if quant is not None:
            kinds.add("dynamic" if quant.scale is None else "static")
        _replace_forward_(module, weights.get((module, "weight")), quant)
    for (module, param), weight in weights.items():  # what reads the weight itself gets it dequantized
        parametrize.register_parametrization(module, param, weight)
    return max(kinds, key=("", "static", "dynamic").index)


def _replace_forward_(module: Any, weight: QuantizedWeight | None, quant: ActivationQuant | None) -> None:
    """Replace the forward of a module, or its rounding of inputs, by operators on codes where there are some."""
    dynamic = quant is not None and quant.scale is None
    if isinstance(module, FakeQuantize):
        if dynamic:
            _set_forward_(module, fake_quantize_dynamically)
        return
    if dynamic:
        set_activation_quant_(module, None)
    is_linear, is_conv = isinstance(module, nn.Linear) or is_hf_conv1d(module), isinstance(module, CONV)
    on_outputs = weight is not None and weight.is_per_output(module)
    if weight is not None and isinstance(module, nn.Embedding) and weight.axis == 0 and module.max_norm is None:
        module.quantized_weight = weight
        _set_forward_(module, partial(embed, module))
    elif weight is not None and on_outputs and is_linear:
        module.quantized_weight = weight.transposed() if isinstance(module, nn.Linear) else weight
        _set_forward_(module, partial(multiply_dynamic if dynamic else multiply, module))
    elif (
        weight is not None and on_outputs and is_conv and dynamic and weight.one_zero and module.padding_mode == "zeros"
    ):
        module.quantized_weight = weight
        _set_forward_(module, partial(convolve_dynamic, module))
    elif dynamic:
        nn.Module.register_forward_pre_hook(module, _round_dynamically, with_kwargs=True)
    bias: Any = getattr(module, "bias", None)
    if weight is None or quant is None or quant.scale is None or bias is None:
        return
    if on_outputs and weight.symmetric and (is_linear or is_conv):
        bias = QuantizedBias(bias.detach(), weight.scale.flatten() * quant.scale)
        parametrize.register_parametrization(module, "bias", bias)


def _set_forward_(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    """Let calls of a module run another function of its first argument."""
    module.__dict__["forward"] = lambda *args, **kwargs: forward(args[0] if args else next(iter(kwargs.values())))


# Weights


class QuantizedWeight(nn.Module):
    """A weight as codes, W = (codes - zero) scale; as a parametrization it dequantizes them.

    Attributes:
        codes: int8, or uint8 where there are zero points, in the shape of the weight; scales of blocks have the weights
            of a block as a row.
        scale: a number, or a vector along the axis or the rows.
        zero: the codes of 0, in the shape of the scale. ONNX Runtime fuses no weight without them.
        axis: the one dimension along which scales differ, 0 for a single scale; None for blocks.
        shape: sizes of the weight.
        blocks: the number of scales in each dimension.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, axis: int | None, shape: Any, blocks: Any):
        super().__init__()
        self.axis, self.shape, self.blocks = axis, tuple(shape), tuple(blocks)
        for name, tensor in (("codes", codes.contiguous()), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, weight: Tensor, grid: Grid) -> QuantizedWeight:
        """Return the codes of a weight on a grid. O(weights)."""
        codes, blocks = grid.codes(weight), tuple(grid.scale.shape)
        if grid.zero is None:
            codes = codes.to(torch.int8)
        else:
            codes = (codes + grid.expand(grid.zero, tuple(weight.shape)).to(codes.dtype)).to(torch.uint8)
        axes = [d for d, n in enumerate(blocks) if n > 1]
        axis = 0 if not axes else axes[0] if len(axes) == 1 and blocks[axes[0]] == weight.shape[axes[0]] else None
        flat = (-1,) if axes else ()
        rows = codes if axis is not None else block_rows(codes, blocks)
        scale = grid.scale.detach().float().reshape(flat)
        zero = torch.zeros(scale.shape, dtype=torch.int8) if grid.zero is None else grid.zero.reshape(flat)
        return cls(rows, scale, zero.to(codes.dtype), axis, weight.shape, blocks)

    @property
    def symmetric(self) -> bool:
        """Return whether every zero point is 0."""
        return self.codes.dtype == torch.int8

    @property
    def one_zero(self) -> bool:
        """Return whether all zero points are the same."""
        return len(self.zero.unique()) == 1

    def is_per_output(self, module: nn.Module) -> bool:
        """Return whether there is one scale, or one for each output of a layer."""
        return self.axis is not None and (self.scale.dim() == 0 or self.axis == int(is_hf_conv1d(module)))

    def transposed(self) -> QuantizedWeight:
        """Return the codes of the transposed matrix."""
        axis = self.axis if self.axis is None or self.scale.dim() == 0 else 1 - self.axis
        return QuantizedWeight(self.codes.T, self.scale, self.zero, axis, self.shape[::-1], self.blocks[::-1])

    def forward(self, weight: Tensor | None = None) -> Tensor:
        axis = {} if self.scale.dim() == 0 else {"axis": self.axis or 0}
        inputs = (self.codes, self.scale, self.zero)
        values = call_onnx("DequantizeLinear", inputs, torch.float32, self.codes.shape, **axis)
        return values if self.axis is not None else from_block_rows(values, self.blocks, self.shape)


class QuantizedBias(nn.Module):
    """Parametrization: a bias in 32 bits, on the scales of the sums of codes that it is added to."""

    codes: Tensor
    scale: Tensor

    def __init__(self, bias: Tensor, scale: Tensor):
        super().__init__()
        highest = torch.iinfo(torch.int32).max
        codes = (bias.double() / scale.double()).round().clamp(-highest, highest)
        self.register_buffer("codes", codes.to(torch.int32))
        self.register_buffer("scale", scale.expand(len(bias)).contiguous())

    def forward(self, bias: Tensor) -> Tensor:
        return call_onnx("DequantizeLinear", (self.codes, self.scale), torch.float32, self.codes.shape, axis=0)


# Layers


def quantize_static(x: Tensor, scale: float, zero: int) -> Tensor:
    """Return x rounded to codes of 8 bits with one scale and zero point."""
    grid = torch.tensor(scale, dtype=torch.float32), torch.tensor(zero, dtype=torch.uint8)
    codes = call_onnx("QuantizeLinear", (x, *grid), torch.uint8, x.shape)
    return call_onnx("DequantizeLinear", (codes, *grid), torch.float32, x.shape)


def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x as codes of 8 bits, with the scale and zero point that its range needs."""
    shapes, dtypes = (x.shape, (), ()), (torch.uint8, torch.float32, torch.uint8)
    codes, scale, zero = torch.onnx.ops.symbolic_multi_out("DynamicQuantizeLinear", (x,), dtypes=dtypes, shapes=shapes)
    return codes, scale, zero


def fake_quantize_dynamically(x: Tensor) -> Tensor:
    """Return x rounded to codes of 8 bits."""
    return call_onnx("DequantizeLinear", quantize_dynamic(x), torch.float32, x.shape)


def _round_dynamically(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round the first argument of a module's call."""
    if args:
        return (fake_quantize_dynamically(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: fake_quantize_dynamically(kwargs[name])}


def multiply(layer: Any, x: Tensor) -> Tensor:
    """Return x W + b, for codes [inputs, outputs]."""
    y = torch.matmul(x, layer.quantized_weight())
    return y if layer.bias is None else y + layer.bias


def multiply_dynamic(layer: Any, x: Tensor) -> Tensor:
    """Return x W + b, multiplied on codes [inputs, outputs]."""
    weight = layer.quantized_weight
    codes, scale, zero = quantize_dynamic(x)
    shape = (*x.shape[:-1], weight.codes.shape[1])
    sums = call_onnx("MatMulInteger", (codes, weight.codes, zero, weight.zero), torch.int32, shape)
    y = sums.float() * (scale * weight.scale)
    return y if layer.bias is None else y + layer.bias


def convolve_dynamic(layer: Any, x: Tensor) -> Tensor:
    """Return a convolution, computed on codes."""
    weight = layer.quantized_weight
    batch = x if x.dim() == weight.codes.dim() else x.unsqueeze(0)
    kernel, stride, dilation = (list(t) for t in (layer.kernel_size, layer.stride, layer.dilation))
    pads = _pads(layer)
    codes, scale, zero = quantize_dynamic(batch)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    padded = [n + a + b for n, a, b in zip(batch.shape[2:], pads, pads[len(kernel) :])]
    shape = (batch.shape[0], layer.out_channels, *[(n - span) // s + 1 for n, span, s in zip(padded, spans, stride)])
    attributes = {"strides": stride, "dilations": dilation, "pads": pads, "kernel_shape": kernel, "group": layer.groups}
    inputs = (codes, weight.codes, zero, weight.zero.flatten()[0])
    sums = call_onnx("ConvInteger", inputs, torch.int32, shape, **attributes)
    spread = (-1, *[1] * len(kernel))
    y = sums.float() * (scale * weight.scale.reshape(spread))
    y = y if layer.bias is None else y + layer.bias.reshape(spread)
    return y if batch is x else y.squeeze(0)


def _pads(layer: Any) -> list[int]:
    """Return the padding of a convolution: at the beginning of each dimension, then at the end."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        return [*(t // 2 for t in total), *(t - t // 2 for t in total)]
    return [*layer.padding, *layer.padding]


def embed(layer: Any, ids: Tensor) -> Tensor:
    """Return rows of a table that is stored as codes."""
    weight = layer.quantized_weight
    rows = F.embedding(ids, weight.codes).float()
    single = weight.scale.dim() == 0
    scale, zero = (t if single else F.embedding(ids, t.unsqueeze(1)) for t in (weight.scale, weight.zero))
    return (rows if weight.symmetric else rows - zero.float()) * scale


def call_onnx(
    kind: str, inputs: Sequence[Tensor | None], dtype: torch.dtype, shape: Sequence[Any], **attributes: Any
) -> Tensor:
    """Return the output of an ONNX operator, for an export."""
    return torch.onnx.ops.symbolic(kind, inputs, attributes or None, dtype=dtype, shape=shape)


def unshare_zero_points_(graph: Any) -> None:
    """Give each weight zero points of its own: ONNX Runtime cannot read shared ones with x64quantprecision.

    Args:
        graph: a graph of onnx_ir, in which torch's exporter has merged equal constants.
    """
    import onnx_ir as ir

    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.INT8 or len(tensor.shape) > 1:
            continue
        for i, use in enumerate(list(value.uses())[1:]):
            own = ir.Value(name=f"{value.name}_{i + 1}", const_value=ir.tensor(tensor.numpy()))
            own.shape, own.type = tensor.shape, ir.TensorType(tensor.dtype)
            graph.register_initializer(own)
            use.node.replace_input_with(use.idx, own)
