"""Operators that move whole tokens: windows, rolls, padding, slices, images as rows and rows as images.

Each takes tokens of a sample by an index. A program stores a pixel as a token, so that images and rows differ only in
name; where tokens keep their order too, nothing is copied.
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.spec import IMAGES_TO_ROWS, PIXELS, ROWS, ROWS_TO_IMAGES, Call, OpSpec, Shape
from rarefy.compiler.program import NT, Part, Program, Tokens, Value

MAX_SEGMENT = 16  # columns of a segment, SEGMENT_FLOATS of csrc/kernel_table.h
PADDING = -1  # index of a token of zeros


def gather_tokens(x: Tensor, index: Tensor, parts: int, sizes: tuple[int, ...]) -> Tensor:
    """Return tokens of each sample in another order, [.., *sizes, groups * features].

    Args:
        x: [parts * batch, .., features], `parts` entries of the first dimension for each sample.
        index: int64 [groups, tokens], the token of a sample that each feature group of an output token is, -1 for
            zeros.
        parts: entries of the first dimension that make a sample.
        sizes: sizes of the output between the first dimension and the features.
    """
    return _taken(x.reshape(x.shape[0] // parts, -1, x.shape[-1]), index).reshape(
        -1, *sizes, index.shape[0] * x.shape[-1]
    )


def gather_pixels(x: Tensor, index: Tensor, parts: int, sizes: tuple[int, ...]) -> Tensor:
    """Return pixels of each sample in another order, as `gather_tokens`; x and the output are images
    [batch, channels, height, width]."""
    return gather_tokens(x.permute(0, 2, 3, 1), index, parts, sizes).permute(0, 3, 1, 2)


def pixels_to_tokens(x: Tensor, index: Tensor, parts: int, sizes: tuple[int, ...]) -> Tensor:
    """Return pixels of each image [batch, channels, height, width] as rows, in an order as in `gather_tokens`."""
    return gather_tokens(x.permute(0, 2, 3, 1), index, parts, sizes)


def tokens_to_pixels(x: Tensor, index: Tensor, parts: int, sizes: tuple[int, ...]) -> Tensor:
    """Return rows as images [batch, channels, height, width], in an order as in `gather_tokens`."""
    return gather_tokens(x, index, parts, sizes).permute(0, 3, 1, 2)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Return tokens of x [samples, tokens, features] by an index [groups, tokens], [samples, tokens, features]."""
    groups, tokens = index.shape
    zero = x.new_zeros(len(x), 1, x.shape[-1])
    taken = torch.cat([x, zero], 1)[:, index.T.flatten()]  # -1 is the token of zeros
    return taken.reshape(len(x), tokens, groups * x.shape[-1])


def _lower(p: Program, node: Node) -> None:
    """Add a step for each group of features; none where all tokens stay in their place."""
    x, name, parts, _ = node.args
    source, index = p.values[x], p.constants[name.name]
    groups, count = index.shape
    samples = p.shape(x)[0] // parts
    tokens = p.tokens_of(node)
    per_sample = source.tokens.batch * source.tokens.tokens // samples
    first = torch.arange(samples)[:, None, None] * per_sample
    taken = torch.where(index < 0, PADDING, index + first)  # [samples, groups, tokens]
    columns = _columns(source.tokens, taken)
    places = _columns(tokens, torch.arange(samples * count)).view(samples, count)
    if groups == 1 and torch.equal(columns[:, 0], places):
        same = Part(source, 0, source.features)
        same.tokens = tokens
        p.values[node] = same
        return
    out = p.make(node)
    for g in range(groups):
        part = Part(out, g * source.features, source.features)
        segments, starts = _segments(columns[:, g].flatten(), places.flatten(), tokens, source)
        p.held += [segments, starts]
        fields = {"segments": segments.data_ptr(), "segment_starts": starts.data_ptr()}
        p.step("rearrange", part, x=p.use(source), out=p.use(part), **fields)


def _columns(tokens: Tokens, index: Tensor) -> Tensor:
    """Return the columns of tokens that are numbered through all sequences; -1 for -1."""
    column = index // tokens.tokens * tokens.seq_stride + index % tokens.tokens
    return torch.where(index < 0, PADDING, column)


def _segments(columns: Tensor, places: Tensor, tokens: Tokens, source: Value) -> tuple[Tensor, Tensor]:
    """Return rarefy_segment's of a value whose columns `places` are `columns` of another, and where each tile's begin.

    O(columns of the output).
    """
    read = torch.full((tokens.tiles * NT,), PADDING, dtype=torch.int64)
    read[places] = torch.where(columns < 0, PADDING, columns // NT * source.stride + columns % NT)
    at = torch.arange(len(read))
    before = torch.cat([read[:1], read[:-1]])
    follows = torch.where(read < 0, before < 0, (before >= 0) & (read == before + 1))
    begins = ~follows | (at % NT == 0)
    run = torch.where(begins, at, 0).cummax(0).values  # where the run of each column begins
    begins = (at - run) % MAX_SEGMENT == 0
    start = at[begins]
    size = torch.diff(start, append=torch.tensor([len(read)], dtype=torch.int64))
    segments = torch.stack([read[start], start % NT | size << 32], 1).contiguous()
    return segments, torch.searchsorted(start, torch.arange(tokens.tiles + 1) * NT)


def _out_shape(call: Call, to_image: bool) -> Shape:
    (x,), (_, name, parts, sizes) = call.shapes, call.node.args
    groups, count = call.constants[name.name].shape
    features = (x[-1] if call.node.target in FROM_ROWS else x[1]) * groups
    leading = x[0] // parts * count // prod(sizes)
    return (leading, features, *sizes) if to_image else (leading, *sizes, features)


def _fits(call: Call, to_image: bool) -> bool:
    """Return whether the index takes tokens that each sample has, and its tokens fill the output's sizes."""
    (x,), (_, name, parts, sizes) = call.shapes, call.node.args
    index, rows = call.constants[name.name], call.node.target in FROM_ROWS
    if len(x) < 2 or 0 in x or (len(x) != 4 and not rows) or (to_image and len(sizes) != 2) or x[0] % parts:
        return False
    if index.dtype != torch.int64 or index.dim() != 2 or not index.numel() or not prod(sizes):
        return False
    tokens = prod(x) // (x[-1] if rows else x[1]) // (x[0] // parts)
    return not index.shape[1] % prod(sizes) and int(index.min()) >= PADDING and int(index.max()) < tokens


def _check_weights(call: Call) -> None:
    index = call.constants[call.node.args[1].name]
    if index.dtype != torch.int64 or index.dim() != 2:
        dtype = str(index.dtype).removeprefix("torch.")
        raise ValueError(f"expected an index of int64 [groups, tokens], got {dtype} {list(index.shape)}")


FROM_ROWS = (gather_tokens, tokens_to_pixels)
OPERATORS = tuple(
    OpSpec(
        reference=reference,
        arguments=("tensor", "constant", "count", "sizes"),
        lower=_lower,
        fits=partial(_fits, to_image=to_image),
        out_shape=partial(_out_shape, to_image=to_image),
        layout=layout,
        few_tokens=False,
        check_weights=_check_weights,
    )
    for reference, layout, to_image in (
        (gather_tokens, ROWS, False),
        (gather_pixels, PIXELS, True),
        (pixels_to_tokens, IMAGES_TO_ROWS, False),
        (tokens_to_pixels, ROWS_TO_IMAGES, True),
    )
)
