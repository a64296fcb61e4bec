"""Loss of each layer alone at each sparsity, pattern and number of bits: which layers bear compression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import DataError, PatternError, unknown
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.evaluation.quality import RANKED, Metric, metric_of
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, Selector, select_layers
from rarefy.model.masks import effective_weight
from rarefy.model.quant_grid import BITS, scale_shape
from rarefy.model.sparsity_pattern import Pattern, check_sparsity, parse_pattern
from rarefy.prune.options import default_scope
from rarefy.prune.prune import calibrate, check_weights, choose_masks, refuse_impossible
from rarefy.prune.scores import SCORES
from rarefy.quantization.config import QuantizeConfig
from rarefy.quantization.grids import fit_grid

GROUP = 32  # inputs that share a scale of fewer than 8 bits, where it divides the inputs


@dataclass(frozen=True)
class Setting:
    """One way to compress a layer: zeros in a pattern, or weights of few bits."""

    pattern: Pattern | None = None
    sparsity: float = 0.0
    bits: int | None = None

    @property
    def label(self) -> str:
        """Return the heading of its column."""
        if self.pattern is None:
            return f"{self.bits} bits"
        return str(self.pattern) if self.pattern.kind == "nm" else f"{self.pattern} {100 * self.sparsity:g} %"


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    patterns: Sequence[str] = ("unstructured", "2:4"),
    sparsities: Sequence[float] = (0.5, 0.75),
    bits: Sequence[int] = (8, 4),
    layers: Selector = None,
    ignore: Selector = None,
    metric: str | Callable[[Any], float] | Metric = "distance",
    score: str = "wanda",
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Return how much quality is lost when each layer alone is pruned or quantized, at each setting.

    The model is left bit for bit as it was, also after an interrupt. Weights are not refitted: solvers lose less, but
    layers compare alike. The cost is one measurement for each layer and setting.

    Args:
        model: any module with Linear, Conv, Embedding or MultiheadAttention layers.
        data: batches that `model` can be called with, a few are enough; pairs of them for the metric "retrieval".
        patterns: where zeros may be, as in `prune_`: "unstructured", "2:4", "4x1". N:M patterns fix their sparsity.
        sparsities: fractions of zeros to try with all other patterns.
        bits: numbers of bits to try, 2 to 8, by rounding to the nearest; fewer than 8 with a scale for 32 inputs
            where that divides them.
        layers: names, globs or other selectors of layers; by default all but embeddings and the output head.
        ignore: selectors of layers to leave out.
        metric: what is measured: "distance", the mean squared relative distance of the outputs, or another metric of
            `rarefy.evaluation.quality.metric_of`, by name or as a function of the model whose higher numbers are
            better. The loss is then how much worse it gets, in points.
        score: how weights are ranked, as in `prune_`; "magnitude" reads no data.
        seed: of random scores.
        progress: show a progress bar.

    Returns:
        A row for each layer and setting: layer, shape, weights, pattern, sparsity, bits and loss. The loss is None
        where the setting does not fit the layer. Printed, it has a row for each layer and a column for each setting.

    Raises:
        RarefyError: for options, layers, data or a metric that do not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> report = sensitivity(net, [torch.randn(16, 32)], patterns=["unstructured"], sparsities=[0.5], bits=[8])
        >>> [(row["layer"], row["sparsity"], row["bits"]) for row in report.rows]
        [('0', 0.5, None), ('0', None, 8), ('2', 0.5, None), ('2', None, 8)]
    """
    settings = _settings(patterns, sparsities, bits)
    if score not in SCORES:
        raise PatternError(unknown("score", score, SCORES))
    check_batches(data)
    batches = list(data)
    if not batches:
        raise DataError("sensitivity needs at least one batch of data")
    chosen = select_layers(model, layers, ignore)
    check_weights(chosen)
    measured = metric_of(metric, model, batches)
    dense = measured.measure(model)
    stats = calibrate(model, chosen, score, _inputs(batches, metric), None, seed)
    sign = -1.0 if measured.higher_is_better else 1.0
    rows, notes = [], dict[str, None]()
    todo = [(layer, setting) for layer in chosen for setting in settings]
    for layer, setting in track(todo, "measuring layers", progress):
        loss = None
        try:
            weight = compressed_weight(layer, setting, stats, score)
        except PatternError as error:
            notes[f"{layer.full_name} was not measured at {setting.label}: {error}"] = None
        else:
            with replaced_weight(layer, weight):
                loss = sign * (measured.measure(model) - dense)
        rows.append(_row(layer, setting, loss))
    summary = {"metric": measured.name, "of the dense model": dense}
    return Report("sensitivity", tuple(rows), summary, tuple(notes), wide_rows(rows))


def _settings(patterns: Sequence[str], sparsities: Sequence[float], bits: Sequence[int]) -> list[Setting]:
    """Return all settings, each once, in the order of the arguments."""
    if isinstance(patterns, str):
        raise PatternError(f"patterns: expected a list, got {patterns!r}: give [{patterns!r}]")
    for name, numbers in (("sparsities", sparsities), ("bits", bits)):
        if not isinstance(numbers, Iterable):
            raise PatternError(f"{name}: expected a list, got {numbers!r}: give [{numbers!r}]")
    settings = list[Setting]()
    for pattern in map(parse_pattern, patterns):
        wanted = (None,) if pattern.kind == "nm" else tuple(sparsities)
        settings += [Setting(pattern, check_sparsity(pattern, sparsity, None)[0]) for sparsity in wanted]
    for number in bits:
        if isinstance(number, bool) or number not in BITS:
            raise PatternError(f"bits: expected numbers from {BITS[0]} to {BITS[-1]}, got {number!r}")
        settings.append(Setting(bits=int(number)))
    settings = list(dict.fromkeys(settings))
    if not settings:
        raise PatternError("there is nothing to measure: give patterns with sparsities, or bits")
    return settings


def _inputs(batches: list[Any], metric: Any) -> list[Any]:
    """Return batches that the model can be called with: both sides of pairs for retrieval."""
    pairs = isinstance(metric, str) and metric.split("@")[0] in RANKED
    return [side for pair in batches for side in pair] if pairs else batches


@torch.no_grad()
def compressed_weight(layer: Layer, setting: Setting, stats: dict[str, LayerStats], score: str) -> Tensor:
    """Return a layer's weight at a setting, in its stored shape; PatternError where the setting does not fit it."""
    weight = effective_weight(layer)
    if setting.pattern is not None:
        refuse_impossible([layer], setting.pattern)
        scope = default_scope(setting.pattern, score) or "layer"
        scope = "layer" if scope == "global" else scope
        [mask] = choose_masks([layer], stats, setting.pattern, score, setting.sparsity, scope)
        return weight * mask
    assert setting.bits is not None
    grouped = setting.bits < 8 and layer.layout.shape[3] % GROUP == 0
    config = QuantizeConfig(setting.bits, GROUP if grouped else None, fit="minmax" if setting.bits == 8 else "mse")
    return fit_grid(weight, scale_shape(layer, config.group), config).snap(weight)


def replaced_weight(layer: Layer, weight: Tensor) -> AbstractContextManager[None]:
    """Give a layer another weight for a while."""
    return replaced({layer.original: weight})


@contextmanager
def replaced(changed: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give parameters other values for a while. The dense tensors themselves come back, so that no bit can change."""
    dense = {parameter: parameter.data for parameter in changed}
    try:
        for parameter, value in changed.items():
            parameter.data = value.to(parameter.dtype)
        yield
    finally:
        for parameter, value in dense.items():
            parameter.data = value


def _row(layer: Layer, setting: Setting, loss: float | None) -> dict[str, Any]:
    pruned = setting.pattern is not None
    return {
        "layer": layer.full_name,
        "shape": "x".join(map(str, layer.original.shape)),
        "weights": layer.original.numel(),
        "pattern": str(setting.pattern) if pruned else None,
        "sparsity": setting.sparsity if pruned else None,
        "bits": setting.bits,
        "loss": loss,
    }


def label_of(row: dict[str, Any]) -> str:
    """Return the heading of a row's setting, such as "unstructured 50 %" or "8 bits"."""
    pattern = None if row["pattern"] is None else parse_pattern(row["pattern"])
    return Setting(pattern, row["sparsity"] or 0.0, row["bits"]).label


def wide_rows(rows: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return one row for each layer, with the losses of its settings side by side, as text of three digits."""
    wide: dict[str, dict[str, Any]] = {}
    for row in rows:
        layer = wide.setdefault(row["layer"], {name: row[name] for name in ("layer", "shape", "weights")})
        layer[label_of(row)] = "-" if row["loss"] is None else f"{row['loss']:.3g}"
    return tuple(wide.values())
