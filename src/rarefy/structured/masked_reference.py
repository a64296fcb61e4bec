"""What a model with zeroed units returns if nothing counts those units: the oracle of a cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.dependency.graph import Graph
from rarefy.dependency.op_table import OPERATORS, layers
from rarefy.dependency.shape_rules import adds_bias, averages_features
from rarefy.dependency.symbolic_dims import Axis, kept, size

PLAIN = frozenset(("mm", "bmm", "mv", "dot"))  # products that have no bias
PRODUCTS = frozenset(n for rule in (layers.product, layers.convolution) for n in OPERATORS[rule].split())


class MaskedReference(TorchDispatchMode):
    """Runs with statistics over the features that are not zero everywhere: LayerNorm, means over the last dimension.

    A cut model takes its means over the units that are left, a masked one over zeros too. Under this mode the masked
    one does as the cut one will. With a graph and masks, what products return is zero for units that go: the bias of a
    product over tokens would come back into every channel.
    """

    def __init__(self, graph: Graph | None = None, masks: Mapping[Axis, Tensor] | None = None):
        super().__init__()
        self.products = iter(graph.products if graph is not None else ())
        self.masks = masks or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        out = func(*args, **kwargs)
        if name in PRODUCTS or (isinstance(out, Tensor) and adds_bias(func, args, out)):
            return self._without(name, out, name not in PLAIN and (name != "convolution" or args[2] is not None))
        if name == "native_layer_norm" and len(args[1]) == 1:
            return _layer_norm(out[0], self._here(name, args[0], -1), *args[:5]), *out[1:]
        if name in ("_fused_rms_norm", "rms_norm"):
            here = self._here(name, args[0], -1)
            y = out[0] if isinstance(out, tuple) else out
            y = y * (here.sum() / here.numel()).sqrt().to(y.dtype)  # but for eps, which is small
            return (y, *out[1:]) if isinstance(out, tuple) else y
        if averages_features(func, args):
            here = self._here(name, args[0], -1)
            return out * (here.numel() / here.sum().clamp(min=1)).to(out.dtype)
        if name == "native_group_norm":
            return _group_norm(self._here(name, args[0], 1), *args[:8]), *out[1:]
        return out

    def _dims(self, name: str, shape: Any) -> list[Any] | None:
        """The dimensions of the next operator of those that the trace noted; without them from where runs part."""
        operator, dims = next(self.products, ("", []))
        if operator == name and [size(e) for e in dims] == list(shape):
            return dims
        self.products = iter(())
        return None

    def _here(self, name: str, x: Tensor, d: int) -> Tensor:
        """Which indices of a dimension stay: by the masks, or without a graph those that are anywhere not zero."""
        dims = self._dims(name, x.shape)
        if dims is not None:
            return kept(dims[d], self.masks.get).to(x.device)
        return (x != 0).movedim(d, 0).flatten(1).any(1) if x.dim() > 1 else x != 0

    def _without(self, name: str, out: Any, biased: bool) -> Any:
        """The product with what goes as zero, where a bias could have made it something else: what follows from zeros
        without one is a constant that `_constants` finds."""
        for d, e in enumerate(self._dims(name, out.shape) or ()):
            if not biased:
                break
            left = kept(e, self.masks.get)
            if not left.all():
                out = out.index_fill_(d, (~left).nonzero()[:, 0].to(out.device), 0)
        return out


def _layer_norm(
    out: Tensor, here: Tensor, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    y = torch.zeros_like(out)
    scale, shift = (None if p is None else p[here] for p in (weight, bias))
    y[..., here] = F.layer_norm(x[..., here], (int(here.sum()),), scale, shift, eps)
    return y


def _group_norm(
    here: Tensor, x: Tensor, weight: Any, bias: Any, N: int, C: int, HxW: int, groups: int, eps: float
) -> Tensor:
    y = torch.zeros_like(x)
    for g in range(groups):
        where = torch.arange(g * C // groups, (g + 1) * C // groups)[here.view(groups, -1)[g].cpu()]
        if len(where):
            scale, shift = (None if p is None else p[where] for p in (weight, bias))
            y[:, where] = F.group_norm(x[:, where], 1, scale, shift, eps)
    return y
