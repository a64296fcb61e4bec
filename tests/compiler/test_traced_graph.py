"""Graphs that are used again: when they are, when they must not be, and that nothing of the first model stays."""

import copy
import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
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
    traced_graph.forget_graphs()
    yield seen
    traced_graph.forget_graphs()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True).eval()


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def equal(compiled, model, x, far=1e-5):
    with torch.no_grad():
        return relative_distance(compiled(x), model(x)) < far


def test_other_weights_and_precisions_use_the_graph_again(exports):
    for seed, precision in ((0, None), (1, None), (1, "int16"), (2, "int8")):
        model = net(seed)
        compiled = rarefy.compile(model, X, precision=precision, tune=False)
        assert equal(compiled, model, torch.randn(5, 7, 8), 1e-5 if precision is None else 0.1)
    assert len(exports) == 2  # and the branch for a size of 1


def test_buffers_are_those_of_the_new_model(exports):
    for mean in (0.0, 3.0):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        model[1].running_mean.fill_(mean)
        x = torch.randn(2, 3, 9, 9)
        assert equal(rarefy.compile(model, x, tune=False), model, x)
    assert len(exports) == 1


def test_first_and_later_graphs_give_the_same_bits(exports):
    model = net()
    first, second = (rarefy.compile(model, X, precision="int8", tune=False) for _ in range(2))
    assert len(exports) == 2  # and the branch for a size of 1
    assert str(first) == str(second) and torch.equal(first(X), second(X))


class Own(nn.Module):
    def forward(self, x):
        return x


class Settings(dict):
    pass


CHANGES = {
    "a number": lambda m: setattr(m.norm1, "eps", 0.1),
    "a flag": lambda m: setattr(m, "norm_first", True),
    "training": lambda m: m.dropout.train(),
    "a buffer": lambda m: m.register_buffer("more", torch.zeros(1)),
    "a hook": lambda m: m.linear1.register_forward_hook(lambda m, a, y: y + 1),
    "a forward": lambda m: setattr(m.linear1, "forward", partial(nn.Linear.forward, m.linear1)),
    "a layer": lambda m: setattr(m, "linear1", nn.Sequential(nn.Linear(8, 16))),
    "a size": lambda m: setattr(m, "linear1", nn.Linear(8, 16, bias=False)),
    "a type": lambda m: m.linear1.double(),
    "a frozen weight": lambda m: m.linear1.requires_grad_(False),
    "a shared weight": lambda m: setattr(m.norm1, "weight", m.norm2.weight),
    "a literal at a weight": lambda m: setattr(m.linear1.weight, "note", 1),
    "a function": lambda m: setattr(m, "activation", torch.nn.functional.relu),
}
UNKNOWN = {
    "a tensor": lambda m: setattr(m, "plain", torch.zeros(2)),
    "a closure": lambda m: setattr(m, "call", (lambda y: lambda: y)(1)),
    "a function of the user": lambda m: setattr(m, "call", equal),
    "a module of the user": lambda m: setattr(m, "own", Own()),
    "a class of the user": lambda m: setattr(m, "own", Own),
    "a dict with attributes": lambda m: setattr(m, "settings", Settings(a=1)),
    "a generator": lambda m: setattr(m, "random", random.Random(0)),
    "a module that is no part": lambda m: setattr(m, "hidden", [nn.Linear(1, 1)]),
    "too many values": lambda m: setattr(m, "words", {str(i): i for i in range(traced_graph.MAX_VALUES)}),
}


@pytest.mark.parametrize("change", [*CHANGES, *UNKNOWN])
def test_keys(change):
    model, other = net(0), net(1)
    assert traced_graph.key_of(model, X) == traced_graph.key_of(other, X.clone()) is not None
    (CHANGES | UNKNOWN)[change](other)
    key = traced_graph.key_of(other, X)
    assert key != traced_graph.key_of(model, X) and (key is None) == (
        change in UNKNOWN or change in ("a hook", "a forward")
    )
    assert hash(key) == hash(traced_graph.key_of(other, X))


def test_keys_of_arguments():
    keys = [
        traced_graph.key_of(net(), *options)
        for options in ((X,), (X[:2],), (X.double(),), ((X, X),), ({"x": X},), ((X, 1),), ((X, 2),), (X, True))
    ]
    assert len(set(keys)) == len(keys)


FACTOR = 2.0


class ReadsGlobal(nn.Linear):
    def forward(self, x):
        return super().forward(x) * FACTOR


def test_code_of_the_user_is_exported_each_time(exports, monkeypatch):
    model = ReadsGlobal(8, 8).eval()
    assert equal(rarefy.compile(model, X, tune=False), model, X)
    monkeypatch.setitem(globals(), "FACTOR", -5.0)
    assert equal(rarefy.compile(model, X, tune=False), model, X) and len(exports) == 2


@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_graph_that_returns_something_else_is_replaced(exports, precision, monkeypatch):
    """Should code of a library read what no key tells apart: outputs are compared, and then the model is exported."""
    monkeypatch.setattr(traced_graph, "LIBRARIES", (*traced_graph.LIBRARIES, ReadsGlobal.__module__.partition(".")[0]))
    model = ReadsGlobal(8, 8).eval()
    assert equal(rarefy.compile(model, X, precision=precision, tune=False), model, X, 0.05)
    monkeypatch.setitem(globals(), "FACTOR", -5.0)
    assert equal(rarefy.compile(model, X, precision=precision, tune=False), model, X, 0.05) and len(exports) == 2


def test_errors_of_a_model_are_raised_at_once(exports):
    rarefy.compile(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 8, 8), tune=False)
    for _ in range(2):
        with pytest.raises(ModelError, match="has no effect"):
            rarefy.compile(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 8, 8), precision="int16")
    assert len(exports) == 1 and len(traced_graph._graphs) == 1


def test_threads(exports):
    def run(seed):
        model = net(seed)
        return equal(rarefy.compile(model, X, tune=False), model, X)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(6)))
    assert len(exports) == 2  # and the branch for a size of 1


def test_nothing_of_the_model_stays(exports):
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(2, 64)
    weight = weakref.ref(model[0].weight)
    rarefy.compile(model, x, tune=False)
    assert len(traced_graph._graphs) == 1
    del model
    gc.collect()
    assert weight() is None


def test_only_the_last_graphs_are_remembered(exports, monkeypatch):
    monkeypatch.setattr(traced_graph, "REMEMBERED", 4)
    for inputs in (3, 4, 5, 6, 7, 3):
        rarefy.compile(nn.Sequential(nn.Linear(inputs, 2)).eval(), torch.randn(2, inputs), tune=False)
    assert len(exports) == 6 and len(traced_graph._graphs) == 4


def test_the_order_of_a_set_does_not_count():
    several = [nn.Identity() for _ in range(2)]
    several[0].names, several[1].names = {0, 8}, {8, 0}  # both want the first place
    assert list(several[0].names) != list(several[1].names)
    assert traced_graph.key_of(several[0], ()) == traced_graph.key_of(several[1], ()) is not None
    several[1].names = {0}
    assert traced_graph.key_of(several[0], ()) != traced_graph.key_of(several[1], ())


def test_an_encoder_and_its_copy(exports):
    pytest.importorskip("transformers")
    model = tiny_bert()
    batch = {"input_ids": torch.randint(1, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    other = copy.deepcopy(model)
    other.encoder.layer[0].output.dense.weight.data *= -1
    for each in (model, other):
        compiled = rarefy.compile(each, batch, tune=False)
        with torch.no_grad():
            assert relative_distance(compiled(**batch)[0], each(**batch)[0]) < 1e-5
    assert len(exports) == 2  # and the branch for a size of 1


@pytest.mark.slow
def test_decoders(exports):
    pytest.importorskip("transformers")
    ids, model = torch.randint(1, 50, (1, 5)), tiny_llama()
    other = copy.deepcopy(model)
    other.lm_head.weight.data *= -1
    for each, precision in ((model, None), (other, None), (other, "int8")):
        step = rarefy.decoder(each, precision=precision)
        with torch.no_grad():
            assert relative_distance(step(ids), each(ids).logits) < (1e-4 if precision is None else 0.05)
    assert len(exports) == 1
    other.config.rms_norm_eps = 0.5
    other.model.norm.variance_epsilon = 0.5
    rarefy.decoder(other)
    assert len(exports) == 2
