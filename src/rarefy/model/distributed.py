"""Several processes that work on one model (torchrun): data are divided, sums are reduced over all processes.

Nothing here starts a process group. Without torch.distributed there is one process, and these functions do nothing.
The last four functions handle tensors that FSDP2 spreads over the processes (DTensor).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rarefy.model.batches import count_samples, count_tokens, slice_batch, split_batch

_replicated = [0]  # how many times it was said that every process sees all batches
_alone = [0]  # how many times it was said that every process works by itself
POLL = 0.005  # seconds between two looks at a message that has not arrived


def world_size() -> int:
    """Return the number of processes that work together."""
    if _alone[0]:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _backend_device() -> torch.device:
    """Return the device on which the group's backend communicates."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def alone() -> AbstractContextManager[None]:
    """Let every process work by itself within this context: on all batches, with no sums over processes."""
    return _counted(_alone)


def replicated_data() -> AbstractContextManager[None]:
    """Let every process see all batches, and sum nothing over processes, within this context."""
    return _counted(_replicated)


@contextmanager
def _counted(counter: list[int]) -> Iterator[None]:
    """Count one more within this context, which others may surround."""
    counter[0] += 1
    try:
        yield
    finally:
        counter[0] -= 1


def num_data_shards() -> int:
    """Return the number of processes that batches are divided among."""
    return 1 if _replicated[0] else world_size()


def local_batches(data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield (index, batch) for this process's share. Batches are split if there are fewer than processes."""
    processes = num_data_shards()
    if processes == 1:
        yield from enumerate(data)
        return
    batches = list(data)
    while len(batches) < processes and any(count_samples(b) > 1 for b in batches):
        batches = [part for b in batches for part in split_batch(b, 2)]
    for index, batch in enumerate(batches):
        if index % processes == rank():
            yield index, batch


def local_samples(batch: Any) -> tuple[Any, float]:
    """Return this process's samples of a training batch, and the weight of their mean in the mean over all.

    A batch with fewer samples than processes is not divided.
    """
    processes, samples = world_size(), count_samples(batch)
    if processes == 1 or samples < processes:
        return batch, 1.0
    start, end = rank() * samples // processes, (rank() + 1) * samples // processes
    part = slice_batch(batch, start, end)
    return part, count_tokens(part) * processes / max(1, count_tokens(batch))


def all_reduce_tensor(tensor: Tensor | None, shape: tuple[int, ...] = ()) -> Tensor | None:
    """Return the sum over processes: None if no process has a tensor, zeros from one that has none."""
    if num_data_shards() == 1:
        return tensor
    count = torch.tensor([0 if tensor is None else 1], device=_backend_device())
    dist.all_reduce(count)
    if not int(count):
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
    """Return the plain data of process `source` on every process. Sent as JSON, so that nothing is unpickled."""
    if world_size() == 1:
        return value
    text = json.dumps(value).encode() if rank() == source else b""
    length = torch.tensor([len(text)], device=_backend_device())
    dist.broadcast(length, source)
    data = torch.zeros(int(length), dtype=torch.uint8)
    if text:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    data = data.to(_backend_device())
    dist.broadcast(data, source)
    return json.loads(bytes(data.tolist()))


def gather_json(value: Any, group: Any = None) -> list[Any]:
    """Return the plain data of each process on every process, by rank. Sent as JSON, so that nothing is unpickled.

    Args:
        value: what JSON can hold.
        group: a group with a backend for CPU tensors; by default that of all processes, with any backend.

    Raises:
        RuntimeError: if the connection to a process is lost.
    """
    device = _backend_device() if group is None else torch.device("cpu")
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    _wait(dist.all_gather(lengths, torch.tensor([len(data)], device=device), group, async_op=True))
    longest = max(int(n) for n in lengths)
    texts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in lengths]
    _wait(dist.all_gather(texts, torch.nn.functional.pad(data, (0, longest - len(data))), group, async_op=True))
    return [json.loads(text[: int(n)].cpu().numpy().tobytes()) for text, n in zip(texts, lengths)]


def _wait(work: Any) -> None:
    """Wait for other processes; unlike a wait inside the backend, Ctrl-C ends this one."""
    while not work.is_completed():
        time.sleep(POLL)
    work.wait()


def broadcast_tensor(tensor: Tensor, source: int) -> Tensor:
    """Return the tensor of process `source` on every process; the others pass one of the same shape and dtype."""
    if world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, source)
    return tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Tensor:
    """Return the whole tensor on every process; a tensor that is not sharded is returned as it is.

    >>> full_tensor(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(full: Tensor, tensor: Any) -> Tensor:
    """Shard a tensor, which every process holds in full, as `tensor` is sharded."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean over processes, as DDP and FSDP average gradients."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()
