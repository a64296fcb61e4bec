"""Records of cuts in files."""

import copy

import pytest
import torch
from torch import nn

import rarefy
from helpers.folders import read_index, write_index
from rarefy.common.errors import ContainerError
from rarefy.structured.structure_record import restore


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.embed, self.fc = (
            nn.Conv2d(3, 6, 3, stride=2),
            nn.Embedding(9, 6, padding_idx=7),
            nn.Linear(6, 2),
        )
        self.register_buffer("scale", torch.ones(6, 6), persistent=False)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)) @ self.scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": {"scale": {"0": [0] * 3000}}}, r"the kept indices of scale do not fit its shape \[6, 6\]"),
        ({"kept": {"scale": {"0": [1, 0]}}}, "the kept indices of scale"),
        ({"kept": {"scale": {"0": [1, 1]}}}, "the kept indices of scale"),
        ({"numbers": {"conv.stride": [1, 1]}}, "has no size conv.stride"),
        ({"numbers": {"embed.padding_idx": 1}}, "has no size embed.padding_idx"),
        ({"base": []}, "the record of its cuts is damaged"),
    ],
)
def test_records_that_no_cut_can_make_are_refused(change, message):
    parts = {"numbers": {}, "shapes": {}, "kept": {}, "blocks": {}, "attention": [], "base": {}, "config": False}
    with pytest.raises(ContainerError, match=message):
        restore(Buffers(), {**parts, **change}, "out")


def test_a_damaged_record_of_a_fitting_model_is_refused(tmp_path):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    rarefy.cut_(net, torch.randn(2, 4))
    rarefy.save(net, tmp_path / "out")
    index = read_index(tmp_path / "out")
    for bad in ({"shapes": "evil", "config": True}, [], {**index["meta"]["cut"], "blocks": 3}):
        index["meta"]["cut"] = bad
        write_index(tmp_path / "out", index)
        with pytest.raises(ContainerError, match="the record of its cuts is damaged"):
            rarefy.load(tmp_path / "out", model=copy.deepcopy(net))
