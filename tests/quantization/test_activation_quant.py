"""Activation quantization: formulas, calibration, saving, kernels and gradients; SmoothQuant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, tiny_llama
from helpers.folders import read_index, write_index
from rarefy.calibration import static_grids
from rarefy.calibration.static_grids import static_grid
from rarefy.common.errors import ContainerError, DataError, ModelError, PatternError
from rarefy.model.activation_quant import (
    ActivationQuant,
    activation_quants,
    get_activation_quant,
    set_activation_quant_,
)
from rarefy.model.layers import all_layers
from rarefy.model.quant_grid import get_grid
from rarefy.runtime import autotune, bindings, packing, reference
from rarefy.runtime.sparse_layers import SparseLinear


def mlp():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def batches(n=4):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(64, 32, generator=rng) for _ in range(n)]


def test_dynamic_rounding_matches_the_kernels():
    x = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    weight = packing.pack_bitmask(torch.randn(4, 64), "int8")
    assert torch.equal(ActivationQuant()(x), reference.rounded(x, weight))
    assert float((ActivationQuant()(x) - x).abs().max(1).values[0] / x[0].abs().max()) <= 0.5 / 127 + 1e-6


@pytest.mark.parametrize("low", [-3.0, 0.0])
def test_static_rounding_is_to_the_nearest_of_256_points(low):
    x = torch.rand(1000) * (5 - low) + low
    grid = static_grid(x, "minmax")
    points = (torch.arange(256) - grid.zero) * grid.scale
    assert 0.0 in points.tolist()
    nearest = points[(x[:, None] - points).abs().argmin(1)]
    torch.testing.assert_close(grid(x), nearest)
    assert float((grid(x) - x).abs().max()) <= 0.51 * grid.scale


def test_observers_clip_outliers():
    torch.manual_seed(0)
    x = torch.randn(200_000)
    x[:3] = 1000.0
    narrow, whole = (static_grid(x, o).scale or 0.0 for o in ("percentile", "minmax"))
    assert 0 < narrow < 0.02 * whole
    heavy = torch.randn(100_000) ** 3
    off = {o: float((static_grid(heavy, o)(heavy) - heavy).square().sum()) for o in ("minmax", "percentile", "mse")}
    assert off["mse"] < 0.95 * off["minmax"] and off["mse"] <= off["percentile"]


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_constant_inputs_have_a_grid(observer):
    assert static_grid(torch.full((9,), 3.0), observer)(torch.tensor([3.0])) == pytest.approx(3.0, rel=0.01)
    assert static_grid(torch.zeros(9), observer)(torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("each", [500, 20])
def test_a_sample_of_many_batches_stays_small_and_keeps_their_range(monkeypatch, each):
    """Batch b has values from b to b + 1: each has the same share, so that the mean is that of all batches."""
    monkeypatch.setattr(static_grids, "SAMPLES", 64)
    monkeypatch.setattr(static_grids, "KEPT", 1000)
    sample, rng = static_grids.Sample(), torch.Generator().manual_seed(0)
    for b in range(101):
        x = b + torch.rand(each)
        x[7] = {3: -50.0, 90: 500.0}.get(b, b)
        sample.add(x, rng)
        assert sum(map(len, sample.parts)) <= 1000
    values = sample.values()
    assert (float(values.min()), float(values.max())) == (-50, 500)
    assert len({len(part) for part in sample.parts}) == 1
    assert float(torch.cat(sample.parts).clamp(0, 101).mean()) == pytest.approx(50.5, abs=1)


@pytest.mark.parametrize("activations", ["int8", "int8-static"])
def test_outputs_stay_close_and_rows_show_the_grids(activations):
    net, dense, data = mlp(), None, batches()
    dense = copy.deepcopy(net)
    report = rarefy.quantize_(net, "int8", activations=activations, data=data if "static" in activations else None)
    x = data[0]
    assert 0 < float(((net(x) - dense(x)).norm() / dense(x).norm()).detach()) < 0.03
    assert all(r["inputs"] == "dynamic" or r["inputs"].startswith("by ") for r in report.rows)
    rounds = get_activation_quant(net[0])
    assert rounds is not None
    assert (rounds.scale is None) == (activations == "int8")
    want = net[0].weight @ rounds(x).T  # the hook rounds, and nothing else
    torch.testing.assert_close(net[0](x), want.T + net[0].bias)
    net(x.requires_grad_()).square().sum().backward()
    assert x.grad.abs().sum() > 0 and net[0].parametrizations.weight.original.grad is not None


def test_images_have_one_scale_each():
    net = Net()
    rarefy.quantize_(net, "int8", activations="int8")
    x = torch.randn(3, 3, 12, 12) * torch.tensor([1.0, 100.0, 0.01])[:, None, None, None]
    alone = torch.cat([net(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x), alone)
    assert set(activation_quants(net)) == {"conv", "deep", "up", "hidden"}


@pytest.mark.parametrize("activations", ["int8", "int8-static"])
def test_activation_grids_are_copied_saved_and_loaded(activations, tmp_path):
    net, data = mlp(), batches()
    rarefy.quantize_(net, "int8", activations=activations, data=data if "static" in activations else None)
    x = data[0]
    want = net(x)
    assert torch.equal(copy.deepcopy(net)(x), want)
    other = copy.deepcopy(net)
    set_activation_quant_(other[0], None)
    assert get_activation_quant(net[0]) is not None and not torch.equal(other(x), want) and torch.equal(net(x), want)
    assert torch.equal(rarefy.fold_(copy.deepcopy(net))(x), want)
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", mlp())
    assert torch.equal(again(x), want) and activation_quants(again) == activation_quants(net)
    rarefy.save(mlp(), tmp_path / "plain")
    assert activation_quants(again)
    assert activation_quants(rarefy.load(tmp_path / "plain", again)) == {}  # the file says how its model is called


def test_attention_inputs_stay_with_a_note():
    net = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    report = rarefy.quantize_(net, "int8", activations="int8")
    assert report.notes == ("inputs not quantized: 0.in_proj_weight, 0.out_proj",)
    assert "inputs" not in report.rows[0] and "inputs" in report.rows[2]


@pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))
@pytest.mark.parametrize("sparsity", [None, 0.7])
def test_kernels_match_the_hooks(sparsity, monkeypatch):
    net = mlp()
    if sparsity:
        rarefy.prune_(net, sparsity=sparsity, layers=["0", "2"])
    rarefy.quantize_(net, "int8", activations="int8", layers=["0", "2"])
    rarefy.fold_(net)
    x, want = batches()[0], net(batches()[0])
    for way in ("panels", "tiles") if sparsity is None else ("panels", "bitmask", "tiles"):
        monkeypatch.setattr(autotune, "fastest", lambda d, l, inputs, c, way=way: {n: (way, 2.0) for n in inputs})
        fast = copy.deepcopy(net)
        report = rarefy.accelerate_(fast, (1, 64), layers=["0", "2"], tuning_cache=False)
        assert isinstance(fast[0], SparseLinear) and report.summary["layers that run sparse"] == "2 of 2"
        for n in (1, 20, 32 if way == "bitmask" else 64):  # past 32 that one is dense
            with torch.no_grad():
                torch.testing.assert_close(fast[0](x[:n]), net[0](x[:n]), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(
                    fast(x[:n]), want[:n], rtol=0, atol=0.03
                )  # an input at half a step may go either way


@pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))
def test_static_inputs_and_convolutions_stay_dense_with_a_reason():
    net, data = mlp(), batches()
    rarefy.quantize_(net, "int8", activations="int8-static", data=data)
    rarefy.fold_(net)
    assert "no kernel quantizes its inputs in this way" in rarefy.accelerate_(net, tuning_cache=False).rows[0]["why"]
    net = Net().eval()
    rarefy.prune_(net, sparsity=0.8, layers="conv")
    rarefy.quantize_(net, "int8", activations="int8", layers="conv")
    rarefy.fold_(net)
    rows = rarefy.accelerate_(net, example=torch.randn(1, 3, 12, 12), layers="conv", tuning_cache=False).rows
    assert "no kernel quantizes its inputs in this way" in rows[0]["why"]


def test_activations_in_a_recipe(tmp_path):
    stage = {"quantize": {"weights": "int8", "activations": "int8-static", "observer": "percentile"}}
    net = mlp()
    receipt = rarefy.compress_(net, {"stages": [stage]}, batches())
    assert set(activation_quants(net)) == {"0", "2"} and receipt.stages[0]["title"] == "quantized"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"activations": "int4"}, PatternError, "unknown activations 'int4'; choose from int8, int8-static"),
        ({"activations": "int8-static"}, DataError, "activations 'int8-static' reads data: give data=batches"),
        (
            {"activations": "int8-static", "data": []},
            DataError,
            "the calibration data is empty, or does not reach 0, 2",
        ),
        (
            {"activations": "int8-static", "data": [torch.full((2, 32), float("inf"))]},
            ModelError,
            "0 gets NaN or inf",
        ),
        ({"activations": "int8", "data": [torch.zeros(2, 32)]}, DataError, "data has no effect"),
        ({"smooth": 0.5}, PatternError, "smooth=0.5 has no effect without activations"),
        ({"smooth": 1.5, "activations": "int8"}, PatternError, "smooth: expected a number between 0 and 1, got 1.5"),
        ({"smooth": 0.5, "activations": "int8"}, DataError, "smooth reads data: give data=batches"),
        ({"smooth": 0.5, "activations": "int8", "data": []}, DataError, "the calibration data is empty"),
        ({"observer": "mse"}, PatternError, "observer='mse' has no effect without activations='int8-static'"),
        ({"activations": "int8-static", "observer": "max", "data": []}, PatternError, "unknown observer 'max'"),
    ],
)
def test_messages_for_wrong_arguments(options, error, says):
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=says):
        rarefy.quantize_(net, "int8", **options)
    assert list(net.state_dict()) == list(before) and not activation_quants(net) and not net[0]._forward_pre_hooks


@pytest.mark.parametrize(
    "told",
    [
        [], {"0": 3}, {"0": {"bits": 8, "scale": None}}, {"0": {"bits": 9, "scale": None, "zero": 0}},
        {"0": {"bits": 8, "scale": -1.0, "zero": 0}}, {"0": {"bits": 8, "scale": 1.0, "zero": 256}}, {"1": {"bits": 8, "scale": None, "zero": 0}},
        {"9": {"bits": 8, "scale": None, "zero": 0}}, {"0": {"bits": 8, "scale": "1", "zero": 0}}, {"0": {"bits": True, "scale": None, "zero": 0}},
    ],
)  # fmt: skip
def test_damaged_records_are_refused(told, tmp_path):
    net = mlp()
    rarefy.quantize_(net, "int8", activations="int8")
    rarefy.save(net, tmp_path / "out")
    index = read_index(tmp_path / "out")
    index["meta"]["inputs"] = told
    write_index(tmp_path / "out", index)
    with pytest.raises(ContainerError, match="inputs"):
        rarefy.load(tmp_path / "out", mlp())


def test_quantized_activations_hide_no_layer():
    net = mlp()
    rarefy.quantize_(net, "int8", activations="int8")
    assert [l.name for l in all_layers(net)] == ["0", "2"]


# smoothing


class Block(nn.Module):
    """A norm that feeds three layers, a Linear that feeds one past a ReLU, and a norm whose output a residual reads too."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.up, self.act, self.down = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)
        self.after, self.out = nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x):
        y = self.norm(x)
        z = self.q(y) * self.k(y)
        h = self.after(self.down(self.act(self.up(z))))
        return self.out(h) + h[..., :8]


def outliers():
    torch.manual_seed(0)
    net = Block().eval()
    with torch.no_grad():
        net.norm.weight[3] = 80.0  # a channel that is large for every token, and the weights that read it small
        for layer in (net.q, net.k):
            layer.weight[:, 3] *= 0.02
    return net, [torch.randn(64, 32) for _ in range(3)]


@pytest.mark.parametrize("pruned", [False, True])
def test_smoothing_keeps_outputs_and_lowers_input_maxima(pruned):
    dense, data = outliers()
    if pruned:
        rarefy.prune_(dense, "2:4", layers=["q", "k"])
    from rarefy.model.layers import select_layers
    from rarefy.quantization.smoothquant import smooth_

    smoothed = copy.deepcopy(dense)
    done, undo = smooth_(smoothed, select_layers(smoothed, ["q", "k", "up", "down", "out"]), data, 0.5)
    assert done == {"q": "norm", "k": "norm", "down": "up"}  # the residual reads `after`, nothing is moved there
    torch.testing.assert_close(smoothed(data[0]), dense(data[0]), rtol=1e-4, atol=1e-4)
    assert torch.equal(smoothed.after.weight, dense.after.weight)
    undo()
    assert all(torch.equal(a, b) for a, b in zip(smoothed.state_dict().values(), dense.state_dict().values()))
    smooth_(smoothed, select_layers(smoothed, ["q", "k", "up", "down", "out"]), data, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(rarefy.masks(smoothed).values(), rarefy.masks(dense).values()))
    off = []
    for smooth in (None, 0.5):
        one = copy.deepcopy(dense)
        rarefy.quantize_(
            one, "int8", activations="int8", smooth=smooth, layers=["q", "k"], data=data if smooth else None
        )
        off.append(float((one.q(one.norm(data[0])) - dense.q(dense.norm(data[0]))).norm().detach()))
    assert off[1] < 0.5 * off[0]


def test_smoothing_of_a_language_model_in_a_recipe():

    model = tiny_llama().eval()
    ids = torch.randint(0, 64, (2, 9))
    data = [{"input_ids": ids}]
    stage = {"quantize": {"weights": "int8", "activations": "int8", "smooth": 0.5}}
    dense = copy.deepcopy(model)
    receipt = rarefy.compress_(model, {"stages": [stage]}, data)
    assert receipt.notes[0] == "smoothed: 10 of 14 layers"  # q, k, v and gate, up behind norms; o and down are not
    with torch.no_grad():
        got, want = model(ids).logits, dense(ids).logits
    assert float((got - want).norm() / want.norm()) < 0.05


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.emb = nn.Linear(32, 1000, bias=False), nn.Embedding(1000, 32)
        self.emb.weight = self.head.weight

    def forward(self, ids):
        return self.head(self.emb(ids))


def test_embedding_indices_are_not_rounded(tmp_path):
    net = HeadFirst()
    rarefy.quantize_(net, "int8", activations="int8", layers="head")
    ids = torch.tensor([[1, 500, 999]])
    assert torch.equal(net.emb(ids)[0], net.emb.weight[ids[0]]) and set(activation_quants(net)) == {"head"}
    rarefy.save(rarefy.fold_(net), tmp_path / "out")
    assert activation_quants(rarefy.load(tmp_path / "out", HeadFirst())) == activation_quants(net)


@pytest.mark.parametrize("activations", ["int8", "int8-static"])
def test_inputs_of_attention_output_projections_are_not_rounded(activations):
    net, x = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)), torch.randn(2, 5, 32)
    report = rarefy.quantize_(net, "int8", activations=activations, data=[x] if "static" in activations else None)
    assert "0.self_attn.out_proj" in report.notes[0] and get_activation_quant(net[0].self_attn.out_proj) is None


class Behind(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.a(input=self.n(x))


def test_a_failed_call_undoes_smoothing():
    net = Behind()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="does not reach b"):
        rarefy.quantize_(net, "int8", activations="int8-static", smooth=0.5, data=[torch.randn(8, 16)])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    rarefy.quantize_(net, "int8", activations="int8", smooth=0.5, layers="a", data=[torch.randn(8, 16)])
    assert not torch.equal(net.n.weight, before["n.weight"])


def test_smoothing_keeps_a_quantized_producer():
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    rarefy.quantize_(net, "int4", layers="0")
    rarefy.fold_(net)
    rarefy.quantize_(net, "int8", activations="int8", smooth=0.5, layers="2", data=[torch.randn(8, 16)])
    assert get_grid(all_layers(net)[0]) is not None


def test_rounding_of_extreme_values():
    assert ActivationQuant()(torch.tensor([[1e-37, 0.0]])).tolist() == [[0.0, 0.0]]
    grid, x = ActivationQuant(8, 0.1, 128), torch.tensor([1e8, 300.0])
    assert torch.equal(grid(x), grid(x.clone().requires_grad_()).detach())
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    rarefy.quantize_(conv, "int8", activations="int8")
    image = torch.randn(3, 8, 8) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    torch.testing.assert_close(conv(image), conv(image[None])[0])
