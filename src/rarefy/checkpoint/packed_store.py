"""Packed weights of a run that may be killed: each is written once, in a folder beside the output, and read mapped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rarefy.checkpoint.compiled_model import checked_form
from rarefy.common.atomic_io import KEY_FILE, check_output_folder, container_errors, lock_file, sync, unlock_file
from rarefy.common.errors import ContainerError, FormatError, first_line
from rarefy.common.json_text import parse_json
from rarefy.common.machine_errors import raise_memory_error
from rarefy.common.progress import say
from rarefy.formats.aligned_file import write_aligned
from rarefy.runtime.huge_pages import HugePageBuffer
from rarefy.runtime.packed_formats import Packed, to_tensors

WEIGHT_FILE = re.compile(r"packed-[0-9]{5}\.safetensors(\.partial)?")
MAX_KEY_BYTES = 1 << 24
START_OVER = "remove {} (shell: pass --fresh) to start anew, or give another name"


@dataclass
class PackedStore:
    """A folder with a file for each packed weight, in the order in which they are made.

    Attributes:
        folder: the folder.
        count: weights so far.
        resumed: how many of them an earlier run wrote.
        files: the file of each packed weight, by the address of its values.
    """

    folder: Path
    count: int = 0
    resumed: int = 0
    files: dict[int, Path] = field(default_factory=dict)
    memory: HugePageBuffer = field(default_factory=HugePageBuffer)  # of what cannot be mapped

    def hold(self, name: str, pack: Callable[[], Any]) -> Any:
        """Return a packed weight, mapped from its file, which is written first where there is none. O(bytes).

        Args:
            name: of the weight; a file of another name is refused.
            pack: returns the packed weight, or None for one that is not packed.

        Raises:
            ContainerError: no space, or the file is not that of this weight.
        """
        file = self.folder / f"packed-{self.count:05d}.safetensors"
        if file.is_file() and not file.is_symlink():
            self.resumed += 1
        else:
            form = pack()
            if form is None:
                return None
            self._write(file, name, form)
        self.count += 1
        return self._read(file, name)

    def _write(self, file: Path, name: str, form: Packed) -> None:
        scalars, tensors = to_tensors(form)
        partial = file.with_name(f"{file.name}.partial")
        with container_errors(file, sum(t.nbytes for t in tensors.values())):
            try:
                contiguous = {n: t.contiguous() for n, t in tensors.items()}
                write_aligned(contiguous, partial, {"name": name, "packed": json.dumps(scalars)})
                sync(partial)
                os.replace(partial, file)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def _read(self, file: Path, name: str) -> Packed:
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118 (not a dict)
            scalars = parse_json(metadata.get("packed", ""), "packed")
            if metadata.get("name") != name or not isinstance(scalars, dict):
                raise FormatError(f"it is not the weight {name}")
            form = self.memory.hold(checked_form(scalars, tensors), mapped=True)
        except Exception as error:  # safetensors raises several kinds
            raise_memory_error(error)
            start_over = START_OVER.format(self.folder)
            raise ContainerError(f"{file} is damaged: {first_line(error)}: {start_over}") from None
        self.files[form.values.data_ptr()] = file
        return form

    def file_of(self, form: Any) -> Path | None:
        """Return the file of a packed weight that `hold` returned."""
        return self.files.get(form.values.data_ptr())


@contextmanager
def packed_store(out: str | os.PathLike[str], key: Mapping[str, Any], overwrite: bool, fresh: bool) -> Iterator[Any]:
    """Yield the `PackedStore` of an output folder, which is removed when the block succeeds.

    When the block fails, what is packed so far stays, and the next run with the same key resumes.

    Args:
        out: the output folder.
        key: what the packed weights depend on: by name, and for "source" by file.
        overwrite: whether `out` may be replaced.
        fresh: whether an earlier state is removed first.

    Raises:
        ContainerError: `out` cannot be written, or there is the state of a run with another key.
    """
    target = Path(os.path.realpath(out))
    with container_errors(target):
        check_output_folder(target, overwrite)
    work = target.with_name(f".{target.name}.packing")
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ContainerError(f"{work} is a link or no folder: remove it, or give another name")
    new = [p for p in work.parents if not p.exists()]
    with container_errors(target):
        work.mkdir(parents=True, exist_ok=True)
    lock = lock_file(work / KEY_FILE)
    store = PackedStore(work)
    try:
        _check_key(lock, work, dict(key), fresh)
        yield store
        _remove(work)
    except BaseException:
        if any(work.glob("packed-*.safetensors")):
            if store.count:
                say([f"progress is saved in {work}: run the same command again to resume"])
        else:
            _remove(work)
            with suppress(OSError):  # something else is in one
                for folder in new:
                    folder.rmdir()
        raise
    finally:
        unlock_file(lock)


def _check_key(lock: Any, work: Path, key: dict[str, Any], fresh: bool) -> None:
    """Write the key of a new run; ContainerError if the folder has weights of another one."""
    text = lock.read(MAX_KEY_BYTES)
    if fresh or not text:  # without a key, nobody knows of which run the weights are
        _remove(work, keep_key=True)
    if not text or not any(work.glob("packed-*.safetensors")):
        with container_errors(work):
            lock.truncate(0)
            lock.write(json.dumps(key))
            lock.flush()
        return
    stored = parse_json(text, str(work / KEY_FILE))
    if stored == key:
        return
    old, new = ({} if not isinstance(k, dict) else k for k in (stored, key))
    changed = next((n for n in new if old.get(n) != new[n]), "key")
    what = f"with another {changed}"
    if changed == "source":
        files = old["source"] if isinstance(old.get("source"), dict) else {}
        name = next((n for n in {**new["source"], **files} if files.get(n) != new["source"].get(n)), "")
        what = f"of another source: {name} has changed since"
    raise ContainerError(f"{work} has the state of a run {what}: {START_OVER.format(work)}")


def _remove(work: Path, keep_key: bool = False) -> None:
    """Remove the files of a store, the key last, and its folder if nothing else is in it."""
    if work.is_symlink() or not work.is_dir():
        return
    for file in [f for f in work.iterdir() if WEIGHT_FILE.fullmatch(f.name)]:
        file.unlink(missing_ok=True)
    if not keep_key:
        (work / KEY_FILE).unlink(missing_ok=True)
    with suppress(OSError):  # something else is in it
        work.rmdir()
