"""Allocations: the budget is met exactly, and each one means what its paper says."""

import itertools

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, image_batches, tiny_llama
from rarefy import recipe as recipes
from rarefy.errors import DataError, PatternError, RecipeError
from rarefy.model.select import all_layers, select
from rarefy.prune import allocate
from rarefy.prune.allocate import LEVELS
from rarefy.prune.search import TRIALS, probe, search


def mean(found, sizes):
    return sum(found[n] * sizes[n] for n in found) / sum(sizes.values())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_balanced_meets_the_budget_within_bounds(sparsity):
    sizes = {"a": 100, "b": 10, "c": 1000}
    found = allocate.balanced({"a": 0.9, "b": 0.1, "c": 0.5}, sizes, sparsity)
    assert mean(found, sizes) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= s <= max(allocate.MOST, sparsity) for s in found.values())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_erk_is_proportional_and_meets_the_budget(sparsity):
    layers = all_layers(Net())
    found = allocate.erk(layers, sparsity)
    sizes = {l.full_name: l.original.numel() for l in layers}
    assert mean(found, sizes) == pytest.approx(sparsity)
    ratios = set()
    for l in layers:
        _, K, O, I = l.layout.shape
        if found[l.full_name] > 0:
            ratios.add(round((1 - found[l.full_name]) / ((O + I + (K if K > 1 else 0)) / (O * I * K)), 6))
    assert len(ratios) <= 1


def test_line_rises_with_depth():
    layers = all_layers(nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]))
    found = list(allocate.line(layers, 0.5, 0.2).values())
    assert found == pytest.approx([0.4, 0.45, 0.5, 0.55, 0.6])


def test_owl_keeps_layers_with_outliers():
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        net[0].weight[:, 0] *= 50
    report = rarefy.prune_(
        net, score="wanda", sparsity=0.5, allocate="owl", data=[torch.randn(64, 32)], layers="Linear"
    )
    first, second = (r["sparsity"] for r in report.rows)
    assert first == pytest.approx(0.42, abs=0.01) and second == pytest.approx(0.58, abs=0.01)


def test_least_is_the_best_of_all():
    costs = {"a": [1.0, 4.0, 20.0], "b": [0.1, 0.2, 0.9], "c": [3.0, 5.0, 7.0]}
    sizes = {"a": 100, "b": 100, "c": 200}
    found = allocate.least(costs, sizes, 0.6)
    assert mean(found, sizes) == pytest.approx(0.6, abs=1e-6)
    grid = [i / 50 for i in range(49)]

    def total(choice):
        return sum(float(allocate.curve(costs[n], torch.tensor([0.0, s]))[1]) for n, s in zip(costs, choice))

    rivals = (c for c in itertools.product(grid[::4], repeat=3) if abs(mean(dict(zip(costs, c)), sizes) - 0.6) < 1e-9)
    assert total(found.values()) <= min(map(total, rivals)) * 1.01


def test_curve_goes_through_what_was_measured_and_never_falls():
    errors = [0.01, 0.1, 0.5]
    assert allocate.curve(errors, torch.tensor(allocate.LEVELS)).tolist() == pytest.approx(errors)
    values = allocate.curve(errors, torch.arange(97) / 100)
    assert values[0] == 0 and (values.diff() >= 0).all()


def test_sensitivities_are_squared_gradients_of_outputs():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    x, y = torch.randn(6, 4), torch.randint(0, 5, (6,))
    found = allocate.sensitivities(net, [(x, y)], all_layers(net))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    want = torch.zeros(3)
    for i in range(6):  # each sample's own loss
        h = net[0](x[i : i + 1]).detach().requires_grad_()
        nn.functional.cross_entropy(net[2](net[1](h)), y[i : i + 1]).backward()
        want += h.grad[0].square()
    torch.testing.assert_close(found["0"], want / 6)


@pytest.mark.parametrize("how", allocate.ALLOCATIONS)
@pytest.mark.parametrize("settings", [{"score": "magnitude"}, {"solver": "obs"}, {"solver": "refit"}])
def test_the_asked_budget_is_the_achieved_one(how, settings):
    model = tiny_llama()
    ids = [torch.randint(0, 64, (2, 16)) for _ in range(3)]
    data = [{"input_ids": i, "labels": i} for i in ids]
    report = rarefy.prune_(model, sparsity=0.6, allocate=how, data=data, **settings)
    assert report.summary["sparsity"] == pytest.approx(0.6, abs=2e-3)
    assert all(r["sparsity"] == pytest.approx(r["asked"], abs=0.01) for r in report.rows)
    assert (len({round(r["asked"], 4) for r in report.rows}) == 1) is (how == "uniform")


def test_search_finds_what_measured_errors_hide():
    """Errors that lie about which kind of layer matters: the loss tells, and the weights come back."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.dull, self.keen = (nn.ModuleList([nn.Linear(16, 16) for _ in range(2)]) for _ in range(2))

        def forward(self, x):
            return sum(1e-3 * d(x) + k(x) for d, k in zip(self.dull, self.keen))

    net, seen = Two(), []
    layers = all_layers(net)
    x = torch.randn(64, 16)
    data = [(x, net(x).detach())]

    def loss(output, batch):
        seen.append(float((output - batch[1]).square().mean()))
        return torch.tensor(seen[-1])

    costs = {l.full_name: [1.0, 2.0, 4.0] if "dull" in l.full_name else [0.9, 1.8, 3.6] for l in layers}
    solved = {
        l.full_name: [
            torch.where(l.original.abs() > l.original.abs().quantile(s), l.original, 0.0).detach() for s in LEVELS
        ]
        for l in layers
    }
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = search(net, layers, costs, solved, 0.6, data, loss)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    sizes = {l.full_name: l.original.numel() for l in layers}
    assert mean(found, sizes) == pytest.approx(0.6, abs=1e-6)
    assert all(s > 0.7 if "dull" in n else s < 0.5 for n, s in found.items()), found
    assert len(seen) == TRIALS + 4 and min(seen) < 0.5 * min(seen[:4])
    assert found == search(net, layers, costs, solved, 0.6, data, loss)  # a seed is a seed
    seen.clear()
    search(net, layers, costs, solved, 0.6, data, loss, trials=0)
    assert len(seen) == 4


@pytest.mark.parametrize("how", allocate.GRADIENTS)
def test_a_model_without_a_loss_goes_by_its_own_outputs(how):
    """An encoder: what its outputs do not depend on is pruned first."""
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

        def forward(self, x):
            return {"hidden": self.layers[0](x) + 0.01 * self.layers[1](x)}

    report = rarefy.prune_(Encoder(), sparsity=0.6, solver="obs", allocate=how, data=[torch.randn(64, 32)])
    keen, dull = (r["asked"] for r in report.rows)
    assert keen < 0.5 and dull > 0.7 and (keen + dull) / 2 == pytest.approx(0.6, abs=1e-6)


def test_probe_weighs_every_output_alike():
    y = torch.zeros(50_000, 4, requires_grad=True)
    (g,) = torch.autograd.grad(probe(y, None), y)
    torch.testing.assert_close((g * y.numel()).square().mean(0), torch.ones(4), rtol=0.02, atol=0)


def test_errors_of_every_layer_type():
    net = Net().eval()
    report = rarefy.prune_(net, sparsity=0.5, solver="obs", allocate="errors", data=image_batches())
    assert report.summary["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert len(select(net)) == len(report.rows)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"allocate": "unifrom"}, PatternError, r"unknown allocation 'unifrom'.*did you mean 'uniform'"),
        ({"allocate": "owl"}, DataError, "allocation 'owl' reads activations: give data=batches"),
        ({"allocate": "erk", "scope": "global"}, PatternError, "scope 'global' decides every layer's sparsity itself"),
        ({"allocate": "erk", "pattern": "2:4", "sparsity": None}, PatternError, "pattern 2:4 decides every layer's"),
    ],
)
def test_errors(settings, kind, message):
    with pytest.raises(kind, match=message):
        rarefy.prune_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), **{"sparsity": 0.5, **settings})


def test_recipes():
    how = {"sparsity": 0.5, "allocate": "search", "solver": {"name": "obs", "bf16": True}}
    plan = recipes.load({"stages": [{"prune": how}]})
    data = [{"input_ids": torch.randint(0, 64, (2, 16))}]
    receipt = rarefy.compress_(tiny_llama(), plan, data)
    assert receipt.sparsity["achieved"] == pytest.approx(0.5, abs=2e-3)
    with pytest.raises(RecipeError, match="unknown allocate 'x'"):
        recipes.load({"stages": [{"prune": {"sparsity": 0.5, "allocate": "x"}}]})


@pytest.mark.parametrize("how", ["owl", "errors", "search"])
def test_batches_from_a_generator_serve_allocation_and_solver(how):
    ids = torch.randint(0, 64, (2, 16))
    data = ({"input_ids": i, "labels": i} for i in [ids, ids.flip(1)])
    report = rarefy.prune_(tiny_llama(), sparsity=0.6, solver="obs", allocate=how, data=data)
    assert report.summary["sparsity"] == pytest.approx(0.6, abs=2e-3)
