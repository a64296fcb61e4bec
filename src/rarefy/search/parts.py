"""Measure what may be done to a model: its parts with their predicted losses and the time that they save."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import RarefyError
from rarefy.common.progress import track
from rarefy.dependency.graph import Graph, Group, trace
from rarefy.model import hf
from rarefy.model.forward import call, evaluating, without_targets
from rarefy.model.layers import Layer, Selector, all_layers
from rarefy.pipeline.speed import resize_batch
from rarefy.prune.prune import calibrate
from rarefy.search import space
from rarefy.search.deploy import Deployed, Variant, deploy, outputs_of, times_of
from rarefy.search.joint_loss import solver_gain
from rarefy.search.journal import Journal
from rarefy.search.points import short_hash
from rarefy.search.solve import in_spread_order, line, mean_savings
from rarefy.search.space import (
    BIT_LEVELS,
    BITS,
    BLOCK,
    CUTS,
    HEAD_BITS,
    LEVELS,
    PATTERNS,
    PROBE,
    RANK,
    RANK_LEVELS,
    Part,
)
from rarefy.structured.cut import run_cut
from rarefy.structured.layer_drop import Block
from rarefy.structured.options import CutOptions

PROBE_LEVELS = (0.5, 0.9)  # sparsities at which losses are measured
TIMED_LEVELS = (0.5, 0.7, 0.9)  # sparsities at which times are measured; between them they are interpolated
TOKENS = 64  # of a text on which cuts are checked
OF_EACH_KIND = 3  # layers that are factorized first; the others if one of these can be used
GAIN = "gain of the solver that rounds"
CHEAP = 2.0  # a layer is not factorized where that costs so many times the loss of the cheapest other part


class PartMeasurer:
    """Measures the parts of a model in one precision of the engine.

    Args:
        dense: the model.
        example: what it can be called with.
        data: calibration batches; may be empty.
        variant: the precision.
        names: what is timed (`deploy.timed_names`).
        journal: keeps what was measured.
        layers: selectors of layers; by default all but embeddings and head. The head of a language model may get
            fewer bits.
        ignore: selectors of layers to leave as they are.
        fits: whether a step fits into the time, by the kinds of steps that say what it takes, the nearest first.
            Methods that are not timed are left out; parts whose loss is not measured take the mean of others.
        progress: show progress bars.
        begin: is called before losses are measured, with how many parts the time that is left for losses has: this one
            and all that follow.
    """

    def __init__(
        self,
        dense: nn.Module,
        example: Any,
        data: Sequence[Any],
        variant: Variant,
        names: Sequence[str],
        journal: Journal,
        layers: Selector,
        ignore: Selector,
        fits: Callable[..., bool],
        progress: bool,
        begin: Callable[[int], None] = lambda left: None,
    ):
        self.begin, self.methods_left = begin, 1
        self.dense, self.example, self.data, self.variant, self.names = dense, example, data, variant, names
        self.journal, self.layers, self.ignore, self.fits = journal, layers, ignore, fits
        self.progress = progress and journal.processes == 1
        self.few, self.small = few_batches(dense, data, example), small_example(dense, example)
        self.wanted: list[Any] = []
        self.stats: dict[str, LayerStats] = {}
        self.scores: dict[tuple[str, str], Tensor] = {}  # of the units of groups, by kind and name
        self.deployed: Deployed | None = None  # the dense model in this precision

    def measure(self) -> list[Part]:
        """Return all parts that save time, of all methods."""
        result: list[Part] = []
        graph = trace(self.dense, self.example)
        of_weights = (BITS, HEAD_BITS) if hf.is_causal_lm(self.dense) else PATTERNS
        times: dict[str, Callable[[], Any]] = {method: partial(self._timed_groups, graph, method) for method in CUTS}
        times[BLOCK] = self._timed_blocks
        times |= {method: partial(self._timed_layers, method) for method in (*of_weights, RANK)}
        self.journal.prefetch(times.values())
        timed = {method: measure() for method, measure in times.items()}
        methods: list[Callable[[], list[Part]]] = [partial(self._groups, graph, m, *timed[m]) for m in CUTS]
        methods.append(partial(self._blocks, *timed[BLOCK]))
        methods += [partial(self._weights, BITS if m == HEAD_BITS else m, *timed[m]) for m in of_weights]
        methods.append(lambda: self._low_rank(result, *timed[RANK]))
        for i, of_method in enumerate(methods):
            self.methods_left = len(methods) - i
            self.begin(self.methods_left)
            result += of_method()
        return result

    # ---- groups ------------------------------------------------------------------------------------------------

    def _timed_groups(self, graph: Graph, method: str) -> tuple[Sequence[Group], str, dict[str, float]]:
        """Return the groups that can be cut, the score of their units, and what all groups save at half the units."""
        groups = space.cuttable_groups(self.dense, graph, method, self.layers, self.ignore)
        key, data = f"score of {method}", self.few if self.data else []
        if not groups or not self._fits(key, "score of", "point"):
            return [], "", {}
        score = self.journal.get(key, lambda: space.cut_score(self.dense, self.example, groups, data, method))
        return groups, score, self._saved(method, lambda: self._halved(groups, method)) if score else {}

    def _groups(
        self, graph: Graph, method: str, groups: Sequence[Group], score: str, saved: Mapping[str, float]
    ) -> list[Part]:
        if max(saved.values(), default=0.0) * space.MAX_CUT / 0.5 < space.MIN_SAVING:
            return []
        scored = partial(self._scored, graph, score)

        def errors_of(group: Group) -> list[float] | None:
            key = f"errors of {method} {group.name}"
            if not self._fits(key, f"errors of {method}", "errors of", "point"):
                return None
            return self.journal.get(key, lambda: space.local_errors(scored(group), score))

        self.journal.prefetch(partial(errors_of, g) for g in groups)
        measured = {g.name: errors_of(g) for g in track(groups, f"errors of {method}s", self.progress, len(groups))}
        errors = {name: of_group for name, of_group in measured.items() if of_group is not None}
        groups = [g for g in groups if g.name in errors]
        factors = self._group_losses(groups, method, scored, errors)
        shares = space.shares_of_groups(graph, groups)
        return [
            self._group_part(g, method, errors[g.name], factors[g.name], saved, shares[g.name])
            for g in groups
            if g.name in factors
        ]

    def _scored(self, graph: Graph, score: str, group: Group) -> Tensor:
        """Return the importance of a group's units."""
        key = group.kind, group.name
        if key not in self.scores:
            data = self.few if self.data else []
            self.scores[key] = space.removal_scores(self.dense, graph, [group], score, data)[group.axis]
        return self.scores[key]

    def _halved(self, groups: Sequence[Group], method: str) -> nn.Module:
        """Return a copy of the model in which all groups have lost half of their units."""
        smaller = copy.deepcopy(self.dense)
        counts = {g.name: g.size - g.size // 2 for g in groups}
        run_cut(smaller, self.small, CutOptions(units=(method,), counts=counts, score="magnitude", repair=False))
        return smaller

    def _group_losses(
        self, groups: Sequence[Group], method: str, scored: Callable[[Group], Tensor], errors: Mapping[str, list[float]]
    ) -> dict[str, float]:
        """Return the factor from each group's own error to the loss of the outputs."""
        removed = {g.name: max(1, round(g.size * PROBE)) for g in groups}

        def loss(group: Group) -> float | None:
            return space.measured_group_loss(
                self.dense, self.small, group, scored(group), removed[group.name], self.few, self._wanted()
            )

        losses = self._losses(method, {g.name: partial(loss, g) for g in groups}, f"score of {method}")
        factors = {n: l if l is None else l / max(errors[n][removed[n] - 1], 1e-30) for n, l in losses.items()}
        return space.filled(factors, list(removed))

    def _group_part(
        self, group: Group, method: str, errors: list[float], factor: float, saved: Mapping[str, float], share: float
    ) -> Part:
        amounts = space.group_amounts(group.size, method)
        losses = tuple(factor * errors[round(a * group.size) - 1] for a in amounts)
        savings = {n: tuple(a / 0.5 * s * share for a in amounts) for n, s in saved.items()}
        return Part(method, group.name, group.size, amounts, losses, savings)

    # ---- whole blocks ------------------------------------------------------------------------------------------

    def _timed_blocks(self) -> tuple[list[Block], dict[str, dict[str, float]]]:
        """Return the blocks that can be left out, and what each of them saves; one of each list stays."""
        blocks = space.removable_blocks(self.dense, self.small, self.layers, self.ignore)
        lists = [b.stack for b in blocks]
        blocks = [b for b in blocks if lists.count(b.stack) > 1]
        if not blocks:
            return [], {}
        shares = space.shares_of_blocks(
            blocks, space.shares_of_layers(self.dense, all_layers(self.dense), self.example)
        )
        timed = [b for i, b in enumerate(blocks) if i and b.stack == blocks[i - 1].stack][::2]
        share = max(sum(shares[b.name] for b in timed), 1e-9)
        saved = self._saved(BLOCK, lambda: space.without_blocks(self.dense, self.small, timed))
        if max(saved.values(), default=0.0) < space.MIN_SAVING:
            return [], {}
        return blocks, {b.name: {n: s * shares[b.name] / share for n, s in saved.items()} for b in blocks}

    def _blocks(self, blocks: Sequence[Block], saved: Mapping[str, Mapping[str, float]]) -> list[Part]:
        if not blocks:
            return []
        loss = partial(space.measured_block_loss, self.dense, data=self.few, wanted=self._wanted())
        measured = self._losses(BLOCK, {b.name: partial(loss, b) for b in blocks})
        losses = space.filled(measured, [b.name for b in blocks])
        savings = {name: {n: (s,) for n, s in of_block.items()} for name, of_block in saved.items()}
        return [Part(BLOCK, name, 1, (1.0,), (loss,), savings[name]) for name, loss in losses.items()]

    # ---- weights -----------------------------------------------------------------------------------------------

    def _weights(self, method: str, layers: Sequence[Layer], saved: Mapping[float, Mapping[str, float]]) -> list[Part]:
        if not saved:
            return []
        levels = BIT_LEVELS[-1:] if method == BITS else PROBE_LEVELS
        shares = space.shares_of_layers(self.dense, layers, self.example)
        losses: dict[float, dict[str, float]] = {}
        for i, level in enumerate(levels):  # which share the method's time
            self.begin(self.methods_left * (len(levels) - i))
            losses[level] = self._layer_losses(layers, method, level)
        usable = [l for l in layers if all(l.full_name in losses[v] for v in levels)]
        gain = self._solver_gain(usable) if method == BITS else 1.0
        losses[levels[-1]] = {n: loss * gain for n, loss in losses[levels[-1]].items()}
        return [
            self._weight_part(l, method, {v: losses[v][l.full_name] for v in levels}, saved, shares[l.full_name])
            for l in usable
            if losses[levels[-1]][l.full_name] > 0  # else no output reads it, and no time is saved
        ]

    def _timed_layers(self, method: str) -> tuple[list[Layer], dict[float, dict[str, float]]]:
        """Return the layers that a method can change, and what all of them save at each level; nothing where that is
        little at the largest."""
        layers = space.chosen_layers(self.dense, method, self.layers, self.ignore)
        levels = {BITS: BIT_LEVELS, HEAD_BITS: BIT_LEVELS, RANK: RANK_LEVELS}.get(method, TIMED_LEVELS)
        saved: dict[float, dict[str, float]] = {}
        for level in reversed(levels) if layers else ():
            saved[level] = self._saved(method, lambda v=level: self._smaller(layers, method, v), level)
            largest = max(saved[level].values(), default=0.0)
            if largest <= 0 and (method == RANK or not saved[level]):  # not measured, or factors that save nothing
                return [], {}
            if level == levels[-1] and (largest <= 0 or (len(layers) > 1 and largest < space.MIN_SAVING)):
                return [], {}
        return layers, saved

    def _smaller(self, layers: Sequence[Layer], method: str, level: float) -> nn.Module:
        """Return a copy of the model in which all layers are pruned to a level, factorized or quantized."""
        smaller, names = copy.deepcopy(self.dense), [l.full_name for l in layers]
        if method in (BITS, HEAD_BITS):
            space.quantize_(smaller, names, level)
        elif method == RANK:
            space.factorize_(smaller, names, level)
        else:
            space.prune_quickly_(smaller, method, names, level)
        return smaller

    def _layer_losses(self, layers: Sequence[Layer], method: str, level: float) -> dict[str, float]:
        score = "wanda" if self.data else "magnitude"
        setting = space.setting_of(method, level)

        def loss(layer: Layer) -> float | None:
            stats = self._stats(layers, method, score)
            if method != BITS and layer.full_name not in stats:  # no batch reaches it
                return None
            return space.measured_layer_loss(self.dense, layer, setting, stats, score, self.few, self._wanted())

        losses = self._losses(f"{method} {level}", {l.full_name: partial(loss, l) for l in layers})
        return space.filled(losses, [l.full_name for l in layers])

    def _solver_gain(self, layers: Sequence[Layer]) -> float:
        """Return what rounding by the solver loses, in parts of what the nearest values lose; 1 where it is not known.

        It is measured once, of layers of each kind.
        """
        tried = _some_of_each_kind(layers)
        if not (self.data and tried and self._fits(GAIN, GAIN, "point")):
            return 1.0
        measured = partial(solver_gain, self.dense, tried, BIT_LEVELS[-1], self.data)
        return self.journal.get(GAIN, partial(unless_refused, measured)) or 1.0

    def _weight_part(
        self, layer: Layer, method: str, losses: Mapping[float, float], saved: Mapping[float, Any], share: float
    ) -> Part:
        if method == BITS:  # losses are in proportion to what rounding changes
            errors = [space.rounding_error(layer, level) for level in BIT_LEVELS]
            predicted = tuple(losses[BIT_LEVELS[-1]] * e / max(errors[-1], 1e-30) for e in errors)
            savings = {n: tuple(share * saved[level][n] for level in BIT_LEVELS) for n in self.names}
            return Part(method, layer.full_name, layer.weight.numel(), BIT_LEVELS, predicted, savings)
        low, high = PROBE_LEVELS
        lowest = max(losses[low], 1e-30)  # 0 where there are as many zeros already
        power = math.log(max(losses[high], 1e-30) / lowest) / math.log(high / low)
        predicted = tuple(lowest * (a / low) ** max(power, 1.0) for a in LEVELS)
        savings = {
            n: tuple(share * line([(v, saved[v][n]) for v in TIMED_LEVELS], a) for a in LEVELS) for n in saved[low]
        }
        return Part(method, layer.full_name, layer.weight.numel(), LEVELS, predicted, savings)

    def _low_rank(
        self, others: Sequence[Part], layers: Sequence[Layer], saved: Mapping[float, Mapping[str, float]]
    ) -> list[Part]:
        """Return the layers that can be factorized; none where others cost far less for the same time."""
        if not saved:
            return []
        shares = space.shares_of_layers(self.dense, layers, self.example)
        score = "wanda" if self.data else "magnitude"
        limit = CHEAP * min((p.losses[0] / max(mean_savings(p)[0], 1e-9) for p in others), default=math.inf)
        losses: dict[str, list[float | None]] = {}
        mean_saved = sum(saved[RANK_LEVELS[0]].values()) / len(saved[RANK_LEVELS[0]])

        def loss(layer: Layer, level: float) -> float | None:
            stats = self._stats(layers, RANK, score)
            if layer.full_name not in stats:
                return None
            return space.measured_rank_loss(self.dense, layer, level, stats, self.few, self._wanted())

        def measure(layer: Layer) -> list[float | None]:
            name, of_layer = layer.full_name, list[float | None]()
            for level in RANK_LEVELS:
                measured = self._losses(f"{RANK} {level}", {name: partial(loss, layer, level)})
                of_layer.extend(measured.values())
                if (measured.get(name) or 0.0) > limit * max(mean_saved * shares[name], 1e-9):
                    break  # the higher levels of this layer cost even more
            return of_layer

        first = _some_of_each_kind(layers)
        for chosen in (first, [l for l in layers if l not in first]):
            self.journal.prefetch(partial(measure, layer) for layer in chosen)
            for layer in track(chosen, "losses of low rank", self.progress, len(chosen)):
                losses[layer.full_name] = measure(layer)
            if all(len(of_layer) < len(RANK_LEVELS) for of_layer in losses.values()):
                return []  # none of these can be used, and so none of the others
        usable = {n: [v for v in of_layer if v is not None] for n, of_layer in losses.items()}
        return [
            Part(
                RANK, l.full_name, l.weight.numel(), RANK_LEVELS, tuple(usable[l.full_name]),
                {n: tuple(shares[l.full_name] * saved[level][n] for level in RANK_LEVELS) for n in self.names},
            )
            for l in layers
            if len(usable[l.full_name]) == len(RANK_LEVELS) and usable[l.full_name][0] > 0
        ]  # fmt: skip

    # ---- shared ------------------------------------------------------------------------------------------------

    def _fits(self, key: str, *kinds: str) -> bool:
        """Return whether a step is in the journal, or fits into the time."""
        return key in self.journal.values or self.fits(*kinds)

    def _losses(
        self, what: str, measures: Mapping[str, Callable[[], float | None]], like: str = "loss of"
    ) -> dict[str, float | None]:
        """Return the loss of each part that there is time for; None for one that cannot be used. `like` is the kind of
        steps that the first of them may take as long as."""
        fits = lambda kind: self.fits(kind, like, "loss of", "point")  # noqa: E731
        return measured_losses(what, measures, self.journal, fits, self.progress and len(measures) > 1)

    def _saved(self, method: str, smaller: Callable[[], nn.Module], level: float | None = None) -> dict[str, float]:
        """Return the part of a call's time that a smaller model saves: 0 for one that cannot be made, nothing where
        there is no time to measure it."""
        key = " ".join(map(str, ("time of", method, *([] if level is None else [level]), self.variant.name)))
        own = (*self.variant.ignore, *self.variant.per_layer)
        key += f" ({short_hash(repr(own))})" if own else ""
        if not self._fits(key, f"time of {method}", "time of", "point"):
            return {}
        saved = self.journal.get(key, partial(unless_refused, lambda: self._saved_by(smaller())))
        return saved or dict.fromkeys(self.names, 0.0)

    def _stats(self, layers: Sequence[Layer], method: str, score: str) -> dict[str, LayerStats]:
        """Return what the score reads of the inputs of these layers, the same for all patterns; nothing for bits."""
        if not self.stats and method != BITS:
            self.stats = calibrate(self.dense, layers, score, self.few, None, 0, leave_out=True)
        return self.stats

    def _wanted(self) -> list[Any]:
        """Return the dense model's outputs on the few samples."""
        if not self.wanted:
            self.wanted = outputs_of(self.dense, self.few)
        return self.wanted

    def _deploy(self, model: nn.Module) -> Deployed:
        """Return a model as it is deployed, to time it."""
        return deploy(
            model,
            self.example,
            self.variant.precision,
            self.few,
            self.variant.ignore,
            dict(self.variant.per_layer),
            "rtn",
            self.variant.cache_precision,
        )

    def _saved_by(self, smaller: nn.Module) -> dict[str, float]:
        """Return the part of a call's time that a smaller model saves, in turns with the dense one."""
        if self.deployed is None:
            self.deployed = self._deploy(self.dense)
        models = {"dense": self.deployed, "smaller": self._deploy(smaller)}
        times = times_of(models, self.example, self.names)
        return {n: 1 - t["smaller"]["median"] / t["dense"]["median"] for n, t in times.items()}


def measured_losses(
    what: str,
    measures: Mapping[str, Callable[[], float | None]],
    journal: Journal,
    fits: Callable[[str], bool],
    progress: bool,
) -> dict[str, float | None]:
    """Return the loss of each part that there is time for; None for one that cannot be used.

    Args:
        what: is done to the parts.
        measures: by name of the part, what measures it.
        journal: keeps what was measured.
        fits: whether a step of a kind fits into the time.
        progress: show a progress bar.
    """
    losses: dict[str, float | None] = {}

    def measure(name: str) -> None:
        key = f"loss of {what} {name}"
        if key in journal.values or fits(f"loss of {what}"):
            losses[name] = journal.get(key, partial(unless_refused, measures[name]))

    names = in_spread_order([*measures])
    journal.prefetch(partial(measure, name) for name in names)
    for name in track(names, f"losses of {what}", progress and journal.processes == 1, len(measures)):
        measure(name)
    return losses


def _some_of_each_kind(layers: Sequence[Layer]) -> list[Layer]:
    """Return a few layers of each kind, spread over the model."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(space.kind_of(layer.full_name), []).append(layer)
    return [layer for same in kinds.values() for layer in in_spread_order(same)[:OF_EACH_KIND]]


def few_batches(dense: nn.Module, data: Sequence[Any], example: Any) -> list[Any]:
    """Return the batches that losses of parts are measured on: fewer for larger models, the example without data."""
    weights = sum(p.numel() for p in dense.parameters())
    return space.few_samples(data, tokens=space.WORK / max(weights, 1)) if data else [example]


def small_example(dense: nn.Module, example: Any) -> Any:
    """Return an example of two samples, with few tokens of a text: cuts are checked on it in several calls.

    The whole example where the model does not run on that.
    """
    small = resize_batch(without_targets(example), 2)
    mask = small.get("attention_mask") if hasattr(small, "keys") else None
    if hf.is_causal_lm(dense) and hasattr(small, "keys") and (mask is None or bool(mask.all())):
        small = {n: v[:, :TOKENS] if isinstance(v, Tensor) and v.dim() == 2 else v for n, v in small.items()}
    try:
        with evaluating(dense), torch.no_grad():
            call(dense, small)
    except RarefyError:
        return example
    return small


def unless_refused(measure: Callable[[], Any]) -> Any:
    """Return what a measurement gives; None where the model cannot be made, or gives no numbers."""
    try:
        return measure()
    except RarefyError:
        return None
