"""What a walk through a model has done so far, on disk, so that a killed run goes on where it was.

One safetensors file a stop, under its final name only when it is whole; `key.json` says of what run. A run goes on by
passing the known stops again with the weights that were found there: one forward pass, and the same bits afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.errors import ContainerError
from rarefy.files import blaming

KEY = "key.json"
_STOP = re.compile(r"stop-([0-9]{6})\.safetensors")
SAMPLES = 4096  # entries of each tensor that go into the key


@dataclass(frozen=True)
class Entry:
    """What changed at one stop."""

    weights: dict[str, Tensor]  # by name, as stored
    masks: dict[str, Tensor]  # by layer name, packed into bits
    rows: list[dict[str, Any]] = field(default_factory=list)

    def plus(self, other: Entry) -> Entry:
        """Return both together."""
        return Entry(self.weights | other.weights, self.masks | other.masks, self.rows + other.rows)


@dataclass(frozen=True)
class Journal:
    """A folder of entries; `None` as folder keeps nothing."""

    folder: Path | None
    known: int = 0  # the first stops, which are on disk

    def read(self, stop: int) -> Entry | None:
        """Return what was done at a stop (weights mapped from the file), or None where nothing was."""
        file = self._file(stop)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
                rows = json.loads(opened.metadata()["rows"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ContainerError(f"{file} is damaged ({error}): remove {self.folder} to start anew") from None
        part = {p: {n[2:]: t for n, t in tensors.items() if n.startswith(f"{p}.")} for p in "wm"}
        return Entry(part["w"], part["m"], rows)

    def write(self, stop: int, entry: Entry) -> None:
        """Put an entry on disk; ContainerError where there is no space."""
        if self.folder is None:
            return
        file, partial = self._file(stop), self.folder / "partial"
        tensors = {f"w.{n}": t.contiguous() for n, t in entry.weights.items()}
        tensors |= {f"m.{n}": t for n, t in entry.masks.items()}
        with blaming(self.folder, sum(t.nbytes for t in tensors.values())):
            save_file(tensors, partial, metadata={"rows": json.dumps(entry.rows)})
            handle = os.open(partial, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
            os.replace(partial, file)

    def _file(self, stop: int) -> Path:
        return (self.folder or Path("/nonexistent")) / f"stop-{stop:06d}.safetensors"


def open_(folder: Path | None, key: Mapping[str, Any]) -> Journal:
    """Return the journal of a run in `folder`, made if need be; what another run left there is thrown away."""
    if folder is None:
        return Journal(None)
    with blaming(folder):
        text = json.dumps(key, sort_keys=True, indent=1)
        same = (folder / KEY).is_file() and (folder / KEY).read_text(encoding="utf-8") == text
        if folder.is_dir() and not same:
            names = sorted(p.name for p in folder.iterdir())
            strange = [n for n in names if n not in (KEY, "partial") and not _STOP.fullmatch(n)]
            if strange:
                raise ContainerError(f"{folder} is for the state of a run, but holds {strange[0]}: give another name")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not same:
            (folder / KEY).write_text(text, encoding="utf-8")
    found = (_STOP.fullmatch(p.name) for p in folder.iterdir())
    return Journal(folder, 1 + max((int(m[1]) for m in found if m), default=-1))


def key(model: nn.Module, data: Iterable[Any], **settings: Any) -> dict[str, Any]:
    """Return what must agree for a run to go on: settings, versions, threads, a digest of data and of weights
    (`SAMPLES` entries of each tensor). O(data + tensors)."""
    from rarefy import __version__

    weights, batches = hashlib.sha256(), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(_bytes(flat[:: max(1, len(flat) // SAMPLES)]))
    for batch in data:
        _digest(batch, batches)
    versions = {"rarefy": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {**settings, **versions, "weights": weights.hexdigest(), "data": batches.hexdigest()}


def _digest(value: Any, into: Any) -> None:
    if isinstance(value, Tensor):
        into.update(f"{tuple(value.shape)} {value.dtype}".encode())
        into.update(_bytes(value))
    elif hasattr(value, "keys"):
        for name in value:
            into.update(str(name).encode())
            _digest(value[name], into)
    elif isinstance(value, tuple | list):
        for part in value:
            _digest(part, into)
    else:
        into.update(repr(value).encode())


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
