"""A folder of packed tensors: safetensors shards, and an index that says what is in them (`index.py`).

In a compressed folder (LZMA, `.xz`), `rarefy.json` only names the file that holds the index; shards then have `raw`,
their bytes before compression, and are read into memory whole.

`write` builds the folder beside its target and renames it: the folder appears whole or not at all. `read` trusts
nothing: it runs no code, follows no link, and checks every field before a tensor is touched;
`quantized_encodings.check` checks the tensors.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from rarefy.common.atomic_io import (
    INDEX,
    PICKLE_SUFFIXES,
    atomic_folder,
    check_output_folder,
    container_errors,
    sha256_of,
)
from rarefy.common.errors import ContainerError, FormatError, nearest
from rarefy.common.json_text import parse_json
from rarefy.common.machine_errors import raise_memory_error
from rarefy.common.plain_file import usable_path
from rarefy.formats.aligned_file import NAMES, write_aligned
from rarefy.formats.compression import SLACK, compress, decompress, max_decompressed
from rarefy.formats.held_files import HeldFiles
from rarefy.formats.index import SCHEMA, SHARD_NAME, check_fields, check_index, check_name, digest, short
from rarefy.formats.quantized_encodings import check, decode, grid_of
from rarefy.formats.sparse_encodings import DTYPES, Packed
from rarefy.model.construction_limit import Stored
from rarefy.model.quant_grid import WeightGrid

INDEX_BYTES = 64 * 2**20
READINGS = 10  # of a folder that is replaced while it is read
INDEX_XZ = "rarefy-index.json.xz"
MAX_EXPANSION = 64  # decoded bytes per stored byte, unless the caller knows the shape
TRIAL_BYTES = 1 << 24  # a larger tensor is not tried in several formats
_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_-]{0,99}/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # in a folder at most
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Container:
    """A validated folder; tensors are read one at a time. Its files stay open, so that all are of one save."""

    path: Path
    index: dict[str, Any]
    files: HeldFiles = field(compare=False, repr=False)
    decompressed: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # shards read so far

    @property
    def names(self) -> list[str]:
        """Return the names of the stored tensors, in the order in which they were written."""
        return list(self.index["tensors"])

    @property
    def aliases(self) -> dict[str, str]:
        """Return the stored name that each tied name shares."""
        return dict(self.index["aliases"])

    @property
    def stored(self) -> Stored:
        """Return how many tensors and bytes the files hold."""
        return Stored(len(self.names) + len(self.aliases), sum(s["bytes"] for s in self.index["shards"].values()))

    @property
    def meta(self) -> dict[str, Any]:
        """Return the metadata of the writer, in JSON types only."""
        return self.index["meta"]

    def packed(self, name: str, expect_shape: tuple[int, ...] | None = None) -> Packed:
        """Return a stored or tied tensor as Packed and checked: O(stored bytes).

        ContainerError: no such tensor, a shape other than `expect_shape`, damaged parts, or, without
        `expect_shape`, a tensor that would decode to more than 64 times its bytes (+ 1 MiB).
        """
        p = _load(self, name, expect_shape)
        with _located(f"{self.path}: tensor {name!r}"):
            check(p)
        return p

    def tensor(self, name: str, expect_shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a stored or tied tensor, decoded, in memory of its own; errors as for `packed`: O(n)."""
        return self.weight(name, expect_shape)[0]

    def mapped(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return dense tensors in the mapped files, without a copy; others as `tensor` does. O(tensors).

        Each file is opened once. Its bytes are read when a tensor is: whoever overwrites the file changes the tensor.
        """
        tensors, by_shard = {}, dict[str, list[tuple[str, str]]]()
        for name in names:
            entry = self.index["tensors"][name]
            if entry["format"] == "dense":
                location = entry["parts"]["values"]
                by_shard.setdefault(location["shard"], []).append((name, location["key"]))
            else:
                tensors[name] = self.tensor(name)
        for file, keys in by_shard.items():
            with _opened(self, file) as shard, _located(f"{self.path}: {file}"):
                for name, key in keys:
                    entry, tensors[name] = self.index["tensors"][name], shard.get_tensor(key)
                    parts, dtype = {"values": tensors[name]}, DTYPES[entry["dtype"]]
                    check(Packed("dense", tuple(entry["shape"]), dtype, parts, entry["extra"]))
        return tensors

    def weight(self, name: str, expect_shape: tuple[int, ...] | None = None) -> tuple[Tensor, WeightGrid | None]:
        """Return what `tensor` does, and the grid or codebook of a quantized one: O(n)."""
        p = _load(self, name, expect_shape)
        with _located(f"{self.path}: tensor {name!r}"):
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
    aligned: bool = False,
    written: Mapping[str, tuple[Path, str]] = {},
) -> dict[str, Any]:
    """Write a folder and return its index.

    Whatever goes wrong, even Ctrl-C, the old state stays and nothing is left behind; only a kill can leave a
    `.name.partial-*` folder, which may be deleted.

    Args:
        path: the folder.
        tensors: (name, packed tensor), drawn lazily: one shard and one tensor are in memory at a time.
        aliases: tied names and the stored names that they share.
        meta: any JSON.
        files: files to store beside the shards, by name.
        overwrite: replace an older Rarefy folder or an empty one.
        shard_bytes: the size from which another shard is begun.
        compress: compress shards and index with LZMA.
        aligned: let large tensors begin at multiples of 64 bytes, so that kernels can read them mapped.
        written: dense tensors that are in safetensors files already: {name: (file, key in it)}. Each file becomes a
            shard, by a hard link where the system has them; it must not change.

    Raises:
        ContainerError: the folder exists, no space, a bad name, a bad tensor, meta that is not JSON.

    >>> import tempfile, torch
    >>> from rarefy.formats.sparse_encodings import encode
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> index = write(folder, [("w", encode(torch.eye(3), "bitmask"))], aliases={"tied": "w"})
    >>> read(folder).tensor("tied").sum()
    tensor(3.)
    """
    target = Path(os.path.realpath(usable_path(path)))
    with container_errors(target):
        check_output_folder(target, overwrite)
    _check_files(files)
    _json(dict(meta), f"{target}: meta")
    with atomic_folder(target, overwrite=overwrite) as temp:
        index = _write_tensors(temp, target, tensors, shard_bytes, write_aligned if aligned else save_file, written)
        index |= {"aliases": dict(aliases), "meta": dict(meta)}
        if compress:
            _compress_shards(temp, target, index)
        index = json.loads(_json(index, f"{target}: index"))
        index["sha256"] = digest(index)
        check_index(index, str(target))
        text = _json(index, f"{target}: index", None if compress else 1)
        index_files = _compressed_index(text) if compress else {INDEX: text}
        with container_errors(target, sum(map(len, [*index_files.values(), *files.values()]))):
            for file, data in {**files, **index_files}.items():
                (temp / file).parent.mkdir(exist_ok=True)
                (temp / file).write_bytes(data)
    return index


def read(path: str | os.PathLike[str], verify: bool = True) -> Container:
    """Return a validated Container: O(index), and with `verify` one pass over the shards for their sha256.

    ContainerError names what is wrong: not a Rarefy folder (and what it is instead), a newer schema, a field of the
    wrong type, a missing, truncated or altered shard, a link, an alias to nothing, a malformed safetensors header.
    A folder that another save replaces meanwhile is read as it was before, or else again.
    """
    folder = Path(os.path.abspath(usable_path(path)))
    for _ in range(READINGS):
        if os.path.islink(folder / INDEX) or not os.path.isfile(folder / INDEX):
            raise ContainerError(f"{folder} is not a Rarefy folder: {_what_is(folder)}")
        try:
            files = HeldFiles(folder)
        except FileNotFoundError:  # between two renames, where the system cannot exchange folders
            continue
        if not files.is_current():  # some of them may have been removed before they were open
            continue
        try:
            index = _read_index(files)
            check_index(index, str(folder / INDEX))
            saved = Container(folder, index, files)
            _check_shards(saved, verify)
            return saved
        except (OSError, ContainerError) as error:
            if files.is_current():
                if isinstance(error, ContainerError):
                    raise
                raise ContainerError(f"{folder} cannot be read: {error}") from error
    raise ContainerError(f"{folder} was replaced {READINGS} times while it was read: load it when that has ended")


def verify(saved: Container) -> None:
    """Compare the shards of a container that was read without `verify` with their hashes. O(bytes)."""
    try:
        _check_shards(saved, True)
    except OSError as error:
        raise ContainerError(f"{saved.path} cannot be read: {error}") from error


def read_json(saved: Container, name: str, entry: Any) -> Any:
    """Return the contents of a JSON file beside the shards. O(bytes).

    Raises:
        ContainerError: the file's bytes or hash are not those of `entry`, {"bytes", "sha256"}.
    """
    check_fields(entry, f"{saved.path / INDEX}: {name}", bytes=int, sha256=str)
    if entry["bytes"] > INDEX_BYTES:
        raise ContainerError(f"{saved.path / name}: {entry['bytes']:,} bytes, at most {INDEX_BYTES:,} are read")
    return parse_json(saved.files.checked(name, entry).read_bytes(), str(saved.path / name))


# writing


def _check_files(files: Mapping[str, bytes]) -> None:
    for file, data in files.items():
        ours = isinstance(file, str) and (file in (INDEX, INDEX_XZ) or SHARD_NAME.fullmatch(file))
        if not isinstance(file, str) or not _FILE.fullmatch(file) or ours:
            raise ContainerError(
                f"file name {short(file)} must be letters, digits, . _ - and not one of Rarefy's own, in one folder"
            )
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


def _write_tensors(
    temp: Path,
    target: Path,
    tensors: Iterable[tuple[str, Packed]],
    shard_bytes: int,
    write_file: Callable[..., Any],
    written: Mapping[str, tuple[Path, str]],
) -> dict[str, Any]:
    index: dict[str, Any] = {"format": "rarefy", "schema": SCHEMA, "shards": {}, "tensors": {}}
    held: dict[str, Tensor] = {}
    linked: dict[Path, str] = {}  # shards of files that were written before
    for name, p in tensors:
        check_name(name, str(target))
        if name in index["tensors"]:
            raise ContainerError(f"{target}: tensor {name!r} was given twice")
        with _located(f"{target}: tensor {name!r}"):
            check(p)
        file, key = written.get(name, (None, name))
        if held and (file is not None or _nbytes(held) + p.nbytes > shard_bytes):
            _write_shard(temp, target, held, write_file, index["shards"])
            held = {}
        if file is not None:
            shard = linked[file] = linked.get(file) or _link_shard(temp, target, file, index["shards"])
            parts = {part: {"shard": shard, "key": key} for part in p.parts}
        else:
            shard = f"weights-{len(index['shards']) + 1:05d}.safetensors"
            parts = {part: {"shard": shard, "key": f"{name}.{part}"} for part in p.parts}
        kind = {"format": p.format, "shape": list(p.shape), "dtype": _DTYPE_NAMES[p.dtype], "extra": dict(p.extra)}
        index["tensors"][name] = kind | {"parts": parts}
        if file is not None:
            continue
        # copied: a dense part may be the caller's own memory, free to change once the next tensor is drawn
        held |= {parts[part]["key"]: t.detach().to("cpu", copy=True) for part, t in p.parts.items()}
    if held:
        _write_shard(temp, target, held, write_file, index["shards"])
    return index


def _link_shard(temp: Path, target: Path, file: Path, shards: dict[str, Any]) -> str:
    """Put a safetensors file into the folder as its next shard, and return the shard's name."""
    shard = temp / f"weights-{len(shards) + 1:05d}.safetensors"
    with container_errors(target, file.stat().st_size):
        try:
            os.link(file, shard)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, shard)
        shards[shard.name] = {"sha256": sha256_of(shard), "bytes": shard.stat().st_size}
    return shard.name


def _write_shard(
    temp: Path, target: Path, held: dict[str, Tensor], write_file: Callable[..., Any], shards: dict[str, Any]
) -> None:
    file = temp / f"weights-{len(shards) + 1:05d}.safetensors"
    with container_errors(target, needed := _nbytes(held)):
        if shutil.disk_usage(temp).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file = write_file if all(t.dtype in NAMES for t in held.values()) else save_file
        write_file(held, file, metadata={"format": "pt"})
        file.chmod(temp.stat().st_mode & 0o666)  # safetensors may make it readable to its owner only
        shards[file.name] = {"sha256": sha256_of(file), "bytes": file.stat().st_size}


def _compress_shards(temp: Path, target: Path, index: dict[str, Any]) -> None:
    """Compress each shard, and say so in the index."""
    for file in list(index["shards"]):
        data = (temp / file).read_bytes()
        compressed = compress(data)
        if len(data) > max_decompressed(len(compressed)):
            continue  # would be refused when it is read
        with container_errors(target, len(compressed)):
            (temp / f"{file}.xz").write_bytes(compressed)
        (temp / file).unlink()
        del index["shards"][file]
        hashed = {"sha256": sha256_of(temp / f"{file}.xz"), "bytes": len(compressed), "raw": len(data)}
        index["shards"][f"{file}.xz"] = hashed
    for entry in index["tensors"].values():
        for location in entry["parts"].values():
            location["shard"] += "" if location["shard"] in index["shards"] else ".xz"


def _compressed_index(text: bytes) -> dict[str, bytes]:
    """Return the two files of a compressed index: itself, and the one that names it."""
    data = compress(text)
    entry = {"file": INDEX_XZ, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "raw": len(text)}
    return {INDEX_XZ: data, INDEX: _json({"format": "rarefy", "schema": SCHEMA, "index": entry}, INDEX, None)}


def encode_smallest(encode: Callable[[str], Packed], sizes: Mapping[str, int], compressed: bool) -> Packed:
    """Return a tensor in the smallest format.

    Args:
        encode: returns the tensor in a format.
        sizes: bytes by format.
        compressed: whether LZMA follows. Then the formats of at most four times the fewest bytes are tried: positions
            of nonzeros compress badly, dense weights with many zeros well.
    """
    best = min(sizes, key=lambda f: sizes[f])
    if not compressed or sizes[best] > TRIAL_BYTES:
        return encode(best)
    packed = [encode(f) for f in sizes if sizes[f] <= 4 * sizes[best]]
    return min(packed, key=lambda p: sum(len(lzma.compress(_bytes(t))) for t in p.parts.values()))


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _nbytes(held: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in held.values())


# reading


def _read_index(files: HeldFiles) -> Any:
    file, opened = files.folder / INDEX, files.path(INDEX)
    if opened.stat().st_size > INDEX_BYTES:
        raise ContainerError(f"{file}: {opened.stat().st_size:,} bytes, at most {INDEX_BYTES:,} are read")
    index = parse_json(opened.read_bytes(), str(file))
    if type(index) is not dict or "index" not in index or index.get("schema") not in range(1, SCHEMA + 1):
        return index
    check_fields(index, str(file), format=str, schema=int, index=dict)
    check_fields(entry := index["index"], f"{file}: index", file=str, sha256=str, bytes=int, raw=int)
    if entry["file"] != INDEX_XZ:
        raise ContainerError(f"{file}: the index is in {short(entry['file'])}, must be {INDEX_XZ}")
    inner = files.checked(INDEX_XZ, entry)
    return parse_json(decompress(inner, entry["raw"], INDEX_BYTES), str(files.folder / INDEX_XZ))


def _what_is(folder: Path) -> str:
    if os.path.lexists(folder / INDEX):
        return f"its {INDEX} is a link or no plain file; copy the folder with cp -L"
    if folder.is_file():
        pickle = folder.suffix in PICKLE_SUFFIXES
        if folder.suffix == ".onnx":
            return "it is an ONNX file: rarefy.from_onnx reads it"
        return "it is a file" + (", probably a pickle, which Rarefy never opens" if pickle else "")
    if not folder.is_dir():
        near = nearest(folder.name, [f.name for f in folder.parent.glob("*")]) if folder.parent.is_dir() else []
        return "it does not exist" + (f" (did you mean {near[0]!r}?)" if near else "")
    if (folder / "config.json").is_file():
        with suppress(OSError), (folder / "config.json").open("rb") as config:
            if b'"quant_method": "rarefy"' in config.read(1 << 20):
                return f"its {INDEX} is missing, without which its weights cannot be read; copy the whole folder again"
        return "it looks like a Hugging Face folder: `rarefy compress` takes it as it is, transformers loads it"
    names = sorted(f.name for f in folder.iterdir())
    return f"it holds {', '.join(names[:3])}..." if names else "it is empty"


def _check_shards(saved: Container, verify: bool) -> None:
    folder, index = saved.path, saved.index
    keys: dict[str, set[str]] = {}
    for file, known in index["shards"].items():
        saved.files.checked(file, known, verify)
        with _opened(saved, file) as shard:
            keys[file] = set(shard.keys())
    for name, entry in index["tensors"].items():
        for part, location in entry["parts"].items():
            if location["key"] not in keys[location["shard"]]:
                where = f"{folder / location['shard']}: holds no {short(location['key'])}"
                raise ContainerError(f"{where}, part {part} of tensor {short(name)}")


@contextmanager
def _opened(saved: Container, name: str) -> Iterator[Any]:
    file = saved.path / name
    try:
        if name.endswith(".xz"):
            if name not in saved.decompressed:
                known = saved.index["shards"][name]
                opened = saved.files.path(name)
                limit = max_decompressed(min(known["bytes"], opened.stat().st_size))
                saved.decompressed[name] = _Shard(load(decompress(opened, known["raw"], limit)))
            yield saved.decompressed[name]
            return
        with safe_open(saved.files.path(name), "pt") as shard:
            yield shard
    except ContainerError:
        raise
    except Exception as error:  # safetensors raises several kinds; each of them means a bad file here
        raise_memory_error(error)
        raise ContainerError(f"{file}: not a valid safetensors file: {error}") from error


class _Shard(dict[str, Tensor]):
    """Tensors in memory, read as those of a file are."""

    def get_tensor(self, key: str) -> Tensor:
        """Return a tensor."""
        return self[key]


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Turn a FormatError into a ContainerError that says where it happened."""
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
        raise ContainerError(f"{path}: no tensor {short(name)}{hint}")
    entry = tensors[stored]
    shape = tuple(entry["shape"])
    if expect_shape is not None and shape != tuple(expect_shape):
        raise ContainerError(f"{path}: tensor {name!r} has shape {list(shape)}, expected {list(expect_shape)}")
    parts = {}
    for part, location in entry["parts"].items():
        with _opened(saved, location["shard"]) as shard:
            parts[part] = shard.get_tensor(location["key"])
    p = Packed(entry["format"], shape, DTYPES[entry["dtype"]], parts, dict(entry["extra"]))
    decoded = math.prod(shape) * p.dtype.itemsize
    if expect_shape is None and decoded > MAX_EXPANSION * p.nbytes + SLACK:
        why = f"{p.nbytes:,} bytes would become {decoded:,}"
        raise ContainerError(f"{path}: tensor {name!r}: {why}; pass expect_shape={shape} if that is right")
    return p
