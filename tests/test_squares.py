"""Convolutions by squares of outputs in native plans, against eager torch."""

import pytest
import torch
from torch import nn

from rarefy.engine.plan import OPS
from rarefy.engine.timed import resident_bytes
from rarefy.runtime import native, squares
from test_engine_images import equal

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="no kernels")


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


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("name", SQUARES)
def test_squares_of_outputs(isa, name, more):
    batch, C, O, padding, *sizes = SQUARES[name]
    x = torch.randn(batch, 3, *sizes)
    made = equal(Squared(C, O, padding, more), x, most=1e-6)
    by_squares = [k.squares is not None for n, k in made.kernels.items() if k.shape[2:] == (3, 3)]
    assert by_squares == [True] * (1 + more) and len(made.program) == 1


def test_few_squares_are_not_worth_their_weights():
    made = equal(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), torch.randn(2, 4, 8, 10))  # 20 of an image
    with torch.no_grad():
        made(torch.randn(1, 4, 8, 10))
    (segment,) = made.program
    for shapes, (plan,) in segment.plans.items():
        flags = [s.flag for s in plan.array if s.op == OPS["convolve"]]
        assert flags == [int(shapes[0][1] * 20 >= squares.LEAST)]
    assert {s[0][1] for s in segment.plans} == {1, 2}


@pytest.mark.parametrize("how", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel_size": (3, 5)}])
def test_other_convolutions_have_no_squares(how):
    layer = nn.Conv2d(4, 8, **{"kernel_size": 3, "padding": 2, **how})
    made = equal(nn.Sequential(layer), torch.randn(3, 4, 20, 20))
    assert all(k.squares is None for k in made.kernels.values())


def test_what_squares_take_is_told():
    made = equal(nn.Sequential(nn.Conv2d(4, 8, 3, bias=False)), torch.randn(1, 4, 20, 20))
    weight = 4 * 8 * 9 * 4
    constants = sum(t.nbytes for t in made.constants.values())
    assert resident_bytes(made) == constants + weight + weight * 16 // 9
