"""The reference of a cut: the output of the model with masked units, where normalization ignores these units.

A cut model normalizes over the units that remain; a masked model would count the zeros too.
"""

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
from rarefy.dependency.symbolic_dims import Axis, kept_mask, size

UNBIASED = frozenset(("mm", "bmm", "mv", "dot"))  # matrix products without a bias
PRODUCTS = frozenset(n for rule in (layers.matmul, layers.convolution) for n in OPERATORS[rule].split())


class MaskedReference(TorchDispatchMode):
    """Run a masked model with feature statistics (LayerNorm, mean over features) of the remaining units only.

    With a graph and masks, removed units of each matrix product are set to zero as well, since a bias would fill them
    again. Without, units count as removed where they are zero in the whole tensor.
    """

    def __init__(self, graph: Graph | None = None, masks: Mapping[Axis, Tensor] | None = None):
        super().__init__()
        self.products = iter(graph.products if graph is not None else ())
        self.masks = masks or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        out = func(*args, **kwargs)
        if name in PRODUCTS or (isinstance(out, Tensor) and adds_bias(func, args, out)):
            biased = name not in UNBIASED and (name != "convolution" or args[2] is not None)
            return self._zero_removed(name, out, biased)
        if name == "native_layer_norm" and len(args[1]) == 1:
            return _layer_norm(out[0], self._kept_units(name, args[0], -1), *args[:5]), *out[1:]
        if name in ("_fused_rms_norm", "rms_norm"):
            keep = self._kept_units(name, args[0], -1)
            y = out[0] if isinstance(out, tuple) else out
            y = y * (keep.sum() / keep.numel()).sqrt().to(y.dtype)  # exact up to eps
            return (y, *out[1:]) if isinstance(out, tuple) else y
        if averages_features(func, args):
            keep = self._kept_units(name, args[0], -1)
            return out * (keep.numel() / keep.sum().clamp(min=1)).to(out.dtype)
        if name == "native_group_norm":
            return _group_norm(self._kept_units(name, args[0], 1), *args[:8]), *out[1:]
        return out

    def _traced_dims(self, name: str, shape: Any) -> list[Any] | None:
        """Return the dimensions that the trace recorded for this operator; None once the runs differ."""
        operator, dims = next(self.products, ("", []))
        if operator == name and [size(e) for e in dims] == list(shape):
            return dims
        self.products = iter(())
        return None

    def _kept_units(self, name: str, x: Tensor, d: int) -> Tensor:
        """Return which indices of dimension `d` stay: by the masks, or those that are nonzero anywhere."""
        dims = self._traced_dims(name, x.shape)
        if dims is not None:
            return kept_mask(dims[d], self.masks.get).to(x.device)
        return (x != 0).movedim(d, 0).flatten(1).any(1) if x.dim() > 1 else x != 0

    def _zero_removed(self, name: str, out: Any, biased: bool) -> Any:
        """Set removed units of an output to zero where a bias may have changed them.

        Without a bias they are a constant, which `surgery._constants` records.
        """
        for d, e in enumerate(self._traced_dims(name, out.shape) or ()):
            if not biased:
                break
            keep = kept_mask(e, self.masks.get)
            if not keep.all():
                out = out.index_fill_(d, (~keep).nonzero()[:, 0].to(out.device), 0)
        return out


def _layer_norm(
    out: Tensor, keep: Tensor, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return LayerNorm over the features that stay; the others are zero."""
    normed = torch.zeros_like(out)
    scale, shift = (None if p is None else p[keep] for p in (weight, bias))
    normed[..., keep] = F.layer_norm(x[..., keep], (int(keep.sum()),), scale, shift, eps)
    return normed


def _group_norm(
    keep: Tensor, x: Tensor, weight: Any, bias: Any, N: int, C: int, HxW: int, groups: int, eps: float
) -> Tensor:
    """Return GroupNorm over the channels that stay; the others are zero."""
    normed = torch.zeros_like(x)
    for g in range(groups):
        channels = torch.arange(g * C // groups, (g + 1) * C // groups)[keep.view(groups, -1)[g].cpu()]
        if len(channels):
            scale, shift = (None if p is None else p[channels] for p in (weight, bias))
            normed[:, channels] = F.group_norm(x[:, channels], 1, scale, shift, eps)
    return normed
