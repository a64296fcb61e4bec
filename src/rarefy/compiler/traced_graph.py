"""Graphs of torch.export without weights, remembered for the last few models.

Exporting takes most of the time of `compile` and depends on a model's code and sizes, not on its weights. So a model
that is compiled again, with other weights or in another precision, uses the graph of the first time. A graph is used
again only for modules of the same classes with the same attributes and sizes. Models whose code may depend on anything
else, such as hooks or closures, are exported each time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from threading import Lock
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError
from rarefy.compiler.fx_utils import MODULES

REMEMBERED = 4  # graphs
MAX_DEPTH = 12  # of nested attributes
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code defines
LITERALS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, type(None), type(Ellipsis))
OWN = frozenset(vars(nn.Module()))  # attributes of all modules: their tensors and hooks, which are looked at one by one
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_graphs: OrderedDict[Hashable, TracedGraph] = OrderedDict()
_lock = Lock()
_reused = 0


class _Unknown(Exception):
    """Something that a key cannot describe."""


@dataclass(frozen=True)
class Same:
    """An object that equals itself alone, and lives as long as the key that it is in."""

    of: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)


@dataclass(frozen=True)
class TracedGraph:
    """What torch.export returns, without the model's tensors.

    Attributes:
        graph: the nodes, which nobody changes; see `copy_of`.
        names: the model's own names of placeholders that are no inputs.
        tensors: constants that the model has not, by these names.
        ranges: smallest and largest value of each open size.
        in_spec: torch's pytree spec of the arguments.
        out_spec: torch's pytree spec of the outputs.
    """

    graph: fx.Graph
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    ranges: Mapping[Any, Any]
    in_spec: Any
    out_spec: Any


def copy_of(graph: fx.Graph) -> fx.Graph:
    """Return the same nodes, for passes to change, with the records that passes read. O(nodes)."""
    new, same = fx.Graph(), {}
    new.output(new.graph_copy(graph, same))
    for node, copied in same.items():
        copied.meta = {k: node.meta[k] for k in ("val", MODULES) if k in node.meta}
    return new


def traced(program: Any, model: nn.Module) -> TracedGraph:
    """Return the graph of a model that torch exported; ModelError for one that changes its buffers or its inputs."""
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise ModelError("the model changes its buffers or its inputs when it is called, so it cannot be compiled")
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    own, every = tensors_of(model), {**program.state_dict, **program.constants}
    tensors = {t: every[t].detach() for t in names.values() if t not in own}
    specs = program.call_spec.in_spec, program.call_spec.out_spec
    return TracedGraph(program.graph_module.graph, names, tensors, dict(program.range_constraints), *specs)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by all of their names."""
    buffers = model.named_buffers(remove_duplicate=False)
    return {n: t.detach() for n, t in (*model.named_parameters(remove_duplicate=False), *buffers)}


def remembered(key: Hashable | None, export: Callable[[], TracedGraph]) -> TracedGraph:
    """Return the graph of a key, exported where it is not known; the key None stands for what nobody may use again."""
    global _reused
    with _lock:
        graph = None if key is None else _graphs.get(key)
        if graph is not None:
            _graphs.move_to_end(key)
            _reused += 1
            return graph
    graph = export()
    if key is not None and all(n.op != "get_attr" for n in graph.graph.nodes):
        with _lock:
            _graphs[key] = replace(graph, graph=copy_of(graph.graph))  # without the module that has its weights
            while len(_graphs) > REMEMBERED:
                _graphs.popitem(last=False)
    return graph


def forget_graphs() -> None:
    """Forget all graphs: the next models are exported again."""
    with _lock:
        _graphs.clear()


def once_more(make: Callable[[], Any]) -> Any:
    """Return what `make` does; where it fails with the graph of an earlier model, do it again with a new one."""
    before = _reused
    try:
        return make()
    except ModelError:
        if _reused == before:
            raise
    forget_graphs()
    return make()


def key_of(model: nn.Module, arguments: Any, *options: Any) -> Hashable | None:
    """Return what a model's graph depends on, as far as its code, attributes and sizes tell; None where they do not.

    Args:
        model: the model.
        arguments: of the call, nested; tensors count by their sizes.
        options: others on which the export depends.
    """
    places: dict[int, int] = {}
    leaves, spec = pytree.tree_flatten(arguments)
    try:
        modules = tuple(_module(n, m, places) for n, m in model.named_modules(remove_duplicate=False))
        sizes = tuple(_tensor(t) if isinstance(t, Tensor) else _value(t, 0) for t in leaves)
        return modules, sizes, str(spec), _value(options, 0), torch.get_default_dtype()
    except _Unknown:
        return None


def _module(name: str, module: nn.Module, places: dict[int, int]) -> Hashable:
    values = vars(module)
    if "forward" in values or any(values.get(h) for h in FORWARD_HOOKS):
        raise _Unknown
    own = {k: v for k, v in values.items() if k not in OWN}
    tensors = (*module._parameters.items(), *module._buffers.items())
    kind = type(module)
    return (
        name, kind, Same(kind.forward), module.training, places.setdefault(id(module), len(places)), _value(own, 0),
        tuple((n, None if t is None else (_tensor(t), places.setdefault(id(t), len(places)))) for n, t in tensors),
    )  # fmt: skip


def _tensor(t: Tensor) -> Hashable:
    if type(t) not in (Tensor, nn.Parameter, nn.Buffer) or t.layout != torch.strided:
        raise _Unknown
    return t.dtype, tuple(t.shape), t.stride(), t.device, t.requires_grad


def _value(value: Any, depth: int) -> Hashable:
    """Return what tells values apart; _Unknown for those that may change without being told apart."""
    kind, each = type(value), partial(_value, depth=depth + 1)
    if depth > MAX_DEPTH:
        raise _Unknown
    if kind in LITERALS:
        return kind, repr(value)
    if kind in (tuple, list, torch.Size):
        return kind, tuple(map(each, value))
    if kind in (set, frozenset):
        return kind, frozenset(map(each, value))
    if isinstance(value, dict):
        return kind, tuple((each(k), each(v)) for k, v in value.items())
    if kind is partial:
        return kind, each(value.func), each(value.args), each(value.keywords)
    if isinstance(value, type | Enum | BuiltinFunctionType | torch._ops.OpOverload) or (
        kind is FunctionType and not value.__closure__
    ):
        return Same(value)
    plain = all(c.__flags__ & HEAP_TYPE and "__slots__" not in vars(c) for c in kind.__mro__[:-1])
    if not plain or isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        raise _Unknown
    return kind, each(vars(value))


@contextmanager
def without_remembered_graphs() -> Iterator[None]:
    """Export each model anew within the block, as tests of the export itself want."""
    forget_graphs()
    try:
        yield
    finally:
        forget_graphs()
