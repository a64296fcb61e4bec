"""The KV cache: keys and values of the tokens that a language model has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError, unknown
from rarefy.compiler.operators.attention import CACHED
from rarefy.runtime.huge_pages import allocate

TILE = 64  # tokens
PRECISIONS = ("fp32", "int8")
MAX_CODE = 127
MIN_SCALE = 1e-36  # MIN_INPUT_SCALE of csrc/kernel_table.h


class Slot(NamedTuple):
    """Where a cache stores the keys, or the values, of a layer: `start` features of a token come before them."""

    start: int
    features: int
    heads: int
    is_keys: bool


def slots_of(graph: Any) -> list[Slot]:
    """Return where a graph's cached attention stores the keys and values of each layer."""
    slots: list[Slot] = []
    for node in graph.nodes:
        if node.target in CACHED:
            keys, values = node.args[4]
            heads = node.args[6]
            slots += [Slot(keys, values - keys, heads, True), Slot(values, values - keys, heads, False)]
    return slots


def check_cache_precision(precision: Any, slots: Sequence[Slot] = ()) -> None:
    """Raise DataError for a precision that a cache cannot have, or cannot have for these layers."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise DataError(unknown("cache_precision", precision, PRECISIONS))
    odd = next((s.features // s.heads for s in slots if s.features // s.heads % 2), None)
    if precision == "int8" and odd is not None:
        raise DataError(f"cache_precision: int8 needs heads of an even size, got {odd}: leave it out for fp32")


class Cache:
    """Keys and values of several sequences, as native programs read them; see `Decoder.cache`.

    They are stored in pages of 64 tokens, which take memory once they are needed. Sequences that begin alike share
    them: the texts of one prompt, and beams. A page holds for each layer keys, then values, [features, 64] in fp32. In
    "int8" these are codes, keys with pairs of features side by side, [features / 2, 64, 2], with scales in a page of
    their own, [heads, 64] for keys and for values.

    Attributes:
        features: features of keys and values of all layers.
        batch: number of sequences.
        max_tokens: most tokens of a sequence.
        capacity: max_tokens rounded up to whole pages.
        past: tokens that it holds.
        reserved: tokens for which each sequence has pages.
        starts: first token of each sequence that is no padding, [batch]; None without padding.
        slots: where the keys and values of each layer are.
        precision: "fp32", or "int8" for codes with a scale for each token and head.
        head_dim: features of the smallest head, which say where scales are.
        pages: the page of each 64 tokens of a sequence, int32 [batch, capacity / 64]; -1 where there is none yet.
    """

    def __init__(
        self,
        features: int,
        batch: int,
        capacity: int,
        starts: Tensor | None = None,
        slots: Sequence[Slot] = (),
        precision: str = "fp32",
    ):
        self.slots, self.precision = tuple(slots), precision
        for name, n in (("batch", batch), ("capacity", capacity)):
            check_int(name, n, 1, DataError)
        check_cache_precision(precision, slots)
        self.features, self.batch, self.max_tokens, self.past = features, batch, capacity, 0
        self.capacity = -(-capacity // TILE) * TILE
        self.starts = None if starts is None else starts.to(torch.int64).contiguous()
        self.head_dim = min((s.features // s.heads for s in slots), default=features)
        self.reserved = self.own = 0  # `own`: tokens from which on no page is shared
        tiles, coded = self.capacity // TILE, precision == "int8"
        numbers = batch * tiles * TILE * (features if coded else 4 * features)
        heads = features // self.head_dim if coded else 0
        size = numbers + 4 * batch * tiles * TILE * heads
        try:
            memory = allocate(size)
            self.pages = torch.full((batch, tiles), -1, dtype=torch.int32)
        except (MemoryError, RuntimeError):
            message = f"not enough memory for a cache of {capacity:,} tokens of {batch} sequences: {size:,} bytes"
            raise MemoryError(message) from None
        self.stored = memory[:numbers].view(torch.int8 if coded else torch.float32).view(-1, features * TILE)
        self.scales = memory[numbers:].view(torch.float32).view(-1, heads * TILE) if coded else None
        self.free: list[int] = []  # pages that were given back
        self.used = 0  # pages that were given out so far

    @property
    def nbytes(self) -> int:
        """The bytes of all pages in use."""
        one = self.stored[0].nbytes + (0 if self.scales is None else self.scales[0].nbytes)
        return (self.used - len(self.free)) * one

    def pointers(self) -> tuple[int | None, ...]:
        """Return the addresses of numbers, codes, scales, starts and pages; None for what the cache has not."""
        numbers, codes = (None, self.stored) if self.precision == "int8" else (self.stored, None)
        tensors = numbers, codes, self.scales, self.starts, self.pages
        return tuple(None if t is None else t.data_ptr() for t in tensors)

    def reserve(self, tokens: int) -> None:
        """Give each sequence pages of its own for the next tokens, with what shared ones hold. O(1) within a page."""
        end = self.past + tokens
        if self.own <= self.past and end <= self.reserved:
            return
        first, last = self.past // TILE, -(-end // TILE)
        for tile in range(first, last):
            seen: set[int] = set()
            for row, page in enumerate(self.pages[:, tile].tolist()):
                if page < 0 or page in seen:
                    self.pages[row, tile] = self._new_page(self, page)
                seen.add(page)
        self.reserved = max(self.reserved, last * TILE)
        if last * TILE >= self.own:
            self.own = min(self.own, first * TILE)

    def _new_page(self, source: Cache, page: int) -> int:
        """Return a new page with what a page of `source` holds, which may be this cache; with zeros for -1."""
        if not self.free:
            self.free.append(self.used)
            self.used += 1
        new = self.free.pop()
        for own, other in ((self.stored, source.stored), (self.scales, source.scales)):
            if own is not None and other is not None:
                own[new] = 0 if page < 0 else other[page]
        return new

    def repeated(self, count: int) -> Cache:
        """Return a cache with each sequence `count` times, one after the other, which share the pages so far.

        O(tokens that it holds).
        """
        starts = None if self.starts is None else self.starts.repeat_interleave(count, 0)
        other = Cache(self.features, self.batch * count, self.max_tokens, starts, self.slots, self.precision)
        other._copy_pages(self, self.past, count)
        return other

    def take(self, other: Cache, tokens: int) -> None:
        """Begin all sequences with the first tokens of another cache's first sequence. They share one copy of them."""
        self._copy_pages(other, tokens, self.batch)

    def _copy_pages(self, other: Cache, tokens: int, count: int) -> None:
        """Copy the first tokens of another cache's first sequences, each for `count` sequences of this empty one."""
        for tile in range(-(-tokens // TILE)):
            for row, page in enumerate(other.pages[: self.batch // count, tile].tolist()):
                self.pages[row * count : (row + 1) * count, tile] = self._new_page(other, page)
        self.past = tokens
        self.reserved = self.own = -(-tokens // TILE) * TILE

    def select_(self, rows: Tensor) -> None:
        """Replace the sequences by those of other rows [batch], as a beam search goes on. O(pages)."""
        if torch.equal(rows, torch.arange(self.batch)):
            return
        tiles = -(-self.past // TILE)
        self.pages = self.pages[rows]
        self.pages[:, tiles:] = -1
        self.free = sorted(set(range(self.used)) - set(self.pages.flatten().tolist()))
        self.reserved = self.own = tiles * TILE

    def append(self, start: int, new: Tensor) -> Tensor:
        """Write keys or values behind `past`, which stays; torch runs this where there are no kernels.

        Args:
            start: features that the cache stores before these.
            new: [batch, tokens, features].

        Returns:
            All tokens of the slot, [batch, past + tokens, features]; in "int8" dequantized.
        """
        end, new = self.past + new.shape[1], new.float()
        if self.scales is None:
            stored = self._part(self.stored, start, new.shape[2]).unflatten(1, (-1, TILE))
            return self._written(stored.transpose(1, 2), new)[:, :end]
        slot = next(s for s in self.slots if s.start == start)
        heads = new.unflatten(2, (slot.heads, -1))
        largest = heads.abs().amax(3)
        scale = (largest / MAX_CODE).clamp(min=MIN_SCALE).masked_fill(~largest.isfinite(), float("nan"))
        rounded = (heads / scale[..., None]).round().clamp(-MAX_CODE, MAX_CODE).nan_to_num().flatten(2)
        codes = self._part(self.stored, slot.start, slot.features)
        if slot.is_keys:
            codes, rounded = codes.unflatten(1, (-1, TILE, 2)).transpose(1, 2), rounded.unflatten(2, (-1, 2))
        else:
            codes = codes.unflatten(1, (-1, TILE)).transpose(1, 2)
        scales = self._part(self.scales, slot.start // self.head_dim, slot.heads).unflatten(1, (-1, TILE))
        all_codes = self._written(codes, rounded).flatten(2).unflatten(2, (slot.heads, -1))
        return (all_codes * self._written(scales.transpose(1, 2), scale)[..., None]).flatten(2)[:, :end]

    def _part(self, memory: Tensor, start: int, width: int) -> Tensor:
        """Return a view [pages, width * 64] of what pages store from a number of a token on."""
        return memory[:, start * TILE : (start + width) * TILE]

    def _written(self, stored: Tensor, new: Tensor) -> Tensor:
        """Write tokens [batch, tokens, ..] behind `past` into a view [pages, 64, ..].

        Returns:
            Whole pages of tokens in a row, [batch, tokens, ..].
        """
        end = self.past + new.shape[1]
        tokens = torch.arange(self.past, end)
        pages = self.pages.long()
        stored[pages[:, tokens // TILE], tokens % TILE] = new.to(stored.dtype)
        return stored[pages[:, : -(-end // TILE)]].flatten(1, 2)
