"""The functions of `torch.nn.utils.prune`, with the same arguments and choices, on masks that every later stage knows:
`from rarefy.compat import torch_prune as prune`, and the rest of a program stays.

What differs: a mask is a parametrization of one bool a weight, so `module.weight` is always masked, and there are no
`weight_orig` and `weight_mask`. A parameter that torch has pruned already is taken over with its mask.
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

Choose = Callable[[Tensor, int], Tensor]  # (scores of what is left, how many go) -> the places of those that go


def identity(module: nn.Module, name: str) -> nn.Module:
    """Attach a mask that keeps everything.

    >>> masks(identity(nn.Linear(2, 2), "weight"))[""].all().item()
    True
    """
    layer = _layer(module, name)
    return _attach(layer, mask_or_dense(layer))


def random_unstructured(module: nn.Module, name: str, amount: float) -> nn.Module:
    """Prune random entries; `amount` of those that are left, or that many if it is a whole number.

    >>> m = random_unstructured(nn.Linear(4, 4), "weight", amount=3)
    >>> int((m.weight == 0).sum())
    3
    """
    return _entries(module, name, amount, None, _random)


def l1_unstructured(module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None) -> nn.Module:
    """Prune the entries of least magnitude, or of least `importance_scores` in magnitude.

    >>> m = l1_unstructured(l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "weight", 0.5)  # of what is left
    >>> int((m.weight == 0).sum())
    48
    """
    return _entries(module, name, amount, importance_scores, _least)


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
    """Prune the slices along a dimension whose Ln norm is least; n is a number, inf, -inf, "fro" or "nuc".

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
    """Prune entries of several parameters that compete with each other. `pruning_method` is torch's class
    (`L1Unstructured`, `RandomUnstructured`) or its name.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> global_unstructured([(m, "weight") for m in net], "L1Unstructured", amount=0.25)
    >>> sum(int((m.weight == 0).sum()) for m in net)
    8
    """
    pairs = list(parameters) if isinstance(parameters, Iterable) else []
    if not pairs or any(not isinstance(p, tuple | list) or len(p) != 2 for p in pairs):
        raise PatternError(f"parameters is a list of (module, name) pairs, got {parameters!r:.100}")
    method = pruning_method if isinstance(pruning_method, str) else getattr(pruning_method, "__name__", "")
    if method not in METHODS:
        raise PatternError(unknown("pruning method", method or repr(pruning_method), METHODS))
    layers = [_layer(m, n) for m, n in pairs]
    given = importance_scores or {}
    if not isinstance(given, Mapping):
        raise PatternError(f"importance_scores are {{(module, name): scores}}, got {type(given).__name__}")
    scores = torch.cat([_scores(l, given.get((m, n))).flatten() for l, (m, n) in zip(layers, pairs)])
    left = torch.cat([mask_or_dense(l).flatten() for l in layers])
    gone = _pick(scores, left, amount, METHODS[method])
    for layer, part in zip(layers, (left & ~gone).split([l.original.numel() for l in layers])):
        _attach(layer, part.view(layer.original.shape))


def custom_from_mask(module: nn.Module, name: str, mask: Tensor) -> nn.Module:
    """Attach a mask (of any dtype; 0 goes), on top of one that is there.

    >>> int((custom_from_mask(nn.Linear(2, 2), "weight", torch.eye(2)).weight == 0).sum())
    2
    """
    layer = _layer(module, name)
    if not isinstance(mask, Tensor) or mask.shape != layer.original.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PatternError(f"mask has the shape of {name}, {list(layer.original.shape)}; got {shape}")
    return _attach(layer, mask_or_dense(layer) & (mask != 0).to(layer.original.device))


def remove(module: nn.Module, name: str) -> nn.Module:
    """Write the zeros into the parameter and take the mask off.

    >>> is_pruned(remove(identity(nn.Linear(2, 2), "weight"), "weight"))
    False
    """
    layer = _layer(module, name)
    if get_mask(layer) is None:
        raise ModelError(
            f"Parameter '{name}' of {type(module).__name__} has no mask: it has to be pruned before remove"
        )
    fold_parameter_(layer)
    return module


def is_pruned(module: nn.Module) -> bool:
    """Return whether a module, or one in it, has a mask, of torch's or ours."""
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


def _scores(layer: Layer, given: Tensor | None) -> Tensor:
    if given is not None and (not isinstance(given, Tensor) or given.shape != layer.original.shape):
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise PatternError(
            f"importance_scores have the shape of {layer.param}, {list(layer.original.shape)}; got {got}"
        )
    return (layer.weight if given is None else given).detach()


def _entries(module: nn.Module, name: str, amount: Any, given: Tensor | None, choose: Choose) -> nn.Module:
    layer = _layer(module, name)
    left = mask_or_dense(layer)
    return _attach(layer, left & ~_pick(_scores(layer, given), left, amount, choose))


def _pick(scores: Tensor, left: Tensor, amount: Any, choose: Choose) -> Tensor:
    """Which of the entries that are left go."""
    inside, gone = scores[left], torch.zeros(left.numel(), dtype=torch.bool, device=left.device)
    places = choose(inside, how_many(amount, inside.numel()))
    gone[left.flatten().nonzero()[places, 0]] = True
    return gone.view(left.shape)


def _slices(
    module: nn.Module, name: str, amount: Any, dim: Any, given: Tensor | None, norm: Callable[[Tensor, int], Tensor]
) -> nn.Module:
    layer = _layer(module, name)
    scores, left = _scores(layer, given), mask_or_dense(layer)
    if scores.dim() < 2:
        raise PatternError(f"{name} has {scores.dim()} dimension: slices are of parameters with two or more")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -scores.dim() <= dim < scores.dim():
        raise PatternError(f"dim is a dimension of {name}, {-scores.dim()} to {scores.dim() - 1}, got {dim!r}")
    dim %= scores.dim()
    there = left.transpose(0, dim).flatten(1).any(1).nonzero()[:, 0]  # slices of which anything is left
    size = norm(scores.index_select(dim, there), dim).to(scores.device)
    kept = size.topk(len(there) - how_many(amount, len(there))).indices
    whole = torch.zeros(scores.shape[dim], dtype=torch.bool, device=scores.device)
    whole[there[kept]] = True
    return _attach(layer, left & whole.view([-1 if d == dim else 1 for d in range(scores.dim())]))


def _norm(t: Tensor, n: Any, dim: int) -> Tensor:
    others = [d for d in range(t.dim()) if d != dim]
    if n == "nuc" and t.dim() == 3:
        return torch.linalg.matrix_norm(t, "nuc", dim=(others[0], others[1]))
    if n == "fro" or (isinstance(n, int | float) and not isinstance(n, bool) and not math.isnan(n)):
        return torch.linalg.vector_norm(t, 2 if n == "fro" else n, dim=others)
    more = ", of three dimensions 'nuc'" if n == "nuc" else ""
    raise PatternError(f"n is the order of a norm: a number, inf, -inf or 'fro'{more}; got {n!r}")


def _random(scores: Tensor, count: int) -> Tensor:
    return torch.rand_like(scores).topk(count).indices  # the numbers that torch draws, and its choice among them


def _least(scores: Tensor, count: int) -> Tensor:
    return scores.abs().topk(count, largest=False).indices


METHODS: dict[str, Choose] = {"L1Unstructured": _least, "RandomUnstructured": _random}


def how_many(amount: Any, left: int) -> int:
    """Return how many of those that are left go: `amount` is a fraction of them, or a count if it is a whole number.

    >>> how_many(0.5, 7), how_many(3, 7)
    (4, 3)
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise PatternError(f"amount is a fraction of what is left (0.0 to 1.0) or a count, got {amount!r}")
    if isinstance(amount, int):
        if not 0 <= amount <= left:
            raise PatternError(f"amount={amount} is more than the {left} that are left, or below 0")
        return amount
    if not 0.0 <= amount <= 1.0:
        whole = math.isfinite(amount) and amount == int(amount) and amount > 1
        hint = f"; a count is a whole number: {int(amount)}" if whole else ""
        raise PatternError(f"amount is a fraction between 0.0 and 1.0, got {amount!r}{hint}")
    return round(amount * left)
