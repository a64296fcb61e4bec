"""How much each unit matters, [units] a group: the least goes first.

A unit has slices in several parameters (`Group.members`): those that make it, those that read it. Scores of weights
join all of them; scores of activations look at what readers are given, after the nonlinearity; `obs` asks what readers
lose. A new score is one function here and one line in UNIT_SCORES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError
from rarefy.dependency.graph import Graph, Group
from rarefy.dependency.symbolic_dims import Axis, coordinates, leaves
from rarefy.model.batches import tokens_in
from rarefy.model.forward import call, check_batches, evaluating, on_device, trainable
from rarefy.model.losses import Loss, finite, loss_of
from rarefy.structured.consumers import Consumer, Moments, collect_moments, consumers_of

AT_ONCE = 64  # of what is left one unit in so many goes in a step of obs
REDUCTIONS = ("sum", "mean", "max")
# of a group: the sum of values at each index of a dimension, how many they are each, the unit of each index
Slices = Sequence[tuple[Tensor, int, Tensor]]


@dataclass(frozen=True)
class ScoreInputs:
    """What a score is computed from."""

    model: nn.Module
    graph: Graph
    groups: Sequence[Group]
    reduce: str
    data: Iterable[Any] | None
    loss: Loss | None
    seed: int


def reduce_slices(slices: Slices, units: int, reduce: str, *, fair: bool) -> Tensor:
    """Return one number a unit: the sum, the mean or the largest parameter's mean of its values. `fair`: each parameter
    counts alike, whatever the scale of its values. fp64 [units]. O(indices)."""
    sums, counts = torch.zeros(units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64)
    largest = torch.full((units,), -torch.inf, dtype=torch.float64)
    for at, each_of, where in slices:
        here = where >= 0
        each = torch.zeros(units, dtype=torch.float64).index_add_(0, where[here], at[here])
        many = torch.bincount(where[here], minlength=units) * each_of
        each = each / each.abs().mean().clamp(min=1e-300) if fair else each
        sums += each
        counts += many
        largest = torch.maximum(largest, each / many.clamp(min=1))
    return {"sum": sums, "mean": sums / counts.clamp(min=1), "max": largest}[reduce]


def sum_along(values: Tensor, dim: int) -> tuple[Tensor, int]:
    """Return the sums of values at each index of a dimension, fp64 on the CPU, and how many each is of. O(values)."""
    size = values.shape[dim]
    return values.transpose(0, dim).reshape(size, -1).sum(1, dtype=torch.float64).cpu(), values.numel() // size


class SliceSums:
    """Values of parameters, summed along each dimension that has units: once, though many groups may share it."""

    def __init__(self, graph: Graph, values: Callable[[str, nn.Parameter], Tensor | None]):
        self.graph, self.values = graph, values
        self.known: dict[str, dict[int, tuple[Tensor, int]]] = {}

    def of(self, group: Group) -> Slices:
        """Return the slices of a group: of parameters of more than one dimension, or of all, if there are no others."""
        found = []
        for m in group.members:
            W = getattr(*self.graph.owners[m.name][0])
            if isinstance(W, nn.Parameter):
                at = self._along(m.name, W).get(m.dim)
                if at is not None:
                    where = self.graph.places(m.name, m.dim)[group.axis]
                    found.append((W.dim() > 1, (*at, where)))
        return [f for matrix, f in found if matrix] or [f for _, f in found]

    def _along(self, name: str, W: nn.Parameter) -> dict[int, tuple[Tensor, int]]:
        if name not in self.known:
            values = self.values(name, W)
            dims = self.graph.dims[name]
            free = [d for d in range(W.dim()) if any(a.lock is None for a in leaves(dims[d]))]
            self.known[name] = {} if values is None else {d: sum_along(values, d) for d in free}
        return self.known[name]


def _of_weights(of: Callable[[Tensor], Tensor]) -> Callable[[ScoreInputs], dict[Axis, Tensor]]:
    def score(a: ScoreInputs) -> dict[Axis, Tensor]:
        sums = SliceSums(a.graph, lambda _, W: of(W.detach().float()))
        return {g.axis: reduce_slices(sums.of(g), g.size, a.reduce, fair=True) for g in a.groups}

    return score


def _of_gradients(of: Callable[[Tensor, Tensor], Tensor], *, signed: bool = False) -> Any:
    """A score of weights and gradients, its mean over the batches; `signed`: the terms of a unit may cancel."""

    def score(a: ScoreInputs) -> dict[Axis, Tensor]:
        total = {g.axis: torch.zeros(g.size, dtype=torch.float64) for g in a.groups}
        for grads, weight in _gradients(a):

            def values(name: str, W: nn.Parameter, grads: Any = grads) -> Tensor | None:
                return of(W.detach().float(), grads[name].float()) if grads.get(name) is not None else None

            sums = SliceSums(a.graph, values)
            for g in a.groups:
                one = reduce_slices(sums.of(g), g.size, a.reduce, fair=False)
                total[g.axis] += weight * (one.abs() if signed else one)
        return total

    return score


def _gradients(a: ScoreInputs) -> Iterable[tuple[dict[str, Tensor | None], int]]:
    names = list(dict.fromkeys(m.name for g in a.groups for m in g.members))
    found = {n: getattr(*a.graph.owners[n][0]) for n in names}
    found = {n: p for n, p in found.items() if isinstance(p, nn.Parameter)}
    with evaluating(a.model), trainable(list(found.values())), torch.enable_grad():
        for index, batch in enumerate(_data(a)):
            batch = on_device(a.model, batch)
            value = finite(loss_of(a.loss)(call(a.model, batch), batch), index)
            grads = torch.autograd.grad(value, list(found.values()), allow_unused=True)
            yield dict(zip(found, grads)), tokens_in(batch)


def _of_inputs(of: Callable[[Moments, Consumer], Tensor]) -> Callable[[ScoreInputs], dict[Axis, Tensor]]:
    """A score of what readers are given: its sum over all readers of a group."""

    def score(a: ScoreInputs) -> dict[Axis, Tensor]:
        reading = _readers(a)
        seen = collect_moments(a.model, [r for each in reading.values() for r in each], _data(a), gram=False)
        out = {}
        for g, found in reading.items():
            slices = [(of(seen[r.name], r).cpu(), 1, coordinates(r.inputs, g.axis)) for r in _reached(g, found, seen)]
            out[g.axis] = reduce_slices(slices, g.size, a.reduce, fair=False)
        return out

    return score


def _readers(a: ScoreInputs) -> dict[Group, list[Consumer]]:
    reading = consumers_of(a.graph, a.groups)
    for g, found in reading.items():
        if not found:
            raise ModelError(f"no Linear or convolution reads the units of {g.name} ({g.kind}): ignore it, or take "
                             "a score of weights such as magnitude")  # fmt: skip
    return reading


def _reached(group: Group, readers: list[Consumer], seen: Mapping[str, Moments]) -> list[Consumer]:
    found = [r for r in readers if r.name in seen]
    if not found:
        raise DataError(f"no batch of the data reaches {readers[0].name}, which reads the units of {group.name}")
    return found


def _data(a: ScoreInputs) -> Iterable[Any]:
    if a.data is None:
        raise DataError("this score needs data: give batches")
    check_batches(a.data)
    return a.data


def scale(a: ScoreInputs) -> dict[Axis, Tensor]:
    """|gamma| of the norm that units go through (Liu 2017, Network Slimming)."""
    out = {}
    for g in a.groups:
        slices = []
        for m in g.members:
            module, attribute = a.graph.owners[m.name][0]
            if attribute == "weight" and "Norm" in type(module).__name__:
                gamma = getattr(module, attribute).detach().float().abs()
                slices.append((*sum_along(gamma, m.dim), a.graph.places(m.name, m.dim)[g.axis]))
        if not slices:
            raise ModelError(f"no norm scales the units of {g.name} ({g.kind}): ignore it, or take another score")
        out[g.axis] = reduce_slices(slices, g.size, a.reduce, fair=True)
    return out


def median(a: ScoreInputs) -> dict[Axis, Tensor]:
    """Sum of distances to all other units' weights: those near the geometric median can be replaced (He 2019, FPGM)."""
    out = {}
    for g in a.groups:
        total = torch.zeros(g.size, dtype=torch.float64)
        for m in (m for m in g.members if m.role == "out"):
            W = getattr(*a.graph.owners[m.name][0])
            where = a.graph.places(m.name, m.dim)[g.axis]
            if isinstance(W, nn.Parameter) and W.dim() > 1:
                order = _by_unit(where, g.size).to(W.device)
                rows = W.detach().float().transpose(0, m.dim).flatten(1)[order].flatten(1)
                far = torch.cdist(rows, rows).sum(1, dtype=torch.float64).cpu()
                total += far / far.mean().clamp(min=1e-300)
        out[g.axis] = total
    return out


def random(a: ScoreInputs) -> dict[Axis, Tensor]:
    """Uniform noise: the floor that every score must beat."""
    generator = torch.Generator().manual_seed(a.seed)
    return {g.axis: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in a.groups}


def obs(a: ScoreInputs) -> dict[Axis, Tensor]:
    """The error that removal adds to the readers' outputs, those left making up for it: units go one by one, the
    cheapest first (of many the cheapest 64th at once), each time with the inverse Gram matrix of those left (SlimGPT,
    arXiv 2412.18110; Hassibi 1993). The score is the error at which a unit goes. O(64 log(units) x inputs x (inputs +
    outputs)) a reader."""
    reading = _readers(a)
    for g, found in reading.items():
        grouped = next((r for r in found if not r.plain), None)
        if grouped is not None:
            raise ModelError(
                f"{grouped.name} reads the units of {g.name} in groups, obs knows none: take another score"
            )
    seen = collect_moments(a.model, [r for each in reading.values() for r in each], _data(a))
    problems = {g: [_problem(seen[r.name], r, g) for r in _reached(g, found, seen)] for g, found in reading.items()}
    return {g.axis: removal_errors(each) for g, each in problems.items()}


def _problem(moments: Moments, reader: Consumer, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [inputs, outputs], Gram matrix [inputs, inputs] and the columns of each unit [units, columns]."""
    assert moments.second is not None
    W = reader.matrix().double()
    H = moments.second / max(moments.count, 1)
    H = H + 1e-2 * H.diagonal().mean().clamp(min=1e-12) * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return W, H, _by_unit(coordinates(reader.inputs, group.axis), group.size).to(H.device)


def _by_unit(where: Tensor, units: int) -> Tensor:
    """The indices that belong to each unit, [units, indices], where `where` is the unit of each index or -1."""
    return where.argsort(stable=True)[int((where < 0).sum()) :].view(units, -1)


def removal_errors(problems: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return for each unit the total error by the time that it goes, the cheapest first. fp64 [units].

    Removing columns c of W with the others refit costs tr(W_c' (Hinv_cc)^-1 W_c); the others become
    W - Hinv_:c (Hinv_cc)^-1 W_c, and Hinv loses Hinv_:c (Hinv_cc)^-1 Hinv_c:.

    >>> H = torch.eye(3, dtype=torch.float64)
    >>> W = torch.tensor([[3.0], [1.0], [2.0]], dtype=torch.float64)
    >>> removal_errors([(W, H, torch.arange(3)[:, None])]).tolist()
    [14.0, 1.0, 5.0]
    """
    state = [(W.clone(), torch.linalg.inv(H), columns) for W, H, columns in problems]
    units = len(problems[0][2])
    out, spent = torch.zeros(units, dtype=torch.float64), 0.0
    left = torch.ones(units, dtype=torch.bool)
    while left.any():
        cost = sum(_costs(*s).cpu() for s in state)
        assert isinstance(cost, Tensor)
        many = max(1, int(left.sum()) // AT_ONCE)
        gone = cost.masked_fill(~left, torch.inf).topk(many, largest=False).indices
        added = sum(_remove(W, inv, columns[gone].flatten()) for W, inv, columns in state)
        out[gone] = spent + max(added, 0.0) * torch.arange(1, many + 1, dtype=torch.float64) / many
        spent, left[gone] = float(out[gone[-1]]), False
    return out


def _remove(W: Tensor, inv: Tensor, c: Tensor) -> float:
    """Take columns out of a problem, in place; return the error that it adds. O(inputs x (inputs + outputs))."""
    solved = torch.linalg.solve(inv[c][:, c], torch.cat([W[c], inv[c]], 1))
    error = float((W[c] * solved[:, : W.shape[1]]).sum())
    step = inv[:, c] @ solved
    W -= step[:, : W.shape[1]]
    inv -= step[:, W.shape[1] :]
    inv[c], inv[:, c] = 0, 0
    inv[c, c] = 1  # out of the way, and still invertible
    W[c] = 0
    return error


def _costs(W: Tensor, inv: Tensor, columns: Tensor) -> Tensor:
    """tr(W_c' (Hinv_cc)^-1 W_c) of every unit. [units]"""
    if columns.shape[1] == 1:
        return W.square().sum(1)[columns[:, 0]] / inv.diagonal()[columns[:, 0]].clamp(min=1e-30)
    blocks = inv[columns[:, :, None], columns[:, None, :]]
    rows = W[columns]
    return (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))


@dataclass(frozen=True)
class UnitScore:
    """A function, what it reads besides weights, and whether its numbers mean the same in all groups."""

    of: Callable[[ScoreInputs], dict[Axis, Tensor]]
    needs: str = ""  # "", "inputs", "gradient"
    comparable: bool = False


UNIT_SCORES: Mapping[str, UnitScore] = {
    "magnitude": UnitScore(_of_weights(Tensor.square)),  # squared L2 norm of all slices
    "l1": UnitScore(_of_weights(Tensor.abs)),
    "random": UnitScore(random),
    "scale": UnitScore(scale),
    "median": UnitScore(median),
    "gradient": UnitScore(_of_gradients(lambda W, g: g.abs()), "gradient", True),
    "taylor": UnitScore(_of_gradients(torch.mul, signed=True), "gradient", True),  # |sum w g| (Molchanov 2019, eq. 8)
    "fisher": UnitScore(_of_gradients(lambda W, g: (W * g).square()), "gradient", True),
    "activation": UnitScore(_of_inputs(lambda m, r: m.mean_abs), "inputs"),
    "apoz": UnitScore(_of_inputs(lambda m, r: m.nonzero), "inputs"),  # share of inputs that are not 0 (Hu 2016)
    # var(x_j) ||W_:j||^2 (FLAP, arXiv 2312.11983, eq. 5)
    "fluctuation": UnitScore(_of_inputs(lambda m, r: m.variance * r.matrix().square().sum(1)), "inputs"),
    "obs": UnitScore(obs, "inputs", True),
}


def unit_scores(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Group],
    score: str = "magnitude",
    *,
    reduce: str = "sum",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> dict[Axis, Tensor]:
    """Return how much each unit of each group matters, fp64 [units]. Raises DataError without the data that the score
    needs, ModelError for a group that it cannot see or numbers that are not finite."""
    out = UNIT_SCORES[score].of(ScoreInputs(model, graph, groups, reduce, data, loss, seed))
    for g in groups:
        if not torch.isfinite(out[g.axis]).all():
            raise ModelError(f"the {score} score of {g.name} is not finite: NaN or inf in weights or data")
    return out
