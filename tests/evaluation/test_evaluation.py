"""What is measured is what is there: operations, bytes, seconds and quality against hand counts; reports that round-trip."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from conftest import Net, Tied, image_batches, tiny_llama
from rarefy.cli import doctor
from rarefy.cli.benchmark import bench_models
from rarefy.common.errors import DataError, ModelError
from rarefy.common.progress import track
from rarefy.common.report import Report, table
from rarefy.data import builtin
from rarefy.evaluation import profiling
from rarefy.evaluation.metrics import BETTER, METRICS, accuracy, perplexity
from rarefy.evaluation.receipt import Receipt

# operations


class Sdpa(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def linear():
    net = nn.Linear(7, 3)
    return net, lambda: net(torch.zeros(5, 7)), 2 * 5 * 7 * 3


def batched_linear():
    net = nn.Linear(7, 3, bias=False)
    return net, lambda: net(torch.zeros(2, 5, 7)), 2 * 10 * 7 * 3


def convolution():
    net = nn.Conv2d(4, 6, 3, stride=2, padding=1)  # 9x9 -> 5x5
    return net, lambda: net(torch.zeros(2, 4, 9, 9)), 2 * 2 * 6 * 5 * 5 * 4 * 9


def grouped_convolution():
    net = nn.Conv2d(4, 6, 3, groups=2)  # 8x8 -> 6x6, each output reads 2 channels
    return net, lambda: net(torch.zeros(1, 4, 8, 8)), 2 * 6 * 6 * 6 * 2 * 9


def functional():
    w = torch.zeros(3, 7)
    return nn.Identity(), lambda: F.linear(torch.zeros(5, 7), w) @ torch.zeros(3, 2), 2 * 5 * 7 * 3 + 2 * 5 * 3 * 2


def attention():
    net, q, kv = Sdpa(), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8)
    return net, lambda: net(q, kv, kv), 2 * 2 * 3 * 5 * 6 * (8 + 8)


def nothing():
    return nn.ReLU(), lambda: torch.zeros(4).relu(), 0


@pytest.mark.parametrize(
    "make", [linear, batched_linear, convolution, grouped_convolution, functional, attention, nothing]
)
def test_operations_against_hand_counts(make):
    net, run, want = make()
    assert profiling.flops(net, run) == want


def test_a_zero_in_a_dense_weight_costs_what_any_number_costs():
    net, x = Net(), image_batches(1)[0][0]
    before = profiling.flops(net, lambda: net(x))
    rarefy.prune_(net, sparsity=0.9)
    rarefy.fold_(net)
    assert profiling.flops(net, lambda: net(x)) == before > 0


def test_operations_of_a_language_model():
    model, b, s = tiny_llama(), 2, 10
    c: Any = model.config
    h, inner, heads = c.hidden_size, c.intermediate_size, c.num_attention_heads
    kv = h // heads * c.num_key_value_heads
    layer = 2 * b * s * (h * h + 2 * h * kv + h * h + 3 * h * inner) + 2 * b * heads * s * s * (h // heads) * 2
    rotary = 2 * b * (h // heads // 2) * s  # the angles: positions times frequencies
    want = c.num_hidden_layers * layer + 2 * b * s * h * c.vocab_size
    ids = torch.zeros(b, s, dtype=torch.int64)
    assert profiling.flops(model, lambda: model(input_ids=ids)) in (want, want + rotary, want + rotary // b)


# bytes


def test_bytes_in_memory_count_tied_weights_once():
    model = Tied()
    assert profiling.resident_bytes(model) == 4 * (20 * 8 + 8 + 8 + 8 * 8 + 8)


def test_bytes_in_memory_count_buffers_and_views_once():
    model = nn.BatchNorm1d(4)  # weight, bias, mean, variance, and a count of 8 bytes
    assert profiling.resident_bytes(model) == 4 * 4 * 4 + 8
    base = torch.zeros(100)
    model.register_buffer("a", base[:10])
    model.register_buffer("b", base[50:])
    assert profiling.resident_bytes(model) == 72 + 400  # what is held is the storage, not the view
    with torch.device("meta"):
        assert profiling.resident_bytes(nn.Linear(3, 3)) == 0


def test_a_cast_halves_the_bytes():
    model = Net()
    before = profiling.resident_bytes(model)
    rarefy.cast_(model, "bf16")
    assert profiling.resident_bytes(model) * 2 == before


def test_bytes_of_a_folder(tmp_path):
    for name, size in {"a.safetensors": 10, "b.safetensors": 20, "rarefy.json": 5, "README": 100}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "inner.safetensors").mkdir()
    assert profiling.folder_bytes(tmp_path) == 135
    assert profiling.folder_bytes(tmp_path, (".safetensors",)) == 30
    assert profiling.folder_bytes(str(tmp_path), (".safetensors", "rarefy.json")) == 35
    assert profiling.folder_bytes(tmp_path / "README") == 100
    assert profiling.folder_bytes(tmp_path, (".bin",)) == 0


def test_peak_memory_counts_bytes():
    held = torch.zeros(1 << 22)  # 16 MiB, touched
    assert profiling.peak_rss() > held.numel() * 4


def test_peak_memory_is_not_that_of_the_parent():
    held = torch.ones(1 << 27)  # 512 MiB, touched
    words = [sys.executable, "-c", "from rarefy.evaluation.profiling import peak_rss; print(peak_rss())"]
    assert int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) < held.nbytes


@pytest.mark.parametrize(
    ("values", "want"), [([0, 0, 1, 0], 0.75), ([1, 2], 0.0), ([-0.0], 1.0), ([], 1.0), ([float("nan")], 0.0)]
)
def test_sparsity_counts_exact_zeros(values, want):
    assert profiling.sparsity_of(torch.tensor(values, dtype=torch.float32)) == want


# seconds


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 4.0], [1.0, 2.0], list(map(float, range(11)))])
def test_quartiles(values):
    got = profiling.quartiles(values)
    want = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    assert [got.low, got.median, got.high] == pytest.approx(want.tolist()) and got.repeats == len(values)
    assert got.median == statistics.median(values)
    assert got.to_dict() == {"median": got.median, "low": got.low, "high": got.high, "repeats": len(values)}


def test_quartiles_of_one():
    assert profiling.quartiles([2.0]) == profiling.Times(2.0, 2.0, 2.0, 1)


def test_runs_take_turns_after_warm_up():
    order, grads = [], []

    def run(name):
        return lambda: (order.append(name), grads.append(torch.is_grad_enabled()))

    found = profiling.compare({"a": run("a"), "b": run("b"), "c": run("c")}, repeats=4, warmup=2)
    assert order == ["a", "b", "c"] * 6 and not any(grads)
    assert list(found) == ["a", "b", "c"] and all(t.repeats == 4 for t in found.values())


def test_after_a_pause_a_call_wakes_the_threads_and_is_not_timed(monkeypatch):
    events = []
    monkeypatch.setattr(profiling.time, "sleep", lambda seconds: events.append(seconds))
    runs = {name: lambda name=name: events.append(name) for name in ("a", "b")}
    found = profiling.compare(runs, repeats=2, warmup=1, pause=0.5)
    assert events == ["a", "b", *[0.5, "a", "a", 0.5, "b", "b"] * 2] and found["a"].repeats == 2


def test_times_are_seconds():
    found = profiling.compare({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, repeats=3, warmup=0)
    assert 0.02 <= found["slow"].low <= found["slow"].median <= found["slow"].high < 0.2
    assert found["fast"].median < 0.002


def test_tokens_a_second_of_a_language_model():
    models = {"one": tiny_llama(), "two": tiny_llama()}
    calls = []
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda m, a, k, name=name: calls.append(
                (name, k["input_ids"].shape[1], (k.get("cache") or k.get("past_key_values")) is not None)
            ),
            with_kwargs=True,
        )
    found = profiling.decode_and_prefill(models, prompt=12, new=3, repeats=2)
    one_round = [
        (n, length, cached) for n in models for length, cached in ((12, False), (1, True), (1, True), (1, True))
    ]
    assert calls == one_round * 3  # a warm-up and two that count, in turns, each step with the cache of the last
    assert set(found) == {"one", "two"}
    for kinds in found.values():
        for kind in ("prefill", "decode"):
            rate = kinds[kind]
            assert rate["repeats"] == 2 and 0 < rate["low"] <= rate["tokens_per_second"] <= rate["high"]


def test_tokens_are_those_that_generate_would_write():
    model, written = tiny_llama(), []
    model.register_forward_pre_hook(lambda m, a, k: written.append(k["input_ids"][0].tolist()), with_kwargs=True)
    profiling.decode_and_prefill({"m": model}, prompt=9, new=4, repeats=1)
    prompt, steps = written[0], [t for [t] in written[1:5]]
    written.clear()
    with torch.no_grad():
        for _ in range(4):
            prompt.append(int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()))
    assert steps == prompt[9:]


def test_threads_come_back():
    before = torch.get_num_threads()
    with profiling.threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(KeyError), profiling.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_the_machine_says_what_figures_depend_on():
    here = profiling.machine()
    assert here["cpu"] and here["cores"] == os.cpu_count() and here["threads"] == torch.get_num_threads()
    assert here["torch"] == torch.__version__ and set(here["extensions"]) <= profiling.cpu_flags()
    json.dumps(here)


# quality


def hand_perplexity(model, rows) -> float:
    """By the definition, one sequence without padding at a time, in double precision."""
    losses = []
    for row in rows:
        out = model(row[None])
        log_p = getattr(out, "logits", out)[0].double().log_softmax(-1)
        losses += [-float(log_p[i, row[i + 1]]) for i in range(len(row) - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("make", [tiny_llama, Tied])
def test_perplexity_without_padding(make):
    model, ids = make().eval(), torch.randint(0, 20, (5, 9))
    with torch.no_grad():
        want = hand_perplexity(model, ids)
    got = (
        [perplexity(model, [{"input_ids": part} for part in ids.split(n)]) for n in (1, 2, 5)]
        if make is tiny_llama
        else []
    )
    assert got == pytest.approx([want] * len(got), rel=1e-5)
    if make is Tied:

        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, input_ids):
                return self.inner(input_ids)  # a tensor, no .logits

        assert perplexity(Named(), [{"input_ids": ids}]) == pytest.approx(want, rel=1e-5)


def test_perplexity_leaves_padding_out_and_weighs_by_tokens():
    model = tiny_llama()
    lengths, ids = (7, 3, 5), torch.randint(2, 64, (3, 7))
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    with torch.no_grad():
        want = hand_perplexity(model, [row[:n] for row, n in zip(ids, lengths)])
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2))]
    assert perplexity(model, batches) == pytest.approx(want, rel=1e-5)
    other = torch.where(mask.bool(), ids, 1)  # what stands under the mask does not matter
    assert perplexity(model, [{"input_ids": other, "attention_mask": mask}]) == pytest.approx(want, rel=1e-5)


def test_perplexity_of_left_padding_does_not_read_the_padding():
    model, ids = tiny_llama(), torch.randint(2, 64, (1, 6))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        want = hand_perplexity(model, ids)
    got = perplexity(model, [{"input_ids": padded, "attention_mask": mask, "position_ids": positions}])
    assert got == pytest.approx(want, rel=1e-5)  # the first real token has nothing to be predicted from


def test_perplexity_ignores_labels_and_needs_no_loss():
    model, ids = tiny_llama(), torch.randint(0, 64, (2, 6))
    with_labels = [{"input_ids": ids, "labels": torch.full_like(ids, -100)}]
    assert perplexity(model, with_labels) == perplexity(model, [{"input_ids": ids}])


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, [{"input_ids": torch.randint(0, 64, (2, 8))}]) == pytest.approx(64, rel=1e-5)


def test_a_hopeless_model_has_a_finite_perplexity():
    class Wrong(nn.Module):
        def forward(self, input_ids):
            return F.one_hot((input_ids + 1) % 4, 4).float() * 1e4

    assert perplexity(Wrong(), [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]) == math.exp(700)


class Constant(nn.Module):
    """Answers class `pixel` for x = pixel."""

    def forward(self, x, labels=None):
        return F.one_hot(x, 5).float()


@pytest.mark.parametrize("as_dict", [False, True])
def test_accuracy_counts_samples(as_dict):
    x, y = torch.tensor([0, 1, 2, 3, 4, 0, 1]), torch.tensor([0, 1, 2, 0, 0, 0, 0])
    parts = zip(x.split([4, 3]), y.split([4, 3]))
    data = [{"x": a, "labels": b} if as_dict else (a, b) for a, b in parts]
    assert accuracy(Constant(), data) == 4 / 7


def test_accuracy_against_a_loop():
    model, data = Net().eval(), image_batches(4, 3)
    with torch.no_grad():
        right = [int(model(x[i : i + 1])[0].argmax()) == int(y[i]) for x, y in data for i in range(len(y))]
    assert accuracy(model, data) == sum(right) / 12


@pytest.mark.parametrize(
    ("metric", "data", "message"),
    [
        (perplexity, [(torch.zeros(1), torch.zeros(1))], "perplexity needs batches with input_ids, got float32 1 and float32 1"),
        (perplexity, [torch.zeros(1)], "perplexity needs batches with input_ids, got float32 1"),
        (perplexity, [{"x": 1, "y": 2}], "perplexity needs batches with input_ids, got x: int, y: int"),
        (perplexity, [], "no tokens to evaluate"),
        (perplexity, [{"input_ids": torch.zeros(2, 1, dtype=torch.int64)}], "no tokens to evaluate"),
        (accuracy, [{"x": torch.zeros(1)}], r"accuracy needs \(inputs, class\) batches or dicts with labels, got x: float32 1"),
        (accuracy, [(torch.zeros(1),)], r"accuracy needs \(inputs, class\) batches or dicts with labels, got float32 1"),
        (accuracy, [(torch.zeros(1), 3)], r"accuracy needs .*, got float32 1 and int"),
        (accuracy, [torch.zeros(3)], r"accuracy needs .*, got float32 3"),
        (accuracy, [torch.zeros(2, 3)], r"accuracy needs .*, got float32 2x3"),
        (accuracy, [], "no samples to evaluate"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(metric, data, message):
    model = tiny_llama() if metric is perplexity else Constant()
    with pytest.raises(DataError, match=message):
        metric(model, data)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("metric", ["perplexity", "accuracy"])
def test_the_mode_of_every_module_comes_back(metric, fails):
    model = tiny_llama() if metric == "perplexity" else Net()
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)).eval()
    modes, seen = [m.training for m in model.modules()], []
    model.register_forward_pre_hook(
        lambda m, a: seen.append(any(i.training for i in m.modules()) or torch.is_grad_enabled())
    )
    good = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)} if metric == "perplexity" else image_batches(1)[0]
    if fails:
        with pytest.raises(DataError):
            METRICS[metric](model, [good, {}])
    else:
        METRICS[metric](model, [good])
    assert seen == [False] and [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_every_metric_has_a_better_side():
    assert set(METRICS) == set(BETTER) and BETTER["perplexity"] is min and BETTER["accuracy"] is max


# reports

REPORT = Report(
    "pruned",
    ({"layer": "fc", "count": 12345, "sparsity": 0.5, "ok": True, "none": None}, {"layer": "hidden", "count": 7, "sparsity": 1234.5, "ok": False, "none": None}),
    {"total": 0.25, "bytes": 1234567, "word": "x"},
    ("mind the gap",),
)  # fmt: skip


def test_a_report_prints_as_a_table():
    assert str(REPORT).splitlines() == [
        "pruned",
        "layer    count  sparsity   ok  none",
        "fc      12,345    0.5000  yes     -",
        "hidden       7     1,234   no     -",
        "total: 0.2500",
        "bytes: 1,234,567",
        "word: x",
        "note: mind the gap",
    ]


def test_a_report_round_trips_through_json():
    values = json.loads(REPORT.to_json())
    assert (
        values
        == REPORT.to_dict()
        == {"title": "pruned", "rows": list(REPORT.rows), "summary": REPORT.summary, "notes": ["mind the gap"]}
    )
    assert Report(values["title"], tuple(values["rows"]), values["summary"], tuple(values["notes"])) == REPORT
    assert str(Report("nothing")) == "nothing" and json.loads(Report("nothing").to_json())["rows"] == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: rarefy.prune_(Net(), sparsity=0.5),
        lambda: rarefy.cast_(Net(), "bf16"),
        lambda: rarefy.inspect(Net()),
        doctor.examine,
    ],
)
def test_every_report_is_json(make):
    report = make()
    assert json.loads(report.to_json()) == report.to_dict() and str(report)


def test_columns_of_text_to_the_left_and_of_numbers_to_the_right():
    assert table([{"a": "x", "b": 1}, {"a": "long", "b": None}, {"a": "y"}]).splitlines() == [
        "a     b",
        "x     1",
        "long  -",
        "y     -",
    ]


# receipts


class Half(Net):
    """Takes images of any precision, as models do that are trained with mixed precision."""

    def forward(self, x):
        return super().forward(x.to(self.conv.weight.dtype))


def compressed(**evaluate) -> Receipt:
    plan = {
        "name": "half",
        "stages": [{"prune": {"sparsity": 0.5}}, {"cast": {"dtype": "bf16"}}],
        "evaluate": {"metric": "accuracy", **evaluate},
    }
    return rarefy.compress_(Half(), plan, {"evaluate": image_batches()})


def test_a_receipt_states_what_was_measured():
    receipt = compressed(latency={"batch": [1, 6], "repeats": 2})
    assert receipt.disk["before"] == sum(p.numel() * 4 for p in Net().parameters())
    assert receipt.disk["same_precision"] * 2 == receipt.disk["before"]
    assert receipt.memory["after"] * 2 == receipt.memory["before"]
    s = receipt.sparsity
    assert s["asked"] == 0.5 and s["zeros"] == sum(
        round(r["sparsity"] * math.prod(map(int, r["shape"].split("x")))) for r in s["layers"]
    )
    assert s["achieved"] == s["zeros"] / s["weights"] and s["model_before"] < s["model_after"] < s["achieved"]
    assert [r["what"] for r in receipt.speed] == ["forward, batch 1", "forward, batch 6"]
    assert receipt.flops["before"] == receipt.flops["after"] > 0
    assert [r["title"] for r in receipt.stages] == ["cast"]
    assert any("executed dense" in n for n in receipt.notes)


def test_a_cast_model_is_evaluated_on_the_images_it_had_before():
    plan = {"stages": [{"cast": {"dtype": "bf16"}}], "evaluate": {"metric": "accuracy", "latency": {"repeats": 2}}}
    quality = rarefy.compress_(Net(), plan, {"evaluate": image_batches()}).quality
    assert 0 <= quality["after"] <= 1 and abs(quality["after"] - quality["before"]) <= 1 / 12


def test_a_receipt_round_trips_through_json_and_prints_its_figures():
    receipt = compressed(latency={"repeats": 2}, max_degradation=0.5)
    values = json.loads(receipt.to_json())
    assert values == receipt.to_dict()
    again = Receipt(**{**values, **{k: tuple(values[k]) for k in ("speed", "stages", "notes", "samples", "runtimes")}})
    assert again == receipt and str(again) == str(receipt) and again.to_json() == receipt.to_json()
    text = str(receipt)
    for figure in (
        "Receipt: half",
        f"{receipt.disk['before']:,}",
        f"{receipt.disk['after']:,}",
        "dense, same precision",
        f"{receipt.memory['after']:,}",
        f"{receipt.sparsity['achieved']:.2%}",
        "note: accuracy was measured on 3 batches, all of the data",
        "asked 50.00%",
        "forward, batch 1, ms",
        "x as fast",
        "seed 0",
        f"torch {torch.__version__}",
        "note: stored sparse, executed dense",
    ):
        assert figure in text, figure


QUALITY = {"metric": "perplexity", "before": 10.0, "after": 12.0, "change": 0.2}


@pytest.mark.parametrize(
    ("quality", "passed", "text"),
    [
        ({}, True, "Receipt: r"),
        ({**QUALITY, "allowed": None, "passed": None}, True, "+20.0%"),
        ({**QUALITY, "allowed": 0.3, "passed": True}, True, "+20.0% (within 30%)"),
        ({**QUALITY, "allowed": 0.1, "passed": False}, False, "+20.0% (OVER 10%)"),
    ],
)
def test_whether_a_receipt_passed(quality, passed, text):
    receipt = Receipt(name="r", quality=quality)
    assert receipt.passed is passed and text in str(receipt)


@pytest.mark.parametrize(("allowed", "metric"), [(0.5, "accuracy"), (-0.99, "accuracy")])
def test_the_check_of_a_recipe_decides(allowed, metric):
    receipt = compressed(max_degradation=allowed)
    q = receipt.quality
    loss = (q["before"] - q["after"]) / q["before"]
    assert q["change"] == pytest.approx(-loss) and q["allowed"] == allowed
    assert receipt.passed == (loss <= allowed)


@pytest.mark.parametrize(("unit", "faster"), [("ms", "2.00x as fast"), ("tokens/s", "0.50x as fast")])
def test_faster_is_less_time_or_more_tokens(unit, faster):
    sides = {"before": {"median": 4.0, "low": 3.0, "high": 5.0}, "after": {"median": 2.0, "low": 1.0, "high": 3.0}}
    text = str(Receipt(name="r", speed=({"what": "forward", "unit": unit, **sides},)))
    assert f"forward, {unit}" in text and "4 (3-5)" in text and "2 (1-3)" in text and faster in text


def test_layers_that_differ_only_in_numbers_make_one_row():
    receipt = rarefy.compress_(tiny_llama(), {"stages": [{"prune": {"pattern": "2:4"}}]})
    lines = [l for l in str(receipt).splitlines() if "q_proj" in l]
    assert len(lines) == 1 and "model.layers.*.self_attn.q_proj (2)" in lines[0] and "2:4" in lines[0]
    assert sum(r["layer"].endswith("q_proj") for r in receipt.sparsity["layers"]) == 2


def test_a_receipt_refuses_numbers_that_json_does_not_have():
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        Receipt(name="r", disk={"before": float("nan")}).to_json()


# bench


def test_bench_of_language_models():
    model = tiny_llama()
    report = bench_models({"model": model, "against": tiny_llama(torch.bfloat16)}, 8, 2, 1, 2, False)
    assert [(r["what"], r["of"], r["unit"]) for r in report.rows] == [
        (kind, of, "tokens/s") for kind in ("prefill", "decode") for of in ("model", "against")
    ]
    assert all(0 < r["low"] <= r["tokens_per_second"] <= r["high"] for r in report.rows)
    parse_bytes = {k: v for k, v in report.summary.items() if k.startswith("bytes in memory")}
    assert (
        parse_bytes["bytes in memory, model"]
        == profiling.resident_bytes(model)
        > parse_bytes["bytes in memory, against"]
    )
    assert json.loads(report.to_json()) == report.to_dict()


def test_bench_of_an_encoder_and_of_a_vision_model():
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    small: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=30, max_position_embeddings=16, **small)).eval()
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **small)).eval()
    for model, shape, size in ((bert, (3, 8), "3 x 8 tokens"), (vit, (3, 3, 8, 8), "batch 3")):
        shapes = []
        model.register_forward_pre_hook(
            lambda m, a, k, shapes=shapes: shapes.append(tuple(next(iter(k.values())).shape)), with_kwargs=True
        )
        [row] = bench_models({"model": model}, 8, 2, 3, 2, False).rows
        assert row["what"] == f"forward, {size}" and row["unit"] == "ms" and row["repeats"] == 2 and row["median"] > 0
        assert shapes and set(shapes) == {shape}


def test_bench_needs_a_config():
    with pytest.raises(
        ModelError, match="Net does not say what it is called with: expected a Hugging Face model, an ONNX file, or"
    ):
        bench_models({"model": Net()}, 8, 2, 1, 2, False)


# doctor


def test_doctor_names_the_command_for_what_is_missing(monkeypatch):
    monkeypatch.setitem(
        builtin.SOURCES, "wiki", builtin.Source("no_such_package_x", "a", "pip install wiki-please", "MIT")
    )
    monkeypatch.setitem(builtin.SOURCES, "minilm", builtin.Source("", os.sep, "never shown", "MIT"))  # exists
    monkeypatch.setitem(doctor.EXTRAS, "no-such-distribution", "vision")
    rows = {r["what"]: (r["is"], r["get it with"]) for r in doctor.examine().rows}
    assert rows["sample wiki"] == ("missing", "pip install wiki-please")
    assert rows["sample minilm"] == ("installed", "")
    assert rows["no-such-distribution"] == ("missing", 'pip install "rarefy[vision]"')
    assert {"onnx", "onnxscript", "onnxruntime"} <= set(rows)
    assert rows["torch"] == (torch.__version__, "") and set(doctor.CORE) | set(doctor.EXTRAS) <= set(rows)
    assert "pip install wiki-please" in str(doctor.examine())


def test_doctor_knows_what_it_runs_on():
    summary = doctor.examine().summary
    here = profiling.machine()
    assert summary["cpu"] == here["cpu"] and summary["threads"] == here["threads"]
    assert ("native" in summary["bf16 products"]) == bool({"avx512_bf16", "amx_tile", "sve"} & set(here["extensions"]))
    assert doctor.version("no-such-distribution") is None


# progress


@pytest.mark.parametrize("items", [[1, 2, 3], range(3), iter("abc"), []])
@pytest.mark.parametrize("shown", [False, True])
def test_progress_passes_items_on_and_keeps_off_standard_output(items, shown, capsys):
    items = list(items) if not hasattr(items, "__next__") else (c for c in "abc")
    want = list(items) if isinstance(items, list) else list("abc")
    assert list(track(items, "counting", shown)) == want
    out, err = capsys.readouterr()
    assert out == "" and ("counting" in err) is shown


def test_progress_is_drawn_while_items_come(capsys):
    steps = track(range(2), "counting", True, total=2)
    assert next(steps) == 0
    assert list(steps) == [1]
    assert "2/2" in capsys.readouterr().err
