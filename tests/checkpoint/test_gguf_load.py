"""GGUF files that Rarefy reads; llama.cpp and the package gguf are the oracles."""

import numpy as np
import pytest
import torch

import rarefy
from checkpoint.test_gguf_export import EXAMPLE, IDS, MODELS, TEXTS, UNEVEN, build, byte_tokenizer, eager, far, splits
from conftest import sample
from helpers import llama_cpp
from helpers.marks import slow_except
from rarefy.checkpoint import gguf_tokenizer
from rarefy.common.errors import ContainerError, ModelError
from rarefy.data import builtin
from rarefy.formats import gguf_blocks
from rarefy.runtime import bindings
from rarefy.runtime.packing import unpack

gguf = pytest.importorskip("gguf")


def write(tmp_path, model, kind="f32", **options):
    return rarefy.export(model, tmp_path / "m.gguf", to="gguf", type=kind, **options)


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back(name, tmp_path):
    model = MODELS[name]()
    back = rarefy.from_gguf(write(tmp_path, model))
    assert type(back).__name__ == type(model).__name__.replace("Mistral", "Llama")
    assert far(eager(back), eager(model)) < (1e-6 if "llama 3" not in name else 1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_types(kind, tmp_path):
    """Random bytes are valid blocks but for their scales: dequantized as gguf does it, in llama.cpp's order of rows."""
    from rarefy.formats import gguf_file

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    if kind in ("F32", "F16", "BF16"):
        data = gguf.quants.quantize(np.random.default_rng(0).standard_normal((8, 512), np.float32), number)
    else:
        data = np.random.default_rng(0).integers(0, 256, (8, 512 // block * size), np.uint8)
        for start in {"Q6_K": [208]}.get(kind, [0, 2] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]):
            data.reshape(-1, size)[:, start : start + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=number)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    file = gguf_file.read(tmp_path / "m.gguf")
    assert file.tensors["w"].shape == (8, 512) and file.tensors["w"].kind == kind
    assert np.array_equal(file.tensor("w").float().numpy(), gguf.quants.dequantize(data, number))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_codes_are_those_of_the_file(kind, tmp_path):
    file = write(tmp_path, build("Llama", intermediate_size=128), kind)
    model = rarefy.from_gguf(file)
    again = rarefy.export(model, tmp_path / "again.gguf", to="gguf", type=kind)
    assert again.read_bytes() == file.read_bytes()  # the same codes and scales
    layer = model.model.layers[0].self_attn.q_proj
    assert rarefy.model.quant_grid.recorded_grids(layer)["weight"].contains(layer.weight)
    rarefy.save(model, tmp_path / "saved")
    assert far(eager(rarefy.load(tmp_path / "saved")), eager(model)) < 1e-6


def test_a_gemma_2_file_decodes_with_its_caps(tmp_path):
    model = MODELS["gemma 2"]()
    step = rarefy.decoder_from_files(write(tmp_path, model))
    assert model.config.attn_logit_softcapping and model.config.final_logit_softcapping
    assert far(step(torch.tensor([IDS]))[0].numpy(), eager(model)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind, precision, limit", [("bf16", None, 2e-2), ("q8_0", None, 1e-3), ("q4_0", "int8", 5e-2)])
def test_decoders_of_files(kind, precision, limit, tmp_path):
    file = write(tmp_path, build("Llama"), kind)
    model = rarefy.from_gguf(file)
    step = rarefy.decoder(model, precision=precision)
    assert far(step(torch.tensor([IDS]))[0].numpy(), eager(model)) < limit
    assert far(step(torch.tensor([IDS]))[0].numpy(), llama_cpp.logits(file, IDS)) < limit + 3e-2  # it rounds inputs


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("kind", slow_except(["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K"], "Q4_0", "Q5_K"))
def test_decoders_keep_the_bits_of_files(kind, isa, tmp_path):
    """Files that llama.cpp has rounded: the codes stay, scales and minimums lose less than a sixth of a step."""
    model = build("Llama", hidden_size=256, intermediate_size=512, num_key_value_heads=1)
    file = llama_cpp.quantized(write(tmp_path, model), tmp_path / "q.gguf", kind)
    dense, step = rarefy.from_gguf(file), rarefy.decoder_from_files(file)
    held = {layer: k.held[0] for node, k in step.compiled.kernels.items() if (layer := layer_of(step, node))}
    assert {p.kind for p in held.values()} == {f"int{kind[1]}"} and len(held) == 3 * 7 + 1
    for name, packed in held.items():
        layer = dense.get_submodule(name)
        weight, layer.weight.data = layer.weight.detach(), unpack(packed)
        steps = packed.scales.float().amax() * (8 if packed.zero_bits else 1)
        assert (unpack(packed) - weight).abs().max() < 0.15 * steps
    ids = torch.randint(3, 96, (13, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = dense(ids, use_cache=False).logits.numpy()
    for rows in (1, 13):
        cache = step.cache(rows, 40)
        pieces = [step(ids[:rows, a:b], cache) for a, b in ((0, 33), *((i, i + 1) for i in range(33, 40)))]
        assert far(torch.cat(pieces, 1).numpy(), want[:rows]) < 0.03
    rarefy.save(step, tmp_path / "saved")
    loaded = rarefy.load(tmp_path / "saved")
    assert torch.equal(loaded(ids), step(ids))
    assert torch.equal(loaded.generate(ids[:1], max_new_tokens=9), step.generate(ids[:1], max_new_tokens=9))


def layer_of(step, node):
    return step.compiled.exported.layers.get(node, "") if node.target.__name__ == "linear" else ""


def grid_of_q4_1(weights):
    """Return the grid of one block of Q4_1."""
    blocks = gguf.quants.quantize(np.asarray(weights, np.float32)[None], gguf.GGMLQuantizationType.Q4_1)
    return gguf_blocks.to_grid("Q4_1", torch.from_numpy(blocks))


def test_minimums_that_kernels_do_not_hold():
    """Groups that are positive, or far from zero, are read in 8 bits; equal weights are their minimum."""
    assert grid_of_q4_1(np.linspace(-1, 1, 32)).fits and grid_of_q4_1(np.linspace(0, 1, 32)).fits
    assert grid_of_q4_1(np.linspace(1, 2, 32)) is None and grid_of_q4_1(np.linspace(-9, -8.9, 32)) is None
    equal = grid_of_q4_1(np.full(32, -0.5))
    scale, zero = equal.eighths()
    assert equal.codes(torch.full((1, 32), -0.5)).eq(0).all() and float(-scale * zero) == -0.5
    blocks = gguf.quants.quantize(np.linspace(-1, 1, 32, dtype=np.float32)[None], gguf.GGMLQuantizationType.Q4_1)
    blocks[0, :2] = np.frombuffer(np.float16(-0.1).tobytes(), np.uint8)
    assert gguf_blocks.to_grid("Q4_1", torch.from_numpy(blocks)) is None


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_tokenizers_come_back(name, tmp_path):
    tokenizer = byte_tokenizer(splits()[name])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = write(tmp_path, build("Llama", vocab_size=512), "f16", tokenizer=tokenizer)
    back = gguf_tokenizer.load(file)
    assert back(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"] == llama_cpp.tokenize(file, TEXTS)
    assert back.chat_template == tokenizer.chat_template and back.eos_token == tokenizer.eos_token
    assert set(gguf_tokenizer.files(file)) >= {"tokenizer.json", "tokenizer_config.json"}


def test_a_file_without_tokenizer(tmp_path):
    file = write(tmp_path, build("Llama"))
    assert gguf_tokenizer.load(file) is None and gguf_tokenizer.files(file) == {}


def test_layers_of_different_sizes_are_refused(tmp_path):
    model = MODELS["llama"]()
    rarefy.cut_(model, EXAMPLE, ("neuron", "head"), counts=UNEVEN)
    with pytest.raises(ModelError, match="the architecture 'deci'; supported are gemma, gemma2, gemma3, llama, phi3"):
        rarefy.from_gguf(write(tmp_path, model))


def test_wrong_files(tmp_path):
    file = tmp_path / "m.gguf"
    with pytest.raises(ContainerError, match="m.gguf cannot be read: No such file"):
        rarefy.from_gguf(file)
    file.write_bytes(b"")
    with pytest.raises(ContainerError, match="cannot be read as a GGUF file"):
        rarefy.from_gguf(file)
    file.write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ContainerError, match="is no GGUF file that can be read: it does not begin with GGUF"):
        rarefy.from_gguf(file)
    write(tmp_path, build("Llama"), overwrite=True)
    file.write_bytes(file.read_bytes()[:-1000])
    for read in (rarefy.from_gguf, rarefy.inspect):
        with pytest.raises(ContainerError, match="is not within the file's"):
            read(file)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_tensors_are_listed(kind, tmp_path, run):
    file = write(tmp_path, build("Llama"), kind)
    rows = {r["tensor"]: r for r in rarefy.inspect(file).rows}
    read = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert {n: r["bytes"] for n, r in rows.items()} == {n: t.n_bytes for n, t in read.items()}
    assert rows["blk.0.ffn_up.weight"]["format"] == ("dense" if kind == "f16" else "Q8_0")
    file.write_bytes(b"no model")
    ran = run("inspect", file)
    assert ran.code == 2 and "is no GGUF file that can be read: it does not begin with GGUF" in ran.err


def rewrite(file, key=None, value=None, drop=None, add=()):
    """Write a file again with a key changed, a tensor left out, or tensors added."""
    reader, other = gguf.GGUFReader(file), file.with_name("changed.gguf")
    fields = {n: (f.contents(), f.types[0], f.types[-1]) for n, f in reader.fields.items() if "GGUF." not in n}
    writer = gguf.GGUFWriter(other, fields.pop("general.architecture")[0])
    for name, (content, kind, item) in fields.items():
        if name != key:
            writer.add_key_value(name, content, kind, item)
    if value is not None:
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ](key, value)
    for t in reader.tensors:
        if t.name != drop:
            writer.add_tensor(t.name, t.data)
    for name, data in add:
        writer.add_tensor(name, data)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return other


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": "llama.block_count", "value": 4}, "states 4 layers of width 64, but has the tensors of 3 layers"),
        ({"key": "llama.embedding_length", "value": 32}, "of width 32, but .* an embedding of width 64"),
        ({"key": "llama.block_count", "value": 2000}, "llama.block_count: expected a whole number from 1 to 1,024"),
        ({"key": "llama.block_count"}, "llama.block_count: expected a whole number from 1 to 1,024, got None"),
        ({"key": "llama.rope.freq_base", "value": float("nan")}, "llama.rope.freq_base: expected a number from 1 to"),
        ({"key": "llama.rope.scaling.type", "value": "yarn"}, "rope.scaling.type 'yarn' is not supported"),
        ({"key": "llama.feed_forward_length", "value": [96, 96, 48]}, "layers have different sizes"),
        ({"key": "llama.feed_forward_length", "value": 48}, "blk.0.ffn_gate.weight has the shape \\[96, 64\\], expected"),
        ({"key": "llama.attention.value_length", "value": 8}, "heads of values must have an even size, that of the keys"),
        ({"drop": "blk.1.ffn_up.weight"}, "has no tensor 'blk.1.ffn_up.weight', which a llama model needs"),
        ({"add": [("blk.0.extra.weight", np.ones(4, np.float32))]}, "has the tensor 'blk.0.extra.weight', which is not"),
        ({"add": [("rope_freqs.weight", np.full(8, 3, np.float32))]}, "factors that no known setting of Llama 3 gives"),
        ({"add": [("rope_freqs.weight", np.full(8, np.nan, np.float32))]}, "rope_freqs.weight has NaN or infinite"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(change, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        rarefy.from_gguf(rewrite(write(tmp_path, build("Llama")), **change))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("tokens", ["a"] * 512, "tokens must be different texts of at most 1024 characters"),
        ("token_type", [1, 2], "token_type must be a list of 512 numbers"),
        ("merges", ["a b c"], "merges must be pairs of texts"),
        ("eos_token_id", 9999, "eos_token_id must be one of 512 tokens, got 9999"),
        ("model", "rwkv", "the tokenizer cannot be built: Cannot build a tokenizer"),
    ],
)
def test_tokenizers_that_do_not_fit(key, value, message, tmp_path):
    file = write(tmp_path, build("Llama", vocab_size=512), tokenizer=byte_tokenizer(splits()["gpt-2"]))
    with pytest.raises(ModelError, match=message):
        gguf_tokenizer.load(rewrite(file, f"tokenizer.ggml.{key}", value))


@pytest.mark.slow
def test_commands(tmp_path, run):
    tokenizer = byte_tokenizer(splits()["qwen2"])
    file = write(tmp_path, build("Llama", vocab_size=512), "q8_0", tokenizer=tokenizer)
    ran = run("generate", file, "--prompt", "Hello world", "--max-new-tokens", 4, "--json")
    assert ran.code == 0, ran.err
    step = rarefy.decoder(rarefy.from_gguf(file))
    ids = tokenizer("Hello world", return_tensors="pt")["input_ids"]
    want = rarefy.generate(step, ids, max_new_tokens=4)[0, ids.shape[1] :].tolist()
    assert str(want[0]) in ran.out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_same_text_as_llama_cpp(kind, tmp_path):
    sample("smollm2-135m")
    file = rarefy.export(builtin.model_folder("smollm2-135m"), tmp_path / "m.gguf", to="gguf", type=kind)
    ids = gguf_tokenizer.load(file)("The capital of France is", return_tensors="pt")["input_ids"]
    step = rarefy.decoder(rarefy.from_gguf(file))
    step.eos_tokens = ()
    engine = llama_cpp.open_file(file)
    want = engine.decode(ids[0].tolist(), 64)[1]
    engine.close()
    assert rarefy.generate(step, ids, max_new_tokens=64)[0, ids.shape[1] :].tolist() == want
