"""State of a sequential calibration on disk, from which a killed run resumes.

There is one safetensors file per step, which gets its final name once it is complete; `key.json` identifies the run. A
run resumes by passing the finished steps again with the stored weights: one forward pass, and the same bits afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.calibration import offload
from rarefy.common.atomic_io import (
    KEY_FILE,
    PARTIAL,
    SETUP_FILES,
    UNFINISHED_SAFETENSORS,
    container_errors,
    is_resume_file,
    lock_file,
    sync,
    unlock_file,
)
from rarefy.common.errors import ContainerError, DataError
from rarefy.common.machine_errors import raise_memory_error
from rarefy.common.plain_file import plain_file
from rarefy.model.sparsity_pattern import Pattern

START_OVER = "remove {} (shell: pass --fresh) to start anew, or give another name"


@dataclass(frozen=True)
class StepState:
    """What changed in one step."""

    weights: dict[str, Tensor]  # by name, as stored
    masks: dict[str, Tensor]  # by layer name, packed into bits
    rows: list[dict[str, Any]] = field(default_factory=list)

    def merged_with(self, other: StepState) -> StepState:
        """Return both states as one."""
        return StepState(self.weights | other.weights, self.masks | other.masks, self.rows + other.rows)


@dataclass(frozen=True)
class ResumeState:
    """A folder with the state of each step. With `None` as folder nothing is stored."""

    folder: Path | None
    num_done: int = 0  # the first stops, which are on disk
    key: str = ""
    lock: Any = None  # a file that is locked as long as it is open

    def close(self) -> None:
        """Release the folder for other runs."""
        if self.lock is not None:
            unlock_file(self.lock)

    def read(self, stop: int) -> StepState:
        """Return the state of a step, with mapped weights. Raises ContainerError if the file is damaged."""
        tensors, rows = self.read_tensors(f"stop-{stop:06d}.safetensors", "rows")
        part = {p: {n[2:]: t for n, t in tensors.items() if n.startswith(f"{p}.")} for p in "wm"}
        return StepState(part["w"], part["m"], rows)

    def write(self, stop: int, entry: StepState) -> None:
        """Store the state of a step. Raises ContainerError if the disk is full."""
        tensors = {f"w.{n}": t.contiguous() for n, t in entry.weights.items()}
        tensors |= {f"m.{n}": t for n, t in entry.masks.items()}
        self.write_tensors(f"stop-{stop:06d}.safetensors", tensors, "rows", entry.rows)

    def read_tensors(self, name: str, label: str) -> tuple[dict[str, Tensor], Any]:
        """Return the tensors of a file, mapped, and the data that `write_tensors` stored under `label`.

        Raises ContainerError if the file is damaged or of another run.
        """
        assert self.folder is not None
        file = self.folder / name
        try:
            with safe_open(plain_file(file), "pt") as opened:
                tensors = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118 (not a dict)
                metadata = opened.metadata()
            intact = metadata["key"] == self.key and metadata["digest"] == digest(dict(sorted(tensors.items())))
            value = json.loads(metadata[label])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise_memory_error(error)
            raise ContainerError(f"{file} is damaged ({error}): {START_OVER.format(self.folder)}") from None
        if not intact:
            raise ContainerError(f"{file} is damaged or of another run: {START_OVER.format(self.folder)}")
        return tensors, value

    def write_tensors(self, name: str, tensors: dict[str, Tensor], label: str, value: Any) -> None:
        """Write tensors to a file, all or nothing, with plain data under `label`."""
        if self.folder is None:
            return
        metadata = {label: json.dumps(value), "key": self.key, "digest": digest(dict(sorted(tensors.items())))}
        with self._replacing(name, sum(t.nbytes for t in tensors.values())) as partial:
            save_file(tensors, partial, metadata=metadata)

    @contextmanager
    def _replacing(self, name: str, num_bytes: int = 0) -> Iterator[Path]:
        """Yield a file to write, which then gets its final name; on an error it is removed, to free the disk."""
        assert self.folder is not None
        partial = self.folder / PARTIAL
        with container_errors(self.folder, num_bytes):
            try:
                yield partial
                sync(partial)
                os.replace(partial, self.folder / name)
                sync(self.folder)
            finally:
                partial.unlink(missing_ok=True)

    def compute_once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return `compute()` (plain data), or what it returned when this run was here before."""
        if self.folder is None:
            return compute()
        file = self.folder / f"{name}.json"
        assert file.name in SETUP_FILES
        if file.exists():
            try:
                record = json.loads(plain_file(file).read_text(encoding="utf-8"))
                value = record["value"]
                intact = record["key"] == self.key and record["digest"] == digest(json.dumps(value))
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise ContainerError(f"{file} is damaged ({error}): {START_OVER.format(self.folder)}") from None
            if not intact:
                raise ContainerError(f"{file} is damaged or of another run: {START_OVER.format(self.folder)}")
            return value
        value = compute()
        with self._replacing(file.name) as partial:
            record = {"key": self.key, "digest": digest(json.dumps(value)), "value": value}
            partial.write_text(json.dumps(record), encoding="utf-8")
        return value

    def check_same(self, name: str, tensors: Any, description: str) -> None:
        """Raise ContainerError if tensors differ from those of the interrupted run."""
        fingerprint = digest(tensors) if self.folder is not None else None
        if self.compute_once(name, lambda: fingerprint) != fingerprint:
            raise ContainerError(
                f"{self.folder} holds the state of another run (other {description}): {START_OVER.format(self.folder)}"
            )


def open_state(folder: Path | None, key: Mapping[str, Any]) -> ResumeState:
    """Return the state of a run in `folder`, which is created if needed.

    Raises ContainerError if the folder holds something else or the state of another run, or is in use by one.
    """
    if folder is None:
        return ResumeState(None)
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise ContainerError(f"{folder} is a file; give the name of a folder")
    text = json.dumps(key, sort_keys=True, indent=1)
    with container_errors(folder):
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        foreign = [n for n in names if not is_resume_file(n)]
        if foreign:
            raise ContainerError(f"{folder} is for the state of a run, but holds {foreign[0]}: give another name")
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / KEY_FILE)
        try:
            unfinished = set(filter(UNFINISHED_SAFETENSORS.fullmatch, names))
            for name in unfinished:
                (folder / name).unlink(missing_ok=True)
            saved_key = lock.read()
            left = set(names) - {KEY_FILE, PARTIAL} - unfinished
            if text.startswith(saved_key) and not left:  # a kill leaves a part of the key
                lock.truncate(0)
                lock.write(text)
                lock.flush()
            elif saved_key != text:
                problem = f"holds {_difference(saved_key, key)}" if saved_key else f"has no {KEY_FILE}"
                raise ContainerError(f"{folder} {problem}: {START_OVER.format(folder)}")
        except BaseException:
            unlock_file(lock)
            raise
    num_done = next(i for i in count() if not (folder / f"stop-{i:06d}.safetensors").is_file())
    return ResumeState(folder, num_done, hashlib.sha256(text.encode()).hexdigest(), lock)


def _difference(before: str, key: Mapping[str, Any]) -> str:
    """Return a text that says how the run with the saved key differs from this one."""
    try:
        saved = json.loads(before)
        functions = _function(saved), _function(key)
        old, new = _options(saved), _options(json.loads(json.dumps(key)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return f"the state of another run (its {KEY_FILE} is not readable)"
    if functions[0] != functions[1]:
        return f"the state of a {functions[0]} run, this is {functions[1]}"
    names = sorted(n for n in {*old, *new} if old.get(n) != new.get(n))
    if "solver" in names:  # the options of two solvers differ, which says nothing more
        names = [n for n in names if not n.startswith("solver.")]
    options = [n for n in names if n not in ("model", "weights", "data")]
    changes = {n: f"{n} {old.get(n)!r} -> {new.get(n)!r}" for n in options}
    texts = [changes[n] if n in changes and len(changes[n]) < 100 else f"other {n}" for n in options or names]
    return f"the state of another run ({', '.join(texts)})"


def _function(key: Mapping[str, Any]) -> str:
    """Return the name of the function that a key is of: only `fit_` counts epochs."""
    return "fit_" if "epochs" in key else "prune_"


def _options(key: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's options by the names that users know, nested ones as `solver.damping`."""
    names = {"teach": "distill", "solver.name": "solver"}
    if isinstance(key.get("plan"), dict):
        key = {**key, "plan": None, "pattern": str(Pattern(**key["plan"]))}
    nested = ({f"{n}.{k}": x for k, x in v.items()} if isinstance(v, dict) else {n: v} for n, v in key.items())
    return {names.get(n, n): v for entries in nested for n, v in entries.items()}


def digest(value: Any) -> str:
    """Return a hash over nested tensors, texts and numbers. O(bytes)."""
    into = hashlib.blake2b(digest_size=16)
    _digest(value, into)
    return into.hexdigest()


def run_key(model: nn.Module, data: Iterable[Any], **settings: Any) -> dict[str, Any]:
    """Return what must be equal for a run to resume: settings, versions, and hashes of the model, weights and data.

    Raises DataError for data that cannot be hashed. O(data + weights).
    """
    from rarefy.common.version import __version__

    config: Any = getattr(model, "config", None)
    structure = (repr(model), config.to_dict() if hasattr(config, "to_dict") else None)
    state = {**model.state_dict(), **dict(model.named_buffers())}
    digests = {"model": digest(structure), "weights": digest(state), "data": digest(list(data))}
    offload.page_out(offload.file_backed(state.values()))  # the hash has read all weights
    return {**settings, "rarefy": __version__, "torch": torch.__version__, **digests}


def _digest(value: Any, hasher: Any) -> None:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        hasher.update(f"{tuple(value.shape)} {value.dtype}".encode())
        hasher.update(_bytes(value))
    elif hasattr(value, "keys"):
        for name in value.keys():  # noqa: SIM118 (not always a dict)
            hasher.update(repr(name).encode())
            _digest(value[name], hasher)
    elif isinstance(value, tuple | list | set):
        for part in sorted(value, key=repr) if isinstance(value, set) else value:
            _digest(part, hasher)
    elif value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype | torch.device):
        hasher.update(repr(value).encode())
    else:
        raise DataError(
            f"resume_dir needs data that identifies a run: tensors, arrays or text, got {type(value).__name__}"
        )


def _bytes(t: Tensor) -> Any:
    array: Any = t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)
