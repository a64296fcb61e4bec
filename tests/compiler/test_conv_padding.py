"""Zeros that a model adds around an image before a convolution become the convolution's own padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import far
from helpers.marks import slow_except
from rarefy.model.compare import relative_distance

SIDES = [(0, 1, 0, 1), (1, 0, 2, 1), (1, 1, 1, 1), (2, 1, 0, 0), (1, 2), (0, 2, 0, 2), (0, 0, 0, 0), (6, 0, 6, 0)]


class Padded(nn.Module):
    """A convolution of an image with zeros, or something else, around it."""

    def __init__(self, conv, sides, mode="constant", value=None):
        super().__init__()
        self.conv, self.sides, self.mode, self.value = conv, sides, mode, value

    def forward(self, x):
        return F.relu(self.conv(F.pad(x, self.sides, self.mode, self.value)))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def taken(made):
    """Whether padding is left to no operator of its own."""
    return "pad" not in repr(made)


@pytest.mark.parametrize("sides", slow_except(SIDES, (1, 0, 2, 1), (1, 2), (6, 0, 6, 0)))
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_becomes_the_convolutions(sides, groups, stride):
    x = torch.randn(2, 8, 17, 18)
    for kernel, padding, dilation in ((3, 0, 1), (5, 1, 1), (2, 0, 1), (3, 1, 2)):
        net = Padded(nn.Conv2d(8, 8, kernel, stride, padding, dilation, groups), sides).eval()
        left, right, top, bottom = (*sides, 0, 0)[:4]
        fits = {abs(right - left), abs(bottom - top)} <= {0, dilation}  # else zeros would cost more than padding
        made = rarefy.compile(net, x, tune=False)
        want, got = net(x), made(x)
        assert got.shape == want.shape and far(want, got) < 1e-5
        assert taken(made) == fits
        in_bytes = rarefy.compile(net, x, precision="int8", calibrate=[x], tune=False)
        assert relative_distance(in_bytes(x), want) < 0.05


@pytest.mark.parametrize("how", [("constant", 1.0), ("reflect", None), ("circular", None)])
def test_other_padding_stays(how):
    net, x = Padded(nn.Conv2d(4, 4, 3), (1, 1, 1, 1), *how).eval(), torch.randn(2, 4, 9, 9)
    assert far(net(x), rarefy.compile(net, x, tune=False)(x)) < 1e-5


def test_cropping_stays():
    net, x = Padded(nn.Conv2d(4, 4, 3), (-1, 1, 0, -2)).eval(), torch.randn(2, 4, 9, 9)
    assert far(net(x), rarefy.compile(net, x, tune=False)(x)) < 1e-5


def test_an_image_that_others_read_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, 2)

        def forward(self, x):
            y = F.pad(x, (0, 1, 0, 1))
            return self.conv(y), y.sum((2, 3)), self.conv(y.relu())

    net, x = Both().eval(), torch.randn(2, 4, 12, 12)
    for want, got in zip(net(x), rarefy.compile(net, x, tune=False)(x)):
        assert far(want, got) < 1e-5


def inverted_residuals():
    """Depthwise convolutions with TensorFlow's padding, as networks for phones have them."""
    same, odd = nn.ZeroPad2d(1), nn.ZeroPad2d((0, 1, 0, 1))
    return nn.Sequential(
        odd, nn.Conv2d(3, 12, 3, 2), nn.ReLU6(),
        same, nn.Conv2d(12, 12, 3, groups=12), nn.ReLU6(), nn.Conv2d(12, 8, 1),
        nn.Conv2d(8, 48, 1), nn.ReLU6(), odd, nn.Conv2d(48, 48, 3, 2, groups=48), nn.ReLU6(), nn.Conv2d(48, 5, 1),
    ).eval()  # fmt: skip


def test_static_scales_and_padding(tmp_path):
    net, x = inverted_residuals(), torch.randn(2, 3, 32, 32)
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], tune=False)
    names = [row.operator for row in made.profile(x).rows]
    assert names.count("nhwc_depthwise") == 2 and names.count("nhwc_quantize") == 1
    assert taken(made) and relative_distance(made(x), net(x)) < 0.05
    rarefy.save(made, tmp_path / "net")
    assert torch.equal(rarefy.load(tmp_path / "net")(x), made(x))


def test_values_that_the_model_rounds_are_padded_after_it():
    net, x = inverted_residuals(), torch.randn(2, 3, 32, 32)
    rarefy.quantize_(net, weights="int8", activations="int8-static", data=[x])
    made = rarefy.compile(net, x, tune=False)
    assert taken(made) and relative_distance(made(x), net(x)) < 0.02
