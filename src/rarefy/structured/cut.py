"""`cut_`: whole units leave the model, which stays an ordinary dense one, only smaller."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.common.progress import track
from rarefy.common.renamed import renamed_parameters
from rarefy.common.report import Report, group_similar_rows
from rarefy.dependency.graph import Graph, Group, trace, unsupported_notes
from rarefy.dependency.symbolic_dims import Axis, leaves
from rarefy.evaluation.profiling import compare
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Selector, unwrap
from rarefy.model.losses import Loss
from rarefy.model.mha import PrunableMultiheadAttention
from rarefy.structured import budget
from rarefy.structured.compensation import batch_norms, compensate_, layers_losing_inputs, recalibrate_batch_norms
from rarefy.structured.consumers import collect_moments
from rarefy.structured.group_selection import History, select_groups
from rarefy.structured.hf_config import merge_sizes, update_config
from rarefy.structured.importance import UNIT_SCORES, unit_scores
from rarefy.structured.layer_drop import run_drop_layers
from rarefy.structured.optimizer_state import check_optimizer, replace_parameters
from rarefy.structured.options import CutOptions, DropLayersOptions, check_data, check_unmasked
from rarefy.structured.surgery import (
    ForwardFailed,
    OutputMismatch,
    Removal,
    give_own_heads,
    remove_units,
    value_restorer,
)

NOT_ASKED = "not asked for"
UNEVEN = "a chunk takes as many of it as of something that stays"
TRIALS = 8  # cuts that are timed to find one of a latency
TIMINGS = 15


@renamed_parameters(least="min_keep")
def cut_(
    model: nn.Module,
    example: Any,
    units: str | Sequence[str] = ("channel", "neuron", "head"),
    keep: float | None = None,
    *,
    parameters: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    score: str | None = None,
    reduce: str = "sum",
    scope: str = "layer",
    min_keep: float = 0.0,
    layers: Selector = None,
    ignore: Selector = None,
    round_to: int = 1,
    steps: int = 1,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    repair: bool | Sequence[str] = True,
    optimizer: torch.optim.Optimizer | None = None,
    mask_only: bool = False,
    dry_run: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Remove the units of a model that matter least, in place, and every slice of a parameter that belongs to them.

    The model stays an ordinary dense one of its class, only smaller. Its outputs are those of the model whose units are
    zero where they are made (`mask_only`): they are compared, and everything is restored if they differ. An exception
    is what counts the units, such as a LayerNorm; the note of the group says so. `nn.MultiheadAttention` becomes a
    subclass with heads of its own where it has to. Groups whose sizes are fixed in the code of a class stay, and the
    report names them. Costs O(weights) and four calls besides the score, more for groups that a class keeps.

    Args:
        model: any module whose operators have rules (`rarefy.dependency`); others lock the channels they touch.
        example: what the model can be called with: one call shows which slices belong together.
        units: kinds of units: "channel" or "group" of a convolution, "neuron" of a Linear layer (also the width of a
            transformer), "head" (with the queries that share its keys), "head_dim", "query_head" (queries that share
            keys); or "layer" alone: whole blocks, see `drop_layers_`.
        keep: fraction of units that stays in each group; 0.5 where no budget is given.
        parameters: instead of keep: fraction of the model's parameters to leave, met within 1 %.
        flops: instead of keep: fraction of the operations of a call on `example` to leave, met within 1 %.
        latency: instead of keep: fraction of the time of such a call to leave, found by timing cuts.
        score: how units are ranked (`rarefy.structured.importance`): magnitude (the default), l1, scale, median,
            random; from data also activation, apoz, fluctuation, obs; from gradients taylor, fisher, gradient.
        reduce: how the slices of a unit are joined: sum, mean or max.
        scope: units compete in their group ("layer"), with all ("global"), or in groups of equal structure
            ("isomorphic").
        min_keep: no group keeps less than this fraction.
        layers: cut groups of which at least half is made by these layers: "*.mlp.*" means the neurons of MLPs, but not
            the width of the model, which they also write. By default all.
        ignore: layers that must not lose outputs.
        round_to: unit counts that stay are multiples of this.
        steps: cut in so many steps, with new scores and repairs in each.
        data: batches for scores, and for repairs. They are gone through more than once.
        loss: callable(output, batch) for gradient scores; by default the model's own.
        repair: with `data`, how the remaining units compensate: "ridge" (new weights for layers that read lost units),
            "bias" (the mean of what is lost), "batchnorm" (new statistics); True: all, False: none.
        optimizer: one that trains the model: it continues with what is left.
        mask_only: set units to zero and keep all sizes.
        dry_run: change nothing: only report.
        seed: of random scores.
        progress: show progress bars.

    Returns:
        A row a group: units before and after, and why it stays.

    Raises:
        ModelError: for options or a model that do not fit; the model is then unchanged.
        DataError: for data that does not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> cut_(net, torch.randn(1, 4), keep=0.5).rows[0]["units"], net
        ('6 -> 3', Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        ))
    """
    options = CutOptions(
        units=units, keep=keep, parameters=parameters, flops=flops, latency=latency, score=score, reduce=reduce,
        scope=scope, min_keep=min_keep, layers=layers, ignore=ignore, round_to=round_to, steps=steps, repair=repair,
    )  # fmt: skip
    return run_cut(
        model, example, options, data, loss=loss, optimizer=optimizer, mask_only=mask_only, dry_run=dry_run, seed=seed,
        progress=progress,
    )  # fmt: skip


def run_cut(
    model: nn.Module,
    example: Any,
    options: CutOptions,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    mask_only: bool = False,
    dry_run: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Cut a model by checked options. See `cut_`."""
    inner = unwrap(model)
    if options.drops_layers:
        return run_drop_layers(
            inner, example, _layer_options(options), data, loss=loss, optimizer=optimizer, stay=mask_only or dry_run,
            seed=seed, progress=progress,
        )  # fmt: skip
    repairs = check_data(options, data, loss)
    check_optimizer(optimizer, inner)
    check_unmasked(inner)
    run = _CutRun(inner, example, options, data, loss, seed, repairs, mask_only)
    try:
        for step in track(range(1, options.steps + 1), "cutting", progress and options.steps > 1):
            cut, masks = run.step(options.target ** (step / options.steps))
        if not (mask_only or dry_run):
            update_config(inner, example, run.sizes)
    except BaseException:
        _put_back(run.removals)
        raise
    if dry_run:
        _put_back(run.removals)
    elif mask_only:
        _put_back(run.own_heads)
    elif optimizer is not None:
        for removal in run.removals:
            replace_parameters(optimizer, removal.replaced)
    return cut.report(masks, run.removals[-1], dry_run, mask_only)  # type: ignore[possibly-unbound]


def _layer_options(options: CutOptions) -> DropLayersOptions:
    score = options.score or "similarity"
    return DropLayersOptions(keep=options.keep, score=score, layers=options.layers, ignore=options.ignore)


class _Rigid(Exception):
    """An attention module cannot lose what it should, unless it has heads of its own."""


def _put_back(removals: Sequence[Removal]) -> None:
    for removal in reversed(removals):
        removal.put_back()


class _CutRun:
    """What all steps of a cut share, and what they have removed so far."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        options: CutOptions,
        data: Any,
        loss: Loss | None,
        seed: int,
        repairs: Sequence[str],
        mask_only: bool,
    ):
        self.model, self.example, self.options, self.data, self.loss = model, example, options, data, loss
        self.seed, self.repairs, self.mask_only = seed, repairs, mask_only
        self.dense = copy.deepcopy(model) if options.budget == "latency" else None
        self.first = trace(model, example)
        self.whole = {name: measure(self.first, {}) for name, measure in budget.MEASURES.items()}
        self.history = History(self.first)
        self.sizes: dict[int, set[int]] = {}
        self.removals: list[Removal] = []
        self.own_heads: list[Removal] = []

    def step(self, target: float) -> tuple[_Cut, dict[Axis, Tensor]]:
        """Cut until `target` of the budget's measure is left; return the cut and the units that stay."""
        while True:
            graph = trace(self.model, self.example) if self.removals else self.first
            cut = _Cut(self, graph)
            try:
                removal, masks = cut.run(target, self.repairs, self.mask_only)
            except _Rigid:
                self.own_heads.append(give_own_heads(self.model))
                self.removals.append(self.own_heads[-1])
                continue
            self.removals.append(removal)
            self.history.add(graph, masks)
            self.sizes = merge_sizes(self.sizes, budget.size_changes(graph, masks))
            return cut, masks


class _Cut:
    """One step: groups and their scores, a plan that the model's class can run, its execution."""

    def __init__(self, run: _CutRun, graph: Graph):
        self.model, self.example, self.graph, self.options = run.model, run.example, graph, run.options
        self.data, self.loss, self.seed, self.whole, self.dense = run.data, run.loss, run.seed, run.whole, run.dense
        options = run.options
        self.groups = select_groups(run.model, graph, options.units, options.layers, options.ignore)
        self.origin = run.history.origins(graph)
        self.stays: dict[Axis, str] = {}  # groups that a class wants as they are
        self.scores = self._scored(self.groups)
        self.time: float | None = None
        self.tried = self.swap = False

    def _scored(self, groups: Sequence[Group]) -> dict[Axis, Tensor]:
        return unit_scores(
            self.model,
            self.graph,
            groups,
            self.options.unit_score,
            reduce=self.options.reduce,
            data=self.data,
            loss=self.loss,
            seed=self.seed,
        )

    def run(self, target: float, how: Sequence[str], mask_only: bool) -> tuple[Removal, dict[Axis, Tensor]]:
        """Cut until `target` is left, leaving alone what the class does not let go."""
        while True:
            try:
                masks = self._masks(self._plan(target))
                return take_out_and_repair(
                    self.model, self.example, self.graph, masks, how, self.data, stay=mask_only
                ), masks
            except (ForwardFailed, OutputMismatch) as error:
                place = error.module if isinstance(error, ForwardFailed) else ""
                if place and PrunableMultiheadAttention.supports(self.model.get_submodule(place)):
                    raise _Rigid from error
                if isinstance(error, ForwardFailed) and not self.swap:
                    self.swap = True  # first of all, heads may give way to their dimensions
                    if self._plan_changes(target):
                        continue
                if not (isinstance(error, ForwardFailed) and self._leave_alone(error)):
                    self._try_each(error, target)

    def _plan(self, target: float) -> budget.Counts:
        """How many units of each group stay."""
        options, order = self.options, self._order([g for g in self.groups if g.axis not in self.stays])
        if options.budget == "keep":
            left = budget.units_kept(order, 1 - target)
        elif options.budget == "latency":
            left = self._timed(order, target)
        else:
            left = budget.meet_budget(order, options.budget, target, self.whole[options.budget])
        if not left:
            raise ModelError(f"nothing would go: {UNEVEN}")
        if all(n == axis.size for axis, n in left.items()):
            steps = f" in multiples of {options.round_to}" if options.round_to > 1 else ""
            raise ModelError(f"nothing would go: {options.budget} {target:g} leaves every unit of every group{steps}")
        return left

    def _plan_changes(self, target: float) -> bool:
        """Whether dimensions of heads go where heads do not divide."""
        if self.options.budget != "keep":
            return False
        order = self._order([g for g in self.groups if g.axis not in self.stays])
        return set(budget.units_kept(order, 1 - target)) != set(
            budget.units_kept(replace(order, swap=False), 1 - target)
        )

    def _order(self, groups: list[Group]) -> budget.CutOrder:
        options = self.options
        places = budget.rank_units(
            self.graph, groups, self.scores, self.origin, options.scope, UNIT_SCORES[options.unit_score].comparable
        )
        return budget.CutOrder(
            self.graph,
            groups,
            places,
            self.origin,
            options.min_keep,
            options.round_to,
            options.scope == "layer",
            self.swap,
        )

    def _masks(self, left: budget.Counts) -> dict[Axis, Tensor]:
        new = [g for g in self.graph.groups if g.axis in left and g.axis not in self.scores]
        self.scores |= self._scored(new) if new else {}
        return budget.keep_masks(self.scores, left)

    def _timed(self, order: budget.CutOrder, target: float) -> budget.Counts:
        """The shallowest cut that takes `target` of the dense model's time, by bisection over trial cuts."""
        low, high, best = 0.0, 1.0, None
        for trial in range(TRIALS):
            depth = high if trial == 0 else (low + high) / 2
            left = budget.units_kept(order, depth, smooth=True)
            removal = remove_units(self.model, self.example, self.graph, self._masks(left))
            try:
                share = self._share_of_time()
            finally:
                removal.put_back()
            if share <= target * (1 + budget.NEAR):
                high, best, self.time = depth, left, share
            elif trial == 0:
                raise ModelError(
                    f"latency {target:g} is out of reach: with as few units as may stay a call takes {share:.3f} of "
                    "the dense model's time"
                )
            else:
                low = depth
        assert best is not None
        return best

    def _share_of_time(self) -> float:
        """How long a call of the model as it is takes, as a fraction of the dense model's time."""
        assert self.dense is not None
        batch = on_device(self.model, self.example)
        with evaluating(self.model), evaluating(self.dense):
            runs = {"cut": lambda: call(self.model, batch), "dense": lambda: call(self.dense, batch)}  # type: ignore[arg-type]
            times = compare(runs, repeats=TIMINGS)
        return times["cut"].median / times["dense"].median

    def _leave_alone(self, error: ForwardFailed) -> bool:
        """Keep the groups whose sizes the modules that failed have in their code, and those like them: heads first.
        Return whether there are any, and others."""
        alike = {
            n for n in dict(self.model.named_modules()) if budget.strip_indices(n) == budget.strip_indices(error.module)
        }
        axes = {a for n in alike for e in self.graph.sizes.get(n, []) for a in leaves(e)}
        axes |= {g.axis for g in self.groups for m in g.members if m.name.rpartition(".")[0] in alike}
        left = [g for g in self.groups if g.axis in axes and g.axis not in self.stays]
        heads = [g for g in left if g.kind.startswith("head")]
        if not left or (len(left) + len(self.stays) == len(self.groups) and not heads):
            return False
        where = error.module or type(self.model).__name__
        self.stays |= {g.axis: f"{where} has its size in its code ({_said(error)})" for g in heads or left}
        return True

    def _try_each(self, error: ModelError, target: float) -> None:
        """Find out which groups can go: add those of one form after the other, and keep those that fail."""
        if self.tried:
            raise error
        self.tried, self.stays = True, {}
        fine: list[Group] = []
        for groups in budget.groups_by_signature(self.groups):
            try:
                masks = self._masks(budget.units_kept(self._order([*fine, *groups]), 1 - target))
                remove_units(self.model, self.example, self.graph, masks).put_back()
                fine += groups
            except (ForwardFailed, OutputMismatch) as reason:
                self.stays |= {g.axis: _said(reason) for g in groups}
        if not fine:
            raise error

    def report(self, masks: Mapping[Axis, Tensor], done: Removal, dry_run: bool, mask_only: bool) -> Report:
        """Return a row a group, and what is left of the model."""
        asked = {g.axis for g in self.groups}
        rows = []
        for g in self.graph.groups:
            n = int(masks[g.axis].sum()) if g.axis in masks else g.size
            why = "" if g.axis in masks else g.lock or self.stays.get(g.axis)
            why = why if why is not None else UNEVEN if g.axis in asked else NOT_ASKED
            why = "the budget leaves all of its units" if not why and n == g.size else why
            rows.append(row(g, self.origin[g.axis], n, why))
        left = {axis: int(m.sum()) for axis, m in masks.items()}
        summary: dict[str, Any] = {}
        for what, of in budget.MEASURES.items():
            before, after = self.whole[what], of(self.graph, left)
            summary[what] = f"{before:,} -> {after:,} ({after / max(before, 1):.3f})"
        if self.time is not None:
            summary["time"] = f"{self.time:.3f} of the dense model's, as timed for the choice"
        if done.repaired:
            summary["repaired"] = f"{len(done.repaired)} layers and norms"
        notes = unsupported_notes(self.graph)
        if done.unseen:
            notes += ("the example's outputs do not depend on what went: the proof says nothing of it",)
        title = "cut: nothing done" if dry_run else "cut: units are zero, nothing left" if mask_only else "cut"
        asked_for = [r for r in rows if r["stays because"] != NOT_ASKED]
        return Report(title, tuple(rows), summary, notes, tuple(group_similar_rows(asked_for, "group")))


def _said(error: ModelError) -> str:
    """What was wrong, without what is said around it."""
    said = str(error).removeprefix("the cut model does not run, so it was put back: ").partition(" (it takes")[0]
    said = re.sub(r"^\w+ cannot be called with a batch of .*?: (?=[^:]*$)", "", said)
    return said if len(said) < 100 else said[:97] + "..."


def row(group: Group, before: int, after: int, why: str) -> dict[str, Any]:
    """Return a group's line of a report."""
    more = len(group.notes) - 1
    return {
        "group": group.name, "kind": group.kind, "units": f"{before} -> {after}", "parameters": len(group.members),
        "stays because": why, "note": group.notes[0] + (f" and {more} more" if more else "") if group.notes else "",
    }  # fmt: skip


def take_out_and_repair(
    model: nn.Module,
    example: Any,
    graph: Graph,
    masks: Mapping[Axis, Tensor],
    how: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    *,
    stay: bool = False,
) -> Removal:
    """Remove the units that `masks` does not keep, prove it, and let the others make up for them."""
    hit = layers_losing_inputs(graph, masks) if {"ridge", "bias"} & set(how) and not stay else []
    before = {r.name: r.module.weight.detach().clone() for r in hit} if data is not None else {}
    moments = collect_moments(model, hit, data) if data is not None and hit else {}
    removal = remove_units(model, example, graph, masks, stay=stay)
    try:
        if not stay:
            for name in set(before) & set(removal.scaled):  # attention divides by another root now
                dim, rows, by = removal.scaled[name]
                before[name].index_copy_(dim, rows, before[name].index_select(dim, rows) * by)
            removal.undo += [value_restorer(r.module.bias) for r in hit if r.module.bias is not None]
            removal.repaired += compensate_(hit, graph, masks, before, moments, removal.constants, how)
            if "batchnorm" in how and data is not None:
                norms = batch_norms(model)
                removal.undo += [value_restorer(b) for m in norms.values() for b in m.buffers()]
                recalibrate_batch_norms(model, norms, data)
                removal.repaired += norms
    except BaseException:
        removal.put_back()
        raise
    return removal
