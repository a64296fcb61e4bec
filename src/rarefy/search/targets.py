"""What a search is asked for: limits of loss, time and bytes, and what is made as small as possible within them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from rarefy.common.errors import RecipeError, unknown
from rarefy.evaluation.quality import BEST_IS_ZERO
from rarefy.search.frontier import Point

DECODE = ("decode", "prompt")  # what is timed of causal language models: milliseconds a token, and of the prompt
OBJECTIVES = ("latency", *DECODE, "loss", "size", "memory")
OTHER_LIMITS = "speedup, latency_ms, size_mb or memory_mb"
NOISE = 1e-6  # a smaller number of the dense model counts as 0
FRACTIONS = ("accuracy", "similarity")  # metrics from 0 to 1
LARGEST_OF_FRACTION = 0.1  # points of these that may be lost
LOSS = re.compile(r"(-?[0-9]*\.?[0-9]+)\s*(%|points?)?")


@dataclass(frozen=True)
class Targets:
    """Limits that a model has to keep, and what is minimized within them.

    Attributes:
        max_loss: the largest accepted loss, a fraction of the dense model's metric, or points of it; None: any.
        points: whether `max_loss` counts points of the metric.
        speedup: times as fast as the dense compiled model, in every timed batch; None: any.
        latency_ms: the longest accepted call in each timed batch; None: any.
        size_mb: megabytes (10^6 bytes) of the saved model.
        memory_mb: megabytes of its weights in memory.
        objective: what is minimized among models that keep all limits: latency, of a language model decode (the time of
            a token) or prompt alone, loss, size or memory.
    """

    max_loss: float | None = 0.01
    points: bool = False
    speedup: float | None = None
    latency_ms: float | None = None
    size_mb: float | None = None
    memory_mb: float | None = None
    objective: str = "latency"

    @property
    def counts_bytes(self) -> bool:
        """Return whether sizes matter, not only loss and time."""
        return self.size_mb is not None or self.memory_mb is not None or self.objective in ("size", "memory")

    def loss(self, dense: float, quality: float, higher_is_better: bool) -> float:
        """Return how much worse a quality is than the dense model's, as a fraction or in points."""
        worse = dense - quality if higher_is_better else quality - dense
        return worse if self.points else worse / abs(dense)

    def text(self, loss: float) -> str:
        """Return a loss with its unit, such as "1.2 %" or "0.5 points"."""
        return f"{loss:.3g} {_points(loss)}" if self.points else f"{100 * loss:.3g} %"

    def limits(self, point: Point) -> dict[str, float]:
        """Return, for each limit, how much of it a point uses; above 1 it is exceeded.

        Losses are shifted by one. What exceeds their limit counts against the limit, or against a hundredth of the
        metric where that is more: a limit of 0 does not outweigh all others.
        """
        used: dict[str, float] = {}
        if self.max_loss is not None and point.loss is not None:
            hundredth = 0.01 * (abs(point.quality or 0.0) if self.points else 1.0)
            used["max_loss"] = 1 + (point.loss - self.max_loss) / max(abs(self.max_loss), hundredth, 1e-6)
        if self.speedup is not None:
            used["speedup"] = self.speedup / max(point.slowest, 1e-9)
        if self.latency_ms is not None:
            used["latency_ms"] = max(t["median"] for t in point.milliseconds.values()) / self.latency_ms
        if self.size_mb is not None:
            used["size_mb"] = (point.disk_bytes or math.inf) / 1e6 / self.size_mb
        if self.memory_mb is not None:
            used["memory_mb"] = point.memory_bytes / 1e6 / self.memory_mb
        return used

    def bytes_used(self, point: Point) -> float:
        """Return how much a point uses of the limits of bytes; 0 without one, above 1 one is exceeded."""
        used = self.limits(point)
        return max((used[n] for n in ("size_mb", "memory_mb") if n in used), default=0.0)

    def keeps(self, point: Point) -> bool:
        """Return whether a point keeps all limits."""
        return all(u <= 1 + 1e-9 for u in self.limits(point).values())

    def value(self, point: Point) -> float:
        """Return what is minimized."""
        values = {
            "loss": math.inf if point.loss is None else point.loss,
            "size": point.disk_bytes or math.inf,  # one that cannot be saved
            "memory": point.memory_bytes,
        }
        return values.get(self.objective, -mean_speedup(point.speedup))

    def best(self, points: Sequence[Point]) -> tuple[int | None, bool]:
        """Return the number of the best point and whether it keeps all limits; else it is the one that comes nearest.

        None where no point could be made.
        """
        measured = [(i, p) for i, p in enumerate(points) if p.loss is not None]
        if not measured:
            return None, False
        keeping = [(i, p) for i, p in measured if self.keeps(p)]
        if keeping:
            return min(keeping, key=lambda ip: self.value(ip[1]))[0], True
        return min(measured, key=lambda ip: (max(self.limits(ip[1]).values()), self.value(ip[1])))[0], False

    def lines(self, dense: Point, higher_is_better: bool) -> dict[str, Any]:
        """Return the limits as values of a plot: the worst accepted quality, and the longest call of each batch."""
        values: dict[str, Any] = {}
        if self.max_loss is not None and dense.quality is not None:
            worse = self.max_loss * (1.0 if self.points else abs(dense.quality))
            values["quality"] = dense.quality - worse if higher_is_better else dense.quality + worse
        if self.latency_ms is not None:
            values["milliseconds"] = dict.fromkeys(dense.milliseconds, self.latency_ms)
        if self.speedup is not None:
            values["milliseconds"] = {b: t["median"] / self.speedup for b, t in dense.milliseconds.items()}
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return the limits that are set, as text by name."""
        loss = None
        if self.max_loss is not None:
            loss = f"{self.max_loss:g} {_points(self.max_loss)}" if self.points else f"{100 * self.max_loss:g} %"
        named = {
            "max_loss": loss,
            "speedup": None if self.speedup is None else f"{self.speedup:g}x",
            "latency_ms": self.latency_ms,
            "size_mb": self.size_mb,
            "memory_mb": self.memory_mb,
        }
        return {**{k: v for k, v in named.items() if v is not None}, "objective": self.objective}


def parse_loss(value: float | str | None) -> tuple[float | None, bool]:
    """Return a limit of loss and whether it is in points of the metric.

    A number is a fraction of the dense model's metric. In text "1%" is a fraction, "1" and "1 point" are points.

    >>> parse_loss(0.01), parse_loss("1%"), parse_loss("0.5 points")
    ((0.01, False), (0.01, False), (0.5, True))
    """
    if value is None:
        return None, False
    if isinstance(value, str):
        match = LOSS.fullmatch(value.strip())
        if match is None:
            raise RecipeError(
                f"max_loss: expected a percentage such as 1%, or points such as 0.5, got {value!r}; for no limit pass "
                "None (shell: give any)"
            )
        return (float(match[1]) / 100, False) if match[2] == "%" else (float(match[1]), True)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise RecipeError(f"max_loss: expected a fraction such as 0.01, or text such as '1%', got {value!r}")
    if abs(value) >= 1:
        raise RecipeError(
            f"max_loss: expected a fraction of the dense model's metric, below 1, got {value!r}; percent and points "
            f"are text, such as '{abs(value):g}%' and '{abs(value):g} points'"
        )
    return float(value), False


def _points(number: float) -> str:
    return "point" if number == 1 else "points"


def times_tokens(names: Iterable[str]) -> bool:
    """Return whether what is timed are phases of a language model, not batch sizes.

    >>> times_tokens(("decode",)), times_tokens(("1", "16"))
    (True, False)
    """
    return set(names) <= set(DECODE)


def mean_speedup(speedup: Mapping[str, float]) -> float:
    """Return the dense time over the mean of a model's relative times; 0 for a model that could not be made."""
    return len(speedup) / sum(1 / s for s in speedup.values()) if speedup else 0.0


def objective_of(target: str | None, max_loss: float | str | None) -> str:
    """Return what is minimized: by default the latency, or the loss where that has no limit."""
    return target if target is not None else "loss" if max_loss is None else "latency"


def parse_targets(max_loss: float | str | None, objective: str, **limits: float | None) -> Targets:
    """Return checked targets; RecipeError for what is no limit or contradicts itself."""
    loss, points = parse_loss(max_loss)
    if objective not in OBJECTIVES:
        raise RecipeError(unknown("target", objective, OBJECTIVES))
    for name, value in limits.items():
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if value is not None and not number:
            raise RecipeError(f"{name}: expected a number above 0, got {value!r}")
    numbers = {n: None if v is None else float(v) for n, v in limits.items()}
    targets = Targets(loss, points, objective=objective, **numbers)
    if targets.speedup is not None and targets.latency_ms is not None:
        raise RecipeError("speedup and latency_ms both limit the time of a call: give one of them")
    reached = any(v is not None for v in limits.values())
    if loss is None and not reached:
        raise RecipeError(f"nothing limits the loss: give max_loss, or a limit of {OTHER_LIMITS}")
    if objective == "loss" and not reached:
        raise RecipeError(f"no model loses less than the dense one, so give another limit: {OTHER_LIMITS}")
    return targets


def check_points(targets: Targets, metric: str) -> None:
    """Raise RecipeError for points of a named metric from 0 to 1 that nearly any model keeps.

    They are meant as percentage points.
    """
    if metric in FRACTIONS and targets.points and (targets.max_loss or 0.0) > LARGEST_OF_FRACTION:
        raise RecipeError(
            f"max_loss: {metric} goes from 0 to 1, where a percentage point is 0.01: expected at most "
            f"{LARGEST_OF_FRACTION:g} points or a percentage, such as '1%', got {targets.text(targets.max_loss or 0.0)}"
        )


def check_dense(targets: Targets, metric: str, quality: float = math.inf) -> Targets:
    """Return the targets with losses in points where the dense model's number is 0, but for rounding errors.

    Args:
        targets: the limits.
        metric: the name of the number.
        quality: the dense model's number; by default only the metric counts, before anything is measured.

    Raises:
        RecipeError: where the largest loss is a fraction of 0, which means nothing.
    """
    if metric not in BEST_IS_ZERO and abs(quality) >= NOISE:
        return targets
    if targets.max_loss and not targets.points:
        raise RecipeError(
            f"max_loss is a fraction of the dense model's {metric.removeprefix('the ')}, which is 0: give points, such "
            "as '0.02 points'"
        )
    return replace(targets, points=True)
