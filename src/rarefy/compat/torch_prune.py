"""A drop-in replacement for `torch.nn.utils.prune`: the same functions, arguments and results.

Write `from rarefy.compat import torch_prune as prune`; the rest of a program stays unchanged. Masks are Rarefy's own,
so every later stage keeps them.

Difference: a mask is a torch parametrization with one bool per weight. `module.weight` is always masked, and there are
no `weight_orig` and `weight_mask` attributes. A parameter that torch has pruned already keeps its mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from rarefy.common.errors import ModelError, PatternError, unknown
from rarefy.model.layers import Layer, parameter_layer
from rarefy.model.masks import fold_parameter_, get_mask, mask_or_dense, masks, set_mask_

Choose = Callable[[Tensor, int], Tensor]  # (scores of the remaining entries, count) -> positions to prune


def identity(module: nn.Module, name: str) -> nn.Module:
    """Attach a mask without zeros.

    >>> masks(identity(nn.Linear(2, 2), "weight"))[""].all().item()
    True
    """
    layer = _layer(module, name)
    return _attach(layer, mask_or_dense(layer))


def random_unstructured(module: nn.Module, name: str, amount: float) -> nn.Module:
    """Prune random entries: a fraction `amount` of the remaining ones, or that many if it is an int.

    >>> m = random_unstructured(nn.Linear(4, 4), "weight", amount=3)
    >>> int((m.weight == 0).sum())
    3
    """
    return _entries(module, name, amount, None, _random)


def l1_unstructured(module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None) -> nn.Module:
    """Prune the entries with the smallest magnitude, or with the smallest `importance_scores` in magnitude.

    >>> m = l1_unstructured(l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "weight", 0.5)  # of the remaining ones
    >>> int((m.weight == 0).sum())
    48
    """
    return _entries(module, name, amount, importance_scores, _smallest)


def random_structured(module: nn.Module, name: str, amount: float, dim: int) -> nn.Module:
    """Prune random slices along a dimension.

    >>> m = random_structured(nn.Conv2d(3, 8, 3), "weight", amount=2, dim=0)
    >>> int((m.weight.flatten(1) == 0).all(1).sum())
    2
    """
    return _slices(module, name, amount, dim, None, lambda t, d: torch.rand(t.shape[d]))


def ln_structured(
    module: nn.Module, name: str, amount: float, n: Any, dim: int, importance_scores: Tensor | None = None
) -> nn.Module:
    """Prune the slices along a dimension with the smallest Ln norm; n is a number, inf, -inf, "fro" or "nuc".

    >>> m = ln_structured(nn.Linear(8, 4), "weight", amount=0.5, n=2, dim=1)
    >>> int((m.weight == 0).all(0).sum())
    4
    """
    return _slices(module, name, amount, dim, importance_scores, lambda t, d: _norm(t, n, d))


def global_unstructured(
    parameters: Iterable[tuple[nn.Module, str]],
    pruning_method: Any,
    importance_scores: Mapping[tuple[nn.Module, str], Tensor] | None = None,
    *,
    amount: float,
) -> None:
    """Prune the entries with the smallest scores among all parameters. `pruning_method` is torch's class
    (`L1Unstructured`, `RandomUnstructured`) or its name.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> global_unstructured([(m, "weight") for m in net], "L1Unstructured", amount=0.25)
    >>> sum(int((m.weight == 0).sum()) for m in net)
    8
    """
    pairs = list(parameters) if isinstance(parameters, Iterable) else []
    if not pairs or any(not isinstance(p, tuple | list) or len(p) != 2 for p in pairs):
        raise PatternError(f"parameters: expected a list of (module, name) pairs, got {parameters!r:.100}")
    method = pruning_method if isinstance(pruning_method, str) else getattr(pruning_method, "__name__", "")
    if method not in METHODS:
        raise PatternError(unknown("pruning method", method or repr(pruning_method), METHODS))
    layers = [_layer(m, n) for m, n in pairs]
    importance = importance_scores or {}
    if not isinstance(importance, Mapping):
        raise PatternError(
            f"importance_scores: expected a dict {{(module, name): scores}}, got {type(importance).__name__}"
        )
    scores = torch.cat([_scores(l, importance.get((m, n))).flatten() for l, (m, n) in zip(layers, pairs)])
    remaining = torch.cat([mask_or_dense(l).flatten() for l in layers])
    pruned = _pick(scores, remaining, amount, METHODS[method])
    for layer, part in zip(layers, (remaining & ~pruned).split([l.original.numel() for l in layers])):
        _attach(layer, part.view(layer.original.shape))


def custom_from_mask(module: nn.Module, name: str, mask: Tensor) -> nn.Module:
    """Attach a mask of any dtype, in which 0 means pruned; an existing mask is combined with it.

    >>> int((custom_from_mask(nn.Linear(2, 2), "weight", torch.eye(2)).weight == 0).sum())
    2
    """
    layer = _layer(module, name)
    if not isinstance(mask, Tensor) or mask.shape != layer.original.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PatternError(f"mask: expected the shape of {name}, {list(layer.original.shape)}, got {shape}")
    return _attach(layer, mask_or_dense(layer) & (mask != 0).to(layer.original.device))


def remove(module: nn.Module, name: str) -> nn.Module:
    """Write the zeros into the parameter and remove the mask.

    >>> is_pruned(remove(identity(nn.Linear(2, 2), "weight"), "weight"))
    False
    """
    layer = _layer(module, name)
    if get_mask(layer) is None:
        raise ModelError(f"Parameter '{name}' of {type(module).__name__} has no mask: prune it before calling remove")
    fold_parameter_(layer)
    return module


def is_pruned(module: nn.Module) -> bool:
    """Return whether the module or a submodule has a mask, torch's or Rarefy's."""
    return bool(masks(module)) or torch_prune.is_pruned(module)


def _layer(module: nn.Module, name: str) -> Layer:
    if isinstance(module, nn.Module) and f"{name}_mask" in module._buffers:
        mask = module.get_buffer(f"{name}_mask").bool()
        torch_prune.remove(module, name)
        set_mask_(parameter_layer(module, name), mask)
    return parameter_layer(module, name)


def _attach(layer: Layer, mask: Tensor) -> nn.Module:
    set_mask_(layer, mask)
    return layer.module


def _scores(layer: Layer, importance: Tensor | None) -> Tensor:
    if importance is not None and (not isinstance(importance, Tensor) or importance.shape != layer.original.shape):
        got = list(importance.shape) if isinstance(importance, Tensor) else type(importance).__name__
        raise PatternError(
            f"importance_scores: expected the shape of {layer.param}, {list(layer.original.shape)}, got {got}"
        )
    return (layer.weight if importance is None else importance).detach()


def _entries(module: nn.Module, name: str, amount: Any, importance: Tensor | None, choose: Choose) -> nn.Module:
    layer = _layer(module, name)
    remaining = mask_or_dense(layer)
    return _attach(layer, remaining & ~_pick(_scores(layer, importance), remaining, amount, choose))


def _pick(scores: Tensor, remaining: Tensor, amount: Any, choose: Choose) -> Tensor:
    """Return a bool mask of the remaining entries that are pruned now."""
    inside, pruned = scores[remaining], torch.zeros(remaining.numel(), dtype=torch.bool, device=remaining.device)
    positions = choose(inside, how_many(amount, inside.numel()))
    pruned[remaining.flatten().nonzero()[positions, 0]] = True
    return pruned.view(remaining.shape)


def _slices(
    module: nn.Module,
    name: str,
    amount: Any,
    dim: Any,
    importance: Tensor | None,
    norm: Callable[[Tensor, int], Tensor],
) -> nn.Module:
    layer = _layer(module, name)
    scores, remaining = _scores(layer, importance), mask_or_dense(layer)
    if scores.dim() < 2:
        raise PatternError(f"{name} has {scores.dim()} dimension; structured pruning needs at least two")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -scores.dim() <= dim < scores.dim():
        raise PatternError(
            f"dim: expected a dimension of {name} between {-scores.dim()} and {scores.dim() - 1}, got {dim!r}"
        )
    dim %= scores.dim()
    candidates = (
        remaining.transpose(0, dim).flatten(1).any(1).nonzero()[:, 0]
    )  # slices with at least one remaining entry
    size = norm(scores.index_select(dim, candidates), dim).to(scores.device)
    largest = size.topk(len(candidates) - how_many(amount, len(candidates))).indices
    whole = torch.zeros(scores.shape[dim], dtype=torch.bool, device=scores.device)
    whole[candidates[largest]] = True
    return _attach(layer, remaining & whole.view([-1 if d == dim else 1 for d in range(scores.dim())]))


def _norm(t: Tensor, n: Any, dim: int) -> Tensor:
    others = [d for d in range(t.dim()) if d != dim]
    if n == "nuc" and t.dim() == 3:
        return torch.linalg.matrix_norm(t, "nuc", dim=(others[0], others[1]))
    if n == "fro" or (isinstance(n, int | float) and not isinstance(n, bool) and not math.isnan(n)):
        return torch.linalg.vector_norm(t, 2 if n == "fro" else n, dim=others)
    more = ", and 'nuc' for three dimensions" if n == "nuc" else ""
    raise PatternError(f"n: expected a norm order (a number, inf, -inf or 'fro'{more}), got {n!r}")


def _random(scores: Tensor, count: int) -> Tensor:
    return torch.rand_like(scores).topk(count).indices  # the same random numbers and choice as in torch


def _smallest(scores: Tensor, count: int) -> Tensor:
    return scores.abs().topk(count, largest=False).indices


METHODS: dict[str, Choose] = {"L1Unstructured": _smallest, "RandomUnstructured": _random}


def how_many(amount: Any, remaining: int) -> int:
    """Return how many of the remaining entries to prune: `amount` is a fraction of them, or a count if it is an int.

    >>> how_many(0.5, 7), how_many(3, 7)
    (4, 3)
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise PatternError(f"amount: expected a fraction between 0.0 and 1.0 or a count, got {amount!r}")
    if isinstance(amount, int):
        if not 0 <= amount <= remaining:
            raise PatternError(
                f"amount: expected a count between 0 and {remaining} (the remaining entries), got {amount}"
            )
        return amount
    if not 0.0 <= amount <= 1.0:
        whole = math.isfinite(amount) and amount == int(amount) and amount > 1
        hint = f"; write a count as an int: {int(amount)}" if whole else ""
        raise PatternError(f"amount: expected a fraction between 0.0 and 1.0, got {amount!r}{hint}")
    return round(amount * remaining)
