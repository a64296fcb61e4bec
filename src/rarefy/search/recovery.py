"""Recovery: a fast model that loses too much learns from the dense one, as one more stage of its recipe."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rarefy.evaluation.outputs import named_output
from rarefy.evaluation.profiling import native_bf16
from rarefy.model.block_lists import block_lists
from rarefy.model.forward import call, evaluating, without_targets
from rarefy.pipeline.run_data import RunContext, RunData
from rarefy.pipeline.stages import run_stage
from rarefy.recipe.schema import Recipe
from rarefy.search.deploy import runs_in
from rarefy.search.frontier import Point
from rarefy.search.targets import Targets

REMAINS = 0.35  # of a loss that is expected after training, until the first model was trained
SHARES = (0.6, 1.0)  # of the training time that is left, for the first model and the second
RATE = 3e-4  # AdamW's largest learning rate
TIMED = 4  # batches that a training step is timed on
LEAST = 0.2  # of the mean time of a batch with what comes before the first: noise hides smaller ones
OF_CLASSES = ("accuracy", "agreement", "perplexity", "kl")  # metrics that read probabilities
TRAINABLE = ("cut", "prune", "factorize")


@dataclass(frozen=True)
class Recovery:
    """Training that a search may do.

    Attributes:
        seconds: how long, in addition to the search.
        data: training batches.
    """

    seconds: float
    data: Sequence[Any]


def train_stage(model: nn.Module, example: Any, metric: str, epochs: int) -> dict[str, Any]:
    """Return the stage that trains on the dense model's outputs alone; no labels are read.

    Models that return hidden states learn those, their mean, and its similarities in a batch. Of others the
    probabilities of classes are learned where the metric reads classes, else the outputs themselves.
    """
    distill: dict[str, Any] = {"task": 0.0}
    with evaluating(model), torch.no_grad():
        output = call(model, without_targets(example))
    if named_output(output, "last_hidden_state") is not None and named_output(output, "logits") is None:
        distill |= {"logits": 0.0, "embedding": 5.0, "similarity": 10.0}
        if block_lists(model):
            distill["hidden"] = "squarehead"
    elif not metric.startswith(OF_CLASSES) or metric.endswith("()"):
        distill["by"] = "mse"
    train = {"epochs": epochs, "optimizer": {"lr": RATE}, "lr_schedule": "one-cycle", "clip": 1.0, "dropout": False}
    train["batch_norm"] = False  # statistics were learned from far more data
    fast = {"autocast": "bf16"} if native_bf16() else {}
    return {"train": {**train, **fast, "distill": distill}}


def with_training(stages: Sequence[Mapping[str, Any]], train: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the stages with training after the last one that changes weights, before they are quantized."""
    at = next((i for i, s in enumerate(stages) if "quantize" in s), len(stages))
    return [*stages[:at], train, *stages[at:]]


def can_train(point: Point) -> bool:
    """Return whether a point has lost something that training can win back, and was not trained."""
    names = {name for stage in point.recipe["stages"] for name in stage}
    return point.loss is not None and bool(names & set(TRAINABLE)) and "train" not in names


def candidate(points: Sequence[Point], bases: Mapping[Any, Point], targets: Targets, remains: float) -> int | None:
    """Return the number of the point that is expected to be the best one after training; None where none is.

    Args:
        points: all points.
        bases: the dense model by `runs_in`: what it loses stays.
        targets: the limits.
        remains: the part of the rest that stays.
    """
    expected = []
    for point in points:
        known = bases.get(runs_in(point))
        base = None if known is None else known.loss
        if can_train(point) and point.loss is not None and base is not None:
            point = replace(point, loss=base + remains * max(point.loss - base, 0.0))
        expected.append(point)
    index, _ = targets.best(expected)
    return index if index is not None and can_train(points[index]) else None


def seconds_a_batch(
    model: nn.Module, dense: nn.Module, stage: Mapping[str, Any], data: Sequence[Any], seed: int
) -> float:
    """Return the time of a training step, with its teacher's call, on the first batches; `model` stays as it is."""
    recipe = Recipe(stages=[dict(stage)], seed=seed)  # type: ignore[arg-type]
    one, several = list(data[:1]), list(data[: 1 + TIMED])
    times: dict[int, list[float]] = {}
    for batches in (one, several, one, several):  # the first run loads what the others find loaded
        context = RunContext(RunData(recipe, {"train": batches}), seed=seed, before=dense)
        student = copy.deepcopy(model)
        began = time.perf_counter()
        run_stage(student, recipe.stages[0], context)
        times.setdefault(len(batches), []).append(time.perf_counter() - began)
    whole, start = min(times[len(several)]), min(times[1])
    more = len(several) - 1
    return max((whole - start) / more, LEAST * whole / len(several)) if more else start


def fitting(seconds: float, each: float, batches: int) -> tuple[int, int]:
    """Return how many batches and epochs fit into a time; none where it is too short for one batch.

    >>> fitting(100, 1.0, 30), fitting(10, 1.0, 30), fitting(0.5, 1.0, 30)
    ((30, 3), (10, 1), (0, 0))
    """
    used = min(batches, max(0, int(seconds / each)))
    return used, int(seconds / (each * used)) if used else 0
