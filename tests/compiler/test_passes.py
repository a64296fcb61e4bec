"""What models write out becomes the engine's words, and near misses stay as they are: both equal eager."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import equal
from rarefy.compiler import ops
from rarefy.compiler.subgraph import FusedSubgraph


class Says(nn.Module):
    """Two products, and a function between them."""

    def __init__(self, f, width=24):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(width, width), nn.Linear(width, width), f
        self.gain, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.b(self.f(self, self.a(x)))


def native_ops(made):
    return [n.target for s in made.schedule if isinstance(s, FusedSubgraph) for n in s.nodes]


def compiled(net, x):
    """Compile, compare in another size, return the words and how many calls there are."""
    net = net.eval()
    made, more = rarefy.compile(net, x), torch.cat([x, x + 1, x])
    torch.testing.assert_close(made(more), net(more), rtol=1e-4, atol=1e-5)
    return native_ops(made), [i for i in made.schedule if i not in made.fixed_nodes]


def acts(f):
    """The activations of the products that a function between two of them leaves, None where there are others."""
    made = rarefy.compile(Says(f).eval(), torch.randn(2, 5, 24))
    nodes = [n for s in made.schedule if isinstance(s, FusedSubgraph) for n in s.nodes]
    compiled(Says(f), torch.randn(2, 5, 24))
    return [n.args[4] for n in nodes] if len(made.schedule) == 1 and len(nodes) == 2 else None


ROOT = math.sqrt(2 / math.pi)
WRITTEN = {
    "gelu": lambda _, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu, turned": lambda _, x: x * (0.5 * (1.0 + torch.erf(x * 0.70710678))),
    "gelu, halved": lambda _, x: x * (1 + torch.erf(x / 1.41421)) / 2,
    "gelu_tanh": lambda _, x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    "gelu_tanh, cubed": lambda _, x: x * 0.5 * (1 + torch.tanh(ROOT * (x + 0.044715 * x * x * x))),
    "gelu_tanh, factored": lambda _, x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "silu": lambda _, x: x * torch.sigmoid(x),
    "silu, quick": lambda _, x: x * torch.sigmoid(1.702 * x),
}
OTHERS = {
    "another number": lambda _, x: 0.5 * x * (1 + torch.erf(x / 1.5)),
    "another cube": lambda _, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.05 * x**3))),
    "a square": lambda _, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
    "no half": lambda _, x: x * (1 + torch.erf(x / math.sqrt(2))),
    "two more": lambda _, x: 0.5 * x * (2 + torch.erf(x / math.sqrt(2))),
    "of another": lambda m, x: 0.5 * x * (1 + torch.erf((x + m.gain) / math.sqrt(2))),
    "two of them": lambda _, x: 0.5 * x * (1 + 2 * torch.erf(x / math.sqrt(2))),
    "sigmoid of another": lambda m, x: x * torch.sigmoid(x + m.gain),
    "quicker": lambda _, x: x * torch.sigmoid(1.8 * x),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_activations_that_are_written_out(name, isa):
    assert acts(WRITTEN[name]) == [name.partition(",")[0], None]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_nearly_an_activation(name):
    assert acts(OTHERS[name]) is None


def test_an_activation_that_is_read_twice_stays_apart():
    made, _ = compiled(Says(lambda _, x: x * torch.sigmoid(1.702 * x) + x), torch.randn(2, 24))
    assert made.count(ops.linear) == 2


def norm(m, x, spread, root):
    d = x - x.mean(-1, keepdim=True)
    v = {
        "var": lambda: x.var(-1, keepdim=True, unbiased=False),
        "correction": lambda: x.var(-1, keepdim=True, correction=0),
        "d d": lambda: (d * d).mean(-1, keepdim=True),
        "pow": lambda: d.pow(2).mean(-1, keepdim=True),
    }[spread]()
    return d * torch.rsqrt(v + 1e-5) if root == "rsqrt" else d / torch.sqrt(v + 1e-5)


@pytest.mark.parametrize("root", ["sqrt", "rsqrt"])
@pytest.mark.parametrize("spread", ["var", "correction", "d d", "pow"])
@pytest.mark.parametrize("behind", [0, 1, 2])
def test_layer_norm_that_is_written_out(spread, root, behind):
    def f(m, x):
        y = norm(m, x, spread, root)
        return y if not behind else m.gain * y if behind == 1 else m.gain * y + m.bias

    made, calls = compiled(Says(f), torch.randn(2, 5, 24))
    assert made == [ops.linear, ops.norm, ops.linear] and len(calls) == 1


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5),  # n - 1
        lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-5),
        lambda m, x: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5),
        lambda m, x: (x - m.gain) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
    ],
)
def test_what_is_nearly_a_layer_norm(f):
    made, _ = compiled(Says(f), torch.randn(2, 5, 24))
    assert ops.norm not in made


@pytest.mark.parametrize("f", [lambda m, x: m.gain * x, lambda m, x: x * m.gain[None], lambda m, x: x * m.gain.relu()])
def test_scales_of_layers_go_into_products(f):
    made, calls = compiled(Says(f), torch.randn(2, 5, 24))
    assert made == [ops.linear, ops.linear] and len(calls) == 1


def test_a_scale_of_what_others_read_stays():
    compiled(Says(lambda m, x: m.gain * x + x), torch.randn(2, 5, 24))


class Threes(nn.Module):
    """Queries, keys and values of one product, and attention written out or not."""

    def __init__(self, order, out=False, scale="q", mask=None):
        super().__init__()
        self.order, self.out, self.scale, self.mask = order, out, scale, mask
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)
        if mask:
            self.bias = nn.Parameter(torch.randn(4, 9, 9) if mask == "heads" else torch.randn(1, 1, 1, 9))

    def forward(self, x):
        B, N, C = x.shape
        y = self.qkv(x)
        if self.order == "3 h":
            q, k, v = y.reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.order == "h 3":
            y = y.view(B, N, 4, 3, 8).permute(3, 0, 2, 1, 4)
            q, k, v = y[0], y[1], y[2]
        else:
            q, k, v = (t.transpose(1, 2) for t in y.reshape(B, N, 3, 4, 8).permute(2, 0, 1, 3, 4).unbind(0))
        if not self.out:
            y = nn.functional.scaled_dot_product_attention(q * 0.5, k, v)
            return self.o(y.transpose(1, 2).reshape(B, N, C))
        scores = (q * 0.3) @ k.transpose(-2, -1) if self.scale == "q" else q @ k.permute(0, 1, 3, 2) / 3
        scores = scores + self.bias if self.mask else scores
        return self.o((scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(B, N, C)) + x


@pytest.mark.parametrize(
    "how",
    [
        {"order": "3 h"}, {"order": "h 3"}, {"order": "3 n"}, {"order": "3 h", "out": True},
        {"order": "h 3", "out": True, "scale": "scores"}, {"order": "3 n", "out": True, "mask": "heads"},
        {"order": "3 h", "out": True, "mask": "keys"},
    ],
    ids=str,
)  # fmt: skip
def test_attention_of_one_product(how):
    made, calls = compiled(Threes(**how), torch.randn(2, 9, 32))
    assert made.count(ops.linear) == 4 and made.count(ops.attention) == 1 and len(calls) == 1


def test_parts_of_a_product_that_is_read_whole_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(32, 96), nn.Linear(96, 8)

        def forward(self, x):
            y = self.qkv(x)
            q, k, v = y.reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            return self.o(y), q @ k.transpose(-2, -1) @ v

    net, x = Net().eval(), torch.randn(2, 9, 32)
    for got, want in zip(rarefy.compile(net, x)(x), net(x)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Attends(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.inner, self.o = nn.MultiheadAttention(32, 4, **how), nn.Linear(32, 32)

    def forward(self, x, mask=None):
        return self.o(self.inner(x, x, x, need_weights=False, attn_mask=mask)[0])


def test_multihead_attention_is_one_call():
    made, calls = compiled(Attends(batch_first=True), torch.randn(2, 9, 32))
    assert made == [*[ops.linear] * 3, ops.attention, *[ops.linear] * 2] and len(calls) == 1


def test_multihead_attention_with_tokens_first():
    made, _ = compiled(Attends(), torch.randn(2, 9, 32))
    assert ops.attention in made


def test_multihead_attention_with_a_mask():
    net, x = Attends(batch_first=True).eval(), torch.randn(2, 9, 32)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    made = rarefy.compile(net, (x, mask))
    assert ops.attention in native_ops(made)
    torch.testing.assert_close(made(x, mask), net(x, mask), rtol=1e-4, atol=1e-5)


def test_encoder_layers_are_one_call():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
    made, calls = compiled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 9, 32))
    assert made.count(ops.attention) == 2 and len(calls) == 1


class Windows(nn.Module):
    """Words on images as rows between words on images."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        B, H, W, C = x.shape
        y = self.a(x).reshape(B, H * W, C)
        y = (y + self.b(self.c(y))).view(B, H, W, C)
        return self.a(y + x)


def test_views_between_words_go():
    made, calls = compiled(Windows(), torch.randn(2, 3, 5, 8))
    assert made.count(ops.linear) == 3 and len(calls) == 1


def test_masks_that_are_filled_are_constants():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            m = x.new_zeros(4, 8)
            m[1:3] = 2
            return self.a(x) + m + torch.ones_like(m)

    net, x = Net().eval(), torch.randn(3, 4, 8)
    made = rarefy.compile(net, x)
    assert len([i for i in made.schedule if i not in made.fixed_nodes]) <= 3
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


class NormAfterLinear(nn.Module):
    """A linear layer with a BatchNorm over batch and tokens, as LeViT has it."""

    def __init__(self, bias, affine, joins=True):
        super().__init__()
        self.a, self.b, self.joins = nn.Linear(24, 16, bias=bias), nn.Linear(16, 8), joins
        self.norm = nn.BatchNorm1d(16, affine=affine)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x):
        y = self.a(x)
        y = self.norm(y.flatten(0, 1)).reshape_as(y) if self.joins else self.norm(y)
        return self.b(torch.relu(y))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("joins", [True, False])
def test_batch_norm_after_linear(bias, affine, joins):
    net = NormAfterLinear(bias, affine, joins)
    found, calls = compiled(net, torch.randn(2, 5, 24) if joins else torch.randn(5, 24))
    assert found == [ops.linear, ops.linear] and len(calls) == 1


def test_batch_norm_of_the_batch_stays():
    net = NormAfterLinear(True, True).eval()
    net.norm.track_running_stats, net.norm.running_mean, net.norm.running_var = False, None, None
    found, calls = compiled_in_torch(net)
    assert found and calls


def compiled_in_torch(net):
    """The native operators and the number of torch calls of a model that normalizes by its batch."""
    x = torch.randn(2, 5, 24)
    made = rarefy.compile(net, x)
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)
    return native_ops(made), sum(made.counts()[2].values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [lambda y, b: y + b, lambda y, b: b + y])
def test_a_constant_behind_a_linear_layer_is_its_bias(bias, order):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 20, bias=bias), nn.Linear(20, 4)
            self.more = nn.Parameter(torch.randn(20))

        def forward(self, x):
            return self.last(F.gelu(order(self.first(x), self.more)))

    made = equal(Net().eval(), torch.randn(3, 5, 12))
    assert native_ops(made) == [ops.linear, ops.linear]
