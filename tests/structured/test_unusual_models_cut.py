"""Cuts of models that are built to break them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.folders import read_index, write_index
from helpers.structured_models import IDS, language
from rarefy.common.errors import ContainerError, ModelError
from rarefy.structured import cut as module
from rarefy.structured.structure_record import restore

transformers = pytest.importorskip("transformers")


def state(model):
    return copy.deepcopy({**model.state_dict()}), {k: v for k, v in vars(model).items() if not k.startswith("_")}


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.consts, self.ema = {"scale": torch.tensor(2.0)}, {"a": torch.ones(3)}

    def forward(self, x):
        return self.b(F.relu(self.a(x))) * self.consts["scale"]


def test_tensors_that_a_user_keeps_stay():
    model, x = Own(), torch.randn(3, 4)
    rarefy.cut_(model, x, dry_run=True)
    rarefy.cut_(model, x)
    assert model.consts and model.ema and model.a.out_features == 3


def test_caches_of_the_sizes_before_are_emptied():
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


def test_an_attention_module_by_itself():
    model, x = nn.MultiheadAttention(8, 4, batch_first=True).eval(), torch.randn(2, 5, 8)
    with pytest.raises(ModelError):
        rarefy.cut_(model, {"query": x, "key": x, "value": x})


def test_cuts_after_a_config_that_told_all_are_loaded(tmp_path):
    def make():
        return language("Llama", num_key_value_heads=2, num_hidden_layers=6).eval()

    torch.manual_seed(0)
    model = make()
    rarefy.drop_layers_(model, IDS, layers=["model.layers.0", "model.layers.3"])
    assert model.rarefy_cut["config"]
    rarefy.cut_(model, IDS, units="neuron", scope="global", keep=0.6)
    assert not model.rarefy_cut["config"]
    rarefy.save(model, tmp_path / "out")
    for again in (rarefy.load(tmp_path / "out"), rarefy.load(tmp_path / "out", model=make())):
        with torch.no_grad():
            assert torch.equal(again.eval()(**IDS).logits, model(**IDS).logits)
        assert again.config.num_hidden_layers == 4


class Labels(nn.Module):
    """Returns classes only, and counts its features."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h / h.shape[-1] ** 2 + (h.shape[-1] - 8)).argmax(-1)


def test_classes_are_compared_too():
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
def test_one_row_does_not_tell_what_is_constant(rows):
    model, x = Mixes(), torch.randn(rows, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ModelError, match=r"from the masked model's by .* \(at most 0.0001 is allowed\), so it was put back"
    ):
        rarefy.cut_(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_features_that_are_zero_on_the_example_are_no_removed_ones():
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
    """Divides by the root of a size that it sees."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(6, 16)
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.emb(x)
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def test_queries_alone_are_scaled_and_repair_knows():
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


def test_a_proof_that_proves_nothing_says_so():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(net[2].weight)
    report = rarefy.cut_(net, torch.randn(3, 4))
    assert "the example's outputs do not depend on what went: the proof says nothing of it" in report.notes


def test_parts_without_indices():
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


class Strict(nn.Module):
    """What a class may say of its config: with an assert."""

    def __init__(self, config):
        super().__init__()
        assert config.num_hidden_layers % 2 == 0
        self.config = config
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0) for _ in range(config.num_hidden_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_classes_that_refuse_a_config_keep_theirs():
    config = transformers.PretrainedConfig(num_hidden_layers=4)
    model = Strict(config).eval()
    rarefy.drop_layers_(model, torch.randn(3, 2, 8), layers="layers.1")
    assert len(model.layers) == 3 and model.config is config and not model.rarefy_cut["config"]


@pytest.mark.parametrize("what", ["interrupted", "rehearsed"])
def test_no_trace_is_left_where_heads_were_given_in_a_later_step(what, monkeypatch):
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
        real = module.take_out_and_repair

        def fails(*args, **how):
            calls.append(1)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return real(*args, **how)

        monkeypatch.setattr(module, "take_out_and_repair", fails)
        with pytest.raises(KeyboardInterrupt):
            rarefy.cut_(model, x, keep=0.4, steps=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "rarefy_cut" not in vars(model) and type(model[1].layers[0].self_attn) is nn.MultiheadAttention
    assert model[0].out_features == 80


def test_a_config_is_the_users_until_it_changes():
    model = language("Llama", num_key_value_heads=2).eval()
    config = model.config
    rarefy.drop_layers_(model, IDS, keep=0.5, dry_run=True)
    rarefy.cut_(model, IDS, dry_run=True)
    assert model.config is config


# ---- what a new user ran into ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [3, 5])
@pytest.mark.parametrize("keep", [0.5, 0.75])
def test_heads_go_where_their_number_does_not_divide(heads, keep):
    model = language("Llama", hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=heads, head_dim=8)
    rarefy.cut_(model.eval(), IDS, "head", keep)
    left = int(heads * keep + 0.5)
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.out_features == 8 * left and layer.self_attn.head_dim == 8
    assert model.config.num_attention_heads == left


def test_a_cut_after_heads_went_by_number():
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
def test_budgets_leave_blocks_alike(what):
    model = language("Llama", num_key_value_heads=2, num_hidden_layers=6, hidden_size=64, intermediate_size=192).eval()
    rarefy.cut_(model, IDS, **{what: 0.6})
    assert len({l.mlp.gate_proj.out_features for l in model.model.layers}) == 1 and model.rarefy_cut["config"]


def test_a_mask_is_not_called_a_cut():
    report = rarefy.cut_(Own(), torch.randn(3, 4), mask_only=True)
    assert report.title == "cut: units are zero, nothing left"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten()
    )
    net = nn.Sequential(net, nn.Linear(32 * 16, 5)).eval().to(dtype)
    rarefy.cut_(net, torch.randn(2, 3, 8, 8, dtype=dtype))
    assert net[0][0].out_channels == 16


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"units": 0.5}, "units is a kind or a list of kinds, such as 'channel', got 0.5; keep=0.5 is by name"),
        ({"units": "channel"}, "no group of channel can be cut: .*; it has neuron"),
        ({"round_to": 1000}, "nothing would go: keep 0.5 leaves every unit of every group in multiples of 1000"),
        (
            {"parameters": 0.3, "min_keep": 0.9},
            r"parameters 0.3 is out of reach: .* \(min_keep=0.9\); largest parts that stay",
        ),
    ],
)
def test_mistakes_of_a_new_user(how, message):
    with pytest.raises(ModelError, match=message):
        rarefy.cut_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4), **how)


# ---- files that want more than a cut could have done ----------------------------------------------------------------


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.embed, self.fc = (
            nn.Conv2d(3, 6, 3, stride=2),
            nn.Embedding(9, 6, padding_idx=7),
            nn.Linear(6, 2),
        )
        self.register_buffer("scale", torch.ones(6, 6), persistent=False)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)) @ self.scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": {"scale": {"0": [0] * 3000}}}, r"what a cut kept of scale does not fit its shape \[6, 6\]"),
        ({"kept": {"scale": {"0": [1, 0]}}}, "what a cut kept of scale"),
        ({"kept": {"scale": {"0": [1, 1]}}}, "what a cut kept of scale"),
        ({"numbers": {"conv.stride": [1, 1]}}, "has no size conv.stride"),
        ({"numbers": {"embed.padding_idx": 1}}, "has no size embed.padding_idx"),
        ({"base": []}, "the record of its cuts is damaged"),
    ],
)
def test_hostile_structures(change, message):
    parts = {"numbers": {}, "shapes": {}, "kept": {}, "blocks": {}, "attention": [], "base": {}, "config": False}
    with pytest.raises(ContainerError, match=message):
        restore(Buffers(), {**parts, **change}, "out")


def test_hostile_notes_of_a_model_that_fits(tmp_path):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    rarefy.cut_(net, torch.randn(2, 4))
    rarefy.save(net, tmp_path / "out")
    index = read_index(tmp_path / "out")
    for bad in ({"shapes": "evil", "config": True}, [], {**index["meta"]["cut"], "blocks": 3}):
        index["meta"]["cut"] = bad
        write_index(tmp_path / "out", index)
        with pytest.raises(ContainerError, match="the record of its cuts is damaged"):
            rarefy.load(tmp_path / "out", model=copy.deepcopy(net))


def test_a_saved_config_changes_no_ids():
    from rarefy.structured.hf_config import shrink_config

    model = language("Llama", num_key_value_heads=2)
    before = {k: getattr(model.config, k) for k in ("eos_token_id", "pad_token_id", "max_position_embeddings")}
    shrink_config(model, {"eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 1, "hidden_size": 24})
    assert {k: getattr(model.config, k) for k in before} == before and model.config.hidden_size == 24


def test_norms_without_parameters_know_their_channels():
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
