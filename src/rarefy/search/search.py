"""The search itself: measure the precisions, predict, measure the most promising models, correct, and climb.

Predictions order the models along a line: from the dense one, each next model saves more time for the least predicted
loss (`solve.front`). True losses rise along it, so the model that a limit allows is found by bisection with
interpolation. The first line is uniform; the second one is that of the allocation with the least joint loss
(`allocation.climb`); then other balances between methods are tried at the same speed, as long as that helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from rarefy.common.errors import RarefyError
from rarefy.common.progress import say
from rarefy.compiler.executor import Compiled
from rarefy.model import hf
from rarefy.model.layers import ignored_modules
from rarefy.search import solve
from rarefy.search.allocation import calibrated, climb
from rarefy.search.deploy import PLAIN, Variant, deploy, runs_in, variant_of, variants_of
from rarefy.search.describe import describe, rows_of
from rarefy.search.eight_bits import eight_bit_parts, layers_in, layers_in_8_bits, more_exact, savings_of_layers
from rarefy.search.frontier import Point
from rarefy.search.joint_loss import JointLoss
from rarefy.search.line_search import NEAR, at_speed_of, correction, first_choice, next_choice, predicted_sums
from rarefy.search.parts import GAIN, PartMeasurer, few_batches, unless_refused
from rarefy.search.points import (
    MAX_POINTS,
    RESERVED,
    Measured,
    Observed,
    OutOfTime,
    digest_of,
    same_model,
    short_hash,
)
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
from rarefy.search.several_processes import PROCESSES, in_groups, next_choices
from rarefy.search.smoothing import smoothed
from rarefy.search.solve import Choice
from rarefy.search.space import BLOCK, CUTS, RANK, Amounts, Part
from rarefy.search.targets import mean_speedup, times_tokens

BALANCES = ((0.4, 2.5), (0.7, 1.4))  # factors on the losses of one method against those of the others
UNIFORM = (1.0, 0.5, 0.0)  # how far the losses of parts are taken as equal, see `solve.shrunk`


class Search(Measured):
    """One search: which models it measures."""

    def run(self) -> str:
        """Search until nothing is left to try or the time is over; return why it ended."""
        self._run_within_limits()
        self.kept_back = 0.0
        ended = "time" if self.skipped else "done"
        if self.task.recovery is not None:
            try:
                self._recover(self.task.recovery)
            except OutOfTime:
                pass
            except RarefyError as error:
                self.trouble = f"training ended early: {error}"
            self.seconds = max(self.seconds, self.task.seconds + self.task.recovery.seconds)
        return ended

    def run_again(self, factor: float) -> None:
        """Search with a limit of loss that is smaller by a factor, where there is time; what was measured is not
        measured again."""
        task, limit = self.task, (self.task.targets.max_loss or 0.0) / factor
        if limit <= 0 or not self.fits("point"):
            return
        if task.progress:
            say([f"{self.elapsed() / 60:5.1f} min  models that lose at most {task.targets.text(limit)} in the search"])
        try:
            self.task = replace(task, targets=replace(task.targets, max_loss=limit))
            self._run_within_limits()
        finally:
            self.task = task

    def _run_within_limits(self) -> None:
        self.observed = []
        try:
            variant = self._variants()
            parts = self._parts(variant)
            if parts:
                self._search(variant, parts)
        except OutOfTime:
            pass
        except RarefyError as error:  # what was measured before stays
            self.trouble = f"the search ended early: {error}"

    def _variants(self) -> Variant:
        """Measure the dense model in every precision; return the one to search in: the fastest within the limits of
        loss and bytes, the smallest where none is within that of bytes."""
        task = self.task
        variants = variants_of(task.dense, bool(task.data), task.targets.counts_bytes, self._stay_as_they_are())
        measures = {v: partial(self.point, f"dense, {v.name}", v, self.stages({}, (), v)) for v in variants}
        self.prefetch(measures.values())
        for variant, measure in measures.items():
            self.bases[variant] = self.add(measure())
        self._mix_precisions()
        within = self._within_limit() or {v: p for v, p in self.bases.items() if p.loss is not None}
        used = {v: max(1.0, task.targets.bytes_used(p)) for v, p in within.items()}
        smallest = min(used.values())
        within = {v: p for v, p in within.items() if used[v] == smallest}
        if task.targets.objective in ("size", "memory"):
            return min(within, key=lambda v: (task.targets.value(within[v]), -mean_speedup(within[v].speedup)))
        return max(within, key=lambda v: mean_speedup(within[v].speedup))

    def _stay_as_they_are(self) -> tuple[str, ...]:
        """Return the layers that may not change, for models that can keep single layers in fp32."""
        task = self.task
        return () if hf.is_causal_lm(task.dense) else ignored_modules(task.dense, task.ignore)

    def _within_limit(self) -> dict[Variant, Point]:
        """Return the dense model in the precisions from which a faster choice is wanted."""
        return {v: p for v, p in self.bases.items() if p.loss is not None and self._goes_on(p)}

    def _mix_precisions(self) -> None:
        """Measure the dense model with some layers in 16 bits or fp32 and the others in 8 bits, where 8 bits lose too
        much: in the fastest other precision that loses little enough."""
        variant = next((v for v in self.bases if v.precision == "int8" and not v.smooth), None)
        whole = None if variant is None else self.bases[variant]
        if variant is None or whole is None or whole.loss is None or times_tokens(self.names):
            return
        exact = more_exact(self._within_limit(), self.task.targets.counts_bytes)
        base = self.bases[exact]
        if self._goes_on(whole) or mean_speedup(whole.speedup) < (1 + 2 * NEAR) * mean_speedup(base.speedup):
            return
        parts, in_16_bits = self._eight_bit_parts(variant, exact)
        choices = solve.front(parts)

        def measure(choice: Choice) -> Point:
            mixed = variant.with_layers([p.name for p in parts if p.key not in choice.amounts], exact, in_16_bits)
            rows = rows_of(choice, parts, mixed, base)
            self.bases[mixed] = self.add(
                self.point(f"dense, {mixed.name}", mixed, self.stages({}, (), mixed), rows=rows)
            )
            return self.bases[mixed]

        if len(choices) > 2:
            self._bisect(base, choices, measure, last=whole)

    def _eight_bit_parts(self, variant: Variant, exact: Variant) -> tuple[list[Part], list[str]]:
        """Return what each layer saves and loses in 8 bits, beside a more exact precision, and the layers with a kernel
        in that, if it has 16 bits; the losses may take a quarter of the time that is left."""
        task, until = self.task, self._deadline("losses in 8 bits", 4)
        few = few_batches(task.dense, task.data, task.example)
        whole = {n: 1 - self.bases[exact].speedup[n] / s for n, s in self.bases[variant].speedup.items()}
        key = f"savings of layers in {variant.name}, of {exact.name}"
        if key not in self.journal.values and not self.fits(key, "point"):
            return [], []

        def measured() -> Any:
            before = self.dense_fast if exact == PLAIN else self._deploy(task.dense, exact)
            in_8_bits = deploy(task.dense, task.example, variant.precision, few, variant.ignore, solver="rtn")
            assert isinstance(before, Compiled) and isinstance(in_8_bits, Compiled)
            return {
                "layers": layers_in_8_bits(in_8_bits),
                "in 16 bits": [] if exact.precision is None else layers_in(before, exact.precision),
                "savings": savings_of_layers(before, in_8_bits, task.example, whole),
            }

        known = self.journal.get(key, partial(unless_refused, measured))
        if known is None:
            return [], []
        parts = eight_bit_parts(
            task.dense, known["layers"], few, known["savings"], self.journal,
            lambda kind: self.fits(kind, "loss of", until=until), task.progress,
        )  # fmt: skip
        return parts, known["in 16 bits"]

    def _parts(self, variant: Variant) -> list[Part]:
        """Return the parts of the model; their losses may take a third of the time that is left once it is known what
        they save, those of a method its share of that."""
        task, until, of_method = self.task, math.inf, math.inf
        if task.only_precisions:
            return []

        def begin(left: int) -> None:
            nonlocal until, of_method
            until = self._deadline("losses of parts", 3) if until == math.inf else until
            of_method = self.elapsed() + max(until - self.elapsed(), 0.0) / left

        def fits(*kinds: str) -> bool:
            ends = {"loss": of_method, "gain": of_method, "errors": until}.get(kinds[0].partition(" ")[0], math.inf)
            if ends == of_method and self.journal.seconds_of(kinds[0]) is None:
                ends = until  # nobody knows what the first loss of its kind takes
            return self.fits(*kinds, until=ends)

        begun = any(key.startswith(("score of", "time of")) for key in self.journal.values)
        if not begun and not fits("point"):
            return []
        measurer = PartMeasurer(
            task.dense, task.example, task.data, variant, self.names, self.journal, task.layers, task.ignore, fits,
            task.progress, begin,
        )  # fmt: skip
        parts = measurer.measure()
        lists = {p.name.rpartition(".")[0] for p in parts if p.method == BLOCK}
        own = (*variant.ignore, *dict(variant.per_layer))  # they keep their names
        if any(name.startswith(f"{blocks}.") for name in own for blocks in lists):
            parts = [p for p in parts if p.method != BLOCK]
        return [p for p in parts if p.method != RANK or p.name not in own]

    def _search(self, variant: Variant, parts: list[Part]) -> None:
        """Find the choice at the limit: along a uniform line, then along others, then with other balances."""
        every, parts = parts, [p for p in parts if p.method != BLOCK]
        line = solve.shrunk(parts, UNIFORM[0])
        choices = solve.front(line)
        first = choices[first_choice(choices, self.bases[variant], None, self.task.targets)]
        line = self._calibrated(parts, line, first.saving, self._deadline("first line", 4))
        best = self._along(variant, parts, solve.front(line))
        for other_line in self._other_lines(parts, best):
            other = self._along(variant, parts, solve.front(other_line), start=best)
            if other is not None and (best is None or self._better(other, best)):
                best, line = other, other_line
        if len(every) > len(parts):  # a cheap block would hide smaller changes inside it
            with_blocks = [*line, *(p for p in every if p.method == BLOCK)]
            other = self._along(variant, every, solve.front(with_blocks), start=best)
            if other is not None and (best is None or self._better(other, best)):
                best, parts, line = other, every, with_blocks
        scales: dict[str, float] = {}
        methods = sorted({p.method for p in parts})
        for factors in BALANCES if len(methods) > 1 else ():
            improved = True
            while improved:
                improved = False
                for group in in_groups([*product(methods, factors)], self._side_by_side()):
                    trials = [{**scales, m: scales.get(m, 1.0) * f} for m, f in group]
                    searches = [partial(self._along, variant, parts, solve.front(line, t), best, 1) for t in trials]
                    self.prefetch(searches)
                    for trial, search in zip(trials, searches):
                        other = search()
                        if other is not None and (best is None or self._better(other, best)):
                            best, scales, improved = other, trial, True

    def _other_lines(self, parts: list[Part], best: Point | None) -> list[list[Part]]:
        """Return the parts with losses that give less loss together at the best point's saving.

        They may take a quarter of the time that is left. Where no joint loss can be measured, the losses of the single
        parts are all there is.
        """
        lines = [solve.shrunk(parts, weight) for weight in UNIFORM]
        saving = (self._predicted_saving(best) if best is not None else None) or 0.0
        until = self._deadline("other lines", 4)
        if saving <= 0 or self._joint_loss(parts, {}, until) is None:
            return lines[1:]
        if self.task.progress:
            say([f"{self.elapsed() / 60:5.1f} min  allocations that save as much, by what they lose together"])
        self.measures_joint = True
        lines = [self._calibrated(parts, line, saving, until) for line in lines]
        climbed = climb(parts, lines, saving, *self._joint_losses(parts, until), self._side_by_side())
        return lines[1:] if climbed is None else [climbed]

    def _predicted_saving(self, point: Point) -> float | None:
        """Return the saving that was predicted of a measured choice, as lines have it; None for another point."""
        seen = [o.savings.values() for o in self.observed if same_model(o.point, point)]
        return sum(seen[-1]) / len(seen[-1]) if seen else None

    def _calibrated(self, parts: list[Part], line: list[Part], saving: float, until: float) -> list[Part]:
        """Return a line with the losses of methods that were measured alone at a saving, where there is time for it."""
        if len({p.method for p in parts}) < 2 or self._joint_loss(parts, {}, until) is None:
            return line
        return calibrated(line, saving, *self._joint_losses(parts, until))

    def _deadline(self, what: str, parts: int) -> float:
        """Return until when a step may take one of so many parts of the time that is left now, in seconds since the
        start. It is the same after a kill."""
        key = f"until when: {what}, of {self.task.seconds:g} s, limit {self.task.targets.max_loss}"
        return self.journal.get(key, lambda: self.elapsed() + self.left() / parts)

    def _joint_losses(
        self, parts: list[Part], until: float
    ) -> tuple[Callable[[Amounts], float | None], Callable[[Sequence[Amounts]], None]]:
        """Return what measures the joint loss of an allocation, and of several side by side."""
        joint_loss = partial(self._joint_loss, parts, until=until)
        return joint_loss, lambda allocations: self.prefetch(partial(joint_loss, amounts) for amounts in allocations)

    def _joint_loss(self, parts: Sequence[Part], amounts: Amounts, until: float = math.inf) -> float | None:
        """Return the distance of the outputs with all these parts changed; None without time, or where it fails."""
        if any(method == BLOCK for method, _ in amounts) or (amounts and self._joint_loss(parts, {}, until) is None):
            return None
        kind = "joint loss of cuts" if any(method in CUTS for method, _ in amounts) else "joint loss"
        key = f"{kind}: {short_hash(repr(sorted(amounts.items())))}"
        if key not in self.journal.values and not self.fits(f"{kind}:", "point", until=until):
            return None
        if kind == "joint loss of cuts" and not self._scored_units(parts, until):
            return None

        def measured() -> float | None:
            try:
                return self._joint(parts)(amounts)
            except RarefyError:
                return None

        return self.journal.get(key, measured)

    def _joint(self, parts: Sequence[Part]) -> JointLoss:
        keys = {p.key for p in parts if p.method != BLOCK}
        if self.joint is None or (self.joint_keys is not None and not keys <= self.joint_keys):
            self.joint_keys = keys
            task, gain = self.task, self.journal.values.get(GAIN) or 1.0
            self.joint = JointLoss(task.dense, task.example, parts, self.unit_scores(), task.data, gain)
        return self.joint

    def _scored_units(self, parts: Sequence[Part], until: float) -> bool:
        """Score the units of all groups, which takes far longer than the joint losses after it; return whether there
        is time and the model allows it."""

        def measured() -> bool:
            try:
                self._joint(parts).score_units()
                return True
            except RarefyError:
                return False

        seconds = sum(s for key, s in self.journal.costs.items() if key.startswith("score of"))
        key = "score of all units"
        if key not in self.journal.values and not self.fits("score of", "point", more=seconds, until=until):
            return False
        return self.journal.get(key, measured)

    def _recover(self, recovery: Recovery) -> None:
        """Train the models that are expected to be the best ones after it, one after the other."""
        began = self.journal.get(f"training began, after a search of {self.task.seconds:g} s", self.elapsed)
        self.seconds = (began + recovery.seconds) / (1 - RESERVED)
        bases = {runs_in(v): base for v, base in reversed(self.bases.items()) if base.loss is not None}
        remains = REMAINS
        for share in SHARES:
            index = candidate(self.points, bases, self.task.targets, remains)
            if index is None:
                return self._untrained(share, "no model that training could improve is expected to be the best")
            point = self.points[index]
            train = self._training_of(point, recovery, share * (began + recovery.seconds - self.elapsed()))
            if train is None:
                return self._untrained(share, "train_minutes is too short to make, train and measure a model")
            stages = with_training(point.recipe["stages"], train)
            trained = self.add(self.point(f"{point.name}, trained", variant_of(point), stages, rows=point.layers))
            lost = bases[runs_in(point)].loss
            if trained.loss is not None and point.loss is not None and lost is not None and point.loss > lost:
                remains = min(max((trained.loss - lost) / (point.loss - lost), 0.1), 0.9)

    def _untrained(self, share: float, why: str) -> None:
        """Say why the first model was not trained."""
        if share == SHARES[0]:
            self.trouble = self.trouble or f"nothing was trained: {why}"

    def _training_of(self, point: Point, recovery: Recovery, seconds: float) -> dict[str, Any] | None:
        """Return the stage that trains a point for about so many seconds, with those of making and measuring it; None
        where they are not enough to read the data once."""
        task = self.task

        def fitting_batches() -> tuple[int, int]:
            began = self.journal.clock()
            if seconds < 2 * point.seconds:  # it is made and measured
                return 0, 0
            student, stage = self.make(point.recipe), train_stage(task.dense, task.example, task.metric.name, 1)
            each = seconds_a_batch(student, task.dense, stage, recovery.data, task.seed)
            left = seconds - (self.journal.clock() - began) - point.seconds
            known = self.journal.values.get("training batches")
            batches, epochs = fitting(left, each, known or len(recovery.data))
            return batches, epochs if known in (None, batches) else 0

        key = f"epochs of {digest_of(point.recipe, point)}, of {task.seconds:g} s"
        batches, count = self.journal.get(key, fitting_batches, keep=lambda result: result[1] > 0)
        if batches:
            self.journal.get("training batches", lambda: batches)
        return train_stage(task.dense, task.example, task.metric.name, count) if count else None

    def _better(self, a: Point, b: Point) -> bool:
        index, _ = self.task.targets.best(smoothed([b, a], self.observed))
        return index == 1

    def _side_by_side(self) -> int:
        """Return how many candidates are measured at once: as many as there were processes when the search began."""
        return self.journal.values.get(PROCESSES, 1)

    def _along(
        self,
        variant: Variant,
        parts: list[Part],
        choices: list[Choice],
        start: Point | None = None,
        count: int | None = None,
    ) -> Point | None:
        """Find the best choice along one line of predictions; with `start`, only if its neighbourhood is better."""
        measure = lambda c: self.add(self._choice(variant, parts, c))  # noqa: E731
        return self._bisect(self.bases[variant], choices, measure, start, count=count)

    def _bisect(
        self,
        base: Point,
        choices: list[Choice],
        measure: Callable[[Choice], Point],
        start: Point | None = None,
        last: Point | None = None,
        count: int | None = None,
    ) -> Point | None:
        """Find the best choice along a line from the dense model to the fastest.

        What has to be kept on the way is kept before some choice (the loss) or after some choice (time, bytes).

        Args:
            base: the point of the first choice.
            choices: the line.
            measure: returns the point of a choice.
            start: the best point of another line: this one is left where its neighbourhood is not better.
            last: the point of the last choice, where that is known not to keep the loss.
            count: how many points are measured at once; by default as many as possible.
        """
        end = len(choices) - 1
        seen: dict[int, Point] = {0: base} if last is None else {0: base, end: last}
        low, high = 0, len(choices) if last is None else end  # the last known to keep the loss, the first known not to
        if last is None:
            saving = None if start is None else self._predicted_saving(start)
            index = first_choice(choices, base, saving, self.task.targets)
        else:
            index = next_choice(choices, seen, low, high, self.task.targets)
        best: Point | None = None
        while index not in seen and len(self.points) < MAX_POINTS:
            indices = next_choices(index, choices, seen, low, high, self.task.targets, count or self._side_by_side())
            self.prefetch([partial(measure, choices[i]) for i in indices])
            for index in indices:
                if index >= len(choices):  # a smaller one cannot be made
                    break
                point = seen[index] = measure(choices[index])
                if point.loss is None:
                    choices = choices[:index]
                    high = min(high, index)
                elif index < high and self._goes_on(point):
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
        predicted = self._predicted(self.bases[variant], parts, choice.amounts, loss, savings)
        rows = rows_of(choice, parts, variant, self.bases[variant])
        stages, methods = self.stages(choice.amounts, parts, variant), {method for method, _ in choice.amounts}
        point = self.point(name, variant, stages, predicted, rows, methods, {"loss": loss, "savings": savings})
        if point.loss is None:
            return point
        expected = predicted["milliseconds"]
        point = replace(
            point, predicted={**predicted, "milliseconds": at_speed_of(point, self.bases[variant], expected)}
        )
        self.observed.append(Observed(choice.amounts, loss, savings, point, self.bases[variant]))
        return point

    def _predicted(
        self, base: Point, parts: Sequence[Part], amounts: Amounts, loss: float, savings: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the expected loss and milliseconds of a choice, corrected by the points measured before."""
        milliseconds = {}
        for n, saving in savings.items():
            pairs = [(o.savings[n], 1 - base.speedup[n] / o.point.speedup[n]) for o in self.observed]
            milliseconds[n] = base.milliseconds[n]["median"] * (1 - correction(pairs, saving) * saving)
        if not self.observed:
            return {"milliseconds": milliseconds}
        losses = [(o.loss, o.point.loss - base.loss) for o in self.observed]  # type: ignore[operator]
        joint = self._joint_loss(parts, amounts) if self.measures_joint else None
        if joint is not None:  # it is better than the sum
            loss, losses = joint, [(self._joint_loss(parts, o.amounts), l) for o, (_, l) in zip(self.observed, losses)]  # type: ignore[misc]
        known = [(predicted, lost) for predicted, lost in losses if predicted is not None]
        return {"milliseconds": milliseconds, "loss": base.loss + correction(known, loss) * loss}  # type: ignore[operator]
