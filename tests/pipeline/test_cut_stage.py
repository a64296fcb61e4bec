"""Cuts in recipes, on the command line and in the receipt."""

import json

import pytest
import torch
from torch import nn

import rarefy
from conftest import Run, text_model, tiny_llama, tree
from rarefy.common.errors import DataError, ModelError, RecipeError
from rarefy.recipe import parser as recipes
from rarefy.recipe import schema


def cut(settings):
    return f"stages:\n  - cut: {settings}\n"


def test_every_field_is_read():
    text = """stages:
  - cut:
      units: [channel, head]
      keep: 0.75
      score: taylor
      reduce: mean
      scope: isomorphic
      min_keep: 0.2
      round_to: 8
      steps: 3
      repair: [ridge, bias]
      layers: "model.*"
      ignore: lm_head
  - cut: {units: layer, keep: 0.5, score: loss}
  - cut: {flops: 0.5, repair: false}
  - cut:
"""
    one, two, three, four = recipes.from_yaml(text).stages
    assert one == schema.CutStage(
        units=("channel", "head"), keep=0.75, score="taylor", reduce="mean", scope="isomorphic", min_keep=0.2, round_to=8,
        steps=3, repair=("ridge", "bias"), layers=("model.*",), ignore=("lm_head",),
    )  # fmt: skip
    assert two == schema.CutStage(units=("layer",), keep=0.5, score="loss") and two.drops_layers
    assert three == schema.CutStage(flops=0.5, repair=False) and four == schema.CutStage()
    again = recipes.from_dict(recipes.from_yaml(text).to_dict())
    assert again == recipes.from_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (cut("{units: chanel}"), r"r.yaml line 2: .*unknown units 'chanel'; .*did you mean 'channel'\?\)"),
        (cut("{score: talyor}"), r"r.yaml line 2: .*unknown score 'talyor'; .*did you mean 'taylor'\?\)"),
        (cut("{scope: row}"), r"r.yaml line 2: .*unknown scope 'row'; choose from global, isomorphic, layer"),
        (cut("{reduce: l2}"), r"unknown reduce 'l2'; choose from max, mean, sum"),
        (cut("{repair: rigde}"), r"unknown repair 'rigde'; .*did you mean 'ridge'"),
        (cut("{repair: 3}"), r"repair: expected true or false or tuple|repair: expected"),
        (cut("{kep: 0.5}"), r"unknown field 'kep'; .*did you mean 'keep'"),
        (
            cut("\n      units: neuron\n      keep: 1.5"),
            r"r.yaml line 4: .*keep: expected a number above 0 and at most 1, got 1.5",
        ),
        (cut("{keep: 0.5, flops: 0.5}"), r"r.yaml line 2: .*expected one budget, got keep and flops"),
        (cut("{min_keep: 2}"), r"min_keep: expected a number between 0 and 1, got 2"),
        (cut("{steps: 0}"), r"steps: expected a whole number of at least 1, got 0"),
        (cut("{round_to: 0}"), r"round_to: expected a whole number of at least 1, got 0"),
        (cut("{units: [layer, head]}"), r"layers cannot be combined with other units: give units='layer'"),
        (cut("{units: layer, flops: 0.5}"), r"layers are removed as a whole: give keep, not flops"),
        (cut("{units: layer, score: taylor}"), r"unknown score of layers 'taylor'"),
        (cut("{units: layer, steps: 2}"), r"steps has no effect on layers"),
        (cut("{units: head, score: similarity}"), r"unknown score 'similarity'"),
        (
            "stages:\n  - prune: {sparsity: 0.5}\n  - cut: {keep: 0.5}\n",
            r"r.yaml line 3: .*a cut must come before (prune|train): it changes the shapes",
        ),
        (
            "stages:\n  - train: {prune: {sparsity: 0.5}}\n  - cut: {keep: 0.5}\n",
            r"r.yaml line 3: .*a cut must come before (prune|train): it changes the shapes",
        ),
    ],
)
def test_errors_name_the_line(text, message):
    with pytest.raises(RecipeError, match=message):
        recipes.from_yaml(text, "r.yaml")


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 48, 3, padding=1), nn.BatchNorm2d(48)
        self.deep, self.fc = nn.Conv2d(48, 64, 3, padding=1), nn.Linear(64, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc(torch.relu(self.deep(x)).mean((2, 3)))


def batches(n=4):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(32, 3, 8, 8, generator=g) for _ in range(n)]
    return [(b, b.flatten(1)[:, :4].argmax(1)) for b in x]


def test_the_receipt_tells_what_a_cut_left():
    model, data = Images(), batches()
    recipe = {
        "stages": [
            {"cut": {"flops": 0.5, "score": "taylor", "scope": "global"}},
            {"train": {"epochs": 1}},
            {"prune": {"sparsity": 0.5}},
        ],
        "evaluate": {"metric": "accuracy", "latency": {"batch": [1], "repeats": 3}},
    }
    receipt = rarefy.compress_(model, recipe, {"calibrate": data, "train": data, "evaluate": data})
    assert receipt.flops["after"] / receipt.flops["before"] == pytest.approx(0.5, rel=0.011)
    assert (
        receipt.memory["after"] == 4 * sum(p.numel() for p in model.parameters()) + 2 * 4 * model.norm.num_features + 8
    )
    told_flops = receipt.flops["before"] // 16  # of two images, where the evaluation has 32
    told = [s for s in receipt.stages if s["title"] == "cut"]
    assert len(told) == 1 and told[0]["summary"]["flops"].startswith(f"{told_flops:,} -> ")
    left = model.stem.out_channels + model.deep.out_channels
    assert "channels of 2 groups" in str(receipt) and f" {left} " in str(receipt)
    assert receipt.disk["before"] == 4 * (sum(p.numel() for p in Images().parameters()) + 2 * 48) + 8


def test_repair_is_on_where_there_is_data():
    data = batches()
    lost = {}
    for repair in (None, False, True):
        torch.manual_seed(0)
        model = Images().eval()
        want = model(data[0][0])
        receipt = rarefy.compress_(model, {"stages": [{"cut": {"keep": 0.5, "repair": repair}}]}, data)
        lost[repair] = float((model(data[0][0]) - want).detach().norm())
        assert receipt.stages[0]["title"] == "cut"
    assert lost[None] == lost[True] < lost[False]
    with pytest.raises(DataError, match="no calibrate data"):
        rarefy.compress_(Images(), {"stages": [{"cut": {"repair": True}}]})
    with pytest.raises(DataError, match="no calibrate data"):
        rarefy.compress_(Images(), {"stages": [{"cut": {"score": "obs"}}]})
    with pytest.raises(DataError, match="a cut runs the model once: give calibrate or evaluate data"):
        rarefy.compress_(Images(), {"stages": [{"cut": {}}]})


def test_the_loss_of_training_is_not_for_a_cut_without_gradients():
    data, called = batches(), []

    def loss(output, batch):
        called.append(1)
        return torch.nn.functional.cross_entropy(output, batch[1])

    recipe = {"stages": [{"cut": {"keep": 0.5}}, {"train": {"epochs": 1}}]}
    rarefy.compress_(Images(), recipe, data, loss=loss)
    assert called
    called.clear()
    rarefy.compress_(Images(), {"stages": [{"cut": {"keep": 0.5, "score": "taylor"}}]}, data, loss=loss)
    assert called


def test_language_models_need_no_data_for_a_cut():
    model = tiny_llama()
    receipt = rarefy.compress_(
        model, {"stages": [{"cut": {"units": "neuron", "keep": 0.5}}, {"prune": {"sparsity": 0.5}}]}
    )
    assert (
        model.model.layers[0].mlp.gate_proj.weight.count_nonzero()
        <= model.model.layers[0].mlp.gate_proj.weight.numel() / 2
    )
    assert "neurons of" in str(receipt)


def test_blocks_in_recipes():
    model = tiny_llama()
    before = len(model.model.layers)
    receipt = rarefy.compress_(model, {"stages": [{"cut": {"units": "layer", "keep": 0.5}}]})
    assert len(model.model.layers) == before // 2 and "blocks" in str(receipt)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    text_model(folder)
    (folder / "cut.yaml").write_text(
        "name: smaller\ndata: {calibrate: text.txt, samples: 8, tokens: 16}\nstages:\n"
        "  - cut: {units: [neuron, head], keep: 0.5, score: obs}\n  - prune: {sparsity: 0.5}\n"
        "evaluate: {metric: perplexity, data: text.txt, samples: 4, tokens: 16}\n"
    )
    return folder


def test_compress_cuts_saves_and_transformers_loads_it(given, tmp_path, run):
    out, plain = tmp_path / "out", tmp_path / "hf"
    ran = run("compress", given / "model", "-r", given / "cut.yaml", "-o", out)
    assert ran.code == 0, ran.err
    assert "neurons of" in ran.out and "heads of" in ran.out
    ran = run("export", out, "-o", plain)
    assert ran.code == 0, ran.err
    transformers = pytest.importorskip("transformers")
    one, two = rarefy.load(out), transformers.AutoModelForCausalLM.from_pretrained(plain)
    dense = transformers.AutoModelForCausalLM.from_pretrained(given / "model")
    ids = torch.randint(0, 40, (2, 8))
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)
    assert two.config.intermediate_size * 2 == dense.config.intermediate_size


def test_a_dry_run_shows_what_would_go(given, tmp_path, run: Run):
    before = tree(given)
    ran = run("compress", given / "model", "-r", given / "cut.yaml", "--dry-run")
    assert ran.code == 0 and "cut, rehearsed" in ran.out and "stays because" in ran.out
    assert "by magnitude, obs needs data: other units may go" in ran.out
    assert "after the cuts: dry run of smaller: nothing computed" in ran.out and tree(given) == before
    told = json.loads(run("compress", given / "model", "-r", given / "cut.yaml", "--dry-run", "--json").out)
    assert told["cuts"][0]["summary"]["parameters"] and told["forecast"]["rows"]
    out = tmp_path / "out"
    assert run("compress", given / "model", "-r", given / "cut.yaml", "-o", out, "-q").code == 0
    expected = {r["layer"]: r["shape"] for r in told["forecast"]["rows"]}
    state = rarefy.load(out).state_dict()
    assert all(shape == "x".join(map(str, state[f"{n}.weight"].shape)) for n, shape in expected.items())


def test_a_dry_run_wants_the_data_that_a_run_wants(given, run: Run):
    ran = run("compress", given / "model", "-r", given / "cut.yaml", "--dry-run", "--set", "data=null")
    assert ran.code == 2 and "no calibrate data" in ran.err


def test_inspect_shows_groups(given, run: Run):
    ran = run("inspect", given / "model", "--groups")
    assert ran.code == 0 and "model.layers.*.mlp.gate_proj.weight:0" in ran.out
    assert "units that can go" in ran.out and "its rows are looked up" in ran.out
    told = json.loads(run("inspect", given / "model", "--groups", "--json").out)
    kinds = {r["kind"] for r in told["rows"]}
    assert {"neuron", "head"} <= kinds
    for wrong in (given / "cut.yaml", given):
        ran = run("inspect", wrong, "--groups")
        assert ran.code == 2 and "neither a folder written by Rarefy nor a Hugging Face folder" in ran.err


def test_groups_in_python():
    report = rarefy.groups(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), torch.randn(1, 4))
    assert [r["units"] for r in report.rows] == [4] * len(report.rows)
    assert report.summary["units that can go"] == "3 of 5 groups"
    with pytest.raises(ModelError, match="example: Sequential cannot be called with"):
        rarefy.groups(nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 5))
