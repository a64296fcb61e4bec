"""Attention whose queries, keys and values come from layers in unusual layouts, against eager torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import equal
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
HEIGHT, WIDTH = 8, 12


class OnImages(nn.Module):
    """Attention between pixels, as CoAtNet has it: features of a head lie before pixels."""

    def __init__(self, kernel=1):
        super().__init__()
        self.before, self.after = nn.Conv2d(5, 24, 1), nn.Conv2d(24, 7, 3)
        self.qkv = nn.Conv2d(24, 72, kernel, padding=kernel // 2)

    def forward(self, x):
        y = self.before(x)
        batch, features, height, width = y.shape
        q, k, v = (t.transpose(-1, -2) for t in self.qkv(y).view(batch, 3, 24, -1).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, features, height, width)
        return self.after(y)


class FewerKeys(nn.Module):
    """Attention to pooled keys, as PVT has it, with a mask or without."""

    def __init__(self, masked):
        super().__init__()
        self.before, self.reduce = nn.Conv2d(5, 24, 1), nn.Conv2d(24, 24, 2, 2)
        self.q, self.kv, self.after = nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(24, 9)
        self.mask = nn.Parameter(torch.randn(3, HEIGHT * WIDTH, HEIGHT * WIDTH // 4)) if masked else None

    def forward(self, x):
        image = self.before(x)
        x = image.flatten(2).transpose(1, 2)
        batch, tokens, features = x.shape
        q = self.q(x).reshape(batch, tokens, 3, 8).permute(0, 2, 1, 3)
        reduced = self.reduce(x.permute(0, 2, 1).reshape(batch, features, HEIGHT, WIDTH))
        pooled = reduced.reshape(batch, features, -1).permute(0, 2, 1)
        k, v = self.kv(pooled).reshape(batch, -1, 2, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, None if self.mask is None else self.mask[None])
        return self.after(y.transpose(1, 2).reshape(batch, tokens, features))


class WiderValues(nn.Module):
    """Attention whose values have more features than its queries, as LeViT has it."""

    def __init__(self):
        super().__init__()
        self.before, self.qkv, self.after = nn.Conv2d(5, 24, 1), nn.Linear(24, 3 * (4 + 4 + 8)), nn.Linear(24, 7)

    def forward(self, x):
        x = self.before(x).flatten(2).transpose(1, 2)
        batch, tokens, features = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, -1).split([4, 4, 8], dim=3)
        q, k, v = (t.permute(0, 2, 1, 3) for t in qkv)
        return self.after(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, features))


class WindowsAside(nn.Module):
    """Attention in windows that stay a dimension of their own, as Twins has it."""

    def __init__(self):
        super().__init__()
        self.before, self.qkv, self.after = nn.Conv2d(5, 24, 1), nn.Linear(24, 72), nn.Linear(24, 7)

    def forward(self, x):
        x = self.before(x).permute(0, 2, 3, 1)
        batch = x.shape[0]
        x = x.reshape(batch, 2, 4, 3, 4, 24).transpose(2, 3)
        q, k, v = self.qkv(x).reshape(batch, 6, 16, 3, 3, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, 2, 3, 4, 4, 24)
        return self.after(y.transpose(2, 3).reshape(batch, HEIGHT * WIDTH, 24))


class Cross(nn.Module):
    """Attention of one sequence to another one, longer or shorter."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.after = nn.Linear(24, 24), nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 9)

    def forward(self, x, memory):
        q, k, v = (
            layer(t).unflatten(2, (3, 8)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        return self.after(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "make", [OnImages, lambda: FewerKeys(False), lambda: FewerKeys(True), WiderValues, WindowsAside]
)
def test_heads_of_images(isa, make):
    net = make().eval()
    compiled = equal(net, torch.randn(2, 5, HEIGHT, WIDTH))
    assert compiled.counts()[0] == 1 and compiled.counts()[1]["attention"] == 1
    for batch in (1, 3, 9):
        x = torch.randn(batch, 5, HEIGHT, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [OnImages, lambda: FewerKeys(True)])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_heads_of_images_in_low_precision(isa, make, precision):
    net, x = make().eval(), torch.randn(9, 5, HEIGHT, WIDTH)
    compiled = rarefy.compile(net, x, precision=precision, tune=False)
    with torch.no_grad():
        assert (compiled(x) - net(x)).norm() < 0.05 * net(x).norm()


@pytest.mark.parametrize("sizes", [(2, 5, 70), (3, 70, 5), (1, 1, 4), (7, 16, 16)])
def test_more_or_fewer_keys(isa, sizes):
    batch, queries, keys = sizes
    net, x, memory = Cross().eval(), torch.randn(batch, queries, 24), torch.randn(batch, keys, 16)
    compiled = equal(net, torch.randn(2, 9, 24), torch.randn(2, 11, 16))
    assert compiled.counts()[1]["attention"] == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, memory), net(x, memory), rtol=1e-4, atol=1e-5)


def test_parts_of_a_larger_convolution_stay_in_torch():
    compiled = equal(OnImages(kernel=3).eval(), torch.randn(2, 5, HEIGHT, WIDTH))
    assert not compiled.counts()[1]["attention"]
