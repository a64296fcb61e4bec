"""Sparse layers as one operator, `rarefy::sparse`, for torch.compile and torch.export: they see a call with a known
output shape where the layers themselves hand addresses to kernels.

The operator gets all that a layer consists of, as plain tensors and a text, so an exported program runs without the
layer's class. Which form serves is decided in the call: sizes of batches may stay open.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rarefy.runtime.sparse_layers import Sparse, described, geometry, rebuilt

_LIBRARY = torch.library.Library("rarefy", "DEF")
_LIBRARY.define("sparse(Tensor x, Tensor[] parts, Tensor? bias, str about) -> Tensor")
_LIBRARY.define("sparse_input_gradient(Tensor grad, Tensor x, Tensor[] parts, Tensor? bias, str about) -> Tensor")
_layers: Any = WeakTensorKeyDictionary()  # first part -> (what it was made of, layer)


def _layer(parts: list[Tensor], bias: Tensor | None, about: str) -> Sparse:
    """The layer that these tensors are, made at the first call: its kernel checks every index."""
    given = (about, *(t.data_ptr() for t in [*parts, *([] if bias is None else [bias])]))
    known = _layers.get(parts[0])
    if known is None or known[0] != given:
        aliases = [p.detach() for p in parts]  # the key must not keep itself alive
        known = _layers[parts[0]] = given, rebuilt(aliases, bias, about)
    return known[1]


def _run(x: Tensor, parts: list[Tensor], bias: Tensor | None, about: str) -> Tensor:
    with torch.no_grad():
        return _layer(parts, bias, about).run(x, len(x))


def _shaped(x: Tensor, parts: list[Tensor], bias: Tensor | None, about: str) -> Tensor:
    told = described(about)
    O, _, *kernel = told["shape"]
    if not kernel:
        return x.new_empty(x.shape[0], O)
    how = geometry(SimpleNamespace(**told["like"]))
    sizes = zip(x.shape[2:], how["padding"], how["dilation"], kernel, how["stride"])
    return x.new_empty(x.shape[0], O, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes))


def _gradient(grad: Tensor, x: Tensor, parts: list[Tensor], bias: Tensor | None, about: str) -> Tensor:
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        return torch.autograd.grad(_layer(parts, bias, about).run(start, len(x)), start, grad)[0]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, bias, ctx.about = inputs
    ctx.save_for_backward(x, bias, *parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, bias, *parts = ctx.saved_tensors
    back = torch.ops.rarefy.sparse_input_gradient(grad, x, parts, bias, ctx.about)
    return back, [None] * len(parts), None, None


_LIBRARY.impl("sparse", _run, "CPU")
_LIBRARY.impl("sparse_input_gradient", _gradient, "CPU")
torch.library.register_fake("rarefy::sparse", _shaped, lib=_LIBRARY)
torch.library.register_fake(
    "rarefy::sparse_input_gradient", lambda grad, x, parts, bias, about: torch.empty_like(x), lib=_LIBRARY
)
torch.library.register_autograd("rarefy::sparse", _backward, setup_context=_keep, lib=_LIBRARY)
