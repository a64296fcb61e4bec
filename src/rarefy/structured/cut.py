"""`cut_`: remove whole units from a model, which stays an ordinary dense model, only smaller."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.checks import as_dict
from rarefy.common.errors import ModelError
from rarefy.common.progress import track
from rarefy.common.renamed import renamed_parameters
from rarefy.common.report import Report
from rarefy.dependency.graph import Graph, Group, trace
from rarefy.dependency.symbolic_dims import Axis, leaves
from rarefy.evaluation.profiling import compare
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Selector, unwrap
from rarefy.model.losses import Loss
from rarefy.model.mha import PrunableMultiheadAttention
from rarefy.structured import unit_selection
from rarefy.structured.batch_norms import batch_norms, copy_before_cut, match_batch_norms_
from rarefy.structured.compensation import compensate_, layers_losing_inputs
from rarefy.structured.consumers import collect_moments, consumers_of
from rarefy.structured.cut_report import UNEVEN, cut_report
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
    short_reason,
    value_restorer,
)

NUM_TRIALS = 8  # cuts that are timed to meet a latency
NUM_TIMINGS = 15
MAX_SEARCH = 60  # cuts that are tried to find the groups that cannot be cut


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
    counts: Mapping[str, int] | None = None,
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

    The model stays an ordinary dense one of its class, only smaller. Its outputs are compared with those of the model
    whose removed units are zero (`mask_only`), and everything is restored if they differ. Operators that depend on the
    number of units, such as a LayerNorm, do change; the note of the group says so. `nn.MultiheadAttention` becomes a
    subclass with heads of its own where it has to. Groups whose sizes are fixed in the code of a class stay, and the
    report names them. Costs O(weights) and four calls besides the score, more for groups that a class keeps.

    Args:
        model: any module whose operators have rules (`rarefy.dependency`); others lock the channels they touch.
        example: a batch: a tensor, a dict of keyword arguments, or a tuple (inputs, target), of which only the inputs
            are passed. One call shows which slices belong together.
        units: kinds of units: "channel" or "group" of a convolution, "neuron" of a Linear layer (also the width of a
            transformer), "head" (with the queries that share its keys), "head_dim", "query_head" (queries that share
            keys); or "layer" alone: whole blocks, see `drop_layers_`.
        keep: fraction of units that stays in each group; 0.5 where no budget is given. Of units="layer" the fraction
            of blocks, by default 0.75; with `layers` and without `keep` all of these go.
        parameters: instead of keep: fraction of the model's parameters to leave, met within 1 %.
        flops: instead of keep: fraction of the operations of a call on `example` to leave, met within 1 %.
        latency: instead of keep: fraction of the time of such a call to leave, found by timing cuts.
        counts: instead of keep: how many units stay in each group, by its name in `rarefy.groups`; other groups stay.
        score: how units are ranked (`rarefy.structured.importance`): magnitude, l1, scale, median, random; from data
            also activation, apoz, fluctuation, obs; from gradients taylor, fisher, gradient. By default fluctuation
            with data, else magnitude. Of units="layer": similarity (the default), loss or random.
        reduce: how the slices of a unit are joined: sum, mean or max.
        scope: units compete in their group ("layer"), with all ("global"), or in groups of equal structure
            ("isomorphic").
        min_keep: no group keeps less than this fraction.
        layers: cut groups whose units are produced by these layers for at least half. "*.mlp.*" selects the neurons of
            MLPs, but not the width of the model, which these layers also produce. By default all.
        ignore: layers that must not lose outputs.
        round_to: unit counts that stay are multiples of this.
        steps: cut in so many steps, with new scores and repairs in each.
        data: batches for scores, and for repairs. They are gone through more than once.
        loss: for gradient scores, a function of (output, batch) or a criterion (logits, target); see `rarefy.fit_`.
        repair: how the remaining units compensate, with `data`: "ridge" (new weights for layers that read lost units),
            "bias" (the mean of what is lost), "batchnorm" (corrected statistics); True: all, False: none.
        optimizer: one that trains the model: it continues with what is left.
        mask_only: set units to zero and keep all sizes.
        dry_run: change nothing: only report.
        seed: of random scores.
        progress: show progress bars.

    Returns:
        A `Report` with one row for each group: units before and after, and why it stays.

    Raises:
        ModelError: for options or a model that do not fit; the model is then unchanged.
        SelectorError: where `layers` or `ignore` matches nothing.
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
        units=units,  # type: ignore[arg-type]  # lists and single names become tuples
        repair=repair,  # type: ignore[arg-type]  # the same
        keep=keep, parameters=parameters, flops=flops, latency=latency,
        counts=as_dict(counts), score=score, reduce=reduce, scope=scope, min_keep=min_keep, layers=layers,
        ignore=ignore, round_to=round_to, steps=steps,
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
            try:
                cut, masks = run.step(options.target ** (step / options.steps))
            except _NothingRemoved:  # too small a step; the next one removes more
                if step == options.steps and not run.removals:
                    raise
        if not (mask_only or dry_run):
            update_config(inner, example, run.sizes)
    except BaseException:
        _put_back(run.removals)
        raise
    if not dry_run:
        forget_receipt(inner)
    if dry_run:
        _put_back(run.removals)
    elif mask_only:
        _put_back(run.own_heads)
    elif optimizer is not None:
        for removal in run.removals:
            replace_parameters(optimizer, removal.replaced)
    return cut_report(cut, masks, run.removals[-1], dry_run, mask_only)  # type: ignore[possibly-unbound]


def _layer_options(options: CutOptions) -> DropLayersOptions:
    """Return the options of `drop_layers_` that a cut of layers means."""
    score = options.score or "similarity"
    return DropLayersOptions(keep=options.keep, score=score, layers=options.layers, ignore=options.ignore)


class _NothingRemoved(ModelError):
    """Raised where a step's budget leaves all units."""


class _NeedsOwnHeads(Exception):
    """Raised where an attention module must be replaced by one whose heads keep their size."""


def _put_back(removals: Sequence[Removal]) -> None:
    """Undo removals, the last one first."""
    for removal in reversed(removals):
        removal.put_back()


class _CutRun:
    """The data and state that all steps of a cut share, and what they have removed so far."""

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
        self.whole = {name: measure(self.first, {}) for name, measure in unit_selection.MEASURES.items()}
        self.history = History(self.first)
        self.sizes: dict[int, set[int]] = {}
        self.removals: list[Removal] = []
        self.own_heads: list[Removal] = []

    def step(self, target: float) -> tuple[_Cut, dict[Axis, Tensor]]:
        """Cut until `target` of the budget is left; return the cut and the masks of units that stay."""
        while True:
            graph = trace(self.model, self.example) if self.removals else self.first
            cut = _Cut(self, graph)
            try:
                removal, masks = cut.run(target, self.repairs, self.mask_only)
            except _NeedsOwnHeads:
                self.own_heads.append(give_own_heads(self.model))
                self.removals.append(self.own_heads[-1])
                continue
            self.removals.append(removal)
            if not self.mask_only:
                self.history.add(graph, masks)
                self.sizes = merge_sizes(self.sizes, unit_selection.size_changes(graph, masks))
            return cut, masks


class _Cut:
    """One step: score the groups, choose the units, and remove them in a way that the model's class can run."""

    def __init__(self, run: _CutRun, graph: Graph):
        self.model, self.example, self.graph, self.options = run.model, run.example, graph, run.options
        self.data, self.loss, self.seed, self.whole, self.dense = run.data, run.loss, run.seed, run.whole, run.dense
        options = run.options
        self.groups = select_groups(run.model, graph, options.units, options.layers, options.ignore, options.counts)
        self.origin = run.history.origins(graph)
        self.stays: dict[Axis, str] = {}  # groups that cannot be cut, and why
        self.scores = self._score(self.groups)
        self.time: float | None = None
        self.searched = self.swap = False

    def _score(self, groups: Sequence[Group]) -> dict[Axis, Tensor]:
        """Return the importance of the units of groups.

        By default, groups whose units no layer reads in a way that the score of data knows are ranked by magnitude;
        with scores that compete in the whole model all are.
        """
        if self.options.score is None and self.data is not None and self.options.scope == "layer":
            readers = consumers_of(self.graph, groups)
            read, others = ([g for g in groups if bool(readers[g]) is has] for has in (True, False))
            if read and others:
                return {**self._score(read), **self._score(others)}
        return unit_scores(
            self.model,
            self.graph,
            groups,
            self.options.score,
            reduce=self.options.reduce,
            data=self.data,
            loss=self.loss,
            seed=self.seed,
            removed={g.axis: g.size - self.options.counts[g.name] for g in groups} if self.options.counts else None,
        )

    def run(self, target: float, repairs: Sequence[str], mask_only: bool) -> tuple[Removal, dict[Axis, Tensor]]:
        """Cut until `target` of the budget is left; return the removal and the masks.

        Where the model's class cannot run a cut, the cut is changed, in this order: attention modules are replaced,
        head dimensions are cut in place of heads, groups with hard-coded sizes stay, and at last each kind of group is
        tried by itself.
        """
        while True:
            try:
                masks = self._masks(self._choose_counts(target))
                return remove_and_compensate(
                    self.model, self.example, self.graph, masks, repairs, self.data, stay=mask_only
                ), masks
            except (ForwardFailed, OutputMismatch) as error:
                module = error.module if isinstance(error, ForwardFailed) else ""
                if module and PrunableMultiheadAttention.supports(self.model.get_submodule(module)):
                    raise _NeedsOwnHeads from error
                if isinstance(error, ForwardFailed) and not self.swap:
                    self.swap = True  # first, try head dimensions in place of heads
                    if self._swap_changes_counts(target):
                        continue
                if not (isinstance(error, ForwardFailed) and self._keep_hard_coded(error)):
                    self._find_removable(error, target)

    def _choose_counts(self, target: float) -> unit_selection.Counts:
        """Return how many units of each group stay."""
        options, order = self.options, self._order([g for g in self.groups if g.axis not in self.stays])
        if options.counts is not None:
            counts = {g.axis: options.counts[g.name] for g in order.groups}
        elif options.budget == "keep":
            counts = unit_selection.units_kept(order, 1 - target)
        elif options.budget == "latency":
            counts = self._meet_latency(order, target)
        else:
            counts = unit_selection.meet_budget(order, options.budget, target, self.whole[options.budget])
        if not counts:
            raise ModelError(f"nothing would be removed: {UNEVEN}")
        if all(n == axis.size for axis, n in counts.items()):
            steps = f" in multiples of {options.round_to}" if options.round_to > 1 else ""
            raise _NothingRemoved(
                f"nothing would be removed: {options.budget} {target:g} leaves every unit of every group{steps}"
            )
        return counts

    def _swap_changes_counts(self, target: float) -> bool:
        """Return whether cutting head dimensions in place of heads changes anything."""
        if self.options.budget != "keep":
            return False
        order = self._order([g for g in self.groups if g.axis not in self.stays])
        return set(unit_selection.units_kept(order, 1 - target)) != set(
            unit_selection.units_kept(replace(order, swap=False), 1 - target)
        )

    def _order(self, groups: list[Group]) -> unit_selection.CutOrder:
        """Return the order in which units of these groups are removed."""
        options = self.options
        positions = unit_selection.rank_units(
            self.graph, groups, self.scores, self.origin, options.scope, UNIT_SCORES[options.unit_score].comparable
        )
        return unit_selection.CutOrder(
            self.graph,
            groups,
            positions,
            self.origin,
            options.min_keep,
            options.round_to,
            options.scope == "layer",
            self.swap,
        )

    def _masks(self, counts: unit_selection.Counts) -> dict[Axis, Tensor]:
        """Return the masks that keep the most important units."""
        unscored = [g for g in self.graph.groups if g.axis in counts and g.axis not in self.scores]
        self.scores |= self._score(unscored) if unscored else {}
        return unit_selection.keep_masks(self.scores, counts)

    def _meet_latency(self, order: unit_selection.CutOrder, target: float) -> unit_selection.Counts:
        """Return the counts of the shallowest cut that takes `target` of the dense model's time.

        Bisection over timed trial cuts.
        """
        low, high, best = 0.0, 1.0, None
        for trial in range(NUM_TRIALS):
            depth = high if trial == 0 else (low + high) / 2
            counts = unit_selection.units_kept(order, depth, smooth=True)
            removal = remove_units(self.model, self.example, self.graph, self._masks(counts))
            try:
                ratio = self._relative_time()
            finally:
                removal.put_back()
            if ratio <= target * (1 + unit_selection.NEAR):
                high, best, self.time = depth, counts, ratio
            elif trial == 0:
                raise ModelError(
                    f"latency {target:g} is out of reach: with the fewest units allowed a call takes {ratio:.3f} of "
                    "the dense model's time"
                )
            else:
                low = depth
        assert best is not None
        return best

    def _relative_time(self) -> float:
        """Return the time of a call of the present model, relative to the dense one."""
        assert self.dense is not None
        example = on_device(self.model, self.example)
        with evaluating(self.model), evaluating(self.dense):
            runs = {"cut": lambda: call(self.model, example), "dense": lambda: call(self.dense, example)}  # type: ignore[arg-type]
            times = compare(runs, repeats=NUM_TIMINGS)
        return times["cut"].median / times["dense"].median

    def _keep_hard_coded(self, error: ForwardFailed) -> bool:
        """Keep the groups whose sizes are hard-coded in the modules that failed, and in modules like them; heads first.

        Returns False where there are none, or where no other group would be left to cut.
        """
        same_modules = {
            n
            for n in dict(self.model.named_modules())
            if unit_selection.strip_indices(n) == unit_selection.strip_indices(error.module)
        }
        axes = {a for n in same_modules for e in self.graph.sizes.get(n, []) for a in leaves(e)}
        axes |= {g.axis for g in self.groups for m in g.members if m.name.rpartition(".")[0] in same_modules}
        affected = [g for g in self.groups if g.axis in axes and g.axis not in self.stays]
        heads = [g for g in affected if g.kind.startswith("head")]
        if not affected or (len(affected) + len(self.stays) == len(self.groups) and not heads):
            return False
        module = error.module or type(self.model).__name__
        self.stays |= {g.axis: f"{module} has a hard-coded size ({short_reason(error)})" for g in heads or affected}
        return True

    def _find_removable(self, error: ModelError, target: float) -> None:
        """Try groups one signature after the other, then by halves of those that fail, and keep the ones left."""
        if self.searched:
            raise error
        self.searched, self.stays = True, {}
        removable: list[Group] = []
        trials = 0
        untried = [list(groups) for groups in unit_selection.groups_by_signature(self.groups)][::-1]
        while untried:
            groups, trials = untried.pop(), trials + 1
            try:
                masks = self._masks(unit_selection.units_kept(self._order([*removable, *groups]), 1 - target))
                remove_units(self.model, self.example, self.graph, masks).put_back()
                removable += groups
            except (ForwardFailed, OutputMismatch) as reason:
                if len(groups) > 1 and trials < MAX_SEARCH:
                    untried += [groups[len(groups) // 2 :], groups[: len(groups) // 2]]
                else:
                    self.stays |= {g.axis: short_reason(reason) for g in groups}
        if not removable:
            raise error


def remove_and_compensate(
    model: nn.Module,
    example: Any,
    graph: Graph,
    masks: Mapping[Axis, Tensor],
    repairs: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    *,
    stay: bool = False,
) -> Removal:
    """Remove the units that `masks` does not keep, verify the outputs, and compensate with the units that stay."""
    consumers = layers_losing_inputs(graph, masks) if {"ridge", "bias"} & set(repairs) and not stay else []
    dense = {c.name: c.module.weight.detach().clone() for c in consumers} if data is not None else {}
    moments = collect_moments(model, consumers, data) if data is not None and consumers else {}
    before = copy_before_cut(model) if "batchnorm" in repairs and data is not None and not stay else None
    removal = remove_units(model, example, graph, masks, stay=stay)
    try:
        if not stay:
            for name in set(dense) & set(removal.scaled):  # the cut scaled these rows
                dim, rows, factor = removal.scaled[name]
                dense[name].index_copy_(dim, rows, dense[name].index_select(dim, rows) * factor)
            removal.undo += [value_restorer(c.module.bias) for c in consumers if c.module.bias is not None]
            removal.repaired += compensate_(consumers, graph, masks, dense, moments, removal.constants, repairs)
            if before is not None and data is not None:
                removal.undo += [value_restorer(b) for m in batch_norms(model).values() for b in m.buffers()]
                removal.repaired += match_batch_norms_(model, before, graph, masks, data)
    except BaseException:
        removal.put_back()
        raise
    return removal
