"""Guards of models whose code asks whether a size is 1: what the branch for 1 asks of the other sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rarefy.common.errors import ModelError
from rarefy.compiler.fx_utils import ExportedGraph
from rarefy.compiler.other_sizes import connected_sizes, resized
from rarefy.compiler.shape_guards import MAX_SIZE, parse

OTHERS = range(2, 34)  # sizes at which a condition that only excludes 1 holds


def allow_ones(
    exported: ExportedGraph, specs: Sequence[Any], leaves: list[Any], trace: Callable[[list[Any]], ExportedGraph]
) -> None:
    """Let sizes be 1 although the model's code asks for it, under the conditions of its branch for 1.

    Whether this branch gives the same outputs is compared afterwards, see `verify.py`. It is traced here, so that a
    comparison at some sizes holds at all that take the same branches.

    Args:
        exported: the graph, whose guards may say that a size is not 1.
        specs: what each input must be.
        leaves: the example's inputs.
        trace: returns the model's graph for inputs; ModelError where it cannot be traced.

    Cost: an export for each such size.
    """
    groups = connected_sizes(specs, leaves)
    example = {n: size for group in groups for n, size in group.items()}
    for group in groups:
        ones = dict.fromkeys(group, 1)
        broken = {g for g in exported.guards if not parse(g).holds({**example, **ones})}
        if not broken or any(exported.ranges[n][0] > 1 for n in group):
            continue
        others = [{**example, **dict.fromkeys(group, size)} for size in OTHERS]
        if not all(parse(g).holds(sizes) for g in broken for sizes in others):
            continue  # a condition of another kind, which 1 happens to break
        try:
            branch = trace(resized(specs, leaves, ones))
        except ModelError:
            continue
        at_1 = [f"{n} == 1" for n in sorted(group)]
        lowest = [f"{n} >= {low}" for n, (low, _) in branch.ranges.items() if low > 1]
        highest = [f"{n} <= {high}" for n, (_, high) in branch.ranges.items() if high < MAX_SIZE]
        limits = [*lowest, *highest, *branch.guards]
        if not all(parse(g).names <= exported.ranges.keys() for g in limits):
            continue  # of sizes that are fixed in this graph
        allowed = " and ".join(f"({c})" for c in (*at_1, *limits))
        always = set()  # what is true of all sizes now
        if not limits and len(group) == 1:
            always = {f"{n} {excludes_1}" for n in group for excludes_1 in ("!= 1", "> 1", ">= 2")}
        remaining = [g for g in exported.guards if g not in always]
        exported.guards = tuple(f"{g} or ({allowed})" if g in broken else g for g in remaining)
