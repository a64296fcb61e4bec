"""Measure what may be done to a model: its parts with their predicted losses and the time that they save."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import RarefyError
from rarefy.common.progress import track
from rarefy.dependency.graph import Graph, Group, trace
from rarefy.model import hf
from rarefy.model.layers import Layer, Selector, all_layers
from rarefy.prune.prune import calibrate
from rarefy.search import space
from rarefy.search.deploy import Deployed, deploy, outputs_of, times_of
from rarefy.search.journal import Journal
from rarefy.search.solve import line, mean_savings
from rarefy.search.space import BITS, BLOCK, CUTS, LEVELS, PATTERNS, PROBE, RANK, RANK_LEVELS, Part
from rarefy.structured.cut import run_cut
from rarefy.structured.layer_drop import Block
from rarefy.structured.options import CutOptions

PROBE_LEVELS = (0.5, 0.9)  # sparsities at which losses are measured
TIMED_LEVELS = (0.5, 0.7, 0.9)  # sparsities at which times are measured; between them they are interpolated
CHEAP = 2.0  # a layer is not factorized where that costs so many times the loss of the cheapest other part


class PartMeasurer:
    """Measures the parts of a model in one precision of the engine.

    Args:
        dense: the model.
        example: what it can be called with.
        data: calibration batches; may be empty.
        precision: of the engine.
        names: what is timed (`deploy.timed_names`).
        journal: keeps what was measured.
        layers: selectors of layers; by default all but embeddings and head.
        ignore: selectors of layers to leave as they are.
        has_time: whether there is time for another measurement; parts that are not measured take the mean of others.
        progress: show progress bars.
    """

    def __init__(
        self,
        dense: nn.Module,
        example: Any,
        data: Sequence[Any],
        precision: str | None,
        names: Sequence[str],
        journal: Journal,
        layers: Selector,
        ignore: Selector,
        has_time: Callable[[], bool],
        progress: bool,
    ):
        self.dense, self.example, self.data, self.precision, self.names = dense, example, data, precision, names
        self.journal, self.layers, self.ignore, self.has_time = journal, layers, ignore, has_time
        self.progress = progress
        weights = sum(p.numel() for p in dense.parameters())
        self.few = space.few_samples(data, tokens=space.WORK / max(weights, 1)) if data else [example]
        self.wanted: list[Any] = []
        self.stats: dict[str, LayerStats] = {}
        self.deployed: Deployed | None = None  # the dense model in this precision

    def measure(self) -> list[Part]:
        """Return all parts that save time, of all methods."""
        result: list[Part] = []
        graph = trace(self.dense, self.example)
        for method in CUTS:
            result += self._groups(graph, method)
        result += self._blocks()
        for method in (BITS,) if hf.is_causal_lm(self.dense) else PATTERNS:
            result += self._weights(method)
        return result + self._low_rank(result)

    # ---- groups ------------------------------------------------------------------------------------------------

    def _groups(self, graph: Graph, method: str) -> list[Part]:
        groups = space.cuttable_groups(self.dense, graph, method, self.layers, self.ignore)
        if not groups:
            return []
        data = self.few if self.data else []
        score = self.journal.get(
            f"score of {method}", lambda: space.cut_score(self.dense, self.example, groups, data, method)
        )
        if not score:
            return []
        saved = self.journal.get(f"time of {method} {self.precision}", lambda: self._time_of_cut(groups, method))
        if max(saved.values()) * space.MAX_CUT / 0.5 < space.MIN_SAVING:
            return []
        scored = cache(lambda: space.removal_scores(self.dense, graph, groups, score, data))
        errors = self.journal.get(f"errors of {method}", lambda: space.local_errors(scored(), score))
        losses = self._group_losses(groups, method, scored, errors)
        shares = space.shares_of_groups(graph, groups)
        return [self._group_part(g, method, errors[g.name], losses[g.name], saved, shares[g.name]) for g in groups]

    def _time_of_cut(self, groups: Sequence[Group], method: str) -> dict[str, float]:
        """Return the part of a call's time that is saved where all groups lose half of their units."""
        smaller = copy.deepcopy(self.dense)
        counts = {g.name: g.size - g.size // 2 for g in groups}
        try:
            run_cut(smaller, self.example, CutOptions(units=(method,), counts=counts, score="magnitude", repair=False))
            return self._saved_by(smaller)
        except RarefyError:
            return dict.fromkeys(self.names, 0.0)

    def _group_losses(
        self, groups: Sequence[Group], method: str, scored: Callable[[], Any], errors: Mapping[str, list[float]]
    ) -> dict[str, float]:
        """Return the factor from each group's own error to the loss of the outputs."""
        factors: dict[str, float] = {}
        for g in track(groups, f"losses of {method}s", self.progress, len(groups)):
            removed = max(1, round(g.size * PROBE))
            key = f"loss of {method} {g.name}"
            if key not in self.journal.values and not self.has_time():
                continue
            loss = self.journal.get(key, lambda g=g, n=removed: self._group_loss(g, scored()[g.name], n))
            if loss is not None:
                factors[g.name] = loss / max(errors[g.name][removed - 1], 1e-30)
        return space.filled(factors, [g.name for g in groups])

    def _group_loss(self, group: Group, scores: Any, removed: int) -> float | None:
        try:
            return space.measured_group_loss(
                self.dense, self.example, group.name, scores, removed, self.few, self._wanted()
            )
        except RarefyError:
            return None

    def _group_part(
        self, group: Group, method: str, errors: list[float], factor: float, saved: Mapping[str, float], share: float
    ) -> Part:
        amounts = space.group_amounts(group.size, method)
        losses = tuple(factor * errors[round(a * group.size) - 1] for a in amounts)
        savings = {n: tuple(a / 0.5 * s * share for a in amounts) for n, s in saved.items()}
        return Part(method, group.name, group.size, amounts, losses, savings)

    # ---- whole blocks ------------------------------------------------------------------------------------------

    def _blocks(self) -> list[Part]:
        """Return the blocks that can be left out; one of each list stays."""
        blocks = space.removable_blocks(self.dense, self.example, self.layers, self.ignore)
        lists = [b.stack for b in blocks]
        blocks = [b for b in blocks if lists.count(b.stack) > 1]
        if not blocks:
            return []
        shares = space.shares_of_blocks(
            blocks, space.shares_of_layers(self.dense, all_layers(self.dense), self.example)
        )
        timed = [b for i, b in enumerate(blocks) if i and b.stack == blocks[i - 1].stack][::2]
        share = max(sum(shares[b.name] for b in timed), 1e-9)
        saved = self.journal.get(f"time of {BLOCK} {self.precision}", lambda: self._time_of_blocks(timed))
        if max(saved.values()) < space.MIN_SAVING:
            return []
        losses: dict[str, float] = {}
        for block in track(blocks, "losses of layers", self.progress, len(blocks)):
            key = f"loss of {BLOCK} {block.name}"
            if key in self.journal.values or self.has_time():
                loss = self.journal.get(key, lambda b=block: self._block_loss(b))
                blocks = blocks if loss is not None else [b for b in blocks if b is not block]
                losses |= {} if loss is None else {block.name: loss}
        losses = space.filled(losses, [b.name for b in blocks])
        savings = {b.name: {n: (s * shares[b.name] / share,) for n, s in saved.items()} for b in blocks}
        return [Part(BLOCK, b.name, 1, (1.0,), (losses[b.name],), savings[b.name]) for b in blocks]

    def _block_loss(self, block: Block) -> float | None:
        """Return the loss without a block; None where the outputs are no numbers."""
        try:
            return space.measured_block_loss(self.dense, block, self.few, self._wanted())
        except RarefyError:
            return None

    def _time_of_blocks(self, blocks: Sequence[Block]) -> dict[str, float]:
        """Return the part of a call's time that is saved without these blocks."""
        try:
            return self._saved_by(space.without_blocks(self.dense, self.example, blocks))
        except RarefyError:
            return dict.fromkeys(self.names, 0.0)

    # ---- weights -----------------------------------------------------------------------------------------------

    def _weights(self, method: str) -> list[Part]:
        layers = space.chosen_layers(self.dense, method, self.layers, self.ignore)
        if not layers:
            return []
        levels, timed = ((1.0,), (1.0,)) if method == BITS else (PROBE_LEVELS, TIMED_LEVELS)
        saved = self._times_of_weights(layers, method, timed)
        if not saved:
            return []
        shares = space.shares_of_layers(self.dense, layers, self.example)
        losses = {level: self._layer_losses(layers, method, level) for level in levels}
        return [
            self._weight_part(l, method, {v: losses[v][l.full_name] for v in levels}, saved, shares[l.full_name])
            for l in layers
            if losses[levels[-1]][l.full_name] > 0  # else no output reads it, and no time is saved
        ]

    def _times_of_weights(
        self, layers: Sequence[Layer], method: str, levels: Sequence[float]
    ) -> dict[float, dict[str, float]]:
        """Return what all layers save at each level; nothing where that is little at the largest."""
        saved: dict[float, dict[str, float]] = {}
        for level in reversed(levels):
            key = f"time of {method} {level} {self.precision}"
            saved[level] = self.journal.get(key, lambda v=level: self._time_of_weights(layers, method, v))
            if level == levels[-1] and max(saved[level].values()) < space.MIN_SAVING:
                return {}
        return saved

    def _time_of_weights(self, layers: Sequence[Layer], method: str, level: float) -> dict[str, float]:
        """Return the part of a call's time that is saved where all layers are pruned to a level, or quantized."""
        smaller = copy.deepcopy(self.dense)
        try:
            names = [l.full_name for l in layers]
            if method == BITS:
                space.quantize_(smaller, names)
            elif method == RANK:
                space.factorize_(smaller, names, level)
            else:
                space.prune_quickly_(smaller, method, names, level)
            return self._saved_by(smaller)
        except RarefyError:
            return dict.fromkeys(self.names, 0.0)

    def _layer_losses(self, layers: Sequence[Layer], method: str, level: float) -> dict[str, float]:
        score = "wanda" if self.data else "magnitude"
        setting, losses = space.setting_of(method, level), dict[str, float]()
        for layer in track(layers, f"losses of {method} {level:g}", self.progress, len(layers)):
            name = layer.full_name
            key = f"loss of {method} {level} {name}"
            if key not in self.journal.values and not self.has_time():
                continue
            losses[name] = self.journal.get(
                key,
                lambda l=layer: space.measured_layer_loss(
                    self.dense, l, setting, self._stats(layers, method, score), score, self.few, self._wanted()
                ),
            )
        return space.filled(losses, [l.full_name for l in layers])

    def _weight_part(
        self, layer: Layer, method: str, losses: Mapping[float, float], saved: Mapping[float, Any], share: float
    ) -> Part:
        if method == BITS:
            savings = {n: (s * share,) for n, s in saved[1.0].items()}
            return Part(method, layer.full_name, layer.weight.numel(), (1.0,), (losses[1.0],), savings)
        low, high = PROBE_LEVELS
        power = math.log(max(losses[high], 1e-30) / max(losses[low], 1e-30)) / math.log(high / low)
        predicted = tuple(losses[low] * (a / low) ** max(power, 1.0) for a in LEVELS)
        savings = {
            n: tuple(share * line([(v, saved[v][n]) for v in TIMED_LEVELS], a) for a in LEVELS) for n in saved[low]
        }
        return Part(method, layer.full_name, layer.weight.numel(), LEVELS, predicted, savings)

    def _low_rank(self, others: Sequence[Part]) -> list[Part]:
        """Return the layers that can be factorized; none where others cost far less for the same time."""
        layers = space.chosen_layers(self.dense, RANK, self.layers, self.ignore)
        saved = self._times_of_weights(layers, RANK, RANK_LEVELS) if layers else {}
        if not saved:
            return []
        shares = space.shares_of_layers(self.dense, layers, self.example)
        score = "wanda" if self.data else "magnitude"
        first = RANK_LEVELS[0]
        limit = CHEAP * min((p.losses[0] / max(mean_savings(p)[0], 1e-9) for p in others), default=math.inf)
        losses: dict[float, dict[str, float]] = {level: {} for level in RANK_LEVELS}
        mean_saved = sum(saved[first].values()) / len(saved[first])
        for layer in track(layers, "losses of low rank", self.progress, len(layers)):
            name = layer.full_name
            for level in RANK_LEVELS:
                key = f"loss of {RANK} {level} {name}"
                if key not in self.journal.values and not self.has_time():
                    continue
                losses[level][name] = self.journal.get(
                    key,
                    lambda l=layer, v=level: space.measured_rank_loss(
                        self.dense, l, v, self._stats(layers, RANK, score), self.few, self._wanted()
                    ),
                )
                if losses[level][name] > limit * max(mean_saved * shares[name], 1e-9):
                    break  # the higher levels of this layer cost even more
        usable = [
            l for l in layers if losses[first].get(l.full_name, 0.0) > 0 and l.full_name in losses[RANK_LEVELS[-1]]
        ]
        return [
            Part(
                RANK, l.full_name, l.weight.numel(), RANK_LEVELS,
                tuple(losses[level][l.full_name] for level in RANK_LEVELS),
                {n: tuple(shares[l.full_name] * saved[level][n] for level in RANK_LEVELS) for n in self.names},
            )
            for l in usable
        ]  # fmt: skip

    # ---- shared ------------------------------------------------------------------------------------------------

    def _stats(self, layers: Sequence[Layer], method: str, score: str) -> dict[str, LayerStats]:
        """Return what the score reads of the inputs of these layers, the same for all patterns; nothing for bits."""
        if not self.stats and method != BITS:
            self.stats = calibrate(self.dense, layers, score, self.few, None, 0)
        return self.stats

    def _wanted(self) -> list[Any]:
        """Return the dense model's outputs on the few samples."""
        if not self.wanted:
            self.wanted = outputs_of(self.dense, self.few)
        return self.wanted

    def _saved_by(self, smaller: nn.Module) -> dict[str, float]:
        """Return the part of a call's time that a smaller model saves, in turns with the dense one."""
        if self.deployed is None:
            self.deployed = deploy(self.dense, self.example, self.precision, self.few)
        models = {"dense": self.deployed, "smaller": deploy(smaller, self.example, self.precision, self.few)}
        times = times_of(models, self.example, self.names, self.dense)
        return {n: 1 - t["smaller"]["median"] / t["dense"]["median"] for n, t in times.items()}
