"""Limits of a search, and which point keeps them best."""

import pytest

from rarefy.common.errors import RecipeError
from rarefy.search.frontier import Point, pareto
from rarefy.search.targets import Targets, check_dense, check_points, parse_loss, parse_targets


def point(name, loss, speed, disk=1e6, memory=1e6, error=""):
    times = {} if error else {"1": {"median": 10 / speed, "low": 9 / speed, "high": 11 / speed}}
    speedup = {} if error else {"1": speed}
    return Point(name, loss, loss, times, speedup, int(disk), int(memory), {}, error=error)


POINTS = [
    point("dense", 0.0, 1.0, 8e6), point("int8", 0.004, 1.8, 2e6), point("cut", 0.009, 2.2, 1.5e6),
    point("more", 0.03, 3.0, 1e6), point("bad", 0.05, 2.9, 1e6), point("failed", None, 0, error="no"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "name", "met"),
    [
        ({"max_loss": 0.01}, "cut", True),
        ({"max_loss": "0.5%"}, "int8", True),
        ({"max_loss": 0.0}, "dense", True),
        ({"max_loss": 0.01, "speedup": 1.5}, "cut", True),
        ({"max_loss": 0.01, "speedup": 1.5, "target": "loss"}, "int8", True),
        ({"max_loss": None, "speedup": 2.5}, "more", True),  # its target is the loss
        ({"max_loss": 0.01, "speedup": 2.5}, "cut", False),  # 1.14 times too slow, "more" loses three times too much
        ({"max_loss": 0.01, "latency_ms": 5.0}, "cut", True),
        ({"max_loss": 0.04, "size_mb": 1.6, "target": "loss"}, "cut", True),
        ({"max_loss": 0.04, "target": "size"}, "more", True),
        ({"max_loss": None, "memory_mb": 0.5}, "dense", False),
    ],
)
def test_the_best_point(limits, name, met):
    limits = dict(limits)
    target = limits.pop("target", None) or ("loss" if limits["max_loss"] is None else "latency")
    targets = parse_targets(limits.pop("max_loss"), target, **limits)
    index, kept = targets.best(POINTS)
    assert (POINTS[index].name, kept) == (name, met)


def test_limits_as_lines_of_a_plot():
    dense = Point("dense", 50.0, 0.0, {"1": {"median": 10.0}, "16": {"median": 90.0}}, {}, 1, 1, {})
    assert Targets(0.02, speedup=2.0).lines(dense, True) == {"quality": 49.0, "milliseconds": {"1": 5.0, "16": 45.0}}
    assert Targets(0.02, points=True, latency_ms=7.0).lines(dense, False) == {
        "quality": 50.02,
        "milliseconds": {"1": 7.0, "16": 7.0},
    }
    assert Targets(None, size_mb=3.0).lines(dense, True) == {}
    for targets in (Targets(0.02), Targets(0.02, points=True)):  # a model on the line uses all of the limit
        loss = targets.loss(50.0, targets.lines(dense, False)["quality"], False)
        assert targets.limits(Point("p", 1.0, loss, {}, {}, 1, 1, {}))["max_loss"] == pytest.approx(1.0)


def test_nothing_made_is_no_best_point():
    assert Targets().best([POINTS[-1]]) == (None, False) == Targets().best([])


def test_losses_are_fractions_or_points_and_turn_with_the_metric():
    assert Targets().loss(50.0, 49.0, True) == pytest.approx(0.02)
    assert Targets(points=True).loss(50.0, 49.0, True) == pytest.approx(1.0)
    assert Targets().loss(20.0, 21.0, False) == pytest.approx(0.05)
    assert Targets().loss(-2.0, -2.1, True) == pytest.approx(0.05)  # of a negative number too, worse is positive


@pytest.mark.parametrize(
    ("text", "value"),
    [("1%", (0.01, False)), (" 2.5 % ", (0.025, False)), ("1", (1.0, True)), ("0.5 points", (0.5, True)),
     ("1 point", (1.0, True)), (0.01, (0.01, False)), (None, (None, False)), (0, (0.0, False)), ("-1%", (-0.01, False))],
)  # fmt: skip
def test_limits_of_loss(text, value):
    assert parse_loss(text) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("much", "latency", {}), "max_loss: expected a percentage such as 1%, or points such as 0.5, got 'much'"),
        (
            (2.0, "latency", {}),
            "expected a fraction .*, below 1, got 2.0; percent and points are text, such as '2%' and '2 points'",
        ),
        ((True, "latency", {}), "max_loss: expected a fraction"),
        ((float("nan"), "latency", {}), "max_loss: expected a fraction"),
        ((0.01, "speed", {}), "unknown target 'speed'; choose from decode, latency, loss, memory, prompt, size"),
        ((0.01, "latency", {"speedup": 0}), "speedup: expected a number above 0, got 0"),
        ((0.01, "latency", {"size_mb": "9"}), "size_mb: expected a number above 0, got '9'"),
        ((0.01, "latency", {"speedup": 2.0, "latency_ms": 5.0}), "speedup and latency_ms both limit the time"),
        (
            (0.01, "loss", {}),
            "no model loses less than the dense one, so give another limit: speedup, latency_ms, size_mb or memory_mb",
        ),
        ((None, "latency", {}), "nothing limits the loss: give max_loss, or a limit of speedup"),
    ],
)
def test_wrong_limits(arguments, message):
    loss, objective, limits = arguments
    with pytest.raises(RecipeError, match=message):
        parse_targets(loss, objective, **limits)


def test_a_relative_loss_of_zero_is_refused():
    with pytest.raises(RecipeError, match="dense model's R@1, which is 0: give points"):
        check_dense(Targets(), "R@1", 0.0)
    check_dense(Targets(points=True), "R@1", 0.0)


def test_the_front_has_what_no_point_beats():
    assert [p.name for p in pareto(POINTS)] == ["dense", "int8", "cut", "more"]


def test_what_exceeds_a_loss_of_0_does_not_outweigh_the_speed():
    targets = parse_targets(0.0, "latency", speedup=2.0)
    slow, fast = point("slow", 0.0, 1.1), point("fast", 0.002, 1.9)
    assert targets.limits(fast)["max_loss"] == pytest.approx(1.2)  # 0.2 % of a hundredth
    assert targets.best([slow, fast]) == (1, False)
    assert targets.best([slow, point("bad", 0.2, 1.9)]) == (0, False)
    percent = parse_targets("0 points", "latency", speedup=2.0)
    near = Point("near", 79.8, 0.2, {}, {"1": 1.9}, 1, 1, {})
    assert percent.limits(near)["max_loss"] == pytest.approx(1 + 0.2 / 0.798)


def test_losses_have_their_unit():
    assert Targets().text(0.0123) == "1.23 %" and Targets(points=True).text(0.5) == "0.5 points"
    assert Targets(1.0, points=True).to_dict()["max_loss"] == Targets(points=True).text(1.0) == "1 point"


@pytest.mark.parametrize(("metric", "points"), [("accuracy", 0.5), ("accuracy", 1.0), ("similarity", 0.11)])
def test_points_that_nearly_any_model_keeps_are_refused(metric, points):
    message = f"{metric} goes from 0 to 1, .* at most 0.1 points or a percentage, such as '1%', got {points:g} point"
    with pytest.raises(RecipeError, match=message):
        check_points(Targets(points, points=True), metric)


def test_few_points_and_those_of_percentages_are_no_mistake():
    for metric, points in (
        ("accuracy", 0.1),
        ("accuracy", -0.5),
        ("retrieval", 1.0),
        ("agreement", 3.0),
        ("mine", 0.5),
    ):
        check_points(Targets(points, points=True), metric)
    check_points(Targets(0.5), "accuracy")
    check_points(Targets(None, speedup=2.0), "accuracy")


@pytest.mark.parametrize("metric", ["kl", "distance", "mine"])
def test_where_the_dense_number_is_0_losses_are_points(metric):
    quality = 0.3 if metric != "mine" else 1e-9  # of kl and distance it is rounding noise, whatever it is
    for targets in (Targets(None, speedup=2.0), Targets(0.0), Targets(0.5, points=True)):
        checked = check_dense(targets, metric, quality)
        assert checked.points and checked.max_loss == targets.max_loss
    with pytest.raises(
        RecipeError, match=f"the dense model's {metric}, which is 0: give points, such as '0.02 points'"
    ):
        check_dense(Targets(0.01), metric, quality)
    assert check_dense(Targets(0.01), "mine", 0.3) == check_dense(Targets(0.01), "mine") == Targets(0.01)
