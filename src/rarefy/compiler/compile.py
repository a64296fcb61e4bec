"""`compile`: a whole model as one callable, of native plans and of ATen calls for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import DataError, ModelError, unknown
from rarefy.compiler.executor import Compiled, expected
from rarefy.compiler.export import trace, two_samples
from rarefy.compiler.fx_utils import ExportedGraph
from rarefy.compiler.kernel_selection import kernels_of, pack_for_batches
from rarefy.compiler.passes import activation, attention, cleanup, conv, fusion, kv_attention, linear, norm, rope
from rarefy.compiler.verify import prove
from rarefy.model.layers import all_layers
from rarefy.runtime.accelerate import check_plain

EXACT, ROUNDED = 1e-3, 0.5  # of outputs' length, how far they may move: in fp32, and in 8 bits
# Every pass sees each node once, in this order: what a pass matches is what the passes before it left.
PASSES = (
    # remove what does nothing, compute what is constant
    cleanup.remove_noop,
    cleanup.fold_constants,
    # linear layers and embeddings; split what computes queries, keys and values at once
    linear.convert_embedding,
    linear.convert_linear,
    linear.remove_views_around_linear,
    linear.split_linear_outputs,
    attention.split_qkv_view,
    attention.split_mha_in_proj,
    linear.fold_layer_scale,
    # formulas that a model writes out
    activation.fuse_gelu_silu,
    norm.convert_norm,
    norm.fuse_layer_norm,
    norm.fuse_rms_norm,
    norm.fuse_head_norm,
    attention.fuse_sdpa,
    attention.fold_attention_scale,
    rope.fuse_rope,
    kv_attention.convert_cached_attention,
    attention.make_mha_batch_first,
    # elementwise operators, and attention as one operator
    activation.convert_pointwise,
    activation.fuse_quick_gelu,
    attention.fuse_attention,
    linear.remove_view_pairs,
    # images
    conv.convert_conv,
    conv.fold_batch_norm,
    conv.convert_pool,
    # activations and residual sums move into the layer before them: at most one of each kind a run
    fusion.fuse_epilogue,
    fusion.fuse_epilogue,
)


def compile(model: nn.Module, example: Any, *, values: str | None = None) -> Compiled:
    """Return a callable that does what the model does, faster: whole stretches of it run as one native call.

    example  what the model can be called with: a dict of its keywords, a tuple of its arguments, or one tensor. Batches
             and other sizes may differ in later calls, as far as the model's own code leaves them open; sizes of images
             stay
    values   "int8": products and convolutions run in 8 bits, weights with a scale for each output and inputs with one
             for each row or image, so outputs change a little; convolutions in groups stay fp32. None: all fp32
    The callable takes and returns what the model does, without gradients, and may be called by several threads. It
    holds its own copy of the weights: later changes of the model's are not seen. What no plan knows runs in torch, as
    `print(compiled)` says. Raises ModelError for a model that torch.export does not take, in training mode, with masks
    that were not folded, not in fp32, or not on the CPU. O(weights log weights), and a few seconds for the export.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> fast = compile(net, torch.randn(2, 4))
    >>> x = torch.randn(5, 4)
    >>> bool((fast(x) - net(x)).abs().max() < 1e-5)
    True
    """
    if values not in (None, "int8"):
        raise ModelError(unknown("values", str(values), ["int8"]))
    check_module(model)
    check_ready(model)
    args, kwargs = _called(example)
    if not any(isinstance(t, Tensor) for t in pytree.tree_leaves((args, kwargs))):
        raise DataError("the example has no tensor: give what the model is called with")
    traced = trace(model, args, kwargs, PASSES)
    want = [expected(n.meta.get("val")) for n in traced.inputs]
    shown = (args, kwargs) if traced.notes else two_samples(args, kwargs)
    exact = prove(model, in_torch(traced, want), *shown, EXACT) if values else None  # rounding hides what is wrong
    made = Compiled(traced, kernels_of(traced, lambda w, _: pack_for_batches(w, values), values), want)
    prove(model, made, *shown, ROUNDED if values else EXACT, exact)
    made.forget()
    return made


def check_module(model: Any) -> None:
    """Raise ModelError for what is no model of torch."""
    if not isinstance(model, nn.Module):
        hints = {str | PathLike: ": rarefy.load(folder) reads one", Compiled: ": it is compiled already"}
        hint = next((h for kind, h in hints.items() if isinstance(model, kind)), "")
        raise ModelError(f"a torch.nn.Module is expected, got {type(model).__name__}{hint}")


def check_ready(model: nn.Module) -> None:
    """Raise ModelError for a model that the engine does not run as it stands."""
    if model.training:
        raise ModelError("the model is in training mode: call eval() first")
    check_plain(list(all_layers(model)))
    away = next((n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.device.type != "cpu"), None)
    if away is not None:
        raise ModelError(f"the engine runs on the CPU, {away} is elsewhere: model.cpu() first")
    kinds = {n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()}
    other = next((n for n, kind in kinds.items() if kind != torch.float32), None)
    if other is not None:
        kind = str(kinds[other]).removeprefix("torch.")
        raise ModelError(f"the engine takes models in fp32, {other} is {kind}: model.float() first")


def in_torch(traced: ExportedGraph, expected: Sequence[Any]) -> Compiled:
    """Return the graph without kernels: what its words mean."""
    return Compiled(traced, {}, expected, lambda *_: None)


def _called(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if hasattr(example, "keys"):
        return (), {k: example[k] for k in example.keys()}  # noqa: SIM118 (a batch of transformers is no dict)
    return tuple(example) if isinstance(example, tuple | list) else (example,), {}
