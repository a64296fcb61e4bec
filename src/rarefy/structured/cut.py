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
from rarefy.dependency.symbolic_dims import Axis, kept_mask, leaves, products, size
from rarefy.evaluation.profiling import compare
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Selector, all_layers, select_layers, unwrap
from rarefy.model.losses import Loss
from rarefy.model.mha import PrunableMultiheadAttention
from rarefy.structured import budget
from rarefy.structured.compensation import batch_norms, compensate_, layers_losing_inputs, recalibrate_batch_norms
from rarefy.structured.consumers import collect_moments
from rarefy.structured.hf_config import merge_sizes, update_config
from rarefy.structured.importance import UNIT_SCORES, unit_scores
from rarefy.structured.layer_drop import drop_layers_
from rarefy.structured.optimizer_state import check_optimizer, replace_parameters
from rarefy.structured.options import BUDGETS, Ask, asked_of, check_layers, check_unmasked, for_units, repairs_of
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
    """Remove the units that matter least, and everything that belongs to them; return what went and what is locked.

    example   what the model can be called with: it is run, to see what belongs together and to prove the result
    units     kinds of units: channel or group of a convolution, neuron of a Linear (the width of a transformer too),
              head (with the queries that share its keys), head_dim, query_head (of queries that share keys); or
              "layer" alone: whole blocks, see `drop_layers_`
    keep      the fraction of units that stays (0.5 if no budget is given); or instead of it one of
    parameters, flops, latency
              the fraction of the model's that is to be left: parameters, operations of a call on `example`, both met
              within 1 %; or its time, found by timing cuts in turns with the dense model
    score     how much a unit matters, see `rarefy.structured.importance`: magnitude (the default), l1, scale, median,
              random; from data also activation, apoz, fluctuation, obs; from gradients taylor, fisher, gradient
    reduce    how the slices of a unit are joined: sum, mean, max
    scope     units are compared in their group ("layer"), with all ("global"), or in groups built alike ("isomorphic")
    min_keep  no group keeps less than this fraction
    layers    groups at least half of whose makers these layers are ("*.mlp.*" means the neurons of MLPs, and not the
              width of the whole model, which they also write); None: all
    ignore    layers that must not lose outputs: no group that one of them makes is cut
    round_to  as many units stay as are a multiple of this
    steps     cut in so many steps, scores (and repair) anew in each
    data      batches (something that can be run through more than once) for scores, and from which the units that stay
              learn to make up for the others
    repair    how they do, with `data`: "ridge" (layers that read them get new weights), "bias" (the mean of what is
              lost), "batchnorm" (statistics taken anew); True: all, False: none
    optimizer  one that trains the model: it goes on with what is left
    mask_only  units become zero, and nothing leaves
    dry_run   nothing is done: the report says what would go

    `nn.MultiheadAttention`, which cannot lose heads or width by itself, becomes a subclass that can, where it has to.
    Outputs are those of the model whose units are zero where they are made (`mask_only`), except where something counts
    the units, such as a LayerNorm: the note of the group says so. Where a class has a size of its own in its code the
    groups that it concerns stay, and the report names it. Raises ModelError; the model is then as it was.
    O(weights) and four calls, besides the score; a few more for each form of groups that a class does not let go.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> cut_(net, torch.randn(1, 4), keep=0.5).rows[0]["units"], net
    ('6 -> 3', Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    ))
    """
    inner = unwrap(model)
    if not isinstance(units, str | tuple | list):
        raise ModelError(f"units is a kind or a list of kinds, such as 'channel', got {units!r}; keep=0.5 is by name")
    budgets: dict[str, Any] = dict(zip(BUDGETS, (keep, parameters, flops, latency)))
    if "layer" in ((units,) if isinstance(units, str) else units):
        check_layers(units, budgets, score, for_units(reduce, scope, min_keep, round_to, steps, repair))
        return drop_layers_(
            inner, example, keep, score=score or "similarity", layers=layers, ignore=ignore,
            data=data, loss=loss, optimizer=optimizer, mask_only=mask_only, dry_run=dry_run, seed=seed,
            progress=progress,
        )  # fmt: skip
    ask = asked_of(
        units,
        budgets,
        score or "magnitude",
        reduce,
        scope,
        min_keep,
        round_to,
        steps,
        seed,
    )
    how = repairs_of(repair, data, loss, ask)
    check_optimizer(optimizer, inner)
    check_unmasked(inner)
    dense = copy.deepcopy(inner) if ask.budget == "latency" else None
    sizes: dict[int, set[int]] = {}
    done: list[Removal] = []
    own: list[Removal] = []
    first = trace(inner, example)
    whole = {k: of(first, {}) for k, of in budget.MEASURES.items()}
    history = History(first)
    try:
        for step in track(range(1, ask.steps + 1), "cutting", progress and ask.steps > 1):
            removal = None
            while removal is None:
                graph = trace(inner, example) if done else first
                groups = chosen(inner, graph, ask.units, layers, ignore)
                cut = _Cut(inner, example, graph, groups, ask, data, loss, history.origins(graph), whole, dense)
                try:
                    removal, masks = cut.run(ask.target ** (step / ask.steps), how, mask_only)
                except _Rigid:
                    own.append(give_own_heads(inner))
                    done.append(own[-1])
            done.append(removal)
            history.add(graph, masks)
            sizes = merge_sizes(sizes, budget.size_changes(graph, masks))
        if not (mask_only or dry_run):
            update_config(inner, example, sizes)
    except BaseException:
        _put_back(done)
        raise
    if dry_run:
        _put_back(done)
    elif mask_only:
        _put_back(own)
    elif optimizer is not None:
        for removal in done:
            replace_parameters(optimizer, removal.replaced)
    return cut.report(masks, done[-1], dry_run, mask_only)  # type: ignore[possibly-unbound]


class _Rigid(Exception):
    """An attention module cannot lose what it should, unless it has heads of its own."""


def _put_back(done: Sequence[Removal]) -> None:
    for removal in reversed(done):
        removal.put_back()


class _Cut:
    """One step: groups and their scores, a plan that the model's class can run, its execution."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        graph: Graph,
        groups: list[Group],
        ask: Ask,
        data: Any,
        loss: Loss | None,
        origin: Mapping[Axis, int],
        whole: Mapping[str, int],
        dense: nn.Module | None,
    ):
        self.model, self.example, self.graph, self.groups, self.ask = model, example, graph, groups, ask
        self.data, self.loss, self.whole, self.dense = data, loss, whole, dense
        self.origin = origin
        self.stays: dict[Axis, str] = {}  # groups that a class wants as they are
        self.scores = self._scored(groups)
        self.time: float | None = None
        self.tried = self.swap = False

    def _scored(self, groups: Sequence[Group]) -> dict[Axis, Tensor]:
        a = self.ask
        return unit_scores(
            self.model, self.graph, groups, a.score, reduce=a.reduce, data=self.data, loss=self.loss, seed=a.seed
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
        a, order = self.ask, self._order([g for g in self.groups if g.axis not in self.stays])
        if a.budget == "keep":
            left = budget.units_kept(order, 1 - target)
        elif a.budget == "latency":
            left = self._timed(order, target)
        else:
            left = budget.meet_budget(order, a.budget, target, self.whole[a.budget])
        if not left:
            raise ModelError(f"nothing would go: {UNEVEN}")
        if all(n == axis.size for axis, n in left.items()):
            steps = f" in multiples of {a.round_to}" if a.round_to > 1 else ""
            raise ModelError(f"nothing would go: {a.budget} {target:g} leaves every unit of every group{steps}")
        return left

    def _plan_changes(self, target: float) -> bool:
        """Whether dimensions of heads go where heads do not divide."""
        if self.ask.budget != "keep":
            return False
        order = self._order([g for g in self.groups if g.axis not in self.stays])
        return set(budget.units_kept(order, 1 - target)) != set(
            budget.units_kept(replace(order, swap=False), 1 - target)
        )

    def _order(self, groups: list[Group]) -> budget.CutOrder:
        a = self.ask
        places = budget.rank_units(
            self.graph, groups, self.scores, self.origin, a.scope, UNIT_SCORES[a.score].comparable
        )
        return budget.CutOrder(
            self.graph, groups, places, self.origin, a.min_keep, a.round_to, a.scope == "layer", self.swap
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


class History:
    """Where the units of groups were before any cut: names of groups may change, indices of parameters tell."""

    def __init__(self, graph: Graph):
        self.first = graph
        self.left = {(n, d): torch.arange(size(e)) for n, dims in graph.dims.items() for d, e in enumerate(dims)}

    def add(self, graph: Graph, masks: Mapping[Axis, Tensor]) -> None:
        """Note a cut."""
        for (n, d), indices in self.left.items():
            self.left[n, d] = indices[kept_mask(graph.dims[n][d], masks.get)]

    def origins(self, graph: Graph) -> dict[Axis, int]:
        """Return how many units each group of a graph had at first: those of the axis whose units its own are."""
        if graph is self.first:
            return {g.axis: g.size for g in graph.groups}
        return {g.axis: self._origin(graph, g) for g in graph.groups}

    def _origin(self, graph: Graph, group: Group) -> int:
        for m in group.members:
            now = graph.unit_indices(m.name, m.dim)[group.axis]
            there = self.left[m.name, m.dim]
            for axis, before in self.first.unit_indices(m.name, m.dim).items():
                pairs = {(int(j), int(i)) for j, i in zip(now, before[there]) if j >= 0}
                if len(pairs) == group.size == len({i for _, i in pairs if i >= 0}):
                    return axis.size
        return group.size


def _once(graph: Graph, groups: list[Group]) -> list[Group]:
    """Of groups of a kind whose units multiply to a dimension the largest: a fraction of each would be less of it."""
    by_axis, drop = {g.axis: g for g in groups}, set[Group]()
    for e in (e for dims in graph.dims.values() for e in dims):
        for product in products(e):
            factors = [[by_axis[a] for a in leaves(f) if a in by_axis] for f in product.of]
            for kind in {g.kind for gs in factors for g in gs}:
                alike = [[g for g in gs if g.kind == kind and g not in drop] for gs in factors]
                alike = sorted((gs for gs in alike if gs), key=lambda gs: -sum(g.size for g in gs))
                drop |= {g for gs in alike[1:] for g in gs} - set(alike[0] if alike else ())
    return [g for g in groups if g not in drop]


def chosen(model: nn.Module, graph: Graph, kinds: Sequence[str], layers: Selector, ignore: Selector) -> list[Group]:
    """Return the groups to cut."""
    found = [g for g in graph.groups if g.lock is None and g.kind in kinds]
    if layers is not None or ignore is not None:
        known = {id(m) for l in all_layers(model) for _, m, _ in l.owners}
        makers = {
            g: {id(m) for n in g.members if n.role == "out" for m, _ in graph.owners[n.name]} & known for g in found
        }
        wanted, left = (
            {id(m) for l in select_layers(model, words) for _, m, _ in l.owners} if words else None
            for words in (layers, ignore)
        )
        if wanted is not None:
            found = [g for g in found if 2 * len(makers[g] & wanted) >= max(len(makers[g]), 1)]
        found = [g for g in found if not (left and makers[g] & left)]
    found = _once(graph, found)
    if not found:
        why = "; ".join(f"{g.name} ({g.kind}): {g.lock}" for g in graph.groups[:4] if g.lock)
        others = dict.fromkeys(g.kind for g in graph.groups if g.lock is None)
        hint = f"; it has {', '.join(others)}" if others and not set(others) <= set(kinds) else ""
        hint = "; `layers` means groups at least half of whose makers these layers are" if layers is not None else hint
        raise ModelError(f"no group of {', '.join(kinds)} can be cut{': ' + why if why else ''}{hint}")
    return found
