"""Everything a search has measured, on disk: a killed search goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rarefy.common.atomic_io import SEARCH_FILE, container_errors, lock_file, unlock_file
from rarefy.common.errors import ContainerError


class Journal:
    """Results by key. What is there is returned, the rest is computed and appended.

    Attributes:
        values: the results.
        costs: the seconds that each result took, in the order in which they were computed.
        wall_seconds: of results that several processes computed side by side, how much longer each made the search.
        trouble: why results are not written any more; "" where they are.
        notes: what a user has to know about how results were measured.
        processes: how many processes measure, see `SharedJournal`.
        rank: which of them this one is, from 0.
        collecting: whether results are not computed now, but listed, see `prefetch`.
    """

    processes, rank, collecting = 1, 0, False

    def __init__(self, folder: Path | None, settings: dict[str, Any], clock: Callable[[], float] = time.perf_counter):
        """Read the results in a folder, and lock it.

        Args:
            folder: where the file lies; None keeps results in memory alone.
            settings: what the results depend on. Those of other settings are refused.
            clock: returns seconds.

        Raises:
            ContainerError: for a folder that cannot be written, is in use, or has results of another search.
        """
        self.values: dict[str, Any] = {}
        self.costs: dict[str, float] = {}
        self.wall_seconds: dict[str, float] = {}
        self.trouble = ""
        self.notes: list[str] = []
        self.clock = clock
        self.file = None if folder is None else folder / SEARCH_FILE
        self.opened: Any = None
        if folder is None or self.file is None:
            return
        if folder.exists() and not folder.is_dir():
            raise ContainerError(f"{folder} is a file: give the name of a folder")
        with container_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.opened = lock_file(self.file)
            try:
                self._open(json.loads(json.dumps(settings)))
            except BaseException:
                self.close()
                raise

    @property
    def seconds(self) -> float:
        """Return the seconds in which all results were measured, in this run and in those before."""
        return sum({**self.costs, **self.wall_seconds}.values())

    def close(self) -> None:
        """Release the folder for other searches."""
        if self.opened is not None:
            unlock_file(self.opened)

    def _open(self, settings: dict[str, Any]) -> None:
        """Read the results, or write the settings where there are none."""
        assert self.file is not None
        if b"\n" in self.file.read_bytes():
            self._read(settings)
        else:
            os.truncate(self.file, 0)
            self._append({"settings": settings})

    def _read(self, settings: dict[str, Any]) -> None:
        """Read the results; a last line that a kill left incomplete is cut off."""
        assert self.file is not None
        lines = self.file.read_bytes().split(b"\n")
        if lines[-1]:
            os.truncate(self.file, sum(len(l) + 1 for l in lines[:-1]))
        try:
            first, *rest = [json.loads(l) for l in lines[:-1]]
            if not all(type(record["key"]) is str for record in rest):
                raise TypeError("a key is no text")
            for record in rest:
                self.values[record["key"]] = record["value"]
                self.costs[record["key"]] = float(record["seconds"])
                if "wall_seconds" in record:
                    self.wall_seconds[record["key"]] = float(record["wall_seconds"])
            known = first["settings"]
            differs = [n for n in {**known, **settings} if known.get(n) != settings.get(n)]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ContainerError(f"{self.file} was not written by rarefy.optimize ({error!r}): remove it") from error
        if differs:
            raise ContainerError(
                f"{self.file} belongs to another search ({', '.join(differs)} differ): pass another "
                "resume_dir, or delete this one to start again (shell: give another --out, or --fresh to start again)"
            )

    def get(self, key: str, compute: Callable[[], Any], keep: Callable[[Any], bool] = lambda value: True) -> Any:
        """Return the result of a key, which JSON can hold; compute it where there is none yet.

        Args:
            key: its name. The first words say what kind of step it is, see `seconds_of`.
            compute: returns it.
            keep: whether a result is written to disk. Others are computed again after a kill.
        """
        if key not in self.values:
            began = self.clock()
            value = json.loads(json.dumps(compute(), allow_nan=False))
            self._add(key, value, self.clock() - began, keep)
        return self.values[key]

    def prefetch(self, requests: Iterable[Callable[[], Any]]) -> None:
        """Compute what calls without side effects will `get`, side by side. One process computes when it is asked."""

    def _add(
        self, key: str, value: Any, seconds: float, keep: Callable[[Any], bool], wall_seconds: float | None = None
    ) -> None:
        self.values[key], self.costs[key] = value, seconds
        record = {"key": key, "value": value, "seconds": seconds}
        if wall_seconds is not None:
            self.wall_seconds[key] = record["wall_seconds"] = wall_seconds
        if keep(value):
            self._write(record)

    def seconds_of(self, *kinds: str) -> float | None:
        """Return what the last step took whose key begins with the first of these texts that any begins with."""
        costs = [*reversed(self.costs.items())]
        return next((seconds for kind in kinds for key, seconds in costs if key.startswith(kind)), None)

    def folder_of(self, name: str) -> Path | None:
        """Return a folder beside the file for the state of one long step, or None where nothing is on disk."""
        return None if self.file is None else self.file.with_name(name.replace(" ", "-"))

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record; where that fails, all further results stay in memory."""
        if self.opened is None or self.trouble:
            return
        try:
            self._append(record)
        except OSError as error:
            self.trouble = f"{self.file} cannot be written ({error.strerror or error}): a kill would lose the rest"

    def _append(self, record: dict[str, Any]) -> None:
        self.opened.write(json.dumps(record) + "\n")
        self.opened.flush()
        os.fsync(self.opened.fileno())
