"""Compiled kernels against torch in double precision, under every instruction set that this machine has."""

from __future__ import annotations

import mmap
import os
import platform
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rarefy
from conftest import has_isa
from helpers.marks import slow_case, slow_except
from helpers.quantized_weights import GRIDS, TWO_TERM_GRIDS, on_grid
from rarefy.common.errors import FormatError
from rarefy.model.layers import all_layers
from rarefy.model.quant_grid import Grid, OffsetGrid, get_grid
from rarefy.runtime import bindings, huge_pages, packing, reference
from rarefy.runtime.kernel import GroupedKernels, Kernel, can_group
from rarefy.runtime.pack_panels import pack_quantized, unpack_panels
from rarefy.runtime.packed_formats import PANEL_BITS, ROW_KINDS, QuantizedPanels
from rarefy.runtime.sparse_layers import QuantizedEmbedding
from stress import builds

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))


def random(O, C, sparsity, rows=1, columns=1):
    """A weight with blocks of zeros."""
    keep = torch.rand(-(-O // rows), -(-C // columns)) >= sparsity
    keep = keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:O, :C]
    return torch.randn(O, C) * keep


FORMATS = {
    "bitmask": packing.pack_bitmask,
    "csr": packing.pack_csr,
    "tiles": packing.pack_tiles,
    "sell": packing.pack_sell,
    "sell of 32": partial(packing.pack_sell, block=32),
    "tiles of 32": partial(packing.pack_tiles, block=32),
}
SHAPES = [
    (1, 1, 1, 0.0), (4, 64, 1, 0.5), (7, 70, 3, 0.5), (33, 129, 8, 0.9), (64, 512, 70, 0.5), (100, 300, 130, 0.8),
    (5, 3, 65, 0.5), (256, 1024, 17, 0.0), (6, 64, 2, 1.0), (67, 1, 5, 0.5), (3, 4097, 6, 0.95),
]  # fmt: skip


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("shape", slow_except(SHAPES, *SHAPES[1:6]), ids=str)
def test_products(shape, kind, how, isa):
    O, C, N, sparsity = shape
    W, bias, x = random(O, C, sparsity), torch.randn(O), torch.randn(N, C)
    weight = FORMATS[how](W, kind)
    V, scales = packing.stored(W, kind)
    assert torch.equal(packing.unpack(weight), V.float() if scales is None else V.float() * scales[:, None])
    got = Kernel(weight, bias).run(x)
    want = reference.rounded(x, weight).double() @ packing.unpack(weight).double().T + bias
    assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(reference.run(weight, x, bias), want.float(), rtol=1e-4, atol=1e-4)
    activations(weight, bias, x, got)


def activations(weight, bias, x, got):
    """What follows the sums, against torch in double precision on the kernel's own outputs."""
    more = torch.randn(got.shape)
    for name, act in reference.ACTIVATIONS.items():
        kernel = Kernel(weight, bias, name)
        for residual in (None, more):
            before = got.double() if residual is None else got.double() + residual
            y, want = kernel.run(x, residual), act(before)
            assert (y - want).abs().max() <= 1e-6 * max(1.0, float(before.abs().max())), name


def test_activations_of_whatever_value(isa):
    x = torch.cat(
        [torch.linspace(-12, 12, 100_001), torch.tensor([-3e38, -1e30, -200, -88, -0.0, 0, 1e-30, 88, 200, 1e30, 3e38])]
    )
    for name, act in reference.ACTIVATIONS.items():
        y, want = Kernel(packing.pack_tiles(torch.ones(1, 1)), None, name).run(x[:, None])[:, 0], act(x.double())
        most = 1e-6 if name == "gelu" else 5e-7
        assert ((y - want).abs() <= most * want.abs().clamp(min=1)).all(), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nibbles(shape, isa):
    O, C, N, sparsity = shape
    W, bias, x = random(O, C, sparsity), torch.randn(O), torch.randn(N, C)
    weight = packing.pack_bitmask(W, "int4")
    V = packing.unpack(weight)
    assert V.shape == W.shape and bool((V[W == 0] == 0).all())
    steps = (
        torch.nn.functional.pad(W, (0, -C % 64)).reshape(O, -1, 64).abs().amax(-1).repeat_interleave(64, 1)[:, :C] / 7
    )
    assert bool(((V - W).abs() <= 0.53 * steps).all())  # half a step, and what bf16 takes from the scale
    got = Kernel(weight, bias).run(x)
    want = reference.rounded(x, weight).double() @ V.double().T + bias
    assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(reference.run(weight, x, bias), want.float(), rtol=1e-4, atol=1e-4)
    activations(weight, bias, x, got)


CONVOLUTIONS = [  # images, groups, outputs, inputs of a group, kernel, stride, padding, dilation, image, block
    (1, 1, 8, 5, (1, 1), (1, 1), (0, 0), (1, 1), (7, 7), None),
    (3, 1, 70, 33, (3, 3), (1, 1), (1, 1), (1, 1), (14, 14), 16),
    (2, 2, 12, 6, (3, 3), (2, 2), (1, 1), (1, 1), (15, 13), None),
    (2, 1, 64, 3, (7, 7), (2, 2), (3, 3), (1, 1), (32, 30), None),
    (1, 4, 20, 8, (1, 1), (2, 2), (0, 0), (1, 1), (9, 9), None),
    (2, 1, 9, 4, (3, 2), (1, 2), (2, 1), (2, 1), (11, 10), 5),
    (1, 6, 6, 1, (1, 5), (1, 3), (0, 2), (1, 2), (1, 50), None),
    (2, 1, 300, 40, (1, 1), (1, 1), (0, 0), (1, 1), (9, 9), None),
    (1, 1, 4, 2, (1, 1), (1, 1), (0, 0), (1, 1), (1, 3), None),
    (2, 3, 9, 2, (5, 5), (4, 3), (4, 4), (1, 1), (8, 8), None),
    (1, 1, 5, 2, (2, 2), (1, 1), (0, 0), (3, 3), (4, 4), None),
    (7, 1, 17, 64, (3, 3), (1, 1), (1, 1), (1, 1), (56, 56), None),  # more images than one round takes
    (70, 1, 6, 9, (3, 3), (1, 1), (0, 0), (1, 1), (3, 3), None),  # an output each
    (3, 1, 70, 3, (1, 1), (1, 1), (0, 0), (1, 1), (104, 100), None),  # outputs go past the caches
]


@pytest.mark.parametrize("sparsity", [slow_case(0.0), 0.7, slow_case(1.0)])
@pytest.mark.parametrize(
    ("case", "sell"), [(c, s) for c in CONVOLUTIONS for s in ((False, True) if c[1] == 1 else (False,))], ids=str
)
def test_convolutions(case, sell, sparsity, isa):
    N, groups, O, I, kernel, stride, padding, dilation, image, block = case
    W = torch.randn(O, I, *kernel) * (torch.rand(O, I, *kernel) >= sparsity)
    bias, x = torch.randn(O), torch.randn(N, groups * I, *image)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "block": block or 256}
    weight = packing.pack_conv(W, **how, sell=sell)
    assert torch.equal(packing.unpack(weight), W)
    got = Kernel(weight, bias).run(x)
    want = torch.nn.functional.conv2d(x.double(), W.double(), bias.double(), stride, padding, dilation, groups)
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(reference.run(weight, x, bias), want.float(), rtol=1e-4, atol=1e-4)
    activations(weight, bias, x, got)
    assert torch.equal(Kernel(weight).run(x.to(memory_format=torch.channels_last)), Kernel(weight).run(x))


def test_nothing_is_read_past_the_end_of_an_image():
    mmap = pytest.importorskip("mmap")
    pages = mmap.mmap(-1, 1 << 20)
    for C, H, W in ((3, 7, 7), (5, 14, 14), (1, 4, 4), (2, 5, 13), (1, 1, 3)):
        x = torch.frombuffer(pages, dtype=torch.float32)[-C * H * W :].view(1, C, H, W)  # what follows is not mapped
        x.copy_(torch.randn(1, C, H, W))
        weight = torch.randn(6, C, 1, 1)
        got = Kernel(packing.pack_conv(weight)).run(x)
        torch.testing.assert_close(got, torch.nn.functional.conv2d(x, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("N", slow_except([1, 4, 64, 100], 4, 100))
def test_integers_are_summed_exactly(N, how, isa):
    W = torch.randint(-127, 128, (50, 515)).float() * (torch.rand(50, 515) > 0.5)
    x = torch.randint(-127, 128, (N, 515)).float()
    W[:, 0], x[:, 0] = 127, -127  # so that both scales are 1
    assert torch.equal(Kernel(FORMATS[how](W, "int8")).run(x), x @ W.T)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("N", [1, 64])
def test_the_largest_integers_do_not_overflow(N, how, isa):
    signs = torch.tensor([[127.0], [-127.0]])
    W, x = signs.expand(2, 515).repeat(25, 1), signs.expand(2, 515).repeat(N, 1)[:N].contiguous()
    assert torch.equal(Kernel(FORMATS[how](W, "int8")).run(x), x @ W.T)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("blocks", [(4, 1), (1, 4), (1, 2), (16, 1)])
def test_blocks(blocks, how, isa):
    W, x = random(96, 200, 0.8, *blocks), torch.randn(40, 200)
    torch.testing.assert_close(Kernel(FORMATS[how](W, "fp32")).run(x), x @ W.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", FORMATS)
def test_inputs_of_any_kind(how):
    W = random(24, 100, 0.5)
    kernel = Kernel(FORMATS[how](W, "fp32"))
    wide = torch.randn(9, 300)
    for x in (wide[:, :100], wide[:, 100:200], wide[::2, :100], wide.T[:100].T, wide[:, :300:3], wide[:0, :100]):
        torch.testing.assert_close(kernel.run(x), x @ W.T, rtol=1e-4, atol=1e-4)
    half = wide[:, :100].bfloat16()
    torch.testing.assert_close(kernel.run(half), half.float() @ W.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(FormatError, match="the weight has 100 inputs, x has 99"):
        kernel.run(wide[:, :99])


def test_all_threads_at_once_and_any_number_of_them(isa):
    W, x = random(512, 512, 0.5), torch.randn(100, 512)
    kernels = [Kernel(pack(W, "fp32")) for pack in FORMATS.values()]
    want, wrong = [k.run(x) for k in kernels], []

    def work():
        for _ in range(20):
            wrong.extend(i for i, k in enumerate(kernels) if not torch.equal(k.run(x), want[i]))

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            both = [threading.Thread(target=work) for _ in range(2)]
            _ = [t.start() for t in both], [t.join() for t in both]
    finally:
        torch.set_num_threads(before)
    assert not wrong


def test_after_a_fork():
    W, x = random(256, 256, 0.5), torch.randn(3, 256)
    kernel = Kernel(packing.pack_bitmask(W))
    want, before = kernel.run(x), torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own pool does not outlive a fork
    try:
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(kernel.run(x), want) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def damaged(weight, name, change):
    tensor = getattr(weight, name).clone()
    change(tensor)
    return type(weight)(**{**vars(weight), name: tensor})


def add(t, at=0, by=1):
    t.view(-1)[at] += by


@pytest.mark.parametrize(
    ("how", "name", "change"),
    [
        ("bitmask", "masks", lambda t: add(t, 0, 1 << 40)),
        ("bitmask", "masks", lambda t: add(t, -2, 1 << 62)),
        ("bitmask of int4", "masks", lambda t: t.fill_(-1)),
        ("bitmask of int4", "starts", lambda t: add(t, 1)),
        ("bitmask", "starts", lambda t: add(t, 1)),
        ("bitmask", "starts", lambda t: add(t, 0, -5)),
        ("csr", "starts", lambda t: add(t, 0)),
        ("csr", "starts", lambda t: add(t, -1)),
        ("csr", "starts", lambda t: add(t, 3, 1 << 40)),
        ("csr", "starts", lambda t: add(t, 3, -(1 << 40))),
        ("csr", "columns", lambda t: t.fill_(-1)),
        ("csr", "columns", lambda t: t[1:2].copy_(t[:1])),
        ("csr", "columns", lambda t: t.fill_(100)),
        ("tiles", "counts", lambda t: add(t, 3)),
        ("tiles", "counts", lambda t: add(t, 0)),
        ("tiles", "counts", lambda t: t.fill_(-1)),
        ("tiles", "starts", lambda t: add(t, 2)),
        ("tiles", "columns", lambda t: t.fill_(-1)),
        ("tiles", "columns", lambda t: t.fill_(100)),
        ("sell", "counts", lambda t: add(t, 0)),
        ("sell", "counts", lambda t: add(t, 4, -1)),
        ("sell", "counts", lambda t: add(t, 63)),
        ("sell", "starts", lambda t: add(t, 0)),
        ("sell of int8", "columns", lambda t: t.fill_(25)),
        ("sell", "columns", lambda t: t.fill_(100)),
        ("sell", "order", lambda t: t[..., 0].copy_(t[..., 1])),
        ("sell", "order", lambda t: t[..., 0].fill_(10)),
    ],
)
def test_damaged_buffers_never_run(how, name, change):
    W = random(10, 100, 0.5)
    W[0, 40] = 0
    how, _, kind = how.partition(" of ")
    weight = FORMATS[how](W, kind or "fp32")
    with pytest.raises(FormatError, match=r"of shape \[10, 100\] is damaged"):
        Kernel(damaged(weight, name, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3)}, "64 bytes of padding must follow the last value, got 12"),
        ({"values": torch.zeros(300, dtype=torch.float64)}, r"values: .*float32 .*got float64 \[300\]"),
        ({"masks": torch.zeros(3, 2, 8, dtype=torch.int64)[..., ::2]}, "masks: the kernels read contiguous"),
        ({"starts": torch.zeros(2, dtype=torch.int64)}, r"starts: .*\[3\], got int64 \[2\]"),
        ({"scales": torch.zeros(10)}, "scales: the kernels expect no such tensor"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    for lost in ("values", "columns", "starts"):
        csr = packing.pack_csr(random(10, 100, 0.5))
        with pytest.raises(FormatError, match=f"{lost}: the kernels expect torch"):
            Kernel(packing.Csr(**{**vars(csr), lost: None}))
    weight = packing.pack_bitmask(random(10, 100, 0.5))
    with pytest.raises(FormatError, match=message):
        Kernel(packing.Bitmask(**{**vars(weight), **change}))


def test_images_that_are_too_many_to_count():
    kernel = Kernel(packing.pack_conv(torch.ones(4, 64, 3, 3)))
    with pytest.raises(FormatError, match="64 channels of 6000x6000 are more than the kernels support"):
        kernel.run(torch.empty(1, 1, 1, 1).expand(1, 64, 6000, 6000))


def test_columns_that_do_not_fit():
    with pytest.raises(FormatError, match="CSR columns are 16-bit numbers: at most 65536 inputs, got 65537"):
        packing.pack_csr(torch.ones(1, 65537))
    W = torch.zeros(2, 65536)
    W[1, [0, 40_000, 65_535]] = torch.tensor([1.0, 2.0, 3.0])
    weight = packing.pack_csr(W)
    assert torch.equal(packing.unpack(weight), W)
    assert Kernel(weight).run(torch.arange(65_536.0)[None]).tolist() == [[0.0, 2 * 40_000.0 + 3 * 65_535]]


def test_sums_of_bytes_that_do_not_fit():
    with pytest.raises(FormatError, match="sums of 70000 int8 products do not fit 32 bits"):
        packing.pack_tiles(torch.ones(4, 70000), "int8")
    most = packing.MAX_INT8_INPUTS
    for pack in (packing.pack_tiles, packing.pack_bitmask):
        y = Kernel(pack(torch.ones(4, most), "int8")).run(torch.ones(2, most))
        torch.testing.assert_close(y, torch.full((2, 4), float(most)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "no kernel for 4 outputs in 3 groups of fp32"),
        ({"groups": 2}, "counts: the kernels expect|is damaged"),
        ({"groups": 0}, "groups: expected whole numbers from 1"),
        ({"block": 0}, "block: expected whole numbers from 1"),
        ({"stride": (0, 1)}, "stride: expected whole numbers from 1 to 8, got"),
        ({"stride": (9, 1)}, "stride: expected whole numbers from 1 to 8"),
        ({"stride": (2**64 + 1, 1)}, "stride: expected whole numbers from 1 to 8"),
        ({"stride": (1.0, 1)}, "stride: expected whole numbers from 1 to 8"),
        ({"stride": [1, 1]}, "stride: expected whole numbers from 1 to 8"),
        ({"padding": (-1, 1)}, "padding: expected whole numbers from 0"),
        ({"dilation": (1, 0)}, "dilation: expected whole numbers from 1"),
        ({"shape": (8, 3, 3, 2)}, "counts: the kernels expect"),
        ({"shape": (4, 18)}, "shape: expected whole numbers from 1"),
        ({"kind": "bf16"}, "no kernel for 4 outputs in 1 groups of bf16"),
        ({"kind": "int8"}, "scales: the kernels expect torch.float32|counts: the kernels expect"),
        ({"kind": "int9"}, "unknown kind 'int9'"),
        ({"columns": torch.full((72,), 99, dtype=torch.int16)}, "is damaged"),
    ],
)
def test_convolutions_that_do_not_fit(change, message):
    weight = packing.pack_conv(torch.ones(4, 3, 3, 2))
    assert Kernel(weight)
    with pytest.raises(FormatError, match=message):
        Kernel(packing.ConvTiles(**{**vars(weight), **change}))


@pytest.mark.parametrize("name", ["starts", "counts", "order", "columns"])
def test_damaged_convolutions_never_run(name):
    weight = packing.pack_conv(random(12, 90, 0.5).view(12, 10, 3, 3), sell=True)
    with pytest.raises(FormatError, match="is damaged"):
        Kernel(damaged(weight, name, lambda t: t.fill_(90)))


def test_images_that_do_not_fit():
    kernel = Kernel(packing.pack_conv(torch.ones(4, 3, 3, 3)))
    with pytest.raises(FormatError, match="the weight has 3 inputs, x has 2"):
        kernel.run(torch.ones(1, 2, 9, 9))
    with pytest.raises(FormatError, match="a kernel of 3x3 does not run over images of 2x9"):
        kernel.run(torch.ones(1, 3, 2, 9))
    with pytest.raises(FormatError, match="the kernels run on the CPU, x is on meta"):
        kernel.run(torch.ones(1, 3, 9, 9, device="meta"))
    for weight, groups in ((torch.ones(4, 3, 3), 1), (torch.ones(4, 3, 3, 0), 1), (torch.ones(4, 3, 1, 1), 3)):
        with pytest.raises(FormatError, match=f"no convolution of {groups} groups has a weight of shape"):
            packing.pack_conv(weight, groups=groups)
    with pytest.raises(FormatError, match="SELL needs a convolution of one group, got 2"):
        packing.pack_conv(torch.ones(4, 3, 1, 1), groups=2, sell=True)
    with pytest.raises(FormatError, match="int8 needs a convolution of one group, got 2"):
        packing.pack_conv(torch.ones(4, 3, 1, 1), "int8", groups=2)
    kernel = Kernel(packing.pack_conv(torch.ones(4, 3, 3, 3), "int8"))
    with pytest.raises(FormatError, match="convolutions in int8 run in compiled programs only: use rarefy.compile"):
        kernel.run(torch.ones(1, 3, 9, 9))
    with pytest.raises(FormatError, match="sums of 66348 int8 products do not fit 32 bits"):
        Kernel(packing.pack_conv(torch.ones(4, 7372, 3, 3), "int8"))


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_weights_in_large_pages(kind, monkeypatch):
    monkeypatch.setattr(huge_pages, "MIN_CHUNK", 1 << 16)  # so that the last weight needs a second piece of memory
    held, total = huge_pages.HugePageBuffer(), 0
    for rows in (5, 30, 300):
        weight = packing.pack_bitmask(random(rows, 513, 0.5), kind)
        moved = held.hold(weight)
        for name, t in vars(weight).items():
            if isinstance(t, torch.Tensor):
                there = getattr(moved, name)
                assert torch.equal(t, there) and t.dtype == there.dtype and there.is_contiguous()
                assert there.data_ptr() % 64 == 0 and there.data_ptr() != t.data_ptr()
                total += t.nbytes
        x = torch.randn(3, 513)
        assert torch.equal(Kernel(moved).run(x), Kernel(weight).run(x))
    assert total > huge_pages.MIN_CHUNK


def test_weights_as_they_are():
    weight = random(12, 90, 0.1)
    form = packing.pack_dense(weight)
    assert torch.equal(packing.unpack(form), weight)
    assert form.values.data_ptr() != weight.data_ptr(), "later changes of the weight are not seen"
    column = packing.pack_dense(torch.ones(8, 1))
    assert packing.unpack(column).data_ptr() != column.values.data_ptr()
    image = packing.pack_dense(weight.view(12, 10, 3, 3), stride=(2, 1), padding=(1, 1), dilation=(1, 1))
    assert torch.equal(packing.unpack(image), weight.view(12, 10, 3, 3))
    for made in (form, image):
        with pytest.raises(FormatError, match="dense weights run in compiled programs only: use rarefy.compile"):
            Kernel(made).run(torch.ones(1, 10, 9, 9) if made is image else torch.ones(1, 90))
    assert not can_group([Kernel(form)])
    for change in ({"values": form.values[:, 1:]}, {"kind": "int8"}, {"values": form.values.double()}):
        with pytest.raises(FormatError, match="values: the kernels expect|unknown kind"):
            Kernel(packing.Dense(**{**vars(form), **change}))
        with pytest.raises(FormatError, match="values: the kernels expect|unknown kind"):
            Kernel(packing.ConvTiles(**{**vars(image), **change}))
    with pytest.raises(FormatError, match="dense weights of convolutions need one group"):
        Kernel(packing.ConvTiles(**{**vars(image), "groups": 2}))
    with pytest.raises(FormatError, match="order: the kernels expect no such tensor"):
        Kernel(packing.ConvTiles(**{**vars(image), "order": torch.zeros(1, 1, 128, dtype=torch.uint8)}))


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_codes_lie_as_the_header_says(bits):
    """Files depend on it: `csrc/rarefy.h`, read word by word."""
    codes = torch.randint(0, 1 << bits, (4, 64), generator=torch.Generator().manual_seed(bits))
    grid = Grid(bits, torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.uint8))
    packed = pack_quantized(codes.float(), grid, False, True)
    stored = packed.values.flatten().tolist()
    for r in range(4):
        for c in range(64):
            code = stored[32 * r + c // 2] >> 4 * (c % 2) & 15
            if bits == 5:
                code |= (stored[128 + c // 2] >> 2 * r + c % 2 & 1) << 4
            if bits == 6:
                code |= (stored[128 + 32 * (r % 2) + c // 2] >> 4 * (r // 2) + 2 * (c % 2) & 3) << 4
            assert code == int(codes[r, c])
    assert torch.equal(unpack_panels(packed), codes.float())


def test_memory_begins_with_a_page():
    for nbytes in (0, 100, huge_pages.HUGE_PAGE + 1, 5 * huge_pages.HUGE_PAGE):
        memory = huge_pages.allocate(nbytes)
        assert memory.nbytes == nbytes
        assert memory.data_ptr() % (huge_pages.HUGE_PAGE if nbytes > huge_pages.HUGE_PAGE else 64) == 0
    with pytest.raises(MemoryError, match="not enough memory for"):
        huge_pages.allocate(1 << 60)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="memory is mapped on Linux alone")
def test_memory_was_not_used_before():
    used = [torch.ones(30 << 20, dtype=torch.uint8) for _ in range(4)]  # which malloc keeps, in small pages
    del used
    assert not huge_pages.allocate(20 << 20).any()


@pytest.mark.parametrize("name", bindings.ISAS)
def test_this_cpu_has(name):
    """What is skipped here is an instruction set with which no test ran."""
    if not has_isa(name):
        pytest.skip(f"this CPU has no {name}: no test ran with it")
    before = bindings.isa()
    bindings.use(name)
    assert bindings.isa() == name
    bindings.use(str(before))


def test_errors():
    with pytest.raises(FormatError, match="unknown kind 'int9'.*did you mean 'int8'"):
        packing.pack_tiles(torch.ones(2, 2), "int9")
    with pytest.raises(FormatError, match=r"expected a matrix, got a weight of shape \[2\]"):
        packing.pack_bitmask(torch.ones(2))
    with pytest.raises(FormatError, match="a block has at least one lane"):
        packing.pack_tiles(torch.ones(2, 2), block=-1)
    with pytest.raises(FormatError, match="unknown instruction set 'avx51'.*avx512"):
        bindings.use("avx51")
    weight = packing.pack_bitmask(torch.ones(2, 2))
    with pytest.raises(FormatError, match="unknown activation 'rely'.*relu"):
        Kernel(weight, activation="rely")
    kernel, x = Kernel(packing.pack_tiles(torch.ones(2, 2))), torch.ones(3, 2)
    for residual in (torch.ones(3, 1), torch.ones(3, 2).double(), torch.ones(2), torch.ones(3, 2, device="meta")):
        with pytest.raises(FormatError, match=r"the residual is fp32 \[3, 2\] on the CPU, got"):
            kernel.run(x, residual)
    assert torch.equal(kernel.run(x, torch.arange(6.0).view(2, 3).T), torch.arange(6.0).view(2, 3).T + 2)
    with pytest.raises(FormatError, match=r"bias: .*\[2\], got float32 \[3\]"):
        Kernel(weight, torch.ones(3))


@pytest.mark.parametrize(
    ("how", "kind"),
    [*((how, kind) for how in FORMATS for kind in ROW_KINDS), ("bitmask", "int4"), ("convolution", "fp32")],
)
def test_whatever_lies_in_a_buffer_ends_in_an_error_or_a_product(kind, how, isa):
    """Random damage: what passes the check must be safe to run (`make test-all` runs this under ASan too)."""
    g, refused = torch.Generator().manual_seed(0), 0
    if how == "convolution":
        weight: packing.Packed = packing.pack_conv(random(13, 90, 0.6).view(13, 10, 3, 3), padding=(1, 1))
        x = torch.randn(2, 10, 8, 8)
    else:
        weight, x = FORMATS[how](random(13, 150, 0.6), kind), torch.randn(5, 150)
    names = [n for n, v in vars(weight).items() if isinstance(v, torch.Tensor)]
    for _ in range(60):
        name = names[int(torch.randint(len(names), (), generator=g))]
        tensor = getattr(weight, name).clone()
        bits = tensor.view(-1).view(torch.uint8)
        for _ in range(int(torch.randint(1, 4, (), generator=g))):
            bits[int(torch.randint(len(bits), (), generator=g))] ^= 1 << int(torch.randint(8, (), generator=g))
        try:
            Kernel(type(weight)(**{**vars(weight), name: tensor})).run(x)
        except FormatError:
            refused += 1
    assert refused


@pytest.mark.parametrize("way", GRIDS, ids=str)
def test_rows_of_panels(way):
    W, grid = on_grid(37, 384, *way)
    kernel, ids = Kernel(pack_quantized(W, grid)), torch.tensor([[36, 0, 5], [5, 4, 3]])
    torch.testing.assert_close(kernel.rows(ids), packing.unpack(kernel.held[0])[ids], rtol=1e-6, atol=1e-7)
    assert kernel.rows(ids[:0]).shape == (0, 3, 384)
    for wrong in (37, -1):
        with pytest.raises(IndexError, match="expected ids from 0 to 36"):
            kernel.rows(torch.tensor([0, wrong]))
    assert torch.equal(kernel.rows(ids.int()), kernel.rows(ids))
    with pytest.raises(FormatError, match="ids must be integers on the CPU, got torch.float32"):
        kernel.rows(ids.float())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("way", GRIDS, ids=str)
@pytest.mark.parametrize(
    "size", slow_except([(1, 96), (7, 384), (33, 128), (66, 192), (100, 1536)], (7, 384), (33, 128)), ids=str
)
def test_products_of_panels(size, way, exact, isa):
    (O, C), (_, group, _) = size, way
    if isinstance(group, int) and C % group:
        C = group * (C // group or 1)
    W, grid = on_grid(O, C, *way)
    weight = pack_quantized(W, grid, exact)
    torch.testing.assert_close(packing.unpack(weight), W, rtol=1e-6, atol=1e-7)
    codes = (-(-O // 4) * 4) * (-(-C // 64) * 64)
    assert weight.values.numel() * 8 == codes * PANEL_BITS[weight.kind]
    assert weight.kind == {2: "int4", 3: "int4", 7: "int8"}.get(grid.bits, f"int{grid.bits}")
    bias = torch.randn(O)
    for N in (1, 2, 3, 4, 9):
        x = torch.randn(N, C)
        got = Kernel(weight, bias).run(x)
        want = reference.rounded(x, weight).double() @ packing.unpack(weight).double().T + bias
        assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
        if exact:
            assert torch.equal(reference.rounded(x, weight), x)
    activations(weight, bias, x, got)


@pytest.mark.parametrize("way", TWO_TERM_GRIDS, ids=str)
@pytest.mark.parametrize("size", slow_except([(1, 96), (7, 384), (33, 192), (100, 1536)], (1, 96), (33, 192)), ids=str)
def test_products_of_inputs_in_two_terms(size, way, isa):
    O, C = size
    W, grid = on_grid(O, C, *way)
    weight = pack_quantized(W, grid, False, True)
    bias, by_blocks = torch.randn(O), bindings.scales_blocks(rows=True)
    for N in (1, 2, 3, 4, 9):
        x = torch.randn(N, C)
        x[:, 0] *= 50  # an outlier, for which the others are rounded coarsely
        got = Kernel(weight, bias).run(x)
        want = reference.rounded(x, weight, by_blocks).double() @ packing.unpack(weight).double().T + bias
        assert (got - want).abs().max() <= 1e-4 * max(1.0, float(want.abs().max()))  # codes of lost parts between two
        exact = x.double() @ packing.unpack(weight).double().T + bias
        once = reference.rounded(x, replace(weight, two_terms=False)).double() @ unpack_panels(weight).double().T + bias
        least = 0.95 if by_blocks and weight.kind != "int8" else 0.1
        assert O == 1 or (got - exact).norm() < least * (once - exact).norm()  # errors of one output may cancel
    activations(weight, bias, x, got)


@pytest.mark.parametrize(
    "way",
    [("int8", None, True), ("int6", 64, True), ("int5", 32, True), ("int5", 32, None), ("int4", 32, False)],
    ids=str,
)
def test_products_of_many_inputs_in_two_terms(way, isa):
    weight = pack_quantized(*on_grid(9, 70 * 64, *way), False, True)
    x = torch.randn(1, 70 * 64)
    by_blocks = bindings.scales_blocks(rows=True)
    want = reference.rounded(x, weight, by_blocks).double() @ packing.unpack(weight).double().T
    assert (Kernel(weight).run(x) - want).abs().max() <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("way", [("int8", None, True), ("int6", 32, True), ("int4", 32, False)], ids=str)
@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_inputs_that_are_not_finite_give_nan(way, wrong, isa):
    x = torch.randn(3, 96)
    x[1, 40] = wrong
    got = Kernel(pack_quantized(*on_grid(7, 96, *way), False, True)).run(x)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


def test_two_terms_are_for_int8_inputs():
    with pytest.raises(FormatError, match="two_terms: expected False, or True for int8 inputs, got True"):
        Kernel(pack_quantized(*on_grid(8, 96, "int6", 32, True), True, True))
    kernels = [Kernel(pack_quantized(*on_grid(8, 96, "int8", None, True), False, two)) for two in (True, False)]
    assert not can_group(kernels)


def test_panels_of_several_layers_in_one_call(isa):
    weights = [pack_quantized(*on_grid(O, 128, "int4", 32, True)) for O in (5, 64, 70)]
    kernels, x = [Kernel(w) for w in weights], torch.randn(3, 128)
    assert can_group(kernels)
    for got, kernel in zip(GroupedKernels(kernels).run(x), kernels):
        torch.testing.assert_close(got, kernel.run(x))
    W, grid = on_grid(8, 128, "int4", 32, True)
    assert not can_group([kernels[0], Kernel(pack_quantized(W, grid, False))])


def test_inputs_that_are_no_numbers_spoil_their_row_alone(isa):
    W, grid = on_grid(9, 64, "int8", None, True)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    for inputs in ((True, False), (False, False), (False, True)):
        y = Kernel(pack_quantized(W, grid, *inputs)).run(x)
        assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (("int8", None, False), "asymmetric codes of more than 6 bits"),
        (("int7", 32, False), "asymmetric codes of more than 6 bits"),
        (("int6", 32, None), "minimums but of 4 and 5 bits in groups of 32"),
        (("int5", 48, None), "minimums but of 4 and 5 bits in groups of 32"),
        (("int4", 16, True), "groups of 16 inputs"),
        (("int8", 48, True), "groups of 48 inputs"),
    ],
)
def test_grids_that_no_kernel_reads(way, says):
    with pytest.raises(FormatError, match=f"no kernel for {says}"):
        pack_quantized(*on_grid(4, 96, *way))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "fp32"}, "unknown kind 'fp32'; choose from int4, int5, int6, int8"),
        ({"kind": "int8"}, "values: the kernels expect"),
        ({"scale_groups": 3}, "scale_groups 0 to 2, got True and 3"),
        ({"scale_groups": 0}, "scales: the kernels expect no such tensor"),
        ({"fp32_inputs": 1}, "expected fp32_inputs True or False"),
        ({"scales": None}, "scales: the kernels expect torch.bfloat16"),
        ({"zeros": torch.zeros(2, 2, 4, 1, dtype=torch.uint8)}, "zeros: the kernels expect"),
        ({"row_scales": torch.ones(3)}, "row_scales: the kernels expect"),
        ({"row_sums": torch.ones(3)}, "row_sums: the kernels expect"),
        ({"values": torch.zeros(2, 2, 4, 31, dtype=torch.uint8)}, "values: the kernels expect"),
        ({"zero_bits": 2}, "zero_bits: expected 0, or 3 for zero points in eighths, got 2"),
        ({"zero_bits": 3}, r"the packed quantizedpanels of shape \[8, 96\] is damaged"),
        ({"shape": (8, 64)}, "values: the kernels expect"),
        ({"shape": (8, -1)}, "shape: expected whole numbers"),
    ],
)
def test_panels_that_do_not_fit_together_never_run(change, says):
    weight = pack_quantized(*on_grid(8, 96, "int4", 32, True))
    with pytest.raises(FormatError, match=says):
        Kernel(QuantizedPanels(**{**vars(weight), **change}))


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_zero_points_of_too_many_bits_never_run(bits):
    weight = pack_quantized(*on_grid(8, 96, f"int{bits}", 32, False))
    weight.zeros[1, 0, 2, 1] = 1 << bits
    with pytest.raises(FormatError, match=r"the packed quantizedpanels of shape \[8, 96\] is damaged"):
        Kernel(weight)


def test_minimums_out_of_reach_are_refused():
    W, grid = on_grid(8, 96, "int4", 32, None)
    for change in (torch.neg, lambda t: 40 * t):
        with pytest.raises(FormatError, match="no kernel for minimums above zero, or lower than zero by more than"):
            pack_quantized(W, replace(grid, minimum=change(grid.minimum)), False, True)


@pytest.mark.parametrize("bits", [4, 5])
def test_minimums_lose_less_than_a_fifth_of_a_step(bits):
    """Weights as files have them, whose minimums are between eighths, and rows that lie in whole tiles or not."""
    scale, minimum = torch.rand(37, 3) + 0.5, 31 * torch.rand(37, 3) * 0.5
    W = torch.randint(0, 1 << bits, (37, 3, 32)) * scale[..., None] - minimum[..., None]
    packed = pack_quantized(W.flatten(1), OffsetGrid(bits, scale, minimum), False, True)
    assert ((unpack_panels(packed).view(W.shape) - W).abs() / scale[..., None]).max() < 0.2
    ids = torch.tensor([36, 0, 5])
    torch.testing.assert_close(Kernel(packed).rows(ids), unpack_panels(packed)[ids], rtol=1e-6, atol=1e-6)


def run_with_kernels(build, *words, **env):
    """This file, and tests of what programs run, with the kernels of a build."""
    compiler = ("conv", "nhwc", "ignored_layers", "int8_attention", "half_precision", "padding")
    names = ("runtime/test_kernels.py", "runtime/test_winograd.py", *(f"compiler/test_{n}.py" for n in compiler))
    files = [str(builds.TESTS / n) for n in names]
    options = [*files, "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *words]
    ran = builds.start_python(build, f"import pytest\nraise SystemExit(pytest.main({options!r}))", **env)
    output, errors = ran.communicate()
    assert ran.returncode == 0 and " passed" in output, output[-3000:] + errors[-3000:]
    return output


@pytest.mark.slow
def test_under_sanitizers():
    """ASan and UBSan."""
    run_with_kernels(builds.SANITIZED)


@pytest.mark.slow
@pytest.mark.skipif(builds.EMULATED.missing() is not None, reason=str(builds.EMULATED.missing()))
def test_avx512_in_software():
    """What this CPU may not have."""
    output = run_with_kernels(builds.EMULATED, "-rs", "-k", "not expansion_waits", RAREFY_ISA="avx512")
    assert "no avx512" not in output and "no amx" not in output


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_no_expansion_waits_for_its_register_or_for_memory():
    """Zen 4 and 5: a zero-masked expansion waits for the register that it overwrites, one out of memory is slow."""
    ran = subprocess.run(["objdump", "-d", "--no-show-raw-insn", find_spec("rarefy.runtime._kernels").origin],
                         capture_output=True, text=True, check=True)  # fmt: skip
    lines = [l for l in ran.stdout.splitlines() if re.search(r"\bvp?expand[bwdqp]", l)]
    assert platform.machine() != "x86_64" or len(lines) > 20
    assert not [l for l in lines if "{z}" in l or "(%" in l]


def test_torchs_defaults_are_not_ours():
    W, x = random(8, 32, 0.5), torch.randn(3, 32)
    kernel, before = Kernel(packing.pack_bitmask(W)), torch.get_default_dtype()
    want = kernel.run(x)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(kernel.run(x), want) and want.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    with pytest.raises(FormatError, match="the kernels run on the CPU, x is on meta"):
        kernel.run(x.to("meta"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("how", FORMATS)
def test_what_is_not_finite_stays_so(how, kind, bad, isa):
    W, x = random(9, 40, 0.0).abs() + 0.1, torch.rand(6, 40)
    x[2, 7] = bad
    for activation, act in reference.ACTIVATIONS.items():
        y = Kernel(FORMATS[how](W, kind), None, activation).run(x)
        if not act(torch.tensor(bad)).isfinite():  # some functions are bounded
            assert not y[2].isfinite().any()
        assert y[[0, 1, 3, 4, 5]].isfinite().all()


def test_kernels_of_another_version_are_not_used(monkeypatch):
    says = "the compiled kernels are of another version: install again"
    monkeypatch.setattr(bindings, "ABI_VERSION", bindings.ABI_VERSION + 1)
    assert bindings._open.__wrapped__() == (None, says)
    torch_library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))  # has no version of ours
    monkeypatch.setattr(bindings, "find_spec", lambda name: SimpleNamespace(origin=str(torch_library)))
    assert bindings._open.__wrapped__() == (None, says)


def test_versions_of_the_c_interface_agree():
    header = (Path(__file__).parents[2] / "csrc" / "rarefy.h").read_text(encoding="utf-8")
    assert f"RAREFY_ABI_VERSION = {bindings.ABI_VERSION} " in header


def test_quantized_embeddings_are_cast_with_the_model():
    net = nn.Sequential(nn.Linear(64, 6, bias=False))
    rarefy.quantize_(net, "int4")
    rarefy.fold_(net)
    made = QuantizedEmbedding(pack_quantized(net[0].weight.detach(), get_grid(all_layers(net)[0])), torch.float32)
    assert torch.equal(made(torch.tensor([5, 0])), net[0].weight[[5, 0]])
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match="expected ids from 0 to 5"):
            made(torch.tensor([wrong]))
    half = made.bfloat16()
    assert half(torch.tensor([1])).dtype == torch.bfloat16 and half.row_scales.dtype == torch.float32
