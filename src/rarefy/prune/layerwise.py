"""Layerwise pruning with a solver: each group of layers is solved on the inputs it gets from the pruned layers
before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration import offload, resume
from rarefy.calibration.gram import Gram
from rarefy.calibration.sequential import (
    BlockStep,
    GroupStep,
    LayerGroup,
    calibrate_sequentially,
    find_blocks,
    layer_groups,
    with_block_steps,
)
from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import ContainerError, DataError, ModelError, PatternError
from rarefy.common.progress import say, track
from rarefy.formats.bitpacking import pack_bits, unpack_bits
from rarefy.model import distributed
from rarefy.model import sparsity_pattern as patterns
from rarefy.model.batches import count_samples, count_tokens
from rarefy.model.layers import Layer, unwrap
from rarefy.model.masks import get_mask, set_mask_
from rarefy.prune import solvers
from rarefy.prune.allocation import NEEDS_DATA
from rarefy.prune.cost_model import estimate
from rarefy.prune.matrices import flatten_gkoi, to_gkoi, to_matrix, to_stored
from rarefy.prune.reconstruction import reconstruct_
from rarefy.prune.scores import SCORES
from rarefy.prune.solver_config import COMMON, LINES, SOLVERS, Solver, SparsityTarget, in_bf16, passes

STATE_MISFIT = "the state of this run does not fit the model: remove its folder to start anew"
Allocate = Callable[[], tuple[dict[str, float], list[str]]]


def prune_with_solver_(
    model: nn.Module,
    chosen: Sequence[Layer],
    spec: SparsityTarget,
    solver: Solver,
    data: Iterable[Any],
    *,
    spread: Allocate,
    fixed_masks: Callable[[SparsityTarget], Mapping[str, Tensor] | None] = lambda _: None,
    loss_probe: Callable[[], Tensor] | None = None,
    memory: int | None = None,
    resume_dir: Path | None = None,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], SparsityTarget, list[str]]:
    """Prune the chosen layers in place, each on the inputs it gets from the layers pruned before it.

    data         batches that can be iterated several times
    spread       returns the sparsity of each layer, and notes on how it was found; called once per run
    fixed_masks  returns masks that are chosen beforehand, by layer name, or None
    loss_probe   returns a value that identifies the loss that `spread` uses
    memory       bytes to stay near: weights stay in their files, new ones go to `resume_dir` without masks, and
                 activations are moved to files
    resume_dir   folder for the state of the run, from which a killed run with the same arguments resumes

    Returns a row per layer (relative error, damping, seconds, zeros), `spec` with the sparsity of each layer, and the
    notes of `spread`. After an error, the layers before it are pruned. Cost: one forward pass, and that of the solver;
    memory as `rarefy.calibration.sequential.calibrate_sequentially`.
    """
    first = check_solvable(chosen, data, f"solver {solver.name}")
    streaming, model = memory is not None, unwrap(model)
    settings = {"solver": solver.model_dump(), **spec.key()}
    limit = memory and memory // 4
    rows: list[dict[str, Any]] = []
    masks: dict[str, Tensor] = {}  # packed into bits: a thirty-second of the fp32 weights
    dense = bool(solver.asymmetric or solver.reconstruct)
    with (
        distributed.replicated_data() if solver.reconstruct else nullcontext(),  # blocks are trained on all batches
        closing(resume.open_state(resume_dir, resume.run_key(model, data, **settings) if resume_dir else {})) as state,
        passes(solver),
    ):
        groups = layer_groups(model, first, chosen, dense=dense)
        steps = with_block_steps(groups, find_blocks(model, chosen, solver.blocks) if solver.reconstruct else [])
        if progress:
            _say_cost(groups, data, solver, spec.allocate, limit, f"{state.num_done} of {len(steps)}")
        if resume_dir and loss_probe is not None:
            state.check_same("loss", loss_probe(), "loss")
        sparsities, notes = state.compute_once("each", spread) if spec.allocate in NEEDS_DATA else spread()
        if sparsities.keys() != {l.full_name for l in chosen} or not all(0 <= s <= 1 for s in sparsities.values()):
            raise ContainerError(STATE_MISFIT)
        spec = replace(spec, each=sparsities)
        masks_before = fixed_masks(spec)
        if masks_before is not None:
            state.check_same("given", masks_before, "masks")
        say([_progress_line(chosen)] if progress else [])
        calibration = calibrate_sequentially(
            model,
            data,
            steps,
            dense=dense,
            num_done=state.num_done,
            assign=streaming,
            max_suspended_bytes=limit,
            folder=resume_dir,
        )
        with closing(calibration):  # its hooks are removed even if an error's traceback keeps it alive
            for index, step in enumerate(track(calibration, f"pruning by {solver.name}", progress, len(steps))):
                with torch.autocast("cpu", enabled=False):
                    if index < state.num_done:
                        step_state = state.read(index)
                        _apply_state(step, step_state, streaming)
                    else:
                        if isinstance(step, BlockStep):
                            step_state = _reconstruct_block(step, chosen, masks, solver, streaming, progress)
                        else:
                            step_state = _solve_distributed(step, spec, solver, masks_before or {})
                            say([_progress_line(chosen, r) for r in step_state.rows] if progress else [])
                        state.write(index, step_state)
                        if streaming:
                            _apply_state(step, state.read(index), streaming)
                rows += step_state.rows
                masks.update(step_state.masks if solver.reconstruct or not streaming else {})
    if not streaming:
        _attach_masks_(chosen, masks)
    return rows, spec, notes


def _say_cost(
    groups: Sequence[LayerGroup], data: Iterable[Any], solver: Solver, allocate: str, limit: int | None, done: str
) -> None:
    counts = sum(map(count_samples, data)), sum(map(count_tokens, data))
    cost = estimate(groups, *counts, solver, allocate, limit)
    say([f"pruning by {solver.name} takes {cost} if nothing else runs"])
    say([] if done.startswith("0 ") else [f"resuming after {done} steps"])


def _attach_masks_(chosen: Sequence[Layer], masks: Mapping[str, Tensor]) -> None:
    for layer in chosen:
        shape = layer.original.shape
        set_mask_(layer, unpack_bits(masks[layer.full_name], shape.numel()).reshape(shape))


def check_solvable(chosen: Sequence[Layer], data: Iterable[Any], method: str) -> Any:
    """Return the first batch. Raises DataError without one, PatternError for embeddings, which have no input
    vectors.
    """
    first = next(iter(data), None)
    if first is None:
        raise DataError(f"the calibration data is empty: {method} needs at least one batch")
    embeddings = [l.full_name for l in chosen if l.layout.kind == "embedding"]
    if embeddings:
        raise PatternError(f"{method} cannot solve an embedding: ignore {', '.join(embeddings)}")
    return first


def _progress_line(layers: Sequence[Layer], row: Mapping[str, Any] | None = None) -> str:
    """Return a line of the table that is printed during a run, or its header."""
    width = max(len(l.full_name) for l in layers)
    if row is None:
        return f"{'layer':<{width}}  sparsity  error %  damping  seconds"
    sparsity = row["zeros"] / next(l.original.numel() for l in layers if l.full_name == row["layer"])
    numbers = f"{sparsity:8.2%}  {100 * row['error']:7.3f}  {row['damping']:7.4f}  {row['seconds']:7.3f}"
    return f"{row['layer']:<{width}}  {numbers}"


def _reconstruct_block(
    step: BlockStep,
    chosen: Sequence[Layer],
    solved: Mapping[str, Tensor],
    solver: Solver,
    streaming: bool,
    progress: bool,
) -> resume.StepState:
    """Reconstruct a block whose layers are solved; return all its parameters."""
    assert solver.reconstruct and solver.lr is not None
    module, name = step.block.module, step.block.name
    block_parameters = {id(p) for p in module.parameters()}
    masks = {
        l.full_name: unpack_bits(solved[l.full_name], l.original.numel()).reshape(l.original.shape)
        for l in chosen
        if id(l.original) in block_parameters and l.full_name in solved
    }
    for p in module.parameters() if streaming else ():
        p.data = p.data.clone()  # training in place would copy the mapped pages and keep both
    if step.calls:
        before, after = reconstruct_(
            step, masks, layers=chosen, epochs=solver.reconstruct, lr=solver.lr, bf16=in_bf16(solver)
        )
        line = f"{name} reconstructed: held-out error {100 * before:.3f} -> {100 * after:.3f} %"
        say([line] if progress else [])
    return resume.StepState({f"{name}/{n}": p.data for n, p in module.named_parameters()}, {})


def _apply_state(step: GroupStep | BlockStep, state: resume.StepState, streaming: bool) -> None:
    """Apply what was done in a step."""
    if streaming:  # masks are not needed before they are saved; weights are, and are paged out later
        offload.page_out(offload.file_backed(state.masks.values()))
    if isinstance(step, GroupStep):
        step.weights.update(state.weights)
        slots = {l.full_name: l.original for l in step.group.layers}
    else:
        slots = {f"{step.block.name}/{n}": p for n, p in step.block.module.named_parameters()}
        step.changed = True
    if {n: s.shape for n, s in slots.items()} != {n: t.shape for n, t in state.weights.items()}:
        raise ContainerError(STATE_MISFIT)
    if isinstance(step, BlockStep):
        for name, p in slots.items():
            p.data = state.weights[name] if streaming else p.data.copy_(state.weights[name])


def measure_errors(
    model: nn.Module,
    chosen: Sequence[Layer],
    spec: SparsityTarget,
    data: Iterable[Any],
    weights: Mapping[str, Tensor],
    levels: Sequence[float],
    *,
    solved: dict[str, list[Tensor]] | None = None,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Return each layer's error at each of `levels` of sparsity, solved by OBS in the dense model.

    The squared error of each output is weighted by `weights` (by layer name, [outputs]). The solutions are added to
    `solved`, as stored, in bf16. One forward pass, and O(levels) solutions.
    """
    costs: dict[str, list[float]] = {l.full_name: [] for l in chosen}
    model = unwrap(model)
    groups = layer_groups(model, next(iter(data)), chosen)
    with closing(calibrate_sequentially(model, data, groups)) as calibration:
        for step in track(calibration, "measuring errors", progress, len(groups)):
            assert isinstance(step, GroupStep)
            with torch.autocast("cpu", enabled=False):
                _measure_group(step, spec, weights, levels, costs, solved)
    return costs


def _measure_group(
    step: GroupStep,
    spec: SparsityTarget,
    weights: Mapping[str, Tensor],
    levels: Sequence[float],
    costs: dict[str, list[float]],
    solved: dict[str, list[Tensor]] | None,
) -> None:
    layers, H = step.group.layers, step.gram.H
    assert H is not None
    if not step.gram.tokens:
        names = ", ".join(l.full_name for l in layers)
        raise DataError(f"{names}: not called on the calibration data, so no error is known: ignore it")
    W = torch.cat([to_matrix(l, l.weight.detach().float()) for l in layers], 1)
    U = inverse_factor_of(layers, H, COMMON["damping"])[0]
    for level in levels:
        choose, layer_choosers = mask_choosers(layers, replace(spec, each={l.full_name: level for l in layers}), {})
        if spec.pattern.kind in LINES:
            mask = choose((W / U.diagonal(dim1=-2, dim2=-1)[:, None]).square(), 0, W.shape[-1])
            choose = fixed_mask(mask)
        new, _ = solvers.obs(W, U, choose, layer_choosers[0].edges(SOLVERS["obs"]["block"]))
        rows = [c.rows for c in layer_choosers]
        errors = solvers.squared_errors(new, W, H).split(rows, 1)
        for layer, error, w in zip(layers, errors, new.split(rows, 1)):
            if solved is not None:
                solution = to_stored(layer, w, tuple(layer.original.shape)).bfloat16()
                solved.setdefault(layer.full_name, []).append(solution)
            by_output = error.reshape(len(error), -1, layer.layout.shape[2]).sum(1).flatten()
            costs[layer.full_name].append(float((by_output * weights[layer.full_name].reshape(-1)).sum()))


def fixed_mask(mask: Tensor) -> solvers.ChooseMask:
    """Return a mask chooser that always returns the given masks."""
    return lambda _, a, b: mask[..., a:b]


def inverse_factor_of(layers: Sequence[Layer], H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return `solvers.inverse_factor`; raise ModelError that names the layers if there is none."""
    try:
        return solvers.inverse_factor(H, damping)
    except ArithmeticError as error:
        raise ModelError(
            f"{', '.join(l.full_name for l in layers)}: the Gram matrix of its inputs is {error}"
        ) from None


def mask_choosers(
    layers: Sequence[Layer], spec: SparsityTarget, fixed_masks: Mapping[str, Tensor]
) -> tuple[solvers.ChooseMask, list[_Chooser]]:
    """Return a function that chooses the mask of several layers' stacked rows, and the parts of each layer."""
    layer_choosers = [_Chooser(l, spec, fixed_masks.get(l.full_name)) for l in layers]
    rows = [c.rows for c in layer_choosers]

    def choose(score: Tensor, a: int, b: int) -> Tensor:
        return torch.cat([c(layer_score, a, b) for c, layer_score in zip(layer_choosers, score.split(rows, 1))], 1)

    return choose, layer_choosers


def _solve_distributed(
    step: GroupStep, spec: SparsityTarget, solver: Solver, fixed_masks: Mapping[str, Tensor]
) -> resume.StepState:
    """Solve a group's layers, divided among the processes; every process gets all of them."""
    layers, processes = step.group.layers, distributed.world_size()
    if processes == 1:
        return _solve_group(step, spec, solver, fixed_masks)
    state = resume.StepState({}, {})
    local_layers = layers[distributed.rank() :: processes]
    if local_layers:
        target = None
        if solver.asymmetric and step.gram.H is not None:  # the shift is found for all layers together
            matrices = [to_matrix(l, l.weight.detach().float()) for l in layers]
            targets = target_of(torch.cat(matrices, 1), step.gram.H, step.gram, solver).split(
                [p.shape[1] for p in matrices], 1
            )
            target = torch.cat(targets[distributed.rank() :: processes], 1)
        state = _solve_group(
            GroupStep(replace(step.group, layers=local_layers), step.gram), spec, solver, fixed_masks, target
        )
    rows = []
    for index, layer in enumerate(layers):
        name, source, numel = layer.full_name, index % processes, layer.original.numel()
        empty = torch.empty_like(layer.original), torch.empty((numel + 7) // 8, dtype=torch.uint8)
        step.weights[name] = distributed.broadcast_tensor(state.weights.get(name, empty[0]).detach(), source)
        state.masks[name] = distributed.broadcast_tensor(state.masks.get(name, empty[1]), source)
        rows.append(distributed.broadcast_json(next((r for r in state.rows if r["layer"] == name), None), source))
    return resume.StepState(dict(step.weights), {l.full_name: state.masks[l.full_name] for l in layers}, rows)


def _solve_group(
    step: GroupStep,
    spec: SparsityTarget,
    solver: Solver,
    fixed_masks: Mapping[str, Tensor],
    target: Tensor | None = None,
) -> resume.StepState:
    """Solve a group's layers together: their rows are stacked, because they share a Gram matrix."""
    began, layers, H = time.perf_counter(), step.group.layers, step.gram.H
    assert H is not None
    W = torch.cat([to_matrix(l, l.weight.detach().float()) for l in layers], 1)
    if not torch.isfinite(W).all():
        raise ModelError(f"{', '.join(l.full_name for l in layers)}: NaN or inf in its weights")
    new, mask, damping = _solve_stacked(step, spec, solver, fixed_masks, W, target)
    widths = [c.rows for c in mask_choosers(layers, spec, fixed_masks)[1]]
    error = solvers.squared_errors(new, W, H).sum(0).split(widths)
    energy = solvers.squared_errors(torch.zeros_like(W), W, H).sum(0).split(widths)
    seconds = (time.perf_counter() - began) / len(layers)
    masks, rows = {}, []
    for layer, w, m, e, total in zip(layers, new.split(widths, 1), mask.split(widths, 1), error, energy):
        shape = tuple(layer.original.shape)
        step.weights[layer.full_name] = to_stored(layer, w, shape).to(layer.original.dtype)
        masks[layer.full_name] = pack_bits(to_stored(layer, m, shape))
        rows.append(
            {
                "layer": layer.full_name,
                "zeros": int((~m).sum()),
                "error": float(e.sum() / total.sum().clamp(min=1e-30)),
                "damping": damping,
                "seconds": seconds,
            }
        )
        if layer.layout.kind == "experts":  # experts without tokens are pruned by magnitude and not refitted
            seen = step.gram.diagonal.sum(-1) * step.gram.tokens
            rows[-1]["idle"] = (seen == 0).nonzero()[:, 0].tolist()
    return resume.StepState(dict(step.weights), masks, rows)


def _solve_stacked(
    step: GroupStep,
    spec: SparsityTarget,
    solver: Solver,
    fixed_masks: Mapping[str, Tensor],
    W: Tensor,
    target: Tensor | None,
) -> tuple[Tensor, Tensor, float]:
    """Return new weights and masks [G, O, C] of a group's stacked rows, and the damping that was used."""
    layers, score, H, damping = step.group.layers, spec.score, step.gram.H, solver.damping
    assert H is not None and damping is not None
    choose, layer_choosers = mask_choosers(layers, spec, fixed_masks)
    if solver.name == "obs":
        assert solver.block is not None
        U, damping = inverse_factor_of(layers, H, damping)
        target = target_of(W, H, step.gram, solver) if target is None else target
        edges = layer_choosers[0].edges(solver.block)
        if score is not None or spec.pattern.kind in LINES:  # a line crosses all blocks, so its mask comes first
            obs_scores = (W / U.diagonal(dim1=-2, dim2=-1)[:, None]).square()
            scores = obs_scores if score is None or fixed_masks else _scores(layers, score, W, step.gram)
            choose = fixed_mask(choose(scores, 0, W.shape[-1]))
        return *solvers.obs(target, U, choose, edges), damping
    assert solver.refits is not None
    H_damped = solvers.damped(H, damping)
    target = target_of(W, H, step.gram, solver) if target is None else target
    if solver.name == "admm" and score is None and not fixed_masks:
        assert solver.steps is not None
        return *solvers.admm(target, H_damped, choose, steps=solver.steps, refits=solver.refits), damping
    scores = W if fixed_masks else _scores(layers, score or "wanda", W, step.gram)  # fixed masks need no scores
    mask = choose(scores, 0, W.shape[-1])
    return solvers.refit(target, target, H_damped, mask, solver.refits), mask, damping


def target_of(W: Tensor, H: Tensor, gram: Gram, solver: Solver) -> Tensor:
    """Return the weights whose outputs are wanted: the dense ones, or shifted towards the dense model's outputs.

    With several batches the shift is a share of what is best on the first one. Without the dense inputs of that batch,
    or of any, there is none.
    """
    if not solver.asymmetric or gram.cross is None or gram.held_out is None:
        return W
    try:
        L, _ = solvers.cholesky_factor(H, max(solver.damping or 0, 0.01))
    except ArithmeticError:  # of which the solver itself says more
        return W
    amount, held_out = solver.asymmetric, gram.held_out
    if gram.tokens > held_out.tokens:  # the best amount on a batch without which the shift is made
        assert held_out.H is not None and held_out.cross is not None
        other_shift = solvers.target_shift(W, gram.cross - held_out.cross * (held_out.tokens / gram.tokens), L)
        best = float(solvers.best_shift_amount(W, other_shift, held_out.H, held_out.cross)) * (
            1 - held_out.tokens / gram.tokens
        )
        amount *= min(1.0, max(0.0, best))
    return W + amount * solvers.target_shift(W, gram.cross, L)


def _scores(layers: Sequence[Layer], score: str, W: Tensor, gram: Gram) -> Tensor:
    """Return the score of each layer's rows, [G, O, C]."""
    scores, rows = [], [l.original.numel() // (W.shape[0] * W.shape[2]) for l in layers]
    for layer, w in zip(layers, W.split(rows, 1)):
        G, K, _, I = layer.layout.shape
        in_square = gram.diagonal.reshape(G, K if gram.diagonal.shape[1] == K * I else 1, 1, I)
        layer_scores = SCORES[score].of(to_gkoi(layer, w), LayerStats(in_square=in_square, tokens=1))
        scores.append(flatten_gkoi(layer_scores, layer.layout.kind == "conv-transposed"))
    return torch.cat(scores, 1)


class _Chooser:
    """Chooses the mask of one layer, for all its columns or block by block, with exact counts over all blocks."""

    def __init__(self, layer: Layer, spec: SparsityTarget, fixed_mask: Tensor | None):
        self.layer, self.plan, self.sparsity, self.scope = layer, spec.pattern, spec.each[layer.full_name], spec.scope
        self.G, self.K, self.O, self.I = layer.layout.shape
        if layer.layout.kind == "conv-transposed":  # each kernel position adds rows
            self.O, self.K = self.O * self.K, 1
        self.rows, self.num_pruned = self.O, 0
        earlier_mask = get_mask(layer)
        self.earlier_mask = None if earlier_mask is None else to_matrix(layer, earlier_mask)
        self.fixed_mask = None if fixed_mask is None else to_matrix(layer, fixed_mask)

    def __call__(self, score: Tensor, a: int, b: int) -> Tensor:
        if self.fixed_mask is not None:
            return self.fixed_mask[..., a:b]
        if self.earlier_mask is not None:
            score = score.masked_fill(~self.earlier_mask[..., a:b], float("-inf"))
        width = min(self.I, b - a)
        view = score.reshape(self.G, self.O, -1, width).transpose(1, 2)
        if self.layer.layout.kind == "conv-transposed":
            view = score.reshape(self.G, self.layer.layout.shape[1], self.layer.layout.shape[2], b - a)
        parts = view.split(1) if self.layer.layout.kind == "experts" else [view]  # equal sparsity
        sparsity = self.sparsity
        all_columns = b - a == self.K * self.I
        if not all_columns and self.plan.kind == "unstructured":
            entries = self.G * self.O
            sparsity = (round(sparsity * entries * b) - self.num_pruned) / (entries * (b - a))
            sparsity = min(1.0, max(0.0, sparsity))
        mask = torch.cat([patterns.masks_at_sparsity([p], self.plan, sparsity, self.scope)[0] for p in parts])
        if self.layer.layout.kind == "conv-transposed":
            mask = flatten_gkoi(mask, True)
        else:
            mask = mask.transpose(1, 2).reshape(score.shape)
        if self.earlier_mask is not None:  # a row may already have more zeros than its share
            mask = mask & self.earlier_mask[..., a:b]
        if not all_columns:
            self.num_pruned += int((~mask).sum())
        return mask

    def edges(self, block: int) -> list[int]:
        """Return where blocks of about `block` columns start.

        Within a kernel position they start at whole groups or blocks of the pattern; small kernel positions are not
        split.
        """
        C = self.K * self.I
        if block >= self.I:
            step = max(1, block // self.I) * self.I
            return [*range(0, C, step), C]
        unit = {"nm": self.plan.b, "block": self.plan.b}.get(self.plan.kind, 1)
        step = max(1, block // unit) * unit
        return [*(k * self.I + i for k in range(self.K) for i in range(0, self.I, step)), C]
