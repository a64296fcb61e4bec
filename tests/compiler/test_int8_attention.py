"""Attention with products of codes, against the same computed slowly from the same codes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import Attends, packed_programs
from rarefy.compiler.operators.attention import product_type
from rarefy.model.compare import relative_distance
from rarefy.runtime import bindings

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.isa_if(lambda: product_type("int8") == "int8")]


class Shows(nn.Module):
    """Attention that returns what it reads too."""

    def __init__(self, heads=4, kv_heads=4, width=8, scale=None):
        super().__init__()
        self.heads, self.kv_heads, self.scale = heads, kv_heads, scale or width**-0.5
        self.q, self.k, self.v = (nn.Linear(40, n * width) for n in (heads, kv_heads, kv_heads))

    def forward(self, x, mask=None):
        q, k, v = self.q(x) * 3, self.k(x), self.v(x)
        split = [
            t.unflatten(-1, (n, -1)).transpose(1, 2)
            for t, n in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))
        ]
        how = {"scale": self.scale, "enable_gqa": self.heads != self.kv_heads}
        y = F.scaled_dot_product_attention(*split, attn_mask=mask, **how)
        return y.transpose(1, 2).flatten(2), q, k, v


def rounded(t, dim):
    """Return the numbers that int8 codes along one dimension stand for, in fp64."""
    scale = t.abs().amax(dim, keepdim=True) / 127
    return (t / scale).round().double() * scale.double()


def oracle(net, q, k, v, mask):
    """Return the attention of codes, in fp64; the weights of the softmax are codes.

    Values that leading (in blocks of 16) or trailing padding hides do not count for a scale.
    """
    q, k, v = (
        t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, net.heads), (k, net.kv_heads), (v, net.kv_heads))
    )
    k, v = (t.repeat_interleave(net.heads // net.kv_heads, 1) for t in (k, v))
    scores = rounded(q, -1) @ rounded(k, -1).transpose(-1, -2) * net.scale
    if mask is not None:
        scores = scores + mask
        if mask.shape[-2] == 1:
            last = (mask.isfinite() * torch.arange(mask.shape[-1])).amax(-1)[..., None]
            first = mask.isfinite().int().argmax(-1)[..., None] // 16 * 16
            place = torch.arange(mask.shape[-1])[:, None]
            v = v * ((place <= last) & (place >= first))
    largest = 127 if bindings.isa() == "avx2" else 255
    parts = scores.split(128, -1)  # keys that are read together: their weights relate to the largest score so far
    tops = [scores[..., : 128 * (i + 1)].amax(-1, keepdim=True) for i in range(len(parts))]
    weights = [(torch.exp(s - t) * largest).round() * torch.exp(t - tops[-1]) for s, t in zip(parts, tops)]
    weights = torch.cat(weights, -1)
    return (weights @ rounded(v, -2) / weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


SIZES = [(2, 16), (1, 5), (3, 37), (2, 64), (1, 100), (9, 128), (5, 1)]
HOWS = [
    {},
    {"kv_heads": 2},
    {"width": 5, "scale": 0.3},
    {"width": 67},
    {"scale": -0.2},
    {"heads": 1, "kv_heads": 1, "width": 32},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_equals_the_same_computed_slowly(how, size):
    net = Shows(**how).eval()
    x = torch.randn(*size, 40)
    got, *read = rarefy.compile(net, torch.randn(2, 8, 40), precision="int8", tune=False)(x)
    assert relative_distance(got, oracle(net, *read, None)) < 2e-3  # few weights fall to the other side of a half


@pytest.mark.parametrize("kind", ["keys", "queries", "heads", "added", "trailing keys", "leading keys"])
def test_masks(kind):
    B, S = 3, 90
    net, x = Shows().eval(), torch.randn(B, S, 40)
    shown = torch.rand(B, 4 if kind == "heads" else 1, S if kind in ("queries", "heads") else 1, S) < 0.7
    shown[..., 0] = True
    if kind == "trailing keys":
        shown = (torch.arange(S) < torch.tensor([1, 40, 90])[:, None])[:, None, None]
    if kind == "leading keys":
        shown = (torch.arange(S) >= torch.tensor([0, 40, 89])[:, None])[:, None, None]
    mask = torch.zeros(shown.shape).masked_fill(~shown, float("-inf")) if kind != "added" else torch.randn(B, 1, S, S)
    got, *read = rarefy.compile(net, (x, mask.expand(B, -1, S, S)), precision="int8", tune=False)(
        x, mask.expand(B, -1, S, S)
    )
    assert relative_distance(got, oracle(net, *read, mask)) < 2e-3


def test_many_keys():
    net, x = Shows(width=16).eval(), torch.randn(2, 700, 40)
    got, *read = rarefy.compile(net, torch.randn(2, 8, 40), precision="int8", tune=False)(x)
    assert relative_distance(got, oracle(net, *read, None)) < 2e-3


class Masked(nn.Module):
    """Attention under a mask of real tokens."""

    def __init__(self):
        super().__init__()
        self.one = Attends(width=16)

    def forward(self, x, attention_mask):
        return self.one(x, attention_mask.bool()[:, None, None].expand(-1, 1, x.shape[1], -1))


def test_texts_of_unequal_lengths_equal_texts_alone():
    """They begin in any column of a tile, and end in another one."""
    net, lengths = Masked().eval(), [1, 9, 40, 16, 130, 33, 64, 65]
    mask = (torch.arange(130) < torch.tensor(lengths)[:, None]).long()
    x = torch.randn(8, 130, 64)
    made = rarefy.compile(net, {"x": x, "attention_mask": mask}, precision="int8", tune=False)
    together = made(x=x, attention_mask=mask)
    assert packed_programs(made)
    for i, n in enumerate(lengths):
        alone = made(x=x[i : i + 1, :n], attention_mask=mask[i : i + 1, :n])
        assert relative_distance(together[i, :n], alone[0]) < 2e-3  # other kernels for few tokens: a code may flip
        assert relative_distance(together[i, :n], net(x[i : i + 1, :n], mask[i : i + 1, :n])[0].detach()) < 0.03


@pytest.mark.parametrize("size", [1e4, 1e5])
def test_large_scores(size):
    """Where fp32 cannot hold the difference of two scores exactly, the largest weight stays a code."""
    net, x = Shows().eval(), torch.randn(3, 40, 40)
    mask = torch.randn(3, 1, 40, 40) - size
    got, *read = rarefy.compile(net, (x, mask), precision="int8", tune=False)(x, mask)
    assert relative_distance(got, oracle(net, *read, mask)) < 1e-2


def test_causal_attention_is_in_fp32():
    """An outlier in the last token is no reason to round the values that earlier tokens read."""
    net, x = Attends(causal=True).eval(), torch.randn(2, 40, 32)
    made = rarefy.compile(net, x, precision="int8", tune=False)
    before = made(x)
    x[:, -1] *= 1000
    assert relative_distance(made(x)[:, :-1], before[:, :-1]) < 1e-6


class Scaled(Shows):
    """Attention whose queries, keys and values are multiplied by inputs."""

    def forward(self, x, a, b, c):
        q, k, v = (
            (f(x) * s).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, s in ((self.q, a), (self.k, b), (self.v, c))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("place", range(3), ids="qkv")
def test_nan_reaches_what_reads_it(place):
    net, x, factors = Scaled(width=16).eval(), torch.randn(2, 50, 40), list(torch.ones(3, 2, 50, 64))
    made = rarefy.compile(net, (x, *factors), precision="int8", tune=False)
    factors[place][1, 30, 17] = float("nan")  # one token, a feature of the second head
    wrong = made(x, *factors).isnan()
    seen = {0: (1, 30, slice(16, 32)), 1: (1, slice(None), slice(16, 32)), 2: (1, slice(None), 17)}[place]
    assert wrong[seen].all() and wrong.sum() == wrong[seen].numel()
