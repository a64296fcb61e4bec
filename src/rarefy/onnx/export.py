"""Export models to ONNX, quantized ones with QuantizeLinear and DequantizeLinear (QDQ) nodes, which ONNX Runtime fuses
into integer operators."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.common.atomic_io import container_errors, write_bytes_atomic
from rarefy.common.errors import ContainerError, ModelError, first_line
from rarefy.model.activation_quant import ActivationQuant, get_activation_quant, set_activation_quant_
from rarefy.model.batches import distinct_tensors
from rarefy.model.layers import all_layers, unwrap
from rarefy.model.masks import fold_
from rarefy.model.quant_grid import Grid, get_grid


def export_onnx(model: nn.Module, example: Any, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model in evaluation mode as an ONNX file; masks and grids are folded into what is written.

    8-bit weights with one scale, or one for each output, are stored in 8 bits with a DequantizeLinear node. Statically
    quantized activations get QuantizeLinear and DequantizeLinear nodes. Everything else is stored in fp32. Needs the
    extra [export]. O(weights).

    Args:
        model: an fp32 model.
        example: what the model is called with: a tensor, a tuple of tensors, or a dict of keyword arguments. The first
            dimension of each tensor becomes dynamic; the others are fixed.
        path: the file to write.
        overwrite: replace an existing file.

    Returns:
        The path.

    Raises:
        ContainerError: the file exists, or cannot be written.
        ModelError: activations are quantized dynamically, for which ONNX has no operator; the model is not fp32; torch
            cannot export it; or a package is missing.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> export_onnx(net, torch.randn(1, 4), tempfile.mkdtemp() + "/net.onnx").name
        'net.onnx'
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise ContainerError(f"{path} exists: pass overwrite=True, or give another name")
    _check_packages()
    _check_exportable(model)
    folded = _with_qdq(model)
    kwargs = dict(example) if hasattr(example, "keys") else {}
    args = () if kwargs else example if isinstance(example, tuple) else (example,)
    other = [type(a).__name__ for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
    if other:
        raise ModelError(f"example: expected a tensor, a tuple of tensors or a dict of tensors; it holds {other[0]}")
    program = _export(folded, args, kwargs)
    with container_errors(path):
        write_bytes_atomic(path, program.model_proto.SerializeToString())
    return path


def _check_exportable(model: nn.Module) -> None:
    """Raise ModelError for dynamically quantized activations, and for weights that are not fp32."""
    quants = ((n, get_activation_quant(m)) for n, m in model.named_modules())
    dynamic = next((n for n, quant in quants if quant is not None and quant.scale is None), None)
    if dynamic is not None:
        raise ModelError(
            f"{dynamic} quantizes its inputs row by row, for which ONNX has no operator: quantize_ with "
            "activations='int8-static'"
        )
    half = next((n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if half is not None:
        raise ModelError(f"{half} is {str(model.get_parameter(half).dtype).removeprefix('torch.')}: cast to fp32 first")


def _with_qdq(model: nn.Module) -> nn.Module:
    """A folded copy of a model whose quantized weights and inputs are computed by operators that ONNX has."""
    folded = fold_(copy.deepcopy(unwrap(model))).eval()
    for layer in all_layers(folded):
        grid = get_grid(layer)
        axis = None if grid is None else _scale_axis(grid)
        if isinstance(grid, Grid) and axis is not None and len(layer.owners) == 1:
            codes = _DequantizeWeight(layer.weight.detach(), grid, axis)
            parametrize.register_parametrization(layer.module, layer.param, codes)
    for module in folded.modules():
        inputs = get_activation_quant(module)
        if inputs is not None:
            set_activation_quant_(module, None)
            module.register_forward_pre_hook(_QuantizeInput(inputs), with_kwargs=True)
    config: Any = getattr(folded, "config", None)
    if getattr(config, "use_cache", None) is True:
        config.use_cache = False  # a key-value cache is not an output that ONNX can have
    return folded


def _check_packages() -> None:
    try:
        import onnxscript  # noqa: F401
        from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers the operators)
    except ImportError as error:
        raise ModelError(f"ONNX needs more packages: pip install '.[onnx]' in Rarefy's folder ({error})") from None


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = distinct_tensors((args, kwargs))
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = tuple({0: batch} if a.dim() else None for a in args)
    if kwargs:
        shapes = {k: {0: batch} if a.dim() else None for k, a in kwargs.items()}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False, "optimize": True}
            return torch.onnx.export(model, args, kwargs=kwargs or None, **options)
    except Exception as error:  # torch raises many kinds of errors
        cause: BaseException = error
        while cause.__cause__ is not None:  # the cause is in the last one
            cause = cause.__cause__
        raise ModelError(f"torch cannot export this {type(model).__name__} to ONNX: {first_line(cause)}") from error
    finally:
        logger.setLevel(level)


def _scale_axis(grid: Any) -> int | None:
    """The dimension along which a weight's scales differ, 0 for a single scale; None for grids that ONNX cannot
    express."""
    if not isinstance(grid, Grid) or grid.bits != 8 or grid.zero is not None:
        return None
    axes = [d for d, n in enumerate(grid.scale.shape) if n > 1]
    return None if len(axes) > 1 else axes[0] if axes else 0


class _DequantizeWeight(nn.Module):
    """Parametrization: the weight dequantized from its codes, by an operator that ONNX has."""

    codes: Tensor
    scale: Tensor
    zeros: Tensor

    def __init__(self, weight: Tensor, grid: Grid, axis: int):
        super().__init__()
        self.axis = axis
        scale = grid.scale.float().flatten()
        self.register_buffer("codes", grid.codes(weight).to(torch.int8))
        self.register_buffer("scale", scale.expand(weight.shape[axis]).contiguous() if len(scale) == 1 else scale)
        self.register_buffer("zeros", torch.zeros(len(self.scale), dtype=torch.int64))

    def forward(self, weight: Tensor) -> Tensor:
        dequantize: Any = torch.ops.quantized_decomposed.dequantize_per_channel
        return dequantize(self.codes, self.scale, self.zeros, self.axis, -128, 127, torch.int8)


class _QuantizeInput:
    """Forward hook that quantizes and dequantizes the input of a module, by operators that ONNX has."""

    def __init__(self, inputs: ActivationQuant):
        self.options = (inputs.scale, inputs.zero, 0, 255, torch.uint8)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ops: Any = torch.ops.quantized_decomposed

        def fake_quantize(x: Tensor) -> Tensor:
            return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *self.options), *self.options)

        if args:
            return (fake_quantize(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: fake_quantize(kwargs[first])}
