"""A decoder's step of one token for each sequence: its graph without what only prompts need.

The choice of tokens whose logits are wanted falls away, so that the output head runs in the same native call as the
layers. What depends on positions alone, such as the cosines of rotary embeddings, is computed for 64 positions at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.profile import Recorder

aten = torch.ops.aten
POINTWISE = (  # operators that give a position the same, whatever the other positions are
    aten.unsqueeze.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.neg.default,
    aten.cat.default,
    aten.cos.default,
    aten.sin.default,
)
POSITIONS, TABLES = 64, 8  # positions of a table; tables that are kept


class TokenStep:
    """The step from the last token of each sequence to logits.

    Attributes:
        compiled: the step; it reads ids, positions or tokens to keep where its graph still has them, and one row of
            each table.
        tables: what depends on positions alone, for 64 of them, by the first one.
    """

    def __init__(self, compiled: Compiled):
        source = compiled.exported
        ids, positions, keep = source.inputs
        self.positions, self.constants = positions, compiled.constants
        self.computed = self._computable(source.graph)
        self.read = [n for n in self.computed if any(u not in self.computed for u in n.users)]
        graph, copies = fx.Graph(), dict[Node, Node]()
        graph.output(graph.graph_copy(source.graph, copies))
        for node in list(graph.nodes):
            if node.target is aten.index.Tensor and node.args[1:] == ([None, copies[keep]],):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        rows = [_replace_by_input(graph, copies[n], f"of_positions_{i}") for i, n in enumerate(self.read)]
        for node in reversed(self.computed):
            graph.erase_node(copies[node])
        self.reads_positions, self.reads_keep = bool(copies[positions].users), bool(copies[keep].users)
        others = [copies[n] for n, read in ((positions, self.reads_positions), (keep, self.reads_keep)) if read]
        exported = replace(
            source,
            graph=graph,
            inputs=[copies[ids], *others, *rows],
            layers={copies[n]: layer for n, layer in source.layers.items() if n in copies},
            torch_nodes={copies[n] for n in source.torch_nodes},
            image_sizes={},
        )
        self.compiled = compiled.with_kernels({copies[n]: k for n, k in compiled.kernels.items()}, exported)
        self.tables: dict[int, list[Tensor]] = {}

    def run(self, ids: Tensor, cache: Any, recorder: Recorder | None = None) -> Any:
        """Return the logits [batch, 1, vocab_size] of ids [batch, 1] behind what the cache holds."""
        batch, first = len(ids), cache.past // POSITIONS * POSITIONS
        table = self.tables.get(first)
        if table is None:
            table = self._table(first)
            self.tables = {**dict(list(self.tables.items())[1 - TABLES :]), first: table}
        leaves = [ids]
        if self.reads_positions:
            leaves.append(torch.full((batch, 1), cache.past, dtype=torch.int64))
        if self.reads_keep:
            leaves.append(torch.zeros(1, dtype=torch.int64))
        at = cache.past - first
        leaves += [t[:, at : at + 1] if batch == 1 else t[:, at : at + 1].expand(batch, -1, -1) for t in table]
        return self.compiled.run_leaves(leaves, cache, recorder)[0]

    def _table(self, first: int) -> list[Tensor]:
        """Return what is computed from positions `first` on, [1, 64, features] each."""
        values = {self.positions: torch.arange(first, first + POSITIONS)[None]}
        for node in self.computed:
            values[node] = self._value(node, values)
        return [values[n] for n in self.read]

    @torch.no_grad()
    def _value(self, node: Node, values: dict[Node, Any]) -> Any:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: values[n] if n in values else self.constants[n.name]
        )
        return node.target(*args, **kwargs)

    def _computable(self, graph: fx.Graph) -> list[Node]:
        """Return the nodes that depend on positions and constants alone, in order, of which all that others read give
        [1, positions, features]."""
        values: dict[Node, Any] = {self.positions: torch.arange(POSITIONS)[None]}
        for node in graph.nodes:
            reads = node.all_input_nodes
            alone = any(n in values for n in reads) and all(n in values or n.name in self.constants for n in reads)
            if node.target not in POINTWISE or not alone:
                continue
            try:
                value = self._value(node, values)
            except (RuntimeError, IndexError, TypeError):  # of a graph from a file: its own call reports it
                continue
            if value.dim() in (2, 3) and value.shape[:2] == (1, POSITIONS):
                values[node] = value
        nodes = [n for n in values if n is not self.positions]
        flat = {n for n in nodes if values[n].dim() == 2}
        while wrong := {n for n in flat & set(nodes) if any(u not in nodes for u in n.users)}:
            nodes = [n for n in nodes if n not in wrong]
        return nodes


def _replace_by_input(graph: fx.Graph, node: Node, name: str) -> Node:
    """Let an input of this name take the place of a node, which nobody reads then; return it."""
    with graph.inserting_before(next(iter(graph.nodes))):
        new = graph.placeholder(name)
    node.replace_all_uses_with(new)
    return new
