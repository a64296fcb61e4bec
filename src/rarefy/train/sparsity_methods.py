"""Sparsity methods: what each config does to masks and weights during training, as a list of events.

An event is (progress, value). When training has come that far, `act` is called with the value; it returns the sparsity
in force. Scores have the shape [G, K, O, I] of `rarefy.model.layout`.
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
    """What a method works on.

    state  everything that the method remembers, tensors by name, so that a run can be resumed
    """

    model: nn.Module
    layers: Sequence[Layer]
    config: Any
    resolved: ResolvedConfig
    seed: int = 0
    optimizer: torch.optim.Optimizer | None = None
    calibrate: Iterable[Any] | None = None
    loss: Loss | None = None
    gradient: Callable[[Layer], Tensor] = lambda layer: torch.zeros(layer.original.shape)
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pattern(self) -> Pattern:
        """Return the sparsity pattern."""
        return self.resolved.pattern

    def mask_lowest(self, scores: Sequence[Tensor], sparsity: float, layers: Sequence[Layer] | None = None) -> None:
        """Mask the lowest scores of layers (default: all) at a sparsity."""
        layers = self.layers if layers is None else layers
        new_masks = masks_at_sparsity(scores, self.pattern, sparsity, self.resolved.scope)
        for layer, mask in zip(layers, new_masks):
            set_mask_(layer, layer.layout.unview(mask, tuple(layer.original.shape)))

    def view(self, layer: Layer, tensor: Tensor) -> Tensor:
        """Return a tensor of a layer as fp32 [G, K, O, I]."""
        return layer.layout.view(tensor.detach().float())

    def effective(self, layer: Layer) -> Tensor:
        """Return the masked weight, [G, K, O, I]."""
        return self.view(layer, effective_weight(layer))

    def zeros(self) -> float:
        """Return the fraction of masked weights over all layers."""
        num_kept = sum(int(mask_or_dense(l).sum()) for l in self.layers)
        return 1 - num_kept / max(1, sum(l.original.numel() for l in self.layers))


@dataclass(frozen=True)
class Method:
    """How a config is carried out.

    events     (config, final sparsity) -> [(progress, value)]
    act        runs an event; returns the sparsity in force
    each       runs at every step, given the progress before and after it
    gradients  "" (not read), "events" (read at events) or "steps" (read at every step)
    hidden     whether masked weights keep their values; otherwise they, and their optimizer state, are set to zero
    """

    events: Callable[[Any, float], list[tuple[float, Any]]]
    act: Callable[[MethodContext, Any], float]
    each: Callable[[MethodContext, float, float], None] | None = None
    gradients: str = ""
    hidden: Callable[[Any], bool] = lambda config: False


def _scheduled_events(config: Any, last: float) -> list[tuple[float, Any]]:
    """Return evenly spaced events with the index of the pruning step."""
    gap = (config.end - config.start) / max(1, config.steps - 1)
    return [(config.start + i * gap, i) for i in range(config.steps)]


def layers_by_final_sparsity(context: MethodContext) -> list[tuple[float, list[Layer]]]:
    """Return the layers grouped by their final sparsity.

    Raises SelectorError where `ends` names no layer, or none that is pruned.
    """
    config, final = context.config, context.resolved.sparsity
    ends = {id(l.original): final for l in context.layers}
    for selector, end in (getattr(config, "ends", None) or {}).items():
        named = {id(l.original): float(end) for l in select_layers(context.model, selector) if id(l.original) in ends}
        if not named:
            raise SelectorError(f"ends: {selector!r} names no layer that is pruned")
        ends |= named
    return [(end, [l for l in context.layers if ends[id(l.original)] == end]) for end in dict.fromkeys(ends.values())]


def _gradual(context: MethodContext, index: int) -> float:
    """Mask the lowest scores at the scheduled sparsity (Zhu & Gupta 2017)."""
    config: Gradual = context.config
    prune.check_weights(context.layers)
    stats = prune.calibrate(context.model, context.layers, config.score, context.calibrate, context.loss, context.seed)
    new_masks: list[tuple[Layer, Tensor]] = []
    masked, before = 0.0, context.zeros()
    for end, layers in layers_by_final_sparsity(context):
        sparsity = sparsities(config.schedule, end, config.steps, config.first)[index]
        for part, target in _with_min_sparsity(context, layers, sparsity, config.regrow):
            options = (config.score, target, context.resolved.scope, config.reduce, config.regrow)
            new_masks += zip(part, prune.choose_masks(part, stats, context.pattern, *options))
        masked += sparsity * sum(l.original.numel() for l in layers)
    for layer, mask in new_masks:
        set_mask_(layer, mask)
    return max(before, masked / max(1, sum(l.original.numel() for l in context.layers)))


def _with_min_sparsity(
    context: MethodContext, layers: Sequence[Layer], sparsity: float, regrow: bool = False
) -> list[tuple[Sequence[Layer], float]]:
    """Return layers with their target sparsity, which never falls where masked weights stay masked."""
    present = {id(l): 1 - mask_or_dense(l).float().mean().item() for l in layers}
    if regrow or max(present.values(), default=0.0) <= sparsity:
        return [(layers, sparsity)]
    if context.resolved.scope == "global":
        sizes = [l.original.numel() for l in layers]
        return [(layers, max(sparsity, sum(present[id(l)] * n for l, n in zip(layers, sizes)) / sum(sizes)))]
    return [([l], max(sparsity, present[id(l)])) for l in layers]


def _movement_step(context: MethodContext, before: float, now: float) -> None:
    """Update the scores: S -= g w, gradient and weight of the same step (Sanh 2020, eq. 3).

    Soft movement takes a normalized step and adds the gradient of the penalty (eq. 5).
    """
    config: Movement = context.config
    for layer in context.layers:
        update = context.gradient(layer).float()  # already times the weight
        if not torch.isfinite(update).all():
            continue  # a step that the loss scaler skips
        score = _state_of(context, "score", layer)
        if config.penalty is None:
            score.sub_(update)
            continue
        rms = update.square().mean().sqrt().clamp(min=1e-30)
        sigma = score.sigmoid()
        ramp = min(1.0, now / max(config.end, 1e-9))
        score.sub_(update / rms + 4 * config.penalty * ramp * sigma * (1 - sigma), alpha=config.rate)


def _movement(context: MethodContext, index: int) -> float:
    """Mask the lowest movement scores; soft movement masks those below the threshold."""
    config: Movement = context.config
    if not context.state:
        return context.zeros()  # before the first step there are no scores
    scores = [context.view(l, _state_of(context, "score", l)) for l in context.layers]
    if config.penalty is None:
        sparsity = sparsities(config.schedule, context.resolved.sparsity, config.steps, config.first)[index]
        context.mask_lowest(scores, sparsity)
        return sparsity
    threshold = math.log(config.threshold / (1 - config.threshold)) if 0 < config.threshold < 1 else math.inf
    for layer, score in zip(context.layers, scores):
        keep = mean_per_unit(score, context.pattern) > threshold
        set_mask_(layer, layer.layout.unview(keep, tuple(layer.original.shape)))
    return context.zeros()


def _second_order(context: MethodContext, index: int) -> float:
    """Mask the weights of lowest saliency and update the others (oBERT, Kurtic 2022)."""
    config: SecondOrder = context.config
    prune.check_weights(context.layers)
    sparsity = sparsities(config.schedule, context.resolved.sparsity, config.steps, config.first)[index]
    assert context.calibrate is not None
    options = {"count": config.gradients, "block": config.block, "damp": config.damp}
    inverse = fisher.inverses(context.model, context.layers, context.calibrate, context.loss, **options)
    scores: dict[int, Tensor] = {}
    for layer in context.layers:
        saliency = fisher.saliency(layer.weight.detach().float(), inverse[layer.full_name])
        score = context.view(layer, saliency)
        scores[id(layer)] = torch.where(layer.layout.view(mask_or_dense(layer)), score, float("-inf"))
    for part, target in _with_min_sparsity(context, context.layers, sparsity):
        context.mask_lowest([scores[id(l)] for l in part], target, part)
    for layer in context.layers:
        updated = fisher.compensated(layer.original.detach().float(), mask_or_dense(layer), inverse[layer.full_name])
        with torch.no_grad():  # processes round sums differently: all take the result of the first
            layer.original.copy_(distributed.broadcast_tensor(updated, 0))
        set_mask_(layer, distributed.broadcast_tensor(mask_or_dense(layer).to(torch.uint8), 0).bool())
    return context.zeros()


def _rigl_events(config: Rigl, last: float) -> list[tuple[float, Any]]:
    """Return the first mask and the updates, whose drop fraction falls to zero by a cosine."""
    gap = (config.end - config.start) / config.steps
    fractions = [(i + 1) / config.steps for i in range(config.steps - 1)]
    drops = [config.drop / 2 * (1 + math.cos(math.pi * t)) for t in fractions]
    return [(config.start, None), *((config.start + (i + 1) * gap, drop) for i, drop in enumerate(drops))]


def _rigl(context: MethodContext, drop: float | None) -> float:
    """Drop the smallest weights and grow where the gradient is largest (RigL; Evci 2020, section 3).

    Weights that stay score infinity, above all that may grow.
    """
    sparsities_of = {l.full_name: context.resolved.sparsity for l in context.layers}
    if context.config.allocate == "erk":
        sparsities_of = erk(context.layers, context.resolved.sparsity)
    for layer in context.layers:
        W, sparsity = context.effective(layer).abs(), sparsities_of[layer.full_name]
        if drop is None:
            context.mask_lowest([W], sparsity, [layer])
            continue
        active = layer.layout.view(mask_or_dense(layer))
        W = torch.where(active, W, float("-inf"))
        density = active.float().mean().item()
        drop_pattern = context.pattern if context.pattern.kind != "nm" else Pattern("unstructured")
        keep = masks_at_sparsity([W], drop_pattern, 1 - density * (1 - drop), "layer")[0] & active
        grow = context.view(layer, context.gradient(layer)).abs()
        context.mask_lowest([torch.where(keep, float("inf"), grow)], sparsity, [layer])
    return context.zeros()


def _alternate_events(config: Alternate, last: float) -> list[tuple[float, Any]]:
    """Return the sparse and dense phases, ending sparse."""
    half = (config.end - config.start) / (2 * config.cycles)
    phases = [(config.start + i * half, "dense" if i % 2 else "sparse") for i in range(2 * config.cycles)]
    return [*phases, (config.end, "sparse")]


def _alternate(context: MethodContext, phase: str) -> float:
    """Start a sparse phase (mask by magnitude) or a dense one (remove all masks) (AC/DC; Peste 2021)."""
    if phase == "sparse":
        context.mask_lowest([context.effective(l).abs() for l in context.layers], context.resolved.sparsity)
        return context.resolved.sparsity
    for layer in context.layers:
        set_mask_(layer, dense_mask(layer))
    return 0.0


def _admm_events(config: Admm, last: float) -> list[tuple[float, Any]]:
    """Return the first projection, its renewals and the final cut."""
    gap = (config.end - config.start) / config.steps
    renewals = [(config.start + i * gap, "renew" if i else "first") for i in range(config.steps)]
    return [*renewals, (config.end, "cut")]


def _admm_step(context: MethodContext, before: float, now: float) -> None:
    """Move weights toward their projection: W -= p (W - Z + U). p follows half a cosine and sums to `pull`."""
    config: Admm = context.config
    length = config.end - config.start
    start, stop = (min(1.0, max(0.0, (t - config.start) / length)) if length else 1.0 for t in (before, now))
    if start >= stop or f"z/{context.layers[0].full_name}" not in context.state:
        return
    p = -math.expm1(-config.pull * (_raised_cosine(stop) - _raised_cosine(start)))
    with torch.no_grad():
        for layer in context.layers:
            z, u = (_state_of(context, k, layer) for k in "zu")
            W = full_tensor(layer.original)
            if W.dtype == torch.float32:
                new = W - p * (W - z + u)
            else:  # the rounding error of a low-precision weight is carried to the next step
                rest = _state_of(context, "rest", layer)
                exact = W.float() + rest
                exact = exact - p * (exact - z + u)
                new = exact.to(W.dtype)
                rest.copy_(exact - new.float())
            layer.original.copy_(shard_like(new, layer.original))


def _raised_cosine(t: float) -> float:
    """Return the integral of 1 - cos(pi t) from 0 to t, which is 1 at t = 1."""
    return t - math.sin(math.pi * t) / math.pi


def _admm(context: MethodContext, event: str) -> float:
    """Renew the projection Z of W + U and the dual U += W - Z, or cut to the final masks."""
    W = {l.full_name: full_tensor(l.original.detach()).float() for l in context.layers}
    U = {l.full_name: _state_of(context, "u", l) for l in context.layers}
    scores = []
    for layer in context.layers:
        target = (W[layer.full_name] + U[layer.full_name]).square()
        scores.append(context.view(layer, target * _second_moment(context, layer) if context.config.weigh else target))
    if event == "cut":
        context.mask_lowest(scores, context.resolved.sparsity)
        context.state.clear()
        return context.resolved.sparsity
    new_masks = masks_at_sparsity(scores, context.pattern, context.resolved.sparsity, context.resolved.scope)
    for layer, mask in zip(context.layers, new_masks):
        name, shape = layer.full_name, tuple(layer.original.shape)
        z = torch.where(layer.layout.unview(mask, shape), W[name] + U[name], 0.0)
        context.state[f"z/{name}"] = z
        context.state[f"u/{name}"] = U[name] + W[name] - z if event == "renew" else torch.zeros_like(z)
    return 0.0


def _second_moment(context: MethodContext, layer: Layer) -> Tensor:
    """Return the optimizer's second moments of a weight, [weight shape]."""
    state = context.optimizer.state.get(layer.original, {}) if context.optimizer is not None else {}
    if "exp_avg_sq" not in state:
        if context.optimizer is not None and not context.optimizer.state:
            return torch.ones(
                layer.original.shape, device=layer.original.device
            )  # before the first step there are none
        raise PatternError("admm with weigh=True needs the optimizer's second moments: use Adam, or weigh=False")
    return full_tensor(state["exp_avg_sq"]).float() + 1e-30


def _rewind_events(config: Rewind, last: float) -> list[tuple[float, Any]]:
    """Return the moment at which weights are saved, and the end of each round."""
    round_length = 1 / (config.rounds + 1)
    return [(config.to * round_length, "keep"), *(((i + 1) * round_length, i) for i in range(config.rounds))]


def _rewind(context: MethodContext, event: Any) -> float:
    """Save the weights, or prune by magnitude and rewind to the saved weights (Frankle 2019)."""
    config: Rewind = context.config
    tensors = {_original_name(n): p for n, p in context.model.named_parameters()}
    tensors |= {_original_name(n): b for n, b in context.model.named_buffers() if ".parametrizations." not in f".{n}"}
    if event == "keep":
        if config.weights:
            context.state.update({f"w/{n}": p.detach().clone() for n, p in tensors.items()})
        return context.zeros()
    scores = [
        torch.where(l.layout.view(mask_or_dense(l)), context.effective(l).abs(), float("-inf")) for l in context.layers
    ]
    sparsity = sparsities(config.schedule, context.resolved.sparsity, config.rounds)[event]
    context.mask_lowest(scores, sparsity)
    with torch.no_grad():
        for name, p in tensors.items():
            if f"w/{name}" in context.state:
                p.copy_(context.state[f"w/{name}"])
            for value in () if context.optimizer is None else context.optimizer.state.get(p, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()
    return sparsity


def _original_name(name: str) -> str:
    """Return a parameter's name without parametrization."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def lr_progress(config: Any, t: float) -> float:
    """Return the progress of the learning rate schedule at progress t: `Rewind` restarts it each round.

    >>> [round(lr_progress(Rewind(sparsity=0.5, rounds=1, to=0.2), t), 2) for t in (0.0, 0.25, 0.499, 0.5, 0.75, 1.0)]
    [0.0, 0.5, 1.0, 0.2, 0.6, 1.0]
    """
    if not isinstance(config, Rewind):
        return t
    rounds = t * (config.rounds + 1)
    round_index = min(int(rounds + 1e-9), config.rounds)
    within = min(1.0, max(0.0, rounds - round_index))
    return within if round_index == 0 else config.to + (1 - config.to) * within


def _state_of(context: MethodContext, kind: str, layer: Layer) -> Tensor:
    """Return a layer's state tensor of a kind, zeros if it is new."""
    key = f"{kind}/{layer.full_name}"
    if key in context.state and context.state[key].device != layer.original.device:
        context.state[key] = context.state[key].to(layer.original.device)  # the model was moved, or the state was read
    if key not in context.state:
        context.state[key] = torch.zeros(layer.original.shape, device=layer.original.device)
    return context.state[key]


METHODS: dict[type[SparsityConfig], Method] = {
    Gradual: Method(_scheduled_events, _gradual, hidden=lambda config: config.regrow),
    Movement: Method(_scheduled_events, _movement, _movement_step, "steps", hidden=lambda config: True),
    SecondOrder: Method(_scheduled_events, _second_order),
    Rigl: Method(_rigl_events, _rigl, gradients="events"),
    Alternate: Method(_alternate_events, _alternate),
    Admm: Method(_admm_events, _admm, _admm_step),
    Rewind: Method(_rewind_events, _rewind),
}
