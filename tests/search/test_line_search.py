"""Which choice of a line is measured next."""

from __future__ import annotations

import pytest

from rarefy.search.frontier import Point
from rarefy.search.line_search import next_choice
from rarefy.search.solve import Choice
from rarefy.search.targets import Targets

LINE = [Choice({}, i / 1000, i / 100) for i in range(101)]  # predicted losses 0 to 0.1, savings 0 to 1


def point(loss: float | None) -> Point:
    return Point("p", None if loss is None else 1 + loss, loss, {}, {}, 0, 0, {"stages": []})


@pytest.mark.parametrize(
    ("base", "lost", "limit", "index"),
    [
        (0.0, 0.004, 0.01, 50),  # 0.02 was predicted: five times as much
        (0.001, 0.005, 0.0111, 50),
        (0.0, 0.004, 0.1, 60),  # at most half of what is left
        (0.0, 0.0099, 0.01, 32),  # a part of what is left, however little that is
        (0.0, 0.0, 0.01, 60),
        (0.0, 0.004, None, 60),
        (0.0, None, 0.01, 60),
    ],
)
def test_where_nothing_exceeds_the_limit_yet_it_is_where_that_is_expected(base, lost, limit, index):
    seen = {0: point(base), 20: point(lost)}
    assert next_choice(LINE, seen, 20, len(LINE), Targets(limit)) == index


@pytest.mark.parametrize("plateau", [0.009, 0.0097, 0.0099])
def test_a_loss_near_the_limit_does_not_take_many_steps(plateau):
    """Up to a choice all lose nearly the limit, then far more."""
    seen, low, high = {0: point(0.0), 10: point(plateau)}, 10, len(LINE)
    while (index := next_choice(LINE, seen, low, high, Targets(0.01))) not in seen:
        seen[index] = point(plateau if index <= 70 else 0.05)
        low, high = (max(low, index), high) if index <= 70 else (low, min(high, index))
    assert low == 70 and len(seen) <= 15


def test_with_the_least_loss_as_target_the_line_is_halved():
    seen = {0: point(0.0), 20: point(0.004)}
    assert next_choice(LINE, seen, 20, len(LINE), Targets(0.01, speedup=2.0, objective="loss")) == 60


def test_the_end_of_a_line_is_the_last_choice():
    assert next_choice(LINE, {0: point(0.0), 100: point(0.001)}, 100, len(LINE), Targets(0.01)) == 100
