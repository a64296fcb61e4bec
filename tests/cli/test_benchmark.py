"""What `rarefy bench` times besides models: what the engine makes of them, and what was compiled before."""

import re

import pytest
import torch
from torch import nn

import rarefy
from conftest import sample, tiny_bert, tiny_llama
from rarefy.cli.benchmark import bench_models, engine_of, example_for, resident_bytes
from rarefy.common.errors import ModelError
from rarefy.compiler.executor import Compiled
from rarefy.evaluation import profiling
from rarefy.generation.decoder import Decoder
from rarefy.pipeline.engine_evaluation import decode_step


@pytest.mark.slow
def test_language_models_beside_their_decoders():
    model = tiny_llama(torch.bfloat16)
    made, why = engine_of(model, 8, 1, "int8")
    assert isinstance(made, Decoder) and why == "" and model.dtype == torch.bfloat16  # it made a copy
    report = bench_models({"model": model, "engine": made}, 8, 2, 1, 2, False)
    assert report.summary["timed"] == "a prompt of 8 tokens, then 2 new ones, batch 1"
    assert [(r["what"], r["of"]) for r in report.rows] == [
        (kind, of) for kind in ("prefill", "decode") for of in ("model", "engine")
    ]
    assert all(0 < r["low"] <= r["tokens_per_second"] <= r["high"] for r in report.rows)
    with pytest.raises(ModelError, match="engine accepts at most 128 tokens, got 127 and 2 new ones"):
        bench_models({"engine": made}, 127, 2, 1, 2, False)


def test_a_model_is_timed_beside_what_it_was_compiled_to():
    """The compiled model wants all the inputs that it was compiled with, the model itself only one of them."""
    model, ids = tiny_bert(), torch.randint(1, 64, (2, 9))
    fast = rarefy.compile(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tune=False)
    report = bench_models({"model": model, "fast": fast}, 8, 2, 1, 2, False)
    assert [r["of"] for r in report.rows] == ["model", "fast"] and report.rows[0]["what"] == "forward, 1 x 8 tokens"


@pytest.mark.slow
def test_both_write_the_same_tokens(monkeypatch):
    model, tokens = tiny_llama(), {"model": [], "engine": []}
    made, _ = engine_of(model, 8, 1)
    steps = {"model": profiling.step_of(model), "engine": decode_step(made, 12)}

    def listening(name):
        def step(ids, state):
            tokens[name].append(ids.tolist())
            return steps[name](ids, state)

        return step

    profiling.rates({n: listening(n) for n in steps}, 64, prompt=8, new=4, repeats=1)
    assert tokens["model"] == tokens["engine"] and len(tokens["model"]) == 2 * 5


def test_a_delay_of_one_token_changes_the_rate_of_all_but_not_of_the_median_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: clock[0])

    def step(ids, state):
        state = 0 if state is None else state + 1
        clock[0] += 0.5 if state == 3 else 0.01  # the third token waits for another program
        return torch.zeros(1, ids.shape[1], 64), state

    rates = profiling.rates({"model": step}, 64, prompt=8, new=5, repeats=3)["model"]
    assert rates["token"]["tokens_per_second"] == pytest.approx(100)
    assert rates["decode"]["tokens_per_second"] == pytest.approx(5 / 0.54)
    assert rates["prefill"]["tokens_per_second"] == pytest.approx(800)


def test_an_encoder_beside_what_is_compiled_of_it():
    model = tiny_bert()
    made, why = engine_of(model, 8, 1)
    assert isinstance(made, Compiled) and why == ""
    report = bench_models({"model": model, "engine": made}, 8, 2, 1, 2, False)
    rows = report.rows
    assert all(len(re.sub(r"^0\.0*|[.,]", "", r["median"])) == 3 for r in report.printed_rows)
    assert [float(r["median"]) for r in report.printed_rows] == pytest.approx([r["median"] for r in rows], rel=0.01)
    assert [(r["what"], r["of"], r["unit"]) for r in rows] == [
        ("forward, 1 x 8 tokens", n, "ms") for n in ("model", "engine")
    ]


class Own(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

    config = type("C", (), {"to_dict": dict, "model_type": "own", "vocab_size": 9})()


def test_why_the_engine_has_nothing():
    made, why = engine_of(Own().eval(), 8, 1)
    assert made is None and why.startswith("Own cannot be called with an example of input_ids: ")
    writer = Own().eval()
    writer.generate, writer.can_generate, writer.config.is_encoder_decoder = None, lambda: True, True
    made, why = engine_of(writer, 8, 1)
    assert made is None and why == "Own is an encoder-decoder model, which the engine does not support"


@pytest.mark.slow
def test_a_compiled_model_by_itself(tmp_path):
    x = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    rarefy.save(rarefy.compile(tiny_bert(), x), tmp_path / "out")
    made = rarefy.load(tmp_path / "out")
    args, kwargs = example_for(made, 12, 3)
    assert args == () and kwargs["input_ids"].shape == (3, 12) and int(kwargs["attention_mask"].sum()) == 36
    with pytest.raises(ModelError, match="input_ids accepts at most 64 tokens, got 65"):
        example_for(made, 65, 3)
    [row] = bench_models({"model": made}, 12, 2, 3, 2, False).rows
    assert row["what"] == "forward, 3 x 12 tokens" and row["median"] > 0
    net = rarefy.compile(nn.Linear(5, 3).eval(), torch.randn(2, 5))
    [row] = bench_models({"model": net}, 12, 2, 7, 2, False).rows
    assert row["what"] == "forward, batch 7"
    with pytest.raises(ModelError, match="against generates text and model does not"):
        bench_models({"model": net, "against": engine_of(tiny_llama(), 8, 1)[0]}, 8, 2, 1, 2, False)


@pytest.mark.slow
def test_bytes_of_what_is_compiled():
    net = nn.Linear(64, 64).eval()
    dense = rarefy.compile(net, torch.randn(2, 64))
    net.weight.data[32:] = 0
    half, small = (rarefy.compile(net, torch.randn(2, 64), precision=v) for v in (None, "int8"))
    assert resident_bytes(small) < resident_bytes(half) < resident_bytes(dense)
    made = engine_of(tiny_llama(), 8, 1)[0]
    weights = sum(p.numel() for p in tiny_llama().parameters())
    assert 0.5 * 4 * weights < resident_bytes(made) < 3 * 4 * weights


def test_a_precision_that_the_engine_lacks(run):
    sample("minilm")
    ran = run("bench", "minilm", "--precision", "int4", "--tokens", "8")
    assert ran.code == 2 and "--precision int4: " in ran.err and "Traceback" not in ran.err
