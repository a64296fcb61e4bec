"""Language models of GGUF files: the model's config and weights, its tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.checkpoint import gguf_architectures as table
from rarefy.common.errors import ModelError
from rarefy.formats import gguf_blocks, gguf_file
from rarefy.model import hf
from rarefy.model.construction_limit import Stored
from rarefy.model.quant_grid import Grid, OffsetGrid, record_grid_

LAYER = re.compile(r"blk\.(\d{1,6})\.")
MAX_LAYERS, MAX_TOKENS = 1024, 1 << 30
IGNORED = ("rope_freqs.weight",)  # becomes a setting of the config
KNOWN_ROPE = (  # (factor, original context) of Llama 3's models, whose factors alone are in files
    (8.0, 8192),
    (32.0, 8192),
)


class GgufModel:
    """A GGUF file as a model of transformers without weights, and its weights by the model's names.

    Attributes:
        file: the open file.
        model: the model; its parameters are on the meta device.
        architecture: of the file.
        names: {name in transformers: name in the file}.
    """

    def __init__(self, path: str | Path):
        table.gguf()
        self.file = gguf_file.read(path)
        self.architecture = _architecture(self.file)
        config = _config(self.file, self.architecture)
        structure = {"config": config, "class": self.architecture.model_class, "dtype": str(self.dtype)[6:]}
        self.model: Any = hf.build(structure, Stored(len(self.file.tensors), self.file.path.stat().st_size), empty=True)
        self.head = table.head_size(self.model.config)
        self.names = self._names()
        _set_ends_(self.model, self.file.metadata)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's parameters: that of the matrices if all are floating point, else fp32."""
        kinds = {e.kind for e in self.file.tensors.values() if len(e.shape) > 1}
        return gguf_file.FLOATS[kinds.pop()] if len(kinds) == 1 and kinds <= set(gguf_file.FLOATS) else torch.float32

    @property
    def is_quantized(self) -> bool:
        """Return whether matrices are in other types than floating point."""
        return any(e.kind not in gguf_file.FLOATS for e in self.file.tensors.values())

    def weight(self, name: str) -> tuple[Tensor, Grid | OffsetGrid | None]:
        """Return a weight by its name in transformers, and the grid that it is on in the file."""
        stored = self.names[name]
        weight, kind = self.file.tensor(stored), self.file.tensors[stored].kind
        grid = gguf_blocks.to_grid(kind, self.file.blocks(stored)) if weight.dim() == 2 else None
        if table.is_norm(stored) and self.architecture.norm_offset:
            weight = weight.float() - self.architecture.norm_offset
        if table.is_paired(self.architecture, stored):
            weight = table.unpair_rows(weight, self.head)
            grid = None if grid is None else grid.map(lambda t: table.unpair_rows(t, self.head))
        return weight.to(self.dtype).contiguous(), grid

    def _names(self) -> dict[str, str]:
        """Return {name in transformers: name in the file}; ModelError unless the file has exactly those tensors."""
        path, tensors = self.file.path, self.file.tensors
        state = dict(self.model.state_dict())
        if self.model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        names = table.tensor_names(self.architecture.name, self.model.config.num_hidden_layers, state)
        for name, stored in names.items():
            if stored not in tensors:
                raise ModelError(f"{path} has no tensor {stored!r}, which a {self.architecture.name} model needs")
            if tensors[stored].shape != tuple(state[name].shape):
                shape = list(tensors[stored].shape)
                raise ModelError(f"{path}: {stored} has the shape {shape}, expected {list(state[name].shape)}")
        extra = sorted(set(tensors) - set(names.values()) - set(IGNORED))
        if extra:
            raise ModelError(
                f"{path} has the tensor {extra[0][:80]!r}, which is not supported in {self.architecture.name} models"
            )
        return names


def from_gguf(path: str | Path) -> nn.Module:
    """Return the language model of a GGUF file as a model of transformers.

    Weights have exactly the file's values. Those in Q8_0, Q5_0 and Q4_0 also keep their codes: `decoder`, `save` and
    `export` use them. `decoder_from_files` keeps those of Q4_1, Q5_1, Q4_K and Q5_K too.

    Args:
        path: a file of a llama-, qwen2-, qwen3-, gemma- or phi3-like architecture (Mistral's files are llama's), in
            F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K.

    Returns:
        The model in evaluation mode: in fp32, or in the file's type if all matrices are in F16 or BF16.

    Raises:
        ContainerError: the file is damaged, or has another type of tensor.
        ModelError: the architecture or a setting is not supported, or tensors do not fit the settings.

    Cost: the model in fp32. `rarefy.decoder_from_files` needs less memory.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from rarefy.checkpoint.export import export
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
        >>> file = export(model, tempfile.mkdtemp() + "/model.gguf", to="gguf", type="f32")
        >>> torch.equal(from_gguf(file).lm_head.weight, model.lm_head.weight)
        True
    """
    source = GgufModel(path)
    model = source.model
    for name in source.names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        weight, grid = source.weight(name)
        setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
        record_grid_(module, leaf, grid if isinstance(grid, Grid) else None)
    model.tie_weights()
    for p in model.parameters():
        p.requires_grad_(True)
    return model


def _architecture(file: gguf_file.GgufFile) -> table.Architecture:
    name = file.metadata.get("general.architecture")
    known = {a.name: a for a in reversed(table.ARCHITECTURES)}
    if not isinstance(name, str) or name not in known:
        raise ModelError(
            f"{file.path} has the architecture {str(name)[:80]!r}; supported are {', '.join(sorted(known))}"
        )
    return known[name]


def _config(file: gguf_file.GgufFile, architecture: table.Architecture) -> dict[str, Any]:
    """Return the config of transformers for a file; ModelError unless its sizes are those of the tensors."""
    read = _Reader(file, architecture.name)
    shapes = {n: e.shape for n, e in file.tensors.items()}
    layers = {int(m[1]) for n in shapes if (m := LAYER.match(n))}
    vocab_size, hidden = (
        shapes.get("token_embd.weight", (0, 0))[:2] if _is_matrix(shapes, "token_embd.weight") else (0, 0)
    )
    depth = read.whole("block_count", 1, MAX_LAYERS)
    width = read.whole("embedding_length", 1, 1 << 24)
    if layers != set(range(depth)) or width != hidden:
        raise ModelError(
            f"{file.path} states {depth} layers of width {width}, but has the tensors of {len(layers)} layers and an "
            f"embedding of width {hidden}"
        )
    heads = read.whole("attention.head_count", 1, 1 << 16)
    head = read.whole("attention.key_length", 2, 1 << 16, hidden // heads if hidden % heads == 0 else None)
    if read.whole("attention.value_length", 2, 1 << 16, head) != head or head % 2:
        raise ModelError(f"{file.path}: the heads of values must have an even size, that of the keys, {head}")
    values: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "intermediate_size": read.whole("feed_forward_length", 1, 1 << 24),
        "num_attention_heads": heads,
        "num_key_value_heads": read.whole("attention.head_count_kv", 1, heads, heads),
        "max_position_embeddings": read.whole("context_length", 1, MAX_TOKENS),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": _rope(read, file, head),
    }
    values["hidden_activation" if architecture.activation == table.GELU else "hidden_act"] = architecture.activation
    if architecture.model_type != "phi3":
        values["head_dim"] = head
    elif head * heads != hidden:
        raise ModelError(f"{file.path}: {heads} heads of {head} features do not make up the width {hidden}")
    if architecture.scaled_by:
        values[architecture.scaled_by] = head
    values |= _windows(read, architecture, depth)
    caps = {a: read.number(k, 0.0, 1e6, 0.0) or None for k, a in table.CAPS.items()}
    return values | {a: cap for a, cap in caps.items() if architecture.scaled_by or cap is not None}


def _is_matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> bool:
    return len(shapes.get(name, ())) == 2


class _Reader:
    """Reads settings of an architecture from the metadata; ModelError for those that are not possible."""

    def __init__(self, file: gguf_file.GgufFile, name: str):
        self.file, self.name = file, name

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.name}.{key}")

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Return a whole number; a list of equal ones, a number for each layer, counts as one."""
        value = self.get(key)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if isinstance(value, list):
            raise ModelError(
                f"{self.file.path}: layers have different sizes ({self.name}.{key}), which is not supported"
            )
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low:,} to {high:,}", value)
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a number."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def wrong(self, key: str, expected: str, value: Any) -> ModelError:
        """Return the error for a value that is not possible."""
        return ModelError(f"{self.file.path}: {self.name}.{key}: expected {expected}, got {str(value)[:80]}")


def _rope(read: _Reader, file: gguf_file.GgufFile, head: int) -> dict[str, Any]:
    """Return the rotary parameters of transformers."""
    rotated = read.whole("rope.dimension_count", 2, head, head)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": read.number("rope.freq_base", 1.0, 1e12, 1e4)}
    if rotated != head:
        rope["partial_rotary_factor"] = rotated / head
    kind = read.get("rope.scaling.type") or "none"
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path}: rope.scaling.type {str(kind)[:80]!r} is not supported; none and linear are")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": read.number("rope.scaling.factor", 1.0, 1e6)}
    if "rope_freqs.weight" in file.tensors:
        rope |= _llama3(rope, file, head)
    if read.name == "gemma3":
        local = {"rope_type": "default", "rope_theta": read.number("rope.freq_base_swa", 1.0, 1e12, 1e4)}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def _llama3(rope: dict[str, Any], file: gguf_file.GgufFile, head: int) -> dict[str, Any]:
    """Return the settings of Llama 3's scaled positions that give the factors in a file."""
    factors = file.tensor("rope_freqs.weight").float()
    contexts = {c for _, c in KNOWN_ROPE} | {2**n for n in range(5, 21)}
    for context in sorted(contexts, reverse=True):
        known = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        known |= {"rope_theta": rope["rope_theta"], "original_max_position_embeddings": context}
        if factors.shape == (head // 2,) and torch.allclose(table.llama3_factors(known, head), factors, rtol=1e-3):
            return known
    raise ModelError(f"{file.path}: rope_freqs.weight has factors that no known setting of Llama 3 gives")


def _windows(read: _Reader, architecture: table.Architecture, depth: int) -> dict[str, Any]:
    """Return the settings of sliding windows."""
    if architecture.model_type not in table.WINDOWED:
        return {}
    window = read.whole("attention.sliding_window", 0, MAX_TOKENS, 0) or None
    if architecture.model_type == "phi3":
        return {"sliding_window": window}
    every = {"gemma2": 2, "gemma3_text": 6}[architecture.model_type]
    kinds = ["full_attention" if (i + 1) % every == 0 or window is None else "sliding_attention" for i in range(depth)]
    return {"sliding_window": window or 4096, "layer_types": kinds}


def _set_ends_(model: Any, metadata: Mapping[str, Any]) -> None:
    """Set the special tokens of a model: those of the file, and those that end a turn by their text."""
    vocab_size = model.config.vocab_size
    ids = {n: metadata.get(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos", "padding", "eot", "eom")}
    ids = {n: i for n, i in ids.items() if type(i) is int and 0 <= i < vocab_size}
    ends = list(dict.fromkeys(ids[n] for n in ("eos", "eot", "eom") if n in ids))
    settings: dict[str, Any] = {"bos_token_id": ids.get("bos"), "pad_token_id": ids.get("padding")}
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    for target in (model.config, model.generation_config):
        for name, value in settings.items():
            setattr(target, name, value)
