"""Short ways through the nesting of arguments and outputs for the usual call, tensors by position or by name.

They matter to models that take less than a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.model.nesting import children_of

TENSORS = (Tensor, nn.Parameter)


def count_flat_arguments(in_spec: Any) -> int | None:
    """Return how many arguments are passed by position, None where one of all arguments is nested."""
    positional, by_name = map(children_of, children_of(in_spec))
    return len(positional) if all(map(_is_leaf, [*positional, *by_name])) else None


def flat_tensors(args: Sequence[Any], kwargs: Mapping[str, Any], names: Mapping[str, Any]) -> list[Any] | None:
    """Return arguments in order, None unless all are tensors and the keywords are those of `names`."""
    if len(kwargs) != len(names):
        return None
    leaves = [*args, *map(kwargs.get, names)]
    return leaves if all(type(t) in TENSORS for t in leaves) else None


def rebuilder(out_spec: Any) -> Callable[[list[Any]], Any]:
    """Return a function that nests output tensors as the model does."""
    if _is_leaf(out_spec):
        return itemgetter(0)
    if out_spec.type in (tuple, list) and all(map(_is_leaf, children_of(out_spec))):
        return out_spec.type
    return lambda leaves: pytree.tree_unflatten(leaves, out_spec)


def _is_leaf(spec: Any) -> bool:
    return spec.type is None
