"""Never slower than eager: time each native call of a compiled model against the same operators in torch.

Both run alternately on the example's own values. What torch runs faster is left to torch. The choices are remembered in
the tuning cache, by CPU, instruction set, build of the kernels, threads, operators and sizes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.compiler import ops
from rarefy.compiler.executor import Compiled, Native
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.op_registry import name_of
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.runtime import bindings, tuning_cache
from rarefy.runtime.packing import nbytes

MAX_SECONDS = 4.0  # of timing all native calls of a model; what is not timed by then stays native
MAX_PAIR_SECONDS = 0.4  # of timing one native call against torch, where there are many
MAX_MODEL_SECONDS = 2.0  # of timing the whole model against eager torch
MIN_PAIRS, MAX_PAIRS = 3, 15  # runs of each side
NATIVE, TORCH = "native", "torch"
MUCH_FASTER = 2.0  # torch takes over rows of a table in 8 bits only then: its own table is four times as large


def is_enabled() -> bool:
    """Return whether anything is timed: there are kernels, and the environment has no RAREFY_TUNE=0."""
    return bindings.missing() is None and os.environ.get("RAREFY_TUNE") != "0"


def slow_nodes(compiled: Compiled, weights: Mapping[str, Tensor], leaves: Sequence[Any]) -> set[Node]:
    """Return the operators of native calls that take longer than the same operators in torch.

    Equal calls on equal sizes are timed once. Cost: at most about 4 seconds, and two calls of the model.

    Args:
        compiled: a compiled model.
        weights: dense weights by the names of their placeholders, of the layers that have kernels.
        leaves: the tensors of a call in the graph's order.
    """
    file = tuning_cache.default_file()
    known = tuning_cache.read(file)
    measured: dict[str, tuning_cache.Choice] = {}
    values: dict[Node, Any] = dict(zip(compiled.exported.inputs, leaves))
    slow: set[Node] = set()
    deadline = time.perf_counter() + MAX_SECONDS
    calls = sum(isinstance(call, Native) for call in compiled.schedule)
    seconds = max(MAX_PAIR_SECONDS, MAX_SECONDS / max(1, calls))  # a model in one call depends on that choice alone

    def lookup(node: Node) -> Any:
        if node in values:
            return values[node]
        return compiled.constants[node.name] if node.name in compiled.constants else weights[node.name]

    with torch.no_grad():
        for call in compiled.walk(values, lookup):
            if isinstance(call, Native):
                key = f"subgraph {_digest(_signature(call.nodes, compiled.kernels, lookup))}"
                choice = measured.get(key) or known.get(key)
                if choice is None and time.perf_counter() < deadline:
                    choice = measured[key] = _fastest(call, lookup, seconds)
                name, ratio = (choice or {}).get(1, (NATIVE, 1.0))
                packed = all(n.target is ops.embedding and n in compiled.kernels for n in call.nodes)
                if name == TORCH and ratio >= (MUCH_FASTER if packed else 1.0):
                    slow.update(call.nodes)
    if measured:
        tuning_cache.write(file, measured)
    compiled.forget()
    return slow


def _fastest(call: Native, lookup: Callable[[Node], Any], seconds: float) -> tuning_cache.Choice:
    """Time one native call; return who runs it faster and by how much."""
    native, eager = alternate(lambda: call.run(lookup), lambda: run_in_torch(call, lookup), seconds)
    return {1: (NATIVE, eager / native) if native <= eager else (TORCH, native / eager)}


def seconds_of_calls(compiled: Compiled, other: nn.Module | Compiled, args: Any, kwargs: Any) -> tuple[float, float]:
    """Return the seconds of calls of a compiled model and of the model that it was made from; remembered by the graph.

    The other one may also be the same model compiled in another way.

    Cost: at most about 2 seconds, or three calls of each.
    """
    file = tuning_cache.default_file()
    key = f"model {type(other).__qualname__} {signature_of_calls(compiled, args, kwargs)}"
    known = tuning_cache.read(file).get(key, {})
    if known.keys() == {0, 1}:
        return known[0][1], known[1][1]
    with torch.no_grad():
        ours, eager = alternate(
            lambda: compiled(*args, **kwargs), lambda: other(*args, **kwargs), MAX_MODEL_SECONDS, 2 * MIN_PAIRS
        )
    tuning_cache.write(file, {key: {0: ("compiled seconds", ours), 1: ("other seconds", eager)}})
    return ours, eager


def alternate(
    first: Callable[[], Any],
    second: Callable[[], Any],
    seconds: float,
    min_pairs: int = MIN_PAIRS,
    max_pairs: int = MAX_PAIRS,
) -> tuple[float, float]:
    """Return the fewest seconds of two functions that run in turns; see `fewest_seconds`."""
    first_seconds, second_seconds = fewest_seconds((first, second), seconds, min_pairs, max_pairs)
    return first_seconds, second_seconds


def fewest_seconds(
    functions: Sequence[Callable[[], Any]], seconds: float, min_rounds: int, max_rounds: int
) -> list[float]:
    """Return the fewest seconds of each of some functions that run in turns, after one run of each.

    Other processes only ever add time, so that the fastest run is the one that they disturbed least.

    Args:
        functions: what runs, in this order.
        seconds: time after which no more rounds are run.
        min_rounds: rounds that run in any case.
        max_rounds: rounds that run at most.
    """
    times: list[list[float]] = [[] for _ in functions]
    for run in functions:
        run()
    began = time.perf_counter()
    while len(times[0]) < max_rounds and (len(times[0]) < min_rounds or time.perf_counter() - began < seconds):
        for run, spent in zip(functions, times):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
    return [min(spent) for spent in times]


def run_in_torch(call: Native, lookup: Callable[[Node], Any]) -> list[Tensor]:
    """Return the outputs of a native call as torch computes them, freeing values as eager torch does."""
    values: dict[Node, Any] = {}
    inside = dict.fromkeys(call.nodes)
    last: dict[Node, Node] = {a: n for n in call.nodes for a in n.all_input_nodes if a in inside}
    ended: dict[Node, list[Node]] = {}
    for value, reader in last.items():
        if value not in call.outputs:
            ended.setdefault(reader, []).append(value)
    for n in call.nodes:
        args = fx.map_arg(n.args, lambda a: values[a] if a in values else lookup(a))
        values[n] = n.target(*args)
        for value in ended.get(n, ()):
            del values[value]
    return [values[n] for n in call.outputs]


# ---- what a time depends on -----------------------------------------------------------------------------------------


def signature_of_calls(compiled: Compiled, args: Any, kwargs: Any) -> str:
    """Return what the time of a call depends on, as a digest: the graph, its packed weights, and sizes of inputs."""
    leaves = [t for t in [*args, *kwargs.values()] if isinstance(t, Tensor)]
    nodes = [n for n in compiled.exported.graph.nodes if n.op == "call_function"]
    torch_nodes = sorted(n.name for n in compiled.exported.torch_nodes)
    graph = _signature(nodes, compiled.kernels, lambda _: None), torch_nodes, [(t.shape, t.dtype) for t in leaves]
    return _digest(graph)


def _signature(nodes: Iterable[Node], kernels: Mapping[Node, Any], lookup: Callable[[Node], Any]) -> list[Any]:
    """Return what the time of operators depends on: their names, arguments, sizes of inputs and packed weights."""
    index: dict[Node, int] = {}

    def describe(a: Node) -> Any:
        if a in index:
            return index[a]
        value = lookup(a)
        return (tuple(value.shape), str(value.dtype), value.is_contiguous()) if isinstance(value, Tensor) else None

    lines: list[Any] = []
    for i, n in enumerate(nodes):
        spec, kernel = BY_TARGET.get(n.target), kernels.get(n)
        packed = None
        if kernel is not None:
            form = kernel.held[0]
            packed = tuple(form.shape), type(getattr(form, "matrix", form)).__name__, form.kind, f"{nbytes(form):.1e}"
        weight = None if spec is None or kernel is None else spec.argument(n, "weight")
        args = fx.map_arg(n.args, lambda a, weight=weight: "packed" if a is weight else describe(a))
        lines.append((name_of(n.target) or str(n.target), str(args), str(n.kwargs), packed))
        index[n] = i
    return lines


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
