"""Linear layers over all pixels of an image, as convolutional networks end with: they become convolutions."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    add_constant,
    aten,
    is_node,
    keep_layer,
    replace_node,
    same,
    shape,
)
from rarefy.compiler.kernel_selection import is_nearly_dense
from rarefy.compiler.operators.table import BY_TARGET


def linear_to_conv(exported: ExportedGraph, node: Node, stay: Collection[str] = ()) -> None:
    """Convert a linear layer whose inputs are a flattened image, or the outputs of another such layer.

    Its convolution has a kernel as large as the image, so that the image is read as it is. Weights with many zeros
    stay: linear layers have faster kernels for them. So do layers in `stay`.
    """
    if node.target is not ops.linear:
        return
    x, w, bias, residual, act, *_ = node.args
    if exported.names.get(w.name, "").rpartition(".")[0] in stay:
        return
    image, weight = _image_of(x), exported.constants.get(w.name)
    if image is None or residual is not None or weight is None or not is_nearly_dense(weight):
        return
    batch, *sizes = shape(image)
    kernel = add_constant(exported, f"{node.name}_w", weight.reshape(len(weight), *sizes))
    with exported.graph.inserting_before(node):
        call = (image, kernel, bias, None, act, (1, 1), (0, 0), (1, 1), 1)
        conv = exported.graph.call_function(ops.conv2d, call)
    conv.meta["val"] = node.meta["val"].new_empty((batch, len(weight), 1, 1))
    keep_layer(conv, node)
    replace_node(exported, node, aten.flatten.using_ints, conv, 1)


def _image_of(x: Node) -> Node | None:
    """Return the image [batch, channels, height, width] of which a value [batch, features] is all numbers.

    None where it is no such value, or the image is no output of the engine, or of one pixel that no convolution made.
    """
    image = x.args[0] if x.target in (*VIEWS, aten.flatten.using_ints) else None
    if not is_node(image) or len(shape(image)) != 4 or len(shape(x)) != 2 or image.target not in BY_TARGET:  # type: ignore[union-attr]
        return None
    batch, *sizes = shape(image)
    if not all(isinstance(n, int) for n in sizes) or not same(shape(x), (batch, prod(sizes))):
        return None
    return image if prod(sizes[1:]) > 1 or image.target is ops.conv2d else None  # type: ignore[union-attr, return-value]
