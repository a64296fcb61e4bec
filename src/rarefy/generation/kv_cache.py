"""The KV cache: keys and values of the tokens that a language model has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError, unknown
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
        if getattr(node.target, "__name__", "") in ("cached_attention", "capped_cached_attention"):
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

    For each layer it stores keys, then values, both [batch, tiles of 64 tokens, features, 64] in fp32. In "int8" these
    are codes, keys with pairs of features side by side, [batch, tiles, features / 2, 64, 2], and behind the codes of
    all layers follow scales, [batch, tiles, heads, 64] for keys and for values.

    Attributes:
        features: features of keys and values of all layers.
        batch: number of sequences.
        max_tokens: most tokens of a sequence.
        capacity: max_tokens rounded up to whole tiles.
        past: tokens that it holds.
        starts: first token of each sequence that is no padding, [batch]; None without padding.
        slots: where the keys and values of each layer are.
        precision: "fp32", or "int8" for codes with a scale for each token and head.
        head_dim: features of the smallest head, which say where scales are.
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
        tokens, coded = batch * self.capacity, precision == "int8"
        size = (features + 4 * (features // self.head_dim) if coded else 4 * features) * tokens
        try:
            self.memory = allocate(size).zero_()
        except RuntimeError:  # raised by torch
            message = f"not enough memory for a cache of {capacity:,} tokens of {batch} sequences: {size:,} bytes"
            raise MemoryError(message) from None
        if coded:
            self.numbers, self.codes = None, self.memory[: features * tokens].view(torch.int8)
            self.scales = self.memory[features * tokens :].view(torch.float32)
        else:
            self.numbers, self.codes, self.scales = self.memory.view(torch.float32), None, None

    def pointers(self) -> tuple[int | None, ...]:
        """Return the addresses of numbers, codes, scales and starts; None for what the cache has not."""
        tensors = self.numbers, self.codes, self.scales, self.starts
        return tuple(None if t is None else t.data_ptr() for t in tensors)

    def _part(self, memory: Tensor, start: int, width: int) -> Tensor:
        """Return a view [batch, tiles, width, 64] of what is stored from a number of a token on."""
        tokens = self.batch * self.capacity
        return memory[start * tokens : (start + width) * tokens].view(self.batch, -1, width, TILE)

    def _parts(self, slot: Slot) -> list[Tensor]:
        """Return views [batch, tiles, .., 64] of all that is stored for a slot."""
        if self.numbers is not None:
            return [self._part(self.numbers, slot.start, slot.features)]
        assert self.codes is not None and self.scales is not None
        scales = self._part(self.scales, slot.start // self.head_dim, slot.heads)
        return [self._part(self.codes, slot.start, slot.features), scales]

    def repeated(self, count: int) -> Cache:
        """Return a cache with each sequence `count` times, one after the other. O(tokens that it holds)."""
        starts = None if self.starts is None else self.starts.repeat_interleave(count, 0)
        other = Cache(self.features, self.batch * count, self.max_tokens, starts, self.slots, self.precision)
        other.past, tiles = self.past, -(-self.past // TILE)
        for slot in self.slots:
            for source, target in zip(self._parts(slot), other._parts(slot)):
                target[:, :tiles] = source[:, :tiles].repeat_interleave(count, 0)
        return other

    def select_(self, rows: Tensor) -> None:
        """Replace the sequences by those of other rows [batch], as a beam search goes on. O(tokens that it holds)."""
        if torch.equal(rows, torch.arange(self.batch)):
            return
        tiles = -(-self.past // TILE)
        for part in (p[:, :tiles] for slot in self.slots for p in self._parts(slot)):
            part.copy_(part[rows])

    def append(self, start: int, new: Tensor) -> Tensor:
        """Write keys or values behind `past`, which stays; torch runs this where there are no kernels.

        Args:
            start: features that the cache stores before these.
            new: [batch, tokens, features].

        Returns:
            All tokens of the slot, [batch, past + tokens, features]; in "int8" dequantized.
        """
        end, new = self.past + new.shape[1], new.float()
        if self.numbers is not None:
            stored = self._part(self.numbers, start, new.shape[2]).transpose(2, 3)
            return self._written(stored, new)[:, :end]
        slot = next(s for s in self.slots if s.start == start)
        codes, scales = self._parts(slot)
        heads = new.unflatten(2, (slot.heads, -1))
        largest = heads.abs().amax(3)
        scale = (largest / MAX_CODE).clamp(min=MIN_SCALE).masked_fill(~largest.isfinite(), float("nan"))
        rounded = (heads / scale[..., None]).round().clamp(-MAX_CODE, MAX_CODE).nan_to_num().flatten(2)
        if slot.is_keys:
            codes = codes.view(*codes.shape[:2], -1, TILE, 2).transpose(2, 3)
            rounded = rounded.unflatten(2, (-1, 2))
        else:
            codes = codes.transpose(2, 3)
        all_codes = self._written(codes, rounded).flatten(2).unflatten(2, (slot.heads, -1))
        return (all_codes * self._written(scales.transpose(2, 3), scale)[..., None]).flatten(2)[:, :end]

    def _written(self, stored: Tensor, new: Tensor) -> Tensor:
        """Write tokens behind `past` into a view [batch, tiles, 64, ..]; return whole tiles of tokens in a row."""
        end = self.past + new.shape[1]
        tokens = torch.arange(self.past, end)
        stored[:, tokens // TILE, tokens % TILE] = new.to(stored.dtype)
        return stored[:, : -(-end // TILE)].flatten(1, 2)
