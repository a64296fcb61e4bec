"""Memory in huge pages, for weights: reading them as one stream is faster (20 % of a language model's decode step)."""

from __future__ import annotations

import mmap
import os
import sys
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rarefy.runtime.packed_formats import Packed

HUGE_PAGE = 2 << 20  # bytes
MIN_CHUNK, MAX_CHUNK = 4 << 20, 64 << 20  # bytes of the first chunk of memory, and of later ones
CACHE_LINE = 64
MIN_MAPPED = 1 << 16  # bytes of a tensor that stays in a mapped file
INDICES = ("masks", "starts", "counts", "columns", "order")  # tensors by which kernels find others
LAST_CACHE = 194  # glibc's _SC_LEVEL3_CACHE_SIZE


@cache
def last_cache() -> int:
    """Return the bytes of the CPU's L3 cache, 0 if they are not known. O(1)."""
    try:
        return max(0, os.sysconf(LAST_CACHE)) if sys.platform == "linux" else 0
    except (OSError, ValueError):  # libraries without that number
        return 0


def allocate(nbytes: int) -> Tensor:
    """Return new memory, uint8 [nbytes], aligned to a huge page if it is larger than one. O(1).

    Raises:
        MemoryError: if there is not as much.
    """
    alignment = HUGE_PAGE if nbytes > HUGE_PAGE else CACHE_LINE
    memory = _mapped(nbytes + alignment) if nbytes > HUGE_PAGE else torch.empty(nbytes + alignment, dtype=torch.uint8)
    return memory[-memory.data_ptr() % alignment :][:nbytes]


def _mapped(nbytes: int) -> Tensor:
    """Return memory that nothing has used yet: what `malloc` returns again is in small pages already."""
    try:
        if not hasattr(mmap, "MADV_HUGEPAGE"):  # it is Linux's
            return torch.empty(nbytes, dtype=torch.uint8)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, RuntimeError) as error:
        raise MemoryError(f"not enough memory for {nbytes:,} bytes") from error
    with suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class HugePageBuffer:
    """Stores packed weights one after the other in huge pages; each keeps its chunk of memory alive."""

    def __init__(self) -> None:
        self.chunk, self.used, self.size = allocate(0), 0, MIN_CHUNK

    def hold(self, packed: Packed, mapped: bool = False) -> Any:
        """Return a packed weight whose tensors are copies in huge pages. O(bytes that are copied).

        With `mapped`, tensors in a mapped file stay there: large ones that are aligned, and hold numbers alone. Indices
        are copied, so that nobody changes them after the kernel's check.
        """
        stay = {n for n, v in vars(packed).items() if mapped and isinstance(v, Tensor) and _can_stay(n, v)}
        copies: dict[str, Any] = {
            n: self._copy(v) if isinstance(v, Tensor) and n not in stay else v for n, v in vars(packed).items()
        }
        return type(packed)(**copies)

    def _copy(self, t: Tensor) -> Tensor:
        if self.used + t.nbytes > len(self.chunk):
            self.chunk, self.used = allocate(max(self.size, t.nbytes)), 0
            self.size = min(2 * self.size, MAX_CHUNK)
        part = self.chunk[self.used : self.used + t.nbytes].view(t.dtype).view(t.shape)
        self.used += -(-t.nbytes // CACHE_LINE) * CACHE_LINE
        return part.copy_(t)


def _can_stay(name: str, t: Tensor) -> bool:
    return name not in INDICES and t.nbytes >= MIN_MAPPED and t.data_ptr() % CACHE_LINE == 0
