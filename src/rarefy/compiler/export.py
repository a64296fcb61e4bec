"""A model as a graph of words and ATen calls: exported with open sizes, then read again in the engine's words."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError, first_line
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.runtime import torch_ops  # noqa: F401 (models that run sparse already hold its operator)

MOST_SIZE = 1 << 62  # of an open size, where nothing is known


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rules: Sequence[Any], name: str | None = None
) -> ExportedGraph:
    """Export a model with all its sizes open that can be; ModelError with what export said where it cannot be.
    name: what the message calls the model, else its class."""
    two = two_samples(args, kwargs)
    try:
        return read(_export(model, *two), rules)
    except Exception as error:  # torch.export raises its own kinds, and those of whatever the model calls
        if isinstance(error, ModelError):
            raise
        why = f"{name or type(model).__name__} cannot be exported: {first_line(error)}"
        if "cache_utils" in str(error):
            why += " (a language model: put use_cache=False into the example)"
        if two[0] is args:
            raise ModelError(why) from error
    try:
        traced = read(_export(model, args, kwargs), rules)
    except ModelError:
        raise
    except Exception:
        raise ModelError(why) from None
    traced.notes = (f"for batches of the example's size alone: {why}",)
    return traced


def two_samples(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments with two samples where the example has one: export takes a size of one for a constant."""
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not leaves or any(not t.dim() or len(t) != 1 for t in leaves):
        return args, kwargs
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), (args, dict(kwargs)))


def _export(model: nn.Module, args: Any, kwargs: Any) -> Any:
    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args)), **kwargs}
    open_ = pytree.tree_map(lambda t: _open(t) if isinstance(t, Tensor) else None, given)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own trees
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # caches; the proof tells
        program = export(model, args, dict(kwargs), dynamic_shapes=open_, strict=False)
        changes = any(_changes(n.target) for n in program.graph.nodes if n.op == "call_function")
        return program.run_decompositions({}) if changes else program  # calls that change their inputs become others


def _open(t: Tensor) -> list[Any]:
    """Which sizes of an input stay open: all, but of images, of whose sizes export reasons for minutes, the first."""
    return [Dim.AUTO, *[Dim.STATIC if t.dim() > 3 and t.is_floating_point() else Dim.AUTO] * (t.dim() - 1)][: t.dim()]


def _changes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def read(program: Any, rules: Sequence[Callable[[ExportedGraph, Node], None]]) -> ExportedGraph:
    """Return a program's graph in the engine's words: each rule is shown every node in turn."""
    signature, graph = program.graph_signature, program.graph_module.graph
    state = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise ModelError("the model changes its buffers or its inputs when it is called: that cannot be compiled")
    constants = {n: state[t].detach() for n, t in names.items()}
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name not in constants]
    ranges = {str(k): (int(v.lower), int(min(v.upper, MOST_SIZE))) for k, v in program.range_constraints.items()}
    specs = program.call_spec.in_spec, program.call_spec.out_spec
    traced = ExportedGraph(graph, constants, inputs, *specs, ranges, names=names)
    for rule in rules:
        for node in list(graph.nodes):
            if node.op == "call_function" and not node._erased:
                rule(traced, node)
        graph.eliminate_dead_code()
    graph.lint()
    return traced


# ---- one rule each: of a node, its place in the graph and what the constants are ------------------------------------
