"""Progress bars on standard error."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Sized
from typing import Any, TypeVar

T = TypeVar("T")
_live: list[Any] = []  # consoles that show a bar now


def say(lines: Iterable[str]) -> None:
    """Print lines above the current progress bar, or on standard error."""
    for line in lines:
        if _live:
            _live[-1].print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr)


def track(items: Iterable[T], text: str, visible: bool, total: int | None = None) -> Generator[T, None, None]:
    """Yield the items; if `visible`, show a progress bar with the remaining time.

    >>> list(track([1, 2], "counting", visible=False))
    [1, 2]
    """
    if not visible:
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if total is None and isinstance(items, Sized):
        total = len(items)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),  # the whole bar fits a line of 80 characters
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bar:
        _live.append(console)
        try:
            yield from bar.track(items, total=total, description=f"{text:<22}")
        finally:
            _live.remove(console)
