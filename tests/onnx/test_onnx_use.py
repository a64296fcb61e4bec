"""What is done with models of ONNX files: compiled, pruned, cut, trained, exported again; files of other exporters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import rarefy
import zoo
from helpers.marks import slow_case
from helpers.onnx_files import apart, bert, export, ocr_file, run
from rarefy.runtime import bindings

needs_kernels = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


class Stem(nn.Module):
    """Convolutions with norms, a residual and a gate over channels, as image networks have them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid()
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        return self.head((x + y * self.gate(y)).mean((2, 3)))


@needs_kernels
@pytest.mark.parametrize("opset", [slow_case(12), 17, slow_case("dynamo")])
def test_an_image_network_is_compiled_cut_trained_and_exported(opset, tmp_path):
    model, x = zoo.lively(Stem()), torch.randn(2, 3, 16, 16)
    net = rarefy.from_onnx(export(model, x, tmp_path / "net.onnx", opset))
    with torch.no_grad():
        want = model(x)
        assert apart(rarefy.compile(net, (x,), tune=False)(x), want) < 1e-4
    narrow = copy.deepcopy(net)
    rarefy.cut_(narrow, (x,), keep=0.5)
    assert sum(p.numel() for p in narrow.parameters()) < 0.7 * sum(p.numel() for p in net.parameters())
    rarefy.prune_(narrow, sparsity=0.5, layers="head")
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.01)
    narrow(x).square().sum().backward()
    optimizer.step()
    rarefy.fold_(narrow.eval())
    path = rarefy.export_onnx(narrow, x, tmp_path / "narrow.onnx")
    with torch.no_grad():
        assert apart(run(path, {"x": x}), narrow(x)) < 1e-4


@needs_kernels
@pytest.mark.parametrize("opset", [14, slow_case(17)])
def test_an_encoder_keeps_batch_and_length_open(opset, tmp_path):
    model, path, words = bert(tmp_path, opset, open_length=True)
    net = rarefy.from_onnx(path)
    fast = rarefy.compile(net, words, tune=False)
    for batch, length in ((2, 7), (3, 5), (1, 9)):
        other = {
            "input_ids": torch.randint(5, 60, (batch, length)),
            "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        }
        with torch.no_grad():
            assert apart(fast(**other), model(**other)) < 1e-4


@needs_kernels
@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "shape"),
    [("ch_PP-OCRv4_det_infer", (1, 3, 64, 96)), slow_case("ch_PP-OCRv4_rec_infer", (1, 3, 48, 96)), slow_case("ch_ppocr_mobile_v2.0_cls_infer", (1, 3, 48, 192))],
)  # fmt: skip
def test_trained_files_of_an_ocr_system(name, shape):
    path, x = ocr_file(name), torch.rand(shape)
    net = rarefy.from_onnx(path, example=x)
    with torch.no_grad():
        want = run(path, {"x": x})
        for model in (net, rarefy.compile(net, (x,), tune=False)):
            torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-6)
    rarefy.cut_(net, (x,), keep=0.7)


def nhwc_file(path: Path) -> Path:
    """A file as converters of NHWC models write it: each operator of images between two Transposes."""
    rng = np.random.default_rng(0)
    held = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "v": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
        "b": rng.standard_normal(4).astype(np.float32), "low": np.array(0, np.float32), "high": np.array(6, np.float32),
    }  # fmt: skip
    last, first = {"perm": [0, 2, 3, 1]}, {"perm": [0, 3, 1, 2]}
    nodes = [
        helper.make_node("Transpose", ["x"], ["a"], **first), helper.make_node("Conv", ["a", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Transpose", ["c"], ["d"], **last), helper.make_node("Add", ["d", "b"], ["e"]),
        helper.make_node("Clip", ["e", "low", "high"], ["f"]), helper.make_node("Transpose", ["f"], ["g"], **first),
        helper.make_node("Conv", ["g", "v"], ["h"]), helper.make_node("Transpose", ["h"], ["i"], **last),
        helper.make_node("Add", ["i", "f"], ["j"]), helper.make_node("Concat", ["j", "f"], ["k"], axis=3),
        helper.make_node("ReduceMean", ["k"], ["y"], axes=[1, 2], keepdims=0),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 8, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])], [numpy_helper.from_array(a, n) for n, a in held.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_channels_last_files_are_read_without_their_transposes(tmp_path):
    path, x = nhwc_file(tmp_path / "net.onnx"), torch.randn(2, 8, 8, 3)
    net = rarefy.from_onnx(path)
    kinds = [type(m)._get_name(m) for m in net.modules()]
    assert kinds.count("Transpose") == 1 and kinds.count("Conv2d") == 2
    with torch.no_grad():
        assert apart(net(x), run(path, {"x": x})) < 1e-5


class Gates(nn.Module):
    """Thirds of a layer's outputs, and halves of another's."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 48), nn.Linear(16, 64), nn.Linear(32, 4)

    def forward(self, x):
        q, k, v = self.a(x).chunk(3, -1)
        u, w = self.b(q * torch.sigmoid(k) + v).chunk(2, -1)
        return self.c(u * torch.sigmoid(w))


@pytest.mark.parametrize("opset", [11, 17, slow_case("dynamo")])
def test_parts_of_a_layer_are_cut_alike(opset, tmp_path, capfd):
    """TorchScript writes a chunk as slices with fixed ends."""
    x = torch.randn(3, 8)
    net = rarefy.from_onnx(export(Gates().eval(), x, tmp_path / "net.onnx", opset))
    rarefy.cut_(net, (x,), keep=0.5)
    assert {n: tuple(m.weight.shape) for n, m in net.named_modules() if isinstance(m, nn.Linear)} == {
        "a": (24, 8), "b": (32, 8), "c": (4, 16),
    }  # fmt: skip
    path = rarefy.export_onnx(net, (x,), tmp_path / "cut.onnx").path
    assert apart(run(path, {"x": x}), net(x).detach()) < 1e-5
    assert not capfd.readouterr().err


def test_parts_that_are_not_all_of_a_tensor_stay_slices(tmp_path):
    """Overlaps, gaps, other lengths, and the open size of a batch."""

    class Parts(nn.Module):
        def forward(self, x):
            return x[:1], x[1:2], x[:, :4], x[:, 3:], x[:, :2], x[:, 6:], x[:, :8], x[..., ::2]

    x = torch.randn(2, 8)
    net = rarefy.from_onnx(export(Parts().eval(), x, tmp_path / "net.onnx", 13), example=(x,))
    graph: Any = net.graph
    assert not any(n.target is torch.chunk for n in graph.nodes)
    for more in (x, torch.randn(5, 8)):
        assert all(torch.equal(a, b) for a, b in zip(net(more), Parts()(more), strict=True))


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), torch.randn(2, 7, 32)


def vision_transformer():
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return VisionTransformer(**sizes), torch.randn(2, 3, 32, 32)


@needs_kernels
@pytest.mark.parametrize("opset", [17, slow_case("dynamo")])
@pytest.mark.parametrize("make", [encoder, vision_transformer])
def test_attention_of_torchs_own_layers_is_native(make, opset, tmp_path, monkeypatch):
    """nn.MultiheadAttention, which splits its inputs, scales queries and keys, and computes tokens first."""
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    torch.manual_seed(0)
    model, x = make()
    model = zoo.lively(model.eval())
    net = rarefy.from_onnx(export(model, x, tmp_path / "net.onnx", opset), example=(x,))
    fast = rarefy.compile(net, (x,), tune=False)
    assert "2 attention" in repr(fast) and "scaled_dot_product_attention" not in repr(fast)
    with torch.no_grad():
        assert apart(fast(x), model(x)) < 1e-4
