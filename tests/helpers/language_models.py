"""Small language models of several families, and ways to call them."""

import torch
import transformers

import rarefy

V = 101


COMMON = {"vocab_size": V, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}


COMMON |= {"max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 2}


GATED = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}


GPT = {
    "vocab_size": V,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


TOKENS = {"vocab_size": V, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}


FAMILIES = {
    "Llama": GATED,
    "Mistral": {**GATED, "sliding_window": 9},
    "Qwen2": GATED,
    "Qwen3": {**GATED, "head_dim": 32},
    "Gemma": {**GATED, "head_dim": 16},
    "Gemma2": {
        **GATED,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 9,
        "attn_logit_softcapping": 0.05,
    },
    "Gemma3Text": {
        **GATED,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Phi3": GATED,
    "Olmo2": GATED,
    "GPT2": {**GPT, "pad_token_id": 0},
    "GPTNeoX": {**COMMON, "intermediate_size": 96},
    "OPT": {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "Bloom": {**TOKENS, "hidden_size": 96, "n_layer": 2, "n_head": 6},
    "Mpt": {**TOKENS, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
}


def small(family="Llama", seed=0, **more):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def far(want, got):
    return float((want - got).norm() / want.norm())


def eager(model, ids, mask=None):
    with torch.no_grad():
        if mask is None:
            return model(input_ids=ids, use_cache=False).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def in_pieces(made, ids, sizes, mask=None):
    cache = made.cache(len(ids), ids.shape[1], mask)
    return torch.cat([made(piece, cache) for piece in ids.split(sizes, 1)], 1)


def pruned_to(model, sparsity):
    rarefy.prune_(model, "unstructured", "magnitude", sparsity, layers="model.layers.*")
    rarefy.fold_(model)
    return model
