"""Folders of sentence-transformers models: where a name leads, what is in them, and the compiled model beside it.

MODEL/                        what sentence-transformers writes: modules.json, 1_Pooling/, dense weights, tokenizer
MODEL/rarefy/                 the compiled transformer, as `rarefy.save` writes it
MODEL/rarefy/embedding.json   its precision, and the hashes of the dense weights that it was made from
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.common.atomic_io import INDEX, MODULES, PICKLE_SUFFIXES, sha256_of
from rarefy.common.errors import ContainerError, ModelError, nearest
from rarefy.common.json_text import read_json_file
from rarefy.common.plain_file import usable_path
from rarefy.common.version import __version__
from rarefy.data import builtin
from rarefy.formats import container
from rarefy.integrations.compiled_transformer import DENSE_FILES
from rarefy.model import hub
from rarefy.model.checked_folder import MAX_CONFIG_BYTES, check_modules
from rarefy.model.construction_limit import Stored, stored_in
from rarefy.model.embedding_modules import refuse_pickles

ENGINE = "rarefy"  # folder of the compiled model
NOTE = "embedding.json"
MARKER = f"{ENGINE}/{INDEX}"  # a folder with this file may be overwritten
SCHEMA = 1
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "merges.txt")
OF_RAREFY = (INDEX, "rarefy-index.json.xz", "rarefy-export.json")  # in folders of `compress` and `export`
NOT_COPIED = (*PICKLE_SUFFIXES, ".onnx", ".h5", ".msgpack", ".ot", ".safetensors")  # other forms of the weights


@dataclass(frozen=True)
class Note:
    """What is known of a compiled model.

    Attributes:
        precision: "fp32", "bf16", "int16" or "int8".
        dense: sha256 of the files that it was made from, by name.
    """

    precision: str
    dense: Mapping[str, str]


def resolve(
    name: str | os.PathLike[str], organization: str | None, revision: str | None = None, **options: Any
) -> Path:
    """Return the folder of a model: a path, a built-in name, or a name of the hub, which is downloaded.

    Args:
        name: the path or name.
        organization: whose model a name of the hub without a slash is.
        revision: branch, tag or commit of a model of the hub, in place of NAME@REVISION.
        **options: those of `rarefy.model.hub.download`.

    Raises:
        ModelError: if there is none; similar names are suggested.
    """
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise ModelError(f"expected the folder or the name of a model, got {name!r}")
    path = usable_path(Path(name).expanduser(), ModelError)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file: give the folder that it is in")
    if str(name) in builtin.MODELS:
        return builtin.model_folder(str(name))
    siblings = {p.name: str(path.with_name(p.name)) for p in path.parent.glob("*") if p.is_dir()}
    known = siblings | ({} if "/" in str(name) else dict.fromkeys(builtin.MODELS))
    near = nearest(path.name, known)
    hint = f"; did you mean {known[near[0]] or near[0]!r}?" if near else ""
    missing = f"no model folder {str(name)!r} and no built-in model of that name ({', '.join(builtin.MODELS)})"
    named = hub.parse_hub_name(str(name) if "/" in str(name) or organization is None else f"{organization}/{name}")
    if named is None or ("/" in str(name) and path.parent.is_dir()):  # as on the command line
        raise ModelError(missing + hint)
    if revision is not None and named.revision not in (None, revision):
        raise ModelError(f"revision={revision!r} contradicts {str(named)!r}: give one of the two")
    try:
        return hub.download(hub.HubName(named.repo, revision or named.revision), **options)
    except ModelError as error:
        raise ModelError(f"{missing}{hint}; {error}") from None


def all_stored(folder: Path, shown: Path) -> Stored:
    """Return what the files of a model hold, compressed ones too, of which `shown` is a checked copy. O(tensors)."""
    dense = stored_in(shown)
    if not (folder / INDEX).is_file():
        return dense
    own = container.read(folder, verify=False).stored
    return Stored(dense.tensors + own.tensors, dense.bytes + own.bytes)


def check_folder(folder: Path) -> None:
    """Raise ModelError for a folder that is no model, needs code of its own, or has pickled weights alone."""
    if not (folder / "config.json").is_file() and not (folder / MODULES).is_file():
        raise ModelError(
            f"{folder} is no model of sentence-transformers or transformers: it has neither {MODULES} nor config.json"
        )
    entries = check_modules(folder)
    for part in {"", *(entry["path"] for entry in entries)}:
        refuse_pickles(folder / part)
    first = folder / entries[0]["path"] if entries else folder
    tokenizes = not entries or entries[0]["type"].endswith(".Transformer")
    if tokenizes and not any(file for pattern in TOKENIZERS for file in first.glob(pattern)):
        raise ModelError(f"{first} has no tokenizer, such as tokenizer.json: copy the files of the original there")


def missing_file(folder: Path) -> str | None:
    """Return which file or folder of a model's modules is missing; None where all are there."""
    for entry in check_modules(folder):
        part = folder / entry["path"]
        if not part.is_dir() and not entry["type"].endswith(".Normalize"):
            return f"{part} is missing"
        if entry["type"].endswith((".Pooling", ".Dense")) and not (part / "config.json").is_file():
            return f"{part / 'config.json'} is missing"
    return None


def read_note(folder: Path) -> Note | None:
    """Return the note of the compiled model in a folder, None where there is none.

    Raises:
        ContainerError: if it is damaged.
    """
    file = folder / ENGINE / NOTE
    if not file.is_file():
        return None
    hint = f"delete {folder / ENGINE} to compile the model again"
    if file.is_symlink() or file.stat().st_size > MAX_CONFIG_BYTES:
        raise ContainerError(f"{file}: expected a small file, no link; {hint}")
    value = read_json_file(file, MAX_CONFIG_BYTES)
    value = value if isinstance(value, dict) else {}
    dense = value.get("dense")
    valid = value.get("schema") == SCHEMA and value.get("precision") in ("fp32", "bf16", "int16", "int8")
    if not valid or not isinstance(dense, dict) or not all(isinstance(v, str) for v in dense.values()):
        raise ContainerError(f"{file}: expected schema {SCHEMA}, a precision and hashes of files; {hint}")
    return Note(value["precision"], dense)


def note_bytes(precision: str, folder: Path) -> bytes:
    """Return the note of a model compiled from the dense weights in a folder. O(bytes of the weights)."""
    value = {"schema": SCHEMA, "rarefy": __version__, "precision": precision, "dense": dense_hashes(folder)}
    return json.dumps(value, indent=1).encode()


def dense_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of the dense weights and config of a folder by name."""
    return {f.name: sha256_of(f) for f in sorted(f for pattern in DENSE_FILES for f in folder.glob(pattern))}


def dense_stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the bytes and the time of change of the dense weights and config of a folder by name."""
    files = sorted(f for pattern in DENSE_FILES for f in folder.glob(pattern))
    return {f.name: (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


def config_labels(folder: Path) -> int | None:
    """Return the number of labels in a folder's config.json, None if it does not say."""
    file = folder / "config.json"
    values = read_json_file(file, MAX_CONFIG_BYTES) if file.is_file() else None
    labels = values.get("id2label") if isinstance(values, dict) else None
    return len(labels) if isinstance(labels, dict) else None


def _is_other_form(file: Path) -> bool:
    return file.suffix in NOT_COPIED or file.name in OF_RAREFY or file.name.endswith(".safetensors.index.json")


def copy_missing(source: Path, target: Path, top: Path | None = None) -> None:
    """Copy the files of a model's folder that another one lacks, but for other forms of the weights.

    Folders are copied if the target has them: those of its modules. Links out of the folder are refused.
    """
    top = source if top is None else top
    for file in sorted(source.iterdir()):
        copy = target / file.name
        if file.is_dir() and copy.is_dir() and file.name != ENGINE:
            copy_missing(file, copy, top)
        elif file.is_file() and not copy.exists() and file.name[0] != "." and not _is_other_form(file):
            shutil.copyfile(hub.check_link(file, top), copy)
