"""The dense model in ONNX Runtime and OpenVINO beside the models of a search."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

import rarefy
from conftest import tiny_bert, tiny_llama
from helpers.marks import slow_except
from rarefy.evaluation.quality import Metric, metric_of
from rarefy.search import other_engines
from rarefy.search.frontier import frontier_from_dict
from zoo import lively

ENGINES = ["ONNX Runtime, fp32", "ONNX Runtime, int8"] + ["OpenVINO, fp32"] * (find_spec("openvino") is not None)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(other_engines, "PAUSE", 0.002)


class Pair(nn.Module):
    """Two inputs, and outputs by name and nested."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 4)

    def forward(self, x, scale):
        hidden = self.a(x).relu()
        return {"logits": self.b(hidden) * scale, "more": [hidden]}


def rows_of(net, example, data, metric=None):
    metric = metric or metric_of("similarity", net, data)
    ours = rarefy.compile(net, example)
    result = other_engines.measured_engines(net, example, data, metric, ("1", "3"), ours)
    return {r["name"]: r for r in result["rows"]}, result["notes"]


def images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(8, 5)).eval()
    return net, torch.randn(2, 3, 12, 12), [torch.randn(8, 3, 12, 12) for _ in range(3)]


def texts():
    def batch(n):
        return {"input_ids": torch.randint(1, 64, (n, 9)), "attention_mask": torch.ones(n, 9, dtype=torch.long)}

    torch.manual_seed(0)
    return lively(tiny_bert()), batch(2), [batch(4) for _ in range(3)]


def pairs():
    data = [{"x": torch.randn(4, 6), "scale": torch.rand(4, 1) + 1} for _ in range(3)]
    return Pair().eval(), data[0], data


@pytest.mark.parametrize("case", slow_except([images, texts, pairs], pairs))
def test_quality_and_times_of_each_engine(case):
    rows, notes = rows_of(*case())
    assert set(ENGINES) <= set(rows), notes
    for name, row in rows.items():
        assert row["quality"] > (0.9999 if "fp32" in name else 0.95)
        assert set(row["milliseconds"]) == set(row["speedup"]) == {"1", "3"}
        for time in row["milliseconds"].values():
            assert 0 < time["low"] <= time["median"] <= time["high"]
        settings = {"threads spin", "threads sleep"} if "ONNX" in name else {""}
        assert set(row["settings"]) == {"1", "3"} and set(row["settings"].values()) <= settings
    assert any(n.startswith("ONNX Runtime, int8 was timed with its fastest setting: threads s") for n in notes)


@pytest.mark.slow
def test_an_engine_returns_what_the_model_returns():
    net, example, data = pairs()
    seen = []

    def distance(model):
        got, want = model(**example), net(**example)
        assert set(got) == {"logits", "more"} and isinstance(got["more"], list)
        seen.append(
            float((got["logits"] - want["logits"]).abs().max() + (got["more"][0] - want["more"][0]).abs().max())
        )
        return seen[-1]

    rows_of(net, example, data, metric_of(distance, net, None, higher_is_better=False))
    assert len(seen) >= 2 and seen[0] < 1e-5 < seen[1] < 0.1  # fp32, then 8 bits


@pytest.mark.slow
def test_without_data_nothing_is_calibrated():
    net, example, data = images()
    rows, _ = rows_of(net, example, [], metric_of("similarity", net, data))
    assert rows and not [n for n in rows if "int8" in n]


def test_models_that_they_do_not_run():
    class Odd(nn.Module):
        def forward(self, x):
            return x, "text"

    class Fixed(nn.Module):
        def forward(self, x):
            return torch.linalg.matrix_exp(x)

    net, x = Fixed(), torch.randn(1, 3, 3)
    metric = Metric("any", True, lambda model: 1.0)
    for model in (Odd(), net):
        result = other_engines.measured_engines(model, x, [x], metric, ("1",), None)
        assert result["rows"] == [] and "other engines are not measured" in result["notes"][-1]
    ids = torch.randint(1, 64, (1, 8))
    result = other_engines.measured_engines(tiny_llama(), {"input_ids": ids}, [], metric, ("decode",), None)
    assert result == {"rows": [], "notes": ["other engines are not measured on language models"]}


def test_an_engine_that_fails_is_a_note():
    net, example, data = images()

    def only_torch(model):
        if not isinstance(model, nn.Module):
            raise RuntimeError("no module")
        return 1.0

    rows, notes = rows_of(net, example, data, metric_of(only_torch, net, None))
    assert not rows
    assert [n for n in notes if n.startswith("ONNX Runtime, fp32 does not run the model: ") and "no module" in n]


@pytest.mark.slow
def test_an_engine_that_fails_at_a_batch_size_loses_its_row(monkeypatch):
    plain = other_engines.onnx_runtime

    def fixed_to_one(file):
        started = plain(file)

        def fixed(feed):
            if len(next(iter(feed.values()))) > 1:
                raise RuntimeError("one sample alone")
            return started.fixed(feed)

        return other_engines.Started(started.run, fixed if file.name == "model.onnx" else started.fixed)

    monkeypatch.setattr(other_engines, "onnx_runtime", fixed_to_one)
    rows, notes = rows_of(*images())
    assert "ONNX Runtime, fp32" not in rows and set(rows["ONNX Runtime, int8"]["milliseconds"]) == {"1", "3"}
    assert "ONNX Runtime, fp32 does not run batch 3: one sample alone" in notes


def test_data_that_do_not_fit_are_a_note():
    net, example, data = images()
    result = other_engines.measured_engines(
        net, example, [*data, {"other": 3}], metric_of("similarity", net, data), ("1",), None
    )
    assert result["rows"] == [] and "other engines are not measured: " in result["notes"][-1]


def test_engines_that_no_time_is_left_for_are_named():
    net, example, data = images()
    asked = []

    def has_time(seconds):
        asked.append(seconds)
        return len(asked) == 1  # for the first engine alone

    ours, metric = rarefy.compile(net, example), metric_of("similarity", net, data)
    result = other_engines.measured_engines(net, example, data, metric, ("1",), ours, has_time)
    assert [(r["name"], r["milliseconds"]) for r in result["rows"]] == [(ENGINES[0], {})]
    assert f"{ENGINES[1]} was not measured: their part of the time is over" in result["notes"]
    assert "other engines were not timed at batch 1: their part of the time is over" in result["notes"]
    assert asked[0] == 0 < asked[1]


@pytest.mark.slow
def test_missing_packages_are_named(monkeypatch):
    net, example, data = images()
    monkeypatch.setattr(other_engines, "find_spec", lambda name: None if name != "onnxruntime" else find_spec(name))
    rows, notes = rows_of(net, example, data)
    assert set(rows) == {"ONNX Runtime, fp32", "ONNX Runtime, int8"}
    assert notes[:1] == ["other engines need packages that are not installed: onnxscript, openvino, nncf"]


def test_the_fastest_setting_of_an_engine_counts_at_each_batch_size(monkeypatch):
    net, example, data = images()
    calls = {"1": {"threads spin": 9.0, "threads sleep": 2.0}, "3": {"threads spin": 1.0, "threads sleep": 8.0}}

    def times(runs, pause):
        size = "1" if times.count == 0 else "3"
        times.count += 1
        assert pause > 0 and ("ONNX Runtime, fp32", "threads sleep") in runs
        ms = {key: calls[size].get(key[1], 4.0) for key in runs}
        return {key: {"low": t, "median": t, "high": t} for key, t in ms.items()}

    times.count = 0
    monkeypatch.setattr(other_engines, "times_in_turns", times)
    rows, notes = rows_of(net, example, data)
    row = rows["ONNX Runtime, fp32"]
    assert row["settings"] == {"1": "threads sleep", "3": "threads spin"} and row["speedup"] == {"1": 2.0, "3": 4.0}
    assert (
        "ONNX Runtime, fp32 was timed with its fastest setting: threads sleep at batch 1; threads spin at batch 3"
        in notes
    )


def test_a_search_reports_and_remembers_them(tmp_path, monkeypatch):
    net, example, data = images()
    limits = {"max_loss": "50%", "minutes": 0.5, "other_engines": True, "resume_dir": tmp_path / "state"}
    found = rarefy.optimize(net, example, data, "similarity", **limits)
    assert {"ONNX Runtime, fp32", "ONNX Runtime, int8"} <= {p["name"] for p in found.peers}
    assert "ONNX Runtime, fp32" in str(found)
    assert frontier_from_dict(found.to_dict()).peers == found.peers
    assert "ONNX Runtime, int8" in found.report(tmp_path / "page.html").read_text()
    monkeypatch.setattr("rarefy.search.optimize.measured_engines", lambda *args: pytest.fail("measured again"))
    again = rarefy.optimize(net, example, data, "similarity", **limits)
    assert again.peers == found.peers
