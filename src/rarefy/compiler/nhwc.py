"""Steps of a program on images in NHWC order: of int8 codes with one scale for all, or of fp32 numbers.

Int8 convolutions whose inputs have static scales, and depthwise ones of rounded values, read and write codes, so that
activations between them are bytes. Dense convolutions in fp32 and int16, and other depthwise ones, read and write
numbers. Other operators read fp32 values in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.input_steps import matrix_fields
from rarefy.compiler.operators.fake_quantize import grid_of
from rarefy.compiler.program import Program, Value, is_depthwise
from rarefy.model.activation_quant import ActivationQuant
from rarefy.runtime import bindings, winograd
from rarefy.runtime.nhwc_weights import BLOCK_BYTES, LANES, NhwcWeight, grouped_weight, merged_groups, weight_of
from rarefy.runtime.packed_formats import DTYPES

OVERREAD_PIXELS = 32  # that steps may read past the last image
MAX_DROPPED = 1.35  # sums computed for each that is used, up to which inputs are read in place
MIN_ROW = 14  # outputs of a row from which a convolution of numbers with strides reads its inputs in place
MAX_TAP = 32767  # the largest code of a depthwise weight
MAX_SUM = 2**31 - 1  # of codes times codes of inputs
MAX_OVERREAD = 32 << 20  # bytes after images that are read as pixels, which kernels may read
MAX_OFFSET = 1 << 31  # of a block, in bytes
FP32: Literal["fp32"] = "fp32"  # in place of a grid: numbers

POOLS = ("max_pool2d", "max_pool2d_ceil")
MEANS = ("global_avg_pool", "image_mean")
MAPS = ("add", "activation", "channel_affine", "channel_scale", "concat", "select_channels", "depth_to_pixels")
MOVES = ("concat", "depth_to_pixels")  # of MAPS, those that run on codes too

Format = ActivationQuant | Literal["fp32"]


class Image(Structure):
    """rarefy_nhwc_image of csrc/rarefy.h."""

    _fields_ = [
        *[(n, c_int64) for n in ("height", "width", "channels", "border", "pixel_bytes")],
        ("scale", c_float),
        ("zero", c_int32),
        ("dtype", c_int32),
    ]


class Block(Structure):
    """rarefy_nhwc_block of csrc/rarefy.h."""

    _fields_ = [("offset", c_int32), ("lanes", c_int32)]


class Nhwc(Structure):
    """rarefy_nhwc of csrc/rarefy.h."""

    _fields_ = [
        *[(n, Image) for n in ("input", "out", "residual")],
        *[(n, c_int64 * 2) for n in ("kernel", "stride", "padding", "dilation")],
        *[(n, c_void_p) for n in ("values", "blocks", "segments")],
        *[(n, c_int64) for n in ("num_blocks", "num_segments", "segment_bytes", "segment_stride")],
        *[(n, c_void_p) for n in ("factors", "bias", "row_sums", "taps")],
        *[(n, c_int64) for n in ("tap_columns", "group_outputs", "group_channels")],
        ("last_blocks", c_void_p),
        ("first_channel", c_int64),
        ("order", c_void_p),
        ("num_order", c_int64),
    ]


@dataclass(frozen=True)
class Codes:
    """An image value in NHWC order: where it is, and how.

    Attributes:
        value: its memory.
        image: its sizes; those of the whole where it is some channels of one.
        first_channel: the channel of the whole at which it begins.
    """

    value: Value
    image: Image
    first_channel: int = 0


def wanted_format(p: Program, node: Node, numbers: bool | None = None) -> Format | None:
    """Return how a node's value is written as an NHWC image: FP32 where an operator reads numbers, which others then
    round, else the grid of the first one that reads codes.

    Returns:
        None where no operator reads such an image; with `numbers` given, where none reads numbers, or codes.
    """
    read = [_wanted_by(p, node, user) for user in node.users if user in p.nodes]
    if FP32 in read and numbers is not False:
        return FP32
    return None if numbers else next((f for f in read if isinstance(f, ActivationQuant)), None)


def _wanted_by(p: Program, node: Node, user: Node) -> Format | None:
    if p.runs_on_nhwc(user):
        return _format_in(p, node, user)
    name = p.operators[user.target].name
    if name in POOLS or (name in MAPS and not _is_gate(node, name, user)):
        return output_format(p, user)
    rounds = name == "fake_quantize" and any(p.runs_on_nhwc(u) for u in user.users)
    if rounds and (grid := wanted_format(p, user, numbers=False)) == grid_of(user):
        return grid
    return None


def _format_in(p: Program, node: Node, conv: Node) -> Format | None:
    """Return how a convolution on NHWC images reads an operand; None for a residual that it reads in tiles."""
    kernel = p.kernels.get(conv)
    if kernel is None:
        grid = grid_of(conv.args[0]) if is_depthwise(conv, p.constants) else None  # type: ignore[arg-type]
        if grid is None:
            return FP32
        return grid if conv.args[0] is node else grid_of(node)
    if kernel.held[0].kind in (FP32, "int16"):
        return FP32
    if conv.args[0] is node:
        return kernel.input_grid
    return grid_of(node) or kernel.residual_grid


def codes_of(p: Program, node: Node, wanted: Format) -> Codes:
    """Return a node's value as an NHWC image, made once: codes out of numbers where these are there."""
    if node in p.nodes and grid_of(node) == wanted:  # codes of a value that is rounded here are those before
        node = node.args[0]  # type: ignore[assignment]
    if (node, wanted) not in p.nhwc:
        numbers = None if wanted == FP32 else p.nhwc.get((node, FP32))
        codes = p.nhwc[node, wanted] = new_codes(p, node, wanted)
        step = Nhwc(out=codes.image)
        p.held.append(step)
        fields: dict[str, Any] = {"channels_first": 1}
        if numbers is not None and not numbers.first_channel:
            step.input, fields = numbers.image, {"x": p.use(numbers.value)}
        elif node in p.values:
            fields = {"x": p.use(p.values[node])}
        else:  # read from the program's input as it is
            p.raw[node].append(len(p.steps))
        over = p.values.get(node) or p.image_tokens(node)
        p.step("nhwc_quantize", over, out_codes=p.use(codes.value), nhwc=addressof(step), **fields)
    return p.nhwc[node, wanted]


def new_codes(p: Program, node: Node, wanted: Format) -> Codes:
    """Return memory for a node's value as an NHWC image, with a border as wide as its operators need."""
    batch, channels, height, width = p.shape(node)
    border = max((max(padding) for padding in _paddings(p, node)), default=0)
    pixel_bytes = 4 * channels if wanted == FP32 else -(-channels // 4) * 4
    image_bytes = (height + 2 * border) * (width + 2 * border) * pixel_bytes
    merged = height * width if any(_merges_pixels(p, node, u) for u in node.users) else 1
    size = batch * image_bytes + OVERREAD_PIXELS * pixel_bytes * merged + BLOCK_BYTES
    numbers = (0.0, 0, DTYPES.index("fp32"))
    grid = numbers if isinstance(wanted, str) else (wanted.scale, wanted.zero - 128, DTYPES.index("int8"))
    image = Image(height, width, channels, border, pixel_bytes, *grid)
    value = Value(p.image_tokens(node).tokens, channels, len(p.steps), False, size=-(-size // 4))
    p.every.append(value)
    return Codes(value, image)


def lower_conv(p: Program, node: Node) -> None:
    """Add the step of a convolution on NHWC images."""
    x, w, bias, residual, act, stride, padding, dilation, groups = node.args
    kernel, act, wanted = p.kernels.get(node), bindings.ACTIVATIONS.index(act), _format_in(p, node.args[0], node)  # type: ignore[arg-type]
    assert wanted is not None
    source, added = codes_of(p, x, wanted), None if residual is None else _residual_codes(p, node)  # type: ignore[arg-type]
    size = p.constants[w.name].shape[2:] if kernel is None else kernel.shape[2:]
    step = Nhwc(input=source.image, **_geometry(size, stride, padding, dilation))
    numbers: dict[str, Any] = {}
    if kernel is None:
        weight, added_bias = p.constants[w.name], None if bias is None else p.constants[bias.name]
        if weight.shape[1] > 1 or len(weight) > groups:
            _set_groups(p, step, weight, groups, added_bias)
        else:
            (_set_numbers if wanted == FP32 else _set_taps)(p, step, weight, added_bias)
    elif kernel.held[0].counts is not None:
        _set_sparse_weight(p, step, *kernel.held)
        numbers = matrix_fields(kernel)
    elif winograd.is_used(kernel.held[0], p.shape(node)[2:]):
        _set_winograd(p, step, winograd.weight_of(kernel), kernel.held[1])
        numbers = {"winograd": 1}
    else:
        _set_weight(p, step, weight_of(kernel), kernel.held[1], p.shape(node)[2:])
        if not step.factors and not source.image.border and _merges_pixels(p, x, node):  # type: ignore[arg-type]
            _merge_pixels(step)
    operands, separate = {"x": source.value}, residual is not None and added is None  # an addition of its own
    if added is not None:
        step.residual, operands["residual"] = added.image, added.value
    out, read = p.make(node), wanted_format(p, node)
    if read is not None and not separate:
        operands["out_codes"] = set_out(p, step, node, read)
    operands = {n: p.use(v) for n, v in {**operands, "out": out}.items()}
    name = "nhwc_depthwise" if step.taps else "nhwc_conv"
    p.step(name, out, act=0 if separate else act, nhwc=addressof(step), **numbers, **operands)
    if separate:
        p.step("add", out, x=p.use(out), out=p.use(out), act=act, other=p.use(p.values[residual]))


def _merges_pixels(p: Program, image: Node, conv: Node) -> bool:
    """Return whether a convolution's kernel is as large as its image, which it reads as one pixel: so a batch of them
    is an image, whose pixels are computed together."""
    if not p.runs_on_nhwc(conv) or conv.args[0] is not image or conv not in p.kernels:
        return False
    sizes, kernel = p.shape(image)[1:], tuple(p.kernels[conv].shape[2:])
    small = 4 * OVERREAD_PIXELS * prod(sizes) <= MAX_OVERREAD
    return kernel == tuple(sizes[1:]) and p.shape(conv)[2:] == (1, 1) and not any(conv.args[6]) and small  # type: ignore[arg-type]


def _merge_pixels(step: Nhwc) -> None:
    """Let a convolution read each image as one pixel."""
    image = step.input
    image.pixel_bytes *= image.height * image.width
    image.height = image.width = 1
    step.kernel = (c_int64 * 2)(1, 1)


def _residual_codes(p: Program, node: Node) -> Codes | None:
    """Return a convolution's residual as an NHWC image, None where it has no grid."""
    residual: Any = node.args[3]
    wanted = _format_in(p, residual, node)
    return None if wanted is None else codes_of(p, residual, wanted)


def _paddings(p: Program, node: Node) -> Iterator[Any]:
    """Yield the paddings of the convolutions that read a node's value as codes."""
    for user in node.users:
        if p.runs_on_nhwc(user) and user.args[0] is node:
            yield user.args[6]
        elif user in p.nodes and grid_of(user) is not None:
            yield from _paddings(p, user)


def output_format(p: Program, node: Node) -> Format | None:
    """Return how an operator of POOLS or MAPS writes its output where that is read as an NHWC image alone, else None.

    It is found for all operators of the program at once, from the last one on, so that no call goes deep.
    """
    if node not in p.formats:
        for n in reversed(p.order):
            name = p.operators[n.target].name
            if n in p.images and (name in POOLS or name in MAPS):
                wanted = wanted_format(p, n, numbers=True if name in MAPS and name not in MOVES else None)
                read = wanted is not None and all(_reads_image(p, n, u, wanted) for u in n.users)
                p.formats[n] = wanted if read else None
    return p.formats.get(node)


def _is_gate(node: Node, name: str, user: Node) -> bool:
    """Return whether a node gives an operator the factors of channels, which it reads in tiles."""
    return name == "channel_scale" and user.args[1] is node


def _reads_image(p: Program, node: Node, user: Node, wanted: Format) -> bool:
    """Return whether an operator reads a value as an NHWC image, and not in tiles."""
    if p.runs_on_nhwc(user):
        return _converts(wanted, _format_in(p, node, user))
    name = p.operators[user.target].name if user in p.nodes else ""
    if name in MEANS:  # which reads what there is
        return wanted == FP32
    if name in POOLS or name in MAPS:
        return not _is_gate(node, name, user) and _converts(wanted, output_format(p, user))
    grid = grid_of(user) if user in p.nodes else None
    return _converts(wanted, grid) and all(_reads_image(p, user, u, grid) for u in user.users)  # type: ignore[arg-type]


def _converts(written: Format, read: Format | None) -> bool:
    """Return whether an image can be read so: as it is written, or as codes that are made of its numbers."""
    return read is not None and written in (read, FP32)


def lower_max_pool(p: Program, node: Node) -> bool:
    """Add the step of a max pool of an NHWC image, if its output is read so alone; return whether it is."""
    wanted = output_format(p, node)
    if wanted is None:
        return False
    add_max_pool(p, node, wanted)
    return True


def add_max_pool(p: Program, node: Node, wanted: Format) -> Codes:
    """Add the step of a max pool of an NHWC image; return what it writes."""
    x, kernel, stride, padding, dilation = node.args
    source = codes_of(p, x, wanted)  # type: ignore[arg-type]
    step = Nhwc(input=source.image, **_geometry(kernel, stride, padding, dilation))
    p.held.append(step)
    out, over = set_out(p, step, node, wanted), p.image_tokens(node)
    p.step("nhwc_max_pool", over, x=p.use(source.value), out_codes=p.use(out), nhwc=addressof(step))
    return p.nhwc[node, wanted]


def set_out(p: Program, step: Nhwc, node: Node, wanted: Format) -> Value:
    """Write into a step where its output goes, and return the memory: its own, or some channels of the concatenation
    that alone reads it."""
    written = _channels_of_concat(p, node, wanted)
    written = p.nhwc[node, wanted] = written or new_codes(p, node, wanted)
    step.out, step.first_channel = written.image, written.first_channel
    return written.value


def _channels_of_concat(p: Program, node: Node, wanted: Format) -> Codes | None:
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    if reader not in p.nodes or p.operators[reader.target].name != "concat":
        return None
    if reader.args.count(node) > 1 or output_format(p, reader) != wanted:
        return None
    if (reader, wanted) not in p.nhwc:
        p.nhwc[reader, wanted] = new_codes(p, reader, wanted)
    whole, before = p.nhwc[reader, wanted], [n for n in reader.args[: reader.args.index(node)] if n is not None]
    return Codes(whole.value, whole.image, sum(p.shape(n)[1] for n in before))  # type: ignore[arg-type]


def _geometry(kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, Any]:
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return {n: (c_int64 * 2)(*v) for n, v in pairs.items()}


def _starts(step: Nhwc, columns: Sequence[int] | None = None) -> list[int]:
    """Return where some columns, else all, of each kernel row begin in an image, in bytes from an output's first input
    on."""
    image, (rows, width), (down, right) = step.input, step.kernel, step.dilation
    columns = [j * right for j in range(width)] if columns is None else columns
    row_bytes = (image.width + 2 * image.border) * image.pixel_bytes
    return [i * down * row_bytes + j * image.pixel_bytes for i in range(rows) for j in columns]


def _set_outputs(p: Program, step: Nhwc, scales: Tensor, row_sums: Tensor, bias: Tensor | None) -> None:
    """Write into a step what turns sums of codes into outputs; scales and row sums of the weight are padded to 64
    outputs."""
    factors = scales * step.input.scale
    p.held += [factors, row_sums]
    step.factors, step.row_sums = factors.data_ptr(), row_sums.data_ptr()
    _set_bias(p, step, bias, len(factors))


def _set_bias(p: Program, step: Nhwc, bias: Tensor | None, outputs: int) -> None:
    padded = -(-outputs // 64) * 64
    bias = torch.zeros(padded, dtype=torch.float32) if bias is None else F.pad(bias.float(), (0, padded - len(bias)))
    p.held += [step, bias]
    step.bias = bias.data_ptr()


def _blocks_of(offsets: Sequence[int], lanes: Sequence[int]) -> Any:
    """Return an array of rarefy_nhwc_block."""
    if max(offsets) >= MAX_OFFSET:
        raise MemoryError(f"a kernel of a convolution reaches over {max(offsets):,} bytes, at most {MAX_OFFSET:,}")
    return (Block * len(lanes))(*zip(offsets, lanes))


def _set_segments(p: Program, step: Nhwc, starts: Sequence[int]) -> None:
    segments = (c_int64 * len(starts))(*starts)
    p.held.append(segments)
    step.segments, step.num_segments = addressof(segments), len(starts)


def _set_taps(p: Program, step: Nhwc, weight: Tensor, bias: Tensor | None) -> None:
    """Write a depthwise convolution's weight [channels, 1, rows, columns] into its step, in codes of 16 bits.

    Rows and columns of zeros around it are left out: padding of one side alone makes them.
    """
    weight = weight.float()[:, 0].permute(1, 2, 0)  # [rows, columns, channels]
    rows, columns = (weight.any(-1).any(d).nonzero()[:, 0].tolist() or [0] for d in (1, 0))
    starts = _starts(step, [columns[0] * step.dilation[1]])
    _set_segments(p, step, starts[rows[0] : rows[-1] + 1])
    weight = weight[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    step.tap_columns = weight.shape[1]
    largest = min(MAX_TAP, MAX_SUM // (255 * weight[..., 0].numel()))
    scale = (weight.abs().amax((0, 1)) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    padding = (0, -len(scale) % 64)
    codes = F.pad((weight / scale).round(), (*padding, 0, step.tap_columns % 2)).int()
    taps = torch.stack((codes[:, ::2], codes[:, 1::2]), -1).to(torch.int16).contiguous()
    p.held.append(taps)
    step.taps = taps.data_ptr()
    _set_outputs(p, step, F.pad(scale, padding), codes.sum((0, 1)).int(), bias)


def _set_numbers(p: Program, step: Nhwc, weight: Tensor, bias: Tensor | None) -> None:
    """Write a depthwise convolution's weight [channels, 1, rows, columns] into its step, in fp32."""
    _set_segments(p, step, _starts(step, [0]))
    step.tap_columns = weight.shape[-1]
    taps = F.pad(weight.float()[:, 0].permute(1, 2, 0), (0, -len(weight) % 64)).contiguous()
    p.held.append(taps)
    step.taps = taps.data_ptr()
    _set_bias(p, step, bias, len(weight))


def _set_groups(p: Program, step: Nhwc, weight: Tensor, groups: int, bias: Tensor | None) -> None:
    """Write a grouped convolution's weight into its step: each group reads its own channels of the image."""
    packed, starts = grouped_weight(weight, groups), _starts(step)
    channels, merged = packed.segment_bytes // 4, merged_groups(len(weight), groups)
    last = channels - -groups % merged * weight.shape[1]  # channels that the last groups have
    each = -(-channels // LANES)  # blocks of a kernel position
    offsets = [(start + i * BLOCK_BYTES, i * LANES) for start in starts for i in range(each)]
    whole, rest = (
        _blocks_of([offset for offset, _ in offsets], [min(LANES, max(0, n - lane)) for _, lane in offsets])
        for n in (channels, last)
    )
    p.held += [whole, rest, packed]
    step.values, step.blocks, step.num_blocks = packed.values.data_ptr(), addressof(whole), len(offsets)
    step.last_blocks, step.group_channels = addressof(rest), channels
    step.group_outputs = -(-merged * len(weight) // groups // 16) * 16
    _set_bias(p, step, bias, len(weight))


def _set_winograd(p: Program, step: Nhwc, weight: NhwcWeight, bias: Tensor | None) -> None:
    """Write the products of Winograd's algorithm into a step; they read the transformed inputs of one position."""
    lanes = weight.block_lanes()
    blocks = _blocks_of([i * BLOCK_BYTES for i in range(len(lanes))], lanes)
    p.held += [blocks, weight]
    step.values, step.blocks, step.num_blocks = weight.values.data_ptr(), addressof(blocks), len(lanes)
    _set_bias(p, step, bias, 16 * weight.values.shape[1])


def _set_sparse_weight(p: Program, step: Nhwc, packed: Any, bias: Tensor | None) -> None:
    """Write into a step where a sparse weight reads an output's inputs, pixel by pixel of the kernel."""
    _set_segments(p, step, _starts(step))
    padded = -(-packed.shape[0] // 64) * 64  # outputs; those of the weight are padded to fours
    scales, row_sums = (F.pad(t, (0, padded - len(t))) for t in (packed.scales, packed.row_sums))
    _set_outputs(p, step, scales, row_sums, bias)


def _set_weight(p: Program, step: Nhwc, weight: NhwcWeight, bias: Tensor | None, sizes: Sequence[int]) -> None:
    """Write a convolution's weight into its step, and how its blocks read the image; `sizes` are those of outputs."""
    image = step.input
    starts = _starts(step, [0] if step.dilation[1] == 1 else None)
    pitch = image.width + 2 * image.border
    dropped = ((sizes[0] - 1) * pitch + sizes[1]) / (sizes[0] * sizes[1])
    strided, in_rows = tuple(step.stride) != (1, 1), weight.factors is None and sizes[1] >= MIN_ROW
    copied = weight.tight or weight.in_int16 or (strided and not in_rows) or (not strided and dropped > MAX_DROPPED)
    lanes = weight.block_lanes()
    each = len(lanes) // len(starts)  # blocks of a segment
    offsets = [i * BLOCK_BYTES for i in range(len(lanes))]
    if copied:
        _set_segments(p, step, starts)
        step.segment_bytes, step.segment_stride = weight.segment_bytes, weight.segment_stride
    else:
        offsets = [start + i * BLOCK_BYTES for start in starts for i in range(each)]
    blocks = _blocks_of(offsets, lanes)
    p.held += [blocks, weight]
    step.values, step.blocks, step.num_blocks = weight.values.data_ptr(), addressof(blocks), len(lanes)
    if weight.factors is None or weight.row_sums is None:
        step.factors = None if weight.factors is None else weight.factors.data_ptr()
        _set_bias(p, step, bias, 16 * len(weight.values))
    else:
        _set_outputs(p, step, weight.factors, weight.row_sums, bias)
