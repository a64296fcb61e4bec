"""Linear layers and convolutions in 16-bit integers: exact sums, whatever the numbers, and what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.marks import slow_case
from rarefy.common.errors import FormatError, ModelError
from rarefy.compiler import kernel_selection, ops
from rarefy.compiler.executor import Compiled
from rarefy.model.compare import relative_distance
from rarefy.runtime.int16_codes import int16_codes
from rarefy.runtime.kernel import Kernel, can_group
from rarefy.runtime.packed_formats import (
    INT16_COLUMNS,
    MAX_INT16_INPUTS,
    MAX_INT16_SUM,
    Dense,
    Sell,
    Tiles,
    skips_zeros,
)
from rarefy.runtime.packing import pack_bitmask, pack_csr, pack_dense, pack_sell, pack_tiles, unpack
from rarefy.runtime.reference import INT16_INPUT_STEPS


@pytest.fixture(autouse=True)
def small_convolutions_too(monkeypatch, request):
    """Kernels are tested on small convolutions too, which the compiler leaves in fp32."""
    if request.node.originalname != "test_convolutions_that_stay_in_fp32":
        monkeypatch.setattr(kernel_selection, "MIN_INT16_TAPS", 1)


def exact(layer: nn.Module, compiled: Compiled, x: torch.Tensor) -> torch.Tensor:
    """Return what a layer's packed weight makes of rows of inputs, by sums of integers of 64 bits."""
    (packed,) = (k.held[0] for k in compiled.kernels.values())
    weight, scales = unpack(replace(packed, scales=None)).flatten(1), packed.scales[: len(layer.weight)]
    step = x.abs().amax(-1, keepdim=True) / INT16_INPUT_STEPS
    step = torch.where(step > 0, step, 1.0)
    sums = (x * (1 / step)).round().long() @ weight.long().T
    return sums.double() * step * scales + (0 if layer.bias is None else layer.bias.detach())


@pytest.mark.parametrize("tokens", [slow_case(1), 3, slow_case(70)])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (7, 5), (384, 130), (1537, 66)])
def test_products_equal_sums_of_integers(isa, inputs, outputs, zeros, tokens):
    torch.manual_seed(inputs)
    layer = nn.Linear(inputs, outputs).eval()
    layer.weight.data[torch.rand(layer.weight.shape) < zeros] = 0
    x = torch.randn(tokens, inputs)
    compiled = rarefy.compile(nn.Sequential(layer).eval(), x, precision="int16", tune=False)
    want, got = exact(layer, compiled, x), compiled(x).double()
    assert float((got - want).abs().max()) <= 5e-5 * float(want.abs().max())  # an input between two steps
    assert relative_distance(got, layer(x).detach().double()) < (2e-3 if inputs > 1000 else 1e-3)


GEOMETRIES = [  # inputs, outputs, kernel, stride, padding, dilation, size
    (64, 64, 1, 1, 0, 1, (14, 14)),
    (96, 24, 1, 1, 0, 1, (5, 31)),
    (64, 130, 1, 2, 0, 1, (9, 9)),
    (3, 32, 3, 2, 1, 1, (33, 20)),
    (40, 64, 5, 1, 2, 1, (12, 7)),
    (33, 48, 3, 1, 2, 2, (15, 15)),
    (320, 24, (1, 3), (1, 2), (0, 1), 1, (3, 8)),
    (16, 40, 4, 1, 0, 1, (4, 4)),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_round_the_inputs_of_each_output_together(isa, geometry, batch):
    torch.manual_seed(0)
    inputs, outputs, kernel, stride, padding, dilation, size = geometry
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation)
    x = torch.randn(batch, inputs, *size)
    compiled = rarefy.compile(nn.Sequential(layer).eval(), x, precision="int16", tune=False)
    assert [k.held[0].kind for k in compiled.kernels.values()] == ["int16"]
    rows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    got, plain = compiled(x).double(), layer(x).detach().double()
    want = exact(layer, compiled, rows).mT.reshape(plain.shape)
    assert float((got - want).abs().max()) <= 5e-5 * float(want.abs().max())
    assert relative_distance(got, plain) < 2e-3


class Block(nn.Module):
    """A residual block whose images are read by convolutions, a pool and a concatenation."""

    def __init__(self, act):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 32, 3, 2, 1), act
        self.up, self.down = nn.Conv2d(32, 96, 1), nn.Conv2d(96, 32, 1)
        self.depthwise, self.last = nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.Conv2d(64, 40, 1)

    def forward(self, x):
        x = self.act(self.stem(x))
        y = x + self.down(self.act(self.depthwise(self.act(self.up(x)))))
        z = torch.cat([F.max_pool2d(y, 2), F.max_pool2d(x, 2)], 1)
        return self.last(z).mean((2, 3))


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU(), nn.Identity()], ids=lambda a: type(a).__name__)
def test_networks_of_convolutions(isa, act, tmp_path):
    torch.manual_seed(0)
    net, x = Block(act).eval(), torch.randn(2, 3, 30, 26)
    compiled = rarefy.compile(net, x, precision="int16", tune=False)
    with torch.no_grad():
        for batch in (x, torch.randn(5, 3, 30, 26)):
            assert relative_distance(compiled(batch), net(batch)) < 1e-3
    rarefy.save(compiled, tmp_path / "out")
    assert torch.equal(rarefy.load(tmp_path / "out")(x), compiled(x))
    assert [k.held[0].kind for k in compiled.kernels.values()].count("int16") == 4


def test_odd_numbers_in_images(isa):
    """Of NaN and infinity, only the outputs that read them."""
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 40, 1).eval()
    x = torch.randn(2, 32, 9, 9)
    x[0, :, 0, 0], x[0, :, 0, 1], x[1, 3, 4, 5], x[1, 7, 0, 0] = 0, 1e-42, float("nan"), float("inf")
    got = rarefy.compile(nn.Sequential(layer).eval(), torch.randn(2, 32, 9, 9), precision="int16", tune=False)(x)
    wrong = got.isnan().any(1)
    assert wrong[1, 4, 5] and wrong[1, 0, 0] and int(wrong.sum()) == 2
    torch.testing.assert_close(got[0, :, 0, :2], layer.bias.detach()[:, None].expand(40, 2), rtol=0, atol=1e-6)


def test_convolutions_that_stay_in_fp32():
    """With few outputs or inputs, in groups, on Winograd's algorithm, or with zeros that are skipped."""
    sparse = nn.Conv2d(64, 64, 1)
    sparse.weight.data[torch.rand(sparse.weight.shape) < 0.9] = 0
    layers = [
        nn.Conv2d(64, 16, 1),
        nn.Conv2d(16, 64, 3, padding=1),
        nn.Conv2d(64, 128, 1, groups=2),
        nn.Conv2d(128, 32, 1),
        nn.Conv2d(32, 64, 1),
        sparse,
    ]
    net, x = nn.Sequential(*layers).eval(), torch.randn(2, 64, 24, 24)
    compiled = rarefy.compile(net, x, precision="int16", tune=False)
    kinds = [k.held[0].kind for k in compiled.kernels.values()]
    assert kinds.count("int16") == 1 and set(kinds) == {"fp32", "int16"}
    assert relative_distance(compiled(x), net(x).detach()) < 1e-3


@pytest.mark.parametrize("inputs", [2, 512, INT16_COLUMNS, INT16_COLUMNS + 1, 2 * INT16_COLUMNS, 5000])
@pytest.mark.parametrize("sign", [1, slow_case(-1)])
@pytest.mark.parametrize("rows", [2, slow_case(65)])
def test_the_largest_sums_do_not_overflow(isa, inputs, sign, rows):
    """Equal weights and inputs have the largest sum for their sizes, which random numbers never show."""
    layer = nn.Linear(inputs, 20, bias=False).eval()
    layer.weight.data.fill_(0.7 * sign)
    x = torch.full((rows, inputs), 3.0)
    got = rarefy.compile(nn.Sequential(layer).eval(), x, precision="int16", tune=False)(x)
    torch.testing.assert_close(got, layer(x).detach(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_the_largest_sums_of_sparse_weights(isa, zeros):
    layer = nn.Linear(MAX_INT16_INPUTS, 130, bias=False).eval()
    layer.weight.data = 0.7 * (torch.rand(130, MAX_INT16_INPUTS) >= zeros)
    x = torch.full((65, MAX_INT16_INPUTS), -3.0)
    compiled = rarefy.compile(nn.Sequential(layer).eval(), x, precision="int16", tune=False)
    assert skips_zeros(next(iter(compiled.kernels.values())).held[0]) == (zeros > 0)
    torch.testing.assert_close(compiled(x), layer(x).detach(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("inputs", [768, 1536, 3072, 4096, 8192])
def test_closer_than_bf16_at_any_width(inputs):
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, 40), torch.randn(70, inputs)
    torch.nn.init.normal_(layer.weight)
    far = {
        p: relative_distance(
            rarefy.compile(nn.Sequential(layer).eval(), x, precision=p, tune=False)(x), layer(x).detach()
        )
        for p in ("bf16", "int16")
    }
    assert far["int16"] < 0.6 * far["bf16"]


@pytest.mark.parametrize("weights, inputs", [(1e-12, 1e-20), (1e-20, 1e-12), (1e12, 1e12), (1e-30, 1e15)])
def test_sizes_of_numbers(isa, weights, inputs):
    """The product of both scales alone would be denormal."""
    for layer, shape in ((nn.Linear(40, 30, bias=False), (66, 40)), (nn.Conv2d(40, 30, 1, bias=False), (2, 40, 8, 8))):
        layer.weight.data *= weights
        x = torch.randn(shape) * inputs
        got = rarefy.compile(nn.Sequential(layer).eval(), x, precision="int16", tune=False)(x)
        assert relative_distance(got, layer(x).detach()) < 1e-3


def test_odd_numbers(isa):
    """Zeros, denormal numbers, and infinite ones, which stay in their row."""
    layer = nn.Linear(40, 30).eval()
    layer.weight.data[3] = 0
    layer.weight.data[4] = 1e-41
    x = torch.randn(66, 40)
    x[1], x[2], x[3, 5] = 0, 1e-42, float("inf")
    got = rarefy.compile(nn.Sequential(layer).eval(), torch.randn(66, 40), precision="int16", tune=False)(x)
    want = layer(x).detach()
    rest = [i for i in range(66) if i != 3]
    assert relative_distance(got[rest], want[rest]) < 1e-3
    assert got[3].isnan().all() and not got[rest].isnan().any()
    torch.testing.assert_close(got[:3, 3:5], layer.bias.detach()[3:5].expand(3, 2), rtol=0, atol=1e-6)


def test_codes_use_what_sums_allow():
    weight = torch.randn(6, 300)
    codes, scales = int16_codes(weight, 300)
    sums = codes.long().abs().sum(1)
    assert (sums <= MAX_INT16_SUM).all() and (sums > 0.99 * (MAX_INT16_SUM - 151)).all()
    assert ((codes * scales[:, None] - weight).abs() <= 0.501 * scales[:, None]).all()
    few, _ = int16_codes(weight[:, :5], 300)
    assert (few.abs().amax(1) == 32767).all()
    parts, steps = int16_codes(weight, 100)
    assert (steps < scales).all() and max(
        int(p.long().abs().sum(1).max()) for p in parts.split(100, 1)
    ) <= MAX_INT16_SUM


def test_between_bf16_and_fp32_on_a_transformer(isa):
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(64, 4, 256, activation="gelu", batch_first=True).eval(), torch.randn(3, 20, 64)
    with torch.no_grad():
        far = {
            p: relative_distance(rarefy.compile(net, x, precision=p, tune=False)(x), net(x))
            for p in ("bf16", "int16", "int8")
        }
    assert 1e-6 < far["int16"] < far["bf16"] / 3 < far["int8"] / 3


def test_attention_stays_in_fp32():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            y = self.stem(x).flatten(2).mT
            return self.attend(y, y, y, need_weights=False)[0]

    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    compiled = rarefy.compile(net, x, precision="int16", tune=False)
    kinds = {(n.target, k.held[0].kind) for n, k in compiled.kernels.items()}
    assert kinds == {(ops.linear, "int16"), (ops.conv2d, "fp32")}
    assert relative_distance(compiled(x), net(x).detach()) < 1e-3


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 40)).eval()
    net[2].weight.data[torch.rand(40, 128) < 0.8] = 0
    x = torch.randn(9, 96)
    compiled = rarefy.compile(net, x, precision="int16", tune=False)
    rarefy.save(compiled, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out")
    assert torch.equal(loaded(x), compiled(x))
    assert [k.held[0].kind for k in loaded.kernels.values()] == ["int16", "int16"]
    assert {type(k.held[0]) for k in loaded.kernels.values()} in ({Dense, Sell}, {Dense, Tiles})


def test_wide_layers_multiply_their_zeros():
    layer = nn.Linear(MAX_INT16_INPUTS + 1, 40)
    layer.weight.data[torch.rand(layer.weight.shape) < 0.9] = 0
    x = torch.randn(70, MAX_INT16_INPUTS + 1)
    compiled = rarefy.compile(nn.Sequential(layer).eval(), x, precision="int16")
    assert not any(skips_zeros(k.held[0]) for k in compiled.kernels.values())
    assert relative_distance(compiled(x), layer(x).detach()) < 2e-3
    for pack in (pack_tiles, pack_sell):
        with pytest.raises(FormatError, match="2049 inputs leave weights in int16 few steps: at most 2048"):
            pack(layer.weight, "int16")


def test_where_nothing_runs_in_16_bits():
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(
        ModelError, match="precision='int16' has no effect: Conv2d has no linear layer and no 2D convolution"
    ):
        rarefy.compile(nn.Conv2d(3, 4, 3).eval(), x, precision="int16")
    net = nn.Sequential(nn.Linear(8, 8)).eval()
    with pytest.raises(ModelError, match="no linear layer .*, or ignore= or per_layer= names all of them"):
        rarefy.compile(net, torch.randn(2, 8), precision="int16", ignore="0")
    with pytest.raises(ModelError, match="calibrate= finds the scales of int8"):
        rarefy.compile(net, torch.randn(2, 8), precision="int16", calibrate=[torch.randn(2, 8)])


@pytest.mark.parametrize("pack", [pack_dense, pack_tiles, pack_sell])
def test_packed_weights_are_checked(pack):
    weight = torch.randn(40, 64) * (torch.rand(40, 64) < 0.5)
    packed = pack(weight, "int16")
    assert relative_distance(unpack(packed), weight) < 1e-3
    kernel = Kernel(packed)
    assert not can_group([kernel, kernel])
    with pytest.raises(FormatError, match="run in compiled programs only"):
        kernel.run(torch.randn(2, 64))
    large = packed.values.clone()
    large.view(torch.int16).fill_(-32768)
    with pytest.raises(
        FormatError, match="sums of 64 int16 products do not fit 32 bits" if pack is pack_dense else "damaged"
    ):
        Kernel(replace(packed, values=large))
    with pytest.raises(FormatError, match="scales: the kernels expect"):
        Kernel(replace(packed, scales=None))


@pytest.mark.parametrize("pack", [pack_bitmask, pack_csr])
def test_formats_for_single_inputs_have_no_int16(pack):
    with pytest.raises(FormatError, match="int16"):
        Kernel(pack(torch.randn(8, 8), "int16"))


def test_columns_that_occur_twice_are_summed():
    """A file could name a column twice: kernels add both products."""
    packed = pack_tiles(torch.full((4, 8), 1.0), "int16")
    columns, counts = packed.columns.repeat_interleave(2), packed.counts * 2
    twice = replace(packed, columns=columns, counts=counts, values=packed.values.repeat(2))
    with pytest.raises(FormatError, match="damaged"):
        Kernel(twice)
    Kernel(packed)


def test_quantized_models_keep_their_codes():
    """Layers with static scales stay in 8 bits, whatever the precision."""
    net, x = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1)).eval(), torch.randn(2, 3, 9, 9)
    rarefy.quantize_(net, "int8", activations="int8-static", data=[x], ignore=None)
    plain, compiled = (rarefy.compile(net, x, precision=p, tune=False) for p in (None, "int16"))
    assert [k.held[0].kind for k in compiled.kernels.values()] == ["int8", "int8"]
    assert torch.equal(compiled(x), plain(x))
