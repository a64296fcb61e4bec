"""Block-diagonal inverse of the empirical Fisher matrix, and the pruning that follows from it.

WoodFisher (Singh & Alistarh 2020) and oBERT (Kurtic 2022):

F      [n, B, B]  n blocks of B weights, in stored order: damp I + 1/m sum over m gradients of g g'
w      weights in blocks, [n, B], the last padded with zeros
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError
from rarefy.model.batches import split_batch
from rarefy.model.forward import call, evaluating, on_device, trainable
from rarefy.model.layers import Layer
from rarefy.model.losses import Loss, check_finite, resolve_loss

FIRST = 16  # gradients whose mean square sets the damping


def inverses(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Iterable[Any],
    loss: Loss | None,
    *,
    count: int,
    block: int,
    damp: float,
) -> dict[str, Tensor]:
    """Return F^-1 of each layer, [n, B, B], by m = about `count` rank-one updates (WoodFisher, eq. 5).

    `damp` is relative to the mean squared gradient of the layer. O(m weights B) and m backward passes. Takes weights x
    B numbers of memory; raises ModelError where that is more than half of the machine's.
    """
    size = sum(l.original.numel() for l in layers)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * size * block > memory / 2:
        raise ModelError(
            f"the Fisher matrix of {size:,} weights in blocks of {block} takes {4e-9 * size * block:.1f} GB, more than "
            f"half of this machine's {memory / 1e9:.1f}: give a smaller block, or name fewer layers"
        )
    batches = list(data)
    if not batches:
        raise DataError("the calibration data is empty")
    per_batch = math.ceil(count / len(batches))
    total = sum(len(split_batch(b, per_batch)) for b in batches)
    first: list[list[Tensor]] = []
    inverse: dict[str, Tensor] = {}
    for index, grads in enumerate(_gradients(model, layers, batches, loss, per_batch)):
        if index < min(FIRST, total):
            first.append(grads)
        if index == min(FIRST, total) - 1:
            for k, layer in enumerate(layers):
                mean_square = float(torch.stack([g[k].square().mean() for g in first]).mean())
                blocks = math.ceil(layer.original.numel() / block)
                eye = torch.eye(block, device=layer.original.device) / max(damp * mean_square, 1e-30)
                inverse[layer.full_name] = eye.expand(blocks, block, block).clone()
                for g in first:
                    _add_(inverse[layer.full_name], in_blocks(g[k], block), total)
            first = []
        elif index >= FIRST:
            for layer, g in zip(layers, grads):
                _add_(inverse[layer.full_name], in_blocks(g, block), total)
    return inverse


def _gradients(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], loss: Loss | None, each: int
) -> Iterator[list[Tensor]]:
    """Yield the gradient of each layer for parts of the batches, at most `each` parts of a batch."""
    of, weights = resolve_loss(loss), [l.original for l in layers]
    with evaluating(model), trainable(weights), torch.enable_grad():
        for index, batch in enumerate(batches):
            for part in split_batch(on_device(model, batch), each):
                value = check_finite(of(call(model, part), part), index)
                grads = torch.autograd.grad(value, weights, allow_unused=True)
                yield [torch.zeros_like(w).float() if g is None else g.float() for g, w in zip(grads, weights)]


def _add_(inverse: Tensor, g: Tensor, m: int) -> None:
    """Add g g' / m to F, given its inverse, in place (Sherman-Morrison)."""
    with torch.autocast(g.device.type, enabled=False):  # autocast of the training must not round these
        u = torch.bmm(inverse, g[:, :, None])
        scale = m + (g * u[:, :, 0]).sum(1)
        inverse.baddbmm_(u, (u / scale[:, None, None]).transpose(1, 2), alpha=-1)


def in_blocks(weight: Tensor, block: int) -> Tensor:
    """Return a tensor as [n, block], padded with zeros. O(weights)."""
    flat = weight.reshape(-1)
    return F.pad(flat, (0, -len(flat) % block)).reshape(-1, block)


def saliency(weight: Tensor, inverse: Tensor) -> Tensor:
    """Return the increase of the loss when one weight is removed and its block compensates, in the weight's shape.

    w^2 / (2 [F^-1]_ii) (oBERT, eq. 6).
    """
    w = in_blocks(weight, inverse.shape[-1])
    increase = w.square() / (2 * inverse.diagonal(dim1=1, dim2=2).clamp(min=1e-30))
    return increase.reshape(-1)[: weight.numel()].reshape(weight.shape)


def compensated(weight: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """Return the weights after the masked ones are removed, all of a block at once. O(weights B^2).

    w - F^-1 E' (E F^-1 E')^-1 E w (oBERT, eq. 5, for sets of weights).
    """
    B = inverse.shape[-1]
    w, removed = in_blocks(weight, B), ~in_blocks(mask.to(weight.dtype), B).bool()
    d = removed.to(w.dtype)
    system = d[:, :, None] * inverse * d[:, None, :] + torch.diag_embed(1 - d)
    lagrange = torch.linalg.solve(system, d * w)
    with torch.autocast(w.device.type, enabled=False):
        updated = w - torch.bmm(inverse, lagrange[:, :, None])[:, :, 0]
    updated = torch.where(removed, torch.zeros((), dtype=w.dtype), updated)
    return updated.reshape(-1)[: weight.numel()].reshape(weight.shape)
