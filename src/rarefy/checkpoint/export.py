"""`export`: write a saved folder as a checkpoint that other software loads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from rarefy.checkpoint import compiled_model, compressed_tensors, gguf_export, pt2_export
from rarefy.checkpoint.load import load
from rarefy.checkpoint.tensor_slots import trusted_shape
from rarefy.common.atomic_io import INDEX, atomic_folder, check_output_folder, container_errors
from rarefy.common.errors import ContainerError, ModelError, unknown
from rarefy.common.plain_file import usable_path
from rarefy.common.version import __version__
from rarefy.formats import container
from rarefy.lowrank import layer_tying
from rarefy.model import hf, lowrank_modules
from rarefy.model.embedding_modules import module_files
from rarefy.model.hub import check_link

EXPORTS = ("hf", "safetensors", "compressed-tensors", "gguf", "pt2")
EXPORTED = "rarefy-export.json"  # marks a folder that an export may be written over


def export(
    path: str | Path | nn.Module,
    out: str | Path,
    *,
    to: str = "hf",
    type: str | None = None,
    tokenizer: Any = None,
    example: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write a saved folder as a checkpoint that needs no Rarefy.

    Args:
        path: the saved folder. For "gguf" and "pt2" also a Hugging Face folder, or a model.
        out: the folder to write, for "gguf" and "pt2" the file; it appears whole or not at all.
        to: "hf" (a dense folder that transformers loads), "safetensors" (one dense file, tensors by name),
            "compressed-tensors" (a quantized folder that transformers loads with that package), "gguf" (a file that
            llama.cpp loads) or "pt2" (a file with the graph that `torch.export.load` loads, in evaluation mode). Dense
            checkpoints do not quantize activations; the graph of "pt2" does.
        type: for "gguf", the type of matrices: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1". None: quantized layers
            in the smallest type that holds their codes, others in f16.
        tokenizer: for "gguf" of a model: its tokenizer, of transformers. A folder's own is written by itself.
        example: for "pt2" a tensor, a tuple of positional arguments, or a dict of keyword arguments; by default random
            inputs for models whose inputs are known.
        overwrite: replace an earlier export.

    Returns:
        The folder or file.

    Raises:
        ContainerError: an unknown `to` or `type`, the output exists, or the model has a structure that the target
            cannot express.
        ModelError: the folder holds no Hugging Face model, or a compiled one, or GGUF files cannot hold the model.

    Example:
        >>> import tempfile, torch
        >>> from rarefy.checkpoint.save import save
        >>> folder = tempfile.mkdtemp()
        >>> _ = save(torch.nn.Linear(2, 2), folder + "/model")
        >>> [file.name for file in sorted(export(folder + "/model", folder + "/out", to="safetensors").iterdir())]
        ['model.safetensors', 'rarefy-export.json']
    """
    if to not in EXPORTS:
        raise ContainerError(unknown("export", to, EXPORTS))
    if to != "pt2" and not isinstance(path, str | os.PathLike | nn.Module):
        raise ModelError(f"export: expected a folder or a torch model, got {path.__class__.__name__}")
    if example is not None and to != "pt2":
        raise ContainerError(f"example= is for to='pt2': leave it out with to={to!r}")
    if to == "gguf":
        return _export_gguf(path, out, type, tokenizer, overwrite)
    if to == "pt2" and type is None and tokenizer is None:
        model = _model_of(path) if isinstance(path, str | Path) else path
        return pt2_export.write(model, out, example, overwrite)
    if to == "pt2":
        raise ContainerError("type= and tokenizer= are for to='gguf': leave them out with to='pt2'")
    if isinstance(path, nn.Module) or type is not None or tokenizer is not None:
        raise ContainerError(f"a model, type= and tokenizer= are for to='gguf': to={to!r} takes the path of a folder")
    if os.path.realpath(out) == os.path.realpath(path):
        raise ContainerError(f"{out} is the folder to export from; give another name")
    check_output_folder(out, overwrite, EXPORTED)
    model = None if to == "safetensors" else load(path)
    if model is not None:
        check_exportable(model, path, to)
    with atomic_folder(out, overwrite=overwrite, marker=EXPORTED) as partial, container_errors(Path(out)):
        if model is None:
            _write_dense(path, partial / "model.safetensors")
        else:
            if to == "hf":
                model.save_pretrained(partial)
            else:
                compressed_tensors.write(model, partial)
            for name, content in side_files(path).items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(content)
        (partial / EXPORTED).write_text(json.dumps({"from": str(path), "rarefy": __version__}))
    return Path(out)


def _export_gguf(
    source: str | Path | nn.Module, out: str | Path, type: str | None, tokenizer: Any, overwrite: bool
) -> Path:
    """Write a model, or that of a folder with its tokenizer, as a GGUF file."""
    if isinstance(source, nn.Module):
        return gguf_export.write(source, out, type=type, tokenizer=tokenizer, overwrite=overwrite)
    if tokenizer is not None:
        raise ContainerError("tokenizer= is for a model: the tokenizer of a folder is written by itself")
    return gguf_export.write(
        _model_of(source), out, type=type, tokenizer=hf.load_tokenizer(source), overwrite=overwrite
    )


def _model_of(source: str | Path) -> nn.Module:
    """Return the model of a folder of Rarefy or Hugging Face, or of a .pt2 file."""
    saved = (usable_path(source) / INDEX).is_file() or not hf.is_folder(source)
    model = load(source) if saved else hf.load_folder(source)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source} holds a decoder or compiled model: export what it was made from")
    return model


def check_exportable(model: Any, path: str | Path, to: str) -> None:
    """Raise ContainerError or ModelError unless transformers can build the model from its config."""
    name = type(model).__name__
    if not hf.is_model(model):
        raise ModelError(f"{path} holds a {name}: only Hugging Face models export to {to}")
    problem = None
    if getattr(model, "rarefy_cut", None) and not model.rarefy_cut["config"]:
        problem = (
            f"a cut left sizes that no config of {name} can express (layers of different sizes, or heads that do not "
            "make up the width)"
        )
    elif layer_tying.noted(model):
        problem = f"blocks share their weights, which {name} does not support"
    elif lowrank_modules.factor_records(model):
        problem = f"{next(iter(lowrank_modules.factor_records(model)))} is factorized, which {name} does not support"
    if problem is not None:
        raise ContainerError(f"{path}: {problem}: load it with rarefy.load, or export --to safetensors")


def _write_dense(path: str | Path, file: Path) -> None:
    saved = container.read(path)
    if compiled_model.is_compiled(saved):
        raise ModelError(f"{path} holds a compiled model: export what it was compiled from")
    names = [*saved.names, *saved.aliases]
    save_file({n: saved.tensor(n, trusted_shape(saved, n)) for n in names}, file)


def side_files(path: str | Path) -> dict[str, bytes]:
    """Return the files of a model folder that stay with its weights, by name.

    These are those of the tokenizer, of generation and, as "1_Pooling/config.json", of the modules that
    sentence-transformers puts behind the model.

    Raises:
        ContainerError: one of them is a link out of the folder.
    """
    folder = Path(path)
    names = [n for n in hf.TOKENIZER_FILES if (folder / n).is_file()]
    files = {n: check_link(folder / n, folder).read_bytes() for n in names}
    return files | module_files(folder)
