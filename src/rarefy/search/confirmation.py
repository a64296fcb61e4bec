"""Measure the best models once more, on evaluation data that the search has not used.

A search compares many models on the same samples, so the best of them is partly the luckiest. A third of the
evaluation data is therefore held back. The fastest model that also keeps the largest loss there is the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rarefy.common.errors import RarefyError, first_line
from rarefy.common.progress import say
from rarefy.model.batches import count_samples
from rarefy.search.points import Measured, digest_of
from rarefy.search.targets import NOISE

SHARE = 3  # of so many batches for evaluation the last is held back
MIN_SAMPLES = 100  # held back; fewer would say less than the search knows
ATTEMPTS = 4  # models that are measured once more
LATE = 1.1  # of the time of the search, after which no other model is made again


def hold_back(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the evaluation batches that the search uses, and those that are held back: none of few samples.

    >>> import torch
    >>> used, held_back = hold_back([torch.zeros(50, 4)] * 9)
    >>> len(used), len(held_back)
    (6, 3)
    """
    first = len(batches) - len(batches) // SHARE
    if sum(map(_count, batches[first:])) < MIN_SAMPLES:
        return list(batches), []
    return list(batches[:first]), list(batches[first:])


def _count(batch: Any) -> int:
    """Return the number of samples of a batch: of pairs of texts, of (inputs, target), or of inputs alone."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and hasattr(batch[0], "keys")
    return count_samples(batch[0] if pair else batch)


def confirm(search: Measured) -> tuple[int | None, bool, list[str]]:
    """Return the best point that keeps the largest loss on the data held back too, whether there is one, and notes.

    The points that were measured once more get their `checked_loss`. Where none keeps the limit, the one that loses
    least there is the best. Cost: up to `ATTEMPTS` models are made again and evaluated.
    """
    targets, metric = search.task.targets, search.task.check
    index, met = targets.best(search.points)
    if metric is None or index is None or search.points[index] is search.reference:
        return index, met, []
    limit = targets.max_loss if met else None
    try:
        dense = search.journal.get("check of the dense model", lambda: metric.measure(search.dense_fast))
        if not targets.points and abs(dense) < NOISE:
            return index, met, []
        checked: dict[int, float] = {}
        for i in _candidates(search, index) if limit is not None else [index]:
            if checked and not _has_time(search, i):
                break
            quality = search.journal.get(
                f"check of {digest_of(search.points[i].recipe, search.points[i])}", lambda i=i: _measure(search, i)
            )
            checked[i] = targets.loss(dense, quality, metric.higher_is_better)
            search.points[i] = replace(search.points[i], checked_loss=checked[i])
            if limit is None or checked[i] <= limit:
                return i, met, []
    except RarefyError as error:
        return index, met, [f"the data held back could not be evaluated: {first_line(error, 200)}"]
    return min(checked, key=lambda i: checked[i]), False, []


def _candidates(search: Measured, best: int) -> list[int]:
    """Return the points that keep all limits on the search's own data, the best first."""
    targets = search.task.targets
    others = {
        i: p
        for i, p in enumerate(search.points)
        if i != best and p is not search.reference and p.loss is not None and targets.keeps(p)
    }
    return [best, *sorted(others, key=lambda i: targets.value(others[i]))][:ATTEMPTS]


def _has_time(search: Measured, index: int) -> bool:
    return search.elapsed() + search.points[index].seconds <= LATE * search.seconds


def _measure(search: Measured, index: int) -> float:
    """Return the quality of a point's model on the data held back; the model is kept as that of the best point."""
    assert search.task.check is not None
    if search.task.progress:
        say([f"{search.elapsed() / 60:5.1f} min  {search.points[index].name}, on data held back"])
    model, deployed = search.models_of(index)
    search.best_models = (index, model, deployed)
    return search.task.check.measure(deployed)
