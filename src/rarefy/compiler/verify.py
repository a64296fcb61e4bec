"""Whether a compiled model does what the model does: on its example, and where sizes are one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError, RarefyError


def prove(
    model: nn.Module,
    made: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    apart: float,
    allowed: list[set[str]] | None = None,
) -> list[set[str]]:
    """Call both with the example; ModelError if their outputs are further apart than `apart` of their length.

    An exported graph took every open size for two or more. Where model and graph agree on a size of one too, it is
    allowed from then on; returns which. What was `allowed` so already must be as near. O(open sizes) calls.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    for names in [set[str](), *(allowed or [])]:
        fewer = [_narrowed(t, want, names) for want, t in zip(made.expected, leaves)]
        far = distance(model, made, fewer, spec)
        if not far <= apart:
            what = f"the compiled {type(model).__name__} returns other numbers"
            raise ModelError(f"{what}, {far:.2g} of their length apart{' where a size is one' if names else ''}")
    found: list[set[str]] = []
    for names in _together(made, leaves) if allowed is None else []:
        before = {n: made.exported.ranges[n] for n in names}
        made.exported.ranges.update({n: (1, most) for n, (_, most) in before.items()})
        fewer = [_narrowed(t, want, names) for want, t in zip(made.expected, leaves)]
        try:
            agrees = distance(model, made, fewer, spec) <= apart
        except (RarefyError, RuntimeError, ValueError, LookupError, AssertionError):
            agrees = False  # the model itself may not take it
        if agrees:
            found.append(names)
        else:
            made.exported.ranges.update(before)
    return found


def _together(made: Any, leaves: list[Any]) -> list[set[str]]:
    """Names of open sizes from two on: those that the example has at the same place of several inputs are one."""
    found: dict[tuple[int, int], set[str]] = {}
    for want, t in zip(made.expected, leaves):
        for d, s in enumerate(want.sizes if isinstance(t, Tensor) else ()):
            if made.exported.ranges.get(s, (0, 0))[0] == 2:
                found.setdefault((d, t.shape[d]), set()).add(s)
    return list(found.values())


def _narrowed(t: Any, want: Any, sizes: set[str]) -> Any:
    if not isinstance(t, Tensor):
        return t
    for d, s in enumerate(want.sizes):
        t = t.narrow(d, 0, 1) if s in sizes else t
    return t


def distance(model: nn.Module, made: Any, leaves: list[Any], spec: Any) -> float:
    """Return how far apart outputs are, in the length of the model's: the largest over tensors."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        want, got = (
            [t for t in pytree.tree_leaves(f(*args, **kwargs)) if isinstance(t, Tensor)] for f in (model, made)
        )
    if [t.shape for t in want] != [t.shape for t in got]:
        return float("inf")
    return max((apart(a, b) for a, b in zip(want, got)), default=0.0)


def apart(a: Tensor, b: Tensor) -> float:
    """Return how far two tensors are apart, in the length of the first."""
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    length = float(a.double().norm())
    return float((a.double() - b.double()).norm()) / (length if length > 0 else 1.0)
