"""`factorize_`: low-rank factors in place of weights, or added to pruned and quantized layers.

W     [O, C]   matrix of a layer; the columns of a convolution are kernel position x input
H     [C, C]   Gram matrix of its inputs; the identity without data
A, B  [O, r], [r, C] of least ||(W - A B) X||: A holds the first left singular vectors of W L, where H = L L^T, and
      B = A^T W (truncation after whitening as in SVD-LLM, Wang 2024, eq. 5, without its inverse)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.calibration.sequential import GroupStep, calibrate_sequentially, layer_groups
from rarefy.common.errors import ModelError, PatternError
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.evaluation.profiling import compare
from rarefy.model.activation_quant import get_activation_quant
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, Selector, select_layers, unwrap
from rarefy.model.lowrank_modules import (
    Corrected,
    LowRank,
    factor_records,
    max_ranks,
    num_factor_weights,
    replace_with_factors_,
    weight_sizes,
    why_not_factorizable,
)
from rarefy.model.quant_grid import get_grid
from rarefy.prune import solvers
from rarefy.prune.layerwise import check_solvable, to_matrix, to_stored
from rarefy.prune.prune import check_weights
from rarefy.runtime.accelerate import WEIGHT_READERS
from rarefy.runtime.fusion_analysis import is_plain

DAMPING = 1e-4  # times the mean of diag(H), so that inputs that are always zero keep a direction
STEP = 8  # ranks chosen by time are multiples of this
BUDGETS = ("rank", "keep", "energy", "time")


@dataclass(frozen=True)
class Ask:
    """How many ranks; one of the four is given."""

    rank: int | None = None
    keep: float | None = None
    energy: float | None = None
    time: float | None = None
    batch: int = 1
    beside: bool = False
    round_to: int = 1

    def rounded(self, rank: int, most: int, up: bool = False) -> int:
        """The nearest multiple below (or above) that is one, as far as there are so many."""
        return min(most, max(1, rank // self.round_to + (up and rank % self.round_to > 0)) * self.round_to)


def factorize_(
    model: nn.Module,
    *,
    rank: int | None = None,
    keep: float | None = None,
    energy: float | None = None,
    time: float | None = None,
    batch: int = 128,
    round_to: int = 1,
    of: nn.Module | None = None,
    layers: Selector = None,
    ignore: Selector = None,
    data: Iterable[Any] | None = None,
    progress: bool = False,
) -> Report:
    """Put products of thinner layers in the place of the selected ones, in place; return a row a layer.

    rank      of every layer
    keep      the share of each layer's weights that its factors have
    energy    the share of each layer's output energy on `data` (without: of its weights' squares) that they keep
    time      the share of its time, on `batch` inputs on this machine, that they take at most (Linear layers)
    round_to  ranks found by keep, energy or time are multiples of this: of a group's width, to be quantized by groups
    of        the model before it was pruned or quantized: layers stay, and get the thin layers of `rank` beside them
              that bring back most of what they have lost against it
    data      batches: what counts are errors of outputs, of layers on inputs that factors before them have changed;
              without, errors of weights (plain SVD)

    Convolutions with a kernel become three (Tucker-2). A layer whose factors would not be fewer weights stays, and its
    row says why; ModelError where that is true of all. `save` and `load` know of them. Raises the ValueErrors of
    `rarefy.common.errors`, and then the model is unchanged. O(O C min(O, C)) a layer besides the pass.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> [(r["layer"], r["ranks"], r["why"]) for r in factorize_(net, keep=0.5).rows]
    [('0', '16', ''), ('2', '3', '')]
    """
    ask = asked(rank, keep, energy, time, batch, of is not None, round_to)
    if data is not None:
        check_batches(data)
        data = data if isinstance(data, list | tuple) else list(data)
    chosen = select_layers(model, layers, ignore)
    check_weights(chosen)
    whole = unwrap(model)
    kept = {l.full_name: _why_skipped(l, whole, ask) for l in chosen}
    lost = {} if of is None else _residuals(chosen, of)
    able = [l for l in chosen if kept[l.full_name] is None]
    made: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    rows = {l.full_name: _row(l, "", kept[l.full_name] or "") for l in chosen}
    for layer, H, stop in _with_gram(whole, able, data, progress):
        row, factors, ranks = _factors(layer, H, ask, lost.get(layer.full_name))
        rows[layer.full_name] = row
        if factors is not None:
            made[layer.full_name] = factors, ranks
            if stop is not None and not ask.beside:
                stop.weights[layer.full_name] = _dense_weight(layer, factors)
    if not made:
        reasons = "; ".join(f"{n}: {r['why']}" for n, r in list(rows.items())[:4])
        raise ModelError(f"no layer has factors that would save anything: {reasons}")
    for layer in able:
        if layer.full_name in made:
            replace_with_factors_(whole, layer.name, *made[layer.full_name])
    model.__dict__.pop("rarefy_receipt", None)  # what it measured is no longer so
    before = sum(r["weights"] for r in rows.values())
    after = sum(r["left"] for r in rows.values())
    summary = {"layers": f"{len(made)} of {len(chosen)}", "weights": before, "left": after, "ratio": after / before}
    return Report("factorized", tuple(rows.values()), summary)


def asked(rank: Any, keep: Any, energy: Any, time: Any, batch: Any, beside: bool, round_to: Any = 1) -> Ask:
    """Return what `factorize_` is asked for; PatternError for what it does not know."""
    given = {n: v for n, v in zip(BUDGETS, (rank, keep, energy, time)) if v is not None}
    if len(given) != 1:
        raise PatternError(f"factors need one of {', '.join(BUDGETS)}, got {', '.join(given) or 'none'}")
    (name, value), *_ = given.items()
    if name == "rank" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise PatternError(f"rank is a whole number from 1 up, got {value!r}")
    if name != "rank" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1):
        raise PatternError(f"{name} is a fraction between 0 and 1, got {value!r}")
    for what, n in (("batch", batch), ("round_to", round_to)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise PatternError(f"{what} is a whole number from 1 up, got {n!r}")
    if rank is not None and round_to > 1:
        raise PatternError(f"round_to={round_to} is for ranks that are found; rank={rank} is given: leave it out")
    if beside and name != "rank":
        raise PatternError(f"{name}={value!r} is for factors in a layer's place; beside one, give rank")
    return Ask(rank, keep, energy, time, batch, beside, round_to)


def truncated(W: Tensor, L: Tensor | None, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return A [O, r], B [r, C] and the energies [min(O, C)], as at the head of this file.

    `L` None is the identity, `rank` None keeps all. O(O C min(O, C)).

    >>> A, B, e = truncated(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), None, 1)
    >>> (A @ B).abs().round().tolist(), e.tolist()
    ([[3.0, 0.0], [0.0, 0.0]], [9.0, 1.0])
    """
    U, S, _ = torch.linalg.svd(W if L is None else W @ L, full_matrices=False)
    A = U[:, :rank]
    return A, A.T @ W, S.square()


def _with_gram(
    model: nn.Module, layers: Sequence[Layer], data: Sequence[Any] | None, progress: bool
) -> Iterable[tuple[Layer, Tensor | None, GroupStep | None]]:
    """Yield each layer in the order of execution, with the Gram matrix of its inputs where there is data.

    The weights of `model` are restored afterwards.
    """
    if data is None or not layers:
        for layer in track(layers, "factorizing", progress, len(layers)):
            yield layer, None, None
        return
    first = check_solvable(layers, data, "factorizing with data")
    originals = {l.full_name: l.original.detach().clone() for l in layers}
    try:
        groups = layer_groups(model, first, layers)
        with closing(calibrate_sequentially(model, data, groups)) as stops:
            for stop in track(stops, "factorizing", progress, len(groups)):
                assert isinstance(stop, GroupStep) and stop.gram.H is not None
                with torch.autocast("cpu", enabled=False):
                    for layer in stop.group.layers:
                        yield layer, stop.gram.H[0], stop
    finally:
        with torch.no_grad():
            for layer in layers:
                layer.original.copy_(originals[layer.full_name])


def _why_skipped(layer: Layer, model: nn.Module, ask: Ask) -> str | None:
    """Return why a layer cannot be factorized, or None."""
    module = layer.module
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    if not layer.name:
        return "it is the whole model: put it into a module"
    if any(layer.name.startswith(f"{n}.") for n in factor_records(model)):
        return "it is a factor itself"
    if layer.param != "weight" or (reason := why_not_factorizable(module, ask.beside)) is not None:
        return f"{layer.param} cannot be factorized" if layer.param != "weight" else reason
    if len(layer.owners) > 1 or layer.tied_to:
        return "its weight is shared"
    if not ask.beside and (get_activation_quant(module) is not None or not is_plain(module)):
        return (
            "its hooks would be lost"
            if get_activation_quant(module) is None
            else "its inputs are rounded: factorize first"
        )
    if isinstance(parent, WEIGHT_READERS):
        return f"{type(parent).__name__} reads its weight itself"
    if not ask.beside and (parametrize.is_parametrized(module, "weight") or get_grid(layer) is not None):
        return "it is pruned or quantized: factorize first, or give of= the model before"
    if ask.time is not None and not isinstance(module, nn.Linear):
        return "time is for Linear layers"
    return None


def _residuals(chosen: Sequence[Layer], of: nn.Module) -> dict[str, Tensor]:
    """Return what each layer lost against the same layer of another model, [O, C]."""
    dense_modules = dict(unwrap(of).named_modules())
    residuals = {}
    for layer in chosen:
        weight = getattr(dense_modules.get(layer.name), layer.param, None)
        if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
            raise ModelError(f"of: {type(of).__name__} has no {layer.full_name} of {list(layer.weight.shape)}")
        residuals[layer.full_name] = to_matrix(layer, weight.detach().float() - layer.weight.detach().float())[0]
    return residuals


def _factors(
    layer: Layer, H: Tensor | None, ask: Ask, residual: Tensor | None
) -> tuple[dict[str, Any], nn.Module | None, tuple[int, ...]]:
    """Return the report row of a layer, its factors (None where they would not save weights), and their ranks."""
    module = layer.module
    weight = to_matrix(layer, layer.weight.detach().float())[0]
    W = weight if residual is None else residual
    L = None if H is None else _cholesky(H)
    rank_limits = max_ranks(module) if residual is None else (min(weight_sizes(module)[:2]),)
    if len(rank_limits) == 2:
        factors, ranks, error = _tucker(layer, W, H, ask)
    else:
        A, B, energies = truncated(W, L)
        rank = _rank(module, energies, ask, rank_limits[0])
        ranks, error = (rank,), _ratio(energies[rank:].sum(), energies.sum())
        factors = Corrected.empty(module, rank) if residual is not None else LowRank.empty(module, [rank])
        # factors of equal norm lose less in bf16
        scale = math.sqrt(float(B[:rank].norm() / max(A[:, :rank].norm(), 1e-30))) or 1.0
        _copy_weight(factors.down, B[:rank] / scale)
        _copy_weight(factors.up, A[:, :rank] * scale)
    if residual is not None:
        return (
            _row(layer, ",".join(map(str, ranks)), "", num_factor_weights(module, ranks) + weight.numel(), error),
            factors,
            ranks,
        )
    after, before = num_factor_weights(module, ranks), weight.numel()
    if after >= before:
        why = f"rank {','.join(map(str, ranks))} is {after:,} weights, it has {before:,}"
        return _row(layer, "", why), None, ranks
    return _row(layer, ",".join(map(str, ranks)), "", after, error), factors, ranks


def _tucker(layer: Layer, W: Tensor, H: Tensor | None, ask: Ask) -> tuple[LowRank, tuple[int, ...], float]:
    """Return the factors of a convolution (Tucker-2), their ranks and relative error.

    Inputs are reduced first, by the energy that the weights read of them; then outputs, refitted on reduced inputs.
    """
    O, I, K = weight_sizes(layer.module)
    if ask.time is not None:
        raise PatternError("time is for Linear layers")
    P, energy = _input_directions(W, H, O, I, K)
    r_in = _tucker_rank(ask, energy, I, I, _tucker_ranks_for_share(O, I, K, ask.keep or 1.0)[0])
    P = P[:, :r_in]  # [I, r]
    reduce = torch.block_diag(*[P] * K)  # [K I, K r]
    if H is None:
        Wz, L = W @ reduce, None
    else:
        Hz = reduce.T @ H @ reduce
        Wz, L = torch.linalg.solve(solvers.damped(Hz[None], DAMPING)[0], reduce.T @ H @ W.T).T, _cholesky(Hz)
    A, B, outputs = truncated(Wz, L)
    r_out = _tucker_rank(ask, outputs, O, r_in * K, _tucker_ranks_for_share(O, I, K, ask.keep or 1.0)[1])
    factors = LowRank.empty(layer.module, [r_in, r_out])
    _copy_weight(factors.down, P.T)
    core: Any = factors.core
    kernel = core.weight.shape[2:]
    _copy_weight(core, B[:r_out].reshape(r_out, K, r_in).transpose(1, 2).reshape(r_out, r_in, *kernel))
    _copy_weight(factors.up, A[:, :r_out])
    error = W - A[:, :r_out] @ B[:r_out] @ reduce.T
    G = torch.eye(W.shape[1]) if H is None else H
    return factors, (r_in, r_out), _ratio(((error @ G) * error).sum(), ((W @ G) * W).sum())


def _input_directions(W: Tensor, H: Tensor | None, O: int, I: int, K: int) -> tuple[Tensor, Tensor]:
    """Return the directions of a convolution's inputs, [I, I], and the energy that the weights read of each."""
    tall = W.reshape(O, K, I).permute(2, 0, 1).reshape(I, O * K)
    if H is None:
        P, S, _ = torch.linalg.svd(tall, full_matrices=False)
        return P, S.square()
    root = _cholesky(torch.stack([H[k * I : (k + 1) * I, k * I : (k + 1) * I] for k in range(K)]).mean(0))
    U, S, _ = torch.linalg.svd(root.T @ tall, full_matrices=False)
    return torch.linalg.qr(root @ U)[0], S.square()


def _tucker_rank(ask: Ask, energies: Tensor, size: int, limit: int, by_share: int) -> int:
    """Return one of the two ranks, at most `size` and `limit`; each keeps half of the energy that may be lost."""
    max_rank = min(size, limit)
    if ask.energy is not None:
        return ask.rounded(_rank_for_energy(energies, (1 + ask.energy) / 2), max_rank, up=True)
    return min(ask.rank, max_rank) if ask.rank is not None else ask.rounded(by_share, max_rank)


def _tucker_ranks_for_share(O: int, I: int, K: int, keep: float) -> tuple[int, int]:
    """Return the ranks of inputs and outputs that leave a share of a convolution's weights, in equal proportion."""
    a, b, c = O * I * K, O * O + I * I, -keep * O * I * K
    share = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    return max(1, int(share * I)), max(1, int(share * O))


def _cholesky(H: Tensor) -> Tensor:
    """Return L with L L^T = H, damped."""
    for damping in (DAMPING, 100 * DAMPING, 1.0):
        L, info = torch.linalg.cholesky_ex(solvers.damped(H[None], damping)[0])
        if not info.any():
            return L
    raise ModelError("the Gram matrix of a layer's inputs is not positive definite: check its inputs for NaN or inf")


def _rank(module: nn.Module, energies: Tensor, ask: Ask, max_rank: int) -> int:
    """Return the rank that a budget allows."""
    O, I, K = weight_sizes(module)
    if ask.rank is not None:
        return min(ask.rank, max_rank)
    if ask.keep is not None:
        return ask.rounded(int(ask.keep * O * I * K / (O + I * K)), max_rank)
    if ask.energy is not None:
        return ask.rounded(_rank_for_energy(energies, ask.energy), max_rank, up=True)
    assert ask.time is not None
    return _rank_for_time(module, ask.time, ask.batch, max_rank, math.lcm(STEP, ask.round_to))


def _rank_for_energy(energies: Tensor, share: float) -> int:
    """Return how many of falling energies make up a share of their sum."""
    sums = energies.double().cumsum(0)
    return min(len(sums), int((sums < share * sums[-1]).sum()) + 1)


def _rank_for_time(module: Any, share: float, batch: int, max_rank: int, step: int) -> int:
    """Return the largest multiple of `step` whose factors take at most a share of the layer's time.

    Returns `max_rank` where none does.
    """
    x = torch.randn(batch, module.in_features, dtype=module.weight.dtype)
    low, high = 0, max(1, min(max_rank, module.out_features * module.in_features // sum(module.weight.shape)) // step)
    with torch.no_grad():
        while low < high:
            middle = (low + high + 1) // 2
            factors = LowRank.empty(module, [middle * step])
            times = compare({"dense": lambda: module(x), "factors": lambda: factors(x)}, repeats=15)  # noqa: B023
            if times["factors"].median <= share * times["dense"].median:
                low = middle
            else:
                high = middle - 1
    return low * step or max_rank


@torch.no_grad()
def _copy_weight(module: Any, weight: Tensor) -> None:
    """Copy a weight into a module, reshaped."""
    module.weight.copy_(weight.reshape(module.weight.shape))


def _dense_weight(layer: Layer, factors: Any) -> Tensor:
    """Return the product of factors in the shape in which the layer stores its weight."""
    with torch.no_grad():
        weight = factors.weight
    shape = tuple(layer.original.shape)
    if layer.layout.kind == "conv1d-hf":
        return to_stored(layer, weight[None], shape).to(layer.original.dtype)
    return weight.reshape(shape).to(layer.original.dtype)


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Return part / whole."""
    return float(part.clamp(min=0) / whole.clamp(min=1e-30))


def _row(
    layer: Layer, ranks: str, why: str, remaining: int | None = None, error: float | None = None
) -> dict[str, Any]:
    """Return the report row of a layer."""
    size = layer.original.numel()
    return {
        "layer": layer.full_name,
        "shape": "x".join(map(str, layer.original.shape)),
        "ranks": ranks,
        "weights": size,
        "left": size if remaining is None else remaining,
        "error": error,
        "why": why,
    }
