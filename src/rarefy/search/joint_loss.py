"""The loss of many changes at once, without making the model: weights are put in place, the outputs compared.

Losses of single parts add up for small changes only. Here all changed weights stand in the model together. A group
that loses units keeps its size: the weights that read these units become zero, and those that read the others
compensate, as after a cut. Distances are taken on samples that no weight was fitted to, since weights fit their own
samples far better than others: of MiniLM without 29 % of its neurons, 0.017 of the squared length of the outputs on the
128 texts of the cut and 0.045 on others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import RarefyError
from rarefy.dependency.graph import Graph, Group, trace
from rarefy.dependency.symbolic_dims import Axis, kept_mask
from rarefy.model.layers import Layer, all_layers
from rarefy.pipeline.sensitivity import compressed_weight, replaced
from rarefy.prune.prune import calibrate
from rarefy.search import space
from rarefy.search.deploy import distance, outputs_of
from rarefy.search.space import BITS, BLOCK, CUTS, PATTERNS, RANK, Amounts, Key, Part
from rarefy.structured.compensation import compensation, layers_losing_inputs
from rarefy.structured.consumers import Consumer, Moments, collect_moments
from rarefy.structured.unit_selection import keep_masks

JUDGED = 4  # of so many batches the last is kept for distances
CACHED_BYTES = 1 << 30  # of changed weights that are kept for other allocations


class JointLoss:
    """The distance between the outputs of a model and of itself with some of its parts changed.

    Args:
        dense: the model. Its weights are replaced during a call, and put back.
        example: what it can be called with.
        parts: what may be changed; blocks are ignored.
        scores: by method the score of units, from `space.cut_score`.
        data: calibration batches; without any, units go by their weights alone and the example is compared.
        gain: what `solver_gain` returned: rounding to fewer bits moves weights so much less that outputs lose as much
            less as they do by the solver.

    Cost: each call is a pass over a quarter of the data, after the weights that have not been seen before were fitted,
    O(units^3) a layer. The first one that cuts units takes a pass over the data for scores and moments.
    """

    def __init__(
        self, dense: nn.Module, example: Any, parts: Sequence[Part], scores: Mapping[str, str], data: Sequence[Any],
        gain: float = 1.0,
    ):  # fmt: skip
        self.gain = gain
        self.dense = dense
        self.fitted, self.judged = split(data) if data else ([], [example])
        weights = sum(p.numel() for p in dense.parameters())
        self.judged = space.few_samples(self.judged, tokens=space.WORK / max(weights, 1)) if data else self.judged
        self.wanted = outputs_of(dense, self.judged)
        self.example, self.parts, self.unit_scores = example, parts, scores
        self.layers = {l.full_name: l for l in all_layers(dense)}
        self.score = "wanda" if self.fitted else "magnitude"
        self.cached: dict[Any, list[tuple[nn.Parameter, Tensor]]] = {}

    def __call__(self, amounts: Amounts) -> float | None:
        """Return the squared distance over the squared length of the dense outputs; None where one is not finite."""
        with replaced(self._changed(amounts)):
            return distance(self.dense, self.wanted, self.judged)

    def score_units(self) -> None:
        """Compute what allocations that cut units need: else the first one of them does."""
        _ = self.scores, self.moments

    # ---- groups of units ---------------------------------------------------------------------------------------

    @cached_property
    def graph(self) -> Graph:
        """The dependencies of the model's parameters."""
        return trace(self.dense, self.example)

    @cached_property
    def groups(self) -> dict[Key, Group]:
        """The groups of the parts that lose units, by the key of the part."""
        groups: dict[Key, Group] = {}
        for method in dict.fromkeys(p.method for p in self.parts if p.method in CUTS):
            names = {p.name for p in self.parts if p.method == method}
            of_method = space.cuttable_groups(self.dense, self.graph, method, None, None)
            groups |= {(method, g.name): g for g in of_method if g.name in names}
        return groups

    @cached_property
    def scores(self) -> dict[Key, Tensor]:
        """The importance of the units of all groups."""
        return {k: s for method, score in self.unit_scores.items() for k, s in self._scored(method, score).items()}

    @cached_property
    def reads(self) -> dict[Consumer, list[Key]]:
        """The groups that each layer reads units of."""
        one_less = self._masks({k: 1 / g.size for k, g in self.groups.items()})  # each group without one unit
        consumers = layers_losing_inputs(self.graph, one_less)
        return {c: [k for k, g in self.groups.items() if _reads(c, g, one_less)] for c in consumers}

    @cached_property
    def other_readers(self) -> dict[tuple[str, int], list[Key]]:
        """The groups that other parameters read units of, which no layer makes up for, by name and dimension.

        These are weights of convolutions with groups, transposed ones, attention, and classes of users.
        """
        known, others = {c.name for c in self.reads}, dict[tuple[str, int], list[Key]]()
        for key, group in self.groups.items():
            for member in group.members:
                if member.role == "in" and member.name not in known:
                    others.setdefault((member.name, member.dim), []).append(key)
        return others

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """The second moments of the inputs of these layers, by name; empty without data."""
        return collect_moments(self.dense, [*self.reads], self.fitted) if self.fitted and self.reads else {}

    def _scored(self, method: str, score: str) -> dict[Key, Tensor]:
        """Return the importance of the units of all groups of a method."""
        groups = {k: g for k, g in self.groups.items() if k[0] == method}
        if not groups:
            return {}
        scores = space.removal_scores(self.dense, self.graph, [*groups.values()], score, self.fitted)
        return {k: scores[g.axis] for k, g in groups.items()}

    def _masks(self, amounts: Amounts) -> dict[Axis, Tensor]:
        """Return the masks of the units that stay."""
        cut = {k: a for k, a in amounts.items() if a and k in self.groups}
        counts = {self.groups[k].axis: self.groups[k].size - round(a * self.groups[k].size) for k, a in cut.items()}
        return keep_masks({self.groups[k].axis: self.scores[k] for k in cut}, counts)

    def _without_units(self, consumer: Consumer, masks: Mapping[Axis, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Return a consumer's weight, and its bias if it has one, after units have gone: zeros where they were."""
        layer, axis = consumer.module, consumer.axis
        dense = layer.weight.detach().transpose(0, axis).transpose(0, 1)  # [outputs, inputs, ...]
        keep, weight = kept_mask(consumer.inputs, masks.get), dense.clone()
        weight[:, ~keep] = 0.0
        changed = [(layer.weight, weight)]
        if consumer.name in self.moments:
            B, shift = compensation(self.moments[consumer.name], keep, layer.bias is not None)
            weight[:, keep] = torch.einsum("oc...,cs->os...", dense.double(), B).to(weight.dtype)
            if layer.bias is not None:
                more = torch.einsum("oc...,c->o", dense.double(), shift).to(layer.bias.dtype)
                changed.append((layer.bias, layer.bias.detach() + more))
        changed[0] = (layer.weight, weight.transpose(0, 1).transpose(0, axis))
        return changed

    # ---- weights -----------------------------------------------------------------------------------------------

    @cached_property
    def stats(self) -> dict[str, LayerStats]:
        """What scores read of the inputs of layers that may be pruned or factorized, by name: without data nothing."""
        names = {p.name for p in self.parts if p.method not in (BITS, BLOCK, *CUTS)}
        layers = [l for name, l in self.layers.items() if name in names]
        try:
            return calibrate(self.dense, layers, self.score, self.fitted, None, 0)
        except RarefyError:  # of one layer, which is then left out alone
            return {}

    def _smaller(self, key: Key, amount: float) -> list[tuple[nn.Parameter, Tensor]]:
        """Return a layer's weight in a pattern, in fewer bits, or of low rank."""
        method, name = key
        layer, stats = self.layers[name], {} if method == BITS else self.stats
        if method != BITS and name not in stats:
            stats |= calibrate(self.dense, [layer], self.score, self.fitted, None, 0)
        if method == RANK:
            return [(layer.original, space.factorized_weight(layer, amount, stats))]
        weight = compressed_weight(layer, space.setting_of(method, amount), stats, self.score)
        if method == BITS:
            weight = torch.lerp(layer.weight.detach(), weight, math.sqrt(self.gain))
        return [(layer.original, weight)]

    def _changed(self, amounts: Amounts) -> dict[nn.Parameter, Tensor]:
        """Return the changed weights and biases of an allocation."""
        chosen = {k: a for k, a in amounts.items() if a and k[0] != BLOCK}
        changed = dict[nn.Parameter, Tensor]()
        cuts = {k: a for k, a in chosen.items() if k[0] in CUTS}
        masks = self._masks(cuts) if cuts else {}
        for consumer, keys in self.reads.items() if cuts else ():
            read = tuple((k, chosen[k]) for k in keys if k in chosen)
            if read:
                changed |= self._cache((consumer.name, read), lambda c=consumer: self._without_units(c, masks))
        for (name, dim), keys in self.other_readers.items() if cuts else ():
            if any(k in chosen for k in keys):
                parameter: Any = getattr(*self.graph.owners[name][0])
                gone = (~kept_mask(self.graph.dims[name][dim], masks.get)).nonzero().flatten()
                weight: Any = changed.get(parameter, parameter.detach())
                changed[parameter] = weight.index_fill(dim, gone, 0.0)
        for key, amount in chosen.items():
            if key in cuts:
                continue
            for parameter, weight in self._cache((key, amount), lambda k=key, a=amount: self._smaller(k, a)):
                cut = changed.get(parameter)  # a layer whose inputs have gone too
                changed[parameter] = weight if cut is None else _of_both(key[0], parameter, cut, weight)
        return changed

    def _cache(self, key: Any, compute: Callable[[], list[tuple[nn.Parameter, Tensor]]]) -> Any:
        """Return changed weights, computed once as long as there is room."""
        if key in self.cached:
            return self.cached[key]
        changed = compute()
        while self.cached and _bytes([*chain(*self.cached.values()), *changed]) > CACHED_BYTES:
            del self.cached[next(iter(self.cached))]
        self.cached[key] = changed
        return changed


def split(data: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the batches that weights are fitted to, and those that outputs are compared on: all where they are few.

    >>> split([1, 2, 3, 4, 5])
    ([1, 2, 3, 4], [5])
    >>> split([1, 2])
    ([1, 2], [1, 2])
    """
    last = len(data) // JUDGED
    return (list(data[:-last]), list(data[-last:])) if last else (list(data), list(data))


def solver_gain(dense: nn.Module, layers: Sequence[Layer], level: float, data: Sequence[Any]) -> float | None:
    """Return what outputs lose where a solver (GPTQ) rounds layers, in parts of what they lose by the nearest values.

    Args:
        dense: the model.
        layers: the layers that are tried, all at once.
        level: of their bits.
        data: calibration batches; the last are kept for the losses.

    Returns:
        At most 1; None where the batches are too few to keep some, or outputs are not finite.
    """
    if len(data) < JUDGED:
        return None
    fitted, judged = split(data)
    judged = space.few_samples(judged, tokens=space.WORK / max(sum(p.numel() for p in dense.parameters()), 1))
    wanted, solved = outputs_of(dense, judged), copy.deepcopy(dense)
    space.quantize_(solved, [l.full_name for l in layers], level, fitted)
    by_solver = distance(solved, wanted, judged)
    setting = space.setting_of(BITS, level)
    with replaced({l.original: compressed_weight(l, setting, {}, "magnitude") for l in layers}):
        by_nearest = distance(dense, wanted, judged)
    return None if by_solver is None or not by_nearest else min(1.0, by_solver / by_nearest)


def _of_both(method: str, parameter: nn.Parameter, cut: Tensor, weight: Tensor) -> Tensor:
    """Return the weight of a layer that has lost inputs, `cut`, after what a method made of it, `weight`: the zeros of
    a pattern, or else the error of the inputs that stay."""
    if method in PATTERNS:
        return cut * (weight != 0)
    return torch.where(cut == 0, 0.0, cut + (weight - parameter.detach()))


def _reads(consumer: Consumer, group: Group, masks: Mapping[Axis, Tensor]) -> bool:
    return not bool(kept_mask(consumer.inputs, {group.axis: masks[group.axis]}.get).all())


def _bytes(changed: Sequence[tuple[nn.Parameter, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for _, t in changed)
