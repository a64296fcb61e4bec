"""What a walk through a model has done so far, on disk, so that a killed run goes on where it was.

One safetensors file a stop, under its final name only when it is whole; `key.json` says of what run. A run goes on by
passing the known stops again with the weights that were found there: one forward pass, and the same bits afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
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
from rarefy.common.atomic_io import KEY_FILE, PARTIAL, SETUP_FILES, container_errors, is_resume_file, sync
from rarefy.common.errors import ContainerError, DataError

START_OVER = "remove {} (shell: --fresh) to start anew, or give another name"


@dataclass(frozen=True)
class StepState:
    """What changed at one stop."""

    weights: dict[str, Tensor]  # by name, as stored
    masks: dict[str, Tensor]  # by layer name, packed into bits
    rows: list[dict[str, Any]] = field(default_factory=list)

    def merged_with(self, other: StepState) -> StepState:
        """Return both together."""
        return StepState(self.weights | other.weights, self.masks | other.masks, self.rows + other.rows)


@dataclass(frozen=True)
class ResumeState:
    """A folder of entries; `None` as folder keeps nothing."""

    folder: Path | None
    num_done: int = 0  # the first stops, which are on disk
    key: str = ""
    lock: Any = None  # a file that is locked as long as it is open

    def close(self) -> None:
        """Let other runs use the folder."""
        if self.lock is not None:
            self.lock.close()

    def read(self, stop: int) -> StepState:
        """Return what was done at a stop, weights mapped from the file; ContainerError where it is not whole."""
        tensors, rows = self.read_tensors(f"stop-{stop:06d}.safetensors", "rows")
        part = {p: {n[2:]: t for n, t in tensors.items() if n.startswith(f"{p}.")} for p in "wm"}
        return StepState(part["w"], part["m"], rows)

    def write(self, stop: int, entry: StepState) -> None:
        """Put an entry on disk; ContainerError where there is no space."""
        tensors = {f"w.{n}": t.contiguous() for n, t in entry.weights.items()}
        tensors |= {f"m.{n}": t for n, t in entry.masks.items()}
        self.write_tensors(f"stop-{stop:06d}.safetensors", tensors, "rows", entry.rows)

    def read_tensors(self, name: str, word: str) -> tuple[dict[str, Tensor], Any]:
        """Return the tensors of a file, mapped, and what `put` noted under `word`; ContainerError where the file is
        damaged or of another run."""
        assert self.folder is not None
        file = self.folder / name
        try:
            with safe_open(file, "pt") as opened:
                tensors = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118 (not a dict)
                about = opened.metadata()
            whole = about["key"] == self.key and about["digest"] == digest(dict(sorted(tensors.items())))
            value = json.loads(about[word])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ContainerError(f"{file} is damaged ({error}): {START_OVER.format(self.folder)}") from None
        if not whole:
            raise ContainerError(f"{file} is damaged or of another run: {START_OVER.format(self.folder)}")
        return tensors, value

    def write_tensors(self, name: str, tensors: dict[str, Tensor], word: str, value: Any) -> None:
        """Put tensors into a file, whole or not at all, with plain data under `word`; ContainerError where there is no
        space."""
        if self.folder is None:
            return
        about = {word: json.dumps(value), "key": self.key, "digest": digest(dict(sorted(tensors.items())))}
        with container_errors(self.folder, sum(t.nbytes for t in tensors.values())):
            save_file(tensors, self.folder / PARTIAL, metadata=about)
            self._name(self.folder, name)

    @staticmethod
    def _name(folder: Path, name: str) -> None:
        """Give what was written its final name."""
        sync(folder / PARTIAL)
        os.replace(folder / PARTIAL, folder / name)
        sync(folder)

    def compute_once(self, name: str, find: Callable[[], Any]) -> Any:
        """Return what `find` returns (of what JSON can hold), or what it returned when this run was here before."""
        if self.folder is None:
            return find()
        file = self.folder / f"{name}.json"
        assert file.name in SETUP_FILES
        if file.exists():
            try:
                about = json.loads(file.read_text(encoding="utf-8"))
                value = about["value"]
                whole = about["key"] == self.key and about["digest"] == digest(json.dumps(value))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ContainerError(f"{file} is damaged ({error}): {START_OVER.format(self.folder)}") from None
            if not whole:
                raise ContainerError(f"{file} is damaged or of another run: {START_OVER.format(self.folder)}")
            return value
        value = find()
        with container_errors(self.folder):
            about = {"key": self.key, "digest": digest(json.dumps(value)), "value": value}
            (self.folder / PARTIAL).write_text(json.dumps(about), encoding="utf-8")
            self._name(self.folder, file.name)
        return value

    def check_same(self, name: str, what: Any, word: str) -> None:
        """Raise ContainerError where tensors, called `word`, are others than when this run was here before."""
        made = digest(what) if self.folder is not None else None
        if self.compute_once(name, lambda: made) != made:
            raise ContainerError(
                f"{self.folder} holds the state of another run (other {word}): {START_OVER.format(self.folder)}"
            )


def open_state(folder: Path | None, key: Mapping[str, Any]) -> ResumeState:
    """Return the journal of a run in `folder`, made if need be; ContainerError where the folder holds something else,
    the state of another run, or is in use by one."""
    if folder is None:
        return ResumeState(None)
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise ContainerError(f"{folder} is a file; give the name of a folder")
    text = json.dumps(key, sort_keys=True, indent=1)
    with container_errors(folder):
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        strange = [n for n in names if not is_resume_file(n)]
        if strange:
            raise ContainerError(f"{folder} is for the state of a run, but holds {strange[0]}: give another name")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder / KEY_FILE)
        before = lock.read()
        if not before and not set(names) - {KEY_FILE}:
            lock.write(text)
            lock.flush()
        elif before != text:
            lock.close()
            what = f"holds the state of another run ({_difference(before, key)})" if before else f"has no {KEY_FILE}"
            raise ContainerError(f"{folder} {what}: {START_OVER.format(folder)}")
    known = next(i for i in count() if not (folder / f"stop-{i:06d}.safetensors").is_file())
    return ResumeState(folder, known, hashlib.sha256(text.encode()).hexdigest(), lock)


def _locked(file: Path) -> Any:
    opened = open(file, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such locks here
        pass
    except OSError:
        opened.close()
        raise ContainerError(f"{file.parent} is in use by another run; wait for it, or give another name") from None
    opened.seek(0)
    return opened


def _difference(before: str, key: Mapping[str, Any]) -> str:
    """What a state was made for, and what is asked now."""
    try:
        had = json.loads(before)
        want = json.loads(json.dumps(key))
        names = sorted(n for n in {*had, *want} if had.get(n) != want.get(n))
    except (ValueError, TypeError, AttributeError):
        return f"its {KEY_FILE} is not readable"
    short = [n for n in names if n not in ("model", "weights", "data")]
    told = {n: f"{n} {had.get(n)!r} -> {want.get(n)!r}" for n in short if len(repr((had.get(n), want.get(n)))) < 100}
    return ", ".join(told.get(n, f"other {n}") for n in short or names)


def digest(value: Any) -> str:
    """Return a sum over nested tensors, texts and numbers. O(bytes)."""
    into = hashlib.blake2b(digest_size=16)
    _digest(value, into)
    return into.hexdigest()


def run_key(model: nn.Module, data: Iterable[Any], **settings: Any) -> dict[str, Any]:
    """Return what must agree for a run to go on: settings, versions, digests of the modules, their weights and the
    data. Raises DataError for data that has no bytes to go by. O(data + weights)."""
    from rarefy.common.version import __version__

    config: Any = getattr(model, "config", None)
    made = (repr(model), config.to_dict() if hasattr(config, "to_dict") else None)
    state = {**model.state_dict(), **dict(model.named_buffers())}
    digests = {"model": digest(made), "weights": digest(state), "data": digest(list(data))}
    offload.page_out(offload.file_backed(state.values()))  # all of a model is read here, a block at a time later
    return {**settings, "rarefy": __version__, "torch": torch.__version__, **digests}


def _digest(value: Any, into: Any) -> None:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        into.update(f"{tuple(value.shape)} {value.dtype}".encode())
        into.update(_bytes(value))
    elif hasattr(value, "keys"):
        for name in value.keys():  # noqa: SIM118 (not always a dict)
            into.update(repr(name).encode())
            _digest(value[name], into)
    elif isinstance(value, tuple | list | set):
        for part in sorted(value, key=repr) if isinstance(value, set) else value:
            _digest(part, into)
    elif value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype | torch.device):
        into.update(repr(value).encode())
    else:
        raise DataError(
            f"resume_dir needs data that identifies a run: tensors, arrays or text, got {type(value).__name__}"
        )


def _bytes(t: Tensor) -> Any:
    array: Any = t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)
