"""Static scales of the inputs of int8 operators, found by running a graph in torch on calibration data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.calibration.static_grids import sample_values, static_grid
from rarefy.common.errors import DataError
from rarefy.compiler import ops
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import Node
from rarefy.model.activation_quant import ActivationQuant

OBSERVER = "mse"
WRITES_CODES = (ops.linear, ops.norm)  # whose steps find a scale for each token on the way


def reads_static_codes(node: Node) -> bool:
    """Return whether one scale for all inputs of an int8 operator is faster than one for each token or image."""
    return node.target is ops.conv2d or (node.target is ops.linear and node.args[0].target not in WRITES_CODES)


def input_grids(graph: Compiled, nodes: Collection[Node], batches: Iterable[Any]) -> dict[Node, ActivationQuant]:
    """Return {value: 8-bit grid} of the inputs of operators.

    Args:
        graph: the graph without kernels, which torch runs.
        nodes: operators whose inputs are quantized.
        batches: what the model is called with: dicts of keywords, tuples of arguments, or tensors.

    Raises:
        DataError: if there is no batch, one does not fit the model, or inputs of an operator are not finite.
    """
    samples: dict[Node, list[Tensor]] = {n.args[0]: [] for n in nodes}  # type: ignore[misc]
    rng = torch.Generator().manual_seed(0)
    count = 0
    for batch in batches:
        args, kwargs = _call_of(batch)
        try:
            leaves = graph.leaves(args, kwargs)
        except DataError as error:
            raise DataError(f"calibrate: batch {count + 1} does not fit the model: {error}") from error
        for value, x in _values(graph, leaves, samples):
            if not bool(torch.isfinite(x).all()):
                raise DataError(
                    f"calibrate: batch {count + 1} gives NaN or inf at {value.name}: it has no finite range"
                )
            samples[value].append(sample_values(x, rng))
        count += 1
    if not count:
        raise DataError("calibrate: expected at least one batch, got none")
    return {value: static_grid(torch.cat(sampled), OBSERVER) for value, sampled in samples.items()}


def _call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as arguments and keywords."""
    if hasattr(batch, "keys"):
        return (), {k: batch[k] for k in batch.keys()}  # noqa: SIM118 (a batch of transformers is no dict)
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}


def _values(graph: Compiled, leaves: list[Any], wanted: Mapping[Node, Any]) -> Iterable[tuple[Node, Tensor]]:
    """Yield the wanted values of a call."""
    values: dict[Node, Any] = dict(zip(graph.exported.inputs, leaves))
    yield from ((n, x) for n, x in values.items() if n in wanted)

    def lookup(node: Node) -> Any:
        return values[node] if node in values else graph.constants[node.name]

    with torch.no_grad():
        for node in graph.exported.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lookup)
                values[node] = node.target(*args, **kwargs)
                if node in wanted:
                    yield node, values[node]
