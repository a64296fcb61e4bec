"""Select the groups of units that a cut may shrink, and track how many units they had at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError, unknown
from rarefy.dependency.graph import Graph, Group
from rarefy.dependency.symbolic_dims import Axis, kept_mask, leaves, products, size
from rarefy.model.layers import Selector, all_layers, select_layers


class History:
    """Tracks the units of groups over several cuts, by the indices of parameters: names of groups may change."""

    def __init__(self, graph: Graph):
        self.first = graph
        self.indices = {(n, d): torch.arange(size(e)) for n, dims in graph.dims.items() for d, e in enumerate(dims)}

    def add(self, graph: Graph, masks: Mapping[Axis, Tensor]) -> None:
        """Record a cut."""
        for (n, d), kept_indices in self.indices.items():
            self.indices[n, d] = kept_indices[kept_mask(graph.dims[n][d], masks.get)]

    def origins(self, graph: Graph) -> dict[Axis, int]:
        """Return how many units each group of a graph had before any cut."""
        if graph is self.first:
            return {g.axis: g.size for g in graph.groups}
        return {g.axis: self._origin(graph, g) for g in graph.groups}

    def _origin(self, graph: Graph, group: Group) -> int:
        """Return the size of the original axis whose units are those of the group."""
        for m in group.members:
            present = graph.unit_indices(m.name, m.dim)[group.axis]
            original = self.indices[m.name, m.dim]
            for axis, before in self.first.unit_indices(m.name, m.dim).items():
                pairs = {(int(j), int(i)) for j, i in zip(present, before[original]) if j >= 0}
                if len(pairs) == group.size == len({i for _, i in pairs if i >= 0}):
                    return axis.size
        return group.size


def _largest_factors(graph: Graph, groups: list[Group]) -> list[Group]:
    """Keep only the largest of groups whose units multiply to one dimension: cutting each would remove too much."""
    by_axis, dropped = {g.axis: g for g in groups}, set[Group]()
    for e in (e for dims in graph.dims.values() for e in dims):
        for product in products(e):
            factors = [[by_axis[a] for a in leaves(f) if a in by_axis] for f in product.of]
            for kind in {g.kind for part in factors for g in part}:
                same_kind = [[g for g in part if g.kind == kind and g not in dropped] for part in factors]
                same_kind = sorted((part for part in same_kind if part), key=lambda part: -sum(g.size for g in part))
                dropped |= {g for part in same_kind[1:] for g in part} - set(same_kind[0] if same_kind else ())
    return [g for g in groups if g not in dropped]


def select_groups(
    model: nn.Module,
    graph: Graph,
    kinds: Sequence[str],
    layers: Selector,
    ignore: Selector,
    counts: Mapping[str, int] | None = None,
) -> list[Group]:
    """Return the groups to cut: those that `counts` names, or all of these kinds. ModelError where there are none."""
    if counts is not None:
        return _named(graph, kinds, counts)
    groups = [g for g in graph.groups if g.lock is None and g.kind in kinds]
    if layers is not None or ignore is not None:
        groups = _produced_by(model, graph, groups, layers, ignore)
    groups = _largest_factors(graph, groups)
    if not groups:
        why = "; ".join(f"{g.name} ({g.kind}): {g.lock}" for g in graph.groups[:4] if g.lock)
        others = dict.fromkeys(g.kind for g in graph.groups if g.lock is None)
        hint = f"; it has {', '.join(others)}" if others and not set(others) <= set(kinds) else ""
        hint = "; `layers` selects groups of which these layers produce at least half" if layers is not None else hint
        raise ModelError(f"no group of {', '.join(kinds)} can be cut{': ' + why if why else ''}{hint}")
    return groups


def _named(graph: Graph, kinds: Sequence[str], counts: Mapping[str, int]) -> list[Group]:
    """Return the groups of these names, in the order of the model; ModelError for names or numbers that do not fit."""
    known: dict[str, list[Group]] = {}
    for group in graph.groups:
        if group.kind in kinds:
            known.setdefault(group.name, []).append(group)
    for name, count in counts.items():
        if name not in known:
            raise ModelError(f"counts: {unknown('group of ' + ', '.join(kinds), name, known)}")
        group = known[name][0]
        if len(known[name]) > 1:
            kinds_of = " and ".join(g.kind for g in known[name])
            raise ModelError(f"counts: {name} names units of {kinds_of}: give one of them as `units`")
        if group.lock is not None:
            raise ModelError(f"counts: {name} cannot be cut: {group.lock}")
        if count > group.size:
            raise ModelError(f"counts: {name} has {group.size} units, so at most that many stay, got {count}")
    return [g for name, groups in known.items() if name in counts for g in groups]


def modules_of(model: nn.Module, selector: Selector) -> set[int]:
    """Return the ids of the modules that have the weights of the selected layers."""
    return {id(m) for l in select_layers(model, selector) for _, m, _ in l.owners}


def _produced_by(
    model: nn.Module, graph: Graph, groups: list[Group], layers: Selector, ignore: Selector
) -> list[Group]:
    """Return the groups with at least half of their producers in `layers` and none in `ignore`."""
    known = {id(m) for l in all_layers(model) for _, m, _ in l.owners}
    producers = {
        g: {id(m) for n in g.members if n.role == "out" for m, _ in graph.owners[n.name]} & known for g in groups
    }

    if layers:
        named = modules_of(model, layers)
        groups = [g for g in groups if 2 * len(producers[g] & named) >= max(len(producers[g]), 1)]
    if ignore:
        ignored = modules_of(model, ignore)
        groups = [g for g in groups if not producers[g] & ignored]
    return groups
