"""What each plan does to masks and weights, and when: events along the way of training, as plain functions.

An event is (progress, value); `act` is called with the value when training has come that far, and returns the sparsity
that is then in force. Scores have the shape [G, K, O, I] of `rarefy.model.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import PatternError, SelectorError
from rarefy.model import distributed
from rarefy.model.distributed import full_tensor, shard_like
from rarefy.model.layers import Layer, select_layers
from rarefy.model.losses import Loss
from rarefy.model.masks import dense_mask, effective_weight, mask_or_dense, set_mask_
from rarefy.model.sparsity_pattern import Pattern, masks_at_sparsity, mean_per_unit
from rarefy.prune import prune
from rarefy.prune.allocation import erk
from rarefy.train import fisher
from rarefy.train.sparsity_config import (
    Admm,
    Alternate,
    Gradual,
    Movement,
    ResolvedConfig,
    Rewind,
    Rigl,
    SecondOrder,
    SparsityConfig,
)
from rarefy.train.sparsity_schedule import sparsities


@dataclass
class MethodContext:
    """What a method works on. `kept` is all that it remembers, tensors by name, so that a run can go on elsewhere."""

    model: nn.Module
    layers: Sequence[Layer]
    plan: Any
    asked: ResolvedConfig
    seed: int = 0
    optimizer: torch.optim.Optimizer | None = None
    calibrate: Iterable[Any] | None = None
    loss: Loss | None = None
    gradient: Callable[[Layer], Tensor] = lambda layer: torch.zeros(layer.original.shape)
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pattern(self) -> Pattern:
        return self.asked.pattern

    def put(self, scores: Sequence[Tensor], sparsity: float, layers: Sequence[Layer] | None = None) -> None:
        """Mask the least scores of layers (all, if not named)."""
        layers = self.layers if layers is None else layers
        found = masks_at_sparsity(scores, self.pattern, sparsity, self.asked.scope)
        for layer, mask in zip(layers, found):
            set_mask_(layer, layer.layout.unview(mask, tuple(layer.original.shape)))

    def view(self, layer: Layer, tensor: Tensor) -> Tensor:
        return layer.layout.view(tensor.detach().float())

    def effective(self, layer: Layer) -> Tensor:
        """The weight as it counts, [G, K, O, I]."""
        return self.view(layer, effective_weight(layer))

    def zeros(self) -> float:
        """The share of zeros of all layers together."""
        kept = sum(int(mask_or_dense(l).sum()) for l in self.layers)
        return 1 - kept / max(1, sum(l.original.numel() for l in self.layers))


@dataclass(frozen=True)
class Method:
    """How one plan is carried out.

    events     (plan, final sparsity) -> [(progress, value)]
    act        what an event does; returns the sparsity in force
    each       what every step does, given the progress before and after it
    gradients  "" (not read), "events" (read where an event is due) or "steps" (read at every step)
    hidden     whether values beneath a mask count: they are zeroed elsewhere, and the optimizer's state with them
    """

    events: Callable[[Any, float], list[tuple[float, Any]]]
    act: Callable[[MethodContext, Any], float]
    each: Callable[[MethodContext, float, float], None] | None = None
    gradients: str = ""
    hidden: Callable[[Any], bool] = lambda plan: False


def _stairs(plan: Any, last: float) -> list[tuple[float, Any]]:
    gap = (plan.end - plan.start) / max(1, plan.steps - 1)
    return [(plan.start + i * gap, i) for i in range(plan.steps)]


def layers_by_final_sparsity(work: MethodContext) -> list[tuple[float, list[Layer]]]:
    """Return the layers by the sparsity they end with; SelectorError where `ends` names what is no layer, or none that
    is pruned."""
    plan, last = work.plan, work.asked.sparsity
    ends = {id(l.original): last for l in work.layers}
    for words, end in (getattr(plan, "ends", None) or {}).items():
        named = {id(l.original): float(end) for l in select_layers(work.model, words) if id(l.original) in ends}
        if not named:
            raise SelectorError(f"ends: {words!r} names no layer that is pruned")
        ends |= named
    return [(end, [l for l in work.layers if ends[id(l.original)] == end]) for end in dict.fromkeys(ends.values())]


def _gradual(work: MethodContext, index: int) -> float:
    plan: Gradual = work.plan
    prune.check_weights(work.layers)
    stats = prune.calibrate(work.model, work.layers, plan.score, work.calibrate, work.loss, work.seed)
    found: list[tuple[Layer, Tensor]] = []
    asked, before = 0.0, work.zeros()
    for end, layers in layers_by_final_sparsity(work):
        sparsity = sparsities(plan.schedule, end, plan.steps, plan.first)[index]
        for some, least in _parts(work, layers, sparsity, plan.regrow):
            how = (plan.score, least, work.asked.scope, plan.reduce, plan.regrow)
            found += zip(some, prune.choose_masks(some, stats, work.pattern, *how))
        asked += sparsity * sum(l.original.numel() for l in layers)
    for layer, mask in found:
        set_mask_(layer, mask)
    return max(before, asked / max(1, sum(l.original.numel() for l in work.layers)))


def _parts(
    work: MethodContext, layers: Sequence[Layer], sparsity: float, regrow: bool = False
) -> list[tuple[Sequence[Layer], float]]:
    """Layers with the sparsity to choose for them: no less than they have, where what is masked stays so."""
    had = {id(l): 1 - mask_or_dense(l).float().mean().item() for l in layers}
    if regrow or max(had.values(), default=0.0) <= sparsity:
        return [(layers, sparsity)]
    if work.asked.scope == "global":
        sizes = [l.original.numel() for l in layers]
        return [(layers, max(sparsity, sum(had[id(l)] * n for l, n in zip(layers, sizes)) / sum(sizes)))]
    return [([l], max(sparsity, had[id(l)])) for l in layers]


def _move(work: MethodContext, before: float, now: float) -> None:
    """S -= g w, both of the same moment; for soft movement a normalised step, and the pull of the penalty (Sanh 2020,
    eqs. 3 and 5)."""
    plan: Movement = work.plan
    for layer in work.layers:
        push = work.gradient(layer).float()  # times the weight already
        if not torch.isfinite(push).all():
            continue  # a step that a loss scaler throws away
        score = _kept(work, "score", layer)
        if plan.penalty is None:
            score.sub_(push)
            continue
        root = push.square().mean().sqrt().clamp(min=1e-30)
        sigma = score.sigmoid()
        ramp = min(1.0, now / max(plan.end, 1e-9))
        score.sub_(push / root + 4 * plan.penalty * ramp * sigma * (1 - sigma), alpha=plan.rate)


def _movement(work: MethodContext, index: int) -> float:
    plan: Movement = work.plan
    if not work.kept:
        return work.zeros()  # before the first step nothing has moved
    scores = [work.view(l, _kept(work, "score", l)) for l in work.layers]
    if plan.penalty is None:
        sparsity = sparsities(plan.schedule, work.asked.sparsity, plan.steps, plan.first)[index]
        work.put(scores, sparsity)
        return sparsity
    limit = math.log(plan.threshold / (1 - plan.threshold)) if 0 < plan.threshold < 1 else math.inf
    for layer, score in zip(work.layers, scores):
        kept = mean_per_unit(score, work.pattern) > limit
        set_mask_(layer, layer.layout.unview(kept, tuple(layer.original.shape)))
    return work.zeros()


def _second_order(work: MethodContext, index: int) -> float:
    plan: SecondOrder = work.plan
    prune.check_weights(work.layers)
    sparsity = sparsities(plan.schedule, work.asked.sparsity, plan.steps, plan.first)[index]
    assert work.calibrate is not None
    how = {"count": plan.gradients, "block": plan.block, "damp": plan.damp}
    inverse = fisher.inverses(work.model, work.layers, work.calibrate, work.loss, **how)
    scores: dict[int, Tensor] = {}
    for layer in work.layers:
        flat = fisher.saliency(layer.weight.detach().float(), inverse[layer.full_name])
        score = work.view(layer, flat)
        scores[id(layer)] = torch.where(layer.layout.view(mask_or_dense(layer)), score, float("-inf"))
    for some, least in _parts(work, work.layers, sparsity):
        work.put([scores[id(l)] for l in some], least, some)
    for layer in work.layers:
        moved = fisher.compensated(layer.original.detach().float(), mask_or_dense(layer), inverse[layer.full_name])
        with torch.no_grad():  # its sums do not add up over processes: all take those of the first
            layer.original.copy_(distributed.broadcast_tensor(moved, 0))
        set_mask_(layer, distributed.broadcast_tensor(mask_or_dense(layer).to(torch.uint8), 0).bool())
    return work.zeros()


def _drops(plan: Rigl, last: float) -> list[tuple[float, Any]]:
    gap = (plan.end - plan.start) / plan.steps
    part = [(i + 1) / plan.steps for i in range(plan.steps - 1)]
    later = [(plan.start + (i + 1) * gap, plan.drop / 2 * (1 + math.cos(math.pi * t))) for i, t in enumerate(part)]
    return [(plan.start, None), *later]


def _rigl(work: MethodContext, drop: float | None) -> float:
    """Drop by magnitude, grow by the gradient (Evci 2020, section 3); kept weights score above all that may grow."""
    each = {l.full_name: work.asked.sparsity for l in work.layers}
    if work.plan.allocate == "erk":
        each = erk(work.layers, work.asked.sparsity)
    for layer in work.layers:
        W, sparsity = work.effective(layer).abs(), each[layer.full_name]
        if drop is None:
            work.put([W], sparsity, [layer])
            continue
        active = layer.layout.view(mask_or_dense(layer))
        W = torch.where(active, W, float("-inf"))
        density = active.float().mean().item()
        flat = work.pattern if work.pattern.kind != "nm" else Pattern("unstructured")
        stay = masks_at_sparsity([W], flat, 1 - density * (1 - drop), "layer")[0] & active
        grow = work.view(layer, work.gradient(layer)).abs()
        work.put([torch.where(stay, float("inf"), grow)], sparsity, [layer])
    return work.zeros()


def _phases(plan: Alternate, last: float) -> list[tuple[float, Any]]:
    half = (plan.end - plan.start) / (2 * plan.cycles)
    return [(plan.start + i * half, "sparse" if i % 2 == 0 else "dense") for i in range(2 * plan.cycles)] + [
        (plan.end, "sparse")
    ]


def _alternate(work: MethodContext, phase: str) -> float:
    if phase == "sparse":
        work.put([work.effective(l).abs() for l in work.layers], work.asked.sparsity)
        return work.asked.sparsity
    for layer in work.layers:
        set_mask_(layer, dense_mask(layer))
    return 0.0


def _updates(plan: Admm, last: float) -> list[tuple[float, Any]]:
    gap = (plan.end - plan.start) / plan.steps
    return [(plan.start + i * gap, "first" if i == 0 else "renew") for i in range(plan.steps)] + [(plan.end, "cut")]


def _pull(work: MethodContext, before: float, now: float) -> None:
    """W -= p (W - Z + U); p rises by half a cosine and comes to `pull` over the way."""
    plan: Admm = work.plan
    long = plan.end - plan.start
    low, high = (min(1.0, max(0.0, (t - plan.start) / long)) if long else 1.0 for t in (before, now))
    if low >= high or f"z/{work.layers[0].full_name}" not in work.kept:
        return
    p = -math.expm1(-plan.pull * (_raised(high) - _raised(low)))
    with torch.no_grad():
        for layer in work.layers:
            z, u = (_kept(work, k, layer) for k in "zu")
            W = full_tensor(layer.original)
            if W.dtype == torch.float32:
                new = W - p * (W - z + u)
            else:  # what a step of few bits is too coarse for is kept for the next
                rest = _kept(work, "rest", layer)
                fine = W.float() + rest
                fine = fine - p * (fine - z + u)
                new = fine.to(W.dtype)
                rest.copy_(fine - new.float())
            layer.original.copy_(shard_like(new, layer.original))


def _raised(t: float) -> float:
    """The integral from 0 to t of 1 - cos(pi t): 1 at 1."""
    return t - math.sin(math.pi * t) / math.pi


def _admm(work: MethodContext, what: str) -> float:
    """Z = projection of W + U; U += W - Z."""
    W = {l.full_name: full_tensor(l.original.detach()).float() for l in work.layers}
    U = {l.full_name: _kept(work, "u", l) for l in work.layers}
    scores = []
    for layer in work.layers:
        target = (W[layer.full_name] + U[layer.full_name]).square()
        scores.append(work.view(layer, target * _second_moment(work, layer) if work.plan.weigh else target))
    if what == "cut":
        work.put(scores, work.asked.sparsity)
        work.kept.clear()
        return work.asked.sparsity
    found = masks_at_sparsity(scores, work.pattern, work.asked.sparsity, work.asked.scope)
    for layer, mask in zip(work.layers, found):
        name, stored = layer.full_name, tuple(layer.original.shape)
        z = torch.where(layer.layout.unview(mask, stored), W[name] + U[name], 0.0)
        work.kept[f"z/{name}"] = z
        work.kept[f"u/{name}"] = U[name] + W[name] - z if what == "renew" else torch.zeros_like(z)
    return 0.0


def _second_moment(work: MethodContext, layer: Layer) -> Tensor:
    state = work.optimizer.state.get(layer.original, {}) if work.optimizer is not None else {}
    if "exp_avg_sq" not in state:
        if work.optimizer is not None and not work.optimizer.state:
            return torch.ones(
                layer.original.shape, device=layer.original.device
            )  # before the first step there are none
        raise PatternError(
            "admm weighs by second moments, which the optimizer does not keep: take adam, or weigh=False"
        )
    return full_tensor(state["exp_avg_sq"]).float() + 1e-30


def _tickets(plan: Rewind, last: float) -> list[tuple[float, Any]]:
    part = 1 / (plan.rounds + 1)
    return [(plan.to * part, "keep"), *(((i + 1) * part, i) for i in range(plan.rounds))]


def _rewind(work: MethodContext, what: Any) -> float:
    plan: Rewind = work.plan
    here = {_plain(n): p for n, p in work.model.named_parameters()}
    here |= {_plain(n): b for n, b in work.model.named_buffers() if ".parametrizations." not in f".{n}"}
    if what == "keep":
        if plan.weights:
            work.kept.update({f"w/{n}": p.detach().clone() for n, p in here.items()})
        return work.zeros()
    scores = [torch.where(l.layout.view(mask_or_dense(l)), work.effective(l).abs(), float("-inf")) for l in work.layers]
    sparsity = sparsities(plan.schedule, work.asked.sparsity, plan.rounds)[what]
    work.put(scores, sparsity)
    with torch.no_grad():
        for name, p in here.items():
            if f"w/{name}" in work.kept:
                p.copy_(work.kept[f"w/{name}"])
            for value in () if work.optimizer is None else work.optimizer.state.get(p, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()
    return sparsity


def _plain(name: str) -> str:
    """A parameter's name whether something is attached to it or not."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def lr_progress(plan: Any, t: float) -> float:
    """Return where a learning rate's schedule stands at progress t: `Rewind` sends it back each round.

    >>> [round(lr_progress(Rewind(sparsity=0.5, rounds=1, to=0.2), t), 2) for t in (0.0, 0.25, 0.499, 0.5, 0.75, 1.0)]
    [0.0, 0.5, 1.0, 0.2, 0.6, 1.0]
    """
    if not isinstance(plan, Rewind):
        return t
    turns = t * (plan.rounds + 1)
    turn = min(int(turns + 1e-9), plan.rounds)
    inside = min(1.0, max(0.0, turns - turn))
    return inside if turn == 0 else plan.to + (1 - plan.to) * inside


def _kept(work: MethodContext, kind: str, layer: Layer) -> Tensor:
    key = f"{kind}/{layer.full_name}"
    if key in work.kept and work.kept[key].device != layer.original.device:
        work.kept[key] = work.kept[key].to(layer.original.device)  # the model was moved, or the state was read
    if key not in work.kept:
        work.kept[key] = torch.zeros(layer.original.shape, device=layer.original.device)
    return work.kept[key]


METHODS: dict[type[SparsityConfig], Method] = {
    Gradual: Method(_stairs, _gradual, hidden=lambda plan: plan.regrow),
    Movement: Method(_stairs, _movement, _move, "steps", hidden=lambda plan: True),
    SecondOrder: Method(_stairs, _second_order),
    Rigl: Method(_drops, _rigl, gradients="events"),
    Alternate: Method(_phases, _alternate),
    Admm: Method(_updates, _admm, _pull),
    Rewind: Method(_tickets, _rewind),
}
