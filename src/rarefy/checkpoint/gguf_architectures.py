"""How models of transformers and GGUF files correspond: names of tensors, sizes in the metadata, orders of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError
from rarefy.common.extras import install


@dataclass(frozen=True)
class Architecture:
    """An architecture that both transformers and GGUF know.

    Attributes:
        model_type: of the config of transformers.
        name: `general.architecture` of the file.
        model_class: of transformers.
        activation: of the feed-forward layers; GGUF has no key for it.
        uneven: the GGUF architecture whose layers may have different sizes, if there is one.
        pairs: whether the rows of queries and keys are ordered in pairs: first row of the first half of a head, first
            row of its second half, and so on.
        norm_offset: what is added to the weights of norms in the file.
        always_tied: whether the file has no output head, because it is always the embedding.
        scaled_by: the config value whose square root divides the scores of attention, where it is not the head size.
    """

    model_type: str
    name: str
    model_class: str
    activation: str = "silu"
    uneven: str | None = None
    pairs: bool = False
    norm_offset: float = 0.0
    always_tied: bool = False
    scaled_by: str | None = None


GELU = "gelu_pytorch_tanh"
GEMMA: dict[str, Any] = {"activation": GELU, "norm_offset": 1.0}
ARCHITECTURES = (  # of those with one name, files are read as the first
    Architecture("llama", "llama", "LlamaForCausalLM", uneven="deci", pairs=True),
    Architecture("mistral", "llama", "MistralForCausalLM", uneven="deci", pairs=True),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
    Architecture("gemma", "gemma", "GemmaForCausalLM", **GEMMA, always_tied=True),
    Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", **GEMMA, always_tied=True, scaled_by="query_pre_attn_scalar"),
    Architecture("gemma3_text", "gemma3", "Gemma3ForCausalLM", **GEMMA, scaled_by="query_pre_attn_scalar"),
    Architecture("phi3", "phi3", "Phi3ForCausalLM"),
)
KEYS = {  # the key after the architecture's name -> value of the config
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "vocab_size": "vocab_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
WINDOWED = ("gemma2", "gemma3_text", "phi3")  # whose windows llama.cpp applies
ROPE_TYPES = ("default", "linear", "llama3")


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a config; ModelError if GGUF files of it are not written."""
    known = {a.model_type: a for a in ARCHITECTURES}
    if config.model_type not in known:
        raise ModelError(f"GGUF files are written of {', '.join(known)} models, not of {config.model_type}")
    return known[config.model_type]


def gguf() -> Any:
    """Return the module gguf; ModelError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError(f"GGUF files need the package gguf: {install('hf')}") from None
    return gguf


def tensor_names(name: str, num_layers: int, tensors: Iterable[str]) -> dict[str, str]:
    """Return {name in transformers: name in the file} of tensors for an architecture; ModelError if one has none."""
    package = gguf()
    by_name = {v: k for k, v in package.MODEL_ARCH_NAMES.items()}
    table = package.get_tensor_name_map(by_name[name], num_layers)
    names: dict[str, str] = {}
    for tensor in tensors:
        module, _, leaf = tensor.rpartition(".")
        mapped = table.get_name(module)
        if mapped is None:
            raise ModelError(f"{tensor} has no name in GGUF files of architecture {name}")
        names[tensor] = f"{mapped}.{leaf}"
    return names


def rope_of(config: Any) -> Mapping[str, Any]:
    """Return the rotary parameters of a config, for Gemma 3 those of layers without a window."""
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def check_config(config: Any, architecture: Architecture) -> None:
    """Raise ModelError if a config has a setting that GGUF files, or llama.cpp, do not have."""
    rope = rope_of(config)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    problems = []
    if rope["rope_type"] not in ROPE_TYPES:
        problems.append(f"rope_type {rope['rope_type']!r}; supported: {', '.join(ROPE_TYPES)}")
    if activation != architecture.activation:
        problems.append(f"activation {activation!r}; supported: {architecture.activation!r}")
    if architecture.always_tied and not config.tie_word_embeddings:
        problems.append("an output head that is not the embedding")
    if getattr(config, "use_sliding_window", False):
        problems.append("use_sliding_window")
    if getattr(config, "use_bidirectional_attention", None):
        problems.append("use_bidirectional_attention")
    scaled_by = getattr(config, architecture.scaled_by) if architecture.scaled_by else head_size(config)
    if scaled_by != head_size(config):
        problems.append(f"{architecture.scaled_by} {scaled_by}; supported: the head size, {head_size(config)}")
    if problems:
        raise ModelError(f"GGUF files of {config.model_type} cannot express {problems[0]}")


def head_size(config: Any) -> int:
    """Return the features of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pair_rows(t: Tensor, head: int) -> Tensor:
    """Return rows of queries or keys [heads x head, ..] in the file's order: halves of a head alternate.

    >>> pair_rows(torch.arange(4), 4).tolist()
    [0, 2, 1, 3]
    """
    return t.reshape(-1, 2, head // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def unpair_rows(t: Tensor, head: int) -> Tensor:
    """Return rows in the order of transformers: the inverse of `pair_rows`."""
    return t.reshape(-1, head // 2, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def is_paired(architecture: Architecture, name: str) -> bool:
    """Return whether the rows of a tensor of a file are in pairs."""
    return architecture.pairs and (".attn_q." in name or ".attn_k." in name)


def is_norm(name: str) -> bool:
    """Return whether a tensor of a file is the weight of a norm."""
    return name.endswith("norm.weight")


def llama3_factors(rope: Mapping[str, Any], head: int) -> Tensor:
    """Return what the frequencies of Llama 3's scaled positions are divided by, [head / 2] (transformers,
    modeling_rope_utils)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2).double() / head)
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = torch.where(wavelengths > context / low, rope["factor"], between)
    return torch.where(wavelengths < context / high, 1.0, factors).float()
