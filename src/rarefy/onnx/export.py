"""Quantized models as ONNX with QuantizeLinear and DequantizeLinear, which ONNX Runtime makes integer operators of."""

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
from rarefy.model.layers import all_layers, unwrap
from rarefy.model.masks import fold_
from rarefy.model.quant_grid import Grid, get_grid


def export_onnx(model: nn.Module, example: Any, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `model` in evaluation mode as an ONNX file whose first dimension stays open (others are the example's);
    return its path.

    example   what the model is called with: a tensor, a tuple of them, or a dict of keywords
    Weights of 8 bits with a scale an output or tensor are stored in 8 bits and dequantized (QDQ), inputs that are
    rounded statically are quantized before their layer; all else is stored as the numbers that it is. Needs the extra
    [export]. Raises ContainerError (something is in the way), ModelError (rows rounded in each call, which ONNX has no
    operator for; a model that torch cannot export). O(weights).
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise ContainerError(f"{path} exists: pass overwrite=True, or give another name")
    _check_packages()
    dynamic = [n for n, m in model.named_modules() if (i := get_activation_quant(m)) is not None and i.scale is None]
    if dynamic:
        raise ModelError(
            f"{dynamic[0]} rounds its inputs row by row, for which ONNX has no operator: quantize_ with "
            "activations='int8-static'"
        )
    half = next((n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if half is not None:
        raise ModelError(f"{half} is {str(model.get_parameter(half).dtype).removeprefix('torch.')}: cast to fp32 first")
    made = fold_(copy.deepcopy(unwrap(model))).eval()
    for layer in all_layers(made):
        grid = get_grid(layer)
        axis = None if grid is None else _axis(grid)
        if isinstance(grid, Grid) and axis is not None and len(layer.owners) == 1:
            parametrize.register_parametrization(layer.module, layer.param, _Stored(layer.weight.detach(), grid, axis))
    for module in made.modules():
        inputs = get_activation_quant(module)
        if inputs is not None:
            set_activation_quant_(module, None)
            module.register_forward_pre_hook(_QuantizeInput(inputs), with_kwargs=True)
    config: Any = getattr(made, "config", None)
    if getattr(config, "use_cache", None) is True:
        config.use_cache = False  # keys and values of another call are no output that ONNX has a form for
    given = dict(example) if hasattr(example, "keys") else {}
    args = () if given else example if isinstance(example, tuple) else (example,)
    strange = [type(a).__name__ for a in (*args, *given.values()) if not isinstance(a, Tensor)]
    if strange:
        raise ModelError(f"example is a tensor, a tuple of tensors, or a dict of them; it holds {strange[0]}")
    program = _exported(made, args, given)
    with container_errors(path):
        write_bytes_atomic(path, program.model_proto.SerializeToString())
    return path


def _check_packages() -> None:
    try:
        import onnxscript  # noqa: F401
        from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers the operators)
    except ImportError as error:
        raise ModelError(f"ONNX needs more packages: pip install 'rarefy[export]' ({error})") from None


def _exported(model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = tuple({0: batch} if a.dim() else None for a in args)
    if given:
        shapes = {k: {0: batch} if a.dim() else None for k, a in given.items()}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how: dict[str, Any] = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False, "optimize": True}
            return torch.onnx.export(model, args, kwargs=given or None, **how)
    except Exception as error:  # torch raises whatever its stages do
        cause: BaseException = error
        while cause.__cause__ is not None:  # what a stage says is behind what torch says of the stage
            cause = cause.__cause__
        raise ModelError(f"torch cannot export this {type(model).__name__} to ONNX: {first_line(cause)}") from error
    finally:
        quiet.setLevel(level)


def _axis(grid: Any) -> int | None:
    """Which dimension of a weight has scales of its own: 0 where all have one, None where ONNX would not read it so."""
    if not isinstance(grid, Grid) or grid.bits != 8 or grid.zero is not None:
        return None
    wide = [d for d, n in enumerate(grid.scale.shape) if n > 1]
    return None if len(wide) > 1 else wide[0] if wide else 0


class _Stored(nn.Module):
    """Parametrization: the weight out of its codes, as an operator that ONNX knows."""

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
        do: Any = torch.ops.quantized_decomposed.dequantize_per_channel
        return do(self.codes, self.scale, self.zeros, self.axis, -128, 127, torch.int8)


class _QuantizeInput:
    """A hook that rounds what a module is called with by operators that ONNX knows."""

    def __init__(self, inputs: ActivationQuant):
        self.how = (inputs.scale, inputs.zero, 0, 255, torch.uint8)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ops: Any = torch.ops.quantized_decomposed

        def rounded(x: Tensor) -> Tensor:
            return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *self.how), *self.how)

        if args:
            return (rounded(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: rounded(kwargs[first])}
