"""The stage `train` of a recipe: inside `compress_`, or inside a training loop of the user."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from rarefy.checkpoint import load
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import DataError, ModelError, RecipeError
from rarefy.common.plain_file import usable_path
from rarefy.common.report import Report
from rarefy.evaluation.metrics import BETTER, METRICS
from rarefy.model import hf
from rarefy.model.forward import check_batches, on_device
from rarefy.model.losses import Loss, resolve_loss
from rarefy.model.masks import adopt_
from rarefy.pipeline.run_data import Labelled, RunContext, RunData, needs_calibration, with_labels
from rarefy.quantization.quantize import run_quantize
from rarefy.recipe.parser import load as load_recipe
from rarefy.recipe.schema import STAGE_NAMES, Recipe, TrainStage
from rarefy.train import sparsifier
from rarefy.train.distill import Distiller, frozen_copy
from rarefy.train.fit import Steps, run_fit
from rarefy.train.optimizers import optimizer_of
from rarefy.train.sparsifier import check_steps
from rarefy.train.sparsity_config import SparsityConfig


def run_train(model: nn.Module, stage: TrainStage, context: RunContext) -> list[Report]:
    """Train a model in place on the recipe's data; return the reports of what was done."""
    data, quantized = context.data, list[Report]()
    batches = labelled_batches(model, data)
    if stage.keep_zeros:
        adopt_(model)
    validate = None
    if stage.validate is not None:
        validate = partial(METRICS[stage.validate], data=data.batches("validate"))
    optimizer = stage.optimizer
    with distiller_of(model, stage, context, batches) as distill:
        trained = run_fit(
            model,
            batches,
            stage,
            Steps(**stage.model_dump(include=set(Steps.model_fields))),
            optimizer=optimizer_of(optimizer.name, optimizer.lr, **optimizer.options()),
            loss=context.loss,
            prune=stage.prune,
            calibrate=calibration_batches(model, stage, data),
            distill=distill,
            at=quantize_events(stage, data, context.progress, quantized),
            validate=validate,
            maximize=stage.validate is None or BETTER[stage.validate] is max,
            seed=context.seed,
            resume_dir=context.resume_dir,
            also=stage.model_dump(),
            log=context.log,
            progress=context.progress,
        )
    return [trained, *quantized]


def labelled_batches(model: nn.Module, data: RunData) -> Callable[[int], Labelled]:
    """Return the training batches as a function of the epoch, text with the labels that make it a task."""
    train = data.batches("train")
    if callable(train):
        return lambda epoch: Labelled(model, train(epoch), "train")
    return lambda _: Labelled(model, train, "train")


def calibration_batches(model: nn.Module, stage: TrainStage, data: RunData) -> list[Any] | None:
    """Return the batches that the scores of a stage read, or None."""
    if stage.prune is None or not needs_calibration(stage.prune):
        return None
    return list(with_labels(model, data.batches("calibrate"), getattr(stage.prune, "score", "train")))


def quantize_events(
    stage: TrainStage, data: RunData | None, progress: bool, reports: list[Report]
) -> dict[float, Callable[[nn.Module], Any]]:
    """Return the event that quantizes the weights, by its progress; it appends its report to `reports`."""
    options = stage.quantize
    if options is None:
        return {}

    def quantize(model: nn.Module) -> None:
        batches = None
        if needs_calibration(options):
            if data is None:
                raise DataError("the stage's quantize reads calibration data: give calibrate=batches")
            batches = Labelled(model, data.batches("calibrate"), None)
        reports.append(run_quantize(model, options, batches, progress=progress))

    return {options.start: quantize}


@contextmanager
def distiller_of(
    model: nn.Module, stage: TrainStage, context: RunContext, batches: Callable[[int], Labelled]
) -> Iterator[Distiller | None]:
    """Give the loss of a stage's teacher, with a folder for the teacher's outputs if it keeps them, or None."""
    if stage.distill is None:
        yield None
        return
    before, resume_dir = context.before, context.resume_dir
    if before is None:
        raise ModelError("distill needs the model before the first stage: RunContext.before")
    folder = stage.distill.teacher
    teacher = frozen_copy(before) if folder is None else load_teacher(folder, context.data.base, before)
    example = next(iter(batches(0)), None)
    if example is None:
        raise DataError("the training data is empty")
    with TemporaryDirectory() as temporary:
        outputs = temporary if resume_dir is None else resume_dir.with_name(f"{resume_dir.name}-answers")
        cache = outputs if stage.distill.cache else None
        distiller = Distiller(model, teacher, stage.distill, example=on_device(model, example), cache=cache)
        try:
            yield distiller
        finally:
            distiller.close()


def check_stage(stage: TrainStage, data: RunData, model: nn.Module | None) -> None:
    """Raise for what a stage would only find in the middle: no data to validate on, or data or a model that its metric
    cannot read, a teacher that is not there."""
    if stage.distill is not None and stage.distill.teacher is not None:
        _teacher_folder(stage.distill.teacher, data.base)
    if stage.validate is None:
        return
    if not data.has("validate"):
        raise DataError(
            "no validate data: name it in the recipe (data: {validate: ...}), or pass data={'validate': ...}"
        )
    if model is None:
        return
    batch = next(iter(data.batches("validate")), None)
    if batch is None:
        raise DataError("the validation data is empty")
    METRICS[stage.validate](model, [batch])


def _teacher_folder(folder: str, base: Path | None) -> Path:
    path = Path(folder).expanduser()
    path = usable_path(path if base is None else base / path, ModelError)
    if not (path / INDEX).is_file() and not (path / "config.json").is_file():
        raise ModelError(f"teacher {folder!r} is not a model folder: it has neither config.json nor {INDEX}")
    return path


def load_teacher(folder: str, base: Path | None, before: nn.Module) -> nn.Module:
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
    """Apply a recipe's train stage in your own training loop: masks, quantization and distillation.

    `rarefy.fold_(model)` makes an ordinary model of the result. Masks are attached at once, so create the sparsifier
    before torch.compile, DDP or FSDP wrap the model. Call `step()` after `optimizer.step()` and before `zero_grad()`;
    with gradient accumulation or a loss scaler once an optimizer step. `sparsity` and `done` say how far it is.

        sparsifier = rarefy.Sparsifier(model, "recipe.yaml", steps_per_epoch=len(loader), optimizer=optimizer)
        for batch in loader:
            output = model(**batch)
            sparsifier.loss(output, batch).backward()  # the model's own loss, where the recipe names no teacher
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()

    Args:
        model: the model that is trained.
        recipe: a preset, file, dict or Recipe with one stage, train; or a configuration such as rarefy.Gradual. The
            recipe's optimizer, rates and data are not used.
        steps_per_epoch: optimizer steps in one of the stage's `epochs`.
        steps: instead of steps_per_epoch: optimizer steps in all. Without both, call `step(progress)`.
        optimizer: the optimizer of the loop; its state of masked weights is set to zero.
        teacher: what the model learns from where the recipe has distill; by default the model as it is now.
        calibrate: batches for scores that read data, and for static activations.
        loss: for gradient scores and `loss`, a function of (output, batch) or a criterion (logits, target); see
            `rarefy.fit_`.
        example: a batch by which student and teacher are checked at once.
        cache: folder for the teacher's outputs.
        **overrides: new values of the recipe's fields.

    Raises:
        RarefyError: for a recipe, model or data that do not fit.

    Example:
        >>> net = nn.Linear(8, 8)
        >>> stage = {"train": {"epochs": 2, "prune": {"sparsity": 0.5, "steps": 2, "end": 1.0}}}
        >>> s = Sparsifier(net, {"stages": [stage]}, steps_per_epoch=2)
        >>> for _ in range(4): s.step()
        >>> s.sparsity
        0.5
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: str | Path | Mapping[str, Any] | Recipe | SparsityConfig,
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
        seed, data = 0, None
        if calibrate is not None:
            check_batches(calibrate, "calibrate")
        if isinstance(recipe, SparsityConfig):
            stage = _stage_of_config(recipe, steps_per_epoch, overrides)
        else:
            loaded = load_recipe(recipe, **overrides)
            stage, seed = _only_train(loaded), loaded.seed
            if calibrate is not None:
                calibrate = list(calibrate)
                data = RunData(loaded, {"calibrate": calibrate})
        if steps_per_epoch is not None and steps is not None:
            raise RecipeError("give steps_per_epoch or steps, not both")
        if steps_per_epoch is not None:
            check_steps(steps_per_epoch, "steps_per_epoch")
            steps = steps_per_epoch * stage.epochs
        if teacher is not None and stage.distill is not None and stage.distill.teacher is not None:
            raise RecipeError(
                "the recipe already names a teacher's folder: leave teacher out, or remove it from the recipe"
            )
        if teacher is not None and stage.distill is None:
            raise RecipeError("teacher has no effect: the recipe's train stage has no distill")
        if stage.keep_zeros:
            adopt_(model)
        self._own_loss, self.distiller = resolve_loss(loss), None
        if stage.distill is not None:
            folder = stage.distill.teacher
            if teacher is None:
                teacher = frozen_copy(model) if folder is None else load_teacher(folder, None, model)
            self.distiller = Distiller(model, teacher, stage.distill, example=example, cache=cache)
        batches = None if calibrate is None else list(with_labels(model, calibrate, "train"))
        at = quantize_events(stage, data, False, [])
        settings = {"optimizer": optimizer, "calibrate": batches, "loss": loss, "seed": seed, "at": at}
        try:
            super().__init__(model, stage.prune, steps=steps, **settings)
        except BaseException:
            if self.distiller is not None:
                self.distiller.close()
            raise
        self.use(optimizer)

    def use(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Register the optimizer; the projectors of the distillation loss are added to it."""
        super().use(optimizer)
        if optimizer is not None and self.distiller is not None:
            self.distiller.join(optimizer)

    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        """Return the loss of a step: the teacher's and the model's own, as the recipe weighs them."""
        if self.distiller is None:
            return self._own_loss(output, batch)
        return self.distiller(output, batch, self._own_loss(output, batch) if self.distiller.task else None)


def _stage_of_config(config: SparsityConfig, steps_per_epoch: int | None, overrides: Mapping[str, Any]) -> TrainStage:
    """Return a train stage that has only a pruning configuration."""
    if steps_per_epoch is not None:
        raise RecipeError("steps_per_epoch needs a recipe with epochs: give steps, the number in the whole training")
    if overrides:
        raise RecipeError(f"overrides need a recipe: {', '.join(overrides)}; set them in the configuration instead")
    return TrainStage.model_validate({"prune": config})


def _only_train(recipe: Recipe) -> TrainStage:
    """Return the train stage of a recipe that has no other."""
    if len(recipe.stages) != 1 or not isinstance(recipe.stages[0], TrainStage):
        names = ", ".join(STAGE_NAMES[type(stage)] for stage in recipe.stages)
        raise RecipeError(
            f"expected a recipe with the single stage train; {recipe.name} has {names}: run the others with compress_, "
            "before or after"
        )
    return recipe.stages[0]
