"""The KV cache: keys and values of the tokens that a language model has read."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError
from rarefy.runtime.huge_pages import allocate

TILE = 64  # tokens


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
    """

    def __init__(self, features: int, batch: int, capacity: int, starts: Tensor | None = None):
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

    def append(self, slot: int, new: Tensor) -> Tensor:
        """Write keys or values behind `past`, which stays; torch runs this where there are no kernels.

        Args:
            slot: features that the cache stores before these.
            new: [batch, tokens, features].

        Returns:
            All tokens of the slot, [batch, past + tokens, features].
        """
        view, end = self._view(slot, new.shape[2]), self.past + new.shape[1]
        tokens = torch.arange(self.past, end)
        view[:, tokens // TILE, tokens % TILE] = new.float()
        return view.reshape(self.batch, self.capacity, -1)[:, :end]
