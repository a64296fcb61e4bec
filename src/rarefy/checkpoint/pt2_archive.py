"""Read the archives that `torch.export.save` writes: JSON and raw tensors. What would be unpickled is refused.

`torch.export.load` unpickles the example inputs and some constants, evaluates the sizes of tensors as Python
expressions and executes guards. Nothing of that is read here.

    NAME/archive_format                             the text pt2
    NAME/models/model.json                          the graph, the names of its weights, how arguments are nested
    NAME/data/weights/model_weights_config.json     for each weight its record, type, sizes and strides
    NAME/data/weights/weight_0                      a record: the bytes of a tensor
    NAME/data/constants/...                         the same for constants
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ContainerError, RarefyError, first_line
from rarefy.common.json_text import parse_json
from rarefy.common.plain_file import plain_file

MODEL = "models/model.json"
WEIGHTS, CONSTANTS = ("data/weights/", "model_weights_config.json"), ("data/constants/", "model_constants_config.json")
COMPILED = "data/aotinductor/"
MAX_JSON = 1 << 28  # bytes
MAX_RECORDS = 200_000
MAX_COPIES = 8  # of all bytes of a file, in tensors that read the same bytes

DTYPES = {  # by the numbers of torch's schema
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """What an archive holds.

    Attributes:
        path: the file.
        program: the exported program as JSON, not checked.
        tensors: parameters, buffers and constants by name.
    """

    path: Path
    program: Any
    tensors: dict[str, Tensor]


def read(path: str | Path) -> Archive:
    """Return what an archive of `torch.export.save` holds. O(weights).

    Raises:
        ContainerError: there is no such file, it is damaged, or it has records that are pickles or compiled code.
    """
    file = plain_file(path)
    try:
        with zipfile.ZipFile(file) as archive:
            return _read(file, _records(file, archive))
    except RarefyError:
        raise
    except OSError as error:
        raise ContainerError(f"{file} cannot be read: {error.strerror or first_line(error)}") from None
    except (zipfile.BadZipFile, struct.error, EOFError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ContainerError(f"{file} is no .pt2 file of torch.export.save: {first_line(error)}") from None


def _records(file: Path, archive: zipfile.ZipFile) -> Callable[[str], bytes | None]:
    """Return a function that reads a record by its path in the archive's folder, None for a missing one."""
    entries = archive.infolist()
    if len(entries) > MAX_RECORDS:
        raise ContainerError(f"{file}: {len(entries):,} records, at most {MAX_RECORDS:,} are read")
    if any(e.compress_type != zipfile.ZIP_STORED or e.file_size > e.compress_size for e in entries):
        raise ContainerError(f"{file} is no .pt2 file of torch.export.save: its records are compressed")
    records = {e.filename.partition("/")[2]: e for e in entries}
    if any(e.filename == "serialized_exported_program.json" for e in entries) or "data/weights/model.pt" in records:
        raise ContainerError(
            f"{file} was written by an old version of torch, which pickled the weights, and a pickle is never opened: "
            "load it in Python with torch.export.load and save it again with torch.export.save, torch 2.9 or newer"
        )
    if any(name.startswith(COMPILED) for name in records):
        raise ContainerError(f"{file} holds a compiled library, which is never loaded: give the exported program")
    if MODEL not in records:
        raise ContainerError(f"{file} is no .pt2 file of torch.export.save: it has no {MODEL}")
    return lambda name: archive.read(records[name]) if name in records else None


def _read(file: Path, record: Callable[[str], bytes | None]) -> Archive:
    if record("archive_format") != b"pt2":
        raise ContainerError(f"{file} is no .pt2 file of torch.export.save: its archive_format is not pt2")
    tensors: dict[str, Tensor] = {}
    for folder, config in (WEIGHTS, CONSTANTS):
        text = record(folder + config)
        entries = {} if text is None else _json(file, text).get("config")
        if not isinstance(entries, dict):
            raise ContainerError(f"{file}: {config} has no table of tensors")
        storages = Storages(lambda r, folder=folder: record(folder + r), MAX_COPIES * file.stat().st_size)
        for name, entry in entries.items():
            try:
                tensors[name] = _tensor(name, entry, storages)
            except ContainerError as error:
                raise ContainerError(f"{file}: {error}") from None
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise ContainerError(f"{file}: the tensor {name[:200]!r} is damaged: {first_line(error)}") from None
    return Archive(file, _json(file, record(MODEL) or b""), tensors)


def _json(file: Path, data: bytes) -> Any:
    if len(data) > MAX_JSON:
        raise ContainerError(f"{file}: {len(data):,} bytes of JSON, at most {MAX_JSON:,} are read")
    try:
        value = parse_json(data.decode(), str(file))
    except UnicodeDecodeError:
        raise ContainerError(f"{file}: not JSON: expected text in UTF-8") from None
    if not isinstance(value, dict):
        raise ContainerError(f"{file}: expected a JSON object, got a {type(value).__name__}")
    return value


class Storages:
    """The records of an archive, each read once, and the tensors of their bytes."""

    def __init__(self, record: Callable[[str], bytes | None], max_bytes: int):
        self.record, self.bytes_left = record, max_bytes
        self.tensors: dict[Any, Tensor] = {}  # by record, type, sizes and strides
        self._bytes: dict[str, bytearray] = {}

    def tensor(self, where: str, dtype: torch.dtype, sizes: list[int], strides: list[int], offset: int) -> Tensor:
        """Return a tensor of a record's bytes; ContainerError for more than `max_bytes` in all."""
        first = where not in self._bytes
        if first:
            data = self.record(where)
            if data is None:
                raise ContainerError(f"the record {where[:200]!r} is missing")
            self._bytes[where] = bytearray(data)
        tensor = _strided(self._bytes[where], dtype, sizes, strides, offset)
        self.bytes_left -= tensor.nbytes
        if self.bytes_left < 0:
            raise ContainerError(f"its tensors have more than {MAX_COPIES} times the bytes of the file")
        return tensor if first and tensor.nbytes == len(self._bytes[where]) else tensor.clone()


def _tensor(name: str, entry: Mapping[str, Any], storages: Storages) -> Tensor:
    """Return a tensor of its entry; entries of the same bytes and sizes become one tensor."""
    where = entry["path_name"]
    if entry["use_pickle"] is not False:
        raise ContainerError(
            f"{name[:200]!r} is stored as a pickle, which is never opened: it is an object, or of a subclass of Tensor"
        )
    meta = entry["tensor_meta"]
    dtype = DTYPES.get(meta["dtype"])
    if dtype is None or meta["layout"] != 7:
        raise ContainerError(f"{name[:200]!r} has a type or layout that is not supported")
    sizes, strides = ([_count(n) for n in meta[key]] for key in ("sizes", "strides"))
    offset, is_param = _count(meta["storage_offset"]), entry["is_param"] is True
    key = (where, dtype, tuple(sizes), tuple(strides), offset, is_param)
    if key not in storages.tensors:
        tensor = storages.tensor(where, dtype, sizes, strides, offset)
        is_float = dtype.is_floating_point or dtype.is_complex
        storages.tensors[key] = nn.Parameter(tensor, requires_grad=is_float) if is_param else tensor
    return storages.tensors[key]


def _count(value: Any) -> int:
    number = value["as_int"]
    if type(number) is not int or not 0 <= number < 1 << 48:
        raise ValueError(f"expected a whole number of at least 0, got {str(number)[:40]}")
    return number


def _strided(data: bytearray, dtype: torch.dtype, sizes: list[int], strides: list[int], offset: int) -> Tensor:
    """Return a tensor that reads bytes where they are; ValueError unless they have as many entries, all of its type."""
    if len(sizes) != len(strides) or len(data) % dtype.itemsize:
        raise ValueError("its bytes do not fit its sizes")
    count, numel = len(data) // dtype.itemsize, torch.Size(sizes).numel()
    if not numel:
        return torch.empty(sizes, dtype=dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides))
    if last >= count or numel > count:
        raise ValueError(f"it has {numel:,} entries, and its record {count:,}")
    if dtype == torch.bool and torch.frombuffer(data, dtype=torch.uint8).as_strided(sizes, strides, offset).max() > 1:
        raise ValueError("it has booleans that are neither 0 nor 1")
    return torch.frombuffer(data, dtype=dtype).as_strided(sizes, strides, offset)
