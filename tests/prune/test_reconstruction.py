"""Blocks that learn the dense model's outputs: zeros stay, held-out errors never rise, the model comes closer."""

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, tiny_bert, tiny_llama
from helpers.small_blocks import Decoder, lin, module, rows
from rarefy.calibration.sequential import (
    Block,
    BlockStep,
    GroupStep,
    calibrate_sequentially,
    find_blocks,
    layer_groups,
    with_block_steps,
)
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.model.layers import select_layers
from rarefy.prune import layerwise
from rarefy.prune.reconstruction import reconstruct_

LEARN = rarefy.Solver(name="refit", reconstruct=4, lr=1e-2)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x, scale=1.0):
        return x + scale * self.b(torch.relu(self.a(self.norm(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=2.0)
        return self.head(x)


def data(count=6):
    return [torch.randn(64, 5) @ torch.randn(5, 16) + 0.1 * torch.randn(64, 16) for _ in range(count)]


def test_blocks_are_the_outermost_lists_of_equal_modules():
    model = tiny_llama()
    found = find_blocks(model, select_layers(model))
    assert [b.name for b in found] == ["model.layers.0", "model.layers.1"]
    assert all(len(b.layers) == 7 for b in found)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert [b.name for b in find_blocks(encoder, select_layers(encoder))] == ["layers.0", "layers.1"]
    with pytest.raises(ModelError, match="Net has no list of equal blocks to reconstruct"):
        find_blocks(Net(), select_layers(Net()))


def test_ends_come_with_the_real_arguments_and_the_dense_outputs():
    model, batches = Stack().eval(), data(3)
    want = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, out, i=i: want.setdefault(i, []).append(out.detach()))
    with torch.no_grad():
        for x in batches:
            model(x)
    for block in model.blocks:
        block._forward_hooks.clear()
    chosen, seen = select_layers(model), 0
    for stop in calibrate_sequentially(
        model,
        batches,
        with_block_steps(layer_groups(model, batches[0], chosen), find_blocks(model, chosen)),
        dense=True,
    ):
        if isinstance(stop, GroupStep):
            stop.weights = {l.full_name: l.original.detach() * 0.9 for l in stop.group.layers}
            continue
        assert isinstance(stop, BlockStep) and stop.block.name == f"blocks.{seen}"
        for (args, kwargs, target), dense in zip(stop.calls, want[seen]):
            torch.testing.assert_close(target, dense)
            assert kwargs == {"scale": 2.0} and len(args) == 1
        seen += 1
    assert seen == 3


def test_a_changed_block_is_run_again():
    """What comes after a block sees the weights that it ended with."""
    model, batches = Stack().eval(), data(2)
    chosen = select_layers(model)
    for stop in calibrate_sequentially(
        model, batches, with_block_steps(layer_groups(model, batches[0], chosen), find_blocks(model, chosen))
    ):
        if isinstance(stop, BlockStep):
            stop.block.module.b.bias.data += 1.0
            stop.changed = True
        elif stop.group.layers[0].name == "blocks.2.a":
            with torch.no_grad():
                x = torch.cat([model.blocks[2].norm(model.blocks[1](model.blocks[0](b, 2.0), 2.0)) for b in batches])
            torch.testing.assert_close(stop.gram.H[0], x.T @ x / len(x))


def test_the_held_out_error_never_rises_and_zeros_stay():
    torch.manual_seed(2)
    block = Residual()
    layers = select_layers(block)
    x = data(5)
    with torch.no_grad():
        calls = [((b,), {}, block(b)) for b in x]
        masks = {l.full_name: torch.rand_like(l.weight) > 0.5 for l in layers}
        for l in layers:
            l.original.mul_(masks[l.full_name])
    for lr, better in ((1e-2, True), (1e3, False)):
        before = {k: v.clone() for k, v in block.state_dict().items()}
        end = BlockStep(Block("", block, tuple(layers)), calls)
        start, now = reconstruct_(end, masks, epochs=4, lr=lr)
        assert (now < 0.7 * start) if better else (now == start)
        assert end.changed is better
        assert all((l.original[~masks[l.full_name]] == 0).all() for l in layers)
        if not better:
            assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in block.parameters())


def test_the_whole_model_comes_closer():
    batches, errors = data(), []
    for reconstruct in (0, 5):
        torch.manual_seed(4)
        model = Stack().eval()
        with torch.no_grad():
            want = torch.cat([model(b) for b in batches])
        lr = 3e-3 if reconstruct else None
        solver = rarefy.Solver(name="obs", reconstruct=reconstruct, lr=lr)
        rarefy.prune_(model, sparsity=0.6, solver=solver, data=batches, layers="blocks.*")
        with torch.no_grad():
            errors.append(float((torch.cat([model(b) for b in batches]) - want).square().mean()))
        assert all((model.get_submodule(n).weight == 0).float().mean() == pytest.approx(0.6, abs=0.01)
                   for n in ("blocks.0.a", "blocks.2.b"))  # fmt: skip
    assert errors[1] < 0.8 * errors[0]


def test_an_idle_rate_is_an_error():
    with pytest.raises(PatternError, match=r"lr=0.1 has no effect without reconstruct"):
        rarefy.prune_(Stack(), sparsity=0.5, solver=rarefy.Solver(name="obs", lr=0.1), data=data())


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_presets_run_on_any_transformer(preset, make):
    model = make()
    batches = [{"input_ids": torch.randint(0, 64, (2, 16))} for _ in range(3)]
    receipt = rarefy.compress_(model, preset, batches, sparsity=0.4)
    assert receipt.sparsity["achieved"] == pytest.approx(0.4, abs=0.01)


def test_key_value_caches_are_off_meanwhile():
    """A block that is run again would attend to its own past."""
    data = [{"input_ids": torch.randint(0, 64, (2, 12))} for _ in range(3)]
    how = {"sparsity": 0.5, "solver": rarefy.Solver(name="refit", reconstruct=2), "data": data}
    caching, plain = tiny_llama(), tiny_llama()
    assert caching.config.use_cache
    plain.config.use_cache = False
    rarefy.prune_(caching, **how)
    rarefy.prune_(plain, **how)
    assert caching.config.use_cache and not plain.config.use_cache
    for (name, a), b in zip(caching.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(a, b), name


def test_blocks_may_be_named(monkeypatch):
    model = tiny_llama()
    chosen = select_layers(model, "model.layers.*")
    parts = find_blocks(model, chosen, "model.layers.*.self_attn|*.mlp")
    assert [b.name for b in parts[:3]] == ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn"]
    assert [len(b.layers) for b in parts] == [4, 3, 4, 3]
    assert [b.name for b in find_blocks(model, chosen, "model.layers.*")] == ["model.layers.0", "model.layers.1"]
    with pytest.raises(ModelError, match=r"match no module of LlamaForCausalLM .*did you mean 'model.layers.0.mlp'"):
        find_blocks(model, chosen, "model.layer.0.mlp")
    data = [{"input_ids": torch.randint(0, 64, (2, 12))} for _ in range(3)]
    learnt, real = [], layerwise.reconstruct_

    def spy(end, *a, **k):
        learnt.append((end.block.name, *real(end, *a, **k)))
        return learnt[-1][1:]

    monkeypatch.setattr(layerwise, "reconstruct_", spy)
    how = rarefy.Solver(name="refit", reconstruct=3, lr=1e-3, blocks="*.self_attn|*.mlp")
    rarefy.prune_(model, sparsity=0.6, data=data, solver=how)
    assert [n for n, _, _ in learnt] == [b.name for b in parts]
    assert all(after <= before for _, before, after in learnt) and any(a < b for _, b, a in learnt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "x"}, "blocks='x' has no effect without"),
        ({"blocks": 3, "reconstruct": 1}, "blocks: expected a string, got 3"),
    ],
)
def test_wrong_blocks(options, message):
    with pytest.raises(PatternError, match=message):
        rarefy.prune_(tiny_llama(), sparsity=0.5, solver=rarefy.Solver(name="obs", **options), data=[torch.ones(1)])


@pytest.mark.parametrize("lean", [False, True])
def test_zeros_stay_in_groups_that_span_blocks(lean, tmp_path):
    net, more = Decoder(), {"memory": "1G", "resume_dir": tmp_path / "w"} if lean else {}
    report = rarefy.prune_(net, sparsity=0.5, solver=LEARN, data=rows(), **more)
    rarefy.fold_(net)
    for row in report.rows:
        assert float((net.get_submodule(row["layer"]).weight == 0).float().mean()) == row["sparsity"] == 0.5


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
            "called several times in a pass, so blocks.0 cannot be reconstructed",
        ),
        (
            nn.Sequential(block(lambda m, x: None), block(lambda m, x: torch.ones(1))),
            "returns NoneType without a tensor",
        ),
    ],
)
def test_blocks_that_cannot_be_reconstructed(net, message):
    with pytest.raises((ModelError, DataError), match=message):
        rarefy.prune_(net, sparsity=0.5, solver=LEARN, data=rows())


def test_blocks_with_dict_outputs_and_shared_layers():
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


def test_zeros_and_frozen_biases_are_not_trained():
    net = nn.Sequential(block(), block())
    rarefy.fold_((rarefy.prune_(net, sparsity=0.5, layers="*.g"), net)[1])
    zeros = [b.g.weight == 0 for b in net]
    for b in net:
        b.f.bias.requires_grad_(False)
    biases = [b.f.bias.clone() for b in net]
    rarefy.prune_(net, sparsity=0.5, layers="*.f", solver=LEARN, data=rows())
    for b, zero, bias in zip(net, zeros, biases):
        assert (b.g.weight[zero] == 0).all() and torch.equal(b.f.bias, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_blocks_are_reconstructed(dtype):
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
