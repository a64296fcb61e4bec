"""What lies in memory: weights that stay in their files, activations that go to one, pages handed back to the system.

All of it is advice about memory and never changes a value, so a mistake here costs time and nothing else.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.atomic_io import container_errors

PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: clean pages of a file are dropped, changed ones stay
MIN_BYTES = 1 << 16  # bytes of a tensor that is not worth moving
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None


def available_bytes() -> int | None:
    """Return the bytes that this process may still take without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(l.split()[1]) * 1024 for l in lines if l.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:  # a container's own limit
        most, taken = (int(Path("/sys/fs/cgroup", f"memory.{n}").read_text()) for n in ("max", "current"))
        return max(0, min(free, most - taken))
    except (OSError, ValueError):
        return free


def resident_bytes() -> tuple[int, int]:
    """Return the bytes of this process that are in memory now: its own, and those that belong to files; 0 where the
    system does not say."""
    try:
        whole, files = (int(n) * mmap.PAGESIZE for n in Path("/proc/self/statm").read_text().split()[1:3])
        return whole - files, files
    except OSError:
        return 0, 0


def trim_heap() -> None:
    """Give freed heap pages back to the system (glibc): activations of many batches leave holes."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def page_out(tensors: Iterable[Tensor]) -> None:
    """Advise the system to drop the pages of tensors that lie in files; they are read again when touched."""
    if not hasattr(_LIBC, "madvise"):
        return
    for t in tensors:
        if t.is_meta or t.device.type != "cpu" or t.nbytes < MIN_BYTES:
            continue
        start = t.data_ptr() & -mmap.PAGESIZE
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(t.data_ptr() + t.nbytes - start), PAGEOUT)


def file_backed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return those tensors that lie in mapped files; others would be swapped. O(mappings + tensors log mappings)."""
    try:
        lines = [l.split() for l in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return []
    spans = sorted(tuple(int(a, 16) for a in l[0].split("-")) for l in lines if l[4] != "0")
    found = []
    for t in tensors:
        at = 0 if t.is_meta or t.device.type != "cpu" else bisect.bisect(spans, (t.data_ptr() + 1,))
        if at and t.data_ptr() + t.nbytes <= spans[at - 1][1]:
            found.append(t)
    return found


@contextmanager
def limiting_resident_weights(model: nn.Module, memory: int | None) -> Iterator[None]:
    """Keep what is resident of mapped files near what it is now + an eighth of `memory` bytes by paging out the model's
    weights; None = leave them be.

    Weights as `safetensors` loads them are mapped from their file and come in as they are touched. A thread looks
    fifty times a second.
    """
    if memory is None:
        yield
        return
    done, before = threading.Event(), resident_bytes()[1]

    def look() -> None:
        while not done.wait(0.02):
            if resident_bytes()[1] > before + memory // 8:
                page_out(p.data for p in list(model.parameters()))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def tensors_in_frames(frame: Any) -> list[Tensor]:
    """Return the tensors that the frames of a suspended coroutine hold, each once."""
    found: dict[int, Tensor] = {}
    while frame is not None:
        if frame.f_code.co_flags & 1:  # a function's
            held = frame.f_locals
            _gather(held, found, 3)
            if type(held) is dict:
                held.clear()  # a snapshot (before Python 3.13) would keep alive what the function lets go
        frame = frame.f_back
    return list(found.values())


def _gather(value: Any, found: dict[int, Tensor], depth: int) -> None:
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif depth and isinstance(value, Mapping | tuple | list):
        for v in value.values() if isinstance(value, Mapping) else value:
            _gather(v, found, depth - 1)


def storage_pointers(tensors: Iterable[Tensor]) -> set[int]:
    """Return where the storages of tensors begin."""
    return {t.untyped_storage().data_ptr() for t in tensors}


def movable(tensors: Iterable[Tensor], taken: set[int]) -> list[list[Tensor]]:
    """Return the CPU tensors that nobody else refers to, grouped by storage; `taken` are
    the `storage_pointers` of tensors with other owners."""
    groups: dict[int, list[Tensor]] = {}
    for t in tensors:
        if type(t) is Tensor and t.device.type == "cpu" and t.layout == torch.strided and t.nbytes >= MIN_BYTES:
            groups.setdefault(t.untyped_storage().data_ptr(), []).append(t)
    return [same for key, same in groups.items() if key not in taken and _is_exclusive(same)]


def _is_exclusive(same: Sequence[Tensor]) -> bool:
    """Whether no tensor but these shares the storage: a change in place through another would be lost."""
    storage = same[0].untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) == len(same) + 1  # and `storage` here


def nbytes(groups: Iterable[Sequence[Tensor]]) -> int:
    """Return the bytes of grouped tensors, each storage once."""
    return sum(same[0].untyped_storage().nbytes() for same in groups)


@torch.no_grad()
def to_file(groups: Sequence[Sequence[Tensor]], folder: Path | None = None) -> None:
    """Move the storages of grouped tensors into a nameless file mapped to memory, out of which they are read when
    touched; the file is gone with the last of them. The tensors keep their values, shapes and strides."""
    starts = [0]
    for same in groups:
        starts.append(-(-(starts[-1] + same[0].untyped_storage().nbytes()) // 64) * 64)
    if not starts[-1]:
        return
    place = Path(folder or tempfile.gettempdir())
    with container_errors(place, starts[-1]), tempfile.TemporaryFile(dir=place) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash later
            os.posix_fallocate(file.fileno(), 0, starts[-1])
        file.truncate(starts[-1])
        pages = mmap.mmap(file.fileno(), starts[-1])
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    for start, same in zip(starts, groups):
        old = same[0].untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8).set_(old)
        whole[start : start + flat.numel()].copy_(flat)
        for t in same:
            offset = start // t.element_size() + t.storage_offset()
            t.set_(whole.untyped_storage(), offset, t.shape, t.stride())
    pages.madvise(mmap.MADV_DONTNEED)
