"""Loggers of training: JSON lines, TensorBoard, W&B and MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.common.atomic_io import container_errors
from rarefy.common.errors import ModelError, RecipeError, first_line, unknown

Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Loggers:
    """Writers of rows; a row is {name: number} with its epoch."""

    writers: tuple[Write, ...] = ()

    @staticmethod
    @contextmanager
    def open(targets: str | Path | Sequence[str] | None) -> Iterator[Loggers]:
        """Open loggers: a file, `tensorboard:FOLDER`, `wandb:PROJECT`, `mlflow:EXPERIMENT`.

        Raises:
            RecipeError: a package is missing.
        """
        names = [] if targets is None else [targets] if isinstance(targets, str | Path) else list(targets)
        with ExitStack() as stack:
            yield Loggers(tuple(_writer(str(name), stack) for name in names))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row to all loggers."""
        for write in self.writers:
            write(row)


def _writer(name: str, stack: ExitStack) -> Write:
    """Return the writer that a name means."""
    kind, colon, target = name.partition(":")
    if colon and kind in PACKAGES:
        start, what = PACKAGES[kind]
        if not target:
            raise RecipeError(f"log {name!r} lacks a name: {kind}:{what}")
        try:
            return start(target, stack)
        except ImportError as error:
            raise RecipeError(f"log {name!r} needs the package {kind}: pip install {kind} ({error})") from None
    if colon and "/" not in kind and len(kind) > 1:  # a single letter is a Windows drive
        raise RecipeError(unknown("log", kind, PACKAGES) + "; or a file's name without a colon")
    file = Path(name).expanduser()
    with container_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = stack.enter_context(file.open("a", encoding="utf-8"))

    def write(row: Mapping[str, Any]) -> None:
        print(json.dumps(dict(row)), file=opened, flush=True)

    return write


def _tensorboard(folder: str, stack: ExitStack) -> Write:
    """Return a writer of TensorBoard scalars."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder)
    stack.callback(board.close)

    def write(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch":
                board.add_scalar(f"train/{name}", value, int(row["epoch"]))

    return write


def _wandb(project: str, stack: ExitStack) -> Write:
    """Return a writer of a W&B run."""
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(project=project)
    stack.callback(run.finish)
    return lambda row: run.log(dict(row))


def _mlflow(experiment: str, stack: ExitStack) -> Write:
    """Return a writer of metrics of an MLflow run: the one that is active, else a new one of the experiment."""
    import mlflow  # pyright: ignore[reportMissingImports]

    if mlflow.active_run() is None:
        with mlflow_errors():
            mlflow.set_experiment(experiment)
            stack.enter_context(mlflow.start_run())

    def write(row: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in row.items() if name != "epoch"}
        mlflow.log_metrics(values, step=int(row["epoch"]))

    return write


@contextmanager
def mlflow_errors() -> Iterator[None]:
    """Raise what MLflow cannot store as a ModelError of one line."""
    import mlflow  # pyright: ignore[reportMissingImports]
    from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

    try:
        yield
    except MlflowException as error:
        raise ModelError(
            f"MLflow cannot log to {mlflow.get_tracking_uri()}: {first_line(error, 160)}. Install all of MLflow (pip "
            "install mlflow; mlflow-skinny has no database), or set MLFLOW_TRACKING_URI to the address of a server"
        ) from None


PACKAGES: dict[str, tuple[Callable[[str, ExitStack], Write], str]] = {  # and what a name stands for
    "tensorboard": (_tensorboard, "FOLDER"),
    "wandb": (_wandb, "PROJECT"),
    "mlflow": (_mlflow, "EXPERIMENT"),
}
