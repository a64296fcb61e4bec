"""What a search finds out about the parts of a model."""

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from rarefy.dependency.graph import trace
from rarefy.search import space
from rarefy.search.deploy import distance
from rarefy.search.space import MAX_CUT, filled, local_errors, removal_scores
from rarefy.structured.importance import unit_scores


class Upwards(nn.Module):
    """Channels of `a` are read by a convolution, those of `b` by a transposed one alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, 2, 1)
        self.up, self.last = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.up(torch.relu(self.b(torch.relu(self.a(x)))))))


def test_units_that_a_score_cannot_observe_are_scored_by_their_weights():
    torch.manual_seed(0)
    net, x = Upwards().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    groups = {g.name: g for g in graph.groups if g.name in ("a.weight:0", "b.weight:0")}
    assert len(groups) == 2
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    observed, by_weights = groups["a.weight:0"], groups["b.weight:0"]
    for group, score in ((observed, "activation"), (by_weights, "magnitude")):
        wanted = unit_scores(net, graph, [group], score, data=data)[group.axis]
        assert torch.equal(removal_scores(net, graph, [group], "activation", data)[group.axis], wanted)


def test_the_units_that_may_go_are_scored_as_if_all_might():
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 4)), [torch.randn(64, 8)]
    graph = trace(net, data[0])
    group = next(g for g in graph.groups if g.size == 96)
    every = unit_scores(net, graph, [group], "obs", data=data)[group.axis]
    some, most = removal_scores(net, graph, [group], "obs", data)[group.axis], int(MAX_CUT * 96)
    assert local_errors(some, "obs")[:most] == local_errors(every, "obs")[:most]
    assert torch.equal(some.argsort()[:most], every.argsort()[:most])


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_outputs_that_are_wanted_as_infinite_do_not_count(value):
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    with torch.no_grad():
        wanted = net(x)
        masked = wanted.masked_fill(torch.tensor([False, True, False]), value)
        other = nn.Linear(4, 3)
        counted = [0, 2]
        exact = (other(x) - wanted)[:, counted].square().sum() / wanted[:, counted].square().sum()
    assert distance(other, [masked], [x]) == pytest.approx(float(exact))
    assert distance(net, [wanted], [x]) == 0.0
    with torch.no_grad():
        other.bias[0] = value
    assert distance(other, [masked], [x]) is None  # infinite where the dense model is not


def test_parts_without_a_loss_take_the_mean_and_those_that_cannot_be_used_are_left_out():
    assert filled({"a": 1.0, "b": None, "c": 4.0}, ["a", "b", "c", "d"]) == {"a": 1.0, "c": 4.0, "d": 2.0}
    assert filled({"a": None}, ["a", "b"]) == {} == filled({}, ["a"])
    alike = filled({"1.q": 1.0, "3.q": 4.0, "1.v": 100.0}, ["1.q", "2.q", "3.q", "1.v", "2.v"])
    assert alike == pytest.approx({"1.q": 1.0, "2.q": 2.0, "3.q": 4.0, "1.v": 100.0, "2.v": 100.0})


def test_the_width_of_a_transformer_is_left_alone():
    """A norm averages over it: without one unit it makes other values of all others, in every block."""
    model, example = tiny_llama(), torch.randint(64, (1, 8))
    graph = trace(model, example)
    names = [g.name for g in space.cuttable_groups(model, graph, "neuron", None, None)]
    assert len(names) == 2 and all(".mlp." in name for name in names)
    assert any("embed_tokens" in g.name for g in graph.groups if g.kind == "neuron" and g.lock is None)
