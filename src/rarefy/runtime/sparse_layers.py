"""Layers that run on packed weights, in the place of dense ones."""

from __future__ import annotations

import json
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache, partial
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.common.errors import ModelError, unknown
from rarefy.model.activation_quant import ActivationQuant
from rarefy.runtime import bindings, reference
from rarefy.runtime.kernel import GroupedKernels, Kernel, can_group
from rarefy.runtime.packed_formats import Packed, QuantizedPanels, from_tensors, to_tensors
from rarefy.runtime.packing import unpack

MAX_PANEL_BATCH = 32  # inputs of a call up to which panels run on their kernel; more: unpacked, then torch's product
MAX_BATCHES = 64  # batches for which calls of grouped layers are kept


class Sparse(nn.Module):
    """A layer whose weight is packed, in one format or, by the number of inputs in a call, in several.

    For inference: weights are frozen; gradients flow to inputs, at the cost of unpacking. Outputs have the dtype of the
    inputs. Buffers are plain tensors, so `state_dict`, `deepcopy` and pickling work.

    Args:
        weights: the packed or dense weight by the smallest batch that it serves: {1: Bitmask, 9: Tiles} runs up to 8
            inputs on the bitmask.
        bias: fp32 [outputs], or None.
        activation: what follows the layer, a name in `reference.ACTIVATIONS`.
        int8_inputs: whether inputs are quantized to 8 bits row by row, for dense weights too.
    """

    bias: Tensor | None
    unpacked = 0  # how often `weight` was

    def __init__(
        self,
        weights: Mapping[int, Packed | Tensor],
        bias: Tensor | None = None,
        activation: str | None = None,
        int8_inputs: bool = False,
    ):
        super().__init__()
        self.int8_inputs = int8_inputs
        if activation not in reference.ACTIVATIONS:
            raise ModelError(unknown("activation", str(activation), [str(a) for a in reference.ACTIVATIONS]))
        self.activation = activation
        if not weights or min(weights) != 1:
            raise ModelError("expected packed weights for batches from one input up")
        shapes = {tuple(w.shape) for w in weights.values()}
        if len(shapes) != 1:
            raise ModelError(f"the packed weights of a layer must have one shape, got {sorted(shapes)}")
        self.shape = shapes.pop()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.formats: list[tuple[int, dict[str, Any]]] = []  # (smallest batch, format and its numbers)
        for start in sorted(weights):
            packed = weights[start]
            tensors: dict[str, Tensor]
            if isinstance(packed, Tensor):
                metadata, tensors = {"format": "dense"}, {"weight": packed.detach()}
            else:
                metadata, tensors = to_tensors(packed)
            for name, tensor in tensors.items():
                self.register_buffer(f"from{start}_{name}", tensor)
            self.formats.append((start, metadata))
        self.buffer_names = {start: [n for n in self._buffers if n.startswith(f"from{start}_")] for start in weights}
        dense = {start: f"from{start}_weight" for start, f in self.formats if f["format"] == "dense"}
        self._descending = [
            (start, dense.get(start), ("bias", *self.buffer_names[start])) for start in sorted(weights, reverse=True)
        ]
        self.spec = self._spec(None)
        self._kernels: dict[int, tuple[Any, Any]] = {}
        self.grouped: tuple[SparseLinear, ...] = ()  # layers that have the same inputs after this one
        self._grouped_calls: dict[int, Any] = {}  # by batch: (layers and buffers, their kernels, all in one call)
        self._computed: dict[int, Any] = {}  # by thread: (inputs, their state, kernel, outputs), by the leading layer

    @property
    def weight(self) -> Tensor:
        """Return the dense weight, unpacked at each call: some modules read their layers' weights."""
        packed = self.packed_weight(1)
        if isinstance(packed, Tensor):
            return packed
        self.unpacked += 1
        return unpack(packed).to(torch.bfloat16 if packed.kind == "bf16" else torch.float32)

    def packed_weight(self, start: int) -> Packed | Tensor:
        """Return the weight that serves batches from `start` on."""
        parts: Any = {n.removeprefix(f"from{start}_"): self._buffers[n] for n in self.buffer_names[start]}
        metadata = dict(self.formats)[start]
        return parts["weight"] if metadata["format"] == "dense" else from_tensors(metadata, parts)

    def _spec(self, like: dict[str, Any] | None) -> str:
        """Return what the operator needs besides the tensors, as JSON."""
        formats = [
            (start, f, [n.removeprefix(f"from{start}_") for n in self.buffer_names[start]]) for start, f in self.formats
        ]
        spec = {"shape": self.shape, "formats": formats, "like": like, "activation": self.activation}
        return json.dumps({**spec, "int8_inputs": self.int8_inputs})

    @abstractmethod
    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the outputs of the dense layer with this weight."""

    def run(self, x: Tensor, batch: int) -> Tensor:
        """Return what the dense layer would, by the weight that serves this batch."""
        start, dense, names = self._serving(batch)
        needs_gradient = x.requires_grad and torch.is_grad_enabled()
        if self.int8_inputs and (dense is not None or needs_gradient):
            x = ActivationQuant()(x)
        if dense is not None:
            return self._run_dense(x, self._buffers[dense], self._buffers["bias"])
        if needs_gradient:
            return self._run_dense(x, unpack(self.packed_weight(start)))  # type: ignore[arg-type]
        if batch > MAX_PANEL_BATCH and isinstance(packed := self.packed_weight(start), QuantizedPanels):
            return self._run_dense(reference.rounded(x.float(), packed).to(x.dtype), unpack(packed))
        if not x.is_floating_point():
            raise ModelError(f"the layer needs floating-point inputs, x is {str(x.dtype).removeprefix('torch.')}")
        y = self._kernel_for(start, names).run(x)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def _run_dense(self, x: Tensor, weight: Any, bias: Any = ...) -> Tensor:
        """Return act(dense(x)); without `bias` the layer's, and the weight, in the dtype of x."""
        if bias is ...:
            layer_bias = self._buffers["bias"]
            weight, bias = weight.to(x.dtype), None if layer_bias is None else layer_bias.to(x.dtype)
        return reference.ACTIVATIONS[self.activation](self.dense(x, weight, bias))

    def _serving(self, batch: int) -> tuple[int, str | None, tuple[str, ...]]:
        """Return, of the weight for this batch, where it starts, the buffer of a dense one, and all its buffers."""
        for entry in self._descending:
            if entry[0] <= batch:
                return entry
        return self._descending[-1]

    def _kernel_for(self, start: int, names: tuple[str, ...]) -> Any:
        """Return the kernel of a weight, rebuilt if its tensors were edited, swapped or loaded since."""
        buffers: Any = self._buffers
        state = [(b.data_ptr(), _version(b)) for n in names if (b := buffers[n]) is not None]
        kernel, built_from = self._kernels.get(start, (None, None))
        if built_from != state:
            kernel = self._new_kernel(start)
            self._kernels[start] = kernel, state
        return kernel

    def operator(self, x: Tensor) -> Tensor:
        """Return the same for a compiler to see: a call of `rarefy::sparse`."""
        parts = [self._buffers[n] for names in self.buffer_names.values() for n in names]
        return torch.ops.rarefy.sparse(x, parts, self.bias, self.spec)

    def _new_kernel(self, start: int) -> Any:
        """Return a new kernel of the weight; it holds addresses, so it is neither copied nor pickled."""
        packed: Any = self.packed_weight(start)
        if bindings.missing() is None:
            return Kernel(packed, self.bias, self.activation)
        bias = None if self.bias is None else self.bias.float()
        return SimpleNamespace(run=lambda x: reference.run(packed, x, bias, self.activation))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": {}, "_grouped_calls": {}, "_computed": {}}

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move with the model, but keep the dtype of packed tensors, which `half()` must not change."""
        packed = {n: b for n, b in self._buffers.items() if n.startswith("from") and not n.endswith("_weight")}
        super()._apply(fn, recurse)
        for name, before in packed.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def extra_repr(self) -> str:
        formats = ", ".join(f"{start}+: {f['format']}" for start, f in self.formats)
        act = "" if self.activation is None else f", {self.activation}"
        return f"shape={list(self.shape)}, bias={self.bias is not None}, {formats}{act}"


class SparseLinear(Sparse):
    """act(x W^T + bias) with W [outputs, inputs] packed; the weight is chosen by the number of rows of x.

    >>> from rarefy.runtime.packing import pack_bitmask
    >>> layer = SparseLinear({1: pack_bitmask(torch.tensor([[0.0, 2.0]]))}, torch.tensor([1.0]))
    >>> layer(torch.tensor([[[5.0, 3.0]]])).tolist()
    [[[7.0]]]
    """

    def __init__(
        self,
        weights: Mapping[int, Packed | Tensor],
        bias: Tensor | None = None,
        activation: str | None = None,
        int8_inputs: bool = False,
    ):
        super().__init__(weights, bias, activation, int8_inputs)
        self.out_features, self.in_features = self.shape

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        compiling, inputs = torch.compiler.is_compiling(), self.in_features
        refuse_traces(compiling)
        if x.shape[-1] != inputs:
            raise ModelError(f"the layer has {inputs} inputs, x has {x.shape[-1]}")
        if compiling:
            return self.operator(x.reshape(-1, inputs)).view(*x.shape[:-1], self.out_features)
        batch = x.numel() // inputs
        if self._computed and (y := self._take_computed(x, batch)) is not None:
            return y
        if self.grouped and _may_share_outputs(x) and x.is_floating_point():
            y = self._run_grouped(x, batch)
            if y is not None:
                return y
        return self.run(x, batch)

    def group_with(self, others: Sequence[SparseLinear]) -> None:
        """Compute these layers, which have the same inputs after this one, in the same call."""
        self.grouped, self._grouped_calls = tuple(others), {}

    def _run_grouped(self, x: Tensor, batch: int) -> Tensor | None:
        """Run the grouped layers too, in one call, and leave them their outputs; None where their formats differ."""
        known = self._grouped_calls.get(batch)
        if known is None:
            serving = [(l, *l._serving(batch)) for l in (self, *self.grouped)]
            packed = all(dense is None for _, _, dense, _ in serving)
            known = [(l, start, names) for l, start, _, names in serving] if packed else [], [], None
        members, before, grouped = known
        kernels = [l._kernel_for(start, names) for l, start, names in members]
        if kernels != before:
            grouped = GroupedKernels(kernels) if can_group(kernels) else None
        if kernels != before or batch not in self._grouped_calls:
            if before or len(self._grouped_calls) >= MAX_BATCHES:
                self._grouped_calls.clear()  # other batches hold old weights too
            self._grouped_calls[batch] = members, kernels, grouped
        if grouped is None:
            return None
        y, *others = grouped.run(x)
        if x.dtype is not torch.float32:
            y, others = y.to(x.dtype), [t.to(x.dtype) for t in others]
        thread, state = get_ident(), _state(x)
        for layer, kernel, other in zip(self.grouped, kernels[1:], others):
            if len(layer._computed) >= MAX_BATCHES:  # of threads that have ended
                layer._computed.clear()
            layer._computed[thread] = weakref.ref(x, partial(_forget, layer._computed, thread)), state, kernel, other
        return y

    def _take_computed(self, x: Tensor, batch: int) -> Tensor | None:
        """Return, once, what the leading layer computed for this one from x; None if x or this layer changed."""
        ref, state, kernel, y = self._computed.pop(get_ident(), (None, None, None, None))
        if ref is None or ref() is not x or not _may_share_outputs(x) or state != _state(x):
            return None
        start, _, names = self._serving(batch)
        return y if self._kernel_for(start, names) is kernel else None


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _may_share_outputs(x: Tensor) -> bool:
    """Return whether outputs for x may be kept for another layer: no gradient is needed, torch counts edits of x."""
    return (
        not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_inference_mode_enabled()
        and not x.is_inference()
    )


def _state(x: Tensor) -> tuple[Any, ...]:
    return x._version, x.data_ptr(), x.shape, x.dtype


def _forget(computed: dict[int, Any], thread: int, ref: Any) -> None:
    """Drop outputs whose inputs no longer exist."""
    if computed.get(thread, (None,))[0] is ref:
        computed.pop(thread, None)


class SparseConv(Sparse):
    """A convolution of images [N, C, H, W] or lines [N, C, L], with W [O, I, rows, columns] packed; the weight is
    chosen by the number of images. An image may have no batch dimension, as in `nn.Conv2d`; outputs are contiguous.

    Args:
        weights: as for `Sparse`.
        like: the convolution that it replaces: its strides, padding, dilation, groups and bias.
        activation: as for `Sparse`.

    >>> from rarefy.runtime.packing import pack_conv
    >>> layer = SparseConv({1: pack_conv(torch.tensor([[[[0.0, 2.0]]]]))}, like=nn.Conv2d(1, 1, (1, 2), bias=False))
    >>> layer(torch.tensor([[[5.0, 3.0, 4.0]]])).tolist()
    [[[6.0, 8.0]]]
    """

    def __init__(
        self, weights: Mapping[int, Packed | Tensor], *, like: nn.Conv1d | nn.Conv2d, activation: str | None = None
    ):
        super().__init__(weights, like.bias, activation)
        self.in_channels, self.out_channels, self.kernel_size = like.in_channels, like.out_channels, like.kernel_size
        self.stride, self.padding, self.dilation, self.groups = like.stride, like.padding, like.dilation, like.groups
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        self.spec = self._spec({n: getattr(self, n) for n in names})

    @property
    def weight(self) -> Tensor:
        """Return the dense weight in the shape of the layer's class, unpacked at each call."""
        return super().weight.reshape(self.out_channels, -1, *self.kernel_size)

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of x with this weight."""
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


class QuantizedEmbedding(nn.Module):
    """An embedding that reads a packed weight, whose buffers it shares with the layer that multiplies by it."""

    def __init__(self, packed: QuantizedPanels, dtype: torch.dtype, padding_idx: int | None = None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.dtype, self.padding_idx = dtype, padding_idx
        self.metadata = {n: v for n, v in vars(packed).items() if not isinstance(v, Tensor) and v is not None}
        for name, tensor in vars(packed).items():
            if isinstance(tensor, Tensor):
                self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """Return the dense weight, unpacked at each call."""
        return unpack(QuantizedPanels(**self.metadata, **self._buffers)).to(self.dtype)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move with the model: outputs change their dtype, packed tensors keep theirs."""
        packed = dict(self._buffers)
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, before in packed.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows [..., embedding_dim] for ids [...]; IndexError for an id out of range. O(ids)."""
        flat = ids.reshape(-1)
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(
                f"expected ids from 0 to {self.num_embeddings - 1}, got {int(flat.min())} to {int(flat.max())}"
            )
        panels = flat // 4  # whole ones: four rows of 5 or 6 bits share bytes
        of_panels = (
            (4 * panels[:, None] + torch.arange(4, device=flat.device)).flatten().clamp(max=self.num_embeddings - 1)
        )
        parts: Any = {n: t for n, t in self._buffers.items() if t is not None}
        for name, t in parts.items():
            parts[name] = t[of_panels] if t.dim() == 1 else t[panels]
        rows = unpack(QuantizedPanels(**{**self.metadata, "shape": (4 * len(flat), self.embedding_dim)}, **parts))
        rows = rows.view(-1, 4, self.embedding_dim)[torch.arange(len(flat), device=flat.device), flat % 4]
        return rows.to(self.dtype).reshape(*ids.shape, self.embedding_dim)


def refuse_traces(compiling: bool) -> None:
    """Raise ModelError within torch.jit.trace, which would record the outputs of a kernel as constants."""
    if not compiling and torch._C._is_tracing():
        raise ModelError("torch.jit.trace cannot record kernels: trace the model before accelerate_")


@cache
def read_spec(spec: str) -> dict[str, Any]:
    """Return the spec that a layer passed to the operator."""
    return json.loads(spec)


def from_spec(parts: Sequence[Tensor], bias: Tensor | None, text: str) -> Sparse:
    """Return the layer of a spec and its tensors, in the order of its buffers."""
    spec, tensors = read_spec(text), iter(parts)
    weights = {}
    for start, metadata, names in spec["formats"]:
        named = {n: next(tensors) for n in names}
        weights[start] = named["weight"] if metadata["format"] == "dense" else from_tensors(metadata, named)
    like: Any = spec["like"] and SimpleNamespace(**spec["like"], bias=bias)
    act = spec["activation"]
    layer = (
        SparseConv(weights, like=like, activation=act)
        if like
        else SparseLinear(weights, bias, act, spec["int8_inputs"])
    )
    layer.bias = None if bias is None else bias.detach()  # not a copy: edits are seen
    return layer


def geometry(conv: Any) -> dict[str, Any]:
    """Return stride, padding, dilation and groups of a convolution, as of images."""
    spread = {"stride": 1, "padding": 0, "dilation": 1}
    pairs = {n: getattr(conv, n) for n in spread}
    return {n: v if len(v) == 2 else (spread[n], *v) for n, v in pairs.items()} | {"groups": conv.groups}
