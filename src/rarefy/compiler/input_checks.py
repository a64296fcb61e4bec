"""What the inputs of a compiled graph must be: types, numbers of dimensions, sizes, and conditions on open sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError, OtherSizesError
from rarefy.compiler.shape_guards import MAX_SIZE, Guard, parse
from rarefy.compiler.torch_guards import from_torch

WHAT_TO_DO = "compile the model with an example of these sizes, or pad or cut the inputs"
MAX_SHOWN = 80  # characters of a value in an error


@dataclass(frozen=True)
class InputSpec:
    """What a tensor argument must be.

    Attributes:
        dtype: its type.
        sizes: its sizes; a name stands for a size that may differ between calls, an expression such as "2 * s1" for one
            that follows from others.
    """

    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    def __str__(self) -> str:
        sizes = ["any" if isinstance(s, str) else str(s) for s in self.sizes]
        return f"{str(self.dtype).removeprefix('torch.')} [{', '.join(sizes)}] on the CPU"


def input_spec(value: Any) -> Any:
    """Return the `InputSpec` of what export recorded for an argument; an argument that is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    return InputSpec(value.dtype, tuple(s if isinstance(s, int) else _open_size(s) for s in value.shape))


def _open_size(size: torch.SymInt) -> int | str:
    """Return the name or the expression of an open size; its number where it is none, or cannot be written."""
    text = from_torch(size.node.expr)
    return int(size.node.hint) if text is None else int(text) if text.isdigit() else text


def check_inputs(
    inputs: Iterable[tuple[str, Any, Any]], ranges: Mapping[str, tuple[int, int]], guards: Sequence[Guard]
) -> None:
    """Raise DataError unless inputs have the types and sizes that a graph takes. Microseconds.

    Args:
        inputs: of each input its name, its `InputSpec` or the constant that it must be, and its value.
        ranges: smallest and largest value of each open size.
        guards: conditions on open sizes.

    Raises:
        OtherSizesError: the model may take another branch at these sizes.
        DataError: an input does not fit in another way.
    """
    sizes: dict[str, int] = {}
    dependent: list[tuple[str, str, int]] = []
    places: dict[str, str] = {}
    for name, want, value in inputs:
        if not isinstance(want, InputSpec):
            if not _is_constant(value, want):
                raise DataError(
                    f"{name}: compiled for {_described(want)}, got {_described(value)}: this argument is no tensor in "
                    "the example, so it is fixed: compile the model with an example that has the other value"
                )
            continue
        _check_type(name, want, value)
        for d, (n, size) in enumerate(zip(value.shape, want.sizes)):
            place = f"{name}.shape[{d}]"
            if isinstance(size, int):
                if n != size:
                    got = f"{name}: expected {want}, got {list(value.shape)}: {n} is not {size}"
                    raise OtherSizesError(f"{got}: {WHAT_TO_DO}")
            elif not size.isidentifier():
                dependent.append((place, size, n))
            elif sizes.setdefault(size, n) != n:
                got = f"as in another input, got {n}: {list(value.shape)}"
                raise OtherSizesError(f"{name}: expected a size of {sizes[size]}, {got}: {WHAT_TO_DO}")
            else:
                places.setdefault(size, place)
                low, high = ranges.get(size, (1, MAX_SIZE))
                if not low <= n <= high:
                    limits = f"{low} or more" if high == MAX_SIZE else f"{low} to {high}"
                    got = f"{name}: expected {want}, got {list(value.shape)}: {n} is not {limits}"
                    raise OtherSizesError(f"{got}: {WHAT_TO_DO}")
    for place, expression, n in dependent:
        if parse(expression).evaluate(sizes) != n:
            wanted = f"{place} == {_readable(expression, places)}"
            raise OtherSizesError(f"expected {wanted}, got {place} = {n}{_values(expression, sizes, places)}")
    for guard in guards:
        if not guard.holds(sizes):
            got = _values(guard.text, sizes, places).removeprefix(", ")
            raise OtherSizesError(f"compiled for sizes with {_readable(guard.text, places)}, got {got}: {WHAT_TO_DO}")


def _is_constant(value: Any, want: Any) -> bool:
    """Return whether a value is the constant that a graph was traced with: 2 is neither True nor 2.0."""
    kind = type(value.item()) if isinstance(value, Tensor) and value.dim() == 0 else type(value)
    return kind is type(want) and bool(value == want or (value != value and want != want))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _check_type(name: str, want: InputSpec, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise DataError(f"{name}: expected {want}, got {type(value).__name__}")
    if value.dtype != want.dtype or value.device.type != "cpu" or value.dim() != len(want.sizes):
        got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
        raise DataError(f"{name}: expected {want}, got {got}")


def readable_guards(guards: Iterable[str], inputs: Iterable[tuple[str, Any]]) -> list[str]:
    """Return conditions with the inputs' names in place of the names of sizes.

    >>> readable_guards(["s1 % 4 == 0"], [("x", InputSpec(torch.float32, ("s0", "s1")))])
    ['x.shape[1] % 4 == 0']
    """
    places: dict[str, str] = {}
    for name, want in inputs:
        for d, size in enumerate(want.sizes if isinstance(want, InputSpec) else ()):
            places.setdefault(str(size), f"{name}.shape[{d}]")
    return [_readable(g, places) for g in guards]


def _readable(text: str, places: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda m: places.get(m[0], m[0]), text)


def _values(text: str, sizes: Mapping[str, int], places: Mapping[str, str]) -> str:
    names = sorted(parse(text).names & places.keys())
    return "".join(f", {places[n]} = {sizes[n]}" for n in names)
