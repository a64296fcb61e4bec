"""The pass for attention whose queries, keys and values are cut from layers in a way that no other pass matches."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, add_constant, aten, dtype_of, insert_before, keep_layer, shape
from rarefy.compiler.passes.attention import attention_options
from rarefy.compiler.passes.linear import SPLITS
from rarefy.compiler.passes.matchers import SDPA
from rarefy.compiler.passes.tokens import (
    BATCHES,
    MOVES,
    OPERATORS,
    moves_before,
    numbered,
    run_moves,
    stores_image,
    symbols_of,
)

CUTS = (*MOVES, *SPLITS, aten.unbind.int, aten.select.int, operator.getitem)
POINTWISE = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation and groups of a linear layer on pixels


def convert_heads(exported: ExportedGraph, node: Node) -> None:
    """Convert attention of [batch, heads, tokens, head_dim] whatever views, permutations and splits give it these.

    Where each number comes from is found by trial, as in `convert_moves`. A layer of which a part is taken gets a layer
    of that part in its place.
    """
    if node.target is not SDPA or dtype_of(node) != torch.float32:
        return
    options = attention_options(exported, node)
    dims = [shape(x)[-1] for x in node.args[:3]]
    if options is None or len(shape(node)) not in (4, 5) or dims[2] < dims[0]:
        return
    middle = shape(node)[1:-3]  # other dimensions that heads are batched over
    if not all(isinstance(n, int) for n in middle) or (middle and options[0] is not None):
        return
    matches = [_match(x, dims[2]) for x in node.args[:3]]
    if any(m is None for m in matches):
        return
    rows = [_rows(exported, node, x, *m) for x, m in zip(node.args[:3], matches)]  # type: ignore[misc]
    with exported.graph.inserting_before(node):
        y = exported.graph.call_function(ops.attention, (*rows, *options, None))
    y.meta["val"] = _joined(node)
    keep_layer(y, node)
    y = insert_before(exported, node, aten.unflatten.int, y, 2, [options[1], dims[2]])
    y = insert_before(exported, node, aten.transpose.int, y, 1, 2)
    node.replace_all_uses_with(insert_before(exported, node, aten.unflatten.int, y, 0, [-1, *middle]) if middle else y)
    exported.graph.erase_node(node)


def _joined(x: Node) -> Tensor:
    """Return torch's record of x [.., heads, tokens, head_dim] as rows [batch, tokens, heads * head_dim]."""
    value = x.meta["val"]
    return value.transpose(-3, -2).flatten(-2).flatten(0, -3)


def _match(x: Node, head_dim: int) -> tuple[Node, tuple[Tensor, Tensor, int]] | None:
    """Return the operator whose numbers x [.., heads, tokens, features] has, and which.

    Args:
        x: queries, keys or values.
        head_dim: features of a head that are needed; more than x has stand for zeros.

    Returns:
        The operator, and the features that it gives, [heads * head_dim], -1 for zeros, the tokens of a sample,
        [tokens], and the entries of its first dimension for each sample; None for anything else.
    """
    match = moves_before(x, CUTS)
    if match is None:
        return None
    source, moves = match
    symbols = symbols_of((source, *moves, x))
    if len(symbols) > 1 or (stores_image(source) and len(shape(source)) != 4):
        return None
    symbol = next(iter(symbols), None)
    tried = [_probe(source, moves, symbol, batch, head_dim) for batch in (BATCHES if symbol else (1,))]
    first = tried[0]
    if any(t is None for t in tried) or first is None:
        return None
    same = all(torch.equal(t[0], first[0]) and torch.equal(t[1], first[1]) and t[2] == first[2] for t in tried)  # type: ignore[index]
    return (source, first) if same and _can_give(source, first[0]) else None


def _probe(
    source: Node, moves: list[Node], symbol: Any, batch: int, head_dim: int
) -> tuple[Tensor, Tensor, int] | None:
    """Move a tensor of numbers; return features, tokens and parts, as `_match` does, for one batch size."""
    numbers = numbered(source, stores_image(source), symbol, batch)
    out = None if numbers is None else run_moves(source, moves, numbers, symbol, batch)
    if numbers is None or out is None or out.dim() < 4 or not out.numel() or len(out) % batch:
        return None
    count = numbers.shape[1] if stores_image(source) else numbers.shape[-1]
    number = out.flatten(0, -4).transpose(1, 2).long() - 1  # [batch, tokens, heads, features]
    if int(number.min()) < 0:
        return None
    token, feature = number // count, number % count
    features, tokens = feature[0, 0], token[:, :, 0, 0].reshape(batch, -1)
    per_sample = numbers.numel() // count // batch
    shifts = torch.arange(batch)[:, None] * per_sample
    regular = (token == token[:, :, :1, :1]).all() and (feature == features).all()
    if not regular or not torch.equal(tokens, tokens[:1] + shifts) or int(tokens[0].max()) >= per_sample:
        return None
    features = F.pad(features, (0, head_dim - features.shape[-1]), value=-1)
    return features.flatten(), tokens[0], len(numbers) // batch


def _can_give(source: Node, features: Tensor) -> bool:
    """Return whether an operator gives these features in order, or can be replaced by a layer that does."""
    count = shape(source)[1 if stores_image(source) else -1]
    if torch.equal(features, torch.arange(count)):
        return True
    if source.target is ops.conv2d:
        kernel = shape(source.args[1])[2:]
        return kernel == (1, 1) and source.args[3:5] == (None, None) and tuple(source.args[5:9]) == POINTWISE
    return source.target is ops.linear and source.args[3] is None


def _rows(exported: ExportedGraph, before: Node, x: Node, source: Node, match: tuple[Tensor, Tensor, int]) -> Node:
    """Return x [.., heads, tokens, features] as rows [batch, tokens, heads * head_dim]."""
    features, tokens, parts = match
    image = stores_image(source)
    layer = source
    if not torch.equal(features, torch.arange(shape(source)[1 if image else -1])):
        layer = _layer_of(exported, x, source, features)
    index = add_constant(exported, f"{x.name}_tokens", tokens[None])
    with exported.graph.inserting_before(before):
        args = layer, index, parts, (int(shape(x)[-2]),)
        rows = exported.graph.call_function(OPERATORS[image, False], args)
    value = _joined(x)
    rows.meta["val"] = value.new_empty((*value.shape[:-1], len(features)))
    return keep_layer(rows, before)


def _layer_of(exported: ExportedGraph, before: Node, y: Node, features: Tensor) -> Node:
    """Return a linear layer or pointwise convolution with some outputs of another one, zeros for -1, before a node."""
    x, *weights = y.args[:3]
    parts = []
    for n, part in zip(weights, ("weight", "bias")):
        if n is not None:
            value = exported.constants[n.name][features.clamp(min=0)]
            value[features < 0] = 0.0
            n = add_constant(exported, f"{before.name}_{part}", value)
        parts.append(n)
    with exported.graph.inserting_before(before):
        new = exported.graph.call_function(y.target, (x, *parts, *y.args[3:]))
    value, dim = y.meta["val"], 1 if y.target is ops.conv2d else y.meta["val"].dim() - 1
    new.meta["val"] = value.new_empty((*value.shape[:dim], len(features), *value.shape[dim + 1 :]))
    return keep_layer(new, y)
