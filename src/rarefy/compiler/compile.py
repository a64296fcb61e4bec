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
from rarefy.compiler.fx_utils import Traced
from rarefy.compiler.kernel_selection import kernels_of, pack_for_batches
from rarefy.compiler.passes import activation, conv
from rarefy.compiler.passes.activation import pointwise
from rarefy.compiler.passes.attention import attention, multihead, parts, scaled, thirds, written
from rarefy.compiler.passes.cleanup import constants, drop
from rarefy.compiler.passes.fusion import fuse
from rarefy.compiler.passes.kv_attention import recalled
from rarefy.compiler.passes.linear import between_views, embedding, layer_scale, linear, pieces, reshaped
from rarefy.compiler.passes.norm import heads, layer_norm, norm, rms
from rarefy.compiler.passes.rope import rotation
from rarefy.compiler.verify import prove
from rarefy.model.layers import all_layers
from rarefy.runtime.accelerate import check_plain

EXACT, ROUNDED = 1e-3, 0.5  # of outputs' length, how far they may move: in fp32, and in 8 bits
RULES = (
    drop, constants, embedding, linear, reshaped, pieces, parts,
    thirds, layer_scale, activation.activations, norm, layer_norm, rms,
    heads, written, scaled, rotation, recalled, multihead, pointwise,
    activation.quick_gelu, attention, between_views, conv.convolution, conv.batch_norm,
    conv.pooled, fuse, fuse,
)  # fmt: skip


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
    traced = trace(model, args, kwargs, RULES)
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


def in_torch(traced: Traced, expected: Sequence[Any]) -> Compiled:
    """Return the graph without kernels: what its words mean."""
    return Compiled(traced, {}, expected, lambda *_: None)


def _called(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if hasattr(example, "keys"):
        return (), {k: example[k] for k in example.keys()}  # noqa: SIM118 (a batch of transformers is no dict)
    return tuple(example) if isinstance(example, tuple | list) else (example,), {}
