"""TODO."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from rarefy.checkpoint import compiled_model, compressed_tensors
from rarefy.checkpoint.load import _shape, load
from rarefy.checkpoint.save import _version
from rarefy.common.atomic_io import blaming, check_target, whole_folder
from rarefy.common.errors import ContainerError, ModelError
from rarefy.formats import container
from rarefy.lowrank import layer_tying
from rarefy.model import hf, lowrank_modules

EXPORTS = ("hf", "safetensors", "compressed-tensors")


EXPORTED = "rarefy-export.json"  # marks a folder that an export may be written over


def export(path: str | Path, out: str | Path, *, to: str = "hf", overwrite: bool = False) -> Path:
    """Write a saved folder as a checkpoint that needs no Rarefy: `hf` (a dense folder that transformers loads),
    `safetensors` (one dense file under a folder, tensors by name) or `compressed-tensors` (a quantized folder that
    transformers loads with that package). In dense ones inputs are no longer rounded. Returns the folder."""
    if to not in EXPORTS:
        raise ContainerError(f"export --to {to!r}: choose from {', '.join(EXPORTS)}")
    if os.path.realpath(out) == os.path.realpath(path):
        raise ContainerError(f"{out} is the folder to export from; give another name")
    check_target(out, overwrite, EXPORTED)
    note = {"from": str(path), "rarefy": _version()}
    if to != "safetensors":
        model = load(path)
        if not hf.is_model(model):
            raise ModelError(f"{path} holds a {type(model).__name__}: only Hugging Face models export to {to}")
        if getattr(model, "rarefy_cut", None) and not model.rarefy_cut["config"]:  # type: ignore[index, operator]
            raise ContainerError(
                f"{path}: a cut left sizes that no config of {type(model).__name__} can tell (layers unlike each "
                "other, or heads that do not make up the width): load it with rarefy.load, or export --to safetensors"
            )
        if layer_tying.noted(model):
            raise ContainerError(
                f"{path}: blocks share their weights, which {type(model).__name__} knows nothing of: load it with "
                "rarefy.load, or export --to safetensors"
            )
        if lowrank_modules.factor_records(model):
            raise ContainerError(
                f"{path}: {next(iter(lowrank_modules.factor_records(model)))} is made of factors, which "
                f"{type(model).__name__} knows nothing of: load it with rarefy.load, or export --to safetensors"
            )
    with whole_folder(out, overwrite=overwrite, marker=EXPORTED) as partial, blaming(Path(out)):
        if to != "safetensors":
            if to == "hf":
                model.save_pretrained(partial)  # type: ignore[possibly-unbound, operator]
            else:
                compressed_tensors.write(model, partial)  # type: ignore[possibly-unbound]
            for name, content in side_files(path).items():
                (partial / name).write_bytes(content)
        else:
            saved = container.read(path)
            if compiled_model.is_compiled(saved):
                raise ModelError(f"{path} holds a compiled model: export what it was compiled from")
            names = [*saved.names, *saved.aliases]
            save_file({n: saved.tensor(n, _shape(saved, n)) for n in names}, partial / "model.safetensors")
        (partial / EXPORTED).write_text(json.dumps(note))
    return Path(out)


def side_files(path: str | Path) -> dict[str, bytes]:
    """Return tokenizer and generation files of a model folder, to go along with its weights."""
    return {n: (Path(path) / n).read_bytes() for n in hf.TOKENIZER_FILES if (Path(path) / n).is_file()}
