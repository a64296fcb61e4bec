"""What the command line measures, replaces and returns."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import rarefy
from conftest import shell, text_model
from rarefy.cli.main import _load_recipe
from rarefy.common.errors import DataError, ModelError, RecipeError
from rarefy.data.images import transform_of
from rarefy.evaluation.metrics import accuracy
from rarefy.evaluation.quality import metric_of
from rarefy.model.image_config import ImageConfig
from rarefy.pipeline.engine_evaluation import EngineModule, sample_of

RECIPE = "stages:\n- prune: {sparsity: 0.5, score: magnitude}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    text_model(folder)
    return folder


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_texts_of_receipts_are_greedy(place):
    """Whatever the model's own settings are: else the engine's would differ in every run."""
    model, tokenizer = load(place / "model")
    model.generation_config.update(do_sample=True, temperature=5.0)
    on_engine = EngineModule(rarefy.decoder(model))
    texts = [sample_of({"torch": model, "engine": on_engine}, tokenizer, "w1 w2 w3") for _ in range(2)]
    assert texts[0] == texts[1] and texts[0]["torch"] == texts[0]["engine"]


def test_more_tokens_than_positions_are_refused_before_the_work(place):
    model, tokenizer = load(place / "model")
    limit = model.config.max_position_embeddings
    recipe = {
        "stages": [{"prune": {"sparsity": 0.5, "score": "magnitude"}}],
        "evaluate": {"metric": "perplexity", "data": str(place / "text.txt"), "tokens": 16, "samples": 4,
                     "decode": {"prompt": limit, "new": 4}},
    }  # fmt: skip
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(DataError, match=f"evaluate.decode: the model has {limit} positions, got prompt {limit}"):
        rarefy.compress_(model, recipe, tokenizer=tokenizer)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_a_table_does_not_replace_a_file(place):
    (place / "mine.txt").write_text("mine")
    arguments = ["bench", place / "model", "--table", place / "mine.txt", "--tokens", "8", "--repeats", "2", "-q"]
    refused = shell(*arguments)
    assert refused.returncode == 2 and "the file exists: give another name, or --force" in refused.stderr
    assert (place / "mine.txt").read_text() == "mine"


def test_a_closed_pipe_is_no_failed_check():
    command = f"set -o pipefail; {sys.executable} -m rarefy.cli.main recipes --fields | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr


def test_the_seed_is_that_of_the_data_too(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "x.txt").write_text("a b c")
    loaded = _load_recipe(str(tmp_path / "r.yaml"), None, str(tmp_path / "x.txt"), None, 5)
    assert loaded.seed == loaded.data.seed == 5


def test_paths_on_the_command_line_start_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "r.yaml").write_text(RECIPE)
    for name in ("t.txt", "sub/t.txt"):
        (tmp_path / name).write_text("a b c")
    monkeypatch.chdir(tmp_path)
    loaded = _load_recipe("sub/r.yaml", ["data.train=t.txt"], None, None, None)
    assert loaded.data.train == str(tmp_path / "t.txt")
    with pytest.raises(RecipeError, match="expected field=value"):
        _load_recipe("sub/r.yaml", ["data.train"], None, None, None)


@pytest.mark.slow
def test_hints_name_what_the_command_takes(place, tmp_path):
    (tmp_path / "r.yaml").write_text("stages:\n- prune: {sparsity: 0.5, score: wanda}\n")
    told = shell("compress", place / "model", "-r", tmp_path / "r.yaml", "--data", place / "text.txt", "-o", tmp_path / "o",
                 "--set", "data.samples=64", "--set", "data.tokens=16")  # fmt: skip
    assert told.returncode == 2 and "or pass --set data.samples=" in told.stderr
    told = shell("sensitivity", place / "model", "--data", place / "text.txt", "--samples", "99", "--tokens", "16")
    assert told.returncode == 2 and "or pass --samples " in told.stderr and "--set" not in told.stderr


def test_gray_pictures_of_16_bits():
    import numpy as np

    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    values = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    config = ImageConfig(size=64, resize=64, mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = transform_of(config)(Image.fromarray(values))
    torch.testing.assert_close(seen[0], torch.from_numpy(values / 65535).float(), atol=0.01, rtol=0)


class Infinite(nn.Module):
    def forward(self, input_ids, **others):
        hidden = input_ids[..., None].float() * torch.ones(4)
        hidden[0, 0, 0] = float("inf")
        return {"last_hidden_state": hidden}


@pytest.mark.parametrize("metric", ["retrieval", "agreement"])
def test_infinite_outputs_are_no_quality(metric):
    if metric == "agreement":
        net, broken = nn.Linear(4, 3), nn.Linear(4, 3)
        with torch.no_grad():
            broken.bias[1] = float("inf")
        judge, model = metric_of(metric, net, [torch.randn(8, 4)] * 2), broken
    else:
        texts = {"input_ids": torch.arange(40).reshape(8, 5)}
        judge, model = metric_of(metric, Infinite(), [(texts, texts)]), Infinite()
    with pytest.raises(ModelError, match="inf"):
        judge.measure(model)


def test_accuracy_of_language_models_is_of_the_next_token(place):
    model, _ = load(place / "model")
    ids = torch.randint(3, 60, (4, 12))
    with torch.no_grad():
        wanted = float((model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean())
    batch = {"input_ids": ids, "labels": ids}
    assert accuracy(model, [batch]) == pytest.approx(wanted)
    assert accuracy(EngineModule(rarefy.decoder(model)), [batch]) == pytest.approx(wanted)


def test_the_receipt_says_that_bytes_are_those_before_lzma():
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    recipe = {"stages": [{"prune": {"sparsity": 0.5, "score": "magnitude"}}], "save": {"compress": True}}
    assert "bytes on disk are those before LZMA" in rarefy.compress_(net, recipe).notes
    assert json.loads(rarefy.compress_(nn.Linear(8, 8), {"stages": [{"cast": {"dtype": "fp32"}}]}).to_json())
