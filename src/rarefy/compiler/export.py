"""Export a model with torch.export, its sizes left open, and run the compiler's passes on the graph."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError, first_line
from rarefy.compiler import ops
from rarefy.compiler.fx_utils import MODULES, ExportedGraph, Node, shape
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.passes.quantization import FAKE_QUANTIZE
from rarefy.compiler.torch_guards import TORCH, plain_texts, recorded_decisions
from rarefy.compiler.traced_graph import TracedGraph, copy_of, key_of, remembered, tensors_of, traced
from rarefy.model.activation_quant import rounding_by
from rarefy.model.batches import distinct_tensors
from rarefy.model.forward import named_arguments
from rarefy.runtime import torch_ops  # noqa: F401 (registers the operator of layers that run sparse already)

PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep

_exporting = RLock()  # torch's tracing, and the fake tensors of passes, are of one thread at a time

Pass = Callable[[ExportedGraph, Node], None]
Result = TypeVar("Result")


def export_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    passes: Sequence[Pass],
    name: str | None = None,
    dynamic: bool = True,
    again: bool = True,
    two: bool = True,
) -> ExportedGraph:
    """Return a model's graph after all passes, with every size open that can be. One thread at a time exports.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keywords.
        passes: run in order, each on every node.
        name: what messages call the model, by default its class.
        dynamic: False: all sizes are fixed to those of the arguments, which takes less time.
        again: whether the graph of an earlier model may be used again; see `traced_graph.py`. Compare the outputs.
        two: export with two samples where there is one.

    Raises:
        ModelError: with torch.export's reason, in one line, if the model cannot be exported.
    """

    def graph(a: Any, k: Any) -> ExportedGraph:
        def new() -> TracedGraph:
            with recorded_decisions() as decisions:
                return traced(_export(model, a, k, dynamic), model, decisions)

        key = key_of(model, (a, dict(k)), dynamic) if again else None
        one = remembered(key, new)
        return run_passes(one, tensors_of(model), passes)

    with _exporting:
        exported, reason = _with_open_sizes(model, args, kwargs, graph, name, dynamic and two)
    if reason:
        exported.notes = (f"only for the example's batch size: {reason}",)
    return exported


def export_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rounding: Any
) -> tuple[ExportedProgram, str]:
    """Return torch's exported program of a model, and why its sizes are not open, "" where they are.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keywords.
        rounding: the operator of (x, scale, zero) that rounds to static grids of 8 bits.

    Raises:
        ModelError: with torch.export's reason, in one line, if the model cannot be exported.
    """
    return _with_open_sizes(model, args, kwargs, lambda a, k: _export(model, a, k, True, rounding))


def _with_open_sizes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Callable[[Any, Any], Result],
    name: str | None = None,
    dynamic: bool = True,
) -> tuple[Result, str]:
    """Return what `run` exports with arguments and keywords, and why its sizes are not open, "" where they are."""
    two = two_samples(args, kwargs) if dynamic else (args, kwargs)
    try:
        return run(*two), ""
    except ModelError:
        raise
    except Exception as error:  # torch.export raises its own classes, and those of whatever the model calls
        reason = f"{name or type(model).__name__} cannot be exported: {_reason(error)}"
        if "cache_utils" in str(error):
            reason += " (for a language model, put use_cache=False into the example)"
        if two[0] is args:
            raise ModelError(reason) from error
    try:
        return run(args, kwargs), reason
    except ModelError:
        raise
    except Exception:
        raise ModelError(reason) from None


def _reason(error: Exception) -> str:
    """Return torch.export's reason in one line; of data-dependent code the line, and what runs it."""
    if "data-dependent" not in first_line(error):
        return first_line(error)
    frames, cause = [], error
    while cause is not None:
        frames += traceback.extract_tb(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    own = [f for f in frames if not f.filename.startswith((TORCH, PACKAGE, "<"))]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    return f"its code depends on the values of tensors (data-dependent){where}; rarefy.accelerate_ needs no export"


def two_samples(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments with two samples where the example has one, as torch.export takes a size of 1 for a constant."""
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not leaves or any(not t.dim() or len(t) != 1 for t in leaves):
        return args, kwargs
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), (args, dict(kwargs)))


def _export(model: nn.Module, args: Any, kwargs: Any, dynamic: bool, rounding: Any = FAKE_QUANTIZE) -> Any:
    """Return torch's exported program without operators that change their inputs."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (args, dict(kwargs)))  # strides follow from sizes
    args, kwargs = distinct_tensors((args, kwargs))
    arguments = named_arguments(model, args, kwargs)
    shapes = pytree.tree_map(lambda t: _open_sizes(t) if isinstance(t, Tensor) and dynamic else None, arguments)
    with torch.no_grad(), warnings.catch_warnings(), _quiet_export(), rounding_by(rounding):
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own pytrees
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # outputs are verified
        with plain_texts():
            program = export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
        mutable = any(_is_mutable(n.target) for n in program.graph.nodes if n.op == "call_function")
        return program.run_decompositions({}) if mutable else program


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch's log, and the whole graph that torch.export prints when it fails, off the terminal.

    What is printed to standard error by an export that succeeds is shown afterwards.
    """
    names = [name for name in logging.root.manager.loggerDict if name == "torch" or name.startswith("torch.")]
    handlers = {h: None for name in names for h in logging.getLogger(name).handlers}
    printed = io.StringIO()
    for handler in handlers:
        handler.addFilter(_silence)
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for handler in handlers:
            handler.removeFilter(_silence)


def _silence(record: logging.LogRecord) -> bool:
    return False


def _open_sizes(t: Tensor) -> list[Any]:
    """Return which sizes of an input stay open: all but those of 1; only the first of images, whose sizes take export
    minutes."""
    is_image = t.dim() > 3 and t.is_floating_point()
    return [Dim.STATIC if n < 2 or (d and is_image) else Dim.AUTO for d, n in enumerate(t.shape)]


def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def run_passes(program: TracedGraph, tensors: Mapping[str, Tensor], passes: Sequence[Pass]) -> ExportedGraph:
    """Return the graph of a model with these tensors after all passes, each of which sees every node in turn."""
    graph, every = copy_of(program.graph), {**tensors, **program.tensors}
    constants = {n: every[t] for n, t in program.names.items()}
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name not in constants]
    specs = program.in_spec, program.out_spec
    exported = ExportedGraph(graph, constants, inputs, *specs, dict(program.ranges), program.guards)
    exported.names = program.names
    for run in passes:
        for node in list(graph.nodes):
            if node.op == "call_function" and not node._erased:
                run(exported, node)
        graph.eliminate_dead_code()
    graph.lint()
    exported.layers = layer_names(exported)
    exported.image_sizes = {n: shape(n)[2:] for n in graph.nodes if n.target is ops.conv2d}
    return exported


def layer_names(exported: ExportedGraph) -> dict[Node, str]:
    """Return the layer of each node: the module of its weight, else the module in which torch.export recorded it.

    A graph from a file has only the names of its weights' placeholders.
    """
    layers: dict[Node, str] = {}
    for node in exported.graph.nodes:
        spec = BY_TARGET.get(node.target)
        weight = None if spec is None else spec.argument(node, "weight")
        stack = node.meta.get(MODULES)
        if weight is not None and weight.name in exported.names:
            layers[node] = exported.names[weight.name].rpartition(".")[0]
        elif stack:
            layers[node] = str(list(stack.values())[-1][0])
        elif weight is not None:
            layers[node] = weight.name.removeprefix("p_").removesuffix("_weight")
    return layers
