"""Quantized weights, packed: symmetric codes (`int`), codes with a zero point (`uint`) or codebook indices
(`codebook`), each in any of the sparse formats: `int:dense`, `uint:bitmask`, `codebook:nm`.

    u      uint8 in 0..2^bits - 1, in the weight's shape: the codes; 0 where the weight is 0, so that sparse formats
           store u as they store any tensor with zeros
    scale  see `rarefy.model.quant_grid`
    table  [*blocks, 2^bits], the values of a codebook

Stored are the parts of u in its sparse format, its `values` packed to `bits` bits, least significant first. `check` and
`decode` take the unquantized formats of `rarefy.formats.sparse_encodings` too.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rarefy.common.errors import FormatError, unknown
from rarefy.formats import sparse_encodings
from rarefy.formats.bitpacking import pack_codes, unpack_codes
from rarefy.formats.sparse_encodings import Packed
from rarefy.model.quant_grid import BITS, Codebook, Grid, WeightGrid, scale_fits

INNER = ("dense", "bitmask", "csr", "bsr", "nm")
KINDS: dict[str, tuple[str, ...]] = {"int": ("scale",), "uint": ("scale", "zero"), "codebook": ("table",)}
PARTS: dict[str, tuple[str, ...]] = {name: codec.parts for name, codec in sparse_encodings.FORMATS.items()}
PARTS |= {f"{kind}:{f}": (*sparse_encodings.FORMATS[f].parts, *more) for kind, more in KINDS.items() for f in INNER}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kind_of(grid: WeightGrid) -> str:
    """Return the kind of codes, the part of a format's name before the colon."""
    if isinstance(grid, Codebook):
        return "codebook"
    return "int" if grid.zero is None else "uint"


def encode(weight: Tensor, grid: WeightGrid, format: str, pattern: str | None = None, *, axis: int = -1) -> Packed:
    """Return a quantized weight packed in `format`, one of `INNER`; the other arguments are those of
    `sparse_encodings.encode`. `decode` returns the same bits. O(n).

    >>> p = encode(torch.tensor([[0.0, 1.0, -0.5, 0.0]]), Grid(4, torch.tensor([[0.5]])), "bitmask")
    >>> p.format, p.nbytes, decode(p).tolist()
    ('int:bitmask', 6, [[0.0, 1.0, -0.5, 0.0]])
    """
    if format not in INNER:
        raise FormatError(unknown("format of quantized weights", format, INNER))
    inner = sparse_encodings.encode(_codes(weight, grid), format, pattern, axis=axis)
    parts = inner.parts | {"values": pack_codes(inner.parts["values"].flatten(), grid.bits)}
    kind = kind_of(grid)
    parts |= {n: t.detach().cpu().contiguous() for n in KINDS[kind] if (t := getattr(grid, n)) is not None}
    p = Packed(f"{kind}:{format}", tuple(weight.shape), weight.dtype, parts, inner.extra)
    return replace(p, extra=p.extra | {"bits": grid.bits})


def sizes(weight: Tensor, grid: WeightGrid, pattern: str | None = None, *, axis: int = -1) -> dict[str, int]:
    """Return the exact bytes of a weight in each format of `INNER` that can hold it. O(n)."""
    u = _codes(weight, grid)
    grid_bytes = sum(t.nbytes for n in KINDS[kind_of(grid)] if (t := getattr(grid, n)) is not None)
    one, two = (sparse_encodings.sizes(u.to(d), pattern, axis=axis) for d in (torch.uint8, torch.int16))
    count = {f: two[f] - one[f] for f in INNER if f in one}  # stored values: a second byte of each makes the difference
    return {f: one[f] - n + -(-n * grid.bits // 8) + grid_bytes for f, n in count.items()}


def grid_of(p: Packed) -> WeightGrid | None:
    """Return the grid or codebook of a checked Packed, or None where it has neither."""
    kind, _, inner = p.format.partition(":")
    if not inner:
        return None
    if kind == "codebook":
        return Codebook(p.extra["bits"], p.parts["table"])
    return Grid(p.extra["bits"], p.parts["scale"], p.parts.get("zero"))


def check(p: Packed) -> None:
    """Raise FormatError unless all parts of `p` agree, as `sparse_encodings.check`. O(stored bytes)."""
    if ":" not in p.format:
        return sparse_encodings.check(p)
    sparse_encodings.check(_inner(p))


def decode(p: Packed) -> Tensor:
    """Return the dense tensor of any format; checks first. O(n)."""
    if ":" not in p.format:
        return sparse_encodings.decode(p)
    u, grid = sparse_encodings.decode(_inner(p)), grid_of(p)
    assert grid is not None
    if isinstance(grid, Codebook):
        return grid.values(u, p.dtype)
    half = 1 << (grid.bits - 1)
    if grid.zero is None:
        return grid.values(((u.to(torch.int16) + half) & (2 * half - 1)) - half, p.dtype)
    zero = grid.expand(grid.zero.to(torch.int16), p.shape)
    return grid.values(((u.to(torch.int16) + zero) & (2 * half - 1)) - zero, p.dtype)


def label(p: Packed) -> str:
    """Return a short name of the format with its bits: `int4:bitmask`."""
    kind, _, inner = p.format.partition(":")
    return f"{kind}{p.extra['bits']}:{inner}" if inner else kind


def _codes(weight: Tensor, grid: WeightGrid) -> Tensor:
    if isinstance(grid, Codebook):
        return grid.codes(weight)
    return (grid.codes(weight) & ((1 << grid.bits) - 1)).to(torch.uint8)


def _inner(p: Packed) -> Packed:
    """Return u in its sparse format; FormatError unless the codes, scales, zeros or table are sound."""
    if p.format not in PARTS:
        raise FormatError(unknown("format", p.format, PARTS))
    kind, _, format = p.format.partition(":")
    bits = p.extra.get("bits")
    if type(bits) is not int or bits not in BITS:
        raise FormatError(f"{p.format}: bits is {bits!r}, must be a whole number from {BITS[0]} to {BITS[-1]}")
    if set(p.parts) != set(PARTS[p.format]):
        raise FormatError(f"{p.format}: parts are {sorted(p.parts)}, must be {sorted(PARTS[p.format])}")
    bare = Packed(format, p.shape, torch.uint8, {}, {k: v for k, v in p.extra.items() if k != "bits"})
    for name, t in p.parts.items():
        if not isinstance(t, Tensor) or t.layout != torch.strided or not t.is_contiguous():
            raise FormatError(f"{p.format}: part {name!r} must be a dense contiguous tensor")
    if p.dtype not in FLOATS:
        raise FormatError(f"{p.format}: dtype {p.dtype} is not a floating point type of quantized weights")
    _check_grid_parts(p, kind, bits)
    parts = {n: t for n, t in p.parts.items() if n not in KINDS[kind]}
    shape = sparse_encodings.values_shape(replace(bare, parts=parts))
    n, packed = math.prod(shape), parts["values"]
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-n * bits // 8),):
        want = f"uint8 [{-(-n * bits // 8)}]"
        raise FormatError(f"{p.format}: part 'values' is {sparse_encodings.kind(packed)}, must be {want}")
    if n * bits % 8 and int(packed[-1]) >> n * bits % 8:
        raise FormatError(f"{p.format}: part 'values' has bits set after its {n} values")
    codes = unpack_codes(packed, bits, n)
    if kind == "int" and bits == 8 and bool((codes == 128).any()):
        raise FormatError(f"{p.format}: part 'values' holds -128, which symmetric codes exclude")
    return replace(bare, parts=parts | {"values": codes.view(shape)})


def _check_grid_parts(p: Packed, kind: str, bits: int) -> None:
    """Raise FormatError unless scales, zeros or the table fit the weight."""
    for name in KINDS[kind]:
        t = p.parts[name]
        shape = tuple(t.shape)
        if name == "table":
            if shape[-1:] != (1 << bits,):
                raise FormatError(
                    f"{p.format}: part 'table' is {sparse_encodings.kind(t)}, its last size must be {1 << bits}"
                )
            shape = shape[:-1]
        if not scale_fits(shape, p.shape):
            raise FormatError(
                f"{p.format}: part {name!r} is {sparse_encodings.kind(t)}, which does not fit a weight {list(p.shape)}"
            )
        dtypes = (torch.uint8,) if name == "zero" else FLOATS
        if t.dtype not in dtypes:
            raise FormatError(f"{p.format}: part {name!r} is {sparse_encodings.kind(t)}, must be {dtypes[0]}")
        if name != "zero" and not bool(torch.isfinite(t).all()):
            raise FormatError(f"{p.format}: part {name!r} holds NaN or inf")
        if name == "scale" and t.numel() and not float(t.min()) > 0:
            raise FormatError(f"{p.format}: part 'scale' must be above zero")
    if kind == "uint":
        if p.parts["zero"].shape != p.parts["scale"].shape:
            raise FormatError(
                f"{p.format}: part 'zero' is {sparse_encodings.kind(p.parts['zero'])}, must have the shape of 'scale'"
            )
        if p.parts["zero"].numel() and int(p.parts["zero"].max()) >= 1 << bits:
            raise FormatError(f"{p.format}: part 'zero' must hold codes of {bits} bits")
    if kind == "codebook" and bool(p.parts["table"][..., 0].any()):
        raise FormatError(f"{p.format}: part 'table' must begin with zero")
