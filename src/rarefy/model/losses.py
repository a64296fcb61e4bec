"""The loss of a batch: the model's own, a criterion, or any callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError
from rarefy.model.forward import describe_batch
from rarefy.model.image_config import NO_CLASS

Loss = Callable[[Any, Any], Tensor]


def resolve_loss(loss: Any) -> Loss:
    """Return a function (output, batch) -> loss.

    None is `default_loss`. A criterion such as nn.CrossEntropyLoss() is called with (logits, target), any other
    callable with (output, batch).
    """
    if loss is None:
        return default_loss
    if isinstance(loss, nn.Module):
        return lambda output, batch: _single(loss(getattr(output, "logits", output), _target(batch)))
    if callable(loss):
        return lambda output, batch: _single(loss(output, batch))
    raise DataError(
        f"loss: expected a callable(output, batch) or a criterion such as nn.CrossEntropyLoss(), got {loss!r}"
    )


def _single(value: Any) -> Tensor:
    """Return a loss; DataError for what is no tensor with one number."""
    if not isinstance(value, Tensor):
        name = type(value).__name__
        raise DataError(f"loss: expected a tensor with one number, got {name}: return it without item()")
    if value.numel() != 1:
        raise DataError(f"loss: expected a tensor with one number, got {describe_batch(value)}: use reduction='mean'")
    return value


def _target(batch: Any) -> Any:
    if hasattr(batch, "keys") and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    raise DataError(f"a criterion needs (inputs, target) batches or dicts with labels, got {describe_batch(batch)}")


def has_loss(output: Any, batch: Any) -> bool:
    """Return whether `default_loss` applies: the output has a loss, or the batch is (inputs, classes)."""
    target = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    classes = isinstance(target, Tensor) and not target.is_floating_point()
    return isinstance(getattr(output, "loss", None), Tensor) or (
        classes and isinstance(getattr(output, "logits", output), Tensor)
    )


def default_loss(output: Any, batch: Any) -> Tensor:
    """Return the model's own loss (`output.loss`), or the cross entropy of an (inputs, classes) batch."""
    model_loss = getattr(output, "loss", None)
    if isinstance(model_loss, Tensor):
        return model_loss
    if has_loss(output, batch):
        logits, target = getattr(output, "logits", output), batch[1]
        if target.dim() == 0 or target.dtype == torch.bool:
            raise DataError(f"expected classes as integers [samples], got {describe_batch(target)}")
        target = target.long()
        classes = target[target != NO_CLASS]
        if classes.numel() and logits.dim() > 1 and not 0 <= int(classes.min()) <= int(classes.max()) < logits.shape[1]:
            wrong = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
            raise DataError(
                f"expected classes from 0 to {logits.shape[1] - 1}, as the model has outputs, or {NO_CLASS} for "
                f"samples to leave out, got {wrong}"
            )
        if logits.dim() > 1 and len(logits) != len(target):
            raise DataError(f"the model returns outputs of {len(logits)} samples, the batch has {len(target)} classes")
        return F.cross_entropy(logits.float(), target)
    raise DataError(
        "no loss: the model's output has no .loss (are there labels in the batch?) and the batch is not "
        "(inputs, integer classes); pass loss=callable(output, batch)"
    )


def check_finite(loss: Tensor, index: int) -> Tensor:
    """Return the loss of a calibration batch; raise ModelError if it is NaN or infinite."""
    if not torch.isfinite(loss).all():
        raise ModelError(
            f"the loss of calibration batch {index} is {float(loss.detach())}: "
            "NaN or inf in weights or inputs, or no label but -100"
        )
    return loss
