"""Symbolic dimensions against real tensors, groups of real models, and cut models against masked ones."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.structured_models import CASES, IDS, Attention, Net, language, outputs
from rarefy.common.errors import ContainerError, ModelError, RarefyError
from rarefy.dependency.graph import trace
from rarefy.dependency.symbolic_dims import Algebra, Axis, Prod, Sum, kept_mask, leaves, size
from rarefy.model.mha import PrunableMultiheadAttention
from rarefy.structured.masked_reference import MaskedReference
from rarefy.structured.structure_record import restore

# ---- the algebra against torch: what stays of a tensor must be a grid, whatever happens to it ------------------------


def grid(dims, masks):
    """Return which entries of a tensor with these dimensions stay, in its shape."""
    out = torch.ones((), dtype=torch.bool)
    for e in dims:
        out = out[..., None] & kept_mask(e, masks.get)
    return out


@pytest.mark.parametrize("seed", range(40))
def test_masks_follow_views_and_splits(seed):
    """View, split, join and permute a dimension at random: the mask of kept entries, moved by torch, must be the one that
    the algebra computes, for any masks on the axes found at the end.
    """
    rng, algebra = random.Random(seed), Algebra()
    n = rng.choice([24, 36, 48, 60])
    dims, steps = [Axis(n)], []
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(dims))
        s = size(dims[at])
        if rng.random() < 0.5 and s > 3:  # a view
            k = rng.choice([d for d in range(2, s) if s % d == 0] or [1])
            outer, inner = algebra.factor(dims[at], k)
            dims[at : at + 1] = [outer, inner]
            steps.append(lambda t, at=at, k=k: t.unflatten(at, (k, -1)))
        elif len(dims) > 1:
            i, j = rng.sample(range(len(dims)), 2)
            dims[i], dims[j] = dims[j], dims[i]
            steps.append(lambda t, i=i, j=j: t.transpose(i, j))
        elif s > 2:  # cut in two and joined the other way round
            k = rng.randint(1, s - 1)
            a, b = algebra.take(dims[at], k)
            dims[at] = Sum((b, a))
            steps.append(lambda t, at=at, k=k: torch.cat([t.narrow(at, k, t.shape[at] - k), t.narrow(at, 0, k)], at))
    start = Axis(n)
    flat = Prod(tuple(dims))
    algebra.unify(start, flat)  # the same numbers again in one row
    axes = list(dict.fromkeys(leaves(flat)))
    for _ in range(5):
        masks = {a: torch.rand(a.size) < 0.6 for a in axes if not a.lock}
        assert torch.equal(grid([start], masks), grid([flat], masks)) and size(flat) == n
        assert int(grid(dims, masks).sum()) == math.prod(int(kept_mask(e, masks.get).sum()) for e in dims)


@pytest.mark.parametrize("seed", range(20))
def test_refining_a_dimension_keeps_older_ones(seed):
    rng, algebra = random.Random(seed), Algebra()
    original = Axis(24)
    parts = algebra.cut(original, [8, 16]) if rng.random() < 0.5 else list(algebra.factor(original, 4))
    outer, inner = algebra.factor(parts[-1], 2)
    masks = {a: torch.rand(a.size) < 0.5 for a in leaves(original) if not a.lock}
    one = kept_mask(original, masks.get)
    if len(parts) == 2 and size(parts[0]) + size(parts[1]) == 24:
        want = torch.cat([kept_mask(p, masks.get) for p in parts])
    else:
        want = (kept_mask(parts[0], masks.get)[:, None] & kept_mask(parts[1], masks.get)).flatten()
    assert torch.equal(one, want)
    last = (kept_mask(outer, masks.get)[:, None] & kept_mask(inner, masks.get)).flatten()
    assert torch.equal(last, kept_mask(parts[-1], masks.get))


def test_dimensions_that_cannot_be_expressed_are_locked():
    algebra = Algebra()
    algebra.where = "view in net"
    a = Axis(6)
    algebra.factor(a, 2)
    b = Axis(6)
    algebra.take(b, 1)
    algebra.unify(a, b)  # 2 x 3 and 1 + 5
    assert all(x.lock == "shapes do not line up at view in net" for x in (*leaves(a), *leaves(b)) if x.size > 1)
    c, d = Axis(4), Axis(4, "the model returns it")
    algebra.unify(c, d)
    assert c.lock == "the model returns it"


# ---- groups ---------------------------------------------------------------------------------------------------------


def by_name(graph):
    return {g.name: g for g in graph.groups}


def test_groups_of_a_network():
    graph = trace(Net().eval(), torch.randn(2, 3, 8, 8))
    groups = by_name(graph)
    assert not graph.unknown
    stem = groups["stem.weight:0"]
    assert stem.kind == "channel" and stem.lock is None and not stem.notes
    names = {(m.name, m.dim, m.role) for m in stem.members}
    assert {("stem.weight", 0, "out"), ("norm.weight", 0, "out"), ("norm.running_var", 0, "out")} <= names
    assert ("deep.weight", 0, "out") in names and ("deep.weight", 1, "out") not in names
    assert groups["head.weight:0"].lock == "the model returns it"
    assert groups["stem.weight:1"].lock == "the model is given it"
    assert all(not n.startswith(("stem.weight:2", "stem.weight:3")) for n in groups)  # kernels are no units


def test_groups_of_attention():
    graph = trace(Attention().eval(), torch.randint(0, 11, (2, 6)))
    kinds = {(g.kind, g.size): g for g in graph.groups if g.lock is None}
    assert set(kinds) == {("neuron", 16), ("head", 4), ("neuron", 32)}
    assert "mean and variance over it in norm" in kinds["neuron", 16].notes
    assert {m.role for m in kinds["neuron", 16].members if m.name == "embed.weight"} == {
        "out"
    }  # though the head reads it
    assert {(m.name, m.dim) for m in kinds["neuron", 32].members} == {("gate.weight", 0), ("down.weight", 1)}
    locked = {g.lock for g in graph.groups if g.lock}
    assert (
        "attention divides by the root of its size in the model itself" in locked and "its rows are looked up" in locked
    )


def test_unsupported_operators_lock_their_groups():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x):
            return torch.linalg.matrix_exp(self.b(self.a(x))).sum()

    model = Odd()
    graph = trace(model, torch.randn(6, 4))
    assert [op for op, _ in graph.unknown] == ["aten.linalg_matrix_exp"]
    assert by_name(graph)["b.weight:0"].lock == "no rule for aten.linalg_matrix_exp in the model itself"
    report = rarefy.cut_(model, torch.randn(6, 4))
    assert (
        model.a.out_features == 3 and model.b.out_features == 6 and "no rule for aten.linalg_matrix_exp" in str(report)
    )


# ---- cuts -----------------------------------------------------------------------------------------------------------


SLOW = {("swin_t", 0.25), ("swin_t", 0.75), ("regnet_y_400mf", 0.25), ("regnet_y_400mf", 0.75)}
EACH = [(n, k) for n in CASES for k in (0.25, 0.5, 0.75)]


@pytest.mark.parametrize(
    ("name", "keep"), [pytest.param(*e, marks=[pytest.mark.slow] if e in SLOW else []) for e in EACH]
)
def test_a_cut_model_returns_what_the_masked_one_returns(name, keep, tmp_path):
    make, x = CASES[name]
    torch.manual_seed(0)
    dense = make().eval()
    masked, cut = copy.deepcopy(dense), copy.deepcopy(dense)
    rarefy.cut_(masked, x, keep=keep, mask_only=True)
    report = rarefy.cut_(cut, x, keep=keep)
    with torch.no_grad():
        with MaskedReference():
            want = outputs(masked, x)
        got = outputs(cut, x)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max() and want.abs().max() > 1e-3
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense, cut))
    assert after < (0.9 if keep > 0.5 else 0.8) * before
    assert report.summary["parameters"].startswith(f"{before:,} -> {after:,} (")
    rarefy.save(cut, tmp_path / "cut")  # and back into the class that it came from
    again = rarefy.load(tmp_path / "cut", model=make()).eval()
    with torch.no_grad():
        assert torch.equal(outputs(again, x), got)
    cut.train()  # it is an ordinary model
    optimizer = torch.optim.SGD([p for p in cut.parameters() if p.requires_grad], 1e-3)
    outputs(cut, x).square().mean().backward()
    optimizer.step()
    for p, (n, q) in zip(dense.parameters(), cut.named_parameters()):
        assert p.requires_grad == q.requires_grad, n


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 0.25), ("swin_t", 0.25), ("llama", 0.3), ("regnet_y_400mf", 0.26)]
)
def test_removable_units_are_removed(name, width):
    make, x = CASES[name]
    model = make().eval()
    before = sum(p.numel() for p in model.parameters())
    report = rarefy.cut_(model, x)
    free = [r for r in report.rows if r["kind"] in ("channel", "neuron", "head") and not r["stays because"]]
    for row in free:
        a, b = map(int, row["units"].split(" -> "))
        assert b == (a + 1) // 2, row
    assert sum(p.numel() for p in model.parameters()) / before == pytest.approx(width, abs=0.05)


def test_chunks_stay_equal():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(6, 3)

        def forward(self, x):
            one, two = self.a(x).chunk(2, -1)
            return self.b(one), two  # the second half is returned: it stays

    model, x = Halves(), torch.randn(2, 4)
    with pytest.raises(ModelError, match="nothing would go: a chunk takes as many"):
        rarefy.cut_(model, x)
    assert model.a.out_features == 12 and model.b.in_features == 6


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("how", [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers(kind, how, tmp_path):
    torch.manual_seed(0)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(20, 12), kind(12, 16, batch_first=True, **how)
            self.out = nn.Linear(32 if how else 16, 5)

        def forward(self, ids):
            return self.out(self.rnn(self.embed(ids))[0])

    model, x = Reads(), torch.randint(0, 20, (2, 6))
    masked = copy.deepcopy(model)
    rarefy.cut_(masked, x, mask_only=True)
    rarefy.cut_(model, x)
    assert (model.embed.embedding_dim, model.rnn.input_size, model.rnn.hidden_size) == (6, 6, 8)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-4, atol=1e-6)
    rarefy.save(model, tmp_path / "out")
    assert torch.equal(rarefy.load(tmp_path / "out", model=Reads())(x), model(x))
    model(x).sum().backward()


def test_residual_layers_are_producers():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.again, self.b = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            for _ in range(3):
                x = x + F.relu(self.again(x))
            return self.b(x)

    model, x = Adds(), torch.randn(4, 5)
    masked = copy.deepcopy(model)
    rarefy.cut_(masked, x, mask_only=True)
    rarefy.cut_(model, x)
    assert model.again.weight.shape == (4, 4)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-4, atol=1e-6)


def test_tied_weights_stay_tied_and_sizes_are_updated():
    model = Attention()
    rarefy.cut_(model, torch.randint(0, 11, (2, 6)))
    assert model.out.weight is model.embed.weight and model.num_heads == 2
    assert (model.qkv.in_features, model.qkv.out_features, model.embed.embedding_dim) == (8, 24, 8)
    assert model.norm.normalized_shape == (8,) and model.position.shape == (1, 6, 8)
    rarefy.cut_(model, torch.randint(0, 11, (2, 6)))  # and once more
    assert model.num_heads == 1 and model.embed.embedding_dim == 4 and model.out.weight is model.embed.weight
    again = Attention()

    restore(again, model.rarefy_cut, "here")
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert again.num_heads == 1 and again.out.weight is again.embed.weight


def test_the_smallest_units_are_removed_in_multiples_of_round_to():
    net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.no_grad():
        net[0].weight[[1, 4, 7]] *= 0.01
        net[2].weight[:, [1, 4, 7]] *= 0.01
    want = net[0].weight[[0, 2, 3, 5, 6, 8, 9]].clone()
    rarefy.cut_(net, torch.randn(1, 4), keep=0.7)
    assert torch.equal(net[0].weight, want)
    rarefy.cut_(net, torch.randn(1, 4), keep=0.8, round_to=2)  # 5.6 of 7
    assert net[0].out_features == 6 and net[2].in_features == 6


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"units": "chanel"}, "unknown units 'chanel'.*did you mean 'channel'"),
        ({"keep": 0}, "keep: expected a number above 0 and at most 1, got 0"),
        ({"keep": True}, "keep: expected a number above 0"),
        ({"round_to": 0}, "round_to: expected a whole number of at least 1, got 0"),
        ({"example": torch.randn(1, 5)}, "cannot be called with a batch of float32 1x5"),
        ({"layers": "9"}, "matches no layer"),
        ({"layers": "2"}, "no group of channel, neuron, head can be cut: 0.weight:1 .neuron.: the model is given it"),
        ({"units": "head"}, "no group of head can be cut"),
    ],
)
def test_wrong_arguments_leave_the_model_unchanged(how, message):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RarefyError, match=message):
        rarefy.cut_(net, **{"example": torch.randn(1, 4), **how})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net[0].out_features == 6


def test_masked_models_are_refused():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    rarefy.prune_(net, sparsity=0.5)
    with pytest.raises(ModelError, match="masks are still attached: fold_"):
        rarefy.cut_(net, torch.randn(1, 4))


def test_a_hard_coded_size_undoes_the_cut():
    class Wired(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x).view(-1, 6))

    model = Wired()
    before = copy.deepcopy(model)
    with pytest.raises(ModelError, match="the cut model does not run, so it was put back"):
        rarefy.cut_(model, torch.randn(1, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters())) and model.a.out_features == 6
    assert getattr(model, "rarefy_cut", None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": {"0.out_features": 7}}, "has no size 0.out_features that a cut could make 7"),
        ({"numbers": {"0.training": 1}}, "has no size 0.training"),
        ({"numbers": {"0.nothing": 1}}, "has no size 0.nothing"),
        ({"numbers": {"9.out_features": 1}}, "has no size 9.out_features"),
        ({"numbers": {"0.forward": 1}}, "has no size 0.forward"),
        ({"shapes": {"0.weight": [3, 5]}}, r"0.weight is \[6, 4\] in this class; no cut makes it \[3, 5\]"),
        ({"shapes": {"0.weight": [3]}}, "no cut makes it"),
        ({"shapes": {"0.weigth": [3, 4]}}, "unknown tensor of a cut '0.weigth'"),
        ({"kept": {"0.weight": {"0": [6]}}}, "the kept indices of 0.weight do not fit its shape"),
        ({"kept": {"0.weight": {"x": [0]}}}, "the kept indices of 0.weight"),
        ({"kept": {"0.weight": [0]}}, "the kept indices of 0.weight"),
        ({"kept": 3}, "the record of its cuts is damaged"),
        ({"attention": ["0"]}, "Sequential has no attention '0' that could have own heads"),
        ({"attention": [3]}, "Sequential has no attention 3"),
        ({"config": 1}, "the record of its cuts is damaged"),
        ({"blocks": {"0": [0]}}, r"Sequential has no list of blocks 0 of which a cut could keep \[0\]"),
        ({"blocks": {"": [2, 1]}}, "has no list of blocks"),
        ({"blocks": {"": [3]}}, "has no list of blocks"),
        ({"blocks": {"": []}}, "has no list of blocks"),
        ({"blocks": {"": "all"}}, "has no list of blocks"),
        ({"numbers": {"0.layer_idx": 0}}, "has no size 0.layer_idx"),
    ],
)
def test_damaged_records_are_refused(change, message):

    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ContainerError, match=message):
        restore(
            net,
            {
                "numbers": {},
                "shapes": {},
                "kept": {},
                "blocks": {},
                "attention": [],
                "base": {},
                "config": False,
                **change,
            },
            "out",
        )


# ---- repair ---------------------------------------------------------------------------------------------------------


def copies(first, last):
    """A network whose units 3 to 5 repeat units 0 to 2, weakly."""
    net = nn.Sequential(first, nn.ReLU(), last)
    with torch.no_grad():
        first.weight[3:] = first.weight[:3] * 0.5
        first.bias[3:] = first.bias[:3] * 0.5
        last.weight[:, 3:] *= 0.1
    return net


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_consumers_are_compensated(kind):
    if kind == "linear":
        net, data = copies(nn.Linear(4, 6), nn.Linear(6, 2)), [torch.randn(64, 4) for _ in range(3)]
    else:
        net = copies(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 3, bias=False))
        data = [torch.randn(8, 4, 6, 6) for _ in range(3)]
    dense, plain, repaired = net, copy.deepcopy(net), copy.deepcopy(net)
    rarefy.cut_(plain, data[0])
    rarefy.cut_(repaired, data[0], data=data)
    x = data[0] * 1.5 + 0.1  # not what was seen
    with torch.no_grad():
        lost = (plain(x) - dense(x)).norm() / dense(x).norm()
        left = (repaired(x) - dense(x)).norm() / dense(x).norm()
    assert left < 1e-2 < lost


def test_ridge_regression_matches_a_solver():
    from rarefy.structured.compensation import RIDGE, compensation
    from rarefy.structured.consumers import Moments

    x = torch.randn(500, 7) @ torch.randn(7, 7) + torch.randn(7)
    left = torch.tensor([True, False, True, True, False, True, False])
    moments = Moments.of(7)
    for part in x.split(100):
        moments.add(part)
    B, shift = compensation(moments, left, intercept=True)
    centred = (x - x.mean(0)).double()
    S = centred[:, left]
    ridge = (RIDGE + (4 / 500) ** 2) * (S.square().sum(0) / len(x)).mean()
    stacked = torch.cat([S, (len(x) * ridge).sqrt() * torch.eye(4, dtype=torch.float64)])
    target = torch.cat([centred, torch.zeros(4, 7, dtype=torch.float64)])
    want = torch.linalg.lstsq(stacked, target).solution.T
    torch.testing.assert_close(B[~left], want[~left], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(B[left], torch.eye(7, dtype=torch.float64)[left][:, left])
    torch.testing.assert_close(shift, x.mean(0).double() - B @ x.mean(0).double()[left], rtol=1e-3, atol=1e-4)


def test_batch_norms_are_recalibrated():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).eval()
    data = [torch.randn(4, 3, 8, 8) * 2 + 1 for _ in range(3)]
    rarefy.cut_(net, data[0], data=data, repair="batchnorm")
    assert net[1].num_features == 4 and net[1].momentum == 0.1 and not net[1].training
    seen = [net[0](x) for x in data]
    torch.testing.assert_close(net[1].running_mean, torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0))
    want = torch.stack([s.var((0, 2, 3), unbiased=True) for s in seen]).mean(0)
    torch.testing.assert_close(net[1].running_var, want)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"repair": "rigde"}, "unknown repair 'rigde'.*did you mean 'ridge'"),
        ({"repair": ["bias", "x"]}, "unknown repair 'x'"),
        ({"data": iter([torch.randn(1, 4)])}, "data is run through more than once: give a list or a DataLoader"),
        ({"data": [torch.randn(1, 5)]}, "cannot be called with a batch of float32 1x5"),
    ],
)
def test_messages_for_wrong_repairs(how, message):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RarefyError, match=message):
        rarefy.cut_(net, torch.randn(1, 4), **how)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- heads by number ------------------------------------------------------------------------------------------------


def test_prune_heads_removes_the_given_heads():
    model = Attention().eval()
    ids = torch.randint(0, 11, (2, 6))
    W = model.qkv.weight.detach().view(3, 4, 4, 16).clone()
    report = rarefy.prune_heads_(model, {"qkv": [1, 2]}, ids)
    assert model.num_heads == 2 and torch.equal(model.qkv.weight.view(3, 2, 4, 16), W[:, [0, 3]])
    assert model.proj.weight.shape == (16, 8) and [r["units"] for r in report.rows if r["kind"] == "head"] == ["4 -> 2"]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "qwen3"])
def test_prune_heads_of_transformers(name):
    make, x = CASES[name]
    model = make().eval()
    layer = {"llama": "model.layers.1.self_attn", "qwen3": "model.layers.1.self_attn", "gpt2": "transformer.h.1.attn"}
    where = layer.get(name, "bert.encoder.layer.1.attention")
    dense = copy.deepcopy(model)
    gone = [0, 1] if name in ("llama", "qwen3") else [2]
    rarefy.prune_heads_(model, {where: gone}, x)
    out = {"bert": "output.dense", "gpt2": "c_proj"}.get(name, "o_proj")
    W, old = (m.get_submodule(f"{where}.{out}").weight.detach() for m in (model, dense))
    W, old = (W.T, old.T) if name == "gpt2" else (W, old)
    kept = [h for h in range(4) if h not in gone]
    assert torch.equal(W.reshape(len(W), len(kept), -1), old.reshape(len(old), 4, -1)[:, kept])
    if name in ("llama", "qwen3"):
        with pytest.raises(ModelError, match="every 2 heads share a key and must be removed together"):
            rarefy.prune_heads_(dense, {where: [1]}, x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_prune_heads_of_multihead_attention(batch_first, tmp_path):
    torch.manual_seed(0)

    def make():
        return nn.TransformerEncoderLayer(8, 4, 16, batch_first=batch_first).eval()

    net, x = make(), torch.randn(2, 3, 8)
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for rows in (slice(0, 2), slice(4, 6)):
            for part in (0, 8, 16):
                masked.self_attn.in_proj_weight[part:][rows] = 0
                masked.self_attn.in_proj_bias[part:][rows] = 0
    rarefy.prune_heads_(net, {"self_attn": [0, 2]}, x)
    attention = net.self_attn
    assert isinstance(attention, nn.MultiheadAttention) and attention.num_heads == 2
    assert attention.in_proj_weight.shape == (12, 8) and attention.embed_dim == 8 and attention.head_dim == 2
    torch.testing.assert_close(net(x), masked(x))
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", model=make()).eval()
    assert torch.equal(again(x), net(x))
    rarefy.prune_(again, sparsity=0.5, score="wanda", data=[x])  # it is an attention like any other
    rarefy.fold_(again)
    assert int((again.self_attn.in_proj_weight == 0).sum()) == 48


@pytest.mark.parametrize("how", ["plain", "causal", "padding", "mask", "heads", "single", "crossed", "sequence first"])
def test_replaced_attention_matches_torch(how):
    torch.manual_seed(0)
    first = how != "sequence first"
    old = nn.MultiheadAttention(12, 3, batch_first=first).eval()
    new = PrunableMultiheadAttention.from_mha(copy.deepcopy(old))
    x, y = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    gone = torch.ones(5, 5, dtype=torch.bool).triu(1)
    q, k, v, more = x, x, x, {}
    if how == "causal":
        more = {"attn_mask": gone, "is_causal": True}
    if how == "padding":
        more = {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]), "attn_mask": gone}
    if how == "mask":
        more = {"attn_mask": torch.randn(6, 5, 5)}
    if how == "heads":
        more = {"average_attn_weights": False}
    if how == "single":
        q, k, v = x[0], x[0], x[0]
    if how in ("crossed", "sequence first"):
        k, v = y[:, :4], torch.randn(2, 4, 12)
        q, k, v = (q, k, v) if first else (t.transpose(0, 1) for t in (q, k, v))
    for weights in (True, False):
        a, b = (m(q, k, v, need_weights=weights, **more) for m in (old, new))
        torch.testing.assert_close(a[0], b[0])
        assert (a[1] is None) == (b[1] is None) == (not weights)
        if weights:
            torch.testing.assert_close(a[1], b[1])
    assert not PrunableMultiheadAttention.supports(nn.MultiheadAttention(12, 3, add_bias_kv=True))
    assert not PrunableMultiheadAttention.supports(nn.MultiheadAttention(12, 3, kdim=6))


@pytest.mark.parametrize("keep", [0.3, 0.55])
def test_multihead_attention_is_cut_where_heads_do_not_divide(keep, tmp_path):
    """5 heads of 16 in 80 features: keeping 0.3 divides neither."""
    torch.manual_seed(0)

    def make():
        layer = nn.TransformerEncoderLayer(80, 5, 64, batch_first=True)
        return nn.Sequential(
            nn.Linear(6, 80), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(80, 3)
        ).eval()

    model, x = make(), torch.randn(2, 7, 6)
    masked = copy.deepcopy(model)
    rarefy.cut_(masked, x, keep=keep, mask_only=True)
    assert type(masked[1].layers[0].self_attn) is nn.MultiheadAttention
    report = rarefy.cut_(model, x, keep=keep)
    assert all(
        not r["stays because"]
        for r in report.rows
        if r["kind"] in ("head", "neuron") and r["units"][:2] in ("5 ", "80", "64")
    )
    assert model[1].layers[0].self_attn.num_heads == round(5 * keep + 0.01) and model[0].out_features == round(
        80 * keep
    )
    with MaskedReference(), torch.no_grad():
        want = masked(x)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    rarefy.save(model, tmp_path / "out")
    assert torch.equal(rarefy.load(tmp_path / "out", model=make()).eval()(x), model(x))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"qkv": [4]}, r"qkv has heads 0 to 3: give a list of such numbers, got \[4\]"),
        ({"qkv": 0}, "qkv has heads 0 to 3: give a list of such numbers, got 0"),
        ({"qkv": []}, "qkv has heads 0 to 3"),
        ({"qkv": "1"}, "qkv has heads 0 to 3"),
        ({"qkv": [0, 1, 2, 3]}, "all of its 4 heads would be removed"),
        ({"gate": [0]}, "'gate' has no heads; attention modules: "),
        ([0], "heads is {name of an attention module"),
    ],
)
def test_messages_for_wrong_heads(heads, message):
    model = Attention()
    with pytest.raises(ModelError, match=message):
        rarefy.prune_heads_(model, heads, torch.randint(0, 11, (2, 6)))
    assert model.num_heads == 4 and model.qkv.out_features == 48


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.consts, self.ema = {"scale": torch.tensor(2.0)}, {"a": torch.ones(3)}

    def forward(self, x):
        return self.b(F.relu(self.a(x))) * self.consts["scale"]


@pytest.mark.parametrize("heads", [3, 5])
@pytest.mark.parametrize("keep", [0.5, 0.75])
def test_odd_numbers_of_heads_are_cut(heads, keep):
    model = language("Llama", hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=heads, head_dim=8)
    rarefy.cut_(model.eval(), IDS, "head", keep)
    left = int(heads * keep + 0.5)
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.out_features == 8 * left and layer.self_attn.head_dim == 8
    assert model.config.num_attention_heads == left


def test_a_cut_after_prune_heads():
    model = language("Llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64).eval()
    rarefy.prune_heads_(model, {"model.layers.0.self_attn": [0, 1]}, IDS)
    rarefy.cut_(model, IDS, "head", 0.5)
    assert [l.self_attn.k_proj.out_features for l in model.model.layers] == [16, 16]


def test_ignored_layers_lose_no_outputs():
    model = language("Llama", num_key_value_heads=2).eval()
    rarefy.cut_(model, IDS, ignore="model.embed_tokens")
    assert model.model.embed_tokens.embedding_dim == 48 and model.model.layers[0].mlp.gate_proj.out_features == 48
    model = language("Llama", num_key_value_heads=2).eval()
    rarefy.cut_(model, IDS, layers="*.mlp.*")
    assert model.config.hidden_size == 48 and model.config.intermediate_size == 48
    with pytest.raises(ModelError, match="`layers` means groups at least half of whose makers these layers are"):
        rarefy.cut_(model, IDS, layers="*.down_proj")


@pytest.mark.parametrize("what", ["parameters", "flops"])
def test_budgets_keep_blocks_equal(what):
    model = language("Llama", num_key_value_heads=2, num_hidden_layers=6, hidden_size=64, intermediate_size=192).eval()
    rarefy.cut_(model, IDS, **{what: 0.6})
    assert len({l.mlp.gate_proj.out_features for l in model.model.layers}) == 1 and model.rarefy_cut["config"]


def test_the_title_of_a_masked_model():
    report = rarefy.cut_(Own(), torch.randn(3, 4), mask_only=True)
    assert report.title == "cut: units are zero, nothing left"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"units": 0.5}, "units: expected one of channel, .* got 0.5"),
        ({"units": "channel"}, "no group of channel can be cut: .*; it has neuron"),
        ({"round_to": 1000}, "nothing would go: keep 0.5 leaves every unit of every group in multiples of 1000"),
        (
            {"parameters": 0.3, "min_keep": 0.9},
            r"parameters 0.3 is out of reach: .* \(min_keep=0.9\); largest parts that stay",
        ),
    ],
)
def test_messages_for_wrong_arguments(how, message):
    with pytest.raises(ModelError, match=message):
        rarefy.cut_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4), **how)
