"""`permute_`: reorder channels so that an N:M pattern keeps more, without changing the outputs.

N:M keeps the best N of every M neighbouring inputs, so their order matters. The units of a group of coupled slices
(`rarefy.dependency.graph`) may be reordered if all their slices are. Nothing is left to do at run time, and the model
stays an ordinary one of its class.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import PatternError
from rarefy.common.options import Names, OneOf, Options
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.dependency.graph import Graph, Group, trace, unsupported_notes
from rarefy.dependency.symbolic_dims import Axis, leaves, reordered_indices
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, Selector, select_layers, unwrap
from rarefy.model.losses import Loss
from rarefy.model.sparsity_pattern import Pattern, parse_pattern
from rarefy.prune.prune import calibrate, check_weights
from rarefy.prune.scores import SCORES
from rarefy.structured.optimizer_state import check_optimizer
from rarefy.structured.options import check_unmasked
from rarefy.structured.permutation_search import kept_score, search
from rarefy.structured.surgery import output_difference, outputs

ROWS = 2048  # sampled for the search; the kept scores are computed on all rows
NEAR = 1e-5  # how far outputs may be from those before, relative to the largest: sums round otherwise


class PermuteOptions(Options):
    """Reorder channels so that N:M pruning loses less; outputs stay. See `rarefy.permute_`."""

    error = PatternError

    pattern: str = Field(default="2:4", description="the N:M pattern that the order is for")
    score: Annotated[str, OneOf(SCORES)] = Field(default="magnitude", description="what the kept weights have most of")
    seconds: float = Field(default=30.0, gt=0, description="how long the search takes at most, of all groups together")
    layers: Names | None = Field(
        default=None, description="selectors of layers; by default all but embeddings and head"
    )
    ignore: Names | None = Field(default=None, description="selectors of layers to leave as they are")

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        if parse_pattern(pattern).kind != "nm":
            raise PatternError(f"expected an N:M pattern such as 2:4, got {pattern!r}")
        return pattern


def permute_(
    model: nn.Module,
    example: Any,
    pattern: str = "2:4",
    *,
    score: str = "magnitude",
    layers: Selector = None,
    ignore: Selector = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seconds: float = 30.0,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Reorder the inputs of the selected layers in place, so that N:M pruning keeps more of their scores.

    Layers that make these inputs are reordered alike, so the model returns what it did. Then call
    `prune_(model, pattern)`. A group of units stays where no order keeps more, where its units differ in parts that the
    model's class makes itself (rotary frequencies), and where no selected layer reads them one by one. Outputs on
    `example` are compared before and after; groups that change them by more than 1e-5 of the largest are restored, and
    their row says so. Costs O(R C^2) for a group of C units that R rows read, and O(R C) a swap.

    Args:
        model: any module whose operators have rules (`rarefy.dependency`).
        example: a batch, as for `rarefy.cut_`: one call shows which slices belong together. What it does not call is
            not seen, and a note names it.
        pattern: the N:M pattern that the order is for.
        score: what the kept weights should have most of (`rarefy.prune.scores.SCORES`).
        layers: names, globs or other selectors of layers; by default all but embeddings and the output head.
        ignore: selectors of layers to leave as they are.
        data: batches, for scores that need them.
        loss: for gradient scores, a function of (output, batch) or a criterion (logits, target); see `rarefy.fit_`.
        optimizer: one that trains the model: its state is reordered too.
        seconds: how long the search takes at most, of all groups together. 64 x 128 weights take a second; wide layers
            use all of it.
        seed: of the search.
        progress: show progress bars.

    Returns:
        A `Report` with one row for each group of units: the fraction of scores kept before and after, swaps, seconds,
        why it stayed.

    Raises:
        RarefyError: for options, a model or data that do not fit; the model is then unchanged.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> report = permute_(net, torch.randn(2, 8))
        >>> report.summary["kept"] > report.summary["kept before"]
        True
    """
    options = PermuteOptions(pattern=pattern, score=score, seconds=seconds, layers=layers, ignore=ignore)
    return run_permute(model, example, options, data, loss=loss, optimizer=optimizer, seed=seed, progress=progress)


def run_permute(
    model: nn.Module,
    example: Any,
    options: PermuteOptions,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Reorder channels by checked options. See `permute_`."""
    pattern = parse_pattern(options.pattern)
    if data is not None:
        check_batches(data)
    inner = unwrap(model)
    check_unmasked(inner, doing="permute")
    layers = select_layers(model, options.layers, options.ignore)
    check_weights(layers)
    check_optimizer(optimizer, inner)
    before = outputs(inner, example)
    graph = trace(inner, example)
    scores = _scores(layers, options.score, calibrate(model, layers, options.score, data, loss, seed))
    read = _group_scores(graph, scores, pattern)
    sums = {g: float(S.sum(dtype=torch.float64)) for g, S in read.items()}
    rows, orders = _search_orders(inner, read, sums, pattern, options.seconds, seed, progress)
    undone = _apply_orders(inner, example, graph, orders, optimizer, before)
    for group in rows:
        if group.axis in undone:
            rows[group] |= {"kept": rows[group]["kept before"], "why": undone[group.axis]}
    if orders:
        forget_receipt(model)
    total = sum(sums.values()) or 1.0
    means = {name: sum(rows[g][name] * s for g, s in sums.items()) / total for name in ("kept before", "kept")}
    summary = {"groups": f"{len(orders) - len(undone)} of {len(rows)}", **means}
    return Report(f"inputs reordered for {pattern}", tuple(rows.values()), summary, unsupported_notes(graph))


def _group_scores(graph: Graph, scores: Mapping[int, tuple[Tensor, int]], pattern: Pattern) -> dict[Group, Tensor]:
    """Return the scores [rows, units] of each group whose units some layers read one by one."""
    names = {id(getattr(*owners[0])): n for n, owners in graph.owners.items()}
    columns = [(S, graph.unit_indices(names[key], dim)) for key, (S, dim) in scores.items()]
    unlocked = [g for g in graph.groups if g.lock is None]
    return {g: S for g in unlocked if (S := _scores_of_group(columns, g, pattern)) is not None}


def _search_orders(
    model: nn.Module,
    read: Mapping[Group, Tensor],
    sums: Mapping[Group, float],
    pattern: Pattern,
    seconds: float,
    seed: int,
    progress: bool,
) -> tuple[dict[Group, dict[str, Any]], dict[Axis, Tensor]]:
    """Return a row a group, and the better orders. Groups share the time by the cost of their search."""
    stored = set(model.state_dict(keep_vars=True))
    rows, orders = dict[Group, dict[str, Any]](), dict[Axis, Tensor]()
    seconds_left, cost_left = float(seconds), sum(map(_cost, read.values()))
    for group, S in track(list(read.items()), "ordering inputs", progress, len(read)):
        began, share = time.perf_counter(), seconds_left * _cost(S) / cost_left
        computed = next((m.name for m in group.members if m.name not in stored), None)
        before = after = kept_score(S, pattern.a, pattern.b)
        swaps, why = 0, "" if computed is None else f"{computed} is computed by its class"
        if computed is None:
            result = search(_sampled_rows(S), pattern.a, pattern.b, seconds=share, seed=seed)
            swaps, after = result.swaps, kept_score(S[:, result.order], pattern.a, pattern.b)
            why = ("" if result.converged else "time limit reached") if after > before else "no better order found"
            if after > before:
                orders[group.axis] = result.order
        of = sums[group] or 1.0
        rows[group] = {
            "group": group.name, "kind": group.kind, "units": group.size, "rows": len(S), "kept before": before / of,
            "kept": max(before, after) / of, "swaps": swaps, "seconds": time.perf_counter() - began, "why": why,
        }  # fmt: skip
        seconds_left, cost_left = seconds_left - (time.perf_counter() - began), cost_left - _cost(S)
    return rows, orders


def _scores(layers: Sequence[Layer], score: str, stats: Mapping[str, LayerStats]) -> dict[int, tuple[Tensor, int]]:
    """Return {id of a parameter: scores [G, K, O, I], input dimension} where one dimension holds all inputs."""
    scores: dict[int, tuple[Tensor, int]] = {}
    with torch.no_grad():
        for layer in layers:
            W = layer.original.detach()
            S = SCORES[score].of(layer.layout.view(W.float()), stats[layer.full_name]).float().cpu()
            dim = layer.layout.in_axis % W.dim()
            if W.shape[dim] == S.shape[-1]:
                scores[id(layer.original)] = S, dim
    return scores


def _scores_of_group(
    columns: Sequence[tuple[Tensor, Mapping[Axis, Tensor]]], group: Group, pattern: Pattern
) -> Tensor | None:
    """Return the scores of a group's units in all layers, [rows, units], or None where none reads them in order.

    `columns` holds the scores of each parameter and the unit of each of its columns.
    """
    if group.size % pattern.b or group.size == pattern.b:
        return None
    rows = []
    for S, units_of in columns:
        units = units_of.get(group.axis)
        if units is None:
            continue
        for first in (units == 0).nonzero()[:, 0].tolist():
            window = slice(first, first + group.size)
            if first % pattern.b == 0 and torch.equal(units[window], torch.arange(group.size)):
                rows.append(S[..., window].reshape(-1, group.size))
    return torch.cat(rows) if rows else None


def _cost(S: Tensor) -> float:
    """Return the relative cost of a search."""
    return min(len(S), ROWS) * S.shape[1] ** 2


def _sampled_rows(S: Tensor) -> Tensor:
    """Return at most ROWS rows, evenly spaced."""
    return S if len(S) <= ROWS else S[torch.linspace(0, len(S) - 1, ROWS).long()]


def _apply_orders(
    model: nn.Module,
    example: Any,
    graph: Graph,
    orders: Mapping[Axis, Tensor],
    optimizer: torch.optim.Optimizer | None,
    before: Sequence[Tensor],
) -> dict[Axis, str]:
    """Reorder the groups, one by one if all together change the outputs; return why groups were not reordered."""
    reasons: dict[Axis, str] = {}

    def reorder_and_verify(orders: Mapping[Axis, Tensor]) -> str:
        reorder_(graph, orders, optimizer)
        difference = "raises"  # unless the call succeeds
        try:
            difference = output_difference(outputs(model, example), before, "those before", NEAR)
        finally:
            if difference:
                reorder_(graph, {a: o.argsort() for a, o in orders.items()}, optimizer)
        return difference

    if orders and reorder_and_verify(orders):
        for axis, order in orders.items():
            if difference := reorder_and_verify({axis: order}):
                reasons[axis] = f"the model {difference}"
    return reasons


@torch.no_grad()
def reorder_(graph: Graph, orders: Mapping[Axis, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reorder the units of axes in every parameter, buffer and optimizer state, in place. O(weights)."""
    for name, dims in graph.dims.items():
        tensor = getattr(*graph.owners[name][0])
        optimizer_state = () if optimizer is None else optimizer.state.get(tensor, {}).values()
        for d, e in enumerate(dims):
            if not any(a in orders for a in leaves(e)):
                continue
            index = reordered_indices(e, orders.get).to(tensor.device)
            for t in (tensor, *(s for s in optimizer_state if isinstance(s, Tensor) and s.shape == tensor.shape)):
                t.copy_(t.index_select(d, index))
