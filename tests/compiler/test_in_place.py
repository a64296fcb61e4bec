"""Operators of torch that write over their input, where nothing else reads it."""

import pytest
import torch
from torch import nn

import rarefy
from rarefy.compiler import in_place
from rarefy.runtime.reference import ACTIVATIONS


@pytest.mark.parametrize("act", [a for a in ACTIVATIONS if a])
def test_activations_write_over_their_input(act):
    x = torch.randn(5, 7)
    want = ACTIVATIONS[act](x)
    got = in_place.activate_(x, act)
    assert torch.equal(got, want) and (got.data_ptr() == x.data_ptr()) == (act in in_place.OVERWRITE)


def test_sums_write_over_the_first_of_equal_shapes():
    x, row = torch.randn(3, 4), torch.randn(4)
    want = torch.relu(x + row)
    assert torch.equal(in_place.add_(x, row, "relu"), want)
    y, want = torch.randn(3, 4), x + row
    assert torch.equal(in_place.add_(x, row), want) and not torch.equal(x, want)
    want = x + y
    assert in_place.add_(x, y) is x and torch.equal(x, want)


class Video(nn.Module):
    """Residual blocks of 3D convolutions, which torch runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
        self.norm, self.act = nn.BatchNorm3d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.a(x))
        y = self.norm(self.b(x))
        y += x
        return self.act(y)


def test_video_networks_run_in_place():
    net, x = Video().eval(), torch.randn(2, 2, 4, 5, 5)
    made = rarefy.compile(net, x)
    before, want = x.clone(), net(x)
    assert len(made.in_place) == 2  # the activation, and the sum with its activation
    for _ in range(2):
        torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
    assert made.profile(x, repeats=1, warmup=0).rows
    torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-5)


class Kept(nn.Module):
    """What is read once more, given from outside, or a view, is not written over."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(2, 2, 1)

    def forward(self, x):
        y = self.a(x)
        z = self.a(torch.relu(x))
        return torch.relu(y) + y, torch.relu(z[:, :1]), torch.relu(x)


def test_what_others_read_stays():
    net, x = Kept().eval(), torch.randn(2, 2, 3, 3, 3)
    made, before = rarefy.compile(net, x), x.clone()
    for got, want in zip(made(x), net(x), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(x, before)
    assert not made.in_place
