"""The pass for values that a model rounds to 8 bits by one scale and zero point, and the torch operator that
represents them in an export."""

from __future__ import annotations

from typing import Any

import torch

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    aten,
    dtype_of,
    is_node,
    keep_layer,
    replace_node,
    replace_uses,
)
from rarefy.model.activation_quant import MIN_SCALE, ActivationQuant

MOVES = (
    *VIEWS, ops.max_pool2d, ops.max_pool2d_ceil, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default, aten.t.default,
)  # fmt: skip

_LIBRARY = torch.library.Library("rarefy", "FRAGMENT")
_LIBRARY.define("fake_quantize(Tensor x, float scale, int zero) -> Tensor")
_LIBRARY.impl("fake_quantize", lambda x, scale, zero: ActivationQuant(8, scale, zero)(x), "CPU")
_LIBRARY.impl("fake_quantize", lambda x, scale, zero: torch.empty_like(x), "Meta")
FAKE_QUANTIZE = torch.ops.rarefy.fake_quantize.default


def convert_fake_quantize(exported: ExportedGraph, node: Node) -> None:
    """Convert the fake quantization of `quantize_` and `from_onnx`; equal ones of a value become one."""
    if node.target is not FAKE_QUANTIZE or dtype_of(node) != torch.float32:
        return
    x, scale, zero = node.args
    if not MIN_SCALE < scale < 1e36:  # programs divide by it
        return
    same = next((u for u in x.users if u.target is ops.fake_quantize and u.args == (x, scale, zero)), None)
    if same is None:
        replace_node(exported, node, ops.fake_quantize, x, scale, zero)
    else:
        replace_uses(exported, node, same)


def delay_fake_quantize(exported: ExportedGraph, node: Node) -> None:
    """Round after an operator that chooses or moves values, instead of before it, and only once.

    Rounding keeps the order of values, and zero is on each grid, so the outputs are the same. There are fewer values
    behind a pool, a ReLU can move into the layer before it, and the layer behind a view reads codes.
    """
    x: Any = node.args[0] if node.args else None
    moves = node.target in MOVES or (node.target is ops.activation and node.args[1] == "relu")
    if not moves or not is_node(x) or x.target is not ops.fake_quantize or len(x.users) != 1:
        return
    node.replace_input_with(x, x.args[0])
    with exported.graph.inserting_after(node):
        new = exported.graph.call_function(ops.fake_quantize, (node, *x.args[1:]))
    new.meta["val"] = node.meta["val"]
    keep_layer(new, node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    exported.graph.erase_node(x)
    for user in [u for u in new.users if u.target is ops.fake_quantize and u.args[1:] == new.args[1:]]:
        replace_uses(exported, user, new)
