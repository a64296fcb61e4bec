"""Files that ONNX Runtime wrote itself, with its fused operators, read and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rarefy
import zoo
from helpers.onnx_files import apart, bert, run

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def fused(path: Path) -> Path:
    """Write the graph that ONNX Runtime makes of a file, as its users save it; return the new file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".fused.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return path.with_suffix(".fused.onnx")


def own_operators(path: Path) -> set[str]:
    return {n.op_type for n in onnx.load(path).graph.node if n.domain == "com.microsoft"}


def check(path: Path, feeds: dict[str, Tensor]) -> set[str]:
    """Compare a fused file, read and compiled, with ONNX Runtime; return its own operators."""
    want, file = run(path, feeds), fused(path)
    module = rarefy.from_onnx(file)
    with torch.no_grad():
        assert apart(module(*feeds.values()), want) < 1e-4
    compiled = rarefy.compile(module, tuple(feeds.values()))
    assert apart(compiled(*feeds.values()), want) < 1e-4
    return own_operators(file)


@pytest.mark.parametrize("opset", [14, 17])
def test_an_encoder_of_texts(tmp_path, opset):
    _, path, feeds = bert(tmp_path, opset)
    assert "SkipLayerNormalization" in check(path, feeds)


class First(nn.Module):
    """A transformers model as a function of one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama", "gemma"])
def test_models_of_torch_s_exporter(tmp_path, name):
    make, inputs = zoo.transformers_cases()[name]
    x = next(iter(inputs.values()))
    model = First(make()).eval()
    model.model.config.use_cache = False
    path = tmp_path / "net.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, input_names=["x"], verbose=False)
    check(path, {"x": x})


def test_an_image_model(tmp_path):
    model, x = zoo.lively(zoo.timm_cases()["timm.convnext_atto"][0]()), torch.randn(1, 3, 64, 64)
    path = tmp_path / "net.onnx"
    torch.onnx.export(model.eval(), (x,), path, dynamo=True, external_data=False, input_names=["x"], verbose=False)
    check(path, {"x": x})
