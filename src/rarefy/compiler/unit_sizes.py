"""Guards of models whose code asks whether a size is 1: what the branch for 1 asks of the other sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rarefy.common.errors import ModelError
from rarefy.compiler.fx_utils import ExportedGraph
from rarefy.compiler.other_sizes import connected_sizes, resized


def allow_ones(
    exported: ExportedGraph, specs: Sequence[Any], leaves: list[Any], guards_of: Callable[[list[Any]], tuple[str, ...]]
) -> None:
    """Let sizes be 1 although the model's code asks for it, under the conditions of its branch for 1.

    Whether this branch gives the same outputs is compared afterwards, see `verify.py`. It is traced here, so that a
    comparison at some sizes holds at all that take the same branches.

    Args:
        exported: the graph, whose guards may say that a size is not 1.
        specs: what each input must be.
        leaves: the example's inputs.
        guards_of: returns the guards of the model traced with inputs; ModelError where it cannot be traced.

    Cost: an export for each such size.
    """
    for group in connected_sizes(specs, leaves):
        not_1 = {f"{n} != 1" for n in group} & {*exported.guards}
        if not not_1:
            continue
        try:
            conditions = guards_of(resized(specs, leaves, dict.fromkeys(group, 1)))
        except ModelError:
            continue
        relaxed = {g: f"{g} or ({' and '.join(f'({c})' for c in conditions) or '1'})" for g in not_1}
        exported.guards = tuple(relaxed.get(g, g) for g in exported.guards)
