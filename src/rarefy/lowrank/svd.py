"""`factorize_`: weights as products of thinner ones, or what pruning and quantizing took from them as such.

W     [O, C]   a layer's matrix; a convolution's columns are kernel position x input
H     [C, C]   the Gram matrix of its inputs; the identity where there is no data
A, B  [O, r], [r, C] with the least ||(W - A B) X||: A are the first left singular vectors of W L, where H = L L^T,
      and B = A^T W (truncation after whitening, as in SVD-LLM, Wang 2024, eq. 5, without its inverse)
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

DAMPING = 1e-4  # times the mean of diag(H), so that inputs that were never seen keep a direction
STEP = 8  # ranks by measured time are multiples of this at least
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
    kept = {l.full_name: _why_left(l, whole, ask) for l in chosen}
    lost = {} if of is None else _lost(chosen, of)
    able = [l for l in chosen if kept[l.full_name] is None]
    made: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    rows = {l.full_name: _row(l, "", kept[l.full_name] or "") for l in chosen}
    for layer, H, stop in _passing(whole, able, data, progress):
        row, factors, ranks = _factors(layer, H, ask, lost.get(layer.full_name))
        rows[layer.full_name] = row
        if factors is not None:
            made[layer.full_name] = factors, ranks
            if stop is not None and not ask.beside:
                stop.weights[layer.full_name] = _product(layer, factors)
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
    """Return (A [O, r], B [r, C], energies [min(O, C)]) as at the head of this file; `L` None is the identity, `rank`
    None all. O(O C min(O, C)).

    >>> A, B, e = truncated(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), None, 1)
    >>> (A @ B).abs().round().tolist(), e.tolist()
    ([[3.0, 0.0], [0.0, 0.0]], [9.0, 1.0])
    """
    U, S, _ = torch.linalg.svd(W if L is None else W @ L, full_matrices=False)
    A = U[:, :rank]
    return A, A.T @ W, S.square()


def _passing(
    model: nn.Module, layers: Sequence[Layer], data: Sequence[Any] | None, progress: bool
) -> Iterable[tuple[Layer, Tensor | None, GroupStep | None]]:
    """Each layer in the order in which the model runs, with the Gram matrix of its inputs where there is data. The
    weights of `model` are its own again afterwards."""
    if data is None or not layers:
        for layer in track(layers, "factorizing", progress, len(layers)):
            yield layer, None, None
        return
    first = check_solvable(layers, data, "factorizing with data")
    own = {l.full_name: l.original.detach().clone() for l in layers}
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
                layer.original.copy_(own[layer.full_name])


def _why_left(layer: Layer, model: nn.Module, ask: Ask) -> str | None:
    module = layer.module
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    if not layer.name:
        return "it is the whole model: put it into a module"
    if any(layer.name.startswith(f"{n}.") for n in factor_records(model)):
        return "it is a factor itself"
    if layer.param != "weight" or (reason := why_not_factorizable(module, ask.beside)) is not None:
        return f"no factors of {layer.param}" if layer.param != "weight" else reason
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


def _lost(chosen: Sequence[Layer], of: nn.Module) -> dict[str, Tensor]:
    """What each layer has lost against the same layer of another model, [O, C]."""
    before = dict(unwrap(of).named_modules())
    lost = {}
    for layer in chosen:
        weight = getattr(before.get(layer.name), layer.param, None)
        if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
            raise ModelError(f"of: {type(of).__name__} has no {layer.full_name} of {list(layer.weight.shape)}")
        lost[layer.full_name] = to_matrix(layer, weight.detach().float() - layer.weight.detach().float())[0]
    return lost


def _factors(
    layer: Layer, H: Tensor | None, ask: Ask, lost: Tensor | None
) -> tuple[dict[str, Any], nn.Module | None, tuple[int, ...]]:
    """Return the row of a layer and its factors, None where they would not save."""
    module = layer.module
    own = to_matrix(layer, layer.weight.detach().float())[0]
    W = own if lost is None else lost
    L = None if H is None else _root(H)
    most = max_ranks(module) if lost is None else (min(weight_sizes(module)[:2]),)
    if len(most) == 2:
        made, ranks, left = _tucker(layer, W, H, ask)
    else:
        A, B, energies = truncated(W, L)
        rank = _rank(module, energies, ask, most[0])
        ranks, left = (rank,), _share(energies[rank:].sum(), energies.sum())
        made = Corrected.empty(module, rank) if lost is not None else LowRank.empty(module, [rank])
        scale = (
            math.sqrt(float(B[:rank].norm() / max(A[:, :rank].norm(), 1e-30))) or 1.0
        )  # alike in size: less is lost in bf16
        _fill(made.down, B[:rank] / scale)
        _fill(made.up, A[:, :rank] * scale)
    if lost is not None:
        return (
            _row(layer, ",".join(map(str, ranks)), "", num_factor_weights(module, ranks) + own.numel(), left),
            made,
            ranks,
        )
    after, before = num_factor_weights(module, ranks), own.numel()
    if after >= before:
        why = f"rank {','.join(map(str, ranks))} is {after:,} weights, it has {before:,}"
        return _row(layer, "", why), None, ranks
    return _row(layer, ",".join(map(str, ranks)), "", after, left), made, ranks


def _tucker(layer: Layer, W: Tensor, H: Tensor | None, ask: Ask) -> tuple[LowRank, tuple[int, ...], float]:
    """Inputs first, by what of them the weights read; then outputs, by what a refit on those inputs leaves."""
    O, I, K = weight_sizes(layer.module)
    if ask.time is not None:
        raise PatternError("time is for Linear layers")
    tall = W.reshape(O, K, I).permute(2, 0, 1).reshape(I, O * K)
    energy = None
    if H is not None:  # what each input is worth, over kernel positions
        inner = torch.stack([H[k * I : (k + 1) * I, k * I : (k + 1) * I] for k in range(K)]).mean(0)
        U, S, _ = torch.linalg.svd(_root(inner).T @ tall, full_matrices=False)
        P = torch.linalg.qr(_root(inner) @ U)[0]
        energy = S.square()
    else:
        P, S, _ = torch.linalg.svd(tall, full_matrices=False)
        energy = S.square()
    if ask.energy is not None:
        r_in = ask.rounded(_enough(energy, (1 + ask.energy) / 2), I, up=True)
    elif ask.rank is not None:
        r_in = min(ask.rank, I)
    else:
        r_in = ask.rounded(_share_of_both(O, I, K, ask.keep or 1.0)[0], I)
    P = P[:, :r_in]  # [I, r]
    wide = torch.block_diag(*[P] * K)  # [K I, K r]
    if H is None:
        Wz, L = W @ wide, None
    else:
        Hz = wide.T @ H @ wide
        Wz, L = torch.linalg.solve(solvers.damped(Hz[None], DAMPING)[0], wide.T @ H @ W.T).T, _root(Hz)
    A, B, outputs = truncated(Wz, L)
    if ask.energy is not None:
        r_out = ask.rounded(_enough(outputs, (1 + ask.energy) / 2), min(O, r_in * K), up=True)
    elif ask.rank is not None:
        r_out = min(ask.rank, O, r_in * K)
    else:
        r_out = ask.rounded(_share_of_both(O, I, K, ask.keep or 1.0)[1], min(O, r_in * K))
    made = LowRank.empty(layer.module, [r_in, r_out])
    _fill(made.down, P.T)
    core: Any = made.core
    kernel = core.weight.shape[2:]
    _fill(core, B[:r_out].reshape(r_out, K, r_in).transpose(1, 2).reshape(r_out, r_in, *kernel))
    _fill(made.up, A[:, :r_out])
    off = W - A[:, :r_out] @ B[:r_out] @ wide.T
    G = torch.eye(W.shape[1]) if H is None else H
    return made, (r_in, r_out), _share(((off @ G) * off).sum(), ((W @ G) * W).sum())


def _share_of_both(O: int, I: int, K: int, keep: float) -> tuple[int, int]:
    """The ranks of inputs and outputs that leave a share of a convolution's weights, both in the same proportion."""
    a, b, c = O * I * K, O * O + I * I, -keep * O * I * K
    share = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    return max(1, int(share * I)), max(1, int(share * O))


def _root(H: Tensor) -> Tensor:
    """L with L L^T = H, damped."""
    for damping in (DAMPING, 100 * DAMPING, 1.0):
        L, info = torch.linalg.cholesky_ex(solvers.damped(H[None], damping)[0])
        if not info.any():
            return L
    raise ModelError("the Gram matrix of a layer's inputs is not positive definite: NaN or inf in its inputs?")


def _rank(module: nn.Module, energies: Tensor, ask: Ask, most: int) -> int:
    O, I, K = weight_sizes(module)
    if ask.rank is not None:
        return min(ask.rank, most)
    if ask.keep is not None:
        return ask.rounded(int(ask.keep * O * I * K / (O + I * K)), most)
    if ask.energy is not None:
        return ask.rounded(_enough(energies, ask.energy), most, up=True)
    assert ask.time is not None
    return _fast_enough(module, ask.time, ask.batch, most, math.lcm(STEP, ask.round_to))


def _enough(energies: Tensor, share: float) -> int:
    """How many of falling energies make up a share of all."""
    sums = energies.double().cumsum(0)
    return min(len(sums), int((sums < share * sums[-1]).sum()) + 1)


def _fast_enough(module: Any, share: float, batch: int, most: int, step: int) -> int:
    """The largest rank, a multiple of `step`, that takes at most a share of the time; `most` where none does."""
    x = torch.randn(batch, module.in_features, dtype=module.weight.dtype)
    low, high = 0, max(1, min(most, module.out_features * module.in_features // sum(module.weight.shape)) // step)
    with torch.no_grad():
        while low < high:
            middle = (low + high + 1) // 2
            thin = LowRank.empty(module, [middle * step])
            took = compare({"dense": lambda: module(x), "thin": lambda: thin(x)}, repeats=15)  # noqa: B023
            if took["thin"].median <= share * took["dense"].median:
                low = middle
            else:
                high = middle - 1
    return low * step or most


@torch.no_grad()
def _fill(module: Any, weight: Tensor) -> None:
    module.weight.copy_(weight.reshape(module.weight.shape))


def _product(layer: Layer, factors: Any) -> Tensor:
    """The weight that factors amount to, as the layer stores it."""
    with torch.no_grad():
        weight = factors.weight
    shape = tuple(layer.original.shape)
    if layer.layout.kind == "conv1d-hf":
        return to_stored(layer, weight[None], shape).to(layer.original.dtype)
    return weight.reshape(shape).to(layer.original.dtype)


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.clamp(min=0) / whole.clamp(min=1e-30))


def _row(layer: Layer, ranks: str, why: str, left: int | None = None, error: float | None = None) -> dict[str, Any]:
    size = layer.original.numel()
    return {
        "layer": layer.full_name,
        "shape": "x".join(map(str, layer.original.shape)),
        "ranks": ranks,
        "weights": size,
        "left": size if left is None else left,
        "error": error,
        "why": why,
    }
