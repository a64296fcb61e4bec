"""Memory: weights that stay in their files, activations moved to a file, and pages returned to the system.

Nothing here changes a value: it only decides what is resident.
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
MIN_BYTES = 1 << 16  # smaller tensors are not worth moving
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None


def available_bytes() -> int | None:
    """Return the bytes that this process may still use without swapping, or None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(l.split()[1]) * 1024 for l in lines if l.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:  # the container's limit
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{n}").read_text()) for n in ("max", "current"))
        return max(0, min(free, limit - used))
    except (OSError, ValueError):
        return free


def resident_bytes() -> tuple[int, int]:
    """Return the resident bytes of this process: (anonymous, file-backed); 0 if the system does not say."""
    try:
        whole, files = (int(n) * mmap.PAGESIZE for n in Path("/proc/self/statm").read_text().split()[1:3])
        return whole - files, files
    except OSError:
        return 0, 0


def trim_heap() -> None:
    """Return freed heap pages to the system (glibc): activations of many batches leave holes."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def page_out(tensors: Iterable[Tensor]) -> None:
    """Advise the system to drop the pages of file-backed tensors; they are read again when used."""
    if not hasattr(_LIBC, "madvise"):
        return
    for t in tensors:
        if t.is_meta or t.device.type != "cpu" or t.nbytes < MIN_BYTES:
            continue
        start = t.data_ptr() & -mmap.PAGESIZE
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(t.data_ptr() + t.nbytes - start), PAGEOUT)


def file_backed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors in memory-mapped files; others would be swapped. O(mappings + tensors log mappings)."""
    try:
        lines = [l.split() for l in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return []
    spans = sorted(tuple(int(a, 16) for a in l[0].split("-")) for l in lines if l[4] != "0")
    mapped = []
    for t in tensors:
        index = 0 if t.is_meta or t.device.type != "cpu" else bisect.bisect(spans, (t.data_ptr() + 1,))
        if index and t.data_ptr() + t.nbytes <= spans[index - 1][1]:
            mapped.append(t)
    return mapped


@contextmanager
def limiting_resident_weights(model: nn.Module, memory: int | None) -> Iterator[None]:
    """Page out the model's weights whenever file-backed memory grows by more than an eighth of `memory` bytes.

    Weights that `safetensors` loads are mapped from their file and become resident as they are used. A thread checks
    fifty times a second. None changes nothing.
    """
    if memory is None:
        yield
        return
    finished, baseline = threading.Event(), resident_bytes()[1]

    def watch() -> None:
        while not finished.wait(0.02):
            if resident_bytes()[1] > baseline + memory // 8:
                page_out(p.data for p in list(model.parameters()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def tensors_in_frames(frame: Any) -> list[Tensor]:
    """Return the tensors that the frames of a suspended coroutine hold, each once."""
    tensors: dict[int, Tensor] = {}
    while frame is not None:
        if frame.f_code.co_flags & 1:  # the frame of a function
            variables = frame.f_locals
            _gather(variables, tensors, 3)
            if type(variables) is dict:
                variables.clear()  # before Python 3.13 a snapshot, which would keep tensors alive
        frame = frame.f_back
    return list(tensors.values())


def _gather(value: Any, tensors: dict[int, Tensor], depth: int) -> None:
    if isinstance(value, Tensor):
        tensors[id(value)] = value
    elif depth and isinstance(value, Mapping | tuple | list):
        for v in value.values() if isinstance(value, Mapping) else value:
            _gather(v, tensors, depth - 1)


def storage_pointers(tensors: Iterable[Tensor]) -> set[int]:
    """Return the addresses of the tensors' storages."""
    return {t.untyped_storage().data_ptr() for t in tensors}


def movable(tensors: Iterable[Tensor], owned: set[int]) -> list[list[Tensor]]:
    """Return the CPU tensors without other references, grouped by storage; `owned` are addresses to leave out."""
    groups: dict[int, list[Tensor]] = {}
    for t in tensors:
        if type(t) is Tensor and t.device.type == "cpu" and t.layout == torch.strided and t.nbytes >= MIN_BYTES:
            groups.setdefault(t.untyped_storage().data_ptr(), []).append(t)
    return [group for start, group in groups.items() if start not in owned and _is_exclusive(group)]


def _is_exclusive(same: Sequence[Tensor]) -> bool:
    """Return whether only these tensors share the storage; an in-place change through another would be lost."""
    storage = same[0].untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) == len(same) + 1  # and `storage`


def nbytes(groups: Iterable[Sequence[Tensor]]) -> int:
    """Return the bytes of grouped tensors, each storage once."""
    return sum(same[0].untyped_storage().nbytes() for same in groups)


@torch.no_grad()
def to_file(groups: Sequence[Sequence[Tensor]], folder: Path | None = None) -> None:
    """Move the storages of grouped tensors to an unnamed, memory-mapped file, from which they are read when used.

    The file disappears with the last of the tensors. They keep their values, shapes and strides.
    """
    starts = [0]
    for group in groups:
        starts.append(-(-(starts[-1] + group[0].untyped_storage().nbytes()) // 64) * 64)
    if not starts[-1]:
        return
    directory = Path(folder or tempfile.gettempdir())
    with container_errors(directory, starts[-1]), tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash later
            os.posix_fallocate(file.fileno(), 0, starts[-1])
        file.truncate(starts[-1])
        mapping = mmap.mmap(file.fileno(), starts[-1])
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    for start, group in zip(starts, groups):
        storage = group[0].untyped_storage()
        source = torch.empty(0, dtype=torch.uint8).set_(storage)
        buffer[start : start + source.numel()].copy_(source)
        for t in group:
            offset = start // t.element_size() + t.storage_offset()
            t.set_(buffer.untyped_storage(), offset, t.shape, t.stride())
    mapping.madvise(mmap.MADV_DONTNEED)
