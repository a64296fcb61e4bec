"""Drop Transposes between channels-last and channels-first: each moves on through the graph until one undoes it.

Converters of channels-last models put an operator of images between two Transposes. What stands between the second and
the next first one (activations, sums, concatenations, means) is computed in the other layout instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rarefy.onnx.graph import Graph, Kind, attribute, inputs_of, make_node

LAYOUTS = ((0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 3, 4, 1), (0, 4, 1, 2, 3))
ON_ELEMENTS = (
    "Abs", "Add", "Ceil", "Clip", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu",
    "Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Sub",
    "Tanh",
)  # fmt: skip
REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
Perm = tuple[int, ...]


def fold_transposes(graph: Graph) -> Iterable[Any]:
    """Move Transposes of layouts past operators that do not depend on the order of dimensions."""
    if not any(_layout(n) for n in graph.nodes):
        yield from graph.nodes
        return
    folding = _Folding(graph)
    for node in graph.nodes:
        yield from folding.rewrite(node)
    yield from folding.write(graph.outputs)


def _layout(node: Any) -> Perm | None:
    """Return the permutation of a Transpose between layouts."""
    perm = tuple(attribute(node, "perm", ())) if node.op_type == "Transpose" else ()
    return perm if perm in LAYOUTS else None


class _Folding:
    """What is known while the nodes are rewritten.

    Attributes:
        moved: values that are another value transposed: that one's name, and the permutation.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.moved: dict[str, tuple[str, Perm]] = {}
        self.written: set[str] = set()

    def rewrite(self, node: Any) -> Iterable[Any]:
        """Yield the nodes in place of a node."""
        if (perm := _layout(node)) is not None:
            source, before = self.moved.get(node.input[0], (node.input[0], tuple(range(len(perm)))))
            self.moved[node.output[0]] = (source, tuple(before[i] for i in perm))
            return
        moved = [self.moved[n] for n in node.input if n in self.moved]
        fresh = self._past(node, moved) if moved and node.output[0] not in self.graph.modules else None
        if fresh is not None:
            yield fresh
            return
        yield from self.write(inputs_of(node))
        yield node

    def write(self, names: Sequence[str]) -> Iterable[Any]:
        """Yield the Transposes that make values which are needed in their own layout."""
        for name in dict.fromkeys(names):
            if name in self.moved and name not in self.written:
                self.written.add(name)
                source, perm = self.moved[name]
                if perm == tuple(range(len(perm))):
                    yield make_node("Identity", [source], [name])
                else:
                    yield make_node("Transpose", [source], [name], perm=list(perm))

    def _past(self, node: Any, moved: list[tuple[str, Perm]]) -> Any:
        """Return the node on the values before their Transpose, None if it must see them after it."""
        perm = moved[0][1]
        tensors = [n for n in node.input if n and n not in self.graph.constants]
        if any(p != perm for _, p in moved) or len(moved) != len(tensors):
            return None
        if node.op_type in ON_ELEMENTS:
            inputs = self._inputs(node, perm)
            return None if inputs is None else self._moved_node(node, inputs, perm)
        if node.op_type == "Concat" and len(moved) == len(node.input):
            axis = attribute(node, "axis", 0)
            return self._moved_node(node, [s for s, _ in moved], perm, axis=perm[axis % len(perm)])
        if node.op_type in REDUCTIONS:
            return self._reduction(node, moved[0][0], perm)
        return None

    def _inputs(self, node: Any, perm: Perm) -> list[str] | None:
        """Return the inputs before the Transpose, constants in the other order of dimensions."""
        inputs = []
        for name in node.input:
            array = self.graph.constants.get(name)
            if array is None or array.size == 1:
                inputs.append(self.moved[name][0] if name in self.moved else name)
                continue
            if array.ndim > len(perm):
                return None
            whole = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
            inputs.append(self.graph.add_constant(np.ascontiguousarray(whole.transpose(np.argsort(perm)))))
        return inputs

    def _reduction(self, node: Any, source: str, perm: Perm) -> Any:
        """Return a reduction of other axes; without them, what remains must keep its order."""
        axes = attribute(node, "axes", None)
        if axes is None and len(node.input) > 1:
            constant = self.graph.constants.get(node.input[1])
            axes = None if constant is None else constant.reshape(-1).tolist()
        if not axes:
            return None
        places = sorted(perm[a % len(perm)] for a in axes)
        rest = [d for d in perm if d not in places]
        keep = attribute(node, "keepdims", 1)
        if not keep and rest != sorted(rest):
            return None
        inputs: list[str] = [source]
        more: dict[str, Any] = {"axes": places}
        if len(node.input) > 1:
            inputs, more = [source, self.graph.add_constant(np.array(places, np.int64))], {}
        if keep:
            return self._moved_node(node, inputs, perm, **more)
        return make_node(node.op_type, inputs, node.output, node, **more)

    def _moved_node(self, node: Any, inputs: list[str], perm: Perm, **attributes: Any) -> Any:
        """Return the node before a Transpose, which is recorded: its output gets it later."""
        name = node.output[0]
        before = f"{name}_rarefy_moved"
        self.moved[name] = (before, perm)
        kind = self.graph.kinds.get(name, Kind())
        if kind.dims is not None and len(kind.dims) == len(perm):
            order = np.argsort(perm)
            self.graph.kinds[before] = Kind(kind.dtype, tuple(kind.dims[i] for i in order))
        return make_node(node.op_type, inputs, [before], node, **attributes)
