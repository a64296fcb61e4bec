"""`share_`: all weights of a layer take one of a few values, found by k-means; the first value is zero.

In one dimension the best values are found exactly, by dynamic programming over sorted weights; of large weights over a
histogram, and then by Lloyd's steps on the weights themselves, which only improve. Errors may be weighed by how large
each weight's input is, which is what matters to the layer's outputs (the diagonal of the Gram matrix).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rarefy.calibration.statistics import collect_stats
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.common.options import Names, Options
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.formats.quantized_encodings import sizes
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, Selector, select_layers
from rarefy.model.masks import check_maskable
from rarefy.model.quant_grid import BITS, Codebook, attached_grid, block_rows, get_grid, scale_shape
from rarefy.prune.prune import check_weights
from rarefy.quantization.quantize import relative_error, set_quantized_

BINS = 1024  # of the histogram of large weights
LLOYD_STEPS = 15
MIN_ERROR_WEIGHT = 1e-9  # relative to the largest, so that every weight counts


class ShareOptions(Options):
    """Replace the weights of a layer by a few shared values. See `rarefy.share_`."""

    error = PatternError

    bits: int = Field(default=4, ge=BITS[0], le=BITS[-1], description="2^bits values; zero is always one of them")
    group: Literal["tensor"] | None = Field(
        default="tensor", description="tensor: one table of values for a layer; null: one for each output"
    )
    layers: Names | None = Field(
        default=None, description="selectors of layers; by default all but embeddings and head"
    )
    ignore: Names | None = Field(default=None, description="selectors of layers to leave as they are")


def share_(
    model: nn.Module,
    bits: int = 4,
    *,
    group: Literal["tensor"] | None = "tensor",
    layers: Selector = None,
    ignore: Selector = None,
    data: Iterable[Any] | None = None,
    progress: bool = False,
) -> Report:
    """Let the weights of each selected layer share 2^bits values, in place (Deep Compression, Han 2016).

    Which weight has which value is fixed from here on; training moves the values. `save` stores indices of `bits`
    bits. Costs O(n log n + 2^bits BINS^2) for a layer of n weights, and the pass over the data.

    Args:
        model: any module with Linear, Conv or Embedding layers.
        bits: 2 to 8. Zero is always one of the values, so zeros stay zeros.
        group: "tensor": one table of values for a layer. None: one for each output.
        layers: names, globs or other selectors of layers; by default all but embeddings and the output head.
        ignore: selectors of layers to leave as they are.
        data: batches: the error of a weight is then weighted by the mean square of its input.
        progress: show progress bars.

    Returns:
        A `Report` with one row for each layer: how many values, fraction of zeros, bytes stored and dense, and the
        squared error, relative to the squared weights.

    Raises:
        RarefyError: for options, layers or data that do not fit; the model is then unchanged.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 32))
        >>> report = share_(net, 3)
        >>> report.rows[0]["values"], len(net[0].weight.unique())
        (8, 8)
    """
    options = ShareOptions(bits=bits, group=group, layers=layers, ignore=ignore)
    return run_share(model, options, data, progress=progress)


def run_share(
    model: nn.Module, options: ShareOptions, data: Iterable[Any] | None = None, *, progress: bool = False
) -> Report:
    """Share weights by checked options. See `share_`."""
    if data is not None:
        check_batches(data)
    layers = select_layers(model, options.layers, options.ignore)
    check_layers(layers)
    importance = {} if data is None else _importance(model, layers, data)
    shared = []
    for layer in track(layers, "sharing values", progress, len(layers)):
        weight = layer.weight.detach()
        book = codebook(weight, scale_shape(layer, options.group), options.bits, importance.get(layer.full_name))
        _check_saving(layer, weight, book)
        shared.append((layer, book, book.snap(weight)))
    rows = []
    for layer, book, values in shared:
        rows.append(_row(layer, book, values))
        set_quantized_(layer, book, values, None)
    forget_receipt(model)
    stored, dense = (sum(r[k] for r in rows) for k in ("bytes", "dense bytes"))
    summary = {"layers": len(rows), "bytes": stored, "dense bytes": dense, "ratio": stored / max(dense, 1)}
    return Report("shared", tuple(rows), summary)


def _check_saving(layer: Layer, weight: Tensor, book: Codebook) -> None:
    """Raise ModelError where the tables need more bytes than they save."""
    saved = weight.numel() * (8 * weight.element_size() - book.bits) // 8
    if book.table.nbytes >= saved:
        raise ModelError(
            f"{layer.full_name}: {book.table.numel():,} shared values need more memory than they save on "
            f"{weight.numel():,} weights: ignore the layer, use fewer bits, or group='tensor'"
        )


def _row(layer: Layer, book: Codebook, values: Tensor) -> dict[str, Any]:
    return {
        "layer": layer.full_name,
        "shape": "x".join(map(str, values.shape)),
        "values": 1 << book.bits,
        "zeros": float((values == 0).float().mean()),
        "bytes": min(sizes(values, book, axis=layer.layout.in_axis).values()),
        "dense bytes": values.numel() * values.element_size(),
        "error": relative_error(layer.weight.detach(), values),
    }


def check_layers(chosen: Sequence[Layer]) -> None:
    """Raise ModelError for layers that cannot use a codebook."""
    check_weights(chosen)
    for layer in chosen:
        check_maskable(layer)
        if attached_grid(layer.module, layer.param) is not None or get_grid(layer) is not None:
            raise ModelError(f"{layer.full_name} is already quantized: ignore it")


def codebook(weight: Tensor, blocks: tuple[int, ...], bits: int, weigh: Tensor | None = None) -> Codebook:
    """Return the best table for a weight, or one for each of its blocks; `weigh` weights the squared errors."""
    X = block_rows(weight.float(), blocks)
    W = torch.ones_like(X) if weigh is None else block_rows(weigh.expand_as(weight).float(), blocks)
    tables = [_table(x, w, bits) for x, w in zip(X, W)]
    return Codebook(bits, torch.stack(tables).reshape(*blocks, 1 << bits))


def best_values(x: Tensor, w: Tensor, count: int) -> Tensor:
    """Return at most `count` values, one of them zero, of least weighted squared error for sorted x [n].

    Exact, by dynamic programming over the first weight of each value (Wang and Song 2011). O(count n^2).

    >>> best_values(torch.tensor([-2.5, -1.5, 0.1, 3.0, 4.0]), torch.ones(5), 3).tolist()
    [-2.0, 0.0, 3.5]
    """
    x, w = x.double(), w.double()
    s0, s1, s2 = (torch.cat([t.new_zeros(1), t.cumsum(0)]) for t in (w, w * x, w * x * x))
    first, last = torch.arange(len(x) + 1)[:, None], torch.arange(len(x) + 1)[None]
    mass, moment, energy = (s[None] - s[:, None] for s in (s0, s1, s2))
    penalty = torch.where(first <= last, 0.0, float("inf"))  # of runs that end before they begin
    zero = energy.clamp(min=0) + penalty  # weights first..last - 1 as zeros
    at_mean = (energy - moment.square() / mass.clamp(min=1e-300)).clamp(
        min=0
    ) + penalty  # weights first..last - 1 at their mean
    start = torch.where(torch.arange(len(x) + 1) == 0, 0.0, float("inf")).double()
    before, after = (
        start,
        (start[:, None] + zero).min(0).values,
    )  # least error of the first n weights, before and after the zero value
    choices: list[tuple[Tensor, Tensor, Tensor]] = [
        (torch.zeros_like(last[0]), (start[:, None] + zero).argmin(0), last[0] * 0)
    ]
    for _ in range(count - 1):
        next_before, begin = (before[:, None] + at_mean).min(0)
        by_mean, begin_by_mean = (after[:, None] + at_mean).min(0)
        by_zero, begin_by_zero = (next_before[:, None] + zero).min(0)
        choices.append(
            (begin, torch.where(by_mean <= by_zero, begin_by_mean, begin_by_zero), (by_mean <= by_zero).long())
        )
        before, after = next_before, torch.minimum(by_mean, by_zero)
    return _backtrack(choices, len(x), s0, s1)


def _backtrack(choices: Sequence[tuple[Tensor, Tensor, Tensor]], n: int, s0: Tensor, s1: Tensor) -> Tensor:
    """Return the values, from the last run of weights to the first."""
    values, end, step, zero_done = [0.0], n, len(choices) - 1, False
    while end > 0 and step >= 0:
        begins, begins_after_zero, by_mean = choices[step]
        if zero_done:  # the remaining runs come before the zero
            begin = int(begins[end])
        elif step == 0 or not bool(by_mean[end]):
            end, zero_done = int(begins_after_zero[end]), True
            continue
        else:
            begin = int(begins_after_zero[end])
        if begin < end:
            values.append(float((s1[end] - s1[begin]) / (s0[end] - s0[begin]).clamp(min=1e-300)))
        end, step = begin, step - 1
    return torch.tensor(sorted(set(values)), dtype=torch.float32)


def _table(x: Tensor, w: Tensor, bits: int) -> Tensor:
    """Return the values for the weights x [n]: zero first, the others rising; unused entries repeat zero."""
    count = 1 << bits
    order = x.argsort()
    x, w = x[order], w[order].clamp(min=MIN_ERROR_WEIGHT * float(w.max().clamp(min=1e-30)))
    bins = BINS if bits <= 5 else BINS // 2
    centres, mass = (x, w) if len(x) <= bins else _histogram(x, w, bins)
    values = best_values(centres, mass, count)
    if len(x) > bins:
        values = _lloyd(x, w, values)
    others = values[values != 0]
    return torch.cat([x.new_zeros(count - len(others)), others])


def _histogram(x: Tensor, w: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return the means and weights of bins of sorted x: half of equal width, for the tails, half of equal count."""
    places = torch.linspace(float(x[0]), float(x[-1]), bins // 2 + 1, dtype=torch.float32)
    equal_width = torch.searchsorted(x, places[1:-1])
    equal_count = torch.linspace(0, len(x), bins // 2 + 1, dtype=torch.float32)[1:-1].long()
    edges = torch.cat([equal_width, equal_count]).unique()
    bin_of = torch.searchsorted(edges, torch.arange(len(x)), right=True)
    mass = torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, bin_of, w.double())
    moment = torch.zeros_like(mass).index_add_(0, bin_of, (w * x).double())
    used = mass > 0
    return (moment[used] / mass[used]).float(), mass[used].float()


def _lloyd(x: Tensor, w: Tensor, values: Tensor) -> Tensor:
    """Move each value except zero to the mean of the weights nearest to it, until none moves."""
    w, moment = w.double(), (w * x).double()
    for _ in range(LLOYD_STEPS):
        nearest = torch.searchsorted((values[1:] + values[:-1]) / 2, x)
        mass = torch.zeros(len(values), dtype=torch.float64).index_add_(0, nearest, w)
        means = torch.zeros_like(mass).index_add_(0, nearest, moment) / mass.clamp(min=1e-300)
        moved = torch.where((values == 0) | (mass == 0), values, means.float())
        if torch.equal(moved, values):
            break
        values = moved
    return values


def _importance(model: nn.Module, chosen: Sequence[Layer], data: Iterable[Any]) -> dict[str, Tensor]:
    """Return the error weight of each weight, in its stored shape."""
    idle = [l.full_name for l in chosen if l.layout.kind == "embedding"]
    if idle:
        raise DataError(f"an embedding has no input statistics: ignore {', '.join(idle)}, or leave data out")
    stats = collect_stats(model, data, chosen, frozenset({"input"}))
    importance = {}
    for layer in chosen:
        mean_square: Any = stats[layer.full_name].in_square
        expanded = mean_square.expand(layer.layout.shape)
        importance[layer.full_name] = layer.layout.unview(expanded, tuple(layer.original.shape))
    return importance
