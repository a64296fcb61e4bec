"""Blocks that share weights: sharing, training, saving, and the checks of files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rarefy
from conftest import tiny_llama
from helpers.folders import read_index, write_index
from rarefy.common.errors import ContainerError, ModelError, PatternError
from rarefy.lowrank.layer_tying import noted
from rarefy.recipe import parser as recipes


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.fc(x)).relu()


def blocks(many=5, width=8):
    return nn.Sequential(*(Block(width) for _ in range(many)))


@pytest.mark.parametrize("average", [True, False])
def test_neighbouring_blocks_share_weights(average):
    net = blocks()
    before = copy.deepcopy(net)
    report = rarefy.tie_layers_(net, 2, average=average)
    assert report.rows[0]["groups"] == "0+1 2+3" and noted(net) == {"": [[0, 1], [2, 3]]}
    for a, b in ((0, 1), (2, 3)):
        assert net[a].fc.weight is net[b].fc.weight and net[a].norm.bias is net[b].norm.bias
        assert net[a].norm.running_mean is not net[b].norm.running_mean
        mean = (before[a].fc.weight + before[b].fc.weight) / 2
        torch.testing.assert_close(net[a].fc.weight, mean if average else before[a].fc.weight)
    assert net[4].fc.weight is not net[3].fc.weight
    three = blocks()
    rarefy.tie_layers_(three, 3)
    assert noted(three) == {"": [[0, 1, 2], [3, 4]]}


def test_a_tied_language_model_generates(tmp_path):
    model = tiny_llama()
    before = sum(p.numel() for p in model.parameters())
    rarefy.tie_layers_(model, 2, blocks="model.layers")
    after = sum(p.numel() for p in model.parameters())
    assert after < 0.65 * before
    ids = torch.randint(0, 64, (1, 5))
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    rarefy.save(model, tmp_path / "out")
    again = rarefy.load(tmp_path / "out")
    assert noted(again) == noted(model) and sum(p.numel() for p in again.parameters()) == after
    assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), text)
    stored = rarefy.inspect(tmp_path / "out").summary["bytes"]
    assert stored == sum(p.numel() * p.element_size() for p in model.parameters())


def test_weights_stay_shared_after_pruning_training_and_saving(tmp_path):
    net = blocks(4, 16).eval()
    rarefy.tie_layers_(net)
    rarefy.prune_(net, "2:4")
    rarefy.quantize_(net, "int8")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    assert torch.equal(net[0].fc.weight, net[1].fc.weight) and len(rarefy.masks(net)) == 2
    rarefy.save(net, tmp_path / "out")
    fresh = blocks(4, 16).eval()
    again = rarefy.load(tmp_path / "out", fresh)
    assert again[0].fc.weight is again[1].fc.weight and torch.equal(again[2].fc.weight, net[3].fc.weight)
    x = torch.randn(3, 16)
    torch.testing.assert_close(again(x), net(x))
    assert rarefy.load(tmp_path / "out", again) is again  # into a model that shares them already


def test_tying_in_a_recipe():
    net = blocks(4)
    data = [(torch.randn(16, 8), torch.randint(0, 8, (16,)))]
    receipt = rarefy.compress_(net, recipes.from_yaml("stages:\n- tie: {every: 2}\n- train: {epochs: 1}"), data)
    assert net[0].fc.weight is net[1].fc.weight and "outputs have changed: train on" in receipt.notes
    assert receipt.disk["after"] < 0.65 * receipt.disk["before"]


@pytest.mark.parametrize(
    ("net", "options", "error", "says"),
    [
        (blocks(), {"every": 1}, PatternError, "every: expected a whole number of at least 2, got 1"),
        (blocks(), {"every": True}, PatternError, "every: expected a whole number"),
        (blocks(), {"average": 1}, PatternError, "average: expected true or false, got 1"),
        (tiny_llama(), {"blocks": "model.layer"}, ModelError, r"unknown list of blocks 'model.layer'.*did you mean 'model.layers'"),
        (nn.Linear(2, 2), {}, ModelError, "Linear has no list with 2 or more equal blocks that could share weights"),
        (nn.Linear(2, 2), {"blocks": "x"}, ModelError, "Linear has no blocks"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_tied(net, options, error, says):
    with pytest.raises(error, match=says):
        rarefy.tie_layers_(net, **options)
    assert noted(net) == {}


@pytest.mark.parametrize("do", [lambda m: rarefy.prune_(m, "2:4"), lambda m: rarefy.factorize_(m, keep=0.5)])
def test_pruned_models_are_refused(do):
    net = blocks()
    do(net)
    with pytest.raises(ModelError, match="is pruned, quantized or factorized already: tie first"):
        rarefy.tie_layers_(net)


@pytest.mark.parametrize(
    "told",
    [[], {"": 3}, {"": [[0]]}, {"": [[0, 9]]}, {"": [[1, 0]]}, {"": [[0, 1], [1, 2]]}, {"x": [[0, 1]]}, {"": [[0, "1"]]}, {"": [[0, True]]}],
)  # fmt: skip
def test_damaged_records_are_refused(told, tmp_path):
    net = blocks()
    rarefy.tie_layers_(net)
    rarefy.save(net, tmp_path / "out")
    index = read_index(tmp_path / "out")
    index["meta"]["tied"] = told
    write_index(tmp_path / "out", index)
    with pytest.raises(ContainerError, match="share"):
        rarefy.load(tmp_path / "out", blocks())


def test_ties_within_blocks_and_repeated_calls(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    net = nn.Module()
    net.layers = nn.ModuleList(Block() for _ in range(4))
    rarefy.tie_layers_(net, 2)
    first, second = net.layers[0], net.layers[1]
    assert first.a.weight is first.b.weight is second.a.weight is second.b.weight
    with pytest.raises(ModelError, match="blocks of layers already share weights"):
        rarefy.tie_layers_(net, 4)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    rarefy.fold_(rarefy.quantize_(encoder, "int8") and encoder)
    with pytest.raises(ModelError, match="is pruned, quantized or factorized already: tie first"):
        rarefy.tie_layers_(encoder)
