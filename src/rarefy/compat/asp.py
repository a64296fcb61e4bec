"""A replacement for NVIDIA ASP's two calls, for any N:M pattern on any device.

    from rarefy.compat import asp
    asp.prune_trained_model(model, optimizer)

Zeros are written into the weights, and optimizer hooks keep them: they clear gradients before each step, and weights
and optimizer state after it. Names in `state_dict`, checkpoints and the training script stay unchanged. After loading a
checkpoint, the same call finds the same zeros.
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
from rarefy.model.sparsity_pattern import parse_pattern
from rarefy.prune.prune import prune_
from rarefy.structured.optimizer_state import check_optimizer
from rarefy.structured.permutation import PermuteOptions, permute_

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
    """Prune the weights of `model` to N:M in place and make `optimizer` keep the zeros.

    Linear layers, convolutions and attention projections whose input count is divisible by M are pruned. Other layers,
    embeddings and the output layer stay dense unless `layers` names them. Costs O(weights) per optimizer step.

    Args:
        model: the model to prune.
        optimizer: the optimizer that trains it.
        pattern: N:M, such as "2:4".
        score: the importance score; some read `data`.
        example: a batch that the model can be called with. If given, input channels are permuted first
            (`rarefy.permute_`, for at most `seconds`); the outputs do not change.
        layers: selectors of the layers to prune.
        ignore: selectors of layers to leave alone.
        data: calibration batches for scores that need them.
        loss: callable(output, batch) for gradient scores.
        seconds: time limit of the permutation search.
        progress: whether to show a progress bar.

    Returns:
        A report with one row per layer.

    Raises:
        ValueError: one of `rarefy.common.errors`; the model is then unchanged.

    >>> net = nn.Linear(8, 8)
    >>> moves = torch.optim.AdamW(net.parameters())
    >>> prune_trained_model(net, moves, layers="Linear").summary["sparsity"]
    0.5
    >>> net(torch.randn(4, 8)).sum().backward(); moves.step(); int((net.weight == 0).sum())
    32
    """
    nm = parse_pattern(PermuteOptions(pattern=pattern, score=score, seconds=seconds).pattern)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise ModelError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    check_optimizer(optimizer, unwrap(model))
    chosen = select_layers(model, layers, ignore)
    fits = [l for l in chosen if layers is not None or l.layout.shape[-1] % nm.b == 0]
    if not fits:
        raise ModelError(
            f"no layer has an input count divisible by {nm.b}: {chosen[0].full_name} has {chosen[0].layout.shape[-1]}"
        )
    names = [_exact_selector(l) for l in fits]
    if data is not None:
        check_batches(data)
        data = list(data)  # it is read twice
    options = {"layers": names, "data": data, "loss": loss, "progress": progress}
    notes: tuple[str, ...] = ()
    if example is not None:
        permutation = permute_(model, example, pattern, score=score, optimizer=optimizer, seconds=seconds, **options)
        was, now = permutation.summary["kept before"], permutation.summary["kept"]
        notes = (f"input channels permuted: the mask keeps {now:.2%} of the scores, {was:.2%} before",)
    done = prune_(model, pattern, score, **options)
    masks = {l.original: mask_or_dense(l).clone() for l in fits}
    for layer in fits:
        fold_parameter_(layer)
    keep_zeros_(optimizer, masks)
    too_narrow = [l.full_name for l in chosen if l.full_name not in {f.full_name for f in fits}]
    if too_narrow:
        notes += (f"left dense, because their input count is not divisible by {nm.b}: {', '.join(too_narrow)}",)
    return replace(done, notes=(*done.notes, *notes))


def keep_zeros_(optimizer: Optimizer, masks: dict[nn.Parameter, Tensor]) -> None:
    """Register optimizer hooks that keep parameters zero where their bool masks are False.

    Gradients are cleared before each step; parameters and optimizer state are cleared now and after each step.
    """

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
    """Replace the weights of 2:4 Linear layers by torch's semi-structured tensors, in place, on an NVIDIA GPU.

    For inference only: the model can be run and compiled afterwards, but not trained or saved.

    Returns:
        A report with one row per layer; `why` says why a layer was left as it was.

    Raises:
        ModelError: without a GPU of compute capability 8.0 or higher, or if no layer fits (fp16, bf16 or int8 weights,
            two zeros in every four, sizes that torch accepts).
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
        raise ModelError(
            "semi-structured weights need an NVIDIA GPU of compute capability 8.0 or higher, and none was found; "
            "on a CPU, use rarefy.accelerate_"
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
        raise ModelError(f"no layer can use semi-structured weights: {rows[0]['layer']}: {rows[0]['why']}")
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


def _exact_selector(layer: Layer) -> str:
    """Return a selector that matches this layer only."""
    return f"re:{re.escape(layer.full_name)}"
