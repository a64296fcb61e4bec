"""Check that a compiled model returns what the model returns: on the example, and where open sizes are 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import OutputsDifferError, RarefyError
from rarefy.model.compare import relative_distance
from rarefy.model.rounding_noise import is_excused, noise_of_sums


def verify(
    model: nn.Module,
    compiled: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tolerance: float,
    unit_sizes: list[set[str]] | None = None,
) -> list[set[str]]:
    """Compare outputs on the example, and open the sizes that may be 1. One or two calls for each open size.

    torch.export takes every open size to be 2 or more. Where model and compiled model agree on a size of 1 too, it is
    allowed from then on.

    Args:
        model: the model.
        compiled: a `Compiled` made from it.
        args: the example's arguments.
        kwargs: the example's keywords.
        tolerance: largest relative distance of each output.
        unit_sizes: open sizes that an earlier call of this function allowed to be 1; they are only compared again.

    Returns:
        The names of sizes that may be 1, in sets of those that change together.

    Raises:
        ModelError: if outputs differ by more than the tolerance and more than by rounding errors of the inputs.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    for names in [set[str](), *(unit_sizes or [])]:
        values = _with_ones(compiled, leaves, names)
        d = distance(model, compiled, values, spec)
        if not d <= tolerance and _excused(model, values, spec, d):
            note = f"outputs differ by {d:.0%}, as rounding errors of the inputs move the model's own: judge it on data"
            known = [n for n in compiled.exported.notes if not n.startswith("outputs differ by")]
            compiled.exported.notes = (*known, note)
        elif not d <= tolerance:
            where = " where a size is 1" if names else ""
            raise OutputsDifferError(
                f"outputs of the compiled {type(model).__name__} differ{where}: relative distance {d:.2g}, "
                f"at most {tolerance:g} is allowed (a random model, outliers in 8 bits, or outputs at padding?)"
            )
    allowed: list[set[str]] = []
    for names in _connected_sizes(compiled, leaves) if unit_sizes is None else []:
        ranges = {n: compiled.exported.ranges[n] for n in names}
        compiled.exported.ranges.update({n: (1, high) for n, (_, high) in ranges.items()})
        try:
            agrees = distance(model, compiled, _with_ones(compiled, leaves, names), spec) <= tolerance
        except (RarefyError, RuntimeError, ValueError, LookupError, AssertionError):
            agrees = False  # the model itself may not accept a size of 1
        if agrees:
            allowed.append(names)
        else:
            compiled.exported.ranges.update(ranges)
    return allowed


def _excused(model: nn.Module, leaves: list[Any], spec: Any, difference: float) -> bool:
    """Return whether rounding errors of the inputs move the model's own outputs about as far."""

    def run(values: Any) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(values, spec)
        with torch.no_grad():
            return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]

    return is_excused(difference, noise_of_sums(run, leaves, run(leaves)))


def _connected_sizes(compiled: Any, leaves: list[Any]) -> list[set[str]]:
    """Return the open sizes from 2 up; sizes of one dimension that are equal in the example belong together."""
    groups: dict[tuple[int, int], set[str]] = {}
    for want, t in zip(compiled.input_specs, leaves):
        for d, s in enumerate(want.sizes if isinstance(t, Tensor) else ()):
            if compiled.exported.ranges.get(s, (0, 0))[0] == 2:
                groups.setdefault((d, t.shape[d]), set()).add(s)
    return list(groups.values())


def _with_ones(compiled: Any, leaves: list[Any], sizes: set[str]) -> list[Any]:
    """Return the example with these sizes cut to 1."""
    return [_narrowed(t, want, sizes) for want, t in zip(compiled.input_specs, leaves)]


def _narrowed(t: Any, want: Any, sizes: set[str]) -> Any:
    if not isinstance(t, Tensor):
        return t
    for d, s in enumerate(want.sizes):
        t = t.narrow(d, 0, 1) if s in sizes else t
    return t


def distance(model: nn.Module, compiled: Any, leaves: list[Any], spec: Any) -> float:
    """Return the largest relative distance over all outputs for one call; infinity where integers differ."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        want, got = (
            [t for t in pytree.tree_leaves(f(*args, **kwargs)) if isinstance(t, Tensor)] for f in (model, compiled)
        )
    if len(want) != len(got):
        return math.inf
    return max((_output_distance(a, b) for a, b in zip(got, want)), default=0.0)


def _output_distance(result: Tensor, expected: Tensor) -> float:
    d = relative_distance(result, expected)
    return math.inf if d and not expected.is_floating_point() else d
