"""Several processes that work on one model (torchrun): each sees its share of the batches, sums are everyone's.

Nothing here starts a group: where torch.distributed has none, there is one process, and all of this does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rarefy.model.batches import cut, samples_in, slices, tokens_in

_whole = [0]  # how many times it was said that every process sees all batches


def size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _place() -> torch.device:
    """Where a tensor of the group's backend lies that belongs to no model."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def together() -> Iterator[None]:
    """Let every process see all batches, for what must be the same everywhere and adds up over no processes."""
    _whole[0] += 1
    try:
        yield
    finally:
        _whole[0] -= 1


def shared() -> int:
    """Return among how many processes batches are shared out."""
    return 1 if _whole[0] else size()


def mine(data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield (number, batch) of this process's share; batches are cut where there are fewer than processes."""
    many = shared()
    if many == 1:
        yield from enumerate(data)
        return
    batches = list(data)
    while len(batches) < many and any(samples_in(b) > 1 for b in batches):
        batches = [part for b in batches for part in slices(b, 2)]
    for index, batch in enumerate(batches):
        if index % many == rank():
            yield index, batch


def part_of(batch: Any) -> tuple[Any, float]:
    """Return this process's samples of a training batch, and what their mean counts in the mean of all; the whole batch
    where it has fewer samples than there are processes."""
    many, count = size(), samples_in(batch)
    if many == 1 or count < many:
        return batch, 1.0
    low, high = rank() * count // many, (rank() + 1) * count // many
    part = cut(batch, low, high)
    return part, tokens_in(part) * many / max(1, tokens_in(batch))


def summed(tensor: Tensor | None, shape: tuple[int, ...] = ()) -> Tensor | None:
    """Return the sum over processes; None where none has one, zeros where this one has none."""
    if shared() == 1:
        return tensor
    have = torch.tensor([0 if tensor is None else 1], device=_place())
    dist.all_reduce(have)
    if not int(have):
        return None
    total = torch.zeros(shape, device=_place()) if tensor is None else tensor.contiguous()
    dist.all_reduce(total)
    return total


def number(value: float) -> float:
    """Return the sum of a number over processes."""
    if shared() == 1:
        return value
    total = torch.tensor([value], dtype=torch.float64, device=_place())
    dist.all_reduce(total)
    return float(total)


def told(value: Any, source: int) -> Any:
    """Return plain data as process `source` has it (by JSON: nothing is unpickled)."""
    if size() == 1:
        return value
    text = json.dumps(value).encode() if rank() == source else b""
    long = torch.tensor([len(text)], device=_place())
    dist.broadcast(long, source)
    raw = torch.zeros(int(long), dtype=torch.uint8)
    if text:
        raw = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    raw = raw.to(_place())
    dist.broadcast(raw, source)
    return json.loads(bytes(raw.tolist()))


def sent(tensor: Tensor, source: int) -> Tensor:
    """Return a tensor as process `source` has it; the others give one of its shape and type."""
    if size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, source)
    return tensor
