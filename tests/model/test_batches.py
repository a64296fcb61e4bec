"""Parts of batches: as many tokens as asked for, in whole samples."""

import pytest
import torch

from rarefy.model.batches import first_samples, samples_in, some, tokens_in


@pytest.mark.parametrize(
    ("tokens", "each", "samples"),
    [(10, None, [1]), (11, None, [2]), (40, None, [4]), (41, None, [4, 1]), (1000, None, [4, 4, 4]), (30, 10, [1, 1, 1]),
     (30, 25, [2, 1]), (1000, 5, [1, 1, 1])],
)  # fmt: skip
def test_some(tokens, each, samples):
    text = [{"input_ids": torch.zeros(4, 10, dtype=torch.long), "attention_mask": torch.ones(4, 10)} for _ in range(3)]
    found = some(text, tokens, each)
    assert [samples_in(b) for b in found] == samples
    assert sum(map(tokens_in, found)) >= min(tokens, 120) or each is not None


def test_images_count_as_samples_and_what_cannot_be_cut_stays_whole():
    images = [(torch.zeros(8, 3, 2, 2), torch.zeros(8, dtype=torch.long)) for _ in range(2)]
    assert [len(b[0]) for b in some(images, 10)] == [8, 2]
    odd = {"x": torch.zeros(8, 5), "y": torch.zeros(3)}
    assert some([odd, odd], 3)[0] is odd and first_samples(odd, 1) is odd
    assert some([], 5) == [] and some(iter([odd]), 0) == []


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(4, 10, dtype=torch.long),
        torch.zeros(4, 10, dtype=torch.int32),
        (torch.zeros(4, 10, dtype=torch.long), torch.zeros(4)),
        {"input_ids": torch.zeros(4, 10, dtype=torch.int32)},
    ],
)
def test_token_ids_count_each_however_they_come(batch):
    assert tokens_in(batch) == 40
    assert [tokens_in(b) for b in some([batch, batch], 50)] == [40, 10]
