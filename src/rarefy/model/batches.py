"""Batches of any kind: what tensors they hold, how many samples, and parts of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors in nested dicts, tuples and lists."""
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, tuple | list) else ()
    return [t for part in parts for t in tensors_in(part)]


def count_tokens(batch: Any) -> int:
    """Return how many tokens (or samples) a batch holds, padding left out: its weight in every average."""
    if hasattr(batch, "keys"):
        mask = batch.get("attention_mask")
        if mask is not None:
            return int(mask.sum())
        first = next((v for v in batch.values() if isinstance(v, Tensor)), None)
    else:
        first = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(first, Tensor) or not first.dim():
        return 1
    return first.numel() if first.dtype in (torch.int64, torch.int32) else len(first)


def count_samples(batch: Any) -> int:
    """Return how many of what `order` runs a batch holds: samples, or 1 where its tensors do not say."""
    one = tensors_in(first_samples(batch))
    return len(tensors_in(batch)[0]) if one and one[0].dim() and len(one[0]) == 1 else 1


def first_samples(batch: Any, n: int = 1) -> Any:
    """Return the first samples of a batch whose tensors agree on their first dimension, else the batch."""
    if isinstance(batch, Tensor):
        return batch[:n] if batch.dim() else batch
    tensors = list(batch.values()) if hasattr(batch, "keys") else list(batch) if isinstance(batch, tuple | list) else []
    sizes = {len(t) if isinstance(t, Tensor) and t.dim() else None for t in tensors}
    if len(sizes) != 1 or None in sizes:
        return batch
    if hasattr(batch, "keys"):
        return {k: batch[k][:n] for k in batch}
    return tuple(t[:n] for t in batch)


def take_tokens(data: Iterable[Any], tokens: int, each: int | None = None) -> list[Any]:
    """Return the first batches that hold `tokens` tokens (or samples, where these are no text) together, the last one
    cut to whole samples, and each one to about `each` tokens.

    >>> import torch
    >>> [len(b) for b in take_tokens([torch.ones(8, 3), torch.ones(8, 3), torch.ones(8, 3)], 10)]
    [8, 2]
    """
    few, left = list[Any](), tokens
    for batch in data:
        if left <= 0:
            break
        long = max(1.0, count_tokens(batch) / count_samples(batch))
        n = math.ceil(left / long) if each is None else min(math.ceil(left / long), int(each / long))
        part = first_samples(batch, max(1, n))
        few.append(part)
        left -= count_tokens(part)
    return few


def split_batch(batch: Any, most: int) -> list[Any]:
    """Return a batch in at most `most` parts of whole samples, as equal as they come.

    >>> import torch
    >>> [len(p) for p in split_batch(torch.ones(5, 2), 3)]
    [2, 2, 1]
    """
    count = count_samples(batch)
    size = math.ceil(count / max(1, min(most, count)))
    return [batch] if size >= count else [slice_batch(batch, i, i + size) for i in range(0, count, size)]


def slice_batch(batch: Any, low: int, high: int) -> Any:
    """Return the samples from `low` to `high` of a batch."""
    if isinstance(batch, Tensor):
        return batch[low:high]
    if hasattr(batch, "keys"):
        return {k: batch[k][low:high] for k in batch}
    return tuple(t[low:high] for t in batch)
