"""A plain fine-tuning loop: masks hold by themselves, amounts can rise on the way, the best epoch is kept."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from rarefy.errors import DataError, ModelError, PatternError, RecipeError, unknown
from rarefy.model.select import Layer, Selector, select
from rarefy.model.stats import Loss, call, check_batches, loss_of, on_device, tokens_in
from rarefy.progress import track
from rarefy.proof.report import Report
from rarefy.prune import stage
from rarefy.prune.pattern import Pattern, check_sparsity, parse
from rarefy.prune.score import SCORES
from rarefy.runtime.layers import Sparse
from rarefy.train.schedule import sparsities

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]  # batches, or a function of the epoch that gives them
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
# factor on the learning rate at progress t in 0..1
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "one-cycle": lambda t: 0.05 + 0.95 * t / 0.25 if t < 0.25 else (1 + math.cos(math.pi * (t - 0.25) / 0.75)) / 2,
}


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Prune in `steps` steps while training runs from `start` to `end` of its way; scores are computed anew each time.

    `regrow` lets a masked weight come back where its score has become better than a kept one's.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    score: str = "magnitude"
    schedule: str = "cubic"
    steps: int = 10
    first: float = 0.0
    start: float = 0.0
    end: float = 0.7
    scope: str | None = None
    reduce: str | None = None
    layers: Selector = None
    ignore: Selector = None
    regrow: bool = False
    seed: int = 0


def optimizer_of(name: str, lr: float, **options: Any) -> MakeOptimizer:
    """Return a maker of the named optimizer; RecipeError for a name or an option it does not have.

    >>> optimizer_of("sgd", 0.1, momentum=0.9)([nn.Parameter(torch.zeros(1))]).defaults["momentum"]
    0.9
    """
    if name not in OPTIMIZERS:
        raise RecipeError(unknown("optimizer", name, OPTIMIZERS))
    try:
        OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], lr=lr, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer {name!r} cannot be made with lr={lr}, {options}: {error}") from None
    return lambda parameters: OPTIMIZERS[name](parameters, lr=lr, **options)


def fit_(
    model: nn.Module,
    data: Batches,
    *,
    epochs: int = 1,
    optimizer: MakeOptimizer | torch.optim.Optimizer | None = None,
    lr_schedule: str = "constant",
    loss: Loss | None = None,
    prune: Gradual | None = None,
    calibrate: Iterable[Any] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    maximize: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Report:
    """Train `model` in place and return a row an epoch: loss, sparsity, metric, seconds.

    Masks hold whatever the optimizer does. With `validate` the weights of the best epoch are restored at the end; only
    epochs whose sparsity is final compete. `prune` raises the sparsity on the way; `calibrate` are the batches its
    score reads. Raises DataError on empty data, ModelError when the loss is not finite (epoch and step named).

    >>> net = nn.Linear(2, 2)
    >>> r = fit_(net, [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))], epochs=2, prune=Gradual(sparsity=0.5, steps=2))
    >>> r.rows[-1]["sparsity"]
    0.5
    """
    if lr_schedule not in LR_SCHEDULES:
        raise RecipeError(unknown("lr schedule", lr_schedule, LR_SCHEDULES))
    fixed = next((n for n, m in model.named_modules() if isinstance(m, Sparse)), None)
    if fixed is not None:
        raise ModelError(f"{fixed} runs on kernels, which do not learn: train before accelerate_")
    if not isinstance(epochs, int) or epochs < 1:
        raise RecipeError(f"epochs is a whole number, at least 1, got {epochs!r}")
    if prune is not None and not isinstance(prune, Gradual):
        raise RecipeError(f"prune is a rarefy.Gradual, such as Gradual(sparsity=0.9), got {prune!r}")
    if not callable(data):
        check_batches(data)
    pruner = _Pruner.of(model, prune, calibrate, loss) if prune else None
    if optimizer is None:
        optimizer = optimizer_of("adamw", 1e-4)
    moves = _optimizer(model, optimizer)
    run = _Run(model, moves, LR_SCHEDULES[lr_schedule], loss_of(loss), pruner, epochs, progress)
    best = _Best(model, maximize)
    rows: list[dict[str, Any]] = []
    modes = [(m, m.training) for m in model.modules()]
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            for epoch in range(epochs):
                began = time.perf_counter()
                row: dict[str, Any] = {"epoch": epoch + 1, "loss": run.epoch(epoch, data)}
                if pruner:
                    row["sparsity"] = pruner.sparsity
                if validate:
                    model.eval()
                    row["metric"] = float(validate(model))
                    if pruner is None or pruner.done:
                        best.offer(row["metric"], epoch + 1)
                row["seconds"] = time.perf_counter() - began
                rows.append(row)
        finally:
            for module, mode in modes:
                module.training = mode
            run.restore_rates()
    model.__dict__.pop("rarefy_receipt", None)  # what it measured is no longer so
    return Report("trained", tuple(rows), {"epochs": epochs, **best.restore()})


class _Run:
    """One training run: what stays the same from epoch to epoch."""

    def __init__(
        self,
        model: nn.Module,
        moves: torch.optim.Optimizer,
        factor: Callable[[float], float],
        loss: Loss,
        pruner: _Pruner | None,
        epochs: int,
        progress: bool,
    ):
        self.model, self.moves, self.factor, self.loss = model, moves, factor, loss
        self.pruner, self.epochs, self.progress = pruner, epochs, progress
        self.rates = [g["lr"] for g in moves.param_groups]

    def epoch(self, epoch: int, data: Batches) -> float:
        """Train one epoch and return its mean loss."""
        self.model.train()
        batches = data(epoch) if callable(data) else data
        if not isinstance(batches, Sized) and (self.pruner or self.factor is not LR_SCHEDULES["constant"]):
            batches = list(batches)  # a schedule needs to know how far it is
        steps = len(batches) if isinstance(batches, Sized) else None
        total, seen = 0.0, 0
        for step, batch in enumerate(track(batches, f"epoch {epoch + 1}/{self.epochs}", self.progress, steps)):
            self._advance((epoch + (step / steps if steps else 0.0)) / self.epochs)
            batch = on_device(self.model, batch)
            value = self.loss(call(self.model, batch), batch)
            loss = float(value.detach())
            if not math.isfinite(loss):
                raise ModelError(f"the loss is {loss} in epoch {epoch + 1}, step {step + 1}: lower the learning rate")
            self.moves.zero_grad()
            value.backward()
            self.moves.step()
            count = tokens_in(batch)
            total, seen = total + loss * count, seen + count
        if not seen:
            raise DataError(
                f"the training data is empty in epoch {epoch + 1} (an iterator gives its batches only once)"
            )
        self._advance((epoch + 1) / self.epochs)
        return total / seen

    def _advance(self, part: float) -> None:
        if self.pruner:
            self.pruner.at(part)
        for group, rate in zip(self.moves.param_groups, self.rates):
            group["lr"] = rate * self.factor(part)

    def restore_rates(self) -> None:
        for group, rate in zip(self.moves.param_groups, self.rates):
            group["lr"] = rate


class _Best:
    """The weights of the best epoch so far."""

    def __init__(self, model: nn.Module, maximize: bool):
        self.model, self.sign = model, 1 if maximize else -1
        self.metric: float | None = None
        self.epoch, self.state = 0, {}

    def offer(self, metric: float, epoch: int) -> None:
        if not math.isfinite(metric):
            raise ModelError(f"the validation metric is {metric} in epoch {epoch}")
        if self.metric is None or self.sign * metric > self.sign * self.metric:
            self.metric, self.epoch = metric, epoch
            self.state = copy.deepcopy(self.model.state_dict())

    def restore(self) -> dict[str, Any]:
        if self.metric is None:
            return {}
        self.model.load_state_dict(self.state)
        return {"best_metric": self.metric, "best_epoch": self.epoch}


class _Pruner:
    """Where a gradual pruning stands."""

    def __init__(self, model: nn.Module, plan: Gradual, chosen: Sequence[Layer], pattern: Pattern, scope: str):
        self.model, self.plan, self.chosen, self.pattern, self.scope = model, plan, chosen, pattern, scope
        self.left: list[tuple[float, float]] = []  # (training progress, sparsity) still to come
        self.sparsity = 0.0
        self.calibrate: Iterable[Any] | None = None
        self.loss: Loss | None = None

    @classmethod
    def of(cls, model: nn.Module, plan: Gradual, calibrate: Iterable[Any] | None, loss: Loss | None) -> _Pruner:
        pattern = parse(plan.pattern)
        if plan.score not in SCORES:
            raise PatternError(unknown("score", plan.score, SCORES))
        scope = plan.scope or stage.default_scope(pattern, plan.score)
        last, scope = check_sparsity(pattern, plan.sparsity, scope)
        if not 0 <= plan.start <= plan.end <= 1:
            raise PatternError(f"pruning starts and ends within training, 0..1, got {plan.start} to {plan.end}")
        chosen = select(model, plan.layers, plan.ignore)
        stage.refuse_impossible(chosen, pattern)
        way = sparsities(plan.schedule, last, plan.steps, plan.first)
        if plan.regrow and "gradient" in SCORES[plan.score].needs:
            raise PatternError(f"score {plan.score!r} sees no gradient beneath a mask: regrow would have no effect")
        if SCORES[plan.score].needs and calibrate is None:
            raise DataError(f"score {plan.score!r} reads statistics: give calibrate=batches")
        self = cls(model, plan, chosen, pattern, scope)
        gap = (plan.end - plan.start) / max(1, plan.steps - 1)
        self.left = [(plan.start + i * gap, s) for i, s in enumerate(way)]
        self.calibrate = list(calibrate) if isinstance(calibrate, Iterator) else calibrate
        self.loss = loss
        return self

    @property
    def done(self) -> bool:
        return not self.left

    def at(self, progress: float) -> None:
        """Prune as far as the schedule is at this progress."""
        due = [s for t, s in self.left if t <= progress + 1e-9]
        if not due:
            return
        self.left = self.left[len(due) :]
        stage.check_weights(self.chosen)
        stats = stage.calibrate(self.model, self.chosen, self.plan.score, self.calibrate, self.loss, self.plan.seed)
        found = stage.choose_masks(
            self.chosen, stats, self.pattern, self.plan.score, due[-1], self.scope, self.plan.reduce, self.plan.regrow
        )
        for layer, mask in zip(self.chosen, found):
            stage.set_mask_(layer, mask)
        self.sparsity = due[-1]


def _optimizer(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise RecipeError(
                "optimizer is a torch optimizer or a function that makes one, such as "
                f"lambda parameters: torch.optim.SGD(parameters, lr=0.1); got {optimizer!r}"
            )
        return cast(MakeOptimizer, optimizer)(_trainable(model))
    known = {id(p) for p in model.parameters()}
    if not any(id(p) in known for g in optimizer.param_groups for p in g["params"]):
        raise ModelError("the optimizer holds none of the model's parameters: make it from model.parameters()")
    return optimizer


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ModelError(f"{type(model).__name__} has no trainable parameters")
    return found
