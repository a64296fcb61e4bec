"""A folder of packed tensors: safetensors shards and one `rarefy.json` that says what is in them.

    index = {"format": "rarefy", "schema": 1, "shards": {file: {"sha256", "bytes"}},
             "tensors": {name: {"format", "shape", "dtype", "extra", "parts": {part: {"shard", "key"}}}},
             "aliases": {tied: stored}, "meta": {...}}

Where all of it is compressed (LZMA, as `.xz`), `rarefy.json` says only which file holds the index; shards then have
`raw`, their bytes before, and are read into memory whole.

`write` builds the folder beside its place and renames it there: whole or not at all. `read` trusts nothing: it runs
no code, follows no link, and checks every field before a tensor is touched; `values.check` does the tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from rarefy.common.atomic_io import INDEX, PICKLES, blaming, check_target, whole_folder
from rarefy.common.errors import ContainerError, FormatError, nearest, unknown
from rarefy.formats.quantized_encodings import PARTS, check, decode, grid_of
from rarefy.formats.sparse_encodings import DTYPES, Packed
from rarefy.model.quant_grid import WeightGrid

SCHEMA = 1
INDEX_BYTES = 64 * 2**20
EXPANSION, SLACK = 64, 2**20  # decoded bytes allowed per stored byte, unless the caller knows the shape
MOST_RATIO = 256  # bytes that a compressed byte may become; what is denser is stored as it is
SQUEEZED = 1 << 24  # bytes of a tensor that is tried in several formats
INDEX_XZ = "rarefy-index.json.xz"
_SHARD = re.compile(r"weights-[0-9]{5,8}\.safetensors(\.xz)?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Container:
    """A validated folder; tensors are read one at a time, and no file stays open between calls."""

    path: Path
    index: dict[str, Any]
    unpacked: dict[str, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # compressed shards that were read

    @property
    def names(self) -> list[str]:
        """The stored tensors, in the order they were written."""
        return list(self.index["tensors"])

    @property
    def aliases(self) -> dict[str, str]:
        """Tied name -> the stored name it shares."""
        return dict(self.index["aliases"])

    @property
    def meta(self) -> dict[str, Any]:
        """What the writer put in, JSON types only."""
        return self.index["meta"]

    def packed(self, name: str, expect_shape: tuple[int, ...] | None = None) -> Packed:
        """Return a stored or tied tensor as Packed and checked: O(stored bytes).

        ContainerError: no such tensor, a shape other than `expect_shape`, damaged parts, or, without
        `expect_shape`, a tensor that would decode to more than 64 times its bytes (+ 1 MiB).
        """
        p = _load(self, name, expect_shape)
        with _blaming(f"{self.path}: tensor {name!r}"):
            check(p)
        return p

    def tensor(self, name: str, expect_shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a stored or tied tensor, decoded, in memory of its own; errors as for `packed`: O(n)."""
        return self.weight(name, expect_shape)[0]

    def weight(self, name: str, expect_shape: tuple[int, ...] | None = None) -> tuple[Tensor, WeightGrid | None]:
        """Return what `tensor` does, and the grid or codebook that it lies on: O(n)."""
        p = _load(self, name, expect_shape)
        with _blaming(f"{self.path}: tensor {name!r}"):
            return decode(p), grid_of(p)


def write(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Packed]],
    *,
    aliases: Mapping[str, str] = {},
    meta: Mapping[str, Any] = {},
    files: Mapping[str, bytes] = {},
    overwrite: bool = False,
    shard_bytes: int = 256 * 2**20,
    compress: bool = False,
) -> dict[str, Any]:
    """Write a folder and return its index; `tensors` is drawn lazily, one shard and one tensor in memory at a time.

    `aliases` maps tied names to stored ones, `files` are stored beside the shards under plain names, `meta` is any
    JSON. Whatever goes wrong, even Ctrl-C, the old state stays and nothing is left behind; only a kill can leave a
    `.name.partial-*` folder, which may be deleted. `overwrite` replaces an older Rarefy folder or an empty one.
    `compress` puts shards and index through LZMA. ContainerError: something is in the way, no space, a bad name, a bad
    tensor, meta that is not JSON.

    >>> import tempfile, torch
    >>> from rarefy.formats.sparse_encodings import encode
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> index = write(folder, [("w", encode(torch.eye(3), "bitmask"))], aliases={"tied": "w"})
    >>> read(folder).tensor("tied").sum()
    tensor(3.)
    """
    target = Path(os.path.realpath(path))
    with blaming(target):
        check_target(target, overwrite)
    _check_files(files)
    _json(dict(meta), f"{target}: meta")
    with whole_folder(target, overwrite=overwrite) as temp:
        index = _write_tensors(temp, target, tensors, shard_bytes)
        index |= {"aliases": dict(aliases), "meta": dict(meta)}
        _check_index(index, str(target))
        if compress:
            _compress_shards(temp, target, index)
        text = _json(index, f"{target}: index", None if compress else 1)
        made = {INDEX: text} if not compress else _compressed_index(text)
        with blaming(target, sum(map(len, [*made.values(), *files.values()]))):
            for file, data in {**files, **made}.items():
                (temp / file).write_bytes(data)
    return json.loads(text)


def read(path: str | os.PathLike[str], verify: bool = True) -> Container:
    """Return a validated Container: O(index), and with `verify` one pass over the shards for their sha256.

    ContainerError names what is wrong: not a Rarefy folder (and what it is instead), a newer schema, a field of the
    wrong type, a missing, truncated or altered shard, a link, an alias to nothing, a malformed safetensors header.
    """
    folder = Path(os.path.abspath(path))
    try:
        index = _read_index(folder)
        _check_index(index, str(folder / INDEX))
        saved = Container(folder, index)
        _check_shards(saved, verify)
    except OSError as error:
        raise ContainerError(f"{folder} cannot be read: {error}") from error
    return saved


def beside(saved: Container, name: str, known: Any) -> Any:
    """Return the JSON of a file beside the shards, of which `known` says bytes and sha256; ContainerError where it is
    another. O(its bytes)."""
    _fields(known, f"{saved.path / INDEX}: {name}", bytes=int, sha256=str)
    if known["bytes"] > INDEX_BYTES:
        raise ContainerError(f"{saved.path / name}: {known['bytes']:,} bytes, at most {INDEX_BYTES:,} are read")
    _check_shard(saved.path / name, known, True)
    return _parsed(saved.path / name, (saved.path / name).read_bytes())


# writing


def _check_files(files: Mapping[str, bytes]) -> None:
    for file, data in files.items():
        ours = isinstance(file, str) and (file in (INDEX, INDEX_XZ) or _SHARD.fullmatch(file))
        if not isinstance(file, str) or not _FILE.fullmatch(file) or ours:
            raise ContainerError(f"file name {_short(file)} must be letters, digits, . _ - and not one of Rarefy's own")
        if not isinstance(data, bytes):
            raise ContainerError(f"file {file!r} is {type(data).__name__}, must be bytes")


def _json(value: Any, where: str, indent: int | None = 1) -> bytes:
    try:
        tight = (",", ":") if indent is None else None
        text = json.dumps(value, allow_nan=False, indent=indent, separators=tight).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ContainerError(f"{where} must be strict JSON: {error}; store NaN and infinity as null") from error
    if len(text) > INDEX_BYTES:
        raise ContainerError(f"{where} takes {len(text):,} bytes of JSON, at most {INDEX_BYTES:,} can be read back")
    return text


def _write_tensors(temp: Path, target: Path, tensors: Iterable[tuple[str, Packed]], most: int) -> dict[str, Any]:
    index: dict[str, Any] = {"format": "rarefy", "schema": SCHEMA, "shards": {}, "tensors": {}}
    held: dict[str, Tensor] = {}
    for name, p in tensors:
        _check_name(name, str(target))
        if name in index["tensors"]:
            raise ContainerError(f"{target}: tensor {name!r} was given twice")
        with _blaming(f"{target}: tensor {name!r}"):
            check(p)
        if held and _nbytes(held) + p.nbytes > most:
            _write_shard(temp, target, held, index["shards"])
            held = {}
        shard = f"weights-{len(index['shards']) + 1:05d}.safetensors"
        parts = {part: {"shard": shard, "key": f"{name}.{part}"} for part in p.parts}
        kind = {"format": p.format, "shape": list(p.shape), "dtype": _DTYPE_NAMES[p.dtype], "extra": dict(p.extra)}
        index["tensors"][name] = kind | {"parts": parts}
        # copied: a dense part may be the caller's own memory, free to change once the next tensor is drawn
        held |= {parts[part]["key"]: t.detach().to("cpu", copy=True) for part, t in p.parts.items()}
    if held:
        _write_shard(temp, target, held, index["shards"])
    return index


def _write_shard(temp: Path, target: Path, held: dict[str, Tensor], shards: dict[str, Any]) -> None:
    file = temp / f"weights-{len(shards) + 1:05d}.safetensors"
    with blaming(target, needed := _nbytes(held)):
        if shutil.disk_usage(temp).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(temp.stat().st_mode & 0o666)  # safetensors may make it readable to its owner only
        shards[file.name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}


def _compress_shards(temp: Path, target: Path, index: dict[str, Any]) -> None:
    """Put each shard through LZMA, and say so in the index."""
    for file in list(index["shards"]):
        data = (temp / file).read_bytes()
        packed = _compressed(data)
        if len(data) > _most_raw(len(packed)):
            continue
        with blaming(target, len(packed)):
            (temp / f"{file}.xz").write_bytes(packed)
        (temp / file).unlink()
        about = {"sha256": _sha256(temp / f"{file}.xz"), "bytes": len(packed), "raw": len(data)}
        del index["shards"][file]
        index["shards"][f"{file}.xz"] = about
    for entry in index["tensors"].values():
        for place in entry["parts"].values():
            place["shard"] += "" if place["shard"] in index["shards"] else ".xz"


def least(make: Callable[[str], Packed], sizes: Mapping[str, int], compress: bool) -> Packed:
    """Return a tensor in the smallest of the formats that `sizes` has bytes of; with `compress` what is smallest after
    LZMA, among those of at most four times the bytes: positions of zeros do not pack, bits that say little do."""
    best = min(sizes, key=lambda f: sizes[f])
    if not compress or sizes[best] > SQUEEZED:
        return make(best)
    near = [make(f) for f in sizes if sizes[f] <= 4 * sizes[best]]
    return min(near, key=lambda p: sum(len(lzma.compress(_bytes(t))) for t in p.parts.values()))


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _compressed(data: bytes) -> bytes:
    """The smaller of what LZMA makes of text-like bytes and of bytes that know nothing of their neighbours."""
    alone = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}
    usual = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
    return min((lzma.compress(data, check=lzma.CHECK_CRC32, filters=[f]) for f in (alone, usual)), key=len)


def _compressed_index(text: bytes) -> dict[str, bytes]:
    packed = _compressed(text)
    about = {"file": INDEX_XZ, "sha256": hashlib.sha256(packed).hexdigest(), "bytes": len(packed), "raw": len(text)}
    return {INDEX_XZ: packed, INDEX: _json({"format": "rarefy", "schema": SCHEMA, "index": about}, INDEX, None)}


def _decompressed(file: Path, raw: int, most: int) -> bytes:
    """Return what a compressed file holds, never more than it says and at most `most`; ContainerError for else."""
    if not 0 <= raw <= most:
        raise ContainerError(f"{file}: would become {_short(raw)} bytes, at most {most:,} for what it holds")
    unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=1 << 30)
    try:
        data = unpacker.decompress(file.read_bytes(), max_length=raw + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ContainerError(f"{file}: not sound LZMA: {error}") from error
    if len(data) != raw or not unpacker.eof:
        raise ContainerError(f"{file}: does not hold the {raw:,} bytes that the index says")
    return data


def _nbytes(held: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in held.values())


# reading


def _read_index(folder: Path) -> Any:
    file = folder / INDEX
    if not _is_plain(file):
        raise ContainerError(f"{folder} is not a Rarefy folder: {_what_is(folder)}")
    if file.stat().st_size > INDEX_BYTES:
        raise ContainerError(f"{file}: {file.stat().st_size:,} bytes, at most {INDEX_BYTES:,} are read")
    index = _parsed(file, file.read_bytes())
    if type(index) is not dict or "index" not in index or index.get("schema") != SCHEMA:
        return index
    _fields(index, str(file), format=str, schema=int, index=dict)
    _fields(about := index["index"], f"{file}: index", file=str, sha256=str, bytes=int, raw=int)
    if about["file"] != INDEX_XZ:
        raise ContainerError(f"{file}: index lies in {_short(about['file'])}, must be {INDEX_XZ}")
    inner = folder / INDEX_XZ
    _check_shard(inner, about, True)
    return _parsed(inner, _decompressed(inner, about["raw"], INDEX_BYTES))


def _parsed(file: Path, text: bytes) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"{file}: not JSON that can be read: {error}") from error


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _finite(number: str) -> float:
    return float(number) if math.isfinite(float(number)) else _no_constant(number)


def _what_is(folder: Path) -> str:
    if os.path.lexists(folder / INDEX):
        return f"its {INDEX} is a link or no plain file; copy the folder with cp -L"
    if folder.is_file():
        pickle = folder.suffix in PICKLES
        return "it is a file" + (", probably a pickle, which Rarefy never opens" if pickle else "")
    if not folder.is_dir():
        near = nearest(folder.name, [f.name for f in folder.parent.glob("*")]) if folder.parent.is_dir() else []
        return "it does not exist" + (f" (did you mean {near[0]!r}?)" if near else "")
    if (folder / "config.json").is_file():
        return "it looks like a Hugging Face folder: `rarefy compress` takes it as it is, transformers loads it"
    names = sorted(f.name for f in folder.iterdir())
    return f"it holds {', '.join(names[:3])}..." if names else "it is empty"


def _is_plain(file: Path) -> bool:
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except OSError:
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields(value: Any, where: str, **kinds: type) -> None:
    if type(value) is not dict or set(value) != set(kinds):
        got = sorted(value) if type(value) is dict else value
        raise ContainerError(f"{where}: is {_short(got)}, must be an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(value[name]) is not kind:
            raise ContainerError(f"{where}: {name} is {_short(value[name])}, must be {kind.__name__}")


def _check_name(name: Any, where: str) -> None:
    if type(name) is not str or not 0 < len(name) <= 1024 or not name.isprintable():
        raise ContainerError(f"{where}: tensor name {_short(name)} must be 1 to 1024 printable characters")


def _check_index(index: Any, where: str) -> None:
    if type(index) is not dict or index.get("format") != "rarefy" or type(index.get("schema")) is not int:
        raise ContainerError(f'{where}: must be an object with "format": "rarefy" and a whole number "schema"')
    if index["schema"] != SCHEMA:
        newer = "written by a newer Rarefy" if index["schema"] > SCHEMA else "of no known Rarefy"
        raise ContainerError(f"{where}: schema {_short(index['schema'])} is {newer}; this one reads schema {SCHEMA}")
    _fields(index, where, format=str, schema=int, shards=dict, tensors=dict, aliases=dict, meta=dict)
    for file, known in index["shards"].items():
        if not _SHARD.fullmatch(file):
            raise ContainerError(f"{where}: shard {_short(file)} must be named like weights-00001.safetensors")
        more = {"raw": int} if file.endswith(".xz") else {}
        _fields(known, f"{where}: shard {file}", sha256=str, bytes=int, **more)
    for name, entry in index["tensors"].items():
        _check_name(name, where)
        _check_entry(entry, f"{where}: tensor {_short(name)}", index["shards"])
    for name, stored in index["aliases"].items():
        _check_name(name, where)
        if type(stored) is not str or stored not in index["tensors"] or name in index["tensors"]:
            pair = f"{_short(name)} -> {_short(stored)}"
            raise ContainerError(f"{where}: alias {pair} must lead from a new name to a stored one")


def _check_entry(entry: Any, where: str, shards: dict[str, Any]) -> None:
    _fields(entry, where, format=str, shape=list, dtype=str, extra=dict, parts=dict)
    for what, known in (("format", PARTS), ("dtype", DTYPES)):
        if entry[what] not in known:
            raise ContainerError(unknown(what, entry[what][:80], known, where))
    if any(type(d) is not int or not 0 <= d <= 2**48 for d in entry["shape"]) or len(entry["shape"]) > 16:
        raise ContainerError(f"{where}: shape {_short(entry['shape'])} must be at most 16 sizes from 0 to 2**48")
    if set(entry["parts"]) != set(PARTS[entry["format"]]):
        raise ContainerError(f"{where}: parts {_short(sorted(entry['parts']))} are not those of {entry['format']}")
    for part, place in entry["parts"].items():
        _fields(place, f"{where}: part {part}", shard=str, key=str)
        if place["shard"] not in shards:
            raise ContainerError(f"{where}: part {part} lies in {_short(place['shard'])}, which is not a listed shard")


def _check_shards(saved: Container, verify: bool) -> None:
    folder, index = saved.path, saved.index
    keys: dict[str, set[str]] = {}
    for file, known in index["shards"].items():
        _check_shard(folder / file, known, verify)
        with _opened(saved, file) as shard:
            keys[file] = set(shard.keys())
    for name, entry in index["tensors"].items():
        for part, place in entry["parts"].items():
            if place["key"] not in keys[place["shard"]]:
                where = f"{folder / place['shard']}: holds no {_short(place['key'])}"
                raise ContainerError(f"{where}, part {part} of tensor {_short(name)}")


def _check_shard(file: Path, known: dict[str, Any], verify: bool) -> None:
    if not _is_plain(file):
        raise ContainerError(f"{file}: " + ("a link or no plain file" if os.path.lexists(file) else "missing"))
    if file.stat().st_size != known["bytes"]:
        raise ContainerError(
            f"{file}: {file.stat().st_size} bytes, the index says {_short(known['bytes'])}; cut short?"
        )
    if verify and _sha256(file) != known["sha256"]:
        raise ContainerError(f"{file}: its sha256 is not the one in the index; the file was altered")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _opened(saved: Container, name: str) -> Iterator[Any]:
    file = saved.path / name
    try:
        if name.endswith(".xz"):
            if name not in saved.unpacked:
                known = saved.index["shards"][name]
                most = _most_raw(min(known["bytes"], file.stat().st_size))
                saved.unpacked[name] = _Shard(load(_decompressed(file, known["raw"], most)))
            yield saved.unpacked[name]
            return
        with safe_open(file, "pt") as shard:
            yield shard
    except ContainerError:
        raise
    except Exception as error:  # safetensors raises several kinds; each of them means a bad file here
        raise ContainerError(f"{file}: not a sound safetensors file: {error}") from error


class _Shard(dict[str, Tensor]):
    """Tensors in memory, read as those of a file are."""

    def get_tensor(self, key: str) -> Tensor:
        """Return a tensor."""
        return self[key]


def _most_raw(packed: int) -> int:
    """How many bytes so many compressed ones may become: more would be no weights but a trap."""
    return MOST_RATIO * packed + SLACK


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise ContainerError(f"{where}: {error}") from error


def _load(saved: Container, name: str, expect_shape: tuple[int, ...] | None) -> Packed:
    path, index = saved.path, saved.index
    tensors, stored = index["tensors"], index["aliases"].get(name, name)
    if stored not in tensors:
        near = nearest(name, [*tensors, *index["aliases"]])
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ContainerError(f"{path}: no tensor {_short(name)}{hint}")
    entry = tensors[stored]
    shape = tuple(entry["shape"])
    if expect_shape is not None and shape != tuple(expect_shape):
        raise ContainerError(f"{path}: tensor {name!r} has shape {list(shape)}, expected {list(expect_shape)}")
    parts = {}
    for part, place in entry["parts"].items():
        with _opened(saved, place["shard"]) as shard:
            parts[part] = shard.get_tensor(place["key"])
    p = Packed(entry["format"], shape, DTYPES[entry["dtype"]], parts, dict(entry["extra"]))
    decoded = math.prod(shape) * p.dtype.itemsize
    if expect_shape is None and decoded > EXPANSION * p.nbytes + SLACK:
        why = f"{p.nbytes:,} bytes would become {decoded:,}"
        raise ContainerError(f"{path}: tensor {name!r}: {why}; pass expect_shape={shape} if that is right")
    return p
