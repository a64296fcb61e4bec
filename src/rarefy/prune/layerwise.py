"""Pruning with reconstruction: one walk through the model, each group of layers solved on the inputs it really gets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import ContainerError, DataError, ModelError, PatternError, unknown
from rarefy.formats.sparse import pack_bits, unpack_bits
from rarefy.model.gram import Gram
from rarefy.model.mask import get_mask, set_mask_
from rarefy.model.select import Layer
from rarefy.model.stats import Stats
from rarefy.model.walk import Block, End, Group, Stop, blocks, order, samples_in, walk, with_ends
from rarefy.progress import say, track
from rarefy.proof.report import table
from rarefy.prune import journal, solve
from rarefy.prune import pattern as patterns
from rarefy.prune.estimate import estimate
from rarefy.prune.reconstruct import reconstruct_
from rarefy.prune.score import SCORES


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How kept weights are moved; what is None is the solver's own default, see `SOLVERS`.

    name        obs (SparseGPT), admm (ALPS, then conjugate gradients) or refit (conjugate gradients on a scored mask)
    damping     times the mean of diag(H) is added to the diagonal
    asymmetric  0..1: how far the target moves towards the outputs of the dense model on its own inputs, as a share of
                what is best on a batch that is held out
    bf16        run the model's forward passes in bf16 where torch allows
    block       obs: columns whose mask is chosen together
    steps       admm: iterations
    refits      admm, refit: conjugate gradient steps once the mask is fixed
    reconstruct passes over the calibration set in which each block learns the dense block's outputs; 0 = none
    lr          of that learning (Adam, cosine)
    blocks      names of what learns as one, globs with | between; by default the members of the model's outermost lists
                of equal modules
    """

    name: str
    damping: float | None = None
    asymmetric: float | None = None
    bf16: bool | None = None
    block: int | None = None
    steps: int | None = None
    refits: int | None = None
    reconstruct: int | None = None
    lr: float | None = None
    blocks: str | None = None


@dataclass(frozen=True)
class Ask:
    """Which zeros are wanted."""

    plan: patterns.Pattern
    sparsity: float
    each: Mapping[str, float]  # sparsity by layer name
    scope: str
    score: str | None = None  # None = the solver's own criterion (refit: wanda)
    reduce: str | None = None

    @property
    def first(self) -> bool:
        """Whether masks need all layers before the first is solved."""
        if self.score is None:
            return False
        return self.scope == "global" or self.reduce is not None or bool(SCORES[self.score].needs - {"input"})


COMMON: dict[str, Any] = {
    "damping": 0.01,
    "asymmetric": 0.0,
    "bf16": False,
    "reconstruct": 0,
    "lr": 1e-3,
    "blocks": None,
}
SOLVERS: dict[str, dict[str, Any]] = {
    "obs": {**COMMON, "block": 128},
    "admm": {**COMMON, "steps": 10, "refits": 6},
    "refit": {**COMMON, "refits": 6},
}


def resolve(solver: str | Solver) -> Solver:
    """Return the solver with its defaults filled in; PatternError for an unknown one or an option it does not have.

    >>> resolve("obs").block
    128
    """
    if not isinstance(solver, Solver):
        solver = Solver(name=solver)
    if solver.name not in SOLVERS:
        raise PatternError(unknown("solver", solver.name, SOLVERS))
    known = SOLVERS[solver.name]
    given = {f.name: getattr(solver, f.name) for f in fields(solver) if f.name != "name"}
    idle = [k for k, v in given.items() if v is not None and k not in known]
    if idle:
        raise PatternError(f"solver {solver.name} has no {', '.join(idle)}; it has {', '.join(known)}")
    for key in ("lr", "blocks"):
        if given[key] is not None and not given["reconstruct"]:
            raise PatternError(f"solver {solver.name}: {key}={given[key]!r} has no effect without reconstruct")
    if not isinstance(solver.blocks, str | None):
        raise PatternError(f"solver {solver.name}: blocks is a glob of module names, got {solver.blocks!r}")
    ranges = {
        "damping": (0, 10),
        "asymmetric": (0, 1),
        "block": (1, 1 << 20),
        "steps": (1, 10000),
        "refits": (0, 10000),
        "reconstruct": (0, 1000),
        "lr": (0, 1),
    }
    for key, (low, high) in ranges.items():
        if given[key] is not None and not low <= given[key] <= high:
            raise PatternError(f"solver {solver.name}: {key} lies within {low} and {high}, got {given[key]!r}")
    return Solver(name=solver.name, **{k: known[k] if given[k] is None else given[k] for k in known})


def passes(solver: Solver) -> AbstractContextManager[Any]:
    """The precision in which a solver runs the model."""
    # no cache: it would keep the weights of the first pass for as long as the context lasts
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if solver.bf16 else nullcontext()


def solve_(
    model: nn.Module,
    chosen: Sequence[Layer],
    ask: Ask,
    solver: Solver,
    data: Iterable[Any],
    *,
    given: Mapping[str, Tensor] | None = None,
    memory: int | None = None,
    work: Path | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Prune the chosen layers in place, each solved on the inputs it gets from the layers pruned before it.

    data      batches that can be gone through more than once
    given     masks chosen beforehand, by layer name
    memory    bytes to stay near: weights stay in their files, new ones in `work`, without masks; activations spill
    work      folder for the state of the run, from which a killed one with the same arguments goes on
    Returns a row a layer: its relative error, damping, seconds, zeros. An error in the middle leaves the layers before
    it pruned. O(one forward pass) + the solver's cost; memory as `rarefy.model.walk.walk`.
    """
    first = next(iter(data), None)
    if first is None:
        raise DataError(f"the calibration data is empty: solver {solver.name} needs at least one batch")
    idle = [l.full_name for l in chosen if l.layout.kind == "embedding"]
    if idle:
        raise PatternError(f"solver {solver.name} has nothing to move in an embedding: ignore {', '.join(idle)}")
    lean = memory is not None
    settings = {"solver": asdict(solver), **asdict(ask)}
    known = journal.open_(work, journal.key(model, [*data, given], **settings) if work else {})
    rows: list[dict[str, Any]] = []
    masks: dict[str, Tensor] = {}  # in bits: all layers' together are a quarter of their weights in bytes
    with passes(solver):
        groups = order(model, first, chosen)
        if progress:
            cost = estimate(groups, sum(map(samples_in, data)), solver, memory and memory // 4)
            say([f"pruning by {solver.name} takes {cost} if nothing else runs"])
        places = with_ends(groups, blocks(model, chosen, solver.blocks) if solver.reconstruct else [])
        stops = walk(
            model,
            data,
            places,
            dense=bool(solver.asymmetric or solver.reconstruct),
            passed=known.known,
            assign=lean,
            most=memory and memory // 4,
            folder=work,
        )
        if known.known and progress:
            say([f"goes on after {known.known} of {len(places)} steps that were done before"])
        waiting = journal.Entry({}, {})  # layers whose block is to be learnt yet
        for index, stop in enumerate(track(stops, f"pruning by {solver.name}", progress, len(places))):
            with torch.autocast("cpu", enabled=False):
                if index < known.known:
                    entry = known.read(index)
                    _put(stop, entry, lean)
                elif isinstance(stop, End):
                    entry, waiting = _learn(stop, waiting, solver, lean), journal.Entry({}, {})
                else:
                    entry = _solve(stop, ask, solver, given or {})
                    say([table(entry.rows)] if progress else [])
                    if _is_learnt(stop, places[index:]):
                        waiting, entry = waiting.plus(entry), None
            if entry is None:
                continue
            if index >= known.known:
                known.write(index, entry)
                if lean:
                    _put(stop, known.read(index), lean)
            rows += entry.rows
            masks.update({} if lean else entry.masks)
    for layer in chosen if not lean else ():
        shape = layer.original.shape
        set_mask_(layer, unpack_bits(masks[layer.full_name], shape.numel()).reshape(shape))
    return rows


def _is_learnt(stop: Stop, places: Sequence[Group | Block]) -> bool:
    """Whether the layers of a group lie in the block that ends next."""
    block = next((p for p in places if isinstance(p, Block)), None)
    inside = {id(l) for l in block.layers} if block else set()
    return all(id(l) in inside for l in stop.group.layers)


def _learn(stop: End, solved: journal.Entry, solver: Solver, lean: bool) -> journal.Entry:
    """Reconstruct a block whose layers are solved; return all its parameters."""
    assert solver.reconstruct and solver.lr is not None
    shapes = {l.full_name: l.original.shape for l in stop.block.layers if l.full_name in solved.masks}
    masks = {n: unpack_bits(solved.masks[n], s.numel()).reshape(s) for n, s in shapes.items()}
    for p in stop.block.module.parameters() if lean else ():
        p.data = p.data.clone()  # training in place would copy the pages of the file, and keep both
    reconstruct_(stop, masks, epochs=solver.reconstruct, lr=solver.lr, bf16=bool(solver.bf16))
    weights = {f"{stop.block.name}/{n}": p.data for n, p in stop.block.module.named_parameters()}
    return journal.Entry(weights, solved.masks, solved.rows)


def _put(stop: Stop | End, entry: journal.Entry | None, lean: bool) -> None:
    """Take up what was done at a stop."""
    if entry is None:
        return
    if isinstance(stop, Stop):
        stop.weights.update(entry.weights)
        slots = {l.full_name: l.original for l in stop.group.layers}
    else:
        slots = {f"{stop.block.name}/{n}": p for n, p in stop.block.module.named_parameters()}
        stop.changed = True
    if {n: s.shape for n, s in slots.items()} != {n: t.shape for n, t in entry.weights.items()}:
        raise ContainerError("the state of this run does not fit the model: remove its folder to start anew")
    if isinstance(stop, End):
        for name, p in slots.items():
            p.data = entry.weights[name] if lean else p.data.copy_(entry.weights[name])


def measure(
    model: nn.Module,
    chosen: Sequence[Layer],
    ask: Ask,
    data: Iterable[Any],
    weights: Mapping[str, Tensor],
    levels: Sequence[float],
    *,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Return each layer's error at each of `levels` of sparsity, solved by OBS in the untouched model; each output's
    squared error counts as much as `weights` (by layer name, [outputs]) says. One forward pass, O(levels) solutions."""
    costs: dict[str, list[float]] = {l.full_name: [] for l in chosen}
    groups = order(model, next(iter(data)), chosen)
    for stop in track(walk(model, data, groups), "measuring errors", progress, len(groups)):
        assert isinstance(stop, Stop) and stop.gram.H is not None
        layers, H = stop.group.layers, stop.gram.H
        W = torch.cat([matrix(l, l.weight.detach().float()) for l in layers], 1)
        U, _ = solve.inverse_factor(H, COMMON["damping"])
        for level in levels:
            choose, parts = _choosers(layers, replace(ask, each={l.full_name: level for l in layers}), {})
            new, _ = solve.obs(W, U, choose, parts[0].edges(SOLVERS["obs"]["block"]))
            errors = solve.error(new, W, H).split([c.rows for c in parts], 1)
            for layer, error in zip(layers, errors):
                outputs = layer.layout.shape[2]
                by_output = error.reshape(len(error), -1, outputs).sum(1).flatten()
                w = weights[layer.full_name].reshape(-1)
                costs[layer.full_name].append(float((by_output * w).sum()))
    return costs


def _choosers(layers: Sequence[Layer], ask: Ask, given: Mapping[str, Tensor]) -> tuple[solve.Choose, list[_Chooser]]:
    """One choice for the stacked rows of several layers, each by itself."""
    parts = [_Chooser(l, ask, given.get(l.full_name)) for l in layers]
    widths = [c.rows for c in parts]

    def choose(score: Tensor, a: int, b: int) -> Tensor:
        return torch.cat([c(part, a, b) for c, part in zip(parts, score.split(widths, 1))], 1)

    return choose, parts


def _solve(stop: Stop, ask: Ask, s: Solver, given: Mapping[str, Tensor]) -> journal.Entry:
    began, score = time.perf_counter(), ask.score
    layers = stop.group.layers
    W = torch.cat([matrix(l, l.weight.detach().float()) for l in layers], 1)
    if not torch.isfinite(W).all():
        raise ModelError(f"{', '.join(l.full_name for l in layers)}: NaN or inf in its weights")
    choose, chosen = _choosers(layers, ask, given)
    widths = [c.rows for c in chosen]
    H, used = stop.gram.H, s.damping
    assert H is not None and used is not None
    if s.name == "obs":
        assert s.block is not None
        U, used = solve.inverse_factor(H, used)
        target = _target(W, H, stop.gram, s)
        edges = chosen[0].edges(s.block)
        if score is not None or ask.plan.kind in ("row", "column"):  # a line crosses all blocks: its mask comes first
            own = (W / U.diagonal(dim1=-2, dim2=-1)[:, None]).square()
            scores = own if score is None or given else _scores(layers, score, W, stop.gram)
            mask = choose(scores, 0, W.shape[-1])
            new, mask = solve.obs(target, U, lambda _, a, b: mask[..., a:b], edges)
        else:
            new, mask = solve.obs(target, U, choose, edges)
    else:
        assert s.refits is not None
        Hd = solve.damped(H, used)
        target = _target(W, H, stop.gram, s)
        if s.name == "admm" and score is None and not given:
            assert s.steps is not None
            new, mask = solve.admm(target, Hd, choose, steps=s.steps, refits=s.refits)
        else:
            scores = W if given else _scores(layers, score or "wanda", W, stop.gram)  # given masks need none
            mask = choose(scores, 0, W.shape[-1])
            new = solve.refit(target, target, Hd, mask, s.refits)
    error = solve.error(new, W, H).sum(0).split(widths)
    energy = solve.error(torch.zeros_like(W), W, H).sum(0).split(widths)
    seconds = (time.perf_counter() - began) / len(layers)
    masks, rows = {}, []
    for layer, w, m, e, all_ in zip(layers, new.split(widths, 1), mask.split(widths, 1), error, energy):
        shape = tuple(layer.original.shape)
        stop.weights[layer.full_name] = stored(layer, w, shape).to(layer.original.dtype)
        masks[layer.full_name] = pack_bits(stored(layer, m, shape))
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
    return journal.Entry(dict(stop.weights), masks, rows)


def _target(W: Tensor, H: Tensor, gram: Gram, s: Solver) -> Tensor:
    if not s.asymmetric or gram.cross is None:
        return W
    L = torch.linalg.cholesky(solve.damped(H, max(s.damping or 0, 0.01)))
    amount, held = s.asymmetric, gram.held
    if held is not None and gram.tokens > held.tokens:  # what is right for tokens that the shift was not made of
        assert held.H is not None and held.cross is not None
        seen = solve.shift(W, gram.cross - held.cross * (held.tokens / gram.tokens), L)
        best = float(solve.best_shift(W, seen, held.H, held.cross)) * (1 - held.tokens / gram.tokens)
        amount *= min(1.0, max(0.0, best))
    return W + amount * solve.shift(W, gram.cross, L)


def _scores(layers: Sequence[Layer], score: str, W: Tensor, gram: Gram) -> Tensor:
    """The score of each layer by itself, [G, O, C]."""
    parts, widths = [], [l.original.numel() // (W.shape[0] * W.shape[2]) for l in layers]
    for layer, w in zip(layers, W.split(widths, 1)):
        G, K, _, I = layer.layout.shape
        square = gram.diagonal.reshape(G, K if gram.diagonal.shape[1] == K * I else 1, 1, I)
        found = SCORES[score].of(four(layer, w), Stats(in_square=square, tokens=1))
        parts.append(flat(found, layer.layout.kind == "conv-transposed"))
    return torch.cat(parts, 1)


class _Chooser:
    """Masks of one layer, for all its columns or a block of them at a time, with exact counts over all blocks."""

    def __init__(self, layer: Layer, ask: Ask, given: Tensor | None):
        self.layer, self.plan, self.sparsity, self.scope = layer, ask.plan, ask.each[layer.full_name], ask.scope
        self.G, self.K, self.O, self.I = layer.layout.shape
        if layer.layout.kind == "conv-transposed":  # its outputs at each kernel position are rows
            self.O, self.K = self.O * self.K, 1
        self.rows, self.pruned = self.O, 0
        before = get_mask(layer)
        self.before = None if before is None else matrix(layer, before)
        self.given = None if given is None else matrix(layer, given)

    def __call__(self, score: Tensor, a: int, b: int) -> Tensor:
        if self.given is not None:
            return self.given[..., a:b]
        if self.before is not None:
            score = score.masked_fill(~self.before[..., a:b], float("-inf"))
        width = min(self.I, b - a)
        tall = score.reshape(self.G, self.O, -1, width).transpose(1, 2)
        if self.layer.layout.kind == "conv-transposed":
            tall = four(self.layer, score)
        parts = tall.split(1) if self.layer.layout.kind == "experts" else [tall]  # each expert keeps its share
        share = self.sparsity
        whole = b - a == self.K * self.I
        if not whole and self.plan.kind == "unstructured":
            entries = self.G * self.O
            share = (round(share * entries * b) - self.pruned) / (entries * (b - a))
            share = min(1.0, max(0.0, share))
        mask = torch.cat([patterns.masks_at([p], self.plan, share, self.scope)[0] for p in parts])
        if self.layer.layout.kind == "conv-transposed":
            mask = flat(mask, True)
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


def matrix(layer: Layer, weight: Tensor) -> Tensor:
    """Return a weight (as stored) as [G, O, C]; a transposed convolution has its kernel positions among the rows."""
    return flat(layer.layout.view(weight), layer.layout.kind == "conv-transposed")


def flat(view: Tensor, positions_are_rows: bool = False) -> Tensor:
    """[G, K, O, I] -> [G, O, K I], or [G, K O, I]."""
    return view.flatten(1, 2) if positions_are_rows else view.transpose(1, 2).flatten(2)


def four(layer: Layer, W: Tensor) -> Tensor:
    """[G, O, C] -> [G, K, O, I]."""
    G, K, O, I = layer.layout.shape
    if layer.layout.kind == "conv-transposed":
        return W.reshape(G, K, O, I)
    return W.reshape(G, O, K, I).transpose(1, 2)


def stored(layer: Layer, W: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[G, O, C] -> as stored: the inverse of `matrix`."""
    return layer.layout.unview(four(layer, W), shape)
