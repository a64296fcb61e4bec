"""The index of a container, `rarefy.json`: its fields are checked, and a hash notices a changed one.

    {"format": "rarefy", "schema": 2, "sha256": of all that follows,
     "shards": {file: {"sha256", "bytes"}},
     "tensors": {name: {"format", "shape", "dtype", "extra", "parts": {part: {"shard", "key"}}}},
     "aliases": {tied: stored}, "meta": {...}}

Schema 1, of Rarefy 0.1.0 and before, has no hash and is still read.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from rarefy.common.errors import ContainerError, unknown
from rarefy.formats.quantized_encodings import PARTS
from rarefy.formats.sparse_encodings import DTYPES

SCHEMA = 2
SHARD_NAME = re.compile(r"weights-[0-9]{5,8}\.safetensors(\.xz)?")


def digest(index: dict[str, Any]) -> str:
    """Return the SHA-256 of an index without its own hash, whatever the order and layout of its JSON.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1, "sha256": "x"})
    True
    """
    plain = {k: v for k, v in index.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def short(value: object) -> str:
    """Return a value from a file as text of at most 80 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_fields(value: Any, where: str, **kinds: type) -> None:
    """Raise ContainerError unless a value is an object with exactly these fields, of these types."""
    if type(value) is not dict or set(value) != set(kinds):
        got = sorted(value) if type(value) is dict else value
        raise ContainerError(f"{where}: is {short(got)}, must be an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(value[name]) is not kind:
            raise ContainerError(f"{where}: {name} is {short(value[name])}, must be {kind.__name__}")


def check_name(name: Any, where: str) -> None:
    """Raise ContainerError for what cannot be a tensor's name."""
    if type(name) is not str or not 0 < len(name) <= 1024 or not name.isprintable():
        raise ContainerError(f"{where}: tensor name {short(name)} must be 1 to 1024 printable characters")


def check_index(index: Any, where: str) -> None:
    """Raise ContainerError unless every field of an index has the right type, and its hash is right."""
    if type(index) is not dict or index.get("format") != "rarefy" or type(index.get("schema")) is not int:
        raise ContainerError(f'{where}: must be an object with "format": "rarefy" and a whole number "schema"')
    if not 1 <= index["schema"] <= SCHEMA:
        newer = "written by a newer Rarefy" if index["schema"] > SCHEMA else "unknown"
        raise ContainerError(
            f"{where}: schema {short(index['schema'])} is {newer}; this one reads schema 1 to {SCHEMA}"
        )
    sealed = {"sha256": str} if index["schema"] >= 2 else {}
    check_fields(index, where, format=str, schema=int, **sealed, shards=dict, tensors=dict, aliases=dict, meta=dict)
    for file, known in index["shards"].items():
        if not SHARD_NAME.fullmatch(file):
            raise ContainerError(f"{where}: shard {short(file)} must be named like weights-00001.safetensors")
        extra = {"raw": int} if file.endswith(".xz") else {}
        check_fields(known, f"{where}: shard {file}", sha256=str, bytes=int, **extra)
    for name, entry in index["tensors"].items():
        check_name(name, where)
        _check_entry(entry, f"{where}: tensor {short(name)}", index["shards"])
    for name, stored in index["aliases"].items():
        check_name(name, where)
        if type(stored) is not str or stored not in index["tensors"] or name in index["tensors"]:
            pair = f"{short(name)} -> {short(stored)}"
            raise ContainerError(f"{where}: alias {pair} must map a new name to a stored one")
    if sealed and index["sha256"] != digest(index):
        raise ContainerError(f"{where}: its sha256 does not match its contents; the file was altered")


def _check_entry(entry: Any, where: str, shards: dict[str, Any]) -> None:
    check_fields(entry, where, format=str, shape=list, dtype=str, extra=dict, parts=dict)
    for field, known in (("format", PARTS), ("dtype", DTYPES)):
        if entry[field] not in known:
            raise ContainerError(unknown(field, entry[field][:80], known, where))
    if any(type(d) is not int or not 0 <= d <= 2**48 for d in entry["shape"]) or len(entry["shape"]) > 16:
        raise ContainerError(f"{where}: shape {short(entry['shape'])} must be at most 16 sizes from 0 to 2**48")
    if set(entry["parts"]) != set(PARTS[entry["format"]]):
        raise ContainerError(f"{where}: parts {short(sorted(entry['parts']))} are not those of {entry['format']}")
    for part, location in entry["parts"].items():
        check_fields(location, f"{where}: part {part}", shard=str, key=str)
        if location["shard"] not in shards:
            raise ContainerError(f"{where}: part {part} is in {short(location['shard'])}, which is not a listed shard")
