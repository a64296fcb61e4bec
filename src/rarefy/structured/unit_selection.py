"""Choose how many units of each group stay: rank the units, then find the cut depth that meets a budget.

position  of a unit, in [0, 1]: the unit is removed when 1 - depth is above it. Units are ranked in their group
          (`layer`), among all units (`global`), or among groups of the same structure (`isomorphic`; Fang 2024,
          arXiv 2407.04616)
counts    the number of units of each group that stay. Parameters and operations depend on nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.dependency.graph import Graph, Group
from rarefy.dependency.symbolic_dims import Axis, leaves, num_kept, resolve, size

SCOPES = ("layer", "global", "isomorphic")
DIGITS = re.compile(r"\d+")
NEAR = 0.01  # relative tolerance of a budget
Counts = dict[Axis, int]


@dataclass(frozen=True, eq=False)
class CutOrder:
    """The order in which units are removed.

    positions  of the units of each group, [units] each
    origin     units per group before any cut
    min_keep   fraction of them that stays at any depth
    step       units stay in multiples of this
    local      every group is cut by the same fraction, so head dimensions may have to be cut in place of heads
    swap       cut head dimensions where the number of heads does not divide
    """

    graph: Graph
    groups: Sequence[Group]
    positions: Mapping[Axis, Tensor]
    origin: Mapping[Axis, int]
    min_keep: float
    step: int
    local: bool
    swap: bool = False


def rank_units(
    graph: Graph,
    groups: Sequence[Group],
    scores: Mapping[Axis, Tensor],
    origin: Mapping[Axis, int],
    scope: str,
    comparable: bool,
) -> dict[Axis, Tensor]:
    """Return the position of each unit, [units] a group, after the units that were removed before.

    Scores that cannot be compared between groups are divided by the mean of their group first. O(units log units).
    """
    if scope == "layer":
        positions = {g.axis: _positions(scores[g.axis], origin[g.axis]) for g in groups}
    else:
        classes: dict[Any, list[Group]] = {}
        for g in groups:
            classes.setdefault(_structure(graph, g) if scope == "isomorphic" else None, []).append(g)
        positions = {}
        for members in classes.values():
            normalized = [
                scores[g.axis] if comparable else scores[g.axis] / scores[g.axis].mean().clamp(min=1e-300)
                for g in members
            ]
            ranks = _positions(torch.cat(normalized), sum(origin[g.axis] for g in members))
            positions |= {g.axis: r for g, r in zip(members, ranks.split([g.size for g in members]))}
    for a, b in _paired_axes(graph, set(positions)):  # units of equal rank are removed together
        mean = (positions[a].sort().values + positions[b].sort().values) / 2
        for axis in (a, b):
            positions[axis] = mean[_ranks(positions[axis]).long()]
    return positions


def _positions(scores: Tensor, origin: int) -> Tensor:
    """Return the positions of units by rank, where the first `origin - units` are already removed."""
    return (_ranks(scores) + (origin - len(scores)) + 0.5) / origin


def _ranks(x: Tensor) -> Tensor:
    """Return the rank of each entry, 0 for the smallest."""
    out = torch.empty(len(x), dtype=torch.float64)
    out[x.argsort(stable=True)] = torch.arange(len(x), dtype=torch.float64)
    return out


def _structure(graph: Graph, group: Group) -> tuple[Any, ...]:
    """Return what groups must share to be compared: the kind, and the classes of producers and consumers."""
    parts = sorted((type(graph.owners[m.name][0][0]).__name__, m.role, m.dim) for m in group.members)
    return group.kind, *parts


def _paired_axes(graph: Graph, known: set[Axis]) -> list[tuple[Axis, Axis]]:
    """Return pairs of groups that `chunk` splits into equal parts: they must lose equally many units."""
    pairs = [(resolve(a), resolve(b)) for a, b in graph.equal]
    return [(a, b) for a, b in pairs if isinstance(a, Axis) and isinstance(b, Axis) and a is not b and {a, b} <= known]


def group_signature(group: Group) -> tuple[str, str]:
    """Return the kind of a group and its name without indices: equal for the same group of every block."""
    return group.kind, strip_indices(group.name)


def strip_indices(name: str) -> str:
    """Return a module name with its numbers replaced by `*`."""
    return DIGITS.sub("*", name)


def groups_by_signature(groups: Iterable[Group]) -> list[list[Group]]:
    """Return the groups in lists of equal signature."""
    by_signature: dict[Any, list[Group]] = {}
    for g in groups:
        by_signature.setdefault(group_signature(g), []).append(g)
    return list(by_signature.values())


def units_kept(order: CutOrder, depth: float, *, smooth: bool = False) -> Counts:
    """Return how many units of each group stay at a depth between 0 (all) and 1. O(units).

    With `smooth`, groups of different signatures lose units at slightly different depths, so that a budget can be met
    closely. Groups of one signature stay equal.
    """
    groups = _with_head_dims(order, 1 - depth) if order.swap and order.local and not smooth else order.groups
    counts, numbers = {}, {f: i for i, f in enumerate(dict.fromkeys(group_signature(g) for g in groups))}
    for g in groups:
        size = order.origin[g.axis]
        phase = ((numbers[group_signature(g)] * 0.618034) % 1 - 0.5) / size if smooth and order.local else 0.0
        positions = order.positions.get(g.axis)
        n = round(size * (1 - depth)) if positions is None else int((positions + phase >= depth - 1e-9).sum())
        n = min(max(n, 1, math.ceil(size * order.min_keep - 1e-9)), g.size)
        if order.step > 1:
            n = max(order.step, n // order.step * order.step) if g.size >= order.step else g.size
        counts[g.axis] = n
    return _drop_uneven(order.graph, counts)


def _with_head_dims(order: CutOrder, keep: float) -> list[Group]:
    """Return the groups, with head dimensions in place of heads whose number that fraction does not divide.

    Models compute the one as the quotient of their width and the other.
    """
    graph, dims_of = order.graph, dict[Axis, list[Group]]()
    by_axis = {g.axis: g for g in graph.groups}

    def uneven(g: Group) -> bool:
        return abs(order.origin[g.axis] * keep - round(order.origin[g.axis] * keep)) > 1e-6

    for group in order.groups:
        if group.kind == "head" and uneven(group):
            axes = [a for m in group.members for a in leaves(graph.dims[m.name][m.dim])]
            dims = [by_axis[a] for a in dict.fromkeys(axes) if a.kind == "head_dim" and a in by_axis]
            if dims and all(d.lock is None and not uneven(d) for d in dims):
                dims_of[group.axis] = dims
    groups = [new for g in order.groups for new in dims_of.get(g.axis, [g])]
    return list(dict.fromkeys(groups))


def _drop_uneven(graph: Graph, counts: Counts) -> Counts:
    """Return the counts without groups that would make the equal parts of a `chunk` unequal."""
    while True:
        uneven = [e for e in graph.equal if num_kept(e[0], counts.get) != num_kept(e[1], counts.get)]
        dropped = {axis for pair in uneven for e in pair for axis in leaves(e)} & set(counts)
        if not dropped:
            return counts
        counts = {axis: n for axis, n in counts.items() if axis not in dropped}


def keep_masks(scores: Mapping[Axis, Tensor], counts: Counts) -> dict[Axis, Tensor]:
    """Return which units of each group stay, bool [units]: those with the highest scores."""
    out = {}
    for axis, n in counts.items():
        out[axis] = torch.zeros(axis.size, dtype=torch.bool)
        out[axis][scores[axis].topk(n).indices] = True
    return out


def parameters(graph: Graph, counts: Counts) -> int:
    """Return how many parameters remain with these unit counts. O(parameters x axes)."""
    total = 0
    for name, dims in graph.dims.items():
        if isinstance(getattr(*graph.owners[name][0]), nn.Parameter):
            total += _product(dims, counts)
    return total


def flops(graph: Graph, counts: Counts) -> int:
    """Return the operations that remain in the traced call, 2 a multiply-add.

    Matrix products, convolutions and attention count. O(operators x axes).
    """
    return sum(2 * repeats * _product(dims, counts) for repeats, dims in graph.costs)


def _product(dims: Sequence[Any], counts: Counts) -> int:
    total = 1
    for e in dims:
        total *= num_kept(e, counts.get)
    return total


MEASURES: Mapping[str, Callable[[Graph, Counts], int]] = {"parameters": parameters, "flops": flops}


def meet_budget(order: CutOrder, measure_name: str, target: float, whole: int) -> Counts:
    """Return the counts that leave `target` of the dense model's parameters or flops, within 1 %.

    `whole` is the dense model's number. Raises ModelError where no depth meets the target; the message names the groups
    that hold most of the rest. O(log units x operators).
    """
    measure = MEASURES[measure_name]

    def at(depth: float) -> float:
        return measure(order.graph, units_kept(order, depth, smooth=True)) / whole

    if at(1.0) > target * (1 + NEAR):
        raise ModelError(
            f"{measure_name} {target:g} is out of reach: {at(1.0):.3f} remain with the fewest units allowed"
            + (f" (min_keep={order.min_keep:g}); " if order.min_keep else "; ")
            + f"{_largest_fixed(order, measure_name)}"
        )
    low, high = 0.0, 1.0  # above the target at low, not above it at high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle) <= target else (middle, high)
    counts = units_kept(order, high, smooth=True)
    blocks = [[g.axis for g in groups] for groups in groups_by_signature(g for g in order.groups if g.axis in counts)]
    for together in (blocks, [[axis] for axis in counts]):  # keep blocks equal where that meets the target
        counts = _add_back(order, counts, together, lambda counts: measure(order.graph, counts) / whole, target)
    reached = measure(order.graph, counts) / whole
    if abs(reached - target) > NEAR * target:
        raise ModelError(
            f"{measure_name} {target:g} cannot be met within 1 %: {reached:.4f} is the closest value below"
            + (
                f"; units stay in multiples of {order.step}: a smaller round_to comes closer"
                if order.step > 1
                else f": {sum(g.size for g in order.groups)} units are too few to come closer"
            )
        )
    return counts


def _add_back(
    order: CutOrder, counts: Counts, batches: Sequence[Sequence[Axis]], share: Callable[[Counts], float], target: float
) -> Counts:
    """Give units back to groups, a step at a time, until the target is met; never exceed it."""
    for axes in sorted(batches, key=lambda axes: sum(a.size for a in axes)):
        while share(counts) < target * (1 - NEAR) and all(counts[a] + order.step <= a.size for a in axes):
            trial = _drop_uneven(order.graph, {**counts, **{a: counts[a] + order.step for a in axes}})
            if len(trial) < len(counts) or share(trial) > target:
                break
            counts = trial
    return counts


def _largest_fixed(order: CutOrder, measure_name: str) -> str:
    """Return the part of an error that names the groups that keep most of a budget: locked or not selected."""
    selected = set(order.groups)
    shares = {}
    deepest = units_kept(order, 1.0, smooth=True)
    rest = MEASURES[measure_name](order.graph, deepest)
    for g in order.graph.groups:
        if g not in selected and g.size > 1:
            shares[g] = 1 - MEASURES[measure_name](order.graph, {**deepest, g.axis: 1}) / max(rest, 1)
    largest = sorted(shares, key=lambda g: -shares[g])[:3]
    return "largest parts that stay: " + "; ".join(f"{g.name} ({g.lock or 'not selected'})" for g in largest)


def size_changes(graph: Graph, masks: Mapping[Axis, Tensor]) -> dict[int, set[int]]:
    """Return {old size: new sizes} of the parameter dimensions, views and groups that change."""
    counts = {axis: int(m.sum()) for axis, m in masks.items()}
    exprs = [e for dims in (*graph.dims.values(), *graph.sizes.values()) for e in dims]
    changes: dict[int, set[int]] = {}
    for e in [*exprs, *masks]:
        old, new = size(e), num_kept(e, counts.get)
        if old != new:
            changes.setdefault(old, set()).add(new)
    return changes
