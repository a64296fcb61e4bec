"""Modules for ONNX operators that onnx2torch does not convert, or not for every number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from rarefy.onnx.graph import Graph, attribute, make_node


class GlobalAveragePool(nn.Module):
    """The mean of each channel: [N, C, ...] to [N, C, 1, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.dim())), keepdim=True)


class Flatten(nn.Module):
    """Flatten the dimensions before an axis, and those from it on, to two dimensions."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(math.prod(x.shape[: self.axis]), -1)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class Reshape(nn.Module):
    """Reshape to constant sizes, where 0 keeps a size of the input and -1 takes what remains."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape([size or x.shape[d] for d, size in enumerate(self.sizes)])

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.sizes))


class Slice(nn.Module):
    """Slices of some axes: starts, ends, axes and steps are constants or inputs."""

    def __init__(self, *constants: list[int] | None):
        super().__init__()
        self.constants = constants

    def forward(
        self,
        x: Tensor,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        axes: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        inputs = [None if t is None else t.tolist() for t in (starts, ends, axes, steps)]
        first, last, along, by = [*self.constants, None, None, None, None][:4] if starts is None else inputs
        assert first is not None and last is not None
        for i, (start, end) in enumerate(zip(first, last)):
            axis, step = i if along is None else along[i], 1 if by is None else by[i]
            indices = slice(start, end, step).indices(x.shape[axis])
            if step > 0:
                x = x.movedim(axis, 0)[slice(*indices)].movedim(0, axis)
            else:
                x = x.index_select(axis, torch.arange(*indices, device=x.device))
        return x

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.constants))


class Select(nn.Module):
    """One index of an axis."""

    def __init__(self, axis: int, index: int):
        super().__init__()
        self.axis, self.index = axis, index

    def forward(self, x: Tensor) -> Tensor:
        return x.select(self.axis, self.index)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, index={self.index}"


def substitute_modules(graph: Graph) -> Iterable[object]:
    """Substitute these modules for nodes with one input that is not constant, and rewrite operators that have no
    module by others."""
    for node in graph.nodes:
        constants = [graph.constants.get(n) if n else None for n in node.input[1:]]
        known = all(c is not None for c, n in zip(constants, node.input[1:]) if n)
        kind = node.op_type if node.domain in ("", "ai.onnx") else ""
        if kind == "GlobalAveragePool":
            yield graph.substitute(node, GlobalAveragePool())
        elif kind == "Flatten":
            yield graph.substitute(node, Flatten(attribute(node, "axis", 1)))
        elif kind == "Reshape" and len(constants) == 1 and known and not attribute(node, "allowzero", 0):
            yield graph.substitute(node, Reshape(constants[0].reshape(-1).tolist()))  # type: ignore[union-attr]
        elif kind == "Slice" and known and node.input[0] not in graph.constants:
            old = [attribute(node, n, None) for n in ("starts", "ends", "axes")] if len(node.input) == 1 else []
            values = [None if c is None else c.reshape(-1).tolist() for c in constants]
            yield graph.substitute(node, Slice(*(old or values)))
        elif kind == "Gather" and known and constants[0] is not None and constants[0].ndim == 0:
            yield graph.substitute(node, Select(attribute(node, "axis", 0), int(constants[0])))
        elif kind in ("GreaterOrEqual", "LessOrEqual"):
            sides = [f"{node.output[0]}_rarefy_{i}" for i in range(2)]
            yield make_node(kind.removesuffix("OrEqual"), node.input, sides[:1])
            yield make_node("Equal", node.input, sides[1:])
            yield make_node("Or", sides, node.output)
        else:
            yield node


def replace_slices_(model: fx.GraphModule) -> None:
    """Replace the slices of onnx2torch, which index by a list: torch deprecates that."""
    for name, module in list(model.named_children()):
        if type(module).__name__ == "OnnxSlice":
            setattr(model, name, Slice())
