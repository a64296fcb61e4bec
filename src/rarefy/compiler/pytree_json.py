"""How a call's arguments and outputs are nested, as JSON and back: dicts, lists, tuples, and classes with named fields.

A file names the class of outputs, but loading does not look it up: values come back in an `Outputs`, or in a
`NamedOutputs` where they were a namedtuple. Both can be read in the same ways. Where transformers is imported already,
its own output classes are used.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, namedtuple
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError
from rarefy.model.nesting import children_of, type_of

LEAF = "*"
MAX_DEPTH = 64  # levels of nesting
KEY_TYPES = (str, int, bool, float, type(None))


class Outputs(dict[str, Any]):
    """Outputs by name, as attributes, and by position.

    >>> out = Outputs(hidden=1, pooled=2)
    >>> out.hidden, out["pooled"], out[0], out[:2], out.to_tuple()
    (1, 2, 1, (1, 2), (1, 2))
    """

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"no output {name!r}: there are {', '.join(self)}")
        return super().__getitem__(name)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values in order."""
        return tuple(self.values())


class NamedOutputs(tuple[Any, ...]):
    """A tuple of outputs that also have names.

    >>> pair = NamedOutputs(("a", "b"), (1, 2))
    >>> pair.b, pair[0], len(pair)
    (2, 1, 2)
    """

    _fields: tuple[str, ...]

    def __new__(cls, names: Iterable[str], values: Iterable[Any]) -> NamedOutputs:
        outputs = super().__new__(cls, values)
        outputs._fields = tuple(names)
        return outputs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._fields:
            raise AttributeError(f"no output {name!r}")
        return self[self._fields.index(name)]

    def __reduce__(self) -> Any:
        return NamedOutputs, (self._fields, tuple(self))


pytree.register_pytree_node(
    Outputs, lambda o: (list(o.values()), list(o)), lambda values, names: Outputs(zip(names, values))
)
pytree.register_pytree_node(
    NamedOutputs, lambda o: (list(o), o._fields), lambda values, names: NamedOutputs(names, values)
)


def to_nesting(spec: Any, arguments: bool = False) -> Any:
    """Return one of torch's pytree specs as JSON. O(nodes).

    Args:
        spec: of arguments or outputs.
        arguments: these are arguments, whose classes a call must match exactly.

    Raises:
        ModelError: for a class whose fields have no names, and for any class among arguments.
    """
    kind, parts = type_of(spec), [to_nesting(s, arguments) for s in children_of(spec)]
    if kind is None:
        return LEAF
    if kind in (tuple, list):
        return {kind.__name__: parts}
    if kind in (dict, OrderedDict) and all(type(k) in KEY_TYPES for k in spec.context):
        return {"ordered" if kind is OrderedDict else "dict": [list(spec.context), parts]}
    kind, names = (spec.context, spec.context._fields) if kind is namedtuple else (kind, spec.context)
    name = f"{kind.__module__}.{kind.__qualname__}"
    named = isinstance(names, list | tuple) and len(names) == len(parts) and all(type(n) is str for n in names)
    if arguments or not named:
        allowed = "arguments may be dicts, lists and tuples" if arguments else "outputs need named fields"
        raise ModelError(f"this model runs, but cannot be saved: {allowed}, got a {name}")
    return {"named" if issubclass(kind, tuple) else "outputs": [name, list(names), parts]}


def from_nesting(value: Any, leaves: int, arguments: bool = False) -> Any:
    """Return torch's pytree spec for a nesting from JSON. O(nodes).

    Args:
        value: the JSON.
        leaves: tensors that it must have.
        arguments: these are a call's arguments: a tuple of arguments and a dict of keywords.

    Raises:
        ValueError: if the JSON does not describe a structure of that many tensors.
    """
    if arguments and (not _is(value, "tuple") or len(value["tuple"]) != 2 or not _is(value["tuple"][1], "dict")):
        raise ValueError("expected arguments as a tuple and a dict of keywords")
    spec = pytree.tree_flatten(_example_of(value, 0))[1]
    if spec.num_leaves != leaves:
        raise ValueError(f"expected a structure of {leaves} tensors, got one of {spec.num_leaves}")
    return spec


def _is(value: Any, kind: str) -> bool:
    return type(value) is dict and list(value) == [kind] and type(value[kind]) is list


def _example_of(value: Any, depth: int) -> Any:
    """Return an object that is nested so, with empty tensors in it."""
    if value == LEAF:
        return torch.empty(0, dtype=torch.float32)
    if type(value) is not dict or len(value) != 1 or depth > MAX_DEPTH:
        raise ValueError(f"{str(value)[:80]!r} is not a valid structure")
    ((kind, entry),) = value.items()
    if kind in ("tuple", "list") and type(entry) is list:
        return (tuple if kind == "tuple" else list)(_example_of(v, depth + 1) for v in entry)
    length = {"dict": 2, "ordered": 2, "named": 3, "outputs": 3}.get(kind)
    if length is None or type(entry) is not list or len(entry) != length:
        raise ValueError(f"{str(kind)[:80]!r} is not a valid structure")
    names, parts = entry[-2:]
    types = KEY_TYPES if length == 2 else (str,)
    valid = type(names) is list and type(parts) is list and len(names) == len(parts) and type(entry[0]) in (list, str)
    if not valid or any(type(n) not in types for n in names) or len(set(names)) != len(names):
        raise ValueError(f"{str(entry)[:80]!r} has no valid names for its entries")
    values = [_example_of(v, depth + 1) for v in parts]
    if kind == "named":
        return NamedOutputs(names, values)
    if kind == "outputs":
        return _transformers_output(entry[0], names, values) or Outputs(zip(names, values))
    return (OrderedDict if kind == "ordered" else dict)(zip(names, values))


def _transformers_output(name: str, names: list[str], values: list[Any]) -> Any:
    """Return the outputs in transformers' class of this name, None where it is not imported or has no such class."""
    module, _, class_name = name.rpartition(".")
    outputs, generic = (sys.modules.get(f"transformers.{m}") for m in ("modeling_outputs", "utils.generic"))
    valid = module == "transformers.modeling_outputs" and class_name.isidentifier() and "Output" in class_name
    if outputs is None or generic is None or not valid:
        return None
    kind = vars(outputs).get(class_name)
    if not isinstance(kind, type) or not issubclass(kind, generic.ModelOutput) or kind is generic.ModelOutput:
        return None
    try:
        example = kind(**dict(zip(names, values)))
        return example if list(example) == names else None
    except (TypeError, ValueError):  # another version of transformers has other fields
        return None
