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
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.calibration.sequential import GroupStep, calibrate_sequentially, layer_groups
from rarefy.common.errors import ModelError, PatternError
from rarefy.common.options import Names, Options, Positive, at
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.evaluation.profiling import compare
from rarefy.model.activation_quant import get_activation_quant
from rarefy.model.attached_receipt import forget_receipt
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
from rarefy.prune.layerwise import check_solvable
from rarefy.prune.matrices import to_matrix, to_stored
from rarefy.prune.prune import check_weights
from rarefy.runtime.accelerate import WEIGHT_READERS
from rarefy.runtime.fusion_analysis import is_plain

DAMPING = 1e-4  # times the mean of diag(H), so that inputs that are always zero keep a direction
STEP = 8  # ranks chosen by time are multiples of this
BUDGETS = ("rank", "keep", "energy", "time")


Share = Annotated[float, Field(gt=0, lt=1)]


class FactorizeOptions(Options):
    """Replace layers by low-rank factors; exactly one of rank, keep, energy and time sets the size."""

    error = PatternError

    rank: Positive | None = Field(default=None, description="rank of every layer")
    keep: Share | None = Field(default=None, description="fraction of each layer's weights that its factors have")
    energy: Share | None = Field(
        default=None,
        description="fraction of the output energy on the data (without data: of the squared weights) that stays",
    )
    time: Share | None = Field(
        default=None, description="fraction of each Linear layer's time on this machine that its factors take at most"
    )
    batch: Positive = Field(default=128, description="time: how many inputs are timed")
    round_to: Positive = Field(default=1, description="ranks found by keep, energy or time are multiples of this")
    layers: Names | None = Field(
        default=None, description="selectors of layers; by default all but embeddings and head"
    )
    ignore: Names | None = Field(default=None, description="selectors of layers to leave as they are")

    @model_validator(mode="after")
    def _check_budget(self) -> FactorizeOptions:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) != 1:
            with at(*budgets[1:2]):
                raise PatternError(f"factors need one of {', '.join(BUDGETS)}, got {', '.join(budgets) or 'none'}")
        if self.rank is not None and self.round_to > 1:
            with at("round_to"):
                raise PatternError(
                    f"round_to={self.round_to} has no effect with a fixed rank={self.rank}: leave it out"
                )
        return self

    def rounded(self, rank: int, max_rank: int, up: bool = False) -> int:
        """Return the nearest multiple of `round_to` below (or above), at least one of it and at most `max_rank`."""
        return min(max_rank, max(1, rank // self.round_to + (up and rank % self.round_to > 0)) * self.round_to)


def check_beside(options: FactorizeOptions) -> None:
    """Raise PatternError for a budget other than rank, where factors are added beside layers."""
    name = next(name for name in BUDGETS if getattr(options, name) is not None)
    if name != "rank":
        raise PatternError(f"{name}={getattr(options, name)!r} is not supported for factors beside a layer: give rank")


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
    """Replace the selected layers of a model by products of smaller ones, in place (low-rank factorization).

    Linear layers become two (truncated SVD, with `data` after whitening as in SVD-LLM, Wang 2024), convolutions with a
    kernel three (Tucker-2). A layer whose factors would not be fewer weights stays, and its row says why. `save` and
    `load` keep the factors. Costs O(O C min(O, C)) for a layer of O outputs and C inputs, and the pass over the data.

    Args:
        model: any module with Linear or Conv layers.
        rank: the rank of every layer. Give exactly one of rank, keep, energy and time.
        keep: fraction of each layer's weights that its factors have.
        energy: fraction of each layer's output energy on `data` (without data: of its squared weights) that stays.
        time: fraction of each Linear layer's time, on `batch` inputs on this machine, that its factors take at most.
        batch: how many inputs `time` is measured on.
        round_to: ranks found by keep, energy or time are multiples of this, such as the group size of quantization; by
            time also of 8.
        of: the model before it was pruned or quantized: layers then stay, and get factors of `rank` beside them that
            restore most of what was lost.
        layers: names, globs or other selectors of layers; by default all but embeddings and the output head.
        ignore: selectors of layers to leave as they are.
        data: batches: errors of layer outputs are minimized, on inputs that earlier factors have changed. Without,
            errors of weights.
        progress: show progress bars.

    Returns:
        A `Report` with one row for each layer: its ranks, weights before and after, the squared error, relative to that
        of zeros, and why it stayed.

    Raises:
        RarefyError: for options, layers or data that do not fit, or where no layer would have fewer weights; the model
            is then unchanged.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> [(r["layer"], r["ranks"], r["why"]) for r in factorize_(net, keep=0.5).rows]
        [('0', '16', ''), ('2', '3', '')]
    """
    options = FactorizeOptions(
        rank=rank, keep=keep, energy=energy, time=time, batch=batch, round_to=round_to, layers=layers, ignore=ignore
    )
    return run_factorize(model, options, data, of=of, progress=progress)


def run_factorize(
    model: nn.Module,
    options: FactorizeOptions,
    data: Iterable[Any] | None = None,
    *,
    of: nn.Module | None = None,
    progress: bool = False,
) -> Report:
    """Factorize a model by checked options. See `factorize_`."""
    if of is not None:
        check_beside(options)
    if data is not None:
        check_batches(data)
        data = data if isinstance(data, list | tuple) else list(data)
    chosen = select_layers(model, options.layers, options.ignore)
    check_weights(chosen)
    whole = unwrap(model)
    reasons = {l.full_name: _why_skipped(l, whole, options, of is not None) for l in chosen}
    lost = {} if of is None else _residuals(chosen, of)
    able = [l for l in chosen if reasons[l.full_name] is None]
    factors: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    rows = {l.full_name: _row(l, "", reasons[l.full_name] or "") for l in chosen}
    for layer, H, stop in _with_gram(whole, able, data, progress):
        row, modules, ranks = _factors(layer, H, options, lost.get(layer.full_name))
        rows[layer.full_name] = row
        if modules is not None:
            factors[layer.full_name] = modules, ranks
            if stop is not None and of is None:
                stop.weights[layer.full_name] = _dense_weight(layer, modules)
    if not factors:
        texts = "; ".join(f"{n}: {r['why']}" for n, r in list(rows.items())[:4])
        raise ModelError(f"factors would make no layer smaller: {texts}")
    for layer in able:
        if layer.full_name in factors:
            replace_with_factors_(whole, layer.name, *factors[layer.full_name])
    forget_receipt(model)
    before = sum(r["weights"] for r in rows.values())
    after = sum(r["left"] for r in rows.values())
    summary = {"layers": f"{len(factors)} of {len(chosen)}", "weights": before, "left": after, "ratio": after / before}
    return Report("factorized", tuple(rows.values()), summary)


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


def _why_skipped(layer: Layer, model: nn.Module, options: FactorizeOptions, as_correction: bool) -> str | None:
    """Return why a layer cannot be factorized, or None."""
    module = layer.module
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    if not layer.name:
        return "it is the whole model: put it into a module"
    if any(layer.name.startswith(f"{n}.") for n in factor_records(model)):
        return "it is a factor itself"
    if layer.param != "weight" or (reason := why_not_factorizable(module, as_correction)) is not None:
        return f"{layer.param} cannot be factorized" if layer.param != "weight" else reason
    if len(layer.owners) > 1 or layer.tied_to:
        return "its weight is shared"
    if not as_correction and (get_activation_quant(module) is not None or not is_plain(module)):
        return (
            "its hooks would be lost"
            if get_activation_quant(module) is None
            else "its inputs are rounded: factorize first"
        )
    if isinstance(parent, WEIGHT_READERS):
        return f"{type(parent).__name__} reads its weight itself"
    if not as_correction and (parametrize.is_parametrized(module, "weight") or get_grid(layer) is not None):
        return "it is pruned or quantized: factorize first, or give of= the model before"
    if options.time is not None and not isinstance(module, nn.Linear):
        return "time supports Linear layers only"
    return None


def _residuals(chosen: Sequence[Layer], of: nn.Module) -> dict[str, Tensor]:
    """Return the weight differences [O, C] of each layer to the same layer of another model."""
    dense_modules = dict(unwrap(of).named_modules())
    residuals = {}
    for layer in chosen:
        weight = getattr(dense_modules.get(layer.name), layer.param, None)
        if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
            raise ModelError(
                f"of: expected {layer.full_name} of shape {list(layer.weight.shape)} in {type(of).__name__}"
            )
        residuals[layer.full_name] = to_matrix(layer, weight.detach().float() - layer.weight.detach().float())[0]
    return residuals


def _factors(
    layer: Layer, H: Tensor | None, options: FactorizeOptions, residual: Tensor | None
) -> tuple[dict[str, Any], nn.Module | None, tuple[int, ...]]:
    """Return the report row of a layer, its factors (None where they would not save weights), and their ranks."""
    module = layer.module
    weight = to_matrix(layer, layer.weight.detach().float())[0]
    W = weight if residual is None else residual
    L = None if H is None else _cholesky(H)
    rank_limits = max_ranks(module) if residual is None else (min(weight_sizes(module)[:2]),)
    if len(rank_limits) == 2:
        factors, ranks, error = _tucker(layer, W, H, options)
    else:
        A, B, energies = truncated(W, L)
        rank = _rank(module, energies, options, rank_limits[0])
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


def _tucker(
    layer: Layer, W: Tensor, H: Tensor | None, options: FactorizeOptions
) -> tuple[LowRank, tuple[int, ...], float]:
    """Return the factors of a convolution (Tucker-2), their ranks and relative error.

    Inputs are reduced first, by the energy that the weights read of them; then outputs, refitted on reduced inputs.
    """
    O, I, K = weight_sizes(layer.module)
    if options.time is not None:
        raise PatternError("time supports Linear layers only")
    P, energy = _input_directions(W, H, O, I, K)
    r_in = _tucker_rank(options, energy, I, P.shape[1], _tucker_ranks_for_share(O, I, K, options.keep or 1.0)[0])
    P = P[:, :r_in]  # [I, r]
    reduce = torch.block_diag(*[P] * K)  # [K I, K r]
    if H is None:
        Wz, L = W @ reduce, None
    else:
        Hz = reduce.T @ H @ reduce
        Wz, L = torch.linalg.solve(solvers.damped(Hz[None], DAMPING)[0], reduce.T @ H @ W.T).T, _cholesky(Hz)
    A, B, outputs = truncated(Wz, L)
    r_out = _tucker_rank(options, outputs, O, r_in * K, _tucker_ranks_for_share(O, I, K, options.keep or 1.0)[1])
    factors = LowRank.empty(layer.module, [r_in, r_out])
    _copy_weight(factors.down, P.T)
    core: Any = factors.core
    kernel = core.weight.shape[2:]
    _copy_weight(core, B[:r_out].reshape(r_out, K, r_in).transpose(1, 2).reshape(r_out, r_in, *kernel))
    _copy_weight(factors.up, A[:, :r_out])
    error = W - A[:, :r_out] @ B[:r_out] @ reduce.T
    G = torch.eye(W.shape[1], device=W.device) if H is None else H
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


def _tucker_rank(options: FactorizeOptions, energies: Tensor, size: int, limit: int, by_share: int) -> int:
    """Return one of the two ranks, at most `size` and `limit`; each keeps half of the energy that may be lost."""
    max_rank = min(size, limit)
    if options.energy is not None:
        return options.rounded(_rank_for_energy(energies, (1 + options.energy) / 2), max_rank, up=True)
    return min(options.rank, max_rank) if options.rank is not None else options.rounded(by_share, max_rank)


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


def _rank(module: nn.Module, energies: Tensor, options: FactorizeOptions, max_rank: int) -> int:
    """Return the rank that a budget allows."""
    O, I, K = weight_sizes(module)
    if options.rank is not None:
        return min(options.rank, max_rank)
    if options.keep is not None:
        return options.rounded(int(options.keep * O * I * K / (O + I * K)), max_rank)
    if options.energy is not None:
        return options.rounded(_rank_for_energy(energies, options.energy), max_rank, up=True)
    assert options.time is not None
    return _rank_for_time(module, options.time, options.batch, max_rank, math.lcm(STEP, options.round_to))


def _rank_for_energy(energies: Tensor, share: float) -> int:
    """Return how many of the largest energies (sorted, descending) reach a share of their sum."""
    sums = energies.double().cumsum(0)
    return min(len(sums), int((sums < share * sums[-1]).sum()) + 1)


def _rank_for_time(module: Any, share: float, batch: int, max_rank: int, step: int) -> int:
    """Return the largest multiple of `step` whose factors take at most a share of the layer's time.

    Returns `max_rank` where none does.
    """
    x = torch.randn(batch, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
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
