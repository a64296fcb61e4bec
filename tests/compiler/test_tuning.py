"""Operators that torch runs faster run in torch: timed, remembered, shown, saved."""

import json
import time

import pytest
import torch
from torch import nn

import rarefy
from helpers.compile_models import Residual, far
from helpers.marks import slow_case
from rarefy.checkpoint import compiled_model
from rarefy.compiler import tuning
from rarefy.compiler.compile import split_example
from rarefy.compiler.subgraph import FusedSubgraph, SingleOp
from rarefy.runtime import bindings, tuning_cache

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


@pytest.fixture(autouse=True)
def _timed(monkeypatch, tmp_path):
    monkeypatch.delenv("RAREFY_TUNE")
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def clock(monkeypatch):
    """Decide who is faster: `clock.slow` says for each native call whether torch wins, `clock.eager` the model's time."""

    class Clock:
        slow, eager, timed = staticmethod(lambda call: False), 2.0, 0

    def fastest(call, lookup, seconds):
        Clock.timed += 1
        for a, b in zip(call.run(lookup), tuning.run_in_torch(call, lookup)):
            assert far(a, b) < 0.05  # of int8
        return {1: ("torch", 2.0) if Clock.slow(call) else ("native", 2.0)}

    def alternate(first, second, *_):
        first(), second()
        return 1.0, Clock.eager

    monkeypatch.setattr(tuning, "_fastest", fastest)
    monkeypatch.setattr(tuning, "alternate", alternate)
    return Clock


class Blocks(nn.Module):
    """Linear layers of two native calls, with an operator between them that the engine does not have."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 48), nn.Linear(48, 48), nn.Linear(48, 8)
        self.norm = nn.LayerNorm(48)

    def forward(self, x):
        return self.c(self.norm(torch.cumsum(self.b(torch.relu(self.a(x))), -1)))


def native_calls(compiled):
    return [c for c in compiled.schedule if isinstance(c, FusedSubgraph | SingleOp)]


def test_slow_native_calls_run_in_torch(clock, tmp_path):
    clock.slow = staticmethod(lambda call: len(call.nodes) > 1 and call.nodes[0].target.__name__ == "linear")
    net, x = Blocks().eval(), torch.randn(5, 24)
    with torch.no_grad():
        expected = net(x)
    compiled = rarefy.compile(net, torch.randn(3, 24))
    assert clock.timed == 2
    assert repr(compiled) == (
        "1 native call: 1 norm, 1 linear\nin torch: 1 cumsum\nin torch, where it was faster: 2 linear"
    )
    assert len(compiled.kernels) == 1 and len(native_calls(compiled)) == 1
    net.a.weight.data.zero_()  # later changes of the model are not seen
    assert far(expected, compiled(x)) < 1e-5
    rarefy.save(compiled, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out")
    assert repr(loaded) == repr(compiled) and torch.equal(loaded(x), compiled(x))
    assert clock.timed == 2
    again = rarefy.load(tmp_path / "out")
    rarefy.save(again, tmp_path / "again")
    assert torch.equal(rarefy.load(tmp_path / "again")(x), compiled(x))


@pytest.mark.parametrize("precision", [None, slow_case("int8")])
def test_convolutions_in_torch(clock, precision):
    clock.slow = staticmethod(lambda call: True)
    net, x = Residual().eval(), torch.randn(2, 8, 12, 12)
    compiled = rarefy.compile(net, x, precision=precision)
    assert not native_calls(compiled) and not compiled.kernels
    with torch.no_grad():
        assert far(net(x[:1]), compiled(x[:1])) < 1e-5


def test_a_model_that_eager_torch_runs_faster(clock, tmp_path):
    clock.eager = 0.5
    net, x = Residual().eval(), torch.randn(1, 8, 12, 12)
    compiled = rarefy.compile(net, x)
    assert not native_calls(compiled) and not compiled.kernels
    note = "all in torch: on the example it takes 500 ms, with native calls 1e+03 ms"
    assert compiled.exported.notes == (note,) and note in repr(compiled)
    more = torch.randn(3, 8, 12, 12)
    with torch.no_grad():
        assert far(net(more), compiled(more)) < 1e-5
    rarefy.save(compiled, tmp_path / "out")
    assert torch.equal(rarefy.load(tmp_path / "out")(more), compiled(more))


def test_a_model_that_is_as_fast_as_eager_is_compared_with_torch_alone(clock, monkeypatch):
    """Eager takes as long as the compiled model, which wins against the graph in torch alone."""
    times = [(1.0, 1.0), (1.0, 1.2)]
    monkeypatch.setattr(tuning, "alternate", lambda *_: times.pop(0))
    compiled = rarefy.compile(Residual().eval(), torch.randn(1, 8, 12, 12))
    assert native_calls(compiled) and not times and not compiled.exported.notes


def test_choices_are_remembered(clock):
    clock.slow = staticmethod(lambda call: call.nodes[0].target.__name__ == "norm")
    net, x = Blocks().eval(), torch.randn(3, 24)
    first = rarefy.compile(net, x)
    clock.slow, timed = staticmethod(lambda call: False), clock.timed
    second = rarefy.compile(net, x)
    assert repr(second) == repr(first) and clock.timed == timed == 2
    names = sorted(n for choice in tuning_cache.read(tuning_cache.default_file()).values() for n, _ in choice.values())
    assert names == ["compiled seconds", "native", "other seconds", "torch"]
    rarefy.compile(net, torch.randn(4, 24))  # other sizes are timed again
    assert clock.timed == 4


def test_equal_native_calls_are_timed_once(clock):
    net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1)) for _ in range(4))).eval()
    compiled = rarefy.compile(net, torch.randn(3, 16))
    assert len(native_calls(compiled)) == 4 and clock.timed == 1


def test_nothing_is_timed_where_that_is_switched_off(clock, monkeypatch):
    clock.slow = staticmethod(lambda call: True)
    net, x = Blocks().eval(), torch.randn(3, 24)
    assert native_calls(rarefy.compile(net, x, tune=False)) and not clock.timed
    monkeypatch.setenv("RAREFY_TUNE", "0")
    assert native_calls(rarefy.compile(net, x)) and not clock.timed


def test_fastest_of_alternated_runs(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds.pop(0)

        return call

    first, second = run("a", [9.0, 1.0, 5.0, 2.0]), run("b", [9.0, 3.0, 3.0, 30.0])
    assert tuning.alternate(first, second, 0.0) == (1.0, 3.0)
    assert "".join(order) == "abababab"


def test_real_times_choose_the_faster():
    net, x = Blocks().eval(), torch.randn(3, 24)
    compiled = rarefy.compile(net, x)
    with torch.no_grad():
        assert far(net(x), compiled(x)) < 1e-5
    args, kwargs = split_example(x)
    ours, eager = tuning.seconds_of_calls(compiled, net, args, kwargs)
    assert ours > 0 and eager > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g: g["torch"].append("nobody"),
            "torch: 'nobody' is not an operator of the engine without a packed weight",
        ),
        (lambda g: g["torch"].append("x"), "torch: 'x' is not an operator of the engine"),
        (lambda g: g["torch"].append("cumsum"), "torch: 'cumsum' is not an operator of the engine"),
        (lambda g: g["torch"].append(next(iter(g["kernels"]))), "is not an operator of the engine without a packed"),
        (lambda g: g.update(torch=[7]), "torch: expected str, got 7"),
        (lambda g: g.update(torch={}), "torch: expected list"),
        (lambda g: g["torch"].clear(), "has no packed weight, but other operators have one"),
    ],
)
def test_graphs_with_other_nodes_in_torch_are_refused(clock, tmp_path, change, message):
    from helpers.compiled_folders import edit
    from rarefy.common.errors import ContainerError

    clock.slow = staticmethod(lambda call: len(call.nodes) > 1 and call.nodes[0].target.__name__ == "linear")
    rarefy.save(rarefy.compile(Blocks().eval(), torch.randn(3, 24)), tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / compiled_model.GRAPH).read_text())["torch"]) == 2
    edit(tmp_path / "out", change)
    with pytest.raises(ContainerError, match=message):
        rarefy.load(tmp_path / "out")
