"""The distance that every comparison of outputs uses."""

import math

import pytest
import torch

from rarefy.model.compare import relative_distance


@pytest.mark.parametrize(("norm", "want"), [(2, 0.5 / 5), (math.inf, 0.5 / 4)])
def test_distance_is_relative(norm, want):
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    result = expected + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    for scale in (1e-20, 1.0, 1e30):
        assert relative_distance(result * scale, expected * scale, norm=norm) == pytest.approx(want)


def test_zeros_are_compared_absolutely_or_with_a_floor():
    result, expected = torch.full((4,), 1e-3), torch.zeros(4)
    assert relative_distance(result, expected) == pytest.approx(2e-3)
    assert relative_distance(result, expected, norm=math.inf, floor=1e-6) == pytest.approx(1000)
    assert relative_distance(expected, expected, floor=1e-6) == 0


def test_integers_are_counted():
    assert relative_distance(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 9, 4])) == 0.25
    assert relative_distance(torch.tensor([True]), torch.tensor([False])) == 1


def test_shapes_and_what_is_not_finite():
    x = torch.tensor([1.0, math.inf, math.nan])
    assert relative_distance(x, x) == 0
    assert relative_distance(torch.tensor([1.1, math.inf, math.nan]), x) == pytest.approx(0.1)
    for other in ([1.0, -math.inf, math.nan], [1.0, math.inf, 0.0], [math.nan, math.inf, math.nan]):
        assert relative_distance(torch.tensor(other), x) == math.inf
    assert relative_distance(torch.ones(2), torch.ones(1, 2)) == math.inf
    assert relative_distance(torch.ones(0), torch.ones(0)) == 0
    assert relative_distance(torch.tensor([1 + 1j]), torch.tensor([1 - 1j])) == pytest.approx(math.sqrt(2))
