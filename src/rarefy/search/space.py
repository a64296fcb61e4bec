"""What may be done to each part of a model: the predicted loss and the time saved by each amount of it.

A part is a group of units (neurons, heads, channels) that can be removed together, a whole block, or the weight of a
layer that can be pruned in a pattern, factorized or quantized to 6, 5 or 4 bits. Losses are squared distances of the
model's outputs where this part alone is changed; they add up for small changes. Times are those of the dense model's
call in the same precision, taken as 1.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import ModelError, RarefyError
from rarefy.dependency.graph import Graph, Group, trace
from rarefy.dependency.symbolic_dims import Axis
from rarefy.lowrank.svd import FactorizeOptions, run_factorize, truncated
from rarefy.model.batches import count_samples, count_tokens, first_samples
from rarefy.model.forward import call, evaluating, temporary_hooks, without_targets
from rarefy.model.layers import Layer, Selector, all_layers, select_layers
from rarefy.model.masks import fold_
from rarefy.model.sparsity_pattern import parse_pattern
from rarefy.pipeline.sensitivity import GROUP, Setting, compressed_weight, replaced_weight
from rarefy.prune.options import PruneOptions
from rarefy.prune.prune import run_prune
from rarefy.quantization.config import DRIFT_CORRECTION, QuantizeOptions
from rarefy.quantization.quantize import run_quantize
from rarefy.search.deploy import distance
from rarefy.structured.compensation import REPAIRS
from rarefy.structured.cut import remove_and_compensate, run_cut
from rarefy.structured.group_selection import modules_of, select_groups
from rarefy.structured.importance import unit_scores
from rarefy.structured.layer_drop import Block, drop_layers_, droppable, skipping
from rarefy.structured.options import CutOptions
from rarefy.structured.surgery import give_own_heads
from rarefy.structured.unit_selection import flops, groups_by_signature, keep_masks

CUTS = ("neuron", "head", "channel")
BLOCK = "layer"  # whole blocks, such as those of a transformer
RANK = "low rank"
PATTERNS = ("1x4", "4x1", "unstructured")
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)  # sparsities
BITS, EIGHT_BITS = "fewer bits", "8 bits"
HEAD_BITS = "fewer bits of the output head"  # timed separately; its parts have the method BITS
BIT_LEVELS = (0.25, 0.375, 0.5)  # fractions of 8 bits that a layer of a decoder saves: 6, 5 and 4 bits
RANK_LEVELS = (0.3, 0.5, 0.7)  # fractions of a layer's weights that its factors save
MAX_CUT = 0.75  # no group loses more than this fraction
CHOICES = 24  # amounts of a group, about
SAMPLES, WORK = 32, 1.5e11  # for losses: at most so many samples, and tokens times weights; at least two samples
PROBE = 0.3  # fraction of a group that is removed to measure its loss
SOLVER: Mapping[str, Any] = {"name": "obs", "asymmetric": DRIFT_CORRECTION}  # of fewer than 8 bits
MIN_SAVING = 0.03  # a method that saves less of a call's time at its largest amount in all layers is left out
CUT_SCORES = ("obs", "fluctuation", "magnitude")  # the first that the groups support


@dataclass(frozen=True)
class Part:
    """A part of a model, and what an amount of a method does to it.

    Attributes:
        method: neuron, head, channel or layer (removed), a pattern (pruned), "low rank", or "fewer bits".
        name: of the group, block or layer.
        size: units of the group, weights of the layer, or 1 for a block.
        amounts: fractions that may be removed or pruned, rising; of a block 1.
        losses: predicted loss of each amount.
        savings: by name of what is timed, the part of the call's time that each amount saves.
    """

    method: str
    name: str
    size: int
    amounts: tuple[float, ...]
    losses: tuple[float, ...]
    savings: Mapping[str, tuple[float, ...]]

    @property
    def key(self) -> tuple[str, str]:
        """Return the method and the name, which no other part shares."""
        return self.method, self.name

    def units_left(self, amount: float) -> int:
        """Return the units that stay at an amount."""
        return self.size - round(self.size * amount)


Key = tuple[str, str]  # of a part: its method and name
Amounts = Mapping[Key, float]  # by Part.key; what is missing is left as it is


# ---- groups of units -----------------------------------------------------------------------------------------------


def step_of(size: int, method: str) -> int:
    """Return the number of units that are removed at once, so that about CHOICES amounts result."""
    if method == "head":
        return 1
    for step in (256, 128, 64, 32, 16, 8, 4, 2):
        if size % step == 0 and size / step >= 6:
            return step if size / step <= 2 * CHOICES else step * round(size / step / CHOICES)
    return 1


def group_amounts(size: int, method: str) -> tuple[float, ...]:
    """Return the fractions of a group that may be removed."""
    step = step_of(size, method)
    return tuple(n / size for n in range(step, int(size * MAX_CUT) + 1, step))


def cuttable_groups(
    model: nn.Module, graph: Graph, method: str, layers: Selector, ignore: Selector
) -> tuple[Group, ...]:
    """Return the groups of a kind that can lose units.

    Units that a norm averages over, of which the group has a note, are left out: the width of a transformer. Each unit
    that goes changes what the norm makes of all others, in every block, and only training wins that back. So are those
    that an ignored layer reads: it would lose inputs.
    """
    try:
        groups = select_groups(model, graph, (method,), layers, ignore)
    except RarefyError:
        return ()
    if ignore:
        ignored = modules_of(model, ignore)
        groups = [g for g in groups if not any(id(m) in ignored for n in g.members for m, _ in graph.owners[n.name])]
    return tuple(g for g in groups if group_amounts(g.size, method) and not g.notes)


def cut_score(model: nn.Module, example: Any, groups: Sequence[Group], data: Sequence[Any], method: str) -> str:
    """Return the first score that these groups support; each that reads data only where there is some.

    One group of each structure is tried, the smallest.
    """
    kinds = groups_by_signature(groups)
    counts = {g.name: g.size - 1 for g in (min(same, key=lambda g: g.size) for same in kinds)}
    for score in CUT_SCORES if data else CUT_SCORES[-1:]:
        try:
            options = CutOptions(units=(method,), counts=counts, score=score)
            run_cut(copy.deepcopy(model), example, options, few_samples(data, 2) or None, dry_run=True)
        except RarefyError:
            continue
        return score
    return ""


def removal_scores(
    model: nn.Module, graph: Graph, groups: Sequence[Group], score: str, data: Sequence[Any]
) -> dict[Axis, torch.Tensor]:
    """Return the importance of the units of groups, as far as they may be removed.

    Of a group whose units no layer reads that the score observes, such as transposed convolutions, the weights count.
    """
    removed = {g.axis: int(g.size * MAX_CUT) + 1 for g in groups}
    try:
        return unit_scores(model, graph, groups, score, data=data or None, removed=removed)
    except RarefyError:
        if len(groups) == 1:
            return unit_scores(model, graph, groups, "magnitude")
        return {axis: s for g in groups for axis, s in removal_scores(model, graph, [g], score, data).items()}


def local_errors(scores: torch.Tensor, score: str) -> list[float]:
    """Return the error of a group's consumers after its n cheapest units are gone, n = 1 to all.

    With obs it is that of refitted weights. Other scores have no such error: that of a square is taken, as for units
    that are removed in a random order.
    """
    if score == "obs":
        return scores.sort().values.tolist()
    return [(n / len(scores)) ** 2 for n in range(1, len(scores) + 1)]


def measured_group_loss(
    model: nn.Module, example: Any, group: Group, scores: torch.Tensor, removed: int, data: Sequence[Any], wanted: Any
) -> float | None:
    """Return the loss where one group, of the model or of a copy, loses so many units and the others compensate."""
    smaller = copy.deepcopy(model)
    if "head" in group.kind:  # torch's attention computes the size of a head from the width
        give_own_heads(smaller)
    graph = trace(smaller, example)
    group = next(g for g in graph.groups if (g.name, g.kind) == (group.name, group.kind))
    masks = keep_masks({group.axis: scores}, {group.axis: group.size - removed})
    remove_and_compensate(smaller, example, graph, masks, REPAIRS, data)
    return distance(smaller, wanted, data)


def shares_of_groups(graph: Graph, groups: Sequence[Group]) -> dict[str, float]:
    """Return the part of the operations saved by halving all groups that each one saves."""
    whole = flops(graph, {})
    saved = {g.name: whole - flops(graph, {g.axis: g.size - g.size // 2}) for g in groups}
    total = max(sum(saved.values()), 1)
    return {name: s / total for name, s in saved.items()}


# ---- whole blocks --------------------------------------------------------------------------------------------------


def removable_blocks(model: nn.Module, example: Any, layers: Selector, ignore: Selector) -> list[Block]:
    """Return the blocks that can go as a whole: the rest fits without them, and all their layers may change."""
    try:
        blocks = droppable(model, example)
    except RarefyError:
        return []
    if layers is None and ignore is None:
        return blocks
    stay = {l.full_name for l in all_layers(model)} - {l.full_name for l in select_layers(model, layers, ignore)}
    return [b for b in blocks if not any(name.startswith(f"{b.name}.") for name in stay)]


def without_blocks(model: nn.Module, example: Any, blocks: Sequence[Block]) -> nn.Module:
    """Return a copy of the model without some of its blocks."""
    smaller = copy.deepcopy(model)
    drop_layers_(smaller, example, layers=[b.name for b in blocks], score="random")
    return smaller


def measured_block_loss(model: nn.Module, block: Block, data: Sequence[Any], wanted: Any) -> float | None:
    """Return the loss where a block returns its input."""
    with skipping([block]):
        return distance(model, wanted, data)


def shares_of_blocks(blocks: Sequence[Block], shares: Mapping[str, float]) -> dict[str, float]:
    """Return each block's part of the multiply-adds, from those of its layers."""
    return {b.name: sum(s for name, s in shares.items() if name.startswith(f"{b.name}.")) for b in blocks}


# ---- weights of layers ---------------------------------------------------------------------------------------------


def shares_of_layers(model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, float]:
    """Return each layer's part of the multiply-adds of all of them in a call."""
    if len(layers) == 1:  # the weight may be read as an embedding
        return {layers[0].full_name: 1.0}
    positions: dict[str, int] = {}

    def hook(name: str, outputs: int) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any, out: Any) -> None:
            calls = out.numel() // outputs if isinstance(out, torch.Tensor) else 1
            positions[name] = positions.get(name, 0) + calls

        return count

    handles = [l.module.register_forward_hook(hook(l.full_name, len(l.weight))) for l in layers]
    with temporary_hooks(handles), evaluating(model), torch.no_grad():
        call(model, without_targets(example))
    work = {l.full_name: l.weight.numel() * positions.get(l.full_name, 0) for l in layers}
    total = max(sum(work.values()), 1)
    return {name: w / total for name, w in work.items()}


def measured_rank_loss(
    model: nn.Module, layer: Layer, level: float, stats: Mapping[str, LayerStats], data: Any, wanted: Any
) -> float | None:
    """Return the loss where one Linear layer alone is factorized."""
    with replaced_weight(layer, factorized_weight(layer, level, stats)):
        return distance(model, wanted, data)


def factorized_weight(layer: Layer, level: float, stats: Mapping[str, LayerStats]) -> torch.Tensor:
    """Return the product of a Linear layer's factors, with each input weighted by its size in the data."""
    weight = layer.weight.detach().float()
    scale = torch.ones(weight.shape[1], dtype=torch.float32)
    if layer.full_name in stats and stats[layer.full_name].in_square is not None:
        scale = stats[layer.full_name].in_norm.flatten().float().clamp_min(1e-6)
    rank = max(1, int((1 - level) * weight.numel() / sum(weight.shape)))
    a, b, _ = truncated(weight * scale, None, rank)
    return a @ b / scale


def setting_of(method: str, amount: float) -> Setting:
    """Return a layer's setting: zeros in a pattern, or fewer bits."""
    return Setting(bits=bits_at(amount)) if method == BITS else Setting(parse_pattern(method), amount)


def bits_at(amount: float) -> int:
    """Return the bits of weights that save a fraction of 8 bits.

    >>> [bits_at(amount) for amount in BIT_LEVELS]
    [6, 5, 4]
    """
    return round(8 * (1 - amount))


def rounding_error(layer: Layer, level: float) -> float:
    """Return the squared error of a layer's weights where they are rounded to the bits of a level."""
    weight = layer.weight.detach().float()
    return float((compressed_weight(layer, setting_of(BITS, level), {}, "magnitude") - weight).square().sum())


def measured_layer_loss(
    model: nn.Module, layer: Layer, setting: Setting, stats: dict[str, LayerStats], score: str, data: Any, wanted: Any
) -> float | None:
    """Return the loss where one layer alone is pruned by a score, or rounded; no other weights move."""
    with replaced_weight(layer, compressed_weight(layer, setting, stats, score)):
        return distance(model, wanted, data)


def prune_quickly_(model: nn.Module, pattern: str, layers: Sequence[str], sparsity: float) -> None:
    """Prune layers in place by the size of their weights, to time the model."""
    run_prune(model, PruneOptions(pattern=pattern, per_layer=dict.fromkeys(layers, sparsity)))
    fold_(model)


def factorize_(model: nn.Module, layers: Sequence[str], level: float) -> None:
    """Replace layers in place by factors that save a fraction of their weights, to time the model."""
    run_factorize(model, FactorizeOptions(keep=1 - level, layers=tuple(layers)))


def quantize_(model: nn.Module, layers: Sequence[str], level: float, data: Sequence[Any] = ()) -> None:
    """Round layers to the bits of a level in place: by `SOLVER` on data, or without any to the nearest."""
    solver = SOLVER if data else "rtn"
    options = QuantizeOptions(weights=f"int{bits_at(level)}", group=GROUP, layers=tuple(layers), solver=solver)
    run_quantize(model, options, data or None)


def chosen_layers(model: nn.Module, method: str, layers: Selector, ignore: Selector) -> list[Layer]:
    """Return the layers whose weights a method may change; none where all of them stay."""
    try:
        every = select_layers(model, "*" if method == HEAD_BITS and layers is None else layers, ignore)
    except ModelError:
        return []
    if method == HEAD_BITS:
        return [l for l in every if l.is_output_head and any(isinstance(m, nn.Linear) for _, m, _ in l.owners)]
    kinds = (nn.Linear,) if method in (BITS, RANK) else (nn.Linear, nn.Conv2d)
    chosen = [l for l in every if isinstance(l.module, kinds) and len(l.owners) == 1]
    return [l for l in chosen if method != BITS or not l.is_output_head]


def few_samples(data: Sequence[Any], samples: int = SAMPLES, tokens: float = float("inf")) -> list[Any]:
    """Return the first samples of data, in batches: at most so many, and about so many tokens, but at least two."""
    chosen, count, used = [], 0, 0
    for batch in data:
        each = count_tokens(batch) / max(count_samples(batch), 1)
        room = int(min((tokens - used) / max(each, 1), samples))
        more = min(samples - count, count_samples(batch), max(room, 2 - count))
        if more <= 0:
            break
        chosen.append(first_samples(batch, more))
        count, used = count + more, used + more * each
    return chosen


def filled(values: Mapping[str, float | None], names: Sequence[str]) -> dict[str, float]:
    """Return a value for each name: where none was measured, the geometric mean of those of the same kind, or else
    of all; nothing where there is none. Names with None, which cannot be used, are left out."""
    if not any(v is not None for v in values.values()):
        return {}
    logs = {n: math.log(max(v, 1e-30)) for n, v in values.items() if v is not None}
    by_kind: dict[str, list[float]] = {}
    for name, log in logs.items():
        by_kind.setdefault(kind_of(name), []).append(log)

    def mean(name: str) -> float:
        alike = by_kind.get(kind_of(name), [*logs.values()])
        return math.exp(sum(alike) / len(alike))

    with_mean = {n: values[n] if n in values else mean(n) for n in names}
    return {n: v for n, v in with_mean.items() if v is not None}


def kind_of(name: str) -> str:
    """Return what names of the same layers of different blocks have in common.

    >>> kind_of("layers.3.mlp.up"), kind_of("blocks.0.fc1")
    ('layers.*.mlp.up', 'blocks.*.fc1')
    """
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)
