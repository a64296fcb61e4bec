"""Dropping whole blocks, and the configs of models without them."""

import copy
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.marks import slow_case
from helpers.structured_models import CASES, IDS, IMAGE, language, outputs, vision
from rarefy.common.errors import ContainerError, DataError, ModelError, SelectorError
from rarefy.structured.layer_drop import droppable, layer_scores, skipping

transformers = pytest.importorskip("transformers")


def tall(name="Llama", head="ForCausalLM", layers=5, **more):
    return language(name, head, **({"num_key_value_heads": 2} if name in ("Llama", "Qwen3") else {}), **more,
                    num_hidden_layers=layers).eval()  # fmt: skip


def test_similarity_is_the_cosine_of_inputs_and_outputs():
    model = tall()
    blocks = droppable(model, IDS)
    assert [b.name for b in blocks] == [f"model.layers.{i}" for i in range(5)]
    got = layer_scores(model, blocks, "similarity", [IDS, IDS], None, 0)
    with torch.no_grad():
        states = model(**IDS, output_hidden_states=True).hidden_states[:5]
        states = (*states, model.model.layers[4](states[4], **_rotary(model, states[4])))
    want = [1 - F.cosine_similarity(a, b, dim=-1).double().mean() for a, b in pairwise(states)]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-6)


def _rotary(model, x):
    place = torch.arange(x.shape[1])[None]
    return {"position_embeddings": model.model.rotary_emb(x, place), "position_ids": place, "attention_mask": None}


def test_loss_is_the_increase_without_the_block():
    model, batch = tall(), {**IDS, "labels": IDS["input_ids"]}
    blocks = droppable(model, batch)
    got = layer_scores(model, blocks, "loss", [batch], None, 0)
    base = float(model(**batch).loss.detach())
    for i, b in enumerate(blocks):
        one = copy.deepcopy(model)
        del one.model.layers[i]
        for n, layer in enumerate(one.model.layers):
            layer.self_attn.layer_idx = n
        one.config.num_hidden_layers -= 1
        assert float(one(**batch).loss.detach()) - base == pytest.approx(float(got[i]), abs=1e-5), b.name


def test_images_are_compared_pixel_by_pixel():
    model = vision("resnet18").eval()
    blocks = droppable(model, IMAGE)
    assert [b.name for b in blocks] == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    seen = {}
    hook = model.layer2[1].register_forward_hook(lambda m, a, o: seen.update(x=a[0], y=o))
    model(IMAGE)
    hook.remove()
    got = layer_scores(model, blocks, "similarity", [IMAGE], None, 0)
    want = 1 - F.cosine_similarity(seen["x"], seen["y"], dim=1).double().mean()
    torch.testing.assert_close(got[2], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: tall(), IDS),
        (lambda: tall("Qwen3", head_dim=12, layer_types=["full_attention"] * 5), IDS),
        (lambda: tall("Bert", "ForSequenceClassification"), IDS),
        (lambda: tall("GPT2", "LMHeadModel"), IDS),
        (lambda: vision("resnet18").eval(), IMAGE),
        slow_case(lambda: vision("swin_t").eval(), IMAGE),
        slow_case(lambda: vision("mobilenet_v2").eval(), IMAGE),
    ],
    ids=["llama", "qwen3", "bert", "gpt2", "resnet18", "swin_t", "mobilenet_v2"],
)
def test_dropped_blocks_are_skipped_exactly(make, x, tmp_path):
    torch.manual_seed(0)
    model = make()
    dense = copy.deepcopy(model)
    report = rarefy.drop_layers_(model, x, keep=0.6)
    gone = [r["block"] for r in report.rows if r["goes"]]
    assert len(gone) == len(report.rows) - round(0.6 * len(report.rows))
    least = sorted(report.rows, key=lambda r: r["change"])
    assert set(gone) <= {r["block"] for r in least[: len(gone) + 2]}  # but for lists that one must be left of
    with torch.no_grad(), skipping([b for b in droppable(dense, x) if b.name in gone]):
        want = outputs(dense, x)
    got = outputs(model, x).detach()
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    rarefy.save(model, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", model=make()).eval()
    torch.testing.assert_close(outputs(again, x).detach(), got)
    rarefy.cut_(model, x, keep=0.5)  # and width after depth
    got = outputs(model, x).detach()
    rarefy.save(model, tmp_path / "both")
    again = rarefy.load(tmp_path / "both", model=make()).eval()
    torch.testing.assert_close(outputs(again, x).detach(), got)


def test_dropping_after_a_cut_and_twice(tmp_path):
    def make():
        return tall(layers=6)

    torch.manual_seed(0)
    model = make()
    rarefy.cut_(model, IDS, keep=0.5, units="neuron", layers="*.1.mlp.gate_proj")  # one layer differs
    assert model.rarefy_cut["config"] is False
    rarefy.drop_layers_(model, IDS, layers="model.layers.0")
    rarefy.drop_layers_(model, IDS, keep=4 / 5, layers="model.layers.[34]")
    assert [m.self_attn.layer_idx for m in model.model.layers] == [0, 1, 2, 3]
    assert model.model.layers[0].mlp.gate_proj.out_features == 48
    model.generate(IDS["input_ids"], max_new_tokens=3, do_sample=False)  # with a cache by layer
    got = outputs(model, IDS).detach()
    rarefy.save(model, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", model=make()).eval()
    torch.testing.assert_close(outputs(again, IDS).detach(), got)
    with pytest.raises(ContainerError, match="a cut left sizes that no config of LlamaForCausalLM can express"):
        rarefy.export(tmp_path / "out", tmp_path / "hf")
    torch.testing.assert_close(outputs(rarefy.load(tmp_path / "out").eval(), IDS).detach(), got)


CONFIGS = {
    "llama": ("Llama", "ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", "ForCausalLM", {"num_key_value_heads": 2, "head_dim": 12}),
    "bert": ("Bert", "ForSequenceClassification", {}),
    "gpt2": ("GPT2", "LMHeadModel", {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_updated_and_transformers_loads_the_model(name, tmp_path):
    family, head, more = CONFIGS[name]
    torch.manual_seed(0)
    model = language(family, head, **more).eval()
    rarefy.cut_(model, IDS)
    assert model.rarefy_cut["config"] is True
    if name == "llama":
        c = model.config
        assert (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads) == (24, 48, 2, 1)
        assert c.num_hidden_layers == 2 and c.vocab_size == 100
    got = outputs(model, IDS).detach()
    rarefy.save(model, tmp_path / "out")
    again = rarefy.load(tmp_path / "out").eval()  # from its config
    torch.testing.assert_close(outputs(again, IDS).detach(), got)
    original = language(family, head, **more).eval()
    given = rarefy.load(tmp_path / "out", model=original)  # from the class, as it was before the cut
    torch.testing.assert_close(outputs(given.eval(), IDS).detach(), got)
    assert given.config.to_dict() == model.config.to_dict()
    rarefy.export(tmp_path / "out", tmp_path / "hf")
    auto = {"Bert": transformers.AutoModelForSequenceClassification}.get(family, transformers.AutoModelForCausalLM)
    plain = auto.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(outputs(plain, IDS).detach(), got)
    rarefy.cut_(again, IDS, units="neuron", keep=0.5)  # and on
    rarefy.save(again, tmp_path / "more")
    last = rarefy.load(tmp_path / "more", model=language(family, head, **more).eval())
    torch.testing.assert_close(outputs(last, IDS).detach(), outputs(again, IDS).detach())


def test_a_shared_config_stays(tmp_path):
    config = transformers.LlamaConfig(vocab_size=100, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    before = config.to_dict()
    model = transformers.LlamaForCausalLM(config).eval()
    rarefy.cut_(model, IDS)
    rarefy.drop_layers_(model, IDS, keep=0.5)
    rarefy.save(model, tmp_path / "out")
    given = rarefy.load(tmp_path / "out", model=transformers.LlamaForCausalLM(config))
    assert given.config.num_hidden_layers == 2
    assert config.to_dict() == before and model.config.hidden_size == 24 and model.config.num_hidden_layers == 2
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_configs_of_fewer_layers():
    model = tall("Qwen3", head_dim=12, layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
                 sliding_window=4, use_sliding_window=True, max_window_layers=0)  # fmt: skip
    report = rarefy.drop_layers_(model, IDS, keep=0.8, layers="model.layers.[013]")
    gone = int(next(r["block"] for r in report.rows if r["goes"])[-1])
    want = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    del want[gone]
    assert model.config.num_hidden_layers == 4 and model.config.layer_types == want
    again = type(model)(model.config)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_a_saved_config_only_shrinks_numbers(tmp_path):
    model = language("Llama", num_key_value_heads=2).eval()
    rarefy.cut_(model, IDS)
    rarefy.save(model, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "rarefy.json").read_text())
    index["meta"]["structure"]["config"] |= {"vocab_size": 10**9, "rope_theta": "evil", "num_hidden_layers": -1}
    from rarefy.structured.hf_config import shrink_config

    fresh = language("Llama", num_key_value_heads=2)
    shrink_config(fresh, index["meta"]["structure"]["config"])
    assert fresh.config.vocab_size == 100 and fresh.config.num_hidden_layers == 2 and fresh.config.hidden_size == 24


def test_an_optimizer_loses_dropped_parameters():
    model = tall()
    optimizer = torch.optim.AdamW(model.parameters())
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    optimizer.step()
    rarefy.drop_layers_(model, IDS, keep=0.6, optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(map(id, model.parameters()))
    assert {id(p) for p in optimizer.state} <= set(map(id, model.parameters()))


def test_dry_runs_change_nothing():
    model = tall()
    want = outputs(model, IDS).detach()
    for how in ({"dry_run": True}, {"mask_only": True}):
        report = rarefy.drop_layers_(model, IDS, keep=0.6, **how)
        assert report.summary["blocks"] == "5 -> 3" and "nothing done" in report.title
        assert len(model.model.layers) == 5 and torch.equal(outputs(model, IDS).detach(), want)
        assert model.config.num_hidden_layers == 5 and "rarefy_cut" not in vars(model)


def test_cut_with_units_layer_is_the_same():
    one, two = tall(), tall()
    two.load_state_dict(one.state_dict())
    rarefy.cut_(one, IDS, "layer", 0.6)
    rarefy.drop_layers_(two, IDS, 0.6)
    assert torch.equal(outputs(one, IDS), outputs(two, IDS)) and len(one.model.layers) == 3


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"score": "similarty"}, ModelError, "unknown score of layers 'similarty'.*did you mean 'similarity'"),
        ({"keep": 0}, ModelError, "keep: expected a number above 0 and at most 1, got 0"),
        ({"keep": 0.95}, ModelError, "nothing would be removed: all 5 blocks stay"),
        ({"keep": 0.05}, ModelError, "5 blocks would be removed, but only 4 can be: each list keeps one"),
        (
            {"layers": "model.layer.0"},
            SelectorError,
            "layers: 'model.layer.0' matches no block; nearest: model.layers.0",
        ),
        ({"layers": "*", "ignore": "*"}, ModelError, "no block is selected"),
        ({"score": "loss"}, DataError, "no loss: "),
        ({"data": []}, DataError, "no batch of the data reaches model.layers.0: the score needs at least one"),
        ({"score": "loss", "data": []}, DataError, "the data is empty"),
        ({"score": "random", "data": [IDS]}, DataError, "data has no effect with score random"),
        ({"data": iter([IDS])}, DataError, "data is read more than once"),
    ],
)
def test_messages_for_wrong_arguments(how, error, message):
    model = tall()
    with pytest.raises(error, match=message):
        rarefy.drop_layers_(model, IDS, **how)
    assert len(model.model.layers) == 5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"units": ("layer", "neuron")}, "layers cannot be combined with other units: give units='layer'"),
        ({"units": "layer", "flops": 0.5}, "layers are removed as a whole: give keep, not flops"),
        ({"units": "layer", "scope": "global"}, "scope has no effect on layers"),
        ({"units": "layer", "round_to": 8}, "round_to has no effect on layers"),
        ({"units": "layer", "repair": ["ridge"]}, "repair has no effect on layers"),
        (
            {"units": "layer", "score": "taylor"},
            "unknown score of layers 'taylor'; choose from loss, random, similarity",
        ),
        ({"units": "neuron", "score": "similarity"}, "unknown score 'similarity'"),
    ],
)
def test_options_without_effect_are_refused(how, message):
    with pytest.raises(ModelError, match=message):
        rarefy.cut_(tall(), IDS, **how)


def test_models_without_blocks():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ModelError, match="Sequential has no list of blocks whose output has the shape"):
        rarefy.drop_layers_(net, torch.randn(1, 4))


def test_blocks_with_hard_coded_counts_stay():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return F.relu(self.linear(x))

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            for i in range(3):
                x = x + self.blocks[i](x)
            return x

    model = Counts()
    with pytest.raises(ModelError, match="the cut model does not run, so the cut was undone"):
        rarefy.drop_layers_(model, torch.randn(2, 4), keep=0.6)
    assert len(model.blocks) == 3 and CASES
