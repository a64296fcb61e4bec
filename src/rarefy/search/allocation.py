"""Find how much each part should lose, by the joint loss of all: a climb over factors on the losses of parts.

The loss of a part that was measured alone says little about what it costs beside others. As in SPDY (Frantar and
Alistarh 2022, section 3.2) each part has a factor on its loss. The factors say which allocation saves a given time for
the least predicted loss, and the true loss of that allocation says which factors are better. So the climb leaves a
whole line of allocations, one for each saving, not a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from rarefy.search import solve
from rarefy.search.solve import Choice
from rarefy.search.space import Amounts, Key, Part, kind_of

FACTORS = (2.0, 1.4, 1.2)  # on the losses of parts, one round of the climb after the other
GAIN = 1e-3  # of the loss: less is not taken as better
DEARER = 10.0  # a method that is predicted to lose so many times what the cheapest one does is not measured

Loss = Callable[[Amounts], float | None]


def climb(
    parts: Sequence[Part],
    starts: Sequence[Sequence[Part]],
    saving: float,
    loss: Loss,
    prefetch: Callable[[Sequence[Amounts]], None] = lambda allocations: None,
    count: int = 1,
) -> list[Part] | None:
    """Return the parts with losses whose best allocation at a saving has the least joint loss; None where none of the
    starts has one.

    Args:
        parts: all parts, with their measured losses.
        starts: the same parts with other losses: the best of them is where the climb begins.
        saving: of a call's time, at which allocations are compared.
        loss: returns the joint loss of an allocation; None for one that cannot be made, or once there is no time left.
            It is called for the same allocation once.
        prefetch: measures allocations side by side, before `loss` is called for each of them.
        count: how many: the next one, and those that follow it as long as none is better.

    Cost: two allocations for each of `sets_of_parts` in each round, until a round finds nothing better.
    """
    seen: dict[tuple[tuple[tuple[str, str], float], ...], float | None] = {}

    def at(candidate: Sequence[Part]) -> tuple[list[Choice], int, Any]:
        choices = solve.front(candidate)
        index = solve.at_saving(choices, saving)
        return choices, index, tuple(sorted(choices[index].amounts.items()))

    def joint(candidate: Sequence[Part], following: Iterable[Sequence[Part]] = ()) -> float:
        choices, index, key = at(candidate)
        if key not in seen:
            new, after = {key: choices[index].amounts}, iter(following)
            while len(new) < count and (other := next(after, None)) is not None:
                others, i, other_key = at(other)
                if other_key not in seen:
                    new[other_key] = others[i].amounts
            prefetch([*new.values()])
            seen.update({k: loss(amounts) for k, amounts in new.items()})
        value = seen[key]
        return float("inf") if value is None else value * _share_at(choices, index, saving)

    best = min(starts, key=joint)
    lowest = joint(best)
    if lowest == float("inf"):
        return None
    for sets, factor in product(sets_of_parts(parts), FACTORS):
        improved = True
        while improved:
            improved = False
            trials, taken = [*product(sets, (factor, 1 / factor))], None
            for i, (keys, f) in enumerate(trials):
                if keys is taken:  # with the other factor
                    continue
                trial = scaled(best, dict.fromkeys(keys, f))
                value = joint(trial, (scaled(best, dict.fromkeys(k, g)) for k, g in trials[i + 1 :]))
                if value < (1 - GAIN) * lowest:
                    best, lowest, improved, taken = trial, value, True, keys
    choices = solve.front(best)
    predicted = choices[solve.at_saving(choices, saving)].loss
    return scaled(best, dict.fromkeys((p.key for p in best), lowest / predicted if predicted > 0 else 1.0))


def sets_of_parts(parts: Sequence[Part]) -> list[list[list[Key]]]:
    """Return which parts get a factor together: those of a method or of a kind, then those of a kind in a quarter of
    the model, then each alone.

    Of the layers of many blocks one alone changes little, and measuring each takes long.

    >>> parts = [Part("head", f"{i}.{n}", 8, (0.5,), (1.0,), {}) for i in range(8) for n in "ab"]
    >>> [[len(keys) for keys in sets] for sets in sets_of_parts(parts)]
    [[8, 8], [2, 2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
    """
    methods: dict[Any, list[Key]] = {}
    kinds: dict[Any, list[Key]] = {}
    for part in parts:
        methods.setdefault(part.method, []).append(part.key)
        kinds.setdefault((part.method, kind_of(part.name)), []).append(part.key)
    quarters = [of[i * len(of) // 4 : (i + 1) * len(of) // 4] for of in kinds.values() for i in range(4)]
    of_kinds = [keys for keys in kinds.values() if keys not in methods.values()]
    several = [[k for k in sets if 1 < len(k) < len(parts)] for sets in ([*methods.values(), *of_kinds], quarters)]
    return [*several, [[p.key] for p in parts]]


def calibrated(
    parts: Sequence[Part],
    saving: float,
    loss: Loss,
    prefetch: Callable[[Sequence[Amounts]], None] = lambda amounts: None,
) -> list[Part]:
    """Return the parts with the losses of each method rescaled to what the method loses when it saves this time alone.

    The sum of what single parts lose is too small by a factor that differs between methods: of MiniLM 8 for heads, 2
    for neurons, 1 for zeros. Methods that are predicted to lose far more than others are not measured; they get the
    largest factor of those that are.

    Args:
        parts: the parts, with their predicted losses.
        saving: of a call's time; a method that cannot save it alone is compared at the most that it saves.
        loss: returns the joint loss of an allocation, or None: then no losses are rescaled, because factors of some
            methods alone would favour the others.
        prefetch: measures allocations side by side, before `loss` is called for each of them.
    """
    choices = dict[str, Choice]()
    for method in dict.fromkeys(p.method for p in parts):
        of_method = solve.front([p for p in parts if p.method == method])
        choices[method] = of_method[solve.at_saving(of_method, saving)]
    slopes = {m: c.loss / c.saving for m, c in choices.items() if c.saving > 0 and c.loss > 0}
    compared = {m: choices[m] for m, slope in slopes.items() if slope <= DEARER * min(slopes.values())}
    prefetch([c.amounts for c in compared.values()])
    factors = dict[str, float]()
    for method, choice in compared.items():
        if (value := loss(choice.amounts)) is None:
            return [*parts]
        factors[method] = max(value, 1e-9) / choice.loss
    largest = max(factors.values(), default=1.0)
    return scaled(parts, {p.key: factors.get(p.method, largest) for p in parts})


def scaled(parts: Sequence[Part], factors: Mapping[tuple[str, str], float]) -> list[Part]:
    """Return the parts with their losses multiplied by the factors of their keys."""
    return [replace(p, losses=tuple(factors.get(p.key, 1.0) * l for l in p.losses)) for p in parts]


def _share_at(choices: Sequence[Choice], index: int, saving: float) -> float:
    """Return which part of a choice's loss is expected at a saving just below its own.

    Choices save a little more than is asked, each another amount, which would otherwise count against them.
    """
    at = choices[index]
    if not index or at.loss <= 0 or at.saving <= saving:
        return 1.0
    before = choices[index - 1]
    slope = (at.loss - before.loss) / (at.saving - before.saving)
    return max(1 - slope * (at.saving - saving) / at.loss, 0.5)
