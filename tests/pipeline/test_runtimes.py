"""The result of a recipe in ONNX Runtime and OpenVINO, in the receipt."""

import importlib.util
import json

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import RecipeError
from rarefy.evaluation.metrics import accuracy
from rarefy.evaluation.receipt import receipt_from_dict
from rarefy.pipeline import runtimes

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="no OpenVINO")


def net_and_data():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    x = torch.randn(64, 3, 8, 8)
    y = net(x).argmax(-1)
    return net, [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]


def recipe(*names, **options):
    return {
        "stages": [{"prune": {"sparsity": 0.7}}],
        "evaluate": {"metric": "accuracy", "runtimes": list(names), **options},
    }


@needs_openvino
def test_quality_and_times_are_in_the_receipt():
    net, data = net_and_data()
    wanted = recipe("onnxruntime", "openvino", latency={"batch": [1, 3], "repeats": 2})
    receipt = rarefy.compress_(net, wanted, {"evaluate": data})
    first, *others = receipt.runtimes
    assert first["runtime"] == "eager torch, fp32" and [r["runtime"] for r in others] == ["ONNX Runtime", "OpenVINO"]
    assert first["quality"] == receipt.quality["after"] == accuracy(net, data) < 1
    assert all(r["quality"] == first["quality"] and set(r["milliseconds"]) == {"1", "3"} for r in receipt.runtimes)
    assert all(t["low"] <= t["median"] <= t["high"] for r in receipt.runtimes for t in r["milliseconds"].values())
    assert set(others[0]["settings"]) == {"1", "3"}
    assert set(others[0]["settings"].values()) <= {"threads spin", "threads sleep"}
    assert any(n.startswith("ONNX Runtime was timed with its fastest setting: threads s") for n in receipt.notes)
    text = receipt.summary()
    assert "accuracy, ONNX Runtime" in text and "accuracy, OpenVINO" in text and "forward, batch 3, ms" in text
    again = receipt_from_dict(json.loads(receipt.to_json()))
    assert str(again) == str(receipt) and again.runtimes[1]["runtime"] == "ONNX Runtime"


@pytest.mark.slow
def test_on_the_engine_and_at_the_size_of_the_example():
    net, data = net_and_data()
    receipt = rarefy.compress_(net, recipe("onnxruntime", engine=True), {"evaluate": data})
    ours, theirs = receipt.runtimes
    assert ours["runtime"] == "Rarefy's engine" and set(theirs["milliseconds"]) == {"16"}


def test_a_runtime_that_fails_is_a_note(monkeypatch):
    def broken(file):
        raise RuntimeError("cannot read it")

    monkeypatch.setitem(runtimes.STARTERS, "onnxruntime", ("ONNX Runtime", broken))
    net, data = net_and_data()
    receipt = rarefy.compress_(net, recipe("onnxruntime"), {"evaluate": data})
    assert len(receipt.runtimes) == 1 and "ONNX Runtime does not run the model: cannot read it" in receipt.notes


def test_what_cannot_be_measured_is_refused_before_anything_is_done(monkeypatch):
    net, data = net_and_data()
    with pytest.raises(RecipeError, match="unknown runtimes? 'tensorrt'; choose from onnxruntime, openvino"):
        rarefy.compress_(net, recipe("tensorrt"), {"evaluate": data})
    with pytest.raises(RecipeError, match="evaluate.runtimes: expected each runtime once, got openvino, openvino"):
        rarefy.compress_(net, recipe("openvino", "openvino"), {"evaluate": data})
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r'needs onnxscript, openvino: pip install "rarefy\[onnx\]" and pip install openvino'
    ):
        rarefy.compress_(net, recipe("openvino"), {"evaluate": data})
    assert all(bool(p.count_nonzero() == p.numel()) for p in net.parameters())


def test_language_models_are_refused():
    from conftest import tiny_llama

    wanted = {"stages": [{"quantize": {}}], "evaluate": {"metric": "perplexity", "runtimes": "onnxruntime"}}
    with pytest.raises(RecipeError, match="evaluate.runtimes has no effect on language models"):
        rarefy.compress_(tiny_llama(), wanted, {"evaluate": [{"input_ids": torch.ones(1, 8).long()}]})
