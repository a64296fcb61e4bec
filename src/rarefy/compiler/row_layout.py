"""Which values are stored row by row, a token in each row, in place of tiles of 64 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

MAX_DECODE_TOKENS = 16  # tokens up to which values are stored row by row
MAX_DECODE_SEQUENCES = 1024  # the same for sequences of one token each, which tiles pad to whole vectors


def few_tokens(leading: Sequence[int]) -> bool:
    """Return whether values of these leading dimensions, such as (batch, tokens), are stored row by row.

    >>> few_tokens((1, 16)), few_tokens((64, 1)), few_tokens((2, 16))
    (True, True, False)
    """
    single = len(leading) == 2 and leading[1] == 1 and leading[0] <= MAX_DECODE_SEQUENCES
    return single or prod(leading) <= MAX_DECODE_TOKENS
