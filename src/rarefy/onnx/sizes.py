"""Sizes that an ONNX graph computes: known ones are ints, open ones nodes of the torch graph.

Exporters write shapes as small graphs: Shape, Gather, Mul, Concat, Reshape. Each element of such a vector is followed
by itself, so that what the file fixes becomes a constant, and what it leaves open stays a size of a tensor, which
torch.export can follow.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

Item = int | float | bool | fx.Node
Emit = Callable[..., fx.Node]  # adds a call of (function, *arguments) to the graph
MAX_ITEMS = 64  # of a vector that is followed element by element
NUMBERS = (int, float, bool)


@dataclass(frozen=True)
class Sizes:
    """A vector of sizes, or a single one, with the type of the tensor that it stands for."""

    items: tuple[Item, ...]
    scalar: bool = False
    dtype: torch.dtype = torch.int64

    def known(self) -> Tensor | None:
        """Return the tensor if all sizes are known."""
        if not all(isinstance(i, NUMBERS) for i in self.items):
            return None
        values = torch.tensor(list(self.items), dtype=self.dtype)
        return values.reshape(()) if self.scalar else values


def as_sizes(value: Any) -> Sizes | None:
    """Return sizes of a constant that may be one, of sizes themselves; None for other values."""
    if isinstance(value, Sizes):
        return value
    if isinstance(value, Tensor) and value.dim() < 2 and value.numel() <= MAX_ITEMS and not value.is_complex():
        return Sizes(tuple(value.reshape(-1).tolist()), value.dim() == 0, value.dtype)
    return None


def truncated(x: Any) -> Any:
    """Return a number without its fraction."""
    return torch.sym_int(x) if isinstance(x, torch.SymFloat) else int(x)


def quotient(a: Any, b: Any) -> Any:
    """Divide: floats, or sizes without the fraction."""
    if isinstance(a, int | torch.SymInt) and isinstance(b, int | torch.SymInt):
        return -(-a // b) if isinstance(a, int) and isinstance(b, int) and (a < 0) != (b < 0) else a // b
    return single(a / b)


def single(x: Any) -> Any:
    """Round a float to 32 bits, as ONNX computes; not the open ones of an export."""
    return float(np.float32(x)) if isinstance(x, float) else x


def product(a: Any, b: Any) -> Any:
    """Return a b, rounded as `single`."""
    return single(a * b)


def floor(x: Any) -> Any:
    return float(math.floor(x)) if isinstance(x, float) else torch.sym_float(torch.sym_int(x))


def ceil(x: Any) -> Any:
    return float(math.ceil(x)) if isinstance(x, float) else -floor(-x)


def choose(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


def negated(x: Any) -> Any:
    return not x


def to_bool(x: Any) -> Any:
    return x != 0


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": product,
    "Div": quotient,
    "Mod": operator.mod,
    "Neg": operator.neg,
    "Floor": floor,
    "Ceil": ceil,
    "Min": torch.sym_min,
    "Max": torch.sym_max,
    "Equal": operator.eq,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "And": operator.and_,
    "Or": operator.or_,
    "Not": negated,
    "Where": choose,
}
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not")
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceProd": operator.mul,
    "ReduceSum": operator.add,
    "ReduceMin": torch.sym_min,
    "ReduceMax": torch.sym_max,
}


class SizeRules:
    """The operators on sizes; a rule returns None where the result is no vector of sizes.

    Attributes:
        emit: adds a call to the torch graph.
        counts: nodes that are sizes of tensors, so never negative.
    """

    def __init__(self, emit: Emit):
        self.emit = emit
        self.counts: set[fx.Node] = set()
        self.calls: dict[tuple[Any, ...], fx.Node] = {}
        self.moving: dict[str, Callable[..., Sizes | None]] = {
            "Gather": self._gather,
            "Slice": self._slice,
            "Concat": self._concat,
            "Unsqueeze": self._unsqueeze,
            "Squeeze": self._squeeze,
            "Reshape": self._reshape,
            "Identity": lambda inputs, attributes: inputs[0],
            "Cast": self._cast,
        }

    def compute(self, kind: str, inputs: Sequence[Sizes | None], attributes: dict[str, Any]) -> Sizes | None:
        """Return the sizes that an operator computes from sizes; None if it is none of sizes."""
        if any(i is None for i in inputs[:1]):
            return None
        if kind in self.moving:
            return self.moving[kind](inputs, attributes)
        if any(i is None for i in inputs):
            return None
        if kind in ELEMENTWISE:
            return self._elementwise(kind, inputs)  # type: ignore[arg-type]
        if kind in REDUCTIONS and inputs[0] is not None:
            return self._reduce(kind, inputs[0], attributes)
        return None

    def size(self, x: Any, dim: int) -> fx.Node:
        """Return the node of an open size of a tensor."""
        node = self._call("size", x, dim)
        self.counts.add(node)
        return node

    def apply(self, function: Callable[..., Any], *items: Item) -> Item:
        """Compute a function of sizes now if all are known, else in the graph."""
        if all(isinstance(i, NUMBERS) for i in items):
            return function(*items)
        known = self._shortcut(function, items)
        if known is not None:
            return known
        node = self._call(function, *items)
        if function in (operator.add, product, torch.sym_max, operator.mul) and all(map(self._is_count, items)):
            self.counts.add(node)
        return node

    def _call(self, function: Any, *items: Any) -> fx.Node:
        """Return the one node that computes a function of sizes."""
        key = (function, *((type(i), i) for i in items))
        if key not in self.calls:
            self.calls[key] = self.emit(function, *items)
        return self.calls[key]

    def _is_count(self, item: Item) -> bool:
        return item >= 0 if isinstance(item, NUMBERS) else item in self.counts

    def _shortcut(self, function: Callable[..., Any], items: tuple[Item, ...]) -> Item | None:
        """Return what is known without the value of a size: it is not negative, and one of it is itself."""
        if function is choose and isinstance(items[0], NUMBERS):
            return items[1] if items[0] else items[2]
        if function in (product, quotient, operator.mul) and isinstance(items[1], int) and items[1] == 1:
            return items[0]
        if function in (product, operator.mul) and isinstance(items[0], int) and items[0] == 1:
            return items[1]
        if function is operator.eq:
            for a, b in (items, items[::-1]):
                if isinstance(a, NUMBERS) and a < 0 and self._is_count(b):
                    return False
            if items[0] is items[1]:
                return True
        return None

    def _elementwise(self, kind: str, inputs: Sequence[Sizes]) -> Sizes | None:
        if kind == "Where" and len(inputs) != 3:
            return None
        count = max(len(i.items) for i in inputs)
        if any(len(i.items) not in (1, count) for i in inputs):
            return None
        columns = [i.items if len(i.items) == count else i.items * count for i in inputs]
        items: list[Item] = []
        for row in zip(*columns):
            value = row[0]
            if kind in ("Min", "Max") and len(row) > 1:
                for other in row[1:]:
                    value = self.apply(ELEMENTWISE[kind], value, other)
            else:
                value = self.apply(ELEMENTWISE[kind], *row)
            items.append(value)
        dtype = torch.bool if kind in COMPARISONS else inputs[-1].dtype
        return Sizes(tuple(items), all(i.scalar for i in inputs), dtype)

    def _reduce(self, kind: str, x: Sizes, attributes: dict[str, Any]) -> Sizes | None:
        if not x.items:
            return None
        value = x.items[0]
        for item in x.items[1:]:
            value = self.apply(REDUCTIONS[kind], value, item)
        return Sizes((value,), not attributes.get("keepdims", 1), x.dtype)

    def _gather(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> Sizes | None:
        x, indices = inputs
        if x.scalar or indices is None or not all(isinstance(i, int) for i in indices.items):
            return None
        if not all(-len(x.items) <= i < len(x.items) for i in indices.items):
            return None
        return Sizes(tuple(x.items[i] for i in indices.items), indices.scalar, x.dtype)

    def _slice(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> Sizes | None:
        x, *parts = inputs
        values = [list(p.items) if p is not None else None for p in parts]
        starts, ends = (values[i] if len(values) > i else attributes.get(n) for i, n in enumerate(("starts", "ends")))
        steps = values[3] if len(values) > 3 and values[3] else [1]
        if x.scalar or not starts or not ends or not all(isinstance(i, int) for i in (*starts, *ends, *steps)):
            return None
        return Sizes(x.items[slice(starts[0], ends[0], steps[0])], False, x.dtype)

    def _concat(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> Sizes | None:
        if any(i is None or i.scalar for i in inputs):
            return None
        return Sizes(tuple(item for i in inputs for item in i.items), False, inputs[0].dtype)

    def _unsqueeze(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> Sizes | None:
        return Sizes(inputs[0].items, False, inputs[0].dtype) if inputs[0].scalar else None

    def _squeeze(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> Sizes | None:
        return Sizes(inputs[0].items, True, inputs[0].dtype) if len(inputs[0].items) == 1 else None

    def _reshape(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> Sizes | None:
        x, shape = inputs
        if shape is None or shape.scalar or len(shape.items) > 1:
            return None
        whole = not shape.items or shape.items[0] in (-1, len(x.items))
        if not whole or (not shape.items and len(x.items) != 1):
            return None
        return Sizes(x.items, not shape.items, x.dtype)

    def _cast(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> Sizes | None:
        from rarefy.onnx.dtypes import DTYPES

        x, dtype = inputs[0], DTYPES.get(attributes.get("to", 0))
        if dtype is None or dtype.is_complex:
            return None
        if dtype == torch.bool:
            convert: Callable[..., Any] = to_bool
        elif dtype.is_floating_point:
            convert = torch.sym_float
        elif x.dtype.is_floating_point or x.dtype == torch.bool:
            convert = truncated
        else:
            return Sizes(x.items, x.scalar, dtype)
        return Sizes(tuple(self.apply(convert, i) for i in x.items), x.scalar, dtype)
