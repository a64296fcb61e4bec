"""Layers on few rows of input: dense weights are read once for all of them, and the rest of a tile is left alone."""

import pytest
import torch
from torch import nn

import rarefy
from helpers.marks import slow_case, slow_except
from rarefy.compiler.program import Program
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


@pytest.mark.parametrize("rows", slow_except([1, 2, 3, 4, 5, 8], 1, 3))
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


@pytest.mark.parametrize("precision", ["int8", "int16", "bf16"])
@pytest.mark.parametrize("rows", [1, slow_case(2), 4])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 7), (16, 64), (37, 130), (513, 300)])
def test_few_rows_of_codes(isa, rows, inputs, outputs, precision):
    """Rows are the same alone and among many, which other kernels multiply."""
    torch.manual_seed(rows)
    net = nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, 5, bias=False)).eval()
    x = torch.randn(70, inputs)
    with torch.no_grad():
        made = rarefy.compile(net, x, precision=precision, tune=False)
        many, few = made(x)[:rows], made(x[:rows])
        assert float((many - few).abs().max()) <= 5e-3 * float(many.abs().max())
        assert float((few - net(x[:rows])).norm()) <= 0.05 * float(net(x).norm())


def test_static_codes_of_few_rows(isa):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 40))
    batches = list(torch.randn(6, 2, 3, 6, 6))
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        made = rarefy.compile(net.eval(), x, precision="int8", calibrate=batches, tune=False)
        assert float((made(x) - net(x)).norm()) <= 0.05 * float(net(x).norm())
    assert "adaptive_avg_pool2d" not in str(made)  # from 4 to 4 pixels: nothing to do


@pytest.mark.parametrize("precision", [None, "bf16", "int16", "int8"])
@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_no_result_depends_on_columns_that_do_not_exist(isa, precision, zeros, monkeypatch):
    """Steps leave the rest of a tile as it is: here NaN, before each call."""
    run = Program.run

    def poisoned(self, *args):
        self.memory.fill_(torch.nan)
        return run(self, *args)

    monkeypatch.setattr(Program, "run", poisoned)
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(32, 2, 64, activation="gelu", batch_first=True).eval()
    for weight in (net.linear1.weight, net.linear2.weight):
        weight.data[torch.rand(weight.shape) < zeros] = 0
    with torch.no_grad():
        made = rarefy.compile(net, torch.randn(2, 9, 32), precision=precision, tune=False)
        for shape in ((1, 3, 32), (1, 17, 32), (3, 5, 32), (1, 65, 32)):
            x = torch.randn(shape)
            assert float((made(x) - net(x)).norm()) <= (1e-5 if precision is None else 0.05) * float(net(x).norm())
