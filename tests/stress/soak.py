"""A soak test: many calls of one compiled model from several threads, equal outputs, and memory that stays flat."""

from __future__ import annotations

import gc
import random
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from stress.models import MODELS

THREADS = 6  # that call at the same time
ROUNDS = 50  # of new threads
INPUTS = 24  # of different sizes
MAX_GROWTH_BYTES = 2 << 20


@dataclass
class Soak:
    """What a soak test found: calls, seconds, calls with other outputs than alone, and bytes of resident memory."""

    model: str
    calls: int = 0
    seconds: float = 0.0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    bytes_early: int = 0
    bytes_late: int = 0

    @property
    def growth(self) -> int:
        """Return the growth of memory after the first tenth, in bytes."""
        return self.bytes_late - self.bytes_early

    @property
    def passed(self) -> bool:
        """Return whether all outputs were equal, and memory flat: 2 MiB or 1 %."""
        flat = self.growth <= max(MAX_GROWTH_BYTES, self.bytes_early // 100)
        return not self.wrong and not self.errors and flat

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        memory = f"{self.bytes_early / 2**20:.1f} -> {self.bytes_late / 2**20:.1f} MiB"
        text = f"{self.model:28} {self.calls:>8,} calls in {self.seconds:6.1f} s, {self.wrong} differ, memory {memory}"
        return text + "".join(f"\n    {e}" for e in self.errors[:3])


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(name: str, calls: int, threads: int = THREADS, rounds: int = ROUNDS, inputs: int = INPUTS) -> Soak:
    """Call a model of `MODELS` from several threads, which new ones replace in each round.

    Args:
        name: of the model.
        calls: in all.
        threads: that call at the same time.
        rounds: how often threads are replaced.
        inputs: number of different inputs, more than programs are kept for.
    """
    model, result = MODELS[name], Soak(name)
    compiled, batches = model.compile(), model.inputs(inputs, torch.Generator().manual_seed(2))
    expected = [compiled(**b) for b in batches]
    each = max(1, calls // (threads * rounds))
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng, wrong = random.Random(seed), 0
        try:
            for _ in range(each):
                i = rng.randrange(inputs)
                wrong += not torch.equal(compiled(**batches[i]), expected[i])
        except Exception as error:
            with lock:
                result.errors.append(f"{type(error).__name__}: {error}")
        with lock:
            result.wrong += wrong
            result.calls += each

    began = time.monotonic()
    for r in range(rounds):
        running = [threading.Thread(target=work, args=(r * threads + t,)) for t in range(threads)]
        _ = [t.start() for t in running], [t.join() for t in running]
        if r + 1 == max(1, rounds // 10):
            result.bytes_early = resident_bytes()
    result.seconds, result.bytes_late = time.monotonic() - began, resident_bytes()
    return result
