"""How a call's arguments and outputs are laid out, as JSON and back: dicts, lists, tuples, and what has names.

A class of outputs is known by its name in a file, and not looked up by it: values come back in an `Outputs`, or a
`Named` where they were a namedtuple, which are read in the same ways. Where transformers is imported already, its own
outputs are themselves.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, namedtuple
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError

LEAF = "*"
MOST_DEEP = 64  # levels of what lies in one another
KEYS = (str, int, bool, float, type(None))


class Outputs(dict[str, Any]):
    """Outputs by name, as attributes, and by their place.

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
        """Return the values in their order."""
        return tuple(self.values())


class Named(tuple[Any, ...]):
    """Outputs in their order that have names too.

    >>> pair = Named(("a", "b"), (1, 2))
    >>> pair.b, pair[0], len(pair)
    (2, 1, 2)
    """

    _fields: tuple[str, ...]

    def __new__(cls, names: Iterable[str], values: Iterable[Any]) -> Named:
        made = super().__new__(cls, values)
        made._fields = tuple(names)
        return made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._fields:
            raise AttributeError(f"no output {name!r}")
        return self[self._fields.index(name)]

    def __reduce__(self) -> Any:
        return Named, (self._fields, tuple(self))


pytree.register_pytree_node(
    Outputs, lambda o: (list(o.values()), list(o)), lambda values, names: Outputs(zip(names, values))
)
pytree.register_pytree_node(Named, lambda o: (list(o), o._fields), lambda values, names: Named(names, values))


def tree(spec: Any, arguments: bool = False) -> Any:
    """Return a spec of torch's as JSON. ModelError for a class whose parts have no names, and, among arguments, for
    any: what a call gives is compared with what was compiled for. O(parts)."""
    kind, children = spec.type, spec.children() if hasattr(spec, "children") else spec.children_specs
    parts = [tree(s, arguments) for s in children]
    if kind is None:
        return LEAF
    if kind in (tuple, list):
        return {kind.__name__: parts}
    if kind in (dict, OrderedDict) and all(type(k) in KEYS for k in spec.context):
        return {"ordered" if kind is OrderedDict else "dict": [list(spec.context), parts]}
    kind, names = (spec.context, spec.context._fields) if kind is namedtuple else (kind, spec.context)
    name = f"{kind.__module__}.{kind.__qualname__}"
    named = isinstance(names, list | tuple) and len(names) == len(parts) and all(type(n) is str for n in names)
    if arguments or not named:
        where = "arguments, of which dicts, lists and tuples" if arguments else "outputs, of which those with names"
        raise ModelError(f"a {name} is among the {where} can be saved")
    return {"named" if issubclass(kind, tuple) else "outputs": [name, list(names), parts]}


def spec_of(told: Any, leaves: int, arguments: bool = False) -> Any:
    """Return torch's spec of so many tensors in a layout from JSON; ValueError for what is none. O(parts).

    arguments   whether these are a call's, (arguments, keywords)
    """
    if arguments and (not _is(told, "tuple") or len(told["tuple"]) != 2 or not _is(told["tuple"][1], "dict")):
        raise ValueError("arguments are a tuple and a dict of keywords")
    spec = pytree.tree_flatten(_made(told, 0))[1]
    if spec.num_leaves != leaves:
        raise ValueError(f"{spec.num_leaves} tensors laid out, there are {leaves}")
    return spec


def _is(told: Any, kind: str) -> bool:
    return type(told) is dict and list(told) == [kind] and type(told[kind]) is list


def _made(told: Any, deep: int) -> Any:
    """Something that is laid out so."""
    if told == LEAF:
        return torch.empty(0)
    if type(told) is not dict or len(told) != 1 or deep > MOST_DEEP:
        raise ValueError(f"{str(told)[:80]!r} is no layout")
    ((kind, about),) = told.items()
    if kind in ("tuple", "list") and type(about) is list:
        return (tuple if kind == "tuple" else list)(_made(t, deep + 1) for t in about)
    wide = {"dict": 2, "ordered": 2, "named": 3, "outputs": 3}.get(kind)
    if wide is None or type(about) is not list or len(about) != wide:
        raise ValueError(f"{str(kind)[:80]!r} is no layout")
    names, parts = about[-2:]
    allowed = KEYS if wide == 2 else (str,)
    right = type(names) is list and type(parts) is list and len(names) == len(parts) and type(about[0]) in (list, str)
    if not right or any(type(n) not in allowed for n in names) or len(set(names)) != len(names):
        raise ValueError(f"{str(about)[:80]!r} has no names for its parts")
    values = [_made(t, deep + 1) for t in parts]
    if kind == "named":
        return Named(names, values)
    if kind == "outputs":
        return _of_transformers(about[0], names, values) or Outputs(zip(names, values))
    return (OrderedDict if kind == "ordered" else dict)(zip(names, values))


def _of_transformers(name: str, names: list[str], values: list[Any]) -> Any:
    """The outputs as transformers' own, where it is imported and has them under this name; else None."""
    module, _, leaf = name.rpartition(".")
    known, generic = (sys.modules.get(f"transformers.{m}") for m in ("modeling_outputs", "utils.generic"))
    fits = module == "transformers.modeling_outputs" and leaf.isidentifier() and "Output" in leaf
    if known is None or generic is None or not fits:
        return None
    kind = vars(known).get(leaf)
    if not isinstance(kind, type) or not issubclass(kind, generic.ModelOutput) or kind is generic.ModelOutput:
        return None
    try:
        made = kind(**dict(zip(names, values)))
        return made if list(made) == names else None
    except (TypeError, ValueError):  # of a transformers that has other outputs under this name
        return None
