"""Zeros are skipped where that is faster: the choice, its memory, its results, and what `print` says of it."""

import pytest
import torch
from torch import nn

import rarefy
from helpers.compile_models import far
from rarefy.compiler import zero_choice
from rarefy.compiler.zero_choice import MULTIPLIED, SKIPPED, formats_of
from rarefy.model.quant_grid import Grid
from rarefy.runtime import bindings, tuning_cache
from rarefy.runtime.packed_formats import skips_zeros
from rarefy.runtime.packing import pack_bitmask, pack_conv, pack_dense, pack_tiles, unpack

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


def sparse(*shape, zeros=0.8):
    W = torch.randn(shape)
    return W * (torch.rand(shape) >= zeros)


class Net(nn.Module):
    """Convolutions and a linear layer with zeros, a depthwise and a dense one without."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.c, self.d, self.e = nn.Conv2d(16, 32, 1), nn.Linear(32, 24), nn.Linear(24, 5)
        for layer in (self.a, self.c, self.d):
            layer.weight.data = sparse(*layer.weight.shape)

    def forward(self, x):
        return self.e(torch.relu(self.d(torch.relu(self.c(torch.relu(self.b(self.a(x))))).mean((2, 3)))))


@pytest.fixture(autouse=True)
def _timed(monkeypatch, tmp_path):
    monkeypatch.delenv("RAREFY_TUNE")
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rarefy.compiler.compile._not_slower", lambda model, compiled, *_: compiled)


@pytest.fixture
def clock(monkeypatch):
    """Decide which layers are faster with zeros multiplied, and which variant of the model is fastest."""

    class Clock:
        multiplied, fastest, timed = frozenset(), "mixed", 0

    def seconds(variants, leaves):
        Clock.timed += 1
        nodes = {n for v in variants.values() for n in v.kernels}
        assert set(variants) == {SKIPPED, MULTIPLIED}
        order = sorted(nodes, key=lambda n: list(n.graph.nodes).index(n))
        return {
            name: {n: 1.0 if (i in Clock.multiplied) == (name == MULTIPLIED) else 2.0 for i, n in enumerate(order)}
            for name in variants
        }

    def fastest(variants, leaves):
        outputs = [v.run_leaves(leaves)[0] for v in variants.values()]
        assert all(far(outputs[0], y) < 1e-5 for y in outputs)
        return Clock.fastest if Clock.fastest in variants else SKIPPED

    monkeypatch.setattr(zero_choice, "_seconds_of_nodes", seconds)
    monkeypatch.setattr(zero_choice, "_fastest_variant", fastest)
    return Clock


def test_each_layer_keeps_its_faster_format(clock, tmp_path):
    net, x = Net().eval(), torch.randn(2, 8, 12, 12)
    clock.multiplied = {0}  # the first convolution
    compiled = rarefy.compile(net, x)
    assert "zeros skipped: 1 conv2d, 1 linear" in repr(compiled)
    with torch.no_grad():
        assert far(net(x), compiled(x)) < 1e-5
    rarefy.save(compiled, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out")
    assert repr(loaded) == repr(compiled) and torch.equal(loaded(x), compiled(x))


@pytest.mark.parametrize(("name", "layers"), [(SKIPPED, 3), (MULTIPLIED, 0)])
def test_the_fastest_model_stays(clock, name, layers):
    clock.multiplied, clock.fastest = {0}, name
    compiled = rarefy.compile(Net().eval(), torch.randn(2, 8, 12, 12))
    assert sum(skips_zeros(k.held[0]) for k in compiled.kernels.values()) == layers
    assert ("zeros skipped" in repr(compiled)) == bool(layers)


def test_choices_are_remembered(clock):
    net, x = Net().eval(), torch.randn(2, 8, 12, 12)
    clock.multiplied = {2}
    first = rarefy.compile(net, x)
    clock.multiplied = frozenset()
    assert repr(rarefy.compile(net, x)) == repr(first) and clock.timed == 1
    rarefy.compile(net, torch.randn(4, 8, 12, 12))
    assert clock.timed == 2


def test_choices_of_other_names_are_made_again(clock):
    net, x = Net().eval(), torch.randn(2, 8, 12, 12)
    rarefy.compile(net, x)
    file = tuning_cache.default_file()
    choices = {k: {i: ("sparse", r) for i, (_, r) in c.items()} for k, c in tuning_cache.read(file).items()}
    tuning_cache.write(file, choices)
    rarefy.compile(net, x)
    assert clock.timed == 2


def test_layers_of_zeros_alone(clock):
    """Two weights without a value, of one shape and different strides."""
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, padding=1)).eval()
    for i in (0, 2):
        net[i].weight.data.zero_()
    x = torch.randn(2, 16, 8, 8)
    compiled = rarefy.compile(net, x)
    assert {tuple(k.held[0].stride) for k in compiled.kernels.values()} == {(1, 1), (2, 2)}
    with torch.no_grad():
        assert far(net(x), compiled(x)) < 1e-5


def test_nothing_is_timed_without_zeros_or_tuning(clock):
    x = torch.randn(2, 8, 12, 12)
    rarefy.compile(Net().eval(), x, tune=False)
    dense = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    assert "zeros" not in repr(rarefy.compile(dense, x)) and clock.timed == 0


@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
def test_measured_for_real(precision):
    net, x = Net().eval(), torch.randn(2, 8, 12, 12)
    options = {} if precision != "int8" else {"calibrate": [torch.randn(2, 8, 12, 12) for _ in range(4)]}
    compiled = rarefy.compile(net, x, precision=precision, **options)
    with torch.no_grad():
        assert far(net(x), compiled(x)) < (1e-5 if precision is None else 0.1)


def test_layers_that_share_a_weight_share_its_format(clock):
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval()
    net[0].weight.data = sparse(24, 24)
    net[2].weight = net[0].weight
    compiled = rarefy.compile(net, torch.randn(64, 24))
    assert len({k.held[0].values.data_ptr() for k in compiled.kernels.values()}) == 1


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int16", "int8"])
def test_formats_hold_the_same_weight(kind):
    """Both formats of a linear layer, from either of them."""
    W = sparse(40, 96, zeros=0.9)
    for packed in (pack_dense(W, kind), pack_tiles(W, kind)):
        both = formats_of(packed)
        assert skips_zeros(both[SKIPPED]) and not skips_zeros(both[MULTIPLIED])
        assert packed in both.values()
        assert torch.equal(unpack(both[SKIPPED]), unpack(both[MULTIPLIED]))


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_formats_of_convolutions_hold_the_same_weight(kind):
    W = sparse(10, 6, 3, 5, zeros=0.9)
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}
    grid = None if kind == "fp32" else Grid(8, W.flatten(1).abs().amax(1, keepdim=True) / 127)
    dense = pack_dense(W, **geometry) if kind == "fp32" else pack_conv(W, kind, **geometry, grid=grid, dense=True)
    for packed in (dense, pack_conv(W, kind, **geometry, grid=grid)):
        both = formats_of(packed)
        assert skips_zeros(both[SKIPPED]) and not skips_zeros(both[MULTIPLIED])
        assert torch.equal(unpack(both[SKIPPED]), unpack(both[MULTIPLIED]))
        assert all(getattr(both[c], n) == geometry[n] for c in both for n in geometry)


def test_weights_with_one_format():
    """Few zeros, groups, and formats of small batches are left as they are."""
    assert not formats_of(pack_dense(sparse(16, 32, zeros=0.1)))
    assert not formats_of(pack_conv(sparse(8, 4, 3, 3), groups=2))
    assert not formats_of(pack_bitmask(sparse(16, 64)))


def test_what_a_neighbour_takes_longer_counts():
    """A layout that changes between a layer and its neighbour costs the neighbour time."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a, b = (graph.call_function(torch.relu, (x,)) for _ in range(2))
    c = graph.call_function(torch.add, (a, b))
    seconds = {SKIPPED: {a: 1.0, b: 1.0, c: 5.0}, MULTIPLIED: {a: 2.0, b: 1.5, c: 1.0}}
    formats = {n: {} for n in (a, b)}
    costs = {name: zero_choice._costs_of(formats, times, seconds) for name, times in seconds.items()}
    assert costs == {SKIPPED: {a: 3.0, b: 3.0}, MULTIPLIED: {a: 2.0, b: 1.5}}
