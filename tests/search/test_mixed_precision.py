"""Layers that stay in fp32 where 8 bits lose too much: which ones a search chooses, and what it says of them."""

import pytest
import torch
from torch import nn

import rarefy
from rarefy.model.layers import all_layers
from rarefy.runtime import bindings
from rarefy.search import deploy as search_deploy
from rarefy.search import eight_bits, points
from rarefy.search.deploy import PLAIN, Variant, deploy, distance, outputs_of, variants_of
from rarefy.search.eight_bits import layers_in_8_bits, more_exact, rounded_alone, savings_of_layers
from rarefy.search.frontier import Point, frontier_from_dict
from rarefy.search.html_report import frontier_page

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")

LAYERS = ["a", "b", "c", "d", "out"]


class Net(nn.Module):
    """A convolution with an input that is 300 times smaller and counts 300 times as much, which 8 bits lose."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 72, 3, 1, 1), nn.Conv2d(72, 48, 1), nn.Conv2d(48, 48, 3, 1, 1)
        self.d, self.out = nn.Conv2d(48, 48, 3, 1, 1, 1, 48), nn.Linear(48, 10)
        with torch.no_grad():
            self.b.weight[:, 5] *= 300
            self.a.weight[5] /= 300
            self.a.bias[5] /= 300

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.out(self.d(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 24, 24) for _ in range(4)]


@pytest.fixture
def steady_times(monkeypatch):
    """Times that depend on no machine: 1 ms for each layer in fp32, 0.4 ms for each one in 8 bits."""

    def of_layers(model, batch):
        in_8_bits = layers_in_8_bits(model)
        return {layer: 0.4 if layer in in_8_bits else 1.0 for layer in LAYERS}

    def of_models(models, example, names):
        total = {n: sum(of_layers(m, example).values()) for n, m in models.items()}
        return {b: {n: dict.fromkeys(("median", "low", "high"), t) for n, t in total.items()} for b in names}

    monkeypatch.setattr(eight_bits, "_milliseconds_of_layers", of_layers)
    monkeypatch.setattr(points, "times_of", of_models)


@pytest.mark.slow
def test_the_layer_that_loses_most_stays(net, data, steady_times):
    frontier = rarefy.optimize(
        net, data[0], data, "similarity", max_loss="0.0000001 points", minutes=9, layers="out", batch=(1, 8)
    )
    mixed = [p for p in frontier.points if p.ignore and p.loss is not None and p.name.startswith("dense")]
    whole = next(p for p in frontier.points if p.name == "dense, int8")
    assert all(p.loss < whole.loss for p in mixed if "b" in p.ignore)
    least = next(p for p in mixed if "b" in p.ignore)
    rows = {row["layer"]: row for row in least.layers}
    assert rows["b"]["bits"] == 32 and rows["b"]["choice"] == "as it is"
    assert {r["bits"] for p in mixed for r in p.layers} == {8, 32}
    assert all({r["layer"] for r in p.layers if r["bits"] == 32} == set(p.ignore) for p in mixed)
    again = frontier_from_dict(frontier.to_dict())
    assert [p.ignore for p in again.points] == [p.ignore for p in frontier.points]


@pytest.mark.slow
def test_the_best_model_is_compiled_so_again(net, data, steady_times):
    frontier = rarefy.optimize(
        net, data[0], data, lambda m: -float((m(data[0]) - net(data[0])).square().sum()), eval_data=None,
        max_loss="0.0000001 points", minutes=9, layers="out",
    )  # fmt: skip
    point = next(p for p in frontier.points if p.ignore and p.precision == "int8")
    assert f"precision='int8', ignore={list(point.ignore)!r}, calibrate=data." in point.recipe["about"]
    model = rarefy.compile(net, data[0], precision="int8", calibrate=data, ignore=list(point.ignore))
    kinds = {model.exported.layers[n]: k.held[0].kind for n, k in model.kernels.items()}
    assert all(kind == "fp32" for layer, kind in kinds.items() if layer in point.ignore)
    page = frontier_page(
        rarefy.search.frontier.Frontier(**{**vars(frontier), "best_index": frontier.points.index(point)})
    )
    assert f"ignore={list(point.ignore)!r}, calibrate=data".replace("'", "&#x27;") in page


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["int16", "bf16"])
def test_layers_stay_in_16_bits_where_these_are_fast(net, data, monkeypatch, fast):
    """1 ms for each layer in fp32, 0.7 in this precision, 0.4 in 8 bits. Only the layer "b" loses, a convolution, which
    has no kernel in bf16."""

    def of_layers(model, batch):
        kinds = {model.exported.layers[n]: k.held[0].kind for n, k in model.kernels.items()}
        return {n: 0.4 if n in layers_in_8_bits(model) else 0.7 if kinds.get(n) == fast else 1.0 for n in LAYERS}

    def of_models(models, example, names):
        total = {n: sum(of_layers(m, example).values()) for n, m in models.items()}
        return {b: {n: dict.fromkeys(("median", "low", "high"), t) for n, t in total.items()} for b in names}

    monkeypatch.setattr(eight_bits, "_milliseconds_of_layers", of_layers)
    monkeypatch.setattr(points, "times_of", of_models)
    monkeypatch.setattr(search_deploy, "multiplies_bf16", lambda: True)
    frontier = rarefy.optimize(
        net, data[0], data, "distance", max_loss="0.00001 points", minutes=9, layers="out", batch=(1, 8)
    )
    losses = {p.name: p.loss or 0.0 for p in frontier.points}
    assert losses["dense, bf16"] < 1e-5 and losses["dense, int16"] < 1e-5 < losses["dense, int8"]
    mixed = [p for p in frontier.points if (p.per_layer or p.ignore) and p.name.startswith("dense")]
    with_kernel = {"int16": {"b", "out"}, "bf16": {"out"}}[fast]
    assert mixed and {v for p in mixed for v in p.per_layer.values()} <= {fast}
    assert all({*p.per_layer} <= with_kernel and with_kernel.isdisjoint(p.ignore) for p in mixed)
    for point in mixed:
        bits = {r["layer"]: r["bits"] for r in point.layers}
        assert bits == {n: 16 if n in point.per_layer else 32 if n in point.ignore else 8 for n in LAYERS}
    best = frontier.best_point
    assert best.precision == "int8" and "b" in (best.per_layer if fast == "int16" else best.ignore)
    assert losses[best.name] < 1e-5 and frontier.met
    assert f"b in {fast if fast == 'int16' else 'fp32'}" in best.name or "2 layers" in best.name
    images, own = frontier.best.data["calibrate"], {"ignore": list(best.ignore), "per_layer": best.per_layer}
    model = rarefy.compile(net, data[0], precision="int8", calibrate=images, **own)
    assert all(torch.equal(model(x), frontier.best.model(x)) for x in data)
    point = next(p for p in mixed if p.per_layer)
    index = frontier.points.index(point)
    page = frontier_page(rarefy.search.frontier.Frontier(**{**vars(frontier), "best_index": index}))
    assert f"per_layer={dict(point.per_layer)!r}, calibrate=data".replace("'", "&#x27;") in page
    values = {**vars(frontier), "best_index": index, "model": "net"}
    layer = next(iter(point.per_layer))
    assert f"--per-layer {layer}={fast}" in frontier_page(rarefy.search.frontier.Frontier(**values))
    again = frontier_from_dict(frontier.to_dict())
    assert [p.per_layer for p in again.points] == [p.per_layer for p in frontier.points]


def test_the_precision_of_layers_that_stay():
    """The fastest one, the smallest where bytes count; never a mix that an earlier part of the search made."""

    def point(speed, disk_bytes):
        return Point("", 1.0, 0.0, {}, {"1": speed}, disk_bytes, 0, {})

    mixed = Variant("int8, a in int16", "int8", per_layer=(("a", "int16"),))
    bf16, int16 = Variant("bf16", "bf16"), Variant("int16", "int16")
    within = {PLAIN: point(1.0, 40), bf16: point(0.5, 20), int16: point(1.2, 21), mixed: point(2.0, 12)}
    assert more_exact(within, counts_bytes=False) == int16
    assert more_exact(within, counts_bytes=True) == bf16
    assert more_exact({mixed: within[mixed]}, counts_bytes=False) == PLAIN


def test_precisions_that_are_tried(monkeypatch):
    monkeypatch.setattr(search_deploy, "multiplies_bf16", lambda: True)

    def tried(*layers):
        return [v.precision for v in variants_of(nn.Sequential(*layers), has_data=True, counts_bytes=False)]

    assert tried(nn.Linear(64, 64)) == ["bf16", "int8"]
    assert tried(nn.Conv2d(64, 64, 1), nn.Linear(64, 64)) == ["bf16", "int16", "int8"]
    assert tried(nn.Conv2d(64, 64, 3)) == ["int8"]  # by Winograd's algorithm in fp32
    assert tried(nn.Conv2d(64, 64, 3, 2)) == ["int16", "int8"]
    assert tried(nn.Conv2d(16, 64, 1)) == tried(nn.Conv2d(64, 64, 5, groups=64)) == ["int8"]
    monkeypatch.setattr(search_deploy, "multiplies_bf16", lambda: False)
    assert tried(nn.Linear(64, 64)) == ["int16", "int8"]


def test_what_runs_in_8_bits(net, data):
    compiled = deploy(net, data[0], "int8", data)
    assert layers_in_8_bits(compiled) == LAYERS
    some = deploy(net, data[0], "int8", data, ["a", "d"])
    assert layers_in_8_bits(some) == ["b", "c", "out"]


def test_the_time_of_each_layer_is_measured(net, data):
    times = eight_bits._milliseconds_of_layers(deploy(net, data[0], None, data), data[0])
    assert set(LAYERS) <= set(times) and all(t > 0 for t in times.values())


def test_savings_add_up_to_the_whole(net, data, steady_times):
    plain, in_8_bits = deploy(net, data[0], None, data), deploy(net, data[0], "int8", data, solver="rtn")
    savings = savings_of_layers(plain, in_8_bits, data[0], {"1": 0.3, "8": 0.5})
    assert sum(savings["1"].values()) == pytest.approx(0.3) and sum(savings["8"].values()) == pytest.approx(0.5)
    assert set(LAYERS) <= set(savings["8"])


def test_a_layer_rounded_alone_comes_back(net, data):
    rounded = Net().eval()
    rounded.load_state_dict(net.state_dict())
    rarefy.quantize_(rounded, "int8", activations="int8-static", layers="*", data=data)
    wanted, before = outputs_of(net, data), {n: p.clone() for n, p in net.named_parameters()}
    copies = {l.full_name: l for l in all_layers(rounded)}
    losses = {}
    for layer in all_layers(net):
        with rounded_alone(layer, copies[layer.full_name]):
            losses[layer.full_name] = distance(net, wanted, data)
    assert distance(net, wanted, data) == 0 and all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert max(losses, key=losses.get) == "b" and all(value > 0 for value in losses.values())
