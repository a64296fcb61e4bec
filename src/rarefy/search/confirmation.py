"""Measure the best models once more: on evaluation data that the search has not used, and their times.

A search compares many models on the same samples and times each once, so the best of them is partly the luckiest. A
third of the evaluation data is therefore held back, and the best model is timed again. If it keeps all limits, it is
the result. Else the search goes on with a limit that is smaller by the factor by which the model loses more on these
data, and the best of the models that should keep the limit is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rarefy.common.errors import RarefyError, first_line
from rarefy.common.progress import say
from rarefy.model import hf
from rarefy.model.batches import count_samples, slice_batch
from rarefy.search.deploy import Deployed
from rarefy.search.frontier import Point
from rarefy.search.points import Measured, digest_of, with_times
from rarefy.search.smoothing import smoothed
from rarefy.search.targets import NOISE
from rarefy.search.task import Task

SHARE = 3  # of so many batches for evaluation the last is held back
MIN_SAMPLES = 100  # held back; fewer would say less than the search knows
COUNTED = ("accuracy", "agreement", "retrieval R@")  # metrics that count samples
ATTEMPTS = 4  # models that are measured once more
MIN_SECONDS = 150.0  # of a search whose best model is timed once more
INTERRUPTED = "the best models were not all measured once more: the search was interrupted"
LATE = 1.1  # of the time of the search, after which no other model is made again


def hold_back(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the evaluation batches that the search uses, and those that are held back: none of few samples.

    Fewer batches than `SHARE` are divided first.

    >>> import torch
    >>> used, held_back = hold_back([torch.zeros(50, 4)] * 9)
    >>> len(used), len(held_back)
    (6, 3)
    >>> [len(part[0]) for part in hold_back([torch.zeros(600, 4)])]
    [200, 200]
    """
    parts = [*batches] if len(batches) >= SHARE else [part for batch in batches for part in _divided(batch)]
    first = len(parts) - len(parts) // SHARE
    if sum(map(count_evaluated, parts[first:])) < MIN_SAMPLES:
        return list(batches), []
    return parts[:first], parts[first:]


def _divided(batch: Any) -> list[Any]:
    """Return a batch in as many parts as `SHARE`, without empty ones."""
    count = count_evaluated(batch)
    ends = [count * i // SHARE for i in range(SHARE + 1)]
    return [slice_batch(batch, a, b) for a, b in pairwise(ends) if b > a]


def count_evaluated(batch: Any) -> int:
    """Return the number of samples of a batch: of pairs of texts, of (inputs, target), or of inputs alone."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and hasattr(batch[0], "keys")
    return count_samples(batch[0] if pair else batch)


def too_few_samples(task: Task, dense: Point) -> list[str]:
    """Return a note where so few samples are counted that the largest loss is within their noise.

    Of n samples none of which is lost, up to 3 / n may be (a one-sided 95 % interval).
    """
    name, limit = task.metric.name, task.targets.max_loss
    if not name.startswith(COUNTED) or not limit or limit <= 0 or not task.num_samples or hf.is_causal_lm(task.dense):
        return []
    whole = 100.0 if task.metric.scale == "%" else 1.0
    limit = limit / whole if task.targets.points else limit * (dense.quality or 0.0) / whole
    if 3 / task.num_samples <= limit:
        return []
    return [
        f"{task.num_samples} samples for evaluation are few for a loss of {100 * limit:.2g} %: even if none of them is "
        f"lost, up to {300 / task.num_samples:.2g} % of others may be; give more"
    ]


def confirm(search: Measured, search_again: Callable[[float], None]) -> tuple[int | None, bool, list[str]]:
    """Return the best point that keeps all limits when it is measured once more, whether there is one, and notes.

    The points that were measured once more get their `checked_loss` and new times. Where none keeps the limits, the
    dense model is the best if it does, else the one that comes nearest. Cost: up to `ATTEMPTS` models are made again,
    timed and evaluated.

    Args:
        search: what was measured.
        search_again: goes on with the search; it is given by which factor the limit of loss has to be smaller.
    """
    targets, notes = search.task.targets, list[str]()
    index, met = targets.best(smoothed(search.points, search.observed))
    if index is None or search.points[index] is search.reference:
        return index, met, []
    checked: dict[int, Point] = {}
    try:
        dense = _dense_quality(search)
        tried, i = set[int](), index
        while len(tried) < ATTEMPTS and i is not None and not (checked and not _has_time(search, i)):
            tried.add(i)
            try:
                search.points[i] = _measured_again(search, i, dense)
                checked[i] = _as_checked(search.points[i])
            except RarefyError as error:
                notes.append(f"{search.points[i].name} could not be measured once more: {first_line(error, 200)}")
            if i in checked and (not met or targets.keeps(checked[i])):
                return i, targets.keeps(checked[i]), notes
            factor = max((_loss_factor(search.points[j]) for j in checked), default=1.0)
            if factor > 1:
                search_again(factor)
            i = _next_best(search, tried, factor)
    except RarefyError as error:  # of the dense model
        notes.append(f"the dense model could not be measured once more: {first_line(error, 200)}")
    except KeyboardInterrupt:
        notes.append(INTERRUPTED)
    if not checked:
        return index, met, notes
    if met and search.reference is not None and targets.keeps(search.reference) and INTERRUPTED not in notes:
        notes.append("no smaller or faster model that was measured once more keeps all limits: this is the dense one")
        return search.points.index(search.reference), True, notes
    return min(checked, key=lambda i: max(targets.limits(checked[i]).values(), default=0.0)), False, notes


def _dense_quality(search: Measured) -> float | None:
    """Return the dense model's quality on the data held back; None without them, or where losses are fractions of 0."""
    metric, targets = search.task.check, search.task.targets
    if metric is None:
        return None
    dense = search.journal.get("check of the dense model", lambda: metric.measure(search.dense_fast))
    return dense if targets.points or abs(dense) >= NOISE else None


def _measured_again(search: Measured, index: int, dense: float | None) -> Point:
    """Return a point with its loss on the data held back and new times, as far as there are data and time."""
    point, task = search.points[index], search.task
    digest = digest_of(point.recipe, point)
    if task.progress:
        say([f"{search.elapsed() / 60:5.1f} min  {point.name}, once more"])
    if dense is not None:
        quality = search.journal.get(f"check of {digest}", lambda: _quality(search, index))
        point = replace(point, checked_loss=task.targets.loss(dense, quality, task.metric.higher_is_better))
    if search.seconds >= MIN_SECONDS:
        times = search.journal.get(f"times again of {digest}", lambda: _times(search, index))
        point = with_times(point, times)
    return point


def _as_checked(point: Point) -> Point:
    """Return a point with the loss that counts: the larger one."""
    if point.checked_loss is None or point.loss is None:
        return point
    return replace(point, loss=max(point.loss, point.checked_loss))


def _loss_factor(point: Point) -> float:
    """Return how many times what a point loses in the search it loses on the data held back; 1 where it is less."""
    if point.checked_loss is None or point.loss is None or point.loss <= 0:
        return 1.0
    return max(point.checked_loss / point.loss, 1.0)


def _next_best(search: Measured, tried: Collection[int], factor: float) -> int | None:
    """Return the best point that keeps all limits if it too loses so many times as much on the data held back."""
    targets = search.task.targets
    others = {
        i: p
        for i, p in enumerate(smoothed(search.points, search.observed))
        if i not in tried
        and search.points[i] is not search.reference
        and p.loss is not None
        and targets.keeps(replace(p, loss=max(p.loss, p.loss * factor)))
    }
    return min(others, key=lambda i: targets.value(others[i]), default=None)


def _has_time(search: Measured, index: int) -> bool:
    return search.elapsed() + search.points[index].seconds <= LATE * search.seconds


def _made_again(search: Measured, index: int) -> Deployed:
    """Return the model of a point as it is deployed; it is kept as that of the best point."""
    model, deployed = search.models_of(index)
    search.best_models = (index, model, deployed)
    return deployed


def _quality(search: Measured, index: int) -> float:
    assert search.task.check is not None
    return search.task.check.measure(_made_again(search, index))


def _times(search: Measured, index: int) -> dict[str, Any]:
    return search.times(_made_again(search, index), search.points[index])
