"""Parts of batches: as many tokens as asked for, in whole samples."""

import pytest
import torch

from rarefy.model.batches import count_samples, count_tokens, first_samples, take_tokens


@pytest.mark.parametrize(
    ("tokens", "each", "samples"),
    [(10, None, [1]), (11, None, [2]), (40, None, [4]), (41, None, [4, 1]), (1000, None, [4, 4, 4]), (30, 10, [1, 1, 1]),
     (30, 25, [2, 1]), (1000, 5, [1, 1, 1])],
)  # fmt: skip
def test_some(tokens, each, samples):
    text = [{"input_ids": torch.zeros(4, 10, dtype=torch.long), "attention_mask": torch.ones(4, 10)} for _ in range(3)]
    found = take_tokens(text, tokens, each)
    assert [count_samples(b) for b in found] == samples
    assert sum(map(count_tokens, found)) >= min(tokens, 120) or each is not None


def test_images_count_as_samples_and_what_cannot_be_cut_stays_whole():
    images = [(torch.zeros(8, 3, 2, 2), torch.zeros(8, dtype=torch.long)) for _ in range(2)]
    assert [len(b[0]) for b in take_tokens(images, 10)] == [8, 2]
    odd = {"x": torch.zeros(8, 5), "y": torch.zeros(3)}
    assert take_tokens([odd, odd], 3)[0] is odd and first_samples(odd, 1) is odd
    assert take_tokens([], 5) == [] and take_tokens(iter([odd]), 0) == []


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
    assert count_tokens(batch) == 40
    assert [count_tokens(b) for b in take_tokens([batch, batch], 50)] == [40, 10]
