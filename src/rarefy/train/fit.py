"""A fine-tuning loop: masks stay fixed or weights are pruned on the way, the best epoch is kept, a killed run goes
on where it was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import nn

from rarefy.calibration import resume
from rarefy.common.atomic_io import parse_path
from rarefy.common.errors import DataError, ModelError, RecipeError
from rarefy.common.options import OneOf, Options, Positive
from rarefy.common.progress import track
from rarefy.common.renamed import renamed_parameters
from rarefy.common.report import Report
from rarefy.model import distributed
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.batches import count_tokens
from rarefy.model.distributed import all_reduce_mean
from rarefy.model.forward import call, check_batches, on_device
from rarefy.model.layers import all_layers, check_is_module
from rarefy.model.losses import Loss, resolve_loss
from rarefy.model.masks import MIN_ZEROS_ON_GRID, get_mask, reattach_grids_, zero_fraction
from rarefy.runtime.sparse_layers import Sparse
from rarefy.train import checkpoint
from rarefy.train.best_epoch import BestEpoch
from rarefy.train.distill import Distiller
from rarefy.train.loggers import Loggers
from rarefy.train.optimizers import LR_SCHEDULES, MakeOptimizer, optimizer_of
from rarefy.train.sparsifier import Event, Sparsifier
from rarefy.train.sparsity_config import SparsityConfig

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]  # batches, or a function of the epoch that gives them
DistillLoss = Callable[[Any, Any, torch.Tensor | None], torch.Tensor]  # (output, batch, own loss) -> loss
BATCH_NORM = nn.modules.batchnorm._BatchNorm
AUTOCAST = {"bf16": torch.bfloat16}  # fp16 would need its loss scaled


class Steps(Options):
    """How an optimizer step is taken."""

    accumulate: Positive = Field(
        default=1,
        description="batches whose gradients are averaged for a step; each batch counts alike, whatever its size",
    )
    clip: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    autocast: Annotated[str, OneOf(AUTOCAST)] | None = Field(
        default=None, description="precision in which the model runs while it trains"
    )
    dropout: bool = Field(
        default=True, description="false: dropout is off, as is best where a teacher without it is copied"
    )
    batch_norm: bool = Field(
        default=True, description="false: BatchNorms keep their statistics, as is best for few or small batches"
    )


class FitOptions(Options):
    """How long and at which rates a model is trained. See `rarefy.fit_`."""

    epochs: Positive = Field(default=1, description="passes over the training data")
    lr_schedule: Annotated[str, OneOf(LR_SCHEDULES)] = Field(
        default="constant", description="how the learning rate changes"
    )
    patience: Positive | None = Field(
        default=None, description="stop after so many epochs without a better one; needs validate"
    )


@renamed_parameters(work="resume_dir", teach="distill")
def fit_(
    model: nn.Module,
    data: Batches,
    *,
    epochs: int = 1,
    optimizer: MakeOptimizer | torch.optim.Optimizer | None = None,
    lr_schedule: str = "constant",
    loss: Loss | None = None,
    prune: SparsityConfig | None = None,
    calibrate: Iterable[Any] | None = None,
    distill: DistillLoss | None = None,
    at: Mapping[float, Event] | None = None,
    steps: Steps | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    maximize: bool = True,
    patience: int | None = None,
    seed: int | None = None,
    resume_dir: str | Path | None = None,
    also: Any = None,
    log: str | Path | Sequence[str] | None = None,
    progress: bool = False,
) -> Report:
    """Train a model in place. Masks hold whatever the optimizer does, and quantized weights stay on their grid.

    Args:
        model: the model to train.
        data: batches, or a function of the epoch that returns them.
        epochs: passes over the data.
        optimizer: a torch optimizer, or a function of the parameters that makes one; by default AdamW at 1e-4.
        lr_schedule: constant, linear, cosine or one-cycle.
        loss: a function of (output, batch), or a criterion such as nn.CrossEntropyLoss(), which is called with (logits,
            target). By default the loss of the output, or the cross entropy of (inputs, classes).
        prune: how zeros come in: Gradual, Movement, SecondOrder, Rigl, Alternate, Admm or Rewind.
        calibrate: batches that the scores of `prune` read.
        distill: a `rarefy.Distiller`, or any callable(output, batch, own loss), whose loss is used instead.
        at: {progress: function of the model}, called once when training has come that far (0 to 1), such as
            {0.5: lambda m: rarefy.quantize_(m, "int4")}: weights are trained on their grid from there on.
        steps: how an optimizer step is taken: `rarefy.train.fit.Steps`.
        validate: callable(model) -> number. The weights of the best epoch are restored at the end; only epochs compete
            after which no more zeros come in and nothing else happens (`at`).
        maximize: whether a larger number is better.
        patience: stop after so many of these epochs without a better one.
        seed: of shuffling and dropout.
        resume_dir: folder for the state of the run: after a kill, the same call on the same model continues from there,
            to the same bits. Remove it when the result is saved.
        also: plain data that must agree too for a run to continue, about `loss`, `distill` and `at`.
        log: a file for JSON lines, "tensorboard:FOLDER", "wandb:PROJECT", "mlflow:EXPERIMENT", or several.
        progress: show progress bars.

    Returns:
        A `Report` with one row for each epoch: loss, sparsity, metric, seconds.

    Raises:
        RarefyError: for options, a model or data that do not fit, before training.
        ModelError: when the loss is not finite (epoch and step named); the best weights so far are then restored.

    Example:
        >>> from rarefy.train.sparsity_config import Gradual
        >>> net = nn.Linear(2, 2)
        >>> data = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))]
        >>> fit_(net, data, epochs=2, prune=Gradual(sparsity=0.5, steps=2)).rows[-1]["sparsity"]
        0.5
    """
    options = FitOptions(epochs=epochs, lr_schedule=lr_schedule, patience=patience)
    if steps is not None and not isinstance(steps, Steps):
        raise RecipeError(f"steps: expected a rarefy.train.fit.Steps, got {steps!r}")
    return run_fit(
        model, data, options, steps, optimizer=optimizer, loss=loss, prune=prune, calibrate=calibrate,
        distill=distill, at=at, validate=validate, maximize=maximize, seed=seed, resume_dir=resume_dir, also=also,
        log=log, progress=progress,
    )  # fmt: skip


def run_fit(
    model: nn.Module,
    data: Batches,
    options: FitOptions,
    steps: Steps | None = None,
    *,
    optimizer: MakeOptimizer | torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    prune: SparsityConfig | None = None,
    calibrate: Iterable[Any] | None = None,
    distill: DistillLoss | None = None,
    at: Mapping[float, Event] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    maximize: bool = True,
    seed: int | None = None,
    resume_dir: str | Path | None = None,
    also: Any = None,
    log: str | Path | Sequence[str] | None = None,
    progress: bool = False,
) -> Report:
    """Train a model by checked options. See `fit_`."""
    _check_arguments(model, data, options, distill, at, validate)
    resume_dir = parse_path(resume_dir)
    if isinstance(distill, Distiller) and not distill.prepared and not hasattr(data, "__next__"):
        distill.prepare(on_device(model, _first(data)))
    zeros_before = {
        l.full_name: z for l in all_layers(model) if get_mask(l) is None and (z := zero_fraction(l)) > MIN_ZEROS_ON_GRID
    }
    reattach_grids_(model)
    moves = _optimizer(model, optimizer or optimizer_of("adamw", 1e-4), distill)
    key: dict[str, Any] = {}
    if resume_dir is not None:
        # the names are those of states that were saved before
        settings = {**options.model_dump(include=set(FitOptions.model_fields)), "prune": prune, "steps": steps}
        settings |= {"seed": seed, "maximize": maximize, "at": sorted(at or {}), "also": also, "teach": distill}
        key = _key(model, data, moves, settings)
    modes = [(m, m.training) for m in model.modules()]
    forked = torch.random.fork_rng(devices=[], enabled=seed is not None)
    with forked, torch.enable_grad(), Loggers.open(log) as logs:
        if seed is not None:
            torch.manual_seed(seed)
        events = {"calibrate": calibrate, "loss": loss, "seed": seed or 0, "at": at}
        sparsifier = Sparsifier(model, prune, optimizer=moves, **events)
        run = _Run(model, moves, options, resolve_loss(loss), sparsifier, steps or Steps())
        run.distill, run.logs, run.progress = distill, logs, progress
        run.validate, run.best = validate, BestEpoch(model, maximize)
        try:
            if resume_dir is not None:
                run.resume_state = resume.open_state(resume_dir, key)
            run.resume()
            run.all_epochs(data)
        except ModelError:
            run.best.restore()
            raise
        finally:
            for module, mode in modes:
                module.training = mode
            sparsifier.remove_probes()
            run.restore_rates()
            run.resume_state.close()
    forget_receipt(model)
    summary = {"epochs": len(run.rows), **run.best.restore()}
    return Report("trained", tuple(run.rows), summary, (*run.early_note(), *_filled_zeros(model, zeros_before)))


def _filled_zeros(model: nn.Module, zeros_before: Mapping[str, float]) -> tuple[str, ...]:
    """Return a note where zeros that no mask holds were trained away."""
    lost = [l.full_name for l in all_layers(model) if zero_fraction(l) < zeros_before.get(l.full_name, 0.0) - 0.01]
    if not lost:
        return ()
    return (f"zeros without a mask were filled in {', '.join(lost)}: rarefy.adopt_(model) before keeps them",)


def _check_arguments(model: nn.Module, data: Any, options: FitOptions, distill: Any, at: Any, validate: Any) -> None:
    """Raise for what would only be found wrong in the middle of training."""
    check_is_module(model)
    fixed = next((n for n, m in model.named_modules() if isinstance(m, Sparse)), None)
    if fixed is not None:
        raise ModelError(f"{fixed} runs on kernels, which have no gradients: train before accelerate_")
    if options.patience is not None and validate is None:
        raise RecipeError("patience needs a validation metric: give validate, a function of the model")
    if not callable(data):
        check_batches(data)
    for when, event in (at or {}).items():
        if not callable(event):
            raise RecipeError(f"at[{when!r}]: expected a function of the model, such as a lambda, got {event!r}")
    plain = isinstance(distill, nn.Module) and not isinstance(distill, Distiller)
    if distill is not None and (plain or not callable(distill)):
        what = "distill: expected a rarefy.Distiller(model, teacher) or a callable(output, batch, own loss)"
        raise RecipeError(f"{what}, got {type(distill).__name__}")
    wrong = next((n for n, p in model.named_parameters() if not p.is_meta and not torch.isfinite(p).all()), None)
    if wrong is not None:
        raise ModelError(f"{wrong}: NaN or inf in its weights, before training")


def _first(data: Any) -> Any:
    """Return the first batch, as if nobody had looked."""
    before = checkpoint.random_state()
    batches: Any = data(0) if callable(data) else data
    first = next(iter(batches), None)
    checkpoint.set_random_state(before)
    if first is None:
        raise DataError("the training data is empty in epoch 1 (an iterator gives its batches only once)")
    return first


def _key(model: nn.Module, data: Any, moves: torch.optim.Optimizer, options: dict[str, Any]) -> dict[str, Any]:
    """By what a run is known again: what it was called with, the model, and data (of a function of the epoch: its first
    batch)."""
    plain = {n: v.model_dump() if isinstance(v, Options) else v for n, v in options.items()}
    distill = options["teach"]  # its name in states of earlier versions
    plain["teach"] = distill.config.model_dump() if isinstance(distill, Distiller) else distill is not None
    rates = [{k: v for k, v in g.items() if isinstance(v, int | float | str)} for g in moves.param_groups]
    plain["optimizer"] = [type(moves).__name__, rates]
    known = data
    if not isinstance(data, list | tuple):
        known = [] if hasattr(data, "__next__") else [_first(data)]
    return resume.run_key(model, known, **plain)


def _number(metric: Any) -> float:
    if not isinstance(metric, Real) and not (isinstance(metric, torch.Tensor) and metric.numel() == 1):
        raise RecipeError(f"validate must return a number, got {type(metric).__name__}")
    return float(metric)


class _Run:
    """One training run: its fixed settings and its current progress."""

    distill: DistillLoss | None
    logs: Loggers
    validate: Callable[[nn.Module], float] | None
    best: BestEpoch
    progress: bool

    def __init__(
        self,
        model: nn.Module,
        moves: torch.optim.Optimizer,
        options: FitOptions,
        loss: Loss,
        sparsifier: Sparsifier,
        steps: Steps,
    ):
        self.model, self.moves, self.options, self.loss = model, moves, options, loss
        self.sparsifier, self.steps, self.epochs = sparsifier, steps, options.epochs
        self.factor = LR_SCHEDULES[options.lr_schedule]
        self.resume_state = resume.ResumeState(None)
        self.rates = [g["lr"] for g in moves.param_groups]
        self.run: nn.Module = model
        if distributed.world_size() > 1:
            self.run = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        of_model = {id(p) for p in model.parameters()}
        # parameters of the teacher's loss
        self.others = [p for g in moves.param_groups for p in g["params"] if id(p) not in of_model]
        self.epoch, self.step, self.total, self.seen = 0, 0, 0.0, 0
        self.rows: list[dict[str, Any]] = []
        self.random: dict[str, Any] = {}  # at the epoch's start
        self.clock = checkpoint.Clock()
        self.resumed: dict[str, Any] = {}

    def all_epochs(self, data: Batches) -> None:
        """Train until the last epoch, or until no better one has come for too long."""
        patience = self.options.patience
        while self.epoch < self.epochs and not (patience and self.best.waited >= patience):
            started = time.perf_counter()
            row: dict[str, Any] = {"epoch": self.epoch + 1, "loss": self.one(data)}
            if self.sparsifier.config is not None:
                row["sparsity"] = self.sparsifier.sparsity
            if self.validate:
                self.model.eval()
                row["metric"] = _number(self.validate(self.model))
                if self.sparsifier.finished:
                    self.best.offer(row["metric"], self.epoch)
            row["seconds"] = time.perf_counter() - started
            self.rows.append(row)
            self.logs.write(row)
            if self.epoch == self.epochs or self.clock.due():
                self.keep()

    def early_note(self) -> tuple[str, ...]:
        """Return a note where training stopped early."""
        done = len(self.rows)
        if done == self.epochs:
            return ()
        return (f"stopped after {done} of {self.epochs} epochs: {self.options.patience} without a better one",)

    def one(self, data: Batches) -> float:
        """Train one epoch, or what is left of it, and return its mean loss."""
        self.model.train()
        for module in self.model.modules():  # however a model drops: all but BatchNorm
            learns = self.steps.batch_norm if isinstance(module, BATCH_NORM) else self.steps.dropout
            module.training = module.training and learns
        self.moves.zero_grad()
        self.random = checkpoint.random_state() if not self.resumed else self.random
        batches = data(self.epoch) if callable(data) else data
        try:
            count = len(cast(Sized, batches))
        except TypeError:
            batches = list(batches)  # a schedule needs to know how far it is
            count = len(batches)
        name = f"epoch {self.epoch + 1}/{self.epochs}"
        with closing(track(batches, name, self.progress, count)) as bar:
            self._through(enumerate(bar), count)
        if not self.seen:
            raise DataError(
                f"the training data is empty in epoch {self.epoch + 1} (an iterator gives its batches only once)"
            )
        mean = distributed.all_reduce_number(self.total) / distributed.all_reduce_number(self.seen)
        self.epoch, self.step, self.total, self.seen = self.epoch + 1, 0, 0.0, 0
        return mean

    def _through(self, batches: Iterator[tuple[int, Any]], count: int) -> None:
        """Learn from the batches of an epoch, or from those that are left of it."""
        if self.resumed:
            for _ in islice(batches, self.step):  # skip the batches that are done, in the same order
                pass
            checkpoint.set_random_state(self.resumed)
            self.resumed = {}
        else:
            self._advance(self.epoch / self.epochs, started=True)
        accumulate = self.steps.accumulate
        for index, batch in batches:
            last = index + 1 == count
            self._learn(batch, index, min(accumulate, count - index // accumulate * accumulate))
            self.step = index + 1
            if (index + 1) % accumulate == 0 or last:
                self._move()
                self._advance((self.epoch + (index + 1) / count) / self.epochs)
                if not last and self.clock.due():
                    self.keep()

    def _learn(self, batch: Any, index: int, num_accumulated: int) -> None:
        """Add the gradient of one of `num_accumulated` batches."""
        batch, share = distributed.local_samples(on_device(self.model, batch))
        with self._precision():
            out = call(self.run, batch)
            value = self.loss(out, batch) if self.distill is None else self._distill_loss(out, batch)
        loss = float(value.detach())
        if distributed.all_reduce_number(float(not math.isfinite(loss))):
            hint = f"; the state before is in {self.resume_state.folder}" if self.resume_state.folder else ""
            raise ModelError(
                f"the loss is {loss} in epoch {self.epoch + 1}, step {index + 1}: lower the learning rate{hint}"
            )
        (value if num_accumulated == 1 and share == 1 else value * (share / num_accumulated)).backward()
        count = count_tokens(batch)
        self.total, self.seen = self.total + loss * count, self.seen + count

    def _distill_loss(self, out: Any, batch: Any) -> torch.Tensor:
        assert self.distill is not None
        alone = getattr(self.distill, "task", 1.0) == 0  # the teacher's loss alone, which takes no labels
        return self.distill(out, batch, None if alone else self.loss(out, batch))

    def _precision(self) -> AbstractContextManager[Any]:
        if self.steps.autocast is None:
            return nullcontext()
        kind = next(self.model.parameters()).device.type
        # cast weights are not cached: masks and grids recompute them
        return torch.autocast(kind, AUTOCAST[self.steps.autocast], cache_enabled=False)

    def _move(self) -> None:
        for p in self.others if distributed.world_size() > 1 else ():
            p.grad = None if p.grad is None else all_reduce_mean(p.grad)
        if self.steps.clip is not None:
            nn.utils.clip_grad_norm_([p for g in self.moves.param_groups for p in g["params"]], self.steps.clip)
        self.moves.step()

    def _advance(self, part: float, started: bool = False) -> None:
        if not started:
            self.sparsifier.step(part)
            self.moves.zero_grad()
        new = self.moves.param_groups[len(self.rates) :]  # what came to be trained on the way
        self.rates += [self.rates[0]] * len(new)
        for group, rate in zip(self.moves.param_groups, self.rates):
            group["lr"] = rate * self.factor(self.sparsifier.lr_progress)

    def keep(self) -> None:
        """Put the state on disk, where there is a folder for it."""
        if self.resume_state.folder is None:
            return
        state = checkpoint.State()
        state.numbers["run"] = {k: getattr(self, k) for k in ("epoch", "step", "total", "seen", "rows")}
        state.add("model", self.model.state_dict())
        state.add("optimizer", checkpoint.optimizer_state(self.moves))
        state.add("sparsifier", self.sparsifier.state_dict())
        state.add("best", self.best.to_dict())
        state.add("random", checkpoint.random_state())
        state.add("start", self.random)
        if isinstance(self.distill, nn.Module):
            state.add("teach", self.distill.state_dict())
        checkpoint.save(self.resume_state, state)

    def resume(self) -> None:
        """Go on from the state on disk, if there is one."""
        state = checkpoint.load(self.resume_state)
        if state is None:
            return
        for key, value in state.numbers["run"].items():
            setattr(self, key, value)
        self.sparsifier.load_state_dict(state.get("sparsifier"))  # first: it makes the structure that the state is of
        checkpoint.restore_model(self.model, state.get("model"))
        if isinstance(self.distill, nn.Module):
            checkpoint.restore_model(self.distill, state.get("teach"))
        checkpoint.restore_optimizer(self.moves, state.get("optimizer"))
        self.best.load(state.get("best"))
        self.random, self.resumed = state.get("start"), state.get("random")
        if self.step:
            checkpoint.set_random_state(self.random)
        else:
            checkpoint.set_random_state(self.resumed)
            self.resumed = {}

    def restore_rates(self) -> None:
        for group, rate in zip(self.moves.param_groups, self.rates):
            group["lr"] = rate


def _optimizer(model: nn.Module, optimizer: Any, distill: Any) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise RecipeError(
                "optimizer: expected a torch optimizer or a function that creates one, such as "
                f"lambda parameters: torch.optim.SGD(parameters, lr=0.1); got {optimizer!r}"
            )
        projectors = list(distill.parameters()) if isinstance(distill, nn.Module) else []
        return cast(MakeOptimizer, optimizer)([*_trainable(model), *projectors])
    known = {id(p) for p in model.parameters()}
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    if not held & known:
        raise ModelError("the optimizer holds none of the model's parameters: make it from model.parameters()")
    if isinstance(distill, Distiller):
        distill.join(optimizer)
    return optimizer


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no trainable parameters")
    return parameters
