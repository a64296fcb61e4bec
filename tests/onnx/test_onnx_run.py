"""Compiled ONNX models called as an InferenceSession is: numpy arrays by the file's own names."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import rarefy
from helpers.marks import slow_case
from helpers.onnx_files import bert
from rarefy.common.errors import DataError
from rarefy.model.signature import get_signature

ort = pytest.importorskip("onnxruntime")


def strange_file(path: Path) -> Path:
    """A file whose names are no identifiers, with a dead input, inputs of several types, and two outputs."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((6, 3)).astype(np.float32), "weight")
    nodes = [
        helper.make_node("MatMul", ["in/x:0", "weight"], ["h"]),
        helper.make_node("Cast", ["class"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["h", "c"], ["2nd out"]),
        helper.make_node("ArgMax", ["2nd out"], ["Best:0"], axis=1, keepdims=0),
    ]
    inputs = [
        ("in/x:0", TensorProto.FLOAT, ["N", 6]),
        ("class", TensorProto.INT32, ["N", 1]),
        ("unread", TensorProto.BOOL, ["N"]),
    ]
    outputs = [("Best:0", TensorProto.INT64, ["N"]), ("2nd out", TensorProto.FLOAT, ["N", 3])]
    values = [[helper.make_tensor_value_info(*v) for v in ends] for ends in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *values, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def strange_feed(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 6)).astype(np.float32)
    return {"in/x:0": x, "class": rng.integers(0, 3, (rows, 1)).astype(np.int32), "unread": np.ones(rows, bool)}


def through_a_folder(fast, folder):
    rarefy.save(fast, folder)
    return rarefy.load(folder)


def compare(session, fast, feed):
    """The lines of a program with an InferenceSession, for both."""
    names = [o.name for o in session.get_outputs()]
    assert fast.input_names == [i.name for i in session.get_inputs()] and fast.output_names == names
    for wanted in (None, [names[-1]], names[::-1]):
        for ours, theirs in zip(fast.run(wanted, feed), session.run(wanted, feed), strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert list(fast.run(feed)) == names


@pytest.mark.parametrize("by_keyword", [False, True])
def test_names_that_are_no_identifiers(tmp_path, by_keyword):
    path = strange_file(tmp_path / "net.onnx")
    net = rarefy.from_onnx(path)
    signature = get_signature(net)
    assert [(str(i), i.num_values) for i in signature.inputs] == [
        ("in/x:0 float32 Nx6", 2), ("class int32 Nx1", 2), ("unread bool N", 2)
    ]  # fmt: skip
    example = {i.parameter: torch.from_numpy(strange_feed(2)[i.name]) for i in signature.inputs}
    fast = rarefy.compile(net, example if by_keyword else tuple(example.values()))
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for model in (fast, through_a_folder(fast, tmp_path / "fast")):
        compare(session, model, strange_feed(4))
    with pytest.raises(DataError, match=r"unknown input 'in_x_0'; choose from class, in/x:0, unread"):
        fast.run(None, {**strange_feed(2), "in_x_0": strange_feed(2)["in/x:0"]})
    with pytest.raises(DataError, match="class: expected int32 .* got int64"):
        fast.run(None, {**strange_feed(2), "class": np.zeros((2, 1), np.int64)})


@pytest.mark.parametrize("opset", [14, slow_case("dynamo")])
def test_an_encoder(tmp_path, opset):
    _, path, words = bert(tmp_path, opset)
    net = rarefy.from_onnx(path)
    assert [i.num_values for i in get_signature(net).inputs] == [64, 2]  # the rows of its embedding
    fast = through_a_folder(rarefy.compile(net, words), tmp_path / "fast")
    feed = {n: t.numpy() for n, t in words.items()}
    fast.skip_padding = False
    compare(ort.InferenceSession(path, providers=["CPUExecutionProvider"]), fast, feed)


def test_a_pruned_model_keeps_the_names(tmp_path):
    import copy

    net = rarefy.from_onnx(strange_file(tmp_path / "net.onnx"))
    example = tuple(torch.from_numpy(a) for a in strange_feed(2).values())
    rarefy.prune_(net, sparsity=0.5, ignore=None)
    for model in (net, copy.deepcopy(net)):
        fast = rarefy.compile(model, example)
        assert fast.input_names == ["in/x:0", "class", "unread"] and fast.output_names == ["Best:0", "2nd out"]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "shape"), [("ch_PP-OCRv4_det_infer", (1, 3, 64, 96)), ("ch_ppocr_mobile_v2.0_cls_infer", (1, 3, 48, 192))]
)
def test_trained_files_of_an_ocr_system(name, shape, tmp_path):
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package rapidocr-onnxruntime")
    path, x = Path(spec.submodule_search_locations[0]) / "models" / f"{name}.onnx", torch.rand(shape)
    fast = through_a_folder(rarefy.compile(rarefy.from_onnx(path, example=x), x), tmp_path / "fast")
    compare(ort.InferenceSession(path, providers=["CPUExecutionProvider"]), fast, {"x": x.numpy()})
