"""The cost that is told before a run starts."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import rarefy
from rarefy.calibration.sequential import layer_groups
from rarefy.model.batches import count_samples
from rarefy.model.layers import select_layers
from rarefy.prune.cost_model import Cost, estimate
from rarefy.prune.solver_config import SOLVERS, resolve


def deep(width=512, depth=4):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)])


def test_samples_are_counted_as_the_scout_cuts_them():
    assert count_samples({"input_ids": torch.zeros(8, 5), "mask": torch.zeros(8, 5)}) == 8
    assert count_samples((torch.zeros(6, 3), torch.zeros(6))) == 6
    assert count_samples(torch.zeros(4, 2)) == 4
    assert count_samples({"x": torch.zeros(8, 5), "y": torch.zeros(3)}) == 1  # run as it is


@pytest.mark.parametrize("name", SOLVERS)
def test_more_work_takes_longer(name):
    net, data = deep(), [torch.randn(64, 512) for _ in range(2)]
    groups = layer_groups(net, data[0], select_layers(net))
    assert {g.rows for g in groups} == {1}
    plain, more = resolve(name), resolve(rarefy.Solver(name=name, asymmetric=0.5, reconstruct=2))
    rate = {"rate": 1e11}
    a, b, c = (estimate(groups, n, n, s, **rate) for n, s in ((100, plain), (100000, plain), (100000, more)))
    assert a.seconds < b.seconds < c.seconds and a.bytes < b.bytes < c.bytes
    assert estimate(groups, 100000, 100000, plain, max_suspended_bytes=10**6, **rate).bytes < b.bytes


def test_an_allocation_costs_too():
    net = deep(16, 60)
    groups = layer_groups(net, torch.randn(4, 16), select_layers(net))
    hows = ("uniform", "owl", "errors", "search")
    found = [estimate(groups, 100, 100, resolve("obs"), how, rate=1e11) for how in hows]
    assert all(x.seconds < y.seconds for x, y in pairwise(found)) and found[0].bytes + 100_000 < found[-1].bytes


def test_words():
    assert str(Cost(12.4, 1_500_000_000)) == "about 12 s and 1.5 GB"
    assert str(Cost(125, 900_000_000)) == "about 2 min 5 s and 0.9 GB"


def test_it_is_told_before_the_bar(capsys):
    rarefy.prune_(deep(16, 2), sparsity=0.5, solver="obs", data=[torch.randn(8, 16)], progress=True)
    text = capsys.readouterr().err
    assert text.index("pruning by obs takes about 0 s") < text.index("damping") < text.rindex("2/2")
