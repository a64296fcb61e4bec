"""The search itself: measure the precisions, predict, measure the most promising models, correct, and climb.

Predictions order the models along a line: from the dense one, each next model saves more time for the least predicted
loss (`solve.front`). True losses rise along it, so the model that a limit allows is found by bisection with
interpolation. The first line is uniform; then measured losses of the parts, and other balances between methods, are
tried at the same speed, as long as that helps.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from rarefy.common.errors import RarefyError
from rarefy.common.progress import say
from rarefy.model.batches import count_samples
from rarefy.model.masks import fold_
from rarefy.pipeline.compress import run_stages
from rarefy.pipeline.run_data import RunContext, RunData
from rarefy.recipe.schema import Recipe, TrainStage
from rarefy.search import solve
from rarefy.search.deploy import Deployed, Variant, deploy, sizes_of, timed_names, times_of, variants_of
from rarefy.search.describe import describe, rows_of
from rarefy.search.frontier import Point
from rarefy.search.journal import Journal
from rarefy.search.line_search import correction, first_choice, next_choice, predicted_sums
from rarefy.search.parts import PartMeasurer
from rarefy.search.recovery import (
    REMAINS,
    SHARES,
    Recovery,
    candidate,
    fitting,
    seconds_a_batch,
    train_stage,
    with_training,
)
from rarefy.search.solve import Choice
from rarefy.search.space import BLOCK, CUTS, Amounts, Part
from rarefy.search.stages import stages_of
from rarefy.search.targets import check_dense, mean_speedup
from rarefy.search.task import Task

BALANCES = ((0.4, 2.5), (0.7, 1.4))  # factors on the losses of one method against those of the others
UNIFORM = (1.0, 0.5, 0.0)  # how far the losses of parts are taken as equal, see `solve.shrunk`
RESERVED = 0.03  # of the time, for saving the result
MAX_POINTS = 200


class OutOfTime(Exception):
    """Raised where another measurement does not fit into the time."""


class Search:
    """One search: what it has measured so far, and the best model of it."""

    def __init__(self, task: Task, journal: Journal):
        """Begin to count the time.

        Args:
            task: what is searched.
            journal: keeps what was measured, and has the clock.
        """
        self.task, self.journal = task, journal
        self.began = journal.clock() - journal.seconds
        self.seconds = task.seconds  # until when measurements begin
        self.names = timed_names(task.dense, task.batches)
        self.points: list[Point] = []
        self.dense_fast: Deployed | None = None
        self.reference: Point | None = None
        self.bases: dict[Variant, Point] = {}  # the dense model in each precision
        self.observed: list[tuple[float, dict[str, float], Point]] = []  # sums of predictions, and what was measured
        self.skipped = False  # whether a step did not fit into the time
        self.trouble = ""  # why training ended early
        self.best_models: tuple[int, nn.Module, Deployed] | None = None  # the best point, its model, as it is deployed

    # ---- time --------------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Return the seconds since the start, with those of earlier processes."""
        return self.journal.clock() - self.began

    def left(self) -> float:
        """Return the seconds that are left for measurements."""
        index, _ = self.task.targets.best(self.points)
        in_memory = self.best_models is not None and self.best_models[0] == index
        make_again = 0.0 if index is None or in_memory else self.points[index].seconds
        return self.seconds * (1 - RESERVED) - self.elapsed() - make_again

    def fits(self, *kinds: str, more: float = 0.0, until: float = math.inf) -> bool:
        """Return whether a step fits into the time.

        Args:
            kinds: kinds of steps, the nearest first: the last one of them says what the step takes.
            more: seconds that it takes in addition.
            until: when it has to have ended, in seconds since the start.
        """
        seconds = (self.journal.seconds_of(*kinds) or 0.0) + more
        fitting = seconds <= self.left()
        self.skipped = self.skipped or not fitting
        return fitting and seconds <= until - self.elapsed()

    def _need_time(self, key: str, kind: str, methods: Iterable[str]) -> None:
        """Raise OutOfTime where a point that is not in the journal would take too long.

        The first one of a kind takes as long as the last other point, and as measuring its parts; the first one after
        the dense model twice as long as that, which was timed alone.
        """
        if key in self.journal.values or self.reference is None:
            return
        more = 0.0
        if self.journal.seconds_of(kind) is None:
            measured = tuple(f"{step} of {m}" for m in methods for step in ("errors", "loss"))
            more = sum(seconds for k, seconds in self.journal.costs.items() if k.startswith(measured))
            more += self.reference.seconds if len(self.points) == 1 else 0.0
        if not self.fits(kind, "point", more=more):
            raise OutOfTime

    # ---- points ------------------------------------------------------------------------------------------------

    def measure_dense(self) -> Point:
        """Measure the dense model, compiled in fp32."""
        task = self.task
        self.dense_fast = deploy(task.dense, task.example, None, task.data)
        plain = variants_of(task.dense, False)[0]
        dense = self._point("dense, fp32", None, self._stages({}, (), plain))
        if dense.quality is not None:
            self.task = replace(task, targets=check_dense(task.targets, task.metric.name, dense.quality))
        self.reference = self.bases[plain] = self.add(dense)
        return self.reference

    def _point(
        self,
        name: str,
        precision: str | None,
        stages: list[Any],
        predicted: Mapping[str, Any] | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
        methods: Iterable[str] = (),
    ) -> Point:
        """Return a point, from the journal or measured. `methods` are those of its parts."""
        recipe = self._recipe(name, precision, stages)
        kind = f"point {'+'.join(next(iter(stage)) for stage in stages)} {precision}:"
        key = f"{kind} {_digest(recipe, precision)}"
        self._need_time(key, kind, methods)
        if self.task.progress and key not in self.journal.values:
            say([f"{self.elapsed() / 60:5.1f} min  {name}"])
        measured = self.journal.get(
            key, lambda: self._measured(name, recipe, precision), keep=lambda values: not values["error"]
        )
        return Point(**{**measured, "recipe": recipe, "predicted": predicted or {}, "layers": tuple(rows)})

    def _measured(self, name: str, recipe: Mapping[str, Any], precision: str | None) -> dict[str, Any]:
        """Make a model and measure it."""
        began = self.journal.clock()
        try:
            model = self.make(recipe)
            deployed = deploy(model, self.task.example, precision, self.task.data)
            with torch.no_grad():
                quality = self.task.metric.measure(deployed)
            times = self._times(deployed)
            sizes = sizes_of(deployed)
        except RarefyError as error:
            seconds = self.journal.clock() - began
            return asdict(Point(name, None, None, {}, {}, 0, 0, recipe, precision, seconds=seconds, error=str(error)))
        loss = 0.0 if self.reference is None else self._loss(quality)
        point = Point(
            name, quality, loss, {n: t["model"] for n, t in times.items()},
            {n: t["dense"]["median"] / t["model"]["median"] for n, t in times.items()},
            sizes["disk"], sizes["memory"], recipe, precision, seconds=self.journal.clock() - began,
        )  # fmt: skip
        self._keep(point, model, deployed)
        return asdict(point)

    def _loss(self, quality: float) -> float:
        """Return how much worse a quality is than the dense model's."""
        assert self.reference is not None and self.reference.quality is not None
        return self.task.targets.loss(self.reference.quality, quality, self.task.metric.higher_is_better)

    def _times(self, deployed: Deployed) -> dict[str, dict[str, dict[str, float]]]:
        """Return the times of a model and of the dense one, in turns."""
        assert self.dense_fast is not None
        models = {"model": deployed} | ({} if self.reference is None else {"dense": self.dense_fast})
        times = times_of(models, self.task.example, self.names)
        return {n: {"dense": t["model"], **t} for n, t in times.items()}

    def _keep(self, point: Point, model: nn.Module, deployed: Deployed) -> None:
        """Keep the model itself while it is the best one."""
        index, _ = self.task.targets.best([*self.points, point])
        if index is not None and index == len(self.points):
            self.best_models = (index, model, deployed)

    def models_of(self, index: int) -> tuple[nn.Module, Deployed]:
        """Return the model of a point and how it is deployed; one that is not kept any more is made again."""
        if self.best_models is not None and self.best_models[0] == index:
            return self.best_models[1:]
        point = self.points[index]
        model = self.make(point.recipe)
        return model, deploy(model, self.task.example, point.precision, self.task.data)

    def add(self, point: Point) -> Point:
        """Add a point to those that were tried, unless the same model is among them."""
        for other in self.points:
            if (other.recipe["stages"], other.precision) == (point.recipe["stages"], point.precision):
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
        trains = any(isinstance(s, TrainStage) for s in parsed.stages)
        folder = self.journal.folder_of(f"training {_digest(recipe, None)}") if trains else None
        context = RunContext(RunData(parsed, self.data_of(recipe)), progress=self.task.progress and trains)
        run_stages(model, parsed, context, folder)
        fold_(model)
        return model.eval()

    def data_of(self, recipe: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return the batches that a recipe reads, as `compress_` takes them."""
        data = {"calibrate": list(self.task.data)} if self.task.data else {}
        trains = any("train" in stage for stage in recipe["stages"])
        return data | ({"train": self._training_data()} if trains else {})

    def _recipe(self, name: str, precision: str | None, stages: list[Any]) -> dict[str, Any]:
        about = f"Found by rarefy optimize; compile with precision={precision!r}."
        data: dict[str, Any] = {}
        if (options := self.task.data_options) is not None:
            trained = any("train" in stage for stage in stages)
            samples = sum(map(count_samples, self._training_data())) if trained else None
            changes = {"train_samples": samples} if trained else {"train": None, "train_samples": None}
            data = {"data": options.model_copy(update=changes).model_dump(mode="json", exclude_none=True)}
        return {"name": name, "about": about, "stages": stages, **data, "seed": self.task.seed}

    def _training_data(self) -> list[Any]:
        """Return the batches that models are trained on: as many as the time allows to read once."""
        assert self.task.recovery is not None
        return list(self.task.recovery.data[: self.journal.values["training batches"]])

    def _stages(self, amounts: Amounts, parts: Sequence[Part], variant: Variant) -> list[dict[str, Any]]:
        """Return the stages of a choice."""
        scores = {m: self.journal.values[f"score of {m}"] for m in CUTS if f"score of {m}" in self.journal.values}
        return stages_of(amounts, parts, variant, scores, bool(self.task.data))

    # ---- the search --------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Search until nothing is left to try or the time is over; return why it ended."""
        try:
            variant = self._variants()
            parts = self._parts(variant.precision)
            if parts:
                self._search(variant, parts)
        except OutOfTime:
            pass
        ended = "time" if self.skipped else "done"
        if self.task.recovery is not None:
            try:
                self._recover(self.task.recovery)
            except OutOfTime:
                pass
            except RarefyError as error:
                self.trouble = str(error)
        return ended

    def _variants(self) -> Variant:
        """Measure the dense model in every precision; return the one to search in: the fastest within the limit."""
        for variant in variants_of(self.task.dense, bool(self.task.data))[1:]:
            stages = self._stages({}, (), variant)
            self.bases[variant] = self.add(self._point(f"dense, {variant.name}", variant.precision, stages))
        measured = {v: p for v, p in self.bases.items() if p.loss is not None}
        limit = self.task.targets.max_loss
        within = {v: p for v, p in measured.items() if limit is None or p.loss <= limit} or measured  # type: ignore[operator]
        return max(within, key=lambda v: mean_speedup(within[v].speedup))

    def _parts(self, precision: str | None) -> list[Part]:
        """Return the parts of the model; their losses may take a third of the time that is left."""
        task, until = self.task, self.elapsed() + self.left() / 3

        def fits(*kinds: str) -> bool:
            return self.fits(*kinds, until=until if kinds[0].startswith(("loss", "errors")) else math.inf)

        begun = any(key.startswith(("score of", "time of")) for key in self.journal.values)
        if not begun and not fits("point"):
            return []
        measurer = PartMeasurer(
            task.dense, task.example, task.data, precision, self.names, self.journal, task.layers, task.ignore, fits,
            task.progress,
        )  # fmt: skip
        return measurer.measure()

    def _search(self, variant: Variant, parts: list[Part]) -> None:
        """Find the choice at the limit for one balance after the other: between parts, then between methods."""
        every, parts = parts, [p for p in parts if p.method != BLOCK]
        best, weight = self._along(variant, parts, solve.front(solve.shrunk(parts, UNIFORM[0]))), UNIFORM[0]
        for other_weight in UNIFORM[1:]:
            other = self._along(variant, parts, solve.front(solve.shrunk(parts, other_weight)), start=best)
            if other is not None and (best is None or self._better(other, best)):
                best, weight = other, other_weight
        if len(every) > len(parts):  # a cheap block would hide smaller changes inside it
            other = self._along(variant, every, solve.front(solve.shrunk(every, weight)), start=best)
            if other is not None and (best is None or self._better(other, best)):
                best, parts = other, every
        balanced, scales = solve.shrunk(parts, weight), dict[str, float]()
        methods = sorted({p.method for p in parts})
        for factors in BALANCES if len(methods) > 1 else ():
            improved = True
            while improved:
                improved = False
                for method, factor in product(methods, factors):
                    trial = {**scales, method: scales.get(method, 1.0) * factor}
                    other = self._along(variant, parts, solve.front(balanced, trial), start=best)
                    if other is not None and (best is None or self._better(other, best)):
                        best, scales, improved = other, trial, True

    def _recover(self, recovery: Recovery) -> None:
        """Train the models that are expected to be the best ones after it, one after the other."""
        began = self.journal.get("training began", self.elapsed)
        self.seconds = (began + recovery.seconds) / (1 - RESERVED)
        bases: dict[str | None, Point] = {}
        for variant, base in self.bases.items():
            if base.loss is not None:
                bases.setdefault(variant.precision, base)
        remains = REMAINS
        for share in SHARES:
            index = candidate(self.points, bases, self.task.targets, remains)
            if index is None:
                return
            point = self.points[index]
            train = self._training_of(point, recovery, share * (began + recovery.seconds - self.elapsed()))
            if train is None:
                return
            stages = with_training(point.recipe["stages"], train)
            trained = self.add(self._point(f"{point.name}, trained", point.precision, stages, rows=point.layers))
            lost = bases[point.precision].loss
            if trained.loss is not None and point.loss is not None and lost is not None and point.loss > lost:
                remains = min(max((trained.loss - lost) / (point.loss - lost), 0.1), 0.9)

    def _training_of(self, point: Point, recovery: Recovery, seconds: float) -> dict[str, Any] | None:
        """Return the stage that trains a point for about so many seconds, with those of making and measuring it; None
        where they are not enough to read the data once."""
        task = self.task

        def epochs() -> int:
            began = self.journal.clock()
            if seconds < 2 * point.seconds:  # it is made and measured
                return 0
            student, stage = self.make(point.recipe), train_stage(task.dense, task.example, task.metric.name, 1)
            each = seconds_a_batch(student, task.dense, stage, recovery.data, task.seed)
            left = seconds - (self.journal.clock() - began) - point.seconds
            known = self.journal.values.get("training batches")
            batches, count = fitting(left, each, known or len(recovery.data))
            if known is None and batches:
                self.journal.get("training batches", lambda: batches)
            return count if known in (None, batches) else 0

        key = f"epochs of {_digest(point.recipe, point.precision)}"
        count = self.journal.get(key, epochs, keep=lambda epochs: epochs > 0)
        return train_stage(task.dense, task.example, task.metric.name, count) if count else None

    def _better(self, a: Point, b: Point) -> bool:
        index, _ = self.task.targets.best([b, a])
        return index == 1

    def _along(
        self, variant: Variant, parts: list[Part], choices: list[Choice], start: Point | None = None
    ) -> Point | None:
        """Find the best choice along one line of predictions; with `start`, only if its neighbourhood is better.

        The line goes from the dense model to the fastest. What has to be kept on the way is kept before some choice
        (the loss) or after some choice (time, bytes).
        """
        base = self.bases[variant]
        seen: dict[int, Point] = {0: base}
        low, high = 0, len(choices)  # the last one known to keep the loss, the first one known not to
        index = first_choice(choices, base, start, self.task.targets)
        best: Point | None = None
        while index not in seen and len(self.points) < MAX_POINTS:
            point = self.add(self._choice(variant, parts, choices[index]))
            seen[index] = point
            if point.loss is None:
                choices = choices[:index]
                high = min(high, index)
            elif self._goes_on(point):
                low = max(low, index)
            else:
                high = min(high, index)
            if point.loss is not None and (best is None or self._better(point, best)):
                best = point
            if start is not None and len(seen) == 2 and not self._promises(point, start):
                return best
            index = next_choice(choices, seen, low, high, self.task.targets)
        return best

    def _promises(self, point: Point, start: Point) -> bool:
        """Return whether a point is better than the best one, or loses less at about its speed."""
        less = point.loss is not None and start.loss is not None and point.loss < start.loss
        return less or self._better(point, start)

    def _goes_on(self, point: Point) -> bool:
        """Return whether a faster choice is wanted: the loss allows it, or time and bytes need it."""
        targets = self.task.targets
        used = targets.limits(point)
        loss_kept = used.pop("max_loss", 0.0) <= 1
        rest_kept = all(u <= 1 for u in used.values())
        return not rest_kept if targets.objective == "loss" else loss_kept

    def _choice(self, variant: Variant, parts: list[Part], choice: Choice) -> Point:
        """Measure one choice."""
        name = describe(choice, parts, variant)
        loss, savings = predicted_sums(choice, parts, self.names)
        predicted = self._predicted(self.bases[variant], loss, savings)
        rows = rows_of(choice, parts, variant, self.bases[variant])
        stages, methods = self._stages(choice.amounts, parts, variant), {method for method, _ in choice.amounts}
        point = self._point(name, variant.precision, stages, predicted, rows, methods)
        if point.loss is not None:
            self.observed.append((loss, savings, point))
        return point

    def _predicted(self, base: Point, loss: float, savings: Mapping[str, float]) -> dict[str, Any]:
        """Return the expected loss and milliseconds of a choice, corrected by the points measured before."""
        pairs = [
            (saved[n], 1 - base.speedup[n] / point.speedup[n]) for _, saved, point in self.observed for n in self.names
        ]
        factor = correction(pairs)
        milliseconds = {n: base.milliseconds[n]["median"] * (1 - factor * s) for n, s in savings.items()}
        known = sorted([(0.0, base.loss), *((e, point.loss) for e, _, point in self.observed)])
        expected = {"loss": solve.line(known, loss)} if self.observed else {}  # type: ignore[arg-type]
        return {"milliseconds": milliseconds, **expected}


def _digest(recipe: Mapping[str, Any], precision: str | None) -> str:
    """Return a name for what a recipe does, whatever its own name."""
    same = json.dumps([recipe["stages"], recipe["seed"], precision], sort_keys=True)
    return hashlib.sha256(same.encode()).hexdigest()[:16]
