"""Decoders whose weights are read, packed and released one at a time equal those of models in memory."""

import json
import subprocess
import sys

import pytest
import torch

import rarefy
from checkpoint.test_gguf_export import IDS, build, eager, far
from helpers.marks import slow_case
from rarefy.checkpoint.streamed_decoder import streamed_weights
from rarefy.common.errors import ContainerError, ModelError
from rarefy.formats import held_files
from rarefy.model import hf

TEXT = torch.tensor([IDS])


def folder(tmp_path, model, **options):
    model.save_pretrained(tmp_path / "model", **options)
    return tmp_path / "model"


def logits(step):
    return step(TEXT)[0].float().numpy()


@pytest.mark.parametrize("tie", [slow_case(False), True])
def test_fp32_and_a_folder_of_shards(tie, tmp_path):
    model = build("Llama", tie_word_embeddings=tie)
    path = folder(tmp_path, model, max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").is_file()
    assert far(logits(rarefy.decoder_from_files(path)), eager(model)) < 1e-5


@pytest.mark.slow
def test_fused_weights_in_8_bits(tmp_path):
    model = build("Phi3")
    streamed = rarefy.decoder_from_files(folder(tmp_path, model), precision="int8")
    assert far(logits(streamed), eager(model)) < 5e-2
    rarefy.save(streamed, tmp_path / "saved")
    assert torch.equal(rarefy.load(tmp_path / "saved")(TEXT), streamed(TEXT))


@pytest.mark.slow
def test_bf16_is_that_of_the_files(tmp_path):
    path = folder(tmp_path, build("Qwen2").bfloat16())
    assert torch.equal(rarefy.decoder_from_files(path)(TEXT), rarefy.decoder(hf.load_folder(path))(TEXT))


@pytest.mark.parametrize("kind", [slow_case("int4"), "int5", slow_case("int6")])
def test_few_bits_are_those_of_quantize(kind, tmp_path):
    model = build("Llama")
    streamed = rarefy.decoder_from_files(folder(tmp_path, model), precision=kind)
    rarefy.quantize_(model, kind, group=32, symmetric=kind != "int4", layers="model.layers.*")
    rarefy.fold_(model)
    assert far(logits(streamed), eager(model)) < 5e-2
    assert kind in {k.held[0].kind for k in streamed.compiled.kernels.values()}


@pytest.mark.parametrize("kind", ["int5", slow_case("int6")])
def test_quantized_folders_keep_5_and_6_bits(kind, tmp_path):
    model = build("Llama")
    rarefy.quantize_(model, kind, group=32, layers="model.layers.*")
    rarefy.save(model, tmp_path / "saved")
    rarefy.fold_(model)
    streamed = rarefy.decoder_from_files(tmp_path / "saved", precision="int8", out=tmp_path / "out")
    assert kind in {k.held[0].kind for k in streamed.compiled.kernels.values()}
    assert far(logits(streamed), eager(model)) < 5e-2
    assert torch.equal(rarefy.load(tmp_path / "out")(TEXT), streamed(TEXT))


@pytest.mark.slow
def test_quantized_and_cut_folders_of_rarefy(tmp_path):
    model = build("Llama")
    example = {"input_ids": TEXT, "use_cache": False}
    rarefy.cut_(model, example, ("neuron", "head"), counts={"model.layers.0.mlp.gate_proj.weight:0": 32})
    rarefy.quantize_(model, "int4", group=32, layers="model.layers.*")
    rarefy.save(model, tmp_path / "saved")
    rarefy.fold_(model)
    assert far(logits(rarefy.decoder_from_files(tmp_path / "saved", precision="int8")), eager(model)) < 5e-2


def test_gguf_files(tmp_path):
    model = build("Gemma", head_dim=32)
    file = rarefy.export(model, tmp_path / "m.gguf", to="gguf", type="q4_0")
    assert far(logits(rarefy.decoder_from_files(file)), eager(rarefy.from_gguf(file))) < 5e-2


@pytest.mark.slow
def test_pieces_of_rows(tmp_path, monkeypatch):
    from rarefy.checkpoint import streamed_decoder

    path = folder(tmp_path, build("Llama"))
    whole = logits(rarefy.decoder_from_files(path, precision="int4"))
    monkeypatch.setattr(streamed_decoder, "PIECE", 64 * 64)
    assert (logits(rarefy.decoder_from_files(path, precision="int4")) == whole).all()


def test_wrong_use(tmp_path):
    with pytest.raises(
        ModelError, match="is no folder of a model \\(no config.json or rarefy.json\\), and no .gguf file"
    ):
        rarefy.decoder_from_files(tmp_path)
    with pytest.raises(ModelError, match="no file or folder '.*none.gguf'"):
        rarefy.decoder_from_files(tmp_path / "none.gguf")
    model = build("Llama")
    path = folder(tmp_path, model)
    with pytest.raises(ModelError, match="unknown precision 'int3'; choose from bf16, fp32, int4, int5, int6, int8"):
        rarefy.decoder_from_files(path, precision="int3")
    state = {n: t for n, t in model.state_dict().items() if n != "model.layers.1.mlp.up_proj.weight"}
    model.save_pretrained(path, state_dict=state)
    with pytest.raises(ModelError, match="has no tensor 'model.layers.1.mlp.up_proj.weight' \\(1 are missing\\)"):
        rarefy.decoder_from_files(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ContainerError, match="expected weight_map as names of files"):
        rarefy.decoder_from_files(path)
    (path / "model.safetensors.index.json").unlink()
    (path / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ContainerError, match="not a valid safetensors file"):
        rarefy.decoder_from_files(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="is quantized by another tool"):
        rarefy.decoder_from_files(path)


BUILD = """
import sys, rarefy, torch
from rarefy.evaluation.profiling import peak_rss
torch.set_num_threads(1)
step = rarefy.decoder_from_files(sys.argv[1], precision="int8")
print(peak_rss() - step.compiled.weight_bytes())
"""


@pytest.mark.slow
def test_memory_is_that_of_the_packed_weights_and_a_constant(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=32000, num_key_value_heads=4, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").bfloat16()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
    model.save_pretrained(tmp_path, max_shard_size="500MB")
    del model
    ran = subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 1.5e9


def test_hashes_of_a_folder_are_checked_when_its_weights_are_read(tmp_path, monkeypatch):
    model = build("Llama")
    rarefy.save(model, tmp_path / "saved")
    rarefy.save(rarefy.decoder(model), tmp_path / "decoder")
    monkeypatch.setattr(held_files, "sha256_of", lambda file: "0" * 64)  # as if each file had changed
    assert streamed_weights(tmp_path / "decoder") is None  # it is left to `load`, which checks them
    with pytest.raises(ContainerError, match="weights-00001.safetensors"):
        rarefy.decoder_from_files(tmp_path / "saved", precision="int8")
