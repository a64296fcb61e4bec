"""Models that do unusual things in their forward pass, and states that a walk must leave as they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from rarefy.calibration.sequential import (
    BlockStep,
    GroupStep,
    calibrate_sequentially,
    find_blocks,
    layer_groups,
    with_block_steps,
)
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.model.layers import select_layers
from rarefy.prune.solver_config import SOLVERS

LEARN = rarefy.Solver(name="refit", reconstruct=4, lr=1e-2)


def rows(count=3, width=6, size=40):
    return [torch.randn(size, width, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def module(forward, **parts):
    """A module of these parts with this forward."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Made.forward = lambda self, x: forward(self, x)
    return Made().eval()


def lin(width=6):
    return nn.Linear(width, width)


class Decoder(nn.Module):
    """Blocks that each read one memory, as cross-attention does."""

    def __init__(self, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": lin(), "c": lin(), "o": lin()}) for _ in range(depth))
        for block in self.blocks:
            block.forward = lambda x, memory, b=block: x + b["o"](torch.relu(b["a"](x) + b["c"](memory)))

    def forward(self, x):
        memory = x * 2
        for block in self.blocks:
            x = block(x, memory)
        return x


@pytest.mark.parametrize("lean", [False, True])
def test_zeros_stay_in_layers_whose_group_is_wider_than_a_block(lean, tmp_path):
    net, more = Decoder(), {"memory": "1G", "resume_dir": tmp_path / "w"} if lean else {}
    report = rarefy.prune_(net, sparsity=0.5, solver=LEARN, data=rows(), **more)
    rarefy.fold_(net)
    for row in report.rows:
        assert float((net.get_submodule(row["layer"]).weight == 0).float().mean()) == row["sparsity"] == 0.5


def test_a_run_goes_on_between_a_group_and_its_block(tmp_path, monkeypatch):
    from helpers.interrupt import stopping

    want = Decoder()
    state = {n: t.clone() for n, t in want.state_dict().items()}
    rarefy.prune_(want, sparsity=0.5, solver=LEARN, data=rows())
    for writes in (1, 2, 3, 4):
        nets = [Decoder(), Decoder()]
        for net in nets:
            net.load_state_dict(state)
        with monkeypatch.context() as patch:
            stopping(patch, writes)
            with pytest.raises(KeyboardInterrupt):
                rarefy.prune_(nets[0], sparsity=0.5, solver=LEARN, data=rows(), resume_dir=tmp_path / f"{writes}")
        rarefy.prune_(nets[1], sparsity=0.5, solver=LEARN, data=rows(), resume_dir=tmp_path / f"{writes}")
        assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), nets[1].state_dict().values()))


def test_a_change_in_place_makes_another_input():
    net = module(lambda m, x: m.b((x := x * 1, y := m.a(x), x.add_(5 * y))[0]), a=lin(), b=lin())
    assert [[l.name for l in g.layers] for g in layer_groups(net, rows()[0], select_layers(net))] == [["a"], ["b"]]


def grams(net, data, change=None, **how):
    """Gram matrices by the first layer of each stop; `change` = a layer that is emptied at its stop."""
    found = {}
    for stop in calibrate_sequentially(net, data, layer_groups(net, data[0], select_layers(net), **how), **how):
        found[stop.group.layers[0].name] = stop.gram
        for layer in stop.group.layers:
            if layer.name == change:
                stop.weights[change] = torch.zeros_like(layer.original)
    return found


def test_what_was_seen_through_old_weights_is_forgotten():
    def loop(m, x):
        for _ in range(3):
            x = x + m.b(torch.relu(m.a(x)))
        return x

    net, data = module(loop, a=lin(), b=lin()), rows()
    found = grams(net, data, change="a")["b"]
    inside = [torch.relu(net.a.bias).expand(40, 6)] * 9  # a is empty: only its bias is left
    assert found.tokens == 360
    torch.testing.assert_close(found.H[0], sum(x.T @ x for x in inside).detach() / 360)


def test_the_untouched_model_is_untouched():
    """kv shares its input with qa but runs after qb: the dense pass must not meet it emptied."""
    net = module(lambda m, x: m.o(m.qb(torch.relu(m.qa(x))) + 5 * m.kv(x)), qa=lin(), qb=lin(), kv=lin(), o=lin())
    data = rows()
    q, kv = [net.qb(torch.relu(net.qa(x))) for x in data], [5 * net.kv(x) for x in data]
    cut = [x @ torch.zeros(6, 6) + 5 * net.kv.bias for x in data]
    want = sum((k - c).T @ (a + c) for a, k, c in zip(q, kv, cut)).detach() / 120
    found = grams(net, data, change="kv", dense=True)["o"]
    torch.testing.assert_close(found.cross[0], want, rtol=1e-4, atol=1e-4)


class Part(nn.Module):
    """A block; blocks are of one class, whatever their forward does here."""

    def __init__(self, way):
        super().__init__()
        self.f, self.g, self.way = lin(), lin(), way

    def forward(self, x):
        return self.way(self, x)


def block(way=lambda m, x: x + m.g(torch.relu(m.f(x)))):
    return Part(way).eval()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(block(lambda m, x: x.add_(m.g(m.f(x * 1)))), block()), "0 changes its input in place"),
        (
            module(
                lambda m, x: [x := b(x) for _ in range(2) for b in m.blocks][-1],
                blocks=nn.ModuleList([block(), block()]),
            ),
            "called several times in a pass, blocks.0 cannot learn",
        ),
        (
            nn.Sequential(block(lambda m, x: None), block(lambda m, x: torch.ones(1))),
            "returns NoneType without a tensor",
        ),
    ],
)
def test_blocks_that_cannot_learn(net, message):
    with pytest.raises((ModelError, DataError), match=message):
        rarefy.prune_(net, sparsity=0.5, solver=LEARN, data=rows())


def test_blocks_of_dicts_and_shared_layers_learn():
    shared = lin()
    first, second = (
        block(lambda m, x: {"y": x + m.g(torch.relu(m.f(x)))}),
        block(lambda m, x: {"y": x["y"] + m.g(x["y"])}),
    )
    first.f, second.f = shared, shared
    net = nn.Sequential(first, second)
    assert [b.name for b in find_blocks(net, select_layers(net))] == ["0", "1"]
    rarefy.prune_(net, sparsity=0.5, solver=LEARN, data=rows())
    assert float((shared.weight == 0).float().mean()) == 0.5


class Same(nn.Conv2d):
    """Pads inside its forward, as TensorFlow does."""

    def forward(self, x):
        pads = []
        for d in (1, 0):
            size = x.shape[2 + d]
            out = -(-size // self.stride[d])
            need = max((out - 1) * self.stride[d] + self.kernel_size[d] - size, 0)
            pads += [need // 2, need - need // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


@pytest.mark.parametrize("size", [9, 2])
def test_convolutions_that_pad_in_their_forward(size):
    conv = Same(2, 4, 3, stride=2)
    data = [torch.randn(3, 2, size, size) for _ in range(2)]
    net = nn.Sequential(conv)
    found = grams(net, data)["0"]
    out = [net(x) for x in data]
    assert found.tokens == sum(o[:, 0].numel() for o in out)
    W = select_layers(net)[0].layout.view(conv.weight.detach()).transpose(1, 2).flatten(2)
    got = (W @ found.H @ W.transpose(1, 2)).diagonal(dim1=-2, dim2=-1).sum()
    want = sum((o - conv.bias[:, None, None]).square().sum() for o in out) / found.tokens
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_an_error_that_is_held_leaves_nothing_on_the_model(monkeypatch):
    net, data = nn.Sequential(lin(), nn.ReLU(), lin()).train(), [*rows(), rows()[0] * float("nan")]
    with pytest.raises(ModelError) as held:
        rarefy.prune_(net, sparsity=0.5, solver="obs", data=data, progress=True)
    assert held.value and net.training and torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_contexts_inside_a_forward_stay_inside():
    def cast(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = m.a(x)
        with torch.enable_grad():
            x = m.b(x.float())
        return m.c(x)

    net = module(cast, a=lin(), b=lin(), c=lin())
    seen = []
    net.c.register_forward_pre_hook(lambda *_: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))))
    rarefy.prune_(net, sparsity=0.5, solver="obs", data=rows())
    assert set(seen) == {(False, False)} and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("way", ["parametrization", "parameter"])
def test_a_weight_that_takes_no_mask_is_refused_first(way):
    net = nn.Sequential(lin(), lin())
    if way == "parameter":
        net.also = net[1].weight
    else:
        nn.utils.parametrizations.spectral_norm(net[1])
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ModelError, match="parametrization already|also the parameter"):
        rarefy.prune_(net, sparsity=0.5, solver="obs", data=rows())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_what_is_ignored_or_zero_is_not_learnt():
    net = nn.Sequential(block(), block())
    rarefy.fold_((rarefy.prune_(net, sparsity=0.5, layers="*.g"), net)[1])
    zeros = [b.g.weight == 0 for b in net]
    for b in net:
        b.f.bias.requires_grad_(False)
    biases = [b.f.bias.clone() for b in net]
    rarefy.prune_(net, sparsity=0.5, layers="*.f", solver=LEARN, data=rows())
    for b, zero, bias in zip(net, zeros, biases):
        assert (b.g.weight[zero] == 0).all() and torch.equal(b.f.bias, bias)


def test_a_compiled_model():
    net = torch.compile(nn.Sequential(lin(), nn.ReLU(), lin()), backend="eager")
    assert rarefy.prune_(net, sparsity=0.5, solver="obs", data=rows()).summary["sparsity"] == pytest.approx(
        0.5, abs=0.01
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_wide_transposed_convolutions(solver):
    net, data = nn.Sequential(nn.ConvTranspose2d(160, 4, 3)), [torch.randn(2, 160, 5, 5) for _ in range(2)]
    assert rarefy.prune_(net, sparsity=0.5, solver=solver, data=data).summary["sparsity"] == 0.5


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_damping_at_all(solver):
    data = [torch.randn(4, 6) * torch.tensor([1.0, 1, 1, 1, 1, 0]) for _ in range(1)]
    report = rarefy.prune_(
        nn.Sequential(lin()), sparsity=0.5, solver=rarefy.Solver(name=solver, damping=0.0), data=data
    )
    assert all(0 <= r["error"] < 1.0001 for r in report.rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns(dtype):
    net, data = nn.Sequential(block(), block()).to(dtype), [x.to(dtype) for x in rows()]
    ends = []
    chosen = select_layers(net)
    from rarefy.prune.reconstruction import reconstruct_

    masks = {l.full_name: torch.rand(l.original.shape) > 0.5 for l in chosen}
    for stop in calibrate_sequentially(
        net,
        data,
        with_block_steps(layer_groups(net, data[0], chosen, dense=True), find_blocks(net, chosen)),
        dense=True,
    ):
        if isinstance(stop, GroupStep):
            stop.weights |= {l.full_name: l.original * masks[l.full_name] for l in stop.group.layers}
        else:
            assert isinstance(stop, BlockStep)
            ends.append(reconstruct_(stop, masks, epochs=5, lr=1e-2))
    assert all(after < before for before, after in ends)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"allocate": "errors", "data": []}, DataError, "calibration data is empty: allocation 'errors'"),
        ({"solver": {"name": "obs", "blok": 3}}, PatternError, "unknown solver option 'blok'.*did you mean 'block'"),
        ({"solver": {"damping": 3}}, PatternError, "a solver needs a name"),
        ({"solver": "SparseGPT"}, PatternError, "unknown solver 'SparseGPT' .did you mean 'obs'"),
        ({"solver": rarefy.Solver(name="obs", damping="0.1")}, PatternError, "damping is a number, got '0.1'"),
        ({"solver": rarefy.Solver(name="obs", block=1.5)}, PatternError, "block is a whole number, got 1.5"),
        (
            {"solver": rarefy.Solver(name="obs", reconstruct=True)},
            PatternError,
            "reconstruct is a whole number, got True",
        ),
        ({"solver": rarefy.Solver(name="obs", bf16="no")}, PatternError, "bf16 is true or false, got 'no'"),
        ({"solver": rarefy.Solver(name="obs", reconstruct=1, lr=0)}, PatternError, "lr=0 learns nothing"),
    ],
)
def test_what_a_solver_cannot_be(how, kind, message):
    with pytest.raises(kind, match=message):
        rarefy.prune_(nn.Sequential(lin()), sparsity=0.5, **{"data": rows(), **how})


def test_a_solver_may_be_a_dict_and_data_a_bar():
    from tqdm import tqdm

    net = nn.Sequential(lin())
    rarefy.prune_(net, sparsity=0.5, solver={"name": "obs", "block": 2}, data=tqdm(iter(rows()), total=3, disable=True))
    assert rarefy.masks(net)


def test_a_patched_forward_stays_patched():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    own = experts.forward
    experts.forward = patched = lambda *a, **k: own(*a, **k)
    rarefy.prune_(model, sparsity=0.5, solver="obs", data=[{"input_ids": torch.randint(0, 32, (2, 20))}])
    assert experts.__dict__["forward"] is patched
