"""Files that ONNX Runtime wrote itself, with its fused operators, read and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rarefy
import zoo
from helpers.onnx_files import apart, bert, export, run
from rarefy.onnx.shape_inference import MAX_INFERRED

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def fused(path: Path, level: str = "ORT_ENABLE_EXTENDED") -> Path:
    """Write the graph that ONNX Runtime makes of a file, as its users save it; return the new file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
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
    assert {"BiasGelu", "FusedMatMul"} <= check(path, feeds)


class First(nn.Module):
    """A transformers model as a function of one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama", "gemma"])
def test_models_of_torch_s_exporter(tmp_path, name):
    make, inputs = zoo.transformers_cases()[name]
    x = next(iter(inputs.values()))
    model = First(make()).eval()
    model.model.config.use_cache = False
    check(export(model, x, tmp_path / "net.onnx", "dynamo"), {"x": x})


def residual_net(act: nn.Module) -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.act, self.head, self.last = act, nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.first(x))
            y = self.act(self.second(y) + y)
            return self.last(self.act(self.head(y.mean((2, 3)))))

    return Residual().eval()


@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh(), nn.ReLU6()], ids=lambda a: type(a).__name__
)
def test_convolutions_with_activations(tmp_path, act, opset):
    x = torch.randn(2, 3, 9, 9)
    net = residual_net(act)
    path = export(net, (x,), tmp_path / "net.onnx", opset, ("x",))
    assert "FusedConv" in check(path, {"x": x})


def test_fused_layers_can_be_pruned_and_cut(tmp_path):
    x = torch.randn(2, 3, 9, 9)
    path = fused(export(residual_net(nn.ReLU()), (x,), tmp_path / "net.onnx", 13, ("x",)))
    module = rarefy.from_onnx(path)
    assert sum(isinstance(m, nn.Conv2d) for m in module.modules()) == 2
    rarefy.cut_(module, (x,), keep=0.5)
    assert min(m.out_channels for m in module.modules() if isinstance(m, nn.Conv2d)) == 4


def test_an_unknown_activation_is_named(tmp_path):
    node = onnx.helper.make_node("FusedConv", ["x", "w"], ["y"], "conv", domain="com.microsoft", activation="Abs")
    weight = onnx.numpy_helper.from_array(torch.randn(4, 3, 1, 1).numpy(), "w")
    values = [onnx.helper.make_tensor_value_info(n, 1, [1, c, 5, 5]) for n, c in (("x", 3), ("y", 4))]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    opsets = [onnx.helper.make_opsetid("", 13), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "net.onnx")
    with pytest.raises(rarefy.RarefyError, match="the activation 'Abs' is not one of Relu"):
        rarefy.from_onnx(tmp_path / "net.onnx")


def test_shapes_are_not_inferred_without_end(tmp_path, monkeypatch):
    """Those behind each operator of ONNX Runtime are inferred anew; a long chain would take minutes."""
    infer, sizes = onnx.shape_inference.infer_shapes, []

    def counted(model, **options):
        sizes.append(len(model.graph.node))
        return infer(model, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    nodes, last = [], "x"
    for i in range(1500):
        nodes.append(onnx.helper.make_node("QuickGelu", [last], [f"a{i}"], domain="com.microsoft"))
        nodes.append(onnx.helper.make_node("Add", [f"a{i}", "b"], [f"b{i}"]))
        last = f"b{i}"
    value = onnx.helper.make_tensor_value_info("x", 1, ["batch", 4])
    result = onnx.helper.make_tensor_value_info(last, 1, ["batch", 4])
    bias = onnx.numpy_helper.from_array(torch.zeros(4).numpy(), "b")
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph(nodes, "g", [value], [result], [bias])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "net.onnx")
    rarefy.from_onnx(tmp_path / "net.onnx")
    assert sum(sizes) < 3 * MAX_INFERRED


def test_a_layout_of_one_cpu_is_named(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    path = fused(export(net, torch.randn(1, 3, 9, 9), tmp_path / "net.onnx", 17), "ORT_ENABLE_ALL")
    if not any(n.domain == "com.microsoft.nchwc" for n in onnx.load(path).graph.node):
        pytest.skip("ONNX Runtime has no layout of its own here")
    with pytest.raises(rarefy.RarefyError, match="for one CPU: save it with ORT_ENABLE_EXTENDED"):
        rarefy.from_onnx(path)
