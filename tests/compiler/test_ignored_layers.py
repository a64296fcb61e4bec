"""Layers that stay in fp32 beside others in 8 bits or bf16, against torch on the numbers that the codes stand for."""

import random

import pytest
import torch
import torch.nn.functional as F
from test_nhwc import Residual, rounded
from torch import nn

import rarefy
from helpers.compile_models import steps
from helpers.marks import slow_except
from rarefy.common.errors import ModelError, SelectorError
from rarefy.compiler import ops
from rarefy.compiler.kernel_selection import fits_int16
from rarefy.model.activation_quant import ActivationQuant
from rarefy.model.compare import relative_distance
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


class Mobile(nn.Module):
    """Inverted residuals with depthwise convolutions, padded on one side where they stride, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 13, 3, 2, 1)
        self.expand, self.deep, self.project = (
            nn.Conv2d(13, 70, 1),
            nn.Conv2d(70, 70, 3, 1, 1, 1, 70),
            nn.Conv2d(70, 13, 1),
        )
        self.expand2, self.deep2 = nn.Conv2d(13, 66, 1), nn.Conv2d(66, 66, 5, 2, 0, 1, 66)
        self.project2, self.head = nn.Conv2d(66, 26, 1), nn.Linear(26, 5)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        x = self.project(F.relu6(self.deep(F.relu6(self.expand(x))))) + x
        x = F.silu(self.deep2(F.pad(F.silu(self.expand2(x)), (1, 2, 1, 2))))
        return self.head(F.gelu(self.project2(x)).mean((2, 3)))


def weighted(net):
    return [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def kinds(made):
    """The precision of each layer that has a kernel."""
    return {made.exported.layers[n]: k.held[0].kind for n, k in made.kernels.items()}


@pytest.mark.parametrize("seed", slow_except(range(12), 0, 1, 2, 3))
@pytest.mark.parametrize("make", [Mobile, Residual])
def test_any_layers_stay_in_fp32(isa, make, seed):
    torch.manual_seed(seed)
    net, x = make().eval(), torch.randn(2, 3, 45, 53)
    names = weighted(net)
    ignored = random.Random(seed).sample(names, 1 + seed % (len(names) - 1))
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], ignore=ignored, tune=False)
    for layer, kind in kinds(made).items():
        assert kind == ("fp32" if layer in ignored or layer.startswith("deep") else "int8")
    got = made(x)
    assert not {"pack", "pad_planes", "conv"} & set(steps(made))
    assert relative_distance(got, rounded(made, x)) < 1e-2  # codes may differ by one where a sum lies between two
    assert relative_distance(got, net(x).detach()) < 0.1
    assert relative_distance(made(x[1:]), got[1:]) < 1e-5


@pytest.mark.parametrize("seed", slow_except(range(12), 0, 1, 2))
@pytest.mark.parametrize("make", [Mobile, Residual])
def test_each_layer_in_a_precision_of_its_own(isa, make, seed):
    """int16 convolutions of one group, of enough inputs and outputs; bf16 ones and depthwise ones stay in fp32."""
    torch.manual_seed(seed)
    net, x = make().eval(), torch.randn(2, 3, 45, 53)
    draw = random.Random(seed)
    own = {n: draw.choice(["fp32", "bf16", "int16"]) for n in draw.sample(weighted(net), 3)}
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], per_layer=own, tune=False)
    for layer, kind in kinds(made).items():
        module, wanted = net.get_submodule(layer), own.get(layer, "int8")
        if isinstance(module, nn.Conv2d) and wanted in ("bf16", "int16"):
            fits = wanted == "int16" and fits_int16(module.weight, module.groups)
            wanted = "int16" if fits else "fp32"
        assert kind == wanted or (layer.startswith("deep") and kind == "fp32")
    in_fp32 = rarefy.compile(net, x, precision="int8", calibrate=[x], ignore=[*own], tune=False)
    got = made(x)
    assert relative_distance(got, in_fp32(x)) < 2e-2  # codes of later layers may differ by one
    assert relative_distance(got, net(x).detach()) < 0.1
    assert relative_distance(made(x[1:]), got[1:]) < 1e-5


def test_a_precision_for_one_layer_alone(isa):
    """The other layers are exact; without a precision for the whole model too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 96), nn.GELU(), nn.Linear(96, 200), nn.ReLU(), nn.Linear(200, 8)).eval()
    x = torch.randn(5, 256)
    for precision in ("bf16", "int16", "int8"):
        made = rarefy.compile(net, x, per_layer={"2": precision}, tune=False)
        assert kinds(made) == {"0": "fp32", "2": precision, "4": "fp32"}
        want = net[4](net[3](rarefy.compile(net[2], net[1](net[0](x)).detach(), precision=precision, tune=False)(
            net[1](net[0](x)).detach())))  # fmt: skip
        assert relative_distance(made(x), want.detach()) < 1e-4
    last = rarefy.compile(net, x, precision="bf16", per_layer={"*": "int8", "Linear": "fp32", "4": "int16"}, tune=False)
    assert kinds(last) == {"0": "fp32", "2": "fp32", "4": "int16"}


@pytest.mark.parametrize("precision", ["bf16", "int16"])
def test_a_linear_layer_on_a_flattened_image_stays_one(isa, precision):
    """As a convolution over the whole image it would have no kernel in 16 bits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24 * 16, 64), nn.ReLU(),
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5),
    ).eval()  # fmt: skip
    x = torch.randn(6, 3, 16, 16)
    for own in ({"4": precision}, {"6": precision}, {"4": precision, "8": precision}):
        made = rarefy.compile(net, x, precision="int8", calibrate=[x], per_layer=own, tune=False)
        assert {n: kinds(made)[n] for n in own} == own and {*kinds(made).values()} == {"int8", precision}
        in_fp32 = rarefy.compile(net, x, precision="int8", calibrate=[x], ignore=[*own], tune=False)
        assert relative_distance(made(x), in_fp32(x)) < 2e-2
        assert not any("per_layer" in note for note in made.exported.notes)


@pytest.mark.parametrize(("options", "kind"), [({"ignore": "0"}, "fp32"), ({"per_layer": {"0": "int16"}}, "int16")])
def test_a_module_that_is_registered_twice(options, kind):
    twice = nn.Linear(64, 64)
    net, x = nn.Sequential(twice, nn.ReLU(), twice, nn.Linear(64, 64)).eval(), torch.randn(4, 64)
    made = rarefy.compile(net, x, precision="int8", tune=False, **options)
    kinds = {made.exported.layers[n]: k.held[0].kind for n, k in made.kernels.items()}
    assert kinds.pop("3") == "int8" and {*kinds.values()} == {kind}


def test_layers_without_a_kernel_are_named():
    net, x = Mobile().eval(), torch.randn(1, 3, 45, 53)
    made = rarefy.compile(net, x, precision="int8", per_layer={"deep*": "int16", "head": "bf16"}, tune=False)
    assert "per_layer: these layers have no kernel in 16 bits and run in fp32: deep, deep2" in str(made)
    made = rarefy.compile(net, x, precision="int8", per_layer={"*": "bf16", "project": "int8"}, tune=False)
    assert "in fp32: deep, deep2, expand, expand2 and 2 more" in str(made)


def test_some_layers_in_calibrated_8_bits(isa):
    """The others are exact, depthwise convolutions too."""
    torch.manual_seed(0)
    net, x = Mobile().eval(), torch.randn(2, 3, 45, 53)
    own = {"expand": "int8", "deep": "int8"}
    made = rarefy.compile(net, x, calibrate=[x], per_layer=own, tune=False)
    assert {n for n, kind in kinds(made).items() if kind == "int8"} == {"expand"}
    rounded_inputs = [n for n in made.exported.graph.nodes if n.target is ops.fake_quantize]
    assert rounded_inputs and relative_distance(made(x), rounded(made, x)) < 1e-4
    assert 1e-6 < relative_distance(made(x), net(x).detach()) < 1e-3
    with pytest.raises(ModelError, match="calibrate= finds the scales of int8: pass precision='int8' with it"):
        rarefy.compile(net, x, calibrate=[x], per_layer={"expand": "int16"})


def test_the_last_selector_applies():
    net, x = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80)).eval(), torch.randn(2, 80)
    made = rarefy.compile(net, x, per_layer={"0": "int16", "*": "bf16"}, tune=False)
    assert kinds(made) == {"0": "bf16", "1": "bf16"}
    assert kinds(rarefy.compile(net, x, precision="int8", per_layer={}, tune=False)) == {"0": "int8", "1": "int8"}


def test_attention_follows_the_precision_of_the_model():
    """Its layer has weights of its own, which are linear layers."""
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu").eval(), torch.randn(2, 9, 64)
    made = rarefy.compile(net, x, per_layer={"MultiheadAttention": "int16"}, tune=False)
    precisions = [n.args[-1] for n in made.exported.graph.nodes if n.target is ops.attention]
    assert precisions == [None] and relative_distance(made(x), net(x).detach()) < 1e-3


@pytest.mark.parametrize("ignored", [["0", "2"], ["1"], ["1", "2"]])
def test_images_change_their_kind_on_the_way(isa, ignored):
    """A convolution writes codes or numbers as the next one reads them: nothing but the input is converted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 37, 3, 1, 1), nn.Conv2d(37, 70, 1), nn.Conv2d(70, 9, 3, 2, 1)).eval()
    x = torch.randn(2, 3, 21, 30)
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], ignore=ignored, tune=False)
    assert relative_distance(made(x), rounded(made, x)) < 4e-3
    assert steps(made) == ["nhwc_quantize", "nhwc_conv", "nhwc_conv", "nhwc_conv", "unpack"]


def test_one_value_read_as_codes_and_as_numbers(isa):
    """The second kind is made out of the first one."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 67, 3, 1, 1), nn.Conv2d(67, 8, 3, 1, 1), nn.Conv2d(67, 8, 1)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    net, x = Two().eval(), torch.randn(3, 3, 17, 19)
    for ignored in ("a", "b"):
        made = rarefy.compile(net, x, precision="int8", calibrate=[x], ignore=ignored, tune=False)
        outputs = made(x)
        assert sorted(steps(made)) == sorted(["nhwc_quantize"] * 2 + ["nhwc_conv"] * 3 + ["unpack"] * 2)
        for got, want in zip(outputs, net(x)):
            assert relative_distance(got, want.detach()) < 0.03
        exact = dict(zip("ab", zip(outputs, net(x))))[ignored]
        assert relative_distance(exact[0], exact[1].detach()) < 0.02


@pytest.mark.parametrize("groups", [1, 4])
def test_inputs_of_the_model_are_read_as_they_are(isa, groups):
    """A layer in fp32 reads numbers, not the codes of a layer in 8 bits that reads the same image."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 32, 3), nn.Conv2d(16, 32, 3, groups=groups)

        def forward(self, x):
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    net, x = Two().eval(), torch.randn(2, 16, 12, 14)
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], ignore="b", tune=False)
    for y in (x, 5 * x):  # larger values than those of the calibration saturate as codes
        assert relative_distance(made(y)[1], net(y)[1].detach()) < 1e-5


@pytest.mark.parametrize("ignored", ["a", "b"])
def test_a_rounded_value_behind_a_pool_read_in_both_kinds(isa, ignored):
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 9, 1), nn.Conv2d(8, 9, 3)
            self.grid = ActivationQuant(8, 0.02, 3)

        def forward(self, x):
            x = self.grid(F.max_pool2d(self.stem(x).relu(), 2))
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    net, x = Rounded().eval(), torch.randn(2, 3, 16, 18)
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], ignore=ignored, tune=False)
    for got, want in zip(made(x), net(x)):
        assert relative_distance(got, want.detach()) < 0.05


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_linear_layers(precision):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 8)).eval()
    net[2].weight.data[:, 3] *= 300  # one large input, which 8 bits for all of them lose
    x = torch.randn(5, 64)
    far = relative_distance(rarefy.compile(net, x, precision=precision, tune=False)(x), net(x).detach())
    made = rarefy.compile(net, x, precision=precision, ignore="2", tune=False)
    assert kinds(made) == {"0": precision, "2": "fp32", "4": precision}
    assert relative_distance(made(x), net(x).detach()) < far
    whole = rarefy.compile(net, x, tune=False)
    both = (
        rarefy.compile(net, x, precision=precision, ignore=["0", "2", "re:4"], tune=False)
        if precision == "bf16"
        else whole
    )
    assert torch.equal(both(x), whole(x))


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net, x = Mobile().eval(), torch.randn(2, 3, 45, 53)
    own = {"expand2": "int16", "project2": "int16", "head": "bf16"}
    made = rarefy.compile(
        net, x, precision="int8", calibrate=[x], ignore=["deep", "project"], per_layer=own, tune=False
    )
    assert kinds(made) | own | {"expand2": "fp32"} == kinds(made)  # too few inputs for int16
    rarefy.save(made, tmp_path / "m")
    assert torch.equal(rarefy.load(tmp_path / "m")(x), made(x))


def test_embeddings_stay_in_fp32():
    net = nn.Sequential(nn.Embedding(40_000, 64), nn.Linear(64, 32)).eval()
    ids = torch.randint(0, 40_000, (2, 7))
    made = rarefy.compile(net, ids, precision="int8", ignore="0", tune=False)
    packed = rarefy.compile(net, ids, precision="int8", tune=False)
    assert made.weight_bytes() > 3 * packed.weight_bytes()
    with torch.no_grad():
        assert relative_distance(made(ids), net(ids)) < 0.02


def test_what_cannot_be_ignored():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    with pytest.raises(
        ModelError,
        match=r"ignore= and per_layer= name layers that stay in fp32, .*: pass precision='int8', 'int16' or 'bf16'",
    ):
        rarefy.compile(net, x, ignore="0")
    with pytest.raises(SelectorError, match="ignore: '7' matches no layer"):
        rarefy.compile(net, x, precision="int8", ignore="7")
    with pytest.raises(SelectorError, match="per_layer: '7' matches no layer"):
        rarefy.compile(net, x, precision="int8", per_layer={"7": "bf16"})
    with pytest.raises(ModelError, match=r"per_layer: expected precisions by layer, .*got \['0'\]"):
        rarefy.compile(net, x, precision="int8", per_layer=["0"])
    with pytest.raises(ModelError, match="per_layer= name layers that stay in fp32, as all others do: pass precision="):
        rarefy.compile(net, x, per_layer={"0": "fp32"})
    with pytest.raises(ModelError, match=r"unknown precision 'int7'; choose from .* .per_layer of '0'"):
        rarefy.compile(net, x, precision="int8", per_layer={"0": "int7"})
    with pytest.raises(
        ModelError, match="per_layer: '0' is also in ignore, which keeps it in fp32: remove it from one"
    ):
        rarefy.compile(net, x, precision="int8", ignore="0", per_layer={"*": "bf16"})
    with pytest.raises(ModelError, match="has no effect: .*, or ignore= or per_layer= names all of them"):
        rarefy.compile(net, x, precision="int8", ignore="*")
