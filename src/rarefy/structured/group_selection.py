"""Which groups of units a cut may shrink, and how many units they had before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.dependency.graph import Graph, Group
from rarefy.dependency.symbolic_dims import Axis, kept_mask, leaves, products, size
from rarefy.model.layers import Selector, all_layers, select_layers


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


def _largest_factors(graph: Graph, groups: list[Group]) -> list[Group]:
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


def select_groups(
    model: nn.Module, graph: Graph, kinds: Sequence[str], layers: Selector, ignore: Selector
) -> list[Group]:
    """Return the groups to cut."""
    groups = [g for g in graph.groups if g.lock is None and g.kind in kinds]
    if layers is not None or ignore is not None:
        groups = _made_by(model, graph, groups, layers, ignore)
    groups = _largest_factors(graph, groups)
    if not groups:
        why = "; ".join(f"{g.name} ({g.kind}): {g.lock}" for g in graph.groups[:4] if g.lock)
        others = dict.fromkeys(g.kind for g in graph.groups if g.lock is None)
        hint = f"; it has {', '.join(others)}" if others and not set(others) <= set(kinds) else ""
        hint = "; `layers` means groups at least half of whose makers these layers are" if layers is not None else hint
        raise ModelError(f"no group of {', '.join(kinds)} can be cut{': ' + why if why else ''}{hint}")
    return groups


def _made_by(model: nn.Module, graph: Graph, groups: list[Group], layers: Selector, ignore: Selector) -> list[Group]:
    """Return the groups of which at least half is made by `layers`, and nothing by `ignore`."""
    known = {id(m) for l in all_layers(model) for _, m, _ in l.owners}
    makers = {g: {id(m) for n in g.members if n.role == "out" for m, _ in graph.owners[n.name]} & known for g in groups}

    def modules_of(selector: Selector) -> set[int]:
        return {id(m) for l in select_layers(model, selector) for _, m, _ in l.owners}

    if layers:
        named = modules_of(layers)
        groups = [g for g in groups if 2 * len(makers[g] & named) >= max(len(makers[g]), 1)]
    if ignore:
        ignored = modules_of(ignore)
        groups = [g for g in groups if not makers[g] & ignored]
    return groups
