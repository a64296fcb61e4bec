"""Times of points as all measurements together say: single ones are off by several percent on a shared machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rarefy.search.frontier import Point
from rarefy.search.line_search import correction
from rarefy.search.points import Observed, same_model

MIN_OBSERVED = 3  # measured choices; with fewer each keeps its own time


def smoothed(points: Sequence[Point], observed: Sequence[Observed]) -> list[Point]:
    """Return points with the speed-ups that predictions give once all measured choices have corrected them.

    A point's own measurement counts most, those of choices that save about as much count too. Points that nothing was
    predicted of keep their speed-ups.
    """
    if len(observed) < MIN_OBSERVED:
        return [*points]
    return [_smoothed(point, observed) for point in points]


def _smoothed(point: Point, observed: Sequence[Observed]) -> Point:
    own = next((o for o in observed if same_model(o.point, point)), None)
    if own is None:
        return point
    speedup = dict(point.speedup)
    for name, saving in own.savings.items():
        pairs = [(o.savings[name], 1 - o.base.speedup[name] / o.point.speedup[name]) for o in observed]
        speedup[name] = own.base.speedup[name] / max(1 - correction(pairs, saving) * saving, 1e-3)
    return replace(point, speedup=speedup)
