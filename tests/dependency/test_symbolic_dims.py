"""Symbolic dimensions against real tensors."""

import math
import random

import pytest
import torch

from rarefy.dependency.symbolic_dims import Algebra, Axis, Prod, Sum, kept_mask, leaves, size


def grid(dims, masks):
    """Return which entries of a tensor with these dimensions stay, in its shape."""
    out = torch.ones((), dtype=torch.bool)
    for e in dims:
        out = out[..., None] & kept_mask(e, masks.get)
    return out


@pytest.mark.parametrize("seed", range(40))
def test_masks_follow_views_and_splits(seed):
    """View, split, join and permute a dimension at random: the mask of kept entries, moved by torch, must be the one that
    the algebra computes, for any masks on the axes found at the end.
    """
    rng, algebra = random.Random(seed), Algebra()
    n = rng.choice([24, 36, 48, 60])
    dims, steps = [Axis(n)], []
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(dims))
        s = size(dims[at])
        if rng.random() < 0.5 and s > 3:  # a view
            k = rng.choice([d for d in range(2, s) if s % d == 0] or [1])
            outer, inner = algebra.factor(dims[at], k)
            dims[at : at + 1] = [outer, inner]
            steps.append(lambda t, at=at, k=k: t.unflatten(at, (k, -1)))
        elif len(dims) > 1:
            i, j = rng.sample(range(len(dims)), 2)
            dims[i], dims[j] = dims[j], dims[i]
            steps.append(lambda t, i=i, j=j: t.transpose(i, j))
        elif s > 2:  # cut in two and joined the other way round
            k = rng.randint(1, s - 1)
            a, b = algebra.take(dims[at], k)
            dims[at] = Sum((b, a))
            steps.append(lambda t, at=at, k=k: torch.cat([t.narrow(at, k, t.shape[at] - k), t.narrow(at, 0, k)], at))
    start = Axis(n)
    flat = Prod(tuple(dims))
    algebra.unify(start, flat)  # the same numbers again in one row
    axes = list(dict.fromkeys(leaves(flat)))
    for _ in range(5):
        masks = {a: torch.rand(a.size) < 0.6 for a in axes if not a.lock}
        assert torch.equal(grid([start], masks), grid([flat], masks)) and size(flat) == n
        assert int(grid(dims, masks).sum()) == math.prod(int(kept_mask(e, masks.get).sum()) for e in dims)


@pytest.mark.parametrize("seed", range(20))
def test_refining_a_dimension_keeps_older_ones(seed):
    rng, algebra = random.Random(seed), Algebra()
    original = Axis(24)
    parts = algebra.cut(original, [8, 16]) if rng.random() < 0.5 else list(algebra.factor(original, 4))
    outer, inner = algebra.factor(parts[-1], 2)
    masks = {a: torch.rand(a.size) < 0.5 for a in leaves(original) if not a.lock}
    one = kept_mask(original, masks.get)
    if len(parts) == 2 and size(parts[0]) + size(parts[1]) == 24:
        want = torch.cat([kept_mask(p, masks.get) for p in parts])
    else:
        want = (kept_mask(parts[0], masks.get)[:, None] & kept_mask(parts[1], masks.get)).flatten()
    assert torch.equal(one, want)
    last = (kept_mask(outer, masks.get)[:, None] & kept_mask(inner, masks.get)).flatten()
    assert torch.equal(last, kept_mask(parts[-1], masks.get))


def test_dimensions_that_cannot_be_expressed_are_locked():
    algebra = Algebra()
    algebra.where = "view in net"
    a = Axis(6)
    algebra.factor(a, 2)
    b = Axis(6)
    algebra.take(b, 1)
    algebra.unify(a, b)  # 2 x 3 and 1 + 5
    assert all(x.lock == "shapes do not line up at view in net" for x in (*leaves(a), *leaves(b)) if x.size > 1)
    c, d = Axis(4), Axis(4, "the model returns it")
    algebra.unify(c, d)
    assert c.lock == "the model returns it"
