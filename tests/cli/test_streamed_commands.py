"""`generate`, `compile` and `compress` of language models whose weights are packed one at a time."""

import json
import re

import pytest
import torch

import rarefy
from checkpoint.test_gguf_export import build
from checkpoint.test_gguf_load import byte_tokenizer, splits
from helpers.language_models import small
from rarefy.cli import shared
from rarefy.formats import container
from rarefy.model import hf

pytest.importorskip("gguf")


@pytest.fixture
def gguf(tmp_path):
    """A GGUF file of a tiny quantized model with its tokenizer."""
    tokenizer = byte_tokenizer(splits()["qwen2"])
    model = build("Llama", vocab_size=512)
    return rarefy.export(model, tmp_path / "m.gguf", to="gguf", type="q8_0", tokenizer=tokenizer)


def no_whole_models(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was loaded as a whole")

    monkeypatch.setattr(shared, "load_any", refuse)


@pytest.mark.slow
def test_gguf_file_becomes_a_folder_that_generates(gguf, tmp_path, run, monkeypatch):
    no_whole_models(monkeypatch)
    ran = run("compile", gguf, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    monkeypatch.undo()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    want = rarefy.decoder(rarefy.from_gguf(gguf), precision="int8")  # quantized files run in 8 bits
    rarefy.save(want, tmp_path / "want")
    assert (tmp_path / "out" / "graph.json").read_bytes() == (tmp_path / "want" / "graph.json").read_bytes()
    got, expected = container.read(tmp_path / "out"), container.read(tmp_path / "want")
    assert all(torch.equal(got.tensor(n), expected.tensor(n)) for n in expected.names)
    ran = run("generate", tmp_path / "out", "--prompt", "Hello world", "--max-new-tokens", 4, "--json")
    assert ran.code == 0, ran.err
    direct = run("generate", gguf, "--prompt", "Hello world", "--max-new-tokens", 4, "--json")
    assert direct.code == 0 and json.loads(direct.out)["text"] == json.loads(ran.out)["text"]


def test_compress_writes_the_tokenizer_of_a_gguf_file(gguf, tmp_path, run):
    (tmp_path / "half.yaml").write_text("name: half\nstages: [{prune: {score: random, sparsity: 0.5}}]\n")
    ran = run("compress", gguf, "-r", tmp_path / "half.yaml", "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    assert hf.load_tokenizer(tmp_path / "out")("Hello")["input_ids"]


@pytest.mark.slow
def test_folder_in_4_bits(tmp_path, run, monkeypatch):
    small().save_pretrained(tmp_path / "model")
    no_whole_models(monkeypatch)
    ran = run("compile", tmp_path / "model", "--precision", "int4", "--out", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    monkeypatch.undo()
    ids = torch.tensor([[3, 17, 5]])
    want = rarefy.decoder_from_files(tmp_path / "model", precision="int4")
    assert torch.equal(rarefy.load(tmp_path / "out")(ids), want(ids))


def test_other_models_are_loaded_as_a_whole(tmp_path, run):
    small("GPT2").save_pretrained(tmp_path / "model")
    ran = run("compile", tmp_path / "model", "--precision", "int4", "--out", tmp_path / "out")
    assert ran.code == 2 and "read one at a time, which this model does not support" in ran.err
    ran = run("compile", tmp_path / "model", "--fresh", "--out", tmp_path / "out")
    assert ran.code == 2 and "--fresh has no effect" in ran.err
    ran = run("generate", tmp_path / "model", "--ids", "3 4", "--max-new-tokens", 2, "-q")
    assert ran.code == 0, ran.err
    with pytest.raises(rarefy.RarefyError, match="stores its weights transposed \\(Conv1D\\): load it with transf"):
        rarefy.decoder_from_files(tmp_path / "model")


@pytest.mark.parametrize(
    "option", [("--batch", 2), ("--ignore", "lm_head", "--precision", "int8"), ("--input-shape", "x=1")]
)
def test_options_without_effect(tmp_path, run, option):
    small().save_pretrained(tmp_path / "model")
    ran = run("compile", tmp_path / "model", "--out", tmp_path / "out", *option)
    assert ran.code == 2 and re.search("ha(s|ve) no effect", ran.err)
