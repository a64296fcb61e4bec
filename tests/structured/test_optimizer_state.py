"""Optimizers after a cut."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from rarefy.common.errors import ModelError


def mlp(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 12, bias=bias), nn.ReLU(), nn.Linear(12, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3)
    )


def data(n=4):
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(16, 5, generator=g) for _ in range(n)]
    return [(b, b[:, :3].argmax(1)) for b in x]


def test_an_optimizer_continues_after_a_cut():
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    old = {n: optimizer.state[p]["exp_avg"].clone() for n, p in net.named_parameters()}
    weight = net[0].weight.detach().clone()
    rarefy.cut_(net, torch.randn(1, 5), optimizer=optimizer, steps=2)
    rows = [int((weight == w).all(1).nonzero()[0, 0]) for w in net[0].weight.detach()]  # type: ignore[union-attr, operator]
    assert torch.equal(optimizer.state[net[0].weight]["exp_avg"], old["0.weight"][rows])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(map(id, net.parameters()))
    assert len(optimizer.state) == len(list(net.parameters()))
    before = net[0].weight.detach().clone()
    F.cross_entropy(net(data()[0][0]), data()[0][1]).backward()
    optimizer.step()
    assert not torch.equal(before, net[0].weight)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_optimizers_whose_state_cannot_be_cut(kind):
    net, (x, y) = mlp(), data()[0]
    optimizer = kind(net.parameters())

    def closure():
        optimizer.zero_grad()
        value = F.cross_entropy(net(x), y)
        value.backward()
        return value

    optimizer.step(closure)
    with pytest.raises(ModelError, match=f"{kind.__name__} keeps '.*', which does not have the shape of its parameter"):
        rarefy.cut_(net, x[:2], optimizer=optimizer)
    assert net[0].out_features == 12
