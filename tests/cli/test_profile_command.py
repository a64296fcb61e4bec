"""`rarefy profile`: encoders, language models, compiled folders, JSON, and mistakes."""

import json

import pytest
import torch

import rarefy
from conftest import text_model, tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    tiny_bert().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled") / "out"
    x = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    rarefy.save(rarefy.compile(tiny_bert(), x), folder)
    return folder


def rows_of(profile, operator):
    return [r for r in profile["rows"] if r["operator"] == operator]


@pytest.mark.slow
def test_an_encoder(encoder, run):
    ran = run("profile", encoder, "--batch", 3, "--tokens", 20, "--precision", "int8", "--repeats", 2, "--json")
    assert ran.code == 0, ran.err
    profile = json.loads(ran.out)["call"]
    linear = rows_of(profile, "linear")
    assert "encoder.layer.1.attention.self.query" in {r["layer"] for r in linear}
    assert {r["weights"] for r in linear} == {"int8 dense"} and linear[0]["sizes"] == "60 x 32 -> 32"
    assert sum(r["milliseconds"] for r in profile["rows"]) == pytest.approx(profile["milliseconds"])
    assert profile["ceilings"]["fp32"] > 0


@pytest.mark.slow
def test_the_printed_tables(encoder, run):
    ran = run("profile", encoder, "--rows", 2, "--tokens", 20, "--repeats", 2)
    assert ran.code == 0 and "ms a call" in ran.out and "of ceiling %" in ran.out and "measured ceilings" in ran.out
    by_operator, by_row = ran.out.split("\n\n")[1:3]
    assert "linear" in by_operator and len(by_row.splitlines()) == 1 + 2 + 1 and "more rows" in by_row
    assert run("profile", encoder, "--rows", 0, "--tokens", 20, "--repeats", 1).out.count("of ceiling %") == 1
    ran = run("profile", encoder, "--tokens", 20, "--repeats", 1, "--quiet")
    assert ran.code == 0 and ran.out == ""


def test_a_compiled_folder(compiled, run):
    ran = run("profile", compiled, "--batch", 2, "--tokens", 12, "--repeats", 1, "--json")
    assert ran.code == 0, ran.err
    profile = json.loads(ran.out)["call"]
    assert rows_of(profile, "linear")[0]["sizes"] == "24 x 32 -> 32"


@pytest.mark.slow
def test_a_language_model_and_its_decoder(tmp_path, run):
    text_model(tmp_path)
    rarefy.save(rarefy.decoder(tiny_llama()), tmp_path / "decoder")
    for folder in ("model", "decoder"):
        ran = run("profile", tmp_path / folder, "--tokens", 20, "--repeats", 1, "--json")
        assert ran.code == 0, ran.err
        prompt, token = json.loads(ran.out).items()  # prompts are padded to whole vectors
        assert prompt[0] == "prompt of 1 x 20 tokens" and token[0] == "next token"
        assert " x 32 x 32 x " in rows_of(prompt[1], "attention")[0]["sizes"]
        assert " x 1 x 21 x " in rows_of(token[1], "attention")[0]["sizes"]


def test_mistakes(encoder, compiled, tmp_path, run):
    ran = run("profile", compiled, "--precision", "int8")
    assert ran.code == 2 and "--precision has no effect" in ran.err and "compiled model" in ran.err
    ran = run("profile", tmp_path / "none")
    assert ran.code == 2 and "no model folder" in ran.err
    ran = run("profile", encoder, "--tokens", 65)
    assert ran.code == 2 and "--tokens: expected at most 64" in ran.err
    ran = run("profile", encoder, "--repeats", 0)
    assert ran.code == 2
    rarefy.save(rarefy.decoder(tiny_llama()), tmp_path / "decoder")
    ran = run("profile", tmp_path / "decoder", "--tokens", 128)
    assert ran.code == 2 and "the model accepts at most 128 tokens, got 128 and a new one" in ran.err
