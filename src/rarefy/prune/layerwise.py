"""Pruning with reconstruction: one walk through the model, each group of layers solved on the inputs it really gets."""

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
    given: Callable[[SparsityTarget], Mapping[str, Tensor] | None] = lambda _: None,
    mark: Callable[[], Tensor] | None = None,
    memory: int | None = None,
    resume_dir: Path | None = None,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], SparsityTarget, list[str]]:
    """Prune the chosen layers in place, each solved on the inputs it gets from the layers pruned before it.

    data      batches that can be gone through more than once
    spread    finds the sparsity of each layer, and what is to be said of it; called once a run
    given     chooses masks beforehand, by layer name
    mark      by what the loss that `spread` reads can be known again
    memory    bytes to stay near: weights stay in their files, new ones in `resume_dir`, no masks; activations spill
    resume_dir folder for the state of the run, from which a killed one with the same arguments goes on
    Returns a row a layer (its relative error, damping, seconds, zeros), `spec` with the sparsity of each layer, and
    what `spread` said. An error in the middle leaves the layers before it pruned.
    O(one forward pass) + the solver's cost; memory as `rarefy.calibration.sequential.calibrate_sequentially`.
    """
    first = check_solvable(chosen, data, f"solver {solver.name}")
    lean, model = memory is not None, unwrap(model)
    settings = {"solver": solver.model_dump(), **spec.key()}
    rows: list[dict[str, Any]] = []
    masks: dict[str, Tensor] = {}  # in bits: all layers' together are a thirtieth of their weights
    dense = bool(solver.asymmetric or solver.reconstruct)
    with (
        distributed.replicated_data()
        if solver.reconstruct
        else nullcontext(),  # blocks learn on all batches, everywhere the same
        closing(resume.open_state(resume_dir, resume.run_key(model, data, **settings) if resume_dir else {})) as known,
        passes(solver),
    ):
        groups = layer_groups(model, first, chosen, dense=dense)
        places = with_block_steps(groups, find_blocks(model, chosen, solver.blocks) if solver.reconstruct else [])
        if progress:
            sizes = sum(map(count_samples, data)), sum(map(count_tokens, data))
            cost = estimate(groups, *sizes, solver, spec.allocate, memory and memory // 4)
            say([f"pruning by {solver.name} takes {cost} if nothing else runs"])
            if known.num_done:
                say([f"goes on after {known.num_done} of {len(places)} steps that were done before"])
        if resume_dir and mark is not None:
            known.check_same("loss", mark(), "loss")
        each, notes = known.compute_once("each", spread) if spec.allocate in NEEDS_DATA else spread()
        if each.keys() != {l.full_name for l in chosen} or not all(0 <= s <= 1 for s in each.values()):
            raise ContainerError(STATE_MISFIT)
        spec = replace(spec, each=each)
        masked = given(spec)
        if masked is not None:
            known.check_same("given", masked, "masks")
        say([_progress_line(chosen)] if progress else [])
        stops = calibrate_sequentially(
            model,
            data,
            places,
            dense=dense,
            num_done=known.num_done,
            assign=lean,
            max_suspended_bytes=memory and memory // 4,
            folder=resume_dir,
        )
        with closing(stops):  # hooks and modes go with it, whoever holds the traceback of an error
            for index, stop in enumerate(track(stops, f"pruning by {solver.name}", progress, len(places))):
                with torch.autocast("cpu", enabled=False):
                    if index < known.num_done:
                        entry = known.read(index)
                        _apply_state(stop, entry, lean)
                    else:
                        if isinstance(stop, BlockStep):
                            entry = _reconstruct_block(stop, chosen, masks, solver, lean, progress)
                        else:
                            entry = _solve_distributed(stop, spec, solver, masked or {})
                            say([_progress_line(chosen, r) for r in entry.rows] if progress else [])
                        known.write(index, entry)
                        if lean:
                            _apply_state(stop, known.read(index), lean)
                rows += entry.rows
                masks.update(entry.masks if solver.reconstruct or not lean else {})
    for layer in chosen if not lean else ():
        shape = layer.original.shape
        set_mask_(layer, unpack_bits(masks[layer.full_name], shape.numel()).reshape(shape))
    return rows, spec, notes


def check_solvable(chosen: Sequence[Layer], data: Iterable[Any], what: str) -> Any:
    """Return the first batch; raise for data without one, and for layers whose inputs are no vectors."""
    first = next(iter(data), None)
    if first is None:
        raise DataError(f"the calibration data is empty: {what} needs at least one batch")
    idle = [l.full_name for l in chosen if l.layout.kind == "embedding"]
    if idle:
        raise PatternError(f"{what} has nothing to move in an embedding: ignore {', '.join(idle)}")
    return first


def _progress_line(layers: Sequence[Layer], row: Mapping[str, Any] | None = None) -> str:
    """A line of the table that grows while a walk goes on, or its head."""
    width = max(len(l.full_name) for l in layers)
    if row is None:
        return f"{'layer':<{width}}  sparsity  error %  damping  seconds"
    share = row["zeros"] / next(l.original.numel() for l in layers if l.full_name == row["layer"])
    numbers = f"{share:8.2%}  {100 * row['error']:7.3f}  {row['damping']:7.4f}  {row['seconds']:7.3f}"
    return f"{row['layer']:<{width}}  {numbers}"


def _reconstruct_block(
    stop: BlockStep, chosen: Sequence[Layer], solved: Mapping[str, Tensor], solver: Solver, lean: bool, progress: bool
) -> resume.StepState:
    """Reconstruct a block whose layers are solved, with their masks in bits; return all its parameters."""
    assert solver.reconstruct and solver.lr is not None
    module, name = stop.block.module, stop.block.name
    inside = {id(p) for p in module.parameters()}
    masks = {
        l.full_name: unpack_bits(solved[l.full_name], l.original.numel()).reshape(l.original.shape)
        for l in chosen
        if id(l.original) in inside and l.full_name in solved
    }
    for p in module.parameters() if lean else ():
        p.data = p.data.clone()  # training in place would copy the pages of the file, and keep both
    before, after = reconstruct_(
        stop, masks, layers=chosen, epochs=solver.reconstruct, lr=solver.lr, bf16=in_bf16(solver)
    )
    say([f"{name} learnt: held-out error {100 * before:.3f} -> {100 * after:.3f} %"] if progress else [])
    return resume.StepState({f"{name}/{n}": p.data for n, p in module.named_parameters()}, {})


def _apply_state(stop: GroupStep | BlockStep, entry: resume.StepState, lean: bool) -> None:
    """Take up what was done at a stop."""
    if lean:  # masks are not wanted before they are saved; weights are, and the walk lets them go
        offload.page_out(offload.file_backed(entry.masks.values()))
    if isinstance(stop, GroupStep):
        stop.weights.update(entry.weights)
        slots = {l.full_name: l.original for l in stop.group.layers}
    else:
        slots = {f"{stop.block.name}/{n}": p for n, p in stop.block.module.named_parameters()}
        stop.changed = True
    if {n: s.shape for n, s in slots.items()} != {n: t.shape for n, t in entry.weights.items()}:
        raise ContainerError(STATE_MISFIT)
    if isinstance(stop, BlockStep):
        for name, p in slots.items():
            p.data = entry.weights[name] if lean else p.data.copy_(entry.weights[name])


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
    """Return each layer's error at each of `levels` of sparsity, solved by OBS in the untouched model; each output's
    squared error counts as much as `weights` (by layer name, [outputs]) says. The solutions go to `solved`, as stored,
    in bf16. One forward pass, O(levels) solutions."""
    costs: dict[str, list[float]] = {l.full_name: [] for l in chosen}
    model = unwrap(model)
    groups = layer_groups(model, next(iter(data)), chosen)
    with closing(calibrate_sequentially(model, data, groups)) as stops:
        for stop in track(stops, "measuring errors", progress, len(groups)):
            assert isinstance(stop, GroupStep)
            with torch.autocast("cpu", enabled=False):
                _measure_group(stop, spec, weights, levels, costs, solved)
    return costs


def _measure_group(
    stop: GroupStep,
    spec: SparsityTarget,
    weights: Mapping[str, Tensor],
    levels: Sequence[float],
    costs: dict[str, list[float]],
    solved: dict[str, list[Tensor]] | None,
) -> None:
    layers, H = stop.group.layers, stop.gram.H
    assert H is not None
    W = torch.cat([to_matrix(l, l.weight.detach().float()) for l in layers], 1)
    U = inverse_factor_of(layers, H, COMMON["damping"])[0]
    for level in levels:
        choose, parts = mask_choosers(layers, replace(spec, each={l.full_name: level for l in layers}), {})
        if spec.pattern.kind in LINES:
            mask = choose((W / U.diagonal(dim1=-2, dim2=-1)[:, None]).square(), 0, W.shape[-1])
            choose = fixed_mask(mask)
        new, _ = solvers.obs(W, U, choose, parts[0].edges(SOLVERS["obs"]["block"]))
        widths = [c.rows for c in parts]
        errors = solvers.squared_errors(new, W, H).split(widths, 1)
        for layer, error, w in zip(layers, errors, new.split(widths, 1)):
            if solved is not None:
                kept = to_stored(layer, w, tuple(layer.original.shape)).bfloat16()
                solved.setdefault(layer.full_name, []).append(kept)
            by_output = error.reshape(len(error), -1, layer.layout.shape[2]).sum(1).flatten()
            costs[layer.full_name].append(float((by_output * weights[layer.full_name].reshape(-1)).sum()))


def fixed_mask(mask: Tensor) -> solvers.ChooseMask:
    """A choice that was made before."""
    return lambda _, a, b: mask[..., a:b]


def inverse_factor_of(layers: Sequence[Layer], H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return `solve.inverse_factor`; ModelError naming the layers where there is none."""
    try:
        return solvers.inverse_factor(H, damping)
    except ArithmeticError as error:
        raise ModelError(
            f"{', '.join(l.full_name for l in layers)}: the Gram matrix of its inputs is {error}"
        ) from None


def mask_choosers(
    layers: Sequence[Layer], spec: SparsityTarget, given: Mapping[str, Tensor]
) -> tuple[solvers.ChooseMask, list[_Chooser]]:
    """One choice for the stacked rows of several layers, each by itself."""
    parts = [_Chooser(l, spec, given.get(l.full_name)) for l in layers]
    widths = [c.rows for c in parts]

    def choose(score: Tensor, a: int, b: int) -> Tensor:
        return torch.cat([c(part, a, b) for c, part in zip(parts, score.split(widths, 1))], 1)

    return choose, parts


def _solve_distributed(
    stop: GroupStep, spec: SparsityTarget, s: Solver, given: Mapping[str, Tensor]
) -> resume.StepState:
    """Solve a group's layers, each on one of several processes; all processes get all of them."""
    layers, many = stop.group.layers, distributed.world_size()
    if many == 1:
        return _solve_group(stop, spec, s, given)
    done = resume.StepState({}, {})
    own = layers[distributed.rank() :: many]
    if own:
        wanted = None
        if s.asymmetric and stop.gram.H is not None:  # how far targets are shifted is asked of all layers together
            parts = [to_matrix(l, l.weight.detach().float()) for l in layers]
            shifted = target_of(torch.cat(parts, 1), stop.gram.H, stop.gram, s).split([p.shape[1] for p in parts], 1)
            wanted = torch.cat(shifted[distributed.rank() :: many], 1)
        done = _solve_group(GroupStep(replace(stop.group, layers=own), stop.gram), spec, s, given, wanted)
    rows = []
    for index, layer in enumerate(layers):
        name, source, numel = layer.full_name, index % many, layer.original.numel()
        empty = torch.empty_like(layer.original), torch.empty((numel + 7) // 8, dtype=torch.uint8)
        stop.weights[name] = distributed.broadcast_tensor(done.weights.get(name, empty[0]).detach(), source)
        done.masks[name] = distributed.broadcast_tensor(done.masks.get(name, empty[1]), source)
        rows.append(distributed.broadcast_json(next((r for r in done.rows if r["layer"] == name), None), source))
    return resume.StepState(dict(stop.weights), {l.full_name: done.masks[l.full_name] for l in layers}, rows)


def _solve_group(
    stop: GroupStep, spec: SparsityTarget, s: Solver, given: Mapping[str, Tensor], wanted: Tensor | None = None
) -> resume.StepState:
    began, score = time.perf_counter(), spec.score
    layers = stop.group.layers
    W = torch.cat([to_matrix(l, l.weight.detach().float()) for l in layers], 1)
    if not torch.isfinite(W).all():
        raise ModelError(f"{', '.join(l.full_name for l in layers)}: NaN or inf in its weights")
    choose, chosen = mask_choosers(layers, spec, given)
    widths = [c.rows for c in chosen]
    H, used = stop.gram.H, s.damping
    assert H is not None and used is not None
    if s.name == "obs":
        assert s.block is not None
        U, used = inverse_factor_of(layers, H, used)
        target = target_of(W, H, stop.gram, s) if wanted is None else wanted
        edges = chosen[0].edges(s.block)
        if score is not None or spec.pattern.kind in LINES:  # a line crosses all blocks: its mask comes first
            own = (W / U.diagonal(dim1=-2, dim2=-1)[:, None]).square()
            scores = own if score is None or given else _scores(layers, score, W, stop.gram)
            mask = choose(scores, 0, W.shape[-1])
            new, mask = solvers.obs(target, U, fixed_mask(mask), edges)
        else:
            new, mask = solvers.obs(target, U, choose, edges)
    else:
        assert s.refits is not None
        Hd = solvers.damped(H, used)
        target = target_of(W, H, stop.gram, s) if wanted is None else wanted
        if s.name == "admm" and score is None and not given:
            assert s.steps is not None
            new, mask = solvers.admm(target, Hd, choose, steps=s.steps, refits=s.refits)
        else:
            scores = W if given else _scores(layers, score or "wanda", W, stop.gram)  # given masks need none
            mask = choose(scores, 0, W.shape[-1])
            new = solvers.refit(target, target, Hd, mask, s.refits)
    error = solvers.squared_errors(new, W, H).sum(0).split(widths)
    energy = solvers.squared_errors(torch.zeros_like(W), W, H).sum(0).split(widths)
    seconds = (time.perf_counter() - began) / len(layers)
    masks, rows = {}, []
    for layer, w, m, e, all_ in zip(layers, new.split(widths, 1), mask.split(widths, 1), error, energy):
        shape = tuple(layer.original.shape)
        stop.weights[layer.full_name] = to_stored(layer, w, shape).to(layer.original.dtype)
        masks[layer.full_name] = pack_bits(to_stored(layer, m, shape))
        rows.append(
            {
                "layer": layer.full_name,
                "zeros": int((~m).sum()),
                "error": float(e.sum() / all_.sum().clamp(min=1e-30)),
                "damping": used,
                "seconds": seconds,
            }
        )
        if layer.layout.kind == "experts":  # their masks went by magnitude, their weights stay
            rows[-1]["idle"] = (stop.gram.diagonal.sum(-1) == 0).nonzero()[:, 0].tolist()
    return resume.StepState(dict(stop.weights), masks, rows)


def target_of(W: Tensor, H: Tensor, gram: Gram, s: Solver) -> Tensor:
    """Return the weights whose outputs are wanted: the dense ones, or shifted towards the dense model's outputs."""
    if not s.asymmetric or gram.cross is None:
        return W
    L = torch.linalg.cholesky(solvers.damped(H, max(s.damping or 0, 0.01)))
    amount, held = s.asymmetric, gram.held_out
    if held is not None and gram.tokens > held.tokens:  # what is right for tokens that the shift was not made of
        assert held.H is not None and held.cross is not None
        seen = solvers.target_shift(W, gram.cross - held.cross * (held.tokens / gram.tokens), L)
        best = float(solvers.best_shift_amount(W, seen, held.H, held.cross)) * (1 - held.tokens / gram.tokens)
        amount *= min(1.0, max(0.0, best))
    return W + amount * solvers.target_shift(W, gram.cross, L)


def _scores(layers: Sequence[Layer], score: str, W: Tensor, gram: Gram) -> Tensor:
    """The score of each layer by itself, [G, O, C]."""
    parts, widths = [], [l.original.numel() // (W.shape[0] * W.shape[2]) for l in layers]
    for layer, w in zip(layers, W.split(widths, 1)):
        G, K, _, I = layer.layout.shape
        square = gram.diagonal.reshape(G, K if gram.diagonal.shape[1] == K * I else 1, 1, I)
        found = SCORES[score].of(to_gkoi(layer, w), LayerStats(in_square=square, tokens=1))
        parts.append(flatten_gkoi(found, layer.layout.kind == "conv-transposed"))
    return torch.cat(parts, 1)


class _Chooser:
    """Masks of one layer, for all its columns or a block of them at a time, with exact counts over all blocks."""

    def __init__(self, layer: Layer, spec: SparsityTarget, given: Tensor | None):
        self.layer, self.plan, self.sparsity, self.scope = layer, spec.pattern, spec.each[layer.full_name], spec.scope
        self.G, self.K, self.O, self.I = layer.layout.shape
        if layer.layout.kind == "conv-transposed":  # its outputs at each kernel position are rows
            self.O, self.K = self.O * self.K, 1
        self.rows, self.pruned = self.O, 0
        before = get_mask(layer)
        self.before = None if before is None else to_matrix(layer, before)
        self.given = None if given is None else to_matrix(layer, given)

    def __call__(self, score: Tensor, a: int, b: int) -> Tensor:
        if self.given is not None:
            return self.given[..., a:b]
        if self.before is not None:
            score = score.masked_fill(~self.before[..., a:b], float("-inf"))
        width = min(self.I, b - a)
        tall = score.reshape(self.G, self.O, -1, width).transpose(1, 2)
        if self.layer.layout.kind == "conv-transposed":
            tall = score.reshape(self.G, self.layer.layout.shape[1], self.layer.layout.shape[2], b - a)
        parts = tall.split(1) if self.layer.layout.kind == "experts" else [tall]  # each expert keeps its share
        share = self.sparsity
        whole = b - a == self.K * self.I
        if not whole and self.plan.kind == "unstructured":
            entries = self.G * self.O
            share = (round(share * entries * b) - self.pruned) / (entries * (b - a))
            share = min(1.0, max(0.0, share))
        mask = torch.cat([patterns.masks_at_sparsity([p], self.plan, share, self.scope)[0] for p in parts])
        if self.layer.layout.kind == "conv-transposed":
            mask = flatten_gkoi(mask, True)
        else:
            mask = mask.transpose(1, 2).reshape(score.shape)
        if self.before is not None:  # a row may hold more zeros than its share
            mask = mask & self.before[..., a:b]
        if not whole:
            self.pruned += int((~mask).sum())
        return mask

    def edges(self, block: int) -> list[int]:
        """Where blocks of about `block` columns begin: within a kernel position at whole groups or blocks of the
        pattern, or at whole kernel positions where these are small."""
        C = self.K * self.I
        if block >= self.I:
            step = max(1, block // self.I) * self.I
            return [*range(0, C, step), C]
        unit = {"nm": self.plan.b, "block": self.plan.b}.get(self.plan.kind, 1)
        step = max(1, block // unit) * unit
        return [*(k * self.I + i for k in range(self.K) for i in range(0, self.I, step)), C]


def to_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """Return a weight (as stored) as [G, O, C]; a transposed convolution has its kernel positions among the rows."""
    return flatten_gkoi(layer.layout.view(weight), layer.layout.kind == "conv-transposed")


def flatten_gkoi(view: Tensor, positions_are_rows: bool = False) -> Tensor:
    """[G, K, O, I] -> [G, O, K I], or [G, K O, I]."""
    return view.flatten(1, 2) if positions_are_rows else view.transpose(1, 2).flatten(2)


def to_gkoi(layer: Layer, W: Tensor) -> Tensor:
    """[G, O, C] -> [G, K, O, I]."""
    G, K, O, I = layer.layout.shape
    if layer.layout.kind == "conv-transposed":
        return W.reshape(G, K, O, I)
    return W.reshape(G, O, K, I).transpose(1, 2)


def to_stored(layer: Layer, W: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[G, O, C] -> as stored: the inverse of `to_matrix`."""
    return layer.layout.unview(to_gkoi(layer, W), shape)
