"""Cut models against masked ones: groups, steps, budgets and messages."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.marks import slow_case
from helpers.structured_models import CASES, IDS, Attention, language, outputs
from rarefy.common.errors import ContainerError, ModelError, RarefyError
from rarefy.structured import unit_selection
from rarefy.structured.masked_reference import MaskedReference
from rarefy.structured.structure_record import restore

SLOW = ("regnet_y_400mf", "swin_t")


@pytest.mark.parametrize(
    ("name", "keep"),
    [(n, k) if k == 0.5 and n not in SLOW else slow_case(n, k) for n in CASES for k in (0.25, 0.5, 0.75)],
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
    ("name", "width"), [("resnet18", 0.25), slow_case("swin_t", 0.25), ("llama", 0.3), ("regnet_y_400mf", 0.26)]
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
    with pytest.raises(ModelError, match="nothing would be removed: `chunk` needs it to stay equal"):
        rarefy.cut_(model, x)
    assert model.a.out_features == 12 and model.b.in_features == 6


def test_gated_linear_units():
    class Gated(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(4, 12, 3), nn.Conv1d(6, 10, 1), nn.Linear(5, 3)
            self.gate = gate

        def forward(self, x):
            return self.c(self.gate(self.b(self.gate(self.a(x), 1)), 1).mean(-1))

    def by_hand(x, dim):
        kept, gate = x.chunk(2, dim)
        return kept * gate.sigmoid()

    torch.manual_seed(0)
    model, x = Gated(F.glu), torch.randn(2, 4, 9)
    other, masked = Gated(by_hand), copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        rarefy.cut_(each, x)
    rarefy.cut_(masked, x, mask_only=True)
    assert (model.a.out_channels, model.b.in_channels, model.b.out_channels, model.c.in_features) == (6, 3, 6, 3)
    assert torch.equal(model(x), other(x))
    torch.testing.assert_close(model(x), masked(x), rtol=1e-4, atol=1e-6)


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
    with pytest.raises(ModelError, match="the cut model does not run, so the cut was undone"):
        rarefy.cut_(model, torch.randn(1, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters())) and model.a.out_features == 6
    assert getattr(model, "rarefy_cut", None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": {"0.out_features": 7}}, "has no size 0.out_features that can be reduced to 7"),
        ({"numbers": {"0.training": 1}}, "has no size 0.training"),
        ({"numbers": {"0.nothing": 1}}, "has no size 0.nothing"),
        ({"numbers": {"9.out_features": 1}}, "has no size 9.out_features"),
        ({"numbers": {"0.forward": 1}}, "has no size 0.forward"),
        ({"shapes": {"0.weight": [3, 5]}}, r"0.weight is \[6, 4\] in this class and cannot be cut to \[3, 5\]"),
        ({"shapes": {"0.weight": [3]}}, "cannot be cut to"),
        ({"shapes": {"0.weigth": [3, 4]}}, "unknown tensor of a cut '0.weigth'"),
        ({"kept": {"0.weight": {"0": [6]}}}, "the kept indices of 0.weight do not fit its shape"),
        ({"kept": {"0.weight": {"x": [0]}}}, "the kept indices of 0.weight"),
        ({"kept": {"0.weight": [0]}}, "the kept indices of 0.weight"),
        ({"kept": 3}, "the record of its cuts is damaged"),
        ({"attention": ["0"]}, "Sequential has no attention '0' whose heads can be cut"),
        ({"attention": [3]}, "Sequential has no attention 3"),
        ({"config": 1}, "the record of its cuts is damaged"),
        ({"blocks": {"0": [0]}}, r"Sequential has no list of blocks 0 with the indices \[0\]"),
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


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.consts, self.ema = {"scale": torch.tensor(2.0)}, {"a": torch.ones(3)}

    def forward(self, x):
        return self.b(F.relu(self.a(x))) * self.consts["scale"]


def test_ignored_layers_lose_no_outputs():
    model = language("Llama", num_key_value_heads=2).eval()
    rarefy.cut_(model, IDS, ignore="model.embed_tokens")
    assert model.model.embed_tokens.embedding_dim == 48 and model.model.layers[0].mlp.gate_proj.out_features == 48
    model = language("Llama", num_key_value_heads=2).eval()
    rarefy.cut_(model, IDS, layers="*.mlp.*")
    assert model.config.hidden_size == 48 and model.config.intermediate_size == 48
    with pytest.raises(ModelError, match="`layers` selects groups of which these layers produce at least half"):
        rarefy.cut_(model, IDS, layers="*.down_proj")


@pytest.mark.parametrize("what", ["parameters", "flops"])
def test_budgets_keep_blocks_equal(what):
    model = language("Llama", num_key_value_heads=2, num_hidden_layers=6, hidden_size=64, intermediate_size=192).eval()
    rarefy.cut_(model, IDS, **{what: 0.6})
    assert len({l.mlp.gate_proj.out_features for l in model.model.layers}) == 1 and model.rarefy_cut["config"]


def test_the_title_of_a_masked_model():
    report = rarefy.cut_(Own(), torch.randn(3, 4), mask_only=True)
    assert report.title == "cut: units are zero, none removed"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"units": 0.5}, "units: expected one of channel, .* got 0.5"),
        ({"units": "channel"}, "no group of channel can be cut: .*; it has neuron"),
        (
            {"round_to": 1000},
            "nothing would be removed: keep 0.5 leaves every unit of every group in multiples of 1000",
        ),
        (
            {"parameters": 0.3, "min_keep": 0.9},
            r"parameters 0.3 is out of reach: .* \(min_keep=0.9\); largest parts that stay",
        ),
    ],
)
def test_messages_for_wrong_arguments(how, message):
    with pytest.raises(ModelError, match=message):
        rarefy.cut_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4), **how)


def mlp(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 12, bias=bias), nn.ReLU(), nn.Linear(12, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3)
    )


def data(n=4):
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(16, 5, generator=g) for _ in range(n)]
    return [(b, b[:, :3].argmax(1)) for b in x]


@pytest.mark.parametrize("scope", unit_selection.SCOPES)
def test_steps_reach_the_same_size_as_one_cut(scope):
    one, many = mlp(), mlp()
    how = {"score": "taylor", "scope": scope, "data": data(), "repair": False}
    rarefy.cut_(one, torch.randn(1, 5), keep=0.25, **how)
    report = rarefy.cut_(many, torch.randn(1, 5), keep=0.25, steps=3, **how)
    left = [m[0].out_features + m[2].out_features for m in (one, many)]
    assert left == [5, 5]
    assert report.rows[0]["units"] == f"12 -> {many[0].out_features}"
    total = sum(p.numel() for p in mlp().parameters())
    assert report.summary["parameters"].startswith(f"{total:,} -> ")


def test_a_failed_step_undoes_earlier_steps():
    calls = []

    class Fails(list):
        def __iter__(self):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("the disk is gone")
            return super().__iter__()

    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="the disk is gone"):
        rarefy.cut_(net, torch.randn(1, 5), steps=3, data=Fails(data()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net[0].out_features == 12


class Parts(nn.Module):
    """Two parts of one dimension; the small one soon has a single unit."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 102), nn.Linear(2, 2), nn.Linear(100, 2)

    def forward(self, x):
        p, q = self.a(x).split([self.b.in_features, self.c.in_features], -1)
        return self.b(p) + self.c(F.relu(q))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_count_from_the_original_size(steps):
    model = Parts()
    rarefy.cut_(model, torch.randn(3, 5), keep=0.5, steps=steps)
    assert (model.b.in_features, model.c.in_features) == (1, 50)


def test_a_dry_run_changes_nothing():
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    told = rarefy.cut_(net, torch.randn(1, 5), dry_run=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net[0].out_features == 12
    assert "rarefy_cut" not in vars(net) and str(told).startswith("cut: nothing done")
    done = rarefy.cut_(net, torch.randn(1, 5))
    assert told.rows == done.rows and told.summary == done.summary


def test_a_dimension_of_two_groups_is_cut_once():
    """64 groups of 2 outputs each: half of the 128 channels are removed, not three quarters."""
    net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 128, 3, groups=64), nn.ReLU(), nn.Conv2d(128, 4, 1)).eval()
    rarefy.cut_(net, torch.randn(1, 3, 8, 8))
    assert net[0].out_channels == 32 and net[1].out_channels == 64 and net[3].in_channels == 64
