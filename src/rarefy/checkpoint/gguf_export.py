"""Write language models as GGUF files, which llama.cpp reads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.checkpoint import gguf_architectures as table
from rarefy.checkpoint import gguf_tokenizer
from rarefy.checkpoint.tensor_slots import aliases
from rarefy.common.atomic_io import atomic_file, container_errors, sync
from rarefy.common.errors import ContainerError, ModelError, unknown
from rarefy.common.plain_file import usable_path
from rarefy.formats import gguf_blocks
from rarefy.lowrank import layer_tying
from rarefy.model import hf, lowrank_modules
from rarefy.model.layers import all_layers
from rarefy.model.masks import folded_state
from rarefy.model.quant_grid import Grid, get_grid

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
CODES = ("Q4_0", "Q4_1", "Q8_0")  # types that hold codes of a grid, the smallest first
ENDS = ("token_embd.weight", "output.weight")  # 8 bits in files of 4 bits: they lose most by rounding
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MIN_F16, MAX_F16 = 2.0**-24, 65504.0


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its name in the file, the weight, its grid, and its type."""

    name: str
    weight: Tensor
    grid: Grid | None
    kind: str


def write(
    model: nn.Module, out: str | Path, *, type: str | None = None, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write a causal language model of transformers as a GGUF file. One tensor at a time is converted.

    Args:
        model: the model; masks and quantization grids are folded into what is written.
        out: the file; it appears whole or not at all.
        type: of matrices: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1". None: a layer on a quantization grid in the
            smallest type that holds its codes, others in f16. Norms and biases stay in fp32.
        tokenizer: of transformers; None for a file that reads and writes ids.
        overwrite: replace the file.

    Returns:
        The file.

    Raises:
        ModelError: GGUF has no such architecture, setting or tokenizer, or layers differ in size where it cannot say
            so, or gguf is not installed.
        ContainerError: the file exists or cannot be written, or an unknown type.
    """
    file = usable_path(out)
    if type is not None and type not in TYPES:
        raise ContainerError(unknown("type", type, TYPES))
    if file.is_dir() or (file.exists() and not overwrite):
        hint = "give the name of a file" if file.is_dir() else "pass overwrite=True (shell: pass --force)"
        raise ContainerError(f"{file} exists: {hint}")
    package, config = table.gguf(), _check_model(model)
    architecture = table.architecture_of(config)
    table.check_config(config, architecture)
    state, tied = dict(folded_state(model)), aliases(model)
    state = {n: t for n, t in state.items() if n not in tied and t.is_floating_point()}
    sizes = _layer_sizes(config, state)
    uneven = any(isinstance(v, list) for v in sizes.values())
    name = architecture.uneven if uneven else architecture.name
    if name is None:
        raise ModelError(
            f"layers have different sizes, which GGUF files of {architecture.name} cannot say: cut each by the same "
            "amount, or export --to safetensors"
        )
    names = table.tensor_names(name, config.num_hidden_layers, state)
    layers = {f"{n}.{p}" if n else p: l for l in all_layers(model) for n, _, p in l.owners}
    grids = {n: get_grid(layers[n]) for n in state if n in layers}
    entries = [_entry(names[n], t, grids.get(n), type) for n, t in state.items()]
    if table.rope_of(config)["rope_type"] == "llama3":
        factors = table.llama3_factors(table.rope_of(config), table.head_size(config))
        entries.append(_Entry("rope_freqs.weight", factors, None, "F32"))
    with container_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            writer = package.GGUFWriter(partial, name)
            _add_metadata(writer, config, architecture, sizes, _file_type(entries))
            _add_tokenizer(writer, tokenizer, config.vocab_size)
            _write_tensors(writer, entries, architecture, table.head_size(config))
            sync(partial)
    return file


def _check_model(model: nn.Module) -> Any:
    """Return the config of a model; ModelError for models that GGUF files cannot hold."""
    if not hf.is_model(model) or not hf.is_causal_lm(model):
        raise ModelError(f"GGUF files hold language models of transformers, not a {type(model).__name__}")
    if layer_tying.noted(model):
        raise ModelError("blocks share their weights, which GGUF files cannot say: export --to safetensors")
    if factors := lowrank_modules.factor_records(model):
        raise ModelError(f"{next(iter(factors))} is factorized, which GGUF files cannot say: export --to safetensors")
    return model.config


def _layer_sizes(config: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the heads and neurons of the layers by GGUF key: one number if all are equal, else a list."""
    layers, head = range(config.num_hidden_layers), table.head_size(config)
    inputs = {part: [state[f"model.layers.{i}.{part}.weight"].shape[1] for i in layers] for part in _PARTS}
    heads = [n // head for n in inputs["self_attn.o_proj"]]
    fused = f"model.layers.0.{_FUSED}.weight" in state
    keys = [state[f"model.layers.{i}.{_FUSED if fused else 'self_attn.k_proj'}.weight"].shape[0] for i in layers]
    kv_heads = [(n // head - h) // 2 if fused else n // head for n, h in zip(keys, heads)]
    for i, (h, kv, width) in enumerate(zip(heads, kv_heads, inputs["self_attn.o_proj"])):
        if kv < 1 or h % kv or width % head:
            raise ModelError(
                f"layer {i} has {width / head:g} heads of queries and {kv} of keys and values: llama.cpp needs a "
                "multiple"
            )
    sizes = {"attention.head_count": heads, "attention.head_count_kv": kv_heads}
    sizes["feed_forward_length"] = inputs["mlp.down_proj"]
    return {n: v[0] if len(set(v)) == 1 else v for n, v in sizes.items()}


_PARTS, _FUSED = ("self_attn.o_proj", "mlp.down_proj"), "self_attn.qkv_proj"


def _entry(name: str, weight: Tensor, grid: Any, type: str | None) -> _Entry:
    """Return how a tensor is written."""
    grid = grid if isinstance(grid, Grid) else None
    shape = tuple(weight.shape)
    if weight.dim() < 2:
        return _Entry(name, weight, None, "F32")
    holding = [k for k in CODES if grid is not None and gguf_blocks.holds(k, grid, shape)]
    if type is None:
        return _Entry(name, weight, grid, holding[0] if holding else "F16")
    kind = type.upper()
    if kind in holding:
        return _Entry(name, weight, grid, kind)
    if kind in CODES and shape[-1] % gguf_blocks.BLOCK:
        return _Entry(name, weight, None, "F16")  # as llama.cpp's quantizer does
    return _Entry(name, weight, None, "Q8_0" if kind.startswith("Q4") and name in ENDS else kind)


def _file_type(entries: list[_Entry]) -> int:
    """Return `general.file_type`: that of most weights."""
    package, counts = table.gguf(), dict[str, int]()
    for e in entries:
        counts[e.kind] = counts.get(e.kind, 0) + e.weight.numel()
    kind = max(counts, key=lambda k: counts[k])
    return package.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]


def _add_metadata(
    writer: Any, config: Any, architecture: table.Architecture, sizes: Mapping[str, Any], file_type: int
) -> None:
    name, rope, head = writer.arch, table.rope_of(config), table.head_size(config)
    writer.add_name(Path(str(getattr(config, "_name_or_path", "") or architecture.name)).name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(table.gguf().GGML_QUANT_VERSION)
    values = {key: getattr(config, attribute) for key, attribute in table.KEYS.items()}
    window = getattr(config, "sliding_window", None)
    if window and architecture.model_type not in table.WINDOWED:  # llama.cpp would see more tokens than the model
        values["context_length"] = min(values["context_length"], window)
    rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    values |= {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": rotated}
    values |= {**sizes, "rope.freq_base": float(rope["rope_theta"])}
    if architecture.model_type in table.WINDOWED:
        values["attention.sliding_window"] = window or 0
    if "sliding_attention" in config.rope_parameters:
        values["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    values |= {k: getattr(config, a, None) for k, a in table.CAPS.items()}
    for key, value in values.items():
        if value is not None:
            _add(writer, f"{name}.{key}", value)


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    for key, value in gguf_tokenizer.metadata(tokenizer, vocab_size).items():
        _add(writer, f"tokenizer.{key}", value)


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key in the type of its value."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _write_tensors(writer: Any, entries: list[_Entry], architecture: table.Architecture, head: int) -> None:
    package = table.gguf()
    for e in entries:
        kind = package.GGMLQuantizationType[e.kind]
        block, size = package.GGML_QUANT_SIZES[kind]
        num_bytes = e.weight.numel() // block * size
        writer.add_tensor_info(e.name, tuple(e.weight.shape), np.dtype(np.float32), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with contextlib.closing(writer):
        for e in entries:
            writer.write_tensor_data(_data(e, architecture, head).numpy())


def _data(e: _Entry, architecture: table.Architecture, head: int) -> Tensor:
    """Return a tensor as it is in the file; uint8 where numpy has no such type."""
    weight, grid = e.weight.detach().cpu(), e.grid
    if table.is_paired(architecture, e.name):
        weight = table.pair_rows(weight, head)
        by_row = grid is not None and len(grid.scale) > 1
        grid = grid.map(lambda t: table.pair_rows(t, head)) if by_row and grid is not None else grid
    if grid is not None and e.kind in CODES:
        return gguf_blocks.from_grid(e.kind, weight, grid)
    weight = weight.float() + (architecture.norm_offset if table.is_norm(e.name) else 0.0)
    if not bool(weight.isfinite().all()) or (e.kind == "F16" and float(weight.abs().max()) > MAX_F16):
        raise ModelError(
            f"{e.name} has weights that {e.kind} cannot hold (NaN, infinite or too large): use f32 or bf16"
        )
    if e.kind in FLOATS:
        weight = weight.to(FLOATS[e.kind])
        return weight.view(torch.uint8) if e.kind == "BF16" else weight
    package = table.gguf()
    return torch.from_numpy(package.quants.quantize(weight.numpy(), package.GGMLQuantizationType[e.kind]))
