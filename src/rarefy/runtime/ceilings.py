"""The machine's ceilings, measured: how fast all threads multiply, and read memory, at best."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from rarefy.runtime import bindings
from rarefy.runtime.huge_pages import allocate, last_cache
from rarefy.runtime.packed_formats import DTYPES, LANE

READ = 3  # RAREFY_CEILING_READ of csrc/rarefy.h
COMPUTE_SECONDS, READ_SECONDS = 0.06, 0.03  # for each ceiling
CACHE_BYTES = 256 << 10  # that a thread reads again and again: they fit its L2 cache
SIZE_FACTOR = 2  # from one buffer to the next
MIN_MEMORY_BYTES = 256 << 20


@dataclass(frozen=True)
class Ceilings:
    """What all threads reach together.

    Attributes:
        isa: the instruction set of the kernels.
        threads: number of threads.
        fp32: operations per second; a multiply-add counts as 2.
        bf16: the same on bf16 inputs.
        int8: the same on int8 inputs.
        int16: the same on int16 inputs.
        reads: bytes of a buffer, and how many bytes per second the threads read when each reads its share of that
            buffer again and again. The first buffer fits the L2 caches, the last one is larger than the last cache.
    """

    isa: str
    threads: int
    fp32: float
    bf16: float
    int8: float
    int16: float
    reads: tuple[tuple[int, float], ...]

    @property
    def cache(self) -> float:
        """Return the bytes read per second from the L2 caches."""
        return self.reads[0][1]

    @property
    def memory(self) -> float:
        """Return the bytes read per second from memory."""
        return self.reads[-1][1]

    def read_rate(self, nbytes: int) -> float:
        """Return how many bytes per second are read from data of this size: the rate of the next smaller buffer."""
        return next((rate for size, rate in reversed(self.reads) if size <= nbytes), self.cache)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {**asdict(self), "reads": [list(r) for r in self.reads]}


def ceilings() -> Ceilings:
    """Return the ceilings of this machine with the active instruction set and torch's number of threads.

    Each is the best of many windows of 2 ms. Measured once for each instruction set and number of threads in a process,
    in about half a second, with a buffer of 1.5 times the last cache.

    Raises:
        FormatError: if there are no kernels.

    Example:
        >>> c = ceilings()
        >>> c.fp32 > 0 and c.memory > 0
        True
    """
    return _measure(bindings.library().rarefy_isa().decode(), torch.get_num_threads())


@cache
def _measure(isa: str, threads: int) -> Ceilings:
    """Measure with the active instruction set and number of threads, which are the key of the cache."""
    measure = bindings.library().rarefy_measure_ceiling
    compute = {kind: 2 * measure(DTYPES.index(kind), COMPUTE_SECONDS, None, 0) for kind in LANE}
    memory = allocate(max(MIN_MEMORY_BYTES, last_cache() * 3 // 2)).fill_(1)  # pages that are written have memory
    sizes = [CACHE_BYTES * threads]
    while sizes[-1] * SIZE_FACTOR < memory.nbytes:
        sizes.append(sizes[-1] * SIZE_FACTOR)
    sizes.append(memory.nbytes)
    reads = tuple((n, measure(READ, READ_SECONDS, memory.data_ptr(), n)) for n in sizes)
    return Ceilings(isa, threads, **compute, reads=reads)
