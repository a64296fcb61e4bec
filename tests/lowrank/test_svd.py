"""Low-rank factors against the optimum; saving, recipes, and use with other compressions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net
from helpers.folders import read_index, write_index
from rarefy.common.errors import ContainerError, DataError, ModelError, PatternError, RecipeError
from rarefy.lowrank.svd import truncated
from rarefy.model.lowrank_modules import Corrected, LowRank, factor_records
from rarefy.recipe import parser as recipes


def batches(width=32, n=4, seed=0):
    """Inputs that lie mostly in a few directions."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(width, width, generator=rng))[0] * torch.logspace(0, -2, width)[:, None]
    return [torch.randn(64, width, generator=rng) @ mix for _ in range(n)]


def mlp():
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 40))


def off(model, dense, data):
    with torch.no_grad():
        return float(
            sum((model(x) - dense(x)).square().sum() for x in data) / sum(dense(x).square().sum() for x in data)
        )


def test_truncation_is_optimal():
    torch.manual_seed(0)
    W = torch.randn(6, 9, dtype=torch.float64)
    X = torch.randn(9, 9, dtype=torch.float64) @ torch.randn(9, 200, dtype=torch.float64)
    L = torch.linalg.cholesky(X @ X.T)
    A, B, energies = truncated(W, L, 2)
    best = (W @ X - A @ B @ X).square().sum()
    torch.testing.assert_close(best, energies[2:].sum())
    # the optimum of rank 2 of the outputs themselves (Eckart and Young), which no weight can beat
    torch.testing.assert_close(best, torch.linalg.svdvals(W @ X)[2:].square().sum())
    for _ in range(20):
        a, b = A + 0.1 * torch.randn_like(A), B + 0.1 * torch.randn_like(B)
        assert (W @ X - a @ b @ X).square().sum() > best


@pytest.mark.parametrize("budget", [{"rank": 6}, {"keep": 0.5}, {"energy": 0.9}])
@pytest.mark.parametrize("whiten", [False, True])
def test_budgets_are_met_and_reported(budget, whiten):
    dense, data = mlp(), batches()
    for i in (0, 2):  # weights that lie mostly in a few directions too
        dense[i].weight.data.copy_(
            dense[i].weight @ batches(dense[i].in_features, 1)[0].T @ batches(dense[i].in_features, 1)[0]
        )
    net = copy.deepcopy(dense)
    report = rarefy.factorize_(net, **budget, data=data if whiten else None)
    for row, name in zip(report.rows, ("0", "2")):
        made = net.get_submodule(name)
        assert isinstance(made, LowRank)
        r = int(row["ranks"])
        assert made.down.weight.shape[0] == r == made.up.weight.shape[1]
        assert row["left"] == made.down.weight.numel() + made.up.weight.numel() < row["weights"]
        assert budget.get("rank", r) == r and row["left"] <= budget.get("keep", 1) * row["weights"]
        if not whiten:
            lost = (dense.get_submodule(name).weight - made.weight).square().sum()
            assert row["error"] == pytest.approx(
                float((lost / dense.get_submodule(name).weight.square().sum()).detach()), rel=1e-3
            )
        if "energy" in budget:
            assert row["error"] <= 0.1 + 1e-6
    assert report.summary["left"] == sum(r["left"] for r in report.rows)


@pytest.mark.parametrize(("budget", "up"), [({"keep": 0.6}, False), ({"energy": 0.5}, True)])
def test_ranks_are_multiples_of_round_to(budget, up):
    found, rounded, conv = mlp(), mlp(), nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU())
    free = [int(r["ranks"]) for r in rarefy.factorize_(found, **budget).rows]
    rows = rarefy.factorize_(rounded, **budget, round_to=4).rows
    assert [int(r["ranks"]) for r in rows] == [-(-n // 4) * 4 if up else n // 4 * 4 for n in free]
    assert any(n % 4 for n in free)  # else nothing was rounded
    rarefy.quantize_(rounded, "int4", group=4, layers=["*.up", "*.down"])
    with pytest.raises(ModelError, match="divide"):
        rarefy.quantize_(found, "int4", group=4, layers=["*.up", "*.down"])
    (row, *_) = rarefy.factorize_(conv, **budget, round_to=8).rows
    assert all(int(n) % 8 == 0 for n in row["ranks"].split(","))


def test_whitening_lowers_the_output_error():
    dense, data = mlp(), batches()
    plain, white = copy.deepcopy(dense), copy.deepcopy(dense)
    rarefy.factorize_(plain, keep=0.5)
    rarefy.factorize_(white, keep=0.5, data=data)
    assert off(white, dense, data) < 0.3 * off(plain, dense, data)


@pytest.mark.parametrize("whiten", [False, True])
def test_convolutions_are_factorized_by_tucker(whiten):
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 1, stride=2), nn.Flatten()
    )
    data = [torch.randn(8, 8, 12, 12) * torch.logspace(0, -1.5, 8)[:, None, None] for _ in range(3)]
    net = copy.deepcopy(dense)
    report = rarefy.factorize_(net, keep=0.6, data=data if whiten else None)
    assert [r["ranks"].count(",") for r in report.rows] == [1, 0]
    assert all(r["left"] <= 0.6 * r["weights"] for r in report.rows)
    product = copy.deepcopy(dense)
    for i in (0, 2):  # the factors compute what their product does
        product[i].weight.data.copy_(net[i].weight)
    assert off(net, product, data) < 1e-9
    assert 0 < off(net, dense, data) < 0.7
    everything = copy.deepcopy(dense)
    with pytest.raises(ModelError, match="factors would make no layer smaller: 0: rank 8,16 is"):
        rarefy.factorize_(everything, rank=99)


def test_conv1d_of_transformers_and_of_torch(tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(20, 32), nn.Linear(20, 16))
    x, dense = torch.randn(4, 32), copy.deepcopy(net)
    rarefy.factorize_(net, rank=5, layers="0", data=[torch.randn(16, 32)])
    torch.testing.assert_close(net[0](x), x @ net[0].weight.T + dense[0].bias)
    lines = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 4, 1))
    rarefy.factorize_(lines, keep=0.5, layers="0")
    assert lines(torch.randn(2, 16, 9)).shape == (2, 4, 9)


def test_skipped_layers_have_a_reason():
    net = Net()
    report = rarefy.factorize_(net, keep=0.5)
    why = {r["layer"]: r["why"] for r in report.rows}
    assert why["deep"] == "a convolution with 8 groups" and why["up"] == "ConvTranspose2d cannot be factorized"
    assert why["hidden"] == "" and why["conv"] == ""
    assert isinstance(net.hidden, LowRank) and isinstance(net.deep, nn.Conv2d)
    shared = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    shared[1].weight = shared[0].weight
    assert {r["layer"]: r["why"] for r in rarefy.factorize_(shared, keep=0.5).rows}["0"] == "its weight is shared"
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    rows = {r["layer"]: r["why"] for r in rarefy.factorize_(attention, keep=0.5).rows}
    assert rows["0.in_proj_weight"] == "in_proj_weight cannot be factorized"
    assert rows["0.out_proj"] == "MultiheadAttention reads its weight itself"


def test_corrections_of_a_pruned_and_quantized_model(tmp_path):
    dense, data = mlp(), batches()
    net = copy.deepcopy(dense)
    rarefy.prune_(net, "2:4")
    rarefy.quantize_(net, "int4", group=8)
    masks, before = rarefy.masks(net), off(net, dense, data)
    report = rarefy.factorize_(net, rank=6, of=dense, data=data)
    assert isinstance(net[0], Corrected) and off(net, dense, data) < 0.5 * before
    assert all(torch.equal(masks[n.removesuffix(".base")], m) for n, m in rarefy.masks(net).items())
    assert report.rows[0]["left"] == report.rows[0]["weights"] + 6 * (32 + 24)
    x = data[0]
    quiet = net(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(net(x), quiet)  # summed in place
    torch.testing.assert_close(net[0].weight @ x[0] + net[0].bias, net[0](x[0]))
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", mlp())
    torch.testing.assert_close(again(x), quiet)
    formats = {r["tensor"]: r["format"] for r in rarefy.inspect(tmp_path / "out").rows}
    assert formats["0.base.weight"].startswith("int4:") and formats["0.down.weight"] == "dense"


def test_factors_are_saved_and_loaded(tmp_path):
    net = Net().eval()
    rarefy.factorize_(net, keep=0.5)
    x = torch.randn(2, 3, 8, 8)
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", Net()).eval()
    assert torch.equal(again(x), net(x)) and factor_records(again) == factor_records(net)
    assert rarefy.save(again, tmp_path / "again") == rarefy.save(copy.deepcopy(net), tmp_path / "copy")
    over = copy.deepcopy(net)
    assert torch.equal(rarefy.load(tmp_path / "out", over)(x), net(x))  # into a model that has them already
    rarefy.save(Net(), tmp_path / "plain")
    with pytest.raises(ContainerError, match="holds no factors, but conv of this model is factorized"):
        rarefy.load(tmp_path / "plain", copy.deepcopy(net))


def test_factors_are_pruned_and_quantized_as_layers():
    net = mlp()
    rarefy.factorize_(net, keep=0.7)
    rarefy.prune_(net, "2:4", layers=["*.down"])
    rarefy.quantize_(net, "int8")
    assert set(rarefy.masks(net)) == {"0.down", "2.down"}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    net(batches()[0]).square().mean().backward()
    optimizer.step()
    with pytest.raises(ModelError, match="factors would make no layer smaller.* it is a factor itself"):
        rarefy.factorize_(copy.deepcopy(net), keep=0.5, layers="*.down")
    assert rarefy.accelerate_(rarefy.fold_(net), tuning_cache=False).rows


def test_a_time_budget_is_met():
    from rarefy.evaluation.profiling import compare

    net = nn.Sequential(nn.Linear(512, 512))
    dense = copy.deepcopy(net)
    row = rarefy.factorize_(net, time=0.6, batch=64).rows[0]
    assert int(row["ranks"]) % 8 == 0 and 0 < int(row["ranks"]) < 256
    x = torch.randn(64, 512)
    with torch.no_grad():
        took = compare({"dense": lambda: dense(x), "thin": lambda: net(x)}, repeats=15)
    assert took["thin"].median < took["dense"].median


@pytest.mark.parametrize(
    "told",
    [
        [], {"0": {}}, {"0": {"kind": "lowrank"}}, {"0": {"kind": "pickle", "ranks": [2]}}, {"1": {"kind": "lowrank", "ranks": [2]}},
        {"": {"kind": "lowrank", "ranks": [2]}}, {"0": {"kind": "lowrank", "ranks": [0]}}, {"0": {"kind": "lowrank", "ranks": [99]}},
        {"0": {"kind": "lowrank", "ranks": [2, 2]}}, {"0": {"kind": "lowrank", "ranks": 2}}, {"0": {"kind": "lowrank", "ranks": [True]}},
        {"9": {"kind": "lowrank", "ranks": [2]}}, {"0": {"kind": "corrected", "ranks": [2.0]}},
    ],
)  # fmt: skip
def test_damaged_records_are_refused(told, tmp_path):

    net = mlp()
    rarefy.factorize_(net, rank=2)
    rarefy.save(net, tmp_path / "out")
    index = read_index(tmp_path / "out")
    index["meta"]["factors"] = told
    write_index(tmp_path / "out", index)
    with pytest.raises(ContainerError, match="factor|ranks"):
        rarefy.load(tmp_path / "out", mlp())


def test_a_recipe_factorizes_and_corrects():
    plan = recipes.from_yaml(
        "stages:\n- prune: {pattern: 2:4, layers: '0'}\n- factorize: {rank: 4, beside: true, layers: '0'}\n"
        "- factorize: {keep: 0.5, layers: '2', whiten: false}"
    )
    net = mlp()
    receipt = rarefy.compress_(net, plan, batches())
    assert isinstance(net[0], Corrected) and isinstance(net[2], LowRank)
    assert [s["title"] for s in receipt.stages] == ["factorized", "factorized"]
    assert [r["layer"] for r in receipt.sparsity["layers"]] == ["0"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, PatternError, "factors need one of rank, keep, energy, time, got none"),
        ({"rank": 2, "keep": 0.5}, PatternError, "got rank, keep"),
        ({"rank": 0}, PatternError, "rank: expected a whole number of at least 1, got 0"),
        ({"rank": 2.5}, PatternError, "rank: expected a whole number"),
        ({"keep": 1}, PatternError, "keep: expected a number above 0 and below 1, got 1"),
        ({"energy": 1.5}, PatternError, "energy: expected a number above 0"),
        ({"time": True}, PatternError, "time: expected a number above 0"),
        ({"time": 0.5, "batch": 0}, PatternError, "batch: expected a whole number"),
        ({"keep": 0.5, "round_to": 0}, PatternError, "round_to: expected a whole number of at least 1, got 0"),
        ({"rank": 8, "round_to": 4}, PatternError, "round_to=4 has no effect with a fixed rank=8"),
        ({"rank": 2, "data": []}, DataError, "the calibration data is empty"),
        ({"rank": 2, "data": "wiki"}, DataError, "data: expected an iterable of batches"),
        ({"keep": 0.5, "of": mlp()}, PatternError, "is not supported for factors beside a layer: give rank"),
        ({"rank": 2, "of": nn.Linear(2, 2)}, ModelError, r"of: expected 0 of shape \[24, 32\] in Linear"),
        ({"rank": 24}, ModelError, "factors would make no layer smaller: 0: rank 24 is 1,344 weights, it has 768"),
        ({"rank": 2, "layers": "9"}, rarefy.RarefyError, "'9' matches no layer"),
    ],
)  # fmt: skip
def test_messages_for_wrong_arguments(options, error, says):
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=says):
        rarefy.factorize_(net, **options)
    assert list(net.state_dict()) == list(before) and all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )


def test_pruned_layers_are_skipped_with_a_reason():
    net = mlp()
    rarefy.prune_(net, "2:4", layers="0")
    rows = rarefy.factorize_(net, keep=0.5).rows
    assert "it is pruned or quantized" in rows[0]["why"] and rows[1]["why"] == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- factorize: {}", "factors need one of rank, keep, energy, time, got none"),
        ("- factorize:\n    keep: 2.0", r"r.yaml line 3: .*keep: expected a number above 0 and below 1, got 2.0"),
        ("- factorize:\n    rnak: 2", r"unknown field 'rnak'"),
        ("- factorize: {rank: 2}\n- cut: {keep: 0.5}", "a cut must come before"),
    ],
)
def test_recipe_errors_name_the_line(text, says):
    with pytest.raises(RecipeError, match=says):
        recipes.from_yaml(f"stages:\n{text}", "r.yaml")


def linear(width=64, out=64):
    return nn.Sequential(nn.Linear(width, out))


def test_corrections_do_not_change_the_layer_they_correct():
    dense, net = linear(), None
    net = copy.deepcopy(dense)
    rarefy.quantize_(net, "int2")
    rarefy.factorize_(net, rank=4, of=dense)
    x, seen = torch.randn(2, 64), []
    net[0].base.register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        y = net(x)
        assert not torch.equal(seen[0], y)
        with torch.autocast("cpu", torch.bfloat16):
            net(x)


def test_hooks_are_refused_and_frozen_weights_stay_frozen():
    net = linear()
    net[0].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    with pytest.raises(ModelError, match="its hooks would be lost"):
        rarefy.factorize_(net, keep=0.5)
    frozen = linear().requires_grad_(False)
    rarefy.factorize_(frozen, keep=0.5)
    assert not any(p.requires_grad for p in frozen.parameters())


class Scaled(nn.Linear):
    """A layer that does something else with its weight."""

    def forward(self, x):
        return nn.functional.linear(x, 0.1 * self.weight, self.bias)


def test_layers_with_a_forward_of_their_own_are_left_out():
    net = nn.Sequential(Scaled(32, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(8, 32)
    before = net[0](x)
    report = rarefy.factorize_(net, keep=0.5)
    torch.testing.assert_close(net[0](x), before)
    assert any("computes its outputs in a way of its own" in str(n) for n in (*report.notes, *report.rows))


def test_convolutions_with_few_outputs():
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 3, 3))
    rarefy.factorize_(net, rank=32)
    assert net(torch.randn(1, 64, 8, 8)).shape == (1, 3, 4, 4)
