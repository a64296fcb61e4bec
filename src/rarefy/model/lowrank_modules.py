"""Low-rank factors as ordinary modules in the place of a layer.

    LowRank     down and up (for a convolution with a kernel: down, core, up) replace a Linear or a convolution
    Corrected   base + up(down(x)): a pruned or quantized layer plus a low-rank correction of its error

The factors are plain Linear and Conv layers, which are pruned, quantized, trained and accelerated like all others. What
was replaced is recorded in `model.rarefy_factors`, from which `load` builds the same modules before it reads weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ContainerError, nearest
from rarefy.model.layout import is_hf_conv1d

NOTE = "rarefy_factors"
KINDS = ("lowrank", "corrected")


class LowRank(nn.Module):
    """A product of two or three layers in the place of one.

    >>> layer = LowRank.empty(nn.Linear(8, 6), [2])
    >>> layer(torch.ones(3, 8)).shape, [tuple(p.shape) for p in layer.parameters()]
    (torch.Size([3, 6]), [(2, 8), (6, 2), (6,)])
    """

    def __init__(self, down: nn.Module, up: nn.Module, core: nn.Module | None = None):
        super().__init__()
        self.down = down
        if core is not None:
            self.core = core
        self.up = up

    @classmethod
    def empty(cls, module: nn.Module, ranks: Sequence[int]) -> LowRank:
        """Return the factors of a layer, with its bias and with weights that are still to be set."""
        down, *core, up = _factor_modules(module, ranks)
        factors = cls(down, up, *core).requires_grad_(module.weight.requires_grad)  # type: ignore[union-attr, arg-type]
        bias = getattr(module, "bias", None)
        if bias is not None:
            factors.up.bias = bias  # type: ignore[assignment]
        return factors.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(x if not hasattr(self, "core") else self.core(x))

    @property
    def weight(self) -> Tensor:
        """Return the product as one weight, computed at each access: some modules read their layers' weights."""
        if hasattr(self, "core"):
            a, b = self.up.weight.flatten(1), self.down.weight.flatten(1)  # type: ignore[union-attr, operator]
            return torch.einsum("or,rs...,si->oi...", a, self.core.weight, b)
        a, b = self.up.weight, self.down.weight
        return (a.flatten(1) @ b.flatten(1)).reshape(len(a), *b.shape[1:])  # type: ignore[union-attr, operator, arg-type]

    @property
    def bias(self) -> Any:
        return self.up.bias


class Corrected(nn.Module):
    """A layer plus a low-rank correction: base(x) + up(down(x))."""

    def __init__(self, base: nn.Module, down: nn.Linear, up: nn.Linear):
        super().__init__()
        self.base, self.down, self.up = base, down, up

    @classmethod
    def empty(cls, module: nn.Module, rank: int) -> Corrected:
        """Return a layer with a correction whose weights are still to be set."""
        down, up = _factor_modules(module, [rank])
        trains: Any = module.weight.requires_grad
        down, up = down.requires_grad_(trains), up.requires_grad_(trains)
        return cls(module, down, up).train(module.training)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y, small = self.base(x), self.down(x)
        if not y.dtype == small.dtype == self.up.weight.dtype or y.dim() < 2:
            return y + self.up(small)
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), small.reshape(-1, small.shape[-1]), self.up.weight.t())
        return flat.view_as(y)

    @property
    def weight(self) -> Tensor:
        """Return the sum as one weight, computed at each access."""
        product = self.up.weight @ self.down.weight
        base: Any = self.base.weight
        return base + (product.t() if is_hf_conv1d(self.base) else product)

    @property
    def bias(self) -> Any:
        return self.base.bias


def why_not_factorizable(module: nn.Module, correction: bool = False) -> str | None:
    """Return why a layer cannot be factorized, or corrected, or None if it can."""
    kinds = [kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(module, kind)]
    if any(_computes_otherwise(module, kind) for kind in kinds):
        return f"{type(module).__name__} computes its outputs in a way of its own"
    if isinstance(module, nn.Linear) or is_hf_conv1d(module):
        return None
    if correction or not isinstance(module, nn.Conv1d | nn.Conv2d):
        return f"{type(module).__name__} cannot be factorized"
    if module.groups > 1:
        return f"a convolution with {module.groups} groups"
    return None if module.padding_mode == "zeros" else f"padding mode {module.padding_mode}"


def _computes_otherwise(module: nn.Module, kind: Any) -> bool:
    """Return whether a layer's class changes what its kind computes from the weight."""
    methods = ("forward", "_conv_forward") if hasattr(kind, "_conv_forward") else ("forward",)
    return any(getattr(type(module), m) is not getattr(kind, m) for m in methods)


def max_ranks(module: nn.Module) -> tuple[int, ...]:
    """Return the ranks at which a layer loses nothing: one, or (inputs, outputs) for a convolution with a kernel."""
    O, I, K = weight_sizes(module)
    return (min(O, I),) if K == 1 else (min(I, O * K), min(O, I * K))


def weight_sizes(module: Any) -> tuple[int, int, int]:
    """Return the outputs, inputs and kernel positions of a layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, 1
    if is_hf_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0], 1
    return module.out_channels, module.in_channels, module.weight[0, 0].numel()


def num_factor_weights(module: nn.Module, ranks: Sequence[int]) -> int:
    """Return the number of weights of a layer's factors."""
    O, I, K = weight_sizes(module)
    if len(ranks) == 1:
        return ranks[0] * (O + I * K)
    return I * ranks[0] + ranks[0] * ranks[1] * K + ranks[1] * O


def replace_with_factors_(model: nn.Module, name: str, factors: nn.Module, ranks: Sequence[int]) -> None:
    """Replace a layer by its factors, and record it."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, factors)
    record = {"kind": "corrected" if isinstance(factors, Corrected) else "lowrank", "ranks": list(ranks)}
    model.__dict__[NOTE] = {**factor_records(model), name: record}


def factor_records(model: nn.Module) -> dict[str, Any]:
    """Return {layer name: {"kind", "ranks"}} of a model's factors."""
    return model.__dict__.get(NOTE, {})


def restore_factors_(model: nn.Module, records: Any, path: Any) -> None:
    """Build the factors that a saved file records, before their weights are read. Raises ContainerError if they do
    not fit.
    """
    if not records and factor_records(model):
        raise ContainerError(
            f"{path} holds no factors, but {next(iter(factor_records(model)))} of this model is factorized"
        )
    if not isinstance(records, Mapping):
        raise ContainerError(f"{path}: expected an object that describes factors, got {type(records).__name__}")
    known = dict(model.named_modules())
    for name, record in records.items():
        if factor_records(model).get(name) == record:
            continue
        if not isinstance(record, Mapping) or set(record) != {"kind", "ranks"} or record["kind"] not in KINDS:
            raise ContainerError(f"{path}: factors of {str(name)[:80]!r} must have kind ({', '.join(KINDS)}) and ranks")
        module = known.get(name)
        if module is None or not name or why_not_factorizable(module, record["kind"] == "corrected") is not None:
            similar = nearest(str(name), known)
            hint = f"; nearest is {similar[0]!r}" if similar else ""
            raise ContainerError(f"{path}: {type(model).__name__} has no layer {str(name)[:80]!r} to factorize{hint}")
        limits, ranks = max_ranks(module), record["ranks"]
        correction = record["kind"] == "corrected"
        limits = (min(weight_sizes(module)[:2]),) if correction else limits
        fits = isinstance(ranks, list) and len(ranks) == len(limits)
        if not fits or any(type(r) is not int or not 1 <= r <= m for r, m in zip(ranks, limits)):
            raise ContainerError(f"{path}: ranks of {name} are {str(ranks)[:80]}, at most {list(limits)} in this class")
        replace_with_factors_(
            model, name, Corrected.empty(module, ranks[0]) if correction else LowRank.empty(module, ranks), ranks
        )


def _factor_modules(module: Any, ranks: Sequence[int]) -> list[nn.Module]:
    O, I, _ = weight_sizes(module)
    like: dict[str, Any] = {"dtype": module.weight.dtype, "device": module.weight.device}
    if isinstance(module, nn.Linear) or is_hf_conv1d(module):
        return [nn.Linear(I, ranks[0], bias=False, **like), nn.Linear(ranks[0], O, bias=False, **like)]
    conv: Any = type(module) if type(module) in (nn.Conv1d, nn.Conv2d) else nn.Conv2d
    geometry = {n: getattr(module, n) for n in ("stride", "padding", "dilation")}
    if len(ranks) == 1:  # 1 x 1 kernel: strides come first, so that the second factor reads fewer pixels
        return [conv(I, ranks[0], 1, bias=False, **geometry, **like), conv(ranks[0], O, 1, bias=False, **like)]
    core = conv(ranks[0], ranks[1], module.kernel_size, bias=False, **geometry, **like)
    return [conv(I, ranks[0], 1, bias=False, **like), core, conv(ranks[1], O, 1, bias=False, **like)]
