"""The dependency graph: which slices of which parameters belong together, found in one run of a model.

`trace` calls the model once on an example under a dispatch mode. Every dimension of every tensor gets symbolic axes
(`symbolic_dims.py`), which the rules of the operators (`op_table.py`) refine and unify. The result are groups: an axis
of parameters, with every dimension in which it occurs. Removing a unit of a group is exact except for what `notes`
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.common.report import Report, group_similar_rows
from rarefy.dependency.symbolic_dims import Axis, Expr, fixed, leaves, lock, unit_of_index
from rarefy.dependency.tracer import KERNEL, Trace, clear_caches, decomposed_ops, tracking_module_names
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import check_is_module, unwrap


@dataclass(frozen=True, eq=False)
class Member:
    """A dimension of a parameter or buffer in which the units of a group occur.

    role  "out": the parameter produces the units; "in": it reads them
    """

    name: str
    dim: int
    role: str  # "out": it makes the units, "in": it reads them


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be removed one by one, each with its slices of all members.

    name    the first parameter and dimension that produce the units; unique among groups of a kind
    kind    channel or group of a convolution, neuron of a Linear, head (with the queries that share it), query_head,
            head_dim
    lock    why no unit can be removed; None if units can
    notes   what a removal changes besides the units, such as the mean in a LayerNorm
    """

    name: str
    kind: str
    axis: Axis
    members: tuple[Member, ...]
    lock: str | None
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Return the number of units."""
        return self.axis.size


@dataclass(eq=False)
class Graph:
    """The result of `trace`.

    dims      by name, the symbolic dimensions of each parameter and buffer
    groups    coupled units, in the order of parameters
    unknown   operators without a rule: (operator, module); the dimensions of their tensors are locked
    sizes     by module name, dimensions whose size the module's code names, as in `view`
    costs     multiply-adds of matrix products, convolutions and attention: a factor, and the dimensions to multiply
    unused   names of weights that the example does not use
    derived_weights  by module name, the dimensions of a weight that is computed in each call, as weight_norm does
    products  outputs of matrix products and convolutions, inputs of norms, in order: operator, dimensions
    """

    dims: dict[str, list[Expr]]
    groups: tuple[Group, ...]
    unknown: tuple[tuple[str, str], ...]
    sizes: dict[str, list[Expr]]
    equal: tuple[tuple[Expr, Expr], ...] = ()  # parts of a chunk, which must stay equally long
    owners: dict[str, list[tuple[nn.Module, str]]] = field(default_factory=dict)
    costs: list[tuple[int, list[Expr]]] = field(default_factory=list)
    products: list[tuple[str, list[Expr]]] = field(default_factory=list)
    derived_weights: dict[str, list[Expr]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # weights that the example does not use
    _unit_indices: dict[tuple[str, int], dict[Axis, Tensor]] = field(default_factory=dict)

    def unit_indices(self, name: str, dim: int) -> dict[Axis, Tensor]:
        """Return the unit of each axis to which the indices of a dimension belong, -1 for none. O(size x axes),
        once.
        """
        if (name, dim) not in self._unit_indices:
            e = self.dims[name][dim]
            self._unit_indices[name, dim] = {a: unit_of_index(e, a) for a in dict.fromkeys(leaves(e))}
        return self._unit_indices[name, dim]


def trace(model: nn.Module, example: Any) -> Graph:
    """Run the model once on `example` in evaluation mode, and return which slices belong together.

    Raises ModelError if the example does not run. Cost: one call, and O(axes) per operator.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> for g in trace(net, torch.randn(1, 4)).groups: print(g.name, g.kind, g.size, g.lock)
    0.weight:0 neuron 6 None
    0.weight:1 neuron 4 the model is given it
    2.weight:0 neuron 2 the model returns it
    """
    from rarefy.dependency.op_table import RULES  # the rules import the tracer

    model = unwrap(model)
    check_is_module(model)
    clear_caches(model)
    run = Trace(model, RULES)
    for t in tensors_in(example):
        run.known_dims[t] = [fixed(n, "the model is given it") for n in t.shape]
    try:
        with evaluating(model), torch.no_grad(), decomposed_ops(), tracking_module_names(model, run.stack), run:
            output = call(model, on_device(model, example))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise ModelError(f"example: {error}") from error
    if not tensors_in(output):
        raise ModelError(
            f"the model returns {type(output).__name__}, in which no tensor is found, so nobody knows which units have "
            "to stay: return a tensor, or a tuple, a dict or a dataclass of tensors"
        )
    for t in tensors_in(output):
        for e in run.dims(t):
            lock(e, "the model returns it")
    for parameter in model.parameters():
        if id(parameter) not in run.used:  # such as wav2vec2's masked_spec_embed, which only training reads
            for e in run.dims(parameter):
                lock(e, "the example does not use it")
    graph = _graph(model, run)
    unused = [n for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in run.used]
    graph.unused = tuple(n.removesuffix(".weight") for n in unused)
    return graph


def _graph(model: nn.Module, run: Trace) -> Graph:
    dims: dict[str, list[Expr]] = {}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    names_of: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for attribute, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None:
                name = names_of.setdefault(id(t), f"{prefix}.{attribute}" if prefix else attribute)
                dims[name] = run.param_dims[id(t)]
                owners.setdefault(name, []).append((module, attribute))
    members_of: dict[Axis, list[Member]] = {}
    for name, exprs in dims.items():
        t = getattr(*owners[name][0])
        for d, e in enumerate(exprs):
            for axis in dict.fromkeys(leaves(e)):
                role = "out" if (id(t), d) in run.output_dims else run.roles.get((id(t), d), "out")
                members_of.setdefault(axis, []).append(Member(name, d, role))
    convolution_parameters = _convolution_parameters(model, owners)
    params = {n for n in dims if isinstance(getattr(*owners[n][0]), nn.Parameter)}
    groups, name_counts = [], dict[tuple[str, str], int]()
    for axis, members in members_of.items():
        if axis.lock == KERNEL or not any(m.name in params for m in members):
            continue
        makers = [m for m in members if m.role == "out" and m.name in params]
        reason = axis.lock or (None if makers else "no parameter makes it")
        first = (makers or members)[0]
        name, kind = f"{first.name}:{first.dim}", _kind(axis, members, convolution_parameters)
        count = name_counts[name, kind] = name_counts.get((name, kind), 0) + 1
        name = f"{name} ({count})" if count > 1 else name  # a dimension of several axes
        groups.append(Group(name, kind, axis, tuple(members), reason, tuple(sorted(axis.notes))))
    return Graph(
        dims,
        tuple(groups),
        tuple(run.unknown),
        run.sizes,
        tuple(run.algebra.equal),
        owners,
        run.costs,
        run.products,
        run.derived_weights,
    )


def _kind(axis: Axis, members: list[Member], convolution_parameters: set[str]) -> str:
    if axis.kind in ("head", "query_head", "head_dim", "group"):
        return axis.kind
    return "channel" if any(m.name in convolution_parameters for m in members) else "neuron"


def _convolution_parameters(model: nn.Module, owners: Mapping[str, list[tuple[nn.Module, str]]]) -> set[str]:
    """Return the names of parameters of convolutions, those beneath a parametrization included."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    holders = {id(part) for m in convolutions for part in (m, *getattr(m, "parametrizations", {}).values())}
    return {name for name, slots in owners.items() if id(slots[0][0]) in holders}


def groups(model: nn.Module, example: Any) -> Report:
    """List the groups of coupled units of a model and whether each can be pruned.

    A group is what `cut_` removes together: a neuron or channel with its slices of every weight, bias and norm, an
    attention head with its rows and columns. Cost: one call of the model.

    Args:
        model: the model; it is left unchanged.
        example: an input that the model can be called with: a tensor, a tuple (inputs, target) or a dict.

    Returns:
        A report with one row per group: its name, its kind (channel, neuron, head, query_head, head_dim, group), the
        number of units, the number of parameters and buffers it slices, and why its units stay ("" if they can go).
        Groups that differ only in numbers of their names are printed as one row.

    Raises:
        ModelError: the example does not run.

    Example:
        >>> import rarefy
        >>> print(rarefy.groups(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(1, 4)))
        groups of Sequential
        group       many  kind    units  parameters  stays because
        0.weight:0     1  neuron      6           3
        0.weight:1     1  neuron      4           1  the model is given it
        2.weight:0     1  neuron      2           2  the model returns it
        units that can go: 1 of 3 groups
    """
    graph = trace(model, example)
    rows = [
        {"group": g.name, "kind": g.kind, "units": g.size, "parameters": len(g.members), "stays because": g.lock or ""}
        for g in graph.groups
    ]
    free = sum(g.lock is None for g in graph.groups)
    summary = {"units that can go": f"{free} of {len(graph.groups)} groups"}
    title = f"groups of {type(unwrap(model)).__name__}"
    return Report(title, tuple(rows), summary, unsupported_notes(graph), tuple(group_similar_rows(rows, "group")))


def unsupported_notes(graph: Graph) -> tuple[str, ...]:
    """Return a note for each operator without a rule, and one for layers that the example does not use."""
    notes = tuple(
        f"no rule for {op} in {module_name}: channels that reach it are not pruned" for op, module_name in graph.unknown
    )
    if not graph.unused:
        return notes
    names = ", ".join(graph.unused[:4]) + (f" and {len(graph.unused) - 4} more" if len(graph.unused) > 4 else "")
    return (*notes, f"not called on the example, so a call that uses it fails or returns something else: {names}")
