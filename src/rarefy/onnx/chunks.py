"""Slices that together are all of a tensor become one chunk: its parts stay equally long where layers are cut."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rarefy.onnx.graph import Kind


@dataclass(frozen=True)
class Slice:
    """A part of one axis of a value: from `start` up to `end`.

    Attributes:
        value: the ONNX name of the value.
        axis: counted from the front.
        size: of the whole axis.
        call: the node that returns the part.
    """

    value: str
    axis: int
    size: int
    start: int
    end: int
    call: fx.Node


def slice_of(value: str, kind: Kind, constants: Mapping[str, Any], call: fx.Node) -> Slice | None:
    """Return the part that a Slice takes; None for several axes, steps, and an axis whose size is open.

    Args:
        value: the name of what is sliced.
        kind: what is known about it.
        constants: the operator's starts, ends, axes and steps, as far as they are known.
        call: the node of the Slice.
    """
    starts, ends, axes = (constants.get(n) for n in ("starts", "ends", "axes"))
    if starts is None or ends is None or len(starts) != 1 or kind.dims is None or constants.get("steps", (1,)) != (1,):
        return None
    axis = (0 if axes is None else axes[0]) % max(1, len(kind.dims))
    size = kind.dims[axis] if kind.dims else None
    if size is None:
        return None
    start, end, _ = slice(starts[0], ends[0]).indices(size)
    return Slice(value, axis, size, start, end, call)


def merge_slices_(graph: fx.Graph, slices: list[Slice]) -> None:
    """Replace slices of equal length that lie side by side and cover an axis by a chunk of it, in place.

    Args:
        graph: the torch graph.
        slices: parts, in the graph's order.
    """
    groups: dict[tuple[str, int], list[Slice]] = {}
    for s in slices:
        groups.setdefault((s.value, s.axis), []).append(s)
    for (_, axis), parts in groups.items():
        count, size = len(parts), parts[0].size
        ends = [(size * i // count, size * (i + 1) // count) for i in range(count)]
        if count < 2 or size % count or sorted((p.start, p.end) for p in parts) != ends:
            continue
        first = parts[0].call
        with graph.inserting_before(first):
            chunk = graph.call_function(torch.chunk, (first.args[0], count, axis))
            for part in parts:
                i = ends.index((part.start, part.end))
                part.call.replace_all_uses_with(graph.call_function(operator.getitem, (chunk, i)))
