"""The pass for views, permutations, rolls, padding, slices and repetitions that move whole tokens or pixels."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    add_constant,
    aten,
    dtype_of,
    is_node,
    keep_layer,
    replace_node,
    shape,
)
from rarefy.compiler.operators.spec import ELEMENTWISE, IMAGES, IMAGES_TO_ROWS, PIXELS, ROWS_TO_IMAGES
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.passes.matchers import swaps

MOVES = (  # operators that compute nothing
    *VIEWS, aten.unflatten.int, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.roll.default,
    aten.pad.default, aten.constant_pad_nd.default, aten.slice.Tensor, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.cat.default, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default,
    aten.expand.default,
)  # fmt: skip
MAX_MOVES = 24  # nodes between two operators of the engine
MAX_PROBED = 1 << 24  # numbers of a tensor that is moved to find out where its tokens go
MAX_TOKENS = 1 << 20  # of a sample
BATCHES = (2, 3)  # that are tried
OPERATORS = {  # by whether input and output are images
    (False, False): ops.gather_tokens, (True, False): ops.pixels_to_tokens, (False, True): ops.tokens_to_pixels,
    (True, True): ops.gather_pixels,
}  # fmt: skip


def convert_moves(exported: ExportedGraph, node: Node) -> None:
    """Convert what moves whole tokens between two operators of the engine, to one operator that takes them by an index.

    Where tokens go is found by trial: all moves run on a tensor that numbers its elements, with two batch sizes.
    """
    if not in_programs(node):
        return
    for moved in dict.fromkeys(BY_TARGET[node.target].tensors(node)):
        if moved.target not in MOVES or dtype_of(moved) != torch.float32 or moved.op != "call_function":
            continue
        match = moves_before(moved)
        if match is None:
            continue
        source, moves = match
        to_image = _is_image(node, moved)
        index = _index(source, moves, moved, stores_image(source), to_image)
        if index is not None:
            _replace(exported, node, source, moved, index, to_image)


def in_programs(node: Any) -> bool:
    """Return whether a node becomes a step of a native program."""
    return is_node(node) and node.target in BY_TARGET and BY_TARGET[node.target].lower is not None


def moves_before(moved: Node, targets: Collection[Any] = MOVES) -> tuple[Node, list[Node]] | None:
    """Return the only operator of the engine whose output some moves read, and the moves in order; None otherwise.

    Args:
        moved: the last of the moves.
        targets: the operators that count as moves.
    """
    moves: dict[Node, None] = {}
    sources: dict[Node, None] = {}
    queue = [moved]
    while queue:
        n = queue.pop()
        if n in moves:
            continue
        if n.target in targets:
            moves[n] = None
            queue += [a for a in n.all_input_nodes if not _is_number(a)]
        else:
            sources[n] = None
        if len(moves) > MAX_MOVES or len(sources) > 1:
            return None
    source = next(iter(sources), None)
    if source is None or not in_programs(source) or dtype_of(source) != torch.float32:
        return None
    return source, [n for n in moved.graph.nodes if n in moves]


def _is_number(x: Node) -> bool:
    return isinstance(x.meta.get("val"), int | float | torch.SymInt)


def stores_image(source: Node, depth: int = 0) -> bool:
    """Return whether an operator's output is an image [batch, channels, height, width] in a program."""
    layout = BY_TARGET[source.target].layout
    if layout != ELEMENTWISE or len(shape(source)) != 4 or depth > MAX_MOVES:
        return layout in (IMAGES, PIXELS, ROWS_TO_IMAGES)
    inputs = [a for a in BY_TARGET[source.target].tensors(source) if in_programs(a)]
    return any(stores_image(a, depth + 1) for a in inputs)


def _is_image(node: Node, moved: Node, depth: int = 0) -> bool:
    """Return whether an operator takes a value as an image [batch, channels, height, width]."""
    layout = BY_TARGET[node.target].layout
    if layout != ELEMENTWISE or len(shape(moved)) != 4 or depth > MAX_MOVES:
        return layout in (IMAGES, PIXELS, IMAGES_TO_ROWS)
    others = [a for a in BY_TARGET[node.target].tensors(node) if a is not moved and in_programs(a)]
    if others:
        return stores_image(others[0])
    users = [u for u in node.users if in_programs(u)]
    return bool(users) and _is_image(users[0], node, depth + 1)


def _index(source: Node, moves: list[Node], moved: Node, from_image: bool, to_image: bool) -> Any:
    """Return the arguments of an operator that does what moves do: index [groups, tokens], parts, sizes; else None."""
    if (from_image and len(shape(source)) != 4) or (to_image and len(shape(moved)) != 4) or len(shape(moved)) < 2:
        return None
    symbols = symbols_of((source, *moves))
    if len(symbols) > 1:
        return None
    symbol = next(iter(symbols), None)
    tried = [_probe(source, moves, from_image, to_image, symbol, b) for b in (BATCHES if symbol else (1,))]
    if any(t is None for t in tried):
        return None
    first, parts, sizes = tried[0]
    if any(not torch.equal(t[0], first) or t[1:] != (parts, sizes) for t in tried[1:]):
        return None
    return first, parts, sizes


def symbols_of(nodes: Iterable[Node]) -> set[Any]:
    """Return the open sizes in the shapes of some nodes."""
    sizes = [size for n in nodes for size in shape(n) if isinstance(size, torch.SymInt)]
    return {symbol for size in sizes for symbol in size.node.expr.free_symbols}


def _number(size: Any, symbol: Any, batch: int) -> Any:
    """Return a size with a number in place of the open batch size."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.expr if symbol is None else size.node.expr.subs(symbol, batch))


def numbered(source: Node, image: bool, symbol: Any, batch: int) -> Tensor | None:
    """Return a tensor like an operator's output whose elements are numbers from 1 on, token by token; 0 is padding.

    None where it would be too large, or where the batch size does not divide its first dimension.
    """
    sizes = [_number(s, symbol, batch) for s in shape(source)]
    count = torch.Size(sizes).numel()
    features = sizes[1] if image else sizes[-1]
    if not features or not count or count > MAX_PROBED or sizes[0] % batch:
        return None
    numbers = torch.arange(1, count + 1, dtype=torch.float64).view(-1, features)
    if image:
        numbers = numbers.view(sizes[0], *sizes[2:], features).permute(0, 3, 1, 2)
    return numbers.reshape(sizes)


def run_moves(source: Node, moves: list[Node], x: Tensor, symbol: Any, batch: int) -> Any:
    """Return what moves make of a tensor in place of an operator's output; None where they cannot run on it."""
    values: dict[Node, Any] = {source: x}
    for n in moves:
        args, kwargs = fx.map_arg(
            (n.args, n.kwargs), lambda a: values[a] if a in values else _number(a.meta.get("val"), symbol, batch)
        )
        try:
            values[n] = n.target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        if isinstance(values[n], Tensor) and values[n].numel() > MAX_PROBED:
            return None
    return values[moves[-1]] if moves else x


def _probe(source: Node, moves: list[Node], from_image: bool, to_image: bool, symbol: Any, batch: int) -> Any:
    """Move a tensor of numbers; return index, parts and sizes, as `_index` does, for one batch size."""
    numbers = numbered(source, from_image, symbol, batch)
    out = None if numbers is None else run_moves(source, moves, numbers, symbol, batch)
    if numbers is None or out is None:
        return None
    features = numbers.shape[1] if from_image else numbers.shape[-1]
    out = out.permute(0, 2, 3, 1) if to_image else out
    return _read_probe(out, features, numbers.numel() // features // batch, batch, len(numbers) // batch)


def _read_probe(out: Tensor, features: int, per_sample: int, batch: int, parts: int) -> Any:
    """Return index, parts and sizes from a moved tensor of numbers [.., features]; None if features were moved too."""
    groups, rest = divmod(out.shape[-1], features)
    if rest or not groups or out.shape[0] % batch or not out.numel():
        return None
    middle = tuple(out.shape[1:-1])
    number = out.reshape(-1, groups, features).long() - 1
    token = torch.where(number < 0, -1, number // features)
    whole = (token == token[..., :1]).all() and ((number < 0) | (number % features == torch.arange(features))).all()
    if not whole or len(number) % batch:
        return None
    by_sample = token[..., 0].view(batch, -1, groups)
    first = by_sample[0]
    if first.numel() > MAX_TOKENS or int(first.max()) >= per_sample:
        return None
    shifts = torch.arange(batch)[:, None, None] * per_sample
    if not torch.equal(by_sample, torch.where(first < 0, -1, first + shifts)):
        return None
    return first.T.contiguous(), parts, middle


def _replace(exported: ExportedGraph, node: Node, source: Node, moved: Node, index: Any, to_image: bool) -> None:
    """Let an operator, and all others of the engine, read moved tokens from one operator."""
    numbers, parts, sizes = index
    name = add_constant(exported, f"{moved.name}_index", numbers)
    op = OPERATORS[stores_image(source), to_image]
    with exported.graph.inserting_before(moved):
        new = exported.graph.call_function(op, (source, name, parts, sizes))
    new.meta["val"] = moved.meta["val"]
    keep_layer(new, moved)
    for user in list(moved.users):
        if in_programs(user) and _is_image(user, moved) == to_image:
            user.replace_input_with(moved, new)


def convert_swap(exported: ExportedGraph, node: Node) -> None:
    """Convert a transpose [batch, features, tokens] between operators of the engine."""
    x: Any = node.args[0] if node.args else None
    if not is_node(x) or x.target not in BY_TARGET or len(shape(x)) != 3 or dtype_of(x) != torch.float32:
        return
    if swaps(node, 1, 2) and any(u.target in BY_TARGET for u in node.users):
        replace_node(exported, node, ops.swap_features, x)
