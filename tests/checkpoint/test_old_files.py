"""Folders that earlier versions saved still load, with the same weights and outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rarefy
from fixtures.saved_by_0_1 import models
from rarefy.runtime import bindings

FOLDER = Path(__file__).parents[1] / "fixtures" / "saved_by_0_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
MODELS = sorted(n for n in EXPECTED if n != "runs")
OUTPUTS = load_file(FOLDER / "outputs.safetensors")


def close(outputs, name):
    expected = OUTPUTS[name].double()
    tolerance = 0.02 if "int8" in name else 1e-4  # activations in 8 bits may be rounded the other way on another CPU
    return float((outputs.double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("name", [n for n in MODELS if "digest" in EXPECTED[n]])
def test_weights_of_saved_models(name):
    factory = EXPECTED[name]["model"]
    if factory == "llama":
        pytest.importorskip("transformers")
    model = rarefy.load(FOLDER / name, getattr(models, factory)())
    assert models.digest(model) == EXPECTED[name]["digest"]
    with torch.no_grad():
        outputs = model(models.inputs(factory))
    assert close(outputs if isinstance(outputs, torch.Tensor) else outputs.logits, name)


@pytest.mark.parametrize("name", [n for n in MODELS if "digest" not in EXPECTED[n]])
def test_outputs_of_compiled_models(name):
    compiled, inputs = rarefy.load(FOLDER / name), models.inputs(EXPECTED[name]["model"])
    assert type(compiled).__name__ == EXPECTED[name]["class"]
    outputs = compiled(inputs, compiled.cache(*inputs.shape)) if name.startswith("decoder") else compiled(inputs)
    assert close(outputs, name)


@pytest.mark.parametrize("name", ["compiled-mlp", "compiled-conv_net-int8", "decoder-int4"])
def test_an_old_compiled_model_is_saved_anew(tmp_path, name):
    compiled, inputs = rarefy.load(FOLDER / name), models.inputs(EXPECTED[name]["model"])
    rarefy.save(compiled, tmp_path / "out")
    outputs = [
        m(inputs, m.cache(*inputs.shape)) if name.startswith("decoder") else m(inputs)
        for m in (compiled, rarefy.load(tmp_path / "out"))
    ]
    assert torch.equal(*outputs)


def test_the_receipt_and_recipe_come_with_the_model():
    pytest.importorskip("transformers")
    model = rarefy.load(FOLDER / "receipt-llama")
    assert model.rarefy_receipt.to_json() and model.rarefy_recipe["stages"][0]["prune"]["pattern"] == "2:4"
    assert "evaluated" in str(model.rarefy_receipt) or "perplexity" in str(model.rarefy_receipt)


# a run is resumed only by the versions of Rarefy and torch that began it: its key says so
same_versions = pytest.mark.skipif(
    (rarefy.__version__, torch.__version__) != ("0.1.0", EXPECTED["runs"]["torch"]), reason="other versions"
)


@same_versions
def test_a_stopped_prune_goes_on(tmp_path):
    shutil.copytree(FOLDER / "resume-prune", tmp_path / "state")
    model = models.mlp()
    data = [x for x, _ in models.batches()]
    rarefy.prune_(model, sparsity=0.5, solver="obs", data=data, resume_dir=tmp_path / "state")
    assert close(model(models.inputs("mlp")).detach(), "resume-prune")


@same_versions
def test_a_stopped_training_goes_on(tmp_path):
    shutil.copytree(FOLDER / "resume-fit", tmp_path / "state")
    model, validated = models.mlp(), []

    def validate(net: nn.Module) -> float:
        validated.append(net)
        return 0.0

    plan = rarefy.Gradual(sparsity=0.5, steps=2)
    state = tmp_path / "state"
    rarefy.fit_(model, models.batches(), epochs=3, prune=plan, seed=0, validate=validate, resume_dir=state)
    assert len(validated) == 2  # the first of the three epochs was done
    assert close(model(models.inputs("mlp")).detach(), "resume-fit")


@pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))
def test_an_old_tuning_cache_does_no_harm(tmp_path):
    shutil.copy(FOLDER / "choices.json", tmp_path / "cache.json")
    before = json.loads((tmp_path / "cache.json").read_text())
    model = rarefy.load(FOLDER / "sparse-csr", models.mlp())
    report = rarefy.accelerate_(model, (1, 16), repeats=1, tuning_cache=tmp_path / "cache.json")
    assert len(report.rows) == 3 and close(model(models.inputs("mlp")).detach(), "sparse-csr")
    after = json.loads((tmp_path / "cache.json").read_text())
    assert set(before) <= set(after)
