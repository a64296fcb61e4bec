"""Steps of a program on the channels of fp32 images in NHWC order: affine maps, gates, sums, means, concatenation."""

from __future__ import annotations

from ctypes import addressof, c_int64
from typing import Any

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.nhwc import FP32, Codes, Nhwc, add_max_pool, codes_of, new_codes, output_format, set_out
from rarefy.compiler.program import Program, Value
from rarefy.runtime import bindings


def lower_map(
    p: Program, node: Node, x: Node, act: str | None = None, residual: Node | None = None, gate: Node | None = None,
    scale: Node | None = None, bias: Node | None = None,
) -> bool:  # fmt: skip
    """Add the step of act(x * scale + bias + residual), if it runs on NHWC numbers; return whether it does.

    Args:
        p: the program.
        node: whose step it is.
        x: an image.
        act: an activation.
        residual: an image.
        gate: a factor for each channel of each image, in place of a scale.
        scale: a constant for each channel.
        bias: likewise.
    """
    if output_format(p, node) is None:
        return False
    source = codes_of(p, x, FP32)
    step = Nhwc(input=source.image)
    operands = {"x": source.value}
    if residual is not None:
        added = codes_of(p, residual, FP32)
        step.residual, operands["residual"] = added.image, added.value
    if gate is not None:
        operands["other"] = p.values[gate]
    operands["out_codes"] = set_out(p, step, node, FP32)
    fields: dict[str, Any] = {n: p.use(v) for n, v in operands.items()}
    fields |= {"gamma": p.constant(scale), "bias": p.constant(bias), "act": bindings.ACTIVATIONS.index(act)}
    p.held.append(step)
    p.step("nhwc_map", p.image_tokens(node), nhwc=addressof(step), **fields)
    return True


def lower_concat(p: Program, node: Node) -> bool:
    """Add the steps of a concatenation, if it runs on NHWC images, of codes too; return whether it does.

    There are none for images whose operators write their channels themselves.
    """
    wanted = output_format(p, node)
    if wanted is None:
        return False
    images = [n for n in node.args if n is not None]
    sources = [codes_of(p, n, wanted) for n in images]  # type: ignore[arg-type]
    if (node, wanted) not in p.nhwc:
        p.nhwc[node, wanted] = new_codes(p, node, wanted)
    whole, first = p.nhwc[node, wanted], 0
    for n, source in zip(images, sources):
        if source.value is not whole.value:
            step = Nhwc(input=source.image, out=whole.image, first_channel=first)
            p.held.append(step)
            operands = {"x": p.use(source.value), "out_codes": p.use(whole.value)}
            p.step("nhwc_copy", p.image_tokens(node), nhwc=addressof(step), **operands)
        first += p.shape(n)[1]  # type: ignore[arg-type]
    return True


def lower_select(p: Program, node: Node) -> None:
    """Add the steps of channels in another order; into column tiles where those are read."""
    taken = p.constants[node.args[1].name].contiguous()  # type: ignore[union-attr]
    p.held.append(taken)
    _add_move(p, node, "nhwc_copy", p.image_tokens(node), order=taken.data_ptr(), num_order=len(taken))


def lower_spread(p: Program, node: Node) -> None:
    """Add the steps that make pixels of channels; into column tiles where those are read."""
    x, *sizes = node.args
    _add_move(p, node, "nhwc_spread", p.image_tokens(x), stride=(c_int64 * 2)(*sizes))  # type: ignore[arg-type]


def _add_move(p: Program, node: Node, name: str, over: Value, **fields: Any) -> None:
    """Add the step of an operator that moves what its input holds, and one into column tiles where those are read."""
    read = output_format(p, node)
    wanted = read or FP32
    source = codes_of(p, node.args[0], wanted)  # type: ignore[arg-type]
    step = Nhwc(input=source.image, **fields)
    p.held.append(step)
    operands = {"x": p.use(source.value), "out_codes": p.use(set_out(p, step, node, wanted))}
    p.step(name, over, nhwc=addressof(step), **operands)
    if read is None:
        _unpack(p, node, p.nhwc[node, wanted])


def lower_mean(p: Program, node: Node) -> bool:
    """Add the step of means over pixels, if there is an NHWC image of numbers; return whether there is."""
    source = p.nhwc.get((node.args[0], FP32))
    if source is None:
        return False
    step, out = Nhwc(input=source.image), p.make(node)
    p.held.append(step)
    p.step("nhwc_mean", out, x=p.use(source.value), out=p.use(out), batch=p.shape(node)[0], nhwc=addressof(step))
    return True


def lower_pool_into_tiles(p: Program, node: Node) -> None:
    """Add the steps of a max pool of an NHWC image of numbers whose output is read in tiles."""
    _unpack(p, node, add_max_pool(p, node, FP32))


def _unpack(p: Program, node: Node, image: Codes) -> None:
    step, out = Nhwc(input=image.image), p.make(node)
    p.held.append(step)
    p.step("nhwc_unpack", out, x=p.use(image.value), out=p.use(out), nhwc=addressof(step))
