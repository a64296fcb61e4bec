"""The time of a search, by a clock that only its steps move on: nothing begins that does not fit."""

import pytest
import torch
from torch import nn

from helpers.marks import slow_case
from rarefy.evaluation.quality import metric_of
from rarefy.search import deploy as deploying
from rarefy.search import parts, search
from rarefy.search.journal import Journal
from rarefy.search.search import Search
from rarefy.search.targets import parse_targets
from rarefy.search.task import Task

X = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
torch.manual_seed(1)
NET = nn.Sequential(nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 6)).eval()
LABELS = NET(X).argmax(1)
COMPILING, JUDGING = 2.0, 1.0  # seconds


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def steps(monkeypatch):
    """A clock, and a search of so many seconds whose steps are listed with the seconds when they begin and end."""
    clock, listed = Clock(), []

    def deploy(*arguments, plain=search.deploy):
        clock.now += COMPILING
        return plain(*arguments)

    def accuracy(model):
        clock.now += JUDGING
        return float((model(X).argmax(1) == LABELS).float().mean())

    class Listed(Journal):
        def get(self, key, compute, **options):
            def measured():
                listed.append([key, clock.now, None])
                step = listed[-1]
                value = compute()
                step[2] = clock.now
                return value

            return super().get(key, measured, **options)

    monkeypatch.setattr(search, "deploy", deploy)
    monkeypatch.setattr(parts, "deploy", deploy)

    def make(seconds):
        targets = parse_targets(0.3, "latency")
        task = Task(NET, X[:4], list(X.split(32)), metric_of(accuracy, NET, None), targets, (1,), seconds)
        return Search(task, Listed(None, {}, clock))

    return clock, listed, make


@pytest.mark.parametrize("seconds", [1.0, 8.0, *map(slow_case, (12.0, 30.0, 60.0))])
def test_nothing_begins_that_does_not_fit(steps, seconds):
    clock, listed, make = steps
    found = make(seconds)
    found.measure_dense()
    dense = clock.now
    ended = found.run()
    assert all(begin <= seconds for _, begin, _ in listed[1:])
    points = [step for step in listed[1:] if step[0].startswith("point")]
    assert all(end <= seconds for _, _, end in points)
    assert clock.now <= max(
        dense, seconds + 2 * COMPILING
    )  # the first timing of a method also compiles the dense model
    assert ended == "time" or clock.now <= seconds
    assert len(found.points) >= (1 if seconds < 12 else 2)
    if seconds <= dense:
        assert len(listed) == 1 and ended == "time"  # the dense model's measurement always ends


@pytest.mark.slow
def test_more_time_measures_more(steps):
    _, listed, make = steps
    counts = []
    for seconds in (8.0, 200.0):
        listed.clear()
        found = make(seconds)
        found.began = found.journal.clock()
        found.measure_dense()
        found.run()
        counts.append(len(found.points))
    assert counts[0] < counts[-1]


def test_a_step_fits_by_the_last_one_of_its_kind(steps):
    clock, _, make = steps
    found = make(100.0)

    def takes(seconds):
        clock.now += seconds
        return 0

    found.journal.get("time of a", lambda: takes(30.0))
    found.journal.get("loss of b", lambda: takes(1.0))
    assert found.fits("time of a") and not found.fits("time of a", more=40.0)
    assert found.fits("loss of c", "loss of") and not found.fits("loss of b", until=31.5)
    clock.now += 40.0
    assert not found.fits("time of a") and found.skipped and found.fits("loss of b")


def test_the_first_point_of_a_kind_takes_what_measuring_its_parts_took(steps):
    clock, _, make = steps
    found = make(40.0)
    found.measure_dense()

    def errors():
        clock.now += 20.0
        return 0

    found.journal.get("errors of neuron a", errors)
    found._need_time("point cut int8: x", "point cut int8:", ["head"])
    with pytest.raises(search.OutOfTime):
        found._need_time("point cut int8: x", "point cut int8:", ["neuron"])


def test_the_first_loss_may_take_longer_than_the_share_of_its_method(steps):
    """Nobody knows what it takes, and losses of all groups were left out where a point took longer than that share."""
    _, listed, make = steps
    found = make(60.0)
    found.measure_dense()
    found.run()
    assert any(key.startswith("loss of neuron") for key, _, _ in listed)


def test_a_deadline_is_the_same_after_a_kill(steps):
    clock, _, make = steps
    found = make(60.0)
    found.measure_dense()
    until = found._deadline("first line", 4)
    assert clock.now < until < 60.0 / 3
    clock.now += 10.0
    assert found._deadline("first line", 4) == until
    assert found._deadline("other lines", 4) > until


@pytest.mark.parametrize(("spreads", "kept"), [([0.1], 0), ([0.6, 0.1], 1), ([0.6, 0.3, 0.4], 1)])
def test_times_that_vary_are_measured_again(monkeypatch, spreads, kept):
    """Other programs made them vary: the steadiest of up to three attempts counts."""
    made = [
        {"1": {"model": {"median": 1.0 + i, "low": 1.0 + i, "high": (1.0 + i) * (1 + s)}}}
        for i, s in enumerate(spreads)
    ]
    attempts = iter(made)
    monkeypatch.setattr(deploying, "_times_once", lambda *arguments: next(attempts))
    assert deploying.times_of({}, X, ["1"]) == made[kept]
    assert next(attempts, None) is None
