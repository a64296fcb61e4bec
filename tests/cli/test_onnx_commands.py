"""ONNX files on the command line: compile, bench, optimize, profile, inspect, compress, sensitivity."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
import zoo
from conftest import shell, text_model
from helpers.onnx_files import bert, export
from rarefy.cli import onnx_files
from rarefy.common.errors import DataError, RecipeError
from rarefy.data.sources import Take
from rarefy.evaluation.example_inputs import input_shapes, random_inputs
from rarefy.model.layers import all_layers
from rarefy.model.signature import ModelInput, Signature
from rarefy.runtime import bindings

pytest.importorskip("onnxruntime")
needs_kernels = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


class Small(nn.Module):
    """A convolutional classifier of images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an image network of open batch, the same with a fixed one, an encoder, and images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("onnx")
    net, x = zoo.lively(Small()).eval(), torch.randn(2, 3, 16, 16)
    export(net, x, folder / "net.onnx", 17, ("image",))
    export(net, x, folder / "fixed.onnx", 17, ("image",), ())
    bert(folder, 14, open_length=True)
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", image=rng.standard_normal((24, 3, 16, 16)).astype(np.float32))
    np.savez(folder / "words.npz", input_ids=rng.integers(5, 60, (16, 9)), attention_mask=np.ones((16, 9), np.int64))
    return folder


def feed(count=3):
    return {"image": np.random.default_rng(1).standard_normal((count, 3, 16, 16)).astype(np.float32)}


def by_onnxruntime(path, inputs):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)


# compile


@needs_kernels
@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_compiled_file_takes_arrays_by_name(run, place, tmp_path, precision):
    words = ("--precision", precision) if precision else ()
    ran = run("compile", place / "net.onnx", "--out", tmp_path / "fast", *words, "--json")
    assert ran.code == 0 and json.loads(ran.out)["summary"]["contains"] == "a compiled model", ran.err
    fast = rarefy.load(tmp_path / "fast")
    assert fast.input_names == ["image"]
    [ours], [theirs] = fast.run(None, feed()), by_onnxruntime(place / "net.onnx", feed())
    assert np.abs(ours - theirs).max() < (0.05 if precision else 1e-4) * np.abs(theirs).max()


@needs_kernels
def test_scales_from_data(run, place, tmp_path):
    words = ("compile", place / "net.onnx", "-o", tmp_path / "fast", "--data", place / "images.npz")
    ran = run(*words, "--precision", "int8", "--samples", 16, "-q")
    assert ran.code == 0, ran.err
    fast = rarefy.load(tmp_path / "fast")
    assert any(k.input_grid is not None for k in fast.kernels.values())
    [ours], [theirs] = fast.run(None, feed()), by_onnxruntime(place / "net.onnx", feed())
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    assert "--data has no effect: it gives the scales of --precision int8" in run(*words, "--force").err
    every = run(*words, "--precision", "int8", "--force", "-q")  # 24 samples, fewer than the default
    assert every.code == 0, every.err
    ran = run(*words, "--precision", "int8", "--samples", 64, "--force")
    assert ran.code == 2 and "images.npz is too short: 24 samples, 64 are needed" in ran.err
    ran = run("compile", place / "net.onnx", "-o", tmp_path / "more", "--samples", 3)
    assert ran.code == 2 and "--samples has no effect without --data" in ran.err
    text_model(tmp_path)
    ran = run("compile", tmp_path / "model", "-o", tmp_path / "more", "--data", "wiki", "--precision", "int8")
    assert ran.code == 2 and "--data has no effect: a decoder" in ran.err
    for option in (("--ignore", "lm_head"), ("--per-layer", "lm_head=bf16")):
        ran = run("compile", tmp_path / "model", "-o", tmp_path / "more", *option, "--precision", "int8")
        assert ran.code == 2 and "--ignore and --per-layer have no effect: all layers of a decoder" in ran.err


@needs_kernels
def test_the_largest_error_is_chosen(run, place, tmp_path):
    text_model(tmp_path)
    for model in (place / "net.onnx", tmp_path / "model"):
        words = ("compile", model, "-o", tmp_path / "fast", "--precision", "int8", "-q")
        ran = run(*words, "--max-error", 1e-6)
        assert ran.code == 2 and "at most 1e-06 is allowed" in ran.err and not (tmp_path / "fast").exists()
        assert run(*words, "--max-error", 0.9, "--force").code == 0
        ran = run(*words, "--max-error", 0)
        assert ran.code == 2 and "--max-error" in ran.err
        shutil.rmtree(tmp_path / "fast")


def test_layers_that_stay_in_fp32(run, place, tmp_path):
    words = ("compile", place / "net.onnx", "-o", tmp_path / "fast", "--precision", "int8", "-q")
    names = [l.full_name for l in all_layers(rarefy.from_onnx(place / "net.onnx"))]
    ran = run(*words, "--data", place / "images.npz", "--ignore", names[0])
    assert ran.code == 0, ran.err
    fast = rarefy.load(tmp_path / "fast")
    assert [k.held[0].kind for k in fast.kernels.values()].count("fp32") == 1
    ran = run("compile", place / "net.onnx", "-o", tmp_path / "more", "--ignore", names[0])
    assert ran.code == 2 and "--ignore has no effect: it names layers that stay in fp32 beside" in ran.err
    ran = run(*words, "--force", "--ignore", "no.such.layer")
    assert ran.code == 2 and "ignore: 'no.such.layer' matches no layer" in ran.err


def test_layers_with_a_precision_of_their_own(run, place, tmp_path):
    words = ("compile", place / "net.onnx", "-o", tmp_path / "fast", "-q")
    names = [l.full_name for l in all_layers(rarefy.from_onnx(place / "net.onnx"))]
    ran = run(*words, "--precision", "int8", "--per-layer", f"{names[0]}=fp32", "--per-layer", f"{names[-1]}=int16")
    assert ran.code == 0, ran.err
    kinds = [k.held[0].kind for k in rarefy.load(tmp_path / "fast").kernels.values()]
    assert {"fp32", "int16"} <= {*kinds}
    order = ("--per-layer", f"{names[0]}=int16", "--per-layer", "*=int8", "--per-layer", f"{names[0]}=bf16")
    ran = run(*words, "--force", "--precision", "int8", *order)  # the last one that matches applies
    assert ran.code == 0, ran.err
    assert {k.held[0].kind for k in rarefy.load(tmp_path / "fast").kernels.values()} <= {"fp32", "bf16", "int8"}
    for option, message in (
        ("head", "--per-layer: expected a layer and its precision, such as head=bf16, got 'head'"),
        ("=bf16", "--per-layer: expected a layer and its precision, such as head=bf16, got '=bf16'"),
        ("no.such.layer=bf16", "per_layer: 'no.such.layer' matches no layer"),
        (f"{names[0]}=fp8", "unknown precision 'fp8'"),
    ):
        ran = run(*words, "--force", "--per-layer", option)
        assert ran.code == 2 and message in ran.err, ran.err


def test_what_needs_a_language_model_says_so(run, place):
    ran = run("generate", place / "net.onnx", "--ids", "1 2")
    assert ran.code == 2 and "expected a language model of transformers, got OnnxModel" in ran.err


def test_an_encoder_is_compiled_with_its_tokenizer(run, place, tmp_path):
    text_model(tmp_path)
    (tmp_path / "model" / "bert.onnx").write_bytes((place / "bert.onnx").read_bytes())
    ran = run("compile", tmp_path / "model" / "bert.onnx", "-o", tmp_path / "fast", "--tokens", 16, "--batch", 3, "-q")
    assert ran.code == 0, ran.err
    assert (tmp_path / "fast" / "tokenizer.json").is_file() and (tmp_path / "fast" / "config.json").is_file()
    fast = rarefy.load(tmp_path / "fast")
    words = {"input_ids": np.full((2, 11), 7), "attention_mask": np.ones((2, 11), np.int64)}
    assert np.allclose(fast.run(None, words)[0], by_onnxruntime(place / "bert.onnx", words)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("net.onnx", "--input-shape", "images=2x3x16x16"), "unknown input 'images'; choose from image (did you mean 'image'?)"),
        (("net.onnx", "--input-shape", "image=2x3x16"), "--input-shape 'image=2x3x16': the file's input is image float32 batchx3x16x16"),
        (("net.onnx", "--input-shape", "image=2x3x16x17"), "the file's input is image float32 batchx3x16x16"),
        (("net.onnx", "--input-shape", "image=2x0"), "expected an input and its sizes, as NAME=1x3x224x224"),
        (("bert.onnx", "--input-shape", "2x7"), "expected an input and its sizes, as NAME=1x3x224x224"),
        (("net.onnx", "--tokens", "7"), "--tokens has no effect: it fills no open size of the inputs (image float32 batchx3x16x16)"),
        (("fixed.onnx", "--batch", "4"), "--batch has no effect: it fills no open size of the inputs (image float32 2x3x16x16)"),
        (("net.onnx", "--input-shape", "image=2x3x16x16", "--batch", "2"), "--batch has no effect: it fills no open size of the inputs"),
        (("nett.onnx",), "no file"),
        (("broken.onnx",), "not an ONNX file"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line(run, place, tmp_path, words, message):
    (place / "broken.onnx").write_bytes(b"no protobuf")
    name, *options = words
    ran = run("compile", place / name, "-o", tmp_path / "fast", *options)
    assert ran.code == 2 and message in ran.err and "Traceback" not in ran.err and not any(tmp_path.iterdir())


def test_a_missing_file_has_similar_names(run, place, tmp_path):
    ran = run("compile", place / "nett.onnx", "-o", tmp_path / "fast")
    assert "did you mean" in ran.err and "net.onnx" in ran.err


def test_sizes_that_onnxruntime_does_not_run(run, tmp_path):
    """Position embeddings that are shorter than the default length."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Parameter(torch.randn(1, 8, 6)), nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(x + self.table)

    path = export(Positions().eval(), torch.randn(2, 8, 6), tmp_path / "p.onnx", 17, ("x",), ("batch", "length"))
    ran = run("compile", path, "-o", tmp_path / "fast", "--tokens", 9)
    assert ran.code == 2 and "ONNX Runtime does not run the example" in ran.err
    assert "(x float32 2x9x6): give others, --tokens 128 or --input-shape NAME=1x3x224x224" in ran.err
    ran = run("compile", path, "-o", tmp_path / "fast")
    assert ran.code == 2 and "cannot be called with an example of float32 2x128x6" in ran.err
    assert run("compile", path, "-o", tmp_path / "fast", "--tokens", 8, "-q").code == 0
    assert run("compile", path, "-o", tmp_path / "again", "--input-shape", "2x8x6", "-q").code == 0


# bench


@needs_kernels
def test_engines_side_by_side(run, place):
    ran = run("bench", place / "net.onnx", "--precision", "int8", "--batch", 4, "--repeats", 3, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    rows = {r["of"]: r for r in report["rows"]}
    engines = [
        "Rarefy",
        "Rarefy, int8",
        "ONNX Runtime",
        *(["OpenVINO"] if importlib.util.find_spec("openvino") else []),
    ]
    assert list(rows) == engines
    assert rows["ONNX Runtime"]["difference"] is None and rows["ONNX Runtime"]["speed"] == 1
    assert rows["Rarefy"]["difference"] < 1e-4 < rows["Rarefy, int8"]["difference"] < 0.1
    assert rows["ONNX Runtime"]["setting"] in ("threads spin", "threads sleep") and rows["Rarefy"]["setting"] == ""
    for r in rows.values():
        assert 0 < r["low"] <= r["median"] <= r["high"] and r["repeats"] == 3
        assert r["samples_per_second"] == pytest.approx(4000 / r["median"])
    assert report["summary"]["inputs"] == "image float32 4x3x16x16" and report["summary"]["streams"] == "1"
    assert any("OpenVINO is not installed" in n for n in report["notes"]) == ("OpenVINO" not in rows)


def test_the_table_of_engines(run, place):
    ran = run("bench", place / "bert.onnx", "--tokens", 16, "--repeats", 2)
    assert ran.code == 0, ran.err
    head = next(line for line in ran.out.splitlines() if line.startswith("engine"))
    assert head.split() == ["engine", "ms", "a", "call", "quartiles", "samples/s", "speed", "difference"]
    assert "ONNX Runtime, threads s" in ran.out
    assert "inputs: input_ids int64 1x16, attention_mask int64 1x16" in ran.out and "note: inputs are random" in ran.out


def test_several_streams(run, place, monkeypatch):
    from rarefy.cli import onnx_benchmark

    monkeypatch.setattr(onnx_benchmark, "SECONDS", 0.2)
    ran = run("bench", place / "net.onnx", "--streams", 2, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["summary"]["streams"].startswith("2, each of ")
    assert all(r["samples_per_second"] > 0 and r["repeats"] >= 10 for r in report["rows"])
    assert torch.get_num_threads() > 0


def test_a_compiled_folder_beside_its_file(run, place, tmp_path):
    assert run("compile", place / "net.onnx", "-o", tmp_path / "fast", "-q").code == 0
    ran = run("bench", place / "net.onnx", "--against", tmp_path / "fast", "--repeats", 2, "--json")
    assert ran.code == 0, ran.err
    rows = {r["of"]: r for r in json.loads(ran.out)["rows"]}
    assert rows[str(tmp_path / "fast")]["difference"] < 1e-4
    ran = run("bench", tmp_path / "fast", "--against", place / "net.onnx")
    assert (
        ran.code == 2 and f"give it first, rarefy bench {place / 'net.onnx'} --against {tmp_path / 'fast'}" in ran.err
    )
    ran = run("bench", place / "net.onnx", "--against", place / "fixed.onnx")
    assert ran.code == 2 and f"rarefy compile {place / 'fixed.onnx'} --out fast/ makes a folder" in ran.err
    ran = run("bench", place / "bert.onnx", "--against", tmp_path / "fast", "--repeats", 2, "--tokens", 9)
    assert ran.code == 2 and "unknown input 'input_ids'; choose from image" in ran.err


def test_a_compiled_folder_of_another_model(run, place, tmp_path):
    export(nn.Flatten().eval(), torch.randn(2, 3, 16, 16), tmp_path / "flat.onnx", 17, ("image",))
    assert run("compile", tmp_path / "flat.onnx", "-o", tmp_path / "fast", "-q").code == 0
    ran = run("bench", place / "net.onnx", "--against", tmp_path / "fast", "--repeats", 2)
    assert ran.code == 2 and "returns 1x768, ONNX Runtime 1x5: they are other models" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accelerate",), "--accelerate has no effect: the model is an ONNX file"),
        (("--no-engine",), "--no-engine has no effect: the model is an ONNX file"),
        (("--new", "3"), "--new has no effect: the model is an ONNX file"),
        (("--table", "t.json"), "--table has no effect: the model is an ONNX file"),
        (("--streams", "2", "--repeats", "3"), "--repeats has no effect: --streams times each engine for some seconds"),
        (("--streams", "999"), "4 for each core, got 999"),
        (("--tokens", "3"), "--tokens has no effect: it fills no open size"),
        (("--precision", "int4"), "unknown precision 'int4'"),
    ],
)
def test_bench_options_without_effect(run, place, words, message):
    ran = run("bench", place / "net.onnx", *words)
    assert ran.code == 2 and message in ran.err


def test_options_of_files_on_folders(run, tmp_path):
    text_model(tmp_path)
    for words in (("bench", "--streams", "2"), ("bench", "--input-shape", "x=1"), ("profile", "--input-shape", "x=1")):
        ran = run(words[0], tmp_path / "model", *words[1:])
        assert ran.code == 2 and f"{words[1]} has no effect: {tmp_path / 'model'} is no ONNX" in ran.err


# optimize


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    ("file", "words"),
    [("net.onnx", ("--data", "images.npz", "--samples", "16")), ("fixed.onnx", ()), ("bert.onnx", ("--data", "words.npz", "--samples", "16", "--tokens", "9"))],
)  # fmt: skip
def test_a_search_with_inputs_alone(place, tmp_path, file, words):
    words = [place / w if w.endswith(".npz") else w for w in words]
    limits = ["--max-loss", "20%", "--minutes", "0.5", "--json"]
    ran = shell("optimize", place / file, "-o", tmp_path / "fast", *words, *limits)
    assert ran.returncode in (0, 1), ran.stderr
    frontier = json.loads(ran.stdout)
    assert frontier["metric"]["name"] and {p["name"] for p in frontier["points"]} >= {"dense, fp32"}
    assert frontier["batches"] == (["2"] if file == "fixed.onnx" else ["1"])
    fast = rarefy.load(tmp_path / "fast")
    if file == "bert.onnx":
        inputs = {"input_ids": np.full((1, 9), 7), "attention_mask": np.ones((1, 9), np.int64)}
    else:
        inputs = feed(2)
    [ours], [theirs] = fast.run(None, inputs), by_onnxruntime(place / file, inputs)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    assert (tmp_path / "fast" / "recipe.yaml").is_file()


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    ("samples", "calibrated", "words"),
    [
        (96, 64, ()),
        (20, 15, ()),
        (96, 64, ("--train", "0.1")),
    ],  # of several batches, of one, and with training
)
def test_the_recipe_of_a_search_gives_the_model_that_was_measured(tmp_path, samples, calibrated, words):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 384), nn.ReLU(), nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 6)).eval()
    x = torch.randn(samples, 24)
    export(net, x[:2], tmp_path / "net.onnx", 17, ("x",))
    np.savez(tmp_path / "x.npz", x=x.numpy())
    limits = ["--max-loss", "any", "--speedup", "1000", "--target", "latency", "--minutes", "0.2", "--json"]
    data = ["--data", tmp_path / "x.npz", "--evaluate", "similarity", *words]
    ran = shell("optimize", tmp_path / "net.onnx", *data, "-o", tmp_path / "fast", *limits)
    frontier = json.loads(ran.stdout)
    best = frontier["points"][frontier["best_index"]]
    assert any(next(iter(stage)) in ("cut", "prune") for stage in best["recipe"]["stages"]), ran.stderr
    assert best["recipe"]["data"]["samples"] == calibrated  # the others are for evaluation
    assert not (tmp_path / ".fast.work").exists()  # nor what the training had saved
    trained = [p["recipe"]["data"] for p in frontier["points"] if "trained" in p["name"]]
    untrained = [p["recipe"]["data"] for p in frontier["points"] if "trained" not in p["name"]]
    assert bool(trained) == bool(words) and all(1 <= d["train_samples"] <= calibrated for d in trained)
    assert not any("train" in d for d in untrained)
    again = shell(
        "compress", tmp_path / "net.onnx", "--recipe", tmp_path / "fast" / "recipe.yaml", "-o", tmp_path / "t"
    )
    assert again.returncode == 0, again.stderr
    loaded = rarefy.load(tmp_path / "t", model=rarefy.from_onnx(tmp_path / "net.onnx"))
    made = rarefy.compile(loaded, x[:1], precision=best["precision"])
    assert torch.equal(made(x), rarefy.load(tmp_path / "fast")(x))


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("bert.onnx", "images.npz", "--data has image: expected an array for each input, input_ids, attention_mask"),
        ("net.onnx", "words.npz", "--data has input_ids, attention_mask: expected an array for each input, image"),
        ("net.onnx", "small.npz", "float32 8x3x8x8 does not fit the input image float32 batchx3x16x16: 8 is not 16 in dimension 2"),
        ("net.onnx", "whole.npz", "int64 8x3x16x16 for the input image float32 batchx3x16x16: expected float32"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit(run, place, tmp_path, file, data, message):
    np.savez(place / "small.npz", image=np.zeros((8, 3, 8, 8), np.float32))
    np.savez(place / "whole.npz", image=np.zeros((8, 3, 16, 16), np.int64))
    ran = run("optimize", place / file, "-o", tmp_path / "fast", "--data", place / data, "--samples", 8, "--minutes", 1)
    assert ran.code == 2 and message in ran.err, ran.err
    assert not any(tmp_path.iterdir())


# other commands


@needs_kernels
def test_profile(run, place):
    ran = run("profile", place / "net.onnx", "--repeats", 2, "--json")
    assert ran.code == 0 and any("conv" in r["operator"] for r in json.loads(ran.out)["call"]["rows"]), ran.err
    ran = run("profile", place / "bert.onnx", "--repeats", 2, "--tokens", 16, "--batch", 2)
    assert ran.code == 0 and "linear" in ran.out, ran.err
    assert "--batch has no effect" in run("profile", place / "fixed.onnx", "--batch", 3).err


def test_inspect(run, place):
    ran = run("inspect", place / "net.onnx", "--json")
    report = json.loads(ran.out)
    assert report["title"] == str(place / "net.onnx")
    assert {r["tensor"] for r in report["rows"]} >= {"body.0.weight", "head.weight"}
    assert "body.0" in run("inspect", place / "net.onnx", "--groups").out


def test_compress_and_use_in_python(run, place, tmp_path):
    recipe = "name: half\nstages: [{prune: {sparsity: 0.5}}]\n"
    (tmp_path / "half.yaml").write_text(recipe)
    ran = run("compress", place / "net.onnx", "-r", tmp_path / "half.yaml", "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    net = rarefy.load(tmp_path / "out", rarefy.from_onnx(place / "net.onnx"))
    assert float((net.get_submodule("body.2").weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    ran = run("compress", place / "net.onnx", "-r", tmp_path / "half.yaml", "--dry-run")
    assert ran.code == 0 and "body.2" in ran.out, ran.out + ran.err


def test_sensitivity(run, place):
    ran = run("sensitivity", place / "net.onnx", "--sparsity", 0.5, "--pattern", "unstructured", "--bits", 8, "--json")
    assert ran.code == 0, ran.err
    assert {r["layer"] for r in json.loads(ran.out)["rows"]} == {"body.0", "body.2"}
    ran = run("sensitivity", place / "bert.onnx", "--data", place / "words.npz", "--bits", 4, "--sparsity", 0.5, "-q")
    assert ran.code == 0, ran.err


# sizes and data


def signature(*inputs):
    return Signature(tuple(ModelInput(n, n, dtype, dims) for n, dtype, dims in inputs), ("y",))


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        ([("x", torch.float32, ("N", 3, "H", "W"))], [(2, 3, 224, 224)]),
        ([("x", torch.float32, ("", "", "", ""))], [(2, 3, 224, 224)]),
        ([("x", torch.float32, ("N", "H", "W", 3))], [(2, 224, 224, 3)]),
        ([("x", torch.float32, (1, 3, "H", 48))], [(1, 3, 224, 48)]),
        ([("ids", torch.int64, ("N", "L")), ("mask", torch.int64, ("N", "L"))], [(2, 7), (2, 7)]),
        ([("audio", torch.float32, ("N", 80, ""))], [(2, 80, 7)]),
        ([("a", torch.float32, ("N", "D")), ("b", torch.float32, ("D", "N"))], [(2, 7), (7, 2)]),
        ([("scale", torch.float32, ())], [()]),
    ],
)
def test_open_sizes_are_filled(inputs, shapes):
    assert list(input_shapes(signature(*inputs), 7, 2).values()) == shapes


def test_given_sizes_hold_for_all_inputs():
    told = signature(("ids", torch.int64, ("N", "L")), ("mask", torch.int64, ("N", "L")))
    told = onnx_files.with_shapes(told, ["mask=5x6"])
    assert list(input_shapes(told, 7, 2).values()) == [(5, 6), (5, 6)]
    tensors = random_inputs(told, 7, 2)
    assert bool((tensors["mask"] == 1).all()) and tensors["ids"].unique().tolist() == [0, 1]


def test_an_input_of_unknown_rank(run):
    with pytest.raises(
        rarefy.RarefyError, match="how many dimensions its input x has: give --input-shape x=1x3x224x224"
    ):
        input_shapes(signature(("x", torch.float32, None)), 7, 2)
    told = onnx_files.with_shapes(signature(("x", torch.float32, None)), ["2x4"])
    assert input_shapes(told, 7, 2) == {"x": (2, 4)}


def test_names_with_an_equals_sign():
    told = onnx_files.with_shapes(signature(("a=b", torch.float32, ("N", 4))), ["a=b=3x4"])
    assert input_shapes(told, 7, 2) == {"a=b": (3, 4)}
    with pytest.raises(RecipeError, match="unknown input 'a'; choose from a=b"):
        onnx_files.with_shapes(told, ["a=3x4"])


def test_batches_fit_the_file():
    images = signature(("x", torch.float32, (4, 48, 48, 3)))
    take = onnx_files.fitting_take(images, Take(batch=8))
    assert (take.batch, take.images.size) == (4, 48)
    assert onnx_files.fitting_take(signature(("x", torch.float32, ("N", 3, 32, 64))), Take()).images.size == 224
    x, y = torch.randn(4, 3, 48, 48), torch.arange(4)
    [(fitted, classes)] = onnx_files.fit_batches(
        images, [(x, y), (x[:1], y[:1])], "--data"
    )  # the last one is too small
    assert torch.equal(fitted, x.permute(0, 2, 3, 1)) and classes is y
    half = signature(("x", torch.float16, ("N", 3, 48, 48)))
    assert onnx_files.fit_batches(half, [{"arr_0": x}], "--data")[0].dtype == torch.float16
    text = signature(
        ("input_ids", torch.int32, ("N", "L")), ("attention_mask", torch.int64, ("N", "L")), ("token_type_ids", torch.int64, ("N", "L"))
    )  # fmt: skip
    [batch] = onnx_files.fit_batches(text, [{"input_ids": torch.full((2, 5), 9)}], "--data")
    assert batch["input_ids"].dtype == torch.int32 and int(batch["attention_mask"].sum()) == 10
    assert int(batch["token_type_ids"].sum()) == 0
    with pytest.raises(
        DataError, match="--data: the model takes input_ids, attention_mask, token_type_ids: give an .npz"
    ):
        onnx_files.fit_batches(text, [(x, y)], "--data")


@pytest.mark.slow
@needs_kernels
@pytest.mark.real
def test_a_trained_file_of_an_ocr_system(run, tmp_path):
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package rapidocr-onnxruntime")
    path = Path(spec.submodule_search_locations[0]) / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    ran = run("bench", path, "--input-shape", "x=1x3x48x192", "--repeats", 2, "--json")
    assert ran.code == 0, ran.err
    rows = {r["of"]: r for r in json.loads(ran.out)["rows"]}
    assert rows["Rarefy"]["difference"] < 1e-3
    assert run("compile", path, "--input-shape", "1x3x48x192", "-o", tmp_path / "fast", "-q").code == 0
    assert rarefy.load(tmp_path / "fast").input_names == ["x"]


def test_engines_that_do_not_run_a_file_are_notes():
    from rarefy.cli.onnx_benchmark import Engine, _ready

    def missing(streams, threads):
        raise ImportError("no module")

    def broken(streams, threads):
        raise RuntimeError("operator X\nmore")

    works = Engine("works", lambda streams, threads: [lambda: [streams]] * streams)
    runs, notes = _ready([works, Engine("a", missing), Engine("b", broken)], 2, 1)
    assert list(runs) == [("works", "")] and len(runs["works", ""]) == 2
    assert notes == ["a is not installed", "b does not run the file: operator X"]
    with pytest.raises(rarefy.RarefyError, match="ONNX Runtime does not run the file: operator X"):
        _ready([Engine("ONNX Runtime", broken)], 1, 1)
    with pytest.raises(RuntimeError, match="operator X"):  # a mistake of ours is not hidden
        _ready([Engine("Rarefy", broken, True)], 1, 1)


def test_outputs_that_are_not_finite_have_no_difference():
    from rarefy.cli.onnx_benchmark import _difference

    ones = [np.ones((2, 3), np.float32)]
    assert _difference("x", [ones[0] * np.float32(1.01)], ones) == pytest.approx(0.01, rel=1e-3)
    assert _difference("x", [ones[0] * np.nan], ones) is None
