"""Read GGUF files. Everything is checked before a tensor is read: counts, lengths, types, sizes, places, overlaps."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.common.errors import ContainerError, ModelError
from rarefy.common.plain_file import plain_file

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
KINDS = {  # type in the file -> name, weights of a block, bytes of a block
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_NAME, MAX_TENSORS, MAX_KEYS, MAX_ITEMS = 1 << 10, 1 << 16, 1 << 16, 1 << 24
MAX_DIMENSIONS, MAX_SIZE = 4, 1 << 40


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type, its shape as torch has it, and its bytes."""

    kind: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """An open file, checked.

    Attributes:
        path: of the file.
        metadata: values by key; arrays are lists.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    data: mmap.mmap

    def blocks(self, name: str) -> Tensor:
        """Return the bytes of a tensor, uint8 [rows, bytes of a row], a copy."""
        e = self.tensors[name]
        block = np.frombuffer(self.data, np.uint8, e.num_bytes, e.start)
        copy = torch.from_numpy(block.reshape(prod(e.shape[:-1]), -1).copy())
        first = e.start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):  # of this process's memory; the system's copy of the file stays
            self.data.madvise(mmap.MADV_DONTNEED, first, e.start + e.num_bytes - first)
        return copy

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: of floating point in its own type, others in fp32; ModelError if it has NaN or infinity."""
        e, blocks = self.tensors[name], self.blocks(name)
        if e.kind in FLOATS:
            value = blocks.view(FLOATS[e.kind]).reshape(e.shape)
        else:
            import gguf

            kind = gguf.GGMLQuantizationType[e.kind]
            with np.errstate(all="ignore"):
                value = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind)).reshape(e.shape)
        if not bool(value.isfinite().all()):
            raise ModelError(f"{self.path}: {name} has NaN or infinite values: the file is damaged")
        return value


def is_file(path: str | Path) -> bool:
    """Return whether a path is that of a GGUF file, by its name."""
    return Path(path).suffix.lower() == ".gguf"


def read(path: str | Path) -> GgufFile:
    """Return an open GGUF file. O(metadata); tensors are read when they are asked for.

    Raises:
        ContainerError: the file is missing, truncated or damaged, or has a type of tensor that is not supported.
    """
    path = plain_file(path)
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ContainerError(f"{path} cannot be read as a GGUF file: {error}") from None
    try:
        return _parse(path, data)
    except _Damaged as error:
        raise ContainerError(f"{path} is no GGUF file that can be read: {error}") from None


class _Damaged(Exception):
    """What is wrong with a file."""


class _Cursor:
    """Reads values one after the other, never beyond the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.items = data, 4, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code) * count
        if size > self.left():
            raise _Damaged(f"it ends within a value at byte {self.at:,}")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += size
        return values

    def text(self, max_length: int | None = None) -> str:
        (length,) = self.numbers("Q")
        if length > self.left() or (max_length is not None and length > max_length):
            raise _Damaged(f"a text at byte {self.at:,} has {length:,} bytes, more than there are or are allowed")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _Damaged(f"the text at byte {self.at - length:,} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise _Damaged(f"a value at byte {self.at:,} has the unknown type {kind}")
        item, count = *self.numbers("I"), *self.numbers("Q")
        self.items += count
        item_bytes = 8 if item == STRING else struct.calcsize("<" + SCALARS.get(item, "B"))
        if count * item_bytes > self.left() or self.items > MAX_ITEMS:
            raise _Damaged(f"an array at byte {self.at:,} has {count:,} items, more than there are or are allowed")
        if item in SCALARS:
            return list(self.numbers(SCALARS[item], count))
        if item != STRING:
            raise _Damaged(f"an array at byte {self.at:,} has items of the type {item}, expected numbers or texts")
        return [self.text() for _ in range(count)]


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    if data[:4] != MAGIC:
        raise _Damaged("it does not begin with GGUF")
    cursor = _Cursor(data)
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        raise _Damaged(f"it has version {version}, supported are 2 and 3 (little-endian)")
    num_tensors, num_keys = cursor.numbers("Q", 2)
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise _Damaged(f"it states {num_tensors:,} tensors and {num_keys:,} keys, more than are allowed")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text(MAX_NAME)
        if key in metadata:
            raise _Damaged(f"the key {key[:80]!r} is there twice")
        metadata[key] = cursor.value(*cursor.numbers("I"))
    stated = [_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise _Damaged(f"general.alignment is {str(alignment)[:80]}, expected a power of two")
    return GgufFile(path, metadata, _placed(stated, -(-cursor.at // alignment) * alignment, alignment, len(data)), data)


def _entry(cursor: _Cursor) -> tuple[str, Entry]:
    """Return the name and the description of a tensor, its start counted from the first tensor."""
    name = cursor.text(MAX_NAME)
    (dimensions,) = cursor.numbers("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _Damaged(f"tensor {name[:80]!r} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(reversed(cursor.numbers("Q", dimensions)))
    number, start = *cursor.numbers("I"), *cursor.numbers("Q")
    if number not in KINDS:
        names = ", ".join(k for k, _, _ in KINDS.values())
        raise _Damaged(f"tensor {name[:80]!r} has the type {number}, which is not supported: {names} are")
    kind, block, size = KINDS[number]
    if min(shape) < 1 or prod(shape) > MAX_SIZE or shape[-1] % block:
        raise _Damaged(f"tensor {name[:80]!r} of {kind} has the shape {list(shape)}, which is not possible")
    return name, Entry(kind, shape, start, prod(shape) // block * size)


def _placed(stated: list[tuple[str, Entry]], first: int, alignment: int, end: int) -> dict[str, Entry]:
    """Return the tensors by name with their places in the file, which must be within it and apart."""
    tensors: dict[str, Entry] = {}
    for name, e in stated:
        if name in tensors:
            raise _Damaged(f"tensor {name[:80]!r} is there twice")
        tensors[name] = Entry(e.kind, e.shape, first + e.start, e.num_bytes)
        if e.start % alignment or first + e.start + e.num_bytes > end:
            raise _Damaged(f"tensor {name[:80]!r} is not within the file's {end:,} bytes, or not aligned")
    ordered = sorted((e.start, e.start + e.num_bytes, n) for n, e in tensors.items())
    for (_, stop, name), (start, _, other) in pairwise(ordered):
        if start < stop:
            raise _Damaged(f"tensors {name[:80]!r} and {other[:80]!r} overlap")
    return tensors
