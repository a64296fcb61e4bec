"""Solvers work unchanged on randomly made tiny models of the families of transformers."""

import pytest
import torch

import rarefy
from rarefy.model.layers import select_layers
from rarefy.model.moe import is_experts, observing_experts

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8}


def tokens():
    return [{"input_ids": torch.randint(2, 64, (3, 12))} for _ in range(3)]


def images():
    return [{"pixel_values": torch.randn(3, 3, 16, 16)} for _ in range(3)]


def clip():
    text = {**SMALL, **SPECIAL, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config={**VISION, **IMAGE}, projection_dim=16)
    return transformers.CLIPModel(config), [a | b for a, b in zip(tokens(), images())]


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=20, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[], **SPECIAL,
    )  # fmt: skip
    data = [{"input_features": torch.randn(2, 8, 40), "decoder_input_ids": b["input_ids"][:2]} for b in tokens()]
    return transformers.WhisperForConditionalGeneration(config), data


def causal(name, **settings):
    def make():
        config = getattr(transformers, f"{name}Config")(**settings)
        suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        return getattr(transformers, f"{name}{suffix}")(config), tokens()

    return make


def encoder():
    return transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=64)), tokens()


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**VISION, **IMAGE)), images()


FAMILIES = {
    "gpt2": causal("GPT2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL),
    "opt": causal("OPT", vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                  max_position_embeddings=64, word_embed_proj_dim=32, **SPECIAL),
    "llama": causal("Llama", **GQA, **SPECIAL),
    "qwen2": causal("Qwen2", **{k: v for k, v in GQA.items() if k != "head_dim"}, **SPECIAL),
    "qwen3": causal("Qwen3", **GQA, **SPECIAL),
    "gemma": causal("Gemma", **GQA, **SPECIAL),
    "gemma2": causal("Gemma2", **GQA, **SPECIAL, sliding_window=8),
    "phi": causal("Phi", **{k: v for k, v in GQA.items() if k != "head_dim"}, **SPECIAL),
    "mistral": causal("Mistral", **GQA, **SPECIAL, sliding_window=8),
    "mixtral": causal("Mixtral", **GQA, **SPECIAL, num_local_experts=4),
    "qwen3-moe": causal("Qwen3Moe", **GQA, **SPECIAL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "bert": encoder,
    "vit": vit,
    "clip": clip,
    "whisper": whisper,
}  # fmt: skip


# a pooler that nothing calls, and images with three channels, of which 2:4 keeps two
IGNORE = {"bert": "*pooler*", "vit": ["*pooler*", "Conv2d"], "clip": "Conv2d"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    model, data = FAMILIES[family]()
    model.eval()
    solver = rarefy.Solver(name="admm", steps=4, asymmetric=0.25)
    report = rarefy.prune_(model, "2:4", solver=solver, data=data, ignore=IGNORE.get(family))
    assert report.summary["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert len(report.rows) >= 8 and all(r["error"] < 1 for r in report.rows)
    with torch.no_grad():
        out = model(**data[0])
    first = out.logits if hasattr(out, "logits") else out[0]
    assert torch.isfinite(first).all()


def test_reconstruction_of_two_towers():
    model, data = FAMILIES["clip"]()
    model.eval()
    solver = rarefy.Solver(name="obs", reconstruct=1)
    rarefy.prune_(model, sparsity=0.5, solver=solver, data=data, layers=["*encoder.layers*"])
    zeros = [float((l.weight == 0).float().mean()) for l in select_layers(model, "*encoder.layers*")]
    assert zeros == pytest.approx([0.5] * len(zeros), abs=0.01)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_one_by_one_are_the_experts(family):
    """Watched experts give the outputs of transformers' own forward, and each sees its own tokens."""
    model = (FAMILIES.get(family) or gpt_oss)()[0].eval()
    module = next(m for m in model.modules() if is_experts(m))
    x, index, share = torch.randn(20, 32), torch.randint(0, 4, (20, 2)), torch.rand(20, 2)
    index[:, 1] = (index[:, 0] + 1) % 4
    seen = {}
    with torch.no_grad():
        want = module(x, index, share)
        with observing_experts(module, lambda name, rows, out: seen.setdefault((name, out is None), (rows, out))):
            got = module(x, index, share)
    torch.testing.assert_close(got, want)
    assert "forward" not in module.__dict__
    for e, rows in enumerate(seen["gate_up_proj", True][0]):
        torch.testing.assert_close(rows, x[(index == e).any(1)])


def gpt_oss():
    config = transformers.GptOssConfig(**GQA, **SPECIAL, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config), tokens()


@pytest.mark.parametrize("solver", ["obs", "admm", "refit"])
def test_experts_without_tokens_are_named_and_left(solver):
    model, _ = FAMILIES["mixtral"]()
    model.eval()
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.detach().clone()
    data = [{"input_ids": torch.full((2, 12), 7)}]  # one token everywhere goes to the same two of four experts
    report = rarefy.prune_(model, sparsity=0.5, solver=solver, data=data, layers="model.layers.0.mlp.experts.*")
    start = "experts that saw no token were pruned by magnitude, without moving weights: model.layers.0.mlp.experts.gate_up_proj ["
    assert report.notes[0].startswith(start)
    idle = [int(n) for n in report.notes[0].partition("[")[2].partition("]")[0].split(", ")]
    assert len(idle) == 2
    mask, weight = rarefy.masks(model)["model.layers.0.mlp.experts.gate_up_proj"], experts.gate_up_proj.detach()
    for e in range(4):
        assert float(mask[e].float().mean()) == pytest.approx(0.5, abs=1e-3)
        if e in idle:
            torch.testing.assert_close(weight[e][mask[e]], before[e][mask[e]], rtol=1e-4, atol=1e-6)
        else:
            assert (weight[e][mask[e]] - before[e][mask[e]]).abs().max() > 1e-3


@pytest.mark.parametrize("score", ["wanda", "activation", "taylor", "ria"])
def test_scores_of_experts(score):
    model, data = FAMILIES["mixtral"]()
    batches = [b | {"labels": b["input_ids"]} for b in data]
    rarefy.prune_(model.eval(), sparsity=0.5, score=score, data=batches)
    for layer in select_layers(model, "*experts*"):
        assert float((layer.weight == 0).float().mean()) > 0.1


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_experts_are_stored_small_and_come_back(pattern, tmp_path):
    model, data = FAMILIES["mixtral"]()
    rarefy.prune_(model.eval(), pattern, sparsity=None if pattern == "2:4" else 0.5, layers="*experts*")
    rarefy.save(model, tmp_path / "m")
    again = rarefy.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(**data[0]).logits, model(**data[0]).logits)
    rows = {r["tensor"]: r for r in rarefy.inspect(tmp_path / "m").rows}
    row = rows["model.layers.0.mlp.experts.down_proj"]
    assert row["sparsity"] == pytest.approx(0.5) and row["bytes"] < 0.7 * row["dense_bytes"]
    assert row["pattern"] == pattern
