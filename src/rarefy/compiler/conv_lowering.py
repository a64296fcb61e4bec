"""Words of images as steps of a plan: values [batch, features, rows, columns] whose pixels are tokens.

What a kernel takes together is brought together out of planes: images with their padding, cut so that a kernel's
position is a shift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import Structure, addressof, c_int64, c_void_p
from math import inf
from typing import Any

import torch

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.program import BESIDE, Program, Value
from rarefy.runtime import bindings, winograd
from rarefy.runtime.packed_formats import LANE, MOST_STRIDE

PIECE = 16  # floats that may be read past the last plane
MOST_PLANES = 1 << 31  # floats, as places are counted in 32 bits
OF_IMAGES = (ops.conv2d, ops.max_pool2d, ops.global_avg_pool)
NEAR_BYTES = 56 << 20  # of what images are on their way through a plan, at most


class Indirection(Structure):
    _fields_ = [("conv", c_void_p), ("height", c_int64), ("width", c_int64), ("offsets", c_void_p)]


def depthwise(node: Node, weight: Any) -> bool:
    """Whether a convolution has one input and one output in each group, and a kernel's stride."""
    groups, stride = node.args[8], node.args[5]
    return groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1 and max(stride) <= MOST_STRIDE


def at_once(memory: int, weights: int, cache: int) -> int:
    """Return how many images go through a plan together, one of which has `memory` on its way: as many as half the last
    cache holds, more where reading the weights once more for each would be the larger part. Bytes. O(1).

    >>> at_once(10 << 20, 8 << 20, 32 << 20), at_once(10 << 20, 100 << 20, 32 << 20)
    (1, 5)
    """
    most = NEAR_BYTES // memory
    near = min(NEAR_BYTES, cache // 2 or NEAR_BYTES) // memory
    return max(1, near, min(most, weights // (2 * memory)))


def layouts(nodes: Sequence[Node]) -> set[Node] | None:
    """Return which values are images; None where words that go over the last dimension read them too."""
    found = {n for n in nodes if n.target in OF_IMAGES[:2]} | {n.args[0] for n in nodes if n.target in OF_IMAGES}
    found |= {n.args[3] for n in nodes if n.target is ops.conv2d and n.args[3] is not None}
    before = -1
    while before != len(found):
        before = len(found)
        for n in (n for n in nodes if n.target in BESIDE):
            around = {n, *n.all_input_nodes}
            if around & found:
                found |= around
    others = {a for n in nodes if n.target not in (*OF_IMAGES, *BESIDE) for a in (n, *n.all_input_nodes)}
    others |= {n for n in nodes if n.target is ops.global_avg_pool}
    return None if found & others else found


def out_sizes(sizes: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...]:
    """Return rows and columns of what a kernel makes of images."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation)
    )


def converted(p: Program, x: Node, kind: str, whole: bool = False) -> tuple[Value, Value]:
    """Return inputs in the numbers of a kernel, and their scales, made once: of each token or pixel, or of images as a
    `whole`, whose pixels a kernel takes together."""
    key = x, f"{kind} images" if whole else kind
    if key not in p.bytes:
        source = p.values[x]
        lanes = -(-source.features // 64) * 64 // LANE[kind] if p.few else -(-source.features // 4)
        most = None if p.few else p.ranges(source)
        if whole:
            told, most = source if most is None else most, p.beside(source, 1)
            p.step("image_absmax", told, x=p.use(told), out=p.use(most))
        numbers = {"dtype": ("fp32", "bf16", "int8").index(kind), "per_image": int(whole)}
        small, scales = p.beside(source, lanes), p.beside(source, 1)
        more = {} if most is None else {"in_absmax": p.use(most), "absmax_rows": most.features}
        p.step("convert", source, x=p.use(source), out=p.use(small), out_scales=p.use(scales), **numbers, **more)
        p.bytes[key] = small, scales
    return p.bytes[key]


def _planes(p: Program, x: Node, conv: Any, rest: float, small: Value | None = None) -> tuple[Value, Indirection]:
    """An image's planes for a kernel, once for all that read it so, and how to read them; `small`: of its bytes."""
    batch, features, height, width = p.shape(x)
    features = features if small is None else small.features
    each = bindings.library().rarefy_padded_image_floats(conv, height, width) // conv.inputs
    how = (x, small is None, rest, *(tuple(getattr(conv, n)) for n in ("kernel", "stride", "padding", "dilation")))
    if batch * features * each >= MOST_PLANES:
        raise MemoryError(f"{batch} images of {features} channels of {height} x {width} are more than a plan counts")
    lanes = conv.inputs * conv.kernel[0] * conv.kernel[1]
    places = torch.empty(lanes, dtype=torch.int32)
    bindings.library().rarefy_indirection_offsets(conv, height, width, places.data_ptr())
    image = Indirection(addressof(conv), height, width, places.data_ptr())
    p.held += [image, places, conv]
    if how not in p.planes:
        source = p.values.get(x) if small is None else small
        tokens = p.over(x) if source is None else source
        made = Value(tokens.tokens, features, len(p.steps), False, size=batch * features * each + PIECE)
        p.every.append(made)
        given: dict[str, Any] = (
            {"channels_first": 1} if source is None else {"x": p.use(source), "dtype": 0 if small is None else 2}
        )
        if source is None:
            p.raw[x].append(len(p.steps))
        p.step("pad_planes", tokens, out=p.use(made), indirection=addressof(image), pad_value=rest, **given)
        p.planes[how] = made
    return p.use(p.planes[how]), image


def convolution(p: Program, node: Node) -> None:
    """By tiles or pairs of rows; where kernel and stride are one, a product over features."""
    x, w, bias, more, act, stride, padding, dilation, _ = node.args
    batch, _, *sizes = p.shape(x)
    weight = None if node in p.kernels else p.constants[w.name]
    shape: Any = p.kernels[node].shape if weight is None else weight.shape
    p.shapes[node] = (batch, shape[0], *out_sizes(sizes, shape[2:], stride, padding, dilation))
    beside = {} if more is None else {"residual": p.values[more]}
    if weight is not None:
        conv = _geometry(shape[2:], stride, padding, dilation)
        planes, image = _planes(p, x, conv, 0.0)
        out = p.make(node)
        acts = bindings.ACTIVATIONS.index(None if beside else act)
        weights = {"depthwise_weights": p.constant(w), "bias": p.constant(bias)}
        p.step(
            "depthwise_conv",
            out,
            x=p.use(planes),
            out=p.use(out),
            indirection=addressof(image),
            act=acts,
            batch=batch,
            **weights,
        )
        if beside:
            p.step(
                "add",
                out,
                x=p.use(out),
                out=p.use(out),
                act=bindings.ACTIVATIONS.index(act),
                other=p.use(beside["residual"]),
            )
        return
    kernel = p.kernels[node]
    plain = tuple(shape[2:]) == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    bytes_ = kernel.held[0].kind == "int8"
    if plain and x in p.values:
        source, step = p.values[x], "linear"
        how = {"weight": addressof(kernel.inner), "format": bindings.FORMATS.index(type(kernel.held[0].matrix))}
        if bytes_:
            source, beside["in_scales"] = converted(p, x, "int8")
    else:
        small = None
        if bytes_:
            small, beside["in_scales"] = converted(p, x, "int8", True)
        by_squares, about = winograd.worth(kernel.held[0], p.shape(node)[2:]), kernel.about
        if by_squares:
            made = winograd.of(kernel)
            about = made.about
            p.held.append(made)
        source, image = _planes(p, x, about, 0.0, small)
        step, how = "conv", {"indirection": addressof(image), "batch": batch, "winograd": int(by_squares)}
    out = p.make(node)
    p.step(step, out, x=p.use(source), out=p.use(out), **how, **{n: p.use(v) for n, v in beside.items()})


def pool(p: Program, node: Node) -> None:
    """The largest of the pixels that a kernel takes together."""
    x, kernel, stride, padding, dilation = node.args
    batch, features, *sizes = p.shape(x)
    p.shapes[node] = (batch, features, *out_sizes(sizes, kernel, stride, padding, dilation))
    planes, image = _planes(p, x, _geometry(kernel, stride, padding, dilation), -inf)
    out = p.make(node)
    p.step("max_pool", out, x=p.use(planes), out=p.use(out), indirection=addressof(image), batch=batch)


def average(p: Program, node: Node) -> None:
    """Means over pixels."""
    batch, features, height, width = p.shape(node.args[0])
    p.shapes[node] = batch, features
    source = p.values[node.args[0]]
    out = p.make(node)
    p.step("global_avg_pool", out, x=p.use(source), out=p.use(out), tokens=height * width)


def _geometry(kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """A convolution of one input without weights."""
    pairs: Mapping[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return bindings.Conv(groups=1, outputs=1, inputs=1, **{n: (c_int64 * 2)(*v) for n, v in pairs.items()})
