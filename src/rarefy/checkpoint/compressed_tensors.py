"""Quantized models as Hugging Face folders in the layout of compressed-tensors, which transformers and vLLM load.

Weights of 8 bits with a scale an output or tensor are stored as they are (`int-quantized`) if inputs are in 8 bits too,
all others as streams of bits in int32 words, a row at a time (`pack-quantized`): vLLM runs `int-quantized` layers in
integers and refuses those without rounded inputs. Dynamic quantization of inputs is recorded in the config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.formats.bitpacking import pack_codes
from rarefy.model.activation_quant import get_activation_quant
from rarefy.model.layers import Layer, all_layers
from rarefy.model.masks import folded_state
from rarefy.model.quant_grid import Grid, get_grid

FORMATS = ("pack-quantized", "int-quantized")


def write(model: nn.Module, folder: Path) -> None:
    """Write a transformers model whose Linear layers lie on grids; ModelError where none does, or one lies on what the
    layout has no word for. O(weights)."""
    layers = {l.full_name: l for l in all_layers(model) if get_grid(l) is not None}
    if not layers:
        raise ModelError("no layer is quantized: call quantize_ first, or export to hf")
    grids: dict[str, Grid] = {}
    for name, layer in layers.items():
        grid = get_grid(layer)
        why = _why_not(layer, grid)
        if why is not None:
            raise ModelError(f"{name}: compressed-tensors has no layout for {why}; export to hf (dense) instead")
        assert isinstance(grid, Grid)
        grids[name] = grid
    plain = all(
        g.bits == 8 and g.scale.shape[1] == 1 and get_activation_quant(layers[n].module) is not None
        for n, g in grids.items()
    )
    tensors: dict[str, Tensor] = {}
    for name, tensor in folded_state(model):
        layer = name.removesuffix(".weight")
        if layer in grids and name.endswith(".weight"):
            stored = _plain(tensor, grids[layer]) if plain else _packed(tensor, grids[layer])
            tensors |= {f"{layer}.{n}": t.contiguous() for n, t in stored.items()}
        elif name not in (getattr(model, "_tied_weights_keys", None) or ()) or not _is_tied(model):
            tensors[name] = tensor.detach().cpu().contiguous()
    config: Any = model.config
    saved_config = {**config.to_dict(), "quantization_config": _config(model, layers, grids, FORMATS[plain])}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(saved_config, indent=1, default=str))


def _why_not(layer: Layer, grid: Any) -> str | None:
    if not isinstance(grid, Grid):
        return "a codebook"
    if not isinstance(layer.module, nn.Linear):
        return f"a {type(layer.module).__name__}"
    if len(layer.owners) > 1:
        return "a weight that is shared"
    if grid.zero is not None:  # it has one, but its 0.20 does not give it back to transformers
        return "asymmetric codes that transformers would load"
    inputs = get_activation_quant(layer.module)
    return "static inputs" if inputs is not None and inputs.scale is not None else None


def _is_tied(model: Any) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _plain(weight: Tensor, grid: Grid) -> dict[str, Tensor]:
    return {"weight": grid.codes(weight).to(torch.int8), "weight_scale": _scale(weight, grid)}


def _packed(weight: Tensor, grid: Grid) -> dict[str, Tensor]:
    return {
        "weight_packed": pack_int32(grid.codes(weight) + (1 << (grid.bits - 1)), grid.bits),
        "weight_scale": _scale(weight, grid),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _scale(weight: Tensor, grid: Grid) -> Tensor:
    return grid.scale.expand(len(weight), -1).to(weight.dtype if weight.dtype != torch.float32 else grid.scale.dtype)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Return codes [rows, n] below 2^bits as bit streams, int32 [rows, ceil(n bits / 32)].

    >>> pack_int32(torch.tensor([[1, 2, 3]]), 4).tolist()
    [[801]]
    """
    rows, n = codes.shape
    full = torch.nn.functional.pad(codes.to(torch.uint8), (0, -n % 32))
    stream = pack_codes(full.flatten(), bits).view(torch.int32).view(rows, -1)
    return stream[:, : -(-n * bits // 32)]


def _config(model: nn.Module, layers: Mapping[str, Layer], grids: Mapping[str, Grid], format: str) -> dict[str, Any]:
    """Return the quantization config of compressed-tensors, with one group for each scheme of quantization."""
    groups: dict[str, dict[str, Any]] = {}
    for name, grid in grids.items():
        columns = layers[name].original.shape[1]
        group_size = columns // grid.scale.shape[1]
        strategy = "group" if grid.scale.shape[1] > 1 else "channel"
        weights = {
            "num_bits": grid.bits, "type": "int", "symmetric": True, "strategy": strategy,
            "group_size": group_size if strategy == "group" else None, "dynamic": False,
        }  # fmt: skip
        inputs = get_activation_quant(layers[name].module)
        token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        scheme = {"weights": weights, "input_activations": None if inputs is None else token, "format": format}
        key = json.dumps(scheme, sort_keys=True)
        groups.setdefault(key, {**scheme, "targets": []})["targets"].append(name)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups.values())},
        "ignore": [n for n in linears if n not in grids],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
