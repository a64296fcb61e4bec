"""Static scales of the inputs of int8 operators, found by running a graph in torch on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.calibration.static_grids import Sample, static_grid
from rarefy.common.errors import DataError
from rarefy.compiler import ops
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import ExportedGraph, Node, keep_layer
from rarefy.model.activation_quant import ActivationQuant
from rarefy.model.forward import split_example

OBSERVER = "mse"
WRITES_CODES = (ops.linear, ops.norm)  # whose steps find a scale for each token on the way


def reads_static_codes(node: Node) -> bool:
    """Return whether one scale for all inputs of an int8 operator is faster than one for each token or image."""
    return node.target is ops.conv2d or (node.target is ops.linear and node.args[0].target not in WRITES_CODES)


def quantized_operands(node: Node) -> list[Node]:
    """Return the operands of an int8 operator that have static grids: its input, and a convolution's residual."""
    residual = node.args[3] if node.target is ops.conv2d and node.args[-1] == 1 else None
    return [v for v in (node.args[0], residual) if v is not None]  # type: ignore[misc]


def round_input(exported: ExportedGraph, node: Node, grid: ActivationQuant) -> None:
    """Round the input of an operator to a grid, in the graph; operators with equal grids share the rounded value."""
    x: Any = node.args[0]
    same = next((u for u in x.users if u.target is ops.fake_quantize and u.args == (x, grid.scale, grid.zero)), None)
    if same is None:
        with exported.graph.inserting_before(node):
            same = exported.graph.call_function(ops.fake_quantize, (x, grid.scale, grid.zero))
        keep_layer(same, node)
    node.args = (same, *node.args[1:])


def in_torch(exported: ExportedGraph, input_specs: Sequence[Any]) -> Compiled:
    """Return the graph as a callable without kernels: torch runs the reference of each operator."""
    return Compiled(exported, {}, input_specs, lambda *_: None)


def calibration_batches(batches: Any) -> list[Any]:
    """Return batches as a list, which is read several times; DataError where there are none."""
    if not isinstance(batches, Iterable) or isinstance(batches, str | Mapping | Tensor):
        raise DataError(
            f"calibrate: expected batches, each like the example, such as a list of them; got {type(batches).__name__}"
        )
    if not (result := list(batches)):
        raise DataError("calibrate: expected at least one batch, got none")
    return result


@torch.no_grad()
def input_grids(graph: Compiled, nodes: Collection[Node], batches: Sequence[Any]) -> dict[Node, ActivationQuant]:
    """Return {value: 8-bit grid} of the inputs of operators.

    Args:
        graph: the graph without kernels, which torch runs.
        nodes: operators whose inputs are quantized, and the residuals of convolutions.
        batches: what the model is called with: dicts of keywords, tuples of arguments, or tensors.

    Raises:
        DataError: if one does not fit the model, or inputs of an operator are not finite.
    """
    samples = {v: Sample() for n in nodes for v in quantized_operands(n)}
    rng = torch.Generator().manual_seed(0)
    for count, batch in enumerate(batches, 1):
        try:
            leaves = graph.leaves(*split_example(batch))
        except DataError as error:
            raise DataError(f"calibrate: batch {count} does not fit the model: {error}") from error
        for value, x in _inputs(graph, leaves, nodes):
            if not bool(torch.isfinite(x).all()):
                raise DataError(f"calibrate: batch {count} gives NaN or inf at {value.name}: it has no finite range")
            samples[value].add(x, rng)
    grids = {value: static_grid(sample.values(), OBSERVER) for value, sample in samples.items()}
    return {value: grids[_before_pools(value, grids)] for value in grids}


def _before_pools(value: Node, grids: Collection[Node]) -> Node:
    """Return the first value with a grid of those from which max pools made one: pools only take values, so that one
    grid does for all, and codes of one are codes of the other."""
    first = value
    while value.target in (ops.max_pool2d, ops.max_pool2d_ceil):
        value = value.args[0]  # type: ignore[assignment]
        first = value if value in grids else first
    return first


def _inputs(graph: Compiled, leaves: list[Any], nodes: Collection[Node]) -> Iterator[tuple[Node, Tensor]]:
    """Yield the inputs of operators in a call, each once."""
    wanted = {v for n in nodes for v in quantized_operands(n)}
    for call, lookup in calls_of(graph, leaves):
        for value in quantized_operands(call) if call in nodes else ():
            if value in wanted:
                wanted.remove(value)
                yield value, lookup(value)


def calls_of(graph: Compiled, leaves: list[Any]) -> Iterator[tuple[Node, Callable[[Node], Any]]]:
    """Yield the calls of a run in torch, each before it runs, with what returns its inputs."""
    values: dict[Node, Any] = dict(zip(graph.exported.inputs, leaves))

    def lookup(node: Node) -> Any:
        return values[node] if node in values else graph.constants[node.name]

    for call in graph.walk(values, lookup):
        yield call, lookup
