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

from rarefy.model.batches import count_samples, count_tokens, slice_batch, split_batch

_replicated = [0]  # how many times it was said that every process sees all batches


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _backend_device() -> torch.device:
    """Where a tensor of the group's backend lies that belongs to no model."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def replicated_data() -> Iterator[None]:
    """Let every process see all batches, for what must be the same everywhere and adds up over no processes."""
    _replicated[0] += 1
    try:
        yield
    finally:
        _replicated[0] -= 1


def num_data_shards() -> int:
    """Return among how many processes batches are shared out."""
    return 1 if _replicated[0] else world_size()


def local_batches(data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield (number, batch) of this process's share; batches are cut where there are fewer than processes."""
    many = num_data_shards()
    if many == 1:
        yield from enumerate(data)
        return
    batches = list(data)
    while len(batches) < many and any(count_samples(b) > 1 for b in batches):
        batches = [part for b in batches for part in split_batch(b, 2)]
    for index, batch in enumerate(batches):
        if index % many == rank():
            yield index, batch


def local_samples(batch: Any) -> tuple[Any, float]:
    """Return this process's samples of a training batch, and what their mean counts in the mean of all; the whole batch
    where it has fewer samples than there are processes."""
    many, count = world_size(), count_samples(batch)
    if many == 1 or count < many:
        return batch, 1.0
    low, high = rank() * count // many, (rank() + 1) * count // many
    part = slice_batch(batch, low, high)
    return part, count_tokens(part) * many / max(1, count_tokens(batch))


def all_reduce_tensor(tensor: Tensor | None, shape: tuple[int, ...] = ()) -> Tensor | None:
    """Return the sum over processes; None where none has one, zeros where this one has none."""
    if num_data_shards() == 1:
        return tensor
    have = torch.tensor([0 if tensor is None else 1], device=_backend_device())
    dist.all_reduce(have)
    if not int(have):
        return None
    total = torch.zeros(shape, device=_backend_device()) if tensor is None else tensor.contiguous()
    dist.all_reduce(total)
    return total


def all_reduce_number(value: float) -> float:
    """Return the sum of a number over processes."""
    if num_data_shards() == 1:
        return value
    total = torch.tensor([value], dtype=torch.float64, device=_backend_device())
    dist.all_reduce(total)
    return float(total)


def broadcast_json(value: Any, source: int) -> Any:
    """Return plain data as process `source` has it (by JSON: nothing is unpickled)."""
    if world_size() == 1:
        return value
    text = json.dumps(value).encode() if rank() == source else b""
    long = torch.tensor([len(text)], device=_backend_device())
    dist.broadcast(long, source)
    raw = torch.zeros(int(long), dtype=torch.uint8)
    if text:
        raw = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    raw = raw.to(_backend_device())
    dist.broadcast(raw, source)
    return json.loads(bytes(raw.tolist()))


def broadcast_tensor(tensor: Tensor, source: int) -> Tensor:
    """Return a tensor as process `source` has it; the others give one of its shape and type."""
    if world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, source)
    return tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Tensor:
    """Return all of a tensor, on every process; itself where it is not spread.

    >>> full_tensor(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(full: Tensor, tensor: Any) -> Tensor:
    """Return a tensor that is whole on every process as `tensor` is spread."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean over processes of what each has, as DDP and FSDP take gradients; itself where there is one."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return tensor
    total = tensor.detach().clone()
    group.all_reduce(total)
    return total / group.get_world_size()
