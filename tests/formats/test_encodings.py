"""Packed formats: bit-exact round trips against slow oracles, exact sizes, and an error for every lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rarefy.common.errors import FormatError
from rarefy.formats.sparse_encodings import (
    DTYPES,
    FORMATS,
    Packed,
    check,
    decode,
    encode,
    from_torch,
    pack_bits,
    sizes,
    smallest,
    to_torch,
    unpack_bits,
)

WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = [(), (1,), (7,), (0,), (3, 0), (0, 3), (1, 1), (8, 16), (5, 7), (6, 5, 3, 3), (4, 8, 1, 1)]
PATTERNS = {
    "nm": ["1:1", "1:2", "2:4", "1:4", "4:8", "2:8", "3:5", "2:7", "16:64", "1:64"],
    "bsr": ["4x1", "1x4", "3x2"],
}
CASES = [(format, pattern) for format in FORMATS for pattern in PATTERNS.get(format, [None])]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(WIDTH[x.element_size()])


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def noise(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random bits (so NaN, inf and -0.0 too) where a coin falls, zero bits elsewhere."""
    g = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    raw = torch.randint(0, 256, (*shape, size), generator=g, dtype=torch.uint8).view(WIDTH[size]).view(shape)
    return (raw * (torch.rand(shape, generator=g) < density)).view(dtype)


def fit(x: torch.Tensor, pattern: str, axis: int) -> torch.Tensor:
    """Zero all but the first N entries of every group of M along `axis`, one entry at a time."""
    n, m = map(int, pattern.split(":"))
    moved = bits(x.clone()).reshape(x.shape or (1,)).movedim(axis, -1).contiguous()
    for row in moved.view(-1, moved.shape[-1]) if moved.numel() else []:
        for start in range(0, len(row), m):
            full = [i for i in range(start, min(start + m, len(row))) if row[i]]
            for i in full[n:]:
                row[i] = 0
    return moved.movedim(-1, axis).reshape(x.shape).contiguous().view(x.dtype)


@pytest.mark.parametrize("format, pattern", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_come_back_and_take_the_size_that_was_foretold(format, pattern, shape):
    axes = [-1] if len(shape) < 2 else [0, 1, -1] if len(shape) == 2 else list(range(len(shape)))
    for axis in axes:
        for density in (0.0, 0.2, 1.0):
            x = noise(shape, density)
            x = fit(x, pattern, axis) if format == "nm" else x
            p = encode(x, format, pattern, axis=axis)
            assert same(decode(p), x)
            assert sizes(x, pattern, axis=axis)[format] == p.nbytes
            assert all(t.is_contiguous() for t in p.parts.values())
            assert decode(p).is_contiguous()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_from_every_format(name):
    for format, pattern in CASES:
        x = noise((6, 10), 0.3, torch.uint8 if name == "bool" else DTYPES[name], seed=1)
        x = x.bool() if name == "bool" else x
        if pattern and ":" in pattern:
            x = fit(x, pattern, -1)
        p = encode(x, format, pattern)
        assert p.parts["values"].dtype == DTYPES[name]
        assert same(decode(p), x), format


@pytest.mark.parametrize("format", FORMATS)
def test_special_values_are_values(format):
    payload = torch.tensor([0x7FC12345, -0x00400001, 0x7F800001], dtype=torch.int32).view(torch.float32)
    x = torch.tensor([[-0.0, 0.0, float("inf"), 0.0], [0.0, -float("inf"), 0.0, 1e-45], [0.0, 0.0, 0.0, 0.0]])
    x[2, :2] = payload[:2]
    p = encode(x, format)
    assert same(decode(p), x)
    if format in ("bitmask", "csr", "csc"):
        assert p.parts["values"].numel() == 6  # -0.0 is stored


@pytest.mark.parametrize("format", FORMATS)
def test_a_view_and_a_parameter_pack_like_a_plain_tensor_and_decode_owns_its_memory(format):
    base = noise((8, 8), 0.2)
    x = base[::2, 1::4].t()
    assert same(decode(encode(x, format)), x.contiguous())
    parameter = torch.nn.Parameter(torch.eye(4))
    p = encode(parameter, format)
    decode(p).fill_(7)
    assert torch.equal(decode(p), torch.eye(4)) and not decode(p).requires_grad


def test_negated_and_conjugated_views_are_resolved():
    z = torch.tensor([1 + 2j, 0j])
    assert torch.equal(decode(encode(z.conj(), "bitmask")), z.conj().resolve_conj())
    assert torch.equal(decode(encode(z.conj().imag, "bitmask")), torch.tensor([-2.0, -0.0]))


def test_bit_packing_matches_a_loop_and_is_little_endian():
    for n in (0, 1, 7, 8, 9, 64, 1001):
        mask = torch.rand(n) < 0.5
        want = [sum(int(mask[8 * i + j]) << j for j in range(min(8, n - 8 * i))) for i in range(-(-n // 8))]
        assert pack_bits(mask).tolist() == want
        assert torch.equal(unpack_bits(pack_bits(mask), n), mask)


def test_bitmask_matches_a_loop():
    x = noise((5, 9), 0.4)
    p = encode(x, "bitmask")
    flat, mask = bits(x).flatten().tolist(), p.parts["mask"].tolist()
    assert [mask[i // 8] >> i % 8 & 1 for i in range(45)] == [int(v != 0) for v in flat]
    assert bits(p.parts["values"]).tolist() == [v for v in flat if v]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:7", "2:8"])
def test_nm_matches_a_loop(pattern):
    """Values in order and zero filled; the index a mask, or N indices where those are shorter."""
    n, m = map(int, pattern.split(":"))
    width = (m - 1).bit_length()
    x = fit(noise((3, 2 * m - 1), 0.5), pattern, -1)
    values, stream = [], []
    for row in bits(x).tolist():
        row += [0] * (-len(row) % m)
        for group in (row[i : i + m] for i in range(0, len(row), m)):
            at = [i for i, v in enumerate(group) if v]
            values.append([group[i] for i in at] + [0] * (n - len(at)))
            if n * width < m:
                stream += [i >> b & 1 for i in at + [0] * (n - len(at)) for b in range(width)]
            else:
                stream += [int(v != 0) for v in group]
    p = encode(x, "nm", pattern)
    assert bits(p.parts["values"]).tolist() == values
    assert unpack_bits(p.parts["index"], len(stream)).tolist() == [bool(b) for b in stream]


@pytest.mark.parametrize("layout", ["csr", "csc", "bsr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_torch_agrees_on_sparse_layouts(layout, dtype):
    x = torch.randint(1, 99, (8, 12)).where(torch.rand(8, 12) < 0.2, 0).to(dtype)
    p = encode(x, layout, "2x3" if layout == "bsr" else None)
    t = to_torch(p)
    assert torch.equal(t.to_dense(), x)
    other = {"csr": x.to_sparse_csr, "csc": x.to_sparse_csc, "bsr": lambda: x.to_sparse_bsr((2, 3))}[layout]()
    assert torch.equal(t.values(), other.values())
    q = from_torch(other)
    assert q.extra == p.extra and all(torch.equal(q.parts[name], t) for name, t in p.parts.items())
    assert torch.equal(decode(q), x)


def test_explicit_zeros_survive_the_way_from_and_to_torch():
    p = encode(torch.eye(2), "csr")
    t = to_torch(replace(p, parts={**p.parts, "values": torch.zeros(2)}))
    assert t.values().tolist() == [0.0, 0.0]
    assert to_torch(from_torch(t)).values().tolist() == [0.0, 0.0]
    assert torch.equal(decode(from_torch(t)), torch.zeros(2, 2))


def test_a_transposed_axis_is_the_transpose():
    """HF Conv1D stores [in, out]: along axis 0 it packs exactly as the Linear [out, in] would."""
    x = fit(noise((12, 6), 0.6), "2:4", 0)
    for format in ("nm", "bsr", "csr", "csc"):
        p, q = encode(x, format, axis=0), encode(x.t(), format)
        assert all(same(p.parts[name], q.parts[name]) for name in q.parts)
        assert p.extra["axis"] == 0


def test_convolution_groups_run_along_input_channels():
    x = fit(noise((4, 8, 3, 3), 0.9), "2:4", 1)
    p = encode(x, "nm", "2:4", axis=1)
    assert p.parts["values"].shape == (4 * 3 * 3 * 2, 2)
    assert p.nbytes == sizes(x, "2:4", axis=1)["nm"] == 4 * 8 * 9 * 4 * (16 + 1) // 32
    assert "nm" not in sizes(x, "2:4", axis=0)


def test_promised_sizes():
    """50 % and 90 % unstructured fp32, 2:4 bf16 and 1:4 fp32, as fractions of dense."""

    def ratio(x: torch.Tensor, pattern: str | None = None) -> float:
        return smallest(x, pattern).nbytes / (x.numel() * x.element_size())

    dense = torch.rand(256, 512) + 1
    assert ratio(dense * (torch.rand(256, 512) < 0.5)) <= 0.54
    assert ratio(dense * (torch.rand(256, 512) < 0.1)) <= 0.14
    two = dense.view(-1, 4) * torch.tensor([1, 0, 0, 1])
    assert ratio(two.view(256, 512).bfloat16(), "2:4") == 0.5625
    one = dense.view(-1, 4) * torch.tensor([0, 0, 1, 0])
    assert encode(one.view(256, 512), "nm", "1:4").nbytes / (256 * 512 * 4) == (32 + 2) / 128


def test_indices_widen_with_the_matrix():
    for columns, dtype in ((2**16, torch.uint16), (2**16 + 1, torch.int32)):
        x = torch.zeros(2, columns, dtype=torch.int8)
        x[:, -1] = 7
        p = encode(x, "csr")
        assert p.parts["col"].dtype == dtype and same(decode(p), x) and sizes(x)["csr"] == p.nbytes


@pytest.mark.parametrize(
    "x, pattern, format",
    [
        (torch.ones(8, 8), None, "dense"),
        (torch.zeros(0, 4), None, "dense"),
        (torch.tensor(3.0), None, "dense"),
        (torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(8, 8), "2:4", "nm"),  # bitmask takes as many bytes
        ((torch.rand(64, 64) < 0.5) * torch.ones(64, 64), None, "bitmask"),
        (torch.eye(256)[:, :32], None, "csc"),
        (torch.eye(256)[:32], None, "csr"),
        (torch.eye(16).repeat_interleave(16, 0), "16x1", "bsr"),
    ],
)
def test_the_smallest_is_chosen(x, pattern, format):
    p = smallest(x, pattern)
    every = sizes(x, pattern)
    assert p.nbytes == min(every.values()) == every[p.format]
    assert p.format == format
    assert torch.equal(decode(p), x)


def test_dense_mask_keeps_a_mask_apart_from_zeros():
    x, mask = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, True, False])
    p = encode(x, "dense+mask", mask=mask)
    assert torch.equal(unpack_bits(p.parts["mask"], 3), mask)
    assert unpack_bits(encode(x, "dense+mask").parts["mask"], 3).tolist() == [True, False, False]
    assert same(decode(p), x) and p.nbytes == 13


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(format="bitmap"), r"unknown format 'bitmap'; .*did you mean 'bitmask'"),
        (dict(format="csr", pattern="row"), r"pattern 'row' is neither N:M \(like '2:4'\) nor RxC \(like '4x1'\)"),
        (dict(format="bitmask", mask=torch.ones(1, 4).bool()), "mask has no effect on format 'bitmask'"),
        (dict(format="dense+mask", mask=torch.ones(4).bool()), r"mask is bool \[4\], must be bool \[1, 4\]"),
        (dict(format="dense+mask", mask=torch.ones(1, 4)), r"mask is float32 \[1, 4\], must be bool \[1, 4\]"),
        (dict(format="nm", pattern="5:4"), "nm: 5:4 keeps more than a whole group"),
        (dict(format="nm", pattern="1:65"), "nm: m is 65, must be a whole number from 1 to 64"),
        (dict(format="bsr", pattern="0x4"), "bsr: rows is 0, must be a whole number from 1 to 4096"),
        (dict(format="nm", axis=2), "axis 2 is not a dimension of a tensor that has 2"),
        (dict(format="nm"), "nm 2:4: group 0 of row 0 has 3 entries, at most 2 fit; use format 'bitmask'"),
        (dict(format="nm", pattern="4x1"), "nm 2:4: group 0 of row 0 has 3 entries"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(FormatError, match=message):
        encode(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), **arguments)


def test_a_group_that_is_too_full_is_named():
    x = torch.zeros(3, 10)
    x[2, 8:] = 1
    assert same(decode(encode(x, "nm", "2:4")), x)
    x[1, 4:7] = 1
    with pytest.raises(FormatError, match="group 1 of row 1 has 3 entries"):
        encode(x, "nm", "2:4")


@pytest.mark.parametrize(
    "x", [torch.eye(2).to_sparse_coo(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.cdouble)]
)
def test_only_dense_tensors_with_values_pack(x):
    with pytest.raises(
        FormatError, match=r"cannot pack a .* tensor .*; give a dense tensor with values, of dtype float64"
    ):
        encode(x, "bitmask")


def test_a_pattern_is_used_by_the_format_of_its_form_and_by_no_other():
    x = fit(noise((4, 8), 0.6), "1:4", -1)
    assert encode(x, "nm", "1:4").nbytes == sizes(x, "1:4")["nm"] < sizes(x, "8x8")["nm"] == sizes(x)["nm"]
    assert encode(x, "bsr", "1:4").extra == encode(x, "bsr").extra == {"rows": 4, "cols": 1, "axis": 1}
    with pytest.raises(FormatError, match="pattern 'unstructured' is neither N:M"):
        sizes(x, "unstructured")


@pytest.mark.parametrize(
    "shape, pattern", [((1, 4096), "256x256"), ((4096, 1), "1x256"), ((9,), "16x1"), ((5, 3), "4096x1")]
)
def test_blocks_larger_than_the_matrix_come_back(shape, pattern):
    x = noise(shape, 0.01)
    assert same(decode(encode(x, "bsr", pattern)), x)


def good(format: str) -> Packed:
    x = torch.zeros(4, 6)
    x[0, 1], x[1, 0], x[1, 5], x[3, 2] = 1, 2, 3, 4
    return encode(x, format, {"nm": "2:4", "nm1": "1:4", "bsr": "2x3"}.get(format))


def good_indices() -> Packed:
    x = torch.zeros(2, 7)
    x[0, 1], x[0, 3], x[1, 5] = 1, 2, 3
    return encode(x, "nm", "2:7")


def tamper(p: Packed, part: str, change) -> Packed:
    t = p.parts[part].clone()
    wide = t.to(torch.int64) if not t.dtype.is_floating_point else t
    new = change(wide)
    return replace(p, parts={**p.parts, part: new.to(t.dtype).contiguous()})


def put(index, value):
    def change(t):
        t[index] = value
        return t

    return change


LIES = [
    (lambda: replace(good("csr"), format="cst"), "unknown format 'cst'"),
    (lambda: replace(good("csr"), shape=(-4, 6)), r"csr: shape \[-4, 6\] is impossible; .* none negative"),
    (lambda: replace(good("csr"), shape=(4.0, 6)), r"csr: shape \[4.0, 6\] is impossible"),
    (lambda: replace(good("csr"), shape=(2**40, 2**9)), r"is impossible; .* 2\*\*48 entries"),
    (lambda: replace(good("csr"), shape=(0, 2**49)), "is impossible"),
    (lambda: replace(good("csr"), shape=(1,) * 17), "is impossible; at most 16 sizes"),
    (lambda: replace(good("csr"), dtype=torch.complex128), "csr: dtype torch.complex128 is not one of float64"),
    (lambda: replace(good("csr"), parts={}), r"csr: parts are \[\], must be \['col', 'crow', 'values'\]"),
    (lambda: replace(good("csr"), parts={**good("csr").parts, "x": torch.ones(1)}), "csr: parts are .*'x'"),
    (lambda: replace(good("dense"), parts={"values": [1]}), "dense: part 'values' must be a dense contiguous tensor"),
    (lambda: replace(good("dense"), parts={"values": torch.ones(6, 4).t()}), "must be a dense contiguous tensor"),
    (lambda: replace(good("dense"), parts={"values": torch.eye(4).to_sparse()}), "must be a dense contiguous"),
    (lambda: replace(good("csr"), extra={"n": 1}), r"csr: extra names \['n'\], must name \[\]"),
    (lambda: replace(good("dense"), extra={"axis": 0}), r"dense: extra names \['axis'\], must name \[\]"),
    (lambda: replace(good("nm"), extra={"n": 2}), r"nm: extra names \['n'\], must name \['m', 'n'\]"),
    (lambda: replace(good("nm"), extra={"n": 4, "m": 2}), "nm: 4:2 keeps more than a whole group"),
    (lambda: replace(good("nm"), extra={"n": 2, "m": 65}), "nm: m is 65, must be a whole number from 1 to 64"),
    (lambda: replace(good("nm"), extra={"n": True, "m": 4}), "nm: n is True, must be a whole number"),
    (lambda: replace(good("nm"), extra={"n": 2, "m": 4, "axis": 2}), "nm: axis is 2, must be .* from -2 to 1"),
    (lambda: replace(good("bsr"), extra={"rows": 0, "cols": 3}), "bsr: rows is 0, must be .* from 1 to 4096"),
    (lambda: replace(good("dense"), dtype=torch.int32), r"dense: part 'values' is float32 \[4, 6\], must be int32"),
    (lambda: replace(good("dense"), shape=(6, 4)), r"part 'values' is float32 \[4, 6\], must be float32 \[6, 4\]"),
    (lambda: replace(good("dense+mask"), shape=(5, 6)), "dense.mask: part 'mask' is uint8 .3., must be uint8 .4."),
    (lambda: tamper(good("dense+mask"), "values", lambda t: t[:3]), r"is float32 \[3, 6\], must be float32 \[4, 6\]"),
    (lambda: tamper(good("bitmask"), "mask", put(0, 255)), r"bitmask: part 'values' is float32 \[4\], must be"),
    (lambda: tamper(good("bitmask"), "values", lambda t: t[:3]), r"is float32 \[3\], must be float32 \[4\]"),
    (lambda: tamper(good("bitmask"), "values", lambda t: t.view(2, 2)), r"is float32 \[2, 2\], must be"),
    (lambda: tamper(good("bitmask"), "mask", lambda t: t.view(3, 1)), r"is uint8 \[3, 1\], must be uint8 \[3\]"),
    (lambda: tamper(encode(torch.ones(3), "bitmask"), "mask", put(0, 15)), "part 'mask' has bits set after its 3"),
    (lambda: tamper(good("csr"), "crow", lambda t: t[:-1]), r"part 'crow' is int32 \[4\], must be int32 \[5\]"),
    (lambda: tamper(good("csr"), "crow", put(0, 1)), "part 'crow' must start at 0, end at 4 and never decrease"),
    (lambda: tamper(good("csr"), "crow", put(4, 5)), "part 'crow' must start at 0, end at 4 and never decrease"),
    (lambda: tamper(good("csr"), "crow", put(2, 0)), "part 'crow' must start at 0, end at 4 and never decrease"),
    (
        lambda: tamper(good("csc"), "ccol", put(2, -(2**31))),
        "csc: part 'ccol' must start at 0, end at 4 and never decrease",
    ),
    (lambda: tamper(good("csr"), "crow", put(slice(1, 3), torch.tensor([2**31 - 1, -2]))), "never decrease"),
    (lambda: tamper(good("csr"), "col", put(0, 6)), "csr: part 'col' must stay within 0 and 5"),
    (lambda: tamper(good("csc"), "row", put(0, 4)), "csc: part 'row' must stay within 0 and 3"),
    (lambda: tamper(good("bsr"), "col", put(0, 2)), "bsr: part 'col' must stay within 0 and 1"),
    (lambda: tamper(good("csr"), "col", put(slice(1, 3), 3)), "part 'col' must increase strictly within each row"),
    (
        lambda: tamper(good("csr"), "col", put(slice(1, 3), torch.tensor([5, 0]))),
        "must increase strictly within each row",
    ),
    (lambda: tamper(good("bsr"), "values", lambda t: t.flatten(1)), r"part 'values' is float32 \[3, 6\], must be"),
    (lambda: tamper(good("csr"), "values", lambda t: t[0]), r"part 'values' is float32 \[\], must be float32 \[1\]"),
    (lambda: replace(good("csr"), parts={**good("csr").parts, "col": torch.zeros(4)}), "'col' is float32 .4., must"),
    (lambda: replace(good("csr"), shape=(4, 0)), "part 'col' must stay within 0 and -1"),
    (lambda: tamper(good("nm"), "values", lambda t: t[:7]), r"nm: part 'values' is float32 \[7, 2\], must be"),
    (lambda: tamper(good("nm"), "index", put(0, 7)), "nm 2:4: part 'index' does not fit the values of some group"),
    (lambda: tamper(good("nm"), "index", put(0, 0)), "nm 2:4: part 'index' does not fit the values of some group"),
    (lambda: tamper(good("nm"), "values", put((0, 1), 9.0)), "part 'index' does not fit the values"),
    (lambda: tamper(good("nm"), "index", put(0, 2 + (4 << 4))), "part 'index' points past the end of a row"),
    (lambda: tamper(good_indices(), "index", put(0, 3 + (1 << 3))), "part 'index' does not fit the values"),
    (lambda: tamper(good_indices(), "index", put(0, 3 + (3 << 3))), "part 'index' does not fit the values"),
    (lambda: tamper(good_indices(), "index", put(0, 7 + (7 << 3))), "part 'index' does not fit the values"),
    (lambda: tamper(good_indices(), "values", put((1, 1), 5.0)), "part 'index' does not fit the values"),
    (lambda: tamper(good_indices(), "index", lambda t: t | 240), "part 'index' has bits set after its 12 bits"),
]


@pytest.mark.parametrize("lie, message", LIES, ids=[message[:40] for _, message in LIES])
def test_check_names_the_lie_before_anything_uses_it(lie, message):
    p = lie()
    with pytest.raises(FormatError, match=message):
        check(p)
    with pytest.raises(FormatError, match=message):
        decode(p)


@pytest.mark.parametrize("format", FORMATS)
def test_honest_parts_pass(format):
    assert check(good(format)) is None
    check(good_indices())


@pytest.mark.parametrize("format", FORMATS)
def test_random_parts_never_end_in_another_error(format):
    """Seeded noise in every part: FormatError, or a tensor of the promised shape."""
    g = torch.Generator().manual_seed(3)
    p = good(format)
    for _ in range(60):
        parts = {name: t.clone() for name, t in p.parts.items()}
        for t in parts.values():
            raw = t.view(-1).view(torch.uint8)
            if len(raw) and torch.rand(1, generator=g) < 0.5:
                raw[torch.randint(len(raw), (1,), generator=g)] = torch.randint(256, (1,), generator=g).to(torch.uint8)
        try:
            x = decode(replace(p, parts=parts))
        except FormatError:
            continue
        assert x.shape == (4, 6)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: from_torch(torch.eye(2)),
            "layout torch.strided is not supported; give torch.sparse_csr",
        ),
        (lambda: from_torch(torch.eye(2).to_sparse_coo()), "layout torch.sparse_coo is not supported"),
        (
            lambda: from_torch(torch.ones(2, 2, 2).to_sparse_csr()),
            r"sparse_csr \[2, 2, 2\] has batch or dense",
        ),
        (lambda: from_torch(torch.ones(2, 2, 2).to_sparse_csr(dense_dim=1)), "has batch or dense dimensions"),
        (lambda: from_torch(torch.ones(5000, 2).to_sparse_bsr((5000, 1))), "bsr: rows is 5000, must be"),
        (lambda: to_torch(good("nm")), "torch has no format 'nm'; it has csr, csc, bsr"),
        (lambda: to_torch(encode(torch.eye(5), "bsr")), r"whole blocks: \[5, 5\] is no multiple of 4x1"),
    ],
)
def test_what_torch_cannot_give_or_take(make, message):
    with pytest.raises(FormatError, match=message):
        make()


def test_unsorted_indices_from_torch_are_refused():
    crow, col = torch.tensor([0, 2]), torch.tensor([1, 0])
    t = torch.sparse_csr_tensor(crow, col, torch.ones(2), size=(1, 2), check_invariants=False)
    with pytest.raises(FormatError, match="csr: part 'col' must increase strictly within each row"):
        from_torch(t)


def test_large_tensors_pack_without_a_loop():
    """A million entries take well under a second in any format, so nothing loops over entries or groups."""
    x = noise((1000, 1024), 0.05)
    x.view(-1, 4)[:, 2:] = 0
    for format in FORMATS:
        assert same(decode(encode(x, format)), x)
