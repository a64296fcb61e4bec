"""Layers that run on packed weights, in the place of dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import ModelError
from rarefy.runtime import native, reference
from rarefy.runtime.packed import Bitmask, Packed, Tiles, unpack

FORMATS: dict[str, type] = {"bitmask": Bitmask, "tiles": Tiles}


class SparseLinear(nn.Module):
    """act(x W^T + bias) with W packed; by the number of inputs in a call, one of several forms of the same weight.

    forms    {first number of inputs: packed weight or a dense one}: {1: Bitmask, 9: Tiles} runs up to 8 inputs by the
             bitmask. Buffers are plain tensors, so `state_dict`, `deepcopy` and pickling work.
    For inference: weights are frozen; gradients flow to inputs, at the cost of unpacking. Outputs have the type of
    inputs.

    >>> from rarefy.runtime.packed import pack_bitmask
    >>> layer = SparseLinear({1: pack_bitmask(torch.tensor([[0.0, 2.0]]))}, torch.tensor([1.0]))
    >>> layer(torch.tensor([[[5.0, 3.0]]])).tolist()
    [[[7.0]]]
    """

    bias: Tensor | None

    def __init__(self, forms: Mapping[int, Packed | Tensor], bias: Tensor | None = None):
        super().__init__()
        if not forms or min(forms) != 1:
            raise ModelError("a layer needs a form of its weight from one input on")
        shapes = {tuple(f.shape) for f in forms.values()}
        if len(shapes) != 1:
            raise ModelError(f"forms of one weight have one shape, got {sorted(shapes)}")
        self.out_features, self.in_features = shapes.pop()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.about: list[tuple[int, dict[str, Any]]] = []  # where a form begins, and what of it is no tensor
        for at in sorted(forms):
            form = forms[at]
            if isinstance(form, Tensor):
                self.register_buffer(f"from{at}_weight", form.detach())
                self.about.append((at, {"format": "dense"}))
                continue
            parts = {n: v for n, v in vars(form).items() if isinstance(v, Tensor)}
            for name, tensor in parts.items():
                self.register_buffer(f"from{at}_{name}", tensor)
            plain = {n: v for n, v in vars(form).items() if n not in parts and v is not None}
            self.about.append((at, {"format": next(k for k, v in FORMATS.items() if type(form) is v), **plain}))
        self.parts = {at: [n for n in self._buffers if n.startswith(f"from{at}_")] for at in forms}  # buffers of each
        self._kernels: dict[int, tuple[Any, Any]] = {}

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked at each call: for modules that look at their layers' weights."""
        form = self.form(1)
        if isinstance(form, Tensor):
            return form
        return unpack(form).to(torch.bfloat16 if form.kind == "bf16" else torch.float32)

    def form(self, at: int) -> Packed | Tensor:
        """Return the form that begins at `at` inputs."""
        plain = dict(dict(self.about)[at])
        kind = plain.pop("format")
        parts = {n.removeprefix(f"from{at}_"): self._buffers[n] for n in self.parts[at]}
        return parts["weight"] if kind == "dense" else FORMATS[kind](**plain, **parts)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._is_tracing():
            raise ModelError("torch.jit.trace sees no kernels: trace the model before accelerate_")
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        rows = x.numel() // max(1, self.in_features)
        at = next(a for a, _ in reversed(self.about) if a <= max(rows, 1))
        dense = self._buffers.get(f"from{at}_weight")
        if dense is not None:
            return F.linear(x, dense, self.bias)
        kernel, made_of = self._kernels.get(at, (None, None))
        if made_of != self._state(at):  # edited, swapped or loaded since
            kernel = self._kernel(at)
        if x.shape[-1] != self.in_features:
            raise ModelError(f"the layer has {self.in_features} inputs, x has {x.shape[-1]}")
        y = kernel(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _kernel(self, at: int) -> Any:
        """What runs a form, made at its first call; it holds addresses, so it is neither copied nor saved."""
        form: Any = self.form(at)
        if native.missing() is None:
            kernel: Any = native.Kernel(form, self.bias).run
        else:
            bias = None if self.bias is None else self.bias.float()
            kernel = lambda x: reference.run(form, x, bias)  # noqa: E731
        self._kernels[at] = kernel, self._state(at)
        return kernel

    def _state(self, at: int) -> list[tuple[int, int]]:
        """What tells one state of a form's buffers from another."""
        parts = (self._buffers[n] for n in ("bias", *self.parts[at]))
        return [(b.data_ptr(), b._version) for b in parts if b is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": {}}

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move with the model, but keep the numbers of packed parts: they are not for `half()` to change."""
        packed = {n: b for n, b in self._buffers.items() if n.startswith("from") and not n.endswith("_weight")}
        super()._apply(fn, recurse)
        for name, before in packed.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def extra_repr(self) -> str:
        forms = ", ".join(f"{a}+: {p['format']}" for a, p in self.about)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {forms}"
        )
