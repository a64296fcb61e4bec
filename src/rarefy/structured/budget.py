"""Which units go: from scores to an order, and from a budget to a point in that order.

position  of a unit, 0 to 1: it goes when the cut is deeper. Compared in its group (`layer`), with all units (`global`),
          or with those of groups that are built alike (`isomorphic`, Fang 2024, arXiv 2407.04616)
counts    how many units of each group stay at a depth: all that parameters and operations depend on
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
from rarefy.dependency.symbolic_dims import Axis, count, leaves, resolve, size

SCOPES = ("layer", "global", "isomorphic")
DIGITS = re.compile(r"\d+")
NEAR = 0.01  # how far from a budget is near enough, relative to it
Counts = dict[Axis, int]


@dataclass(frozen=True, eq=False)
class CutOrder:
    """Positions of the units of each group, [units] each; `origin`: how many units there were before any cut;
    `min_keep`: the fraction of them that stays at any depth; `step`: they stay in multiples of it; `local`: groups are
    cut alike, so heads may have to give way to their dimensions."""

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
    """Return the position of each unit, after those that went before. Scores that mean something else in each group are
    divided by its mean first. O(units log units)."""
    if scope == "layer":
        places = {g.axis: _places(scores[g.axis], origin[g.axis]) for g in groups}
    else:
        classes: dict[Any, list[Group]] = {}
        for g in groups:
            classes.setdefault(_built(graph, g) if scope == "isomorphic" else None, []).append(g)
        places = {}
        for alike in classes.values():
            each = [
                scores[g.axis] if comparable else scores[g.axis] / scores[g.axis].mean().clamp(min=1e-300)
                for g in alike
            ]
            ranks = _places(torch.cat(each), sum(origin[g.axis] for g in alike))
            places |= {g.axis: r for g, r in zip(alike, ranks.split([g.size for g in alike]))}
    for a, b in _twins(graph, set(places)):  # the nth of one goes with the nth of the other
        both = (places[a].sort().values + places[b].sort().values) / 2
        for axis in (a, b):
            places[axis] = both[_ranks(places[axis]).long()]
    return places


def _places(scores: Tensor, before: int) -> Tensor:
    return (_ranks(scores) + (before - len(scores)) + 0.5) / before


def _ranks(x: Tensor) -> Tensor:
    out = torch.empty(len(x), dtype=torch.float64)
    out[x.argsort(stable=True)] = torch.arange(len(x), dtype=torch.float64)
    return out


def _built(graph: Graph, group: Group) -> tuple[Any, ...]:
    """What a group is built of: its kind, and the classes of the layers that make and read it."""
    parts = sorted((type(graph.owners[m.name][0][0]).__name__, m.role, m.dim) for m in group.members)
    return group.kind, *parts


def _twins(graph: Graph, known: set[Axis]) -> list[tuple[Axis, Axis]]:
    """Groups of which a chunk takes equally many."""
    pairs = [(resolve(a), resolve(b)) for a, b in graph.equal]
    return [(a, b) for a, b in pairs if isinstance(a, Axis) and isinstance(b, Axis) and a is not b and {a, b} <= known]


def group_signature(group: Group) -> tuple[str, str]:
    """Return what blocks alike have in common: a group's kind and its name without numbers."""
    return group.kind, strip_indices(group.name)


def strip_indices(name: str) -> str:
    """Return a name without its numbers: that of all blocks alike."""
    return DIGITS.sub("*", name)


def groups_by_signature(groups: Iterable[Group]) -> list[list[Group]]:
    """Return groups together with those of their form."""
    found: dict[Any, list[Group]] = {}
    for g in groups:
        found.setdefault(group_signature(g), []).append(g)
    return list(found.values())


def units_kept(order: CutOrder, depth: float, *, smooth: bool = False) -> Counts:
    """Return how many units of each group stay at a depth, 0 (all) to 1. `smooth`: groups of other forms lose their
    units at depths a little apart, for a budget to be met nearly; those of a form stay alike. O(units)."""
    groups = _whole(order, 1 - depth) if order.swap and order.local and not smooth else order.groups
    out, numbers = {}, {f: i for i, f in enumerate(dict.fromkeys(group_signature(g) for g in groups))}
    for g in groups:
        size = order.origin[g.axis]
        phase = ((numbers[group_signature(g)] * 0.618034) % 1 - 0.5) / size if smooth and order.local else 0.0
        at = order.positions.get(g.axis)
        n = round(size * (1 - depth)) if at is None else int((at + phase >= depth - 1e-9).sum())
        n = min(max(n, 1, math.ceil(size * order.min_keep - 1e-9)), g.size)
        if order.step > 1:
            n = max(order.step, n // order.step * order.step) if g.size >= order.step else g.size
        out[g.axis] = n
    return _even(order.graph, out)


def _whole(order: CutOrder, keep: float) -> list[Group]:
    """The groups, with the dimensions of heads in place of heads whose number cannot be cut by that fraction: models
    take one as the quotient of their width and the other."""
    graph, inside = order.graph, dict[Axis, list[Group]]()
    by_axis = {g.axis: g for g in graph.groups}

    def uneven(g: Group) -> bool:
        return abs(order.origin[g.axis] * keep - round(order.origin[g.axis] * keep)) > 1e-6

    for group in order.groups:
        if group.kind == "head" and uneven(group):
            beside = [a for m in group.members for a in leaves(graph.dims[m.name][m.dim])]
            dims = [by_axis[a] for a in dict.fromkeys(beside) if a.kind == "head_dim" and a in by_axis]
            if dims and all(d.lock is None and not uneven(d) for d in dims):
                inside[group.axis] = dims
    found = [new for g in order.groups for new in inside.get(g.axis, [g])]
    return list(dict.fromkeys(found))


def _even(graph: Graph, left: Counts) -> Counts:
    """Without the groups that would make unequal what a chunk takes in equal parts."""
    while True:
        uneven = [e for e in graph.equal if count(e[0], left.get) != count(e[1], left.get)]
        drop = {axis for pair in uneven for e in pair for axis in leaves(e)} & set(left)
        if not drop:
            return left
        left = {axis: n for axis, n in left.items() if axis not in drop}


def keep_masks(scores: Mapping[Axis, Tensor], left: Counts) -> dict[Axis, Tensor]:
    """Return which units of each group stay, bool [units]: as many as asked, those with the highest scores."""
    out = {}
    for axis, n in left.items():
        out[axis] = torch.zeros(axis.size, dtype=torch.bool)
        out[axis][scores[axis].topk(n).indices] = True
    return out


def parameters(graph: Graph, left: Counts) -> int:
    """Return how many parameters a cut leaves. O(parameters x axes)."""
    total = 0
    for name, dims in graph.dims.items():
        if isinstance(getattr(*graph.owners[name][0]), nn.Parameter):
            total += _product(dims, left)
    return total


def flops(graph: Graph, left: Counts) -> int:
    """Return how many operations of products, convolutions and attention a cut leaves of the traced call, 2 a
    multiply-add. O(operators x axes)."""
    return sum(2 * many * _product(dims, left) for many, dims in graph.costs)


def _product(dims: Sequence[Any], left: Counts) -> int:
    out = 1
    for e in dims:
        out *= count(e, left.get)
    return out


MEASURES: Mapping[str, Callable[[Graph, Counts], int]] = {"parameters": parameters, "flops": flops}


def meet_budget(order: CutOrder, what: str, target: float, whole: int) -> Counts:
    """Return the counts that leave `target` of `whole` parameters or flops, within 1 % of it. Raises ModelError, which
    says what the rest is made of, where no depth does. O(log x operators)."""
    measure = MEASURES[what]

    def at(depth: float) -> float:
        return measure(order.graph, units_kept(order, depth, smooth=True)) / whole

    if at(1.0) > target * (1 + NEAR):
        raise ModelError(
            f"{what} {target:g} is out of reach: {at(1.0):.3f} are left with as few units as may stay"
            + (f" (min_keep={order.min_keep:g}); " if order.min_keep else "; ")
            + f"{_blocks(order, what)}"
        )
    low, high = 0.0, 1.0  # more than the target stays at low, no more at high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle) <= target else (middle, high)
    found = units_kept(order, high, smooth=True)
    forms = [[g.axis for g in groups] for groups in groups_by_signature(g for g in order.groups if g.axis in found)]
    for together in (forms, [[axis] for axis in found]):  # blocks stay alike where that will do
        found = _fill(order, found, together, lambda left: measure(order.graph, left) / whole, target)
    got = measure(order.graph, found) / whole
    if abs(got - target) > NEAR * target:
        raise ModelError(
            f"{what} {target:g} cannot be met within 1 %: {got:.4f} is the nearest below"
            + (
                f"; units go in multiples of {order.step}, a smaller round_to comes nearer"
                if order.step > 1
                else f": {sum(g.size for g in order.groups)} units are too few to come nearer"
            )
        )
    return found


def _fill(
    order: CutOrder, left: Counts, together: Sequence[Sequence[Axis]], share: Callable[[Counts], float], target: float
) -> Counts:
    """Give groups a step of units back, some together, until the target is near enough, and never pass it."""
    for axes in sorted(together, key=lambda axes: sum(a.size for a in axes)):
        while share(left) < target * (1 - NEAR) and all(left[a] + order.step <= a.size for a in axes):
            more = _even(order.graph, {**left, **{a: left[a] + order.step for a in axes}})
            if len(more) < len(left) or share(more) > target:
                break
            left = more
    return left


def _blocks(order: CutOrder, what: str) -> str:
    """What keeps the most of a budget: groups that are locked or left out, by what would be there without them."""
    asked = set(order.groups)
    shares = {}
    here = units_kept(order, 1.0, smooth=True)
    rest = MEASURES[what](order.graph, here)
    for g in order.graph.groups:
        if g not in asked and g.size > 1:
            shares[g] = 1 - MEASURES[what](order.graph, {**here, g.axis: 1}) / max(rest, 1)
    most = sorted(shares, key=lambda g: -shares[g])[:3]
    return "what stays most: " + "; ".join(f"{g.name} ({g.lock or 'not asked for'})" for g in most)


def size_changes(graph: Graph, masks: Mapping[Axis, Tensor]) -> dict[int, set[int]]:
    """Return what each size becomes, wherever one changes: of parameters, of views, of units."""
    left = {axis: int(m.sum()) for axis, m in masks.items()}
    exprs = [e for dims in (*graph.dims.values(), *graph.sizes.values()) for e in dims]
    out: dict[int, set[int]] = {}
    for e in [*exprs, *masks]:
        old, new = size(e), count(e, left.get)
        if old != new:
            out.setdefault(old, set()).add(new)
    return out
