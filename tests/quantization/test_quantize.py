"""Weight quantization against slow references; zeros, GPTQ, learned rounding, saving, training and recipes."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, Tied, tiny_llama
from rarefy.common.errors import DataError, ModelError, PatternError, RecipeError
from rarefy.model.layers import all_layers, select_layers
from rarefy.model.masks import get_mask
from rarefy.model.quant_grid import Codebook, Grid, attached_grid, get_grid, recorded_grids, scale_shape
from rarefy.pipeline.dry_run import forecast
from rarefy.prune import solvers
from rarefy.quantization.config import QuantizeOptions, resolve_options
from rarefy.quantization.grids import fit_grid
from rarefy.quantization.scale_fitting import FITS, _squared_error, mse, mse_in_torch
from rarefy.recipe import parser as recipes
from rarefy.runtime import bindings

WAYS = [
    {"weights": "int8"},
    {"weights": "int8", "symmetric": False},
    {"weights": "int4", "group": 8},
    {"weights": "int4", "group": 8, "symmetric": False},
    {"weights": "int3", "symmetric": False, "fit": "hqq"},
    {"weights": "int2", "fit": "minmax"},
    {"weights": "int5", "group": "tensor"},
]


def batches(n=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=rng)
    return [torch.randn(64, 32, generator=rng) @ mix for _ in range(n)]


def mlp(width=24):
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 16))


def off(model, dense, data):
    with torch.no_grad():
        return float(
            sum((model(x) - dense(x)).square().sum() for x in data) / sum(dense(x).square().sum() for x in data)
        )


# grids


@pytest.mark.parametrize(("bits", "symmetric"), [*product(range(2, 9), [True, False])])
def test_weights_are_rounded_to_nearest(bits, symmetric):
    torch.manual_seed(bits)
    W = torch.randn(3, 8) + (0 if symmetric else 1)
    grid = fit_grid(W, (3, 2), resolve_options(QuantizeOptions(weights=f"int{bits}", group=4, symmetric=symmetric)))
    got = grid.snap(W)
    low, high = grid.range
    for i, j in product(range(3), range(8)):
        scale = float(grid.scale[i, j // 4].float())
        zero = 0 if grid.zero is None else int(grid.zero[i, j // 4])
        points = [(code - zero) * scale for code in range(low, high + 1)]
        assert 0.0 in points
        assert abs(float(got[i, j] - W[i, j])) <= min(abs(p - float(W[i, j])) for p in points) + 1e-6
        assert min(abs(p - float(got[i, j])) for p in points) < 1e-6
    assert grid.contains(got) and torch.equal(grid.values(grid.codes(W), W.dtype), got)
    assert len(range(low, high + 1)) == (2**bits - (bits == 8 and symmetric))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_fitted_scales_are_no_worse_than_minmax(fit, symmetric):
    torch.manual_seed(0)
    X = torch.randn(16, 64)
    off = {}
    for name in {fit, "minmax"}:
        scale, zero = FITS[name](X, 3, symmetric, None)
        grid = Grid(3, scale[:, None], None if zero is None else zero[:, None])
        assert zero is None or (torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() < 8)
        off[name] = (grid.snap(X) - X).square().sum(1)
    assert (off[fit] <= off["minmax"] * 1.0001).all()
    assert fit == "minmax" or off[fit].sum() < 0.9 * off["minmax"].sum()


def test_mse_uses_error_weights():
    X = torch.tensor([[10.0, *[0.3 + 0.01 * i for i in range(15)]]])
    near, far = torch.ones(1, 16), torch.ones(1, 16)
    near[0, 0], far[0, 0] = 1e6, 0.0
    big, small = (float(FITS["mse"](X, 3, True, w)[0]) for w in (near, far))
    assert small < big / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision_weights_stay_on_the_grid(dtype, bits):
    W = torch.randn(8, 64).to(dtype)
    grid = fit_grid(W, (8, 1), resolve_options(QuantizeOptions(weights=f"int{bits}", symmetric=False)))
    got = grid.snap(W)
    assert got.dtype == dtype and grid.contains(got)
    assert not grid.contains(got + grid.scale.to(dtype) / 3)


def test_scales_follow_the_weight_layout():
    net = Net()
    shapes = {l.name: scale_shape(l, None) for l in all_layers(net)}
    assert shapes == {
        "conv": (8, 1, 1, 1), "deep": (8, 1, 1, 1), "up": (2, 4, 1, 1), "hidden": (16, 1), "fc": (5, 1),
    }  # fmt: skip
    assert scale_shape(select_layers(net, "up")[0], 4) == (2, 4, 2, 2) and scale_shape(
        select_layers(net, "up")[0], 2
    ) == (4, 4, 2, 2)
    assert scale_shape(all_layers(nn.MultiheadAttention(8, 2))[0], 4) == (24, 2)
    for layer in all_layers(net):  # one scale an output: rows of the matrix do not see each other
        grid = fit_grid(layer.weight.detach(), shapes[layer.name], resolve_options(QuantizeOptions()))
        G, _, O, _ = layer.layout.shape
        spread = layer.layout.view(grid.expand(grid.scale, layer.weight.shape))
        top = layer.layout.view(layer.weight.detach()).abs().amax((1, 3))
        torch.testing.assert_close(spread[:, 0, :, 0], (top / 127).reshape(G, O))
        assert bool((spread == spread[:, :1, :, :1]).all())


# zeros survive


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4x1"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_zeros_stay_zero(way, pattern):
    net = mlp()
    rarefy.prune_(net, pattern, sparsity=0.5)
    masks = rarefy.masks(net)
    rarefy.quantize_(net, **way)
    for layer in all_layers(net):
        assert bool((layer.weight[~masks[layer.name]] == 0).all())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for x in batches(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    for layer in all_layers(net):
        grid = get_grid(layer)
        assert grid is not None and grid.contains(layer.weight.detach())
        assert bool((layer.weight[~masks[layer.name]] == 0).all())
    rarefy.fold_(net)
    assert all(bool((l.weight[~masks[l.name]] == 0).all()) and get_grid(l) is not None for l in all_layers(net))


@pytest.mark.parametrize("way", [w for w in WAYS if w["weights"] != "int8"], ids=str)
def test_zeros_stay_zero_under_gptq(way):
    net, data = mlp(), batches()
    rarefy.prune_(net, "2:4")
    masks = rarefy.masks(net)
    rarefy.quantize_(net, **way, solver="obs", data=data)
    assert all(bool((l.weight[~masks[l.name]] == 0).all()) for l in all_layers(net))
    assert all(torch.equal(masks[n], m) for n, m in rarefy.masks(net).items())


def test_pruning_keeps_the_grid():
    net = mlp()
    rarefy.quantize_(net, "int4", group=8, symmetric=False)
    before = [l.weight.detach().clone() for l in all_layers(net)]
    rarefy.prune_(net, "2:4")
    for layer, was in zip(all_layers(net), before):
        kept = get_mask(layer)
        assert kept is not None and torch.equal(layer.weight, torch.where(kept, was, 0.0))
        assert get_grid(layer).contains(layer.weight.detach())
    rarefy.fold_(net)
    assert all(get_grid(l) is not None and float((l.weight == 0).float().mean()) >= 0.5 for l in all_layers(net))


# second order


def textbook_gptq(W, H, snap, keep):
    """Round columns left to right; spread each rounding error by the inverse of the remaining H."""
    W, out = W.clone(), torch.zeros_like(W)
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        out[:, j] = torch.where(keep[:, j], snap(W[:, j]), 0.0)
        W[:, j:] -= (W[:, j] - out[:, j])[:, None] / inverse[0, 0] * inverse[0]
    return out


class Fixed:
    """A grid of one scale a row."""

    group = 0

    def __init__(self, scale):
        self.scale = scale

    def begin(self, W, kept, first):
        raise AssertionError("no groups")

    def __call__(self, w, column):
        return (w / self.scale).round().clamp(-8, 7) * self.scale


@pytest.mark.parametrize("masked", [False, True])
def test_gptq_matches_the_textbook(masked):
    rng = torch.Generator().manual_seed(0)
    W, X = (torch.randn(6, 20, generator=rng, dtype=torch.float64) for _ in range(2))
    X = torch.randn(20, 20, generator=rng, dtype=torch.float64) @ torch.randn(
        20, 300, generator=rng, dtype=torch.float64
    )
    H = X @ X.T / 300
    keep = torch.rand(6, 20, generator=rng) < (0.5 if masked else 2)
    scale = W.abs().amax(1) / 7
    U, _ = solvers.inverse_factor(H[None], 0.0)
    got, mask = solvers.obs(W[None], U, lambda s, a, b: keep[None, :, a:b], [0, 8, 16, 20], Fixed(scale[None]))
    want = textbook_gptq(W, H, lambda w: (w / scale).round().clamp(-8, 7) * scale, keep)
    torch.testing.assert_close(got[0], want, rtol=1e-6, atol=1e-8)
    assert torch.equal(mask[0], keep)


class Recorder(Fixed):
    """Records what it gets when a group begins."""

    group = 4

    def __init__(self, scale):
        super().__init__(scale)
        self.seen = {}

    def begin(self, W, kept, first):
        assert kept.shape == W.shape and kept.all()
        self.seen[first] = W.clone()


def test_group_scales_see_propagated_errors():
    rng = torch.Generator().manual_seed(1)
    W = torch.randn(5, 16, generator=rng, dtype=torch.float64)
    X = torch.randn(16, 200, generator=rng, dtype=torch.float64)
    H = X @ X.T / 200 + 0.5
    scale = W.abs().amax(1) / 3
    U, _ = solvers.inverse_factor(H[None], 0.0)
    all_ = torch.ones(1, 5, 16, dtype=torch.bool)
    snaps = [Recorder(scale[None]) for _ in range(2)]
    for snap, edges in zip(snaps, ([0, 16], [0, 4, 8, 12, 16])):
        solvers.obs(W[None], U, lambda s, a, b: all_[..., a:b], edges, snap)
    assert sorted(snaps[0].seen) == [0, 4, 8, 12]
    for first, seen in snaps[0].seen.items():  # in one block or in several: the same
        torch.testing.assert_close(seen, snaps[1].seen[first])
    assert not torch.allclose(snaps[0].seen[8][0].T, W[:, 8:12])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gptq_lowers_the_output_error(way):
    dense, data = mlp(), batches()
    near, far = copy.deepcopy(dense), copy.deepcopy(dense)
    rarefy.quantize_(far, **way)
    report = rarefy.quantize_(near, **way, solver="obs", data=data)
    assert off(near, dense, batches(seed=0)) < (0.9 if way["weights"] != "int8" else 1.0) * off(far, dense, data)
    for layer in all_layers(near):
        assert get_grid(layer).contains(layer.weight.detach())
        assert get_mask(layer) is None
    assert [r["layer"] for r in report.rows] == ["0", "2"] and all(0 < r["error"] < 1 for r in report.rows)


@pytest.mark.parametrize("last", ["int8", "int4"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_gptq_below_8_bits_corrects_errors_of_earlier_layers(bits, last):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    data, other = ([torch.randn(64, 64) for _ in range(8)] for _ in range(2))
    nets = []
    for solver in ("obs", {"name": "obs", "asymmetric": 0}, {"name": "obs", "asymmetric": 0.5}):
        nets.append(copy.deepcopy(dense))
        rarefy.quantize_(nets[-1], bits, per_layer={"4": last}, group=32, solver=solver, data=data)
    default, plain, corrected = [[l.weight.detach() for l in all_layers(net)] for net in nets]
    # the first layer has no layer before it, so nothing to correct
    assert [torch.equal(a, b) for a, b in zip(default, plain)] == [True, bits == "int8", bits == last == "int8"]
    if bits == "int4":  # but layers of 8 bits are not corrected
        assert [torch.equal(a, b) for a, b in zip(default, corrected)] == [True, True, last == "int4"]
        assert off(nets[0], dense, other) < 0.95 * off(nets[1], dense, other)


class Drawing(nn.Module):
    """Adds random numbers to what its last layer reads, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 16)
        self.drawn: list[torch.Tensor] = []

    def forward(self, x):
        noise = torch.randn(len(x), 64)
        self.drawn.append(noise)
        return self.second(self.first(x) + noise)


def test_gptq_of_a_model_that_draws_random_numbers():
    torch.manual_seed(0)
    net = Drawing().eval()
    data = [torch.randn(64, 64) for _ in range(3)]
    rarefy.quantize_(net, "int4", group=32, solver="obs", data=data)
    drawn = net.drawn[-6:]  # each batch passes twice: in the dense model, then in the rounded one
    assert all(torch.equal(a, b) for a, b in zip(drawn[::2], drawn[1::2]))
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[4])


@pytest.mark.parametrize(("layers", "streams"), [(["1"], 1), (["1", "2"], 2)])
def test_the_dense_model_runs_only_where_it_helps(layers, streams):
    net, calls = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    rarefy.quantize_(net, "int4", solver="obs", layers=layers, data=[torch.randn(64, 32)] * 3)
    assert len(calls) == streams * 3 + 2  # and two calls that find the order of layers


class Picking(nn.Module):
    """Its second layer reads the rows for which a third returns the most, as a router or a detector does."""

    def __init__(self):
        super().__init__()
        self.first, self.score, self.second = nn.Linear(64, 64), nn.Linear(64, 1), nn.Linear(64, 16)

    def forward(self, x):
        x = self.first(x)
        return self.second(x[self.score(x)[:, 0].topk(len(x) // 4, sorted=False).indices])


def test_rows_that_a_model_picks_are_not_paired_with_others():
    torch.manual_seed(0)
    net, data = Picking().eval(), [torch.randn(256, 64) for _ in range(4)]
    plain = copy.deepcopy(net)
    how = {"weights": "int2", "group": 32, "data": data, "layers": ["first", "second"]}
    rarefy.quantize_(net, solver="obs", **how)
    rarefy.quantize_(plain, solver={"name": "obs", "asymmetric": 0}, **how)
    assert torch.equal(net.second.weight, plain.second.weight)


def test_gptq_where_inputs_need_more_damping(monkeypatch):
    """A Gram matrix that is not positive definite with the usual damping is solved with more, in all of the solver."""
    factor = torch.linalg.cholesky_ex
    failed = []

    def fail_once(H, **options):
        L, info = factor(H, **options)
        if len(failed) % 2 == 0:
            info = info + 1
        failed.append(1)
        return L, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail_once)
    net, data = mlp(), batches()
    report = rarefy.quantize_(net, "int4", group=8, solver="obs", data=data)
    assert [r["damping"] for r in report.rows] == pytest.approx([0.1, 0.1]) and len(failed) >= 6


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4x1"])
def test_gptq_chooses_zeros(pattern):
    dense, data = mlp(), batches()
    one, two = copy.deepcopy(dense), copy.deepcopy(dense)
    how = {"weights": "int4", "group": 8}
    rarefy.quantize_(one, **how, solver="obs", data=data, pattern=pattern, sparsity=0.5)
    rarefy.prune_(two, pattern, sparsity=0.5)
    rarefy.quantize_(two, **how)
    assert off(one, dense, data) < 0.8 * off(two, dense, data)
    for layer in all_layers(one):
        mask = get_mask(layer)
        assert mask is not None and float((~mask).float().mean()) == pytest.approx(0.5, abs=0.01)
        assert pattern != "2:4" or int(mask.reshape(-1, 4).sum(1).max()) == 2
        assert get_grid(layer).contains(layer.weight.detach())


@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]], ids=str)
def test_gptq_of_every_layer_type(way):
    dense = Net().eval()
    if isinstance(way.get("group"), int):
        way = way | {"group": 2, "ignore": ["deep", "conv"]}
    data = [torch.randn(16, 3, 12, 12) for _ in range(3)]
    near, far = copy.deepcopy(dense), copy.deepcopy(dense)
    rarefy.quantize_(near, **way, solver="obs", data=data)
    rarefy.quantize_(far, **way)
    assert off(near, dense, data) < 1.2 * off(far, dense, data) + 1e-12
    assert all(get_grid(l) is not None for l in select_layers(near, None, way.get("ignore")))


# rounding that is learnt


class Blocks(nn.Module):
    """Three equal blocks with a nonlinearity and a residual, between two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)) for _ in range(3))
        self.last = nn.Linear(24, 8)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@pytest.mark.parametrize(
    "way",
    [{"weights": "int3"}, {"weights": "int3", "group": 8}, {"weights": "int4", "group": 8, "symmetric": False}],
    ids=str,
)
def test_learned_rounding_lowers_the_held_out_error(way):
    dense, data = Blocks(), batches(8)
    near, far = copy.deepcopy(dense), copy.deepcopy(dense)
    rarefy.quantize_(far, **way, layers="blocks.*")
    report = rarefy.quantize_(near, **way, layers="blocks.*", solver={"name": "round", "steps": 100}, data=data)
    assert off(near, dense, batches(4, 0)) < 0.8 * off(far, dense, batches(4, 0))
    assert all(r["error"] < r["nearest"] for r in report.rows)
    assert all(get_grid(l).contains(l.weight.detach()) for l in select_layers(near, "blocks.*"))
    for a, b, c in zip(
        select_layers(near, "blocks.*"), select_layers(far, "blocks.*"), select_layers(dense, "blocks.*")
    ):
        moved = (a.weight - c.weight).abs() / get_grid(b).expand(get_grid(b).scale.float(), a.weight.shape)
        assert float(moved.detach().quantile(0.99)) < 1.6  # up or down, and a smaller step


def test_learned_rounding_keeps_zeros_and_rounds_layers_outside_blocks():
    net, data = Blocks(), batches(4)
    rarefy.prune_(net, "2:4", layers="blocks.*")
    masks = rarefy.masks(net)
    report = rarefy.quantize_(net, "int4", solver={"name": "round", "steps": 20}, data=data)
    assert all(bool((net.get_submodule(n).weight[~m] == 0).all()) for n, m in masks.items())
    assert set(rarefy.masks(net)) == set(masks)
    by_name = {r["layer"]: r for r in report.rows}
    assert "nearest" not in by_name["first"] and "nearest" in by_name["blocks.0.0"]
    assert all(get_grid(l) is not None for l in all_layers(net))


# living with a grid


def test_gradients_pass_straight_through_within_the_range():
    net = nn.Linear(4, 1, bias=False)
    grid = Grid(4, torch.tensor([[1.0]]))
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.2, -3.0, 9.0, -9.0]]))
    from rarefy.model.quant_grid import set_grid_

    set_grid_(all_layers(nn.Sequential(net))[0], grid)
    assert net.weight.tolist() == [[1.0, -3.0, 7.0, -8.0]]
    net(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert net.parametrizations.weight.original.grad.tolist() == [[1.0, 2.0, 0.0, 0.0]]


def test_quantization_aware_training_lowers_the_loss():
    torch.manual_seed(0)
    net, data = mlp(), batches()
    goal = nn.Linear(32, 16)
    rarefy.quantize_(net, "int3", group=8)
    before = off(net, goal, data)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(60):
        for x in data:
            optimizer.zero_grad()
            (net(x) - goal(x).detach()).square().mean().backward()
            optimizer.step()
    assert off(net, goal, data) < 0.3 * before
    assert all(get_grid(l).contains(l.weight.detach()) for l in all_layers(net))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("pattern", [None, "2:4", "4x1", "unstructured"])
def test_codes_are_saved_and_loaded_bit_for_bit(tmp_path, way, pattern):
    net = mlp()
    if pattern:
        rarefy.prune_(net, pattern, sparsity=None if pattern == "2:4" else 0.75)
    rarefy.quantize_(net, **way)
    size = rarefy.save(net, tmp_path / "live")
    again = rarefy.load(tmp_path / "live", mlp())
    for a, b in zip(all_layers(net), all_layers(again)):
        assert torch.equal(a.weight, b.weight) and get_grid(b).bits == get_grid(a).bits
    assert rarefy.save(again, tmp_path / "again") == size
    assert rarefy.save(rarefy.fold_(copy.deepcopy(net)), tmp_path / "folded") == size
    kinds = {r["format"].split(":")[0] for r in rarefy.inspect(tmp_path / "live").rows if r["shape"].count("x")}
    assert kinds == {("int" if way.get("symmetric", True) else "uint") + way["weights"][3:]}
    adopted = rarefy.load(tmp_path / "live", mlp())
    rarefy.adopt_(adopted)
    assert all(attached_grid(l.module, l.param) is not None for l in all_layers(adopted))


def test_a_weight_off_its_grid_is_saved_dense(tmp_path):
    net = mlp()
    rarefy.fold_(rarefy.quantize_(net, "int4") and net)
    with torch.no_grad():
        net[0].weight.add_(0.01)
    rarefy.save(net, tmp_path / "out")
    formats = {r["tensor"]: r["format"] for r in rarefy.inspect(tmp_path / "out").rows}
    assert formats["0.weight"] == "dense" and formats["2.weight"].startswith("int4:")
    assert torch.equal(rarefy.load(tmp_path / "out", mlp())[0].weight, net[0].weight)


def test_tied_weights_stay_tied(tmp_path):
    net = Tied()
    rarefy.quantize_(net, "int8", layers=["embed", "body"])
    assert net.lm_head.weight.data_ptr() != 0 and torch.equal(net.lm_head.weight, net.embed.weight)
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", Tied())
    assert again.lm_head.weight is again.embed.weight and torch.equal(again.embed.weight, net.embed.weight)
    assert set(recorded_grids(again.lm_head)) == {"weight"} == set(recorded_grids(again.embed))


def test_obs_rounds_a_tied_output_head_as_one_that_is_not_tied():
    """It is solved on the inputs of the head; the embedding, which has none, gets the same weights."""
    pytest.importorskip("transformers")
    tied, alone = tiny_llama(), tiny_llama(tie=False)
    alone.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.lm_head.weight})
    data = [{"input_ids": torch.randint(2, 64, (4, 24), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    nearest = copy.deepcopy(alone)
    for net, name in ((tied, "model.embed_tokens"), (alone, "lm_head")):
        report = rarefy.quantize_(net, "int4", group=32, solver="obs", layers=["*.down_proj", name], data=data)
        assert name in [r["layer"] for r in report.rows]
    rarefy.quantize_(nearest, "int4", group=32, layers="lm_head")
    assert torch.equal(tied.lm_head.weight, alone.lm_head.weight)
    assert torch.equal(tied.model.embed_tokens.weight, tied.lm_head.weight)
    assert not torch.equal(alone.lm_head.weight, nearest.lm_head.weight)


def test_obs_rounds_a_tied_head_that_comes_before_its_embedding():
    net = Tied()
    first = nn.Module()
    first.lm_head, first.embed, first.norm, first.body = net.lm_head, net.embed, net.norm, net.body
    first.forward = net.forward
    data = [torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    other = copy.deepcopy(net)
    assert all_layers(first)[0].owners[0][0] == "lm_head"
    rarefy.quantize_(first, "int4", solver="obs", layers="lm_head", data=data)
    rarefy.quantize_(other, "int4", solver="obs", layers="embed", data=data)
    assert torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("solver", ["rtn", "obs"])
def test_bits_of_single_layers(solver):
    """One pass gives what one call for each number of bits gives, where each layer reads those rounded before it."""
    torch.manual_seed(0)
    data = [torch.randn(64, 16) for _ in range(2)] if solver == "obs" else None
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    other = copy.deepcopy(net)
    if solver == "obs":  # each call would correct the errors of its own layers alone
        solver = {"name": "obs", "asymmetric": 0}
    options = {"group": 8, "solver": solver, "data": data}
    report = rarefy.quantize_(net, "int6", layers=["0", "2", "4"], per_layer={"2": "int3", "4": "int8"}, **options)
    for name, weights in (("0", "int6"), ("2", "int3"), ("4", "int8")):
        rarefy.quantize_(other, weights, layers=name, **options)
    assert [r["grid"] for r in report.rows] == ["int6 by 8", "int3 by 8", "int8 by 8"]
    for one, alone in zip(all_layers(net), all_layers(other)):
        assert torch.equal(one.weight, alone.weight) and get_grid(one).bits == get_grid(alone).bits


@pytest.mark.parametrize("in_training", [False, True])
def test_a_dry_run_knows_bits_of_single_layers(in_training):
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    stage = {"quantize": {"weights": "int6", "group": 8, "layers": "*", "per_layer": {"2": "int4"}}}
    report = forecast(net, recipes.from_dict({"stages": [{"train": stage} if in_training else stage]}))
    assert [(r["layer"], r["grid"]) for r in report.rows] == [("0", "int6 by 8"), ("2", "int4 by 8")]
    assert not in_training or "int6 and int4 from 50% on" in report.notes[0]


def test_a_tied_head_has_bits_by_each_of_its_names():
    for name in ("embed", "lm_head"):
        net = Tied()
        rarefy.quantize_(net, "int8", layers=["body", "lm_head"], per_layer={name: "int4"})
        assert [get_grid(l).bits for l in all_layers(net)] == [4, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_layer": {}}, "per_layer is empty: expected names of layers with their bits"),
        ({"per_layer": {"3": "int4"}}, "per_layer: expected full names of selected layers, such as '0', got '3'"),
        ({"per_layer": {"2": "int9"}}, "unknown bits in per_layer 'int9'; choose from int2, int3, int4"),
        (
            {"per_layer": {"2": "int4"}, "layers": "0"},
            "per_layer: expected full names of selected layers, such as '0', got '2'",
        ),
        ({"per_layer": {"2": "int4"}, "solver": "round", "data": [torch.ones(2, 16)]}, "not supported by solver round"),
    ],
)
def test_bits_of_single_layers_that_are_wrong(options, message):
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PatternError, match=message):
        rarefy.quantize_(net, "int8", **options)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_casting_does_not_change_codes(tmp_path):
    net = mlp()
    rarefy.quantize_(net, "int8")
    other, codes = copy.deepcopy(net), [get_grid(l).codes(l.weight) for l in all_layers(net)]
    net.to(torch.bfloat16)
    rarefy.cast_(other, "bf16")
    for made in (net, other):
        for layer, want in zip(all_layers(made), codes):
            assert layer.weight.dtype == torch.bfloat16 and torch.equal(get_grid(layer).codes(layer.weight), want)
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", mlp().to(torch.bfloat16))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(all_layers(net), all_layers(again)))


def test_copies_and_state_dicts_keep_the_grid():
    net = mlp()
    rarefy.quantize_(net, "int4", group=8)
    other = copy.deepcopy(net)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(all_layers(net), all_layers(other)))
    blank = mlp()
    rarefy.quantize_(blank, "int4", group=8)
    blank.load_state_dict(net.state_dict())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(all_layers(net), all_layers(blank)))
    folded = rarefy.fold_(other)
    assert set(folded.state_dict()) == set(mlp().state_dict()) and set(recorded_grids(copy.deepcopy(folded)[0])) == {
        "weight"
    }


def test_codebooks_round_to_the_nearest_value_of_each_block():
    torch.manual_seed(0)
    W, table = torch.randn(4, 6), torch.randn(2, 1, 8)
    table[..., 0] = 0
    book = Codebook(3, table)
    for i, j in product(range(4), range(6)):
        values = table[i // 2, 0]
        want = values[(values - W[i, j]).abs().argmin()]
        assert book.snap(W)[i, j] == want
    assert torch.equal(book.values(book.codes(W), W.dtype), book.snap(W))


# recipes


def test_a_dry_run_predicts_the_bytes(tmp_path):
    plan = recipes.from_yaml(
        "stages:\n- prune: {pattern: 2:4}\n- quantize: {weights: int4, group: 8, solver: obs}\nsave: {format: nm}"
    )
    net, dense = mlp(), mlp()
    expected = forecast(net, plan)
    receipt = rarefy.compress_(net, plan, batches())
    assert receipt.disk["after"] == expected.summary["bytes expected"]
    assert {r["format"] for r in receipt.sparsity["layers"]} == {"int4:nm"}
    assert any("few bits" in n for n in receipt.notes) and any("zeros" in n for n in receipt.notes)
    assert [s["title"] for s in receipt.stages] == ["quantized"]
    rarefy.save(net, tmp_path / "out", format="nm")
    again = rarefy.load(tmp_path / "out", dense)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(all_layers(net), all_layers(again)))


def test_a_recipe_quantizes_and_prunes_at_once():
    receipt = rarefy.compress_(
        mlp(), {"stages": [{"quantize": {"weights": "int4", "group": 8, "solver": "obs", "pattern": "2:4"}}]}, batches()
    )
    assert receipt.sparsity["achieved"] == 0.5


# what cannot be


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"weights": "int9"}, PatternError, "unknown weights 'int9'; choose from int2, int3"),
        ({"weights": "int1"}, PatternError, "unknown weights 'int1'"),
        ({"weights": 8}, PatternError, "weights: expected one of int2, int3, int4, int5, int6, int7, int8, got 8"),
        ({"weights": "fp16"}, PatternError, r"rarefy.cast_\(model, 'fp16'\)"),
        ({"weights": "bfloat16"}, PatternError, r"rarefy.cast_\(model, 'bf16'\)"),
        ({"group": 7}, ModelError, "0: a group of 7 does not divide its 32 inputs: 8, 4, 2 would; or ignore the layer"),
        ({"group": 0}, PatternError, "group: expected a whole number of at least 2 or 'tensor', got 0"),
        ({"group": True}, PatternError, "group: expected a whole number"),
        ({"group": "row"}, PatternError, "got 'row'"),
        ({"symmetric": 1}, PatternError, "symmetric: expected true or false, got 1"),
        ({"fit": "mes"}, PatternError, r"unknown fit 'mes'; choose from hqq, minmax, mse \(did you mean 'mse'\?\)"),
        ({"solver": "gptq"}, PatternError, "gptq is called obs here"),
        ({"solver": "AutoRound"}, PatternError, "AutoRound is called round here"),
        ({"solver": "round"}, DataError, "solver round needs the inputs of each layer: give data=batches"),
        ({"solver": {"name": "round", "refits": 3}}, PatternError, "solver round has no refits; it has steps, lr, bf16, blocks"),
        ({"solver": {"name": "round", "steps": 0}}, PatternError, "steps: expected a whole number between 1 and 10,000, got 0"),
        ({"solver": {"name": "round", "lr": 2}}, PatternError, "solver.lr: expected a number above 0 and at most 1, got 2"),
        ({"solver": "round", "pattern": "2:4"}, PatternError, "only solver='obs' prunes in the same pass"),
        ({"solver": "round", "data": [torch.zeros(2, 32)]}, ModelError, "has no list of equal blocks"),
        ({"solver": "admm"}, PatternError, "unknown solver of quantization 'admm'; choose from obs, round, rtn"),
        ({"solver": "obs"}, DataError, "give data=batches"),
        ({"solver": {"name": "obs", "steps": 3}}, PatternError, "solver obs has no steps"),
        ({"solver": {"name": "obs", "reconstruct": 1}}, PatternError, "reconstruct is not supported for quantization"),
        ({"data": [torch.zeros(2, 32)]}, DataError, "data has no effect"),
        ({"solver": "obs", "data": []}, DataError, "the calibration data is empty"),
        ({"solver": "obs", "data": "wiki"}, DataError, "data: expected an iterable of batches, got the text"),
        ({"pattern": "2:4"}, PatternError, "only solver='obs' prunes in the same pass"),
        ({"sparsity": 0.5}, PatternError, "sparsity=0.5 has no effect without pattern"),
        ({"solver": "obs", "pattern": "row", "sparsity": 0.5}, PatternError, "pattern row spans all columns"),
        ({"solver": "obs", "pattern": "3:5", "group": 8}, PatternError, "group=8 must be a multiple of 5 for pattern 3:5"),
        ({"layers": "nothing"}, rarefy.RarefyError, "'nothing' matches no layer"),
    ],
)  # fmt: skip
def test_messages_for_wrong_arguments(options, error, says):
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=says):
        rarefy.quantize_(net, **{"weights": "int8", **options})
    after = net.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("folded", [False, True])
def test_quantizing_twice_is_refused(folded):
    net = mlp()
    rarefy.quantize_(net, "int8")
    if folded:
        rarefy.fold_(net)
    with pytest.raises(ModelError, match="0 is already quantized"):
        rarefy.quantize_(net, "int4")


def test_weights_that_are_not_finite_are_refused():
    net = mlp()
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="2: NaN or inf in its weights"):
        rarefy.quantize_(net, "int8")


def test_constant_weights_and_zero_inputs():
    net, data = mlp(), [torch.zeros(8, 32), torch.zeros(8, 32)]
    with torch.no_grad():
        net[0].weight.zero_()
        net[2].weight.fill_(0.3)
    for options in ({}, {"symmetric": False}, {"solver": "obs", "data": data}):
        one = copy.deepcopy(net)
        rarefy.quantize_(one, "int4", **options)
        assert bool((one[0].weight == 0).all())
        torch.testing.assert_close(one[2].weight, net[2].weight, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- quantize: {weights: int1}", r"r.yaml line 2: .*unknown weights 'int1';"),
        ("- quantize:\n    weights: int4\n    group: 1", r"r.yaml line 4: .*group: expected a whole number"),
        ("- quantize:\n    fit: mes", r"r.yaml line 3: .*unknown fit 'mes'"),
        ("- quantize:\n    solver: gptq", r"r.yaml line 3: .*gptq is called obs here\)"),
        ("- quantize:\n    pattern: 2:4", r"r.yaml line 3: .*only solver='obs' prunes in the same pass; prune_ first"),
        ("- quantize:\n    bits: 4", r"unknown field 'bits'"),
        ("- quantize: {}\n- cut: {keep: 0.5}", r"a cut must come before quantize"),
    ],
)
def test_recipe_errors_name_the_line(text, says):
    with pytest.raises(RecipeError, match=says):
        recipes.from_yaml(f"stages:\n{text}", "r.yaml")


def test_a_recipe_names_the_stage_of_a_group_that_does_not_divide():
    with pytest.raises(ModelError, match=r"a group of 7 .* \[recipe recipe, stage 1\]"):
        rarefy.compress_(mlp(), {"stages": [{"quantize": {"group": 7}}]})


def test_a_cut_of_a_quantized_model_is_refused():
    for folded in (False, True):
        net = mlp()
        rarefy.quantize_(net, "int8")
        if folded:
            rarefy.fold_(net)
        with pytest.raises(ModelError, match="already quantized: cut first, then quantize"):
            rarefy.cut_(net, torch.randn(2, 32), keep=0.5)


def linear(width=64, out=64):
    return nn.Sequential(nn.Linear(width, out))


@pytest.mark.parametrize("do", [lambda m: rarefy.share_(m, 3), lambda m: rarefy.quantize_(m, "int8")])
def test_solvers_refuse_quantized_weights(do):
    net = linear()
    do(net)
    before = net[0].weight.detach().clone()
    with pytest.raises(ModelError, match="0 is quantized, and solver obs would change its quantized weights"):
        rarefy.prune_(net, sparsity=0.7, solver="obs", data=[torch.randn(32, 64)])
    assert torch.equal(net[0].weight, before)


def test_a_group_of_all_inputs():
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
    rarefy.quantize_(net, "int4", group=64, solver="obs", data=[torch.randn(32, 128)])
    rarefy.quantize_(linear(), "int4", group=64, symmetric=False, solver="obs", data=[torch.randn(32, 64)])
    assert get_grid(all_layers(net)[1]).scale.shape == (8, 1)


def test_zeros_from_rounding_are_no_mask():
    net = linear()
    rarefy.quantize_(net, "int4")
    rarefy.fold_(net)
    rarefy.adopt_(net)
    assert rarefy.masks(net) == {} and get_grid(all_layers(net)[0]) is not None
    pruned = linear()
    rarefy.prune_(pruned, "2:4")
    rarefy.quantize_(pruned, "int8")
    rarefy.fold_(pruned)
    rarefy.adopt_(pruned)
    assert list(rarefy.masks(pruned)) == ["0"]


def test_weights_whose_grid_overflows():
    wide = nn.Sequential(nn.Linear(4, 1, bias=False))
    wide[0].weight.data = torch.tensor([[3e38, -3e38, 1, 2]])
    half = nn.Sequential(nn.Linear(4, 1, bias=False)).half()
    half[0].weight.data = torch.tensor([[-65504, 1, 1, 2.0]]).half()
    for net, options in ((wide, {"symmetric": False}), (half, {"group": 4})):
        before = net[0].weight.detach().clone()
        with pytest.raises(ModelError, match="0 has weights up to .*, whose scales overflow"):
            rarefy.quantize_(net, "int4", **options)
        assert torch.equal(net[0].weight, before)
    with pytest.raises(ModelError, match=r"0 has no weights \(\[8, 0\]\): ignore it"):
        empty = linear(1, 8)
        empty[0].weight = nn.Parameter(torch.empty(8, 0))
        rarefy.quantize_(empty, "int4")
    with pytest.raises(ValueError, match="weights: expected one of int2"):
        rarefy.quantize_(linear(), ["int8"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fit: expected one of minmax"):
        rarefy.quantize_(linear(), fit=0)  # type: ignore[arg-type]


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "blocks", "size"), [(4, 1003, 32), (3, 5, 50), (2, 9, 7), (8, 3, 3000)])
def test_native_scales_are_those_of_torch(isa, bits, blocks, size, symmetric):
    X = torch.randn(blocks, size) * torch.rand(blocks, 1)
    X[0] = 0
    for weigh in (None, torch.rand(blocks, size)):
        got, want = (fit(X, bits, symmetric, weigh) for fit in (mse, mse_in_torch))
        errors = [_squared_error(X, bits, *grid, weigh) for grid in (got, want)]
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all()  # of two as good ones, either
        for ours, theirs in zip(got, want):
            assert (ours is None and theirs is None) or float((ours == theirs).float().mean()) > 0.99


def test_scales_of_numbers_that_are_not_finite():
    X = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [0.5, 1.0]])
    for symmetric in (True, False):
        got, want = (fit(X, 4, symmetric) for fit in (mse, mse_in_torch))
        torch.testing.assert_close(got[0], want[0], equal_nan=True)
        assert symmetric or torch.equal(got[1][1:], want[1][1:])


def test_scales_do_not_depend_on_the_default_dtype_or_device():
    X = torch.randn(40, 32)
    want = mse(X, 4, False)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            torch.testing.assert_close(mse(X, 4, False), want, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        torch.testing.assert_close(mse(X, 4, False), want, rtol=0, atol=0)
