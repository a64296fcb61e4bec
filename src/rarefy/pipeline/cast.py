"""`cast_`: the floating-point type of a model's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.common.report import Report
from rarefy.evaluation import profiling
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.layers import check_is_module
from rarefy.model.quant_grid import GridParametrization
from rarefy.recipe.schema import CastOptions
from rarefy.runtime.sparse_layers import Sparse

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cast_(model: nn.Module, dtype: str) -> Report:
    """Convert the floating-point parameters and saved buffers of a model, in place.

    Buffers that a model computes for itself and does not save (rotary frequencies) keep their type, and so do the
    scales of quantized weights.

    Args:
        model: any module that is not accelerated yet.
        dtype: "bf16", "fp16" or "fp32".

    Returns:
        The new type and the bytes of the model in memory.

    Raises:
        RecipeError: for another dtype.
        ModelError: where a weight would overflow, or the model is accelerated; the model is then unchanged.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> cast_(net, "bf16").summary["bytes"], net.weight.dtype
        (12, torch.bfloat16)
    """
    return run_cast(model, CastOptions(dtype=dtype))


def run_cast(model: nn.Module, options: CastOptions) -> Report:
    """Cast a model by checked options. See `cast_`."""
    check_is_module(model)
    to = DTYPES[options.dtype]
    fixed = next((n for n, m in model.named_modules() if isinstance(m, Sparse)), None)
    if fixed is not None:
        raise ModelError(f"{fixed} runs on kernels chosen for its numbers: cast before accelerate_")
    for name, tensor in _floating_state(model):
        if torch.isfinite(tensor).all() and not torch.isfinite(tensor.to(to)).all():
            largest = float(tensor.detach().abs().max())
            raise ModelError(f"{name} has values that {options.dtype} cannot hold (largest {largest:g})")
    for _, tensor in _floating_state(model):
        tensor.data = tensor.data.to(to)
    forget_receipt(model)
    return Report("cast", (), {"dtype": options.dtype, "bytes": profiling.resident_bytes(model)})


def _floating_state(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Return the tensors that a cast converts: all except quantization scales, which must stay exact."""
    scales = {id(m.scale) for m in model.modules() if isinstance(m, GridParametrization)}
    state = model.state_dict(keep_vars=True).items()
    return ((n, t) for n, t in state if isinstance(t, Tensor) and t.is_floating_point() and id(t) not in scales)
