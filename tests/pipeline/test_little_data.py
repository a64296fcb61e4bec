"""A few ordinary samples must not mislead: defaults that read data, padding, silent channels, fixed statistics."""

import copy

import pytest
import torch
from torch import nn

import rarefy
from conftest import tiny_bert
from rarefy.prune.reconstruction import block_loss, channel_axis
from rarefy.quantization.smoothquant import FLOOR, smoothing_scale
from rarefy.search.confirmation import hold_back

X = torch.randn(64, 8)


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def zeros_of(model):
    return [m.weight == 0 for m in model if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    ("pattern", "score"), [("unstructured", "wanda"), ("2:4", "wanda"), ("4x1", "wanda"), ("row", "magnitude")]
)
def test_pruning_with_data_reads_it(pattern, score):
    sparsity = None if pattern == "2:4" else 0.5
    first, second = net(), None
    first[0].weight.data[:, :4] *= 3
    second = copy.deepcopy(first)
    data = [X * torch.tensor([0.1] * 4 + [2.0] * 4)]
    rarefy.prune_(first, pattern, sparsity=sparsity, data=data)
    rarefy.prune_(second, pattern, score, sparsity, data=data if score == "wanda" else None)
    assert all(torch.equal(a, b) for a, b in zip(zeros_of(first), zeros_of(second)))


def test_a_cut_with_data_reads_it():
    first = net()
    first[0].weight.data[:8] *= 0.1  # small weights, whose outputs vary most
    first[2].weight.data[:, :8] *= 30
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    rarefy.cut_(first, X, data=[X], repair=False)
    rarefy.cut_(second, X, data=[X], repair=False, score="fluctuation")
    rarefy.cut_(third, X)
    assert torch.equal(first[0].weight, second[0].weight) and not torch.equal(first[0].weight, third[0].weight)


def test_groups_that_the_default_does_not_support_are_ranked_by_weights():
    model = nn.Sequential(nn.ConvTranspose1d(4, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 2, 3)).eval()
    other, x = copy.deepcopy(model), torch.randn(2, 4, 9)
    rarefy.cut_(model, x, data=[x], repair=["bias"])
    rarefy.cut_(other, x, score="magnitude")
    assert torch.equal(model[0].weight, other[0].weight)


def test_channels_that_were_silent_keep_a_moderate_scale():
    """Max|X| = 0 once gave factors that blow a channel up by a hundred."""
    inputs, weights = torch.tensor([0.0, 1.0, 2.0, 50.0]), torch.tensor([1.0, 1e-9, 1.0, 1.0])
    scale = smoothing_scale(inputs, weights, 0.5)
    want = (torch.tensor([FLOOR, 1.0, 2.0, 50.0]) ** 0.5) / (torch.tensor([1.0, FLOOR, 1.0, 1.0]) ** 0.5)
    torch.testing.assert_close(scale, want)


def test_silent_channels_do_not_break_other_data():
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    with torch.no_grad():
        model[0].weight[:8] = 0
        model[0].weight[:8, 0], model[0].bias[:8] = 4, -16  # they fire where the first input is above 4
    x, y = torch.randn(512, 64).clamp(-3.5, 3.5), torch.randn(512, 64)
    y[:, 0] = 5
    dense, error = copy.deepcopy(model), dict[float | None, float]()
    for smooth in (None, 0.5):
        other = copy.deepcopy(model)
        options = {} if smooth is None else {"smooth": smooth, "data": [x]}
        rarefy.quantize_(other, "int8", layers=["0", "2"], activations="int8", **options)
        with torch.no_grad():
            error[smooth] = float((other(y) - dense(y)).norm() / dense(y).norm())
    assert error[0.5] < 3 * error[None] + 0.01  # it was 0.99 where the maximum counted as a tiny value


@pytest.mark.parametrize("options", [{"activations": "int8", "smooth": 0.5}, {"activations": "int8-static"}])
def test_padding_is_not_data(options):
    """Ranges and maxima of padded texts are those of the texts alone."""
    torch.manual_seed(0)
    model = tiny_bert().eval()
    ids = torch.randint(1, 30, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    padded = [{"input_ids": ids, "attention_mask": mask}]
    alone = [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate((6, 3))]
    first, second = model, copy.deepcopy(model)
    rarefy.quantize_(first, "int8", layers="*.query", data=padded, observer=None, **options)
    rarefy.quantize_(second, "int8", layers="*.query", data=alone, observer=None, **options)
    if "smooth" in options:
        for a, b in zip(first.parameters(), second.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        return
    grids = [[m.rarefy_inputs.scale for m in n.modules() if hasattr(m, "rarefy_inputs")] for n in (first, second)]
    assert grids[0] == pytest.approx(grids[1], rel=0.02)


def test_dead_channels_of_images_do_not_dominate_a_block():
    """Errors are relative to each pixel, over its channels: not to each row of pixels of a channel."""
    block = nn.Sequential(nn.Conv2d(8, 8, 1))
    assert channel_axis(block) == 1 and channel_axis(nn.Linear(2, 2)) == -1
    target = torch.randn(2, 8, 5, 5).relu() + 0.1
    target[:, :3] = 0
    noise = torch.randn_like(target) * 0.1

    def run(x):
        return x

    loss = float(block_loss(run, ((target + noise,), {}, target), False, 1))
    energy = target.square().sum(1)
    want = float((noise.square().sum(1) / (energy + 1e-3 * energy.mean())).mean())
    assert loss == pytest.approx(want, rel=1e-4)
    tokens = torch.randn(2, 5, 8)  # of a block with convolutions that returns tokens
    loss = float(block_loss(run, ((tokens * 1.1,), {}, tokens), False, 1))
    assert loss == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("learns", [True, False])
def test_training_may_leave_statistics_of_batch_norms_alone(learns):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    before = model[1].running_mean.clone()
    rarefy.fit_(
        model, [(X, torch.zeros(64).long())], optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        steps=rarefy.train.fit.Steps(batch_norm=learns),
    )  # fmt: skip
    assert torch.equal(model[1].running_mean, before) != learns


def test_recovery_leaves_statistics_alone():
    from rarefy.search.recovery import train_stage

    assert train_stage(net(), X, "agreement", 1)["train"]["batch_norm"] is False


# Searches


def test_few_batches_are_divided_for_the_last_choice():
    used, held_back = hold_back([(torch.zeros(400, 8), torch.zeros(400))])
    assert [len(b[0]) for b in used] == [133, 133] and [len(b[0]) for b in held_back] == [134]
    texts = {"input_ids": torch.zeros(200, 4)}
    used, held_back = hold_back([(texts, texts), (texts, texts)])
    assert sum(len(q["input_ids"]) for q, _ in used) == 266 and sum(len(q["input_ids"]) for q, _ in held_back) == 134
    few = torch.zeros(200, 4)
    used, held_back = hold_back([few])
    assert used[0] is few and len(used) == 1 and held_back == []  # it stays whole


def test_few_samples_for_a_small_loss_are_said():
    model = net()
    few = rarefy.optimize(model, X[:2], X.split(8), "agreement", max_loss="1%", minutes=0.05)
    assert any("16 samples for evaluation are few for a loss of 1 %: even if none" in note for note in few.notes)
    free = rarefy.optimize(model, X[:2], X.split(8), "agreement", max_loss="50%", minutes=0.05)
    continuous = rarefy.optimize(model, X[:2], X.split(8), "similarity", max_loss="1%", minutes=0.05)
    assert not any("samples for evaluation" in note for found in (free, continuous) for note in found.notes)


def test_without_data_only_precisions_are_tried():
    found = rarefy.optimize(net(), X[:2], max_loss=0.9, minutes=0.5)
    assert any("there is no data: only precisions were tried" in note for note in found.notes)
    assert [point.name for point in found.points][:1] == ["dense, fp32"]
    assert all("cast" in stage for point in found.points for stage in point.recipe["stages"])
    assert found.metric["name"] == "similarity"


def test_recipes_rank_weights_by_inputs_where_there_are_data():
    """As `prune_` does: the same zeros."""
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), [torch.randn(64, 32) * torch.rand(32)]
    stages = {"stages": [{"prune": {"sparsity": 0.5}}]}
    by_recipe, by_call, without = (copy.deepcopy(net) for _ in range(3))
    rarefy.compress_(by_recipe, stages, data)
    rarefy.compress_(without, stages)
    rarefy.fold_(rarefy.prune_(by_call, sparsity=0.5, data=data) and by_call)
    assert torch.equal(by_recipe[0].weight, by_call[0].weight)
    assert not torch.equal(by_recipe[0].weight, without[0].weight)
    rows = {"stages": [{"prune": {"sparsity": 0.5, "pattern": "row", "layers": "0"}}]}
    rarefy.compress_(net, rows, data)  # whole rows are ranked as without data
    assert int((net[0].weight == 0).all(1).sum()) == 16
