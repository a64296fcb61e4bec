"""Batches of any kind (tensor, tuple, list, dict): their tensors, their sizes, and parts of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError

FILLED = {"attention_mask": 1, "token_type_ids": 0}  # what a model of texts assumes where they are left out


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors in nested dicts, tuples, lists and dataclasses."""
    if isinstance(batch, Tensor):
        return [batch]
    fields = dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping)
    batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)} if fields else batch
    parts = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, tuple | list) else ()
    return [t for part in parts for t in tensors_in(part)]


def first_tensor(out: Any) -> Tensor:
    """Return the first tensor of a module's output. Raises ModelError if there is none."""
    tensors = tensors_in(out)
    if not tensors:
        raise ModelError(f"a block returns {type(out).__name__} without a tensor: leave reconstruct out")
    return tensors[0]


def distinct_tensors(batch: Any) -> Any:
    """Return a batch in which each tensor is its own: torch.export takes one that is given twice for a single input.

    >>> t = torch.ones(1)
    >>> a, b = distinct_tensors((t, t))
    >>> a is t, b is t
    (True, False)
    """
    seen: set[int] = set()

    def own(t: Tensor) -> Tensor:
        repeated = id(t) in seen
        seen.add(id(t))
        return t.clone() if repeated else t

    return pytree.tree_map_only(Tensor, own, batch)


def with_masks(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return inputs of a model of texts with those of these names that change nothing: no padding, one segment.

    >>> with_masks({"input_ids": torch.tensor([[5, 7]])}, ["attention_mask"])["attention_mask"]
    tensor([[1, 1]])
    """
    like = next((t for t in inputs.values() if isinstance(t, Tensor) and t.dim() == 2), None)
    missing = [n for n in names if n in FILLED and n not in inputs and like is not None]
    return {**inputs, **{n: torch.full(like.shape, FILLED[n]) for n in missing}}  # type: ignore[union-attr]


def count_tokens(batch: Any) -> int:
    """Return the number of tokens (or samples) of a batch without padding. It is the batch's weight in every
    average.
    """
    if hasattr(batch, "keys"):
        mask = batch.get("attention_mask")
        if mask is not None:
            return int(mask.sum())
        first = next((v for v in batch.values() if isinstance(v, Tensor)), None)
    else:
        first = batch[0] if isinstance(batch, tuple | list) else batch
        if hasattr(first, "keys"):  # of (inputs, target)
            return count_tokens(first)
    if not isinstance(first, Tensor) or not first.dim():
        return 1
    return first.numel() if first.dtype in (torch.int64, torch.int32) else len(first)


def count_samples(batch: Any) -> int:
    """Return the number of samples of a batch, or 1 if its tensors do not agree on one."""
    first = tensors_in(first_samples(batch))
    return len(tensors_in(batch)[0]) if first and first[0].dim() and len(first[0]) == 1 else 1


def first_samples(batch: Any, n: int = 1) -> Any:
    """Return the first n samples of a batch, or the whole batch if its tensors differ in their first dimension."""
    sizes = {len(t) if t.dim() else None for t in tensors_in(batch)}
    return batch if len(sizes) != 1 or None in sizes else slice_batch(batch, 0, n)


def take_tokens(data: Iterable[Any], tokens: int, max_tokens: int | None = None) -> list[Any]:
    """Return the first batches, which together hold about `tokens` tokens (or samples, if they are not text).

    The last batch is shortened to whole samples, and every batch to at most about `max_tokens`.

    >>> import torch
    >>> [len(b) for b in take_tokens([torch.ones(8, 3), torch.ones(8, 3), torch.ones(8, 3)], 10)]
    [8, 2]
    """
    parts, missing = list[Any](), tokens
    for batch in data:
        if missing <= 0:
            break
        tokens_per_sample = max(1.0, count_tokens(batch) / count_samples(batch))
        n = (
            math.ceil(missing / tokens_per_sample)
            if max_tokens is None
            else min(math.ceil(missing / tokens_per_sample), int(max_tokens / tokens_per_sample))
        )
        part = first_samples(batch, max(1, n))
        parts.append(part)
        missing -= count_tokens(part)
    return parts


def split_batch(batch: Any, max_parts: int) -> list[Any]:
    """Split a batch into at most `max_parts` parts of whole samples, of nearly equal size.

    >>> import torch
    >>> [len(p) for p in split_batch(torch.ones(5, 2), 3)]
    [2, 2, 1]
    """
    count = count_samples(batch)
    size = math.ceil(count / max(1, min(max_parts, count)))
    return [batch] if size >= count else [slice_batch(batch, i, i + size) for i in range(0, count, size)]


def slice_batch(batch: Any, start: int, end: int) -> Any:
    """Return the samples from `start` to `end` of a batch; what is no tensor, such as a flag, stays as it is."""
    if isinstance(batch, Tensor):
        return batch[start:end] if batch.dim() else batch
    if hasattr(batch, "keys"):
        return {k: slice_batch(batch[k], start, end) for k in batch}
    if isinstance(batch, tuple | list):
        return tuple(slice_batch(part, start, end) for part in batch)
    return batch
