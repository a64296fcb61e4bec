"""Sparsity schedules: sparsity as a function of training progress t, 0 to 1."""

from __future__ import annotations

from rarefy.common.errors import PatternError, unknown


def linear(t: float, first: float, last: float) -> float:
    """Return the sparsity if every step removes the same number of weights."""
    return first + (last - first) * t


def cubic(t: float, first: float, last: float) -> float:
    """Return the sparsity if early steps remove many weights and late ones few (Zhu & Gupta 2017, eq. 1)."""
    return last + (first - last) * (1 - t) ** 3


def exponential(t: float, first: float, last: float) -> float:
    """Return the sparsity if density falls by the same factor at every step (Han 2015, Frankle 2019)."""
    return 1 - (1 - first) * ((1 - last) / (1 - first)) ** t


MAX_STEPS = 100_000

SCHEDULES = {"linear": linear, "cubic": cubic, "exponential": exponential}


def sparsities(kind: str, last: float, steps: int, first: float = 0.0) -> list[float]:
    """Return the sparsity after each of `steps` pruning steps; it ends at exactly `last`.

    Raises PatternError for an unknown schedule, fewer than one step, first > last, or an exponential schedule to 1.

    >>> sparsities("linear", 0.9, 3)
    [0.3, 0.6, 0.9]
    >>> [round(s, 3) for s in sparsities("cubic", 0.9, 3)]
    [0.633, 0.867, 0.9]
    """
    if kind not in SCHEDULES:
        raise PatternError(unknown("schedule", kind, SCHEDULES))
    if not 1 <= steps <= MAX_STEPS:
        raise PatternError(f"steps: expected 1 to {MAX_STEPS:,}, got {steps}")
    if not 0 <= first <= last <= 1:
        raise PatternError(f"expected 0 <= first <= last <= 1, got first {first} and last {last}")
    if kind == "exponential" and (last == 1 or first == 1):
        raise PatternError("an exponential schedule never reaches sparsity 1: use linear or cubic")
    schedule = [round(SCHEDULES[kind](i / steps, first, last), 12) for i in range(1, steps + 1)]
    return [*schedule[:-1], last]
