"""Weights rounded to second order on calibration data, against the definition and against rounding to the nearest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from rarefy.common.errors import ModelError
from rarefy.compiler import ops
from rarefy.compiler.rounding import MAX_INPUTS, _round, _rows
from rarefy.model.compare import relative_distance
from rarefy.runtime import bindings
from rarefy.runtime.packing import unpack

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


def related(*shape):
    """Inputs that depend on each other, as those of trained networks do: mixtures of few, with some noise."""
    few = torch.randn(shape[0], max(shape[1] // 8, 1), *shape[2:])
    mixture = torch.randn(shape[1], few.shape[1], generator=torch.Generator().manual_seed(5))
    return torch.einsum("bc...,dc->bd...", few, mixture) + 0.05 * torch.randn(shape)


class Call:
    """A node of a convolution or a linear layer."""

    def __init__(self, target, *args):
        self.target, self.args = target, args


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_rows_are_those_of_unfold(stride, padding, dilation):
    torch.manual_seed(0)
    x, kernel = torch.randn(3, 5, 11, 9), (3, 2)
    node = Call(ops.conv2d, None, None, None, None, None, stride, padding, dilation, 1)
    every = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).reshape(-1, 30)
    whole = torch.cat([*_rows(node, x, kernel, 6000, torch.Generator())])
    assert torch.equal(whole, every)  # each once
    rows = torch.cat([*_rows(node, x.repeat(30, 1, 1, 1), kernel, 20 * len(every), torch.Generator().manual_seed(1))])
    assert rows.shape == (20 * len(every), 30)
    distances = torch.cdist(rows.double(), every.double())
    assert float(distances.min(1).values.max()) < 1e-5
    assert len(distances.argmin(1).unique()) == len(every)  # from everywhere


def test_rows_of_linear_layers():
    x = torch.randn(2, 7, 4)
    node = Call(ops.linear, None, None, None, None, None)
    assert torch.equal(*_rows(node, x, (), 99, torch.Generator()), x.view(14, 4))
    [some] = _rows(node, x, (), 6, torch.Generator())
    assert some.shape == (6, 4)


@pytest.mark.parametrize("shape", [(40, 64), (24, 16, 3, 3)], ids=str)
def test_the_error_on_the_data_is_smaller_and_zeros_stay(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[:, ::5] = 0
    weight[3] = 0
    x = related(4000, weight[0].numel())
    solved = _round(weight, x.T @ x)
    assert solved is not None
    rounded, grid = solved
    W = weight.flatten(1)
    assert torch.equal(grid.snap(rounded.flatten(1)), rounded.flatten(1))
    assert torch.equal(rounded == 0, (rounded == 0) | (weight == 0)) and bool((rounded[weight == 0] == 0).all())
    assert torch.allclose(grid.scale[W.any(1), 0], W[W.any(1)].abs().amax(1) / 127)
    nearest = grid.snap(W)
    errors = [float(((w - W) @ x.T).square().sum()) for w in (rounded.flatten(1), nearest)]
    assert errors[0] < 0.5 * errors[1]


def layers():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 24, 1), nn.BatchNorm2d(24), nn.Flatten())
    return nn.Sequential(*conv, nn.ReLU(), nn.Linear(24 * 64, 16)).eval()


def far(net, made, x):
    with torch.no_grad():
        return relative_distance(made(x), net(x))


def test_outputs_are_nearer_at_the_same_scales(isa):
    net, batches, other = layers(), [related(8, 16, 8, 8) for _ in range(6)], related(16, 16, 8, 8)
    options = {"precision": "int8", "calibrate": batches, "tune": False}
    second, nearest = (rarefy.compile(net, other, **options, solver=s) for s in ("obs", "rtn"))
    assert far(net, second, other) < far(net, nearest, other)
    for a, b in zip(second.kernels.values(), nearest.kernels.values()):
        assert a.held[0].kind == b.held[0].kind == "int8" and a.input_grid == b.input_grid
        assert torch.allclose(a.held[0].scales, b.held[0].scales) and not torch.equal(
            unpack(a.held[0]), unpack(b.held[0])
        )
    again = rarefy.compile(net, other, **options)
    assert torch.equal(again(other), second(other))  # the default, and no randomness


def test_weights_on_a_grid_stay():
    """Who rounded a model's weights, by whatever method, keeps the codes."""
    net, batches = layers(), [related(8, 16, 8, 8) for _ in range(4)]
    rarefy.quantize_(net, "int8", solver="obs", data=batches)
    rarefy.fold_(net)
    made = rarefy.compile(net, batches[0], precision="int8", calibrate=batches, tune=False)
    first = next(k for n, k in made.kernels.items() if n.target is ops.conv2d)
    assert torch.allclose(unpack(first.held[0]), net[0].weight, atol=1e-6)


def test_a_generator_is_calibrated_on():
    net, batches = layers(), [related(8, 16, 8, 8) for _ in range(3)]
    made = [
        rarefy.compile(net, batches[0], precision="int8", calibrate=b, tune=False) for b in (batches, iter(batches))
    ]
    assert torch.equal(made[0](batches[0]), made[1](batches[0]))


def test_inputs_that_are_all_zero_and_very_wide_layers():
    torch.manual_seed(0)
    for wide in (MAX_INPUTS + 1, 64):
        net = nn.Sequential(nn.Linear(wide, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        for x in (torch.randn(3, wide), torch.zeros(3, wide)):
            made = rarefy.compile(net, x, precision="int8", calibrate=[x], tune=False)
            assert far(net, made, x) < 0.05


def test_a_weight_that_an_embedding_reads_too_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.mix, self.head = nn.Embedding(500, 64), nn.Linear(64, 64), nn.Linear(64, 500, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            x = self.words(ids)
            return x, self.head(self.mix(x).relu())

    torch.manual_seed(0)
    net, ids = Tied().eval(), torch.randint(0, 500, (4, 9))
    options = {"precision": "int8", "calibrate": [ids], "tune": False}
    second, nearest = (rarefy.compile(net, ids, **options, solver=s)(ids) for s in ("obs", "rtn"))
    assert torch.equal(second[0], nearest[0])


def test_wrong_solver():
    with pytest.raises(ModelError, match="unknown solver 'gptq'.*obs, rtn"):
        rarefy.compile(layers(), torch.randn(2, 16, 8, 8), precision="int8", solver="gptq")
