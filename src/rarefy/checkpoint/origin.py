"""Where a model came from: its name, revision and licence, written beside a compressed model as source.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rarefy.common.errors import ContainerError, RecipeError
from rarefy.common.json_text import read_json_file
from rarefy.common.yaml_text import read_yaml
from rarefy.data import builtin
from rarefy.model import hub
from rarefy.model.vision import VisionName, licence_of

FILE, CARD = "source.json", "README.md"
MAX_BYTES = 1 << 20
FROM_CARD = {  # what is carried over from a model card: its key, and the key of source.json
    "license": "licence",
    "license_name": "licence_name",
    "license_link": "licence_link",
    "pipeline_tag": "task",
    "language": "language",
}
TEXT = re.compile(r"[\w][\w .,:/()+@#=-]{0,199}")


def origin_files(source: Path | VisionName) -> dict[str, bytes]:
    """Return source.json and the licence files of a model's folder, by name; {} where nothing is known.

    Args:
        source: the folder or file of a model, or a name of timm or torchvision.

    Raises:
        ContainerError: a licence file is a link out of the folder.

    Example:
        >>> json.loads(origin_files(VisionName("torchvision", "resnet18", Path("w.pth")))["source.json"])
        {'model': 'torchvision/resnet18', 'weights': 'w.pth'}
    """
    record, files = _record(source), {}
    if isinstance(source, Path) and source.is_dir():
        files = {p.name: hub.check_link(p, source).read_bytes() for p in sorted(source.iterdir()) if _is_licence(p)}
    return files | ({FILE: json.dumps(record, indent=1).encode()} if record else {})


def read_origin(folder: Path) -> dict[str, Any]:
    """Return what source.json of a folder says, checked; {} where there is none.

    Raises:
        ContainerError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file() or file.is_symlink() or file.stat().st_size > MAX_BYTES:
        return {}
    data = read_json_file(file, MAX_BYTES)
    known = ("model", "revision", "weights", *FROM_CARD.values())
    if not isinstance(data, dict) or any(n not in known or not _is_plain(v) for n, v in data.items()):
        raise ContainerError(f"{file}: expected the fields {', '.join(known)}, each a short text")
    return data


def card_fields(folder: Path) -> dict[str, Any]:
    """Return the licence, task and language that the model card of a folder states, by the names of source.json."""
    file = folder / CARD
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\n(.*?)\n---\s*(\n|$)", text.replace("\r\n", "\n"), re.DOTALL)
    if match is None:
        return {}
    try:
        data = read_yaml(match[1], str(file)).data
    except RecipeError:  # a card is not a part of the model
        return {}
    data = data if isinstance(data, dict) else {}
    return {name: data[key] for key, name in FROM_CARD.items() if key in data and _is_plain(data[key])}


def _record(source: Path | VisionName) -> dict[str, Any]:
    if isinstance(source, VisionName):
        weights = "random" if source.random else source.checkpoint.name if source.checkpoint else None
        record = {"model": str(source), "weights": weights, "licence": licence_of(source)}
        return {n: v for n, v in record.items() if v is not None}
    if source.is_file():
        return {}
    earlier = read_origin(source)
    if earlier:
        return earlier
    for name in builtin.MODELS:
        if source == builtin.folder_of(name):
            return {"model": name, "licence": builtin.SOURCES[name].licence.lower()}
    return {**hub.origin_of(source), **card_fields(source)}


def _is_licence(path: Path) -> bool:
    return bool(hub.LICENCE.fullmatch(path.name)) and path.is_file() and path.stat().st_size <= MAX_BYTES


def _is_plain(value: Any) -> bool:
    """Return whether a value is a short text in one line, or a list of a few."""
    if isinstance(value, list):
        return 0 < len(value) <= 100 and all(isinstance(v, str) and TEXT.fullmatch(v) for v in value)
    return isinstance(value, str) and TEXT.fullmatch(value) is not None
