"""Operators of ONNX that onnx2torch has no module for, or none for every number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from rarefy.onnx.graph import Graph, attribute, make


class GlobalAverage(nn.Module):
    """The mean of each channel, [N, C, 1, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.dim())), keepdim=True)


class Flatten(nn.Module):
    """Two dimensions: those before an axis, and the others."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(math.prod(x.shape[: self.axis]), -1)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class Slice(nn.Module):
    """Parts of some axes: from where to where in which steps, as known beforehand or as given."""

    def __init__(self, *known: list[int] | None):
        super().__init__()
        self.known = known

    def forward(
        self,
        x: Tensor,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        axes: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        given = [None if t is None else t.tolist() for t in (starts, ends, axes, steps)]
        first, last, where, by = [*self.known, None, None, None, None][:4] if starts is None else given
        assert first is not None and last is not None
        for i, (start, end) in enumerate(zip(first, last)):
            axis, step = i if where is None else where[i], 1 if by is None else by[i]
            places = slice(start, end, step).indices(x.shape[axis])
            if step > 0:
                x = x.movedim(axis, 0)[slice(*places)].movedim(0, axis)
            else:
                x = x.index_select(axis, torch.arange(*places, device=x.device))
        return x

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.known))


class Pick(nn.Module):
    """One slice of an axis."""

    def __init__(self, axis: int, index: int):
        super().__init__()
        self.axis, self.index = axis, index

    def forward(self, x: Tensor) -> Tensor:
        return x.select(self.axis, self.index)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, index={self.index}"


def stands(graph: Graph) -> Iterable[object]:
    """Give a module to what depends on one value alone; write what no module is known for in other operators."""
    for node in graph.nodes:
        given = [graph.constants.get(n) if n else None for n in node.input[1:]]
        known = all(g is not None for g, n in zip(given, node.input[1:]) if n)
        kind = node.op_type if node.domain in ("", "ai.onnx") else ""
        if kind == "GlobalAveragePool":
            yield graph.stand(node, GlobalAverage())
        elif kind == "Flatten":
            yield graph.stand(node, Flatten(attribute(node, "axis", 1)))
        elif kind == "Slice" and known and node.input[0] not in graph.constants:
            old = [attribute(node, n, None) for n in ("starts", "ends", "axes")] if len(node.input) == 1 else []
            values = [None if g is None else g.reshape(-1).tolist() for g in given]
            yield graph.stand(node, Slice(*(old or values)))
        elif kind == "Gather" and known and given[0] is not None and given[0].ndim == 0:
            yield graph.stand(node, Pick(attribute(node, "axis", 0), int(given[0])))
        elif kind in ("GreaterOrEqual", "LessOrEqual"):
            sides = [f"{node.output[0]}_rarefy_{i}" for i in range(2)]
            yield make(kind.removesuffix("OrEqual"), node.input, sides[:1])
            yield make("Equal", node.input, sides[1:])
            yield make("Or", sides, node.output)
        else:
            yield node


def replace_(model: fx.GraphModule) -> None:
    """Put ours where onnx2torch indexes by a list, which torch will read as something else one day."""
    for name, module in list(model.named_children()):
        if type(module).__name__ == "OnnxSlice":
            setattr(model, name, Slice())
