"""Removing units: what is removed, verified and restored."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from rarefy.common.errors import ModelError
from rarefy.structured import cut as module


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.consts, self.ema = {"scale": torch.tensor(2.0)}, {"a": torch.ones(3)}

    def forward(self, x):
        return self.b(F.relu(self.a(x))) * self.consts["scale"]


def test_tensors_in_plain_attributes_stay():
    model, x = Own(), torch.randn(3, 4)
    rarefy.cut_(model, x, dry_run=True)
    rarefy.cut_(model, x)
    assert model.consts and model.ema and model.a.out_features == 3


def test_caches_of_old_sizes_are_cleared():
    class Caches(Own):
        def __init__(self):
            super().__init__()
            self.bias_cache = {}

        def forward(self, x):
            if "b" not in self.bias_cache:
                self.bias_cache["b"] = (self.a.bias * 1).detach()
            return self.b(F.relu(self.a(x) + self.bias_cache["b"]))

    model, x = Caches().eval(), torch.randn(3, 4)
    model(x)
    masked = copy.deepcopy(model.requires_grad_(False))
    rarefy.cut_(masked, x, mask_only=True)
    rarefy.cut_(model, x)
    torch.testing.assert_close(model(x), masked(x))


def test_an_attention_module_alone_cannot_be_cut():
    model, x = nn.MultiheadAttention(8, 4, batch_first=True).eval(), torch.randn(2, 5, 8)
    with pytest.raises(ModelError):
        rarefy.cut_(model, {"query": x, "key": x, "value": x})


class Labels(nn.Module):
    """Returns only classes, and depends on the number of features."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h / h.shape[-1] ** 2 + (h.shape[-1] - 8)).argmax(-1)


def test_integer_outputs_are_compared():
    torch.manual_seed(0)
    model, x = Labels(), torch.randn(64, 4)
    with pytest.raises(
        ModelError, match=r"the cut model returns integers of which \d+% differ from the masked model's"
    ):
        rarefy.cut_(model, x)
    assert model.a.out_features == 8


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.sigmoid(self.a(x)) * x.mean(-1, keepdim=True))


@pytest.mark.parametrize("rows", [1, 8])
def test_inputs_that_vary_are_not_constant(rows):
    model, x = Mixes(), torch.randn(rows, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ModelError, match=r"from the masked model's by .* \(at most 0.0001 is allowed\), so the cut was undone"
    ):
        rarefy.cut_(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_zero_features_on_the_example_are_not_removed_units():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    rarefy.cut_(model, torch.randn(1, 4))
    assert model[0].out_features == 4 and model[2].normalized_shape == (4,)


@pytest.mark.parametrize(("groups", "channels"), [(8, 64), (16, 64), (4, 8), (8, 8), (4, 64)])
def test_group_norms_lose_groups_or_channels(groups, channels):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.GroupNorm(groups, channels), nn.ReLU(), nn.Conv2d(channels, 2, 1))
    masked, x = copy.deepcopy(net), torch.randn(2, 3, 6, 6)
    report = rarefy.cut_(net, x)
    assert net[0].out_channels == channels // 2 and net[1].num_channels == channels // 2
    if net[1].num_groups < groups:  # whole groups: nothing else changes
        rarefy.cut_(masked, x, mask_only=True)
        torch.testing.assert_close(net(x), masked(x), rtol=1e-4, atol=1e-5)
    assert report.rows


class Attends(nn.Module):
    """Divides by the square root of a size that it reads from a tensor."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(6, 16)
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.emb(x)
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def test_scaled_queries_and_compensation():
    torch.manual_seed(0)
    model, x = Attends(), torch.randn(2, 5, 6)
    masked = copy.deepcopy(model)
    how = {"units": ("neuron", "head_dim"), "keep": 0.75}
    rarefy.cut_(masked, x, mask_only=True, **how)
    report = rarefy.cut_(model, x, **how)
    assert model.q.out_features == model.v.out_features == 12 and not [
        r for r in report.rows if r["stays because"][:3] == "the cut"
    ]
    torch.testing.assert_close(model(x), masked(x), rtol=1e-4, atol=1e-5)
    repaired = Attends()
    with torch.no_grad():
        repaired.emb.weight[8:] *= 1e-3  # units that hardly matter go, and repair leaves the others as they are
        repaired.emb.bias[8:] *= 1e-3
        for f in (repaired.q, repaired.k):
            f.weight[6:8] *= 1e-4
            f.weight[14:] *= 1e-4
            f.bias[6:8] *= 1e-4
            f.bias[14:] *= 1e-4
    dense, data = copy.deepcopy(repaired), [torch.randn(64, 5, 6) for _ in range(4)]
    rarefy.cut_(repaired, data[0], units=("neuron", "head_dim"), keep=0.75, layers=["emb", "q", "k"], data=data)
    assert repaired.q.out_features == 12
    y, want = repaired(data[1]), dense(data[1])
    assert float((y - want).detach().norm() / want.detach().norm()) < 2e-3


def test_a_note_says_that_nothing_was_verified():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(net[2].weight)
    report = rarefy.cut_(net, torch.randn(3, 4))
    assert "the example's outputs do not depend on the removed units: the cut was not verified" in report.notes


def test_empty_splits():
    class Splits(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            p, _ = self.a(x).split([6, 0], -1)
            return self.b(F.relu(p))

    report = rarefy.groups(Splits(), torch.randn(3, 4))
    first = report.rows[0]
    assert (first["group"], first["units"], first["stays because"]) == ("a.weight:0", 6, "")


@pytest.mark.parametrize("what", ["interrupted", "rehearsed"])
def test_an_interrupted_or_dry_run_restores_attention_modules(what, monkeypatch):
    torch.manual_seed(0)

    def make():
        layer = nn.TransformerEncoderLayer(80, 5, 64, batch_first=True)
        return nn.Sequential(
            nn.Linear(6, 80), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(80, 3)
        )

    model, x = make().eval(), torch.randn(2, 7, 6)
    before = copy.deepcopy(model.state_dict())
    if what == "rehearsed":
        rarefy.cut_(model, x, keep=0.4, steps=3, dry_run=True)
    else:
        calls = []
        real = module.remove_and_compensate

        def fails(*args, **how):
            calls.append(1)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return real(*args, **how)

        monkeypatch.setattr(module, "remove_and_compensate", fails)
        with pytest.raises(KeyboardInterrupt):
            rarefy.cut_(model, x, keep=0.4, steps=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "rarefy_cut" not in vars(model) and type(model[1].layers[0].self_attn) is nn.MultiheadAttention
    assert model[0].out_features == 80


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten()
    )
    net = nn.Sequential(net, nn.Linear(32 * 16, 5)).eval().to(dtype)
    rarefy.cut_(net, torch.randn(2, 3, 8, 8, dtype=dtype))
    assert net[0][0].out_channels == 16


def test_norms_without_parameters_are_resized():
    class Picture(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.out(self.norm(self.conv(x)).relu())

    net = Picture()
    rarefy.cut_(net, torch.randn(1, 3, 8, 8), keep=0.5)  # as many places in a row as channels
    assert net.norm.num_features == 4 and net.out.in_channels == 4
    net(torch.randn(1, 3, 8, 8))


def mlp(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 12, bias=bias), nn.ReLU(), nn.Linear(12, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3)
    )


def constant_net(last, between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), between, last)


@pytest.mark.parametrize("between", [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid()])
def test_constant_outputs_of_removed_units_move_into_the_bias(between):
    net = constant_net(nn.Linear(8, 3), between)
    masked, x = copy.deepcopy(net), torch.randn(6, 5)
    rarefy.cut_(masked, x, mask_only=True)
    rarefy.cut_(net, x)
    assert net[0].out_features == 4
    torch.testing.assert_close(net(x), masked(x), rtol=1e-5, atol=1e-6)


def test_constant_outputs_of_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3)).eval()
    masked, x = copy.deepcopy(net), torch.randn(2, 3, 9, 9)
    rarefy.cut_(masked, x, mask_only=True)
    rarefy.cut_(net, x)
    torch.testing.assert_close(net(x), masked(x), rtol=1e-5, atol=1e-5)
    for last in (nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 3, bias=False)):  # zeros at the edge; nowhere to put it
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), last).eval()
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(
            ModelError,
            match="the cut model returns outputs that differ from the masked model's by .*so the cut was undone",
        ):
            rarefy.cut_(net, x)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Hardwired(nn.Module):
    """A hard-coded size, as in many classes."""

    def __init__(self):
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x):
        y = F.relu(self.a(x)) + self.inner(F.relu(self.a(x))).reshape(-1, 12)
        return self.b(y)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.fixed = mlp(), nn.ModuleList([Hardwired(), Hardwired()])
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        y = self.mlp(x)
        return self.last(torch.cat([y[:, :2], sum(f(x) for f in self.fixed)], 1))


def test_hard_coded_sizes_are_found_and_named():
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(4, 5)
    masked = copy.deepcopy(model)
    report = rarefy.cut_(model, x)
    assert model.mlp[0].out_features == 6 and all(f.a.out_features == 12 for f in model.fixed)
    why = {r["group"]: r["stays because"] for r in report.rows}
    assert why["fixed.0.a.weight:0"].startswith("fixed.0 has a hard-coded size (")
    assert why["fixed.1.a.weight:0"].startswith("fixed.0 has a hard-coded size (")
    rarefy.cut_(masked, x, mask_only=True)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-5, atol=1e-6)


class Counts(nn.Module):
    """A count of features that no rule knows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.b(y) / y.shape[-1]
        return self.d(F.relu(self.c(F.relu(y))))


def test_groups_with_inexact_cuts_stay():
    torch.manual_seed(0)
    model, x = Counts(), torch.randn(4, 5)
    report = rarefy.cut_(model, x)
    assert model.a.out_features == 8 and model.b.out_features == 3 and model.c.out_features == 4
    why = {r["group"]: r["stays because"] for r in report.rows}
    assert why["a.weight:0"].startswith("the cut model returns outputs that differ ")


class Residual(nn.Module):
    """Two convolutions; with a constant for each channel between them, which a padded one cannot take over."""

    def __init__(self, constant):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("constant", torch.randn(8, 1, 1) if constant else None)

    def forward(self, x):
        y = self.a(x)
        return x + self.b(y if self.constant is None else y + self.constant)


def test_one_group_that_cannot_be_cut_leaves_its_likes_free():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *(Residual(i == 2) for i in range(5)))
    report = rarefy.cut_(net.eval(), torch.randn(2, 3, 7, 7), keep=0.5)
    assert [net[i].a.out_channels for i in range(1, 6)] == [4, 4, 8, 4, 4]
    why = {r["group"]: r["stays because"] for r in report.rows}
    assert why["3.a.weight:0"].startswith("the cut model returns outputs that differ ")


class Chaos(nn.Module):
    """Magnifies rounding errors by a thousand or more."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 40), nn.Linear(40, 4)

    def forward(self, x):
        return torch.sin(3e4 * self.b(torch.relu(self.a(x))))


class Asserts(Counts):
    """Fails on inputs that differ from the example."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("x", x)

    def forward(self, x):
        if not torch.equal(x, self.x):
            raise ValueError("another input")
        return super().forward(x)


def test_rounding_errors_that_a_model_magnifies_are_no_mismatch():
    torch.manual_seed(0)
    net = Chaos().eval()
    rarefy.cut_(net, torch.randn(16, 6), keep=0.5)
    assert net.a.out_features == 20


def test_inputs_that_cannot_be_changed_excuse_nothing():
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    model = Asserts(x)
    rarefy.cut_(model, x)
    assert model.a.out_features == 8 and model.c.out_features == 4
