"""Which kernel runs each linear layer and convolution: formats chosen from the number of zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.executor import Lookup
from rarefy.compiler.fx_utils import ExportedGraph, Node, shape
from rarefy.runtime import bindings, winograd
from rarefy.runtime.huge_pages import Pages
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.packed_formats import (
    CONV_BLOCK,
    LEAST_ZEROS,
    LEAST_ZEROS_OF_SQUARES,
    MOST_BYTES_IN_A_SUM,
    MOST_STRIDE,
    NEAR,
    SHARED,
    Panels,
)
from rarefy.runtime.packing import pack_conv, pack_dense, pack_sell, pack_tiles, shared


def kernels_of(t: ExportedGraph, pack: Callable[[Tensor, str], Any], values: str | None = None) -> dict[Node, Any]:
    """Return the kernels of all products, of `pack(weight, its name in the model)`, and of convolutions in `values`."""
    if bindings.missing() is not None:
        return {}
    found, known, pages = {}, {}, Pages()
    for node in t.graph.nodes:
        if node.target is ops.linear:
            _, w, bias, _, act = node.args
            if w.name not in known:
                known[w.name] = pages.hold(pack(t.constants[w.name], t.names.get(w.name, "")))
            found[node] = Kernel(known[w.name], None if bias is None else t.constants[bias.name].clone(), act)
        elif node.target is ops.conv2d and (form := packed(t, node, values)) is not None:
            bias, act = node.args[2], node.args[4]
            found[node] = Kernel(pages.hold(form), None if bias is None else t.constants[bias.name].clone(), act)
    for node in t.graph.nodes:  # an embedding that is a product's weight too
        if node.target is ops.embedding and isinstance(known.get(node.args[1].name), Panels):
            found[node] = Lookup(Kernel(known[node.args[1].name]))
    return found


def pack_for_batches(weight: Tensor, values: str | None) -> Any:
    if values is None and few_zeros(weight):
        return pack_dense(weight)
    packed: Any = pack_tiles(weight, values or "fp32")
    return pack_sell(weight, values or "fp32") if shared(packed) < SHARED else packed


LEAST = 0.4  # zeros from which a kernel is faster than torch's dense one


def few_zeros(weight: Tensor, least: tuple[float, float] = LEAST_ZEROS) -> bool:
    """Return whether a weight is multiplied by faster with its zeros: as many as there may be depends on whether the
    others come in fours."""
    W = weight.flatten(1)
    hit = torch.nn.functional.pad(W != 0, (0, 0, 0, -len(W) % 4)).view(-1, 4, W.shape[1])
    fours = float(hit.sum()) / max(1.0, float(hit.any(1).sum()))
    return 1 - float(hit.sum()) / W.numel() < least[fours < SHARED]


def packed(t: ExportedGraph, node: Node, values: str | None) -> Any:
    """Return the packed weight of a convolution, in `values` where it is of one group; None where torch runs it: with
    few zeros in groups of several, or depthwise."""
    w, (stride, padding, dilation, groups) = node.args[1], node.args[5:]
    weight = t.constants[w.name]
    zeros = float((weight == 0).float().mean())
    if max(stride) > MOST_STRIDE or (groups > 1 and (zeros < LEAST or weight.shape[1] == 1)):
        return None
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    wide = -(-weight.shape[1] // 4) * 4 * weight[0, 0].numel() > MOST_BYTES_IN_A_SUM
    kind = "fp32" if groups > 1 or wide else values or "fp32"
    by_squares = winograd.fit(tuple(weight.shape), tuple(stride), tuple(dilation), shape(node)[2:])
    least = LEAST_ZEROS_OF_SQUARES if by_squares else LEAST_ZEROS
    if groups == 1 and kind == "fp32" and few_zeros(weight, least):
        return pack_dense(weight, stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))
    form = pack_conv(weight, kind, **how, block=CONV_BLOCK if groups > 1 else NEAR)
    if groups == 1 and shared(form) < SHARED:
        form = pack_conv(weight, kind, **how, block=NEAR, sell=True)
    return form
