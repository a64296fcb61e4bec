"""Unit scores, orders and budgets against slow references; steps, optimizers and failed cuts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.structured_models import CASES, IDS, IMAGE, language, vision
from rarefy.common.errors import DataError, ModelError
from rarefy.dependency.graph import trace
from rarefy.evaluation.profiling import flops
from rarefy.structured import budget
from rarefy.structured.importance import UNIT_SCORES, reduce_slices, removal_errors, sum_along, unit_scores


def mlp(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 12, bias=bias), nn.ReLU(), nn.Linear(12, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3)
    )


def data(n=4):
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(16, 5, generator=g) for _ in range(n)]
    return [(b, b[:, :3].argmax(1)) for b in x]


def scores(model, name, example=None, **how):
    example = torch.randn(2, 5) if example is None else example
    graph = trace(model, example)
    groups = [g for g in graph.groups if g.lock is None and g.kind in ("channel", "neuron", "head")]
    return [unit_scores(model, graph, groups, name, **how)[g.axis] for g in groups]


def test_magnitude_sums_all_slices_of_a_unit():
    net = mlp()
    W, V = net[0].weight.detach().double(), net[2].weight.detach().double()
    rows, columns = W.square().sum(1), V.square().sum(0)
    one = rows / rows.mean() + columns / columns.mean()
    torch.testing.assert_close(scores(net, "magnitude")[0], one)
    torch.testing.assert_close(scores(net, "magnitude", reduce="mean")[0], one / 13, rtol=1e-6, atol=0)
    largest = torch.maximum(rows / rows.mean() / 5, columns / columns.mean() / 8)
    torch.testing.assert_close(scores(net, "magnitude", reduce="max")[0], largest)


def test_l1_scale_and_random():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    nn.init.normal_(net[1].weight)
    x = torch.randn(2, 3, 8, 8)
    gamma = net[1].weight.detach().abs().double()
    torch.testing.assert_close(scores(net, "scale", x)[0], gamma / gamma.mean())
    W, V = net[0].weight.detach().abs().double().flatten(1).sum(1), net[3].weight.detach().abs().double().sum((0, 2, 3))
    torch.testing.assert_close(scores(net, "l1", x)[0], W / W.mean() + V / V.mean())
    assert torch.equal(scores(net, "random", x, seed=3)[0], scores(net, "random", x, seed=3)[0])
    assert not torch.equal(scores(net, "random", x, seed=3)[0], scores(net, "random", x, seed=4)[0])
    with pytest.raises(ModelError, match=r"no norm scales the units of 0.weight:0 \(neuron\)"):
        scores(mlp(), "scale")


def test_the_geometric_median_uses_distances_of_rows():
    W = mlp()[0].weight.detach().double()
    far = torch.tensor([sum(float((a - b).norm()) for b in W) for a in W], dtype=torch.float64)
    torch.testing.assert_close(scores(mlp(), "median")[0], far / far.mean(), rtol=1e-5, atol=1e-6)


def test_taylor_is_the_gradient_of_a_gate():
    """In a ReLU net without biases, the producer and the consumers of a unit have the same sum of w g."""
    net, batches = mlp(bias=False), data()
    want = torch.zeros(12, dtype=torch.float64)
    for x, y in batches:
        gate = torch.ones(12, requires_grad=True)
        out = net[4](net[3](net[2](net[1](net[0](x)) * gate)))
        (slope,) = torch.autograd.grad(F.cross_entropy(out, y), gate)
        want += 2 * 16 * slope.abs().double()
    torch.testing.assert_close(scores(net, "taylor", data=batches)[0], want, rtol=1e-4, atol=1e-7)
    assert not any(p.grad is not None for p in net.parameters())


def test_gradient_and_fisher_match_autograd():
    net, batches = mlp(), data()
    wants = {"gradient": torch.zeros(12, dtype=torch.float64), "fisher": torch.zeros(12, dtype=torch.float64)}
    for x, y in batches:
        W, V = net[0].weight, net[2].weight
        g, h = torch.autograd.grad(F.cross_entropy(net(x), y), [W, V])
        wants["gradient"] += 16 * (g.abs().sum(1) + h.abs().sum(0)).detach()
        wants["fisher"] += 16 * ((W * g).square().sum(1) + (V * h).square().sum(0)).detach()
    for name, want in wants.items():
        torch.testing.assert_close(scores(net, name, data=batches)[0], want, rtol=1e-5, atol=1e-8)


def test_activation_scores_use_consumer_inputs():
    net, batches = mlp(), data()
    with torch.no_grad():
        h = torch.cat([net[1](net[0](x)) for x, _ in batches]).double()
    torch.testing.assert_close(scores(net, "activation", data=batches)[0], h.abs().mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scores(net, "apoz", data=batches)[0], (h != 0).double().mean(0))
    want = h.var(0, correction=0) * net[2].weight.detach().double().square().sum(0)
    torch.testing.assert_close(scores(net, "fluctuation", data=batches)[0], want, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 6, 3, stride=2), lambda: nn.Conv2d(3, 6, 1, stride=2)])
def test_convolution_inputs_are_pixels(make):
    net = nn.Sequential(make(), nn.ReLU(), nn.Conv2d(6, 4, 1, stride=2))
    batches = [torch.randn(2, 3, 9, 9) for _ in range(3)]
    with torch.no_grad():
        h = torch.cat([net[1](net[0](x))[:, :, ::2, ::2].movedim(1, -1).flatten(0, -2) for x in batches]).double()
    got = scores(net, "activation", torch.randn(1, 3, 9, 9), data=batches)[0]
    torch.testing.assert_close(got, h.abs().mean(0), rtol=1e-5, atol=1e-7)


def test_padding_does_not_count():
    model = language("Bert", "ForSequenceClassification")
    ids = torch.randint(5, 99, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 4:] = 0
    how = {"example": {"input_ids": ids, "attention_mask": mask}}
    one = scores(model, "activation", **how, data=[{"input_ids": ids, "attention_mask": mask}])
    other = torch.where(mask.bool(), ids, 7)  # what stands in the padding is nothing to them
    two = scores(model, "activation", **how, data=[{"input_ids": other, "attention_mask": mask}])
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_obs_errors_match_least_squares():
    torch.manual_seed(0)
    X, W = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 5)
    H, W = X.T @ X / 400, W.double()
    for width in (1, 2):
        columns = torch.arange(8).view(-1, width)
        out = removal_errors([(W, H, columns)])
        gone = []
        for j in out.argsort().tolist():  # in the order in which they went
            gone += columns[j].tolist()
            left = [c for c in range(8) if c not in gone]
            best = torch.linalg.lstsq(X[:, left], X @ W).solution if left else torch.zeros(0, 5, dtype=torch.float64)
            error = (X @ W - X[:, left] @ best).square().sum() / 400
            torch.testing.assert_close(out[j], error, rtol=1e-6, atol=1e-9)
            cheaper = [c for c in range(8 // width) if out[c] > out[j]]
            for c in cheaper:  # no other would have cost less at that point
                others = [k for k in range(8) if k not in gone or k in columns[j].tolist()]
                others = [k for k in others if k not in columns[c].tolist()]
                fit = torch.linalg.lstsq(X[:, others], X @ W).solution
                assert (X @ W - X[:, others] @ fit).square().sum() / 400 >= error - 1e-9


def test_obs_removes_redundant_units():
    """A unit that repeats another one is removed, though its weights are large."""
    net = mlp()
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = net[0].weight[7] * 2, net[0].bias[7] * 2
        net[2].weight[:, 3] *= 5
    found = scores(net, "obs", data=data(40))[0]
    assert int(found.argmin()) in (3, 7)
    dense, one, two = net, copy.deepcopy(net), copy.deepcopy(net)
    rarefy.cut_(one, torch.randn(1, 5), keep=11 / 12, layers="0", score="obs", data=data(40))
    rarefy.cut_(two, torch.randn(1, 5), keep=11 / 12, layers="0", score="magnitude", data=data(40))
    x = data()[0][0]
    lost = [float((m(x) - dense(x)).detach().norm()) for m in (one, two)]
    assert lost[0] < 0.2 * lost[1]


@pytest.mark.parametrize("score", [s for s in UNIT_SCORES if s != "scale"])
@pytest.mark.parametrize("scope", budget.SCOPES)
def test_every_score_in_every_scope(score, scope):
    net = mlp()
    given = data() if UNIT_SCORES[score].needs else None
    report = rarefy.cut_(net, torch.randn(1, 5), score=score, scope=scope, data=given, repair=False)
    left = net[0].out_features + net[2].out_features
    assert left == 10 and net(torch.randn(3, 5)).shape == (3, 3)
    assert scope != "layer" or (net[0].out_features, net[2].out_features) == (6, 4)
    assert report.rows[0]["units"] == f"12 -> {net[0].out_features}"


def test_global_and_isomorphic_orders():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(128, 10),
                        nn.GELU(), nn.Linear(10, 10), nn.GELU(), nn.Linear(10, 2)).eval()  # fmt: skip
    x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 2
    with torch.no_grad():
        net[7].weight[2:], net[7].bias[2:], net[9].weight[:, 2:] = 0, 0, 0  # eight of ten units say nothing
    one, two, three = (copy.deepcopy(net) for _ in range(3))
    rarefy.cut_(one, x, score="taylor", scope="global", data=[(x, y)], repair=False)
    assert one[7].out_features <= 2 and sum(m.out_features for m in (one[5], one[7])) > 7
    rarefy.cut_(two, x, score="taylor", scope="global", data=[(x, y)], repair=False, min_keep=0.4)
    assert two[7].out_features == 4
    assert all(n >= 0.4 for n in (two[0].out_channels / 8, two[2].out_channels / 8, two[5].out_features / 10))
    rarefy.cut_(three, x, score="taylor", scope="isomorphic", data=[(x, y)], repair=False)
    convolutions = three[0].out_channels + three[2].out_channels
    assert 7 <= convolutions <= 9  # they are compared with each other alone


def test_reduced_scores_are_scale_free():
    where = torch.arange(3)
    a, b = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[300.0], [200.0], [100.0]])
    fair = reduce_slices([(*sum_along(a, 0), where), (*sum_along(b, 0), where)], 3, "sum", fair=True)
    assert torch.allclose(fair, torch.full((3,), 2.0, dtype=torch.float64))


# ---- budgets --------------------------------------------------------------------------------------------------------

COSTS = {
    "resnet18": CASES["resnet18"],
    "mobilenet_v3_small": CASES["mobilenet_v3_small"],
    "swin_t": CASES["swin_t"],
    "vit": (lambda: vision("vit_b_32", image_size=64, num_classes=10), IMAGE),
    "llama": CASES["llama"],
    "bert": CASES["bert"],
    "gpt2": CASES["gpt2"],
}


@pytest.mark.parametrize("name", COSTS)
def test_flops_match_a_counter(name):
    make, x = COSTS[name]
    model = make().eval()
    graph = trace(model, x)
    ran = flops(model, lambda: model(**x) if isinstance(x, dict) else model(x))
    assert budget.flops(graph, {}) == ran
    assert budget.parameters(graph, {}) == sum(p.numel() for p in model.parameters())
    report = rarefy.cut_(model, x)
    after = flops(model, lambda: model(**x) if isinstance(x, dict) else model(x))
    assert report.summary["flops"].startswith(f"{ran:,} -> {after:,} (")
    assert f"-> {sum(p.numel() for p in model.parameters()):,} (" in report.summary["parameters"]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("what", "target"), [("flops", 0.5), ("parameters", 0.6), ("flops", 0.25)])
def test_budgets_are_met_within_one_percent(what, target, scope):
    model = vision("resnet18", num_classes=10).eval()
    measure = {
        "flops": lambda m: flops(m, lambda: m(IMAGE)),
        "parameters": lambda m: sum(p.numel() for p in m.parameters()),
    }[what]
    before = measure(model)
    rarefy.cut_(model, IMAGE, scope=scope, **{what: target})
    assert measure(model) / before == pytest.approx(target, rel=0.0101)


def test_budgets_of_transformers():
    model = language("Llama", num_key_value_heads=2).eval()
    before = sum(p.numel() for p in model.parameters())
    rarefy.cut_(model, IDS, units="neuron", parameters=0.8)
    assert sum(p.numel() for p in model.parameters()) / before == pytest.approx(0.8, rel=0.0101)


def test_budgets_out_of_reach_name_the_largest_parts():
    model = language("Llama", num_key_value_heads=2)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ModelError, match=r"parameters 0.01 is out of reach: 0\.\d+ remain .*largest parts that stay: model.emb"
    ):
        rarefy.cut_(model, IDS, units="neuron", layers="*gate_proj", parameters=0.01)
    with pytest.raises(ModelError, match="cannot be met within 1 %.*units stay in multiples of 4: a smaller round_to"):
        rarefy.cut_(mlp(), torch.randn(1, 5), round_to=4, parameters=0.9)
    with pytest.raises(
        ModelError, match="cannot be met within 1 %: .* is the closest value below: 20 units are too few to come"
    ):
        rarefy.cut_(mlp(), torch.randn(1, 5), parameters=0.33)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_latency_budget_is_met_by_timing():
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(768, 768), nn.ReLU())], nn.Linear(768, 4))
    report = rarefy.cut_(net, torch.randn(64, 768), latency=0.6)
    assert "of the dense model's" in report.summary["time"] and float(report.summary["time"].split()[0]) <= 0.606
    assert net[0].out_features < 768 and net(torch.randn(2, 768)).shape == (2, 4)
    with pytest.raises(ModelError, match="latency 0.0001 is out of reach: with as few units as may stay"):
        rarefy.cut_(mlp(), torch.randn(1, 5), latency=0.0001)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"score": "talyor"}, ModelError, "unknown score 'talyor'.*did you mean 'taylor'"),
        ({"reduce": "most"}, ModelError, "unknown reduce 'most'; choose from max, mean, sum"),
        ({"scope": "globl"}, ModelError, "unknown scope 'globl'.*did you mean 'global'"),
        ({"keep": 0.5, "flops": 0.5}, ModelError, "keep and flops are given: a cut has one budget"),
        ({"flops": 1.5}, ModelError, "flops: expected a number above 0 and at most 1, got 1.5"),
        ({"min_keep": -1}, ModelError, "min_keep: expected a number between 0 and 1, got -1"),
        ({"steps": 0}, ModelError, "steps: expected a whole number of at least 1, got 0"),
        ({"score": "taylor"}, DataError, "score taylor needs data: give batches"),
        ({"score": "obs", "data": []}, DataError, "the data gave no batch: repair and scores need at least one"),
        ({"data": []}, DataError, "the data gave no batch: repair and scores need at least one"),
        ({"repair": "ridge"}, DataError, "repair ridge needs data: give batches"),
        ({"loss": lambda o, b: o.sum()}, ModelError, "loss has no effect: score magnitude takes no gradients"),
        ({"score": "random", "reduce": "max"}, ModelError, "reduce has no effect: score random is one number a unit"),
        ({"keep": 1.0}, ModelError, "nothing would go: keep 1 leaves every unit of every group"),
        ({"optimizer": "adam"}, ModelError, "optimizer is a torch.optim.Optimizer, got 'adam'"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())},
            ModelError,
            "optimizer trains none of this Sequential's parameters",
        ),
        (
            {"data": [torch.full((4, 5), float("nan"))]},
            ModelError,
            "the inputs of 2.weight are not finite on this data",
        ),
        ({"score": "taylor", "data": [torch.randn(2, 5)]}, DataError, "no loss: "),
        ({"data": "text.txt"}, DataError, "data is an iterable of batches, got the text 'text.txt'"),
        ({"data": [torch.randn(2, 5)], "repair": False}, DataError, "data has no effect: nothing is repaired"),
    ],
)
def test_messages_for_wrong_arguments(how, error, message):
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        rarefy.cut_(net, torch.randn(1, 5), **how)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- steps, optimizers, rehearsals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", budget.SCOPES)
def test_steps_reach_the_same_size_as_one_cut(scope):
    one, many = mlp(), mlp()
    how = {"score": "taylor", "scope": scope, "data": data(), "repair": False}
    rarefy.cut_(one, torch.randn(1, 5), keep=0.25, **how)
    report = rarefy.cut_(many, torch.randn(1, 5), keep=0.25, steps=3, **how)
    left = [m[0].out_features + m[2].out_features for m in (one, many)]
    assert left == [5, 5]
    assert report.rows[0]["units"] == f"12 -> {many[0].out_features}"
    total = sum(p.numel() for p in mlp().parameters())
    assert report.summary["parameters"].startswith(f"{total:,} -> ")


def test_a_failed_step_undoes_earlier_steps():
    calls = []

    class Fails(list):
        def __iter__(self):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("the disk is gone")
            return super().__iter__()

    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="the disk is gone"):
        rarefy.cut_(net, torch.randn(1, 5), steps=3, data=Fails(data()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net[0].out_features == 12


def test_an_optimizer_continues_after_a_cut():
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    old = {n: optimizer.state[p]["exp_avg"].clone() for n, p in net.named_parameters()}
    weight = net[0].weight.detach().clone()
    rarefy.cut_(net, torch.randn(1, 5), optimizer=optimizer, steps=2)
    rows = [int((weight == w).all(1).nonzero()[0, 0]) for w in net[0].weight.detach()]  # type: ignore[union-attr, operator]
    assert torch.equal(optimizer.state[net[0].weight]["exp_avg"], old["0.weight"][rows])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(map(id, net.parameters()))
    assert len(optimizer.state) == len(list(net.parameters()))
    before = net[0].weight.detach().clone()
    F.cross_entropy(net(data()[0][0]), data()[0][1]).backward()
    optimizer.step()
    assert not torch.equal(before, net[0].weight)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_optimizers_whose_state_cannot_be_cut(kind):
    net, (x, y) = mlp(), data()[0]
    optimizer = kind(net.parameters())

    def closure():
        optimizer.zero_grad()
        value = F.cross_entropy(net(x), y)
        value.backward()
        return value

    optimizer.step(closure)
    with pytest.raises(ModelError, match=f"{kind.__name__} keeps '.*', which does not have the shape of its parameter"):
        rarefy.cut_(net, x[:2], optimizer=optimizer)
    assert net[0].out_features == 12


class Parts(nn.Module):
    """Two parts of one dimension; the small one soon has a single unit."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 102), nn.Linear(2, 2), nn.Linear(100, 2)

    def forward(self, x):
        p, q = self.a(x).split([self.b.in_features, self.c.in_features], -1)
        return self.b(p) + self.c(F.relu(q))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_count_from_the_original_size(steps):
    model = Parts()
    rarefy.cut_(model, torch.randn(3, 5), keep=0.5, steps=steps)
    assert (model.b.in_features, model.c.in_features) == (1, 50)


def test_batch_norms_are_restored_when_data_fails():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    net[1].running_mean.normal_()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 3, 6, 6)

    class Once:
        def __init__(self):
            self.it = iter([x])

        def __iter__(self):
            return self.it

    nan = [x, x * float("nan")]
    cases = [([], True), ([], "batchnorm"), (nan, True), (nan, "batchnorm"), (Once(), True)]
    for given, repair in cases:
        with pytest.raises((DataError, ModelError), match="not finite" if given is nan else "gave no batch"):
            rarefy.cut_(net, x, data=given, repair=repair)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_dry_run_changes_nothing():
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    told = rarefy.cut_(net, torch.randn(1, 5), dry_run=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net[0].out_features == 12
    assert "rarefy_cut" not in vars(net) and str(told).startswith("cut: nothing done")
    done = rarefy.cut_(net, torch.randn(1, 5))
    assert told.rows == done.rows and told.summary == done.summary


# ---- what stands in the way -----------------------------------------------------------------------------------------


def constant_net(last, between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), between, last)


@pytest.mark.parametrize("between", [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid()])
def test_constant_outputs_of_removed_units_move_into_the_bias(between):
    net = constant_net(nn.Linear(8, 3), between)
    masked, x = copy.deepcopy(net), torch.randn(6, 5)
    rarefy.cut_(masked, x, mask_only=True)
    rarefy.cut_(net, x)
    assert net[0].out_features == 4
    torch.testing.assert_close(net(x), masked(x), rtol=1e-5, atol=1e-6)


def test_constant_outputs_of_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3)).eval()
    masked, x = copy.deepcopy(net), torch.randn(2, 3, 9, 9)
    rarefy.cut_(masked, x, mask_only=True)
    rarefy.cut_(net, x)
    torch.testing.assert_close(net(x), masked(x), rtol=1e-5, atol=1e-5)
    for last in (nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 3, bias=False)):  # zeros at the edge; nowhere to put it
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), last).eval()
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(
            ModelError, match="the cut model returns outputs that differ from the masked model's by .*it was put back"
        ):
            rarefy.cut_(net, x)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_repair_and_constants_are_not_counted_twice():
    net = constant_net(nn.Linear(8, 3), nn.Sigmoid())
    batches = [torch.randn(64, 5) for _ in range(4)]
    dense, plain = copy.deepcopy(net), copy.deepcopy(net)
    rarefy.cut_(plain, batches[0])
    x = torch.cat(batches)
    lost = []
    for how in (["ridge"], ["bias"], ["ridge", "bias"]):
        cut = copy.deepcopy(net)
        rarefy.cut_(cut, batches[0], data=batches, repair=how)
        lost.append(float((cut(x) - dense(x)).detach().norm()))
    assert max(lost) < float((plain(x) - dense(x)).detach().norm())
    assert lost[2] == min(lost)


class Hardwired(nn.Module):
    """A hard-coded size, as in many classes."""

    def __init__(self):
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x):
        y = F.relu(self.a(x)) + self.inner(F.relu(self.a(x))).reshape(-1, 12)
        return self.b(y)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.fixed = mlp(), nn.ModuleList([Hardwired(), Hardwired()])
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        y = self.mlp(x)
        return self.last(torch.cat([y[:, :2], sum(f(x) for f in self.fixed)], 1))


def test_hard_coded_sizes_are_found_and_named():
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(4, 5)
    masked = copy.deepcopy(model)
    report = rarefy.cut_(model, x)
    assert model.mlp[0].out_features == 6 and all(f.a.out_features == 12 for f in model.fixed)
    why = {r["group"]: r["stays because"] for r in report.rows}
    assert why["fixed.0.a.weight:0"].startswith("fixed.0 has its size in its code (")
    assert why["fixed.1.a.weight:0"].startswith("fixed.0 has its size in its code (")
    rarefy.cut_(masked, x, mask_only=True)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-5, atol=1e-6)


class Counts(nn.Module):
    """A count of features that no rule knows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.b(y) / y.shape[-1]
        return self.d(F.relu(self.c(F.relu(y))))


def test_groups_with_inexact_cuts_stay():
    torch.manual_seed(0)
    model, x = Counts(), torch.randn(4, 5)
    report = rarefy.cut_(model, x)
    assert model.a.out_features == 8 and model.b.out_features == 3 and model.c.out_features == 4
    why = {r["group"]: r["stays because"] for r in report.rows}
    assert why["a.weight:0"].startswith("the cut model returns outputs that differ ")


def test_a_dimension_of_two_groups_is_cut_once():
    """64 groups of 2 outputs each: half of the 128 channels are removed, not three quarters."""
    net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 128, 3, groups=64), nn.ReLU(), nn.Conv2d(128, 4, 1)).eval()
    rarefy.cut_(net, torch.randn(1, 3, 8, 8))
    assert net[0].out_channels == 32 and net[1].out_channels == 64 and net[3].in_channels == 64
