"""Operators on channels of images, and activations, in native programs, against eager torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import equal
from rarefy.compiler import ops
from rarefy.compiler.operators import channels
from rarefy.compiler.operators.spec import Call
from rarefy.compiler.operators.table import BY_NAME
from rarefy.compiler.subgraph import FusedSubgraph
from rarefy.runtime import bindings
from rarefy.runtime.reference import ACTIVATIONS

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


def native_ops(compiled):
    return [n.target.__name__ for s in compiled.schedule if isinstance(s, FusedSubgraph) for n in s.nodes]


class Between(nn.Module):
    """A function of images between two convolutions."""

    def __init__(self, function, inner, outer=None):
        super().__init__()
        self.before, self.function = nn.Conv2d(5, inner, 1), function
        self.after = nn.Conv2d(outer or inner, 7, 1)

    def forward(self, x):
        return self.after(self.function(self.before(x)))


def check(function, inner, outer=None, batches=(1, 3, 70), size=(7, 9)):
    """Compile, compare with eager in several batch sizes, and return the native operators of the only call."""
    net = Between(function, inner, outer).eval()
    compiled = equal(net, torch.randn(2, 5, *size))
    for batch in batches:
        x = torch.randn(batch, 5, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert len(compiled.schedule) == 1
    return native_ops(compiled)


class Block(nn.Module):
    """A block of ConvNeXt as torchvision writes it."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 40), nn.Linear(40, width)
        self.gamma = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x):
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.gamma * y


def test_linear_layers_on_pixels(isa):
    assert check(Block(19), 19) == ["conv2d", "conv2d", "channel_norm", "conv2d", "conv2d", "conv2d"]


def test_linear_layers_on_pixels_in_int8(isa):
    net, x = Between(Block(19), 19).eval(), torch.randn(3, 5, 7, 9)
    compiled = rarefy.compile(net, x, precision="int8")
    with torch.no_grad():
        assert (compiled(x) - net(x)).norm() < 0.05 * net(x).norm()
    assert "linear" in {n.target.__name__ for n in compiled.exported.graph.nodes if n.op == "call_function"}


class Shared(nn.Module):
    """Rows that something else reads too stay rows."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        y = self.a(x.permute(0, 2, 3, 1))
        return self.b(y).permute(0, 3, 1, 2) * torch.softmax(y, -1).permute(0, 3, 1, 2)


def test_rows_that_others_read_stay_rows():
    net, x = Between(Shared(8), 8).eval(), torch.randn(2, 5, 7, 9)
    compiled = equal(net, x)
    assert "linear" in {n.target.__name__ for n in compiled.exported.graph.nodes if n.op == "call_function"}


class Overwrites(nn.Module):
    """Tensors that are overwritten, completely and in part."""

    def __init__(self, first, step=1):
        super().__init__()
        self.a, self.b, self.first, self.step = nn.Linear(8, 8), nn.Linear(8, 8), first, step

    def forward(self, x):
        y = self.a(x)
        y[:, self.first :: self.step] = y[:, self.first :: self.step] * 3 + 1
        return self.b(y)


@pytest.mark.parametrize(("first", "step", "left"), [(0, 1, 0), (1, 1, 1), (0, 2, 1)])
def test_tensors_that_are_overwritten(first, step, left):
    compiled = equal(Overwrites(first, step).eval(), torch.randn(3, 5, 8))
    in_torch = compiled.counts()[2]
    assert in_torch["slice_scatter"] == left and not in_torch["copy"]


class SqueezeExcite(nn.Module):
    def __init__(self, width, gate, keep=True):
        super().__init__()
        self.down, self.up, self.gate, self.keep = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width, 1), gate, keep

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True) if self.keep else F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.up(F.relu(self.down(mean))))


@pytest.mark.parametrize("gate", [torch.sigmoid, F.hardsigmoid])
@pytest.mark.parametrize("keep", [True, False])
def test_squeeze_and_excitation(isa, gate, keep):
    found = check(SqueezeExcite(21, gate, keep), 21)
    assert found == ["conv2d", "image_mean", "conv2d", "conv2d", "channel_scale", "conv2d"]


def test_squeeze_and_excitation_in_int8(isa):
    net = Between(SqueezeExcite(32, torch.sigmoid), 32).eval()
    x = torch.randn(3, 5, 8, 8)
    compiled = rarefy.compile(net, x, precision="int8")
    with torch.no_grad():
        far = (compiled(x) - net(x)).norm() / net(x).norm()
    assert len(compiled.schedule) == 1 and far < 0.05


class Affine(nn.Module):
    def __init__(self, width, affine=True):
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=affine)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return F.relu(self.norm(F.max_pool2d(x, 2)))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_alone(isa, affine):
    assert check(Affine(19, affine), 19) == ["conv2d", "max_pool2d", "channel_affine", "conv2d"]


class ChannelNorm(nn.Module):
    def __init__(self, width, rms):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6) if rms else nn.LayerNorm(width)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_norm_over_channels(isa):
    assert check(ChannelNorm(19, False), 19) == ["conv2d", "channel_norm", "conv2d"]


FORMULAS = {  # a function of images: the native operators between two convolutions
    "hard swish": (lambda x: x * F.relu6(x + 3) / 6, []),
    "hard swish, clamped": (lambda x: F.hardtanh(x + 3.0, 0.0, 6.0) * x * (1 / 6), []),
    "other factor": (lambda x: x * F.relu6(x + 3) / 5, ["channel_affine", "mul", "channel_affine"]),
    "scale and shift": (lambda x: x * 0.7 + 0.2, []),
    "shift and scale": (lambda x: (x - 0.3) / 1.7, []),
    "behind an activation": (lambda x: F.silu(x * 2.0) * 0.5 - 1.0, ["channel_affine"]),
    "hard sigmoid": (lambda x: torch.clamp(x * 0.2 + 0.5, 0.0, 1.0), []),
    "between zero and one": (lambda x: F.hardtanh(x, 0.0, 1.0), []),
    "read twice": (lambda x: x * 0.5 + x, ["channel_affine", "add"]),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_numbers_and_formulas(isa, name):
    """Numbers go into the convolution before them, as converters of other frameworks write scales and activations."""
    function, between = FORMULAS[name]
    found = check(function, 19)
    assert sorted(found) == sorted(["conv2d", *between, "conv2d"])


class Windows(nn.Module):
    """Rows with four dimensions, [batch, rows, columns, features], and numbers that multiply them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        y = F.gelu(self.a(x)) * 0.5
        return self.c(torch.clamp(self.b(y) * 0.3 + 0.5, 0.0, 1.0))


def test_numbers_of_rows_are_no_scales_of_channels():
    compiled = equal(Windows(), torch.randn(2, 3, 4, 6))
    assert all(n.target is not ops.channel_affine for n in compiled.exported.graph.nodes)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_concatenation(isa, count):
    def function(x):
        return torch.cat([x, *(F.max_pool2d(x, 3, 1, 1) if i == 0 else F.relu(x) for i in range(count - 1))], 1)

    found = check(function, 6, 6 * count, batches=(1, 13))
    assert found.count("concat") == (count > 1) + (count > 8)


def test_concatenation_before_int8(isa):
    net = Between(lambda x: torch.cat([F.relu(x), x], 1), 32, 64).eval()
    x = torch.randn(3, 5, 8, 8)
    compiled = rarefy.compile(net, x, precision="int8")
    with torch.no_grad():
        assert (compiled(x) - net(x)).norm() < 0.05 * net(x).norm()
    assert "concat" in native_ops(compiled)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(width, width, 3, padding=1), nn.Parameter(torch.randn(1, width, 1, 1))

    def forward(self, x):
        return x + self.conv(x) * self.gamma


def test_layer_scale_of_convolutions(isa):
    assert check(LayerScale(9), 9) == ["conv2d", "conv2d", "conv2d"]


class RowsBetween(nn.Module):
    """A ConvNeXt block: norm and linear layers on the pixels of an image, and a constant for each channel."""

    def __init__(self, width):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x):
        y = self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + self.gamma * y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
def test_layer_scale_of_rows(isa, precision):
    net, x = nn.Sequential(nn.Conv2d(3, 20, 3), RowsBetween(20), RowsBetween(20)).eval(), torch.randn(2, 3, 16, 15)
    compiled = rarefy.compile(net, x, precision=precision)
    with torch.no_grad():
        assert (compiled(x) - net(x)).norm() < (1e-5 if precision is None else 0.03) * net(x).norm()
    assert len(compiled.schedule) == 1


@pytest.mark.parametrize("how", [(2, 2), (3, 1, 1), (3, 2, 1), ((2, 3), (2, 1))])
def test_average_pools(isa, how):
    assert check(nn.AvgPool2d(*how), 11) == ["conv2d", "conv2d", "conv2d"]


@pytest.mark.parametrize("how", [(3, 1, 1), (3, 2, 1), ((2, 3), (2, 1), (1, 0))])
def test_average_pools_without_padding(isa, how):
    pool = nn.AvgPool2d(*how, count_include_pad=False)
    assert check(pool, 41) == ["conv2d", "avg_pool2d", "conv2d"]


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=3),
    ],
)
def test_other_average_pools_stay_in_torch(pool):
    net = Between(pool, 11).eval()
    compiled = equal(net, torch.randn(2, 5, 7, 9))
    assert "avg_pool2d" in compiled.counts()[2]


ALL = {
    "relu6": F.relu6, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "relu6, hardtanh": lambda x: F.hardtanh(x, 0, 6), "relu6, clamp": lambda x: x.clamp(0, 6),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_activations_in_epilogues(isa, name):
    net = nn.Sequential(nn.Linear(9, 40), Function(ALL[name]), nn.Linear(40, 5)).eval()
    compiled = equal(net, torch.randn(3, 9))
    first, _ = (n for s in compiled.schedule for n in s.nodes)
    assert first.args[4] == name.partition(",")[0]
    assert check(ALL[name], 11) == ["conv2d", "conv2d"]


@pytest.mark.parametrize("precision", ["int8", "bf16"])
@pytest.mark.parametrize("name", ["relu6", "hardswish", "hardsigmoid", "sigmoid", "tanh"])
def test_activations_in_other_precisions(isa, name, precision):
    net = nn.Sequential(nn.Linear(64, 40), Function(ACTIVATIONS[name]), nn.Linear(40, 5)).eval()
    x = torch.randn(70, 64) * 3
    with torch.no_grad():
        assert (rarefy.compile(net, x, precision=precision)(x) - net(x)).norm() < 0.03 * net(x).norm()


@pytest.mark.parametrize("limits", [(0, 5), (-1, 6), (-1, 1)])
def test_other_limits_stay_in_torch(limits):
    compiled = equal(Between(lambda x: F.hardtanh(x, *limits), 11).eval(), torch.randn(2, 5, 7, 9))
    assert "hardtanh" in compiled.counts()[2]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", ["relu6", "hardswish", "hardsigmoid", "sigmoid", "tanh"])
def test_values_of_activations(isa, name):
    """All magnitudes, and what is no number."""
    positive = torch.logspace(-12, 3, 400)
    x = torch.cat([-positive.flip(0), torch.zeros(1), positive, torch.tensor([float("nan"), 1e30, -1e30])])[:, None]
    net = nn.Sequential(nn.Linear(1, 1, bias=False), Function(ACTIVATIONS[name])).eval()
    net[0].weight.data.fill_(1)
    got = rarefy.compile(net, torch.randn(3, 1))(x)
    torch.testing.assert_close(
        got, ACTIVATIONS[name](x), rtol=1e-6, atol=1e-30 if name == "tanh" else 1e-7, equal_nan=True
    )


def call(op, shapes, constants=None):
    graph = torch.fx.Graph()
    names = [graph.placeholder(n) for n in (constants or {})]
    node = graph.call_function(op, (graph.placeholder("x"), *names))
    return Call(node, shapes, None, None, constants or {}, {})


def test_shapes_that_do_not_fit_are_found():
    specs = {s.name: s for s in channels.OPERATORS}
    image, gate = (2, 5, 4, 4), (2, 5, 1, 1)
    assert specs["channel_scale"].fits(call(ops.channel_scale, (image, gate)))
    for other in ((2, 4, 1, 1), (1, 5, 1, 1), (2, 5, 4, 1), (2, 5)):
        assert not specs["channel_scale"].fits(call(ops.channel_scale, (image, other)))
    assert specs["concat"].fits(call(ops.concat, (image, (2, 9, 4, 4))))
    for other in ((3, 5, 4, 4), (2, 5, 4, 3), (2, 5, 4), (2, 0, 4, 4)):
        assert not specs["concat"].fits(call(ops.concat, (image, other)))
    assert not specs["image_mean"].fits(call(ops.image_mean, ((2, 5, 0, 4),)))
    five, four = {"a": torch.ones(5), "b": torch.ones(5)}, {"a": torch.ones(5), "b": torch.ones(4)}
    assert specs["channel_affine"].fits(call(ops.channel_affine, (image,), five))
    assert not specs["channel_affine"].fits(call(ops.channel_affine, (image,), four))
    with pytest.raises(ValueError, match=r"expected vectors of one length, got shapes \[\(5,\), \(4,\)\]"):
        specs["channel_affine"].check_weights(call(ops.channel_affine, (), four))  # type: ignore[misc]


CONSTANTS = {
    "times": lambda x, c: x * c,
    "plus": lambda x, c: c + x,
    "minus": lambda x, c: x - c,
    "difference": lambda x, c: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x,
    "layer scale": lambda x, c: x + c * (F.avg_pool2d(x, 3, 1, 1) - x),
}


class Constant(nn.Module):
    """A function of images and a constant for each channel."""

    def __init__(self, function, width):
        super().__init__()
        self.function, self.constant = function, nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x):
        return self.function(x, self.constant)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_channels(isa, name):
    found = check(nn.Sequential(nn.ReLU(), Constant(CONSTANTS[name], 19)), 19)
    assert "channel_affine" in found


def test_differences_with_a_factor_stay_in_torch():
    net = Between(lambda x: torch.sub(F.relu(x), x, alpha=2), 8).eval()
    assert equal(net, torch.randn(2, 5, 7, 9)).counts()[2]["sub.Tensor"] == 1


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 18])
def test_group_norm(isa, groups, affine):
    norm = nn.GroupNorm(groups, 18, eps=1e-3, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    assert check(norm, 18) == ["conv2d", "group_norm", "conv2d"]


def test_group_norm_of_large_numbers():
    net = Between(nn.GroupNorm(2, 8), 8).eval()
    with torch.no_grad():
        net.before.bias += 1000.0
    x = torch.randn(3, 5, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(rarefy.compile(net, x, tune=False)(x), net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(isa, affine):
    norm = nn.InstanceNorm2d(9, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
    assert check(norm, 9) == ["conv2d", "group_norm", "conv2d"]


def test_instance_norm_with_running_statistics():
    net = Between(nn.InstanceNorm2d(9, track_running_stats=True), 9).eval()
    compiled = equal(net, torch.randn(2, 5, 7, 9))
    assert "group_norm" not in {n.target.__name__ for n in compiled.exported.graph.nodes if n.op == "call_function"}


def shuffled(x, groups=2):
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


ORDERS = {  # functions of images of 12 channels, and the channels that they return
    "shuffle": (shuffled, 12),
    "shuffle in four": (lambda x: shuffled(x, 4), 12),
    "torch's shuffle": (nn.ChannelShuffle(3), 12),
    "slice": (lambda x: x[:, 2:9], 7),
    "slice from the end": (lambda x: x[:, -5:], 5),
    "every third": (lambda x: x[:, 1::3], 4),
    "gate": (lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), 6),
    "split": (lambda x: torch.cat([*x.split([5, 4, 3], 1)][::-1], 1), 12),
    "halves of a shuffle": (lambda x: torch.cat([F.relu(t) for t in shuffled(x).chunk(2, 1)], 1), 12),
}


@pytest.mark.parametrize("name", ORDERS)
def test_channels_in_another_order(isa, name):
    function, outer = ORDERS[name]
    assert "select_channels" in check(function, 12, outer)


@pytest.mark.parametrize("function", [lambda x: shuffled(x[:, :6], 3), lambda x: shuffled(x[:, 1::2])[:, 2:]])
def test_shuffles_and_slices_in_any_order(function):
    outer = function(torch.zeros(1, 12, 1, 1)).shape[1]
    assert check(function, 12, outer).count("select_channels") == 1


class Tokens(nn.Module):
    """Later channels of an image as rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.layer = nn.Conv2d(5, 12, 1), nn.Linear(6, 4)

    def forward(self, x):
        _, b = F.relu(self.conv(x)).chunk(2, 1)
        return self.layer(b.flatten(2).transpose(1, 2)), self.layer(b.permute(0, 2, 3, 1))


def test_a_slice_of_channels_as_rows(isa):
    net = Tokens().eval()
    for x in (torch.randn(2, 5, 7, 9), torch.randn(3, 5, 8, 8)):
        compiled = rarefy.compile(net, x, tune=False)
        with torch.no_grad():
            for got, want in zip(compiled(x), net(x)):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [lambda x: x[:, :0], lambda x: x.split([0, 12], 1)[0]])
def test_no_channels(function):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 12, 1)

        def forward(self, x):
            y = self.conv(x)
            return torch.cat([function(y), y], 1)

    equal(Empty().eval(), torch.randn(2, 5, 4, 4))


def test_a_selection_of_a_selection_is_one():
    run = check(lambda x: shuffled(x)[:, 3:9][:, ::2], 12, 3)
    assert run.count("select_channels") == 1


@pytest.mark.parametrize("follower", [nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(2)])
def test_channels_in_another_order_are_read_in_tiles_and_pixel_by_pixel(isa, follower):
    for function in (lambda x: follower(x[:, 1:5]), lambda x: follower(shuffled(x)[:, 8:])):
        equal(Between(function, 12, 4).eval(), torch.randn(3, 5, 8, 8))


def test_rows_are_not_taken_for_channels():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x):
            return self.layer(self.layer(x)[:, 1:3])

    compiled = equal(Heads().eval(), torch.randn(2, 4, 5, 12))
    assert "select_channels" not in native_ops(compiled)


@pytest.mark.parametrize("order", [[], [0, 12], [-1, 0]])
def test_an_order_of_channels_must_exist(order):
    spec, index = BY_NAME["select_channels"], torch.tensor(order, dtype=torch.int64)
    graph = torch.fx.Graph()
    node = graph.call_function(ops.select_channels, (graph.placeholder("x"), graph.placeholder("order")))
    call = Call(node, ((2, 12, 4, 4),), None, None, {"order": index}, {})
    if order:
        assert not spec.fits(call)
    else:
        with pytest.raises(ValueError, match="expected an order"):
            channels._check_order(call)
