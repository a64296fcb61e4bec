"""How arguments and outputs are nested, as torch's pytree describes it, and the names of the tensors in them."""

from __future__ import annotations

import inspect
from collections import namedtuple
from typing import Any

from torch import nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from rarefy.model.signature import get_signature

PLAIN = {immutable_list: list, immutable_dict: dict}  # of the outputs of graph modules


def type_of(spec: Any) -> Any:
    """Return the class of what one of torch's pytree specs describes; None for a leaf."""
    return PLAIN.get(spec.type, spec.type)


def children_of(spec: Any) -> list[Any]:
    """Return the specs of what is nested directly in one of torch's pytree specs."""
    return spec.children() if hasattr(spec, "children") else spec.children_specs


def leaf_names(spec: Any, name: str) -> list[str]:
    """Return a name for each leaf of a nesting: keys, fields and positions joined by dots behind a first name.

    >>> from torch.utils import _pytree as pytree
    >>> leaf_names(pytree.tree_flatten({"a": 1, "b": (2, 3)})[1], "x")
    ['x.a', 'x.b.0', 'x.b.1']
    """
    if spec.type is None:
        return [name]
    children, keys = children_of(spec), spec.context
    keys = keys._fields if spec.type is namedtuple else keys
    named = isinstance(keys, list | tuple) and len(keys) == len(children)
    return [
        n for key, s in zip(keys if named else range(len(children)), children) for n in leaf_names(s, f"{name}.{key}")
    ]


def input_names(model: nn.Module, in_spec: Any) -> list[str]:
    """Return the names of a call's leaves: those of the model's file, else of its keywords and parameters.

    Args:
        model: the model.
        in_spec: torch's pytree spec of the arguments.
    """
    args, kwargs = children_of(in_spec)
    signature = get_signature(model)
    in_file = {} if signature is None else {i.parameter: i.name for i in signature.inputs}
    parameters = _positional_names(model, len(children_of(args)))
    keywords = [str(n) for n in kwargs.context]
    named = [*zip(parameters, children_of(args)), *zip(keywords, children_of(kwargs))]
    return [name for parameter, spec in named for name in leaf_names(spec, in_file.get(parameter, parameter))]


def _positional_names(model: nn.Module, count: int) -> list[str]:
    """Return the names of the first parameters of a model, with numbers behind that of `*args`."""
    names: list[str] = []
    for p in inspect.signature(model.forward).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}.{i}" for i in range(count - len(names))]
        else:
            names.append(p.name)
    return names[:count]


def output_names(model: nn.Module | None, out_spec: Any) -> list[str]:
    """Return the names of a call's outputs: those of the model's file, else of fields, else output_0 and so on."""
    signature = get_signature(model)
    if signature is not None and len(signature.outputs) == out_spec.num_leaves:
        return list(signature.outputs)
    if type_of(out_spec) in (None, tuple, list):
        specs = [out_spec] if out_spec.type is None else children_of(out_spec)
        return [n for i, s in enumerate(specs) for n in leaf_names(s, f"output_{i}")]
    return [n.removeprefix("output.") for n in leaf_names(out_spec, "output")]
