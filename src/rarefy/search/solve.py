"""Which amounts of all parts lose least for the time they save: the lower convex hull of each part, joined by slope.

Losses and savings of parts add up. On the hull of a part each step costs more loss for the same time than the one
before, so taking the steps of all parts in the order of their slopes gives, at each total saving that it reaches, the
least loss (the Lagrangian relaxation of the multiple-choice knapsack; Sinha and Zoltners 1979).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TypeVar

from rarefy.search.space import BLOCK, CUTS, Amounts, Part

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One amount more of one part."""

    part: Part
    amount: float
    loss: float  # more than before
    saving: float  # more than before, the mean over all that is timed


@dataclass(frozen=True)
class Choice:
    """Amounts of all parts, and what is predicted of them."""

    amounts: Amounts
    loss: float
    saving: float


def mean_savings(part: Part) -> list[float]:
    """Return the saving of each amount, the mean over all that is timed."""
    return [sum(values) / len(values) for values in zip(*part.savings.values())]


def hull(part: Part, scale: float = 1.0) -> list[Step]:
    """Return the steps of a part, each with a larger loss for the time it saves than the one before.

    >>> part = Part("head", "a", 4, (0.25, 0.5, 0.75), (1.0, 1.5, 9.0), {"1": (0.1, 0.2, 0.3)})
    >>> [(s.amount, s.loss) for s in hull(part)]
    [(0.5, 1.5), (0.75, 7.5)]
    """
    points = [(0.0, 0.0, 0.0), *zip(mean_savings(part), (scale * l for l in part.losses), part.amounts)]
    steps, at = [], 0
    while at < len(points) - 1:
        saving, loss, _ = points[at]
        ahead = [i for i in range(at + 1, len(points)) if points[i][0] > saving]
        if not ahead:
            break
        following = min(ahead, key=lambda i: ((points[i][1] - loss) / (points[i][0] - saving), -i))
        s, l, amount = points[following]
        steps.append(Step(part, amount, max(l - loss, 0.0), s - saving))
        at = following
    return steps


def front(parts: Sequence[Part], scales: Mapping[str, float] | None = None) -> list[Choice]:
    """Return choices of rising saving, each with the least predicted loss; the first changes nothing. O(steps parts).

    Of several methods for one layer's weight the one whose first step is cheapest stays. Where a whole block goes, what
    was done inside it is undone; of each list one block stays. Steps that cost the same are spread over the model.

    `scales` multiplies the losses of a method.
    """
    scales = scales or {}
    methods = dict.fromkeys(p.method for p in parts)
    spread = chain(*(in_spread_order([p for p in parts if p.method == m]) for m in methods))
    steps = [s for part in spread for s in hull(part, scales.get(part.method, 1.0))]
    method_of: dict[str, str] = {}  # a layer is pruned, factorized or rounded in one way
    left = Counter(_list_of(p.name) for p in parts if p.method == BLOCK)
    gone: list[str] = []
    taken: dict[tuple[str, str], tuple[float, float, float]] = {}  # amount, loss and saving of each part
    choices = [Choice({}, 0.0, 0.0)]
    for step in sorted(steps, key=_slope):
        method, name = step.part.key
        if any(name.startswith(f"{block}.") for block in gone):
            continue
        after = dict(taken)
        if method == BLOCK:
            if left[_list_of(name)] == 1:
                continue
            after = {key: t for key, t in taken.items() if not key[1].startswith(f"{name}.")}
        elif method not in CUTS and method_of.setdefault(name, method) != method:
            continue
        _, loss, saving = taken.get(step.part.key, (0.0, 0.0, 0.0))
        after[step.part.key] = (step.amount, loss + step.loss, saving + step.saving)
        choice = Choice(
            {key: amount for key, (amount, _, _) in after.items()},
            sum(loss for _, loss, _ in after.values()),
            sum(saving for _, _, saving in after.values()),
        )
        if choice.saving <= choices[-1].saving:
            continue
        if method == BLOCK:
            gone.append(name)
            left[_list_of(name)] -= 1
        taken = after
        choices.append(choice)
    return choices


def _slope(step: Step) -> float:
    """Return the loss of a step for the time that it saves, without the rounding errors that tell equal ones apart."""
    return float(f"{step.loss / step.saving:.9g}")


def _list_of(block: str) -> str:
    """Return the name of the list that a block is in."""
    return block.rpartition(".")[0]


def shrunk(parts: Sequence[Part], weight: float) -> list[Part]:
    """Return the parts with losses between the measured ones (weight 0) and those of a uniform allocation (weight 1).

    Where each amount costs every part of a method the same loss for the time that it saves, all of them lose the same
    fraction. Measured losses of single parts may mislead: they are of small changes and few samples. Whole blocks keep
    their losses: a fraction of a block cannot go.
    """
    result = [p for p in parts if p.method == BLOCK]
    for method in dict.fromkeys(p.method for p in parts if p.method != BLOCK):
        alike = [p for p in parts if p.method == method]
        grid = sorted({a for p in alike for a in p.amounts})
        mean = [(a, _mean_slope(alike, a)) for a in grid]
        for part in alike:
            savings = [max(s, 0.0) for s in mean_savings(part)]
            even = [s * (line(mean, a) if len(mean) > 1 else mean[0][1]) for a, s in zip(part.amounts, savings)]
            losses = tuple(l ** (1 - weight) * e**weight for l, e in zip(part.losses, even))
            result.append(replace(part, losses=losses))
    return result


def in_spread_order(items: Sequence[T]) -> list[T]:
    """Return items in an order in which the first ones, however few, are spread over all.

    >>> in_spread_order("abcdefg")
    ['a', 'e', 'c', 'g', 'b', 'f', 'd']
    """
    bits = max(len(items) - 1, 1).bit_length()
    return [items[i] for i in sorted(range(len(items)), key=lambda i: f"{i:0{bits}b}"[::-1])]


def _mean_slope(parts: Sequence[Part], amount: float) -> float:
    """Return the loss of all parts at their amounts next to this one, over the time that they save."""
    at = [(p, min(range(len(p.amounts)), key=lambda i, p=p: abs(p.amounts[i] - amount))) for p in parts]
    saving = sum(mean_savings(p)[i] for p, i in at)
    return sum(p.losses[i] for p, i in at) / saving if saving > 0 else 0.0


def at_loss(choices: Sequence[Choice], loss: float) -> int:
    """Return the number of the last choice whose predicted loss is at most this."""
    return max((i for i, c in enumerate(choices) if c.loss <= loss), default=0)


def at_saving(choices: Sequence[Choice], saving: float) -> int:
    """Return the number of the first choice that saves this, or the last."""
    return next((i for i, c in enumerate(choices) if c.saving >= saving), len(choices) - 1)


def line(known: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value at x on straight lines through known points, the last one continued."""
    pairs = list(pairwise(known))
    (x0, y0), (x1, y1) = next((p for p in pairs if x <= p[1][0]), pairs[-1])
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
