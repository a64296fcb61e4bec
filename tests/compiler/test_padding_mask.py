"""Masks that are indexed by all batches and keys, and joined with what is always true."""

import pytest
import torch
from torch import nn

import rarefy
from helpers.compile_models import far
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


class Masked(nn.Module):
    """Attention of two heads whose mask `find` makes of [batch, tokens]."""

    def __init__(self, find):
        super().__init__()
        self.layer, self.find = nn.Linear(8, 8), find

    def forward(self, x, attention_mask):
        heads = self.layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
        mask = self.find(attention_mask.bool(), *x.shape[:2])
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, mask).transpose(1, 2).flatten(2)


def everywhere(b, t):
    """Indices of all batches, and of all keys, as transformers makes them."""
    return torch.arange(b)[:, None, None, None], torch.arange(t)[None, None, None, :]


def of_transformers(mask, b, t):
    true = mask.new_ones((), dtype=torch.bool)
    queries = torch.arange(t)[None, None, :, None]
    return (true & (queries >= 0) & mask[everywhere(b, t)]).expand(b, -1, t, t)


def rows_first(mask, b, t):
    """Of equal numbers of batches and tokens: another order of dimensions, which is no view."""
    return mask[torch.arange(b)[None, None, None, :], torch.arange(b)[:, None, None, None]].expand(b, 1, b, b)


def from_the_second_on(mask, b, t):
    keys = torch.arange(1, t + 1)[None, None, None, :] % t
    return mask[torch.arange(b)[:, None, None, None], keys].expand(b, 1, t, t)


def causal(mask, b, t):
    """What is joined with the mask is not always true."""
    return ((torch.arange(t)[:, None] >= torch.arange(t))[None, None] & mask[everywhere(b, t)]).expand(b, -1, t, t)


def later_queries(mask, b, t):
    return ((torch.arange(t)[None, None, :, None] >= 1) & mask[everywhere(b, t)]).expand(b, -1, t, t)


def of_other_ranks(mask, b, t):
    """Indices with fewer dimensions than the result are aligned at its end."""
    return mask[torch.arange(b)[:, None], torch.arange(t)[None, None, :]].transpose(0, 1)[:, None].expand(b, 1, t, t)


def of_numbers(mask, b, t):
    """Bits of numbers, of which 1 & 2 has none."""
    bits = (torch.ones(1, 1, 1, 1, dtype=torch.int64) & (mask.long() * 3)[:, None, None, :]).expand(b, -1, t, t)
    return bits == 1


@pytest.mark.parametrize(
    ("find", "simple"),
    [
        (of_transformers, True), (rows_first, False), (from_the_second_on, False), (causal, None),
        (later_queries, None), (of_other_ranks, None), (of_numbers, None),
    ],
)  # fmt: skip
def test_masks_mean_the_same(find, simple):
    torch.manual_seed(0)
    net = Masked(find).eval()
    sizes = [(5, 5)] if find is rows_first else [(2, 5), (1, 9), (4, 3)]
    calls = []
    for b, t in sizes:
        mask = torch.ones(b, t, dtype=torch.int64)
        mask[0, 2:] = 0
        calls.append({"x": torch.randn(b, t, 8), "attention_mask": mask})
    fast = rarefy.compile(net, calls[0], tune=False)
    fast.skip_padding = False
    if simple is not None:
        assert ("index" in repr(fast)) != simple
    if simple:
        assert "__and__" not in repr(fast)
    for batch in calls:
        with torch.no_grad():
            want = net(**batch)
        assert far(want.nan_to_num(), fast(**batch)) < 1e-5
