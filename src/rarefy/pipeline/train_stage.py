"""The stage `train` of a recipe: inside a run of `compress_`, or inside anybody's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from rarefy.checkpoint import load
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import DataError, ModelError, RecipeError
from rarefy.common.report import Report
from rarefy.evaluation.metrics import BETTER, METRICS
from rarefy.model import hf
from rarefy.model.forward import on_device
from rarefy.model.losses import Loss, resolve_loss
from rarefy.model.masks import adopt_
from rarefy.pipeline.run_data import Given, Labelled, calibrates, with_labels
from rarefy.quantization.quantize import quantize_
from rarefy.recipe import parser as recipes
from rarefy.train import sparsifier
from rarefy.train.distill import Distiller, frozen_copy
from rarefy.train.fit import Steps, fit_
from rarefy.train.optimizers import optimizer_of
from rarefy.train.sparsifier import check_steps
from rarefy.train.sparsity_config import SparsityConfig


def train_(
    model: nn.Module,
    s: recipes.Train,
    given: Given,
    loss: Loss | None,
    seed: int,
    progress: bool,
    resume_dir: Path | None = None,
    log: Any = None,
) -> list[Report]:
    """Train as a stage says, on the recipe's data, and return what was done."""
    o = s.optimizer
    batches = labelled(model, given)
    told = list[Report]()
    if s.keep_zeros:
        adopt_(model)
    validate = None
    if s.validate is not None:
        validate = partial(METRICS[s.validate], data=given.batches("validate"))
    with teacher(model, s, given, resume_dir, batches) as distill:
        done = fit_(
            model,
            batches,
            epochs=s.epochs,
            optimizer=optimizer_of(o.name, o.lr, **o.options()),
            lr_schedule=s.lr_schedule,
            loss=loss,
            prune=s.prune,
            calibrate=calibration(model, s, given),
            distill=distill,
            at=happenings(s, given, progress, told),
            steps=Steps(accumulate=s.accumulate, clip=s.clip, autocast=s.autocast),
            validate=validate,
            maximize=s.validate is None or BETTER[s.validate] is max,
            patience=s.patience,
            seed=seed,
            resume_dir=resume_dir,
            also=asdict(s),
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
    model: nn.Module, s: recipes.Train, given: Given, resume_dir: Path | None, batches: Callable[[int], Labelled]
) -> Iterator[Distiller | None]:
    """Give what a stage learns from, with a folder for its answers if it keeps them; None where it has no teacher."""
    if s.distill is None:
        yield None
        return
    assert given.before is not None
    folder, before = s.distill.teacher, given.before
    wise = frozen_copy(before) if folder is None else other(folder, given.base, before)
    example = next(iter(batches(0)), None)
    if example is None:
        raise DataError("the training data is empty")
    with TemporaryDirectory() as place:
        cache = (
            (place if resume_dir is None else resume_dir.with_name(f"{resume_dir.name}-answers"))
            if s.distill.cache
            else None
        )
        distiller = Distiller(model, wise, s.distill, example=on_device(model, example), cache=cache)
        try:
            yield distiller
        finally:
            distiller.close()


def check_stage(s: recipes.Train, given: Given, model: nn.Module | None) -> None:
    """Raise for what a stage would only find in the middle: no data to validate on, or data or a model that its metric
    cannot read, a teacher that is not there."""
    if s.distill is not None and s.distill.teacher is not None:
        _teacher_folder(s.distill.teacher, given.base)
    if s.validate is None:
        return
    if not given.has("validate"):
        raise DataError(
            "no validate data: name it in the recipe (data: {validate: ...}), or pass data={'validate': ...}"
        )
    if model is None:
        return
    first = next(iter(given.batches("validate")), None)
    if first is None:
        raise DataError("the validation data is empty")
    METRICS[s.validate](model, [first])


def _teacher_folder(folder: str, base: Path | None) -> Path:
    path = Path(folder).expanduser()
    path = path if path.is_absolute() or base is None or path.exists() else base / path
    if not (path / INDEX).is_file() and not (path / "config.json").is_file():
        raise ModelError(f"teacher {folder!r} is no folder of a model: neither config.json nor {INDEX} is in it")
    return path


def other(folder: str, base: Path | None, before: nn.Module) -> nn.Module:
    """Return the teacher in a folder: a Hugging Face model, or one of ours, whose class is that of the student where
    the folder does not say. ModelError where it is neither."""
    path = _teacher_folder(folder, base)
    if (path / INDEX).is_file():
        try:
            teacher = load.load(path)
        except ModelError:
            teacher = load.load(path, copy.deepcopy(before))
        if not isinstance(teacher, nn.Module):
            raise ModelError(f"teacher {folder!r} is a compiled model: give the folder of what it was compiled from")
        return frozen_copy(teacher)
    return frozen_copy(hf.load_folder(path))


class Sparsifier(sparsifier.Sparsifier):
    """A recipe's stage `train` in anybody's loop: zeros, grids and a teacher, on the steps of that loop.

        sparsifier = rarefy.Sparsifier(model, "recipe.yaml", steps_per_epoch=len(loader), optimizer=optimizer)
        for batch in loader:
            output = model(**batch)
            sparsifier.loss(output, batch).backward()    # the model's own loss, where the recipe names no teacher
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()

    recipe           a preset, file, dict or Recipe with one stage, `train`; or a plan such as rarefy.Gradual; its
                     optimizer, rates and data are the loop's own business
    steps_per_epoch  optimizer steps in one of the stage's `epochs`; or `steps` in all; or neither, and `step(progress)`
    teacher          what the model learns from where the recipe says distill (default: the model as it is now)
    calibrate        batches for scores that read data, and for static activations
    example          a batch, by which student and teacher are checked at once
    cache            folder for the teacher's answers

    Everything else as in `rarefy.train.sparsifier.Sparsifier`. `rarefy.fold_(model)` makes an ordinary model of it.

    >>> net = nn.Linear(8, 8)
    >>> s = Sparsifier(net, {"stages": [{"train": {"epochs": 2, "prune": {"sparsity": 0.5, "steps": 2, "end": 1.0}}}]},
    ...     steps_per_epoch=2)
    >>> for _ in range(4): s.step()
    >>> s.sparsity
    0.5
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: str | Path | Mapping[str, Any] | recipes.Recipe | SparsityConfig,
        *,
        steps_per_epoch: int | None = None,
        steps: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        teacher: nn.Module | None = None,
        calibrate: Iterable[Any] | None = None,
        loss: Loss | None = None,
        example: Any = None,
        cache: str | Path | None = None,
        **overrides: Any,
    ):
        stage, seed, given = recipes.Train(prune=None), 0, None
        if isinstance(recipe, SparsityConfig):
            stage = replace(stage, prune=recipe)
            if steps_per_epoch is not None:
                raise RecipeError("a plan does not say how many epochs there are: give steps, of the whole training")
            if overrides:
                raise RecipeError(f"a plan takes no overrides: {', '.join(overrides)}; change the plan")
        else:
            whole = recipes.load(recipe, **overrides)
            stage, seed = _only_train(whole), whole.seed
            if calibrate is not None:
                calibrate = list(calibrate)
                given = Given(whole, {"calibrate": calibrate}, None, None)
        if steps_per_epoch is not None and steps is not None:
            raise RecipeError("give steps_per_epoch or steps, not both")
        if steps_per_epoch is not None:
            check_steps(steps_per_epoch, "steps_per_epoch")
            steps = steps_per_epoch * stage.epochs
        if teacher is not None and stage.distill is not None and stage.distill.teacher is not None:
            raise RecipeError("the recipe names a teacher's folder: leave teacher out, or take it from the recipe")
        if teacher is not None and stage.distill is None:
            raise RecipeError("teacher has no effect: the recipe's train stage has no distill")
        if stage.keep_zeros:
            adopt_(model)
        self.own, self.distiller = resolve_loss(loss), None
        if stage.distill is not None:
            folder, wise = stage.distill.teacher, teacher
            if wise is None:
                wise = frozen_copy(model) if folder is None else other(folder, None, model)
            self.distiller = Distiller(model, wise, stage.distill, example=example, cache=cache)
        labels = None if calibrate is None else list(with_labels(model, calibrate, "train"))
        at = happenings(stage, given, False, [])
        told = {"optimizer": optimizer, "calibrate": labels, "loss": loss, "seed": seed, "at": at}
        try:
            super().__init__(model, stage.prune, steps=steps, **told)
        except BaseException:
            if self.distiller is not None:
                self.distiller.close()
            raise
        self.use(optimizer)

    def use(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Take an optimizer that was made later; it trains the projectors of the teacher's loss too."""
        super().use(optimizer)
        if optimizer is not None and self.distiller is not None:
            self.distiller.join(optimizer)

    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        """Return the loss of a step: the teacher's and the model's own, as the recipe weighs them."""
        if self.distiller is None:
            return self.own(output, batch)
        return self.distiller(output, batch, self.own(output, batch) if self.distiller.task else None)


def _only_train(recipe: recipes.Recipe) -> recipes.Train:
    names = {cls: name for name, cls in recipes.STAGES.items()}
    if len(recipe.stages) != 1 or not isinstance(recipe.stages[0], recipes.Train):
        found = ", ".join(names[type(s)] for s in recipe.stages)
        raise RecipeError(
            f"a loop takes a recipe with one stage, train; {recipe.name} has {found}: run the others by compress_, "
            "before or after"
        )
    return recipe.stages[0]
