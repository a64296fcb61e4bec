"""`permute_`: inputs in an order in which an N:M pattern keeps more, taken up by the layers that make them.

N:M keeps the best N of every M neighbouring inputs, so it matters which are neighbours. The units of a group of coupled
slices (`model/graph.py`) may stand in any order, if all slices of them follow: what the model returns stays. Nothing is
left to do at run time, and the model is an ordinary one of its class.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import PatternError, unknown
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.dependency.graph import Graph, Group, trace, unsupported_notes
from rarefy.dependency.symbolic_dims import Axis, leaves, reordered_indices
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, Selector, all_layers, select_layers, unwrap
from rarefy.model.losses import Loss
from rarefy.model.sparsity_pattern import Pattern, parse_pattern
from rarefy.prune.prune import calibrate, check_weights
from rarefy.prune.scores import SCORES
from rarefy.structured.optimizer_state import check_optimizer
from rarefy.structured.options import check_unmasked
from rarefy.structured.permutation_search import kept_score, search
from rarefy.structured.surgery import output_difference, outputs

ROWS = 2048  # from so many, spread over all, an order is found; what it keeps is counted on all
NEAR = 1e-5  # how far outputs may be from those before, relative to the largest: sums round otherwise


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
    """Order the inputs of the selected layers so that N:M keeps more of their scores, in place; return a row a group of
    units. Then `prune_(model, pattern)`. The model returns what it did: whatever makes these inputs makes them in that
    order.

    example    what the model can be called with: one call shows which slices of which parameters belong together
    pattern    N:M
    score      what is to be kept (`rarefy.prune.scores.SCORES`); some read `data`
    optimizer  one that trains the model: its state goes along
    seconds    the search takes at most, of all groups together. It goes on through random exchanges until many in a row
               lead nowhere, which takes a second for 64 x 128, and longer than anyone waits for wide layers

    What the example does not call is not seen, and a note names it. A group stays where no order keeps more, where its
    units differ in parts that the model's class makes itself (rotary frequencies) or no selected layer takes them one
    by one. Outputs on `example` are compared before and after; groups that change them by more than 1e-5 of the largest
    are put back, and their row says so. Raises the ValueErrors of `rarefy.common.errors`, and then the model is
    unchanged. O(R C^2) a group of C units that R rows read, and O(R C) a swap.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> report = permute_(net, torch.randn(2, 8))
    >>> report.summary["kept"] > report.summary["kept before"]
    True
    """
    plan = check_permute(pattern, score, seconds)
    if data is not None:
        check_batches(data)
    inner = unwrap(model)
    check_unmasked(inner, doing="permute")
    chosen = select_layers(model, layers, ignore)
    check_weights(chosen)
    check_optimizer(optimizer, inner)
    with _Reads() as reads:
        before = outputs(inner, example)
    graph = trace(inner, example)
    scores = _scores(chosen, score, calibrate(model, chosen, score, data, loss, seed))
    stored = set(inner.state_dict(keep_vars=True))
    names = {id(getattr(*owners[0])): n for n, owners in graph.owners.items()}
    seen = [(S, graph.unit_indices(names[key], dim)) for key, (S, dim) in scores.items()]
    free = [g for g in graph.groups if g.lock is None]
    read = {g: S for g in free if (S := _read(seen, g, plan)) is not None}
    sums = {g: float(S.sum(dtype=torch.float64)) for g, S in read.items()}
    rows, orders = dict[Group, dict[str, Any]](), dict[Axis, Tensor]()
    left, work = float(seconds), sum(map(_work, read.values()))
    for group, S in track(list(read.items()), "ordering inputs", progress, len(read)):
        began, share = time.perf_counter(), left * _work(S) / work
        made = next((m.name for m in group.members if m.name not in stored), None)
        was = now = kept_score(S, plan.a, plan.b)
        swaps, why = 0, "" if made is None else f"{made} is made by its class"
        if made is None:
            found = search(_some(S), plan.a, plan.b, seconds=share, seed=seed)
            swaps, now = found.swaps, kept_score(S[:, found.order], plan.a, plan.b)
            why = ("" if found.converged else "time was up") if now > was else "no better order found"
            if now > was:
                orders[group.axis] = found.order
        of = sums[group] or 1.0
        rows[group] = {
            "group": group.name, "kind": group.kind, "units": group.size, "rows": len(S), "kept before": was / of,
            "kept": max(was, now) / of, "swaps": swaps, "seconds": time.perf_counter() - began, "why": why,
        }  # fmt: skip
        left, work = left - (time.perf_counter() - began), work - _work(S)
    undone = _apply(inner, example, graph, orders, optimizer, before)
    for group in rows:
        if group.axis in undone:
            rows[group] |= {"kept": rows[group]["kept before"], "why": undone[group.axis]}
    if orders:
        model.__dict__.pop("rarefy_receipt", None)  # what it measured is no longer so
    told = {
        n: sum(rows[g][n] * s for g, s in sums.items()) / (sum(sums.values()) or 1.0) for n in ("kept before", "kept")
    }
    summary = {"groups": f"{len(orders) - len(undone)} of {len(rows)}", **told}
    return Report(
        f"inputs in order for {plan}", tuple(rows.values()), summary, (*unsupported_notes(graph), *reads.idle(inner))
    )


class _Reads(TorchFunctionMode):
    """What parameters a call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, nn.Parameter)}
        return func(*args, **(kwargs or {}))

    def idle(self, model: nn.Module) -> tuple[str, ...]:
        """Return a note where layers have no part in the call: another call would give them units in another order."""
        names = [l.full_name for l in all_layers(model) if id(l.original) not in self.seen]
        said = "not called on the example, so a call that does finds its inputs out of order"
        return (f"{said}: {', '.join(names)}",) if names else ()


def check_permute(pattern: Any, score: Any, seconds: Any) -> Pattern:
    """Return the pattern that `permute_` is asked for; PatternError for what it does not know."""
    plan = parse_pattern(pattern)
    if plan.kind != "nm":
        raise PatternError(f"pattern {str(pattern)!r} is not N:M, such as 2:4, to which the order of inputs matters")
    if score not in SCORES:
        raise PatternError(unknown("score", score, SCORES))
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise PatternError(f"seconds is how long the search takes at most, over 0, got {seconds!r}")
    return plan


def _scores(chosen: Sequence[Layer], score: str, stats: Mapping[str, LayerStats]) -> dict[int, tuple[Tensor, int]]:
    """By the id of the parameter its scores [G, K, O, I] and the dimension of its inputs, where that has all of them (a
    transposed convolution in groups has them apart)."""
    found: dict[int, tuple[Tensor, int]] = {}
    with torch.no_grad():
        for layer in chosen:
            W = layer.original.detach()
            S = SCORES[score].of(layer.layout.view(W.float()), stats[layer.full_name]).float().cpu()
            dim = layer.layout.in_axis % W.dim()
            if W.shape[dim] == S.shape[-1]:
                found[id(layer.original)] = S, dim
    return found


def _read(seen: Sequence[tuple[Tensor, Mapping[Axis, Tensor]]], group: Group, plan: Pattern) -> Tensor | None:
    """What all layers score the units of a group, [rows, units], where `seen` has scores and which units its columns
    are; None where none reads them one by one."""
    if group.size % plan.b or group.size == plan.b:
        return None
    found = []
    for S, units_of in seen:
        units = units_of.get(group.axis)
        if units is None:
            continue
        for first in (units == 0).nonzero()[:, 0].tolist():
            columns = slice(first, first + group.size)
            if first % plan.b == 0 and torch.equal(units[columns], torch.arange(group.size)):
                found.append(S[..., columns].reshape(-1, group.size))
    return torch.cat(found) if found else None


def _work(S: Tensor) -> float:
    return min(len(S), ROWS) * S.shape[1] ** 2


def _some(S: Tensor) -> Tensor:
    """Rows spread evenly over all."""
    return S if len(S) <= ROWS else S[torch.linspace(0, len(S) - 1, ROWS).long()]


def _apply(
    model: nn.Module,
    example: Any,
    graph: Graph,
    orders: Mapping[Axis, Tensor],
    optimizer: torch.optim.Optimizer | None,
    before: Sequence[Tensor],
) -> dict[Axis, str]:
    """Put units in their orders, all together or, where that changes outputs, those groups that do not; return why the
    others stayed."""
    undone: dict[Axis, str] = {}

    def moved(orders: Mapping[Axis, Tensor]) -> str:
        reorder_(graph, orders, optimizer)
        text = "raises"  # until it has run
        try:
            text = output_difference(outputs(model, example), before, "those before", NEAR)
        finally:
            if text:
                reorder_(graph, {a: o.argsort() for a, o in orders.items()}, optimizer)
        return text

    if orders and moved(orders):
        for axis, order in orders.items():
            if text := moved({axis: order}):
                undone[axis] = f"the model {text}"
    return undone


@torch.no_grad()
def reorder_(graph: Graph, orders: Mapping[Axis, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put the units of axes in other orders, [units] each, in every parameter and buffer that has them, and in what an
    optimizer keeps of these. O(weights)."""
    for name, dims in graph.dims.items():
        tensor = getattr(*graph.owners[name][0])
        beside = () if optimizer is None else optimizer.state.get(tensor, {}).values()
        for d, e in enumerate(dims):
            if not any(a in orders for a in leaves(e)):
                continue
            index = reordered_indices(e, orders.get).to(tensor.device)
            for t in (tensor, *(s for s in beside if isinstance(s, Tensor) and s.shape == tensor.shape)):
                t.copy_(t.index_select(d, index))
