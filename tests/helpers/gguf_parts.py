"""GGUF files as lists of keys and tensors, which can be changed one by one and written again."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SIZES = (0, 1, 2, 7, 31, 32, 255, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (b"", b"x", b"\xff\xfe", b"llama", b"qwen2", b"gemma", b"gpt2", b"{{ x }}", b"y" * 2000)


@dataclass(frozen=True)
class Tensor:
    """A tensor's description as it stands in a file."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    start: int

    def encoded(self) -> bytes:
        """Return the description as bytes."""
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return _text(self.name) + dims + struct.pack("<IQ", self.kind, self.start)


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def raw(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.raw(struct.calcsize("<" + code)))[0]

    def text(self) -> bytes:
        return self.raw(self.number("Q"))

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            return item, [self.value(item) for _ in range(count)]
        return self.number(CODES[kind])


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: object) -> bytes:
    if kind == STRING:
        return _text(value if isinstance(value, bytes) else b"")
    if kind == ARRAY:
        assert isinstance(value, tuple)
        return struct.pack("<IQ", value[0], len(value[1])) + b"".join(_value(value[0], v) for v in value[1])
    return struct.pack("<" + CODES[kind], value)


def parts(data: bytes) -> tuple[list[tuple[bytes, int, object]], list[Tensor], bytes]:
    """Return the keys with types and values, the tensors, and the bytes of all tensors."""
    reader = _Reader(data)
    _, _, num_tensors, num_keys = reader.raw(4), reader.number("I"), reader.number("Q"), reader.number("Q")
    keys = []
    for _ in range(num_keys):
        key, kind = reader.text(), reader.number("I")
        keys.append((key, kind, reader.value(kind)))
    tensors = []
    for _ in range(num_tensors):
        name = reader.text()
        dims = tuple(reader.number("Q") for _ in range(reader.number("I")))
        tensors.append(Tensor(name, dims, reader.number("I"), reader.number("Q")))
    return keys, tensors, data[-(-reader.at // 32) * 32 :]


def joined(keys: list[tuple[bytes, int, object]], tensors: list[Tensor], body: bytes) -> bytes:
    """Return a file of these parts."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(_text(key) + struct.pack("<I", kind) + _value(kind, value) for key, kind, value in keys)
    head += b"".join(t.encoded() for t in tensors)
    return head + bytes(-len(head) % 32) + body


def mutate_gguf(data: bytes, rng: random.Random) -> bytes:
    """Return a GGUF file with another key, value, description of a tensor, number anywhere, or other bytes."""
    action = rng.random()
    if action < 0.3:  # a count, length, size, type or place
        end = len(data) if rng.random() < 0.2 else data.index(b".weight") + 200
        code = rng.choice("IQ")
        at = rng.randrange(4, end - 8)
        number = rng.choice([*SIZES, len(data), len(data) - at]) % 2 ** (8 * struct.calcsize(code))
        return data[:at] + struct.pack("<" + code, number) + data[at + struct.calcsize(code) :]
    if action < 0.4:  # a piece in another place
        size = rng.randrange(1, 40)
        at, to = rng.randrange(24, len(data) - size), rng.randrange(24, len(data) - size)
        return data[:to] + data[at : at + size] + data[to + size :]
    keys, tensors, body = parts(data)
    if action < 0.75:
        at = rng.randrange(len(keys))
        keys[at] = _other_key(keys[at], rng)
        if rng.random() < 0.15:
            del keys[at]
    else:
        at = rng.randrange(len(tensors))
        tensors[at] = _other_tensor(tensors[at], tensors, rng)
        if rng.random() < 0.1:
            del tensors[at]
    return joined(keys, tensors, body)


def _other_key(entry: tuple[bytes, int, object], rng: random.Random) -> tuple[bytes, int, object]:
    key, kind, value = entry
    if rng.random() < 0.1:
        return rng.choice((key + b"x", b"general.alignment", b"tokenizer.ggml.scores", b"")), kind, value
    if rng.random() < 0.15:
        others: tuple[tuple[int, object], ...]
        others = (STRING, b"x"), (4, 7), (6, 0.5), (7, True), (ARRAY, (STRING, [b"a", b"a"])), (10, 2**63)
        other, content = rng.choice(others)
        return key, other, content
    if kind == STRING:
        return key, kind, rng.choice(TEXTS)
    if kind == ARRAY:
        assert isinstance(value, tuple)
        item, values = value[0], list(value[1])
        if values and rng.random() < 0.8:
            at = rng.randrange(len(values))
            values[at] = (
                _other_key((key, item, values[rng.randrange(len(values))]), rng)[2] if rng.random() < 0.5 else values[0]
            )
            if not isinstance(values[at], type(values[0])) and len(values) > 1:
                values[at] = values[0]
        else:
            values = values[: rng.randrange(len(values) + 1)]
        return key, kind, (item, values)
    if kind in (6, 12):
        return key, kind, rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    bits = 8 * struct.calcsize("<" + CODES[kind])
    number = rng.choice((*SIZES, int(value) + 1, int(value) - 1)) % 2**bits  # type: ignore[call-overload]
    if CODES[kind].islower() and number >= 2 ** (bits - 1):
        number -= 2**bits
    return key, kind, bool(number) if kind == 7 else number


def _other_tensor(tensor: Tensor, tensors: list[Tensor], rng: random.Random) -> Tensor:
    other = rng.choice(tensors)
    match rng.randrange(5):
        case 0:
            return replace(tensor, name=rng.choice((other.name, b"x", tensor.name + b"x", b"blk.999999.attn_q.weight")))
        case 1:
            return replace(tensor, dims=tensor.dims[::-1] if rng.random() < 0.3 else other.dims)
        case 2:
            at = rng.randrange(len(tensor.dims))
            return replace(tensor, dims=(*tensor.dims[:at], rng.choice(SIZES), *tensor.dims[at + 1 :]))
        case 3:
            return replace(tensor, kind=rng.choice((0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30, 99)))
        case _:
            return replace(tensor, start=rng.choice((other.start, *SIZES)))
