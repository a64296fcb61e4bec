"""Layers on packed weights, and the choice among them, against the dense model."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import math
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import rarefy
from conftest import tiny_llama
from helpers.marks import slow_except
from rarefy.common.errors import ModelError, RarefyError
from rarefy.formats.quantized_encodings import check
from rarefy.formats.quantized_encodings import encode as encode_values
from rarefy.model.quant_grid import Grid, record_grid_
from rarefy.runtime import autotune, bindings, candidates, tuning_cache
from rarefy.runtime.accelerate import accelerate_
from rarefy.runtime.kernel import GroupedKernels, Kernel
from rarefy.runtime.latency_table import latency_table
from rarefy.runtime.pack_panels import pack_quantized
from rarefy.runtime.packing import pack_bitmask, pack_conv, pack_tiles
from rarefy.runtime.sparse_layers import QuantizedEmbedding, SparseConv, SparseLinear, geometry


@pytest.fixture(autouse=True)
def _no_choices_of_others(tmp_path, monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))


needs_kernels = pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))


def pruned(O=48, C=70, sparsity=0.6):
    layer = nn.Linear(C, O)
    with torch.no_grad():
        layer.weight *= torch.rand(O, C) >= sparsity
    return layer


def sparse(layer, forms=None):
    W = layer.weight.detach()
    return SparseLinear(forms or {1: pack_bitmask(W), 5: pack_tiles(W), 50: W}, layer.bias)


@pytest.fixture(params=["kernels", "reference"])
def path(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(bindings, "missing", lambda: "no compiled kernels: for the test")
    elif bindings.missing():
        pytest.skip(str(bindings.missing()))


@pytest.mark.parametrize("shape", [(70,), (1, 70), (4, 70), (2, 3, 70), (0, 70), (7, 7, 70), (3, 0, 70)])
def test_a_sparse_layer_is_the_dense_one(shape, path):
    layer, x = pruned(), torch.randn(shape)
    torch.testing.assert_close(sparse(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_inputs_of_bf16_give_outputs_of_bf16(path):
    layer = pruned().bfloat16()
    x = torch.randn(3, 70).bfloat16()
    y = SparseLinear({1: pack_bitmask(layer.weight, "bf16")}, layer.bias)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x), rtol=2e-2, atol=2e-2)


def test_it_is_copied_saved_and_loaded_like_any_module(path):
    layer, x = pruned(), torch.randn(20, 70)
    one = sparse(layer)
    want = one(x)
    assert torch.equal(copy.deepcopy(one)(x), want)
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)
    for assign in (False, True):
        other = copy.deepcopy(layer).bfloat16().float()
        with torch.no_grad():
            other.weight *= 3
        again = sparse(other)
        before = again(x)  # its kernels exist, and are of other weights
        again.load_state_dict(copy.deepcopy(one.state_dict()), assign=assign)
        assert torch.equal(again(x), want) and not torch.equal(before, want)
    again.bias.zero_()
    torch.testing.assert_close(again(x), want - layer.bias, rtol=1e-4, atol=1e-5)
    again.bias = layer.bias.detach().clone()
    assert torch.equal(again(x), want)
    again.from1_values.data = again.from1_values.data * 2  # the old memory goes
    torch.testing.assert_close(again(x[:2]), 2 * want[:2] - layer.bias, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(one).bfloat16()
    assert half.from1_starts.dtype == torch.int64 and half.from1_values.dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()).float(), want, rtol=2e-2, atol=2e-2)


def test_gradients_reach_inputs(path):
    layer, x = pruned(), torch.randn(3, 70, requires_grad=True)
    y = sparse(layer)(x)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be():
    layer = pruned()
    with pytest.raises(ModelError, match="packed weights for batches from one input up"):
        sparse(layer, {2: layer.weight})
    with pytest.raises(ModelError, match=r"must have one shape, got \[\(48, 70\), \(70, 48\)\]"):
        sparse(layer, {1: layer.weight, 2: layer.weight.T})
    with pytest.raises(ModelError, match="the layer has 70 inputs, x has 7"):
        sparse(layer)(torch.randn(10, 7))


def fixed(times):
    """Timings by a clock that stands still but for what each way is said to take."""

    def fastest(dense, layers, inputs, clock):
        return {b: times(b, dense.weight) for b in inputs}

    return fastest


@needs_kernels
def test_what_is_fastest_takes_the_place(monkeypatch):
    monkeypatch.setattr(
        autotune, "fastest", fixed(lambda b, w: {1: ("bitmask", 3.0), 16: ("dense", 1.0)}.get(b, ("tiles", 2.0)))
    )
    model = tiny_llama()
    rarefy.prune_(model, sparsity=0.5, layers="model.layers.*.mlp.*")
    ids = torch.randint(0, 64, (2, 100))
    with torch.no_grad():
        want = [model(ids[:, :n]).logits for n in (1, 8, 100)]
        report = accelerate_(model, batch=(1, 16, 128))
        for n, y in zip((1, 8, 100), want):
            torch.testing.assert_close(model(ids[:, :n]).logits, y, rtol=1e-4, atol=1e-4)
    ours = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert ours and all([a for a, _ in m.formats] == [1, 5, math.isqrt(16 * 128) + 1] for m in ours)
    assert report.summary["layers that run sparse"] == f"{len(ours)} of {len(report.rows)}"
    assert report.notes == ("masks or quantization grids of 6 weights were folded in first",)
    by_name = {r["layer"]: r for r in report.rows}
    assert by_name["model.layers.0.mlp.up_proj"]["batch 1"] == "bitmask 3.00x"
    assert by_name["model.layers.0.self_attn.q_proj"]["why"] == "dense: 0.00% zeros"
    assert not any(isinstance(m, SparseLinear) for n, m in model.named_modules() if "self_attn" in n)


@needs_kernels
def test_real_timings_choose_something_and_keep_the_outputs():
    torch.manual_seed(0)
    net = nn.Sequential(
        pruned(512, 512, 0.95), nn.ReLU(), pruned(512, 512, 0.95), nn.Conv1d(512, 8, 1).requires_grad_()
    )
    x = torch.randn(128, 512)
    want = net[:3](x)
    report = accelerate_(net, batch=(1, 128), repeats=3)
    torch.testing.assert_close(net[:3](x), want, rtol=1e-4, atol=1e-4)
    assert [r["why"] for r in report.rows][2] == "dense: 0.00% zeros"
    assert report.rows[0]["batch 1"] == report.rows[1]["batch 1"]  # one choice a shape


@needs_kernels
def test_layers_that_stay_dense_say_why():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.attention = nn.Linear(32, 32), nn.Linear(32, 32), nn.MultiheadAttention(32, 2)
            self.b.weight = self.a.weight
            self.c = nn.Linear(32, 32).double()

    model = Tied()
    with torch.no_grad():
        for p in model.parameters():
            p *= torch.rand_like(p) > 0.5
    why = {r["layer"]: r["why"] for r in accelerate_(model).rows}
    assert why == {
        "a": "dense: its weight is shared",
        "attention.in_proj_weight": "dense: no kernel for MultiheadAttention yet",
        "attention.out_proj": "dense: MultiheadAttention reads its weight itself",
        "c": "dense: torch.float64 on cpu",
    }


def test_without_kernels_all_stays_dense(monkeypatch):
    monkeypatch.setattr(bindings, "missing", lambda: "no compiled kernels: for the test")
    net = nn.Sequential(pruned())
    report = accelerate_(net)
    assert type(net[0]) is nn.Linear and report.rows[0]["why"] == "dense: no compiled kernels: for the test"


def test_what_would_be_lost_stays_dense():
    hooked, alone = pruned(), pruned()
    hooked.register_forward_hook(lambda *a: None)
    if bindings.missing() is None:
        assert accelerate_(nn.Sequential(hooked)).rows[0]["why"] == "dense: its hooks would be lost"
        assert accelerate_(alone).rows[0]["why"] == "dense: it is the whole model: put it into a module"
        assert type(alone) is nn.Linear and not list(alone.children())


@needs_kernels
def test_modules_that_look_at_weights_find_them(monkeypatch):
    from transformers import T5Config, T5ForConditionalGeneration

    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("bitmask", 2.0)))
    model = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64))
    model.eval()
    rarefy.prune_(model, sparsity=0.5, layers="*.DenseReluDense.*")
    rarefy.fold_(model)
    dense, ids = copy.deepcopy(model), torch.randint(0, 64, (2, 8))
    with torch.no_grad():
        want = model(input_ids=ids, decoder_input_ids=ids).logits
        rarefy.accelerate_(model, layers="*.DenseReluDense.*")
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
        aware, example = copy.deepcopy(dense), {"input_ids": ids, "decoder_input_ids": ids}
        report = rarefy.accelerate_(aware, (1, 16), example, layers="*.DenseReluDense.*")
        torch.testing.assert_close(aware(**example).logits, want, rtol=1e-4, atol=1e-4)
        why = {r["layer"].split(".")[-1]: r["why"] for r in report.rows}
        assert why == {"wi": "", "wo": "dense: the model reads its weight at each call"}
    with pytest.raises(ModelError, match="wo runs on kernels.*cast before accelerate_|wi runs on kernels"):
        rarefy.cast_(model, "bf16")


@needs_kernels
def test_a_bitmask_gives_way_to_dense_where_it_was_not_tried(monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("bitmask", 2.0)))
    net = nn.Sequential(pruned())
    accelerate_(net, batch=(1,))
    layer: Any = net[0]
    assert [(a, p["format"]) for a, p in layer.formats] == [
        (1, "bitmask"),
        (candidates.MAX_SMALL_BATCH + 1, "dense"),
    ]


@pytest.mark.parametrize("repeats", [0, 1.5])
def test_wrong_repeats(repeats):
    with pytest.raises(ModelError, match="repeats: expected a whole number of at least 1"):
        accelerate_(nn.Sequential(pruned()), repeats=repeats)


@pytest.mark.parametrize("batch", [(), (0,), (1.5,), (True,), 16])
def test_wrong_batches(batch):
    with pytest.raises(ModelError, match="batch: expected whole numbers from 1 up"):
        accelerate_(nn.Sequential(pruned()), batch=batch)


@needs_kernels
def test_a_model_is_saved_before_it_is_accelerated(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("bitmask", 2.0)))
    net = nn.Sequential(pruned(), nn.ReLU(), pruned(70, 48))
    x = torch.randn(3, 70)
    with torch.no_grad():
        want = net(x)
        rarefy.save(net, tmp_path / "m")
        again = rarefy.load(tmp_path / "m", model=nn.Sequential(nn.Linear(70, 48), nn.ReLU(), nn.Linear(48, 70)))
        rarefy.accelerate_(again)
        torch.testing.assert_close(again(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="0 and 1 more run on kernels.*save before accelerate_"):
        rarefy.save(again, tmp_path / "n")
    assert not (tmp_path / "n").exists()


@needs_kernels
def test_a_layer_that_is_used_twice_stays_dense():
    shared = pruned(32, 32, 0.9)
    report = accelerate_(nn.Sequential(shared, nn.ReLU(), shared))
    assert [r["why"] for r in report.rows] == ["dense: its weight is shared"]
    with pytest.raises(ModelError, match="0 is on the meta device"):
        accelerate_(nn.Sequential(nn.Linear(4, 4, device="meta")))


def test_mixed_types_and_traces(path):
    one, x = sparse(pruned()), torch.randn(3, 70)
    y = one(x.bfloat16().requires_grad_())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), one(x), rtol=2e-2, atol=2e-2)
    with torch.no_grad(), pytest.raises(ModelError, match="torch.jit.trace cannot record kernels"):
        torch.jit.trace(one, x)


def convolution(kind, *how, sparsity=0.6, **more):
    layer = kind(*how, **more)
    with torch.no_grad():
        layer.weight *= torch.rand_like(layer.weight) >= sparsity
    return layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (convolution(nn.Conv2d, 6, 10, 3, padding=1), (2, 6, 9, 11)),
        (convolution(nn.Conv2d, 6, 10, (1, 3), stride=(2, 1), groups=2, bias=False), (3, 6, 9, 11)),
        (convolution(nn.Conv2d, 6, 10, 1), (6, 5, 5)),
        (convolution(nn.Conv2d, 6, 10, 1), (0, 6, 5, 5)),
        (convolution(nn.Conv1d, 6, 10, 5, stride=2, padding=2, dilation=2), (2, 6, 33)),
        (convolution(nn.Conv1d, 6, 10, 5, stride=2), (6, 33)),
    ],
    ids=str,
)
def test_a_sparse_convolution_is_the_dense_one(layer, shape, path):
    W = layer.weight.detach() if layer.weight.dim() == 4 else layer.weight.detach().unsqueeze(2)
    one, x = SparseConv({1: pack_conv(W, **geometry(layer)), 4: W}, like=layer), torch.randn(shape)
    assert torch.equal(one.weight, layer.weight)
    with torch.no_grad():
        want = layer(x)
        for same in (one, copy.deepcopy(one)):
            torch.testing.assert_close(same(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one(x.bfloat16()).float(), want, rtol=5e-2, atol=5e-2)
        if x.dim() == 4:
            torch.testing.assert_close(one(x.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)
    x.requires_grad_()
    ours, theirs = (torch.autograd.grad(l(x).square().sum(), x)[0] for l in (one, layer))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="convolves 6 channels, got x of shape"):
        one(torch.randn(2, 5, 9, 9))


class Pictures(nn.Module):
    """Convolutions that run sparse, and some of each kind that cannot."""

    def __init__(self):
        super().__init__()
        self.first = convolution(nn.Conv2d, 3, 32, 3, padding=1)
        self.deep = convolution(nn.Conv2d, 32, 32, 3, padding=1, groups=32)
        self.round = convolution(nn.Conv2d, 32, 32, 3, padding=1, padding_mode="circular")
        self.same = convolution(nn.Conv2d, 32, 32, 3, padding="same")
        self.point = convolution(nn.Conv2d, 32, 64, 1, stride=2)
        self.idle = convolution(nn.Conv2d, 32, 64, 1)
        self.twice = convolution(nn.ConvTranspose2d, 64, 8, 2)

    def forward(self, x):
        return self.twice(self.point(self.same(self.round(self.deep(self.first(x))))))


@needs_kernels
def test_convolutions_are_chosen_on_the_images_of_the_example(monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("convolution", 2.0) if b == 1 else ("dense", 1.0)))
    model, x = Pictures().eval(), torch.randn(9, 3, 8, 8)
    with torch.no_grad():
        want = model(x)
        blind = {r["layer"]: r["why"] for r in accelerate_(model).rows}
        report = accelerate_(model, (1, 16), x)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x[:1]), want[:1], rtol=1e-4, atol=1e-4)
    assert blind["first"] == "dense: give an example: its image size is not known"
    assert {r["layer"]: r["why"] for r in report.rows} == {
        "first": "",
        "deep": "dense: it is depthwise",
        "round": "dense: no kernel for padding (1, 1) of circular, stride (1, 1)",
        "same": "dense: no kernel for padding same of zeros, stride (1, 1)",
        "point": "",
        "idle": "dense: the example does not reach it",
        "twice": "dense: no kernel for ConvTranspose2d yet",
    }
    assert report.rows[0]["batch 1"] == "convolution 2.00x" and report.rows[0]["batch 9"] == "dense"
    assert report.rows[0]["batch 16"] == ""
    layer: Any = model.first
    assert [(a, p["format"]) for a, p in layer.formats] == [(1, "convolution"), (4, "dense")]


@needs_kernels
def test_real_timings_of_convolutions_keep_the_outputs():
    model, x = nn.Sequential(convolution(nn.Conv2d, 64, 64, 3, padding=1, sparsity=0.95)), torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        want = model(x)
        report = accelerate_(model, example=x, repeats=3)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    assert set(report.rows[0]) >= {"batch 1", "batch 2"} and report.summary["layers that run sparse"] in (
        "1 of 1",
        "0 of 1",
    )


class Norms(nn.Module):
    """A convolution, a BatchNorm, and every way in which they may be more than one after the other."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.norm = convolution(nn.Conv2d, 8, 8, 3, padding=1), nn.BatchNorm2d(8)
        nn.init.normal_(self.norm.weight), nn.init.normal_(self.norm.bias)
        self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2)
        if how == "two":
            self.other = nn.BatchNorm2d(8)
        if how == "tied":
            self.again = self.norm
        if how == "a hook":
            self.norm.register_forward_hook(lambda *_: None)

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        if self.how == "the output":
            return z, y
        if self.how == "read twice":
            return z + y
        if self.how == "a view":
            return z + y.view(-1)[0]
        if self.how == "two":
            return self.other(z) + self.other(y)
        if self.how == "called twice":
            return self.norm(self.conv(z))
        if self.how == "one more norm":
            return self.norm(z)
        return z


@needs_kernels
@pytest.mark.parametrize(
    ("how", "folds"),
    [("alone", True), ("called twice", True), ("the output", False), ("read twice", False), ("a view", False),
     ("two", False), ("one more norm", False), ("tied", False), ("a hook", False), ("training", False)],
)  # fmt: skip
@pytest.mark.parametrize("way", ["convolution", "dense"])
def test_a_batch_norm_goes_into_the_convolution_before_it(way, how, folds, monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: (way, 2.0)))
    model, x = Norms(how).train(how == "training"), torch.randn(3, 8, 6, 6)
    want = copy.deepcopy(model).eval()(x)
    report = accelerate_(model, example=x)
    torch.testing.assert_close(model.eval()(x), want, rtol=1e-4, atol=1e-4)
    assert isinstance(model.norm, nn.Identity) is folds
    assert report.rows[0]["fused"] == ("norm" if folds else "")
    assert any("call eval() first" in n for n in report.notes) is (how == "training")
    assert isinstance(model.conv, SparseConv) is (way == "convolution")
    assert all(p.is_leaf for p in model.parameters())


class Acts(nn.Module):
    """A layer, an activation, and every way in which they may be more than one after the other."""

    def __init__(self, how, act):
        super().__init__()
        self.how, self.act, self.up, self.down = how, act, pruned(32, 16), pruned(16, 32)
        if how == "tied":
            self.again = act
        if how == "a norm":
            self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        y = self.up(x)
        if self.how == "read before":
            return self.down(y.mean(-1, keepdim=True) + self.act(y))
        z = self.act(self.norm(y) if self.how == "a norm" else y)
        if self.how == "read after":
            return self.down(z) + y[..., :16] if y is not z else self.down(z) + z[..., :16]
        if self.how == "used again":
            return self.act(self.down(z))
        return self.down(z)


@needs_kernels
@pytest.mark.parametrize(
    ("how", "act", "name"),
    [("alone", nn.ReLU(), "relu"), ("alone", nn.ReLU(inplace=True), "relu"), ("alone", nn.GELU(), "gelu"),
     ("alone", nn.GELU("tanh"), "gelu_tanh"), ("alone", nn.SiLU(), "silu"), ("alone", ACT2FN["gelu"], "gelu"),
     ("alone", ACT2FN["gelu_new"], "gelu_tanh"), ("alone", nn.Tanh(), None), ("alone", nn.ReLU6(), None),
     ("alone", ACT2FN["quick_gelu"], None), ("alone", nn.Identity(), None), ("read before", nn.ReLU(), None),
     ("read after", nn.ReLU(), None), ("read after", nn.ReLU(inplace=True), "relu"), ("used again", nn.GELU(), None),
     ("tied", nn.GELU(), None), ("a norm", nn.GELU(), None)],
)  # fmt: skip
@pytest.mark.parametrize("form", ["tiles", "dense"])
def test_an_activation_goes_into_the_layer_before_it(form, how, act, name, monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: (form if b == 1 else "dense", 2.0)))
    model, x = Acts(how, act).eval(), torch.randn(5, 16)
    want = copy.deepcopy(model)(x)
    report = accelerate_(model, (1, 16), x)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x[:1]), want[:1], rtol=1e-4, atol=1e-4)
    took = form == "tiles" and name is not None
    assert (isinstance(model.act, nn.Identity) and not isinstance(act, nn.Identity)) is took
    assert report.rows[0]["fused"] == ("act" if took else "") and getattr(model.up, "activation", None) == (
        name if took else None
    )
    gradient = x.clone().requires_grad_()
    model(gradient).sum().backward()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(x) if took and name == "silu" else want
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_a_table_of_latencies_times_each_shape_once():
    model = nn.Sequential(
        convolution(nn.Conv2d, 8, 12, 3), nn.Flatten(), pruned(40, 432), pruned(40, 40), pruned(40, 40)
    )
    before = copy.deepcopy(model.state_dict())
    report = latency_table(
        model, (1, 70), torch.randn(3, 8, 8, 8), patterns=("4x1", "2:4"), sparsities=(0.5, 0.9), repeats=2
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    shapes = {r["shape"]: (r["layers"], r["count"]) for r in report.rows}
    assert shapes == {"12x8x3x3": ("0", 1), "40x432": ("2", 1), "40x40": ("3", 2)}
    cases = {(r["format"], r["pattern"], r["sparsity"], r["batch"]) for r in report.rows if r["shape"] == "40x40"}
    kinds = [("4x1", 0.5), ("4x1", 0.9), ("2:4", 0.5)]
    assert cases == {
        *((f, p, s, b) for p, s in kinds for f in ("sell", "tiles") for b in (1, 70)),
        *(("bitmask", p, s, 1) for p, s in kinds), ("csr", "4x1", 0.9, 1), ("dense", "", 0.0, 1), ("dense", "", 0.0, 70),
    }  # fmt: skip
    assert {r["batch"] for r in report.rows if r["format"] == "convolution"} == {1, 3}
    assert all(0 < r["low"] <= r["seconds"] <= r["high"] for r in report.rows)
    with pytest.raises(RarefyError, match="expected sparsity between 0 and 1"):
        latency_table(model, sparsities=(50,))


@needs_kernels
def test_eight_bits_are_chosen_only_when_asked(monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("bitmask" if b < 8 else "tiles", 2.0)))
    model, x = nn.Sequential(pruned(), nn.ReLU(), pruned(30, 48)), torch.randn(20, 70)
    want, exact = model(x), copy.deepcopy(model)
    accelerate_(exact, (1, 16))
    report = accelerate_(model, (1, 16), precision="int8")
    assert report.summary["layers that run sparse"] == "2 of 2"
    layer: Any = model[0]
    assert [(a, p["format"], p["kind"]) for a, p in layer.formats] == [(1, "bitmask", "int8"), (5, "tiles", "int8")]
    with torch.no_grad():
        torch.testing.assert_close(exact(x), want, rtol=1e-4, atol=1e-4)
        for some in (x, x[:2]):
            apart = (model(some) - want[: len(some)]).norm() / want[: len(some)].norm()
            assert 1e-4 < apart < 0.03
    with pytest.raises(ModelError, match="unknown precision 'int7'; choose from None, int8 .did you mean 'int8'"):
        accelerate_(model, precision="int7")


class StdConv(nn.Conv2d):
    """A convolution that normalises its weight at each call."""

    def forward(self, x):
        W = self.weight
        return self._conv_forward(x, W / W.flatten(1).std(1)[:, None, None, None], self.bias)


class Doubled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


@dataclasses.dataclass
class Output:
    first: Any
    hidden: Any


class Odd(nn.Module):
    """Models from which nothing may be taken out, though each output of a layer seems to have one reader."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        kind = {"std": StdConv, "doubled": Doubled}.get(how, nn.Conv2d)
        self.conv, self.norm = convolution(kind, 8, 8, 3, padding=1), nn.BatchNorm2d(8).eval()
        self.norm.running_var.uniform_(0.5, 2)
        self.act = ACT2FN["gelu_10"] if how == "clipped" else nn.GELU()
        self.listed = [self.act]

    def forward(self, x):
        h = self.norm(self.conv(20 * x))
        y = self.act(h)
        if self.how == "listed":
            y = self.listed[0](y)
        if self.how == "dataclass":
            return Output(y, h)
        if self.how == "kept":
            self.features = h
        if self.how == "reads the norm":
            y = y * self.norm.weight.sum()
        if self.how == "tied":
            y = torch.nn.functional.conv_transpose2d(y, self.conv.weight, padding=1)
        return y


@needs_kernels
@pytest.mark.parametrize("how", ["std", "doubled", "clipped", "listed", "dataclass", "kept", "reads the norm", "tied"])
def test_what_is_not_only_read_by_one_stays(how, monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("convolution", 2.0)))
    model, x = Odd(how).eval(), torch.randn(2, 8, 6, 6)

    def told(m):
        with torch.no_grad():
            y = m(x)
        return [y.first, y.hidden] if how == "dataclass" else [y, m.features] if how == "kept" else [y]

    want = told(copy.deepcopy(model))
    report = accelerate_(model, example=x)
    for a, b in zip(told(model), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    undone = how in ("reads the norm", "tied")
    assert any("outputs of the example changed" in n for n in report.notes) is undone
    assert isinstance(model.conv, SparseConv) is (how not in ("std", "doubled", "tied"))


@needs_kernels
def test_nothing_is_folded_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("convolution", 2.0)))
    model = Norms("alone").eval()
    report = accelerate_(model, example=torch.randn(2, 8, 6, 6), fold=False)
    assert isinstance(model.norm, nn.BatchNorm2d) and report.rows[0]["fused"] == ""
    line = nn.Sequential(convolution(nn.Conv1d, 4, 16, 3, padding=1), nn.BatchNorm1d(16)).eval()
    x = torch.randn(4, 16)  # without a batch: BatchNorm takes its second dimension, the length, for channels
    want = copy.deepcopy(line)(x)
    accelerate_(line, example=x)
    torch.testing.assert_close(line(x), want, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_layers_made_in_inference_mode_and_inputs_of_whole_numbers(monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("tiles", 2.0)))
    model, x = nn.Sequential(pruned()), torch.randn(3, 70)
    want = model(x).detach()
    with torch.inference_mode():
        accelerate_(model)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="the layer needs floating-point inputs, x is int64"):
        model(torch.ones(3, 70, dtype=torch.long))


@needs_kernels
def test_a_compiled_convolution_takes_channels_last(monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("dense", 1.0) if b == 1 else ("convolution", 2.0)))
    model, x = nn.Sequential(convolution(nn.Conv2d, 6, 10, 3)), torch.randn(4, 6, 9, 9)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = model(x)
        accelerate_(model, example=x)
        fast = torch.compile(model)
        for n in (1, 4):
            torch.testing.assert_close(fast(x[:n]), want[:n], rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("how", "message"),
    [({"tuning_cache": ""}, "tuning_cache: expected the path of a file"), ({"tuning_cache": "a\0b"}, "tuning_cache: expected the path of a file"),
     ({"tuning_cache": "~no such user/x"}, "is not a path on this machine")],
)  # fmt: skip
def test_choices_that_are_no_file(how, message):
    with pytest.raises(ModelError, match=message):
        accelerate_(nn.Sequential(pruned()), **how)


@needs_kernels
def test_an_accelerated_model_is_not_trained(monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("tiles", 2.0)))
    model = nn.Sequential(pruned())
    accelerate_(model)
    with pytest.raises(ModelError, match="0 runs on kernels, which have no gradients: train before accelerate_"):
        rarefy.fit_(model, [torch.randn(2, 70)], loss=lambda output, batch: output.sum())


@needs_kernels
def test_weights_that_are_computed_are_not_timed():
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(pruned()))
    for call in (accelerate_, latency_table):
        with pytest.raises(ModelError, match="still attached to 0.*remove_parametrizations"):
            call(model)


def small(kind):
    if kind == "linear":
        return sparse(pruned()), (70,)
    layer = convolution(nn.Conv2d, 6, 10, 3, stride=2, padding=1, groups=2)
    W = layer.weight.detach()
    return SparseConv({1: pack_conv(W, **geometry(layer)), 4: W}, like=layer), (6, 9, 9)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_operator_is_what_torch_expects_of_one(kind, path):
    layer, shape = small(kind)
    parts = [layer._buffers[n] for names in layer.buffer_names.values() for n in names]
    for n in (2, 60):
        x = torch.randn(n, *shape)
        torch.testing.assert_close(torch.ops.rarefy.sparse(x, parts, layer.bias, layer.spec), layer(x))
        given = (x.requires_grad_(), parts, layer.bias, layer.spec)
        assert set(torch.library.opcheck(torch.ops.rarefy.sparse.default, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_layers_compile_and_export_with_open_batches(kind):
    layer, shape = small(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    exported = torch.export.export(
        layer, (torch.randn(2, *shape),), dynamic_shapes=({0: torch.export.Dim("n")},)
    ).module()
    for n in (2, 3, 7, 60):
        x = torch.randn(n, *shape)
        with torch.no_grad():
            want = layer(x)
            torch.testing.assert_close(compiled(x), want)
            torch.testing.assert_close(exported(x), want)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    compiled(ours).square().sum().backward()
    layer(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_operator_sees_edits_and_forgets_the_dead():
    from rarefy.runtime import torch_ops

    gc.collect()
    layer, x = sparse(pruned(), {1: pack_tiles(pruned().weight)}), torch.randn(2, 70)
    parts = [layer._buffers[n] for n in layer.buffer_names[1]]
    before = torch.ops.rarefy.sparse(x, parts, layer.bias, layer.spec)
    known = len(torch_ops._layers)
    layer.bias += 1
    torch.testing.assert_close(torch.ops.rarefy.sparse(x, parts, layer.bias, layer.spec), before + 1)
    assert len(torch_ops._layers) == known
    del layer, parts
    gc.collect()
    assert len(torch_ops._layers) == known - 1


@pytest.mark.slow
def test_a_compiled_model_runs_sparse():
    torch.manual_seed(0)
    model = tiny_llama().eval()
    rarefy.prune_(model, sparsity=0.5, layers="model.layers.*")
    rarefy.fold_(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and ".layers." in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SparseLinear({1: pack_tiles(layer.weight)}, layer.bias))
    ids = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(torch.compile(model)(ids).logits, want, rtol=1e-4, atol=1e-4)


def refuse(*given):
    raise AssertionError("it was to be known")


@needs_kernels
@pytest.mark.parametrize("named", [True, "{tmp}/mine/file.json"])
def test_choices_are_kept(named, tmp_path, monkeypatch):
    named = named if named is True else named.format(tmp=tmp_path)
    file = tmp_path / "cache" / "tuning_cache.json" if named is True else tmp_path / "mine" / "file.json"
    best = {1: ("bitmask", 3.0), 16: ("dense", 1.0), 128: ("tiles", 2.0)}
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: best[b]))
    first = accelerate_(nn.Sequential(pruned(), nn.ReLU(), pruned(70, 48)), tuning_cache=named)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    monkeypatch.setattr(autotune, "fastest", refuse)
    torch.manual_seed(0)
    again = accelerate_(nn.Sequential(pruned(), nn.ReLU(), pruned(70, 48)), tuning_cache=named)
    assert [r["batch 128"] for r in again.rows] == [r["batch 128"] for r in first.rows] == ["tiles 2.00x"] * 2
    for change in (
        lambda: accelerate_(nn.Sequential(pruned()), tuning_cache=False),
        lambda: accelerate_(nn.Sequential(pruned()), (1, 16), tuning_cache=named),  # other batches
        lambda: accelerate_(nn.Sequential(pruned(64, 64)), tuning_cache=named),
    ):
        with pytest.raises(AssertionError, match="it was to be known"):
            change()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(AssertionError, match="it was to be known"):  # another machine
            accelerate_(nn.Sequential(pruned()), tuning_cache=named)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "[1]",
        lambda text: text.replace("bitmask", "bitmusk"),
        lambda text: text.replace("2.0", '"much"'),
        lambda text: text.replace('"1"', '"one"'),
        lambda text: text.replace("2.0", "null"),
        lambda text: "[" * 100_000,
        lambda text: text + " " * (tuning_cache.MAX_BYTES + 1),
        lambda text: '{"' + tuning_cache.machine_key() + '": 7}',
    ],
)
def test_choices_that_cannot_be_read_are_made_anew(damage, monkeypatch):
    net = nn.Sequential(pruned())
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("bitmask", 2.0)))
    accelerate_(copy.deepcopy(net), (1,))
    file = tuning_cache.default_file()
    file.write_text(damage(file.read_text()))
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("tiles", 4.0)))
    assert accelerate_(copy.deepcopy(net), (1,)).rows[0]["batch 1"] == "tiles 4.00x"
    monkeypatch.setattr(autotune, "fastest", refuse)
    assert accelerate_(copy.deepcopy(net), (1,)).rows[0]["batch 1"] == "tiles 4.00x"


@needs_kernels
def test_choices_that_cannot_be_kept_cost_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: ("tiles", 4.0)))
    (tmp_path / "file").write_text("")
    assert accelerate_(nn.Sequential(pruned()), (1,), tuning_cache=tmp_path / "file" / "below").rows[0]["why"] == ""
    with pytest.raises(ModelError, match="tuning_cache: expected the path of a file, True or False, got 3"):
        accelerate_(nn.Sequential(pruned()), tuning_cache=3)  # type: ignore[arg-type]


def test_where_choices_are_kept(monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", "/a")
    assert str(tuning_cache.default_file()) == "/a/tuning_cache.json"
    monkeypatch.delenv("RAREFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(tuning_cache.default_file()) == "/b/rarefy/tuning_cache.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert str(tuning_cache.default_file()) == "/c/.cache/rarefy/tuning_cache.json"


class Attention(nn.Module):
    """Three layers on the same inputs, and ways to give them others."""

    def __init__(self, how="plain"):
        super().__init__()
        self.q, self.k, self.v, self.out = pruned(48, 70), pruned(16, 70), pruned(20, 70), pruned(70, 84)
        self.how = how

    def forward(self, x):
        x = x.clone() if self.how == "in between" else x
        q = self.q(x)
        if self.how == "in between":
            x = x.mul_(1.5)
        k = self.k(x if self.how != "another" else x + 1)
        v = self.v(x) if self.how != "sometimes" or len(x) > 2 else torch.zeros(*x.shape[:-1], 20)
        return self.out(torch.cat([q, k, v], -1))


def together(monkeypatch, model, x, best=None):
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: (best or {}).get(b, ("tiles", 2.0))))
    return accelerate_(model, batch=(1, 16), example=x, tuning_cache=False)


@needs_kernels
@pytest.mark.parametrize("how", slow_except(["plain", "another", "in between", "sometimes"], "plain", "sometimes"))
def test_layers_on_the_same_inputs_run_in_one_call(monkeypatch, how):
    model, calls = Attention(how), []
    dense, x = copy.deepcopy(model), torch.randn(3, 9, 70)
    report = together(monkeypatch, model, x.clone(), {1: ("bitmask", 2.0)})
    joined = {r["layer"]: r["grouped_with"] for r in report.rows}
    want = {"plain": ["q", "q"], "sometimes": ["q", "q"], "another": ["", ""], "in between": ["", "k"]}[how]
    assert [joined["k"], joined["v"]] == want and joined["q"] == joined["out"] == ""
    run = GroupedKernels.run
    monkeypatch.setattr(GroupedKernels, "run", lambda self, x: calls.append(len(self.kernels)) or run(self, x))
    with torch.no_grad():
        for x in (
            torch.randn(1, 70),
            torch.randn(2, 70),
            torch.randn(8, 70),
            torch.randn(3, 9, 70),
            torch.randn(0, 70),
        ):
            torch.testing.assert_close(model(x.clone()), dense(x.clone()), rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(model(torch.ones(4, 70)), dense(torch.ones(4, 70)), rtol=1e-4, atol=1e-5)
    assert calls == {"plain": [3] * 5, "sometimes": [3] * 5, "another": [], "in between": [2] * 5}[how]
    gc.collect()
    assert not any(
        m._computed for m in model.modules() if isinstance(m, SparseLinear)
    )  # nothing is kept that nobody took
    if how == "in between":
        return
    x = torch.randn(5, 70, requires_grad=True)  # gradients go through each layer
    (got,), (wanted,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (model, dense))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_outputs_of_one_call_belong_to_its_inputs(monkeypatch):
    model, x = Attention(), torch.randn(4, 70)
    dense = copy.deepcopy(model)
    together(monkeypatch, model, x)
    with torch.no_grad():
        model.q(x)
        other = x.clone()
        torch.testing.assert_close(model.k(other + 1), dense.k(other + 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.k(x), dense.k(x), rtol=1e-4, atol=1e-5)  # what was made is gone: alone
        model.q(x)
        x *= 2
        torch.testing.assert_close(model.k(x), dense.k(x), rtol=1e-4, atol=1e-5)
        model.q(x)
        before = model.v(x)
        before += 1  # its own memory
        torch.testing.assert_close(model.v(x), dense.v(x), rtol=1e-4, atol=1e-5)
        model.k.bias += 1
        torch.testing.assert_close(model(x), with_bias(dense, 1)(x), rtol=1e-4, atol=1e-5)
        again = copy.deepcopy(model)
        assert again.q.grouped == (again.k, again.v) and list(again.state_dict()) == list(model.state_dict())
        model.k.bias -= 1
        torch.testing.assert_close(again(x), with_bias(dense, 0)(x), rtol=1e-4, atol=1e-5)
        file = io.BytesIO()
        torch.save(again, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert loaded.q.grouped == (loaded.k, loaded.v) and torch.equal(loaded(x), again(x))
        half = again.bfloat16()
        torch.testing.assert_close(half(x.bfloat16()).float(), loaded(x), rtol=5e-2, atol=5e-2)


def with_bias(model, more):
    model.k.bias += more
    return model


@needs_kernels
def test_outputs_of_one_call_are_taken_only_where_they_are_what_would_be_made(monkeypatch):
    model, x = Attention(), torch.randn(4, 70)
    together(monkeypatch, model, x)
    alone = copy.deepcopy(model.k)
    with torch.no_grad():
        model.q(x)
        model.k.bias += 10  # the follower is edited
        torch.testing.assert_close(model.k(x), alone(x) + 10)
        model.k.bias -= 10
        model.q(x)
        x.data = torch.randn(5, 70)  # the inputs are others, of which no counter tells
        torch.testing.assert_close(model.k(x), alone(x))
        model.q(x)
    assert model.k(x.requires_grad_()).requires_grad  # gradients are wanted now
    x = torch.randn(4, 70)
    with torch.inference_mode():
        model.q(x)
    assert not model.k(x).is_inference()
    with torch.inference_mode():
        x = torch.randn(4, 70)
        model.q(x)
        x.mul_(2)
        torch.testing.assert_close(model.k(x), alone(x))
        report = accelerate_(Attention(), batch=(1, 16), example=torch.randn(4, 70), tuning_cache=False)
    assert all(r["grouped_with"] == "" for r in report.rows)
    model.k.load_state_dict({n: b.clone() for n, b in model.k.state_dict().items()}, assign=True)
    model.q(torch.randn(4, 70)), model.q(torch.randn(2, 70)), model.q(torch.randn(2, 70))
    assert len(model.q._grouped_calls) == 2 and all(
        k[1][1] is model.k._kernel_for(1, model.k._descending[-1][2]) for k in model.q._grouped_calls.values()
    )


@needs_kernels
def test_only_layers_of_the_same_forms_are_said_to_run_together(monkeypatch):
    model = Attention()
    way = {16: "bitmask", 20: "tiles", 48: "bitmask"}
    monkeypatch.setattr(autotune, "fastest", fixed(lambda b, w: (way.get(len(w), "tiles"), 2.0)))
    report = accelerate_(model, batch=(1, 16), example=torch.randn(4, 70), tuning_cache=False)
    assert {r["layer"]: r["grouped_with"] for r in report.rows} == {"q": "", "k": "q", "v": "", "out": ""}
    assert model.q.grouped == (model.k,) and model.v.grouped == ()

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.each = nn.ModuleList(pruned(8, 70) for _ in range(18))

        def forward(self, x):
            return torch.cat([m(x) for m in self.each], -1)

    wide, x = Wide(), torch.randn(4, 70)
    want = wide(x)
    report = together(monkeypatch, wide, x)
    assert [len(m.grouped) for m in wide.each if m.grouped] == [15, 1]
    torch.testing.assert_close(wide(x), want, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_layers_in_one_call_serve_threads_at_once(monkeypatch):
    model = Attention()
    dense, wrong = copy.deepcopy(model), []
    together(monkeypatch, model, torch.randn(4, 70))

    def work():
        with torch.no_grad():
            for _ in range(200):
                x = torch.randn(3, 70)
                wrong.extend([1] * (not torch.allclose(model(x), dense(x), 1e-4, 1e-5)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    _ = [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


@needs_kernels
def test_layers_that_go_back_to_dense_leave_the_call(monkeypatch):
    class Reads(Attention):
        def forward(self, x):
            return super().forward(x) + self.k.weight.sum()

    model, x = Reads(), torch.randn(4, 70)
    dense = copy.deepcopy(model)
    report = together(monkeypatch, model, x)
    assert type(model.k) is nn.Linear and model.q.grouped == (model.v,)
    assert {r["layer"]: r["grouped_with"] for r in report.rows} == {"q": "", "k": "", "v": "q", "out": ""}
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_weights_that_do_not_go_together():
    kernels = [Kernel(pack_bitmask(torch.ones(4, 8))), Kernel(pack_tiles(torch.ones(4, 8)))]
    for some in (kernels, [], [kernels[0], Kernel(pack_bitmask(torch.ones(4, 9)))], kernels[:1] * 17):
        with pytest.raises(
            RarefyError, match="one call runs up to 16 matrices of one format, kind and number of inputs"
        ):
            GroupedKernels(some)
    with pytest.raises(RarefyError, match="the weight has 8 inputs, x has 9"):
        GroupedKernels(kernels[:1]).run(torch.ones(2, 9))


# weights on grids


def gridded(weights="int4", group=32, bias=True):
    net = nn.Sequential(nn.Linear(64, 48, bias=bias), nn.ReLU(), nn.Linear(48, 10))
    rarefy.quantize_(net, weights, group=group, layers="0")
    return rarefy.fold_(net).eval()


@needs_kernels
@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_layers_on_a_grid_read_their_bits(weights, values, monkeypatch):
    chosen = "panels"
    monkeypatch.setattr(autotune, "fastest", lambda dense, layers, inputs, clock: {n: (chosen, 2.0) for n in inputs})
    net = gridded(weights, None if weights == "int8" else 32)
    dense = copy.deepcopy(net)
    report = rarefy.accelerate_(net, (1, 8), precision=values, tuning_cache=False)
    assert isinstance(net[0], SparseLinear) and net[0].formats[0][1]["format"] == "panels"
    assert "panels 2.00x" in report.rows[0]["batch 1"] and report.rows[1]["why"].startswith("dense: 0.00% zeros")
    assert report.summary["bytes in memory after"] < 0.5 * report.summary["bytes in memory"]
    for n in (1, 5, 32, 33, 200):  # past 32 inputs by torch's own product
        x = torch.randn(n, 64)
        got, want = net[0](x), dense[0](x)
        apart = float(((got - want).norm() / want.norm()).detach())
        assert apart < (1e-5 if values is None else 0.02) and (values is None or apart > 1e-5)
    again = copy.deepcopy(net)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))
    x.requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None


@needs_kernels
def test_a_grid_that_the_weight_has_left_is_no_grid():
    net = gridded()
    with torch.no_grad():
        net[0].weight.add_(0.01)
    assert rarefy.accelerate_(net, (1,), tuning_cache=False).rows[0]["why"] == "dense: 0.00% zeros"


@needs_kernels
def test_grids_that_no_kernel_reads_stay_dense_and_say_why():
    net = gridded("int4", 16)
    assert (
        rarefy.accelerate_(net, (1,), tuning_cache=False).rows[0]["why"].endswith("no kernel for groups of 16 inputs")
    )
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    rarefy.fold_(rarefy.quantize_(conv, "int8") and conv)
    why = rarefy.accelerate_(conv, example=torch.randn(1, 3, 8, 8), tuning_cache=False).rows[0]["why"]
    assert "no kernel for quantized convolutions yet" in why


def test_an_attached_grid_is_folded_first():
    net = nn.Sequential(nn.Linear(8, 8))
    rarefy.quantize_(net, "int8")
    report = rarefy.accelerate_(net, tuning_cache=False)
    assert report.notes == ("masks or quantization grids of 1 weight were folded in first",)
    assert isinstance(net[0], nn.Linear | SparseLinear) and not hasattr(net[0], "parametrizations")


@pytest.mark.parametrize(("old", "new"), [("values", "precision"), ("choices", "tuning_cache")])
def test_old_parameter_names_are_refused(old, new):
    with pytest.raises(TypeError, match=f"accelerate_.. has no parameter '{old}': it is called '{new}' now"):
        accelerate_(nn.Sequential(nn.Linear(8, 8)), **{old: None})


@needs_kernels
def test_zeros_and_bits_together(monkeypatch):
    """A pruned and quantized layer by the kernels that skip zeros, on the grid's own codes."""
    net = nn.Sequential(nn.Linear(128, 64))
    rarefy.prune_(net, sparsity=0.7)
    rarefy.quantize_(net, "int8", fit="mse")
    rarefy.fold_(net)
    x, dense = torch.randn(4, 128), copy.deepcopy(net)
    for way in ("csr", "bitmask", "tiles", "panels"):
        monkeypatch.setattr(autotune, "fastest", lambda d, l, inputs, c, way=way: {n: (way, 2.0) for n in inputs})
        one = copy.deepcopy(net)
        rarefy.accelerate_(one, (4,), precision="int8", tuning_cache=False)
        assert one[0].formats[0][1]["format"] == way
        torch.testing.assert_close(one[0].weight, dense[0].weight)
        assert float(((one(x) - dense(x)).norm() / dense(x).norm()).detach()) < 0.02


@needs_kernels
def test_loading_puts_kernels_in_place_of_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "fastest", lambda dense, layers, inputs, clock: {n: ("panels", 2.0) for n in inputs})
    net = gridded()
    rarefy.save(net, tmp_path / "out")
    fresh = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    fast = rarefy.load(tmp_path / "out", fresh, accelerate={"batch": (1,), "tuning_cache": False}).eval()
    assert isinstance(fast[0], SparseLinear)
    x = torch.randn(2, 64)
    torch.testing.assert_close(fast(x), net(x))


@needs_kernels
@pytest.mark.parametrize("values", [None, "int8"])
def test_a_head_and_its_embedding_share_their_bits(values, monkeypatch):
    monkeypatch.setattr(autotune, "fastest", lambda dense, layers, inputs, clock: {n: ("panels", 2.0) for n in inputs})
    model = tiny_llama()
    rarefy.quantize_(model, "int8", layers=["Linear", "Embedding"])
    rarefy.fold_(model)
    ids, dense = torch.randint(0, 64, (2, 5)), copy.deepcopy(model)
    report = accelerate_(model, (1,), precision=values, tuning_cache=False)
    row = {r["layer"]: r for r in report.rows}["model.embed_tokens"]
    assert row["why"] == "" and row["batch 1"] == "panels 2.00x"
    assert isinstance(model.lm_head, SparseLinear) and isinstance(model.model.embed_tokens, QuantizedEmbedding)
    held = {b.data_ptr() for b in model.lm_head.buffers()}
    assert all(b.data_ptr() in held for b in model.model.embed_tokens.buffers())
    assert torch.equal(model.model.embed_tokens(ids), dense.model.embed_tokens(ids))
    with torch.no_grad():
        got, want = model(ids).logits, dense(ids).logits
    assert float((got - want).norm() / want.norm()) < (1e-4 if values is None else 0.05)
    assert report.summary["bytes in memory after"] < 0.55 * report.summary["bytes in memory"]
    assert torch.equal(copy.deepcopy(model).model.embed_tokens(ids), model.model.embed_tokens(ids))


@pytest.mark.parametrize("rows", [64, 63])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_rows_of_a_quantized_embedding(bits, rows):
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(bits))
    groups = 3 if bits < 8 else 1
    scale = weight.view(rows, groups, -1).abs().amax(-1) / (2 ** (bits - 1) - 1)
    grid = Grid(bits, scale.bfloat16().float() if bits < 8 else scale)
    embedding = QuantizedEmbedding(pack_quantized(grid.snap(weight), grid), torch.float32)
    ids = torch.tensor([[5, 0, 7, 2, 11, rows - 1], [5, 5, 62, 1, 3, 60]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    assert torch.allclose(embedding.weight, weight, atol=float(scale.max()))
    assert embedding(torch.zeros(0, dtype=torch.int64)).shape == (0, 96)


@needs_kernels
def test_a_head_without_a_grid_stays_shared():
    model = tiny_llama()
    rows = accelerate_(model, (1,), layers=["Linear", "Embedding"], tuning_cache=False).rows
    assert {r["layer"]: r["why"] for r in rows}["model.embed_tokens"] == "dense: its weight is shared"


def linear(width=64, out=64):
    return nn.Sequential(nn.Linear(width, out))


@pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))
def test_dense_layers_round_inputs_too(monkeypatch):
    net = linear(128, 128)
    rarefy.prune_(net, sparsity=0.7)
    rarefy.quantize_(net, "int8", activations="int8")
    rarefy.fold_(net)
    fast = copy.deepcopy(net)
    monkeypatch.setattr(autotune, "fastest", lambda d, l, inputs, c: {n: ("bitmask", 2.0) for n in inputs})
    rarefy.accelerate_(fast, (1,), tuning_cache=False)
    x = torch.randn(128, 128)
    layer: Any = fast[0]
    assert [a for a, _ in layer.formats] == [1, 33]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    torch.testing.assert_close(fast(x.clone().requires_grad_()), net(x))


def test_grids_without_a_kernel(tmp_path):
    net, grid = linear(64, 8), Grid(4, torch.full((4, 1), 0.1))
    net[0].weight.data = grid.snap(net[0].weight.data)
    record_grid_(net[0], "weight", grid)
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", linear(64, 8))
    rarefy.accelerate_(again, (1,), tuning_cache=False)
    assert candidates.why_not_quantized(net[0].weight, grid) == "no kernel for scales of 2 outputs"
    with pytest.raises(ValueError, match="no kernel for scales of 2 outputs"):
        pack_quantized(net[0].weight.detach(), grid)
    p = encode_values(torch.ones(1, 4), Grid(8, torch.ones(1, 1)), "dense")
    for part, tensor, says in (
        ("values", torch.full((4,), 128, dtype=torch.uint8), "holds -128"),
        ("scale", torch.zeros(1, 1), "must be above zero"),
    ):
        with pytest.raises(ValueError, match=says):
            check(type(p)(p.format, p.shape, p.dtype, p.parts | {part: tensor}, p.extra))
