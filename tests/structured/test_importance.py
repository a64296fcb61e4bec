"""Unit scores against slow references."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.structured_models import language
from rarefy.common.errors import DataError, ModelError
from rarefy.dependency.graph import trace
from rarefy.structured import unit_selection
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


def test_obs_errors_of_units_of_many_columns():
    """`torch.linalg.solve` fails on several matrices of this size."""
    torch.manual_seed(0)
    X, W = torch.randn(2000, 576, dtype=torch.float64), torch.randn(576, 64, dtype=torch.float64)
    columns = torch.arange(576).view(3, 192)
    out = removal_errors([(W, X.T @ X / 2000, columns)], 1)
    unit = int(out.argmin())
    left = [c for c in range(576) if c not in columns[unit]]
    best = torch.linalg.lstsq(X[:, left], X @ W).solution
    assert float(out[unit]) == pytest.approx(float((X @ W - X[:, left] @ best).square().sum() / 2000), rel=1e-6)


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
@pytest.mark.parametrize("scope", unit_selection.SCOPES)
def test_every_score_in_every_scope(score, scope):
    net = mlp()
    given = data() if UNIT_SCORES[score].needs else None
    report = rarefy.cut_(net, torch.randn(1, 5), score=score, scope=scope, data=given, repair=False)
    left = net[0].out_features + net[2].out_features
    assert left == 10 and net(torch.randn(3, 5)).shape == (3, 3)
    assert scope != "layer" or (net[0].out_features, net[2].out_features) == (6, 4)
    assert report.rows[0]["units"] == f"12 -> {net[0].out_features}"


def test_reduced_scores_are_scale_free():
    where = torch.arange(3)
    a, b = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[300.0], [200.0], [100.0]])
    fair = reduce_slices([(*sum_along(a, 0), where), (*sum_along(b, 0), where)], 3, "sum", fair=True)
    assert torch.allclose(fair, torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"score": "talyor"}, ModelError, "unknown score 'talyor'.*did you mean 'taylor'"),
        ({"reduce": "most"}, ModelError, "unknown reduce 'most'; choose from max, mean, sum"),
        ({"scope": "globl"}, ModelError, "unknown scope 'globl'.*did you mean 'global'"),
        ({"keep": 0.5, "flops": 0.5}, ModelError, "expected one budget, got keep and flops"),
        ({"flops": 1.5}, ModelError, "flops: expected a number above 0 and at most 1, got 1.5"),
        ({"min_keep": -1}, ModelError, "min_keep: expected a number between 0 and 1, got -1"),
        ({"steps": 0}, ModelError, "steps: expected a whole number of at least 1, got 0"),
        ({"score": "taylor"}, DataError, "score taylor needs data: give batches"),
        ({"score": "obs", "data": []}, DataError, "the data gave no batch: repair and scores need at least one"),
        ({"data": []}, DataError, "the data gave no batch: repair and scores need at least one"),
        ({"repair": "ridge"}, DataError, "repair ridge needs data: give batches"),
        ({"loss": lambda o, b: o.sum()}, ModelError, "loss has no effect: score magnitude takes no gradients"),
        (
            {"score": "random", "reduce": "max"},
            ModelError,
            "reduce has no effect: score random gives one number per unit",
        ),
        ({"keep": 1.0}, ModelError, "nothing would be removed: keep 1 leaves every unit of every group"),
        ({"optimizer": "adam"}, ModelError, "optimizer: expected a torch.optim.Optimizer, got 'adam'"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())},
            ModelError,
            "optimizer holds no parameter of this Sequential",
        ),
        (
            {"data": [torch.full((4, 5), float("nan"))]},
            ModelError,
            "the inputs of 2.weight are not finite on this data",
        ),
        ({"score": "taylor", "data": [torch.randn(2, 5)]}, DataError, "no loss: "),
        ({"data": "text.txt"}, DataError, "data: expected an iterable of batches, got the text 'text.txt'"),
        (
            {"data": [torch.randn(2, 5)], "repair": False, "score": "l1"},
            DataError,
            "data has no effect: nothing is repaired",
        ),
    ],
)
def test_messages_for_wrong_arguments(how, error, message):
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        rarefy.cut_(net, torch.randn(1, 5), **how)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_obs_may_stop_once_enough_units_are_ordered():
    random = torch.Generator().manual_seed(3)
    X = torch.randn(400, 200, generator=random, dtype=torch.float64) @ torch.randn(
        200, 200, generator=random, dtype=torch.float64
    )
    W = torch.randn(200, 16, generator=random, dtype=torch.float64)
    problem = (W, X.T @ X / 400, torch.arange(200)[:, None])
    every = removal_errors([problem])
    for removed in (0, 1, 37, 150, 200):
        some = removal_errors([problem], removed)
        first = every.argsort()[:removed]
        assert torch.equal(some[first], every[first])
        assert set(some.argsort()[:removed].tolist()) == set(first.tolist())
