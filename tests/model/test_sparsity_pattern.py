"""Masks against slow, obviously right enumerations, and exact counts for every pattern, scope and score."""

import itertools

import pytest
import torch
from torch import nn

import rarefy
from conftest import image_batches
from rarefy.common.errors import PatternError
from rarefy.model import sparsity_pattern as patterns
from rarefy.model.masks import masks
from rarefy.model.sparsity_pattern import make_mask, make_masks, masks_at_sparsity, parse_pattern
from rarefy.prune.scores import SCORES

UNITS = ["unstructured", "4x1", "1x4", "3x2", "row", "channel", "column"]


def sparsity(mask: torch.Tensor) -> float:
    return 1 - mask.double().mean().item()


@pytest.mark.parametrize("nm", ["1:2", "2:4", "1:4", "4:8", "3:5"])
@pytest.mark.parametrize("width", [20, 40, 41, 43])
def test_nm_is_the_best_of_all_choices_in_every_group(nm, width):
    n, m = map(int, nm.split(":"))
    score = torch.rand(3, width)
    mask = make_mask(score, nm)
    for row, kept in zip(score, mask):
        for start in range(0, width, m):
            group, chosen = row[start : start + m], kept[start : start + m]
            keep = min(n, len(group))
            best = max(sum(c) for c in itertools.combinations(group.tolist(), keep))
            assert int(chosen.sum()) == keep and group[chosen].sum().item() == pytest.approx(best)


@pytest.mark.parametrize("s", [0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_unstructured_counts_are_exact_and_the_least_go(s, scope):
    scores = [torch.rand(2, 3, 5, 7), torch.rand(1, 1, 11, 13)]
    kept = make_masks(scores, "unstructured", s, scope=scope)
    if scope == "global":
        every, mask = torch.cat([x.flatten() for x in scores]), torch.cat([k.flatten() for k in kept])
        assert int((~mask).sum()) == round(s * every.numel())
        assert not mask.any() or mask.all() or every[~mask].max() <= every[mask].min()
        return
    for score, mask in zip(scores, kept):
        assert int((~mask).sum()) == round(s * score.numel())
        if scope == "layer" and 0 < s < 1:
            assert score[~mask].max() <= score[mask].min()
        if scope == "row":
            rows = (~mask).permute(0, 2, 1, 3).flatten(2).sum(2)
            assert int(rows.max() - rows.min()) <= 1


def test_ties_do_not_overshoot():
    ones = torch.ones(1, 1, 10, 10)
    for scope in ("row", "layer", "global"):
        assert int((~make_mask(ones, "unstructured", 0.37, scope=scope)).sum()) == 37
    assert torch.equal(make_mask(torch.ones(1, 4), "unstructured", 0.5), torch.tensor([[False, False, True, True]]))


@pytest.mark.parametrize("pattern", ["4x1", "1x4", "3x2"])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "l2"])
def test_blocks_against_enumeration(pattern, reduce):
    r, c = map(int, pattern.split("x"))
    score = torch.rand(8, 12)
    mask = make_mask(score, pattern, 0.5, reduce=reduce)
    of = {"mean": torch.mean, "sum": torch.sum, "max": torch.max, "l2": lambda x: x.norm()}[reduce]
    units = {}
    for i, j in itertools.product(range(0, 8, r), range(0, 12, c)):
        block, kept = score[i : i + r, j : j + c], mask[i : i + r, j : j + c]
        assert kept.all() or not kept.any()
        units[i, j] = float(of(block)), bool(kept.all())
    assert max(v for v, k in units.values() if not k) <= min(v for v, k in units.values() if k) or 8 % r


@pytest.mark.parametrize("pattern", UNITS)
@pytest.mark.parametrize("shape", [(1, 1, 8, 12), (2, 9, 5, 7), (1, 1, 1, 1), (1, 1, 7, 3)])
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_whole_units_come_nearest_to_the_asked_count(pattern, shape, scope):
    plan = parse_pattern(pattern)
    if scope == "row" and plan.kind in ("row", "column"):
        with pytest.raises(PatternError, match="scope 'row' is impossible"):
            make_mask(torch.rand(shape), pattern, 0.5, scope=scope)
        return
    unit = {"row": shape[1] * shape[3], "column": shape[1] * shape[2], "block": plan.a * plan.b}.get(plan.kind, 1)
    for s in (0.0, 0.25, 0.5, 0.9, 1.0):
        mask = make_mask(torch.rand(shape), pattern, s, scope=scope)
        assert abs(int((~mask).sum()) - s * mask.numel()) <= unit / 2 + 0.5, s
    assert not make_mask(torch.rand(shape), pattern, 1.0, scope=scope).any()
    assert make_mask(torch.rand(shape), pattern, 0.0, scope=scope).all()


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "row", "column", "2:4"])
@pytest.mark.parametrize("score", SCORES)
def test_asked_is_achieved_for_every_pattern_scope_and_score(pattern, score):
    """Sizes that whole units divide: the difference is below 1e-4 of the entries."""
    scopes = {"2:4": [None], "row": ["layer", "global"], "column": ["layer", "global"]}
    for scope in scopes.get(pattern, ["row", "layer", "global"]):
        model = nn.Sequential(nn.Conv2d(40, 40, 1), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(40, 40))
        data = [(torch.randn(2, 40, 3, 3), torch.randint(0, 40, (2,))) for _ in range(2)]
        asked = 0.5
        report = rarefy.prune_(
            model, pattern, score, None if pattern == "2:4" else asked, scope=scope, data=data, layers="*"
        )
        assert abs(report.summary["sparsity"] - asked) < 1e-4, scope
        if scope != "global":
            assert all(abs(sparsity(m) - asked) < 1e-4 for m in masks(model).values())
        assert report.summary["sparsity"] == pytest.approx(
            sum(int((~m).sum()) for m in masks(model).values()) / sum(m.numel() for m in masks(model).values())
        )


def test_a_schedule_towards_nm_ends_in_it():
    score, plan = torch.rand(4, 16), parse_pattern("2:4")
    half = masks_at_sparsity([score], plan, 0.25, "layer")[0]
    full = masks_at_sparsity([score], plan, 0.5, "layer")[0]
    assert sparsity(half) == 0.25 and bool((half | ~full).all())  # what is gone early is gone in the end
    assert bool((full.reshape(-1, 4).sum(1) == 2).all())


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "row", "column", "2:4"])
def test_infinite_scores_go_first_and_last(pattern):
    score = torch.rand(8, 8)
    score[:4, ::2] = float("-inf")
    if pattern == "2:4":
        assert not make_mask(score, pattern)[:4, ::2].any()
    elif pattern == "unstructured":
        assert not make_mask(score, pattern, 0.25)[:4, ::2].any()
    else:
        assert make_mask(score, pattern, 0.5)[4:].any()


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        ("3:2", {}, "keeps 3 of every 2: N:M needs 1 <= N < M <= 64, such as 2:4"),
        ("4:4", {}, "keeps 4 of every 4"),
        ("0:4", {}, "keeps 0 of every 4"),
        ("1:99", {}, "such as 4:8"),
        ("1x1", {}, "a block RxC has 2 to 4096 entries"),
        ("unstructred", {}, "unknown pattern 'unstructred'.*did you mean 'unstructured'"),
        ("2:4", {"sparsity": 0.3}, "2:4 implies sparsity 0.5, got 0.3"),
        ("2:4", {"scope": "global"}, "scope 'global' has no effect"),
        ("unstructured", {}, "needs a sparsity between 0 and 1"),
        ("unstructured", {"sparsity": 1.5}, "expected (sparsity|a number) between 0 and 1, got 1.5"),
        ("unstructured", {"sparsity": -0.1}, "got -0.1"),
        ("unstructured", {"sparsity": "half"}, "got 'half'"),
        ("unstructured", {"sparsity": float("nan")}, "got nan"),
        ("unstructured", {"sparsity": 0.5, "scope": "model"}, "unknown scope 'model'"),
        ("4x1", {"sparsity": 0.5, "reduce": "avg"}, "unknown (reduce|reduction) 'avg'"),
        ("unstructured", {"sparsity": 0.5, "reduce": "max"}, "reduce='max' has no effect"),
    ],
)
def test_pattern_errors(pattern, settings, message):
    with pytest.raises(PatternError, match=message):
        make_mask(
            torch.rand(4, 8),
            pattern,
            settings.get("sparsity"),
            **{k: v for k, v in settings.items() if k != "sparsity"},
        )
    with pytest.raises(PatternError, match=message):
        rarefy.prune_(nn.Linear(8, 4), pattern, **settings)


def test_convolutions_group_along_input_channels_at_each_kernel_position():
    conv = nn.Conv2d(8, 4, 3)
    rarefy.prune_(conv, "2:4")
    kept = (conv.weight != 0).permute(0, 2, 3, 1).reshape(-1, 4).sum(1)
    assert bool((kept == 2).all())
    images = image_batches()
    assert images[0][0].shape[1] == 3


@pytest.mark.parametrize("pattern", ["row", "column", "4x1"])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "l2"])
def test_a_second_pass_adds_to_the_first(pattern, reduce):
    layer = nn.Linear(32, 32)
    rarefy.prune_(layer, pattern, sparsity=0.25, reduce=reduce)
    first = masks(layer)[""]
    rarefy.prune_(layer, pattern, sparsity=0.5, reduce=reduce)
    assert not bool((masks(layer)[""] & ~first).any()) and sparsity(masks(layer)[""]) == 0.5


@pytest.mark.parametrize("pattern", ["unstructured", "row", "column", "4x1"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_empty_layers(pattern, shape, scope):
    if scope == "row" and pattern in ("row", "column"):
        return
    assert make_mask(torch.rand(shape), pattern, 0.5, scope=scope).shape == shape


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2x3", "row", "column"])
def test_entries_score_as_the_mean_of_their_unit(pattern):
    s = torch.randn(2, 3, 6, 7)
    got = patterns.mean_per_unit(s, patterns.parse_pattern(pattern))
    r, c = {"unstructured": (1, 1), "4x1": (4, 1), "2x3": (2, 3), "row": (1, 7), "column": (6, 1)}[pattern]
    whole = pattern in ("row", "column")
    for g, k, o, i in itertools.product(range(2), range(3), range(6), range(7)):
        a, b = o // r * r, i // c * c
        unit = s[g, :, a : a + r, b : b + c] if whole else s[g, k, a : a + r, b : b + c]
        assert got[g, k, o, i] == pytest.approx(float(unit.mean()), abs=1e-6)
