"""What a metric reads of a model's output: one tensor, embeddings of samples, or rows of class scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.common.errors import DataError, ModelError
from rarefy.common.progress import track
from rarefy.model.batches import tensors_in
from rarefy.model.embedding_modules import Head
from rarefy.model.forward import (
    Model,
    call,
    check_batches,
    describe_batch,
    evaluating,
    on_device,
    without_targets,
)

NAMED = ("logits", "last_hidden_state")  # outputs of transformers, the first that exists


def named_output(output: Any, name: str) -> Tensor | None:
    """Return the tensor of that name in an object or dict, or None."""
    value = output.get(name) if hasattr(output, "keys") else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def output_tensor(output: Any) -> Tensor:
    """Return logits, else hidden states, else the first floating tensor of what a model returned.

    Raises:
        DataError: if there is no floating tensor.
        ModelError: if it contains NaN.

    Example:
        >>> output_tensor({"last_hidden_state": torch.ones(1), "logits": torch.zeros(1)})
        tensor([0.])
    """
    named = (t for name in NAMED if (t := named_output(output, name)) is not None)
    tensor = next(named, None)
    if tensor is None:
        tensor = next((t for t in tensors_in(output) if t.is_floating_point()), None)
    if tensor is None:
        raise DataError(f"expected a model that returns a floating tensor, it returns {describe_batch(output)}")
    if bool(tensor.isnan().any()):
        raise ModelError("the outputs contain NaN")
    return tensor


def outputs(model: Model, data: Iterable[Any], text: str, progress: bool) -> Iterator[tuple[Any, Tensor]]:
    """Yield each batch of inputs, without targets, and the model's output tensor for it.

    Args:
        model: a module or any callable.
        data: batches.
        text: label of the progress bar.
        progress: whether to draw it.
    """
    check_batches(data)
    with evaluating(model):
        for batch in track(data, text, progress):
            inputs = on_device(model, without_targets(batch))
            yield inputs, output_tensor(call(model, inputs))


def token_mask(batch: Any, output: Tensor) -> Tensor | None:
    """Return the mask of real tokens [batch, tokens] where the output has a row for each token, else None."""
    if output.dim() != 3:
        return None
    named: Any = batch if hasattr(batch, "keys") else {"input_ids": batch}
    mask = named.get("attention_mask")
    tokens = named.get("input_ids") if mask is None else mask
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.shape != output.shape[:2]:
        return None
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the normalized mean over the real tokens of each text.

    Args:
        hidden: hidden states [batch, tokens, width].
        mask: [batch, tokens], 0 at padding.

    Returns:
        [batch, width], rows of length 1.

    Example:
        >>> pool(torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[0.6000, 0.8000]])
    """
    return F.normalize((hidden * mask[..., None]).sum(1), dim=-1)


def vectors(output: Tensor, batch: Any, head: Head | None = None) -> Tensor:
    """Return a normalized vector for each sample: tokens are pooled, other outputs flattened.

    A single number for each sample says nothing by its direction: all of a batch make one vector then.

    Args:
        output: a model's output.
        batch: its inputs.
        head: makes embeddings of hidden states and mask; by default `pool`.
    """
    mask = token_mask(batch, output)
    if mask is not None:
        return pool(output.float(), mask) if head is None else F.normalize(head(output, mask), dim=-1)
    flat = output.float().reshape(len(output), -1) if output.dim() else output.float().reshape(1, 1)
    return F.normalize(flat.T if flat.shape[1] == 1 else flat, dim=-1)


def class_rows(output: Tensor, batch: Any) -> Iterator[Tensor]:
    """Yield the scores of classes [rows, classes], in fp32, a row for each sample, real token or pixel.

    Classes are the last dimension of two or three, the second of more. One text at a time, because logits are large.

    Raises:
        DataError: for outputs without a dimension of classes.
        ModelError: if a score is infinite; minus infinity is a class that is left out.
    """
    if bool(output.isposinf().any()):
        raise ModelError("the outputs contain inf")
    if output.dim() < 2:
        raise DataError(f"expected outputs with a dimension of classes, [batch, classes], got {describe_batch(output)}")
    mask = token_mask(batch, output)
    if mask is not None:
        yield from (row[real].float() for row, real in zip(output, mask))
    else:
        last = output.movedim(1, -1) if output.dim() > 3 else output
        yield last.reshape(-1, last.shape[-1]).float()


def value_rows(output: Tensor, batch: Any) -> Iterator[Tensor]:
    """Yield the values of a model's output [rows, width], in fp32, a row for each real token or each sample."""
    mask = token_mask(batch, output)
    if mask is not None:
        yield from (row[real].float() for row, real in zip(output, mask))
    else:
        yield output.float().reshape(len(output) if output.dim() else 1, -1)
