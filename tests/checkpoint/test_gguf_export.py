"""GGUF files that Rarefy writes, read by llama.cpp."""

import json

import numpy as np
import pytest
import torch

import rarefy
from conftest import sample, tiny_llama
from helpers import llama_cpp
from rarefy.common.errors import ContainerError, ModelError
from rarefy.data import builtin
from rarefy.evaluation.metrics import perplexity
from rarefy.model import hf

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = [3, 17, 5, 80, 41, 9, 77, 12, 60, 3, 3, 28, 90, 11, 7, 2, 55, 31]


def build(name: str, **more):
    """Return a random model of a config class whose norms and biases have values of their own."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p) if p.dim() == 1 else torch.randn_like(p) / p.shape[1] ** 0.5)
    return model


MODELS = {
    "llama": lambda: build("Llama"),
    "llama, biases": lambda: build("Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama 3": lambda: build("Llama", rope_parameters=LLAMA3, head_dim=32),
    "llama, linear": lambda: build("Llama", rope_parameters={**LLAMA3, "rope_type": "linear", "factor": 2.0}),
    "mistral": lambda: build("Mistral", sliding_window=64),
    "qwen 2": lambda: build("Qwen2"),
    "qwen 3": lambda: build("Qwen3", head_dim=32),
    "gemma": lambda: build("Gemma", head_dim=32),
    "gemma 2": lambda: build("Gemma2", head_dim=32, query_pre_attn_scalar=32, sliding_window=8),
    "gemma 3": lambda: build("Gemma3Text", head_dim=32, query_pre_attn_scalar=32, sliding_window=8, num_hidden_layers=7),
    "phi 3": lambda: build("Phi3"),
}  # fmt: skip


def eager(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0].float().numpy()


def far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_logits(name, tmp_path):
    model = MODELS[name]()
    file = rarefy.export(model, tmp_path / "m.gguf", to="gguf", type="f32")
    assert far(llama_cpp.logits(file, IDS), eager(model)) < 2e-3


@pytest.mark.parametrize("kind, limit", [("f16", 3e-3), ("bf16", 2e-2), ("q8_0", 2e-2), ("q4_0", 0.4), ("q4_1", 0.4)])
def test_types(kind, limit, tmp_path):
    model = MODELS["qwen 2"]()
    file = rarefy.export(model, tmp_path / "m.gguf", to="gguf", type=kind)
    assert far(llama_cpp.logits(file, IDS), eager(model)) < limit


@pytest.mark.parametrize(
    "kind, how",
    [
        ("Q8_0", {"weights": "int8"}),
        ("Q8_0", {"weights": "int8", "group": 32}),
        ("Q4_0", {"weights": "int4", "group": 32}),
        ("Q4_0", {"weights": "int3", "group": 64}),
        ("Q4_1", {"weights": "int4", "group": 32, "symmetric": False}),
        ("F16", {"weights": "int6", "group": 64, "symmetric": False}),
    ],
)
def test_quantized_layers_keep_their_codes(kind, how, tmp_path):
    import gguf

    model = build("Llama", intermediate_size=128)
    rarefy.quantize_(model, layers="model.layers.*", **how)
    file = rarefy.export(model, tmp_path / "m.gguf", to="gguf")
    rarefy.fold_(model)
    for t in gguf.GGUFReader(file).tensors:
        if t.name == "blk.1.ffn_down.weight":
            assert t.tensor_type.name == kind
            want = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
            got = gguf.dequantize(t.data, t.tensor_type)
            assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()  # scales are rounded to fp16, codes are not
    assert far(llama_cpp.logits(file, IDS), eager(model)) < 2e-2  # llama.cpp rounds inputs to 8 bits


def test_zeros_stay_zeros(tmp_path):
    model = MODELS["llama"]()
    rarefy.prune_(model, "2:4", layers="model.layers.*")
    rarefy.quantize_(model, "int4", group=32, layers="model.layers.*")
    file = rarefy.export(model, tmp_path / "m.gguf", to="gguf")
    import gguf

    down = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_down.weight")
    assert (gguf.dequantize(down.data, down.tensor_type) == 0).mean() >= 0.5


EXAMPLE = {"input_ids": torch.tensor([IDS]), "use_cache": False}
UNEVEN = {"model.layers.0.mlp.gate_proj.weight:0": 40, "model.layers.2.self_attn.q_proj.weight:0": 1}


def test_layers_of_different_sizes(tmp_path):
    model = MODELS["llama"]()
    rarefy.cut_(model, EXAMPLE, ("neuron", "head"), counts=UNEVEN)
    rarefy.save(model, tmp_path / "cut")
    file = rarefy.export(tmp_path / "cut", tmp_path / "m.gguf", to="gguf", type="f32")
    assert far(llama_cpp.logits(file, IDS), eager(model)) < 2e-3


def test_layers_of_equal_sizes_and_dropped_layers(tmp_path):
    model = MODELS["qwen 3"]()
    rarefy.cut_(model, EXAMPLE, ("neuron", "head"), 0.5, layers="model.layers.*")
    rarefy.drop_layers_(model, EXAMPLE, layers="model.layers.1")
    file = rarefy.export(model, tmp_path / "m.gguf", to="gguf", type="f32")
    assert far(llama_cpp.logits(file, IDS), eager(model)) < 2e-3


def cut_unevenly(model):
    rarefy.cut_(model, EXAMPLE, "neuron", counts={"model.layers.0.mlp.gate_proj.weight:0": 40})
    return model


def share_blocks(model):
    rarefy.tie_layers_(model, 3)
    return model


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: torch.nn.Linear(2, 2), "GGUF files hold language models of transformers, not a Linear"),
        (lambda: build("GPTNeoX"), "GGUF files are written of llama, .*, not of gpt_neox"),
        (lambda: cut_unevenly(build("Qwen2")), "layers have different sizes, which GGUF files of qwen2 cannot say"),
        (lambda: build("Llama", hidden_act="gelu"), "cannot express activation 'gelu'"),
        (lambda: build("Gemma", head_dim=32, tie_word_embeddings=False), "an output head that is not the embedding"),
        (lambda: build("Gemma2", head_dim=32), "query_pre_attn_scalar 256; supported: the head size, 32"),
        (lambda: build("Qwen2", use_sliding_window=True), "cannot express use_sliding_window"),
        (lambda: build("Llama", rope_parameters={**LLAMA3, "rope_type": "dynamic"}), "rope_type 'dynamic'"),
        (lambda: share_blocks(build("Llama")), "blocks share their weights"),
    ],
)
def test_models_that_gguf_cannot_hold(model, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        rarefy.export(model(), tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


def test_weights_that_a_type_cannot_hold(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match="blk.0.ffn_up.weight has weights that F16 cannot hold"):
        rarefy.export(model, tmp_path / "m.gguf", to="gguf", type="f16")
    assert not list(tmp_path.iterdir())


def test_wrong_use(tmp_path):
    model, file = tiny_llama(), tmp_path / "m.gguf"
    with pytest.raises(ContainerError, match="unknown type 'q5_k'; choose from bf16, f16, f32"):
        rarefy.export(model, file, to="gguf", type="q5_k")
    with pytest.raises(ContainerError, match="type= and tokenizer= are for to='gguf': to='hf' takes the path"):
        rarefy.export(model, file, to="hf")
    with pytest.raises(ContainerError, match="tokenizer= is for a model"):
        rarefy.export(tmp_path, file, to="gguf", tokenizer=object())
    with pytest.raises(ContainerError, match="exists: give the name of a file"):
        rarefy.export(model, tmp_path, to="gguf")
    rarefy.export(model, file, to="gguf")
    with pytest.raises(ContainerError, match="exists: pass overwrite=True"):
        rarefy.export(model, file, to="gguf")
    rarefy.export(model, file, to="gguf", overwrite=True)
    rarefy.save(rarefy.decoder(model), tmp_path / "decoder")
    with pytest.raises(ModelError, match="holds a decoder or compiled model: export what it was made from"):
        rarefy.export(tmp_path / "decoder", tmp_path / "n.gguf", to="gguf")


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello world! It's 12,345.67 kg, isn't it?",
    "  two blanks\n\n\tand a tab  ",
    "Größe, naïve café: 東京 und Москва 2024年",
    "x=1234567;\r\nfor(i=0;i<10;++i){a[i]+=b;}",
    "WE'LL go; they've DONE'T\u00a0\u3000 \U0001f600\U0001f680",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " ",
]


def byte_tokenizer(pre):
    """Return a byte-level BPE tokenizer that was trained on these texts, with a pre-tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    inner.train_from_iterator([*TEXTS, *[t * 2 for t in TEXTS]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_start|>")


def splits():
    from tokenizers import Regex, pre_tokenizers

    from rarefy.checkpoint import gguf_tokenizer

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(regex):
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), end])

    return {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": split(gguf_tokenizer.LLAMA3),
        "qwen2": split(gguf_tokenizer.QWEN2),
        "tekken": split(gguf_tokenizer.TEKKEN),
    }


def write_with(tokenizer, tmp_path):
    model = build("Llama", vocab_size=512)
    return rarefy.export(model, tmp_path / "m.gguf", to="gguf", tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_llama_cpp_reads_texts_with_the_same_tokens(name, tmp_path):
    tokenizer = byte_tokenizer(splits()[name])
    file = write_with(tokenizer, tmp_path)
    assert llama_cpp.tokenize(file, TEXTS) == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("space", ["first", "never"])
def test_tokenizers_of_characters(space, tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blanks = [normalizers.Replace(" ", "\u2581")]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581")] * (space == "first") + blanks)
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["the quick brown fox jumps", "over the lazy dogs and the foxes"] * 3, trainer)
    spec = json.loads(inner.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are no special tokens
    inner = Tokenizer.from_str(json.dumps(spec))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    file = write_with(tokenizer, tmp_path)
    texts = ["the fox jumps over dogs", "quick quick", "lazy 東 fox\n", "a</s>"]
    assert llama_cpp.tokenize(file, texts) == tokenizer(texts)["input_ids"]


def test_special_tokens_and_chat_template_are_written(tmp_path):
    import gguf

    tokenizer = byte_tokenizer(splits()["qwen2"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fields = gguf.GGUFReader(write_with(tokenizer, tmp_path)).fields
    value = {n: f.contents() for n, f in fields.items() if n.startswith("tokenizer.")}
    assert value["tokenizer.chat_template"] == tokenizer.chat_template
    assert value["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert value["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert value["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    assert value["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == 3


def test_tokenizers_that_gguf_cannot_hold(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(ModelError, match="a BPE model, not WordLevel"):
        write_with(words, tmp_path)
    with pytest.raises(ModelError, match="no known name in llama.cpp \\(Whitespace, bytes\\)"):
        steps = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        write_with(byte_tokenizer(pre_tokenizers.Sequence(steps)), tmp_path)
    with pytest.raises(ModelError, match="tokens, the model's embedding 64 rows"):
        rarefy.export(tiny_llama(), tmp_path / "m.gguf", to="gguf", tokenizer=byte_tokenizer(splits()["gpt-2"]))
    assert not list(tmp_path.iterdir())


# ---- SmolLM2 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    sample("smollm2-135m")
    folder = builtin.model_folder("smollm2-135m")
    return hf.load_folder(folder).float(), hf.load_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind, loss", [("f16", 0.005), ("q8_0", 0.01)])
def test_llama_cpp_writes_the_same_text(kind, loss, smollm2, tmp_path, run):
    import language

    model, tokenizer = smollm2
    file, ids = tmp_path / "m.gguf", tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    ran = run("export", "smollm2-135m", "--to", "gguf", "--type", kind, "-o", file)
    assert ran.code == 0 and f"{file.stat().st_size:,}" in ran.out
    engine = llama_cpp.open_file(file)
    want = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :]
    assert engine.decode(ids[0].tolist(), 64)[1] == want.tolist()
    text = language.windows()[:4]
    dense = perplexity(model, [{"input_ids": text}])
    assert abs(language.perplexity(engine, text) / dense - 1) < loss
    engine.close()
