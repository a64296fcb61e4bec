"""A sparsity for each layer by its name, and a number of units for each group by its name."""

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import ModelError, PatternError, RarefyError, RecipeError, SelectorError

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("options", [{}, {"solver": "admm", "data": [X]}, {"solver": "obs", "data": [X]}])
def test_each_layer_has_its_sparsity(options):
    model = net()
    report = rarefy.prune_(model, "1x4", per_layer={"0": 0.5, "2": 0.25}, **options)
    rarefy.fold_(model)
    assert [float((model[i].weight == 0).float().mean()) for i in (0, 2, 4)] == [0.5, 0.25, 0]
    assert [(r["layer"], r["asked"]) for r in report.rows] == [("0", 0.5), ("2", 0.25)]
    assert report.summary["asked"] == 0.375


def test_one_layer_is_what_layers_and_sparsity_give():
    one, other = net(), net()
    rarefy.prune_(one, per_layer={"2": 0.5}, solver="admm", data=[X])
    rarefy.prune_(other, sparsity=0.5, layers="2", solver="admm", data=[X])
    rarefy.fold_(one), rarefy.fold_(other)
    assert torch.equal(one[2].weight, other[2].weight)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"per_layer": {}}, PatternError, "per_layer is empty: expected names of layers"),
        ({"per_layer": {"0": 0.5}, "sparsity": 0.5}, PatternError, "sparsity has no effect: per_layer gives"),
        ({"per_layer": {"0": 0.5}, "layers": "0"}, PatternError, "layers has no effect"),
        ({"per_layer": {"0": 0.5}, "allocate": "erk"}, PatternError, "allocate has no effect"),
        ({"per_layer": {"0": 0.5}, "scope": "global"}, PatternError, "per_layer fixes every layer's sparsity"),
        ({"per_layer": {"0": 0.5}, "pattern": "2:4"}, PatternError, "give layers, not per_layer"),
        ({"per_layer": {"9": 0.5}}, SelectorError, "'9' matches no layer"),
        ({"per_layer": {"*": 0.5}}, PatternError, "expected full names of layers, such as '0'"),
        ({"per_layer": {"0": 1.5}}, PatternError, "per_layer.0: expected a number between 0 and 1"),
    ],
)
def test_wrong_sparsities(options, kind, message):
    model = net()
    with pytest.raises(kind, match=message):
        rarefy.prune_(model, **options)
    assert not rarefy.masks(model)


def test_recipes_have_both():
    recipe = {
        "stages": [
            {"cut": {"counts": {"0.weight:0": 12}, "repair": False}},
            {"prune": {"per_layer": {"0": 0.5, "4": 0.25}}},
        ]
    }
    model = net()
    receipt = rarefy.compress_(model, recipe, {"evaluate": [X]})
    assert model[0].weight.shape == (12, 16) and float((model[0].weight == 0).float().mean()) == 0.5
    assert receipt.sparsity["layers"][1]["asked"] == 0.25
    with pytest.raises(RecipeError, match=r"stages\[0\].prune.per_layer: .*empty"):
        rarefy.compress_(net(), {"stages": [{"prune": {"per_layer": {}}}]})


def test_groups_keep_their_counts():
    model, equal = net(), net()
    report = rarefy.cut_(model, X, counts={"2.weight:0": 8, "0.weight:0": 12}, score="obs", data=[X])
    assert [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)] == [(12, 16), (8, 12), (4, 8)]
    assert {r["group"]: r["units"] for r in report.rows if r["stays because"] == ""} == {
        "0.weight:0": "16 -> 12",
        "2.weight:0": "16 -> 8",
    }
    rarefy.cut_(equal, X, keep=0.75)
    same = net()
    rarefy.cut_(same, X, counts={"0.weight:0": 12, "2.weight:0": 12})
    assert torch.equal(equal(X), same(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": {}}, "counts is empty: expected group names"),
        ({"counts": {"0.weight:0": 17}}, "0.weight:0 has 16 units, so at most that many stay, got 17"),
        ({"counts": {"0.weight:0": 0}}, "counts.0.weight:0: expected"),
        ({"counts": {"0.weight": 9}}, "unknown group of channel, neuron, head '0.weight'"),
        ({"counts": {"4.weight:0": 2}}, "4.weight:0 cannot be cut: the model returns it"),
        ({"counts": {"0.weight:0": 2}, "keep": 0.5}, "expected one budget, got keep and counts"),
        ({"counts": {"0.weight:0": 2}, "steps": 2}, "steps has no effect: counts gives the units"),
        ({"counts": {"0.weight:0": 16}}, "nothing would be removed"),
        ({"counts": {"0.weight:0": 2}, "units": "layer"}, "layers are removed as a whole: give keep, not counts"),
    ],
)
def test_wrong_counts(options, message):
    model = net()
    with pytest.raises(ModelError, match=message) as error:
        rarefy.cut_(model, X, **options)
    assert isinstance(error.value, RarefyError) and model[0].weight.shape == (16, 16)
