"""The joint loss of an allocation against models that are really cut, pruned and rounded; the climb against all choices."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn

from rarefy.common.errors import RarefyError
from rarefy.dependency.graph import trace
from rarefy.model.layers import all_layers
from rarefy.pipeline.sensitivity import compressed_weight
from rarefy.search import solve, space
from rarefy.search.allocation import calibrated, climb
from rarefy.search.deploy import distance
from rarefy.search.joint_loss import JointLoss, solver_gain, split
from rarefy.search.space import BITS, RANK, Part
from rarefy.structured.compensation import REPAIRS
from rarefy.structured.cut import remove_and_compensate
from rarefy.structured.unit_selection import keep_masks


class Net(nn.Module):
    """Two hidden layers and a residual branch around a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(12, 32), nn.Linear(32, 64), nn.Linear(64, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(x + self.c(torch.relu(self.b(torch.relu(self.a(x))))))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def data() -> list[torch.Tensor]:
    torch.manual_seed(1)
    mix = torch.randn(12, 12)
    return [torch.randn(64, 12) @ mix for _ in range(8)]


def part(method: str, name: str, size: int = 1, amounts: tuple[float, ...] = (0.25, 0.5)) -> Part:
    return Part(method, name, size, amounts, (1.0,) * len(amounts), {"1": amounts})


def cut_parts(net: nn.Module, x: torch.Tensor) -> list[Part]:
    groups = space.cuttable_groups(net, trace(net, x), "neuron", None, None)
    return [part("neuron", g.name, g.size) for g in groups if g.size in (32, 64)]


def really_cut(net: nn.Module, joint: JointLoss, amounts: dict, data: list[torch.Tensor]) -> nn.Module:
    smaller = copy.deepcopy(net)
    graph = trace(smaller, data[0])
    groups = {("neuron", g.name): g for g in space.cuttable_groups(smaller, graph, "neuron", None, None)}
    masks = keep_masks(
        {groups[k].axis: joint.scores[k] for k in amounts},
        {groups[k].axis: groups[k].size - round(a * groups[k].size) for k, a in amounts.items()},
    )
    remove_and_compensate(smaller, data[0], graph, masks, REPAIRS, data)
    return smaller


def test_it_is_that_of_the_cut_model(net: nn.Module, data: list[torch.Tensor]) -> None:
    parts = cut_parts(net, data[0])
    joint = JointLoss(net, data[0], parts, {"neuron": "obs"}, data)
    for a, b in ((0.25, 0.5), (0.5, 0.25), (0.25, 0.0)):
        amounts = {k: v for k, v in ((parts[0].key, a), (parts[1].key, b)) if v}
        expected = distance(really_cut(net, joint, amounts, joint.fitted), joint.wanted, joint.judged)
        assert joint(amounts) == pytest.approx(expected, rel=1e-3)
        assert expected is not None and expected > 1e-5


def test_it_is_that_of_a_cut_convnet_with_batchnorm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip
    data = [torch.randn(16, 3, 10, 10) for _ in range(4)]
    groups = space.cuttable_groups(net, trace(net, data[0]), "channel", None, None)
    parts = [part("channel", g.name, g.size) for g in groups]
    joint = JointLoss(net, data[0], parts, {"channel": "magnitude"}, data)
    amounts = {p.key: 0.5 for p in parts}
    smaller = copy.deepcopy(net)
    graph = trace(smaller, data[0])
    axes = {("channel", g.name): g.axis for g in graph.groups}
    masks = keep_masks(
        {axes[k]: joint.scores[k] for k in amounts}, {axes[k]: axes[k].size - axes[k].size // 2 for k in amounts}
    )
    remove_and_compensate(smaller, data[0], graph, masks, ("ridge", "bias"), joint.fitted)
    assert joint(amounts) == pytest.approx(distance(smaller, joint.wanted, joint.judged), rel=1e-3)


@pytest.mark.parametrize("method", ["1x4", BITS, RANK])
def test_changed_weights_are_those_of_the_method(net: nn.Module, data: list[torch.Tensor], method: str) -> None:
    changed = part(method, "b", 64 * 32, (0.5,))
    joint = JointLoss(net, data[0], [changed], {}, data)
    loss = joint({changed.key: changed.amounts[0]})
    other = copy.deepcopy(net)
    layer = next(l for l in all_layers(other) if l.full_name == "b")
    if method == RANK:
        weight = space.factorized_weight(layer, 0.5, joint.stats)
    else:
        weight = compressed_weight(layer, space.setting_of(method, changed.amounts[0]), joint.stats, "wanda")
    layer.original.data = weight
    assert loss == pytest.approx(distance(other, joint.wanted, joint.judged))


def test_nothing_changed_is_no_loss_and_the_model_stays(net: nn.Module, data: list[torch.Tensor]) -> None:
    parts, before = cut_parts(net, data[0]), copy.deepcopy(net.state_dict())
    joint = JointLoss(net, data[0], parts, {"neuron": "obs"}, data)
    assert joint({}) == 0.0
    assert joint({parts[0].key: 0.5}) != joint({parts[1].key: 0.5})
    assert all(torch.equal(before[n], p) for n, p in net.state_dict().items())


def test_zeros_stay_where_inputs_have_gone(net: nn.Module, data: list[torch.Tensor]) -> None:
    first, pattern = cut_parts(net, data[0])[0], part("1x4", "b", 64 * 32, (0.5,))
    joint = JointLoss(net, data[0], [first, pattern], {"neuron": "obs"}, data)
    changed = joint._changed({first.key: 0.5, pattern.key: 0.5})
    weight = changed[net.get_parameter("b.weight")]
    assert 0.5 < float((weight == 0).float().mean()) < 1.0


def test_layers_that_lose_inputs_are_rounded_all_the_same(net: nn.Module, data: list[torch.Tensor]) -> None:
    first, fewer = cut_parts(net, data[0])[0], part(BITS, "b", 64 * 32, (0.5,))
    joint = JointLoss(net, data[0], [first, fewer], {"neuron": "obs"}, data)
    b = net.get_parameter("b.weight")
    cut, both = (joint._changed(a)[b] for a in ({first.key: 0.5}, {first.key: 0.5, fewer.key: 0.5}))
    layer = next(l for l in all_layers(net) if l.full_name == "b")
    error = compressed_weight(layer, space.setting_of(BITS, 0.5), {}, "magnitude") - b.detach()
    torch.testing.assert_close(both, torch.where(cut == 0, 0.0, cut + error))
    assert not torch.equal(both, cut)


def test_rounding_counts_as_much_as_the_solver_leaves_of_it(data: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    fewer = part(BITS, "2", 64 * 32, (0.5,))
    joint = JointLoss(net, data[0], [fewer], {}, data)
    layers = [l for l in all_layers(net) if l.full_name == "2"]
    gain, by_nearest = solver_gain(net, layers, 0.5, data), joint({fewer.key: 0.5})
    assert gain is not None and 0 < gain < 1 and by_nearest is not None
    solved = copy.deepcopy(net)
    space.quantize_(solved, ["2"], 0.5, joint.fitted)
    by_solver = distance(solved, joint.wanted, joint.judged)
    assert by_solver is not None and gain == pytest.approx(by_solver / by_nearest, rel=1e-3)
    scaled = JointLoss(net, data[0], [fewer], {}, data, gain)({fewer.key: 0.5})
    assert scaled == pytest.approx(by_solver, rel=1e-3)  # the layer is linear: losses go by the square
    assert solver_gain(net, layers, 0.5, data[:3]) is None  # none to keep for the loss


def test_without_data_the_example_is_compared(net: nn.Module, data: list[torch.Tensor]) -> None:
    parts = cut_parts(net, data[0])
    joint = JointLoss(net, data[0], parts, {"neuron": "magnitude"}, [])
    assert (joint({parts[0].key: 0.5}) or 0.0) > 0
    assert len(joint.judged) == 1


def test_distances_are_of_samples_that_no_weight_was_fitted_to(data: list[torch.Tensor]) -> None:
    fitted, judged = split(data)
    assert len(fitted) == 6 and len(judged) == 2
    assert not any(f is j for f, j in product(fitted, judged))
    assert all(len(half) == 3 for half in split(data[:3]))


def test_outputs_that_are_not_finite_have_no_loss(net: nn.Module, data: list[torch.Tensor]) -> None:
    pattern = part("1x4", "d", 60, (0.5,))
    joint = JointLoss(net, data[0], [pattern], {}, data)
    assert (joint({pattern.key: 0.5}) or 0.0) > 0
    [(parameter, weight)] = joint.cached[pattern.key, 0.5]
    far = torch.zeros_like(weight)
    far[:, 0] = 3e38
    joint.cached[pattern.key, 0.5] = [(parameter, far)]
    assert joint({pattern.key: 0.5}) is None


def test_the_climb_finds_an_allocation_that_measured_parts_hide() -> None:
    amounts = tuple(i / 8 for i in range(1, 7))
    parts = [
        Part("neuron", name, 8, amounts, tuple(a**2 for a in amounts), {"1": tuple(a / 4 for a in amounts)})
        for name in "abcd"
    ]
    true = {"a": 1.0, "b": 6.0, "c": 0.3, "d": 2.0}
    calls = []

    def loss(chosen: dict) -> float:
        calls.append(chosen)
        return sum(true[name] * a**2 for (_, name), a in chosen.items()) + 0.1 * chosen.get(("neuron", "a"), 0.0)

    climbed = climb(parts, [parts], 0.4, loss)
    assert climbed is not None
    at = lambda line: (c := solve.front(line))[solve.at_saving(c, 0.4)]  # noqa: E731
    every = [
        {p.key: a for p, a in zip(parts, chosen) if a}
        for chosen in product((0.0, *amounts), repeat=4)
        if sum(chosen) / 4 >= 0.4
    ]
    least = min(map(loss, every))
    assert loss(at(climbed).amounts) < 0.6 * loss(at(parts).amounts)
    assert loss(at(climbed).amounts) < 1.1 * least
    assert at(climbed).loss == pytest.approx(loss(at(climbed).amounts), rel=0.1)


def test_the_climb_changes_layers_of_one_kind_together_first() -> None:
    """Within a few measurements it finds which kind loses less, and which quarter of the model."""
    true = {"up": 4.0, "down": 0.5}
    parts = [Part(BITS, f"layers.{i}.{n}", 8, (0.5,), (1.0,), {"1": (1 / 32,)}) for i, n in product(range(16), true)]
    asked = []

    def loss(chosen: dict) -> float | None:
        asked.append(chosen)
        names = [name.split(".") for _, name in chosen]
        lost = sum(true[n] * (3.0 if int(i) < 4 else 1.0) for _, i, n in names)
        return lost if len(asked) < 30 else None  # the time is over

    line = climb(parts, [parts], 0.5, loss)
    assert line is not None
    choices = solve.front(line)
    chosen = choices[solve.at_saving(choices, 0.5)].amounts
    assert sum(name.endswith("down") for _, name in chosen) >= 12
    lost = [true[name.split(".")[-1]] * (3.0 if int(name.split(".")[1]) < 4 else 1.0) for _, name in chosen]
    assert sum(lost) <= 1.3 * (12 * 0.5 + 4 * 1.5)  # the least that is possible


def test_there_is_no_climb_where_nothing_can_be_measured() -> None:
    parts = [part("neuron", name, 8) for name in "ab"]
    assert climb(parts, [parts], 0.3, lambda amounts: None) is None


def test_an_allocation_is_measured_once() -> None:
    amounts = (0.25, 0.5, 0.75)
    parts = [Part("head", n, 4, amounts, (1.0, 2.0, 4.0), {"1": (0.1, 0.2, 0.3)}) for n in "abc"]
    asked = []
    climb(parts, [parts, parts], 0.4, lambda chosen: asked.append(tuple(sorted(chosen.items()))) or float(len(chosen)))
    assert len(asked) == len(set(asked)) > 2


def test_methods_are_compared_by_what_each_loses_alone() -> None:
    amounts = (0.25, 0.5, 0.75)
    true = {"head": 8.0, "neuron": 2.0, "1x4": 100.0}
    parts = [
        Part(m, f"{m}{i}", 8, amounts, tuple((100 if m == "1x4" else 1) * a for a in amounts), {"1": (0.1, 0.2, 0.3)})
        for m in true
        for i in range(2)
    ]
    asked = []

    def loss(chosen: dict) -> float:
        asked.append({method for method, _ in chosen})
        return sum(true[method] * a for (method, _), a in chosen.items())

    brought = calibrated(parts, 0.4, loss)
    assert asked == [{"head"}, {"neuron"}]  # zeros are predicted to lose far more than both
    for before, after in zip(parts, brought):
        factor = {"head": 8.0, "neuron": 2.0, "1x4": 8.0}[before.method]  # the largest where none was measured
        assert after.losses == pytest.approx([factor * l for l in before.losses])
        assert (after.amounts, after.savings) == (before.amounts, before.savings)
    first = solve.front(brought)[1]
    assert {method for method, _ in first.amounts} == {"neuron"}


def test_losses_stay_where_a_method_cannot_be_measured_alone() -> None:
    parts = [part("neuron", "a", 8), part("head", "b", 8)]
    assert calibrated(parts, 0.3, lambda amounts: None) == parts
    assert calibrated(parts, 0.3, lambda amounts: None if ("head", "b") in amounts else 1.0) == parts
    assert calibrated([], 0.3, lambda amounts: None) == []


def test_a_layer_that_no_data_reach_is_left_out_alone(net: nn.Module, data: list[torch.Tensor]) -> None:
    class WithUnused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = net, nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    parts = [part("1x4", name, 64 * 32, (0.5,)) for name in ("net.b", "unused")]
    joint = JointLoss(WithUnused().eval(), data[0], parts, {}, data)
    alone = JointLoss(net, data[0], [part("1x4", "b", 64 * 32, (0.5,))], {}, data)
    assert joint({("1x4", "net.b"): 0.5}) == pytest.approx(alone({("1x4", "b"): 0.5}))
    with pytest.raises(RarefyError, match="unused"):
        joint({("1x4", "unused"): 0.5})


@pytest.mark.parametrize("method", ["1x4", RANK])
def test_without_data_the_loss_is_that_of_magnitudes_on_the_example(net, data, method) -> None:
    joint = JointLoss(net, data[0], [part(method, "b", 64 * 32, (0.5,))], {}, [])
    smaller = copy.deepcopy(net)
    layer = {l.full_name: l for l in all_layers(smaller)}["b"]
    if method == RANK:
        smaller.b.weight.data = space.factorized_weight(layer, 0.5, {})
    else:
        smaller.b.weight.data = compressed_weight(layer, space.setting_of(method, 0.5), joint.stats, "magnitude")
    with torch.no_grad():
        want = (smaller(data[0]) - net(data[0])).square().sum() / net(data[0]).square().sum()
    assert joint({(method, "b"): 0.5}) == pytest.approx(float(want), rel=1e-4)
