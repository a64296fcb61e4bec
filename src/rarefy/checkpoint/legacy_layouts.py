"""Checkpoints in the layouts of compressed-tensors, those that its own later versions no longer read among them.

    sparse-bitmask       compressed [kept], bitmask uint8 [rows, ceil(columns / 8)], row_offsets [rows], shape [2]
    sparse-24-bitmask    compressed [rows, columns / 2], bitmask likewise, shape
    pack-quantized       weight_packed int32 [rows, ceil(columns bits / 32)], weight_scale [rows, groups], weight_shape,
                         weight_zero_point packed along rows, weight_g_idx [columns]: the group of each column
    int-quantized        weight int8, weight_scale, weight_zero_point

A layer's parts are found by their names; the config only says that a folder is of this kind. What of a sparse layout
decodes to int8 is then dequantized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.common.errors import ContainerError, ModelError
from rarefy.common.plain_file import plain_file, usable_path
from rarefy.formats.bitpacking import unpack_bits
from rarefy.model import hf
from rarefy.model.checked_folder import read_config
from rarefy.model.layers import all_layers
from rarefy.model.quant_grid import Grid, record_grid_

KEYS = ("quantization_config", "compression_config", "sparsity_config")
SPARSE = ("compressed", "bitmask", "row_offsets", "shape")
PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
DROPPED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")


def is_compressed(folder: str | Path) -> bool:
    """Return whether a folder has a config of compressed-tensors."""
    file = usable_path(folder) / "config.json"
    return file.is_file() and bool(_settings(_config(file)))


def load(folder: str | Path) -> nn.Module:
    """Return the model of such a folder, dense, in evaluation mode; weights that lie on a grid know it, so that `save`
    stores and `accelerate_` runs their codes. A dense copy is on disk meanwhile. Raises ContainerError for parts that
    are missing or do not fit, ModelError for what transformers does not load. O(weights)."""
    path = Path(folder)
    config = _config(path / "config.json")
    weights, grids = dict[str, Tensor](), dict[str, Grid]()
    for name, tensor, grid, _, _ in tensors(path):
        weights[name] = tensor
        if grid is not None:
            grids[name] = grid
    plain = {k: v for k, v in config.items() if k not in KEYS}
    with TemporaryDirectory(prefix="rarefy-") as temp:
        generation = path / "generation_config.json"
        if generation.is_file():
            (Path(temp) / generation.name).write_bytes(generation.read_bytes())
        (Path(temp) / "config.json").write_text(json.dumps(plain))
        save_file({n: t.contiguous() for n, t in weights.items()}, Path(temp) / "model.safetensors", {"format": "pt"})
        model = hf.load_folder(temp)
    for layer in all_layers(model):
        grid = grids.get(f"{layer.name}.{layer.param}")
        if grid is not None and grid.contains(layer.original.detach()):
            for _, module, param in layer.owners:
                record_grid_(module, param, grid)
    return model


def tensors(folder: str | Path) -> Iterator[tuple[str, Tensor, Grid | None, str, int]]:
    """Yield (name, dense tensor, its grid, its layout, bytes as stored) of every weight in a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ContainerError(f"{folder}: no .safetensors in this folder")
    with ExitStack() as stack:
        where: dict[str, Any] = {}  # the open file of each tensor
        for file in files:
            try:
                opened = stack.enter_context(safe_open(plain_file(file), "pt"))
            except SafetensorError as error:
                raise ContainerError(f"{file}: not a valid safetensors file: {error}") from None
            where |= dict.fromkeys(opened.keys(), opened)
        yield from _decoded(folder, where)


def _decoded(folder: str | Path, where: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Grid | None, str, int]]:
    layers: dict[str, set[str]] = {}
    for name in where:
        prefix, _, leaf = name.rpartition(".")
        if leaf in (*SPARSE, *PACKED):
            layers.setdefault(prefix, set()).add(leaf)
    done: set[str] = set()
    for prefix, leaves in layers.items():
        if not {"compressed", "weight_packed", "weight_scale"} & leaves:
            continue
        names = leaves | ({"weight"} if f"{prefix}.weight" in where else set())
        parts = {leaf: where[f"{prefix}.{leaf}"].get_tensor(f"{prefix}.{leaf}") for leaf in names}
        done |= {f"{prefix}.{leaf}" for leaf in names}
        stored = sum(t.numel() * t.element_size() for t in parts.values())
        try:
            tensor, grid, label = _decode(parts)
        except ContainerError as error:
            raise ContainerError(f"{folder}: {prefix}: {error}") from None
        yield f"{prefix}.weight", tensor, grid, label, stored
    for name in where:
        if name not in done and name.rpartition(".")[2] not in DROPPED:
            tensor = where[name].get_tensor(name)
            yield name, tensor, None, "dense", tensor.numel() * tensor.element_size()


def _decode(parts: Mapping[str, Tensor]) -> tuple[Tensor, Grid | None, str]:
    if "compressed" in parts:
        dense = _sparse(parts)
        label = "sparse-bitmask" if parts["compressed"].dim() == 1 else "sparse-24-bitmask"
        if "weight_scale" not in parts:
            return dense, None, label
        weight, grid = _plain({**parts, "weight": dense})
        return weight, grid, f"{label}, int-quantized"
    if "weight_packed" in parts:
        weight, grid = _packed(parts)
        return weight, grid, "pack-quantized"
    weight, grid = _plain(parts)
    return weight, grid, "int-quantized"


def _sparse(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the dense weight of a bitmask and its values, stored row by row."""
    rows, columns = _shape(parts, "shape")
    values, bits = parts["compressed"], _part(parts, "bitmask", torch.uint8)
    if list(bits.shape) != [rows, -(-columns // 8)]:
        raise ContainerError(f"bitmask of shape {list(bits.shape)} does not fit a weight [{rows}, {columns}]")
    mask = unpack_bits(bits.flatten(), bits.numel() * 8).view(rows, -1)[:, :columns]
    if int(mask.sum()) != values.numel():
        raise ContainerError(f"expected {int(mask.sum())} values, one per set bit of the bitmask, got {values.numel()}")
    return torch.zeros(rows, columns, dtype=values.dtype).masked_scatter_(mask, values.flatten())


def _packed(parts: Mapping[str, Tensor]) -> tuple[Tensor, Grid | None]:
    rows, columns = _shape(parts, "weight_shape")
    packed, scale = _part(parts, "weight_packed", torch.int32), _scale(parts, rows, columns)
    bits = next((b for b in (4, 8) if list(packed.shape) == [rows, -(-columns * b // 32)]), None)
    if bits is None:
        shape = list(packed.shape)
        raise ContainerError(f"packed codes of shape {shape} do not fit a weight [{rows}, {columns}] of 4 or 8 bits")
    codes = _unpacked(packed, bits)[:, :columns]
    zero = None
    if "weight_zero_point" in parts:
        packed = parts["weight_zero_point"]
        if packed.dtype == torch.int32 and list(packed.shape) == [-(-rows * bits // 32), scale.shape[1]]:
            zero = _unpacked(packed.T, bits)[:, :rows].T
        else:
            zero = packed
    return _dequantized(codes, bits, scale, zero, parts.get("weight_g_idx"))


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Signed codes of 4 or 8 bits from int32 [rows, n], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed[..., None] >> shifts & ((1 << bits) - 1)).flatten(1)
    return (codes - (1 << (bits - 1))).to(torch.int16)


def _plain(parts: Mapping[str, Tensor]) -> tuple[Tensor, Grid | None]:
    weight = parts.get("weight")
    if weight is None or weight.dim() != 2 or weight.dtype != torch.int8:
        raise ContainerError("expected a two-dimensional int8 weight beside weight_scale")
    scale = _scale(parts, *weight.shape)
    return _dequantized(weight, 8, scale, parts.get("weight_zero_point"), parts.get("weight_g_idx"))


def _dequantized(
    codes: Tensor, bits: int, scale: Tensor, zero: Tensor | None, order: Tensor | None
) -> tuple[Tensor, Grid | None]:
    columns = codes.shape[1]
    if zero is not None and not zero.any():
        zero = None  # symmetric
    if zero is not None and zero.shape != scale.shape:
        raise ContainerError(f"zero points of shape {list(zero.shape)} do not fit scales {list(scale.shape)}")
    group = torch.arange(columns) // (columns // scale.shape[1])
    if order is not None and not bool((order == -1).all()):
        if order.shape != (columns,) or not 0 <= int(order.min()) <= int(order.max()) < scale.shape[1]:
            raise ContainerError(
                f"expected g_idx [{columns}] with groups below {scale.shape[1]}, got shape {list(order.shape)}"
            )
        order = order.long()
    else:
        order = None
    at = group if order is None else order
    shifted = codes.float() if zero is None else codes.float() - zero.float()[:, at]
    weight = (shifted * scale.float()[:, at]).to(scale.dtype)
    if order is not None and not torch.equal(order, group):
        return weight, None  # its groups are no neighbours
    half = 1 << (bits - 1)
    return weight, Grid(bits, scale, None if zero is None else (zero.to(torch.int16) + half).to(torch.uint8))


def _scale(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    scale = parts.get("weight_scale")
    if scale is None or not scale.is_floating_point():
        raise ContainerError("expected a floating-point weight_scale beside the codes")
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1).contiguous()
    scale = scale[:, None] if scale.dim() == 1 else scale
    if scale.dim() != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise ContainerError(f"scales of shape {list(scale.shape)} do not fit a weight [{rows}, {columns}]")
    return scale


def _part(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    tensor = parts.get(name)
    if tensor is None or tensor.dim() != 2 or tensor.dtype != dtype:
        got = "none" if tensor is None else f"{tensor.dtype} of {list(tensor.shape)}"
        raise ContainerError(f"{name}: expected {str(dtype).removeprefix('torch.')} with two dimensions, got {got}")
    return tensor


def _shape(parts: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    shape = parts.get(name)
    numbers = [] if shape is None or shape.is_floating_point() or shape.numel() != 2 else shape.flatten().tolist()
    if len(numbers) != 2 or any(not 0 < n < 1 << 31 for n in numbers):
        raise ContainerError(f"{name}: expected the numbers of rows and columns, got {numbers}")
    return int(numbers[0]), int(numbers[1])


def _config(file: Path) -> dict[str, Any]:
    try:
        return read_config(file)
    except ContainerError as error:
        raise ModelError(f"{file.parent}: the config is not usable: {error}") from None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the compression settings of a config, under any of their historical names."""
    settings = {k: config[k] for k in KEYS if isinstance(config.get(k), dict)}
    method = settings.get("quantization_config", {}).get("quant_method", "compressed-tensors")
    return settings if method in ("compressed-tensors", "sparseml") else {}
