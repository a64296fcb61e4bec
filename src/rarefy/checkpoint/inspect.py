"""`inspect`: list every tensor of a model or a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rarefy.checkpoint import compiled_model, gguf_architectures, legacy_layouts
from rarefy.checkpoint.tensor_slots import aliases, layouts, trusted_shape
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import ContainerError, ModelError
from rarefy.common.plain_file import plain_file, usable_path
from rarefy.common.report import Report
from rarefy.compiler.executor import Compiled
from rarefy.evaluation.profiling import sparsity_of
from rarefy.formats import container, gguf_file, quantized_encodings
from rarefy.generation.decoder import Decoder
from rarefy.model.masks import folded_state
from rarefy.model.sparsity_pattern import detect_pattern


def inspect(what: str | Path | nn.Module) -> Report:
    """Return a report with a row for each tensor. O(weights).

    Args:
        what: a model, a saved folder, a folder of Hugging Face or compressed-tensors, or a .safetensors or .gguf file.

    Returns:
        Rows with tensor, shape, dtype, format, sparsity, the pattern of its zeros, bytes stored and dense; the summary
        has the totals.

    Raises:
        ContainerError: the folder or file is damaged, or holds no tensors.
        ModelError: a compiled model in memory; inspect the folder that it was saved to. Or the package gguf is missing.

    Example:
        >>> import torch
        >>> inspect(torch.nn.Linear(4, 2)).rows[0]["shape"]
        '2x4'
    """
    rows, compiled = [], {}
    for name, tensor, format, size, axis in _tensors(what, compiled):
        zeros = sparsity_of(tensor)
        rows.append(
            {
                "tensor": name,
                "shape": "x".join(map(str, tensor.shape)) or "scalar",
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "format": format,
                "sparsity": zeros,
                "pattern": detect_pattern(tensor, axis) if zeros > 0.01 else "",
                "bytes": size,
                "dense_bytes": tensor.numel() * tensor.element_size(),
            }
        )
    if not rows:
        raise ContainerError(f"{what} holds no tensors")
    total, dense = sum(r["bytes"] for r in rows), sum(r["dense_bytes"] for r in rows)
    summary = {"tensors": len(rows), "bytes": total, "dense bytes": dense, "ratio": total / max(dense, 1)}
    title = type(what).__name__ if isinstance(what, nn.Module) else str(what)
    if compiled:
        title += ": a decoder" if compiled_model.DECODER in compiled else ": a compiled model"
    return Report(title, tuple(rows), {**summary, **compiled})


def _tensors(what: str | Path | nn.Module, compiled: dict[str, Any]) -> Iterator[tuple[str, Tensor, str, int, int]]:
    """Name, values, format, stored bytes and input axis of each tensor; the summary of a compiled model goes into
    `compiled`."""
    if isinstance(what, nn.Module):
        yield from _model_tensors(what)
        return
    if isinstance(what, Compiled | Decoder):
        raise ModelError("a compiled model: print it, or save it and inspect its folder")
    if not isinstance(what, str | os.PathLike):
        raise ModelError(f"inspect: expected a model or a path, got {type(what).__name__}")
    path = usable_path(what)
    if gguf_file.is_file(path):
        yield from _gguf_tensors(path)
        return
    if (path / INDEX).is_file():
        saved = container.read(path)
        if compiled_model.is_compiled(saved):
            parts = compiled_model.read(saved)
            yield from compiled_model.tensors(parts)
            compiled.update(compiled_model.summary(parts))
            return
        for name in saved.names:
            p = saved.packed(name, trusted_shape(saved, name))
            yield name, quantized_encodings.decode(p), quantized_encodings.label(p), p.nbytes, p.extra.get("axis", -1)
        return
    if legacy_layouts.is_compressed(path):
        yield from ((name, t, label, size, -1) for name, t, _, label, size in legacy_layouts.tensors(path))
        return
    files = [path] if path.suffix == ".safetensors" and path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ContainerError(
            f"{what}: expected a saved folder, a folder with .safetensors files, or a .safetensors or .gguf file"
        )
    for file in files:
        yield from _file_tensors(file)


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, str, int, int]]:
    tied, layout_of = aliases(model), layouts(model)
    for name, tensor in folded_state(model):
        if name not in tied:
            axis = layout_of[name].in_axis if name in layout_of else -1
            yield name, tensor, "dense", tensor.numel() * tensor.element_size(), axis


def _file_tensors(file: Path) -> Iterator[tuple[str, Tensor, str, int, int]]:
    try:
        with safe_open(plain_file(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                tensor = opened.get_tensor(name)
                yield name, tensor, "dense", tensor.numel() * tensor.element_size(), -1
    except SafetensorError as error:
        raise ContainerError(f"{file}: not a valid safetensors file: {error}") from None


def _gguf_tensors(path: Path) -> Iterator[tuple[str, Tensor, str, int, int]]:
    file = gguf_file.read(path)
    if any(e.kind not in gguf_file.FLOATS for e in file.tensors.values()):
        gguf_architectures.gguf()  # which decodes blocks of codes
    for name, entry in file.tensors.items():
        yield name, file.tensor(name), "dense" if entry.kind in gguf_file.FLOATS else entry.kind, entry.num_bytes, -1
