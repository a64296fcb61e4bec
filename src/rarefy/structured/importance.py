"""Importance of units, fp64 [units] a group: the least important are removed first.

A unit has slices in several parameters (`Group.members`): those that produce it and those that consume it. Weight
scores combine all of them. Activation scores look at the inputs of consumers, after the nonlinearity. `obs` measures
the output error of consumers. A new score is one function here and one line in UNIT_SCORES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError
from rarefy.dependency.graph import Graph, Group
from rarefy.dependency.symbolic_dims import Axis, leaves, unit_of_index
from rarefy.model.batches import count_tokens
from rarefy.model.forward import call, check_batches, evaluating, on_device, trainable
from rarefy.model.losses import Loss, check_finite, resolve_loss
from rarefy.structured.consumers import Consumer, Moments, collect_moments, consumers_of

AT_ONCE = 64  # a step of obs removes one in so many of the remaining units
REDUCTIONS = ("sum", "mean", "max")
# of a group: sums of values at each index of a dimension, values per index, unit of each index (-1: none)
Slices = Sequence[tuple[Tensor, int, Tensor]]


@dataclass(frozen=True)
class ScoreInputs:
    """The model, groups and data that a score is computed from."""

    model: nn.Module
    graph: Graph
    groups: Sequence[Group]
    reduce: str
    data: Iterable[Any] | None
    loss: Loss | None
    seed: int
    removed: Mapping[Axis, int] = field(default_factory=dict)


def reduce_slices(slices: Slices, units: int, reduce: str, *, fair: bool) -> Tensor:
    """Return one number a unit, fp64 [units]: the sum or mean of its values, or the largest mean of one parameter.

    With `fair`, each parameter is divided by its mean first, so that all count alike. O(indices).
    """
    sums, counts = torch.zeros(units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64)
    largest = torch.full((units,), -torch.inf, dtype=torch.float64)
    for sums_at, per_index, unit_of in slices:
        used = unit_of >= 0
        each = torch.zeros(units, dtype=torch.float64).index_add_(0, unit_of[used], sums_at[used])
        count = torch.bincount(unit_of[used], minlength=units) * per_index
        each = each / each.abs().mean().clamp(min=1e-300) if fair else each
        sums += each
        counts += count
        largest = torch.maximum(largest, each / count.clamp(min=1))
    return {"sum": sums, "mean": sums / counts.clamp(min=1), "max": largest}[reduce]


def sum_along(values: Tensor, dim: int) -> tuple[Tensor, int]:
    """Return the sums of values at each index of a dimension, fp64 on the CPU, and the values per index. O(values)."""
    size = values.shape[dim]
    return values.transpose(0, dim).reshape(size, -1).sum(1, dtype=torch.float64).cpu(), values.numel() // size


class SliceSums:
    """Values of parameters summed along each dimension that has units; computed once for all groups."""

    def __init__(self, graph: Graph, values: Callable[[str, nn.Parameter], Tensor | None]):
        self.graph, self.values = graph, values
        self.cache: dict[str, dict[int, tuple[Tensor, int]]] = {}

    def of(self, group: Group) -> Slices:
        """Return the slices of a group: of its parameters with two or more dimensions, or of all if there are none."""
        slices = []
        for m in group.members:
            W = getattr(*self.graph.owners[m.name][0])
            if isinstance(W, nn.Parameter):
                sums = self._along(m.name, W).get(m.dim)
                if sums is not None:
                    unit_of = self.graph.unit_indices(m.name, m.dim)[group.axis]
                    slices.append((W.dim() > 1, (*sums, unit_of)))
        return [s for matrix, s in slices if matrix] or [s for _, s in slices]

    def _along(self, name: str, W: nn.Parameter) -> dict[int, tuple[Tensor, int]]:
        if name not in self.cache:
            values = self.values(name, W)
            dims = self.graph.dims[name]
            free = [d for d in range(W.dim()) if any(a.lock is None for a in leaves(dims[d]))]
            self.cache[name] = {} if values is None else {d: sum_along(values, d) for d in free}
        return self.cache[name]


def _weight_score(of: Callable[[Tensor], Tensor]) -> Callable[[ScoreInputs], dict[Axis, Tensor]]:
    """Return a score that sums `of(W)` over the slices of a unit."""

    def score(a: ScoreInputs) -> dict[Axis, Tensor]:
        sums = SliceSums(a.graph, lambda _, W: of(W.detach().float()))
        return {g.axis: reduce_slices(sums.of(g), g.size, a.reduce, fair=True) for g in a.groups}

    return score


def _gradient_score(of: Callable[[Tensor, Tensor], Tensor], *, signed: bool = False) -> Any:
    """Return a score of weights and gradients, averaged over the batches; `signed`: terms of a unit may cancel."""

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
    """Yield {parameter name: gradient} and the number of tokens for each batch."""
    names = list(dict.fromkeys(m.name for g in a.groups for m in g.members))
    parameters = {name: getattr(*a.graph.owners[name][0]) for name in names}
    parameters = {name: p for name, p in parameters.items() if isinstance(p, nn.Parameter)}
    with evaluating(a.model), trainable(list(parameters.values())), torch.enable_grad():
        for index, batch in enumerate(_data(a)):
            batch = on_device(a.model, batch)
            value = check_finite(resolve_loss(a.loss)(call(a.model, batch), batch), index)
            grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            yield dict(zip(parameters, grads)), count_tokens(batch)


def _input_score(of: Callable[[Moments, Consumer], Tensor]) -> Callable[[ScoreInputs], dict[Axis, Tensor]]:
    """Return a score of the inputs of a group's consumers, summed over all consumers."""

    def score(a: ScoreInputs) -> dict[Axis, Tensor]:
        by_group = _consumers(a)
        moments = collect_moments(a.model, [c for each in by_group.values() for c in each], _data(a), gram=False)
        out = {}
        for g, consumers in by_group.items():
            slices = [
                (of(moments[c.name], c).cpu(), 1, unit_of_index(c.inputs, g.axis))
                for c in _observed(g, consumers, moments)
            ]
            out[g.axis] = reduce_slices(slices, g.size, a.reduce, fair=False)
        return out

    return score


def _consumers(a: ScoreInputs) -> dict[Group, list[Consumer]]:
    """Return the consumers of each group. Raises ModelError for a group without any."""
    by_group = consumers_of(a.graph, a.groups)
    for g, consumers in by_group.items():
        if not consumers:
            raise ModelError(f"no Linear or convolution reads the units of {g.name} ({g.kind}): ignore it, or use "
                             "a score of weights such as magnitude")  # fmt: skip
    return by_group


def _observed(group: Group, consumers: list[Consumer], moments: Mapping[str, Moments]) -> list[Consumer]:
    """Return the consumers that have moments. Raises DataError where no batch reaches any."""
    observed = [c for c in consumers if c.name in moments]
    if not observed:
        raise DataError(f"no batch of the data reaches {consumers[0].name}, which reads the units of {group.name}")
    return observed


def _data(a: ScoreInputs) -> Iterable[Any]:
    """Return the data. Raises DataError where there is none."""
    if a.data is None:
        raise DataError("this score needs data: give batches")
    check_batches(a.data)
    return a.data


def scale(a: ScoreInputs) -> dict[Axis, Tensor]:
    """Return |gamma| of the norm that scales the units (Network Slimming; Liu 2017)."""
    out = {}
    for g in a.groups:
        slices = []
        for m in g.members:
            module, attribute = a.graph.owners[m.name][0]
            if attribute == "weight" and "Norm" in type(module).__name__:
                gamma = getattr(module, attribute).detach().float().abs()
                slices.append((*sum_along(gamma, m.dim), a.graph.unit_indices(m.name, m.dim)[g.axis]))
        if not slices:
            raise ModelError(f"no norm scales the units of {g.name} ({g.kind}): ignore it, or use another score")
        out[g.axis] = reduce_slices(slices, g.size, a.reduce, fair=True)
    return out


def median(a: ScoreInputs) -> dict[Axis, Tensor]:
    """Return the sum of distances to the weights of all other units (FPGM; He 2019).

    Units near the geometric median are redundant.
    """
    out = {}
    for g in a.groups:
        total = torch.zeros(g.size, dtype=torch.float64)
        for m in (m for m in g.members if m.role == "out"):
            W = getattr(*a.graph.owners[m.name][0])
            unit_of = a.graph.unit_indices(m.name, m.dim)[g.axis]
            if isinstance(W, nn.Parameter) and W.dim() > 1:
                order = _by_unit(unit_of, g.size).to(W.device)
                rows = W.detach().float().transpose(0, m.dim).flatten(1)[order].flatten(1)
                distances = torch.cdist(rows, rows).sum(1, dtype=torch.float64).cpu()
                total += distances / distances.mean().clamp(min=1e-300)
        out[g.axis] = total
    return out


def random(a: ScoreInputs) -> dict[Axis, Tensor]:
    """Return uniform noise: the baseline of every score."""
    generator = torch.Generator().manual_seed(a.seed)
    return {g.axis: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in a.groups}


def obs(a: ScoreInputs) -> dict[Axis, Tensor]:
    """Return the output error of the consumers at which a unit is removed, with the remaining weights refitted.

    Units are removed one by one, the cheapest first (of many the cheapest 64th at once), each time with the inverse
    Gram matrix of those that remain (SlimGPT, arXiv 2412.18110; Hassibi 1993). O(64 log(units) x inputs x (inputs +
    outputs)) a consumer.
    """
    by_group = _consumers(a)
    for g, consumers in by_group.items():
        grouped = next((c for c in consumers if not c.plain), None)
        if grouped is not None:
            raise ModelError(
                f"{grouped.name} reads the units of {g.name} in groups, which obs does not support: use another score"
            )
    moments = collect_moments(a.model, [c for each in by_group.values() for c in each], _data(a))
    errors = {}
    for g, consumers in by_group.items():
        problems = [_problem(moments[c.name], c, g) for c in _observed(g, consumers, moments)]
        errors[g.axis] = removal_errors(problems, a.removed.get(g.axis))
    return errors


def _problem(moments: Moments, consumer: Consumer, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights [inputs, outputs], Gram matrix [inputs, inputs] and columns of each unit [units, columns]."""
    assert moments.second is not None
    W = consumer.matrix().double()
    n = max(moments.count, 1)
    H = moments.second / n
    damping = 1e-2 + (len(H) / n) ** 2  # with few rows the errors would be those of their noise
    H = H + damping * H.diagonal().mean().clamp(min=1e-12) * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return W, H, _by_unit(unit_of_index(consumer.inputs, group.axis), group.size).to(H.device)


def _by_unit(unit_of: Tensor, units: int) -> Tensor:
    """Return the indices of each unit, [units, indices]; `unit_of` is the unit of each index or -1."""
    return unit_of.argsort(stable=True)[int((unit_of < 0).sum()) :].view(units, -1)


def removal_errors(problems: Sequence[tuple[Tensor, Tensor, Tensor]], removed: int | None = None) -> Tensor:
    """Return the total error at which each unit is removed, the cheapest first. fp64 [units].

    Once `removed` units are gone, each other one gets the error at which it would be the next.

    Removing columns c of W and refitting the others costs tr(W_c' (Hinv_cc)^-1 W_c). The others become
    W - Hinv_:c (Hinv_cc)^-1 W_c, and Hinv loses Hinv_:c (Hinv_cc)^-1 Hinv_c: (Hassibi 1993, for sets of weights).

    >>> H = torch.eye(3, dtype=torch.float64)
    >>> W = torch.tensor([[3.0], [1.0], [2.0]], dtype=torch.float64)
    >>> removal_errors([(W, H, torch.arange(3)[:, None])]).tolist()
    [14.0, 1.0, 5.0]
    """
    state = [(W.clone(), torch.linalg.inv(H), columns) for W, H, columns in problems]
    units = len(problems[0][2])
    errors, total = torch.zeros(units, dtype=torch.float64), 0.0
    remaining = torch.ones(units, dtype=torch.bool)
    while remaining.any():
        cost = sum(_costs(*s).cpu() for s in state)
        assert isinstance(cost, Tensor)
        if removed is not None and int(remaining.sum()) <= units - removed:
            return torch.where(remaining, total + cost.clamp(min=0), errors)
        count = max(1, int(remaining.sum()) // AT_ONCE)
        cheapest = cost.masked_fill(~remaining, torch.inf).topk(count, largest=False).indices
        error = sum(_remove(W, inv, columns[cheapest].flatten()) for W, inv, columns in state)
        errors[cheapest] = total + max(error, 0.0) * torch.arange(1, count + 1, dtype=torch.float64) / count
        total, remaining[cheapest] = float(errors[cheapest[-1]]), False
    return errors


def _remove(W: Tensor, inv: Tensor, c: Tensor) -> float:
    """Remove columns from a problem, in place; return the error that this adds. O(inputs x (inputs + outputs))."""
    solved = torch.linalg.solve(inv[c][:, c], torch.cat([W[c], inv[c]], 1))
    error = float((W[c] * solved[:, : W.shape[1]]).sum())
    step = inv[:, c] @ solved
    W -= step[:, : W.shape[1]]
    inv -= step[:, W.shape[1] :]
    inv[c], inv[:, c] = 0, 0
    inv[c, c] = 1  # decoupled, and still invertible
    W[c] = 0
    return error


def _costs(W: Tensor, inv: Tensor, columns: Tensor) -> Tensor:
    """Return tr(W_c' (Hinv_cc)^-1 W_c) of every unit, [units]."""
    if columns.shape[1] == 1:
        return W.square().sum(1)[columns[:, 0]] / inv.diagonal()[columns[:, 0]].clamp(min=1e-30)
    root = _cholesky(inv[columns[:, :, None], columns[:, None, :]])
    return torch.linalg.solve_triangular(root, W[columns], upper=False).square().sum((1, 2))


def _cholesky(blocks: Tensor) -> Tensor:
    """Return lower triangular roots of positive definite matrices [units, n, n], which rounding may have made less so.

    `torch.linalg.solve` fails on several matrices of 192 x 192 in torch 2.13 with MKL.
    """
    root, failed = torch.linalg.cholesky_ex(blocks)
    for more in (1e-12, 1e-9, 1e-6) if bool(failed.any()) else ():
        mean = blocks.diagonal(dim1=1, dim2=2).mean(1)
        root, failed = torch.linalg.cholesky_ex(
            blocks + more * torch.diag_embed(mean[:, None].expand(blocks.shape[:2]))
        )
        if not bool(failed.any()):
            break
    return root.masked_fill(failed[:, None, None] > 0, torch.nan)  # a unit without a cost is not the cheapest


@dataclass(frozen=True)
class UnitScore:
    """A score function, what it needs besides weights, and whether its numbers compare between groups."""

    of: Callable[[ScoreInputs], dict[Axis, Tensor]]
    needs: str = ""  # "", "inputs", "gradient"
    comparable: bool = False


UNIT_SCORES: Mapping[str, UnitScore] = {
    "magnitude": UnitScore(_weight_score(Tensor.square)),  # squared L2 norm of all slices
    "l1": UnitScore(_weight_score(Tensor.abs)),
    "random": UnitScore(random),
    "scale": UnitScore(scale),
    "median": UnitScore(median),
    "gradient": UnitScore(_gradient_score(lambda W, g: g.abs()), "gradient", True),
    "taylor": UnitScore(_gradient_score(torch.mul, signed=True), "gradient", True),  # |sum w g| (Molchanov 2019, eq. 8)
    "fisher": UnitScore(_gradient_score(lambda W, g: (W * g).square()), "gradient", True),
    "activation": UnitScore(_input_score(lambda m, r: m.mean_abs), "inputs"),
    "apoz": UnitScore(_input_score(lambda m, r: m.nonzero), "inputs"),  # share of inputs that are not 0 (Hu 2016)
    # var(x_j) ||W_:j||^2 (FLAP, arXiv 2312.11983, eq. 5)
    "fluctuation": UnitScore(_input_score(lambda m, r: m.variance * r.matrix().square().sum(1)), "inputs"),
    "obs": UnitScore(obs, "inputs", True),
}


SCORE_OF_DATA = "fluctuation"  # the default with data


def unit_scores(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Group],
    score: str | None = None,
    *,
    reduce: str = "sum",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    removed: Mapping[Axis, int] | None = None,
) -> dict[Axis, Tensor]:
    """Return the importance of each unit of each group, fp64 [units].

    `removed` says how many units at most will be removed, where that is known: obs orders no more than these. By
    default the score is fluctuation where there is data and it applies to all groups, else magnitude.

    Raises DataError where the score needs data and has none, ModelError for a group that the score does not apply to or
    scores that are not finite.
    """
    if score is None and data is not None:
        with suppress(ModelError):
            return unit_scores(model, graph, groups, SCORE_OF_DATA, reduce=reduce, data=data)
    score = score or "magnitude"
    scores = UNIT_SCORES[score].of(ScoreInputs(model, graph, groups, reduce, data, loss, seed, removed or {}))
    for g in groups:
        if not torch.isfinite(scores[g.axis]).all():
            raise ModelError(f"the {score} score of {g.name} is not finite: NaN or inf in weights or data")
    return scores
