"""Quality on held-out data: perplexity and accuracy, weighted by token, without padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.common.errors import DataError
from rarefy.common.progress import track
from rarefy.model.forward import (
    Model,
    call,
    check_batches,
    describe_batch,
    evaluating,
    on_device,
    without_targets,
)


@torch.no_grad()
def perplexity(model: Model, data: Iterable[Any], *, progress: bool = False) -> float:
    """Return exp of the mean negative log likelihood of the next token over all real tokens of `data`.

    data: dicts with `input_ids` [batch, tokens] and optionally `attention_mask`. Raises DataError on other batches.
    """
    total, count = 0.0, 0
    for batch in _evaluation(model, data, "perplexity", progress):
        if not hasattr(batch, "keys") or "input_ids" not in batch:
            raise DataError(f"perplexity needs batches with input_ids, got {describe_batch(batch)}")
        out = call(model, without_targets(batch))
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != batch["input_ids"].shape:
            raise DataError(
                f"perplexity needs a language model with logits [batch, tokens, vocabulary]; {type(model).__name__} "
                f"gives {describe_batch(logits) if isinstance(logits, Tensor) else type(out).__name__}"
            )
        ids, mask = batch["input_ids"][:, 1:], batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else (mask[:, 1:] * mask[:, :-1]).bool()
        for row, target, keep in zip(logits[:, :-1], ids, real):  # one row at a time, because logits are large
            total += float(F.cross_entropy(row[keep].float(), target[keep], reduction="sum"))
            count += int(keep.sum())
    if not count:
        raise DataError("no tokens to evaluate: each sample needs at least two tokens")
    return math.exp(min(total / count, 700.0))


@torch.no_grad()
def accuracy(model: Model, data: Iterable[Any], *, progress: bool = False) -> float:
    """Return the fraction of (inputs, class) samples whose largest output is the class, between 0 and 1."""
    right, count = 0, 0
    for batch in _evaluation(model, data, "accuracy", progress):
        target = (
            batch.get("labels")
            if hasattr(batch, "keys")
            else batch[1]
            if isinstance(batch, tuple | list) and len(batch) == 2
            else None
        )
        if not isinstance(target, Tensor):
            raise DataError(f"accuracy needs (inputs, class) batches or dicts with labels, got {describe_batch(batch)}")
        out = call(model, batch if isinstance(model, nn.Module) else without_targets(batch))
        best = getattr(out, "logits", out).argmax(-1)
        if target.dim() == best.dim() + 1 and target.shape[-1] == 1:
            target = target[..., 0]
        if best.shape != target.shape:
            raise DataError(f"accuracy: outputs give classes {tuple(best.shape)}, labels are {tuple(target.shape)}")
        real = target != -100
        right += int((best == target)[real].sum())
        count += int(real.sum())
    if not count:
        raise DataError("no samples to evaluate")
    return right / count


def _evaluation(model: Model, data: Iterable[Any], text: str, progress: bool) -> Iterable[Any]:
    check_batches(data)
    with evaluating(model):
        yield from (on_device(model, batch) for batch in track(data, text, progress))


METRICS: dict[str, Callable[..., float]] = {"perplexity": perplexity, "accuracy": accuracy}
BETTER = {"perplexity": min, "accuracy": max}
