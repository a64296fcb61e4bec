"""Change saved folders in tests, and make their hashes agree again, so that only what the change means can be wrong."""

import hashlib
import json
import lzma
from pathlib import Path

import torch

from rarefy.common.atomic_io import INDEX
from rarefy.formats.container import write
from rarefy.formats.index import digest
from rarefy.formats.sparse_encodings import FORMATS, encode

SHARD = "weights-00001.safetensors"


def read_index(folder: Path) -> dict:
    """Return the contents of rarefy.json."""
    return json.loads((folder / INDEX).read_text())


def write_index(folder: Path, index: dict) -> None:
    """Write rarefy.json with the right hash of its contents."""
    if "sha256" in index:
        index = {**index, "sha256": digest(index)}
    (folder / INDEX).write_text(json.dumps(index))


def edit_index(folder: Path, change) -> None:
    """Apply a function to the contents of rarefy.json."""
    index = read_index(folder)
    change(index)
    write_index(folder, index)


def seal(folder: Path, shard: str = SHARD) -> None:
    """Make the index agree with a shard, and with the graph of a compiled model."""
    index = read_index(folder)
    files = {shard: index["shards"]}
    files |= {name: index["meta"]["compiled"] for name in ("graph.json",) if "compiled" in index["meta"]}
    for name, entries in files.items():
        data = (folder / name).read_bytes()
        entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_index(folder, index)


def edit_compressed_index(folder: Path, change) -> None:
    """Apply a function to the index of a compressed folder, and make both of its files agree."""
    inner = folder / "rarefy-index.json.xz"
    index = json.loads(lzma.decompress(inner.read_bytes()))
    change(index)
    text = json.dumps({**index, "sha256": digest(index)}).encode()
    inner.write_bytes(lzma.compress(text))
    outer = read_index(folder)
    hashed = hashlib.sha256(inner.read_bytes()).hexdigest()
    outer["index"] |= {"sha256": hashed, "bytes": inner.stat().st_size, "raw": len(text)}
    (folder / INDEX).write_text(json.dumps(outer))


def sample(format: str = "csr", seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 8, generator=g) * (torch.rand(6, 8, generator=g) < 0.4)
    if format == "nm":
        x.view(-1, 4)[:, 2:] = 0
    return x


def small_container(path: Path, **options) -> dict:
    """One tensor of every format, a scalar, an empty one and an alias."""
    named = [(format, encode(sample(format), format)) for format in FORMATS]
    named += [("scalar", encode(torch.tensor(3.0), "dense")), ("empty", encode(torch.zeros(0, 4), "bitmask"))]
    return write(path, named, aliases={"tied": "csr"}, meta={"recipe": [1, None, "x"]}, **options)
