"""The order in which a compiled model's calls run, chosen so that fused subgraphs become large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.operators.conv import conv2d
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.subgraph import Check, FusedSubgraph, SingleOp, image_nodes
from rarefy.runtime.packed_formats import MAX_STRIDE


def schedule(exported: ExportedGraph, kernels: Mapping[Node, Any], check: Check | None) -> list[Any]:
    """Return the calls of a graph in order: `FusedSubgraph`s, `SingleOp`s and nodes that torch runs.

    All torch calls whose inputs are there come first, then all operators of the engine, and so on in turn.
    """
    nodes = [n for n in exported.graph.nodes if n.op == "call_function"]
    missing = {n: {a for a in n.all_input_nodes if a.op == "call_function"} for n in nodes}
    calls: list[Any] = []
    native = False
    while missing:
        ready: dict[Node, None] = {}
        for n in nodes:
            if n in missing and _runs_in_program(exported, n, kernels) == native and missing[n] <= ready.keys():
                ready[n] = None
                del missing[n]
        for inputs in missing.values():
            inputs.difference_update(ready)
        if native and any(BY_TARGET[n.target].heavy for n in ready) and image_nodes(list(ready)) is not None:
            calls.append(FusedSubgraph(list(ready), kernels, exported.constants, check))
        else:
            calls += [_single_call(n, exported, kernels, check) for n in ready]
        native = not native
    return calls


def _runs_in_program(exported: ExportedGraph, node: Node, kernels: Mapping[Node, Any]) -> bool:
    if node in exported.torch_nodes:
        return False
    if node.target is conv2d:
        if node in kernels:
            return node.args[8] == 1
        return bool(kernels) and node.args[8] > 1 and max(node.args[5]) <= MAX_STRIDE
    spec = BY_TARGET.get(node.target)
    return spec is not None and spec.lower is not None and bool(kernels)


def _single_call(node: Node, exported: ExportedGraph, kernels: Mapping[Node, Any], check: Check | None) -> Any:
    """Return a node's call outside of larger subgraphs."""
    spec = BY_TARGET.get(node.target)
    if spec is None or node not in kernels or node in exported.torch_nodes:
        return node
    if not spec.own_call or (node.target is conv2d and kernels[node].program_only):  # it runs in a program alone
        return FusedSubgraph([node], kernels, exported.constants, check)
    return SingleOp(node, kernels[node])
