"""Branches for a size of 1: which of them the graph of larger sizes may answer for."""

import pytest
import torch
from torch import nn

import rarefy

LINEAR = nn.Linear(4, 4).eval()
AT_1 = {  # what a model computes otherwise where a size is 1: the same for ordinary values
    "large sum": lambda x: LINEAR(x) * (x.sum() < 100),
    "small sum": lambda x: LINEAR(x) * (x.sum() > -100),
    "large values": lambda x: torch.where(x.abs() > 8, 0.0, LINEAR(x)),
    "small values": lambda x: torch.where(x.abs() < 0.02, 5.0, LINEAR(x)),
    "clamp": lambda x: LINEAR(x.clamp(-6, 6)),
    "relu": lambda x: LINEAR(x) + torch.relu(x - 4),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", AT_1)
def test_a_branch_for_1_is_compared_at_other_values_than_the_examples(name, dim):
    class One(nn.Module):
        def forward(self, x):
            return AT_1[name](x) if x.shape[dim] == 1 else LINEAR(x)

    model = One().eval()
    compiled = rarefy.compile(model, torch.randn(3, 6, 4).clamp(-3, 3), tune=False)
    sizes = [3, 6, 4]
    sizes[dim] = 1
    with torch.no_grad():
        for x in (torch.randn(sizes) * 0.01, torch.randn(sizes) * 100, torch.rand(sizes) + 20, -torch.rand(sizes) - 20):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_branch_for_1_is_compared_at_other_ids_and_masks():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(12, 8)

        def forward(self, ids, mask):
            y = self.embedding(ids)
            y = y * (ids != 7)[..., None] if ids.shape[0] == 1 else y
            return y + (mask.sum() if ids.shape[1] == 1 else mask.sum().clamp(min=1))

    model = One().eval()
    ids = torch.tensor([[9, 9, 9, 9, 9], [0, 11, 7, 3, 4]])
    compiled = rarefy.compile(model, (ids, torch.ones(2, 5, dtype=torch.long)), tune=False)
    with torch.no_grad():
        for ids, mask in ((torch.full((1, 5), 7), torch.ones(1, 5).long()), (torch.ones(2, 1).long(),) * 2):
            torch.testing.assert_close(compiled(ids, mask), model(ids, mask))


def test_a_branch_for_1_that_computes_the_same_is_not_compiled_again():
    class One(nn.Module):
        def forward(self, x):
            return LINEAR(x[0])[None] if x.shape[0] == 1 else LINEAR(x)

    compiled = rarefy.compile(One().eval(), torch.randn(3, 6, 4), tune=False)
    with torch.no_grad():
        x = torch.randn(1, 6, 4)
        torch.testing.assert_close(compiled(x), LINEAR(x), rtol=1e-4, atol=1e-4)
    assert not compiled.branches.compiled
