"""Notice that weights have changed since a graph was compiled: by an optimizer, `load_state_dict` or `.data`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

PROBE_BYTES = 32  # of each weight that are compared

_version = attrgetter("_version")


class WeightGuard:
    """The state of some tensors, to be compared at each call.

    torch counts the changes of each tensor, but not those through `.data`. So the address of each weight and a few of
    its entries are compared too.

    Example:
        >>> weight = torch.ones(3, 4)
        >>> guard = WeightGuard([weight])
        >>> guard.is_unchanged([weight])
        True
        >>> weight.data.mul_(2).sum(), guard.is_unchanged([weight])
        (tensor(24.), False)
    """

    def __init__(self, tensors: Sequence[Tensor], on_death: Callable[[], None] | None = None):
        """Read the state of the tensors.

        Args:
            tensors: parameters and buffers, none of them made in inference mode.
            on_death: called when one of the tensors is freed.
        """
        self.alive = True
        self._on_death = on_death
        self._references = [weakref.ref(t, self._died) for t in tensors]
        self._versions, self._addresses = _state(tensors)
        self._probes = [_entries(t) for t in tensors if t.numel()]
        self._values = b"".join(self._probes)

    def _died(self, _: object) -> None:
        self.alive = False
        if self._on_death is not None:
            self._on_death()

    def is_unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors are as they were, as far as can be seen. Microseconds for a hundred."""
        if not self.alive or _state(tensors) != (self._versions, self._addresses):
            return False
        return b"".join(self._probes) == self._values  # at the same addresses


def _state(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    return list(map(_version, tensors)), list(map(Tensor.data_ptr, tensors))


def _entries(t: Tensor) -> memoryview:
    """Return the bytes of a few entries in the middle of a tensor, as they are and will be."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    count = min(span, max(1, PROBE_BYTES // t.element_size()))
    with torch.inference_mode(False), torch.no_grad():
        entries = t.detach().as_strided((count,), (1,), t.storage_offset() + (span - count) // 2)
        array: Any = entries.view(torch.uint8).numpy()
        return memoryview(array)
