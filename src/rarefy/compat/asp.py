"""NVIDIA ASP's two lines, for N:M of any kind, on any device:

    from rarefy.compat import asp
    asp.prune_trained_model(model, optimizer)

Zeros lie in the weights themselves, and hooks of the optimizer keep them: gradients before each of its steps, weights
and its own state after. So names in `state_dict`, checkpoints and the rest of a training script stay as they are; after
loading a checkpoint the same call finds the same zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.common.errors import ModelError
from rarefy.common.report import Report
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, Selector, select_layers, unwrap
from rarefy.model.losses import Loss
from rarefy.model.masks import fold_parameter_, mask_or_dense, zero_masked_
from rarefy.prune.prune import prune_
from rarefy.structured.optimizer_state import check_optimizer
from rarefy.structured.permutation import check_permute, permute_

CAPABILITY = (8, 0)  # of GPUs whose matrix units skip 2:4 zeros


def prune_trained_model(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    pattern: str = "2:4",
    score: str = "magnitude",
    example: Any = None,
    layers: Selector = None,
    ignore: Selector = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seconds: float = 30.0,
    progress: bool = False,
) -> Report:
    """Prune the weights of `model` to N:M in place and have `optimizer` keep the zeros; return a row a layer.

    example  what the model can be called with: its inputs are then put in the best order first (`rarefy.permute_`, for
             `seconds` at most), with outputs unchanged
    score    what is pruned first; some read `data`
    Linear and convolution layers and projections of attention take part whose inputs M divides; the rest, embeddings
    and the output layer stay dense until named in `layers`. Raises the ValueErrors of `rarefy.common.errors`, and
    then the model is unchanged. O(weights) a step of the optimizer.

    >>> net = nn.Linear(8, 8)
    >>> moves = torch.optim.AdamW(net.parameters())
    >>> prune_trained_model(net, moves, layers="Linear").summary["sparsity"]
    0.5
    >>> net(torch.randn(4, 8)).sum().backward(); moves.step(); int((net.weight == 0).sum())
    32
    """
    plan = check_permute(pattern, score, seconds)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise ModelError(f"optimizer is a torch.optim.Optimizer, got {type(optimizer).__name__}")
    check_optimizer(optimizer, unwrap(model))
    chosen = select_layers(model, layers, ignore)
    fits = [l for l in chosen if layers is not None or l.layout.shape[-1] % plan.b == 0]
    if not fits:
        raise ModelError(
            f"no layer has a multiple of {plan.b} inputs: {chosen[0].full_name} has {chosen[0].layout.shape[-1]}"
        )
    names = [_exactly(l) for l in fits]
    if data is not None:
        check_batches(data)
        data = list(data)  # it is read twice
    options = {"layers": names, "data": data, "loss": loss, "progress": progress}
    notes: tuple[str, ...] = ()
    if example is not None:
        told = permute_(model, example, pattern, score=score, optimizer=optimizer, seconds=seconds, **options)
        was, now = told.summary["kept before"], told.summary["kept"]
        notes = (f"inputs put in order: {now:.2%} of the scores are kept, {was:.2%} before",)
    done = prune_(model, pattern, score, **options)
    masks = {l.original: mask_or_dense(l).clone() for l in fits}
    for layer in fits:
        fold_parameter_(layer)
    keep_zeros_(optimizer, masks)
    left = [l.full_name for l in chosen if l.full_name not in {f.full_name for f in fits}]
    if left:
        notes += (f"left dense, as {plan.b} does not divide their inputs: {', '.join(left)}",)
    return replace(done, notes=(*done.notes, *notes))


def keep_zeros_(optimizer: Optimizer, masks: dict[nn.Parameter, Tensor]) -> None:
    """Have an optimizer keep parameters zero where their masks (bool) are False: their gradients before each of its
    steps, themselves and its state after, and both now."""

    def before(*_: Any) -> None:
        for p, mask in masks.items():
            zero_masked_((p.grad,), mask)

    def after(*_: Any) -> None:
        for p, mask in masks.items():
            zero_masked_((p, *optimizer.state.get(p, {}).values()), mask)

    after()
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def to_cuda_sparse(model: nn.Module, layers: Selector = None, ignore: Selector = None) -> Report:
    """Give 2:4 Linear layers torch's semi-structured weights, in place, on a GPU that has units for them; return a row
    a layer. For inference: what it returns can be run and compiled, not trained or saved.

    Raises ModelError without such a GPU (compute capability 8.0), or where no layer fits: weights of fp16, bf16 or
    int8, two zeros in every four, sizes that torch takes.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
        raise ModelError(
            "semi-structured weights run on NVIDIA GPUs of compute capability 8.0 and up; none is here. On a CPU, "
            "rarefy.accelerate_ runs N:M layers"
        )
    rows = []
    for layer in select_layers(model, layers, ignore):
        why = _why_not(layer)
        if not why:
            try:
                sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
                layer.module.weight = nn.Parameter(sparse, requires_grad=False)
            except (RuntimeError, ValueError) as error:  # sizes
                why = str(error).splitlines()[0]
        rows.append({"layer": layer.full_name, "shape": "x".join(map(str, layer.weight.shape)), "why": why})
    done = sum(not r["why"] for r in rows)
    if not done:
        raise ModelError(f"no layer could be made semi-structured: {rows[0]['layer']}: {rows[0]['why']}")
    return Report("semi-structured", tuple(rows), {"layers": f"{done} of {len(rows)}"})


def _why_not(layer: Layer) -> str:
    W = layer.weight
    if not isinstance(layer.module, nn.Linear):
        return f"it is a {type(layer.module).__name__}"
    if not W.is_cuda:
        return "it is not on the GPU"
    if W.dtype not in (torch.float16, torch.bfloat16, torch.int8):
        return f"its weights are {str(W.dtype).removeprefix('torch.')}: cast to bf16 or fp16"
    if W.shape[1] % 4 or int((W.detach().view(-1, 4) != 0).sum(1).max()) > 2:
        return "its weights are not 2:4"
    return ""


def _exactly(layer: Layer) -> str:
    """A selector that means this layer alone."""
    return f"re:{re.escape(layer.full_name)}"
