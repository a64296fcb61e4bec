"""Recipes whose result is evaluated and timed on the engine."""

import math

import pytest
import torch

import rarefy
from conftest import Net, image_batches, text_model, tiny_llama
from helpers.marks import slow_case
from rarefy.common.errors import DataError, RecipeError
from rarefy.compiler.executor import Compiled
from rarefy.evaluation.metrics import accuracy, perplexity
from rarefy.generation.decoder import Decoder
from rarefy.model import hf
from rarefy.pipeline.engine_evaluation import EngineModule, first_sentence, resident_bytes

DECODE = {"prompt": 8, "new": 2, "repeats": 2}


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(0))


def run(model, data, stages, tokenizer=None, **evaluate):
    plan = {"name": "r", "stages": stages, "evaluate": {"engine": True, **evaluate}}
    return rarefy.compress_(model, plan, {"evaluate": data}, tokenizer=tokenizer)


@pytest.mark.parametrize("precision", [None, slow_case("int8")])
def test_a_language_model_is_evaluated_by_its_decoder(precision):
    model, data = tiny_llama(), [{"input_ids": ids(3, 12)}]
    before = perplexity(model, data)
    stages = [{"prune": {"sparsity": 0.5, "layers": "model.layers.*"}}, {"quantize": {"layers": "model.layers.*"}}]
    receipt = run(model, data, stages, metric="perplexity", precision=precision, decode=DECODE)
    decoder = rarefy.decoder(model, precision=precision)
    assert receipt.quality["before"] == before
    assert receipt.quality["after"] == perplexity(EngineModule(decoder), data)
    eager = perplexity(model, data)  # quantized weights; activations are rounded by int8 alone
    assert math.isclose(receipt.quality["after"], eager, rel_tol=1e-5) == (precision is None)
    assert receipt.memory["after"] == resident_bytes(decoder)
    assert [s["what"] for s in receipt.speed] == ["prefill of 8", "decode of 2, batch 1"]
    assert all({"before", "after"} <= set(s) for s in receipt.speed)
    name = "Rarefy's engine, int8" if precision else "Rarefy's engine"
    assert receipt.settings["runs"] == {"before": "eager torch, fp32", "after": name}
    assert f"before: eager torch, fp32; after: {name}\n" in str(receipt)


def test_a_model_in_bf16_is_run_as_a_copy_in_fp32():
    model, data = tiny_llama(), [{"input_ids": ids(2, 12)}]
    receipt = run(model, data, [{"cast": {"dtype": "bf16"}}], metric="perplexity")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert math.isclose(receipt.quality["after"], perplexity(model.float(), data), rel_tol=1e-4)


def test_another_model_is_compiled():
    model, data = Net(), image_batches()
    receipt = run(
        model, data, [{"prune": {"sparsity": 0.5}}], metric="accuracy", latency={"batch": [1, 2], "repeats": 2}
    )
    assert receipt.quality["after"] == accuracy(model, data)
    assert [s["what"] for s in receipt.speed] == ["forward, batch 1", "forward, batch 2"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side):
    model, text = tiny_llama(), ids(2, 12)
    mask = torch.ones_like(text)
    mask[1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    data = [{"input_ids": text, "attention_mask": mask}]
    decoder = EngineModule(rarefy.decoder(model))
    assert isinstance(decoder.engine, Decoder)
    alone = perplexity(decoder, [{"input_ids": text[1:, 4:] if side == "left" else text[1:, :8]}])
    one = [{"input_ids": text[1:], "attention_mask": mask[1:]}]
    assert math.isclose(perplexity(decoder, one), alone, rel_tol=1e-5)
    assert math.isclose(perplexity(decoder, data), perplexity(EngineModule(decoder.engine), data))


def test_a_cache_in_8_bits_counts_in_the_quality():
    """Logits are those of generating token by token with the same cache."""
    model, text = tiny_llama(), ids(2, 12)
    decoder = rarefy.decoder(model, cache_precision="int8")
    logits = EngineModule(decoder)(input_ids=text, attention_mask=torch.ones_like(text)).logits
    cache = decoder.cache(2, 12)
    steps = torch.cat([decoder(text[:, i : i + 1], cache) for i in range(12)], 1)
    torch.testing.assert_close(logits, steps, rtol=1e-3, atol=1e-3)
    exact = EngineModule(rarefy.decoder(model))(input_ids=text).logits
    assert 1e-5 < float((logits - exact).abs().max()) < 0.1


def test_padding_on_both_sides_is_refused():
    mask = torch.tensor([[0, 1, 1, 0]])
    with pytest.raises(DataError, match="padded on the left"):
        EngineModule(rarefy.decoder(tiny_llama()))(input_ids=ids(1, 4), attention_mask=mask)


def test_labels_are_not_given_to_a_compiled_model():
    compiled = EngineModule(rarefy.compile(Net().eval(), torch.randn(2, 3, 9, 9)))
    assert isinstance(compiled.engine, Compiled)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(compiled(x, labels=torch.zeros(2)), compiled(x))


@pytest.mark.slow
def test_sample_text_of_both_models(tmp_path):
    text_model(tmp_path)
    model, tokenizer = hf.load_folder(tmp_path / "model"), hf.load_tokenizer(tmp_path / "model")
    receipt = run(
        model,
        [{"input_ids": ids(2, 12)}],
        [{"cast": {"dtype": "fp32"}}],
        tokenizer,
        metric="perplexity",
        decode={**DECODE, "text": "w1 w2"},
    )
    [sample] = receipt.samples
    assert sample["prompt"] == "w1 w2" and sample["before"] == sample["after"] != ""
    assert f"w1 w2 ...\n  before: {sample['before']}\n  after: {sample['after']}\n" in receipt.summary()


def test_sample_text_needs_a_tokenizer():
    decode = {**DECODE, "text": "w1"}
    with pytest.raises(RecipeError, match=r"evaluate.decode.text needs a tokenizer: pass tokenizer="):
        run(
            tiny_llama(),
            [{"input_ids": ids(2, 12)}],
            [{"prune": {"sparsity": 0.5}}],
            metric="perplexity",
            decode=decode,
        )


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (" a place. It is", "a place."),
        ("no end", "no end"),
        ("one\ntwo? three. four", "one two?"),
        ("3.5 m is long.", "3.5 m is long."),
        ("", ""),
    ],
)
def test_the_first_sentence(text, first):
    assert first_sentence(text) == first


@pytest.mark.slow
def test_few_zeros_are_not_said_to_make_the_engine_faster():
    model, data = tiny_llama(), [{"input_ids": ids(2, 12)}]
    quantize = {"quantize": {"layers": ["model.layers.*", "model.embed_tokens"]}}
    few = run(model, data, [{"prune": {"sparsity": 0.05}}, quantize], metric="perplexity", precision="int8")
    assert any("the kernels run dense" in n for n in few.notes)
    half = run(tiny_llama(), data, [{"prune": {"sparsity": 0.5}}, quantize], metric="perplexity", precision="int8")
    assert not any("dense" in n for n in half.notes)
