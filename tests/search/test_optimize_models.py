"""`optimize` on models and inputs of many kinds: language models, masked outputs, several inputs, other types."""

import html
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from conftest import tiny_llama
from rarefy.common.errors import DataError, ModelError, RecipeError
from rarefy.evaluation.metrics import perplexity
from rarefy.evaluation.quality import Metric
from rarefy.pipeline.engine_evaluation import EngineModule
from rarefy.pipeline.speed import resize_batch
from rarefy.runtime import bindings
from rarefy.search import points, search
from rarefy.search.deploy import engine_in, timed_tokens
from rarefy.search.frontier import frontier_from_dict
from rarefy.search.html_report import frontier_page
from rarefy.search.optimize import optimize
from rarefy.search.parts import PartMeasurer, small_example

pytestmark = pytest.mark.usefixtures("one_line")

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
TEXTS = [{"input_ids": torch.randint(2, 60, (4, 24), generator=torch.Generator().manual_seed(i))} for i in range(4)]


class Net(nn.Module):
    """A classifier that one class may be masked out of."""

    def __init__(self, masked=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 256), nn.Linear(256, 6)
        self.register_buffer("mask", torch.tensor([0, 0, masked, 0, 0, 0]))

    def forward(self, x):
        return self.b(self.a(x).relu()) + self.mask


class Scaled(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 256), nn.Linear(256, 6)

    def forward(self, x, scale):
        return self.b(self.a(x).relu()) * scale


# ---- language models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model():
    return tiny_llama()


@pytest.fixture(scope="module")
def searched(language_model):
    return optimize(language_model, TEXTS[0], TEXTS, minutes=5, layers="model.layers.0.self_attn.q_proj")


@pytest.mark.slow
def test_a_language_model_is_judged_by_its_perplexity(language_model, searched):
    assert searched.metric["name"] == "perplexity" and not searched.metric["higher_is_better"]
    dense, int8 = (next(p for p in searched.points if p.name == f"dense, {n}") for n in ("fp32", "int8"))
    exact = perplexity(language_model, TEXTS[3:])  # the last quarter is for evaluation
    assert dense.quality == pytest.approx(exact, rel=1e-4)
    assert int8.loss == pytest.approx(int8.quality / dense.quality - 1) and abs(int8.loss) < 0.02
    assert searched.met and searched.batches == ("decode", "prompt")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["decode", "prompt"])
def test_one_time_of_a_language_model_alone(language_model, target):
    layers = "model.layers.0.self_attn.q_proj"
    frontier = optimize(language_model, TEXTS[0], TEXTS, minutes=5, layers=layers, target=target)
    assert frontier.batches == (target,) and set(frontier.best_point.speedup) == {target}
    assert frontier.targets["objective"] == target
    speeds = {p.name: p.speedup[target] for p in frontier.points if p.loss is not None and p.loss <= 0.01}
    assert frontier.best_point.name in speeds


@pytest.mark.slow
def test_a_cache_in_8_bits_is_kept_where_it_is_faster(language_model, monkeypatch, tmp_path):
    def faster(models, example, names):
        ms = {n: 1.0 if engine_in(m).cache_precision == "int8" else 2.0 for n, m in models.items()}
        return {n: {m: {"median": t, "low": t, "high": t} for m, t in ms.items()} for n in names}

    monkeypatch.setattr(points, "times_of", faster)
    layers = "model.layers.0.self_attn.q_proj"
    frontier = optimize(language_model, TEXTS[0], TEXTS, minutes=5, layers=layers, target="decode", max_loss="50%")
    best = frontier.best_point
    assert best.cache_precision == "int8" and "int8, 8-bit cache" in best.name
    assert "cache_precision='int8'" in best.recipe["about"]
    assert frontier.best.model.cache_precision == "int8"
    assert frontier_from_dict(json.loads(frontier.to_json())).best_point.cache_precision == "int8"
    assert "--cache-precision int8" in frontier_page(replace(frontier, model="tiny"))
    line = "fast = rarefy.compile(model, precision='int8', cache_precision='int8')"
    assert line in html.unescape(frontier_page(frontier))
    same = rarefy.compile(frontier.best.compressed, precision="int8", cache_precision="int8")
    assert torch.equal(same(TEXTS[0]["input_ids"]), frontier.best.model(TEXTS[0]["input_ids"]))
    rarefy.save(frontier.best.model, tmp_path / "fast")
    assert rarefy.load(tmp_path / "fast").cache_precision == "int8"


def test_times_of_tokens_are_of_language_models():
    with pytest.raises(RecipeError, match="target 'decode' is for language models: give 'latency'"):
        optimize(nn.Linear(4, 4).eval(), torch.randn(2, 4), target="decode")


def test_without_kernels_the_search_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bindings, "missing", lambda: "none for the test")
    frontier = optimize(nn.Linear(8, 8).eval(), torch.randn(2, 8), max_loss="5%", minutes=0.05, progress=True)
    assert "there are no native kernels (none for the test): models run in torch" in frontier.notes[0]
    assert "there are no native kernels (none for the test)" in "".join(capsys.readouterr())


def test_a_text_without_data_is_judged_by_the_same_next_tokens(language_model):
    found = optimize(language_model, TEXTS[0], minutes=0.05)
    assert found.metric["name"] == "agreement" and found.dense.quality == 100.0


def test_a_function_calls_it_as_the_model_itself(language_model):
    ids = TEXTS[0]["input_ids"]
    seen = []

    def loss(model):
        assert model.eval() is model and model.device.type == "cpu"
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        assert output.logits.shape == (4, 24, 64) and torch.equal(output.logits, output["logits"])
        seen.append(output.loss)
        return output.loss

    found = optimize(language_model, TEXTS[0], None, loss, higher_is_better=False, max_loss=0.1, minutes=0.05)
    with torch.no_grad():
        exact = language_model(input_ids=ids, labels=ids).loss
    assert seen[0] == pytest.approx(float(exact), abs=1e-4) and found.dense.quality == pytest.approx(
        float(exact), abs=1e-4
    )
    assert found.best.model.eval() is found.best.model


def test_labels_of_minus_100_do_not_count(language_model):
    ids = TEXTS[0]["input_ids"]
    labels = ids.masked_fill(torch.arange(24) > 9, -100)
    engine = EngineModule(rarefy.decoder(language_model))
    with torch.no_grad():
        exact = language_model(input_ids=ids, labels=labels).loss
    assert float(engine(input_ids=ids, labels=labels).loss) == pytest.approx(float(exact), abs=1e-4)
    assert engine(ids).loss is None


@pytest.mark.parametrize("limit", [1, 2, 5, 128, 303, 304, 305, None])
def test_a_prompt_and_what_follows_fit_the_positions(limit):
    prompt, new = timed_tokens(limit)
    assert prompt >= 1 and new >= 1 and (limit is None or prompt + new <= max(limit, 2))
    assert (prompt, new) == (256, 48) or limit in (1, 2, 5, 128, 303)


@pytest.mark.slow
def test_a_model_with_few_positions_is_timed():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    found = optimize(GPT2LMHeadModel(config).eval(), TEXTS[0], TEXTS, minutes=0.05)
    assert set(found.dense.milliseconds) == {"decode", "prompt"} and not found.dense.error


def test_batch_sizes_of_language_models_have_no_effect(language_model):
    with pytest.raises(RecipeError, match="batch has no effect on language models: they are timed at decoding"):
        optimize(language_model, TEXTS[0], TEXTS, batch=(1, 16))


# ---- outputs -----------------------------------------------------------------------------------------------------


def test_outputs_with_infinities_are_searched(monkeypatch):
    def faster(self, smaller):  # beside other work a cut of so small a net may seem to save nothing
        return dict.fromkeys(self.names, 0.3)

    monkeypatch.setattr(PartMeasurer, "_saved_by", faster)
    net = Net(-math.inf).eval()
    found = optimize(net, X[:2], X.split(8), max_loss=0.2, minutes=1)
    assert found.met and found.metric["name"] == "agreement"
    cut = [p for p in found.points if "fewer neurons" in p.name]
    assert cut and not any(p.error for p in found.points)
    assert torch.equal(found.best.model(X)[:, 2], torch.full((64,), -math.inf))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["kl", "distance"])
def test_losses_of_metrics_whose_best_is_0_are_points(metric, monkeypatch):
    monkeypatch.setattr(search, "MAX_POINTS", 4)  # ends the search on any machine before its minutes do
    net = Net().eval()
    with pytest.raises(
        RecipeError, match=f"the dense model's {metric}, which is 0: give points, such as '0.02 points'"
    ):
        optimize(net, X[:2], X.split(8), metric)
    found = optimize(net, X[:2], X.split(8), metric, max_loss="0.05 points", minutes=2)
    int8 = next(p for p in found.points if p.name == "dense, int8")
    assert abs(found.dense.quality) < 1e-6 and int8.loss == pytest.approx(int8.quality - found.dense.quality)
    assert found.met and "points" in found.verdict
    free = optimize(net, X[:2], X.split(8), metric, max_loss=None, speedup=1000, minutes=0.05)
    assert "points of" in free.verdict and all(abs(p.loss) < 10 for p in free.points)


@pytest.mark.slow
def test_a_function_whose_number_is_0_but_for_rounding_is_a_number_of_0():
    net = Net().eval()
    want = net(X).detach()

    def error(model):
        return float((model(X) - want).square().mean())

    with pytest.raises(RecipeError, match="the dense model's error, which is 0: give points"):
        optimize(net, X[:2], X.split(8), error, higher_is_better=False, minutes=0.1)
    found = optimize(net, X[:2], X.split(8), error, higher_is_better=False, max_loss="0.01 points", minutes=0.1)
    assert found.met and error(found.best.model) <= 0.01 + found.dense.quality


# ---- inputs ------------------------------------------------------------------------------------------------------


def test_values_that_are_no_tensors_stay_as_they_are():
    batch = {"x": torch.arange(6).view(3, 2), "flag": True, "none": None, "n": 2, "t": torch.tensor(3.0), "name": "ab"}
    larger = resize_batch(batch, 5)
    assert torch.equal(larger.pop("x"), torch.tensor([[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]))
    assert larger == {k: v for k, v in batch.items() if k != "x"}
    inputs, targets = resize_batch((torch.ones(2, 3), [torch.zeros(2), 7]), 1)
    assert inputs.shape == (1, 3) and targets[0].shape == (1,) and targets[1] == 7


def test_an_example_with_a_flag_is_searched():
    class Flagged(Net):
        def forward(self, x, double=None):
            y = super().forward(x)
            return 2 * y if double else y

    net = Flagged().eval()
    example = {"x": X[:2], "double": True}
    found = optimize(
        net, example, [{"x": x, "double": True} for x in X.split(8)], max_loss=0.2, batch=(1, 8), minutes=0.1
    )
    assert found.batches == ("1", "8") and not any(p.error for p in found.points)


def test_several_inputs_are_a_dict_and_a_tuple_is_inputs_and_target():
    net, scale = Scaled().eval(), torch.rand(64, 1) + 1
    with pytest.raises(DataError, match=r"example: Scaled cannot be called .* \(give several inputs as a dict\)"):
        optimize(net, (X, scale))
    data = [{"x": x, "scale": s} for x, s in zip(X.split(8), scale.split(8))]
    want = net(X, scale).argmax(1)

    def same(model):
        for output in (model(X, scale=scale), model(x=X, scale=scale)):
            assert torch.equal(output, model(**{"scale": scale, "x": X}))
        return float((output.argmax(1) == want).float().mean())

    found = optimize(net, data[0], data, same, max_loss=0.2, minutes=0.1)
    assert found.dense.quality == 1.0 and not any(p.error for p in found.points)
    assert found.best.model.eval() is found.best.model


def test_an_argument_by_position_is_bound_where_one_input_is_left():
    net, scale = Scaled().eval(), torch.rand(64, 1)
    fast = rarefy.compile(net, {"x": X, "scale": scale})
    want = net(X, scale)
    torch.testing.assert_close(fast(X, scale=scale), want)
    with pytest.raises(DataError, match="pass inputs by name, as in the example"):
        fast(X, scale)  # which is which is not known
    with pytest.raises(DataError, match="scale"):
        fast(X, x=X, scale=scale)
    torch.testing.assert_close(rarefy.compile(net, (X, scale))(X, scale=scale), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_are_refused(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=rf"expected a model in float32, got {name}: call model.float\(\)"):
        optimize(Net().to(dtype).eval(), X[:2].to(dtype))


def test_numbers_of_numpy_are_numbers():
    found = optimize(
        Net().eval(), X[:2], X.split(8), max_loss=np.float32(0.25), batch=np.int64(2), minutes=np.float32(0.05),
        seed=np.int64(3),
    )  # fmt: skip
    assert found.batches == ("2",) and found.targets["max_loss"] == "25 %"


# ---- options that would have no effect -----------------------------------------------------------------------------


def mine(model):
    return 1.0


@pytest.mark.parametrize(
    ("evaluate", "options", "error", "message"),
    [
        (mine, {"eval_data": [X]}, RecipeError, "eval_data has no effect on a function"),
        (Metric("mine", True, mine), {"eval_data": [X]}, RecipeError, "eval_data has no effect on a function"),
        (Metric("mine", True, mine), {"higher_is_better": False}, DataError, "has no effect on a Metric"),
        ("agreement", {"higher_is_better": False}, DataError, "a higher agreement is always better"),
        (mine, {"seed": 0.5}, RecipeError, "seed: expected a whole number of at least 0, got 0.5"),
    ],
)
def test_options_without_effect_are_refused(evaluate, options, error, message):
    with pytest.raises(error, match=message):
        optimize(Net().eval(), X[:2], X.split(8), evaluate, **options)


@pytest.mark.slow
def test_an_encoder_whose_attention_has_groups_of_one_name():
    """Heads and the three parts of in_proj are groups of the same parameter and dimension."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(32, 6, 32)
    found = optimize(encoder, x[:2], list(x.split(8)), max_loss=0.3, minutes=0.4)
    assert found.best is not None and len(found.points) > 1


def test_the_global_random_state_is_left_as_it_was():
    net = Net().eval()
    before = torch.random.get_rng_state()
    optimize(net, X[:2], X.split(8), max_loss=0.2, minutes=0.05)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_cross_entropy_is_that_of_the_next_token(language_model):
    ids = TEXTS[1]["input_ids"]
    output = EngineModule(rarefy.decoder(language_model))(input_ids=ids, labels=ids)
    exact = F.cross_entropy(output.logits[:, :-1].reshape(-1, 64), ids[:, 1:].reshape(-1))
    assert float(output.loss) == pytest.approx(float(exact))


class FixedBatch(nn.Module):
    """A network that runs on four samples alone."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x.view(4, 8))


def test_cuts_are_checked_on_a_small_example(language_model):
    ids = torch.randint(2, 60, (6, 100))
    small = small_example(language_model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert {n: v.shape for n, v in small.items()} == dict.fromkeys(("input_ids", "attention_mask"), (2, 64))
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    assert small_example(language_model, {"input_ids": ids, "attention_mask": mask})["input_ids"].shape == (2, 100)
    assert len(small_example(Net().eval(), X)) == 2
    assert len(small_example(FixedBatch().eval(), X[:4, :8])) == 4
