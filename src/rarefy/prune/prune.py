"""`prune_`: select layers, collect statistics, score, choose masks, attach them. The model changes only at the end."""

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
from rarefy.common.checks import as_dict, check_int
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.common.progress import track
from rarefy.common.renamed import renamed_parameters
from rarefy.common.report import Report
from rarefy.model import sparsity_pattern as patterns
from rarefy.model.attached_receipt import forget_receipt
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
from rarefy.prune.options import UNIFORM, PruneOptions, ranks_by_inputs, resolve_options
from rarefy.prune.scores import SCORES
from rarefy.prune.solver_config import Solver, SparsityTarget


@renamed_parameters(work="resume_dir")
def prune_(
    model: nn.Module,
    pattern: str = "unstructured",
    score: str | None = None,
    sparsity: float | None = None,
    *,
    per_layer: Mapping[str, float] | None = None,
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
    """Prune the selected layers of a model in place: attach masks that hold the wanted fraction of weights at zero.

    Masked weights stay masked when the model is trained; `rarefy.fold_` writes the zeros into the weights. Weights
    that are masked already stay so. Without a solver this costs O(weights log weights) and the pass over the data;
    for solvers see `rarefy.prune.layerwise`.

    Args:
        model: any module with Linear, Conv, Embedding or MultiheadAttention layers.
        pattern: where zeros may be: unstructured, N:M such as 2:4 (N of M inputs stay), RxC blocks of outputs by inputs
            such as 4x1, row, channel, column.
        score: how weights are ranked: magnitude, l2, lamp, random; with `data` wanda, ria, activation; with labels in
            it, or `loss`, gradient, taylor, fisher. By default wanda with data, else magnitude; of a solver its own
            criterion.
        sparsity: fraction of zeros, 0 to 1. N:M patterns determine it.
        per_layer: instead of sparsity and layers: the fraction of zeros of each layer to prune, by its full name.
        solver: "obs" (SparseGPT, Frantar 2023), "admm" (ALPS, Meng 2024) or "refit": move the remaining weights so that
            each layer's outputs on `data` are preserved. `rarefy.Solver` sets options. Layers are then pruned in the
            order in which the model runs them.
        allocate: how the sparsity is distributed over layers (`rarefy.prune.allocation`): uniform (the default), erk,
            line; with `data` owl, errors, search. The last two read gradients of the loss, or of the outputs of a model
            without one.
        scope: where scores compete: row, layer or global. By default global for lamp, row for wanda and ria, else
            layer.
        reduce: how a unit of several weights is scored: mean (the default), sum, max or l2.
        layers: names, globs or other selectors of layers; by default all but embeddings and the output head.
        ignore: selectors of layers to leave as they are.
        data: batches that `model` can be called with.
        loss: for gradient scores and allocations, a function of (output, batch) or a criterion (logits, target); see
            `rarefy.fit_`.
        seed: of random scores, and of the search for an allocation.
        memory: bytes, or text such as "4G", at least "256M", to stay near. It needs a solver and `resume_dir`. Weights
            stay in the files they were loaded from, new ones go to `resume_dir`, and zeros are written into the
            weights, without masks.
        resume_dir: folder for the state of a solver's run: after a kill, the same call on the same model continues from
            there. Remove it when the result is saved.
        progress: show progress bars.

    Returns:
        A `Report` with one row for each layer: its shape, pattern, wanted and achieved sparsity, and how many weights
        are kept.

    Raises:
        RarefyError: for options, layers or data that do not fit. The model is then unchanged; if a solver fails
            halfway, the layers before stay pruned.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> prune_(net, "2:4").summary["sparsity"]
        0.5
    """
    check_int("seed", seed, 0, PatternError)
    options = PruneOptions(
        pattern=pattern, score=score, sparsity=sparsity,
        per_layer=as_dict(per_layer), solver=solver, allocate=allocate,
        scope=scope, reduce=reduce, layers=layers, ignore=ignore,
    )  # fmt: skip
    return run_prune(
        model, options, data, loss=loss, seed=seed, memory=memory, resume_dir=resume_dir, progress=progress
    )


def run_prune(
    model: nn.Module,
    options: PruneOptions,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    resume_dir: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Prune a model by checked options. See `prune_`."""
    if data is not None and ranks_by_inputs(options):
        options = options.model_copy(update={"score": "wanda"})
    solver, target = resolve_options(options, seed)
    data = _reusable(data, resume_dir is not None)
    memory, resume_dir = parse_bytes(memory), parse_path(resume_dir)
    check_memory(solver, target, memory, resume_dir)
    layers = chosen_layers(model, options.selected, options.ignore, target.pattern)
    _check_layers(layers, solver)
    target = _weighted(target, layers)
    spread = partial(_spread, model, layers, target, data, loss, progress)
    rows: list[dict[str, Any]] = []
    if solver is not None:
        state = {"memory": memory, "resume_dir": resume_dir, "progress": progress}
        rows, target, notes = _solve(model, layers, target, solver, data, loss, seed, spread, **state)
    else:
        each, notes = spread()
        target = replace(target, each=each)
        batches = None if data is None else track(data, f"calibrating {target.score}", progress)
        for layer, mask in zip(layers, _masks(model, layers, target, batches, loss, seed)):
            set_mask_(layer, mask)
    forget_receipt(model)
    zeros = {r["layer"]: r.pop("zeros") for r in rows}
    done = report(layers, target.pattern, target.sparsity, target.each, zeros if memory is not None else None)
    notes = [*done.notes, *notes, *_expert_notes(rows)]
    if options.selected is None and options.ignore is None:
        notes += _not_selected(model, layers)
    solved = {r["layer"]: {k: v for k, v in r.items() if k != "idle"} for r in rows}
    return replace(done, rows=tuple({**r, **solved.get(r["layer"], {})} for r in done.rows), notes=tuple(notes))


def _reusable(data: Iterable[Any] | None, as_list: bool) -> Iterable[Any] | None:
    """Return data that can be iterated several times: by allocation, score, solver and the key of a saved state."""
    if data is None:
        return None
    check_batches(data)
    batches = data if isinstance(data, list | tuple | DataLoader) and not as_list else list(data)
    empty = next((i for i, batch in enumerate(batches) if batch is None), None) if isinstance(batches, list) else None
    if empty is not None:
        raise DataError(f"batch {empty} of the data is None")
    return batches


def check_layer_names(per_layer: Mapping[str, float], layers: Sequence[Layer]) -> None:
    """Raise PatternError for a layer that `per_layer` selects, but not by its full name."""
    for layer in layers:
        if layer.full_name not in per_layer:
            raise PatternError(f"per_layer: expected full names of layers, such as {layer.full_name!r}")


def _weighted(target: SparsityTarget, layers: Sequence[Layer]) -> SparsityTarget:
    """Return a target with a sparsity for each layer, whose own is their mean over all weights."""
    if not target.each:
        return target
    check_layer_names(target.each, layers)
    sizes = {layer.full_name: layer.original.numel() for layer in layers}
    zeros = sum(target.each[name] * size for name, size in sizes.items())
    return replace(target, sparsity=zeros / max(sum(sizes.values()), 1))


def _check_layers(layers: Sequence[Layer], solver: Solver | None) -> None:
    """Raise ModelError for layers that cannot be pruned, or whose weights a solver must not change."""
    check_weights(layers)
    for layer in layers:
        check_maskable(layer)
        if solver is not None and attached_grid(layer.module, layer.param) is not None:
            raise ModelError(
                f"{layer.full_name} is quantized, and solver {solver.name} would change its quantized weights: "
                "prune first, then quantize; or leave solver out"
            )


def _expert_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    idle = "; ".join(f"{r['layer']} {r['idle']}" for r in rows if r.get("idle"))
    return [f"experts that saw no token were pruned by magnitude, without moving weights: {idle}"] if idle else []


def _not_selected(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    pruned = {layer.full_name for layer in layers}
    others = [layer.full_name for layer in all_layers(model) if layer.full_name not in pruned]
    return [f"not pruned unless named in layers: {', '.join(others)}"] if others else []


def chosen_layers(model: nn.Module, layers: Selector, ignore: Selector, pattern: patterns.Pattern) -> list[Layer]:
    """Return the selected layers; PatternError where the pattern has nothing to prune in one."""
    chosen = select_layers(model, layers, ignore)
    refuse_impossible(chosen, pattern)
    return chosen


def _solve(
    model: nn.Module,
    layers: Sequence[Layer],
    target: SparsityTarget,
    solver: Solver,
    data: Iterable[Any] | None,
    loss: Loss | None,
    seed: int,
    spread: Allocate,
    **state: Any,
) -> tuple[list[dict[str, Any]], SparsityTarget, list[str]]:
    """Choose masks and weights with a solver; a score over all layers, or with gradients, is computed first."""
    if data is None:
        raise DataError(f"solver {solver.name} needs the inputs of each layer: give data=batches")

    def masks_before(target: SparsityTarget) -> dict[str, Tensor] | None:
        if not target.needs_all_layers:
            return None
        batches = track(data, f"calibrating {target.score}", state["progress"])
        masks = _masks(model, layers, target, batches, loss, seed)
        return {layer.full_name: mask for layer, mask in zip(layers, masks)}

    def loss_mark() -> Tensor:
        batch = on_device(model, first_samples(next(iter(data))))
        with evaluating(model), torch.no_grad():
            return torch.as_tensor(resolve_loss(loss)(call(model, batch), batch))

    mark = loss_mark if target.allocate in allocate_.GRADIENTS and loss is not None else None
    return prune_with_solver_(
        model, layers, target, solver, data, spread=spread, fixed_masks=masks_before, loss_probe=mark, **state
    )


def check_memory(solver: Solver | None, target: SparsityTarget, memory: int | None, resume_dir: Path | None) -> None:
    """Raise PatternError for a memory limit or a folder that has no effect, or a limit that cannot be kept."""
    if solver is None and (memory is not None or resume_dir is not None):
        name = "memory" if memory is not None else "resume_dir"
        raise PatternError(f"{name} has no effect without a solver: give solver='refit', 'obs' or 'admm'")
    if memory is None:
        return
    if resume_dir is None:
        raise PatternError("memory needs resume_dir=FOLDER for the new weights")
    if target.needs_all_layers:
        raise PatternError(
            f"score {target.score!r} over all layers needs all weights or gradients in memory: leave score or "
            "memory out"
        )
    if target.allocate in allocate_.GRADIENTS:
        raise PatternError(
            f"allocate={target.allocate!r} needs all weights or gradients in memory: {UNIFORM}, or leave memory out"
        )


def _spread(
    model: nn.Module,
    layers: Sequence[Layer],
    target: SparsityTarget,
    data: Iterable[Any] | None,
    loss: Loss | None,
    progress: bool,
) -> tuple[dict[str, float], list[str]]:
    """Return the sparsity of each layer, and notes on how it was found."""
    method = target.allocate
    if target.each:
        return dict(target.each), []
    if method == "uniform":
        return {layer.full_name: target.sparsity for layer in layers}, []
    if method == "erk":
        return allocate_.erk(layers, target.sparsity), []
    if method == "line":
        return allocate_.line(layers, target.sparsity), []
    if data is None:
        raise DataError(f"allocation {method!r} reads activations: give data=batches")
    if method == "owl":
        return allocate_.owl(layers, target.sparsity, collect_stats(model, data, layers, frozenset({"input"}))), []
    check_solvable(layers, data, f"allocation {method!r}")
    data = list(data)
    tokens = allocate_.TOKENS
    batches = track(take_tokens(data, tokens["gradients"], tokens["pass"]), "output gradients", progress)
    blind = lacks_loss(model, data[0], loss)
    sensitivities = allocate_.sensitivities(model, batches, layers, output_probe if blind else loss)
    notes = ["no loss: sparsity was allocated by the model's own outputs"] if blind else []
    weights = allocate_.fill_missing(sensitivities, layers)
    solved: dict[str, list[Tensor]] | None = {} if method == "search" else None
    part = take_tokens(data, tokens["errors"])
    costs = measure_errors(model, layers, target, part, weights, allocate_.LEVELS, solved=solved, progress=progress)
    if solved is not None:
        settings = {"without_loss": blind, "seed": target.seed, "progress": progress}
        return search_allocation(model, layers, costs, solved, target.sparsity, data, loss, **settings), notes
    return allocate_.cheapest_allocation(
        costs, {l.full_name: l.original.numel() for l in layers}, target.sparsity
    ), notes


def _masks(
    model: nn.Module,
    layers: Sequence[Layer],
    target: SparsityTarget,
    data: Iterable[Any] | None,
    loss: Loss | None,
    seed: int,
) -> list[Tensor]:
    """Return masks by a score, with a sparsity a layer."""
    assert target.score is not None
    stats = calibrate(model, layers, target.score, data, loss, seed)
    ranking = {"score": target.score, "scope": target.scope, "reduce": target.reduce}
    if target.scope == "global" or len(set(target.each.values())) == 1:
        return choose_masks(layers, stats, target.pattern, sparsity=target.sparsity, **ranking)
    each = target.each
    return [choose_masks([l], stats, target.pattern, sparsity=each[l.full_name], **ranking)[0] for l in layers]


def calibrate(
    model: nn.Module, chosen: Sequence[Layer], score: str, data: Iterable[Any] | None, loss: Loss | None, seed: int,
    leave_out: bool = False,
) -> dict[str, LayerStats]:  # fmt: skip
    """Return the statistics that `score` reads; a pass over `data` only if needed. Layers that no batch reaches are an
    error, or to `leave_out`."""
    needs = SCORES[score].needs
    if not needs:
        stats = {l.full_name: LayerStats() for l in chosen}
    elif data is None:
        raise DataError(f"score {score!r} reads {' and '.join(sorted(needs))} statistics: give data=batches")
    else:
        stats = collect_stats(model, data, chosen, needs, loss=loss, leave_out=leave_out)
    for name, of_layer in stats.items():  # by name, so that a layer's noise does not depend on its neighbours
        seed_of_layer = (seed * 1_000_003) % (1 << 62) + zlib.crc32(name.encode())
        of_layer.generator = torch.Generator().manual_seed(seed_of_layer)
    return stats


def check_weights(chosen: Sequence[Layer]) -> None:
    """Raise ModelError for the first layer with weights on the meta device, NaN or inf. O(weights)."""
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
    """Return one mask per layer, in the shape of its weight, for a sparsity over all weights.

    Masked weights stay masked unless `regrow`. Raises PatternError if a layer has more zeros than the target.
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
        matrices = patterns.masks_at_sparsity(scores, plan, sparsity, scope, reduce or "mean")
    masks = [l.layout.unview(k, tuple(l.original.shape)) for l, k in zip(chosen, matrices)]
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
    """Return the table of target and achieved sparsity, one row per layer.

    `each` has the target of each layer, `zeros_of` the zeros of layers without masks.
    """
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
    """Return the mask with all earlier zeros kept; PatternError if that gives more zeros than the target."""
    before = get_mask(layer)
    if before is None:
        return mask
    _, K, O, I = layer.layout.shape
    unit = {"row": K * I, "column": K * O, "block": plan.a * plan.b}.get(plan.kind, 0)
    if int((mask & ~before).sum()) > unit:
        before_sparsity, target = 1 - before.float().mean().item(), 1 - mask.float().mean().item()
        raise PatternError(
            f"{layer.full_name} already has {before_sparsity:.2%} zeros, some where the new mask of {target:.2%} "
            "keeps weights: choose a higher sparsity, or call fold_ first"
        )
    return mask & before
