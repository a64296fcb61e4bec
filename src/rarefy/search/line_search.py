"""Which choice of a line is measured next, and what is predicted of it.

A line goes from the dense model to the fastest choice. A bracket holds the last choice that is known to keep the loss
and the first one that is known not to; each measurement narrows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rarefy.search import solve
from rarefy.search.frontier import Point
from rarefy.search.solve import Choice
from rarefy.search.space import Part
from rarefy.search.targets import Targets

NEAR = 0.01  # of the dense model's time: closer choices are not told apart


def first_choice(choices: Sequence[Choice], base: Point, saving: float | None, targets: Targets) -> int:
    """Return where to begin: at the saving of the best point, at the time that is asked for, or at a third.

    Args:
        choices: the line.
        base: the dense model in this precision.
        saving: that is predicted of the best point of another line, or None.
        targets: the limits.
    """
    if saving is None and targets.speedup is not None and targets.speedup > base.slowest:
        saving = 1 - base.slowest / targets.speedup
    elif saving is None:
        saving = choices[-1].saving / 3
    return max(1, solve.at_saving(choices, saving)) if len(choices) > 1 else 0


def next_choice(choices: Sequence[Choice], seen: Mapping[int, Point], low: int, high: int, targets: Targets) -> int:
    """Return the next choice to measure, or one that was seen where the bracket is narrow enough.

    Args:
        choices: the line.
        seen: the points that were measured, by the number of their choice.
        low: the last choice that is known to keep the loss.
        high: the first one that is known not to; the number of choices where none is known.
        targets: the limits.
    """
    high = min(high, len(choices))
    if high == len(choices):
        if low >= len(choices) - 1:
            return low
        saving = choices[low].saving + max((choices[-1].saving - choices[low].saving) / 2, NEAR)
        guess = _extrapolated(choices, seen, low, targets)
        saving = saving if guess is None else min(saving, max(guess, choices[low].saving + NEAR))
        return min(max(solve.at_saving(choices, saving), low + 1), len(choices) - 1)
    if high - low <= 1 or choices[high].saving - choices[low].saving < NEAR:
        return low
    guess = _interpolated(choices, seen, low, high, targets)
    width = choices[high].saving - choices[low].saving
    inside = min(max(guess, choices[low].saving + 0.15 * width), choices[high].saving - 0.15 * width)
    return min(max(solve.at_saving(choices, inside), low + 1), high - 1)


def _extrapolated(choices: Sequence[Choice], seen: Mapping[int, Point], low: int, targets: Targets) -> float | None:
    """Return the saving at which the limit is expected, if predictions stay as wrong as at `low`.

    None where nothing says how wrong they are.
    """
    first, at, limit = seen[0].loss, seen[low].loss if low in seen else None, targets.max_loss
    if limit is None or first is None or at is None or targets.objective == "loss":
        return None
    if at <= first or choices[low].loss <= 0:
        return None
    predicted = choices[low].loss * (limit - first) / (at - first)
    return choices[solve.at_loss(choices, predicted)].saving


def _interpolated(choices: Sequence[Choice], seen: Mapping[int, Point], low: int, high: int, targets: Targets) -> float:
    """Return the saving at which the limit is expected, from predicted and measured losses of both ends."""
    a, b, limit = seen[low].loss, seen[high].loss, targets.max_loss
    if a is None or b is None or limit is None or targets.objective == "loss" or b <= a:
        return (choices[low].saving + choices[high].saving) / 2
    predicted = choices[low].loss + (limit - a) / (b - a) * (choices[high].loss - choices[low].loss)
    return choices[solve.at_loss(choices, predicted)].saving


def predicted_sums(choice: Choice, parts: Sequence[Part], names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Return the sums of predicted losses and savings of a choice."""
    loss, savings = 0.0, dict.fromkeys(names, 0.0)
    for part in parts:
        amount = choice.amounts.get(part.key)
        if amount is not None:
            at = part.amounts.index(amount)
            loss, savings = loss + part.losses[at], {n: s + part.savings[n][at] for n, s in savings.items()}
    return loss, savings


def correction(pairs: Sequence[tuple[float, float]], at: float) -> float:
    """Return the factor that brings predicted values closest to measured ones; 1 where nothing was measured.

    Values near `at` count most: factors of small and of large changes differ.

    >>> correction([(0.2, 0.1), (0.4, 0.2)], 0.3)
    0.5
    """
    weights = [1 / (abs(p - at) + abs(at) / 3 + 1e-9) ** 2 for p, _ in pairs]
    squares = sum(w * p * p for w, (p, _) in zip(weights, pairs))
    return sum(w * p * m for w, (p, m) in zip(weights, pairs)) / squares if squares else 1.0


def at_speed_of(point: Point, base: Point, milliseconds: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds that were predicted from `base` at the speed that the machine had when `point` was timed.

    Other programs may have slowed the machine down, and the dense model that was timed in the same turns as well.
    """
    then, now = ({n: p.milliseconds[n]["median"] * p.speedup[n] for n in milliseconds} for p in (base, point))
    return {n: ms * now[n] / then[n] for n, ms in milliseconds.items()}
