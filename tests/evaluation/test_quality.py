"""Metrics against slow, plain loops; on real MiniLM, eager and compiled; every function and file that is no metric."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from conftest import Net, Tied, image_batches, sample, tiny_bert, tiny_llama
from rarefy.common.errors import DataError, ModelError
from rarefy.data import builtin
from rarefy.data.text_pairs import text_pairs
from rarefy.evaluation.agreement import keep_probabilities, kl_divergence
from rarefy.evaluation.metrics import accuracy, perplexity
from rarefy.evaluation.quality import METRIC_NAMES, Metric, default_metric, metric_of
from rarefy.evaluation.retrieval import embed, ndcg, ranks, recall
from rarefy.model import hf
from rarefy.pipeline.engine_evaluation import EngineModule


def token_data(count: int = 2, rows: int = 3, tokens: int = 7) -> list[dict[str, torch.Tensor]]:
    """Return batches of texts of different lengths, padded on the right."""
    g = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(count):
        ids = torch.randint(2, 64, (rows, tokens), generator=g)
        mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (rows, 1), generator=g)).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def rougher(model: nn.Module, amount: float = 0.3) -> nn.Module:
    """Return a copy of a model with noise in its weights."""
    torch.manual_seed(3)
    rough = copy.deepcopy(model)
    with torch.no_grad():
        for p in rough.parameters():
            p += amount * p.std(correction=0) * torch.randn_like(p)
    return rough


# retrieval


def test_ranks_and_recall_against_sorting():
    queries, texts = (F.normalize(torch.randn(40, 5), dim=-1) for _ in range(2))
    want = []
    for i, query in enumerate(queries):
        order = sorted(range(40), key=lambda j, query=query: -float(query @ texts[j]))
        want.append(order.index(i) + 1)
    assert ranks(queries, texts).tolist() == want
    for k in (1, 3, 10):
        assert recall(queries, texts, k) == pytest.approx(100 * sum(r <= k for r in want) / 40)
    gains = [1 / math.log2(r + 1) if r <= 10 else 0 for r in want]
    assert ndcg(queries, texts) == pytest.approx(100 * sum(gains) / 40)


def test_equal_embeddings_find_nothing_but_by_chance():
    same = F.normalize(torch.ones(20, 4), dim=-1)
    assert recall(same, same) == 5.0 and recall(same, same, 10) == 50.0


def embeddings_by_loop(model, batches):
    rows = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
            with torch.no_grad():
                states = model(input_ids=ids[None], attention_mask=mask[None])[0][0]
            mean = torch.stack([s for s, m in zip(states, mask) if m]).mean(0)
            rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.real
def test_retrieval_on_a_real_encoder_eager_and_compiled():
    sample("minilm")
    sample("wiki")
    folder = builtin.model_folder("minilm")
    model, tokenizer = hf.load_folder(folder).eval(), hf.load_tokenizer(folder)
    pairs = text_pairs(builtin.wiki(True)[:40], tokenizer, batch=10, tokens=48)
    queries, texts = (embeddings_by_loop(model, [pair[side] for pair in pairs]) for side in (0, 1))
    assert torch.allclose(embed(model, [q for q, _ in pairs]), queries, atol=1e-5)
    right = sum(int((texts @ q).argmax()) == i for i, q in enumerate(queries))
    metric = metric_of("retrieval", model, pairs)
    assert (metric.name, metric.higher_is_better, metric.scale) == ("retrieval R@1", True, "%")
    dense = metric.measure(model)
    assert dense == pytest.approx(100 * right / 40) and dense > 60
    ten, gain = (metric_of(name, model, pairs) for name in ("retrieval@10", "ndcg@10"))
    assert ten.name == "retrieval R@10" and gain.name == "retrieval nDCG@10"
    assert dense <= gain.measure(model) <= ten.measure(model) <= 100
    fast = rarefy.compile(model, pairs[0][0], precision="int8")
    assert metric.measure(fast) == pytest.approx(dense, abs=5.1)
    inputs = [q for q, _ in pairs]
    similarity = metric_of("similarity", model, inputs)
    assert similarity.measure(model) == 1.0
    cosines = (embeddings_by_loop(fast, inputs) * queries).sum(-1)
    assert similarity.measure(fast) == pytest.approx(float(cosines.mean()), abs=2e-3)
    assert 0.98 < similarity.measure(fast) < 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no pairs to evaluate"),
        ([(torch.ones(1, 4), torch.ones(1, 4))], "retrieval@1 needs at least 2 pairs, better 1,000, got 1"),
        ([(torch.ones(3, 4), torch.ones(2, 4))], "a text for each query, got 3 queries and 2 texts"),
        ([torch.ones(2, 4)], r"needs pairs \(queries, texts\) of batches, got float32 2x4"),
        ([(torch.ones(2, 4), torch.ones(2))], "needs pairs .*got float32 2x4 and float32 2"),
        ([{"input_ids": torch.ones(2, 4)}], "needs pairs .*got input_ids: float32 2x4"),
    ],
)
def test_data_that_are_no_pairs(data, message):
    with pytest.raises(DataError, match=message):
        metric_of("retrieval", nn.Identity(), data).measure(nn.Linear(4, 4))


def test_more_nearest_texts_than_there_are():
    pair = (torch.randn(6, 4), torch.randn(6, 4))
    with pytest.raises(DataError, match="retrieval@10 needs at least 11 pairs, better 1,000, got 6"):
        metric_of("retrieval@10", nn.Identity(), [pair]).measure(nn.Identity())


# agreement with the dense model


def test_agreement_similarity_and_divergence_of_a_classifier():
    dense, batches = nn.Sequential(nn.Flatten(), nn.Linear(243, 5)), image_batches()
    rough = rougher(dense, 0.5)
    same, cosines, kl, distance = [], [], [], []
    with torch.no_grad():
        for x, _ in batches:
            for image in x:
                a, b = dense.eval()(image[None])[0].double(), rough.eval()(image[None])[0].double()
                same.append(int(a.argmax()) == int(b.argmax()))
                cosines.append(float(a @ b / a.norm() / b.norm()))
                distance.append(float(((a - b) ** 2).sum() / (a**2).sum()))
                p, q = a.softmax(0), b.softmax(0)
                kl.append(sum(float(pi * (pi / qi).log()) for pi, qi in zip(p, q)))
    for name, want, perfect in (
        ("agreement", 100 * sum(same) / 12, 100.0),
        ("similarity", sum(cosines) / 12, 1.0),
        ("kl", sum(kl) / 12, 0.0),
        ("distance", sum(distance) / 12, 0.0),
    ):
        metric = metric_of(name, dense, batches)
        assert metric.measure(rough) == pytest.approx(want, rel=1e-4), name
        assert metric.measure(dense) == pytest.approx(perfect, abs=1e-6)
        assert metric.higher_is_better is (name not in ("kl", "distance")) and metric.scale == (
            "%" if name == "agreement" else ""
        )
    assert 0 < sum(same) < 12


def by_token(model, batches):
    """Return the logits of each real token, one text at a time without padding."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
                rows += model(input_ids=ids[mask.bool()][None]).logits[0].double()
    return rows


def test_divergence_of_a_language_model_leaves_padding_out():
    dense, batches = tiny_llama(), token_data()
    rough = rougher(dense)
    rows = list(zip(by_token(dense, batches), by_token(rough, batches)))
    assert len(rows) == sum(int(b["attention_mask"].sum()) for b in batches) < 42
    kl = [float(F.kl_div(b.log_softmax(0), a.log_softmax(0), log_target=True, reduction="sum")) for a, b in rows]
    assert metric_of("kl", dense, batches).measure(rough) == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    distance = [float((a - b).square().sum() / a.square().sum()) for a, b in rows]
    got = metric_of("distance", dense, batches).measure(rough)
    assert got == pytest.approx(sum(distance) / len(distance), rel=1e-4)
    same = [int(a.argmax()) == int(b.argmax()) for a, b in rows]
    assert metric_of("agreement", dense, batches).measure(rough) == pytest.approx(100 * sum(same) / len(same))


def test_metrics_of_a_decoder_and_of_compiled_models():
    dense, batches = tiny_llama(), token_data()
    engine = EngineModule(rarefy.decoder(dense))
    for name, perfect in (("kl", 0.0), ("agreement", 100.0), ("perplexity", perplexity(dense, batches))):
        assert metric_of(name, dense, batches).measure(engine) == pytest.approx(perfect, rel=1e-3, abs=1e-5), name
    net, images = Net().eval(), image_batches()
    fast = rarefy.compile(net, images[0][0])
    right = accuracy(net, images)
    assert metric_of("accuracy", net, images).measure(fast) == right == accuracy(EngineModule(fast), images)
    labelled = [{"x": x, "labels": y} for x, y in images]
    assert metric_of("accuracy", net, labelled).measure(rarefy.compile(net, {"x": images[0][0]})) == right
    for name, perfect in (("kl", 0.0), ("agreement", 100.0), ("similarity", 1.0)):
        metric = metric_of(name, net, images)
        assert metric.measure(fast) == pytest.approx(perfect, abs=1e-4) == metric.measure(EngineModule(fast))


def test_most_probable_classes_and_the_rest_give_a_little_less_divergence(monkeypatch):
    torch.manual_seed(1)
    a = 3 * torch.randn(50, 200)
    b = a + 0.5 * torch.randn(50, 200)
    exact = kl_divergence(keep_probabilities(a), b)
    assert torch.allclose(exact, F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="none").sum(1))
    kept = keep_probabilities(a, 60)
    assert [t.shape for t in kept] == [(50, 60), (50, 60)]
    coarse = kl_divergence(kept, b)
    order = a.argsort(1, descending=True)
    for i in range(50):
        p, q = a[i].softmax(0).double(), b[i].softmax(0).double()
        groups = [(p[j], q[j]) for j in order[i, :60]] + [(p[order[i, 60:]].sum(), q[order[i, 60:]].sum())]
        assert float(coarse[i]) == pytest.approx(sum(float(x * (x / y).log()) for x, y in groups), rel=1e-3)
    assert bool((coarse <= exact + 1e-6).all()) and float(coarse.mean()) > 0.9 * float(exact.mean())


def test_infinite_logits_of_both_models_count_as_no_probability():
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    a[:, 2] = b[:, 2] = -math.inf
    want = kl_divergence(keep_probabilities(a[:, [0, 1, 3, 4]]), b[:, [0, 1, 3, 4]])
    assert torch.allclose(kl_divergence(keep_probabilities(a), b), want)


@pytest.mark.slow
@pytest.mark.real
def test_divergence_of_a_real_language_model():
    sample("smollm2-135m")
    sample("wiki")
    folder = builtin.model_folder("smollm2-135m")
    dense, tokenizer = hf.load_folder(folder).eval(), hf.load_tokenizer(folder)
    batch = dict(tokenizer(builtin.wiki(True)[:2], return_tensors="pt", padding=True, truncation=True, max_length=24))
    metric = metric_of("kl", dense, [batch])
    assert metric.measure(dense) == 0.0
    rough = copy.deepcopy(dense)
    rarefy.prune_(rough, sparsity=0.3, layers="model.layers.*")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        p, q = (m(**batch).logits[mask].double().log_softmax(-1) for m in (dense, rough))
    exact = float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
    assert 0.95 * exact < metric.measure(rough) <= exact > 0.05  # of the 1,024 most probable of 49,152 tokens


def test_the_dense_model_is_called_once_and_may_change_afterwards():
    dense, calls = Net(), []
    dense.register_forward_hook(lambda *_: calls.append(1))
    metric = metric_of("similarity", dense, iter(image_batches()))
    assert not calls and metric.measure(dense) == 1.0 and len(calls) == 3
    rough = rougher(dense)
    first = metric.measure(rough)
    with torch.no_grad():
        dense.fc.weight.zero_()
        dense.fc.bias.zero_()
    assert metric.measure(rough) == first and metric.measure(dense) == 0.0


def test_single_numbers_are_compared_over_the_batch():
    dense = nn.Linear(4, 1)
    data = [torch.randn(16, 4)]
    metric = metric_of(None, dense, data)
    rough = nn.Linear(4, 1)
    with torch.no_grad():
        a, b = dense(data[0])[:, 0], rough(data[0])[:, 0]
    assert metric.name == "similarity"
    assert metric.measure(rough) == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)


def test_pixels_are_compared_each():
    dense, data = nn.Conv2d(3, 5, 1), [torch.randn(2, 3, 4, 4)]
    rough = rougher(dense, 2.0)
    with torch.no_grad():
        same = dense(data[0]).argmax(1) == rough(data[0]).argmax(1)
    assert metric_of("agreement", dense, data).measure(rough) == pytest.approx(100 * float(same.double().mean()))


@pytest.mark.parametrize(
    ("name", "other", "data", "message"),
    [
        ("kl", nn.Linear(4, 3), [torch.ones(2, 4)], "the dense model has 4 outputs for each row, this one has 3"),
        ("similarity", nn.Linear(4, 3), [torch.ones(2, 4)], "the dense model has 4 outputs for each row"),
        ("distance", nn.Linear(4, 3), [torch.ones(2, 4)], "the dense model has 4 outputs for each row"),
        ("agreement", nn.Unflatten(0, (1, 2)), [], "no samples to evaluate: agreement needs at least one batch"),
        ("agreement", nn.Flatten(0), [torch.ones(2, 4)], "dimension of classes.*got float32 8"),
        ("agreement", nn.Unflatten(1, (2, 2)), [torch.ones(3, 4)], "the dense model has 3 rows of outputs, this one 6"),
    ],
)
def test_outputs_that_cannot_be_compared(name, other, data, message):
    with pytest.raises(DataError, match=message):
        metric_of(name, nn.Linear(4, 4), data).measure(other)


def test_outputs_with_nan_and_without_numbers():
    class Counts(nn.Module):
        def forward(self, x):
            return {"count": torch.tensor([len(x)])}

    data = [torch.ones(2, 4)]
    broken = nn.Linear(4, 4)
    with torch.no_grad():
        broken.weight.fill_(math.nan)
    for name in ("agreement", "similarity", "kl"):
        with pytest.raises(ModelError, match=f"{name} failed on the model .Linear.: the outputs contain NaN"):
            metric_of(name, nn.Linear(4, 4), data).measure(broken)
    with pytest.raises(DataError, match="a model that returns a floating tensor, it returns count: int64 1"):
        metric_of("similarity", nn.Linear(4, 4), data).measure(Counts())


# the metric that fits the outputs


class Logits(nn.Module):
    """Returns what transformers returns, by name."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids=None, x=None):
        return self.outputs


IDS = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}


@pytest.mark.parametrize(
    ("make", "batch", "want"),
    [
        (tiny_llama, IDS, "perplexity"),
        (tiny_llama, IDS["input_ids"], "agreement"),
        (lambda: Logits(logits=torch.randn(2, 3, 9)), IDS, "agreement"),
        (lambda: Logits(logits=torch.randn(2, 9)), IDS, "agreement"),
        (Net, image_batches(1)[0], "agreement"),
        (tiny_bert, IDS, "similarity"),
        (lambda: Logits(sentence_embedding=torch.randn(2, 9)), IDS, "similarity"),
        (lambda: nn.Sequential(nn.Linear(4, 8), _Unit()), torch.randn(5, 4), "similarity"),
        (lambda: nn.Conv2d(3, 4, 1), torch.randn(2, 3, 5, 5), "similarity"),
        (Tied, torch.zeros(2, 3, dtype=torch.long), "similarity"),
    ],
)
def test_a_metric_is_chosen_by_the_outputs(make, batch, want):
    assert default_metric(make(), [batch]) == want


class _Unit(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


# functions and wrong inputs


@pytest.mark.parametrize(
    "value", [0.5, 1, torch.tensor(0.5), torch.tensor(1), np.float32(0.5), np.int64(1), np.array(0.5)]
)
def test_functions_that_return_numbers(value):
    def quality(model):
        return value

    metric = metric_of(quality, nn.Identity(), None, higher_is_better=False)
    assert metric.measure(nn.Identity()) == float(value) and isinstance(metric.measure(nn.Identity()), float)
    assert metric.name == "quality" and not metric.higher_is_better and metric.scale == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "got nan"),
        (-math.inf, "got -inf"),
        (torch.tensor(math.nan), "got nan"),
        (10**400, "got too much"),
        (None, r"got None \(NoneType\)"),
        (True, r"got True \(bool\)"),
        (torch.tensor(True), r"got tensor\(True\) \(Tensor\)"),
        (np.bool_(True), r"got (np.)?True_? \(bool"),
        ("0.5", r"got '0.5' \(str\)"),
        (torch.ones(1), r"got tensor\(\[1.\]\) \(Tensor\)"),
        (1j, r"got 1j \(complex\)"),
        ({"R@1": 0.5}, r"got {'R@1': 0.5} \(dict\)"),
    ],
)
def test_functions_that_return_no_number(value, text):
    dense = nn.Identity()
    metric = metric_of(lambda model: value, dense, None)
    with pytest.raises(ModelError, match=f"the metric of the dense model: expected a finite number, {text}"):
        metric.measure(dense)


def test_errors_of_a_function_name_the_model():
    def quality(model):
        raise KeyError("rows")

    dense = nn.Identity()
    metric = metric_of(quality, dense, None)
    with pytest.raises(ModelError, match="quality failed on the dense model: KeyError: 'rows'") as caught:
        metric.measure(dense)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ModelError, match=r"quality failed on the model \(Linear\): KeyError"):
        metric.measure(nn.Linear(1, 1))


def test_an_interrupt_of_a_function_is_no_error():
    def quality(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        metric_of(quality, nn.Identity(), None).measure(nn.Identity())


def test_functions_see_the_model_in_evaluation_mode_without_gradients():
    def quality(model):
        assert not model.training and not torch.is_grad_enabled()
        return 1.0

    net = nn.Dropout().train()
    assert metric_of(quality, net, None).measure(net) == 1.0 and net.training


def test_a_metric_of_the_user_is_checked_once():
    made = Metric("zeros", True, lambda model: math.nan)
    metric = metric_of(made, nn.Identity(), None)
    with pytest.raises(ModelError, match="zeros of the dense model|zeros of the model"):
        metric.measure(nn.Identity())
    assert metric_of(metric, nn.Identity(), None) is metric


@pytest.mark.parametrize(
    ("evaluate", "data", "message"),
    [
        ("acuracy", [], "unknown metric 'acuracy'; choose from .*did you mean 'accuracy'"),
        ("retrieval@0", [], "unknown metric 'retrieval@0'; choose from .*retrieval@10"),
        ("accuracy", None, "needs batches of data, got none"),
        (None, None, "needs batches of data, got none"),
        (None, [], "no samples to evaluate: give at least one batch"),
        ("kl", "texts.txt", "expected an iterable of batches, got the text"),
        (3, None, "evaluate: expected a metric's name, a function of a model or None, got int"),
        ("accuracy", [torch.ones(1, 4)], r"accuracy needs \(inputs, class\) batches"),
        ("perplexity", [torch.ones(1, 4)], "perplexity needs batches with input_ids"),
        (None, [torch.ones(1, 3)], "Linear cannot be called with a batch of float32 1x3"),
    ],
)
def test_what_is_no_metric(evaluate, data, message):
    net = nn.Linear(4, 4)
    with pytest.raises(DataError, match=message):
        metric_of(evaluate, net, data).measure(net)


def test_the_direction_of_a_named_metric_is_known():
    with pytest.raises(DataError, match="higher_is_better=False is for functions; a higher accuracy is always better"):
        metric_of("accuracy", nn.Identity(), [torch.ones(1)], higher_is_better=False)
    assert not metric_of("perplexity", nn.Identity(), [torch.ones(1)], higher_is_better=False).higher_is_better


def test_every_name_makes_a_metric():
    for name in METRIC_NAMES:
        assert metric_of(name, nn.Identity(), [torch.ones(1)]).higher_is_better is (
            name not in ("perplexity", "distance", "kl")
        )


def test_progress_is_drawn(capsys):
    net, data = Net(), image_batches()
    metric_of("agreement", net, data, progress=True).measure(rougher(net))
    assert "agreement" in capsys.readouterr().err
    metric_of("agreement", net, data).measure(rougher(net))
    assert "agreement" not in capsys.readouterr().err
