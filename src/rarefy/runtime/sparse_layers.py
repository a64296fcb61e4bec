"""Layers that run on packed weights, in the place of dense ones."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from functools import cache, partial
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.common.errors import ModelError, unknown
from rarefy.model.activation_quant import Inputs
from rarefy.runtime import bindings, reference
from rarefy.runtime.kernel import Kernel, Together, fit_together
from rarefy.runtime.packed_formats import Bitmask, ConvTiles, Csr, Dense, Packed, Panels, Sell, Tiles
from rarefy.runtime.packing import unpack

MOST_INPUTS = 32  # of a call, up to which panels are multiplied by as they lie
MOST_SIZES = 64  # of calls for which layers that run together are kept
FORMATS: dict[str, type] = {
    "bitmask": Bitmask,
    "csr": Csr,
    "tiles": Tiles,
    "convolution": ConvTiles,
    "panels": Panels,
    "sell": Sell,
    "fours": Dense,
}


class Sparse(nn.Module):
    """A layer with its weight packed; by the number of inputs in a call, one of several forms of the same weight.

    forms    {first number of inputs: packed weight or a dense one}: {1: Bitmask, 9: Tiles} runs up to 8 inputs by the
             bitmask. Buffers are plain tensors, so `state_dict`, `deepcopy` and pickling work.
    activation  what follows the layer, by its name in `reference.ACTIVATIONS`
    rounds      whether inputs are rounded to 8 bits row by row, by dense forms too
    For inference: weights are frozen; gradients flow to inputs, at the cost of unpacking. Outputs have the type of
    inputs.
    """

    bias: Tensor | None
    unpacked = 0  # how often `weight` was

    def __init__(
        self,
        forms: Mapping[int, Packed | Tensor],
        bias: Tensor | None = None,
        activation: str | None = None,
        rounds: bool = False,
    ):
        super().__init__()
        self.rounds = rounds
        if activation not in reference.ACTIVATIONS:
            raise ModelError(unknown("activation", str(activation), [str(a) for a in reference.ACTIVATIONS]))
        self.activation = activation
        if not forms or min(forms) != 1:
            raise ModelError("a layer needs a form of its weight from one input on")
        shapes = {tuple(f.shape) for f in forms.values()}
        if len(shapes) != 1:
            raise ModelError(f"forms of one weight have one shape, got {sorted(shapes)}")
        self.shape = shapes.pop()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.about: list[tuple[int, dict[str, Any]]] = []  # where a form begins, and what of it is no tensor
        for at in sorted(forms):
            form = forms[at]
            if isinstance(form, Tensor):
                self.register_buffer(f"from{at}_weight", form.detach())
                self.about.append((at, {"format": "dense"}))
                continue
            about, parts = taken_apart(form)
            for name, tensor in parts.items():
                self.register_buffer(f"from{at}_{name}", tensor)
            self.about.append((at, about))
        self.parts = {at: [n for n in self._buffers if n.startswith(f"from{at}_")] for at in forms}  # buffers of each
        dense = {at: f"from{at}_weight" for at, how in self.about if how["format"] == "dense"}
        self.order = [(at, dense.get(at), ("bias", *self.parts[at])) for at in sorted(forms, reverse=True)]
        self.told = self._tell(None)
        self._kernels: dict[int, tuple[Any, Any]] = {}
        self.beside: tuple[SparseLinear, ...] = ()  # layers that are given the same inputs after this one
        self._joint: dict[int, Any] = {}  # by number of inputs: whose forms, their kernels, all as one
        self._ready: dict[int, Any] = {}  # by thread: (inputs, their version, outputs), made by the layer before

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked at each call: for modules that look at their layers' weights."""
        form = self.form(1)
        if isinstance(form, Tensor):
            return form
        self.unpacked += 1
        return unpack(form).to(torch.bfloat16 if form.kind == "bf16" else torch.float32)

    def form(self, at: int) -> Packed | Tensor:
        """Return the form that begins at `at` inputs."""
        parts: Any = {n.removeprefix(f"from{at}_"): self._buffers[n] for n in self.parts[at]}
        return put_together(dict(self.about)[at], parts)

    def _tell(self, like: dict[str, Any] | None) -> str:
        """What the operator has to know besides the tensors."""
        forms = [(at, about, [n.removeprefix(f"from{at}_") for n in self.parts[at]]) for at, about in self.about]
        told = {"shape": self.shape, "forms": forms, "like": like, "activation": self.activation}
        return json.dumps({**told, "rounds": self.rounds})

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the dense layer would."""
        raise NotImplementedError

    def run(self, x: Tensor, inputs: int) -> Tensor:
        """Return what the dense layer would, by the form that is for so many inputs."""
        at, weight, names = self._serving(inputs)
        buffers: Any = self._buffers
        if self.rounds and (weight is not None or (x.requires_grad and torch.is_grad_enabled())):
            x = Inputs()(x)
        if weight is not None:
            return reference.ACTIVATIONS[self.activation](self.dense(x, buffers[weight], buffers["bias"]))
        if x.requires_grad and torch.is_grad_enabled():
            bias = buffers["bias"]
            W = unpack(self.form(at)).to(x.dtype)  # type: ignore[arg-type]
            y = self.dense(x, W, None if bias is None else bias.to(x.dtype))
            return reference.ACTIVATIONS[self.activation](y)
        if inputs > MOST_INPUTS and isinstance(
            form := self.form(at), Panels
        ):  # one pass to unpack, then torch's own product
            bias, rounded = buffers["bias"], reference.rounded(x.float(), form).to(x.dtype)
            y = self.dense(rounded, unpack(form).to(x.dtype), None if bias is None else bias.to(x.dtype))
            return reference.ACTIVATIONS[self.activation](y)
        if not x.is_floating_point():
            raise ModelError(f"the layer takes floating point, x is {str(x.dtype).removeprefix('torch.')}")
        y = self._current(at, names).run(x)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def _serving(self, inputs: int) -> tuple[int, str | None, tuple[str, ...]]:
        """Of the form for so many inputs: where it begins, the buffer of a dense one, all its buffers."""
        for form in self.order:
            if form[0] <= inputs:
                return form
        return self.order[-1]

    def _current(self, at: int, names: tuple[str, ...]) -> Any:
        """The kernel of a form, made anew where its tensors have been edited, swapped or loaded since."""
        buffers: Any = self._buffers
        state = [(b.data_ptr(), _version(b)) for n in names if (b := buffers[n]) is not None]
        kernel, made_of = self._kernels.get(at, (None, None))
        if made_of != state:
            kernel = self._kernel(at)
            self._kernels[at] = kernel, state
        return kernel

    def operator(self, x: Tensor) -> Tensor:
        """Return the same for a compiler to see: a call of `rarefy::sparse`."""
        parts = [self._buffers[n] for names in self.parts.values() for n in names]
        return torch.ops.rarefy.sparse(x, parts, self.bias, self.told)

    def _kernel(self, at: int) -> Any:
        """What runs a form, made at its first call; it holds addresses, so it is neither copied nor saved."""
        form: Any = self.form(at)
        if bindings.missing() is None:
            return Kernel(form, self.bias, self.activation)
        bias = None if self.bias is None else self.bias.float()
        return SimpleNamespace(run=lambda x: reference.run(form, x, bias, self.activation))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": {}, "_joint": {}, "_ready": {}}

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
        act = "" if self.activation is None else f", {self.activation}"
        return f"shape={list(self.shape)}, bias={self.bias is not None}, {forms}{act}"


class SparseLinear(Sparse):
    """act(x W^T + bias) with W packed; its forms are chosen by the number of rows of x.

    >>> from rarefy.runtime.packing import pack_bitmask
    >>> layer = SparseLinear({1: pack_bitmask(torch.tensor([[0.0, 2.0]]))}, torch.tensor([1.0]))
    >>> layer(torch.tensor([[[5.0, 3.0]]])).tolist()
    [[[7.0]]]
    """

    def __init__(
        self,
        forms: Mapping[int, Packed | Tensor],
        bias: Tensor | None = None,
        activation: str | None = None,
        rounds: bool = False,
    ):
        super().__init__(forms, bias, activation, rounds)
        self.out_features, self.in_features = self.shape

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        compiling, inputs = torch.compiler.is_compiling(), self.in_features
        refuse_traces(compiling)
        if x.shape[-1] != inputs:
            raise ModelError(f"the layer has {inputs} inputs, x has {x.shape[-1]}")
        if compiling:
            return self.operator(x.reshape(-1, inputs)).view(*x.shape[:-1], self.out_features)
        n = x.numel() // inputs
        if self._ready and (y := self._made(x, n)) is not None:
            return y
        if self.beside and _plain(x) and x.is_floating_point():
            y = self._with_others(x, n)
            if y is not None:
                return y
        return self.run(x, n)

    def join(self, others: Sequence[SparseLinear]) -> None:
        """Run these in the same call, which are given the same inputs after this one."""
        self.beside, self._joint = tuple(others), {}

    def _with_others(self, x: Tensor, n: int) -> Tensor | None:
        """Run the layers beside this one too, in one call, and leave them their outputs; None where forms differ."""
        known = self._joint.get(n)
        if known is None:
            layers = (self, *self.beside)
            forms = [(l, *l._serving(n)) for l in layers]
            fit = all(weight is None for _, _, weight, _ in forms)
            known = [(l, at, names) for l, at, _, names in forms] if fit else [], [], None
        whose, before, joint = known
        kernels = [l._current(at, names) for l, at, names in whose]
        if kernels != before:
            joint = Together(kernels) if fit_together(kernels) else None
        if kernels != before or n not in self._joint:
            if before or len(self._joint) >= MOST_SIZES:
                self._joint.clear()  # the others hold old weights too
            self._joint[n] = whose, kernels, joint
        if joint is None:
            return None
        y, *others = joint.run(x)
        if x.dtype is not torch.float32:
            y, others = y.to(x.dtype), [t.to(x.dtype) for t in others]
        me, state = get_ident(), _state(x)
        for layer, kernel, other in zip(self.beside, kernels[1:], others):
            if len(layer._ready) >= MOST_SIZES:  # of threads that are gone
                layer._ready.clear()
            layer._ready[me] = weakref.ref(x, partial(_forget, layer._ready, me)), state, kernel, other
        return y

    def _made(self, x: Tensor, n: int) -> Tensor | None:
        """What the layer before has made for this one out of x, once: if neither x nor this layer is another since."""
        of, state, kernel, y = self._ready.pop(get_ident(), (None, None, None, None))
        if of is None or of() is not x or not _plain(x) or state != _state(x):
            return None
        at, _, names = self._serving(n)
        return y if self._current(at, names) is kernel else None


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _plain(x: Tensor) -> bool:
    """Whether outputs for x may be kept for another layer: no gradient is wanted, and edits of x are counted."""
    return (
        not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_inference_mode_enabled()
        and not x.is_inference()
    )


def _state(x: Tensor) -> tuple[Any, ...]:
    return x._version, x.data_ptr(), x.shape, x.dtype


def _forget(ready: dict[int, Any], thread: int, ref: Any) -> None:
    """Drop outputs whose inputs are gone."""
    if ready.get(thread, (None,))[0] is ref:
        ready.pop(thread, None)


class SparseConv(Sparse):
    """A convolution of images, or of lines (images one pixel high), with W [O, I, rows, columns] packed; its forms are
    chosen by the number of images.

    like    the convolution in whose place it stands: its strides, padding, dilation, groups
    An image may come without a batch dimension, as in `nn.Conv2d`; outputs are contiguous.

    >>> from rarefy.runtime.packing import pack_conv
    >>> layer = SparseConv({1: pack_conv(torch.tensor([[[[0.0, 2.0]]]]))}, like=nn.Conv2d(1, 1, (1, 2), bias=False))
    >>> layer(torch.tensor([[[5.0, 3.0, 4.0]]])).tolist()
    [[[6.0, 8.0]]]
    """

    def __init__(
        self, forms: Mapping[int, Packed | Tensor], *, like: nn.Conv1d | nn.Conv2d, activation: str | None = None
    ):
        super().__init__(forms, like.bias, activation)
        self.in_channels, self.out_channels, self.kernel_size = like.in_channels, like.out_channels, like.kernel_size
        self.stride, self.padding, self.dilation, self.groups = like.stride, like.padding, like.dilation, like.groups
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        self.told = self._tell({n: getattr(self, n) for n in names})

    @property
    def weight(self) -> Tensor:
        """The dense weight in the shape of the layer's class, unpacked at each call."""
        return super().weight.reshape(self.out_channels, -1, *self.kernel_size)

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry(self).values()).contiguous()  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        refuse_traces(compiling)
        spatial = len(self.kernel_size)
        if x.dim() not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != self.in_channels:
            raise ModelError(f"the layer convolves {self.in_channels} channels, got x of shape {list(x.shape)}")
        images = x if x.dim() == spatial + 2 else x[None]
        images = images.unsqueeze(2) if spatial == 1 else images
        y = self.operator(images) if compiling else self.run(images, images.shape[0])
        y = y.squeeze(2) if spatial == 1 else y
        return y if x.dim() == spatial + 2 else y[0]


class PanelEmbedding(nn.Module):
    """The embedding of a packed weight, whose buffers it shares with the layer that multiplies by it."""

    def __init__(self, packed: Panels, dtype: torch.dtype, padding_idx: int | None = None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.dtype, self.padding_idx = dtype, padding_idx
        self.plain = {n: v for n, v in vars(packed).items() if not isinstance(v, Tensor) and v is not None}
        for name, tensor in vars(packed).items():
            if isinstance(tensor, Tensor):
                self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked at each call."""
        return unpack(Panels(**self.plain, **self._buffers)).to(self.dtype)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move with the model; its outputs take the type that is asked for, its packed parts keep theirs."""
        packed = dict(self._buffers)
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, before in packed.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids`; IndexError for one that is not there. O(ids)."""
        flat = ids.reshape(-1)
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(f"an embedding of {self.num_embeddings} rows has no row {int(flat.max())}")
        fours = F.pad(flat, (0, -len(flat) % 4)).view(-1, 4)
        rows: Any = {n: t for n, t in self._buffers.items() if t is not None}
        for name, t in rows.items():
            rows[name] = t[fours].flatten() if t.dim() == 1 else t[fours // 4, :, fours % 4].transpose(1, 2)
        made = unpack(Panels(**{**self.plain, "shape": (fours.numel(), self.embedding_dim)}, **rows))
        return made[: len(flat)].to(self.dtype).reshape(*ids.shape, self.embedding_dim)


def refuse_traces(compiling: bool) -> None:
    """Raise ModelError within torch.jit.trace, which would record what a kernel returned once."""
    if not compiling and torch._C._is_tracing():
        raise ModelError("torch.jit.trace sees no kernels: trace the model before accelerate_")


def taken_apart(form: Packed) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what of a packed weight is no tensor, with the name of its format, and its tensors."""
    parts = {n: v for n, v in vars(form).items() if isinstance(v, Tensor)}
    plain = {n: v for n, v in vars(form).items() if n not in parts and v is not None}
    return {"format": next(k for k, v in FORMATS.items() if type(form) is v), **plain}, parts


def put_together(about: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Packed | Tensor:
    """Return the weight that was taken apart; what JSON made lists of are tuples again."""
    if about["format"] == "dense":
        return parts["weight"]
    plain = {n: tuple(v) if isinstance(v, list) else v for n, v in about.items() if n != "format"}
    return FORMATS[about["format"]](**plain, **parts)


@cache
def described(told: str) -> dict[str, Any]:
    """Return what a layer told the operator about itself."""
    return json.loads(told)


def rebuilt(parts: Sequence[Tensor], bias: Tensor | None, told: str) -> Sparse:
    """Return the layer of these tensors, parts in the order of its forms."""
    about, tensors = described(told), iter(parts)
    forms = {at: put_together(how, {n: next(tensors) for n in names}) for at, how, names in about["forms"]}
    like: Any = about["like"] and SimpleNamespace(**about["like"], bias=bias)
    act = about["activation"]
    layer = SparseConv(forms, like=like, activation=act) if like else SparseLinear(forms, bias, act, about["rounds"])
    layer.bias = None if bias is None else bias.detach()  # not a copy: edits are seen
    return layer


def geometry(conv: Any) -> dict[str, Any]:
    """Return stride, padding, dilation and groups of a convolution, as of images."""
    spread = {"stride": 1, "padding": 0, "dilation": 1}
    pairs = {n: getattr(conv, n) for n in spread}
    return {n: v if len(v) == 2 else (spread[n], *v) for n, v in pairs.items()} | {"groups": conv.groups}
