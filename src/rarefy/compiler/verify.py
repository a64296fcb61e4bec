"""Check that a compiled model returns what the model returns: on the example, at other sizes, and where sizes are 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import OutputsDifferError, RarefyError
from rarefy.compiler.input_checks import readable_guards
from rarefy.compiler.other_sizes import (
    MODEL_ERRORS,
    Sizes,
    connected_sizes,
    is_allowed,
    other_values,
    resized,
    second_sizes,
)
from rarefy.model.compare import relative_distance
from rarefy.model.rounding_noise import is_excused, noise_of_sums

GROSS = 0.5  # relative distance at other sizes than the example's, from which rounding to 8 bits explains no difference
WRONG = 1.0  # the same where a size is 1: a single sample may have outputs near 0


@dataclass(frozen=True)
class CheckedSizes:
    """Sizes at which outputs were compared with the model's, and how far they are from them.

    Attributes:
        error: largest relative distance of an output on the example.
        ones: open sizes that may be 1, in groups that change together.
        others: other sizes than the example's.
    """

    error: float
    ones: tuple[Sizes, ...] = ()
    others: tuple[Sizes, ...] = ()


def verify(
    model: nn.Module,
    compiled: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tolerance: float,
    checked: CheckedSizes | None = None,
    padding: bool = True,
) -> CheckedSizes:
    """Compare outputs on the example, open the sizes that may be 1, and compare at another size of each open dimension.

    torch.export takes every open size to be 2 or more. Where model and compiled model agree on a size of 1 too, it is
    allowed from then on. A size at whose other value they differ is fixed to the example's, with a note.

    Args:
        model: the model.
        compiled: a `Compiled` made from it.
        args: the example's arguments.
        kwargs: the example's keywords.
        tolerance: largest relative distance of each output.
        checked: what an earlier call of this function returned: these sizes are only compared again.
        padding: False: on the example, tokens that `attention_mask` hides are not compared.

    Returns:
        The sizes at which outputs agree.

    Raises:
        ModelError: if outputs on the example differ by more than the tolerance and more than by rounding errors of the
            inputs.

    Cost: one to three calls for each open size.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    first, ranges = checked is None, compiled.exported.ranges
    candidates = _close_unit_sizes(compiled, leaves) if first else []
    error = _compare_example(model, compiled, leaves, spec, tolerance, padding)
    for sizes in () if checked is None else checked.ones:
        values, allowed = resized(compiled.input_specs, leaves, sizes), max(tolerance, WRONG)
        _compare_example(model, compiled, values, spec, allowed, padding, " where a size is 1")
    ones: list[Sizes] = []
    for group in candidates:
        before = {n: ranges[n] for n in group}
        ranges.update({n: (1, high) for n, (_, high) in before.items()})
        sizes = dict.fromkeys(group, 1)
        if _agrees(model, compiled, leaves, spec, sizes, tolerance):
            ones.append(sizes)
        else:
            ranges.update(before)
    others = _compare_elsewhere(model, compiled, leaves, spec, max(tolerance, 0 if first else GROSS), checked)
    return CheckedSizes(error, tuple(ones), others) if checked is None else replace(checked, error=error)


def _close_unit_sizes(compiled: Any, leaves: list[Any]) -> list[Sizes]:
    """Let no open size be 1 before that is compared; return those that may be, in groups that change together."""
    ranges = compiled.exported.ranges
    groups = [g for g in connected_sizes(compiled.input_specs, leaves) if all(ranges[n][0] < 2 for n in g)]
    ranges.update({n: (max(low, 2), high) for n, (low, high) in ranges.items()})
    return groups


def _compare_example(
    model: nn.Module, compiled: Any, leaves: list[Any], spec: Any, tolerance: float, padding: bool, where: str = ""
) -> float:
    """Return the distance of outputs from the model's; OutputsDifferError where it is more than the tolerance, and more
    than rounding errors make it. `where` says in the error at which sizes."""
    d = distance(model, compiled, leaves, spec, padding)
    if d <= tolerance:
        return d
    if not _excused(model, leaves, spec, d):
        raise OutputsDifferError(
            f"outputs of the compiled {type(model).__name__} differ{where}: relative distance {d:.2g}, "
            f"at most {tolerance:g} is allowed (a random model, outliers in 8 bits, or outputs at padding?)"
        )
    note = f"outputs differ by {d:.0%}, as rounding errors of the inputs move the model's own: judge it on data"
    known = [n for n in compiled.exported.notes if not n.startswith("outputs differ by")]
    compiled.exported.notes = (*known, note)
    return d


def _agrees(model: nn.Module, compiled: Any, leaves: list[Any], spec: Any, sizes: Sizes, tolerance: float) -> bool:
    """Return whether model and compiled model run and agree at other sizes, with each of the other open sizes too, and
    for other values: comparisons and maxima may hide a difference for those of the example."""
    inputs = resized(compiled.input_specs, leaves, sizes)
    try:
        if not distance(model, compiled, inputs, spec) <= tolerance:
            return False
        others = [other for other, _ in second_sizes(compiled, inputs, lambda _: True)]
        of_sizes = (resized(compiled.input_specs, inputs, {**other, **sizes}) for other in others)
        for values in (*of_sizes, *other_values(inputs, leaves)):
            if _runs(model, values, spec) and is_allowed(compiled, values):
                d = distance(model, compiled, values, spec)
                if not d <= tolerance and not _excused(model, values, spec, d):
                    return False
    except (RarefyError, *MODEL_ERRORS):
        return False  # the model itself may not accept a size of 1
    return True


def _compare_elsewhere(
    model: nn.Module, compiled: Any, leaves: list[Any], spec: Any, tolerance: float, checked: CheckedSizes | None
) -> tuple[Sizes, ...]:
    """Compare at other sizes, and fix those to the example's at which outputs differ; return the sizes that agree."""
    if checked is None:
        pairs = second_sizes(compiled, leaves, lambda values: _runs(model, values, spec))
    else:
        pairs = iter([(sizes, resized(compiled.input_specs, leaves, sizes)) for sizes in checked.others])
    example = {n: s for group in connected_sizes(compiled.input_specs, leaves) for n, s in group.items()}
    agree: list[Sizes] = []
    for sizes, values in pairs:
        if not is_allowed(compiled, values):
            continue  # fixed by now
        d = distance(model, compiled, values, spec)
        if d <= tolerance or _excused(model, values, spec, d):
            agree.append(sizes)
            continue
        fixed = [f"{n} == {example[n]}" for n in sizes]
        compiled.add_guards(fixed)
        where = ", ".join(readable_guards((f"{n} = {s}" for n, s in sizes.items()), compiled.named_specs()))
        compiled.exported.notes += (f"sizes are fixed to the example's: outputs differ by {d:.0%} at {where}",)
    return tuple(agree)


def _runs(model: nn.Module, leaves: list[Any], spec: Any) -> bool:
    """Return whether the model itself runs with inputs."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except MODEL_ERRORS:
        return False
    return True


def _excused(model: nn.Module, leaves: list[Any], spec: Any, difference: float) -> bool:
    """Return whether rounding errors of the inputs move the model's own outputs about as far."""

    def run(values: Any) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(values, spec)
        with torch.no_grad():
            return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]

    return is_excused(difference, noise_of_sums(run, leaves, run(leaves)))


def distance(model: nn.Module, compiled: Any, leaves: list[Any], spec: Any, padding: bool = True) -> float:
    """Return the largest relative distance over all outputs for one call; infinity where integers differ.

    Outputs for each token are compared at tokens that `attention_mask` hides only with `padding`.
    """
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        want, got = (
            [t for t in pytree.tree_leaves(f(*args, **kwargs)) if isinstance(t, Tensor)] for f in (model, compiled)
        )
    if len(want) != len(got):
        return math.inf
    real = None if padding else _real_tokens(compiled, leaves)
    return max((_output_distance(a, b, real) for a, b in zip(got, want)), default=0.0)


def _real_tokens(compiled: Any, leaves: list[Any]) -> Tensor | None:
    """Return which tokens `attention_mask` does not hide, bool [batch, tokens]; None without such an input."""
    for (name, _), t in zip(compiled.named_specs(), leaves):
        if name.endswith("attention_mask") and isinstance(t, Tensor) and t.dim() == 2 and not t.is_floating_point():
            return t != 0
    return None


def _output_distance(result: Tensor, expected: Tensor, real: Tensor | None) -> float:
    if real is not None and result.shape == expected.shape and expected.shape[:2] == real.shape:
        result, expected = result[real], expected[real]
    d = relative_distance(result, expected)
    return math.inf if d and not expected.is_floating_point() else d
