"""Quantized models in the layouts of others, read back by those others: compressed-tensors, torch.export."""

from __future__ import annotations

import copy
import json

import pytest
import torch

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
    stored = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert stored["format"] == ("int-quantized" if "activations" in way else "pack-quantized")  # as vLLM wants it


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
