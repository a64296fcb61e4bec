"""What models and examples have to be for `compile` and decoders, and the copy without masks that they run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError, first_line, unknown
from rarefy.compiler.executor import Compiled
from rarefy.compiler.half_precision import model_dtype
from rarefy.compiler.layer_precision import PRECISIONS
from rarefy.model.forward import describe_batch
from rarefy.model.layers import all_layers, unwrap
from rarefy.model.masks import attached_layers, fold_attached_
from rarefy.runtime.accelerate import check_plain

DIFFERS_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def check_precision(precision: Any, known: Sequence[str] = PRECISIONS) -> None:
    """Raise ModelError for a precision that the engine does not have."""
    if precision is not None and precision not in known:
        raise ModelError(unknown("precision", str(precision), known))


def check_module(model: Any) -> None:
    """Raise ModelError for what is not a torch module, or under settings of torch that change what a model computes."""
    if not isinstance(model, nn.Module):
        reader = "from_onnx(file)" if str(model).endswith(".onnx") else "load(folder)"
        hints = {str | PathLike: f": rarefy.{reader} reads one", Compiled: ": it is compiled already"}
        hint = next((h for kind, h in hints.items() if isinstance(model, kind)), "")
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}{hint}")
    if unwrap(model) is not model:
        inside = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise ModelError(f"{type(model).__name__} wraps a model: compile the model itself, model.{inside}")
    if torch.is_autocast_enabled("cpu"):
        raise ModelError("autocast is on: compile outside of torch.autocast, with precision= instead")
    if torch.get_default_device().type != "cpu":
        got = torch.get_default_device()
        raise ModelError(
            f"torch's default device is {got}, the engine runs on the CPU: compile under torch.device('cpu')"
        )


def check_example(leaves: Sequence[Any]) -> None:
    """Raise DataError for an example without numbers to compare: no tensor, an empty one, or NaN."""
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    if not tensors:
        array = any(type(t).__module__ == "numpy" for t in leaves)
        hint = ", as tensors: torch.from_numpy(array)" if array else ""
        raise DataError(f"the example has no tensor: give what the model is called with{hint}")
    empty = next((t for t in tensors if not t.numel()), None)
    if empty is not None:
        raise DataError(f"the example has an empty tensor, {describe_batch(empty)}: give at least one sample")
    if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors):
        raise DataError("the example has NaN: outputs are compared on it, so give ordinary inputs")


def fold_copy(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model without masks and grids, and notes about that.

    A model with masks is copied and the copy is folded; all tensors without masks are shared with the model.
    """
    attached = attached_layers(model)
    if not attached:
        return model, ()
    masked = {id(layer.original) for layer in attached}
    tensors = [*model.parameters(), *model.buffers()]
    try:
        model = copy.deepcopy(model, {id(t): t for t in tensors if id(t) not in masked})
    except Exception as error:  # raised by whatever the model holds
        name = type(model).__name__
        raise ModelError(f"{name} has masks and cannot be copied: fold_ it first ({first_line(error)})") from error
    note = fold_attached_(model)
    return model, () if note is None else (f"{note}, in a copy of the model",)


def check_ready(model: nn.Module) -> torch.dtype:
    """Return the type of a model's parameters; ModelError for a model in a state that the engine cannot run."""
    if model.training:
        raise ModelError("the model is in training mode: call eval() first")
    part = next((n for n, m in model.named_modules() if m.training and isinstance(m, DIFFERS_IN_TRAINING)), None)
    if part is not None:
        raise ModelError(f"{part} is in training mode: call eval() on the whole model")
    check_plain(list(all_layers(model)))
    named = [*model.named_parameters(), *model.named_buffers()]
    elsewhere = next((n for n, t in named if t.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ModelError(f"the engine runs on the CPU, but {elsewhere} is on another device: call model.cpu() first")
    wrong = next((n for n, p in model.named_parameters() if not p.is_meta and bool(p.isnan().any())), None)
    if wrong is not None:
        raise ModelError(f"{wrong} has NaN: outputs could not be compared")
    return model_dtype(model)
