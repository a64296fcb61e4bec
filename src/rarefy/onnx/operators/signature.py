"""How ONNX operators are written as functions.

Positional parameters are the operator's inputs in their order; one that is missing is None. Keyword-only parameters are
its attributes, with ONNX's defaults. An attribute that later versions turned into an input has the input's name. Two
keyword-only parameters are no attributes: `opset` is the version of the operators, `outputs` the number of outputs. A
function returns a tensor, or a tuple if there are several outputs.

A parameter annotated `Ints` or `Floats` gets a tuple of numbers, and one annotated `Number` an int or a float (or a
tensor, if the file computes it from other tensors).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from rarefy.common.errors import ModelError

Ints = tuple[int, ...]
Floats = tuple[float, ...]
Number = int | float | Tensor
Function = Callable[..., Any]


@dataclass(frozen=True)
class Signature:
    """What an operator's function takes.

    Attributes:
        inputs: the names of its inputs in their order.
        variadic: whether the last input may come any number of times.
        attributes: the names of its attributes, with `opset` and `outputs`.
        tuples: the inputs that are tuples of numbers.
        numbers: the inputs that are numbers.
        required: how many inputs it needs.
    """

    inputs: tuple[str, ...]
    variadic: bool
    attributes: tuple[str, ...]
    tuples: frozenset[str]
    numbers: frozenset[str]
    required: int


ANY_TENSORS = Signature((), True, (), frozenset(), frozenset(), 1)  # of torch's own functions


@cache
def signature_of(function: Function) -> Signature:
    """Return the signature of an operator's function."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C
        return ANY_TENSORS
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return Signature(
        tuple(p.name for p in positional),
        any(p.kind is p.VAR_POSITIONAL for p in parameters),
        tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        frozenset(p.name for p in parameters if str(p.annotation).startswith(("Ints", "Floats"))),
        frozenset(p.name for p in parameters if str(p.annotation).startswith("Number")),
        sum(p.default is p.empty for p in positional),
    )


def require(condition: object, message: str) -> None:
    """Raise ModelError unless the condition holds: what an operator cannot compute is refused."""
    if not condition:
        raise ModelError(message)


def axis_of(axis: int, rank: int) -> int:
    """Return an axis counted from the first."""
    return axis + rank if axis < 0 else axis


def axes_of(axes: Sequence[int], rank: int) -> list[int]:
    """Return axes counted from the first."""
    return [axis_of(int(a), rank) for a in axes]
