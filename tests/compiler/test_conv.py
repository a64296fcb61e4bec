"""Networks of images in native plans: convolutions, pools and means on tiles of pixels, against eager torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import rarefy
from helpers.compile_models import equal, far
from rarefy.common.errors import DataError, ModelError
from rarefy.compiler import compile, kernel_selection, ops, subgraph
from rarefy.compiler.subgraph import FusedSubgraph, SingleOp, _shapes
from rarefy.evaluation.profiling import threads
from rarefy.model.compare import relative_distance
from rarefy.runtime import bindings, huge_pages, packing
from rarefy.runtime.packed_formats import Bitmask, Dense, Sell, Tiles
from rarefy.runtime.packing import pack_bitmask

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


def native_ops(made):
    return [n.target for s in made.schedule if isinstance(s, FusedSubgraph) for n in s.nodes]


class Between(nn.Module):
    """A layer of images with a product before and behind it, so that all run in one plan."""

    def __init__(self, layer, C, O):
        super().__init__()
        self.before, self.layer, self.behind = nn.Conv2d(5, C, 1), layer, nn.Conv2d(O, 7, 1)

    def forward(self, x):
        return self.behind(torch.relu(self.layer(self.before(x))))


def thin(net, sparsity):
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data *= torch.rand(m.weight.shape) >= sparsity
    return net


CONVOLUTIONS = {  # kernel, stride, padding, dilation, rows, columns
    "pointwise": (1, 1, 0, 1, 9, 11),
    "pointwise, stride": (1, 2, 0, 1, 9, 12),
    "pointwise, padding": (1, 1, 1, 1, 6, 5),
    "square": (3, 1, 1, 1, 14, 9),
    "square, no padding": (3, 1, 0, 1, 7, 7),
    "square, stride": (3, 2, 1, 1, 15, 16),
    "dilation": (3, 1, 2, 2, 12, 10),
    "wide": (5, 3, 2, 1, 13, 13),
    "oblong": ((1, 7), 1, (0, 3), 1, 8, 17),
    "stride past the kernel": (2, 3, 0, 1, 14, 14),
}


def convolution(name):
    """A layer, and the size of images for it."""
    kernel, stride, padding, dilation, rows, columns = CONVOLUTIONS[name]
    return nn.Conv2d(19, 150, kernel, stride, padding, dilation), rows, columns


@pytest.mark.parametrize("sparsity", [0.0, 0.85])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(isa, name, sparsity):
    layer, rows, columns = convolution(name)
    net = thin(Between(layer, 19, 150), sparsity)
    made = equal(net, torch.randn(3, 5, rows, columns))
    assert len(made.schedule) == 1
    x = torch.randn(1, 5, rows, columns)
    with torch.no_grad():
        assert far(net(x), made(x)) < 1e-5


@pytest.mark.parametrize(
    ("sparsity", "fours", "product", "by_squares"),
    [
        (0.0, False, Dense, Dense),
        (0.45, False, Dense, Dense),
        (0.58, False, Sell, Dense),
        (0.8, False, Sell, Sell),
        (0.25, True, Dense, Dense),
        (0.5, True, Tiles, Dense),
        (0.7, True, Tiles, Tiles),
    ],
)
def test_zeros_decide_how_weights_run(sparsity, fours, product, by_squares):
    generator = torch.Generator().manual_seed(0)
    few, many = (5, 9), (16, 12)  # pixels
    for shape, size, form in (
        ((64, 96), None, product),
        ((64, 32, 3, 5), many, product),
        ((64, 32, 3, 3), few, product),
        ((64, 32, 3, 3), many, by_squares),
    ):
        hit = torch.rand((shape[0] // 4, *shape[1:]) if fours else shape, generator=generator) >= sparsity
        layer = nn.Linear(96, 64) if len(shape) == 2 else nn.Conv2d(32, 64, shape[2:])
        layer.weight.data *= hit.repeat_interleave(4, 0) if fours else hit
        net = nn.Sequential(layer).eval()
        x = torch.randn(7, 96) if size is None else torch.randn(9, 32, *size)
        (kernel,) = equal(net, x).kernels.values()
        assert type(getattr(kernel.held[0], "matrix", kernel.held[0])) is form


def in_steps(t, dims):
    """What 8 bits keep of a tensor, with a step for all but `dims`."""
    step = (t.abs().amax(dims, keepdim=True) / 127).clamp(min=1e-30)
    return (t / step).round() * step


NEAR = 1e-3  # a number at the border of two steps may fall on either side


class InBytes(nn.Module):
    """A convolution in 8 bits, as torch does it: a step for each output, and for each image or pixel."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        c = self.conv
        pixels = c.kernel_size == (1, 1) and c.stride == (1, 1) and c.padding == (0, 0)
        x = in_steps(x, 1 if pixels else (1, 2, 3))
        return F.conv2d(x, in_steps(c.weight, (1, 2, 3)), c.bias, c.stride, c.padding, c.dilation)


@pytest.mark.parametrize("sparsity", [0.0, 0.85])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_in_bytes(isa, name, sparsity):
    conv, rows, columns = convolution(name)
    net = thin(nn.Sequential(conv), sparsity).eval()
    x = torch.randn(3, 19, rows, columns) * torch.tensor([0.1, 1.0, 7.0]).view(3, 1, 1, 1)
    made = rarefy.compile(net, x, precision="int8")
    with torch.no_grad():
        want, got = InBytes(conv)(x), made(x)
        for one in zip(want, got):
            assert far(*one) < NEAR
        assert 3 * NEAR < far(net(x), got) < 0.05
        assert far(InBytes(conv)(x[1:2]), made(x[1:2])) < NEAR


def test_instruction_sets_may_change_between_calls():
    """What is added to bytes, and to what surrounds images, is theirs."""
    net, x = nn.Sequential(nn.Conv2d(5, 9, 3, padding=2), nn.Conv2d(9, 4, 1)).eval(), torch.randn(2, 5, 9, 8)
    made, before, found = rarefy.compile(net, x, precision="int8"), str(bindings.isa()), []
    try:
        for name in (before, "portable", before):
            bindings.use(name)
            found.append(made(x))
    finally:
        bindings.use(before)
    assert far(found[0], found[1]) < NEAR and torch.equal(found[0], found[2])


class OneChannel(nn.Module):
    """Two convolutions of the same geometry on one channel."""

    def __init__(self):
        super().__init__()
        self.before, self.a, self.b = nn.Conv2d(3, 1, 1), *(nn.Conv2d(1, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = self.before(x)
        return self.a(x) + self.b(x)


def test_planes_of_bytes_and_of_floats_are_two(monkeypatch):
    pack, seen = kernel_selection.pack_conv_node, []

    def mixed(traced, node, values, grid):
        seen.append(node)
        return pack(traced, node, "int8" if len(seen) == 2 else None, grid)

    monkeypatch.setattr(kernel_selection, "pack_conv_node", mixed)
    net, x = OneChannel().eval(), torch.randn(2, 3, 12, 12)
    made = rarefy.compile(net, x, precision="int8")
    assert sorted(k.held[0].kind for k in made.kernels.values()) == ["fp32", "fp32", "int8"]
    with torch.no_grad():
        assert far(net(x), made(x)) < 0.05


@pytest.mark.parametrize("batch", [1, 3, 70])
def test_sums_and_means_in_bytes(isa, batch):
    net, x = Residual().eval(), (torch.randn(batch, 24, 9, 7), torch.randn(batch, 24, 9, 7))
    made = rarefy.compile(net, x, precision="int8")
    net.a = fuse_conv_bn_eval(net.a, net.norm)
    net.norm, net.a, net.b = nn.Identity(), InBytes(net.a), InBytes(net.b)
    with torch.no_grad():
        want, got = net(*x), made(*x)
    assert far(want[1], got[1]) < 2 * NEAR
    assert made.kernels and {k.held[0].kind for k in made.kernels.values()} == {"int8"}
    assert len(made.schedule) == 1


class Uneven(nn.Module):
    """Outputs that are no fours, with a sum behind them that a pool makes, before a convolution."""

    def __init__(self, O):
        super().__init__()
        self.before = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(3)), nn.Conv2d(16, O, 1))
        self.sum, self.behind = nn.Conv2d(O, O, 1), nn.Conv2d(O, 9, 3)

    def forward(self, x):
        b = self.before(x)
        return self.behind(F.relu(self.sum(b) + F.max_pool2d(b, 3, 1, 1)))


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("O", [5, 6, 7, 8])
def test_what_lay_in_memory_does_not_matter(isa, O, precision):
    net, x = Uneven(O).eval(), torch.randn(2, 16, 12, 12)
    made = rarefy.compile(net, x, precision=precision)
    first = made(x)
    for segment in made.schedule:
        for plan in (p for plans in segment.programs.values() for p in plans):
            plan.memory.fill_(1e6)
    assert torch.equal(made(x), first)
    with torch.no_grad():
        assert far(net(x), first) < (0.05 if precision else 1e-5)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_what_is_no_number_stays_so(isa, precision):
    for net, shape in (
        (nn.Linear(9, 6), (5, 9)),
        (nn.Conv2d(9, 6, 3), (5, 9, 4, 4)),
        (nn.Conv2d(9, 6, 1), (5, 9, 4, 4)),
    ):
        x = torch.randn(shape)
        made = rarefy.compile(nn.Sequential(net, nn.ReLU()).eval(), x, precision=precision)
        for feature in (0, 4, 8):
            bad = x.clone()
            bad.view(5, 9, -1)[3, feature, 0] = math.nan
            got = made(bad).view(5, 6, -1)
            assert got[3, :, 0].isnan().all()
            assert torch.equal(got[[0, 1, 2, 4]], made(x).view(5, 6, -1)[[0, 1, 2, 4]])


def test_convolutions_too_wide_for_sums_of_bytes_stay_exact():
    net, x = nn.Conv2d(1850, 4, 6), torch.randn(1, 1850, 6, 6)
    with pytest.raises(ModelError, match="precision='int8' has no effect"):
        rarefy.compile(nn.Sequential(net, nn.ReLU()).eval(), x, precision="int8")


def test_weights_for_few_inputs_do_not_make_images_few(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.l = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(1, 3)

        def forward(self, x):
            return self.l((self.c(x) + x).mean((2, 3)))

    monkeypatch.setattr(compile, "pack_for_batches", lambda w, *_: pack_bitmask(w))
    made = equal(Net(), torch.randn(2, 1, 4, 300))
    assert Bitmask in {type(k.held[0]) for k in made.kernels.values()}


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_two_threads_do_what_one_does(isa, sparsity, precision):
    net, x = thin(Residual(), sparsity).eval(), (torch.randn(3, 24, 19, 17), torch.randn(3, 24, 19, 17))
    made = rarefy.compile(net, x, precision=precision)
    with threads(1):
        want = made(*x)
    with threads(2):
        for _ in range(20):
            for a, b in zip(want, made(*x)):
                assert torch.equal(a, b)


def test_groups_stay_exact():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU())
    thin(net, 0.7)
    with pytest.raises(ModelError, match="precision='int8' has no effect"):
        rarefy.compile(net.eval(), torch.randn(2, 8, 9, 9), precision="int8")
    net.append(nn.Flatten()).append(nn.Linear(16 * 5 * 5, 4))
    made = rarefy.compile(net.eval(), torch.randn(2, 8, 9, 9), precision="int8")
    kinds = {(n.target, k.held[0].kind) for n, k in made.kernels.items()}
    assert kinds == {(ops.conv2d, "fp32"), (ops.linear, "int8")}


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (3, 1, 2), (7, 2, 1)])
def test_depthwise(isa, kernel, stride, dilation):
    layer = nn.Conv2d(21, 21, kernel, stride, kernel // 2 * dilation, dilation, groups=21)
    made = equal(Between(layer, 21, 21), torch.randn(2, 5, 17, 15))
    assert native_ops(made).count(ops.conv2d) == 3


@pytest.mark.parametrize("how", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 1, 0, 2), ((2, 3), (1, 2), (1, 0))])
def test_pools(isa, how):
    made = equal(Between(nn.MaxPool2d(*how), 19, 19), torch.randn(2, 5, 17, 14))
    assert ops.max_pool2d in native_ops(made)


def test_pools_keep_what_is_no_number():
    net = Between(nn.MaxPool2d(3, 2, 1), 19, 19).eval()
    net.before.weight.data[:, 1:] = 0
    made = rarefy.compile(net, torch.randn(2, 5, 9, 9))
    x = torch.randn(2, 5, 9, 9)
    x[0, 0, 4, 4], x[1, 0, 0, 0] = math.nan, -math.inf
    with torch.no_grad():
        want, got = net(x).isnan(), made(x).isnan()
    assert want.any()
    assert not want.all()
    assert torch.equal(want, got)


class Residual(nn.Module):
    """Sums of images, also of what comes from outside, BatchNorm, a mean, and a product of features."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.Conv2d(24, 24, 1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 10)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x, more):
        y = F.gelu(self.norm(self.a(x)) + x)
        y = self.b(y) + more
        y = F.relu(y + x)
        return self.head(y.mean((2, 3))), y


@pytest.mark.parametrize("batch", [1, 3, 70])
def test_sums_and_means(isa, batch):
    net = Residual().eval()
    made = equal_all(net, torch.randn(batch, 24, 9, 7), torch.randn(batch, 24, 9, 7))
    assert len(made.schedule) == 1
    assert native_ops(made).count(ops.global_avg_pool) == 1


def equal_all(net, *x):
    made = rarefy.compile(net, x)
    with torch.no_grad():
        for want, got in zip(net(*x), made(*x)):
            assert want.shape == got.shape
            assert far(want, got) < 1e-5
    return made


def test_images_a_few_at_a_time(monkeypatch):
    """Batches go through in pieces, of which the last may be smaller."""
    net = Residual().eval()
    x, more = torch.randn(7, 24, 9, 7), torch.randn(7, 24, 9, 7)
    whole = rarefy.compile(net, (x, more))
    monkeypatch.setattr(subgraph, "MAX_IN_FLIGHT", 0)
    made = rarefy.compile(net, (x, more))
    (segment,) = made.schedule
    for few in (1, 3):
        segment.batch_sizes = dict.fromkeys(
            segment.batch_sizes or {_shapes(dict(zip(segment.inputs, (x[:1], more[:1])))): 0}, few
        )
        for want, got in zip(whole(x, more), made(x, more)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert {k[0][1] for k in segment.programs} >= {1, 3}


@pytest.mark.parametrize(
    ("memory", "weights", "cache", "few"),
    [
        (10, 8, 32, 1),
        (10, 30, 32, 1),
        (10, 100, 32, 5),
        (10, 8, 480, 5),
        (10, 8, 0, 5),
        (3, 0, 32, 5),
        (70, 500, 32, 1),
    ],
)
def test_how_many_images_go_together(memory, weights, cache, few):
    assert subgraph.images_together(memory << 20, weights << 20, cache << 20) == few


@pytest.mark.parametrize(("outputs", "few"), [(8, 1), (900, 4)])
def test_weights_that_are_the_larger_part_are_shared_by_images(monkeypatch, outputs, few):
    monkeypatch.setattr(subgraph, "last_cache", lambda: 1 << 16)
    net = nn.Sequential(nn.Conv2d(900, outputs, 1), nn.Conv2d(outputs, 8, 1))
    made = equal(net, torch.randn(few + 1, 900, 4, 4))
    (segment,) = made.schedule
    (plan,) = segment.programs[next(k for k in segment.programs if k[0][1] == 1)]
    weights = sum(t.nbytes for k in made.kernels.values() for t in k.tensors_read())
    assert list(segment.batch_sizes.values()) == [max(1, weights // (2 * plan.memory.nbytes))] == [few]


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_last_cache_may_be_unknown(monkeypatch, system):
    def told(number):
        if system == "linux":
            raise ValueError("unrecognized configuration name")
        return 5  # the number means another thing there

    monkeypatch.setattr(huge_pages.sys, "platform", system)
    monkeypatch.setattr(huge_pages.os, "sysconf", told)
    assert huge_pages.last_cache.__wrapped__() == 0


def test_what_images_and_rows_share_stays_in_torch():
    """A LayerNorm over the last dimension reads what a convolution makes: no plan holds both."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.LayerNorm(8)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    net, x = Both().eval(), torch.randn(2, 6, 8, 8)
    for precision, most in (("int8", 0.02), (None, 1e-5)):  # whose convolution has a plan of its own
        own = rarefy.compile(net, x, precision=precision)
        assert [len(s.nodes) for s in own.schedule if isinstance(s, FusedSubgraph)] == [1]
        with torch.no_grad():
            assert far(net(x), own(x)) < most
    made = equal(thin(net, 0.9), x)
    assert not any(isinstance(s, FusedSubgraph) for s in made.schedule)
    assert any(isinstance(s, SingleOp) for s in made.schedule)
    nodes = [n for n in made.exported.graph.nodes if n.target in (ops.conv2d, ops.norm, ops.add)]
    assert subgraph.image_nodes(nodes) is None
    assert subgraph.image_nodes(nodes[:1]) == {nodes[0], nodes[0].args[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11", "resnext50_32x4d"])
def test_real_networks(name):
    models = pytest.importorskip("torchvision.models")
    net = getattr(models, name)(weights=None).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    thin(net, 0.5)
    made = equal(net, torch.randn(2, 3, 64, 64), most=1e-4)
    if name == "resnet18":
        assert len(made.schedule) == 1


def test_saved_and_loaded(tmp_path):
    net = Residual().eval()
    x = torch.randn(3, 24, 9, 7), torch.randn(3, 24, 9, 7)
    made = rarefy.compile(net, x)
    rarefy.save(made, tmp_path / "net")
    back = rarefy.load(tmp_path / "net")
    for want, got in zip(made(*x), back(*x)):
        assert torch.equal(want, got)


@pytest.mark.parametrize("blocks", [0.3, 0.9])
def test_a_convolution_is_the_same_in_the_format_of_every_cpu(blocks):
    weight = torch.randn(30, 22, 3, 3) * (torch.rand(30, 11, 3, 3) < blocks).repeat_interleave(2, 1)
    geometry = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 1)}
    first = kernel_selection.pack_int8_conv(weight, geometry, amx=False)
    other = kernel_selection.repack(first, amx=True)
    assert other.counts is None and torch.equal(packing.unpack(other), packing.unpack(first))
    again = kernel_selection.repack(other, amx=False)
    assert (again.counts is None) == (first.counts is None)
    assert all(
        torch.equal(a, b) for a, b in zip(vars(again).values(), vars(first).values()) if isinstance(a, torch.Tensor)
    )


class Bottleneck(nn.Module):
    """Convolutions of each kind, whose channels are no multiples of a block, with a sum of images."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 20, 3, 2, 1), nn.Conv2d(20, 33, 1)
        self.middle, self.up = nn.Conv2d(33, 20, 3, 1, 1), nn.Conv2d(20, 9, 1, 2)
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        x = self.first(x).relu()
        x = (self.middle(self.down(x).relu()) + x).relu()
        return self.head(self.up(x).mean((2, 3)))


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_static_scales(isa, sparsity):
    """As near as those found in each call; what is out of range saturates; batches do not change each other."""
    net = Bottleneck().eval()
    for p in net.parameters():
        p.data *= torch.rand(p.shape) >= sparsity
    x = torch.randn(3, 3, 29, 31)
    made = rarefy.compile(net, x, precision="int8", calibrate=[x, x / 2])
    assert sum(k.input_grid is not None for k in made.kernels.values()) == 5
    want = net(x).detach()
    assert 1e-5 < relative_distance(made(x), want) < 0.02
    assert torch.equal(made(x[1:2]), made(x)[1:2])
    assert relative_distance(made(100 * x), net(100 * x).detach()) > 0.1


def test_static_scales_are_saved(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    made = rarefy.compile(Bottleneck().eval(), x, precision="int8", calibrate=[x])
    rarefy.save(made, tmp_path / "out")
    assert torch.equal(rarefy.load(tmp_path / "out")(x), made(x))


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "expected at least one batch, got none"),
        ([torch.full((2, 3, 16, 16), math.nan)], "batch 1 gives NaN or inf at x"),
        ([torch.zeros(2, 3, 16, 16), torch.zeros(2, 4, 16, 16)], "batch 2 does not fit the model: x: expected"),
    ],
)
def test_calibration_data_that_do_not_fit(batches, says):
    with pytest.raises(DataError, match=says):
        rarefy.compile(Bottleneck().eval(), torch.randn(2, 3, 16, 16), precision="int8", calibrate=batches)


def test_calibration_needs_int8():
    with pytest.raises(ModelError, match="pass precision='int8' with it"):
        rarefy.compile(Bottleneck().eval(), torch.randn(2, 3, 16, 16), calibrate=[torch.randn(2, 3, 16, 16)])
