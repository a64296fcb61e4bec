"""Text in and out of language models: prompts as ids, and ids as text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError, ModelError, first_line

BEFORE = 4  # tokens of a prompt, behind which the next one is read: some tokenizers leave out a first blank
HALF = "\ufffd"  # what stands for bytes that are no letter yet


class Text:
    """The text of tokens that come one after the other, letters whole; ids themselves where there is no tokenizer.

    before   the ids that the text follows
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self.tokenizer, self.ids = tokenizer, list(before[-BEFORE:])
        self.start, self.read = 0, len(self.ids)

    def add(self, token: int) -> str:
        """Return what text a token adds: nothing where a letter or a special token is not at its end. O(1)."""
        if self.tokenizer is None:
            return f"{token} "
        self.ids.append(token)
        new = self._new()
        if not new or new.endswith(HALF):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return new

    def rest(self) -> str:
        """Return what is left of a text that was cut within a letter."""
        return "" if self.tokenizer is None else self._new()

    def _new(self) -> str:
        known = self._decoded(self.ids[self.start : self.read])
        return self._decoded(self.ids[self.start :])[len(known) :]

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def ids_of(tokenizer: Any, prompt: str, chat: bool = False) -> list[int]:
    """Return a prompt's ids; `chat`: as a user's message, by the tokenizer's template, with the answer's beginning
    behind it. ModelError for a tokenizer without one, DataError for a prompt of no tokens. O(its length)."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template: leave chat out, and write the prompt as the model knows it"
        )
    try:
        if chat:
            said = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    except Exception as error:  # a damaged tokenizer or template raises anything
        raise ModelError(f"the tokenizer does not take the prompt: {first_line(error)}") from error
    if not ids:
        raise DataError("the prompt is empty: it has no token")
    return list(ids)


def ids_in(text: str) -> list[int]:
    """Return the ids that a text lists; DataError for what is no list of them.

    >>> ids_in("1 2, 3")
    [1, 2, 3]
    """
    words = text.replace(",", " ").split()
    if not words or not all(w.isascii() and w.isdigit() and len(w) < 19 for w in words):
        raise DataError(f"ids are whole numbers, such as '1 2 3', got {text[:80]!r}")
    return [int(w) for w in words]


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor | None]:
    """Return ids [prompts, tokens], shorter prompts filled up on the left, and their mask, None where all are as long.

    >>> left_padded([[5, 6], [7]], 0)[0].tolist()
    [[5, 6], [0, 7]]
    """
    most = max(map(len, prompts))
    ids = torch.tensor([[pad] * (most - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (most - len(p)) + [1] * len(p) for p in prompts])
    return ids, None if bool(mask.all()) else mask
