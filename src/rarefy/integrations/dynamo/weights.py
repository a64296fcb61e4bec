"""Notice that weights have changed since a graph was compiled: by an optimizer, `load_state_dict`, `.data` or numpy.

torch counts changes of a tensor, but not those through `.data`. The check of a call may not read the weights: that
takes longer than many calls. Instead, torch's copy-on-write flag tells of writes: `_lazy_clone` sets it on a storage,
and every function of torch that takes the storage's memory for writing clears it, whichever tensor it was called with.
As the clone is freed at once, nothing is ever copied and no address changes. A flag is also cleared by some functions
that only read (`torch.save`, `data_ptr()`, `numpy()`): then the values decide.

The flag says nothing of writers that had the memory before it was set, such as numpy arrays. torch counts the tensors
of a storage, and an array owns one of them. Where there are more than the weights themselves, samples are compared.
"""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import cache
from operator import attrgetter
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

STEPS = (61, 59, 53, 47)  # between samples: less than 64 entries, and no divisor of most sizes
MAX_CLEARED = 16  # times that flags were cleared without a change, after which a guard reports a change

_version = attrgetter("_version")
_C: Any = torch._C
_address: Callable[[Tensor], int] = _C._data_address  # unlike data_ptr(), it leaves the flag
_is_flagged: Callable[[Tensor], bool] = _C._is_cow_tensor
_lock = RLock()
_guards: weakref.WeakSet[WeightGuard] = weakref.WeakSet()  # those that watch


class WeightGuard:
    """The state of some tensors, to be compared at each call.

    A new guard sees what torch counts, and other memory. `watch` makes it see all writes.

    Example:
        >>> weight = torch.ones(3, 4)
        >>> guard = WeightGuard([weight])
        >>> guard.watch([weight], [weight.clone()])
        True
        >>> weight.data[2].mul_(2).sum(), guard.is_unchanged([weight])
        (tensor(8.), False)
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
        self._addresses = list(map(_address, tensors))
        self._counted = list(range(len(tensors)))  # positions of tensors whose versions are compared
        self._versions = list(map(_version, tensors))
        self._flagged: list[int] = []  # positions of tensors whose flags are checked
        self._cleared: set[int] = set()  # those of them whose flag was cleared
        self._num_cleared = 0
        self._samples: list[tuple[Tensor, Tensor]] = []  # a view, and its values of before
        self._digests: list[bytes] = []
        self._owners: dict[int, int] = {}

    def _died(self, _: object) -> None:
        self.alive = False
        if self._on_death is not None:
            self._on_death()

    def watch(
        self, tensors: Sequence[Tensor], copies: Sequence[Tensor], sampled: AbstractSet[int] = frozenset()
    ) -> bool:
        """See all writes from now on. Return whether the tensors are still equal to copies of them, bit for bit.

        Args:
            tensors: those of `__init__`.
            copies: their values, in memory of their own.
            sampled: positions of tensors of which samples are compared, beside all that have no flag.
        """
        with _lock, torch.inference_mode(False), torch.no_grad():
            self._digests = list(map(_digest, copies))
            flagged = _set_flags(dict(enumerate(tensors)))
            views = [_sample(t) for i, t in enumerate(tensors) if t.numel() and (i in sampled or i not in flagged)]
            self._samples = [(view, view.clone()) for view in views]
            self._flagged = sorted(flagged)
            self._counted = [i for i in range(len(tensors)) if i not in flagged]
            self._versions = [tensors[i]._version for i in self._counted]
            self._owners = _num_owners(tensors)
            _guards.add(self)
            return list(map(_address, tensors)) == self._addresses and list(map(_digest, tensors)) == self._digests

    @property
    def num_samples(self) -> int:
        """The number of entries that each call reads."""
        return sum(view.numel() for view, _ in self._samples)

    def is_unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors are as they were. About 0.3 microseconds for each, more where samples are compared."""
        if not self.alive or list(map(_address, tensors)) != self._addresses:
            return False
        flagged = tensors
        if self._counted:
            if [tensors[i]._version for i in self._counted] != self._versions:
                return False
            flagged = [tensors[i] for i in self._flagged]
        if not all(torch.equal(view, before) for view, before in self._samples):
            return False
        return (not self._cleared and all(map(_is_flagged, flagged))) or self._was_only_read()

    def note_cleared(self) -> None:
        """Remember which flags were cleared, before they are set again for another guard."""
        for i in self._flagged:
            t = self._references[i]()
            if t is None or _address(t) != self._addresses[i]:
                self.alive = False  # a storage that cannot be followed
            elif not _is_flagged(t):
                self._cleared.add(i)

    def _was_only_read(self) -> bool:
        """Return whether tensors whose flags were cleared have the values of before, and set their flags again."""
        with _lock, torch.inference_mode(False), torch.no_grad():
            self.note_cleared()
            self._num_cleared += 1
            if not self.alive or self._num_cleared > MAX_CLEARED:
                return False
            tensors = {i: t for i in self._cleared if (t := self._references[i]()) is not None}
            if _set_flags(tensors) != self._cleared:
                return False
            if any(n > self._owners[storage] for storage, n in _num_owners(list(tensors.values())).items()):
                return False  # such as an array of numpy, which may write from now on
            if any(_digest(t) != self._digests[i] for i, t in tensors.items()):
                return False
            self._cleared.clear()
            return True


def find_sampled(tensors: Sequence[Tensor]) -> set[int]:
    """Return the positions of weights whose memory may be written without a flag, because something else has it.

    Weights in a private mapping of a file have no flags. transformers and `torch.load(mmap=True)` create them. They are
    moved into memory of their own, if nothing else uses them. On Linux alone; elsewhere samples are compared.
    """
    with _lock, torch.inference_mode(False), torch.no_grad():
        shared = _shared(tensors)
        flagged = _set_flags(dict(enumerate(tensors)))
        rest = [t for i, t in enumerate(tensors) if i not in flagged | shared and t.numel()] if _flags_work() else []
        private = _private_mappings() if rest else []
        num_weights = Counter(map(_storage, rest))
        for t in rest:
            inside = any(begin <= _address(t) < end for begin, end in private)
            if inside and num_weights[_storage(t)] == 1:
                t.data = t.detach().clone()
        return shared


def find_unsafe(run: Callable[[], Any], copies: Sequence[Tensor]) -> set[int]:
    """Return the positions of weights whose flags a model clears, although it only reads them.

    Args:
        run: runs the model on the copies.
        copies: copies of its weights.
    """
    with _lock:
        flagged = _set_flags(dict(enumerate(copies)))
    try:
        run()
    except Exception:  # torch refuses to clear flags in some loops of extensions
        return set(range(len(copies)))
    return {i for i in flagged if not _is_flagged(copies[i])}


# ---- flags ----------------------------------------------------------------------------------------------------------


@cache
def _flags_work() -> bool:
    """Return whether this version of torch tells of writes and of arrays as this module expects."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            t = torch.zeros(4, dtype=torch.float32)
            view, address, owners = t[1:], t.data_ptr(), _num_owners([t])
            Tensor._lazy_clone(t)
            read = t.sum() == 0 and _is_flagged(t) and _is_flagged(view) and _address(t) == address
            view.data.add_(1)
            written = not _is_flagged(t) and t.data_ptr() == address and float(t.sum()) == 3
            array = t.numpy()
            return bool(read and written and array[1] == 1 and _num_owners([t])[_storage(t)] > owners[_storage(t)])
    except (AttributeError, RuntimeError, TypeError):
        return False


def _set_flags(tensors: dict[int, Tensor]) -> set[int]:
    """Set the flags of tensors' storages; return the positions of those that have one."""
    if not _flags_work():
        return set()
    for guard in list(_guards):
        guard.note_cleared()
    for t in tensors.values():
        if not _is_flagged(t):
            with suppress(RuntimeError):  # memory of numpy, of other processes, of files has none
                Tensor._lazy_clone(t.detach())
    return {i for i, t in tensors.items() if _is_flagged(t)}


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _num_owners(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Return how many tensors use each storage of these, and one more for its Python object."""
    return {(storage := _storage(t)): _C._storage_Use_Count(storage) for t in tensors}


def _shared(tensors: Sequence[Tensor]) -> set[int]:
    """Return the positions of tensors whose storage other tensors use too, among them those of numpy arrays."""
    known = Counter(map(_storage, tensors))
    storages: set[int] = set()
    for collect in (False, True):
        if collect:
            gc.collect()  # programs of earlier exports
        storages = {storage for storage, n in _num_owners(tensors).items() if n > known[storage] + 1}
        if not storages:
            break
    return {i for i, t in enumerate(tensors) if _storage(t) in storages}


def _private_mappings() -> list[tuple[int, int]]:
    """Return the address ranges of files that are mapped so that writes stay in this process."""
    maps = Path("/proc/self/maps")
    ranges = []
    for line in maps.read_text().splitlines() if maps.exists() else []:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].endswith("p") and fields[5].startswith("/"):
            begin, end = fields[0].split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    return ranges


# ---- values ---------------------------------------------------------------------------------------------------------


def _bits(t: Tensor) -> Tensor:
    """Return a tensor's memory as integers, so that NaN is equal to itself."""
    return t.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _digest(t: Tensor) -> bytes:
    values: Any = _bits(t).clone(memory_format=torch.contiguous_format).numpy()
    return hashlib.blake2b(values, digest_size=16).digest()


def _sample(t: Tensor) -> Tensor:
    """Return a view with at least one of each 64 neighbouring entries along each dimension, of other layouts all."""
    bits = _bits(t)
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    step = next((step for step in STEPS if all(s % step for n, s in zip(t.shape, t.stride()) if n > 1)), 1)
    if span != t.numel():
        return bits
    return bits.as_strided((1 + (span - 1) // step,), (step,), t.storage_offset())
