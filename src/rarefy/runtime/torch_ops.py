"""Sparse layers as one operator, `rarefy::sparse`, for torch.compile and torch.export, which see a call with a known
output shape where the layers themselves pass addresses to kernels.

The operator gets everything that a layer consists of, as plain tensors and a text, so an exported program runs without
the layer's class. Which weight serves a batch is decided in the call, so batch sizes may stay dynamic.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rarefy.runtime.sparse_layers import Sparse, from_spec, geometry, read_spec

_LIBRARY = torch.library.Library("rarefy", "DEF")
_LIBRARY.define("sparse(Tensor x, Tensor[] parts, Tensor? bias, str spec) -> Tensor")
_LIBRARY.define("sparse_input_gradient(Tensor grad, Tensor x, Tensor[] parts, Tensor? bias, str spec) -> Tensor")
_layers: Any = WeakTensorKeyDictionary()  # first part -> (what it was built from, layer)


def _layer(parts: list[Tensor], bias: Tensor | None, spec: str) -> Sparse:
    """Return the layer of these tensors, built at the first call: its kernel bounds-checks every index."""
    key = (spec, *(t.data_ptr() for t in [*parts, *([] if bias is None else [bias])]))
    known = _layers.get(parts[0])
    if known is None or known[0] != key:
        aliases = [p.detach() for p in parts]  # the dictionary's key must not keep itself alive
        known = _layers[parts[0]] = key, from_spec(aliases, bias, spec)
    return known[1]


def _run(x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    with torch.no_grad():
        return _layer(parts, bias, spec).run(x, len(x))


def _output_shape(x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    layer = read_spec(spec)
    O, _, *kernel = layer["shape"]
    if not kernel:
        return x.new_empty(x.shape[0], O)
    conv = geometry(SimpleNamespace(**layer["like"]))
    sizes = zip(x.shape[2:], conv["padding"], conv["dilation"], kernel, conv["stride"])
    return x.new_empty(x.shape[0], O, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes))


def _gradient(grad: Tensor, x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        return torch.autograd.grad(_layer(parts, bias, spec).run(start, len(x)), start, grad)[0]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, bias, ctx.spec = inputs
    ctx.save_for_backward(x, bias, *parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, bias, *parts = ctx.saved_tensors
    back = torch.ops.rarefy.sparse_input_gradient(grad, x, parts, bias, ctx.spec)
    return back, [None] * len(parts), None, None


_LIBRARY.impl("sparse", _run, "CPU")
_LIBRARY.impl("sparse_input_gradient", _gradient, "CPU")
torch.library.register_fake("rarefy::sparse", _output_shape, lib=_LIBRARY)
torch.library.register_fake(
    "rarefy::sparse_input_gradient", lambda grad, x, parts, bias, spec: torch.empty_like(x), lib=_LIBRARY
)
torch.library.register_autograd("rarefy::sparse", _backward, setup_context=_save_for_backward, lib=_LIBRARY)
