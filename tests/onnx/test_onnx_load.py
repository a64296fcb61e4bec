"""ONNX files as torch modules: against the models that they were exported from, and against ONNX Runtime."""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import rarefy
import zoo
from conftest import Net, Tied
from helpers.compile_models import Attends
from helpers.marks import slow_case, slow_except
from helpers.onnx_files import apart, bert, export, run, run_all
from rarefy.common.errors import ContainerError, ModelError
from rarefy.compiler import ops
from rarefy.model.activation_quant import get_activation_quant
from rarefy.model.layers import all_layers
from rarefy.model.quant_grid import get_grid
from rarefy.runtime import bindings
from rarefy.runtime.packing import unpack

OPSETS = [11, 13, 17, "dynamo"]


@torch.no_grad()
def same(model: nn.Module, path: Path, example: tuple[Tensor, ...]) -> nn.Module:
    made = rarefy.from_onnx(path)
    assert apart(made(*example), model(*example)) < 1e-5 and not made.training
    more = tuple(torch.cat([t, t]) for t in example)
    assert apart(made(*more), model(*more)) < 1e-5
    return made


# Graphs of floats


@pytest.mark.parametrize("opset", OPSETS)
def test_a_convolutional_network(opset, tmp_path):
    model = zoo.lively(Net())
    x = torch.randn(2, 3, 8, 8)
    path = export(model, x, tmp_path / "net.onnx", opset)
    made = rarefy.from_onnx(path) if opset == "dynamo" else same(model, path, (x,))
    with torch.no_grad():
        assert apart(made(x=x), model(x)) < 1e-5
    assert {l.name for l in all_layers(made)} == {"conv", "deep", "up", "hidden", "fc"}


@pytest.mark.parametrize("opset", slow_except(OPSETS, 17))
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", slow_case("regnet_y_400mf")])
def test_networks_of_torchvision(name, opset, tmp_path):
    from torchvision import models

    model, x = zoo.lively(getattr(models, name)(weights=None, num_classes=7)), zoo.images(64)
    path = export(model, x, tmp_path / "net.onnx", opset)
    with torch.no_grad():
        made = rarefy.from_onnx(path)
        assert apart(made(x), model(x)) < 1e-5
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [l.name for l in all_layers(made)] == names


@pytest.mark.parametrize("opset", [14, 17, slow_case("dynamo")])
def test_an_encoder(opset, tmp_path):
    model, path, words = bert(tmp_path, opset)
    made = rarefy.from_onnx(path)
    with torch.no_grad():
        assert apart(made(**words), model(**words)) < 1e-5
    layers = {l.name for l in all_layers(model) if "pooler" not in l.name}
    assert {l.name for l in all_layers(made)} | {"model.embeddings.position_embeddings"} == layers
    kinds = [type(m) for m in made.modules()]
    assert kinds.count(nn.LayerNorm) == sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert nn.GELU in kinds and not any("Erf" in k.__name__ for k in kinds)


def test_one_constant_is_one_parameter(tmp_path):
    path = export(Tied().eval(), torch.randint(0, 20, (2, 5)), tmp_path / "tied.onnx")
    assert "lm_head" not in rarefy.from_onnx(path).state_dict()  # its weight is turned, so it is another constant

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(self.fc(x).relu())

    model = Twice().eval()
    made = same(model, export(model, torch.randn(3, 6), tmp_path / "twice.onnx"), (torch.randn(3, 6),))
    assert [p.dim() for p in made.parameters()].count(2) == 1


def test_shapes_can_be_given(tmp_path):
    model, path, words = bert(tmp_path)
    free, fixed = rarefy.from_onnx(path), rarefy.from_onnx(path, shapes={n: (2, 7) for n in words})
    with torch.no_grad():
        assert apart(fixed(**words), model(**words)) < 1e-5
    one = rarefy.from_onnx(path, shapes={n: (1, 7) for n in words})  # other than noise would have
    with torch.no_grad():
        assert apart(one(**{n: w[:1] for n, w in words.items()}), model(**{n: w[:1] for n, w in words.items()})) < 1e-5
    graphs: list[Any] = [free.graph, fixed.graph]
    sizes = [sum(n.target == "size" for n in g.nodes) for g in graphs]
    assert sizes[1] == 0 < sizes[0]
    for shapes, says in [
        ({"input_id": (2, 7)}, "unknown input 'input_id'.*did you mean 'input_ids'"),
        ({"input_ids": (2, 7, 1)}, r"input input_ids has the shape \['batch', 7\], which \[2, 7, 1\] does not fit"),
        ({"input_ids": (2, 8)}, "does not fit"),
        ({"input_ids": (0, 7)}, "does not fit"),
    ]:
        with pytest.raises(ModelError, match=says):
            rarefy.from_onnx(path, shapes=shapes)


# What becomes of the model


def test_zeros_are_adopted_trained_saved_and_run(tmp_path):
    model, path, words = bert(tmp_path)
    rarefy.prune_(model, "4:8", sparsity=0.5, layers="model.encoder.*")
    zeros = {l.name: l.weight == 0 for l in all_layers(rarefy.fold_(model))}
    export(model, tuple(words.values()), path, 14, tuple(words))
    made = rarefy.from_onnx(path)
    taken = rarefy.adopt_(made, "*.encoder.*")
    assert len(taken) == 12
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
    for _ in range(3):
        made(**words).square().sum().backward()
        optimizer.step()
    rarefy.fold_(made.eval())
    for layer in all_layers(made):
        if layer.name in taken:
            assert torch.equal(layer.weight == 0, zeros[layer.name])
    rarefy.save(made, tmp_path / "saved")
    again = rarefy.load(tmp_path / "saved", rarefy.from_onnx(path))
    with torch.no_grad():
        want = made(**words)
        assert torch.equal(again(**words), want)
        told = rarefy.accelerate_(again, (14,), words, tuning_cache=False, repeats=3)
        assert apart(again(**words), want) < 1e-4
    assert {r["layer"] for r in told.rows} >= set(taken)


# Codes


def quantized(path: Path, form: str, feeds: list[dict[str, Tensor]], **how: Any) -> Path:
    """By ONNX Runtime's own quantizer, with weights of 7 bits: its sums of more overflow on a CPU without VNNI."""
    import logging

    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self):
            self.rest = iter([{k: v.numpy() for k, v in f.items()} for f in feeds])

        def get_next(self):
            return next(self.rest, None)

    out = path.with_name(f"{form}.onnx")
    logging.disable(logging.WARNING)
    try:
        if form == "dynamic":
            q.quantize_dynamic(path, out, reduce_range=True, **how)
        else:
            q.quantize_static(path, out, Reader(), quant_format=getattr(q.QuantFormat, form), reduce_range=True, **how)
    finally:
        logging.disable(logging.NOTSET)
    return out


class Small(nn.Module):
    """Convolutions with a residual and a pool between, and a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        return self.fc((x + self.conv2(x)).flatten(1))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_static_quantization_by_onnx_runtime(form, signed, per_channel, tmp_path):
    from onnxruntime.quantization import QuantType

    x = {"x": torch.randn(4, 3, 8, 8)}
    path = export(Small().eval(), x["x"], tmp_path / "net.onnx")
    whole = QuantType.QInt8 if signed else QuantType.QUInt8
    path = quantized(path, form, [x], per_channel=per_channel, activation_type=whole, weight_type=whole)
    made = rarefy.from_onnx(path)
    with torch.no_grad():
        got, want = made(**x), run(path, x)
    step = float(want.abs().max()) / 100
    assert (got - want).abs().max() < 2 * step and ((got - want).abs() < step / 100).float().mean() > 0.9
    for layer in all_layers(made):
        grid, inputs = get_grid(layer), get_activation_quant(layer.module)
        assert grid is not None and grid.bits == 8 and inputs is not None and inputs.scale is not None
        assert grid.scale.numel() == (
            layer.weight.shape[0] if per_channel and layer.name != "fc" else grid.scale.numel()
        )
    rarefy.save(made, tmp_path / "saved")
    assert all(
        "8" in str(r["format"]) for r in rarefy.inspect(tmp_path / "saved").rows if str(r["tensor"]).endswith("weight")
    )


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_compiled_layers_run_on_the_scales_of_the_file(form, per_channel, symmetric, tmp_path):
    from onnxruntime.quantization import QuantType

    x = {"x": torch.randn(4, 3, 8, 8)}
    path = export(Small().eval(), x["x"], tmp_path / "net.onnx")
    how = {"ActivationSymmetric": symmetric}
    path = quantized(
        path, form, [x], per_channel=per_channel, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options=how,
    )  # fmt: skip
    net = rarefy.from_onnx(path)
    made = rarefy.compile(net, (x["x"],), tune=False)
    _on_their_own_scales(net, made, 3)
    assert {k.input_grid.zero == 128 for k in made.kernels.values()} == {symmetric}
    assert sum(n.target is ops.fake_quantize for n in made.exported.graph.nodes) == 5  # none twice
    with torch.no_grad():
        assert apart(made(x["x"]), net(**x)) < 2e-5
    rarefy.save(made, tmp_path / "saved")
    assert torch.equal(rarefy.load(tmp_path / "saved")(x["x"]), made(x["x"]))


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
def test_a_compiled_transformer_block_runs_on_the_scales_of_the_file(tmp_path):
    from onnxruntime.quantization import QuantType

    x, path = torch.randn(2, 16, 32), tmp_path / "block.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Attends().eval(), (x,), path, dynamo=False, opset_version=14, input_names=["x"])
    path = quantized(
        path, "QDQ", [{"x": x}], per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    net = rarefy.from_onnx(path)
    made = rarefy.compile(net, (x,), tune=False)
    _on_their_own_scales(net, made, 4)
    with torch.no_grad():
        assert apart(made(x), net(x)) < 1e-3


def _on_their_own_scales(net: nn.Module, made: Any, layers: int) -> None:
    """Whether all layers run in 8 bits on the codes and scales that the module has."""
    modules = dict(net.named_modules())
    assert len(made.kernels) == layers
    for n, kernel in made.kernels.items():
        layer = modules[made.exported.layers[n]]
        assert kernel.held[0].kind == "int8" and kernel.input_grid == get_activation_quant(layer)
        torch.testing.assert_close(unpack(kernel.held[0]), layer.weight.detach(), rtol=1e-6, atol=0)


def test_dynamic_quantization_by_onnx_runtime(tmp_path):
    model, path, words = bert(tmp_path)
    path = quantized(path, "dynamic", [])
    made = rarefy.from_onnx(path)
    with torch.no_grad():
        got, want, dense = made(**words), run(path, words), model(**words)
    # a scale a row here, one for all in DynamicQuantizeLinear
    assert (got - dense).norm() < 1.2 * (want - dense).norm()
    layers = [l for l in all_layers(made) if isinstance(l.module, nn.Linear)]
    assert layers and all(get_grid(l) is not None and get_activation_quant(l.module) is not None for l in layers)
    tables = [l for l in all_layers(made) if isinstance(l.module, nn.Embedding)]
    assert tables and all(get_grid(l) is not None for l in tables)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{"weights": "int8"}, {"weights": "int8", "activations": "int8-static"}], ids=str)
def test_back_from_our_own_export(weights, tmp_path):
    model, x = zoo.lively(Net()), torch.randn(2, 3, 8, 8)
    rarefy.quantize_(model, data=[x] if "activations" in weights else None, **weights)
    made = rarefy.from_onnx(rarefy.export_onnx(model, x, tmp_path / "net.onnx"))
    with torch.no_grad():
        assert apart(made(x), model(x)) < 0.01
    ours = {l.name: l for l in all_layers(rarefy.fold_(model))}
    for layer in all_layers(made):
        there, here = get_grid(ours[layer.name]), get_grid(layer)
        if layer.name != "up":  # a transposed convolution's scales lie along another dimension
            assert torch.equal(layer.weight, ours[layer.name].weight)
            assert (there is None) == (here is None) == (layer.name == "fc")
            if there is not None and here is not None:
                assert torch.equal(here.codes(layer.weight), there.codes(ours[layer.name].weight))
        rounded, ours_ = get_activation_quant(layer.module), get_activation_quant(ours[layer.name].module)
        assert (rounded is None) == (ours_ is None)
        if rounded is not None and ours_ is not None:  # a scale is stored in fp32
            assert (rounded.zero, rounded.scale) == (ours_.zero, pytest.approx(ours_.scale, rel=1e-6))


def integer_graph(kind: str, static: bool, bias: bool = True) -> tuple[Any, Tensor, Tensor]:
    """A product as SparseML wrote it for DeepSparse: codes, a Cast, one Mul by all scales, an Add."""
    rng = np.random.default_rng(0)
    conv = kind == "ConvInteger"
    codes = rng.integers(-127, 128, (6, 4, 3, 3) if conv else (8, 6)).astype(np.int8)
    codes[rng.random(codes.shape) < 0.5] = 0
    held = {
        "w": codes, "wz": np.array(0, np.int8), "xs": np.array(0.02, np.float32), "xz": np.array(110, np.uint8),
        "s": np.array(0.02 * 0.01 if static else 0.01, np.float32),
        "b": rng.standard_normal((1, 6, 1, 1) if conv else (6,)).astype(np.float32),
    }  # fmt: skip
    shape = (2, 4, 5, 5) if conv else (3, 8)
    more = {"pads": [1, 1, 1, 1]} if conv else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"])
        if static
        else helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "ds", "xz"]),
        helper.make_node(kind, ["q", "w", "xz", "wz"], ["i"], name="layer", **more),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        *([] if static else [helper.make_node("Mul", ["ds", "s"], ["all"])]),
        helper.make_node("Mul", ["f", "s" if static else "all"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    if not static:
        del held["xs"], held["xz"]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"] * len(shape))], [numpy_helper.from_array(a, n) for n, a in held.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model, torch.from_numpy(rng.standard_normal(shape).astype(np.float32)), torch.from_numpy(codes)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("kind", ["ConvInteger", "MatMulInteger"])
def test_integer_operators_of_deepsparse_files(kind, static, tmp_path):
    model, x, codes = integer_graph(kind, static)
    onnx.save(model, tmp_path / "net.onnx")
    made = rarefy.from_onnx(tmp_path / "net.onnx")
    with torch.no_grad():
        assert apart(made(x), run(tmp_path / "net.onnx", {"x": x})) < (1e-5 if static else 0.02)
    (layer,) = all_layers(made)
    grid = get_grid(layer)
    want = codes if kind == "ConvInteger" else codes.T
    assert grid is not None and torch.equal(grid.codes(layer.weight), want.to(torch.int16))
    assert torch.equal(layer.weight == 0, want == 0) and layer.name == "layer"
    assert rarefy.adopt_(made) == ["layer"]


# What cannot be read, and what is meant to do harm


def plain_graph(nodes: list[Any], held: dict[str, np.ndarray], opset: int = 13, inputs: Any = None, **more: Any) -> Any:
    inputs = inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 4))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", "m"))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in held.items()])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)


W = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: b"", ContainerError, "not an ONNX file"),
        (lambda: b"\x08\x09\x3a\xff", ContainerError, "or an incomplete copy of one"),
        (lambda: b"\x80\x04K\x01.", ContainerError, "not an ONNX file"),
        (lambda: plain_graph([], {}).SerializeToString(), ContainerError, "not an ONNX file, or one without operators"),
        (lambda: integer_graph("MatMulInteger", True)[0].SerializeToString()[:-40], ContainerError, "not (an|a sound) ONNX"),
        (
            lambda: plain_graph([helper.make_node("Inverse", ["x"], ["h"], domain="com.microsoft"), helper.make_node("Multinomial", ["h"], ["y"])], {}),
            ModelError, r"operators without a torch module: com.microsoft.Inverse \(1\), Multinomial \(1\)",
        ),
        (
            lambda: plain_graph([helper.make_node("QuantizeLinear", ["x", "s"], ["q"], name="q"), helper.make_node("DequantizeLinear", ["q", "s"], ["y"])], {"s": np.array(np.inf, np.float32)}),
            ModelError, "q: the scale must be above zero and finite, got inf",
        ),
        (
            lambda: plain_graph([helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="d", axis=0), helper.make_node("MatMul", ["x", "d"], ["y"])], {"w": W.astype(np.int8), "s": np.ones(3, np.float32)}),
            ModelError, r"d: scales of \[3\] do not fit weights of \[4, 3\]",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read(make, error, says, tmp_path):
    made = make()
    (tmp_path / "net.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    with pytest.raises(error, match=says):
        rarefy.from_onnx(tmp_path / "net.onnx")


def test_without_its_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r'reading ONNX needs more packages: pip install "rarefy\[onnx\]"'):
        rarefy.from_onnx(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModelError, match=r'ONNX needs more packages: pip install "rarefy\[onnx\]"'):
        rarefy.export_onnx(nn.Linear(2, 2).eval(), torch.ones(1, 2), tmp_path / "net.onnx")


def test_no_file(tmp_path):
    with pytest.raises(ContainerError, match="no such file"):
        rarefy.from_onnx(tmp_path / "net.onnx")
    with pytest.raises(ContainerError, match="is not a file"):
        rarefy.from_onnx(tmp_path)


def test_names_run_no_code(tmp_path):
    mark = tmp_path / "pwned"
    evil = f'x"), open({str(mark)!r}, "w"), getattr(self, "y'
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (2, 4)) for n in ("self", evil)]
    nodes = [
        helper.make_node("MatMul", ["self", f"{evil}.weight"], ["h"], name=evil),
        helper.make_node("MatMul", [evil, f"{evil}.weight"], ["i"], name="/forward/__class__.graph/MatMul"),
        helper.make_node("Add", ["h", "i"], ["y"], name="/__init__/class"),
    ]
    nodes[1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="__import__('os').system('touch /tmp/x')")
    model = plain_graph(nodes, {f"{evil}.weight": W}, inputs=inputs)
    onnx.save(model, tmp_path / "net.onnx")
    made = rarefy.from_onnx(tmp_path / "net.onnx")
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.allclose(made(x, x), 2 * x @ torch.from_numpy(W), atol=1e-5)
    assert not mark.exists() and all(re.fullmatch(r"[\w.-]*", n, re.ASCII) for n, _ in made.named_modules())
    assert next(iter(inspect.signature(made.forward).parameters)) == "input_self"


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "link"])
def test_weights_come_from_the_folder_of_the_file(place, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(48))
    os.symlink(tmp_path / "secret", folder / "link")
    model = plain_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W})
    (w,) = model.graph.initializer
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    w.external_data.add(key="location", value=place)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ContainerError, match="is stored outside the file's folder"):
        rarefy.from_onnx(folder / "net.onnx")


def test_weights_beside_the_file(tmp_path):
    model = plain_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W})
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.allclose(rarefy.from_onnx(tmp_path / "net.onnx")(x), x @ torch.from_numpy(W))
    (tmp_path / "net.data").write_bytes(b"123")
    with pytest.raises(ContainerError, match="w ends at byte 48 of .*, which has 3: copy both files again"):
        rarefy.from_onnx(tmp_path / "net.onnx")
    (tmp_path / "net.data").unlink()
    with pytest.raises(
        ContainerError, match="w is stored in 'net.data', which is missing or no plain file: both files belong"
    ):
        rarefy.from_onnx(tmp_path / "net.onnx")


def test_outputs_keep_their_order(tmp_path):
    nodes = [helper.make_node("Split", ["x"], ["a", "b"], axis=1), helper.make_node("Relu", ["b"], ["c"])]
    model = plain_graph(nodes, {"k": W})
    del model.graph.output[:]
    model.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ("n", "m")) for n in ("c", "b", "x", "k")
    )
    onnx.save(model, tmp_path / "net.onnx")
    x = torch.randn(2, 4)
    c, b, same_, k = rarefy.from_onnx(tmp_path / "net.onnx")(x)
    assert (
        torch.equal(b, x[:, 2:])
        and torch.equal(c, b.relu())
        and torch.equal(same_, x)
        and torch.equal(k, torch.from_numpy(W))
    )


def test_copies_are_whole(tmp_path):
    model, path, words = bert(tmp_path)
    made = rarefy.from_onnx(path)
    again = copy.deepcopy(made)
    with torch.no_grad():
        made.get_submodule("model.encoder.layer.0.output.dense").weight.zero_()
        assert apart(again(**words), model(**words)) < 1e-5


# No other numbers than ONNX Runtime's: equal, or an error

S = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
K = np.random.default_rng(2).standard_normal((3, 2, 3, 3)).astype(np.float32)
F = TensorProto.FLOAT


def floats(*shape: int) -> list[Any]:
    return [helper.make_tensor_value_info("x", F, shape)]


def node(kind: str, inputs: str, outputs: str, **more: Any) -> Any:
    return helper.make_node(kind, [i if i != "_" else "" for i in inputs.split()], outputs.split(), **more)


FAITHFUL = {
    "a square weight, plain and turned": ([node("Gemm", "x w", "h", transB=1), node("MatMul", "h w", "y")], {"w": S}, 13, None),
    "a table that is a head too": (
        [node("Cast", "x", "i", to=7), node("Abs", "i", "j"), node("Mod", "j four", "k"), node("Gather", "w k", "h"), node("MatMul", "h w", "y")],
        {"w": S, "four": np.array(4, np.int64)}, 13, None,
    ),
    "alpha": ([node("Gemm", "x w", "a", alpha=2.0), node("Gemm", "a w", "y")], {"w": S}, 13, None),
    "a layer of constants": ([node("Gemm", "c w", "a"), node("Gemm", "c v", "b"), node("Add", "a b", "d"), node("Add", "d x", "y")], {"c": S, "w": S + 1, "v": S * 2}, 13, floats(4, 4)),
    "a computed bias of a norm": (
        [node("Relu", "x", "r"), node("ReduceMean", "r", "b", axes=[0], keepdims=0), node("LayerNormalization", "x w b", "y")],
        {"w": S[0]}, 17, None,
    ),
    "axes of nothing": ([node("ReduceMean", "x", "y", noop_with_empty_axes=1)], {}, 18, None),
    "no axes": ([node("ReduceMean", "x", "y")], {}, 18, None),
    "a GELU that adds a dimension": (
        [node("Div", "x r", "a"), node("Erf", "a", "b"), node("Add", "b one", "c"), node("Mul", "x c", "d"), node("Mul", "d half", "y")],
        {"r": np.array(2**0.5, np.float32), "one": np.array(1, np.float32), "half": np.full((1, 1, 1), 0.5, np.float32)}, 13, None,
    ),
    "a zero point of no operator": ([node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q s z", "y")], {"s": np.array(0.02, np.float32), "z": np.array(0, np.uint8)}, 13, None),
    "codes with a sign": ([node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s", "y")], {"s": np.array(0.02, np.float32), "z": np.array(0, np.int8)}, 13, None),
    "or equal": ([node("GreaterOrEqual", "x s", "b"), node("Where", "b x s", "y")], {"s": np.array(0.1, np.float32)}, 16, None),
    "from the back": ([node("Slice", "x a b c d", "y")], {"a": np.array([-1]), "b": np.array([-9]), "c": np.array([1]), "d": np.array([-2])}, 13, None),
    "picked": ([node("Gather", "x i", "y", axis=1)], {"i": np.array(-1)}, 13, floats(2, 3, 4)),
    "four bits in blocks": (
        [node("DequantizeLinear", "w s", "d", axis=0, block_size=2), node("MatMul", "x d", "y")],
        {"w": helper.make_tensor("w", TensorProto.INT4, (4, 4), np.arange(-8, 8).tolist()), "s": np.abs(S[:2]) + 0.1}, 21, None,
    ),
    "uneven parts": ([node("Split", "x", "y z w", num_outputs=3, axis=1)], {}, 18, floats(2, 7)),
    "slopes of the last axis": ([node("PRelu", "x w", "y")], {"w": S[0]}, 13, floats(1, 4, 4, 4)),
    "a size asked for": ([node("ConvTranspose", "x w", "y", strides=[2, 2], output_shape=[8, 8])], {"w": K.transpose(1, 0, 2, 3)[:, :2]}, 13, floats(1, 2, 4, 4)),
    "a way to resize": ([node("Resize", "x _ s", "y", mode="linear", coordinate_transformation_mode="asymmetric")], {"s": np.array([1, 1, 2, 2], np.float32)}, 13, floats(1, 2, 4, 4)),
    "an output of codes": ([node("QuantizeLinear", "x s z", "y")], {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}, 13, None),
    "no zero point": (
        [node("QuantizeLinear", "x s z", "q"), node("MatMulInteger", "q w", "i", name="m"), node("Cast", "i", "f", to=1), node("Mul", "f s", "y")],
        {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8), "w": (S * 20).astype(np.int8)}, 13, None,
    ),
    "a scale a row": (
        [node("QuantizeLinear", "x s z", "q"), node("MatMulInteger", "q w z", "i", name="m"), node("Cast", "i", "f", to=1), node("Mul", "f r", "y")],
        {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8), "w": (S * 20).astype(np.int8), "r": np.abs(S[:, :1])}, 13, floats(4, 4),
    ),
    "codes of a sum": ([node("QuantizeLinear", "x s", "q"), node("Cast", "q", "c", to=1), node("QuantizeLinear", "c s", "r"), node("DequantizeLinear", "r s", "y")], {"s": np.array(0.1, np.float32)}, 13, None),
    "a scale that is no number": ([node("QuantizeLinear", "x s z", "q"), node("MatMulInteger", "q w z", "i", name="m"), node("Cast", "i", "f", to=1), node("Mul", "f x", "y")], {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8), "w": (S * 20).astype(np.int8)}, 13, floats(4, 4)),
    "a computed bias": (
        [node("QuantizeLinear", "x s z", "q"), node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "i", to=6), node("Expand", "i n", "b"), node("QLinearConv", "q s z w s k s z b", "o", name="c"), node("DequantizeLinear", "o s z", "y")],
        {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8), "k": np.array(0, np.int8), "w": (K * 20).astype(np.int8), "n": np.array([3])}, 13, floats(1, 2, 4, 4),
    ),
    "no scale of the weights": (
        [node("DynamicQuantizeLinear", "x", "q d z"), node("MatMulInteger", "q w z", "i", name="m"), node("Cast", "i", "f", to=1), node("Mul", "f d", "y")],
        {"w": (S * 20).astype(np.int8)}, 13, None,
    ),
    "another scale": ([node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q t", "y")], {"s": np.array(1, np.float32), "t": np.array(2, np.float32)}, 13, None),
    "a scale a column": ([node("QuantizeLinear", "x s", "q", axis=1), node("DequantizeLinear", "q s", "y", axis=1)], {"s": np.abs(S[0])}, 13, None),
    "a pool with gaps": ([node("AveragePool", "x", "y", kernel_shape=[2], dilations=[2])], {}, 19, floats(1, 2, 8)),
    "half a clip": ([node("Clip", "x _ h", "y")], {"h": np.array(1, np.float32)}, 13, None),
    "a second output": ([node("MaxPool", "x", "y i", kernel_shape=[2, 2])], {}, 12, floats(1, 2, 4, 4)),
}  # fmt: skip
REFUSED = {
    "another operator's GELU": ([node("Gelu", "x", "y", approximate="cubic")], {}, 20, None, "Gelu approximates by none or tanh, got 'cubic'|ONNX Runtime does not run"),
    "codes of 32 bits": ([node("QuantizeLinear", "x s z", "q", name="q"), node("DequantizeLinear", "q s z", "y")], {"s": np.array(0.1, np.float32), "z": np.array(3, np.int32)}, 13, None, "ONNX Runtime does not run this file"),
    "a stranger": ([node("Gelu", "x", "y", domain="evil.dom")], {}, 13, None, "net.onnx: operators that are not part of ONNX: evil.dom.Gelu"),
    "a constant of nothing": ([node("Constant", "", "c"), node("Add", "x c", "y")], {}, 13, None, "holds 0 values|not a sound ONNX file"),
    "words": ([node("Constant", "", "c", value_string="a"), node("Add", "x c", "y")], {}, 13, None, "holds a value_string: arrays and numbers are read|ONNX Runtime"),
    "a bomb": ([node("Expand", "x n", "h"), node("ReduceSum", "h", "y")], {"n": np.array([1 << 16, 1 << 15])}, 13, floats(1, 1), "elements; at most 134,217,728 are read"),
}  # fmt: skip


def file_of(case: Any, path: Path) -> Path:
    nodes, held, opset, inputs = case[:4]
    inputs = inputs or floats(2, 4)
    tensors = [a if isinstance(a, TensorProto) else numpy_helper.from_array(a, n) for n, a in held.items()]
    outputs = []
    for name in nodes[-1].output:
        kind, rank = _kind(nodes, tensors, inputs, opset, name)
        outputs.append(helper.make_tensor_value_info(name, kind or F, [f"{name}{i}" for i in range(rank)]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("evil.dom", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def _kind(nodes: Any, tensors: Any, inputs: Any, opset: int, name: str) -> tuple[int, int]:
    """The type of an output and its number of dimensions."""
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_empty_tensor_value_info(name)], tensors)
    made = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("evil.dom", 1)])
    )
    kind = made.graph.output[0].type.tensor_type
    return kind.elem_type, len(kind.shape.dim)


@pytest.mark.parametrize("name", FAITHFUL)
def test_the_numbers_of_onnx_runtime(name, tmp_path):
    path = file_of(FAITHFUL[name], tmp_path / "net.onnx")
    shape = [d.dim_value for d in (FAITHFUL[name][3] or floats(2, 4))[0].type.tensor_type.shape.dim]
    x = 2 * torch.randn(shape)
    with torch.no_grad():
        outputs = rarefy.from_onnx(path)(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    for got, want in zip(outputs, run_all(path, {"x": x}), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_other_numbers(name, tmp_path):
    path = file_of(REFUSED[name], tmp_path / "net.onnx")
    with pytest.raises((ModelError, ContainerError), match=REFUSED[name][4]):
        rarefy.from_onnx(path)


def test_an_opset_of_the_future(tmp_path):
    path = file_of(([node("Relu", "x", "y")], {}, 13, None), tmp_path / "net.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ContainerError, match=r"net.onnx: opset 99; those up to \d+ are read"):
        rarefy.from_onnx(path)


def test_refusals_name_the_file(tmp_path):
    path = file_of(([node("Multinomial", "x", "y")], {}, 13, None), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"net.onnx: operators without a torch module: Multinomial \(1\)"):
        rarefy.from_onnx(path)


def test_images_that_are_too_small_are_not_the_last_that_are_tried(tmp_path):
    """Torch refuses a pool of nothing, for which ONNX Runtime returns nothing."""
    inputs = [helper.make_tensor_value_info("x", F, ("n", 3, "h", "w"))]
    nodes = [node("AveragePool", "x", "y", kernel_shape=[40, 40], strides=[40, 40])]
    path = file_of((nodes, {}, 13, inputs), tmp_path / "net.onnx")
    assert rarefy.from_onnx(path)(torch.ones(1, 3, 50, 90)).shape == (1, 3, 1, 2)
    path = file_of(
        ([node("AveragePool", "x", "y", kernel_shape=[300, 300], strides=[300, 300])], {}, 13, inputs),
        tmp_path / "far.onnx",
    )
    hint = "far.onnx: the converted module raises an error where ONNX Runtime runs: .*: example= or shapes="
    with pytest.raises(ModelError, match=hint):
        rarefy.from_onnx(path)
    assert rarefy.from_onnx(path, example=torch.ones(1, 3, 300, 400))(torch.ones(1, 3, 301, 600)).shape[2:] == (1, 2)


@pytest.mark.parametrize("name", slow_except(["input", "type", "id", "format"], "input", "id"))
def test_inputs_may_have_names_of_functions_of_python(name, tmp_path):
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    export(net, x, tmp_path / "net.onnx", 17, (name,))
    module = rarefy.from_onnx(tmp_path / "net.onnx")
    want = module(x)
    assert torch.equal(module(**{name: x}), want)
    torch.testing.assert_close(rarefy.compile(module, {name: x})(**{name: x}), want)
    rarefy.cut_(module, {name: x}, keep=0.5)
    assert rarefy.export_onnx(module, {name: x}, tmp_path / "cut.onnx").path.is_file()
    torch.testing.assert_close(run_all(tmp_path / "cut.onnx", {name: x})[0], module(x))


def test_functions_that_double(tmp_path):
    bodies = [
        helper.make_function("evil.dom", f"f{i}", ["a"], ["b"], [helper.make_node(f"f{i + 1}" if i < 24 else "Relu", ["a"], ["c"], domain="evil.dom" if i < 24 else ""), helper.make_node(f"f{i + 1}" if i < 24 else "Relu", ["c"], ["b"], domain="evil.dom" if i < 24 else "")], [helper.make_opsetid("", 13), helper.make_opsetid("evil.dom", 1)])
        for i in range(25)
    ]  # fmt: skip
    graph = helper.make_graph(
        [node("f0", "x", "y", domain="evil.dom")], "g", floats(2, 4), [helper.make_tensor_value_info("y", F, (2, 4))]
    )
    model = helper.make_model(
        graph,
        functions=bodies,
        opset_imports=[helper.make_opsetid("", 13), helper.make_opsetid("evil.dom", 1)],
        ir_version=10,
    )
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises((ModelError, ContainerError), match="operators with its functions expanded|not a sound"):
        rarefy.from_onnx(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        (3, {}, "path: expected the path of an ONNX file, got int"),
        (None, {"shapes": [1]}, r"shapes: expected a dict of input names and shapes, got list"),
        (None, {"shapes": {"x": 3}}, "does not fit"),
        (None, {"shapes": {"x": ("a", 4)}}, "does not fit"),
        (None, {"shapes": {"x": (float("nan"), 4)}}, "does not fit"),
        (None, {"example": torch.zeros(2, 5)}, "ONNX Runtime does not run the example"),
        (None, {"example": {"z": torch.zeros(2, 4)}}, "takes tensors x; example holds z"),
    ],
)
def test_wrong_arguments(path, more, says, tmp_path):
    file = file_of(FAITHFUL["alpha"], tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=says):
        rarefy.from_onnx(file if path is None else path, **more)


def test_what_no_noise_can_show(tmp_path):
    """The shape of the second input depends on values of the first: a warning, or an example."""
    inputs = [*floats(2, 4), helper.make_tensor_value_info("n", TensorProto.INT64, (2,))]
    path = file_of(([node("Reshape", "x n", "y")], {}, 13, inputs), tmp_path / "net.onnx")
    with pytest.warns(UserWarning, match="not compared with ONNX Runtime"):
        rarefy.from_onnx(path)
    made = rarefy.from_onnx(path, example=(torch.randn(2, 4), torch.tensor([4, 2])))
    assert made(torch.randn(2, 4), torch.tensor([8, 1])).shape == (8, 1)


@pytest.mark.parametrize(
    "names", [["value_1", "value_2"], ["value.1", "value_1"], ["a_b", "a.b"], ["getattr", "print"], ["def", "self"]]
)
def test_names_of_inputs(names, tmp_path):
    inputs = [helper.make_tensor_value_info(n, F, (2, 4)) for n in names]
    path = file_of(
        ([helper.make_node("Sub", names, ["h"]), node("Relu", "h", "y")], {}, 13, inputs), tmp_path / "net.onnx"
    )
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(rarefy.from_onnx(path)(a, b), (a - b).relu())
