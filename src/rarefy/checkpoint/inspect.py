"""TODO."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rarefy.checkpoint import compiled_model, legacy_layouts
from rarefy.checkpoint.load import _shape
from rarefy.checkpoint.tensor_slots import _layouts, aliases
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import ContainerError, ModelError
from rarefy.common.report import Report
from rarefy.compiler.executor import Compiled
from rarefy.evaluation.profiling import sparsity_of
from rarefy.formats import container, quantized_encodings
from rarefy.generation.decoder import Decoder
from rarefy.model.masks import folded_state
from rarefy.model.sparsity_pattern import detect_pattern


def inspect(what: str | Path | nn.Module) -> Report:
    """Return a row a tensor: shape, type, format, sparsity, the pattern its zeros fit, bytes stored and dense.

    `what`: a live model, a folder of ours, a Hugging Face folder, or a .safetensors file. O(weights).
    """
    rows, more = [], {}
    for name, tensor, format, size, axis in _tensors(what, more):
        zeros = sparsity_of(tensor)
        dense = tensor.numel() * tensor.element_size()
        rows.append(
            {
                "tensor": name,
                "shape": "x".join(map(str, tensor.shape)) or "scalar",
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "format": format,
                "sparsity": zeros,
                "pattern": detect_pattern(tensor, axis) if zeros > 0.01 else "",
                "bytes": size,
                "dense_bytes": dense,
            }
        )
    if not rows:
        raise ContainerError(f"{what} holds no tensors")
    total, dense = sum(r["bytes"] for r in rows), sum(r["dense_bytes"] for r in rows)
    summary = {"tensors": len(rows), "bytes": total, "dense bytes": dense, "ratio": total / max(dense, 1)}
    title = type(what).__name__ if isinstance(what, nn.Module) else str(what)
    kind = f": {'a decoder' if compiled_model.NUMBERS in more else 'a compiled model'}" if more else ""
    return Report(title + kind, tuple(rows), {**summary, **more})


def _tensors(what: str | Path | nn.Module, more: dict[str, Any]) -> Iterator[tuple[str, Tensor, str, int, int]]:
    """Name, values, format, bytes and axis of each tensor; what there is to say besides goes into `more`."""
    if isinstance(what, nn.Module):
        tied, layouts = aliases(what), _layouts(what)
        for name, tensor in folded_state(what):
            if name not in tied:
                axis = layouts[name].in_axis if name in layouts else -1
                yield name, tensor, "dense", tensor.numel() * tensor.element_size(), axis
        return
    if isinstance(what, Compiled | Decoder):
        raise ModelError("a compiled model: print it, or save it and inspect its folder")
    path = Path(what)
    if (path / INDEX).is_file():
        saved = container.read(path)
        if compiled_model.is_compiled(saved):
            parts = compiled_model.read(saved)
            yield from compiled_model.tensors(parts)
            more.update(compiled_model.summary(parts))
            return
        for name in saved.names:
            packed = saved.packed(name, _shape(saved, name))
            yield (
                name,
                quantized_encodings.decode(packed),
                quantized_encodings.label(packed),
                packed.nbytes,
                packed.extra.get("axis", -1),
            )
        return
    if legacy_layouts.is_compressed(path):
        yield from ((name, t, label, size, -1) for name, t, _, label, size in legacy_layouts.tensors(path))
        return
    files = [path] if path.suffix == ".safetensors" and path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ContainerError(f"{what}: neither a folder of ours, nor a folder with .safetensors, nor such a file")
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    tensor = opened.get_tensor(name)
                    yield name, tensor, "dense", tensor.numel() * tensor.element_size(), -1
        except SafetensorError as error:
            raise ContainerError(f"{file}: not a valid safetensors file: {error}") from None
