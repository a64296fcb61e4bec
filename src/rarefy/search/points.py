"""The points of a search: models that are made, deployed and measured, within its time."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rarefy.common.errors import RarefyError
from rarefy.common.progress import say
from rarefy.model.batches import count_samples
from rarefy.model.forward import without_targets
from rarefy.model.masks import fold_
from rarefy.pipeline.compress import run_stages
from rarefy.pipeline.run_data import RunContext, RunData
from rarefy.recipe.schema import Recipe
from rarefy.search.deploy import (
    PLAIN,
    Deployed,
    Variant,
    deploy,
    has_static_scales,
    runs_in,
    sizes_of,
    timed_names,
    times_of,
)
from rarefy.search.frontier import Point
from rarefy.search.joint_loss import JointLoss
from rarefy.search.journal import Journal
from rarefy.search.line_search import at_speed_of
from rarefy.search.report_text import compile_options
from rarefy.search.space import CUTS, Amounts, Part
from rarefy.search.stages import stages_of
from rarefy.search.targets import check_dense
from rarefy.search.task import Task

RESERVED = 0.03  # of the time, for saving the result
TO_GO_ON = 0.15  # of the time, for a search with a smaller limit where the best model loses more on new data
MAX_POINTS = 200


class OutOfTime(Exception):
    """Raised where another measurement does not fit into the time."""


@dataclass(frozen=True)
class Observed:
    """A choice that was measured: its amounts, the sum of its parts' losses and savings, the point, and the dense model
    in its precision."""

    amounts: Amounts
    loss: float
    savings: Mapping[str, float]
    point: Point
    base: Point


POINTS = ("point ", "trained ")  # how keys of points begin: of the search, and of training after it


class Measured:
    """The points of a search: what was measured so far, and the best model of them."""

    def __init__(self, task: Task, journal: Journal):
        """Begin to count the time.

        Args:
            task: what is searched.
            journal: keeps what was measured, and has the clock.
        """
        self.task, self.journal = task, journal
        self.began = journal.clock() - journal.seconds
        self.seconds = task.seconds  # until when measurements begin
        self.kept_back = 0.0 if task.check is None else TO_GO_ON * task.seconds  # seconds that come after the search
        self.names = timed_names(task.dense, task.batches, task.targets.objective)
        self.points: list[Point] = []
        self.dense_fast: Deployed | None = None
        self.reference: Point | None = None
        self.bases: dict[Variant, Point] = {}  # the dense model in each precision
        self.dense_in: tuple[Any, Deployed] | None = None  # the precision of the last models, and the dense one in it
        self.joint: JointLoss | None = None
        self.joint_keys: set[tuple[str, str]] | None = None  # of the parts that it knows
        self.measures_joint = False  # whether losses of several parts together are measured
        self.observed: list[Observed] = []
        self.skipped = False  # whether a step did not fit into the time
        self.trouble = ""  # why the search or training ended early
        self.best_models: tuple[int, nn.Module, Deployed] | None = None  # the best point, its model, as it is deployed
        self.trained: dict[str, tuple[nn.Module, Deployed]] = {}  # models that were trained, by their digest

    # ---- time --------------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Return the seconds since the start, with those of earlier processes."""
        return self.journal.clock() - self.began

    def left(self) -> float:
        """Return the seconds that are left for measurements."""
        index, _ = self.task.targets.best(self.points)
        in_memory = self.journal.processes == 1 and self.best_models is not None and self.best_models[0] == index
        make_again = 0.0 if index is None or in_memory else self.points[index].seconds
        if index is not None and self.journal.processes > 1 and trains(self.points[index].recipe):
            make_again = 0.0  # the first process has it
        return self.seconds * (1 - RESERVED) - self.kept_back - self.elapsed() - make_again

    def fits(self, *kinds: str, more: float = 0.0, until: float = math.inf) -> bool:
        """Return whether a step fits into the time.

        Args:
            kinds: kinds of steps, the nearest first: the last one of them says what the step takes.
            more: seconds that it takes in addition.
            until: when it has to have ended, in seconds since the start.
        """
        seconds = (self.journal.seconds_of(*kinds) or 0.0) + more
        fitting = seconds <= self.left()
        self.skipped = self.skipped or not (fitting or self.journal.collecting)
        return fitting and seconds <= until - self.elapsed()

    def _need_time(self, key: str, kind: str, methods: Iterable[str]) -> None:
        """Raise OutOfTime where a point that is not in the journal would take too long.

        The first one of a kind takes as long as the last other point, and as scoring the units of its groups or
        changing its layers one by one; the first one after the dense model twice as long as that, which was timed
        alone.
        """
        if key in self.journal.values or self.reference is None:
            return
        more = 0.0
        if self.journal.seconds_of(kind) is None:
            measured = tuple(f"{'errors' if m in CUTS else 'loss'} of {m}" for m in methods)
            more = sum(seconds for k, seconds in self.journal.costs.items() if k.startswith(measured))
            more += self.reference.seconds if len(self.points) == 1 else 0.0
        if not self.fits(kind, "point", more=more):
            raise OutOfTime

    # ---- points ------------------------------------------------------------------------------------------------

    def measure_dense(self) -> Point:
        """Measure the dense model, compiled in fp32."""
        task = self.task
        self.dense_fast = deploy(task.dense, task.example, None, task.data)
        dense = self.point("dense, fp32", PLAIN, self.stages({}, (), PLAIN))
        if dense.quality is not None:
            self.task = replace(task, targets=check_dense(task.targets, task.metric.name, dense.quality))
        self.reference = self.bases[PLAIN] = self.add(dense)
        return self.reference

    def prefetch(self, requests: Iterable[Callable[[], Any]]) -> None:
        """Measure what calls will need side by side, where several processes search; what they add is taken back."""
        self.journal.prefetch(partial(self._without_effect, request) for request in requests)

    def _without_effect(self, request: Callable[[], Any]) -> None:
        before = self.points, self.observed, self.bases
        self.points, self.observed, self.bases = [*self.points], [*self.observed], {**self.bases}
        try:
            request()
        finally:
            self.points, self.observed, self.bases = before

    def point(
        self,
        name: str,
        variant: Variant,
        stages: list[Any],
        predicted: Mapping[str, Any] | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
        methods: Iterable[str] = (),
        sums: Mapping[str, Any] | None = None,
    ) -> Point:
        """Return a point, from the journal or measured. `methods` are those of its parts, `sums` what is predicted of
        these: the journal keeps them for a search that goes on another way."""
        recipe = self._recipe(name, variant, stages)
        kind = f"{POINTS[trains(recipe)]}{'+'.join(map(_work_of, stages))} {variant.precision}:"
        key = f"{kind} {digest_of(recipe, variant)}"
        if not trains(recipe):  # training is planned to fit
            self._need_time(key, kind, methods)
        measured = self.journal.get(
            key,
            lambda: {**self._measured(name, recipe, variant), "predicted": sums or {}, "layers": [*map(dict, rows)]},
            keep=lambda values: not values["error"],
        )
        more = {"predicted": predicted or {}, "layers": tuple(rows), "calibrated": self._is_calibrated(variant)}
        more |= _own_precisions(variant)
        return Point(**{**measured, "recipe": recipe, **more})

    def _measured(self, name: str, recipe: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
        """Make a model and measure it."""
        began, precision = self.journal.clock(), variant.precision
        if self.task.progress:
            say([f"{self.elapsed() / 60:5.1f} min  {name}"])
        try:
            model = self.make(recipe)
            deployed = self._deploy(model, variant)
            with torch.no_grad():
                quality = self.task.metric.measure(deployed)
            times = self.times(deployed, variant)
            sizes = sizes_of(deployed)
        except RarefyError as error:
            seconds = self.journal.clock() - began
            return asdict(Point(name, None, None, {}, {}, 0, 0, recipe, precision, seconds=seconds, error=str(error)))
        loss = 0.0 if self.reference is None else self._loss(quality)
        seconds = self.journal.clock() - began
        sized = Point(name, quality, loss, {}, {}, sizes["disk"], sizes["memory"], recipe, precision)
        point = with_times(replace(sized, seconds=seconds, **_own_precisions(variant)), times)
        self._keep(point, model, deployed)
        return asdict(point)

    def _loss(self, quality: float) -> float:
        """Return how much worse a quality is than the dense model's."""
        assert self.reference is not None and self.reference.quality is not None
        return self.task.targets.loss(self.reference.quality, quality, self.task.metric.higher_is_better)

    def times(self, deployed: Deployed, runs: Variant | Point) -> dict[str, dict[str, dict[str, float]]]:
        """Return the times of a model and of the dense one in fp32, {batch: {"model", "dense": quartiles}}.

        In turns with a model in 8 bits the dense one in 8 bits is called: what else the machine does slows both alike.
        How much faster it is than in fp32 was measured before.
        """
        assert self.dense_fast is not None
        if self.reference is None:
            return {n: {**t, "dense": t["model"]} for n, t in self._times_of({"model": deployed}).items()}
        dense, faster = self._dense_in(runs)
        times = self._times_of({"model": deployed, "dense": dense})
        scaled = {n: {q: ms * faster[n] for q, ms in t["dense"].items()} for n, t in times.items()}
        return {n: {"model": t["model"], "dense": scaled[n]} for n, t in times.items()}

    def _times_of(self, models: Mapping[str, Deployed]) -> dict[str, dict[str, dict[str, float]]]:
        return times_of(models, self.task.example, self.names)

    def _dense_in(self, runs: Variant | Point) -> tuple[Deployed, Mapping[str, float]]:
        """Return the dense model in a precision, or in fp32 where it was not measured in it, and its speed-up."""
        assert self.dense_fast is not None
        own = isinstance(runs, Point) and runs in self.bases.values()
        for variant, point in {} if own else self.bases.items():
            if point is not self.reference and point.loss is not None and runs_in(variant) == runs_in(runs):
                if self.dense_in is None or self.dense_in[0] != runs_in(runs):
                    self.dense_in = runs_in(runs), self._deploy(self.make(point.recipe), variant)
                return self.dense_in[1], point.speedup
        return self.dense_fast, dict.fromkeys(self.names, 1.0)

    def _keep(self, point: Point, model: nn.Module, deployed: Deployed) -> None:
        """Keep the model itself while it is the best one; of several processes, only where it was trained."""
        if self.journal.processes > 1 and not trains(point.recipe):
            return
        if trains(point.recipe):  # training again would take long
            self.trained[digest_of(point.recipe, point)] = model, deployed
        index, _ = self.task.targets.best([*self.points, point])
        if index is not None and index == len(self.points):
            self.best_models = (index, model, deployed)

    def models_of(self, index: int) -> tuple[nn.Module, Deployed]:
        """Return the model of a point and how it is deployed; one that is not kept any more is made again."""
        if self.best_models is not None and self.best_models[0] == index:
            return self.best_models[1:]
        point = self.points[index]
        if (models := self.trained.get(digest_of(point.recipe, point))) is not None:
            return models
        model = self.make(point.recipe)
        return model, self._deploy(model, point)

    def _deploy(self, model: nn.Module, runs: Variant | Point) -> Deployed:
        """Return a model as it is deployed in a precision."""
        return deploy(
            model, self.task.example, runs.precision, self.task.data, runs.ignore, dict(runs.per_layer),
            cache_precision=runs.cache_precision,
        )  # fmt: skip

    def add_earlier_points(self) -> None:
        """Add what a search with less time has measured, and this one has not reached again."""
        for key, value in self.journal.values.items():
            if key.startswith(POINTS) and not value["error"]:
                more: dict[str, Any] = {
                    "ignore": tuple(value["ignore"]),
                    "layers": tuple(value["layers"]),
                    "predicted": {},
                    "calibrated": has_static_scales(self.task.dense, value["precision"], self.task.data),
                }
                point, choice = self.add(Point(**{**value, **more})), value["predicted"]
                bases = [base for variant, base in self.bases.items() if runs_in(variant) == runs_in(point)]
                if choice and bases and not any(same_model(o.point, point) for o in self.observed):
                    self.observed.append(Observed({}, choice["loss"], choice["savings"], point, bases[0]))

    def add(self, point: Point) -> Point:
        """Add a point to those that were tried, unless the same model is among them."""
        for other in self.points:
            if same_model(other, point):
                return other
        names = {p.name for p in self.points}
        free = (f"{point.name} ({n})" for n in range(2, MAX_POINTS + 3))
        self.points.append(
            point if point.name not in names else replace(point, name=next(n for n in free if n not in names))
        )
        return self.points[-1]

    def make(self, recipe: Mapping[str, Any]) -> nn.Module:
        """Return the dense model after the stages of a recipe."""
        parsed = Recipe(**recipe)
        model = copy.deepcopy(self.task.dense)
        training = trains(recipe)
        folder = self.journal.folder_of(f"training {digest_of(recipe)}") if training else None
        context = RunContext(RunData(parsed, self.data_of(recipe)), progress=self.task.progress and training)
        run_stages(model, parsed, context, folder)
        fold_(model)
        return model.eval()

    def data_of(self, recipe: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return the batches that a recipe reads, as `compress_` takes them; without data, cuts run the example."""
        task = self.task
        data = {"calibrate": list(task.data)} if task.data else {"evaluate": [without_targets(task.example)]}
        return data | ({"train": self.training_data()} if trains(recipe) else {})

    def _recipe(self, name: str, variant: Variant, stages: list[Any]) -> dict[str, Any]:
        about = f"Found by rarefy optimize; compile with {compile_options(variant, self._is_calibrated(variant))}."
        data: dict[str, Any] = {}
        if (options := self.task.data_options) is not None:
            trained = any("train" in stage for stage in stages)
            samples = sum(map(count_samples, self.training_data())) if trained else None
            changes = {"train_samples": samples} if trained else {"train": None, "train_samples": None}
            data = {"data": options.model_copy(update=changes).model_dump(mode="json", exclude_none=True)}
        return {"name": name, "about": about, "stages": stages, **data, "seed": self.task.seed}

    def _is_calibrated(self, variant: Variant) -> bool:
        return has_static_scales(self.task.dense, variant.precision, self.task.data)

    def training_data(self) -> list[Any]:
        """Return the batches that models are trained on: as many as the time allows to read once."""
        assert self.task.recovery is not None
        return list(self.task.recovery.data[: self.journal.values["training batches"]])

    def stages(self, amounts: Amounts, parts: Sequence[Part], variant: Variant) -> list[dict[str, Any]]:
        """Return the stages of a choice."""
        return stages_of(amounts, parts, variant, self.unit_scores(), bool(self.task.data))

    def unit_scores(self) -> dict[str, str]:
        """Return the score of units by method, of those methods that have one."""
        return {m: self.journal.values[f"score of {m}"] for m in CUTS if f"score of {m}" in self.journal.values}


def _own_precisions(variant: Variant) -> dict[str, Any]:
    """Return the fields of a point about what does not run in its precision."""
    own = {"ignore": variant.ignore, "per_layer": dict(variant.per_layer)}
    return {**own, "cache_precision": variant.cache_precision}


def with_times(point: Point, times: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Point:
    """Return a point with times of its model and of the dense one in turns, {batch: {"model", "dense": quartiles}}.

    What was predicted is brought to the speed that the machine had then.
    """
    milliseconds = {n: t["model"] for n, t in times.items()}
    speedup = {n: t["dense"]["median"] / t["model"]["median"] for n, t in times.items()}
    timed = replace(point, milliseconds=milliseconds, speedup=speedup)
    expected = point.predicted.get("milliseconds")
    if not expected:
        return timed
    return replace(timed, predicted={**point.predicted, "milliseconds": at_speed_of(timed, point, expected)})


def same_model(a: Point, b: Point) -> bool:
    """Return whether two points, which may have other names, are of the same model."""
    return (a.recipe["stages"], runs_in(a)) == (b.recipe["stages"], runs_in(b))


def trains(recipe: Mapping[str, Any]) -> bool:
    """Return whether a recipe trains the model."""
    return any("train" in stage for stage in recipe["stages"])


def digest_of(recipe: Mapping[str, Any], runs: Variant | Point | None = None) -> str:
    """Return a name for what a recipe does, whatever its own name."""
    same = json.dumps([recipe["stages"], recipe["seed"], *(() if runs is None else runs_in(runs))], sort_keys=True)
    return short_hash(same)


def short_hash(text: str) -> str:
    """Return 16 hexadecimal digits that tell a text from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _work_of(stage: Mapping[str, Any]) -> str:
    """Return what tells how long a stage takes: its name, and its solver.

    >>> _work_of({"quantize": {"weights": "int6", "solver": {"name": "obs"}}}), _work_of({"cast": {"dtype": "fp32"}})
    ('quantize by obs', 'cast')
    """
    (name, options), *_ = stage.items()
    solver = options.get("solver")
    return name if solver is None else f"{name} by {solver if isinstance(solver, str) else solver['name']}"
