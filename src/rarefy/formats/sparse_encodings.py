"""Tensors with zeros, packed into fewer bytes and back, bit for bit.

    X    [shape]   the bits of a tensor as integers of its width: -0.0 and NaN payloads are just numbers
    A    [R, C]    X as a matrix, `axis` moved last; nm: [other dims, axis]; csr, csc, bsr: [first dim, rest]
    hit  bool      True where X is stored, which is where its bits are not all zero
    k              how many values, blocks or groups are stored

Bits are packed least significant first. A format is one line in FORMATS. `check` reads nothing that it has
not measured before: parts from a hostile file end in FormatError, never in an index out of range.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rarefy.common.errors import FormatError, unknown
from rarefy.formats.bitpacking import pack_bits, unpack_bits

# fmt: off
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "complex64": torch.complex64,
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "bool": torch.bool,
    "uint64": torch.uint64, "uint32": torch.uint32, "uint16": torch.uint16, "uint8": torch.uint8,
}
# fmt: on
MAX_ENTRIES, MAX_DIMS = 2**48, 16  # row * C + column stays far from the end of int64
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMBERS = {
    "nm": (r"(\d{1,4}):(\d{1,4})", "2:4", "n", "m"),
    "bsr": (r"(\d{1,4})x(\d{1,4})", "4x1", "rows", "cols"),
}
_HIGHEST = {"n": 64, "m": 64, "rows": 4096, "cols": 4096}
_POINTERS = {"csr": ("crow", "col"), "csc": ("ccol", "row"), "bsr": ("crow", "col")}
_PREFERRED = ("dense", "nm", "bitmask", "csr", "csc", "bsr")  # on equal bytes


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed tensor: what it was (shape, dtype), how it is stored (format, extra), and plain parts."""

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: dict[str, Tensor]
    extra: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all parts together."""
        return sum(t.numel() * t.element_size() for t in self.parts.values())


class Codec(NamedTuple):
    """A format: the names of its parts, and four functions; `p` has no parts yet in encode and size."""

    parts: tuple[str, ...]
    encode: Callable[..., dict[str, Tensor]]  # (p, X) -> parts, the values still as integers
    check: Callable[[Packed], Any]  # p -> what decode would otherwise work out again
    decode: Callable[[Packed, Any], Tensor]  # (p, what check returned) -> X
    size: Callable[[Packed, Tensor], int | None]  # (p, hit) -> bytes, None where the format cannot hold it


def encode(x: Tensor, format: str, pattern: str | None = None, *, axis: int = -1, mask: Tensor | None = None) -> Packed:
    """Return `x` packed; `decode` returns the same bits. O(n), without a loop over entries.

    Args:
        x: any tensor; dense parts share memory with a contiguous one.
        format: a name in `FORMATS`.
        pattern: the block shape of the zeros: "N:M" for nm (2:4 by default), "RxC" for bsr (4x1 by default).
        axis: the dimension along which groups of M and columns of blocks run: 1 for a convolution [O, I, kh, kw]
            pruned along I, 0 for a Conv1D [in, out]. dense, dense+mask and bitmask keep the tensor's own order.
        mask: bool, True = kept: what dense+mask stores; by default where `x` is not zero.

    Raises:
        FormatError: a group has more than N entries, or an argument is impossible.

    >>> p = encode(torch.tensor([[0.0, 1.0, 2.0, 0.0]]), "nm", "2:4")
    >>> p.nbytes, p.parts["values"].tolist(), decode(p).tolist()
    (9, [[1.0, 2.0]], [[0.0, 1.0, 2.0, 0.0]])
    """
    if format not in FORMATS:
        raise FormatError(unknown("format", format, FORMATS))
    if mask is not None and format != "dense+mask":
        raise FormatError(f"mask has no effect on format {format!r}; only dense+mask keeps one")
    if mask is not None and kind(mask) != f"bool {list(x.shape)}":
        raise FormatError(f"mask is {kind(mask)}, must be bool {list(x.shape)}")
    X, p = _bits(x), _empty(x, format, pattern, axis)
    parts = FORMATS[format].encode(p, X)
    parts["values"] = parts["values"].view(x.dtype)
    return replace(p, parts=parts if mask is None else parts | {"mask": pack_bits(mask)})


def decode(p: Packed) -> Tensor:
    """Return the dense tensor, contiguous, in memory of its own: O(n). Checks first; raises what `check` does.

    >>> decode(encode(torch.tensor([0.0, -0.0, 3.0]), "bitmask"))
    tensor([0., -0., 3.])
    """
    checked = _check(p)
    return FORMATS[p.format].decode(p, checked).reshape(p.shape).contiguous().view(p.dtype)


def check(p: Packed) -> None:
    """Raise FormatError unless every length, dtype, pointer, index and count in `p` agrees: O(stored bytes).

    >>> check(Packed("dense", (2,), torch.int8, {"values": torch.zeros(7)}, {}))
    Traceback (most recent call last):
    rarefy.common.errors.FormatError: dense: part 'values' is float32 [7], must be int8 [2]
    """
    _check(p)


def sizes(x: Tensor, pattern: str | None = None, *, axis: int = -1) -> dict[str, int]:
    """Return the exact bytes of `x` in each format that can hold it, without packing; arguments as for `encode`: O(n).

    >>> sizes(torch.eye(8))["bitmask"], sizes(torch.ones(1, 4)).get("nm", "does not fit")
    (40, 'does not fit')
    """
    hit = _bits(x) != 0
    sizes = {format: codec.size(_empty(x, format, pattern, axis), hit) for format, codec in FORMATS.items()}
    return {format: size for format, size in sizes.items() if size is not None}


def smallest(x: Tensor, pattern: str | None = None, *, axis: int = -1) -> Packed:
    """Return `x` in its smallest format; on equal bytes dense, then nm, then bitmask: O(n).

    >>> smallest(torch.ones(4)).format, smallest(torch.tensor([0, 0, 7, 7]), "2:4").format
    ('dense', 'nm')
    """
    size = sizes(x, pattern, axis=axis)
    best = min(_PREFERRED, key=lambda format: size.get(format, math.inf))  # min keeps the first of equals
    return encode(x, best, pattern, axis=axis)


def to_torch(p: Packed) -> Tensor:
    """Return csr, csc or bsr as torch's own sparse matrix [R, C], values shared, explicit zeros kept: O(k).

    FormatError for other formats, and for bsr with partial blocks at the edge, which torch cannot represent.

    >>> to_torch(encode(torch.eye(2), "csr")).layout
    torch.sparse_csr
    """
    make = {"csr": torch.sparse_csr_tensor, "csc": torch.sparse_csc_tensor, "bsr": torch.sparse_bsr_tensor}
    if p.format not in make:
        raise FormatError(f"torch has no format {p.format!r}; it has {', '.join(make)}")
    _check(p)
    (_, R, C), (_, _, r, c) = _matrix_shape(p), _grid_dims(p)
    if R % r or C % c:
        raise FormatError(f"torch.sparse_bsr needs whole blocks: [{R}, {C}] is no multiple of {r}x{c}")
    ptr, idx = (p.parts[name] for name in _POINTERS[p.format])
    index_dtype = torch.int64 if torch.int64 in (ptr.dtype, idx.dtype) else torch.int32
    with warnings.catch_warnings():  # torch says once that these layouts are in beta
        warnings.simplefilter("ignore", UserWarning)
        return make[p.format](ptr.to(index_dtype), idx.to(index_dtype), p.parts["values"], size=(R, C))


def from_torch(t: Tensor) -> Packed:
    """Return torch's sparse CSR, CSC or BSR matrix as Packed, explicit zeros kept, values shared: O(k).

    FormatError for other layouts, batches, dense dimensions, and indices that are unsorted or twice.

    >>> from_torch(to_torch(encode(torch.eye(2), "csr"))).parts["col"].tolist()
    [0, 1]
    """
    layouts = {torch.sparse_csr: "csr", torch.sparse_csc: "csc", torch.sparse_bsr: "bsr"}
    format = layouts.get(t.layout)
    if format is None:
        raise FormatError(f"layout {t.layout} is not supported; give {', '.join(map(str, layouts))}")
    values = t.detach().values().contiguous()
    if t.ndim != 2 or values.ndim != (3 if format == "bsr" else 1):
        raise FormatError(f"{t.layout} {list(t.shape)} has batch or dense dimensions; give one matrix")
    ptr, idx = (t.ccol_indices(), t.row_indices()) if format == "csc" else (t.crow_indices(), t.col_indices())
    extra = {"rows": values.shape[1], "cols": values.shape[2], "axis": 1} if format == "bsr" else {}
    p = Packed(format, tuple(t.shape), t.dtype, {}, extra)
    _check_extra(p)
    parts = _pointers(p, ptr, idx) | {"values": values}
    _check(replace(p, parts=parts))
    return replace(p, parts=parts)


# what all formats share


def kind(t: Tensor) -> str:
    """Return the dtype and shape in words: `float32 [2, 3]`."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _bits(x: Tensor) -> Tensor:
    if x.layout != torch.strided or x.is_meta or x.dtype not in DTYPES.values():
        why = f"cannot pack a {kind(x)} tensor ({x.layout}, on {x.device})"
        raise FormatError(f"{why}; give a dense tensor with values, of dtype {', '.join(DTYPES)}")
    return x.detach().resolve_conj().resolve_neg().contiguous().view(_WIDTHS[x.element_size()])


def _empty(x: Tensor, format: str, pattern: str | None, axis: int) -> Packed:
    """Return a Packed like `x` that has everything but the parts."""
    dims, extra = max(x.ndim, 1), {}
    if not -dims <= axis < dims:
        raise FormatError(f"axis {axis} is not a dimension of a tensor that has {x.ndim}")
    if pattern is not None and not any(re.fullmatch(form, pattern) for form, *_ in _NUMBERS.values()):
        raise FormatError(f"pattern {pattern!r} is neither N:M (like '2:4') nor RxC (like '4x1')")
    if format in _NUMBERS:
        form, default, *names = _NUMBERS[format]
        numbers = re.fullmatch(form, pattern or default) or re.fullmatch(form, default)
        extra = dict(zip(names, map(int, numbers.groups()))) if numbers else {}
    if format in _NUMBERS or (format in _POINTERS and axis % dims != dims - 1):
        extra["axis"] = axis % dims
    p = Packed(format, tuple(x.shape), x.dtype, {}, extra)
    _check_extra(p)
    return p


def _check_extra(p: Packed) -> None:
    names, dims = set(_NUMBERS.get(p.format, ())[2:]), max(len(p.shape), 1)
    if set(p.extra) - ({"axis"} if p.format in (*_NUMBERS, *_POINTERS) else set()) != names:
        raise FormatError(f"{p.format}: extra names {sorted(p.extra)}, must name {sorted(names)}")
    for name, number in p.extra.items():
        low, high = (-dims, dims - 1) if name == "axis" else (1, _HIGHEST[name])
        if type(number) is not int or not low <= number <= high:
            raise FormatError(f"{p.format}: {name} is {number!r}, must be a whole number from {low} to {high}")
    if p.format == "nm" and p.extra["n"] > p.extra["m"]:
        raise FormatError(f"nm: {p.extra['n']}:{p.extra['m']} keeps more than a whole group")


def _check_shape(p: Packed) -> None:
    whole = len(p.shape) <= MAX_DIMS and all(type(d) is int and d >= 0 for d in p.shape)
    if not whole or math.prod(d or 1 for d in p.shape) > MAX_ENTRIES:
        limit = f"at most {MAX_DIMS} sizes, none negative, and 2**48 entries"
        raise FormatError(f"{p.format}: shape {list(p.shape)[: MAX_DIMS + 1]} is impossible; {limit}")


def _check(p: Packed) -> Any:
    if p.format not in FORMATS:
        raise FormatError(unknown("format", p.format, FORMATS))
    _check_shape(p)
    if p.dtype not in DTYPES.values():
        raise FormatError(f"{p.format}: dtype {p.dtype} is not one of {', '.join(DTYPES)}")
    if set(p.parts) != (names := set(FORMATS[p.format].parts)):
        raise FormatError(f"{p.format}: parts are {sorted(p.parts)}, must be {sorted(names)}")
    for name, t in p.parts.items():
        if not isinstance(t, Tensor) or t.layout != torch.strided or not t.is_contiguous():
            raise FormatError(f"{p.format}: part {name!r} must be a dense contiguous tensor")
    _check_extra(p)
    return FORMATS[p.format].check(p)


def _expect(p: Packed, part: str, dtype: torch.dtype, *shape: int) -> Tensor:
    t = p.parts[part].detach()
    if kind(t) != (want := f"{str(dtype).removeprefix('torch.')} {list(shape)}"):
        raise FormatError(f"{p.format}: part {part!r} is {kind(t)}, must be {want}")
    return t.view(_WIDTHS[dtype.itemsize]) if part == "values" else t


def _expect_bits(p: Packed, part: str, n: int) -> Tensor:
    packed = _expect(p, part, torch.uint8, -(-n // 8))
    if n % 8 and int(packed[-1]) >> n % 8:
        raise FormatError(f"{p.format}: part {part!r} has bits set after its {n} bits")
    return unpack_bits(packed, n)


def values_shape(p: Packed) -> tuple[int, ...]:
    """Return the shape that the part `values` must have, as the other parts tell; FormatError where those are wrong."""
    _check_extra(p)
    _check_shape(p)
    if p.format == "bitmask":
        return (int(torch.count_nonzero(_expect_bits(p, "mask", math.prod(p.shape)))),)
    if p.format == "nm":
        n, _, _, k, _ = _nm(p)
        return k, n
    if p.format in _POINTERS:
        k = p.parts[_POINTERS[p.format][1]].numel()
        return (k, p.extra["rows"], p.extra["cols"]) if p.format == "bsr" else (k,)
    return p.shape


def _values(p: Packed) -> Tensor:
    return p.parts["values"].detach().view(_WIDTHS[p.dtype.itemsize])


def _scatter(hit: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(hit.shape).masked_scatter_(hit, values)


def _matrix_shape(p: Packed) -> tuple[list[int], int, int]:
    """Return the shape with `axis` last, and its matrix's R and C; a vector or a scalar is one row."""
    moved = list(p.shape) or [1]
    moved.append(moved.pop(p.extra.get("axis", -1)))
    split = 1 if p.format in _POINTERS and len(moved) > 1 else -1
    return moved, math.prod(moved[:split]), math.prod(moved[split:])


def _to_matrix(p: Packed, X: Tensor, r: int, c: int) -> Tensor:
    """Return the matrix, with zeros up to whole multiples of `r` and `c`."""
    _, R, C = _matrix_shape(p)
    A = X.reshape(p.shape or (1,)).movedim(p.extra.get("axis", -1), -1).reshape(R, C)
    return torch.nn.functional.pad(A, (0, -C % c, 0, -R % r)) if R % r or C % c else A.contiguous()


def _from_matrix(p: Packed, A: Tensor) -> Tensor:
    moved, R, C = _matrix_shape(p)
    return A[:R, :C].reshape(moved).movedim(-1, p.extra.get("axis", -1))


# dense, dense+mask, bitmask: the tensor's own order


def _encode_flat(p: Packed, X: Tensor) -> dict[str, Tensor]:
    if p.format == "dense":
        return {"values": X}
    hit = X != 0
    return {"values": X[hit] if p.format == "bitmask" else X, "mask": pack_bits(hit)}


def _check_flat(p: Packed) -> Tensor | None:
    mask = _expect_bits(p, "mask", math.prod(p.shape)) if "mask" in p.parts else None
    shape = (int(torch.count_nonzero(mask)),) if mask is not None and p.format == "bitmask" else p.shape
    _expect(p, "values", p.dtype, *shape)
    return mask


def _decode_flat(p: Packed, mask: Tensor) -> Tensor:
    return _scatter(mask, _values(p)) if p.format == "bitmask" else _values(p).clone()


def _size_flat(p: Packed, hit: Tensor) -> int:
    stored = int(hit.count_nonzero()) if p.format == "bitmask" else hit.numel()
    return stored * p.dtype.itemsize + (0 if p.format == "dense" else -(-hit.numel() // 8))


# csr, csc, bsr: a grid [R, C] of blocks [r, c]; where each row begins, and the column of each stored block


def _grid_dims(p: Packed) -> tuple[int, int, int, int]:
    _, R, C = _matrix_shape(p)
    r, c = p.extra.get("rows", 1), p.extra.get("cols", 1)
    return (C, R, 1, 1) if p.format == "csc" else (-(-R // r), -(-C // c), r, c)


def _pointer_dtypes(k: int, C: int) -> tuple[torch.dtype, torch.dtype]:
    index = torch.uint16 if C <= 2**16 else torch.int32 if C <= 2**31 else torch.int64
    return (torch.int32 if k < 2**31 else torch.int64), index


def _pointers(p: Packed, ptr: Tensor, idx: Tensor) -> dict[str, Tensor]:
    dtypes = _pointer_dtypes(len(idx), _grid_dims(p)[1])
    return {name: t.to(dtype) for name, t, dtype in zip(_POINTERS[p.format], (ptr, idx), dtypes)}


def _grid(p: Packed, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return all blocks [R, C, r, c], and which of them hold anything [R, C]."""
    R, C, r, c = _grid_dims(p)
    A = _to_matrix(p, X, r, c)
    A = A.t().contiguous() if p.format == "csc" else A
    blocks = A.view(R, r, C, c).transpose(1, 2)
    return blocks, A != 0 if r == c == 1 else (blocks != 0).flatten(2).any(2)


def _encode_grid(p: Packed, X: Tensor) -> dict[str, Tensor]:
    blocks, hit = _grid(p, X)
    ptr = torch.nn.functional.pad(hit.sum(1).cumsum(0), (1, 0))
    idx = hit.flatten().nonzero().flatten() % max(hit.shape[1], 1)
    return _pointers(p, ptr, idx) | {"values": blocks[hit] if p.format == "bsr" else blocks[hit].flatten()}


def _check_grid(p: Packed) -> Tensor:
    """Return the position of each stored block in the grid, row * C + column, int64 [k]."""
    (R, C, r, c), (first, second) = _grid_dims(p), _POINTERS[p.format]
    k = p.parts["values"].numel() // (r * c)
    _expect(p, "values", p.dtype, *((k, r, c) if p.format == "bsr" else (k,)))
    ptr_dtype, idx_dtype = _pointer_dtypes(k, C)
    ptr = _expect(p, first, ptr_dtype, R + 1).to(torch.int64)
    idx = _expect(p, second, idx_dtype, k).to(torch.int64)
    # compared, not subtracted: a hostile difference would wrap around
    if int(ptr[0]) != 0 or int(ptr[-1]) != k or bool((ptr[1:] < ptr[:-1]).any()):
        raise FormatError(f"{p.format}: part {first!r} must start at 0, end at {k} and never decrease")
    if k and not 0 <= int(idx.min()) <= int(idx.max()) < C:
        raise FormatError(f"{p.format}: part {second!r} must stay within 0 and {C - 1}")
    position = torch.arange(R, device=ptr.device).repeat_interleave(ptr.diff(), output_size=k) * C + idx
    if bool((position[1:] <= position[:-1]).any()):
        raise FormatError(f"{p.format}: part {second!r} must increase strictly within each row")
    return position


def _decode_grid(p: Packed, position: Tensor) -> Tensor:
    (R, C, r, c), (_, rows, cols) = _grid_dims(p), _matrix_shape(p)
    values = _values(p)
    if p.format == "bsr":  # a block larger than the matrix would be mostly padding: memory is at most 4 times n
        r, c = min(r, rows), min(c, cols)
        values = values[:, :r, :c].flatten(1)
    A = values.new_zeros(R * C, *values.shape[1:]).index_copy_(0, position, values)
    A = A.view(R, C, r, c).transpose(1, 2).reshape(R * r, C * c)
    return _from_matrix(p, A.t() if p.format == "csc" else A)


def _size_grid(p: Packed, hit: Tensor) -> int:
    R, C, r, c = _grid_dims(p)
    k = int((hit if r == c == 1 else _grid(p, hit)[1]).count_nonzero())
    ptr, idx = _pointer_dtypes(k, C)
    return (R + 1) * ptr.itemsize + k * (idx.itemsize + r * c * p.dtype.itemsize)


# nm: each row cut into groups of m, k in all; each has n places for values, filled from the left, the rest 0


def _nm(p: Packed) -> tuple[int, int, int, int, int]:
    """Return n, m, the groups in a row, k, and the bits of an index, 0 where a mask of m bits is no longer."""
    (_, R, C), n, m = _matrix_shape(p), p.extra["n"], p.extra["m"]
    width = (m - 1).bit_length()
    return n, m, -(-C // m), R * -(-C // m), width if n * width < m else 0


def _used(hit: Tensor, n: int) -> Tensor:
    """Return which of the n places of each group hold a value, bool [k, n]."""
    return torch.arange(n, device=hit.device) < hit.sum(1, dtype=torch.uint8)[:, None]


def _index(hit: Tensor, used: Tensor, width: int) -> Tensor:
    if not width:
        return pack_bits(hit)
    index = _scatter(used, hit.nonzero()[:, 1].to(torch.uint8))
    return pack_bits(index[..., None] >> torch.arange(width, device=hit.device) & 1)


def _encode_nm(p: Packed, X: Tensor) -> dict[str, Tensor]:
    n, m, in_row, _, width = _nm(p)
    groups = _to_matrix(p, X, 1, m).view(-1, m)
    hit = groups != 0
    over = (hit.sum(1) > n).nonzero().flatten()
    if len(over):
        row, group = divmod(int(over[0]), in_row)
        why = f"group {group} of row {row} has {int(hit[over[0]].sum())} entries, at most {n} fit"
        raise FormatError(f"nm {n}:{m}: {why}; use format 'bitmask', or prune to the pattern first")
    used = _used(hit, n)
    return {"values": _scatter(used, groups[hit]), "index": _index(hit, used, width)}


def _check_nm(p: Packed) -> tuple[Tensor, Tensor]:
    """Return where the groups hold values, bool [k, m], and in which places those are, bool [k, n]."""
    n, m, in_row, k, width = _nm(p)
    filled = _expect(p, "values", p.dtype, k, n) != 0
    hit = _expect_bits(p, "index", k * (n * width or m))
    if width:
        bits = 1 << torch.arange(width, dtype=torch.uint8, device=hit.device)
        index = (hit.view(k, n, width) * bits).sum(2).clamp(max=m - 1)
        position = torch.arange(k, device=hit.device)[:, None] * m + index
        hit = hit.new_zeros(k * m).index_fill_(0, position[filled], True)
    hit = hit.view(k, m)
    used = _used(hit, n)
    bad = bool((hit.sum(1) > n).any()) or bool((filled & ~used).any())
    if bad or not torch.equal(_index(hit, used, width), p.parts["index"]):
        raise FormatError(f"nm {n}:{m}: part 'index' does not fit the values of some group")
    _, R, C = _matrix_shape(p)
    if bool(hit.view(R, in_row * m)[:, C:].any()):
        raise FormatError(f"nm {n}:{m}: part 'index' points past the end of a row")
    return hit, used


def _decode_nm(p: Packed, checked: tuple[Tensor, Tensor]) -> Tensor:
    (hit, used), (_, m, in_row, _, _), (_, R, _) = checked, _nm(p), _matrix_shape(p)
    return _from_matrix(p, _scatter(hit, _values(p)[used]).view(R, in_row * m))


def _size_nm(p: Packed, hit: Tensor) -> int | None:
    n, m, _, k, width = _nm(p)
    fits = bool((_to_matrix(p, hit, 1, m).view(-1, m).sum(1) <= n).all())
    return k * n * p.dtype.itemsize + -(-k * (n * width or m) // 8) if fits else None


FORMATS: dict[str, Codec] = {
    "dense": Codec(("values",), _encode_flat, _check_flat, _decode_flat, _size_flat),
    "dense+mask": Codec(("values", "mask"), _encode_flat, _check_flat, _decode_flat, _size_flat),
    "bitmask": Codec(("values", "mask"), _encode_flat, _check_flat, _decode_flat, _size_flat),
    "csr": Codec(("crow", "col", "values"), _encode_grid, _check_grid, _decode_grid, _size_grid),
    "csc": Codec(("ccol", "row", "values"), _encode_grid, _check_grid, _decode_grid, _size_grid),
    "bsr": Codec(("crow", "col", "values"), _encode_grid, _check_grid, _decode_grid, _size_grid),
    "nm": Codec(("values", "index"), _encode_nm, _check_nm, _decode_nm, _size_nm),
}
