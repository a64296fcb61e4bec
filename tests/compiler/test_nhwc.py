"""Int8 convolutions on NHWC codes, against the same convolutions in torch on rounded weights and images."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import CONVOLUTIONS, steps
from helpers.marks import slow_except
from rarefy.model.compare import relative_distance
from rarefy.runtime import bindings
from rarefy.runtime.nhwc_weights import pack_nhwc
from rarefy.runtime.packing import pack_conv, unpack

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")

SIZES = [(3, 19, 23), (1, 7, 7), (5, 4, 9)]


def grids_of(made):
    return {n.name: (k.input_grid, k.residual_grid) for n, k in made.kernels.items() if k.input_grid is not None}


def rounded(made, x):
    """What the graph computes in fp32 with the weights and images that the codes stand for."""
    values = dict(zip(made.exported.inputs, x if isinstance(x, list) else [x]))
    for node in made.exported.graph.nodes:
        if node.op == "placeholder":
            values.setdefault(node, made.constants.get(node.name))
        elif node.op == "call_function":
            args = [values[a] if isinstance(a, torch.fx.Node) else a for a in node.args]
            if node in made.kernels:
                kernel = made.kernels[node]
                args[1], args[2] = unpack(kernel.held[0]), kernel.held[1]
                if kernel.input_grid is not None:
                    args[0] = kernel.input_grid(args[0])
                if kernel.residual_grid is not None:
                    args[3] = kernel.residual_grid(args[3])
            values[node] = node.target(*args, **node.kwargs)
        elif node.op == "output":
            outputs = [values[n] for n in node.args[0]]
            return outputs if isinstance(x, list) else outputs[0]


class Branches(nn.Module):
    """Pairs of convolutions, one for each input: what is between the two is read as codes alone."""

    def __init__(self, geometries, acts):
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(*g) for g in geometries)
        self.last = nn.ModuleList(nn.Conv2d(g[1], 12, 1) for g in geometries)
        self.acts = acts

    def forward(self, images):
        return [b(act(a(x))) for a, b, act, x in zip(self.first, self.last, self.acts, images)]


def keep_blocks(net, outputs, share):
    """Set most blocks of a number of outputs by 4 inputs to zero."""
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups == 1:
            O, I, *kernel = conv.weight.shape
            kept = torch.rand(-(-O // outputs), -(-I // 4), *kernel) < share
            kept[0] = True
            kept = kept.repeat_interleave(outputs, 0)[:O].repeat_interleave(4, 1)[:, :I]
            conv.weight.data *= kept / max(share, 0.1) ** 0.5


def formats(made):
    """The formats of packed weights in order: dense, tiles, sell."""
    packed = [k.held[0] for k in made.kernels.values()]
    return ["dense" if p.counts is None else "tiles" if p.order is None else "sell" for p in packed]


@pytest.mark.parametrize("weights", ["dense", "sell", "tiles"])
@pytest.mark.parametrize("size", slow_except(SIZES, (1, 7, 7)), ids=str)
def test_convolutions(isa, size, weights):
    """Codes may differ by one where a sum lies between two of them; no error is larger than a few such steps."""
    torch.manual_seed(0)
    net = Branches(CONVOLUTIONS, [torch.relu] * len(CONVOLUTIONS)).eval()
    if weights != "dense":
        keep_blocks(net, 1 if weights == "sell" else 4, 0.05)
    images = [torch.randn(size[0], g[0], *size[1:]) for g in CONVOLUTIONS]
    made = rarefy.compile(net, (images,), precision="int8", calibrate=[(images,)], tune=False)
    outputs = made(images)
    assert formats(made).count(weights) >= 4  # small ones are dense, more of them with AMX
    runs, rest = divmod(steps(made).count("nhwc_conv"), 2 * len(CONVOLUTIONS))
    assert runs > 0 and rest == 0 and "conv" not in steps(made)
    for got, codes, eager in zip(outputs, rounded(made, images), net(images)):
        assert relative_distance(got, codes) < 2e-3
        assert relative_distance(got, eager.detach()) < 0.04
    alone = made([x[-1:] for x in images])
    assert all(torch.equal(one, got[-1:]) for one, got in zip(alone, outputs))


def test_activations(isa):
    acts = [F.gelu, F.silu, F.relu6, F.hardswish, torch.sigmoid, torch.tanh, nn.Identity()]
    net = Branches([(8, 21, 3, 1, 1)] * len(acts), acts).eval()
    images = [torch.randn(2, 8, 11, 13) for _ in acts]
    made = rarefy.compile(net, (images,), precision="int8", calibrate=[(images,)], tune=False)
    for got, want in zip(made(images), rounded(made, images)):
        assert relative_distance(got, want) < 2e-3


def check_codes(net, x, step):
    """Only codes go from step to step, and outputs are those that the codes stand for, near eager's."""
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], tune=False)
    got = made(x)
    assert set(steps(made)) == {"nhwc_quantize", "nhwc_conv", step, "unpack"}
    assert relative_distance(got, rounded(made, x)) < 4e-3
    assert relative_distance(got, net(x).detach()) < 0.05
    return made


class Residual(nn.Module):
    """Residuals of both kinds: an identity and a strided projection, behind a stem with a max pool."""

    def __init__(self, channels=24):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 5, 2, 2)
        self.a, self.b = nn.Conv2d(channels, 10, 3, 1, 1), nn.Conv2d(10, channels, 1)
        self.c, self.d = nn.Conv2d(channels, 30, 3, 2, 1), nn.Conv2d(channels, 30, 1, 2)
        self.last = nn.Conv2d(30, 7, 1)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        x = (self.b(self.a(x).relu()) + x).relu()
        x = (self.c(x) + self.d(x)).relu()
        return self.last(x)


@pytest.mark.parametrize("share", [1, 0.05])
@pytest.mark.parametrize("batch", [1, 4])
def test_residuals_and_pools_stay_codes(isa, batch, share):
    torch.manual_seed(1)
    net = Residual().eval()
    if share < 1:
        keep_blocks(net, 1, share)
    made = check_codes(net, torch.randn(batch, 3, 45, 53), "nhwc_max_pool")
    assert ("sell" in formats(made)) == (share < 1)


class Depthwise(nn.Module):
    """Inverted residuals, with and without a stride, and a depthwise convolution whose output is read in fp32."""

    def __init__(self):
        super().__init__()
        self.expand, self.project = nn.Conv2d(5, 70, 1), nn.Conv2d(70, 12, 1)
        self.middle = nn.Conv2d(70, 70, 3, 1, 1, groups=70)
        self.wide, self.narrow = nn.Conv2d(12, 36, 1), nn.Conv2d(36, 12, 1)
        self.down = nn.Conv2d(36, 36, (5, 3), 2, (2, 1), groups=36, bias=False)
        self.last = nn.Conv2d(12, 12, 3, 1, 2, 2, groups=12)

    def forward(self, x):
        x = self.project(F.relu6(self.middle(F.relu6(self.expand(x)))))
        return self.last(self.narrow(F.hardswish(self.down(F.silu(self.wide(x))))))


@pytest.mark.parametrize("batch", [1, 3])
def test_depthwise_convolutions_read_codes(isa, batch):
    torch.manual_seed(2)
    made = check_codes(Depthwise().eval(), torch.randn(batch, 5, 19, 27), "nhwc_depthwise")
    assert steps(made).count("nhwc_depthwise") >= 3


class Mixed(nn.Module):
    """Values that are read as codes and in fp32, by operators and as an output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 18, 3, 1, 1), nn.Conv2d(18, 18, 3, 1, 1), nn.Conv2d(18, 9, 1)
        self.depthwise = nn.Conv2d(18, 18, 3, 1, 1, groups=18)

    def forward(self, x):
        x = self.a(x).relu()
        pooled = F.max_pool2d(x, 2)
        y = self.c(pooled) + pooled.mean((1, 2, 3), keepdim=True)
        return self.b(x) * torch.sigmoid(self.depthwise(x)), x, y


def test_values_that_are_also_read_in_fp32(isa):
    net, x = Mixed().eval(), torch.randn(2, 3, 14, 15)
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], tune=False)
    for got, want in zip(made(x), net(x)):
        assert relative_distance(got, want.detach()) < 0.03


def test_outputs_saturate_and_nan_is_contained(isa):
    net, x = nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 5, 1)).eval(), torch.randn(1, 8, 9, 9)
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], tune=False)
    assert relative_distance(made(1e6 * x), made(1e9 * x)) < 1e-6
    assert bool(torch.isfinite(made(torch.full_like(x, 3e38))).all())


def test_scales_are_saved(tmp_path):
    x = torch.randn(2, 3, 40, 40)
    made = rarefy.compile(Residual().eval(), x, precision="int8", calibrate=[x])
    rarefy.save(made, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out")
    assert grids_of(loaded) == grids_of(made) and any(r is not None for _, r in grids_of(made).values())
    assert torch.equal(loaded(x), made(x))


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_weights_are_in_blocks(geometry):
    """Every code is at its place: the blocks of an output, put back in order, are its weight."""
    inputs, outputs, kernel, _, _, dilation = geometry
    weight = nn.Conv2d(inputs, outputs, kernel).weight.detach()
    dilation = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    packed = pack_conv(weight, "int8", dilation=dilation, dense=True)
    nhwc = pack_nhwc(packed)
    codes = nhwc.values.permute(0, 3, 1, 2).contiguous().view(torch.int8).flatten(0, 1)[:outputs].flatten(1)
    used = [codes[:, 64 * b : 64 * b + 4 * n] for b, n in enumerate(nhwc.block_lanes())]
    rows, columns = weight.shape[2:]
    want = (unpack(packed) / packed.scales[:outputs, None, None, None]).round().permute(0, 2, 3, 1)
    want = F.pad(want, (0, -inputs % 4)).flatten(1)
    assert torch.equal(torch.cat(used, 1).float(), want)
    assert want.shape[1] == rows * columns * -(-inputs // 4) * 4
