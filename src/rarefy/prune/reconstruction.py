"""Block reconstruction: whole blocks are trained to match the dense model's outputs, in a few passes of masked Adam.

Layerwise solvers see neither nonlinearities nor the errors of neighbouring layers; a block sees both (AdaRound, Nagel
2020, for rounding; arXiv 2510.14444 for pruning). The last batch is held out: its error selects the epoch, and the
initial weights are among the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.sequential import BlockStep
from rarefy.model.batches import first_tensor
from rarefy.model.layers import Layer


def reconstruct_(
    end: BlockStep,
    masks: Mapping[str, Tensor],
    *,
    layers: Sequence[Layer] | None = None,
    epochs: int = 2,
    lr: float = 3e-4,
    bf16: bool = False,
) -> tuple[float, float]:
    """Train the remaining weights (and biases and norms) of a block in place; return the held-out error before and
    after.

    masks   by layer name, as stored; entries where they are False stay zero
    layers  all pruned layers of the model, by default those of the block. A weight that is also used outside the block
            is not trained, nor is a frozen parameter that is not pruned. Zeros of other matrices stay.

    The error is the mean over tokens of |y' - y|^2 / |y|^2. O(epochs x three forward passes of the block).
    """
    module, calls = end.block.module, end.calls
    layers = end.block.layers if layers is None else layers
    kept_entries = {id(l.original): masks[l.full_name] for l in layers if l.full_name in masks}
    inner = {id(m) for m in module.modules()}
    shared = {id(l.original) for l in layers if any(id(m) not in inner for _, m, _ in l.owners)}
    parameters = [
        p
        for p in module.parameters()
        if p.is_floating_point() and id(p) not in shared and (p.requires_grad or id(p) in kept_entries)
    ]
    kept_entries |= {id(p): p != 0 for p in parameters if id(p) not in kept_entries and p.dim() > 1}
    training, held_out, axis = calls[:-1] or calls, calls[-1:], channel_axis(module)
    trainable = [p.requires_grad for p in parameters]
    best_values, first_error = [p.detach().clone() for p in parameters], block_error(module, held_out, bf16, axis)
    best_error = first_error
    masters = [
        p.detach().float() if p.element_size() < 4 else p.detach() for p in parameters
    ]  # bf16 would lose small steps
    optimizer = torch.optim.Adam(masters, lr=lr, betas=(0.9, 0.95))
    total, step = epochs * len(training), 0
    try:
        for p in parameters:
            p.requires_grad_(True)
        for _ in range(epochs):
            for call in training:
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * step / total)) / 2
                with torch.enable_grad():
                    loss = block_loss(module, call, bf16, axis)
                    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                for p, m, g in zip(parameters, masters, grads):
                    g = torch.where(kept_entries[id(p)], g, 0) if g is not None and id(p) in kept_entries else g
                    m.grad = None if g is None else g.to(m.dtype)
                optimizer.step()
                for p, m in zip(parameters, masters):
                    if m.dtype != p.dtype:  # otherwise they share memory
                        p.data.copy_(m)
                step += 1
            error = block_error(module, held_out, bf16, axis)
            if error < best_error:
                best_error, best_values = error, [p.detach().clone() for p in parameters]
    finally:
        for p, b, flag in zip(parameters, best_values, trainable):
            p.data.copy_(b)
            p.requires_grad_(flag)
    end.changed = best_error < first_error
    return first_error, best_error


def channel_axis(module: nn.Module) -> int:
    """Return the axis of channels of a block's outputs: the second of images of convolutions, else the last."""
    return 1 if any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()) else -1


def block_loss(module: Any, call: tuple[tuple, dict[str, Any], Tensor], bf16: bool, axis: int = -1) -> Tensor:
    """Return the mean over tokens or pixels of |y' - y|^2 / |y|^2 for one call of a block or of its replacement.

    `axis` holds the channels; outputs of at most three dimensions have them last.
    """
    args, kwargs, target = call
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        out = first_tensor(module(*args, **kwargs)).float()
    target = target.float()
    axis = axis if target.dim() > 3 else -1
    energy = target.square().sum(axis)
    # relative to each token's norm: a norm follows, and a few tokens are a thousand times larger
    return ((out - target).square().sum(axis) / (energy + 1e-3 * energy.mean())).mean()


@torch.no_grad()
def block_error(module: Any, calls: Sequence[tuple[tuple, dict[str, Any], Tensor]], bf16: bool, axis: int) -> float:
    """Return the mean of `block_loss` over calls, without gradients."""
    return sum(float(block_loss(module, c, bf16, axis)) for c in calls) / len(calls)
