"""Inputs of other sizes and values than the example's, made from the example: for checks of compiled models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.compiler.input_checks import InputSpec, check_inputs
from rarefy.compiler.shape_guards import parse

STEPS = (1, 2, 3, 4, 8, 16, 32, 64, -1, -2, -4, -8)  # what is added to a size of the example, until it is allowed
TRIES = 3  # sizes at which the model itself may raise an error
MODEL_ERRORS = (RuntimeError, ValueError, LookupError, AssertionError, TypeError)  # of a model at sizes it cannot take

DRAWN = (
    (1, 0),
    (-1, 0),
    (0.01, 0),
    (4, 0),
    (100, 100),
    (-100, -100),
)  # factors of values, and offsets: times the largest
MAX_NUMBER = 1e4  # of an example whose values are drawn and multiplied; masks that are added have larger ones

Sizes = dict[str, int]


def connected_sizes(specs: Sequence[Any], leaves: Sequence[Any]) -> list[Sizes]:
    """Return the open sizes of the example by name, in groups: equal sizes of one dimension change together."""
    groups: dict[tuple[int, int], Sizes] = {}
    for want, t in zip(specs, leaves):
        for d, name in enumerate(want.sizes if isinstance(want, InputSpec) else ()):
            if isinstance(name, str) and name.isidentifier():
                groups.setdefault((d, t.shape[d]), {})[name] = t.shape[d]
    return list(groups.values())


def second_sizes(
    compiled: Any, leaves: Sequence[Any], runs: Callable[[list[Any]], bool]
) -> Iterator[tuple[Sizes, list[Any]]]:
    """Yield other sizes and inputs of these sizes: first each group of open sizes alone, then all groups together.

    Args:
        compiled: a compiled model.
        leaves: the example's inputs, in the graph's order.
        runs: whether the model itself runs with inputs.
    """
    together: Sizes = {}
    groups = 0
    for group in connected_sizes(compiled.input_specs, leaves):
        other = _second_size(compiled, leaves, group, runs)
        if other is not None:
            yield other
            together |= other[0]
            groups += 1
    inputs = resized(compiled.input_specs, leaves, together) if groups > 1 else None
    if inputs is not None and is_allowed(compiled, inputs) and runs(inputs):
        yield together, inputs


def _second_size(
    compiled: Any, leaves: Sequence[Any], group: Sizes, runs: Callable[[list[Any]], bool]
) -> tuple[Sizes, list[Any]] | None:
    """Return the first other size of a group that graph and model take, None if there is none."""
    failures = 0
    (size,) = set(group.values())
    for n in dict.fromkeys([*(size + step for step in STEPS), 2 * size, 3 * size, size // 2]):
        sizes = dict.fromkeys(group, n)
        if n < 2 or n == size or not is_allowed(compiled, inputs := resized(compiled.input_specs, leaves, sizes)):
            continue
        if runs(inputs):
            return sizes, inputs
        failures += 1
        if failures == TRIES:
            break
    return None


def is_allowed(compiled: Any, leaves: Sequence[Any]) -> bool:
    """Return whether a graph takes inputs of these sizes."""
    names = [str(i) for i in range(len(leaves))]
    try:
        check_inputs(zip(names, compiled.input_specs, leaves), compiled.exported.ranges, compiled.guards)
    except DataError:
        return False
    return True


def resized(specs: Sequence[Any], leaves: Sequence[Any], sizes: Mapping[str, int]) -> list[Any]:
    """Return inputs with other sizes: their entries are repeated from the start, and masks end elsewhere. O(inputs)."""
    known = {n: s for group in connected_sizes(specs, leaves) for n, s in group.items()} | dict(sizes)
    return [_resized(t, want, known) for want, t in zip(specs, leaves)]


def _resized(t: Any, want: Any, sizes: Mapping[str, int]) -> Any:
    if not isinstance(want, InputSpec):
        return t
    old = t.shape
    for d, size in enumerate(want.sizes):
        n = size if isinstance(size, int) else parse(size).evaluate(sizes)
        if n != t.shape[d]:
            t = t.index_select(d, torch.arange(n) % t.shape[d])
    if t.shape != old and t.dim() == 2 and min(t.shape) > 1 and _is_mask(t):
        t = t.clone()
        t[0, t.shape[1] - max(1, t.shape[1] // 4) :] = 0
    return t


def other_values(leaves: Sequence[Any], example: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield inputs of the same sizes with other values: of the other sign, drawn from the example's range, small ones,
    and large ones, of one sign too. Masks end elsewhere. O(inputs)."""
    random = torch.Generator().manual_seed(0)
    yield [-t if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
    for scale, offset in DRAWN:
        yield [_drawn(t, of, scale, offset, random) if isinstance(t, Tensor) else t for t, of in zip(leaves, example)]


def _drawn(t: Tensor, of: Tensor, scale: float, offset: float, random: torch.Generator) -> Tensor:
    """Return a tensor of the sizes and type of `t` with values like those of another; numbers are changed."""
    if _is_mask(of) and t.dim() > 1 and t.shape[-1] > 1:
        ends = torch.randint(1, t.shape[-1] + 1, (*t.shape[:-1], 1), generator=random)
        return (torch.arange(t.shape[-1]) < ends).to(t.dtype)
    largest = math.inf if of.is_complex() else float(of.abs().max()) if of.is_floating_point() else 0.0
    if 0 < largest <= MAX_NUMBER:
        drawn = torch.rand(t.shape, generator=random, dtype=torch.float64) * (of.max() - of.min()) + of.min()
        return (scale * drawn + offset * max(largest, 1.0)).to(t.dtype)
    if of.is_floating_point() or of.is_complex():  # zeros, or a mask that is added to scores
        return of.flatten()[torch.randint(of.numel(), t.shape, generator=random)]
    return torch.randint(int(of.min()), int(of.max()) + 1, t.shape, generator=random).to(t.dtype)


def _is_mask(t: Tensor) -> bool:
    """Return whether a tensor has no other values than 0 and 1, as masks of tokens do."""
    return not t.is_floating_point() and not t.is_complex() and bool(((t == 0) | (t == 1)).all()) and bool(t.any())
