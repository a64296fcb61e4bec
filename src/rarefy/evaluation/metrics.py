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
from rarefy.model import hf
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


def accuracy(model: Model, data: Iterable[Any], *, progress: bool = False) -> float:
    """Return the fraction of (inputs, class) samples whose largest output is the class, between 0 and 1."""
    return accuracies(model, data, progress=progress)["accuracy"]


@torch.no_grad()
def accuracies(model: Model, data: Iterable[Any], *, progress: bool = False) -> dict[str, float]:
    """Return `accuracy`, and where there are more than five classes for a sample also `top-5 accuracy`: the fraction
    of samples whose class is among the five largest outputs."""
    right, among, count, has_five = 0, 0, 0, True
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
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor):
            raise DataError(
                "accuracy needs a model that returns one number for each class, or an output with logits; "
                f"{type(model).__name__} returns {type(logits).__name__}: give a metric of your own"
            )
        if logits.dim() == 3 and _predicts_next_token(model):
            logits, target = logits[:, :-1], target[:, 1:]  # the output at a position predicts the next token
        best = logits.argmax(-1)
        if target.dim() == best.dim() + 1 and target.shape[-1] == 1:
            target = target[..., 0]
        if best.shape != target.shape:
            raise DataError(f"accuracy: outputs give classes {tuple(best.shape)}, labels are {tuple(target.shape)}")
        real = target != -100
        right += int((best == target)[real].sum())
        count += int(real.sum())
        has_five &= logits.dim() == 2 and logits.shape[1] > FIRST
        if has_five:
            among += int((logits.topk(FIRST).indices == target[:, None])[real].any(-1).sum())
    if not count:
        raise DataError(
            "no samples to evaluate: none has a class; name folders of images by the model's classes or their numbers"
        )
    return {"accuracy": right / count} | ({f"top-{FIRST} accuracy": among / count} if has_five else {})


def _predicts_next_token(model: Model) -> bool:
    """Return whether a model is a language model, of transformers or on the engine."""
    return (isinstance(model, nn.Module) and hf.is_causal_lm(model)) or getattr(model, "is_decoder", False)


def _evaluation(model: Model, data: Iterable[Any], text: str, progress: bool) -> Iterable[Any]:
    check_batches(data)
    with evaluating(model):
        yield from (on_device(model, batch) for batch in track(data, text, progress))


FIRST = 5  # largest outputs that the second number of accuracies counts
METRICS: dict[str, Callable[..., float]] = {"perplexity": perplexity, "accuracy": accuracy}
BETTER = {"perplexity": min, "accuracy": max}
