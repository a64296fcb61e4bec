"""The pass for attention whose queries, keys and values are cut from layers in a way that no other pass matches."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, add_constant, aten, dtype_of, insert_before, keep_layer, shape
from rarefy.compiler.passes.attention import SDPA, attention_options
from rarefy.compiler.passes.linear import SPLITS, linear_of_rows
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
    if options is None:
        return
    matches = [_match(x) for x in node.args[:3]]
    if any(m is None for m in matches):
        return
    rows = [_rows(exported, node, x, *m) for x, m in zip(node.args[:3], matches)]  # type: ignore[misc]
    mask, heads, kv_heads, scale, causal = options
    with exported.graph.inserting_before(node):
        y = exported.graph.call_function(ops.attention, (*rows, mask, heads, kv_heads, scale, causal, None))
    y.meta["val"] = node.meta["val"].transpose(1, 2).flatten(2)
    keep_layer(y, node)
    split = insert_before(exported, node, aten.unflatten.int, y, 2, [heads, shape(node)[3]])
    node.replace_all_uses_with(insert_before(exported, node, aten.transpose.int, split, 1, 2))
    exported.graph.erase_node(node)


def _match(x: Node) -> tuple[Node, tuple[Tensor, Tensor, int]] | None:
    """Return the operator whose numbers x [batch, heads, tokens, head_dim] has, and which.

    Returns:
        The operator, and the features that it gives, [heads * head_dim], the tokens of a sample, [tokens], and the
        entries of its first dimension for each sample; None for anything else.
    """
    match = moves_before(x, CUTS)
    if match is None:
        return None
    source, moves = match
    symbols = symbols_of((source, *moves, x))
    if len(symbols) > 1 or (stores_image(source) and len(shape(source)) != 4):
        return None
    symbol = next(iter(symbols), None)
    tried = [_probe(source, moves, symbol, batch) for batch in (BATCHES if symbol else (1,))]
    first = tried[0]
    if any(t is None for t in tried) or first is None:
        return None
    same = all(torch.equal(t[0], first[0]) and torch.equal(t[1], first[1]) and t[2] == first[2] for t in tried)  # type: ignore[index]
    return (source, first) if same and _can_give(source, first[0]) else None


def _probe(source: Node, moves: list[Node], symbol: Any, batch: int) -> tuple[Tensor, Tensor, int] | None:
    """Move a tensor of numbers; return features, tokens and parts, as `_match` does, for one batch size."""
    numbers = numbered(source, stores_image(source), symbol, batch)
    out = None if numbers is None else run_moves(source, moves, numbers, symbol, batch)
    if numbers is None or out is None or out.dim() != 4 or not out.numel() or len(out) % batch:
        return None
    count = numbers.shape[1] if stores_image(source) else numbers.shape[-1]
    number = out.transpose(1, 2).long() - 1  # [batch, tokens, heads, head_dim]
    if int(number.min()) < 0:
        return None
    token, feature = number // count, number % count
    features, tokens = feature[0, 0], token[:, :, 0, 0].reshape(batch, -1)
    per_sample = numbers.numel() // count // batch
    shifts = torch.arange(batch)[:, None] * per_sample
    regular = (token == token[:, :, :1, :1]).all() and (feature == features).all()
    if not regular or not torch.equal(tokens, tokens[:1] + shifts) or int(tokens[0].max()) >= per_sample:
        return None
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
    """Return x [batch, heads, tokens, head_dim] as rows [batch, tokens, heads * head_dim]."""
    features, tokens, parts = match
    layer = source
    if not torch.equal(features, torch.arange(shape(source)[1 if stores_image(source) else -1])):
        layer = (_conv_of_rows if source.target is ops.conv2d else linear_of_rows)(exported, x, source, features)
    index = add_constant(exported, f"{x.name}_tokens", tokens[None])
    with exported.graph.inserting_before(before):
        args = layer, index, parts, (int(shape(x)[2]),)
        rows = exported.graph.call_function(OPERATORS[stores_image(source), False], args)
    rows.meta["val"] = x.meta["val"].transpose(1, 2).flatten(2)
    return keep_layer(rows, before)


def _conv_of_rows(exported: ExportedGraph, before: Node, y: Node, rows: Tensor) -> Node:
    """Return a pointwise convolution with some outputs of another one, of the same input, before a node."""
    x, *weights, _, _, stride, padding, dilation, groups = y.args
    w, bias = (
        None if n is None else add_constant(exported, f"{before.name}_{part}", exported.constants[n.name][rows])
        for n, part in zip(weights, ("weight", "bias"))
    )
    with exported.graph.inserting_before(before):
        new = exported.graph.call_function(ops.conv2d, (x, w, bias, None, None, stride, padding, dilation, groups))
    new.meta["val"] = y.meta["val"][:, : len(rows)]
    return keep_layer(new, y)
