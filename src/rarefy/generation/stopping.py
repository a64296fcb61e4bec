"""When a text ends: functions of the ids so far [rows, tokens] that return which rows have ended, bool [rows].

They are called with ids and scores as the `StoppingCriteria` of transformers are, so that both may be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.generation.tokenization import CONTEXT, decode

Criterion = Callable[[Tensor, Any], Tensor]


def ends_with_token(ids: Tensor, scores: Any, tokens: Tensor) -> Tensor:
    """Return whether the last token is one of some."""
    return torch.isin(ids[:, -1], tokens)


def contains_string(ids: Tensor, scores: Any, tokenizer: Any, strings: Sequence[str], prompt: int) -> Tensor:
    """Return whether the text behind the prompt contains a string. It looks at as many last tokens as can hold one."""
    tokens = max(len(s.encode()) for s in strings) + CONTEXT
    start = max(prompt, ids.shape[1] - tokens)
    before = max(0, start - CONTEXT)  # some tokenizers drop a blank at the beginning
    tails = ids[:, before:].tolist()
    texts = [decode(tokenizer, t)[len(decode(tokenizer, t[: start - before])) :] for t in tails]
    return torch.tensor([any(s in text for s in strings) for text in texts], dtype=torch.bool)


def criteria(
    eos: Sequence[int], strings: Sequence[str], tokenizer: Any, prompt: int, others: Iterable[Criterion] = ()
) -> list[Criterion]:
    """Return the criteria of a call.

    Args:
        eos: tokens that end a text.
        strings: strings that end a text. One that is a token of its own, such as "<|im_end|>", is compared as a token.
        tokenizer: decodes ids; only strings need it.
        prompt: tokens of the prompts, padding included.
        others: criteria of the caller.

    Raises:
        DataError: if there are strings but no tokenizer.
    """
    if strings and not callable(getattr(tokenizer, "decode", None)):
        raise DataError("stop_strings needs a tokenizer to find strings in tokens: pass tokenizer=")
    added = getattr(tokenizer, "get_added_vocab", dict)() if strings else {}
    tokens = [*eos, *(added[s] for s in strings if s in added)]
    result: list[Criterion] = []
    if tokens:
        result.append(partial(ends_with_token, tokens=torch.tensor(tokens, dtype=torch.int64)))
    texts = [s for s in strings if s not in added]
    if texts:
        result.append(partial(contains_string, tokenizer=tokenizer, strings=texts, prompt=prompt))
    return result + [partial(_checked, criterion=c) for c in others]


def ended(criteria: Iterable[Criterion], ids: Tensor) -> Tensor:
    """Return whether any criterion ends the text of each row."""
    result = torch.zeros(len(ids), dtype=torch.bool)
    for criterion in criteria:
        result |= criterion(ids, None)
    return result


def _checked(ids: Tensor, scores: Any, criterion: Any) -> Tensor:
    """Call a caller's criterion; DataError unless it returns a bool, or one for each row."""
    result = criterion(ids, scores)
    if isinstance(result, bool):
        return torch.full((len(ids),), result, dtype=torch.bool)
    if not isinstance(result, Tensor) or result.dtype != torch.bool or result.shape != ids.shape[:1]:
        got = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise DataError(f"stopping_criteria {name}: expected a bool for each of {len(ids)} texts, got {got}")
    return result
