"""Masks of padding as transformers writes them: indexed by batches and keys, and joined with what is true."""

from __future__ import annotations

from typing import Any

import torch

from rarefy.compiler.fx_utils import (
    ExportedGraph,
    Node,
    aten,
    dtype_of,
    insert_before,
    is_node,
    replace_uses,
    same,
    shape,
)
from rarefy.compiler.passes.matchers import constant_of

ARANGES = (aten.arange.default, aten.arange.start)
ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)


def index_to_view(exported: ExportedGraph, node: Node) -> None:
    """Write x[arange(n)[:, None, None, None], arange(m)[None, None, None]] as x[:n, None, None, :m].

    Indices have as many dimensions as the result.
    """
    if node.target is not aten.index.Tensor or len(node.args[1]) != len(shape(node.args[0])):
        return
    x, places = node.args[0], [_arange_along(i) for i in node.args[1]]
    if any(p is None for p in places) or any(len(shape(i)) != len(shape(node)) for i in node.args[1]):
        return
    lengths, dims = zip(*places)  # type: ignore[arg-type]
    if list(dims) != sorted(set(dims)):
        return
    for d, (length, at) in enumerate(zip(lengths, dims)):
        wanted = shape(node)[at]
        if not same(shape(x)[d : d + 1], (wanted,)):
            value = x.meta["val"]
            with exported.graph.inserting_before(node):
                x = exported.graph.call_function(aten.slice.Tensor, (x, d, 0, length))
            x.meta["val"] = value.new_empty([wanted if i == d else n for i, n in enumerate(value.shape)])
    for d in range(len(shape(node))):
        if d not in dims:
            x = insert_before(exported, node, aten.unsqueeze.default, x, d)
    replace_uses(exported, node, x)


def remove_true_operands(exported: ExportedGraph, node: Node) -> None:
    """Replace `mask & true` by the mask itself, so that the mask alone is expanded."""
    if node.target is not aten.expand.default or node.kwargs:
        return
    x, sizes = node.args
    while x.target in ANDS:
        boolean = all(is_node(a) and dtype_of(a) == torch.bool for a in x.args)
        pairs = [x.args, x.args[::-1]] if boolean else []
        other = next((b for a, b in pairs if _is_true(exported, a)), None)
        if other is None or len(shape(other)) != len(shape(x)):
            return
        unchanged = [d for d, n in enumerate(sizes) if isinstance(n, int) and n == -1]
        if len(sizes) != len(shape(x)) or not same(*([shape(y)[d] for d in unchanged] for y in (other, x))):
            return
        x = other
        node.update_arg(0, x)


def _arange_along(x: Any) -> tuple[Any, int] | None:
    """Return the end of an arange and the dimension along which a node has it; None for any other node."""
    dims: list[int] = []
    while is_node(x) and (x.target is aten.unsqueeze.default or _adds_zero(x)):
        if x.target is aten.unsqueeze.default:
            dims.append(x.args[1] % len(shape(x)))
        x = x.args[0]
    if not is_node(x) or x.target not in ARANGES or (x.target is aten.arange.start and x.args[0] != 0):
        return None
    at = 0
    for d in reversed(dims):
        at += d <= at
    return x.args[-1], at


def _adds_zero(x: Node) -> bool:
    return x.target is aten.add.Tensor and isinstance(x.args[1], int) and x.args[1] == 0 and not x.kwargs


def _is_true(exported: ExportedGraph, x: Node) -> bool:
    """Return whether all elements of a node are true, whatever the sizes are."""
    constant = constant_of(exported, x)
    if constant is not None:
        return bool(constant.all())
    if x.target in ANDS:
        return all(is_node(a) and _is_true(exported, a) for a in x.args)
    if x.target in (aten.unsqueeze.default, aten.expand.default):
        return _is_true(exported, x.args[0])
    return x.target is aten.ge.Scalar and x.args[1] == 0 and _arange_along(x.args[0]) is not None
