"""The stage `train` of a recipe: inside a run of `compress_`, or inside anybody's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from rarefy import recipe as recipes
from rarefy import store
from rarefy.errors import DataError, ModelError
from rarefy.files import INDEX
from rarefy.given import Given, Labelled, calibrates, with_labels
from rarefy.model import hf
from rarefy.model.stats import Loss, on_device
from rarefy.proof.evaluate import BETTER, METRICS
from rarefy.proof.report import Report
from rarefy.train.distill import Distiller, frozen_copy
from rarefy.train.loop import Steps, fit_
from rarefy.train.optimizers import optimizer_of
from rarefy.values.quantize import quantize_


def train_(
    model: nn.Module,
    s: recipes.Train,
    given: Given,
    loss: Loss | None,
    seed: int,
    progress: bool,
    work: Path | None = None,
    log: Any = None,
) -> list[Report]:
    """Train as a stage says, on the recipe's data, and return what was done."""
    o = s.optimizer
    batches = labelled(model, given)
    told = list[Report]()
    validate = None
    if s.validate is not None:
        validate = partial(METRICS[s.validate], data=given.batches("validate"))
    with teacher(model, s, given, work, batches) as teach:
        done = fit_(
            model,
            batches,
            epochs=s.epochs,
            optimizer=optimizer_of(o.name, o.lr, **o.options()),
            lr_schedule=s.lr_schedule,
            loss=loss,
            prune=s.prune,
            calibrate=calibration(model, s, given),
            teach=teach,
            at=happenings(s, given, progress, told),
            steps=Steps(accumulate=s.accumulate, clip=s.clip, autocast=s.autocast),
            validate=validate,
            maximize=s.validate is None or BETTER[s.validate] is max,
            patience=s.patience,
            seed=seed,
            work=work,
            log=log,
            progress=progress,
        )
    return [done, *told]


def labelled(model: nn.Module, given: Given) -> Callable[[int], Labelled]:
    """Return the training batches as a function of the epoch, text with the labels that make it a task."""
    train = given.batches("train")
    if callable(train):
        return lambda epoch: Labelled(model, train(epoch), "train")
    return lambda _: Labelled(model, train, "train")


def calibration(model: nn.Module, s: recipes.Train, given: Given) -> list[Any] | None:
    """Return the batches that the scores of a stage read, or None."""
    if s.prune is None or not calibrates(s.prune):
        return None
    return list(with_labels(model, given.batches("calibrate"), getattr(s.prune, "score", "train")))


def happenings(
    s: recipes.Train, given: Given | None, progress: bool, told: list[Report]
) -> dict[float, Callable[[nn.Module], Any]]:
    """Return what happens on the way, by progress: weights come onto their grid."""
    q = s.quantize
    if q is None:
        return {}

    def onto_grid(model: nn.Module) -> None:
        data = None
        if calibrates(q):
            if given is None:
                raise DataError("the stage's quantize reads calibration data: give calibrate=batches")
            data = Labelled(model, given.batches("calibrate"), None)
        told.append(quantize_(model, **q.options(), layers=q.layers, ignore=q.ignore, data=data, progress=progress))

    return {q.start: onto_grid}


@contextmanager
def teacher(
    model: nn.Module, s: recipes.Train, given: Given, work: Path | None, batches: Callable[[int], Labelled]
) -> Iterator[Distiller | None]:
    """Give what a stage learns from, with a folder for its answers if it keeps them; None where it has no teacher."""
    if s.distill is None:
        yield None
        return
    assert given.before is not None
    wise = frozen_copy(given.before)
    if s.distill.teacher is not None:
        wise = other(s.distill.teacher, given.base, wise)
    example = next(iter(batches(0)), None)
    if example is None:
        raise DataError("the training data is empty")
    with TemporaryDirectory() as place:
        cache = (place if work is None else work.with_name(f"{work.name}-answers")) if s.distill.cache else None
        distiller = Distiller(model, wise, s.distill, example=on_device(model, example), cache=cache)
        try:
            yield distiller
        finally:
            distiller.close()


def other(folder: str, base: Path | None, before: nn.Module) -> nn.Module:
    """Return the teacher in a folder: a Hugging Face model, or one of ours, whose class is that of the student where
    the folder does not say. ModelError where it is neither."""
    path = Path(folder).expanduser()
    path = path if path.is_absolute() or base is None or path.exists() else base / path
    if (path / INDEX).is_file():
        try:
            return frozen_copy(store.load(path))
        except ModelError:
            return frozen_copy(store.load(path, copy.deepcopy(before)))
    if not (path / "config.json").is_file():
        raise ModelError(f"teacher {folder!r} is no folder of a model: neither config.json nor {INDEX} is in it")
    return frozen_copy(hf.load_folder(path))
