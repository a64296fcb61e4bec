"""What the guide promises of searches: layers that stay, recipes that give the same weights, state that is taken up."""

import copy
import dataclasses
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rarefy
from rarefy.onnx.engines import Callee
from rarefy.recipe.schema import Data
from rarefy.search.frontier import frontier_from_dict
from rarefy.search.optimize import is_not_in_fp32, optimize, with_cast
from rarefy.search.parts import LEVELS, PROBE_LEVELS, TIMED_LEVELS, PartMeasurer
from rarefy.search.report_text import loss_unit
from rarefy.search.search import Search
from rarefy.search.search_key import function_key
from rarefy.search.space import PATTERNS
from rarefy.search.targets import parse_targets
from rarefy.search.task import Task

torch.manual_seed(0)
X = torch.randn(128, 32)
DATA = [*X.split(32)]


def chain(widths=(32, 64, 64, 64, 4)):
    torch.manual_seed(1)
    layers = [m for pair in pairwise(widths) for m in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


NET = chain()


@pytest.fixture
def cuts_save(monkeypatch):
    saved = lambda self, method, smaller, level=None: {"1": 0.4 if method == "neuron" else 0.0}  # noqa: E731
    monkeypatch.setattr(PartMeasurer, "_saved", saved)  # times of so small a model vary


def test_layers_in_ignore_lose_no_inputs_either(cuts_save):
    frontier = optimize(NET, X[:4], DATA, "similarity", max_loss="60%", ignore=["4"], target="size", minutes=0.3)
    counts = [s["cut"]["counts"] for p in frontier.points for s in p.recipe["stages"] if "cut" in s]
    assert counts and {name for c in counts for name in c} == {"0.weight:0"}
    for point in frontier.points:
        if not point.error:
            net = copy.deepcopy(NET)
            rarefy.compress_(net, point.recipe, frontier.best.data)
            assert torch.equal(net[4].weight, NET[4].weight) and torch.equal(net[4].bias, NET[4].bias)


def test_the_recipe_of_a_model_in_bf16_gives_the_weights_that_were_found(cuts_save):
    stored = copy.deepcopy(NET).bfloat16()
    searched = copy.deepcopy(stored).float()
    assert is_not_in_fp32(stored) and not is_not_in_fp32(searched)
    frontier = optimize(searched, X[:4], DATA, "similarity", max_loss="60%", target="size", minutes=0.3)
    assert with_cast(False, frontier) is frontier
    assert any("cut" in stage for stage in frontier.best.point.recipe["stages"])
    cast = with_cast(True, frontier)
    assert cast.best.point.recipe["stages"][1:] == frontier.best.point.recipe["stages"]
    assert all(p.recipe["stages"][0] == {"cast": {"dtype": "fp32"}} for p in (*cast.points, cast.dense))
    rarefy.compress_(stored, cast.best.point.recipe, cast.best.data)
    for got, want in zip(stored.parameters(), frontier.best.compressed.parameters()):
        assert torch.equal(got, want)


def test_a_recipe_of_a_cast_alone_is_timed_against_the_model_before():
    recipe = {"stages": [{"cast": {"dtype": "fp32"}}], "evaluate": {"metric": "similarity", "latency": {}}}
    receipt = rarefy.compress_(copy.deepcopy(NET), recipe, {"evaluate": [X[:4]]})
    assert receipt.speed


def test_a_cast_at_the_beginning_changes_no_random_choice():
    random = {"prune": {"sparsity": 0.5, "score": "random"}}
    nets = [copy.deepcopy(NET) for _ in range(2)]
    rarefy.compress_(nets[0], {"stages": [random, random]})
    rarefy.compress_(nets[1], {"stages": [{"cast": {"dtype": "fp32"}}, random, random]})
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)


def test_zeros_that_are_there_cost_nothing_and_more_cost_what_was_measured():
    low, high = PROBE_LEVELS
    saved = {level: {"1": level / 2} for level in TIMED_LEVELS}
    measurer = SimpleNamespace(names=("1",))
    layer = SimpleNamespace(full_name="a", weight=torch.zeros(4, 4))
    part = PartMeasurer._weight_part(measurer, layer, PATTERNS[0], {low: 0.0, high: 0.3}, saved, 1.0)
    by_level = dict(zip(LEVELS, part.losses))
    assert by_level[low] < 1e-20 and by_level[high] == pytest.approx(0.3)


def search_of(net, data, example):
    from rarefy.evaluation.quality import metric_of
    from rarefy.search.journal import Journal

    metric = metric_of(lambda model: 1.0, net, None)
    search = Search(Task(net, example, data, metric, parse_targets(0.5, "latency"), (1,), 60.0), Journal(None, {}))
    search.measure_dense()
    return search


def test_points_of_an_earlier_search_are_compiled_as_they_were_measured():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    images = torch.randn(8, 3, 8, 8)
    search = search_of(net, [images], images[:2])
    recipe = {"stages": [{"cut": {"keep": 0.5}}], "seed": 0}
    rows = [{"layer": "0", "loss": 0.1}]
    earlier = dataclasses.replace(search.reference, name="earlier", recipe=recipe, precision="int8", speedup={"1": 2.0})
    search.journal.values["point cut int8: 1"] = {**dataclasses.asdict(earlier), "layers": rows, "predicted": {}}
    search.add_earlier_points()
    assert search.points[-1].calibrated and search.points[-1].layers == tuple(rows)


def test_layers_of_points_are_stored():
    search = search_of(NET, DATA, X[:4])
    stages, rows = [{"cut": {"units": "neuron", "counts": {"0.weight:0": 32}}}], [{"layer": "0", "loss": 0.1}]
    variant = next(iter(search.bases))
    point = search.point("narrower", variant, stages, rows=rows)
    stored = [v for k, v in search.journal.values.items() if k.startswith("point ") and v["name"] == "narrower"]
    assert not point.error and point.layers == tuple(rows) and stored[0]["layers"] == rows


def test_training_that_was_planned_is_not_refused_by_what_training_took():
    search = search_of(NET, DATA, X[:4])
    search.journal.costs["trained cut fp32: earlier"] = 1e9
    assert (search.journal.seconds_of("point") or 0.0) < 1e9
    asked = []
    search._need_time = lambda *arguments: asked.append(arguments)
    search.journal.values["training batches"] = 1
    variant = next(iter(search.bases))
    train = {"train": {"epochs": 1}}
    measured = {**dataclasses.asdict(search.reference), "predicted": {}, "layers": []}
    search._measured = lambda *arguments: measured
    search.training_data = lambda: DATA
    search.point("trained", variant, [train])
    assert not asked and any(k.startswith("trained train") for k in search.journal.values)


def test_a_function_may_be_named_as_a_metric_whose_best_number_is_0():
    def distance(model):
        return 3.0 + float((model(X) - NET(X)).abs().mean())

    frontier = optimize(NET, X[:4], DATA, distance, max_loss=0.5, higher_is_better=False, minutes=0.05)
    assert frontier.metric["name"] == "distance()" and frontier.met


def test_objects_as_default_arguments_of_a_function_do_not_change_it():
    make = lambda value: lambda model, other=value, more=(1, 2): 0.0  # noqa: E731
    assert function_key(make(nn.Linear)) != function_key(make(nn.ReLU))
    assert function_key(make(1)) != function_key(make(2)) and function_key(make([1])) != function_key(make([2]))
    assert function_key(make(torch.ones(2))) != function_key(make(torch.zeros(2)))
    assert function_key(make({"a": 1})) != function_key(make({"a": 2}))
    assert function_key(make(Path("a"))) != function_key(make(Path("b")))
    assert function_key(make(object())) == function_key(make(object()))


def test_data_for_training_alone_leave_the_samples_of_the_recipe_open():
    judge = lambda model: 1.0  # noqa: E731
    frontier = optimize(NET, X[:4], None, judge, max_loss=0.5, minutes=0.05, data_options=Data(train="t.npz"))
    assert frontier.best is not None and "samples" not in frontier.best.point.recipe.get("data", {})


def test_another_engine_takes_eval():
    engine = Callee(NET, lambda feed: [], None)
    assert engine.eval() is engine


@pytest.mark.parametrize(("limit", "unit"), [("0.5 points", "points"), ("1 %", "%"), ("1 point", "points")])
def test_losses_have_the_unit_of_the_limit(limit, unit):
    frontier = optimize(NET, X[:4], DATA, "agreement", max_loss="90%", minutes=0.05)
    assert loss_unit(dataclasses.replace(frontier, targets={**frontier.targets, "max_loss": limit})) == unit
    assert frontier_from_dict(frontier.to_dict()).met == frontier.met
