"""The best models are measured once more, on evaluation data that the search has not used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rarefy.search.confirmation import hold_back
from rarefy.search.frontier import frontier_from_dict
from rarefy.search.html_report import frontier_page
from rarefy.search.optimize import optimize

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4)).eval()


@torch.no_grad()
def margins(x: torch.Tensor) -> torch.Tensor:
    top = NET(x).topk(2, -1).values
    return top[:, 0] - top[:, 1]


X = torch.randn(20_000, 32)
ORDER = margins(X).argsort()
CLOSE, CLEAR = X[ORDER[:150]], X[ORDER[-300:]]  # the first change class with the least change of the weights
EASY = [*CLEAR.split(50)]


def searched(held_back: torch.Tensor, **options):
    options = {"max_loss": "3%", "minutes": 3, "target": "size", **options}  # sizes do not depend on other processes
    return optimize(
        NET, X[:4], [*X[1000:1100].split(50)], "agreement", eval_data=[*EASY, *held_back.split(50)], **options
    )


def test_the_best_model_is_measured_on_data_held_back_and_says_what_it_loses_there():
    frontier = searched(CLEAR[:150])
    point = frontier.best_point
    assert frontier.met and point.checked_loss is not None and point.checked_loss <= 0.03
    with torch.no_grad():
        same = (frontier.best.model(CLEAR[:150]).argmax(-1) == NET(CLEAR[:150]).argmax(-1)).float().mean()
    assert point.checked_loss == pytest.approx(1 - float(same), abs=1e-6)
    assert "On data that the search has not used it loses" in frontier.verdict
    again = frontier_from_dict(frontier.to_dict())
    assert again.best_point.checked_loss == point.checked_loss
    assert "loss on data held back" in frontier_page(frontier)


def test_models_that_lose_more_on_data_held_back_are_not_the_result():
    hard = searched(CLOSE, max_loss="0.5%")
    losses = [p.checked_loss for p in hard.points if p.checked_loss is not None]
    assert losses and max(losses) > 0.005  # what kept the limit before does not keep it here
    kept = hard.best_point.checked_loss if hard.best_point.checked_loss is not None else 0.0
    assert hard.met == (kept <= 0.005)
    if not hard.met:
        assert kept == min(losses)
        assert hard.verdict.startswith("Not all limits are kept") and "It is the nearest" not in hard.verdict


def test_few_samples_and_functions_are_not_divided():
    texts = {"input_ids": torch.ones(50, 7, dtype=torch.long), "attention_mask": torch.ones(50, 7)}
    for batch in (X[:50], texts, (texts, texts), (texts, torch.ones(50)), (X[:50], torch.ones(50))):
        assert [len(part) for part in hold_back([batch] * 6)] == [4, 2]
        assert [len(part) for part in hold_back([batch] * 5)] == [5, 0]
    used, held_back = hold_back([X[:50]] * 5)
    assert len(used) == 5 and not held_back
    frontier = optimize(NET, X[:4], None, lambda m: float(m(CLEAR).sum()), max_loss="10%", minutes=0.05)
    assert all(p.checked_loss is None for p in frontier.points)


def test_a_search_that_goes_on_takes_up_the_checks(tmp_path):
    first = searched(CLEAR[:150], resume_dir=tmp_path)
    second = searched(CLEAR[:150], resume_dir=tmp_path)
    assert second.best_point.checked_loss == first.best_point.checked_loss
