"""Dense fp32 layers on few rows of input, whose weights are read once for all of them."""

import pytest
import torch
from torch import nn

import rarefy
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 7), (16, 64), (37, 130), (513, 300)])
def test_few_rows(isa, rows, inputs, outputs):
    torch.manual_seed(rows)
    net = nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, 5, bias=False)).eval()
    x = torch.randn(rows, inputs)
    with torch.no_grad():
        made, want = rarefy.compile(net, x, tune=False), net(x)
        assert float((made(x) - want).abs().max()) <= 2e-6 * float(want.abs().max())


def test_nan_of_one_row_stays_there(isa):
    net, x = nn.Sequential(nn.Linear(30, 9)).eval(), torch.randn(3, 30)
    with torch.no_grad():
        made, want = rarefy.compile(net, x, tune=False), net(x)
        x[1, 4] = torch.nan
        got = made(x)
    assert got[1].isnan().all() and torch.allclose(got[::2], want[::2], atol=1e-6)
