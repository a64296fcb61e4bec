"""Graphs that are used again: when they are, when they must not be, and that nothing of the first model stays."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import rarefy
from conftest import tiny_bert, tiny_llama
from rarefy.common.errors import ModelError
from rarefy.compiler import export, traced_graph
from rarefy.model.compare import relative_distance


@pytest.fixture
def exports(monkeypatch):
    """The names of the classes of models that torch exports, from here on."""
    seen, real = [], export.export

    def counted(model, *args, **kwargs):
        seen.append(type(model).__name__)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(export, "export", counted)
    with traced_graph.without_remembered_graphs():
        yield seen


class Net(nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.layer, self.scale, self.steps = nn.Linear(8, 6), scale, [1, 2]
        self.register_buffer("shift", torch.randn(6), persistent=False)

    def forward(self, x):
        y = self.layer(x) * self.scale + self.shift
        return y * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) * len(self.steps)


def equal(compiled, net, x, far=1e-5):
    with torch.no_grad():
        return relative_distance(compiled(x), net(x)) < far


def test_other_weights_and_precisions_use_the_graph_again(exports):
    x = torch.randn(3, 8)
    for seed, precision in ((0, None), (1, None), (1, "int16"), (2, "int8")):
        torch.manual_seed(seed)
        net = Net().eval()
        compiled = rarefy.compile(net, x, precision=precision, tune=False)
        assert equal(compiled, net, torch.randn(5, 8), 1e-5 if precision is None else 0.05)
    assert len(exports) == 1


def test_first_and_later_graphs_give_the_same_bits(exports):
    net, x = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval(), torch.randn(2, 9, 32)
    first, second = (rarefy.compile(net, x, precision="int8", tune=False) for _ in range(2))
    assert len(exports) == 1 and str(first) == str(second) and torch.equal(first(x), second(x))


CHANGES = {
    "a number": lambda net, x: setattr(net, "scale", 3.0),
    "a list": lambda net, x: net.steps.append(3),
    "a buffer": lambda net, x: net.register_buffer("more", torch.zeros(1)),
    "a hook": lambda net, x: net.layer.register_forward_hook(lambda m, a, y: y + 1),
    "a forward": lambda net, x: setattr(net, "forward", partial(Net.forward, net)),
    "a layer": lambda net, x: setattr(net, "layer", nn.Sequential(nn.Linear(8, 6))),
    "a type": lambda net, x: setattr(net, "layer", type("Other", (nn.Linear,), {})(8, 6)),
    "a size": lambda net, x: setattr(net, "layer", nn.Linear(8, 6, bias=False)),
    "a tensor": lambda net, x: setattr(net, "plain", torch.zeros(2)),
    "a closure": lambda net, x: setattr(net, "call", lambda: x),
    "an example": lambda net, x: x.resize_(2, 2, 8).normal_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_needs_a_new_graph(exports, change):
    net, x = Net().eval(), torch.randn(3, 8)
    rarefy.compile(net, x, tune=False)
    CHANGES[change](net, x)
    net.eval()
    assert equal(rarefy.compile(net, x, tune=False), net, x) and len(exports) == 2
    assert equal(rarefy.compile(net, x, dynamic=False, tune=False), net, x) and len(exports) == 3


def test_shared_weights_are_told_apart(exports):
    def pair(shared):
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
        net[1].weight = net[0].weight if shared else net[1].weight
        return net

    x = torch.randn(2, 6)
    for shared in (True, False, True, False):
        net = pair(shared)
        assert equal(rarefy.compile(net, x, tune=False), net, x)
    assert len(exports) == 2


FACTOR = 2.0


class ReadsGlobal(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * FACTOR


@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_graph_that_returns_something_else_is_replaced(exports, precision, monkeypatch):
    """Code may read what no key tells apart: outputs are compared, and then the model is exported."""
    net, x = ReadsGlobal().eval(), torch.randn(3, 4)
    assert equal(rarefy.compile(net, x, precision=precision, tune=False), net, x, 0.05)
    monkeypatch.setitem(globals(), "FACTOR", -5.0)
    assert equal(rarefy.compile(net, x, precision=precision, tune=False), net, x, 0.05) and len(exports) == 2


def test_errors_of_a_model_are_raised_once(exports):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x + self.calls

    for _ in range(2):
        with pytest.raises(ModelError, match="changes its buffers"):
            rarefy.compile(Counts().eval(), torch.randn(2), tune=False)


def test_nothing_of_the_model_stays(exports):
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(2, 64)
    weight = weakref.ref(net[0].weight)
    rarefy.compile(net, x, tune=False)
    assert len(traced_graph._graphs) == 1
    del net
    gc.collect()
    assert weight() is None


def test_only_the_last_graphs_are_remembered(exports):
    for inputs in (3, 4, 5, 6, 7, 3):
        rarefy.compile(nn.Sequential(nn.Linear(inputs, 2)).eval(), torch.randn(2, inputs), tune=False)
    assert len(exports) == 6 and len(traced_graph._graphs) == traced_graph.REMEMBERED


def test_an_encoder_and_its_copy(exports):
    pytest.importorskip("transformers")
    model = tiny_bert()
    batch = {"input_ids": torch.randint(1, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    other = copy.deepcopy(model)
    other.encoder.layer[0].output.dense.weight.data *= -1
    for net in (model, other):
        compiled = rarefy.compile(net, batch, tune=False)
        with torch.no_grad():
            assert relative_distance(compiled(**batch)[0], net(**batch)[0]) < 1e-5
    assert len(exports) == 1


def test_decoders(exports):
    pytest.importorskip("transformers")
    ids, model = torch.randint(1, 50, (1, 5)), tiny_llama()
    other = copy.deepcopy(model)
    other.lm_head.weight.data *= -1
    for net, precision in ((model, None), (other, None), (other, "int8")):
        step = rarefy.decoder(net, precision=precision)
        with torch.no_grad():
            assert relative_distance(step(ids), net(ids).logits) < (1e-4 if precision is None else 0.05)
    assert len(exports) == 1
    other.config.rms_norm_eps = 0.5
    other.model.norm.variance_epsilon = 0.5
    rarefy.decoder(other)
    assert len(exports) == 2
