"""Orders of units and budgets of cuts."""

import copy

import pytest
import torch
from torch import nn

import rarefy
from helpers.marks import slow_case
from helpers.structured_models import CASES, IDS, IMAGE, language, vision
from rarefy.common.errors import ModelError
from rarefy.dependency.graph import trace
from rarefy.evaluation.profiling import flops
from rarefy.structured import unit_selection

COSTS = {
    "resnet18": CASES["resnet18"],
    "mobilenet_v3_small": CASES["mobilenet_v3_small"],
    "swin_t": CASES["swin_t"],
    "vit": (lambda: vision("vit_b_32", image_size=64, num_classes=10), IMAGE),
    "llama": CASES["llama"],
    "bert": CASES["bert"],
    "gpt2": CASES["gpt2"],
}


def mlp(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 12, bias=bias), nn.ReLU(), nn.Linear(12, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3)
    )


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


@pytest.mark.parametrize("name", [c if c != "swin_t" else slow_case(c) for c in COSTS])
def test_flops_match_a_counter(name):
    make, x = COSTS[name]
    model = make().eval()
    graph = trace(model, x)
    ran = flops(model, lambda: model(**x) if isinstance(x, dict) else model(x))
    assert unit_selection.flops(graph, {}) == ran
    assert unit_selection.parameters(graph, {}) == sum(p.numel() for p in model.parameters())
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
    with pytest.raises(ModelError, match="latency 0.0001 is out of reach: with the fewest units allowed"):
        rarefy.cut_(mlp(), torch.randn(1, 5), latency=0.0001)
