"""Convolutions over patches of images, whose strides are large."""

import pytest
import torch
from torch import nn

import rarefy
from helpers.compile_models import far
from rarefy.compiler import ops
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


@pytest.mark.parametrize("zeros", [0.0, 0.9])
@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
@pytest.mark.parametrize(
    ("inputs", "kernel", "stride", "padding"),
    [(3, 16, 16, 0), (3, 32, 32, 0), (1, (5, 12), (9, 14), (2, 3)), (6, (24, 3), (24, 3), 0)],
)
def test_patches_in_native_calls(inputs, kernel, stride, padding, precision, zeros):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(inputs, 24, kernel, stride, padding), nn.ReLU(), nn.Flatten(2), nn.Linear(4, 8))
    x = torch.randn(2, inputs, 64, 64)
    net[3] = nn.Linear(net[:3](x).shape[-1], 8)
    net[0].weight.data[torch.rand(net[0].weight.shape) < zeros] = 0
    net = net.eval()
    options = {"calibrate": [x]} if precision == "int8" else {}
    compiled = rarefy.compile(net, x, precision=precision, tune=False, **options)
    native = [n.target for call in compiled.schedule if hasattr(call, "nodes") for n in call.nodes]
    assert ops.conv2d in native
    for batch in (1, 3):
        more = torch.randn(batch, inputs, 64, 64)
        with torch.no_grad():
            assert far(net(more), compiled(more)) < (1e-5 if precision is None else 0.05)
