"""`save`: write a model to a folder, each weight in its smallest format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rarefy.checkpoint import compiled_model
from rarefy.checkpoint.tensor_slots import WEIGHT_FILES, aliases
from rarefy.common.errors import FormatError, ModelError, unknown
from rarefy.common.version import __version__
from rarefy.compiler.executor import Compiled
from rarefy.evaluation.profiling import folder_bytes
from rarefy.evaluation.receipt import Receipt
from rarefy.formats import container, quantized_encodings, sparse_encodings
from rarefy.generation.decoder import Decoder
from rarefy.lowrank import layer_tying
from rarefy.model import activation_quant, hf, lowrank_modules, vision
from rarefy.model.image_config import image_config_of
from rarefy.model.layers import all_layers, check_is_module, unwrap
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
    """Write a model to a folder, each weight in its smallest format.

    Masks and quantization grids that are attached are folded into what is written; the model keeps them. Tied weights
    are stored once. The folder appears whole or not at all. A receipt and recipe of `compress_` are written with the
    model. What `compile` or `decoder` returned is saved with its weights as they are packed. One shard (256 MiB) is in
    memory at a time.

    Args:
        model: a module, or what `compile` or `decoder` returned.
        path: the folder.
        receipt: written as receipt.json and receipt.txt; by default a module's own.
        recipe: plain data, written into the index; by default a module's own.
        format: "smallest", or the format of every prunable weight that it fits: "dense", "dense+mask", "bitmask",
            "csr", "csc", "bsr", "nm".
        files: more files by name, such as those of a tokenizer.
        overwrite: replace an older Rarefy folder or an empty one.
        compress: compress all of it with LZMA: smaller on disk, slower to read, and read into memory as a whole.

    Returns:
        The bytes of weights and index on disk.

    Raises:
        ContainerError: the folder exists, or there is no space.
        FormatError: an unknown format, or one given for a compiled model.
        ModelError: `model` is no module, it was accelerated, or a compiled graph calls an operator that no saved graph
            may call.

    Example:
        >>> import tempfile, torch
        >>> from rarefy.prune.prune import prune_
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> _ = prune_(net, sparsity=0.9)
        >>> save(net, tempfile.mkdtemp() + "/model") < 64 * 64 * 4
        True
    """
    if isinstance(model, Compiled | Decoder):
        if format != "smallest":
            raise FormatError(
                f"format {format!r} has no effect on a compiled model, which keeps its packed weights: leave it out"
            )
        return save_compiled(model, path, receipt, recipe, files, overwrite=overwrite, compress=compress)
    check_is_module(model)
    model = unwrap(model)
    accelerated = [n for n, m in model.named_modules() if isinstance(m, Sparse)]
    if accelerated:
        raise ModelError(
            f"{accelerated[0]} and {len(accelerated) - 1} more run on kernels chosen for this machine: save before "
            "accelerate_, and call accelerate_ on the loaded model"
        )
    if format != "smallest" and format not in sparse_encodings.FORMATS:
        raise FormatError(unknown("format", format, ["smallest", *sparse_encodings.FORMATS]))
    receipt = receipt or getattr(model, "rarefy_receipt", None)
    recipe = recipe or getattr(model, "rarefy_recipe", None)
    structure = hf.structure(model) if hf.is_model(model) else vision.structure(model)
    structure = structure or {"library": None, "class": type(model).__name__}
    meta = {"structure": structure, "recipe": recipe, "rarefy": __version__, **_structure_records(model)}
    extra = {"config.json": hf_config(structure, getattr(model, "rarefy_cut", None))} if "config" in structure else {}
    extra |= {**(files or {}), **(receipt.files() if receipt is not None else {})}
    state, tied = dict(folded_state(model)), aliases(model)
    packed = ((name, p) for name, p in pack(model, state, format, compress) if name not in tied)
    container.write(path, packed, aliases=tied, meta=meta, files=extra, overwrite=overwrite, compress=compress)
    return folder_bytes(os.path.realpath(path), WEIGHT_FILES)


def hf_config(structure: Mapping[str, Any], cut: Mapping[str, Any] | None = None) -> bytes:
    """Return the config.json of a saved Hugging Face model.

    It names Rarefy as the quantization method, so that transformers hands the folder to
    `rarefy.integrations.hf_quantizer`, and is refused where Rarefy is not installed. After a cut that no config can
    express it is the config before the cut.
    """
    config = cut["base"] if cut and cut["base"] and not cut["config"] else structure["config"]
    stamps = {"dtype": structure["dtype"], "architectures": [structure["class"]]}
    return name_rarefy({**config, **stamps})


def name_rarefy(config: Mapping[str, Any]) -> bytes:
    """Return a config.json that names Rarefy as the quantization method."""
    return json.dumps({**config, "quantization_config": {"quant_method": "rarefy"}}, indent=1).encode()


def save_compiled(
    model: Compiled | Decoder,
    path: str | Path,
    receipt: Receipt | None,
    recipe: Mapping[str, Any] | None,
    files: Mapping[str, bytes] | None,
    **options: Any,
) -> int:
    """Write a compiled model or decoder as `save` does; options are those of `compiled_model.save`."""
    extra = {**(files or {}), **(receipt.files() if receipt else {})}
    meta = {"structure": {"library": None, "class": type(model).__name__}, "recipe": recipe, "rarefy": __version__}
    images = image_config_of(model)
    meta |= {} if images is None else {"images": images.to_dict()}
    compiled_model.save(model, path, meta, files=extra, **options)
    return folder_bytes(os.path.realpath(path), WEIGHT_FILES)


def _structure_records(model: nn.Module) -> dict[str, Any]:
    """Return the records with which `load` rebuilds the structure of this model from its original class."""
    records = {
        "cut": getattr(model, "rarefy_cut", None),
        "factors": lowrank_modules.factor_records(model),
        "tied": layer_tying.noted(model),
        "inputs": activation_quant.activation_quants(model),
    }
    return {name: record for name, record in records.items() if record}


def pack(
    model: nn.Module, state: Mapping[str, Tensor], format: str = "smallest", compress: bool = False
) -> Iterator[tuple[str, sparse_encodings.Packed]]:
    """Yield (name, packed tensor) for each tensor of a folded state: prunable weights in `format`, others dense. With
    `compress` the smallest format is the one that is smallest after LZMA."""
    layers = {f"{n}.{p}" if n else p: l for l in all_layers(model) for n, _, p in l.owners}
    patterns = {r["layer"]: r["pattern"] for r in _receipt_rows(model)}
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
            sizes = quantized_encodings.sizes(tensor, grid, pattern, axis=layout.in_axis)
            encode = partial(quantized_encodings.encode, tensor, grid, pattern=pattern, axis=layout.in_axis)
            yield name, encode(format) if format in sizes else container.encode_smallest(encode, sizes, compress)
            continue
        sizes = sparse_encodings.sizes(tensor, pattern, axis=layout.in_axis)
        if compress and format == "smallest":
            encode = partial(sparse_encodings.encode, tensor, pattern=pattern, axis=layout.in_axis)
            yield name, container.encode_smallest(encode, sizes, True)
        elif format == "smallest" or format not in sizes:
            yield name, sparse_encodings.smallest(tensor, pattern, axis=layout.in_axis)
        else:
            yield name, sparse_encodings.encode(tensor, format, pattern, axis=layout.in_axis)


def _receipt_rows(model: nn.Module) -> list[Mapping[str, Any]]:
    receipt = getattr(model, "rarefy_receipt", None)
    return receipt.sparsity.get("layers", []) if receipt else []
