"""Prompts as token ids, and token ids as text while they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError, ModelError, first_line

CONTEXT = 4  # tokens of the prompt that new tokens are decoded with: some tokenizers drop a blank at the beginning
INCOMPLETE = "\ufffd"  # what tokenizers return for bytes that are no whole character yet


class Text:
    """The text of tokens that come one after the other, in whole characters.

    Without a tokenizer the text lists the ids.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        self.tokenizer, self.ids = tokenizer, list(prompt[-CONTEXT:])
        self.start, self.end = 0, len(self.ids)  # the ids whose text is returned already

    def add(self, token: int) -> str:
        """Return the text that a token adds: "" for a special token, or until a character is complete. O(1)."""
        if self.tokenizer is None:
            return f"{token} "
        self.ids.append(token)
        text = self._new_text()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text

    def rest(self) -> str:
        """Return the remaining text of a sequence that ended within a character."""
        return "" if self.tokenizer is None else self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self.ids[self.start : self.end])
        return self._decode(self.ids[self.start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids)


class StopText:
    """Text that ends before the first stop string.

    What may be the beginning of a stop string is held back until it is clear.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings, self.held, self.stopped = tuple(strings), "", False

    def add(self, piece: str) -> str:
        """Return the text that may be shown after the next piece. O(length of the piece and of the stop strings)."""
        if self.stopped:
            return ""
        text = self.held + piece
        places = [i for s in self.strings if (i := text.find(s)) >= 0]
        if places:
            self.held, self.stopped = "", True
            return text[: min(places)]
        longest = max((n for s in self.strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        cut = len(text) - longest
        self.held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self.held = self.held, ""
        return held


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of ids without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def encode_prompt(tokenizer: Any, prompt: str, chat: bool = False, system: str | None = None) -> list[int]:
    """Return the ids of a prompt.

    Args:
        tokenizer: one of transformers.
        prompt: the text.
        chat: the prompt is a user's message: apply the tokenizer's chat template, up to where the answer begins.
        system: with chat, the system's message before it.

    Raises:
        ModelError: if the tokenizer has no chat template, or fails.
        DataError: if the prompt has no token.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template: leave chat out, and write the prompt as the model expects it"
        )
    try:
        if chat:
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": prompt})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    except Exception as error:  # a damaged tokenizer or template raises anything
        raise ModelError(f"the tokenizer cannot encode the prompt: {first_line(error)}") from error
    if not ids:
        raise DataError("the prompt is empty: it has no token")
    return list(ids)


def parse_ids(text: str) -> list[int]:
    """Return the ids that a text lists; DataError if it is no such list.

    >>> parse_ids("1 2, 3")
    [1, 2, 3]
    """
    numbers = text.replace(",", " ").split()
    if not numbers or not all(n.isascii() and n.isdigit() and len(n) < 19 for n in numbers):
        raise DataError(f"expected ids as whole numbers from 0 on, such as '1 2 3', got {text[:80]!r}")
    return [int(n) for n in numbers]


def left_padded(prompts: Sequence[Sequence[int]], pad_token: int) -> tuple[Tensor, Tensor | None]:
    """Return prompts of ids as one batch.

    Returns:
        ids [prompts, tokens], padded on the left, and their attention mask; None for the mask if all lengths are equal.

    >>> left_padded([[5, 6], [7]], 0)[0].tolist()
    [[5, 6], [0, 7]]
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_token] * (length - len(p)) + list(p) for p in prompts], dtype=torch.int64)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], dtype=torch.int64)
    return ids, None if bool(mask.all()) else mask
