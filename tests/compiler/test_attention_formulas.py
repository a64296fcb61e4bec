"""Attention, rotary embeddings and RMSNorm as exporters write them out, against eager torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import equal
from helpers.marks import slow_except
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
TOKENS, HEADS, HEAD_DIM = 11, 4, 6
WIDTH = HEADS * HEAD_DIM


def counts(compiled):
    return compiled.counts()[1]


class Attention(nn.Module):
    """Causal attention in elementary operators, with fewer heads of keys and values where `kv_heads` says so."""

    def __init__(self, kv_heads=HEADS, merged=False, zero=0.0, rope=None, flat=False):
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * HEAD_DIM) for _ in range(2))
        self.kv_heads, self.merged, self.rope, self.flat = kv_heads, merged, rope, flat
        self.register_buffer("zero", torch.tensor(zero))
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -torch.inf).triu(1))

    def heads(self, layer, x, heads):
        return layer(x).view(-1, TOKENS, heads, HEAD_DIM).transpose(1, 2)

    def repeated(self, x):
        if self.kv_heads == HEADS:
            return x
        x = x.unsqueeze(2).expand(-1, self.kv_heads, HEADS // self.kv_heads, TOKENS, HEAD_DIM)
        return x.reshape(-1, HEADS, TOKENS, HEAD_DIM)

    def forward(self, x):
        q, k, v = self.heads(self.q, x, HEADS), *(self.heads(layer, x, self.kv_heads) for layer in (self.k, self.v))
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        k, v = self.repeated(k), self.repeated(v)
        if self.merged:
            k = k.reshape(-1, TOKENS, HEAD_DIM).transpose(1, 2).reshape(-1, HEADS, HEAD_DIM, TOKENS)
        else:
            k = k.transpose(2, 3)
        p = ((q * 0.6) @ (k * 0.6) + self.mask).softmax(-1)
        y = (torch.where(p.isnan(), self.zero, p) @ v).transpose(1, 2)
        if self.flat:
            return self.o(y.reshape(-1, WIDTH)).view(-1, TOKENS, WIDTH)
        return self.o(y.reshape(-1, TOKENS, WIDTH))


def halves(x):
    return x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]


class Rotary(nn.Module):
    def __init__(self, halves=halves):
        super().__init__()
        self.halves = halves
        angles = torch.randn(1, 1, TOKENS, HEAD_DIM)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        first, second = self.halves(x)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


CASES = {
    "keys transposed": {},
    "keys transposed in merged heads": {"merged": True},
    "repeated heads": {"kv_heads": 2},
    "one head repeated, merged": {"kv_heads": 1, "merged": True},
    "rotated": {"rope": Rotary()},
    "rotated, by a chunk": {"rope": Rotary(lambda x: x.chunk(2, -1))},
    "rotated, by a split": {"rope": Rotary(lambda x: x.split(HEAD_DIM // 2, 3))},
    "rotated and repeated": {"rope": Rotary(), "kv_heads": 2, "merged": True},
    "rows of all texts": {"flat": True},
}


@pytest.mark.parametrize(
    "name", slow_except(CASES, "keys transposed", "rotated", "rotated and repeated", "rows of all texts")
)
def test_attention_that_is_written_out_is_one_operator(isa, name):
    net = Attention(**CASES[name]).eval()
    compiled = equal(net, torch.randn(2, TOKENS, WIDTH))
    assert compiled.counts()[0] == 1 and counts(compiled)["attention"] == 1
    assert counts(compiled).get("rope", 0) == (2 if "rotated" in name else 0)
    for batch in (1, 5):
        x = torch.randn(batch, TOKENS, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


def test_another_value_for_rows_that_see_nothing_is_kept():
    net = Attention(zero=1.0).eval()
    net.mask[3] = -torch.inf  # a token that sees nothing
    x = torch.randn(2, TOKENS, WIDTH)
    compiled = rarefy.compile(net, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert "attention" not in counts(compiled)


def test_rows_that_see_nothing_are_zeros():
    net = Attention().eval()
    net.mask[3] = -torch.inf
    compiled = equal(net, torch.randn(2, TOKENS, WIDTH))
    assert counts(compiled)["attention"] == 1


class Returned(Attention):
    """Attention that returns its probabilities too."""

    def forward(self, x):
        q, k, v = (self.heads(layer, x, HEADS) for layer in (self.q, self.k, self.v))
        p = ((q * 0.6) @ (k.mT * 0.6) + self.mask).softmax(-1)
        return self.o((p @ v).transpose(1, 2).reshape(-1, TOKENS, WIDTH)), p


class OneHead(Attention):
    """All heads of queries read one head of keys and values by broadcasting."""

    def forward(self, x):
        q, k, v = self.heads(self.q, x, HEADS), *(self.heads(layer, x, 1) for layer in (self.k, self.v))
        p = ((q * 0.6) @ (k.mT * 0.6) + self.mask).softmax(-1)
        return self.o((p @ v).transpose(1, 2).reshape(-1, TOKENS, WIDTH))


@pytest.mark.parametrize("net", [Returned(), OneHead(kv_heads=1)], ids=["returned", "one head"])
def test_attention_that_cannot_be_fused_stays_as_it_is(net):
    x = torch.randn(2, TOKENS, WIDTH)
    compiled = rarefy.compile(net.eval(), x)
    with torch.no_grad():
        got, want = compiled(x), net(x)
    for a, b in zip(got, want) if isinstance(want, tuple) else [(got, want)]:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """Two batches of heads that read one table of angles."""

    def __init__(self):
        super().__init__()
        self.block = Attention(rope=Rotary())

    def forward(self, x):
        return self.block(x).sum(1), self.block(torch.cat([x, x]))


def test_angles_for_several_batch_sizes():
    net = Twice().eval()
    x = torch.randn(2, TOKENS, WIDTH)
    compiled = rarefy.compile(net, x)
    for batch in (2, 3):
        x = torch.randn(batch, TOKENS, WIDTH)
        with torch.no_grad():
            for got, want in zip(compiled(x), net(x)):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def over(x, eps):
    return x.pow(2.0).mean(-1, keepdim=True) + eps


RMS_NORMS = {
    "rsqrt": lambda x: x * torch.rsqrt(over(x, 1e-5)),
    "quotient": lambda x: x / over(x, 1e-5).sqrt(),
    "reciprocal": lambda x: x * torch.reciprocal(over(x, 1e-5).sqrt()),
    "one over": lambda x: x * (1 / over(x, 1e-5).sqrt()),
    "power": lambda x: x * over(x, 1e-5).pow(-0.5),
    "quotient by a power": lambda x: x / over(x, 1e-5) ** 0.5,
    "product": lambda x: torch.rsqrt((x * x).mean(-1, True) + 1e-5) * x,
}


class Norm(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(WIDTH))
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.after(self.weight * self.function(self.before(x)))


@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norms_that_are_written_out_are_one_operator(isa, name):
    compiled = equal(Norm(RMS_NORMS[name]).eval(), torch.randn(3, TOKENS, WIDTH))
    assert compiled.counts()[0] == 1 and counts(compiled)["norm"] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.reciprocal(over(x, 1e-5)),  # no root
        lambda x: x / over(x, 1e-5).pow(0.25),
        lambda x: F.relu(x) / over(x, 1e-5).sqrt(),  # of another value
        lambda x: x / (x.pow(3.0).mean(-1, keepdim=True) + 10).sqrt(),
    ],
)
def test_other_quotients_are_no_norms(function):
    assert "norm" not in counts(equal(Norm(function).eval(), torch.randn(3, TOKENS, WIDTH)))
