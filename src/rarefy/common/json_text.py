"""Read JSON strictly: what another parser could understand in another way is refused.

Every JSON file whose content decides what a library loads is read here, once.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rarefy.common.errors import ContainerError, first_line
from rarefy.common.plain_file import plain_file

MAX_DEPTH = 100  # of lists and objects in each other


def parse_json(text: str | bytes, where: str = "") -> Any:
    """Return JSON as plain data; ContainerError, naming `where`, for anything that is not plain JSON.

    Refused are NaN, Infinity, numbers that are too large, a key that an object has twice, text that is not UTF-8 or
    begins with a byte order mark, and lists and objects nested deeper than MAX_DEPTH.

    Args:
        text: the text, or its bytes in UTF-8.
        where: what errors call it, such as the name of the file.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    try:
        plain = text.decode() if isinstance(text, bytes) else text
        value = json.loads(
            plain, parse_constant=_refuse_number, parse_float=_finite_float, object_pairs_hook=_without_duplicates
        )
        _check_depth(value)
        return value
    except UnicodeDecodeError:
        problem = "expected text in UTF-8"
    except RecursionError:
        problem = _too_deep()
    except ValueError as error:
        problem = str(error)
    raise ContainerError(f"{where}: not JSON: {problem}".removeprefix(": ")) from None


def read_bytes(file: Path, max_bytes: int) -> bytes:
    """Return the content of a file, read in one go; ContainerError if it is larger or cannot be read."""
    try:
        with plain_file(file).open("rb") as stream:
            data = stream.read(max_bytes + 1)
            size = len(data) if len(data) <= max_bytes else max(len(data), file.stat().st_size)
    except OSError as error:
        raise ContainerError(f"{file} cannot be read: {first_line(error)}") from None
    if size > max_bytes:
        raise ContainerError(f"{file}: {size:,} bytes, at most {max_bytes:,} are read")
    return data


def read_json_file(file: Path, max_bytes: int) -> Any:
    """Return the data of a JSON file as `parse_json` does; ContainerError if it is larger or cannot be read."""
    return parse_json(read_bytes(file, max_bytes), str(file))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} is written twice: remove one of the two")
    return data


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_too_deep())
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]


def _too_deep() -> str:
    return f"lists and objects are nested deeper than {MAX_DEPTH} levels"


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON, or too large")
