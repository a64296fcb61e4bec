"""Guesses of the next tokens, which the language model reads together: from earlier text, or by a smaller decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.generation.loop import LanguageModel


class Guesses:
    """Counts guesses, and guesses fewer tokens while they are wrong.

    Attributes:
        max_guesses: largest number of tokens to guess at once.
        guessed: tokens that were guessed so far.
        accepted: those that were right.
    """

    def __init__(self, max_guesses: int):
        self.max_guesses, self.next = max_guesses, max_guesses
        self.guessed = self.accepted = 0

    def accept(self, guesses: int, accepted: int) -> None:
        """Note how many of the last guesses were right; the next time two more are guessed, or one less."""
        self.guessed, self.accepted = self.guessed + guesses, self.accepted + accepted
        self.next = min(self.max_guesses, self.next + 2) if accepted == guesses else max(1, self.next - 1, accepted)


class Lookup(Guesses):
    """Guesses that a text goes on as it did after the same last tokens before (Saxena 2023)."""

    def __init__(self, max_guesses: int, max_ngram: int):
        super().__init__(max_guesses)
        self.max_ngram = max_ngram

    def propose(self, ids: Tensor, limit: int) -> Tensor:
        """Return what followed the latest place with the same last tokens, [1, guesses]. O(tokens)."""
        n = ids.shape[1]
        for size in range(min(self.max_ngram, n - 1), 0, -1):
            windows = ids[0, :-1].unfold(0, size, 1)  # the last window has no token behind it
            places = (windows == ids[0, n - size :]).all(1).nonzero()[:, 0]
            if len(places):
                start = int(places[-1]) + size
                return ids[:, start : start + max(0, min(self.next, limit))]
        return ids[:, :0]


class Draft(Guesses):
    """Guesses the most likely tokens of a smaller decoder of the same vocabulary (Leviathan et al. 2023)."""

    def __init__(self, decoder: LanguageModel, max_guesses: int, capacity: int):
        super().__init__(max_guesses)
        self.decoder, self.cache = decoder, decoder.cache(1, capacity)

    def propose(self, ids: Tensor, limit: int) -> Tensor:
        """Return the next tokens by the smaller decoder, [1, guesses]."""
        guesses: list[Tensor] = []
        self.cache.past = min(self.cache.past, ids.shape[1] - 1)  # without the guesses that were wrong
        new, positions = ids[:, self.cache.past :], self.decoder.max_tokens
        limit = limit if positions is None else min(limit, positions - ids.shape[1])
        for _ in range(min(self.next, limit)):
            new = self.decoder(new, self.cache, last=True)[:, -1].argmax(-1, keepdim=True)
            guesses.append(new)
        return torch.cat(guesses, 1) if guesses else ids[:, :0]


def check_draft(decoder: LanguageModel, draft: LanguageModel) -> None:
    """Raise DataError unless a decoder can guess tokens of another one."""
    if not hasattr(draft, "vocab_size") or not callable(getattr(draft, "cache", None)):
        raise DataError(f"assistant_model: expected a decoder, from rarefy.compile, got {type(draft).__name__}")
    if draft.vocab_size != decoder.vocab_size:
        raise DataError(
            f"assistant_model: expected a vocabulary of {decoder.vocab_size} tokens, as the model has, got one of "
            f"{draft.vocab_size}"
        )
