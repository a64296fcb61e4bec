"""Where a training run's rows go: JSON lines by ourselves, TensorBoard and W&B by their own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.common.atomic_io import blaming
from rarefy.common.errors import RecipeError, unknown

Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Loggers:
    """Writers of rows; a row is {name: number}, with its epoch."""

    writers: tuple[Write, ...] = ()

    @staticmethod
    @contextmanager
    def open(where: str | Path | Sequence[str] | None) -> Iterator[Loggers]:
        """Open what is named: a file, `tensorboard:FOLDER`, `wandb:PROJECT`. RecipeError where a library is missing."""
        words = [] if where is None else [where] if isinstance(where, str | Path) else list(where)
        with ExitStack() as stack:
            yield Loggers(tuple(_writer(str(w), stack) for w in words))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row to all of them."""
        for write in self.writers:
            write(row)


def _writer(word: str, stack: ExitStack) -> Write:
    kind, colon, rest = word.partition(":")
    if colon and kind in ("tensorboard", "wandb"):
        if not rest:
            raise RecipeError(f"log {word!r} lacks a name: {kind}:{'FOLDER' if kind == 'tensorboard' else 'PROJECT'}")
        try:
            return (_tensorboard if kind == "tensorboard" else _wandb)(rest, stack)
        except ImportError as error:
            raise RecipeError(f"log {word!r} needs the package {kind}: pip install {kind} ({error})") from None
    if colon and "/" not in kind and len(kind) > 1:  # one letter is a drive
        raise RecipeError(unknown("log", kind, ("tensorboard", "wandb")) + "; or a file's name without a colon")
    file = Path(word).expanduser()
    with blaming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = stack.enter_context(file.open("a", encoding="utf-8"))

    def write(row: Mapping[str, Any]) -> None:
        print(json.dumps(dict(row)), file=opened, flush=True)

    return write


def _tensorboard(folder: str, stack: ExitStack) -> Write:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder)
    stack.callback(board.close)

    def write(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch":
                board.add_scalar(f"train/{name}", value, int(row["epoch"]))

    return write


def _wandb(project: str, stack: ExitStack) -> Write:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(project=project)
    stack.callback(run.finish)
    return lambda row: run.log(dict(row))
