"""Random changes of files by their structure: JSON, text, safetensors, protobuf, GGUF, zip. All are seeded."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from contextlib import suppress
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 31, 33, 255, 4097, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (
    None, True, False, -1, 0, 1, 3, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 10**30, 0.5, -0.0, 1e-300, 1e308, "", "x",
    "fp32", "../x", "\x00", "\ud800", "\u202e", "9" * 400, "x" * 5000, [], {}, [[]], [0] * 40, {"node": "x"},
)  # fmt: skip
SPICE = "\t\x00 \n:-[]{},#&*!|>'\"%@`~?=.0189eExXyYnN_<aé\u2028\U0001f600"
WORDS = (
    "2:4", "null", "true", "1e999", ".nan", "-.inf", "NaN", "Infinity", "9" * 30, "9" * 5000, "!!int", "&a ", "*a",
    "!!python/name:os.system ", "<<: ", "2024-99-99", "1:60:60", "0x", "0b2", "---\n", "...\n", "'", '"', "  ", "\n- ",
    "!!set ", "!!omap ", "!!binary ", "!!timestamp ", "{}", "[]", "~", "[" * 3000, "- " * 3000, "{a: " * 500,
    "eval(1 ** 9 ** 9)", "((" * 60,
)  # fmt: skip


def slots_of(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in plain data."""
    slots: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        part = todo.pop()
        for key, inner in part.items() if isinstance(part, dict) else enumerate(part):
            slots.append((part, key))
            if isinstance(inner, dict | list):
                todo.append(inner)
    return slots


def mutate_json(value: Any, rng: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """Return a copy of plain data with one to three of its values replaced, removed, doubled or exchanged."""
    value = copy_json(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        slots = slots_of(value)
        if not slots:
            return copy.deepcopy(rng.choice(values))
        (part, key), (other, other_key) = rng.choice(slots), rng.choice(slots)
        action = rng.random()
        if action < 0.3:
            part[key] = copy_json(other[other_key])
        elif action < 0.4 and isinstance(part, list):
            part.insert(key, copy_json(part[key]))
        elif action < 0.5:
            del part[key]
        elif action < 0.6 and isinstance(part, dict):
            part[str(rng.choice(values))] = part.pop(key)
        elif action < 0.8 and type(part[key]) in (int, float):
            part[key] += rng.choice((-1, 1, 2, 0.5))
        elif action < 0.82:
            for _ in range(rng.choice((20, 200, 2000))):
                part[key] = [part[key]] if rng.random() < 0.5 else {"x": part[key]}
        else:
            part[key] = copy.deepcopy(rng.choice(values))
    return value


def copy_json(value: Any) -> Any:
    """Return a copy of plain data; an empty list where it is too deep to be copied."""
    try:
        return json.loads(json.dumps(value))
    except RecursionError:
        return []


def json_bytes(value: Any) -> bytes:
    """Return plain data as JSON; `[` alone where it is too deep to be written."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 100_000


def mutate_json_file(data: bytes, rng: random.Random) -> bytes:
    """Return a JSON file with another value somewhere, or with other text."""
    if rng.random() < 0.15:
        return mutate_text(data.decode("utf-8", "replace"), rng).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        return mutate_bytes(data, rng)
    return json_bytes(mutate_json(json.loads(data), rng))


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Return a file of JSON lines with one of them changed, removed or doubled."""
    lines = data.split(b"\n")
    at, action = rng.randrange(len(lines)), rng.random()
    if action < 0.7 and lines[at]:
        lines[at] = mutate_json_file(lines[at], rng)
    elif action < 0.8:
        del lines[at]
    elif action < 0.9:
        lines.insert(at, lines[rng.randrange(len(lines))])
    else:
        return mutate_bytes(data, rng)
    return b"\n".join(lines)


def mutate_bytes(data: bytes, rng: random.Random, start: int = 0) -> bytes:
    """Return data with one to eight bytes changed, cut or doubled from `start` on."""
    if len(data) <= start:
        return data + bytes([rng.randrange(256)])
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(start, len(changed))
        changed[at] = rng.choice([rng.randrange(256), changed[at] ^ 1, ord("0") + rng.randrange(10)])
    action, at = rng.random(), rng.randrange(start, len(changed))
    if action < 0.1:
        return bytes(changed[:at])
    if action < 0.2:
        return bytes(changed[:at] + changed[at : at + 9] + changed[at:])
    return bytes(changed)


def mutate_text(text: str, rng: random.Random) -> str:
    """Return text with characters, words, lines or values exchanged."""
    for _ in range(rng.randint(1, 2)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0:
                text = text[:i] + rng.choice(SPICE) + text[i + 1 :]
            case 1:
                text = text[:i] + rng.choice(WORDS) + text[i:]
            case 2:
                text = text[:i] + text[min(j, i + 12) :]
            case 3:
                text = text[:i] + text[i : i + 20] + text[i:]
            case 4:
                lines = text.split("\n")
                a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
                lines[a], lines[b] = lines[b], lines[a]
                text = "\n".join(lines)
            case 5:  # another value for a key
                at = text.find(": ", i) + 2
                end = min((k for k in (text.find(c, at) for c in ",}\n") if k >= 0), default=at)
                text = text[:at] + rng.choice(WORDS) + text[end:]
    return text


def yaml_bomb(rng: random.Random) -> str:
    """Return YAML that would grow without bounds: aliases of aliases, merge keys of merge keys, or deep nesting."""
    width, depth = rng.choice((2, 9, 40)), rng.choice((8, 30, 90))
    match rng.randrange(4):
        case 0:
            lines = ["a0: &a0 [x]"]
            lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
        case 1:
            lines = ["a0: &a0 {k: 1}"]
            lines += [
                f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(width))}, <<: *a{i - 1}}}"
                for i in range(1, depth)
            ]
        case 2:
            lines = [" " * i + "a:" for i in range(rng.choice((20, 200, 600)))]
        case _:
            lines = ["- " * rng.choice((20, 1000, 20_000)) + "x", "[" * rng.choice((20, 1000, 30_000))]
    return "\n".join(lines)


def safetensors_parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensors' bytes of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with another header, of the right or a wrong length, or other bytes."""
    header, body = safetensors_parts(data)
    action = rng.random()
    if action < 0.3:
        return data[: -len(body) or None] + mutate_numbers(body, rng) if body else mutate_bytes(data, rng)
    if action < 0.4:
        return mutate_bytes(data, rng)
    if action < 0.5:
        return struct.pack("<Q", rng.choice((*NUMBERS, len(data), len(data) - 8)) % 2**64) + data[8:]
    text = json_bytes(mutate_json(header, rng))
    return struct.pack("<Q", len(text)) + text + body


def mutate_numbers(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one number of 1, 2, 4 or 8 bytes set to a boundary value, NaN or infinity."""
    code = rng.choice("bHiIqQfd")
    size = struct.calcsize(code)
    if len(data) < size or rng.random() < 0.3:
        return mutate_bytes(data, rng)
    at = rng.randrange(len(data) // size) * size
    if code in "fd":
        number = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1.0, 1e-38))
    else:
        number = rng.choice((*NUMBERS, -1, -2, len(data))) % 2 ** (8 * size)
        number -= 2 ** (8 * size) if code.islower() and number >= 2 ** (8 * size - 1) else 0
    return data[:at] + struct.pack("<" + code, number) + data[at + size :]


def mutate_message(message: Any, rng: random.Random) -> None:
    """Change one field of a protobuf message or of a message in it: its value, its place, its copies."""
    path, parent = [message], None
    while True:
        fields = [f for f, _ in path[-1].ListFields()]
        if not fields:
            break
        field = rng.choice(fields)
        value, repeated = getattr(path[-1], field.name), hasattr(getattr(path[-1], field.name), "__len__")
        repeated = repeated and not isinstance(value, str | bytes)
        parent = (path[-1], field)
        if field.message_type is None or rng.random() < 0.12:
            break
        if repeated:
            if not len(value):
                break
            path.append(value[rng.randrange(len(value))])
        else:
            path.append(value)
    if parent is not None:
        _change_field(*parent, rng)


def _change_field(message: Any, field: Any, rng: random.Random) -> None:
    value = getattr(message, field.name)
    if isinstance(value, str | bytes | bool | int | float):
        with suppress(ValueError):  # not every number is one of the field's type
            setattr(message, field.name, _other_scalar(value, rng))
    elif not hasattr(value, "__len__") or not len(value) or rng.random() < 0.05:  # a message
        message.ClearField(field.name)
    else:
        at, action = rng.randrange(len(value)), rng.random()
        if action < 0.35:
            del value[at]
        elif action < 0.6 and field.message_type is not None:
            value.add().CopyFrom(value[at])
        elif field.message_type is not None:
            value[at].CopyFrom(value[rng.randrange(len(value))])
        elif action < 0.6:
            value.append(value[at])
        else:
            with suppress(ValueError):
                value[at] = _other_scalar(value[rng.randrange(len(value))], rng)


def _other_scalar(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bytes):
        return mutate_numbers(value, rng)
    if isinstance(value, str):
        return rng.choice(("", "x", value + "_", "../x", value[:-1], "9" * 300))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), value * 2))
    number = rng.choice((value + 1, value - 1, -1, -(2**31), *(n for n in NUMBERS if n < 2**63)))
    return number if -(2**31) <= number < 2**31 or abs(value) >= 2**31 or rng.random() < 0.8 else 7


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Return a zip file with a member changed by its kind, removed, doubled or renamed, or with other bytes."""
    if rng.random() < 0.1:
        return mutate_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    json_at = [i for i, (name, _) in enumerate(members) if name.endswith(".json")]
    at = rng.choice(json_at) if json_at and rng.random() < 0.8 else rng.randrange(len(members))
    name, content = members[at]
    action, packing = rng.random(), zipfile.ZIP_STORED
    if action < 0.05:
        del members[at]
    elif action < 0.1:
        members[at] = (rng.choice((name + "x", "../" + name, name.upper(), "-")), content)
    elif action < 0.12:
        packing, members[at] = zipfile.ZIP_DEFLATED, (name, bytes(1 << 20))
    elif name.endswith(".json"):
        members[at] = (name, mutate_json_file(content, rng))
    else:
        members[at] = (name, mutate_numbers(content, rng))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", packing) as archive:
        for member in members:
            archive.writestr(*member)
    return target.getvalue()
