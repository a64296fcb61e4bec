"""TODO."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rarefy.checkpoint import compiled_model
from rarefy.checkpoint.tensor_slots import WEIGHTS, aliases
from rarefy.common.errors import FormatError, ModelError, unknown
from rarefy.compiler.executor import Compiled
from rarefy.evaluation.profiling import folder_bytes
from rarefy.evaluation.receipt import Receipt
from rarefy.formats import container, quantized_encodings, sparse_encodings
from rarefy.generation.decoder import Decoder
from rarefy.lowrank import layer_tying
from rarefy.model import activation_quant, hf, lowrank_modules
from rarefy.model.layers import all_layers, unwrap
from rarefy.model.masks import folded_state
from rarefy.model.quant_grid import get_grid
from rarefy.model.sparsity_pattern import detect_pattern
from rarefy.runtime.sparse_layers import Sparse


def save(
    model: nn.Module | Compiled | Decoder,
    path: str | Path,
    *,
    receipt: Receipt | None = None,
    recipe: Mapping[str, Any] | None = None,
    format: str = "smallest",
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    compress: bool = False,
) -> int:
    """Write `model` to a folder, each weight in its smallest format; return the bytes of weights and index.

    Masks are folded in on the way, tied weights stored once. The folder appears whole or not at all. The receipt and
    recipe of `compress_` are taken along by themselves. `format` other than `smallest` is used for every prunable
    weight that it fits. `compress` puts all of it through LZMA: smaller on disk, slower to read, not mapped from there.
    What `compile` or `decoder` returned is saved as it is, its weights packed already: ModelError where its graph calls
    what no saved one may. Raises ContainerError: folder exists, no space. O(weights), one shard in memory at a time.
    """
    if isinstance(model, Compiled | Decoder):
        if format != "smallest":
            raise FormatError(f"format {format!r}: a compiled model is saved as its kernels read it, leave format out")
        extra = {**(files or {}), **(receipt.files() if receipt else {})}
        meta = {"structure": {"library": None, "class": type(model).__name__}, "recipe": recipe, "rarefy": _version()}
        compiled_model.save(model, path, meta, files=extra, overwrite=overwrite, compress=compress)
        return folder_bytes(os.path.realpath(path), WEIGHTS)
    model = unwrap(model)
    packed_layers = [n for n, m in model.named_modules() if isinstance(m, Sparse)]
    if packed_layers:
        raise ModelError(
            f"{packed_layers[0]} and {len(packed_layers) - 1} more run on kernels chosen for this machine: save before "
            "accelerate_, and accelerate_ what load returns"
        )
    if format != "smallest" and format not in sparse_encodings.FORMATS:
        raise FormatError(unknown("format", format, ["smallest", *sparse_encodings.FORMATS]))
    receipt = receipt or getattr(model, "rarefy_receipt", None)
    recipe = recipe or getattr(model, "rarefy_recipe", None)
    state = list(folded_state(model))
    tied = aliases(model)
    structure = hf.structure(model) if hf.is_model(model) else {"library": None, "class": type(model).__name__}
    meta = {"structure": structure, "recipe": recipe, "rarefy": _version()}
    if getattr(model, "rarefy_cut", None):
        meta["cut"] = model.rarefy_cut
    if lowrank_modules.factor_records(model):
        meta["factors"] = lowrank_modules.factor_records(model)
    if layer_tying.noted(model):
        meta["tied"] = layer_tying.noted(model)
    if activation_quant.activation_quants(model):
        meta["inputs"] = activation_quant.activation_quants(model)
    extra = {"config.json": json.dumps(structure["config"], indent=1).encode()} if structure["library"] else {}
    extra |= files or {}
    if receipt is not None:
        extra.update(receipt.files())
    packed = ((n, packed) for n, packed in pack(model, dict(state), format, compress) if n not in tied)
    container.write(path, packed, aliases=tied, meta=meta, files=extra, overwrite=overwrite, compress=compress)
    return folder_bytes(os.path.realpath(path), WEIGHTS)


def pack(
    model: nn.Module, state: Mapping[str, Tensor], format: str = "smallest", compress: bool = False
) -> Iterator[tuple[str, sparse_encodings.Packed]]:
    """Yield (name, packed) for each tensor of a plain state: prunable weights in `format`, all else dense. What is
    `smallest` counts after LZMA where the file is compressed."""
    layers = {f"{n}.{p}" if n else p: l for l in all_layers(model) for n, _, p in l.owners}
    patterns = {r["layer"]: r["pattern"] for r in _layer_rows(model)}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        layout = layers[name].layout if name in layers else None
        grid = get_grid(layers[name]) if name in layers else None
        if layout is None or (format == "dense" and grid is None):
            yield name, sparse_encodings.encode(tensor, "dense")
            continue
        pattern = patterns.get(name.removesuffix(".weight")) or detect_pattern(tensor, layout.in_axis)
        pattern = pattern if pattern[:1].isdigit() else None
        if grid is not None:
            known = quantized_encodings.sizes(tensor, grid, pattern, axis=layout.in_axis)
            make = partial(quantized_encodings.encode, tensor, grid, pattern=pattern, axis=layout.in_axis)
            yield name, make(format) if format in known else container.encode_smallest(make, known, compress)
            continue
        sizes = sparse_encodings.sizes(tensor, pattern, axis=layout.in_axis)
        if compress and format == "smallest":
            make = partial(sparse_encodings.encode, tensor, pattern=pattern, axis=layout.in_axis)
            yield name, container.encode_smallest(make, sizes, True)
        elif format == "smallest" or format not in sizes:
            yield name, sparse_encodings.smallest(tensor, pattern, axis=layout.in_axis)
        else:
            yield name, sparse_encodings.encode(tensor, format, pattern, axis=layout.in_axis)


def _layer_rows(model: nn.Module) -> list[Mapping[str, Any]]:
    receipt = getattr(model, "rarefy_receipt", None)
    return receipt.sparsity.get("layers", []) if receipt else []


def _version() -> str:
    from rarefy.common.version import __version__

    return __version__
