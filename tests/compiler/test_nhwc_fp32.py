"""Convolutions and the operators around them on fp32 images in NHWC order, against eager torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import CONVOLUTIONS, steps
from helpers.marks import slow_case, slow_except
from rarefy.runtime import bindings
from rarefy.runtime.nhwc_weights import grouped_weight, merged_groups

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")

GEOMETRIES = [  # inputs, outputs, kernel, stride, padding, dilation, groups
    *CONVOLUTIONS,
    (32, 32, 3, 1, 1, 1, 32),
    (70, 70, 5, 2, 2, 1, 70),
    (9, 9, (3, 4), 1, (1, 2), 2, 9),
    (24, 48, 3, 1, 1, 1, 24),
    (32, 64, 3, 2, 1, 1, 8),
    (16, 160, 3, 1, 1, 2, 4),
    (26, 104, 3, 2, 1, 1, 13),
    (6, 30, 3, 1, 1, 1, 2),
    (20, 60, 3, 1, 1, 1, 20),
    (40, 16, 1, 1, 0, 1, 1),
]
SIZES = [(3, 19, 23), (1, 7, 9), (33, 5, 4)]
WIDE = [
    (2, 9, 70),
    (2, 31, 37),
    (1, 1, 150),
    (3, 2, 67),
]  # rows that are computed by themselves, and longer than a block
ACTS = [nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.ReLU6(), nn.GELU(), nn.Tanh(), nn.Identity(), nn.Sigmoid()]


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(net, x, most=2e-6):
    """The compiled model, whose outputs are eager's."""
    net = net.eval()
    made, want = rarefy.compile(net, x, tune=False), net(x)
    got = made(x)
    wanted, gotten = (o if isinstance(o, (list, tuple)) else [o] for o in (want, got))
    for a, b in zip(wanted, gotten):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= most * float(a.abs().max())
    return made


def only_images(made):
    """Whether nothing between input and output was stored in tiles and converted back."""
    names = steps(made)
    return len(made.schedule) == 1 and not {"pack", "pad_planes", "nhwc_unpack", "conv", "depthwise_conv"} & {*names}


class Pairs(nn.Module):
    """A convolution, an activation, a convolution; with a sum around the last one where sizes allow it."""

    def __init__(self, geometry, act):
        super().__init__()
        self.first, self.act = nn.Conv2d(*geometry), act
        self.last = nn.Conv2d(geometry[1], geometry[1], 3, padding=1)
        self.head = nn.Conv2d(geometry[1], 12, 1)

    def forward(self, x):
        y = self.act(self.first(x))
        return self.head(self.act(self.last(y) + y))


@pytest.mark.parametrize("size", slow_except(SIZES, (1, 7, 9)))
@pytest.mark.parametrize("i", range(len(GEOMETRIES)))
def test_convolutions(isa, i, size):
    batch, *sizes = size
    made = compiled(Pairs(GEOMETRIES[i], ACTS[i % len(ACTS)]), torch.randn(batch, GEOMETRIES[i][0], *sizes))
    assert only_images(made)


ROWS = [  # of few inputs, which write their outputs directly, and with strides
    (3, 20, 3, 2, 1, 1, 1),
    (3, 7, 3, (1, 2), (1, 2), 1, 1),
    (20, 33, 1, 2, 0, 1, 1),
    (20, 7, 1, 1, 0, 1, 1),
    (70, 70, 3, (2, 1), 1, 1, 70),
    (9, 9, 5, 2, 2, 1, 9),
    (6, 24, (1, 7), (1, 2), (0, 3), 1, 1),
    (40, 20, 3, 2, 2, 2, 1),
]


@pytest.mark.parametrize(
    "act", [nn.ReLU6(), slow_case(nn.Identity()), slow_case(nn.Hardswish())], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("size", slow_except(WIDE, (2, 9, 70), (1, 1, 150)))
@pytest.mark.parametrize("geometry", ROWS, ids=str)
def test_wide_images(isa, geometry, size, act):
    batch, height, width = size
    compiled(Pairs(geometry, act), torch.randn(batch, geometry[0], max(height, 3), width))


class Joined(nn.Module):
    """Convolutions that write odd numbers of channels side by side, one of them with a sum around it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(5, 7, 1), nn.Conv2d(7, 7, 3, padding=1, groups=7), nn.Conv2d(5, 9, 3, 1, 1)
        self.last = nn.Conv2d(23, 6, 3, padding=1)

    def forward(self, x):
        a = F.relu6(self.a(x))
        return self.last(torch.cat([a, F.relu6(self.b(a) + a), F.relu(self.c(x))], 1))


@pytest.mark.parametrize("size", [*SIZES, *WIDE])
def test_directly_into_a_concatenation(isa, size):
    batch, *sizes = size
    compiled(Joined(), torch.randn(batch, 5, *sizes))


@pytest.mark.parametrize("outputs", slow_except(range(1, 34), 1, 7, 8, 15, 16, 17, 32, 33))
def test_every_number_of_outputs_is_written_directly(isa, outputs):
    net = nn.Sequential(nn.Conv2d(5, outputs, 1), nn.ReLU(), nn.Conv2d(outputs, 4, 3, padding=1))
    compiled(net, torch.randn(2, 5, 6, 15))


@pytest.mark.parametrize("act", ACTS, ids=lambda a: type(a).__name__)
def test_activations_in_tiles_and_in_images(isa, act):
    net = nn.Sequential(nn.Conv2d(5, 24, 1), act, nn.Conv2d(24, 24, 3, groups=24, padding=1), act)
    compiled(net, 3 * torch.randn(2, 5, 9, 21))


def test_kernels_that_do_not_fit_vectors(isa):
    """Every number of channels up to two vectors, whose last stores are masked."""
    for channels in range(1, 34):
        net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(channels, channels, 1),
        )
        compiled(net, torch.randn(2, channels, 6, 7))


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2018) between two convolutions."""

    def __init__(self, C):
        super().__init__()
        self.before, self.behind = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, 9, 1)
        self.squeeze, self.excite = nn.Conv2d(C, 6, 1), nn.Conv2d(6, C, 1)

    def forward(self, x):
        y = F.silu(self.before(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.behind(y * gate)


@pytest.mark.parametrize("C", [5, 16, 40, 130])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_gates_of_channels(isa, C, batch):
    made = compiled(Gate(C), torch.randn(batch, C, 7, 9))
    assert {"nhwc_map", "nhwc_mean"} <= {*steps(made)}


class Dense(nn.Module):
    """Images that grow by concatenation, normed before each convolution (Huang et al. 2017)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(10 + 7 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(10 + 7 * i, 7, 3, padding=1) for i in range(4))
        for n in self.norms:
            n.running_mean.normal_()
            n.running_var.uniform_(0.5, 2)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features[1:], 1)


class Branches(nn.Module):
    """Convolutions and a pool side by side (Szegedy et al. 2015), twice."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(c, 8, 1), nn.Conv2d(c, 5, 3, padding=1), nn.Conv2d(c, 7, 5, padding=2)])
            for c in (6, 26)
        )
        self.head = nn.Conv2d(46, 4, 1)

    def forward(self, x):
        for a, b, c in map(list, self.convs):
            x = torch.cat([F.relu(a(x)), b(x), F.max_pool2d(x, 3, 1, 1), c(x)], 1)
        return self.head(x)


def test_concatenation(isa):
    compiled(Dense(), torch.randn(2, 3, 9, 11))
    made = compiled(Branches(), torch.randn(3, 6, 9, 11))
    assert only_images(made)
    assert not steps(made).count("nhwc_copy")  # convolutions and pools write their channels themselves


class Several(nn.Module):
    """One image as it is, pooled, and through an activation, side by side; and that beside others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 18, 3), nn.Conv2d(54, 4, 3, padding=1), nn.Conv2d(72, 5, 1)

    def forward(self, x):
        y = self.a(x)
        wide = torch.cat([y, F.max_pool2d(y, 3, 1, 1), F.relu(y)], 1)
        return self.b(wide), self.c(torch.cat([torch.tanh(y), wide], 1))


def test_concatenation_of_what_others_read(isa):
    compiled(Several(), torch.randn(2, 3, 9, 11))


class Sums(nn.Module):
    """Sums that no convolution can add up itself, as networks have them that norm first (He et al. 2016b)."""

    def __init__(self, C=20):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(3))

    def forward(self, x):
        x = self.convs[0](x)
        for conv, norm in zip(self.convs, self.norms):
            x = x + conv(F.relu(norm(x)))
        return self.convs[0](x + x), x.mean((2, 3))


def test_sums(isa):
    compiled(Sums(), torch.randn(2, 20, 8, 8))


@pytest.mark.parametrize("kernel", [2, slow_case(3), (2, 3)])
@pytest.mark.parametrize("stride", [slow_case(1), 2, slow_case(3)])
@pytest.mark.parametrize("behind", [True, False])
def test_pools_whose_last_windows_end_beyond_the_image(isa, kernel, stride, behind):
    for padding in (0, 1):
        pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=True)
        net = nn.Sequential(nn.Conv2d(4, 20, 1), pool, *([nn.Conv2d(20, 3, 1)] * behind))
        for size in ((9, 10), (8, 11), (5, 5)):
            made = compiled(net, torch.randn(2, 4, *size))
            assert len(made.schedule) == 1 and "nhwc_max_pool" in steps(made)


def test_nan_and_infinity_are_not_lost(isa):
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1, bias=False)).eval()
    for i in (0, 2):
        net[i].weight.copy_(torch.eye(3)[:, :, None, None] + 0.25)
    x = torch.randn(2, 3, 8, 8)
    made = rarefy.compile(net, x, tune=False)
    x[0, 1, 3, 3], x[1, 0, 2, 5] = torch.nan, torch.inf
    assert torch.equal(made(x).isnan(), net(x).isnan()) and torch.equal(made(x).isinf(), net(x).isinf())


def test_images_that_tokens_read_too(isa):
    """Outputs in both layouts: pixels as tokens, and an image for the next convolution."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 24, 3), nn.Conv2d(24, 24, 1), nn.Linear(24, 6)

        def forward(self, x):
            y = F.gelu(self.a(x))
            return self.b(y), self.c(y.flatten(2).transpose(1, 2))

    compiled(Both(), torch.randn(2, 4, 9, 9))


def test_8_bits_beside_fp32(isa):
    """A depthwise convolution whose inputs are not rounded, among convolutions in 8 bits with scales of each call."""
    net = nn.Sequential(nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1)).eval()
    x = torch.randn(2, 8, 9, 9)
    made = rarefy.compile(net, x, precision="int8", tune=False)
    assert float((made(x) - net(x)).norm() / net(x).norm()) < 0.03
    assert "nhwc_depthwise" in steps(made)


@pytest.mark.parametrize(
    ("outputs", "groups", "merged"),
    [(128, 32, 4), (64, 8, 2), (48, 3, 1), (32, 2, 1), (24, 6, 4), (30, 2, 2), (104, 13, 2)],
)
def test_groups_that_fill_vectors(outputs, groups, merged):
    assert merged_groups(outputs, groups) == merged


def test_a_grouped_weight_is_packed_once_and_freed_with_it():
    weight = torch.randn(32, 2, 3, 3)
    packed = grouped_weight(weight, 8)
    assert grouped_weight(weight, 8) is packed
    dense = torch.zeros(32, 16, 9)
    for g in range(8):
        dense[4 * g : 4 * g + 4, 2 * g : 2 * g + 2] = weight[4 * g : 4 * g + 4].flatten(2)
    blocks = packed.values.view(
        torch.float32
    )  # two merged groups of 16 outputs and 8 inputs, a block for each position
    for merged in range(2):
        for position in range(9):
            block = blocks[merged, position, :8]  # [inputs, outputs]
            rows = slice(16 * merged, 16 * merged + 16), slice(8 * merged, 8 * merged + 8)
            assert torch.equal(block.T, dense[rows[0], rows[1], position])


def test_last_groups_read_nothing_beyond_their_channels(isa):
    """13 groups of 8 outputs are six pairs and a single one, whose pair is missing: what lies there may be NaN."""
    net = nn.Sequential(nn.Conv2d(3, 26, 1), nn.Conv2d(26, 104, 3, groups=13, padding=1), nn.Conv2d(104, 4, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    made = compiled(net, x)
    before = made(x)[0]
    x[1] = torch.nan
    assert torch.equal(made(x)[0], before)


class OwnGate(nn.Module):
    """Gates that no convolution computes: their producers must write them in tiles."""

    def __init__(self, gate):
        super().__init__()
        self.before, self.behind, self.gate = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 5, 1), gate

    def forward(self, x):
        y = self.before(x)
        return self.behind(y * self.gate(y.mean((2, 3), keepdim=True)))


GATES = [torch.sigmoid, lambda m: m + F.relu(m), lambda m: F.max_pool2d(torch.tanh(m), 1), lambda m: m]


@pytest.mark.parametrize("gate", GATES, ids=range(len(GATES)))
def test_gates_of_any_operator(isa, gate):
    compiled(OwnGate(gate), torch.randn(2, 3, 8, 8))


def test_a_weight_that_two_groupings_share(isa):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 4, 3, 3))
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            y = F.conv2d(self.a(x), self.weight, None, 1, 1, 1, 4)
            return self.c(F.conv2d(self.b(y), self.weight, None, 1, 1, 1, 2))

    compiled(Shared(), torch.randn(2, 3, 8, 8))


def test_a_rounded_residual_of_what_is_not_rounded():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, x):
            return self.c(self.depthwise(self.a(x)) + torch.ops.rarefy.fake_quantize(self.b(x), 0.5, 128))

    compiled(Rounded(), torch.randn(2, 3, 8, 8))


def test_long_chains():
    """Formats are found once for each operator, without deep recursion."""
    pools = nn.Sequential(nn.Conv2d(3, 8, 1), *[nn.MaxPool2d(3, 1, 1) for _ in range(40)], nn.Conv2d(8, 4, 1))
    compiled(pools, torch.randn(1, 3, 6, 6))

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = start = self.a(x)
            for _ in range(400):
                y = torch.tanh(y) + start
            return self.b(y)

    compiled(Chain(), torch.randn(1, 3, 4, 4), most=1e-4)


def test_windows_much_larger_than_the_image(isa):
    pool = nn.MaxPool2d(31, 1, 15)
    compiled(nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.Conv2d(8, 4, 1)), torch.randn(1, 3, 6, 6))
    pool = nn.MaxPool2d(3, 2, 1, dilation=3, ceil_mode=True)
    compiled(nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.Conv2d(8, 4, 1)), torch.randn(1, 3, 9, 8))
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    made = compiled(nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.Conv2d(8, 4, 1)), torch.randn(1, 3, 9, 8))
    assert any(r.operator == "depthwise_conv" and r.operations for r in made.profile(torch.randn(1, 3, 9, 8)).rows)


def test_saved_models_keep_pools_with_ceil_mode(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    rarefy.save(rarefy.compile(net, x, tune=False), tmp_path / "fast")
    assert torch.allclose(rarefy.load(tmp_path / "fast")(x), net(x), atol=1e-5)


class Upwards(nn.Module):
    """A transposed convolution whose kernel is its stride, between convolutions; its output is also returned."""

    def __init__(self, kernel, inner, outer, returned=False):
        super().__init__()
        self.first = nn.Conv2d(3, inner, 3, padding=1)
        self.up, self.norm = nn.ConvTranspose2d(inner, outer, kernel, kernel, bias=outer > 1), nn.BatchNorm2d(outer)
        self.last, self.returned = nn.Conv2d(outer, 5, 3, padding=1), returned
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = F.relu(self.norm(self.up(F.relu(self.first(x)))))
        return (self.last(y), y) if self.returned else self.last(y)


UPWARDS = [(2, 24, 24), (3, 7, 5), ((1, 4), 16, 1), ((2, 1), 3, 70)]


@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize(("kernel", "inner", "outer"), UPWARDS, ids=str)
def test_transposed_convolutions_whose_kernel_is_their_stride(isa, kernel, inner, outer, returned):
    for size in ((2, 9, 11), (1, 1, 70), (17, 4, 3)):
        made = compiled(Upwards(kernel, inner, outer, returned), torch.randn(size[0], 3, *size[1:]))
        assert made.counts()[0] == 1 and made.counts()[1]["depth_to_pixels"] == 1
        assert returned or only_images(made)


@pytest.mark.parametrize(("kernel", "inner", "outer"), UPWARDS, ids=str)
def test_transposed_convolutions_on_codes(isa, kernel, inner, outer):
    net, batches = Upwards(kernel, inner, outer).eval(), list(torch.randn(6, 4, 3, 9, 11))
    made = rarefy.compile(net, batches[0], precision="int8", calibrate=batches, tune=False)
    x = torch.randn(3, 3, 9, 11)
    assert float((made(x) - net(x)).norm()) <= 0.05 * float(net(x).norm())


@pytest.mark.parametrize("options", [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "output_padding": 1}])
def test_other_transposed_convolutions_run_in_torch(options):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, **options), nn.Conv2d(6, 4, 1))
    made = compiled(net, torch.randn(2, 3, 7, 8))
    assert made.counts()[2]["conv_transpose2d.input"] == 1
