"""Memory in large pages: what is read as one stream, as weights are, waits less for it there (a fifth of the time of a
language model's step)."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import Packed

PAGE = 2 << 20  # bytes of a large page
LEAST, MOST = 4 << 20, 64 << 20  # bytes of the first piece of memory, and of those after many
LINE = 64
LAST_CACHE = 194  # glibc's _SC_LEVEL3_CACHE_SIZE


@cache
def last_cache() -> int:
    """Return the bytes of the processor's third cache, 0 where the system does not tell. O(1)."""
    try:
        return max(0, os.sysconf(LAST_CACHE)) if sys.platform == "linux" else 0
    except (OSError, ValueError):  # libraries without that number
        return 0


def fresh(nbytes: int) -> Tensor:
    """Return bytes of new memory, which begin with a large page where they fill one. O(1)."""
    page = PAGE if nbytes > PAGE else LINE
    memory = torch.empty(nbytes + page, dtype=torch.uint8)
    if bindings.missing() is None:
        bindings.library().rarefy_advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory[-memory.data_ptr() % page :][:nbytes]


class Pages:
    """Packed weights one after the other in large pages; each holds the memory that it lies in."""

    def __init__(self) -> None:
        self.room, self.used, self.size = fresh(0), 0, LEAST

    def hold(self, packed: Packed) -> Any:
        """Return a packed weight whose tensors are copies in large pages. O(bytes)."""
        held: dict[str, Any] = {n: self._copy(v) if isinstance(v, Tensor) else v for n, v in vars(packed).items()}
        return type(packed)(**held)

    def _copy(self, t: Tensor) -> Tensor:
        if self.used + t.nbytes > len(self.room):
            self.room, self.used = fresh(max(self.size, t.nbytes)), 0
            self.size = min(2 * self.size, MOST)
        part = self.room[self.used : self.used + t.nbytes].view(t.dtype).view(t.shape)
        self.used += -(-t.nbytes // LINE) * LINE
        return part.copy_(t)
