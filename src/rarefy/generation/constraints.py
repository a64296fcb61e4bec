"""Text that follows a JSON schema, a regular expression or a grammar, by the library llguidance (extra `json`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.common.errors import DataError, first_line
from rarefy.common.extras import install

KINDS = ("json_schema", "regex", "grammar")
# as json.dumps writes it, with no other whitespace: small models would go on with blanks for ever
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """What the texts of one call must follow: excludes tokens that break it, and ends texts that are complete."""

    def __init__(self, kind: str, value: Any, tokenizer: Any, vocab_size: int, eos: tuple[int, ...], prompt: int):
        """Compile a constraint.

        Args:
            kind: one of KINDS.
            value: a JSON schema as a dict or text, a regular expression, or a grammar in Lark's syntax.
            tokenizer: a fast tokenizer of transformers.
            vocab_size: number of scores.
            eos: tokens that end a text.
            prompt: tokens of the prompts, padding included.

        Raises:
            DataError: if llguidance is not installed, the tokenizer is none that it reads, or the value is wrong.

        Cost: a second for a tokenizer that is used for the first time.
        """
        guidance = _library(kind)
        self.consumed = prompt
        self.vocab_size = vocab_size
        try:
            grammar = _grammar(guidance, kind, value)
            self.first = guidance.LLMatcher(_tokenizer(tokenizer, vocab_size, eos), grammar, log_level=0)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"{kind}: {first_line(error)}") from error
        if self.first.is_error():
            raise DataError(f"{kind}: {first_line(ValueError(self.first.get_error()))}")
        self.rows: list[Any] = []

    def exclude(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, vocab_size] with tokens that break the constraint excluded; a processor of logits."""
        self._read(ids)
        allowed = torch.ones(scores.shape, dtype=torch.bool)
        for row, matcher in enumerate(self.rows):
            if not matcher.is_stopped():
                bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
                allowed[row] = torch.from_numpy(bits[: scores.shape[1]].astype(bool))
        return scores.masked_fill(~allowed, float("-inf"))

    def ends(self, ids: Tensor, scores: Any) -> Tensor:
        """Return which texts are complete and cannot go on, bool [rows]; a criterion."""
        self._read(ids)
        return torch.tensor([m.is_stopped() for m in self.rows], dtype=torch.bool)

    def _read(self, ids: Tensor) -> None:
        """Have each row's matcher read its new tokens."""
        if not self.rows:
            self.rows = [self.first.deep_copy() for _ in range(len(ids))]
        for matcher, tokens in zip(self.rows, ids[:, self.consumed :].tolist()):
            for token in tokens:
                # a token that is not allowed is padding: a stop string or a criterion has ended the text
                if not matcher.is_stopped() and matcher.validate_tokens([token]):
                    matcher.consume_token(token)
            if matcher.is_error():
                raise DataError(f"the constraint failed: {first_line(ValueError(matcher.get_error()))}")
        self.consumed = ids.shape[1]


def _library(kind: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise DataError(f"{kind} needs llguidance: {install('json')}") from None
    return llguidance


def _grammar(guidance: Any, kind: str, value: Any) -> str:
    if kind == "json_schema":
        if not isinstance(value, str | Mapping):
            raise TypeError(f"expected a JSON schema as a dict or text, got {type(value).__name__}")
        schema = json.loads(value) if isinstance(value, str) else dict(value)
        return guidance.LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE)
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__}")
    matcher = guidance.LLMatcher
    return matcher.grammar_from_regex(value) if kind == "regex" else matcher.grammar_from_lark(value)


@lru_cache(maxsize=2)
def _tokenizer(tokenizer: Any, vocab_size: int, eos: tuple[int, ...]) -> Any:
    """Return llguidance's form of a tokenizer, which takes a second."""
    from llguidance import hf

    if tokenizer is None:
        raise TypeError("it needs a tokenizer to compare text with tokens: pass tokenizer=")
    try:
        return hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos) or None)
    except Exception as error:  # tokenizers of other kinds make it raise anything
        raise ValueError(
            f"llguidance cannot read this tokenizer ({first_line(error, 120)}): it needs a fast one of transformers, "
            "with a decoder of bytes or of blanks, such as those of Llama and GPT-2"
        ) from None
