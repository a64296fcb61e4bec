"""Quantized models in the layouts of others, read back by those others: compressed-tensors, ONNX Runtime, torch.export."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, tiny_llama
from rarefy.checkpoint.compressed_tensors import pack_int32
from rarefy.common.errors import ContainerError, ModelError

# compressed-tensors


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "way",
    [
        {"weights": "int8"}, {"weights": "int4", "group": 16}, {"weights": "int3"}, {"weights": "int5", "group": "tensor"},
        {"weights": "int8", "activations": "int8"},
    ],
    ids=str,
)  # fmt: skip
def test_transformers_loads_what_compressed_tensors_describes(way, tie, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie=tie).eval()
    rarefy.quantize_(model, **way)
    rarefy.save(model, tmp_path / "ours")
    rarefy.export(tmp_path / "ours", tmp_path / "theirs", to="compressed-tensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        got, want = again(ids).logits, model(ids).logits
    apart = float((got - want).abs().max() / want.abs().max())
    assert apart == 0 if "activations" not in way else apart < 0.02  # they round inputs in 255 steps, not 254


def test_layers_quantized_in_different_ways(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(torch.bfloat16).eval()
    rarefy.prune_(model, "2:4", layers="*.mlp.*")
    rarefy.quantize_(model, "int4", group=32, layers="*.mlp.*")
    rarefy.quantize_(model, "int8", layers="*.self_attn.*", ignore="*.o_proj")
    rarefy.save(model, tmp_path / "ours")
    rarefy.export(tmp_path / "ours", tmp_path / "theirs", to="compressed-tensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_theirs(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 1 << bits, (5, 70))
    theirs = pack_to_int32((codes - (1 << (bits - 1))).to(torch.int8), bits)
    assert torch.equal(pack_int32(codes, bits), theirs)


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda m: None, "no layer is quantized: call quantize_ first"),
        (lambda m: rarefy.share_(m, 3, layers="*.mlp.*"), "has no layout for a codebook"),
        (lambda m: rarefy.quantize_(m, "int4", symmetric=False), "asymmetric codes that transformers would load"),
        (
            lambda m: rarefy.quantize_(m, "int8", layers="Embedding"),
            "has no layout for a Embedding|weight that is shared",
        ),
    ],
)
def test_what_that_layout_has_no_word_for(do, says, tmp_path):
    model = tiny_llama()
    do(model)
    rarefy.save(model, tmp_path / "ours")
    with pytest.raises(ModelError, match=says):
        rarefy.export(tmp_path / "ours", tmp_path / "theirs", to="compressed-tensors")
    assert not (tmp_path / "theirs").exists()


# ONNX


def run(path, *inputs):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI its sums of bytes overflow
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)}
    return torch.from_numpy(session.run(None, given)[0])


def kinds(path):
    import onnx

    return [n.op_type for n in onnx.load(path).graph.node]


def stored_in_bytes(path):
    """How many numbers of a file are bytes."""
    import onnx

    return sum(math.prod(i.dims) for i in onnx.load(path).graph.initializer if i.data_type == onnx.TensorProto.INT8)


def picture_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 9, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("activations", "group"), [(None, None), ("int8-static", None), ("int8-static", "tensor")])
def test_onnx_runtime_returns_the_same(activations, group, tmp_path):
    torch.manual_seed(0)
    net, data = picture_net(), [torch.randn(16, 3, 8, 8)]
    options = {"activations": activations, "data": data} if activations else {}
    rarefy.quantize_(net, "int8", group=group, layers=["Conv2d", "Linear"], **options)
    state = copy.deepcopy(net.state_dict())
    path = rarefy.export_onnx(net, data[0][:4], tmp_path / "net.onnx")
    found = kinds(path)
    assert found.count("DequantizeLinear") == 3 + (3 if activations else 0)
    assert found.count("QuantizeLinear") == (3 if activations else 0)
    for n in (1, 4, 9):  # batches stay open
        x = torch.randn(n, 3, 8, 8)
        got, want = run(path, x), net(x).detach()
        assert float((got - want).norm() / want.norm()) < (0.02 if activations else 1e-5)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert stored_in_bytes(path) >= sum(m.weight.numel() for m in (net[0], net[2], net[5]))


def test_one_tensor_as_two_inputs(tmp_path):
    class Difference(nn.Module):
        def forward(self, p, q):
            return p - 2 * q

    onnxruntime = pytest.importorskip("onnxruntime")
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    session = onnxruntime.InferenceSession(str(rarefy.export_onnx(Difference().eval(), (x, x), tmp_path / "net.onnx")))
    (got,) = session.run(None, {"p": x.numpy(), "q": y.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), x - 2 * y)


def test_other_grids_and_masks_become_plain_numbers(tmp_path):
    net = picture_net()
    rarefy.prune_(net, sparsity=0.5)
    rarefy.quantize_(net, "int4", symmetric=False)
    x = torch.randn(2, 3, 8, 8)
    path = rarefy.export_onnx(net, x, tmp_path / "net.onnx")
    assert "DequantizeLinear" not in kinds(path)
    torch.testing.assert_close(run(path, x), net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["exists", "folder", "dynamic", "impossible", "wrong input"])
def test_what_cannot_be_exported_to_onnx(how, tmp_path):
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
        return
    if how == "dynamic":
        rarefy.quantize_(net, "int8", activations="int8")
        with pytest.raises(ModelError, match="0 quantizes its inputs row by row, for which ONNX has no operator"):
            rarefy.export_onnx(net, x, path)
    elif how == "impossible":

        class Branches(nn.Module):
            def forward(self, x):
                return x if float(x.sum()) > 0 else -x

        with pytest.raises(ModelError, match="torch cannot export this Branches to ONNX"):
            rarefy.export_onnx(Branches(), x, path)
    else:
        with pytest.raises(ModelError, match="torch cannot export this Sequential to ONNX"):
            rarefy.export_onnx(net, torch.randn(2, 5, 8, 8), path)
    assert not path.exists()


# torch.export


def test_quantized_models_export_and_compile():
    net = Net().eval()
    rarefy.quantize_(net, "int8", activations="int8-static", data=[torch.randn(8, 3, 12, 12)])
    x = torch.randn(2, 3, 12, 12)
    want = net(x).detach()
    program = torch.export.export(rarefy.fold_(copy.deepcopy(net)), (x,))
    torch.testing.assert_close(program.module()(x), want)
    live = torch.export.export(net, (x,))
    torch.testing.assert_close(live.module()(x), want)


def linear(width=64, out=64):
    return nn.Sequential(nn.Linear(width, out))


def test_encoders_export_and_tied_blocks_are_refused(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertModel(config)
    rarefy.quantize_(model, "int8")
    rarefy.save(model, tmp_path / "bert")
    rarefy.export(tmp_path / "bert", tmp_path / "theirs", to="compressed-tensors")
    assert (tmp_path / "theirs/model.safetensors").is_file()
    tied = tiny_llama()
    rarefy.tie_layers_(tied, 2)
    rarefy.save(tied, tmp_path / "tied")
    for to in ("hf", "compressed-tensors"):
        with pytest.raises(ContainerError, match="blocks share their weights, which LlamaForCausalLM does not support"):
            rarefy.export(tmp_path / "tied", tmp_path / to, to=to)


def test_half_precision_models_are_refused_for_onnx(tmp_path):
    net = linear().half()
    rarefy.quantize_(net, "int8")
    with pytest.raises(ModelError, match="is float16: cast to fp32 first"):
        rarefy.export_onnx(net, torch.randn(2, 64).half(), tmp_path / "net.onnx")
