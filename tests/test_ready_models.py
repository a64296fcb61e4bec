"""The trained models of zoo/: they load at once, run, and tell related texts from others."""

from pathlib import Path

import pytest
import torch

import rarefy
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
    texts = [text for pair in PAIRS for text in pair]
    words = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    mask = words["attention_mask"]
    hidden = model(input_ids=words["input_ids"], attention_mask=mask)[0]
    vectors = torch.nn.functional.normalize((hidden * mask[..., None]).sum(1), dim=-1)
    similar = vectors[::2] @ vectors[1::2].T
    assert similar.argmax(1).tolist() == list(range(len(PAIRS)))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_ready_model_is_small_and_described(folder):
    assert sum(f.stat().st_size for f in folder.iterdir()) < 20e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert rarefy.inspect(folder)
    for part in ("Licence", "Data", "How it was made", "Limits", "R@1", "ms"):
        assert part in card
