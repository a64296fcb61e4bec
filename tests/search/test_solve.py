"""Predicted choices: the least loss at each saving, compared with all combinations."""

import itertools
from dataclasses import replace

import pytest
import torch

from rarefy.search.frontier import Point
from rarefy.search.line_search import at_speed_of, correction, next_choice
from rarefy.search.points import Observed
from rarefy.search.smoothing import smoothed
from rarefy.search.solve import Choice, at_loss, at_saving, front, hull, shrunk
from rarefy.search.space import Part, few_samples, group_amounts, step_of
from rarefy.search.targets import parse_targets


def random_parts(seed, count=4, amounts=4):
    random = torch.Generator().manual_seed(seed)
    parts = []
    for i in range(count):
        losses = torch.rand(amounts, generator=random).cumsum(0).square()
        savings = torch.rand(amounts, generator=random).cumsum(0) / 10
        fractions = tuple((k + 1) / (amounts + 1) for k in range(amounts))
        parts.append(Part("neuron", f"p{i}", 100, fractions, tuple(losses.tolist()), {"1": tuple(savings.tolist())}))
    return parts


@pytest.mark.parametrize("seed", range(8))
def test_no_combination_is_better_than_a_choice(seed):
    parts = random_parts(seed)
    choices = front(parts)
    options = [[(0.0, 0.0), *zip(p.savings["1"], p.losses)] for p in parts]
    every = [(sum(s for s, _ in c), sum(l for _, l in c)) for c in itertools.product(*options)]
    for choice in choices:
        least = min(loss for saving, loss in every if saving >= choice.saving - 1e-9)
        assert choice.loss == pytest.approx(least, abs=1e-6)
        amounts = [(p, choice.amounts.get(p.key)) for p in parts]
        exact = [p.amounts.index(a) for p, a in amounts if a is not None]
        chosen = [p for p, a in amounts if a is not None]
        assert choice.saving == pytest.approx(sum(p.savings["1"][i] for p, i in zip(chosen, exact)))
        assert choice.loss == pytest.approx(sum(p.losses[i] for p, i in zip(chosen, exact)))


def test_choices_rise():
    choices = front(random_parts(3, count=9))
    assert choices[0].amounts == {}
    assert all(b.saving > a.saving and b.loss >= a.loss for a, b in itertools.pairwise(choices))
    assert at_loss(choices, choices[5].loss) == 5 and at_loss(choices, -1.0) == 0
    assert at_saving(choices, choices[5].saving) == 5 and at_saving(choices, 99.0) == len(choices) - 1


def test_a_part_that_saves_nothing_is_left_alone():
    slow = Part("head", "a", 4, (0.5,), (0.1,), {"1": (-0.02,)})
    assert hull(slow) == [] and len(front([slow])) == 1


def test_shrunk_losses_go_from_the_measured_to_a_uniform_allocation():
    amounts = (0.25, 0.5, 0.75)
    parts = [
        Part("neuron", f"p{i}", 64, amounts, tuple(f * a**2 for a in amounts), {"1": tuple(s * a for a in amounts)})
        for i, (f, s) in enumerate([(1.0, 0.1), (5.0, 0.1), (2.0, 0.3)])
    ]
    assert [p.losses for p in shrunk(parts, 0.0)] == [pytest.approx(p.losses) for p in parts]
    ends = [c for c in front(shrunk(parts, 1.0)) if len(c.amounts) in (0, 3) and len(set(c.amounts.values())) <= 1]
    assert [c.amounts.get(("neuron", "p0")) for c in ends] == [None, *amounts]  # all three lose the same fraction
    half = shrunk(parts, 0.5)
    even = shrunk(parts, 1.0)
    for p, m, e in zip(half, parts, even):
        assert p.losses == pytest.approx([(a * b) ** 0.5 for a, b in zip(m.losses, e.losses)])
    assert sum(p.losses[1] for p in even) == pytest.approx(sum(p.losses[1] for p in parts))


def test_equal_steps_are_spread_over_the_model():
    """Of eight layers that lose the same, whatever their sizes, the first four in fewer bits are every second one."""
    sizes = (1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0)
    parts = [
        Part("fewer bits", f"p{i}", 64, (0.25, 0.5), (0.1 * s, 0.4 * s / 3), {"1": (0.1 * s, 0.2 * s / 3)})
        for i, s in enumerate(sizes)
    ]
    for count, names in ((2, "04"), (4, "0246"), (8, "01234567")):
        choice = next(c for c in front(shrunk(parts, 1.0)) if len(c.amounts) == count)
        assert sorted(name for _, name in choice.amounts) == [f"p{i}" for i in names]


def test_a_layer_has_one_pattern():
    options = [Part(m, "fc", 64, (0.5, 0.9), (l, 4 * l), {"1": (0.1, 0.2)}) for m, l in (("1x4", 0.2), ("4x1", 0.1))]
    assert [set(c.amounts) for c in front(options)] == [set(), {("4x1", "fc")}, {("4x1", "fc")}]


def test_scales_move_the_balance():
    a, b = random_parts(0, count=2)
    b = Part("head", b.name, b.size, b.amounts, b.losses, b.savings)
    first = front([a, b], {"neuron": 100.0})[1]
    assert list(first.amounts) == [b.key]


@pytest.mark.parametrize(
    ("size", "method"), [(1536, "neuron"), (12, "head"), (24, "channel"), (2, "head"), (7, "neuron")]
)
def test_amounts_are_whole_units(size, method):
    amounts = group_amounts(size, method)
    assert all((a * size) % step_of(size, method) == pytest.approx(0) and 0 < a <= 0.75 for a in amounts)
    assert len(amounts) <= 48 and (amounts or size == 1)


def test_few_samples_are_whole_samples_of_the_first_batches():
    texts = [{"input_ids": torch.full((4, 100), i)} for i in range(6)]
    assert [len(b["input_ids"]) for b in few_samples(texts, 10)] == [4, 4, 2]
    assert [len(b["input_ids"]) for b in few_samples(texts, 32, tokens=650)] == [4, 2]
    assert [len(b["input_ids"]) for b in few_samples(texts, 32, tokens=10)] == [2]
    images = [torch.zeros(8, 3, 32, 32)] * 3
    assert [len(b) for b in few_samples(images, 20)] == [8, 8, 4]


def test_predicted_times_follow_the_machine() -> None:
    def point(milliseconds: float, speedup: float) -> Point:
        return Point("p", 1.0, 0.0, {"1": {"median": milliseconds}}, {"1": speedup}, 0, 0, {})

    base, slowed = point(10.0, 2.0), point(12.0, 2.5)  # the dense model took 20 ms, then 30
    assert at_speed_of(slowed, base, {"1": 8.0}) == {"1": pytest.approx(12.0)}


def test_values_near_a_prediction_correct_it_most() -> None:
    pairs = [(0.1, 0.05), (0.4, 0.4)]
    assert correction(pairs, 0.1) == pytest.approx(0.5, abs=0.1)
    assert correction(pairs, 0.4) == pytest.approx(1.0, abs=0.01)
    assert correction([], 0.4) == 1.0


def test_a_line_goes_on_as_far_as_its_first_point_says():
    """Not to the middle of all that is possible, where cuts lose a hundred times the limit."""
    choices = [Choice({}, 0.01 * i**2, 0.01 * i) for i in range(100)]
    point = Point("p", 1.0, 0.0, {}, {"1": 1.0}, 1, 1, {})
    seen = {0: replace(point, loss=0.001), 10: replace(point, loss=0.011)}  # predicted 1.0
    limit = parse_targets(0.026, "latency")
    index = next_choice(choices, seen, 10, 100, limit)
    assert index == 15  # the last that is predicted at most at 2.5
    assert next_choice(choices, {0: seen[0]}, 0, 100, limit) == 50  # nothing is known yet
    far = {0: seen[0], 10: replace(point, loss=0.0011)}
    assert next_choice(choices, far, 10, 100, limit) == 55


def test_one_slow_measurement_does_not_decide():
    """Nine choices save 2 % more each; one of them was timed while another program ran."""
    base = Point("dense", 1.0, 0.0, {"1": {"median": 1.0}}, {"1": 3.0}, 1, 1, {"stages": ["dense"], "seed": 0})
    observed = []
    for i in range(9):
        saving = 0.1 + 0.02 * i
        speed = 3.0 / (1 - 0.9 * saving)  # predictions are a tenth too large
        name = f"c{i}"
        point = replace(base, name=name, recipe={"stages": [name], "seed": 0}, speedup={"1": speed})
        observed.append(Observed({}, 0.0, {"1": saving}, point, base))
    exact = [p.speedup["1"] for p in smoothed([o.point for o in observed], observed)]
    assert exact == pytest.approx([o.point.speedup["1"] for o in observed], rel=1e-6)
    slow = replace(observed[7].point, speedup={"1": 0.9 * observed[7].point.speedup["1"]})
    observed[7] = replace(observed[7], point=slow)
    points = smoothed([base, *(o.point for o in observed)], observed)
    assert points[0] == base
    assert points[8].speedup["1"] > points[6].speedup["1"] > slow.speedup["1"]
    assert smoothed([slow], observed[:2]) == [slow]
