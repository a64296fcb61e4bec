"""`torch.compile(backend="rarefy")`: every call returns what eager torch returns, whatever happens between calls."""

import copy
import gc
import logging
import os
import random
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._python_dispatch import TorchDispatchMode

import rarefy
import zoo
from conftest import Net, tiny_bert, tiny_llama
from helpers.marks import slow_except
from rarefy.integrations.dynamo import backend, subgraph
from rarefy.integrations.dynamo import weights as weight_guard
from rarefy.model.compare import relative_distance

LOGGER = "rarefy.integrations.dynamo"


@pytest.fixture(autouse=True)
def _reset(caplog):
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, LOGGER)
    yield
    torch._dynamo.reset()


@pytest.fixture
def places(caplog):
    """What ran where since the last question: a list of "engine" and of reasons for eager torch."""

    def places():
        lines = [r.getMessage() for r in caplog.records if r.name == LOGGER]
        caplog.clear()
        return [line.partition("): " if "(" in line.partition(": ")[0] else ": ")[2] for line in lines]

    return places


def on_engine(lines):
    return bool(lines) and all(line.startswith("engine") for line in lines)


def compiled(net, **more):
    return torch.compile(net, backend=backend, **more)


def same(got, want, most=1e-5):
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor) and got.dtype == want.dtype and got.shape == want.shape
        assert got.stride() == want.stride() and got.requires_grad == want.requires_grad
        assert got.is_inference() == want.is_inference()
        assert relative_distance(got, want) <= most
    elif isinstance(want, dict):
        assert type(got) is type(want) and list(got) == list(want)
        for key in want:
            same(got[key], want[key], most)
    elif isinstance(want, tuple | list):
        assert type(got) is type(want) and len(got) == len(want)
        for a, b in zip(got, want):
            same(a, b, most)
    else:
        assert got == want


class Mlp(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 8)

    def forward(self, x):
        return self.down(self.norm(F.gelu(self.up(x))))


def mlp():
    return Mlp().eval()


def x(*sizes):
    return torch.randn(*(sizes or (4, 8)))


class Then(nn.Module):
    """A model and a function of its input and output."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = Mlp(), function
        self.eval()

    def forward(self, x, *more):
        return self.function(x, self.net(x), *more)


# ---- what runs where ------------------------------------------------------------------------------------------------


def test_a_graph_runs_on_the_engine(places):
    net, a = mlp(), x()
    fast = compiled(net, fullgraph=True)
    with torch.no_grad():
        same(fast(a), net(a))
        same(fast(a + 1), net(a + 1))
    assert on_engine(places())


def test_the_backend_has_a_name(places):
    name = "rarefy_in_this_test"
    torch._dynamo.register_backend(backend, name)
    assert name in torch._dynamo.list_backends()
    net, a = mlp(), x()
    with torch.no_grad():
        same(torch.compile(net, backend=name)(a), net(a))
    assert on_engine(places())


def test_training_runs_in_eager_torch(places):
    net, other, a = Mlp(), Mlp(), x()
    other.load_state_dict(net.state_dict())
    fast = compiled(net)
    for model in (fast, other):
        model(a).square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters()):
        same(p.grad, q.grad)
    assert all("gradients" in line for line in places())


def test_gradients_of_inputs_alone(places):
    net, a = mlp().requires_grad_(False), x().requires_grad_()
    compiled(net)(a).sum().backward()
    (want,) = torch.autograd.grad(net(a).sum(), a)
    same(a.grad, want)
    assert all("gradients" in line for line in places())


def test_frozen_weights_run_on_the_engine_until_they_need_gradients(places):
    net, a = mlp().requires_grad_(False), x()
    fast = compiled(net)
    same(fast(a), net(a))
    assert on_engine(places())
    net.up.weight.requires_grad_()
    fast(a).sum().backward()
    assert net.up.weight.grad is not None and "gradients" in places()[0]


def test_no_grad_inside_the_model(places):
    class Frozen(Mlp):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    net, a = Frozen().eval(), x()
    fast = compiled(net)
    same(fast(a), net(a))
    assert torch.is_grad_enabled() and on_engine(places())


def test_gradients_inside_no_grad(places):
    class Fits(Mlp):
        def forward(self, x):
            with torch.enable_grad():
                y = self.up(x)
            return self.down(y), y

    net, a = Fits().eval(), x()
    with torch.no_grad():
        got, want = compiled(net)(a), net(a)
    same(got, want)
    assert want[1].requires_grad and not on_engine(places())


def test_evaluation_after_training_and_back(places):
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm, self.drop = Mlp(), nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.norm(self.net(x)))

    net, a = Drops().eval(), x()
    fast = compiled(net)
    with torch.no_grad():
        same(fast(a), net(a))
        assert on_engine(places())
        net.train()
        state = {n: t.clone() for n, t in net.state_dict().items()}
        torch.manual_seed(3)
        got, mean = fast(a), net.norm.running_mean.clone()
        net.load_state_dict(state)
        torch.manual_seed(3)
        same(got, net(a))
        same(mean, net.norm.running_mean)
        assert "changes its inputs" in places()[-1]
        net.eval()
        same(fast(a), net(a))  # with the new running mean


def test_random_numbers_are_eagers(places):
    net, a = Then(lambda x, y: y + torch.rand_like(y)), x()
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(5)
            got, after = fast(a), torch.rand(1)
            torch.manual_seed(5)
            same(got, net(a))
            same(after, torch.rand(1))
    assert "random" in places()[0]


def test_compiling_draws_no_random_numbers():
    net, a = mlp(), x()
    fast = compiled(net)
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    with torch.no_grad():
        fast(a)
    same(torch.rand(3), want)


def test_other_types_run_in_eager_torch(places):
    net, a = nn.Linear(8, 4).double(), x().double()
    with torch.no_grad():
        same(compiled(net)(a), net(a))
    assert "the engine has no" in places()[0]


def test_a_model_in_bf16():
    net, a = mlp().bfloat16(), x().bfloat16()
    with torch.no_grad():
        same(compiled(net)(a), net(a), 0.02)


def test_other_devices_run_in_eager_torch(places):
    net = nn.Linear(8, 4, device="meta")
    with torch.no_grad():
        assert compiled(net)(torch.empty(2, 8, device="meta")).shape == (2, 4)
    assert "another device" in places()[0]


def test_autocast(places):
    net, a = mlp(), x()
    inside = Then(lambda x, y: torch.mm(y.T, y))

    def both(x):
        with torch.autocast("cpu", torch.bfloat16):
            return inside(x)

    fast, fast_both = compiled(net), compiled(both)
    with torch.no_grad():
        same(fast_both(a), both(a))
        assert "autocast" in places()[0]
        with torch.autocast("cpu", torch.bfloat16):
            want = net(a)
            same(fast(a), want)
        assert want.dtype == torch.bfloat16 and "autocast" in places()[0]
        same(fast(a), net(a))
    assert on_engine(places())


def test_graphs_without_layers(places):
    def double(x):
        return x * 2 + 1

    same(compiled(double)(x()), double(x()), 10)
    assert "no layer with weights" in places()[0]


# ---- weights that change --------------------------------------------------------------------------------------------


def sgd(net, a):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    with torch.enable_grad():
        net(a).square().sum().backward()
    optimizer.step()


def adam(net, a):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    with torch.enable_grad():
        net(a).square().sum().backward()
    optimizer.step()


def load(net, a):
    net.load_state_dict({n: t + 1 for n, t in net.state_dict().items()})


def assign(net, a):
    net.load_state_dict({n: t + 1 for n, t in net.state_dict().items()}, assign=True)


def through_data(net, a):
    for p in net.parameters():
        p.data.mul_(1.5)


def new_data(net, a):
    for p in net.parameters():
        p.data = p.data + 1


def new_parameter(net, a):
    net.up.weight = nn.Parameter(torch.randn_like(net.up.weight))


def new_layer(net, a):
    net.up = nn.Linear(8, net.up.out_features)


def prune(net, a):
    rarefy.prune_(net, sparsity=0.5, score="magnitude")


def quantize(net, a):
    rarefy.quantize_(net, "int4", ignore=None)


def in_inference_mode(net, a):
    with torch.inference_mode():
        net.up.weight.mul_(2)


def one_bias(net, a):
    net.norm.bias.add_(1)


def through_a_view(net, a):
    net.up.weight[0].mul_(3)


def first_rows_through_data(net, a):
    net.up.weight.data[:8].mul_(3)  # 64 entries


def last_rows_through_detach(net, a):
    net.down.weight.detach()[-4:].zero_()


def through_numpy(net, a):
    net.up.weight.detach().numpy()[:8] = 2


def through_storage(net, a):
    net.up.weight.untyped_storage()[3] = 64  # one byte of the first entry


def no_grad_add(net, a):
    for p in net.parameters():
        p.add_(0.5)


def fused_adam(net, a):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5, fused=True)
    with torch.enable_grad():
        net(a).square().sum().backward()
    optimizer.step()


def from_a_vector(net, a):
    nn.utils.vector_to_parameters(torch.cat([p.reshape(-1) + 1 for p in net.parameters()]), net.parameters())


def cast_and_back(net, a):
    net.up.weight.data[:8].mul_(3)
    net.double().float()


CHANGES = [
    first_rows_through_data,
    last_rows_through_detach,
    through_numpy,
    through_storage,
    no_grad_add,
    fused_adam,
    from_a_vector,
    cast_and_back,
    sgd,
    adam,
    load,
    assign,
    through_data,
    new_data,
    new_parameter,
    new_layer,
    prune,
    quantize,
    in_inference_mode,
    one_bias,
    through_a_view,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_count_at_once(change, places):
    net, a = Mlp(64).eval(), x()
    fast = compiled(net)
    with torch.no_grad():
        before = net(a)
        same(fast(a), before)
        assert on_engine(places())
        change(net, a)
        assert relative_distance(net(a), before) > 1e-3
        same(fast(a), net(a))


def from_numpy(net):
    array = torch.randn(64, 8).numpy()
    net.up.weight = nn.Parameter(torch.from_numpy(array))
    return array


def from_a_file(net, folder):
    torch.save(net.state_dict(), folder / "weights.pt")
    state = torch.load(folder / "weights.pt", mmap=True)
    net.load_state_dict(state, assign=True)
    return state["up.weight"]


ALIASES = {  # made before a model is compiled
    "data": lambda net, folder: net.up.weight.data,
    "detach": lambda net, folder: net.up.weight.detach()[:],
    "a view": lambda net, folder: net.up.weight[:12],
    "numpy": lambda net, folder: net.up.weight.detach().numpy(),
    "numpy of frozen weights": lambda net, folder: net.requires_grad_(False).up.weight.numpy(),
    "from numpy": lambda net, folder: from_numpy(net),
    "shared by processes": lambda net, folder: net.share_memory().up.weight.data,
    "a file": from_a_file,
    "state_dict": lambda net, folder: net.state_dict()["up.weight"],
    "dlpack": lambda net, folder: np.from_dlpack(net.up.weight.data),
}


@pytest.mark.parametrize("alias", slow_except(ALIASES, "data", "numpy", "a file", "shared by processes"))
def test_writes_through_what_was_made_before(alias, places, tmp_path):
    net, a = Mlp(64).eval(), x()
    with torch.no_grad():
        other = ALIASES[alias](net, tmp_path)
        fast = compiled(net)
        for _ in range(2):
            same(fast(a), net(a))
        assert on_engine(places())
        before = net(a)
        if isinstance(other, torch.Tensor):
            other[:8] = 2.0
        else:
            other[:8] = 2
        assert relative_distance(net(a), before) > 1e-3
        same(fast(a), net(a))
        assert "the weights have changed" in places()[0]


def test_a_numpy_array_made_between_calls(places):
    net, a = Mlp(64).eval(), x()
    fast = compiled(net)
    with torch.no_grad():
        fast(a)
        array = net.up.weight.detach().numpy()
        same(fast(a), net(a))
        array[:8] = 2
        same(fast(a), net(a))
        assert "the weights have changed" in places()[-1]


def test_reading_weights_keeps_the_engine(places, tmp_path):
    net, a = Mlp(64).eval(), x()
    fast = compiled(net)
    with torch.no_grad():
        fast(a)
        assert on_engine(places())
        torch.save(net.state_dict(), tmp_path / "weights.pt")
        same(fast(a), net(a))
        assert net.up.weight.data_ptr() and float(net.up.weight.detach().numpy().sum()) < 1e3
        copy.deepcopy(net)
        same(fast(a), net(a))
        assert not places()
        net.up.weight.data[:8].mul_(3)
        same(fast(a), net(a))
        assert places()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_64_neighbouring_values_at_random_places(seed, places, monkeypatch):
    monkeypatch.setattr(subgraph, "CALLS_BEFORE_REBUILD", 1)
    monkeypatch.setattr(subgraph, "MAX_REBUILDS", 1000)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    net, a = nn.Sequential(nn.Linear(8, 96), nn.GELU(), nn.Linear(96, 72)).eval(), x()
    fast = compiled(net)
    with torch.no_grad():
        fast(a)
        for _ in range(8):
            places()
            p = draw.choice([p for p in net.parameters() if p.numel() >= 64])
            start = draw.randrange(p.numel() - 63)
            p.data.view(-1)[start : start + 64] += 1.0
            same(fast(a), net(a))
            assert "the weights have changed" in places()[0]
            for _ in range(3):
                same(fast(a), net(a))
            assert on_engine(places())


def watched(*weights, sampled=frozenset()):
    guard = weight_guard.WeightGuard(weights)
    assert guard.watch(weights, [w.detach().clone() for w in weights], sampled) and guard.is_unchanged(weights)
    return guard


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_guard_sees_64_neighbours_along_any_dimension(flags, dtype, monkeypatch):
    monkeypatch.setattr(weight_guard, "_flags_work", lambda: flags)
    draw, seen = random.Random(3), 0
    for sizes in [(64,), (300,), (80, 61), (64, 64), (128, 384), (7, 122, 64), (1, 64), (59 * 61, 3)]:
        for _ in range(12):
            w = nn.Parameter(torch.randn(sizes).to(dtype))
            w = nn.Parameter(w.data.transpose(0, -1)) if draw.random() < 0.5 else w
            guard = watched(w)
            assert (guard.num_samples == 0) == flags
            dim = draw.choice([d for d, n in enumerate(w.shape) if n >= 64])
            place = [draw.randrange(n) for n in w.shape]
            start = draw.randrange(w.shape[dim] - 63)
            place[dim] = slice(start, start + 64)
            w.data[tuple(place)] += 1
            assert not guard.is_unchanged([w])
            seen += 1
    assert seen == 96


def test_a_flag_that_is_set_again_for_another_guard():
    w = nn.Parameter(torch.randn(8, 8))
    first = watched(w)
    w.data[0, 0] = 5
    second = watched(w)
    assert not first.is_unchanged([w]) and second.is_unchanged([w])
    w.untyped_storage().data_ptr()  # clears both
    third = watched(w)
    assert second.is_unchanged([w]) and third.is_unchanged([w])
    old = w.data
    w.data = torch.randn(8, 8)
    fourth = watched(w)
    w.data = old
    old[0] = 1
    assert not any(g.is_unchanged([w]) for g in (first, second, third, fourth))


def test_a_flag_that_is_cleared_too_often():
    w = nn.Parameter(torch.randn(8, 8))
    guard = watched(w)
    for _ in range(weight_guard.MAX_CLEARED):
        w.data_ptr()
        assert guard.is_unchanged([w])
    w.data_ptr()
    assert not guard.is_unchanged([w])


def test_flags_copy_nothing():
    w = nn.Parameter(torch.randn(8, 8))
    array, address = w.detach().numpy(), w.data_ptr()
    guard = watched(w)
    w.data[0] = 5
    assert not guard.is_unchanged([w]) and w.data_ptr() == address and array[0, 0] == 5
    array[1] = 6
    assert w[1, 0] == 6


def test_weights_that_a_model_takes_for_writing():
    a, b = torch.zeros(3), torch.zeros(3)
    assert weight_guard.find_unsafe(lambda: a + b, [a, b]) == set()
    assert weight_guard.find_unsafe(lambda: (a + b, b.numpy()), [a, b]) == {1}
    assert weight_guard.find_unsafe(lambda: 1 // 0, [a, b]) == {0, 1}


@pytest.mark.skipif(sys.platform != "linux", reason="private mappings are found on Linux")
def test_weights_in_a_mapped_file_get_memory_of_their_own(tmp_path):
    torch.save(mlp().state_dict(), tmp_path / "weights.pt")
    net = mlp()
    net.load_state_dict(torch.load(tmp_path / "weights.pt", mmap=True), assign=True)
    gc.collect()
    weights = list(net.parameters())
    values, addresses = [w.detach().clone() for w in weights], [w.data_ptr() for w in weights]
    assert weight_guard.find_sampled(weights) == set()
    assert all(map(torch.equal, weights, values)) and watched(*weights).num_samples == 0
    assert not set(addresses) & {w.data_ptr() for w in weights}
    state = torch.load(tmp_path / "weights.pt", mmap=True)  # other tensors keep them where they are
    net.load_state_dict(state, assign=True)
    weights = list(net.parameters())
    addresses = [w.data_ptr() for w in weights]
    assert weight_guard.find_sampled(weights) == set(range(len(weights)))
    assert addresses == [w.data_ptr() for w in weights]


def test_weights_that_change_while_they_are_compiled(places, monkeypatch):
    net, a = mlp(), x()
    build = subgraph.Subgraph._build

    def build_and_change(self, *args):
        engine = build(self, *args)
        net.up.weight.data[:8].mul_(3)
        return engine

    monkeypatch.setattr(subgraph.Subgraph, "_build", build_and_change)
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(2):
            same(fast(a), net(a))
    assert not on_engine(places())


def test_weights_that_stay_are_compiled_again(places, monkeypatch):
    monkeypatch.setattr(subgraph, "CALLS_BEFORE_REBUILD", 3)
    monkeypatch.setattr(subgraph, "MAX_REBUILDS", 2)
    net, a = mlp(), x()
    fast = compiled(net)
    with torch.no_grad():
        fast(a)
        assert on_engine(places())
        for rebuild in range(4):
            net.up.weight.mul_(1.5)
            for _ in range(6):
                same(fast(a), net(a))
            lines = places()
            assert on_engine(lines[1:]) if rebuild < 2 else len(lines) == (rebuild == 2)
            assert all("the weights have changed" in line for line in lines[:1])


def test_training_between_evaluations():
    net, a = mlp(), x()
    fast = compiled(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        fast(a).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            same(fast(a), net(a))


def test_blocks_of_the_same_code_have_their_own_weights(places):
    blocks, a = [mlp() for _ in range(3)], x()
    fast = [compiled(block) for block in blocks]
    with torch.no_grad():
        for _ in range(3):
            for f, block in zip(fast, blocks):
                same(f(a), block(a))
    lines = places()
    assert on_engine(lines) and len(lines) == 3


@pytest.mark.parametrize("registered", [False, True])
def test_a_state_that_is_a_new_tensor_in_each_call(registered, places, monkeypatch):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Mlp()
            if registered:
                self.register_buffer("state", torch.zeros(4, 8))
            else:
                self.state = torch.zeros(4, 8)

        def forward(self, x):
            self.state = self.net(x + self.state)
            return self.state + 1

    monkeypatch.setattr(subgraph, "MAX_WEIGHT_SETS", 4)
    net, other, a = Recurrent().eval(), Recurrent().eval(), x()
    other.load_state_dict(net.state_dict())
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(8):
            same(fast(a), other(a))
    assert len(places()) <= 2  # not compiled in each call


def test_a_model_is_freed():
    net, a = mlp(), x()
    dead = weakref.ref(net.up.weight)
    fast = compiled(net)
    with torch.no_grad():
        fast(a)
    del fast, net
    gc.collect()
    assert dead() is None
    other = mlp()  # perhaps at the same addresses
    with torch.no_grad():
        same(compiled(other)(a), other(a))


def test_masks_stay_attached():
    net, a = mlp(), x()
    rarefy.prune_(net, sparsity=0.5, score="magnitude")
    with torch.no_grad():
        same(compiled(net)(a), net(a))


# ---- inputs and outputs ---------------------------------------------------------------------------------------------


RETURNS = {
    "the input": lambda x, y: (x, y),
    "a view of the input": lambda x, y: (x[:, 1:], y),
    "the input twice": lambda x, y: [x, x, y],
    "a view of an output": lambda x, y: (y, y.view(-1), y[0]),
    "an output twice": lambda x, y: (y, y),
    "a transposed output": lambda x, y: y.T,
    "parts of an output": lambda x, y: y.chunk(2, -1),
    "a constant": lambda x, y: (y, torch.arange(3), torch.zeros(2)),
    "numbers": lambda x, y: {"y": y, "n": [x.shape[0], 3, None, "text"]},
    "nested": lambda x, y: {"a": [y, (y + 1,)], "b": {"c": y.sum()}},
    "integers": lambda x, y: y.argmax(-1),
    "booleans": lambda x, y: (y > 0, y),
    "expanded": lambda x, y: y[:, None].expand(-1, 3, -1),
    "contiguous": lambda x, y: x.contiguous(),
}


@pytest.mark.parametrize("what", RETURNS)
def test_outputs(what):
    net, a = Then(RETURNS[what]), x()
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(3):
            b, c = a.clone(), a.clone()
            got, want = fast(b), net(c)
            same(got, want)
            for t in [got, want]:  # who writes into an output must change the same tensors
                first = (
                    t
                    if isinstance(t, torch.Tensor)
                    else next(v for v in torch.utils._pytree.tree_leaves(t) if isinstance(v, torch.Tensor))
                )
                if first.is_floating_point() and what != "expanded":
                    first.fill_(7.0)
                elif what == "a constant":
                    t[1].fill_(9)
            same(got, want)
            same(b, c)


def test_constants_that_are_changed_do_not_leak():
    net, a = Then(lambda x, y: (y, torch.arange(3) * 2, torch.ones(2) * 3)), x()
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(3):
            got = fast(a)
            same(got, net(a))
            for t in got:
                t.fill_(5)


SHARED = {
    "a constant and a view of it": lambda x, y: (y, c := torch.arange(6) * 2, c[1:]),
    "a constant twice": lambda x, y: (y, c := torch.ones(2) * 3, c),
    "a transposed output": lambda x, y: (y, y.T, y[1:]),
    "a reshaped transposed output": lambda x, y: (t := y.T.contiguous().T, t[0]),
}


@pytest.mark.parametrize("what", SHARED)
def test_outputs_that_share_memory(what, places):
    net, a = Then(SHARED[what]), x()
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(3):
            got, want = fast(a), net(a)
            same(got, want)
            for t in (got, want):
                t[0].fill_(3)
                t[1].fill_(5)
            same(got, want)
    if "a view" in what:
        assert "its outputs share memory with inputs or with each other" in places()[0]


def test_weights_as_outputs():
    class Tells(Mlp):
        def forward(self, x):
            return super().forward(x), self.up.weight, self.norm.bias[1:]

    net, a = Tells().eval(), x()
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(2):
            got = fast(a)
            assert got[2].data_ptr() == net.norm.bias[1:].data_ptr()
            same(got[0], net(a)[0])
            got[2].add_(1)


MUTATIONS = {
    "in place": lambda x, y: x.add_(y),
    "a row": lambda x, y: x[0].copy_(y[1]),
    "an index": lambda x, y: (x.__setitem__((0, 1), 5.0), y)[1],
    "relu": lambda x, y: F.relu(x, inplace=True) + y,
    "out": lambda x, y: torch.add(y, 1, out=x),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_inputs_that_are_changed(what):
    net, a = Then(MUTATIONS[what]), x()
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(2):
            b, c = a.clone(), a.clone()
            same(fast(b), net(c))
            same(b, c)


def test_buffers_that_are_changed():
    class Counts(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + self.calls

    net, other, a = Counts().eval(), Counts().eval(), x()
    other.load_state_dict(net.state_dict())
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(3):
            same(fast(a), other(a))
        same(net.calls, other.calls)


LAYOUTS = {
    "transposed": lambda: x(8, 4).T,
    "every second": lambda: x(8, 8)[::2],
    "columns": lambda: x(4, 20)[:, 3:11],
    "expanded": lambda: x(1, 8).expand(4, 8),
    "three dimensions": lambda: x(2, 3, 8),
    "one row": lambda: x(1, 8),
    "one dimension": lambda: x(8),
    "no row": lambda: x(0, 8),
    "not a number": lambda: x().fill_(float("nan")),
    "infinite": lambda: x().fill_(float("inf")),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_layouts_of_inputs(what):
    net, a = mlp(), LAYOUTS[what]()
    fast = compiled(net)
    with torch.no_grad():
        for b in (a, a.clone(), x(), LAYOUTS[what]()):
            same(fast(b), net(b))


@pytest.mark.parametrize("model_too", [False, True])
def test_channels_last(model_too):
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    net, a = Features().eval(), torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    net = net.to(memory_format=torch.channels_last) if model_too else net
    fast = compiled(net)
    with torch.no_grad():
        for b in (a, a.contiguous(), a[:, :, :5]):
            same(fast(b), net(b))


def test_an_output_of_inference_mode_and_one_of_no_grad():
    net, a = mlp(), x()
    fast = compiled(net)
    for first, second in ((torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.no_grad)):
        torch._dynamo.reset()
        with first():
            same(fast(a), net(a))
        with second():
            same(fast(a), net(a))
            b = x()
            same(fast(b), net(b))
        with torch.no_grad():
            fast(a).add_(1)
            same(fast(b), net(b))  # a tensor of inference mode
            same(fast(a), net(a))


def test_a_model_of_inference_mode():
    with torch.inference_mode():
        net, a = mlp(), x()
        fast = compiled(net)
        same(fast(a), net(a))
        net.up.weight.mul_(2)
        same(fast(a), net(a))


def test_errors_are_eagers(places):
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.net = nn.Embedding(9, 8), Mlp()

        def forward(self, ids):
            return self.net(self.table(ids))

    net = Embeds().eval()
    fast = compiled(net)
    good, bad = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 10]])
    with torch.no_grad():
        for ids in (bad, good, bad, good):
            if ids is bad:
                with pytest.raises(IndexError, match="index out of range in self"):
                    fast(ids)
            else:
                same(fast(ids), net(ids))
    assert on_engine(places())


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_that_change(places):
    net, fast = mlp(), compiled(mlp())
    fast = compiled(net)
    with torch.no_grad():
        for n in (4, 7, 2, 1, 33, 0, 5):
            a = x(n, 8)
            same(fast(a), net(a))
    assert on_engine(places())


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic(dynamic):
    net = Then(lambda x, y: (y.view(x.shape[0] // 2, -1), x.shape[0] + 1))
    fast = compiled(net, dynamic=dynamic)
    with torch.no_grad():
        for n in (4, 6, 2):
            a = x(n, 8)
            same(fast(a), net(a))


def test_mark_dynamic(places):
    net = Then(lambda x, y: y.reshape(-1, 2, x.shape[0] * 4 // x.shape[0]))
    fast = compiled(net, fullgraph=True)
    with torch.no_grad():
        for n in (4, 6, 11):
            a = x(n, 8)
            torch._dynamo.mark_dynamic(a, 0)
            same(fast(a), net(a))
    assert len(places()) == 1


def test_numbers_as_inputs():
    net = Then(lambda x, y, n, factor: y[:n] * factor + n)
    fast = compiled(net)
    with torch.no_grad():
        for n, factor in ((1, 0.5), (2, 0.5), (3, 1.5), (4, 2.5), (3, -1.0)):
            a = x()
            same(fast(a, n, factor), net(a, n, factor))


BRANCHES = {
    "remainder": lambda x, y: y * 2 if x.shape[0] % 4 == 0 else y - 1,
    "unequal": lambda x, y: y * 2 if x.shape[0] != 7 else y - 1,
    "product": lambda x, y: y * 2 if x.shape[0] * x.shape[1] > 60 else y - 1,
    "two sizes": lambda x, y: y * 2 if x.shape[0] > y.shape[1] else y - 1,
}


@pytest.mark.parametrize("dynamic", [None, True, "marked"])
@pytest.mark.parametrize("branch", BRANCHES)
def test_branches_on_sizes(branch, dynamic, places):
    net = Then(BRANCHES[branch])
    fast = compiled(net, dynamic=True if dynamic is True else None)
    with torch.no_grad():
        for n in (5, 8, 4, 9, 7, 12, 3, 20, 1, 6, 2, 16):
            a = x(n, 8)
            if dynamic == "marked":
                torch._dynamo.maybe_mark_dynamic(a, 0)
            same(fast(a), net(a))
    assert on_engine(places()) or dynamic is True  # which makes the eps of LayerNorm an input


def test_two_inputs_of_one_size():
    net = Then(lambda x, y, other: y + other)
    fast = compiled(net, dynamic=True)
    with torch.no_grad():
        for n in (4, 6, 3):
            same(fast(a := x(n, 8), b := x(n, 8)), net(a, b))
        same(fast(a := x(5, 8), b := x(1, 8)), net(a, b))
        same(fast(a, a), net(a, a))


# ---- programs around graphs -----------------------------------------------------------------------------------------


def test_graph_breaks(places):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Mlp(), Mlp(), Mlp()

        def forward(self, x):
            y = self.a(x)
            torch._dynamo.graph_break()
            y = self.b(y)
            if float(y.sum()) > 0:
                y = y * 2
            return self.c(y) + x

    net = Breaks().eval()
    fast = compiled(net)
    with torch.no_grad():
        for a in (x(), -x(), x(), x(6, 8)):
            same(fast(a), net(a))
    assert sum(line.startswith("engine") for line in places()) >= 3


def test_breaks_inside_equal_blocks(places):
    class Block(Mlp):
        def forward(self, x):
            y = super().forward(x)
            torch._dynamo.graph_break()
            return x + y

    net, a = nn.Sequential(*[Block() for _ in range(4)]).eval(), x()
    fast = compiled(net)
    with torch.no_grad():
        for _ in range(2):
            same(fast(a), net(a))
        net[2].up.weight.mul_(3)
        for _ in range(2):
            same(fast(a), net(a))
    assert any(line.startswith("engine") for line in places())


def test_hooks_and_vmap():
    net, a = mlp(), x()
    seen = []
    net.up.register_forward_hook(lambda m, i, o: seen.append(1) or o * 2)
    fast = compiled(net)
    with torch.no_grad():
        same(fast(a), net(a))
        same(torch.func.vmap(fast)(a), torch.func.vmap(net)(a), 1e-4)
    other = compiled(lambda x: torch.func.vmap(net)(x))
    with torch.no_grad():
        same(other(a), net(a), 1e-4)


def test_several_threads():
    net = mlp()
    fast = compiled(net, dynamic=True)
    failures = []

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for n in (4, 6, 3, 4, 9) * 3:
                    a = torch.randn(n, 8, generator=g)
                    same(fast(a), net(a))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_modes_that_see_operators():
    class Counts(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operators = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.operators.append(operator)
            return operator(*args, **(kwargs or {}))

    net, a = mlp(), x()
    fast = compiled(net)
    with torch.no_grad():
        fast(a)
        with Counts() as eager:
            net(a)
        with Counts() as counted:
            fast(a)
    assert counted.operators == eager.operators


@pytest.mark.slow
def test_generation():
    net = tiny_llama()
    ids = torch.randint(2, 64, (1, 5))
    want = net.generate(ids, max_new_tokens=8, do_sample=False)
    net.forward = compiled(net.forward)
    for _ in range(2):
        assert torch.equal(net.generate(ids, max_new_tokens=8, do_sample=False), want)


def test_outputs_of_transformers():
    net = tiny_bert()
    batch = {"input_ids": torch.randint(64, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    batch["attention_mask"][1, 5:] = 0
    fast = compiled(net)
    with torch.no_grad():
        got, want = fast(**batch), net(**batch)
    assert type(got) is type(want) and list(got) == list(want)
    for name in want:
        same(got[name], want[name])  # at padding too


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.DYNAMO)
def test_models_of_the_zoo(name, places):
    for library in ("torchvision", "transformers", "timm"):
        pytest.importorskip(library)
    make, example = zoo.dynamo_cases()[name]
    net = make()
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    with torch.no_grad():
        want, fast = net(*args, **kwargs), compiled(net)
        results = [fast(*args, **kwargs) for _ in range(3)]
    for got in results:
        assert type(got) is type(want)
        same(
            *[[t for t in torch.utils._pytree.tree_leaves(o) if isinstance(t, torch.Tensor)] for o in (got, want)], 1e-4
        )
    engines = [line for line in places() if line.startswith("engine")]
    assert len(engines) >= (2 if name.endswith("breaks") else 1)


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, most", [("int8", 0.1), ("bf16", 0.05), ("int16", 2e-3)])
def test_precision(precision, most, places):
    net, a = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval(), x(4, 64)
    with torch.no_grad():
        got, want = compiled(net, options={"precision": precision})(a), net(a)
    assert 1e-5 < relative_distance(got, want) < most and on_engine(places())


@pytest.mark.parametrize("tune", [False, True])
def test_a_model_in_bf16_may_run_in_fp32(tune, places):
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).bfloat16().eval()
    a = x(4, 64).bfloat16()
    with torch.no_grad():
        got = compiled(net, options={"precision": "fp32", "tune": tune})(a)
        want = net.float()(a.float())
    assert got.dtype == torch.bfloat16 and relative_distance(got, want) < 0.02 and (tune or on_engine(places()))


def test_a_precision_without_effect_runs_in_eager_torch(places):
    net, a = nn.Conv1d(3, 4, 3), torch.randn(2, 3, 9)
    with torch.no_grad():
        same(compiled(net, options={"precision": "int8"})(a), net(a))
    assert "no effect" in places()[0]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"options": {"precision": "int7"}}, "unknown precision 'int7'; choose from bf16, fp32, int16, int8"),
        ({"options": {"verbos": True}}, "unknown field 'verbos'; choose from .*did you mean 'verbose'"),
        ({"options": {"tune": 1}}, "tune: expected true or false, got 1"),
        ({"mode": "max-autotune"}, "backend 'rarefy' has no mode="),
        ({"options": "int8"}, "options: expected a dict such as {'precision': 'int8'}, got str"),
    ],
)
def test_wrong_options_are_errors(more, message):
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message):
        compiled(mlp(), **more)(x())


def test_verbose_prints_a_line_for_each_graph(capsys):
    net, a = Mlp().eval(), x()
    fast = compiled(net, options={"verbose": True})
    with torch.no_grad():
        fast(a)
    fast(a)
    first, second = capsys.readouterr().err.splitlines()
    assert (
        first.startswith("rarefy: graph 0/0 (test_dynamo.py, line ") and "in forward): engine: 1 native call" in first
    )
    assert second.endswith(
        "eager torch: gradients are computed: call it under torch.no_grad() or torch.inference_mode()"
    )


@pytest.mark.slow
def test_torch_logs_names_the_reasons():
    code = "import torch, rarefy.integrations.dynamo as d; torch.compile(torch.nn.Linear(2, 2), backend=d.backend)(torch.ones(1, 2))"
    env = {**os.environ, "TORCH_LOGS": LOGGER}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=400)
    assert "eager torch: gradients are computed" in result.stderr


@pytest.mark.parametrize("limit, engine", [(0.0, False), (1e9, True)])
def test_the_faster_one_runs(limit, engine, monkeypatch, places):
    monkeypatch.setenv("RAREFY_TUNE", "1")
    monkeypatch.setattr(subgraph, "CLEARLY_FASTER", limit)
    monkeypatch.setattr(subgraph, "MAX_SECONDS", 0.01)
    net = Net().eval()
    fast = compiled(net)
    with torch.no_grad():
        for n in (4, 6, 9):
            images = torch.randn(n, 3, 9, 9)
            same(fast(images), net(images))
    lines = places()
    assert on_engine(lines) == engine and len(lines) >= 2
    assert all("engine" in line and "eager torch" in line and " ms" in line for line in lines)
