"""The KV cache: keys and values of the tokens that a language model has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError
from rarefy.runtime.huge_pages import allocate

TILE = 64  # tokens


def slots_of(graph: Any) -> list[tuple[int, int]]:
    """Return where a graph's cached attention keeps the keys and values of each layer, and their features."""
    slots: list[tuple[int, int]] = []
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") in ("cached_attention", "capped_cached_attention"):
            keys, values = node.args[4]
            slots += [(keys, values - keys), (values, values - keys)]
    return slots


class Cache:
    """Keys and values of several sequences, as native programs read them; see `Decoder.cache`.

    For each layer it stores keys, then values, both [batch, tiles of 64 tokens, features, 64] in fp32.

    Attributes:
        features: features of keys and values of all layers.
        batch: number of sequences.
        max_tokens: most tokens of a sequence.
        capacity: max_tokens rounded up to whole tiles.
        past: tokens that it holds.
        starts: first token of each sequence that is no padding, [batch]; None without padding.
        slots: where the keys and values of each layer begin, and their features.
    """

    def __init__(
        self,
        features: int,
        batch: int,
        capacity: int,
        starts: Tensor | None = None,
        slots: Sequence[tuple[int, int]] = (),
    ):
        self.slots = tuple(slots)
        for name, n in (("batch", batch), ("capacity", capacity)):
            check_int(name, n, 1, DataError)
        self.features, self.batch, self.max_tokens, self.past = features, batch, capacity, 0
        self.capacity = -(-capacity // TILE) * TILE
        self.starts = None if starts is None else starts.to(torch.int64).contiguous()
        size = 4 * features * batch * self.capacity
        try:
            self.memory = allocate(size).view(torch.float32).zero_()
        except RuntimeError:  # raised by torch
            message = f"not enough memory for a cache of {capacity:,} tokens of {batch} sequences: {size:,} bytes"
            raise MemoryError(message) from None

    def _view(self, slot: int, features: int) -> Tensor:
        """Return a view [batch, tiles, 64, features] of what is stored from a slot on."""
        tokens = self.batch * self.capacity
        part = self.memory[slot * tokens : (slot + features) * tokens]
        return part.view(self.batch, -1, features, TILE).transpose(2, 3)

    def repeated(self, count: int) -> Cache:
        """Return a cache with each sequence `count` times, one after the other. O(tokens that it holds)."""
        starts = None if self.starts is None else self.starts.repeat_interleave(count, 0)
        other = Cache(self.features, self.batch * count, self.max_tokens, starts, self.slots)
        other.past, tiles = self.past, -(-self.past // TILE)
        for slot, features in self.slots:
            source = self._view(slot, features)[:, :tiles]
            other._view(slot, features)[:, :tiles] = source.repeat_interleave(count, 0)
        return other

    def select_(self, rows: Tensor) -> None:
        """Replace the sequences by those of other rows [batch], as a beam search goes on. O(tokens that it holds)."""
        if torch.equal(rows, torch.arange(self.batch)):
            return
        tiles = -(-self.past // TILE)
        for slot, features in self.slots:
            view = self._view(slot, features)[:, :tiles]
            view.copy_(view[rows])

    def append(self, slot: int, new: Tensor) -> Tensor:
        """Write keys or values behind `past`, which stays; torch runs this where there are no kernels.

        Args:
            slot: features that the cache stores before these.
            new: [batch, tokens, features].

        Returns:
            All tokens of the slot, [batch, past + tokens, features].
        """
        view, end = self._view(slot, new.shape[2]), self.past + new.shape[1]
        tiles = -(-end // TILE)
        tokens = torch.arange(self.past, end)
        view[:, tokens // TILE, tokens % TILE] = new.float()
        return view[:, :tiles].reshape(self.batch, tiles * TILE, -1)[:, :end]
