"""Calls of a compiled model by name: with numpy arrays, or with tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.common.errors import DataError, unknown
from rarefy.model.nesting import children_of


def by_position(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], in_spec: Any, names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which those by position in the example are by position, though given by name.

    Args:
        args: the arguments by position.
        kwargs: the arguments by keyword.
        in_spec: torch's pytree spec of the example's arguments.
        names: the names of the example's leaves.
    """
    missing = positional_names(in_spec, names)[len(args) :]
    if not missing or not all(n in kwargs for n in missing):
        return args, dict(kwargs)
    return (*args, *(kwargs[n] for n in missing)), {n: v for n, v in kwargs.items() if n not in missing}


def positional_names(in_spec: Any, names: Sequence[str]) -> list[str]:
    """Return the names of the example's arguments by position; [] where one is nested, and has several."""
    positional = children_of(children_of(in_spec)[0])
    return list(names[: len(positional)]) if all(s.num_leaves == 1 for s in positional) else []


def ordered_inputs(feed: Any, names: Sequence[str]) -> list[Any]:
    """Return inputs given by name in the order of the names; DataError unless there is one for each name."""
    if not isinstance(feed, Mapping):
        example = ", ".join(f"{n!r}: array" for n in names)
        raise DataError(f"expected a dict of numpy arrays by name, {{{example}}}, got {type(feed).__name__}")
    wrong = next((n for n in feed if n not in names), None)
    if wrong is not None:
        raise DataError(unknown("input", wrong, names))
    missing = [n for n in names if n not in feed]
    if missing:
        raise DataError(f"missing {', '.join(missing)}: the model takes {', '.join(names)}")
    return [feed[n] for n in names]


def check_output_names(wanted: Any, names: Sequence[str]) -> list[str]:
    """Return the outputs that a caller wants, all for None or an empty list; DataError for unknown names."""
    if wanted is None:
        return list(names)
    if not isinstance(wanted, list | tuple):
        raise DataError(f"output names: expected a list of names or None, got {type(wanted).__name__}")
    wrong = next((n for n in wanted if n not in names), None)
    if wrong is not None:
        raise DataError(unknown("output", wrong, names))
    return list(wanted or names)


def to_tensor(name: str, value: Any, dtype: torch.dtype, expected: str) -> Tensor:
    """Return a numpy array as a tensor that shares its memory where it can; DataError for another type.

    Args:
        name: what messages call it.
        value: the array. For bfloat16, which numpy does not have, one of float32.
        dtype: the type that it must have.
        expected: what messages say that it must be.
    """
    if not isinstance(value, np.ndarray | np.generic):
        raise DataError(f"{name}: expected a numpy array, {expected}, got {type(value).__name__}")
    array = np.asarray(value)
    wanted = "float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    if array.dtype.name != wanted:
        got = f"{array.dtype.name} {list(array.shape)}"
        raise DataError(f"{name}: expected {expected}, got {got}: convert it with .astype({wanted!r})")
    if not (array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative):
        array = np.array(array, array.dtype.newbyteorder("="), order="C")  # torch warns of read-only memory
    return torch.from_numpy(array).to(dtype)


def to_array(value: Any) -> np.ndarray:
    """Return an output as a numpy array; bfloat16 as float32."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
