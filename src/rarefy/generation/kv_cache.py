"""Keys and values of tokens that a language model has read."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.runtime.huge_pages import fresh

TILE = 64  # tokens


class Cache:
    """Keys and values of `batch` sequences of at most `capacity` tokens, as plans read them: for each layer its keys,
    then its values, [batch, tiles of 64 tokens, features, 64], fp32.

    most      tokens that it is for; `capacity`: these in whole tiles
    past      tokens that are there
    starts    [batch], the first token of each sequence that counts, where some are filled up on the left; or None
    """

    def __init__(self, features: int, batch: int, capacity: int, starts: Tensor | None = None):
        for name, n in (("batch", batch), ("capacity", capacity)):
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise DataError(f"{name} of a cache is a whole number, 1 or more, got {n!r}")
        self.features, self.batch, self.most, self.past = features, batch, capacity, 0
        self.capacity = -(-capacity // TILE) * TILE
        self.starts = None if starts is None else starts.to(torch.int64).contiguous()
        size = 4 * features * batch * self.capacity
        try:
            self.memory = fresh(size).view(torch.float32).zero_()
        except RuntimeError:  # torch's own
            told = f"a cache of {capacity:,} tokens for {batch} sequences takes {size:,} bytes: there is no room for it"
            raise MemoryError(told) from None

    def _of(self, before: int, features: int) -> Tensor:
        """A view [batch, tiles, 64, features]."""
        each = self.batch * self.capacity
        part = self.memory[before * each : (before + features) * each]
        return part.view(self.batch, -1, features, TILE).transpose(2, 3)

    def keep(self, before: int, new: Tensor) -> Tensor:
        """Write new ones [batch, tokens, features] behind `past`; return all [batch, past + tokens, features].
        O(tokens)."""
        own, end = self._of(before, new.shape[2]), self.past + new.shape[1]
        places = torch.arange(self.past, end)
        own[:, places // TILE, places % TILE] = new.float()
        return own.reshape(self.batch, self.capacity, -1)[:, :end]
