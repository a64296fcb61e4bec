"""`prune_`: select, collect statistics, score, choose masks, attach them. Nothing changes before all is known."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rarefy.calibration.statistics import LayerStats, collect_stats
from rarefy.common.atomic_io import parse_bytes, parse_path
from rarefy.common.errors import DataError, ModelError, PatternError, unknown
from rarefy.common.progress import track
from rarefy.common.renamed import renamed_parameters
from rarefy.common.report import Report
from rarefy.model import sparsity_pattern as patterns
from rarefy.model.batches import first_samples, take_tokens
from rarefy.model.distributed import full_tensor
from rarefy.model.forward import call, check_batches, evaluating, on_device
from rarefy.model.layers import Layer, Selector, all_layers, select_layers
from rarefy.model.losses import Loss, resolve_loss
from rarefy.model.masks import check_maskable, effective_weight, get_mask, set_mask_
from rarefy.model.quant_grid import attached_grid
from rarefy.prune import allocation as allocate_
from rarefy.prune.allocation_search import lacks_loss, output_probe, search_allocation
from rarefy.prune.layerwise import Allocate, check_solvable, measure_errors, prune_with_solver_
from rarefy.prune.scores import SCORES
from rarefy.prune.solver_config import Ask, Solver, resolve


@renamed_parameters(work="resume_dir")
def prune_(
    model: nn.Module,
    pattern: str = "unstructured",
    score: str | None = None,
    sparsity: float | None = None,
    *,
    solver: str | Solver | Mapping[str, Any] | None = None,
    allocate: str | None = None,
    scope: str | None = None,
    reduce: str | None = None,
    layers: Selector = None,
    ignore: Selector = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    resume_dir: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Attach masks with the asked sparsity to the selected layers of `model` in place; return what was achieved.

    pattern   where zeros may lie (`rarefy.model.sparsity_pattern`): unstructured, 2:4, 4x1, row, channel, column
    score     what is pruned first (`rarefy.prune.scores.SCORES`); some need `data`, gradients need labels or `loss`;
              by default magnitude, or the solver's own criterion
    solver    obs (SparseGPT), admm or refit: move the kept weights so that each layer's outputs on `data` stay
              (`rarefy.Solver` sets its options); the layers are then pruned in the order in which the model runs
    sparsity  fraction of zeros; N:M patterns decide it themselves
    allocate  how `sparsity` is spread over layers (`rarefy.prune.allocation`): uniform, erk, line, owl, errors or
              search (these two read gradients of the loss or, where a model has none, of its outputs)
    scope     where scores compete: row, layer or global; by default what the score's paper does
    reduce    how a unit of several weights is scored: mean, sum, max or l2
    data      batches that `model` can be called with
    memory    bytes or such as "4G" to stay near (solvers): weights stay in the files they were loaded from, new ones
              go to `resume_dir`, and zeros are written into the weights, without masks
    resume_dir folder for the state of a solver's run: the same call on the same model goes on there after it was
              killed. It stays, to be removed when the result is saved

    Masked entries stay masked. Masks survive training; `rarefy.fold_` writes them into the weights.
    Raises the ValueErrors of `rarefy.common.errors`, and then the model is unchanged (a solver that fails half way
    leaves the
    layers before pruned). O(weights log weights) besides the pass; with a solver see `rarefy.prune.layerwise`.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> prune_(net, "2:4").summary["sparsity"]
    0.5
    """
    how, ask = asked(pattern, score, sparsity, solver, allocate, scope, reduce, seed)
    if data is not None:
        check_batches(data)
        # allocation, score, solver and the key of `resume_dir` each go through it
        data = data if isinstance(data, list | tuple | DataLoader) and resume_dir is None else list(data)
        gone = next((i for i, batch in enumerate(data) if batch is None), None) if isinstance(data, list) else None
        if gone is not None:
            raise DataError(f"batch {gone} of the data is None")
    memory, resume_dir = parse_bytes(memory), parse_path(resume_dir)
    check_ask(how, ask, memory, resume_dir)
    chosen = chosen_layers(model, layers, ignore, ask.plan)
    check_weights(chosen)
    for layer in chosen:
        check_maskable(layer)
        if how is not None and attached_grid(layer.module, layer.param) is not None:
            raise ModelError(
                f"{layer.full_name} lies on a grid, which the weights that solver {how.name} moves would leave: prune "
                "first, then quantize; or leave solver out"
            )
    spread = partial(_spread, model, chosen, ask, data, loss, progress)
    rows: list[dict[str, Any]] = []
    if how is not None:
        options = {"memory": memory, "resume_dir": resume_dir, "progress": progress}
        rows, ask, notes = _solve(model, chosen, ask, how, data, loss, seed, spread, **options)
    else:
        each, notes = spread()
        ask = replace(ask, each=each)
        shown = None if data is None else track(data, f"calibrating {ask.score}", progress)
        for layer, mask in zip(chosen, _masks(model, chosen, ask, shown, loss, seed)):
            set_mask_(layer, mask)
    model.__dict__.pop("rarefy_receipt", None)  # what it measured is no longer so
    zeros = {r["layer"]: r.pop("zeros") for r in rows}
    done = report(chosen, ask.plan, ask.sparsity, ask.each, zeros if memory is not None else None)
    done = replace(done, notes=(*done.notes, *notes))
    idle = "; ".join(f"{r['layer']} {r.pop('idle')}" for r in rows if r.get("idle"))
    if idle:
        done = replace(done, notes=(*done.notes, f"experts that saw no token, pruned by magnitude, not moved: {idle}"))
    solved = {r["layer"]: {k: v for k, v in r.items() if k != "idle"} for r in rows}
    done = replace(done, rows=tuple({**r, **solved.get(r["layer"], {})} for r in done.rows))
    taken = {l.full_name for l in chosen}
    alone = [l.full_name for l in all_layers(model) if l.full_name not in taken]
    if layers is None and ignore is None and alone:
        done = replace(done, notes=(*done.notes, f"left alone until named in layers: {', '.join(alone)}"))
    return done


def asked(
    pattern: str,
    score: str | None = None,
    sparsity: float | None = None,
    solver: str | Solver | Mapping[str, Any] | None = None,
    allocate: str | None = None,
    scope: str | None = None,
    reduce: str | None = None,
    seed: int = 0,
) -> tuple[Solver | None, Ask]:
    """Return what `prune_` is asked for with its defaults filled in; PatternError for what it does not know."""
    plan = patterns.parse_pattern(pattern)
    how = None if solver is None else resolve(solver)
    ranks = score or ("magnitude" if how is None else "wanda" if how.name == "refit" else None)
    if ranks is not None and (not isinstance(ranks, str) or ranks not in SCORES):
        raise PatternError(unknown("score", ranks, SCORES))
    sparsity, scope = patterns.check_sparsity(plan, sparsity, scope or default_scope(plan, ranks))
    allocate = allocate or "uniform"
    if allocate not in allocate_.ALLOCATIONS:
        raise PatternError(unknown("allocation", allocate, allocate_.ALLOCATIONS))
    return how, Ask(plan, sparsity, {}, scope, ranks, reduce, allocate, seed if allocate == "search" else 0)


def chosen_layers(model: nn.Module, layers: Selector, ignore: Selector, plan: patterns.Pattern) -> list[Layer]:
    """Return the selected layers; PatternError where the pattern has nothing to prune in one."""
    chosen = select_layers(model, layers, ignore)
    refuse_impossible(chosen, plan)
    return chosen


def _solve(
    model: nn.Module,
    chosen: Sequence[Layer],
    ask: Ask,
    how: Solver,
    data: Iterable[Any] | None,
    loss: Loss | None,
    seed: int,
    spread: Allocate,
    **options: Any,
) -> tuple[list[dict[str, Any]], Ask, list[str]]:
    """Masks and weights by a solver; a score that reads more than inputs, or ranks all layers together, goes first."""
    if data is None:
        raise DataError(f"solver {how.name} works on a layer's inputs: give data=batches")

    def given(ask: Ask) -> dict[str, Tensor] | None:
        if not ask.first:
            return None
        masks = _masks(model, chosen, ask, track(data, f"calibrating {ask.score}", options["progress"]), loss, seed)
        return {l.full_name: m for l, m in zip(chosen, masks)}

    def mark() -> Tensor:
        one = on_device(model, first_samples(next(iter(data))))
        with evaluating(model), torch.no_grad():
            return torch.as_tensor(resolve_loss(loss)(call(model, one), one))

    read = ask.allocate in allocate_.GRADIENTS and loss is not None
    return prune_with_solver_(
        model, chosen, ask, how, data, spread=spread, given=given, mark=mark if read else None, **options
    )


def check_ask(how: Solver | None, ask: Ask, memory: int | None, resume_dir: Path | None) -> None:
    """Raise PatternError for what has no effect, or cannot be kept to."""
    if how is not None and ask.score is None and (ask.scope == "global" or ask.reduce is not None):
        idle = "scope 'global'" if ask.scope == "global" else f"reduce={ask.reduce!r}"
        raise PatternError(f"solver {how.name} chooses block by block: {idle} has no effect without a score")
    if ask.allocate != "uniform" and (ask.plan.kind == "nm" or ask.scope == "global"):
        what = f"pattern {ask.plan}" if ask.plan.kind == "nm" else "scope 'global'"
        raise PatternError(
            f"{what} decides every layer's sparsity itself: allocate={ask.allocate!r} has no effect, "
            "take 'uniform' (shell: --set allocate=uniform)"
        )
    if how is None and (memory is not None or resume_dir is not None):
        what = "memory" if memory is not None else "resume_dir"
        raise PatternError(f"{what} is for solvers, which go layer by layer: give solver='refit', 'obs' or 'admm'")
    if memory is None:
        return
    if resume_dir is None:
        raise PatternError("memory needs resume_dir=FOLDER, where the new weights go")
    if ask.first or ask.allocate in allocate_.GRADIENTS:
        what = f"score {ask.score!r} over all layers" if ask.first else f"allocate={ask.allocate!r}"
        instead = "leave it out" if ask.first else "take 'uniform' (shell: --set allocate=uniform)"
        raise PatternError(f"{what} holds all weights or gradients at once: {instead}, or leave memory out")


def _spread(
    model: nn.Module,
    chosen: Sequence[Layer],
    ask: Ask,
    data: Iterable[Any] | None,
    loss: Loss | None,
    progress: bool,
) -> tuple[dict[str, float], list[str]]:
    """The sparsity of each layer, and what is to be said of how it was found."""
    how = ask.allocate
    if how == "uniform":
        return {l.full_name: ask.sparsity for l in chosen}, []
    if how == "erk":
        return allocate_.erk(chosen, ask.sparsity), []
    if how == "line":
        return allocate_.line(chosen, ask.sparsity), []
    if data is None:
        raise DataError(f"allocation {how!r} reads activations: give data=batches")
    if how == "owl":
        return allocate_.owl(chosen, ask.sparsity, collect_stats(model, data, chosen, frozenset({"input"}))), []
    check_solvable(chosen, data, f"allocation {how!r}")
    data = list(data)
    tokens = allocate_.TOKENS
    few = track(take_tokens(data, tokens["gradients"], tokens["pass"]), "output gradients", progress)
    blind = lacks_loss(model, data[0], loss)
    found = allocate_.sensitivities(model, few, chosen, output_probe if blind else loss)
    notes = ["no loss: sparsity was allocated by the model's own outputs"] if blind else []
    weights = allocate_.fill_missing(found, chosen)
    solved: dict[str, list[Tensor]] | None = {} if how == "search" else None
    part = take_tokens(data, tokens["errors"])
    costs = measure_errors(model, chosen, ask, part, weights, allocate_.LEVELS, solved=solved, progress=progress)
    if solved is not None:
        told = {"without_loss": blind, "seed": ask.seed, "progress": progress}
        return search_allocation(model, chosen, costs, solved, ask.sparsity, data, loss, **told), notes
    return allocate_.cheapest_allocation(costs, {l.full_name: l.original.numel() for l in chosen}, ask.sparsity), notes


def _masks(
    model: nn.Module, chosen: Sequence[Layer], ask: Ask, data: Iterable[Any] | None, loss: Loss | None, seed: int
) -> list[Tensor]:
    """Masks by a score, with a sparsity a layer."""
    assert ask.score is not None
    stats = calibrate(model, chosen, ask.score, data, loss, seed)
    how = {"score": ask.score, "scope": ask.scope, "reduce": ask.reduce}
    if ask.scope == "global" or len(set(ask.each.values())) == 1:
        return choose_masks(chosen, stats, ask.plan, sparsity=ask.sparsity, **how)
    return [choose_masks([l], stats, ask.plan, sparsity=ask.each[l.full_name], **how)[0] for l in chosen]


def default_scope(plan: patterns.Pattern, score: str | None) -> str | None:
    """Return the scope that the score's paper uses, where the pattern leaves one to choose."""
    if score is None or plan.kind in ("nm", "row", "column"):
        return None
    return SCORES[score].scope


def calibrate(
    model: nn.Module, chosen: Sequence[Layer], score: str, data: Iterable[Any] | None, loss: Loss | None, seed: int
) -> dict[str, LayerStats]:
    """Return the statistics that `score` reads; a pass over `data` only if needed."""
    needs = SCORES[score].needs
    if not needs:
        stats = {l.full_name: LayerStats() for l in chosen}
    elif data is None:
        raise DataError(f"score {score!r} reads {' and '.join(sorted(needs))} statistics: give data=batches")
    else:
        stats = collect_stats(model, data, chosen, needs, loss=loss)
    for layer in chosen:  # by name, so that a layer's noise does not depend on its neighbours
        noise = torch.Generator().manual_seed((seed * 1_000_003) % (1 << 62) + zlib.crc32(layer.full_name.encode()))
        stats[layer.full_name].generator = noise
    return stats


def check_weights(chosen: Sequence[Layer]) -> None:
    """Raise ModelError naming the first layer whose weights are not there or not finite. O(weights)."""
    for layer in chosen:
        if layer.original.is_meta:
            raise ModelError(f"{layer.full_name} is on the meta device: it has no values yet; load its weights first")
        if not torch.isfinite(effective_weight(layer)).all():
            raise ModelError(f"{layer.full_name}: NaN or inf in its weights")


def choose_masks(
    chosen: Sequence[Layer],
    stats: dict[str, LayerStats],
    plan: patterns.Pattern,
    score: str,
    sparsity: float,
    scope: str,
    reduce: str | None = None,
    regrow: bool = False,
) -> list[Tensor]:
    """Return one mask a layer, in its stored shape, for the asked sparsity over all entries.

    What is masked stays so unless `regrow`. Raises PatternError where a layer holds more zeros than asked for.
    """
    scores = []
    with torch.no_grad():
        for layer in chosen:
            weight = full_tensor(layer.original.detach()) if regrow else effective_weight(layer)
            s = SCORES[score].of(layer.layout.view(weight.float()), stats[layer.full_name])
            mask = None if regrow else get_mask(layer)
            if mask is not None:
                s = torch.where(layer.layout.view(mask), s, float("-inf"))
            scores.append(s)
        if reduce is not None:  # for its checks
            patterns.make_masks(scores[:0], plan, None if plan.kind == "nm" else sparsity, reduce=reduce)
        kept = patterns.masks_at_sparsity(scores, plan, sparsity, scope, reduce or "mean")
    masks = [l.layout.unview(k, tuple(l.original.shape)) for l, k in zip(chosen, kept)]
    return masks if regrow else [_keep_zeros(l, m, plan) for l, m in zip(chosen, masks)]


def refuse_impossible(chosen: Sequence[Layer], plan: patterns.Pattern) -> None:
    """Raise PatternError naming the layers in which an N:M pattern has nothing to prune (depthwise convolutions)."""
    idle = [l for l in chosen if plan.kind == "nm" and l.layout.shape[3] <= plan.a]
    if idle:
        names = ", ".join(f"{l.full_name} ({l.layout.shape[3]} inputs a group)" for l in idle)
        words = [l.full_name for l in idle]
        raise PatternError(f"pattern {plan} cannot prune {names}: pass ignore={words}, or take another pattern")


def report(
    chosen: Sequence[Layer],
    plan: patterns.Pattern,
    sparsity: float,
    each: Mapping[str, float] | None = None,
    zeros_of: Mapping[str, int] | None = None,
) -> Report:
    """Return the table of asked and achieved sparsity, a row a layer; `each` is what was asked of each layer,
    `zeros_of` are the zeros of each where they are not masked."""
    rows, zeros, total = [], 0, 0
    for layer in chosen:
        mask = get_mask(layer)
        pruned = 0 if mask is None else int((~mask).sum())
        pruned = pruned if zeros_of is None else zeros_of[layer.full_name]
        size = layer.original.numel()
        rows.append(
            {
                "layer": layer.full_name,
                "shape": "x".join(map(str, layer.original.shape)),
                "pattern": str(plan),
                "asked": each[layer.full_name] if each else sparsity,
                "sparsity": pruned / max(size, 1),
                "kept": size - pruned,
            }
        )
        zeros, total = zeros + pruned, total + size
    ragged = [l.full_name for l in chosen if plan.kind == "nm" and l.layout.shape[3] % plan.b]
    notes = (f"{plan} does not divide the inputs of {', '.join(ragged)}: their last group is padded",) if ragged else ()
    summary = {"layers": len(rows), "weights": total, "asked": sparsity, "sparsity": zeros / max(total, 1)}
    return Report("pruned", tuple(rows), summary, notes)


def _keep_zeros(layer: Layer, mask: Tensor, plan: patterns.Pattern) -> Tensor:
    """What was zero stays zero; PatternError where that makes more zeros than asked for, rounding to units aside."""
    before = get_mask(layer)
    if before is None:
        return mask
    _, K, O, I = layer.layout.shape
    unit = {"row": K * I, "column": K * O, "block": plan.a * plan.b}.get(plan.kind, 0)
    if int((mask & ~before).sum()) > unit:
        had, asked = 1 - before.float().mean().item(), 1 - mask.float().mean().item()
        raise PatternError(
            f"{layer.full_name} already has {had:.2%} zeros in places that the new mask of {asked:.2%} would keep: "
            "ask for more sparsity, or fold_ and choose anew"
        )
    return mask & before
