"""Removing attention heads, by number or by importance."""

import copy

import pytest
import torch
from torch import nn

import rarefy
from helpers.structured_models import CASES, IDS, Attention, language
from rarefy.common.errors import ModelError
from rarefy.model.mha import PrunableMultiheadAttention
from rarefy.structured.masked_reference import MaskedReference


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
        ([0], "heads: expected {name of an attention module"),
    ],
)
def test_messages_for_wrong_heads(heads, message):
    model = Attention()
    with pytest.raises(ModelError, match=message):
        rarefy.prune_heads_(model, heads, torch.randint(0, 11, (2, 6)))
    assert model.num_heads == 4 and model.qkv.out_features == 48


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
