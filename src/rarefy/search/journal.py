"""Everything a search has measured, on disk: a killed search goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rarefy.common.atomic_io import SEARCH_FILE
from rarefy.common.errors import ContainerError


class Journal:
    """Results by key. What is there is returned, the rest is computed and appended.

    Args:
        folder: where the file lies; None keeps results in memory alone.
        settings: what the results depend on. Those of other settings are refused.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]):
        self.values: dict[str, Any] = {}
        self.seconds = 0.0  # that all results took, in this process and in those before
        self.file = None if folder is None else folder / SEARCH_FILE
        if self.file is None:
            return
        settings = json.loads(json.dumps(settings))
        if self.file.is_file() and b"\n" in self.file.read_bytes():
            self._read(settings)
        else:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_bytes(b"")
            self._append({"settings": settings})

    def _read(self, settings: dict[str, Any]) -> None:
        """Read the results; a last line that a kill left incomplete is cut off."""
        assert self.file is not None
        lines = self.file.read_bytes().split(b"\n")
        if lines[-1]:
            os.truncate(self.file, sum(len(l) + 1 for l in lines[:-1]))
        try:
            first, *rest = [json.loads(l) for l in lines[:-1]]
            for record in rest:
                self.values[record["key"]] = record["value"]
                self.seconds += record["seconds"]
            known = first["settings"]
            differs = [n for n in {**known, **settings} if known.get(n) != settings.get(n)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ContainerError(f"{self.file} was not written by rarefy.optimize ({error!r}): remove it") from error
        if differs:
            raise ContainerError(
                f"{self.file} belongs to another search ({', '.join(differs)} differ): give another folder, "
                "or start again (shell: --fresh)"
            )

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return the result of a key, which JSON can hold; compute and keep it where there is none yet."""
        if key not in self.values:
            began = time.perf_counter()
            value = json.loads(json.dumps(compute(), allow_nan=False))
            seconds = time.perf_counter() - began
            self.values[key] = value
            self.seconds += seconds
            if self.file is not None:
                self._append({"key": key, "value": value, "seconds": seconds})
        return self.values[key]

    def folder_of(self, name: str) -> Path | None:
        """Return a folder beside the file for the state of one long step, or None where nothing is on disk."""
        return None if self.file is None else self.file.with_name(name.replace(" ", "-"))

    def _append(self, record: dict[str, Any]) -> None:
        assert self.file is not None
        with self.file.open("ab") as out:
            out.write(json.dumps(record).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
