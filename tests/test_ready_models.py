"""The trained models of zoo/: they load at once, run, and tell related texts from others."""

from pathlib import Path

import pytest

import rarefy
from rarefy.data.text_pairs import token_batches
from rarefy.evaluation.retrieval import embed, ranks
from rarefy.model import hf

FOLDERS = sorted((Path(__file__).parents[1] / "zoo").glob("*/"))
PAIRS = [
    ("A cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("The central bank raised interest rates.", "Borrowing became more expensive after the bank's decision."),
    ("How do I reset my password?", "I forgot my login and want to choose a new one."),
    ("The volcano erupted last night.", "Lava and ash came out of the mountain."),
]


def test_there_is_one():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_ready_model_finds_related_texts(folder):
    tokenizer, model = hf.load_tokenizer(folder), rarefy.load(folder)
    queries, texts = (embed(model, token_batches([p[side] for p in PAIRS], tokenizer)) for side in (0, 1))
    assert ranks(queries, texts).tolist() == [1] * len(PAIRS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_ready_model_is_small_and_described(folder):
    assert sum(f.stat().st_size for f in folder.iterdir()) < 20e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert rarefy.inspect(folder)
    for part in ("Licence", "Data", "How it was made", "Limits", "R@1", "Measured at "):
        assert part in card
