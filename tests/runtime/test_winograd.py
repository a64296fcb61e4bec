"""Convolutions by Winograd's algorithm in programs, against eager torch."""

from threading import Barrier, Thread

import pytest
import torch
from torch import nn

from helpers.compile_models import equal
from helpers.marks import slow_case
from rarefy.cli.benchmark import resident_bytes
from rarefy.compiler.step_structs import OPS
from rarefy.runtime import bindings, winograd

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


class Squared(nn.Module):
    """A convolution whose outputs come two by two, between products, with a sum and without."""

    def __init__(self, C, O, padding, more):
        super().__init__()
        self.before, self.conv, self.behind = (
            nn.Conv2d(3, C, 1),
            nn.Conv2d(C, O, 3, padding=padding),
            nn.Conv2d(O, 5, 1),
        )
        self.beside = nn.Conv2d(3, O, 3, padding=padding) if more else None

    def forward(self, x):
        y = self.conv(self.before(x))
        return self.behind(torch.relu(y if self.beside is None else y + self.beside(x)))


SQUARES = {  # images, inputs, outputs, padding, rows, columns
    "even": (2, 16, 64, 1, 16, 24),
    "odd": (3, 17, 70, 1, 15, 9),
    "no padding": (5, 6, 4, 0, 9, 12),
    "much padding": (1, 5, 130, 3, 10, 7),
    "single pixels": (33, 4, 8, 1, 1, 1),
    "one column": (2, 4, 9, 1, 60, 1),
    "wider than a tile": (1, 3, 5, 1, 3, 301),
    "many parts": (4, 8, 136, 1, 37, 38),
}


@pytest.mark.parametrize("more", [False, slow_case(True)])
@pytest.mark.parametrize("name", SQUARES)
def test_squares_of_outputs(isa, monkeypatch, name, more):
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    batch, C, O, padding, *sizes = SQUARES[name]
    x = torch.randn(batch, 3, *sizes)
    made = equal(Squared(C, O, padding, more), x, most=1e-6)
    by_squares = [k.winograd is not None for n, k in made.kernels.items() if k.shape[2:] == (3, 3)]
    assert by_squares == [True] * (1 + more) and len(made.schedule) == 1


@pytest.mark.parametrize(("sizes", "by_squares"), [((8, 14), 0), ((8, 15), 1), ((7, 15), 1), ((6, 15), 0)])
def test_few_squares_are_not_worth_their_weights(sizes, by_squares):
    """Whatever the number of images: their outputs do not depend on those beside them."""
    net, x = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), torch.randn(5, 4, *sizes)
    made = equal(net, x)
    with torch.no_grad():
        assert torch.equal(made(x)[:1], made(x[:1]))
    (segment,) = made.schedule
    flags = [
        s.winograd for plans in segment.programs.values() for p in plans for s in p.array if s.op == OPS["nhwc_conv"]
    ]
    assert len(flags) >= 2 and set(flags) == {by_squares}


@pytest.mark.parametrize("how", [{"stride": 2}, {"dilation": 2}, {"kernel_size": (3, 5)}])
def test_other_convolutions_have_no_squares(how):
    layer = nn.Conv2d(4, 8, **{"kernel_size": 3, "padding": 2, **how})
    made = equal(nn.Sequential(layer), torch.randn(3, 4, 20, 20))
    assert [k.winograd for k in made.kernels.values()] == [None]


def test_threads_that_come_first_share_squares():
    made = equal(nn.Sequential(nn.Conv2d(8, 64, 3)), torch.randn(2, 8, 20, 20))
    (kernel,) = made.kernels.values()
    for _ in range(20):
        kernel.winograd, together, found = None, Barrier(4), []

        def come(together=together, found=found):
            together.wait()
            found.append(winograd.weight_of(kernel))

        threads = [Thread(target=come) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(found) == 4 and {id(s) for s in found} == {id(kernel.winograd)}


def test_what_squares_take_is_told():
    made = equal(nn.Sequential(nn.Conv2d(16, 32, 3, bias=False)), torch.randn(1, 16, 20, 20))
    weight = 16 * 32 * 9 * 4
    constants = sum(t.nbytes for t in made.constants.values())
    assert resident_bytes(made) == constants + weight + weight * 16 // 9
