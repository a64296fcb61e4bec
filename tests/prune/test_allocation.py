"""Allocations: the budget is met exactly, and each one means what its paper says."""

import itertools

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, image_batches, tiny_llama
from rarefy.common.errors import DataError, ModelError, PatternError, RarefyError, RecipeError
from rarefy.model.hf import is_causal_lm
from rarefy.model.layers import all_layers, select_layers
from rarefy.pipeline.dry_run import forecast
from rarefy.prune import allocation
from rarefy.prune.allocation import LEVELS
from rarefy.prune.allocation_search import TRIALS, output_probe, search_allocation
from rarefy.recipe import parser as recipes


def mean(found, sizes):
    return sum(found[n] * sizes[n] for n in found) / sum(sizes.values())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_balanced_meets_the_budget_within_bounds(sparsity):
    sizes = {"a": 100, "b": 10, "c": 1000}
    found = allocation.shift_to_mean({"a": 0.9, "b": 0.1, "c": 0.5}, sizes, sparsity)
    assert mean(found, sizes) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= s <= max(allocation.MAX_SPARSITY, sparsity) for s in found.values())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_erk_is_proportional_and_meets_the_budget(sparsity):
    layers = all_layers(Net())
    found = allocation.erk(layers, sparsity)
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
    found = list(allocation.line(layers, 0.5, 0.2).values())
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
    found = allocation.cheapest_allocation(costs, sizes, 0.6)
    assert mean(found, sizes) == pytest.approx(0.6, abs=1e-6)
    grid = [i / 50 for i in range(49)]

    def total(choice):
        return sum(
            float(allocation.interpolate_errors(costs[n], torch.tensor([0.0, s]))[1]) for n, s in zip(costs, choice)
        )

    rivals = (c for c in itertools.product(grid[::4], repeat=3) if abs(mean(dict(zip(costs, c)), sizes) - 0.6) < 1e-9)
    assert total(found.values()) <= min(map(total, rivals)) * 1.01


def test_curve_goes_through_what_was_measured_and_never_falls():
    errors = [0.01, 0.1, 0.5]
    assert allocation.interpolate_errors(errors, torch.tensor(allocation.LEVELS)).tolist() == pytest.approx(errors)
    values = allocation.interpolate_errors(errors, torch.arange(97) / 100)
    assert values[0] == 0 and (values.diff() >= 0).all()


def test_sensitivities_are_squared_gradients_of_outputs():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    x, y = torch.randn(6, 4), torch.randint(0, 5, (6,))
    found = allocation.sensitivities(net, [(x, y)], all_layers(net))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    want = torch.zeros(3)
    for i in range(6):  # each sample's own loss
        h = net[0](x[i : i + 1]).detach().requires_grad_()
        nn.functional.cross_entropy(net[2](net[1](h)), y[i : i + 1]).backward()
        want += h.grad[0].square()
    torch.testing.assert_close(found["0"], want / 6)


@pytest.mark.parametrize("how", allocation.ALLOCATIONS)
@pytest.mark.parametrize("settings", [{"score": "magnitude"}, {"solver": "obs"}, {"solver": "refit"}])
def test_the_asked_budget_is_the_achieved_one(how, settings):
    model = tiny_llama()
    ids = [torch.randint(0, 64, (2, 16)) for _ in range(3)]
    data = [{"input_ids": i, "labels": i} for i in ids]
    report = rarefy.prune_(model, sparsity=0.6, allocate=how, data=data, **settings)
    assert report.summary["sparsity"] == pytest.approx(0.6, abs=2e-3)
    assert all(r["sparsity"] == pytest.approx(r["asked"], abs=0.01) for r in report.rows)
    assert (len({round(r["asked"], 4) for r in report.rows}) == 1) is (how == "uniform")


@pytest.mark.parametrize("names", [("dull", "keen"), ("w1", "w2")])
def test_search_finds_what_measured_errors_hide(names):
    """Errors that lie about which kind of layer matters: the loss tells, and the weights come back."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:
                self.add_module(name, nn.ModuleList([nn.Linear(16, 16) for _ in range(2)]))

        def forward(self, x):
            return sum(1e-3 * d(x) + k(x) for d, k in zip(*(self.get_submodule(n) for n in names)))

    net, seen = Two(), []
    layers = all_layers(net)
    x = torch.randn(64, 16)
    data = [(x, net(x).detach())]

    def loss(output, batch):
        seen.append(float((output - batch[1]).square().mean()))
        return torch.tensor(seen[-1])

    costs = {l.full_name: [1.0, 2.0, 4.0] if names[0] in l.full_name else [0.9, 1.8, 3.6] for l in layers}
    solved = {
        l.full_name: [
            torch.where(l.original.abs() > l.original.abs().quantile(s), l.original, 0.0).detach() for s in LEVELS
        ]
        for l in layers
    }
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = search_allocation(net, layers, costs, solved, 0.6, data, loss)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    sizes = {l.full_name: l.original.numel() for l in layers}
    assert mean(found, sizes) == pytest.approx(0.6, abs=1e-6)
    assert all(s > 0.7 if names[0] in n else s < 0.5 for n, s in found.items()), found
    assert len(seen) == TRIALS + 4 and min(seen) < 0.5 * min(seen[:4])
    assert found == search_allocation(net, layers, costs, solved, 0.6, data, loss)  # a seed is a seed
    seen.clear()
    search_allocation(net, layers, costs, solved, 0.6, data, loss, trials=0)
    assert len(seen) == 4


@pytest.mark.parametrize("how", allocation.GRADIENTS)
def test_a_model_without_a_loss_goes_by_its_own_outputs(how):
    """An encoder: what its outputs do not depend on is pruned first."""
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

        def forward(self, x):
            return {"ids": torch.arange(len(x)), "hidden": self.layers[0](x) + 0.01 * self.layers[1](x)}

    report = rarefy.prune_(Encoder(), sparsity=0.6, solver="obs", allocate=how, data=[torch.randn(64, 32)])
    keen, dull = (r["asked"] for r in report.rows)
    assert keen < 0.5 and dull > 0.7 and (keen + dull) / 2 == pytest.approx(0.6, abs=1e-6)
    assert report.notes == ("no loss: sparsity was allocated by the model's own outputs",)


def test_probe_weighs_every_output_alike():
    y = torch.zeros(50_000, 4, requires_grad=True)
    (g,) = torch.autograd.grad(output_probe(y, None), y)
    torch.testing.assert_close((g * y.numel()).square().mean(0), torch.ones(4), rtol=0.02, atol=0)


def test_errors_of_every_layer_type():
    net = Net().eval()
    report = rarefy.prune_(net, sparsity=0.5, solver="obs", allocate="errors", data=image_batches())
    assert report.summary["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert len(select_layers(net)) == len(report.rows)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"allocate": "unifrom"}, PatternError, r"unknown allocation 'unifrom'.*did you mean 'uniform'"),
        ({"allocate": "owl"}, DataError, "allocation 'owl' reads activations: give data=batches"),
        (
            {"allocate": "erk", "scope": "global"},
            PatternError,
            "scope 'global' determines every layer's sparsity: allocate",
        ),
        ({"allocate": "erk", "pattern": "2:4", "sparsity": None}, PatternError, "pattern 2:4 determines every layer's"),
    ],
)
def test_errors(settings, kind, message):
    with pytest.raises(kind, match=message):
        rarefy.prune_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), **{"sparsity": 0.5, **settings})


@pytest.mark.parametrize("how", allocation.GRADIENTS)
def test_targets_are_not_dropped_where_a_loss_is_missing(how):
    told = {"sparsity": 0.5, "solver": "obs", "allocate": how}
    with pytest.raises(DataError, match=r"no loss.*are there labels in the batch"):
        rarefy.prune_(tiny_llama(), data=[{"input_ids": torch.randint(0, 64, (2, 16))}], **told)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(DataError, match=r"no loss.*pass loss=callable"):
        rarefy.prune_(net, data=[(torch.randn(6, 8), torch.randn(6, 4))], **told)
    with pytest.raises(DataError, match="the loss does not depend on any selected layer"):
        rarefy.prune_(net, data=[torch.randn(6, 8)], loss=lambda output, batch: torch.ones(()), **told)


def test_a_loss_that_is_not_finite_is_named():
    ids = [torch.randint(0, 64, (2, 16)) for _ in range(2)]
    good, bad = [{"input_ids": i, "labels": i} for i in ids], {"input_ids": ids[0], "labels": torch.full((2, 16), -100)}
    how = {"sparsity": 0.5, "solver": "obs", "allocate": "search"}
    with pytest.raises(ModelError, match=r"the loss of calibration batch 1 is nan: .*no label but -100"):
        rarefy.prune_(tiny_llama(), data=[good[0], bad], **how)
    long = [{k: v.repeat(32, 1) for k, v in b.items()} for b in good * 2]  # 4,096 tokens, for the gradients
    with pytest.raises(
        ModelError, match=r"the loss of the last calibration batches is inf for every allocation.*no label but -100"
    ):
        rarefy.prune_(tiny_llama(), data=[*long, bad], **how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory": 1 << 30, "resume_dir": "w"},
            r"allocate='search' needs all weights.*--set allocate=uniform.*recipe best, stage 1",
        ),
        ({"pattern": "2:4"}, r"stages\[0\].prune.allocate: pattern 2:4 determines.*--set allocate=uniform"),
        ({"scope": "global"}, r"stages\[0\].prune.solver: .*scope 'global' has no effect"),
    ],
)
def test_what_best_cannot_do_is_said_before_data_is_read(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RarefyError, match=message):
        rarefy.compress_(tiny_llama(), "best", {"calibrate": map(pytest.fail, ["read"])}, **options)
    memory = options.pop("memory", None)
    options.pop("resume_dir", None)
    with pytest.raises(RarefyError, match=message):
        forecast(tiny_llama(), recipes.load("best", **options), memory)
    assert not list(tmp_path.iterdir())


def test_only_causal_models_are_their_own_target():
    import transformers as t

    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    bert = t.BertConfig(**small)
    five = t.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    assert is_causal_lm(tiny_llama())
    for model in (t.BertForMaskedLM(bert), t.BertModel(bert), t.T5ForConditionalGeneration(five), nn.Linear(2, 2)):
        assert not is_causal_lm(model)
    data = [{"input_ids": torch.randint(0, 9, (2, 6))}]
    how = {"sparsity": 0.5, "allocate": "errors", "solver": "obs"}
    receipt = rarefy.compress_(t.BertForMaskedLM(bert), {"stages": [{"prune": how}]}, data)
    assert any("by the model's own outputs" in n for n in receipt.notes)


def test_recipes():
    how = {"sparsity": 0.5, "allocate": "search", "solver": {"name": "obs", "bf16": True}}
    plan = recipes.load({"stages": [{"prune": how}]})
    data = [{"input_ids": torch.randint(0, 64, (2, 16))}]
    receipt = rarefy.compress_(tiny_llama(), plan, data)
    assert receipt.sparsity["achieved"] == pytest.approx(0.5, abs=2e-3)
    with pytest.raises(RecipeError, match="unknown allocation 'x'"):
        recipes.load({"stages": [{"prune": {"sparsity": 0.5, "allocate": "x"}}]})


@pytest.mark.parametrize("how", ["owl", "errors", "search"])
def test_batches_from_a_generator_serve_allocation_and_solver(how):
    ids = torch.randint(0, 64, (2, 16))
    data = ({"input_ids": i, "labels": i} for i in [ids, ids.flip(1)])
    report = rarefy.prune_(tiny_llama(), sparsity=0.6, solver="obs", allocate=how, data=data)
    assert report.summary["sparsity"] == pytest.approx(0.6, abs=2e-3)
