"""Linear layers over flattened images run as convolutions."""

import pytest
import torch
from torch import nn

import rarefy
from helpers.compile_models import far
from helpers.marks import slow_case
from rarefy.compiler import ops
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


class Classifier(nn.Module):
    """Convolutions and a pool, then linear layers over all pixels."""

    def __init__(self, channels=8, size=6, hidden=40, flatten=lambda x: x.flatten(1), padded=False):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, channels, 3, padding=1), nn.MaxPool2d(2)
        self.a, self.b, self.c = (
            nn.Linear(channels * size * size, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 5),
        )
        self.flatten, self.drop = flatten, nn.Dropout()
        self.beside = nn.Conv2d(channels, 4, 3, padding=1) if padded else None

    def forward(self, x):
        image = self.pool(torch.relu(self.conv(x)))
        y = torch.relu(self.a(self.drop(self.flatten(image))))
        y = self.c(torch.relu(self.b(self.drop(y))))
        return y if self.beside is None else (y, self.beside(image))


def targets(compiled):
    return [n.target for n in compiled.exported.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("channels", [slow_case(8), 5, slow_case(17)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("flatten", [lambda x: x.flatten(1), lambda x: x.view(x.shape[0], -1)])
def test_any_batch(flatten, precision, padded, channels):
    """Channels that fill no block, and images with a border for another convolution."""
    torch.manual_seed(0)
    net, x = Classifier(channels, flatten=flatten, padded=padded).eval(), torch.randn(2, 3, 12, 12)
    options = {} if precision is None else {"calibrate": [torch.randn(8, 3, 12, 12)]}
    compiled = rarefy.compile(net, x, precision=precision, tune=False, **options)
    assert ops.linear not in targets(compiled) and targets(compiled).count(ops.conv2d) == 4 + padded
    assert compiled.counts()[0] == 1
    for batch in (1, 2, 3, 70):
        more = torch.randn(batch, 3, 12, 12)
        with torch.no_grad():
            want, got = net(more), compiled(more)
        for a, b in zip(want, got) if padded else ((want, got),):
            assert far(a, b) < (1e-5 if precision is None else 0.1)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "int8"}])
def test_precisions_in_which_linear_layers_are_faster(options):
    net, x = Classifier().eval(), torch.randn(2, 3, 12, 12)
    assert targets(rarefy.compile(net, x, tune=False, **options)).count(ops.linear) == 3


def test_weights_with_zeros_stay_linear():
    net, x = Classifier().eval(), torch.randn(2, 3, 12, 12)
    net.a.weight.data[torch.rand(net.a.weight.shape) < 0.8] = 0
    compiled = rarefy.compile(net, x, tune=False)
    assert targets(compiled).count(ops.linear) == 3
    with torch.no_grad():
        assert far(net(x), compiled(x)) < 1e-5


def test_views_that_mix_images_stay():
    net = Classifier(size=12, flatten=lambda x: x.reshape(x.shape[0] // 2, -1)).eval()
    net.pool = nn.MaxPool2d(1)
    net.a = nn.Linear(2 * 8 * 144, 40)
    x = torch.randn(4, 3, 12, 12)
    compiled = rarefy.compile(net, x, tune=False)
    assert ops.linear in targets(compiled)
    with torch.no_grad():
        assert far(net(x), compiled(x)) < 1e-5


def test_saved_and_loaded(tmp_path):
    net, x = Classifier().eval(), torch.randn(2, 3, 12, 12)
    compiled = rarefy.compile(net, x, tune=False)
    rarefy.save(compiled, tmp_path / "out")
    assert torch.equal(rarefy.load(tmp_path / "out")(x), compiled(x))
