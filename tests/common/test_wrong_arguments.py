"""Arguments of the wrong kind, and damaged files, raise the errors of users: never a raw TypeError or KeyError."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from conftest import tiny_llama
from rarefy.checkpoint.export import export
from rarefy.common.errors import ContainerError, DataError, ModelError, PatternError, RarefyError, RecipeError
from rarefy.evaluation.example_inputs import example_of
from rarefy.evaluation.metrics import accuracy
from rarefy.model.losses import resolve_loss
from rarefy.pipeline.dry_run import targets
from rarefy.recipe import parser as recipes
from rarefy.recipe.schema import Recipe

X = torch.randn(4, 8)
PRUNE = {"prune": {"sparsity": 0.5}}


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


CALLS = {
    "a recipe of a list": (lambda: rarefy.compress_(net(), [PRUNE]), "put stages into"),
    "no recipe": (lambda: rarefy.compress_(net(), None), "recipe: expected the name of a preset, .*, got NoneType$"),
    "YAML as a name": (lambda: rarefy.compress_(net(), "stages:\n- prune: {}\n" * 99), "the YAML text itself: save it"),
    "YAML to migrate": (lambda: rarefy.migrate("stages:\n" * 99), "got the text of a recipe: save it"),
    "options as a stage": (lambda: Recipe(stages=[rarefy.Gradual(sparsity=0.5)]), "got Gradual: write it inside its"),
    "a stage that distils": (lambda: rarefy.compress_(net(), {"stages": [rarefy.Distill()]}), "got Distill: write it"),
    "a path to fit": (lambda: rarefy.fit_("folder/", [X]), "expected a torch.nn.Module as model, got str"),
    "a path to cast": (lambda: rarefy.cast_("folder/", "fp16"), "expected a torch.nn.Module as model, got str"),
    "a path to tie": (lambda: rarefy.tie_layers_("folder/"), "expected a torch.nn.Module as model, got str"),
    "a path of groups": (lambda: rarefy.groups("folder/", X), "expected a torch.nn.Module as model, got str"),
    "one sparsity": (lambda: rarefy.sensitivity(net(), [X], sparsities=0.5), r"sparsities: .* give \[0.5\]"),
    "one number of bits": (lambda: rarefy.sensitivity(net(), [X], bits=8), r"bits: .* got 8: give \[8\]"),
    "no seed": (lambda: rarefy.prune_(net(), sparsity=0.5, seed=None), "seed: expected a whole number"),
    "half a seed": (lambda: rarefy.prune_(net(), sparsity=0.5, seed=1.5), "seed: expected a whole number"),
    "one sparsity of layers": (lambda: rarefy.prune_(net(), per_layer=0.5), "per_layer: expected .*, got 0.5"),
    "a list of counts": (lambda: rarefy.cut_(net(), X, counts=[4]), r"counts: expected .*, got \[4\]"),
    "bits of layers": (lambda: rarefy.quantize_(net(), per_layer="int4"), "per_layer: expected .*, got 'int4'"),
    "text to distil": (
        lambda: rarefy.Distiller(net(), net(), "mse"),
        r"config: expected rarefy.Distill\(...\), got str",
    ),
    "a mask of a file": (lambda: rarefy.adopt_(net(), state="pruned.pt"), "state: expected a state dict, got str"),
    "a state to inspect": (lambda: rarefy.inspect(net().state_dict()), "expected a model or a path, got OrderedDict"),
    "a state to export": (lambda: export(net().state_dict(), "out", to="hf"), "expected a folder or a torch model"),
    "one batch": (lambda: rarefy.prune_(net(), sparsity=0.5, data={"x": X}), r"got one batch \(x: float32 4x8\)"),
    "one batch of a recipe": (
        lambda: rarefy.compress_(net(), {"stages": [PRUNE]}, {"x": X}),
        r"into a list, \[batch\]",
    ),
    "calibration of a name": (
        lambda: rarefy.Sparsifier(net(), rarefy.Gradual(sparsity=0.5, score="wanda"), calibrate="data.txt", steps=9),
        "calibrate: expected an iterable of batches, got the text 'data.txt'",
    ),
    "calibration of a number": (
        lambda: rarefy.Sparsifier(net(), rarefy.Gradual(sparsity=0.5, score="wanda"), calibrate=5, steps=9),
        "calibrate: expected an iterable of batches, got int",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_the_wrong_kind(name):
    call, message = CALLS[name]
    with pytest.raises(RarefyError, match=message):
        call()


def test_a_dict_of_distillation_is_one():
    assert rarefy.Distiller(net(), net(), {"by": "mse"}).config == rarefy.Distill(by="mse")


def test_events_are_functions_by_progress():
    from rarefy.train.sparsifier import Sparsifier

    for at, message in (({"0.5": print}, "between 0 and 1, got '0.5'"), ([print], "a dict of functions .*, got list")):
        with pytest.raises(PatternError, match=message):
            Sparsifier(net(), None, at=at)


def test_a_dry_run_checks_names_of_layers():
    recipe = Recipe(stages=[{"prune": {"per_layer": {"*": 0.5}}}])
    with pytest.raises(PatternError, match="per_layer: expected full names of layers, such as '0'"):
        list(targets(net(), recipe))


def test_a_relative_folder_of_a_recipe_may_be_text(tmp_path):
    np.savez(tmp_path / "data.npz", input=X.numpy())
    recipe = {
        "data": {"calibrate": "data.npz", "samples": 4},
        "stages": [{"prune": {"sparsity": 0.5, "score": "wanda"}}],
    }
    assert rarefy.compress_(net(), recipe, base=str(tmp_path)).sparsity["achieved"] == 0.5


LOSSES = {
    "each sample": (nn.CrossEntropyLoss(reduction="none"), r"got float32 4: use reduction='mean'"),
    "a number": (lambda out, batch: out.sum().item(), r"got float: return it without item\(\)"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_one_number(name):
    loss, message = LOSSES[name]
    batch = (X, torch.tensor([0, 1, 2, 3]))
    for train in (lambda: rarefy.fit_(net(), [batch], loss=loss), lambda: resolve_loss(loss)(net()(X), batch)):
        with pytest.raises(DataError, match=f"loss: expected a tensor with one number, {message}"):
            train()


CLASSES = {
    "below 0": ([0, 1, -1, 2], "expected classes from 0 to 3, as the model has outputs, or -100 .*, got -1"),
    "above": ([0, 1, 4, 2], "got 4"),
    "of fewer samples": ([0, 1, 2], "returns outputs of 4 samples, the batch has 3 classes"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_that_the_model_does_not_have(name):
    classes, message = CLASSES[name]
    with pytest.raises(DataError, match=message):
        rarefy.fit_(net(), [(X, torch.tensor(classes))])


def test_classes_of_any_integers_and_samples_to_leave_out():
    report = rarefy.fit_(net(), [(X, torch.tensor([0, -100, 3, 1], dtype=torch.int32))])
    assert report.rows[-1]["loss"] > 0


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(2), torch.tensor([0.5])])
def test_numbers_of_numpy_validate(number):
    report = rarefy.fit_(net(), [(X, torch.zeros(4).long())], validate=lambda model: number)
    assert report.rows[-1]["metric"] == float(number)


def test_text_does_not_validate():
    with pytest.raises(RecipeError, match="validate must return a number, got ndarray"):
        rarefy.fit_(net(), [(X, torch.zeros(4).long())], validate=lambda model: np.zeros(8))


def test_accuracy_of_a_model_that_returns_a_tuple():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(DataError, match="accuracy needs a model that returns one number for each class.*Pair returns"):
        accuracy(Pair(), [(X, torch.zeros(4).long())])


def test_the_example_of_models_whose_config_lacks_sizes():
    from transformers import ResNetConfig, ResNetModel

    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    assert example_of(model, 8, 2)["pixel_values"].shape == (2, 3, 224, 224)
    model.config.image_size = [32, 48]
    assert example_of(model, 8, 2)["pixel_values"].shape == (2, 3, 32, 48)
    llama = tiny_llama()
    object.__setattr__(llama.config, "vocab_size", None)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: its config does not say how many tokens it knows"):
        example_of(llama, 8, 2)


def test_attention_masks_are_tensors():
    decoder = rarefy.decoder(tiny_llama())
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(DataError, match="attention_mask: expected a tensor of the shape of ids, got list"):
        decoder.generate(ids, attention_mask=[[1, 1, 0]])
    with pytest.raises(DataError, match="logprobs has no effect on a stream of tokens"):
        list(decoder.stream(ids, logprobs=3))


def test_caches_of_other_batches():
    decoder = rarefy.decoder(tiny_llama())
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(DataError, match=r"the cache is for 2 sequences, got 1: make one for 1"):
        decoder(ids, decoder.cache(2, 16))


@pytest.mark.parametrize("operation", ["cut", "drop", "heads"])
def test_a_receipt_does_not_outlive_a_cut(operation):
    model = tiny_llama()
    ids = torch.randint(64, (1, 8))
    rarefy.compress_(model, {"stages": [{"prune": {"sparsity": 0.5}}]})
    assert model.rarefy_receipt is not None
    rarefy.fold_(model)
    if operation == "cut":
        rarefy.cut_(model, ids, units="neuron", keep=0.5, dry_run=True)
        assert model.rarefy_receipt is not None
        rarefy.cut_(model, ids, units="neuron", keep=0.5)
    elif operation == "drop":
        rarefy.drop_layers_(model, ids, keep=0.5)
    else:
        rarefy.prune_heads_(model, {"model.layers.0.self_attn": [0, 1]}, ids)
    assert not hasattr(model, "rarefy_receipt")


# Damaged files


def test_receipts_whose_rows_lack_a_name():
    from rarefy.evaluation.receipt import receipt_from_dict

    receipt = json.loads(rarefy.compress_(net(), {"stages": [PRUNE]}).to_json())
    del receipt["sparsity"]["layers"][1]["pattern"]
    with pytest.raises(ContainerError, match="receipt: not written by Rarefy"):
        receipt_from_dict(receipt)


def test_a_benchmark_without_measurements():
    from rarefy.search.bench_report import bench_from_lines

    line = {"run": "a", "quality": {}, "milliseconds": {}, "machine": {}}
    with pytest.raises(ContainerError, match="bench: line 1: quality has no models: nothing was measured"):
        bench_from_lines(json.dumps(line))


def test_an_index_that_is_a_list(tmp_path):
    from rarefy.model.hub import SHARDS, _is_whole

    for content in ([], {"weight_map": ["a"]}, {}):
        (tmp_path / SHARDS).write_text(json.dumps(content))
        with pytest.raises(ContainerError, match="not an index of safetensors files: download the model again"):
            _is_whole(tmp_path)


def test_a_data_set_that_lists_no_splits(tmp_path):
    pytest.importorskip("datasets")
    from rarefy.data.images import DICT_FILE, _library, _opened

    (tmp_path / DICT_FILE).write_text('{"splits": []}')
    with pytest.raises(DataError, match="lists splits, but holds none: the copy is incomplete"):
        _opened(tmp_path, _library("data"), "data")


def test_built_in_data_that_is_damaged(tmp_path, monkeypatch):
    from rarefy.data import builtin

    file = tmp_path / "wiki.json"
    file.write_text("{")
    for part in ("images-idx3", "labels-idx1"):
        (tmp_path / f"t10k-{part}-ubyte.gz").write_bytes(b"no gzip")
    monkeypatch.setattr(builtin, "find", lambda name: file if name == "wiki" else tmp_path)
    for read in (builtin.wiki, builtin.fashion_mnist):
        with pytest.raises(DataError, match="is damaged: install its package again"):
            read(True)


def test_rows_without_a_label():
    from rarefy.data.datasets import batches

    rows = [{"input_ids": [1, 2], "label": 0}, {"input_ids": [1, 2]}, {"input_ids": None, "label": 1}]
    with pytest.raises(DataError, match="row 2 of the dataset has no 'label': leave such rows out"):
        list(batches(rows[:2], labels="label", batch=2))
    with pytest.raises(DataError, match="row 2 of the dataset has no 'input_ids'"):
        list(batches([rows[0], rows[2]], labels="label", batch=1))


def test_arrays_of_objects_are_not_read(tmp_path):
    from rarefy.data.sources import Take, batches

    np.savez(tmp_path / "data.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="it is damaged, or holds Python objects, which are not read: save arrays of"):
        batches(str(tmp_path / "data.npz"), Take())


def test_a_recipe_that_may_not_be_read(tmp_path, monkeypatch):
    file = tmp_path / "r.yaml"
    file.write_text("stages: []")

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "read_text", refused)
    for read in (recipes.load, rarefy.migrate):
        with pytest.raises(RecipeError, match=r"r.yaml cannot be read: Permission denied"):
            read(file)


# The command line


def test_a_prompt_that_is_no_text(monkeypatch):
    from rarefy.cli.generate_command import _standard_input

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(RecipeError, match=r"standard input is not UTF-8 text \(byte 3\)"):
        _standard_input()


def test_memory_that_runs_out_is_a_line(monkeypatch, capsys):
    from rarefy.cli import main

    def grow(**options):
        raise MemoryError("the cache needs 9 GB")

    monkeypatch.setattr(main, "app", grow)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "rarefy: the cache needs 9 GB: ask for less at once" in capsys.readouterr().err


def test_models_of_other_inputs_are_not_compared():
    from rarefy.cli.benchmark import bench_models

    class Other(nn.Module):
        def forward(self, y):
            return y

    with pytest.raises(ModelError, match=r"other cannot be called with the inputs of the first model: .*\(.*\)"):
        bench_models({"first": _encoder(), "other": Other()}, 8, 24, 1, 2, False)


def test_an_encoder_is_timed_at_its_full_length():
    from rarefy.cli.benchmark import bench_models

    report = bench_models({"bert": _encoder()}, 16, 24, 1, 2, False)
    assert report.rows[0]["what"] == "forward, 1 x 16 tokens"
    with pytest.raises(ModelError, match="bert accepts at most 16 tokens, got 17$"):
        bench_models({"bert": _encoder()}, 17, 24, 1, 2, False)


def _encoder():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=9, max_position_embeddings=16, **sizes)).eval()


def test_a_figure_for_a_missing_folder(tmp_path):
    from rarefy.cli.sensitivity import _check_plot

    with pytest.raises(RecipeError, match=r"there is no folder .*missing: create it, or give another name"):
        _check_plot(tmp_path / "missing" / "layers.svg", False)
