"""Models written as ONNX: what is stored, what ONNX Runtime and OpenVINO make of it, open sizes, opsets, large files."""

from __future__ import annotations

import copy
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import nn

import rarefy
import zoo
from conftest import tiny_bert
from helpers.marks import slow_case
from helpers.onnx_files import apart, run, run_all
from rarefy.common.errors import ContainerError, DataError, ModelError
from rarefy.onnx import export
from rarefy.onnx.integer_layers import use_integer_operators_
from rarefy.onnx.runtimes import session_of

STATIC, DYNAMIC = {"activations": "int8-static"}, {"activations": "int8"}


def picture_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 9, 10),
    ).eval()  # fmt: skip


class Fragile(nn.Module):
    """Rounds values that lie between two codes: a rounding error changes the outputs by a fifth."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 64), factor

    def forward(self, x):
        return self.layer(x).mul(3e5).round().remainder(8) * self.factor


def operators(path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


def fused(path, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime makes of a file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "fused.onnx")
    ort.InferenceSession(str(Path(path)), options, providers=["CPUExecutionProvider"])
    return operators(folder / "fused.onnx")


def float_matrices(path) -> list[list[int]]:
    """Sizes of stored fp32 tensors with more than one dimension that is not 1."""
    stored = onnx.load(path).graph.initializer
    return [list(i.dims) for i in stored if i.data_type == TensorProto.FLOAT and sum(n > 1 for n in i.dims) > 1]


def norm_apart(got, want) -> float:
    return float((got - want).norm() / want.norm())


# Quantized layers


@pytest.mark.parametrize("group", [None, "tensor"])
def test_static_activations_fuse_to_integer_operators(group, tmp_path):
    net, data = picture_net(), [torch.randn(16, 3, 8, 8)]
    rarefy.quantize_(net, "int8", group=group, layers=["Conv2d", "Linear"], data=data, **STATIC)
    state = copy.deepcopy(net.state_dict())
    path = rarefy.export_onnx(net, data[0][:4], tmp_path / "net.onnx").path
    kinds = operators(path)
    assert kinds["QuantizeLinear"] == 3 and kinds["DequantizeLinear"] == 9  # inputs, weights, biases
    assert not float_matrices(path)
    kinds = fused(path, tmp_path)
    assert kinds["QLinearConv"] == 2 and kinds["QGemm"] == 1 and not kinds["Conv"]
    for n in (1, 4, 9):  # batches stay open
        x = torch.randn(n, 3, 8, 8)
        assert norm_apart(run(path, {"input": x}), net(x).detach()) < 0.02
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_dynamic_activations_fuse_to_integer_operators(tmp_path):
    net, x = picture_net(), torch.randn(4, 3, 8, 8)
    rarefy.quantize_(net, "int8", layers=["Conv2d", "Linear"], **DYNAMIC)
    path = rarefy.export_onnx(net, x, tmp_path / "net.onnx").path
    kinds = operators(path)
    assert kinds["DynamicQuantizeLinear"] == 3 and kinds["ConvInteger"] == 2 and kinds["MatMulInteger"] == 1
    assert not kinds["Conv"] and not float_matrices(path)
    assert fused(path, tmp_path)["DynamicQuantizeMatMul"] == 1
    assert norm_apart(run(path, {"input": x}), net(x).detach()) < 0.03


def in_steps(x: torch.Tensor) -> torch.Tensor:
    """x as DynamicQuantizeLinear rounds it."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=(1, 2), groups=2), (2, 4, 12, 13)),
        slow_case(nn.Conv2d(4, 6, (3, 5), padding="same", bias=False), (2, 4, 9, 8)),
        slow_case(nn.Conv2d(4, 6, 3, padding="valid"), (4, 9, 8)),
        slow_case(nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
        slow_case(nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
        (nn.Linear(8, 5, bias=False), (2, 3, 8)),
    ],
    ids=lambda p: p if isinstance(p, tuple) else type(p).__name__,
)
def test_each_layer_with_dynamic_activations(layer, shape, tmp_path):
    net, x = nn.Sequential(layer).eval(), torch.randn(shape)
    rarefy.quantize_(net, "int8", **DYNAMIC)
    path = rarefy.export_onnx(net, x, tmp_path / "net.onnx", dynamic={}).path
    plain = rarefy.fold_(copy.deepcopy(net))
    plain[0]._forward_pre_hooks.clear()  # its own rounding
    (got,) = session_of(path).run(None, {"input": x.numpy()})  # exact sums, on CPUs without VNNI too
    with torch.no_grad():
        assert apart(got, plain(in_steps(x))) < 1e-5
    assert not float_matrices(path)


def test_weights_alone_and_scales_of_blocks(tmp_path):
    net, x = picture_net(), torch.randn(2, 3, 8, 8)
    rarefy.prune_(net, sparsity=0.5)
    rarefy.quantize_(net, "int4", group=4, symmetric=False, layers="Linear")
    rarefy.quantize_(net, "int8", layers="Conv2d", ignore="0")
    path = rarefy.export_onnx(net, x, tmp_path / "net.onnx").path
    assert operators(path)["DequantizeLinear"] == 2 and float_matrices(path) == [[8, 3, 3, 3]]
    torch.testing.assert_close(run(path, {"input": x}), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_codebooks_and_low_rank_layers(tmp_path):
    net, x = picture_net(), torch.randn(2, 3, 8, 8)
    rarefy.factorize_(net, rank=4, layers="Linear")
    rarefy.share_(net, 3, layers="Conv2d")
    path = rarefy.export_onnx(net, x, tmp_path / "net.onnx").path
    torch.testing.assert_close(run(path, {"input": x}), net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, slow_case(False)])
def test_embeddings_keep_their_codes(symmetric, tmp_path):
    net, ids = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8)).eval(), torch.randint(0, 50, (2, 5))
    rarefy.quantize_(net, "int8", symmetric=symmetric, layers=["Embedding", "Linear"])
    path = rarefy.export_onnx(net, ids, tmp_path / "net.onnx").path
    assert not float_matrices(path) and operators(path)["Gather"] >= 2
    assert apart(run(path, {"input": ids}), net(ids).detach()) < 1e-5


@pytest.mark.slow
def test_weights_that_are_read_without_a_call_of_their_layer(tmp_path):
    net, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
    rarefy.quantize_(net, "int8")
    path = rarefy.export_onnx(net, (x, x, x), tmp_path / "net.onnx").path
    assert not float_matrices(path)
    got = run_all(path, dict.fromkeys(("query", "key", "value"), x))
    assert apart(got[0], net(x, x, x)[0].detach()) < 1e-5


@pytest.mark.slow
def test_a_file_that_is_read_and_written_again(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 8)
    rarefy.quantize_(net, "int8", data=[x], **STATIC)
    first = rarefy.from_onnx(rarefy.export_onnx(net, x, tmp_path / "first.onnx"))
    again = rarefy.export_onnx(first, x, tmp_path / "again.onnx")
    assert operators(again)["QuantizeLinear"] == 2 and fused(again, tmp_path)["QGemm"] == 2
    for part in ("input", "output"):
        names = [[v.name for v in getattr(onnx.load(f).graph, part)] for f in (tmp_path / "first.onnx", again)]
        assert names[0] == names[1]
    assert norm_apart(run(again.path, {"input": x}), net(x).detach()) < 0.02


class Named(nn.Module):
    """A dict of outputs, one of which has an input's name, another one the name of a value inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.a(x)
        return {"x": h + 1, "x_output": h, "linear": self.b(h.relu())}


def test_outputs_have_the_names_of_fields(tmp_path):
    net, x = Named().eval(), torch.randn(3, 8)
    path = rarefy.export_onnx(net, x, tmp_path / "net.onnx").path
    assert [o.name for o in onnx.load(path).graph.output] == ["x_output", "x_output_output", "linear"]
    got = run_all(path, {"x": x})
    assert all(apart(a, b.detach()) < 1e-5 for a, b in zip(got, net(x).values(), strict=True))
    plain = rarefy.export_onnx(net.a, x, tmp_path / "plain.onnx").path
    assert [o.name for o in onnx.load(plain).graph.output] == ["output_0"]


def test_an_example_that_is_a_part_of_a_larger_tensor(tmp_path):
    """torch.export writes its strides as sizes, which files do not have."""
    net, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(3, 9)[:, :8]

    class Rows(nn.Module):
        def forward(self, x):
            return net(x.reshape(-1, 8)).view(x.shape[0], -1)

    path = rarefy.export_onnx(Rows().eval(), x, tmp_path / "net.onnx").path
    assert apart(run(path, {"x": x.contiguous()}), net(x).detach()) < 1e-5


def test_operators_are_for_exports_alone():
    net = nn.Sequential(nn.Linear(4, 2)).eval()
    rarefy.quantize_(net, "int8", **DYNAMIC)
    assert use_integer_operators_(rarefy.fold_(net)) == "dynamic"
    assert "forward" in net[0].__dict__


# Transformers


@pytest.mark.parametrize("options", [slow_case({}), DYNAMIC, slow_case(STATIC)], ids=str)
def test_an_encoder_with_open_batch_and_length(options, tmp_path):
    model = zoo.lively(tiny_bert())
    words = {"input_ids": torch.randint(5, 60, (1, 7)), "attention_mask": torch.ones(1, 7, dtype=torch.int64)}
    rarefy.quantize_(model, "int8", data=[words] if options is STATIC else None, layers="encoder.*", **options)
    report = rarefy.export_onnx(model, words, tmp_path / "bert.onnx")
    dims = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in onnx.load(report).graph.input}
    assert dims == {name: ["batch", "length"] for name in words}
    labels = [r["inputs"] for r in report.rows if r["runtime"] == "ONNX Runtime"]
    assert labels == ["the example", "batch = 2", "length = 14"]
    if find_spec("openvino") is not None:
        assert sum(r["runtime"] == "OpenVINO" for r in report.rows) == 3 and not report.notes
    other = {"input_ids": torch.randint(5, 60, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    with torch.no_grad():
        want = model(**other)[0]
    assert norm_apart(run(report.path, other), want) < (0.05 if options else 1e-5)
    stored = [s for s in float_matrices(report) if s[0] != 64 and s[0] != 2]  # tables, and the pooler
    assert stored == [[32, 32]]
    kinds = fused(report, tmp_path)
    assert options is not DYNAMIC or kinds["DynamicQuantizeMatMul"] + kinds["MatMulIntegerToFloat"] == 12


@pytest.mark.slow
def test_transposed_and_tied_weights(tmp_path):
    make, x = zoo.transformers_cases()["gpt2"]
    model = make()
    rarefy.quantize_(model, "int8", **DYNAMIC)
    report = rarefy.export_onnx(model, x, tmp_path / "net.onnx")
    assert operators(report)["MatMulInteger"] >= 8
    assert max(r["difference"] for r in report.rows) < 0.1


# Open sizes


class Flat(nn.Module):
    """A batch of two, which the code fixes."""

    def forward(self, x):
        return x.reshape(2, 3) + 1


@pytest.mark.slow
def test_sizes_of_images_by_name(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    axes = {"input": {0: "batch", 2: "height", 3: "width"}}
    report = rarefy.export_onnx(net, torch.randn(1, 3, 16, 16), tmp_path / "net.onnx", dynamic=axes)
    dims = onnx.load(report).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 3, "height", "width"]
    assert report.summary["open sizes"] == "input[0] batch, input[2] height, input[3] width"
    x = torch.randn(3, 3, 21, 34)
    assert apart(run(report.path, {"input": x}), net(x).detach()) < 1e-5


def test_no_open_sizes(tmp_path):
    report = rarefy.export_onnx(nn.Linear(4, 2).eval(), torch.randn(3, 4), tmp_path / "net.onnx", dynamic={})
    assert report.summary["open sizes"] == "none" and [
        r["inputs"] for r in report.rows if r["runtime"] == "ONNX Runtime"
    ] == ["the example"]


@pytest.mark.slow
def test_a_size_that_the_model_fixes(tmp_path):
    x = torch.randn(2, 3)
    report = rarefy.export_onnx(Flat().eval(), x, tmp_path / "net.onnx")
    assert report.notes == ("the model's code fixes dimension 0 of x (batch) at 2",)
    with pytest.raises(
        ModelError, match=r"the code of Flat fixes dimension 0 of x \(batch\) at 2: leave it out of dynamic="
    ):
        rarefy.export_onnx(Flat().eval(), x, tmp_path / "other.onnx", dynamic={"x": {0: "batch"}})
    assert os.listdir(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize(
    ("dynamic", "says"),
    [
        ({"y": {0: "batch"}}, "dynamic: unknown input 'y'; choose from args_0, args_1"),
        ({"args_0": {2: "batch"}}, "args_0 has dimensions 0 to 1"),
        ({"args_0": {0: "my batch"}}, "a name is made of letters, digits and _, got {0: 'my batch'}"),
        ({"args_0": {0: "n"}, "args_1": {0: "n"}}, "dynamic: 'n' is 2 in args_0 and 3 in args_1: give different sizes"),
        ({"args_0": ["batch"]}, "dynamic: expected {input: {dimension: name}}"),
        (["batch"], "dynamic: expected {input: {dimension: name}}"),
    ],
)
def test_wrong_names_of_sizes(dynamic, says, tmp_path):
    class Sums(nn.Module):
        def forward(self, *args):
            return args[0].sum(0) + args[1].sum(0)

    with pytest.raises(ModelError) as error:
        rarefy.export_onnx(Sums(), (torch.ones(2, 4), torch.ones(3, 4)), tmp_path / "net.onnx", dynamic=dynamic)
    assert says in str(error.value)


def test_one_tensor_as_two_inputs(tmp_path):
    class Difference(nn.Module):
        def forward(self, p, q):
            return p - 2 * q

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    path = rarefy.export_onnx(Difference().eval(), (x, x), tmp_path / "net.onnx").path
    torch.testing.assert_close(run(path, {"p": x, "q": y}), x - 2 * y)


# Opsets


@pytest.mark.parametrize("opset", [slow_case(13), 17, slow_case(21)])
def test_opsets(opset, tmp_path):
    net, x = picture_net(), torch.randn(4, 3, 8, 8)
    rarefy.quantize_(net, "int8", layers=["Conv2d", "Linear"], data=[x], **STATIC)
    report = rarefy.export_onnx(net, x, tmp_path / "net.onnx", opset=opset)
    assert [o.version for o in onnx.load(report).opset_import if o.domain == ""] == [opset] == [report.summary["opset"]]
    assert norm_apart(run(report.path, {"input": x}), net(x).detach()) < 0.02
    assert not float_matrices(report)


@pytest.mark.parametrize("opset", [12, 24, "18", 18.0, True])
def test_opsets_that_are_not_written(opset, tmp_path):
    with pytest.raises(ModelError, match="opset: expected a whole number from 13 to 23, got"):
        rarefy.export_onnx(nn.Linear(2, 2).eval(), torch.ones(1, 2), tmp_path / "net.onnx", opset=opset)


def test_an_opset_that_a_model_cannot_have(tmp_path):
    with pytest.raises(ModelError, match=r"opset: the model cannot be converted to 13 \(.*\): give 18 or more"):
        rarefy.export_onnx(nn.LayerNorm(4).eval(), torch.randn(2, 4), tmp_path / "net.onnx", opset=13)
    assert not os.listdir(tmp_path)


# Files


def test_weights_beside_the_file(tmp_path):
    net, x = picture_net(), torch.randn(2, 3, 8, 8)
    target = tmp_path / "new" / "net.onnx"
    report = rarefy.export_onnx(net, x, target, external_data=True)
    assert sorted(os.listdir(target.parent)) == ["net.onnx", "net.onnx.data"] and os.listdir(tmp_path) == ["new"]
    stored = onnx.load(target, load_external_data=False).graph.initializer
    places = {e.value for i in stored for e in i.external_data if e.key == "location"}
    assert places == {"net.onnx.data"} and report.summary["bytes"] == sum(
        f.stat().st_size for f in target.parent.iterdir()
    )
    with torch.no_grad():
        assert apart(rarefy.from_onnx(report)(x), net(x)) < 1e-5
    with pytest.raises(ContainerError, match=r"cannot write .*nowhere/net.onnx: the folder .*nowhere does not exist"):
        rarefy.export_onnx(nn.Linear(4, 2).eval(), torch.randn(3, 4), tmp_path / "nowhere" / "net.onnx")
    with pytest.raises(ContainerError, match=r"net.onnx exists: pass overwrite=True"):
        rarefy.export_onnx(net, x, target, external_data=True)
    with torch.no_grad():
        net[5].bias += 1
    rarefy.export_onnx(net, x, target, external_data=True, overwrite=True)
    assert apart(run(target, {"input": x}), net(x).detach()) < 1e-5
    (target.parent / "notes.txt").write_text("mine")
    with pytest.raises(
        ContainerError, match=r"holds other files \(notes.txt\): external data needs a folder of its own"
    ):
        rarefy.export_onnx(net, x, target, external_data=True, overwrite=True)
    assert (target.parent / "notes.txt").read_text() == "mine"


def test_large_models_are_split(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "MAX_FILE", 1000)  # in place of 1.5 GB
    net, x = picture_net(), torch.randn(2, 3, 8, 8)
    rarefy.export_onnx(net, x, tmp_path / "new" / "net.onnx")
    assert (tmp_path / "new" / "net.onnx.data").stat().st_size > 1000
    with pytest.raises(ModelError, match="bytes of weights are too many for one file: leave out external_data=False"):
        rarefy.export_onnx(net, x, tmp_path / "net.onnx", external_data=False)
    with pytest.raises(ContainerError, match=r"holds other files \(new\)"):
        rarefy.export_onnx(net, x, tmp_path / "net.onnx")


@pytest.mark.parametrize("external_data", [True, False])
def test_a_file_with_other_outputs_is_not_written(external_data, tmp_path):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + (1.0 if torch.compiler.is_exporting() else 0.0)

    with pytest.raises(
        ModelError, match=r"outputs of the exported model in ONNX Runtime with the example differ from torch's by"
    ):
        path = tmp_path / "new" / "net.onnx" if external_data else tmp_path / "net.onnx"
        rarefy.export_onnx(Noisy().eval(), torch.ones(2, 3), path, external_data=external_data)
    assert not os.listdir(tmp_path)


def test_unverified_files_and_the_report(tmp_path):
    net, x = picture_net(), torch.randn(2, 3, 8, 8)
    report = rarefy.export_onnx(net, x, str(tmp_path / "net.onnx"), verify=False)
    assert not report.rows and os.fspath(report) == str(tmp_path / "net.onnx")
    assert str(report).startswith(f"wrote {tmp_path}/net.onnx\nopset: 18\nbytes: ")
    assert report.to_dict()["summary"]["open sizes"] == "input[0] batch"
    text = (tmp_path / "net.onnx").read_bytes()
    assert b"stack_trace" not in text and os.getcwd().encode() not in text


@pytest.mark.parametrize(
    "how", ["exists", "folder", "no folder", "impossible", "wrong input", "half", "list", "flag", "no module"]
)
def test_what_cannot_be_exported(how, tmp_path):
    net, x, path = picture_net(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx"
    if how == "exists":
        path.write_text("mine")
        with pytest.raises(ContainerError, match=r"net.onnx exists: pass overwrite=True"):
            rarefy.export_onnx(net, x, path)
        assert path.read_text() == "mine"
        rarefy.export_onnx(net, x, path, overwrite=True)
        assert path.stat().st_size > 1000
        return
    if how == "folder":
        with pytest.raises(ContainerError, match="exists"):
            rarefy.export_onnx(net, x, tmp_path, overwrite=True)
    elif how == "no folder":
        with pytest.raises(ContainerError, match=r"cannot write .*net.onnx"):
            rarefy.export_onnx(net, x, tmp_path / "no" / "net.onnx")
    elif how == "impossible":

        class Branches(nn.Module):
            def forward(self, x):
                return x if float(x.sum()) > 0 else -x

        with pytest.raises(ModelError, match="torch cannot export this Branches to ONNX"):
            rarefy.export_onnx(Branches(), x, path)
    elif how == "half":
        with pytest.raises(ModelError, match="is float16: cast to fp32 first"):
            rarefy.export_onnx(net.half(), x.half(), path)
    elif how == "list":
        with pytest.raises(
            ModelError, match="example: expected a tensor, a tuple of tensors or a dict of tensors; it holds int"
        ):
            rarefy.export_onnx(net, (x, 3), path)
    elif how == "flag":
        with pytest.raises(ModelError, match="external_data: expected True, False or None, got 'yes'"):
            rarefy.export_onnx(net, x, path, external_data="yes")
    elif how == "no module":
        with pytest.raises(ModelError, match="expected a torch.nn.Module as model, got function"):
            rarefy.export_onnx(F.relu, x, path)
    else:
        with pytest.raises(DataError, match="Sequential cannot be called with an example of float32 2x5x8x8"):
            rarefy.export_onnx(net, torch.randn(2, 5, 8, 8), path)
    assert not path.exists()


# Calibrated outputs


class Residual(nn.Module):
    """Two residual blocks; the second one with a convolution beside it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
        self.beside, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.convs[1](self.convs[0](x).relu())).relu()
        x = (self.beside(x) + self.convs[3](self.convs[2](x).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
def test_outputs_of_residual_blocks_are_rounded_on_request(tmp_path):
    torch.manual_seed(0)
    net, data = Residual().eval(), [torch.randn(8, 3, 12, 12) for _ in range(2)]
    rarefy.quantize_(net, "int8", layers=["Conv2d", "Linear"], data=data, **STATIC)
    plain = rarefy.export_onnx(net, data[0], tmp_path / "plain.onnx")
    assert sum(fused(plain, tmp_path)[k] for k in ("Conv", "FusedConv")) > 0
    report = rarefy.export_onnx(net, data[0], tmp_path / "net.onnx", calibrate=data)
    kinds = fused(report, tmp_path)
    assert kinds["QLinearConv"] == 6 and kinds["QLinearAdd"] == 2 and not kinds["Conv"] + kinds["FusedConv"]
    assert report.notes[0].startswith("outputs of ") and not report.notes[1:]
    assert norm_apart(run(report.path, {"x": data[1]}), net(data[1]).detach()) < 0.05
    onnx.checker.check_model(str(report.path), full_check=True)


@pytest.mark.slow
def test_calibration_that_cannot_be(tmp_path):
    net, x, path = Residual().eval(), torch.randn(2, 3, 12, 12), tmp_path / "net.onnx"
    with pytest.raises(ModelError, match="calibrate= has no effect: no layer has static activations"):
        rarefy.export_onnx(net, x, path, calibrate=[x])
    rarefy.quantize_(net, "int8", layers=["Conv2d", "Linear"], data=[x], **STATIC)
    for batches, error, says in (
        ([], DataError, "calibrate: there is no batch"),
        ([x[:, :2]], DataError, "calibrate: ONNX Runtime cannot run batch 0"),
        ([x, x * torch.nan], DataError, "calibrate: batch 1 has NaN or infinity"),
        (x, DataError, "calibrate: expected an iterable of batches"),
    ):
        with pytest.raises(error, match=says):
            rarefy.export_onnx(net, x, path, calibrate=batches)
    assert not os.listdir(tmp_path)


def test_rounding_errors_that_the_model_itself_magnifies_are_excused():
    """Outputs that differ as much as rounding errors move the model's own are no error of the file."""
    from rarefy.onnx import runtimes

    file, feeds, wanted = Path("x.onnx"), {"x": torch.ones(1)}, [torch.ones(4)]
    call = [("the example", feeds, wanted)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "onnx_runtime", lambda path: lambda feeds: [1.3 * wanted[0]])
        patch.setattr(runtimes, "find_spec", lambda name: None)
        rows, notes = runtimes.compare_with_runtimes(file, call, "static", lambda label: 0.2)
        assert rows[0]["difference"] == pytest.approx(0.3, abs=1e-6) and "judge it on data" in notes[0]
        for quantized, noise in (("static", 0.1), ("", 0.2)):
            with pytest.raises(ModelError, match="verify=False writes it unseen"):
                runtimes.compare_with_runtimes(file, call, quantized, lambda label, n=noise: n)


def test_a_quantized_model_between_two_codes_is_exported_with_a_note(tmp_path):
    """All activations lie exactly between two codes, so that each kind of sum rounds them to another side."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False)).eval(), torch.randn(4, 64)
    rarefy.quantize_(net, "int8", data=[x], **STATIC)
    outputs = net(x)
    noise = export._noise(net, export.example_call(net, x), [("the example", {"input": x}, [outputs])], "the example")
    assert 0 <= noise < 0.05
    fragile = Fragile()
    call = export.example_call(fragile, x[:, :4].contiguous())
    wanted = [fragile(call.inputs["x"])]
    assert export._noise(fragile, call, [("the example", call.inputs, wanted)], "the example") > 0.1


def test_files_hold_names_of_modules_but_no_other_notes_of_the_exporter(tmp_path):
    net = nn.Sequential(picture_net(), nn.Linear(10, 4)).eval()
    path = rarefy.export_onnx(net, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx").path
    model = onnx.load(path)
    assert {p.key for n in model.graph.node for p in n.metadata_props} == {"pkg.torch.onnx.name_scopes"}
    weights = sum(len(i.SerializeToString()) for i in model.graph.initializer)
    assert path.stat().st_size < weights + 8000
    assert "0.0.weight" in rarefy.from_onnx(path).state_dict()
