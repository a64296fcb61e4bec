"""Graphs of torch.export without weights, remembered for the last few models.

Exporting takes most of the time of `compile` and depends on a model's code and sizes, not on its weights. So a model
that is compiled again, with other weights or in another precision, uses the graph of the first time. A graph is used
again only for modules of libraries, of the same classes with the same attributes and sizes. Models with code of the
user, which may read anything, and with hooks or closures are exported each time. Outputs are compared with the model's
all the same.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from threading import Lock
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError, OutputsDifferError
from rarefy.compiler.fx_utils import MODULES
from rarefy.compiler.torch_guards import conditions

REMEMBERED = 4  # graphs
MAX_DEPTH, MAX_VALUES = 12, 20_000  # of attributes: how deep they are nested, and how many
LIBRARIES = ("torch", "torchvision", "transformers", "huggingface_hub", "timm", "sentence_transformers", "rarefy")
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
        guards: conditions on open sizes under which the graph is right, see `shape_guards.py`.
        in_spec: torch's pytree spec of the arguments.
        out_spec: torch's pytree spec of the outputs.
    """

    graph: fx.Graph
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    ranges: Mapping[str, tuple[int, int]]
    guards: tuple[str, ...]
    in_spec: Any
    out_spec: Any


def copy_of(graph: fx.Graph) -> fx.Graph:
    """Return the same nodes, for passes to change, with the records that passes read. O(nodes)."""
    new, same = fx.Graph(), {}
    new.output(new.graph_copy(graph, same))
    for node, copied in same.items():
        copied.meta = {k: node.meta[k] for k in ("val", MODULES) if k in node.meta}
    return new


def traced(program: Any, model: nn.Module, decisions: Iterable[Any]) -> TracedGraph:
    """Return the graph of a model that torch exported; ModelError for one that changes its buffers or its inputs.

    decisions are those of `torch_guards.py`.
    """
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise ModelError("the model changes its buffers or its inputs when it is called, so it cannot be compiled")
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    own, every = tensors_of(model), {**program.state_dict, **program.constants}
    tensors = {t: every[t].detach() for t in names.values() if t not in own}
    specs = program.call_spec.in_spec, program.call_spec.out_spec
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name not in names]
    ranges, guards = conditions(program, (n.meta.get("val") for n in inputs), decisions)
    return TracedGraph(program.graph_module.graph, names, tensors, ranges, guards, *specs)


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
    """Return what `make` does; where outputs differ with the graph of an earlier model, do it again with a new one."""
    before = _reused
    try:
        return make()
    except OutputsDifferError:
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
    describe = _Description()
    leaves, spec = pytree.tree_flatten(arguments)
    try:
        modules = tuple(describe.module(n, m) for n, m in model.named_modules(remove_duplicate=False))
        sizes = tuple(describe.tensor(t) if isinstance(t, Tensor) else describe.value(t) for t in leaves)
        flags = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
        return modules, sizes, str(spec), describe.value(options), *flags
    except _Unknown:
        return None


class _Description:
    """Says what tells modules and values apart, in at most MAX_VALUES values.

    _Unknown is raised for what may change without being told apart: classes and functions of the user, whose globals
    and attributes are anybody's, and objects that do not show what they hold.
    """

    def __init__(self) -> None:
        self.places: dict[int, int] = {}  # of tensors and modules, which may have several names
        self.values = 0

    def place(self, of: Any) -> int:
        return self.places.setdefault(id(of), len(self.places))

    def module(self, name: str, module: nn.Module) -> Hashable:
        attributes = vars(module)
        if not _is_known(type(module)) or "forward" in attributes or any(attributes.get(h) for h in FORWARD_HOOKS):
            raise _Unknown
        own = {k: v for k, v in attributes.items() if k not in OWN}
        tensors = (*module._parameters.items(), *module._buffers.items())
        of_tensors = tuple((n, None if t is None else (self.tensor(t), self.place(t))) for n, t in tensors)
        return name, type(module), module.training, self.place(module), self.value(own), of_tensors

    def tensor(self, t: Tensor) -> Hashable:
        if type(t) not in (Tensor, nn.Parameter, nn.Buffer) or t.layout != torch.strided:
            raise _Unknown
        return t.dtype, tuple(t.shape), t.stride(), t.device, t.requires_grad, self.value(vars(t))

    def value(self, value: Any, depth: int = 0) -> Hashable:
        kind, each = type(value), partial(self.value, depth=depth + 1)
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise _Unknown
        if kind in LITERALS:
            return kind, repr(value)
        if kind in (tuple, list, torch.Size):
            return kind, tuple(map(each, value))
        if kind in (set, frozenset):  # a copy may have another order
            return kind, frozenset(Counter(map(each, value)).items())
        if kind in (dict, OrderedDict):
            return kind, tuple((each(k), each(v)) for k, v in value.items())
        if kind is partial:
            return kind, each(value.func), each(value.args), each(value.keywords)
        if isinstance(value, Enum | BuiltinFunctionType | torch._ops.OpOverload):
            return Same(value)
        if isinstance(value, type) and _is_known(value):
            return Same(value)
        if kind is FunctionType and not value.__closure__ and _is_of_library(value):
            return Same(value), each(value.__defaults__), each(value.__kwdefaults__)
        if isinstance(value, nn.Module) or not _is_known(kind) or not hasattr(value, "__dict__"):
            raise _Unknown
        return kind, each(vars(value))


def _is_of_library(thing: Any) -> bool:
    return thing.__module__.partition(".")[0] in LIBRARIES


def _is_known(kind: type) -> bool:
    """Return whether a class and its bases are Python code of libraries, whose objects show all that they hold."""
    return all(_is_of_library(c) and c.__flags__ & HEAP_TYPE and "__slots__" not in vars(c) for c in _bases(kind))


def _bases(kind: type) -> list[type]:
    """Return a class and its bases, without those that hold nothing."""
    return [c for c in kind.__mro__ if c is not object and c.__module__ not in ("abc", "typing", "collections.abc")]
