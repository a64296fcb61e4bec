"""The masks of attention in shifted windows, which differ between the windows of an image (Liu et al. 2021)."""

from __future__ import annotations

import torch

from rarefy.compiler.fx_utils import VIEWS, ExportedGraph, Node, add_constant, aten, is_node, same, shape
from rarefy.compiler.passes.matchers import constant_of, size_node


def window_mask(exported: ExportedGraph, node: Node, scores: Node) -> tuple[Node, Node] | None:
    """Match scores [images * windows, heads, tokens, tokens] to which a mask for each window of an image was added.

    The pattern is view to [images, windows, heads, tokens, tokens], add, view back; a bias for each head may be added
    before. Masks and bias are constants.

    Returns:
        The scores without mask and bias, and a new node in front of `node` with their sum for all images; None for
        other scores.
    """
    if scores.target not in VIEWS or len(scores.users) != 1:
        return None
    total = scores.args[0]
    if not is_node(total) or total.target is not aten.add.Tensor or total.kwargs or len(total.users) != 1:
        return None
    split, masks = total.args
    mask = constant_of(exported, masks)
    if not is_node(split) or split.target not in VIEWS or len(split.users) != 1 or mask is None or mask.dim() != 5:
        return None
    inner, (images, windows, heads, *tokens) = split.args[0], shape(split)
    if not same(shape(inner), shape(scores)) or tuple(mask.shape) != (1, windows, 1, *tokens):
        return None
    count = size_node(exported, node, images)
    if count is None:
        return None
    mask = mask[0]
    if inner.target is aten.add.Tensor and len(inner.users) == 1 and not inner.kwargs:
        bias = constant_of(exported, inner.args[1])
        if bias is not None and tuple(bias.shape) in ((heads, *tokens), (1, heads, *tokens)):
            inner, mask = inner.args[0], mask + bias.reshape(heads, *tokens)
    known = add_constant(exported, f"{total.name}_windows", mask)
    with exported.graph.inserting_before(node):
        repeated = exported.graph.call_function(aten.repeat.default, (known, [count, 1, 1, 1]))
    repeated.meta["val"] = torch.empty((*shape(scores)[:1], *mask.shape[1:]), device="meta", dtype=torch.float32)
    return inner, repeated
