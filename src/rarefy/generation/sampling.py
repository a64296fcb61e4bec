"""`generate`: text by a language model on the engine, one token after the other, chosen as transformers does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, unknown
from rarefy.generation.decoder import Decoder, check_ids, decoder

OPTIONS = ("max_new_tokens", "attention_mask", "seed", "values")  # of text; beside those of sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names and meanings are those of transformers.

    do_sample           draw by probability; False: the likeliest
    temperature         what scores are divided by, > 0
    top_k               only the k likeliest; None: all
    top_p               only the likeliest that together have this probability, 0..1; None: all
    repetition_penalty  scores of tokens that are there already are divided by it, or multiplied where they are negative
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        given = {
            "temperature": self.temperature != 1.0,
            "top_k": self.top_k is not None,
            "top_p": self.top_p is not None,
        }
        idle = [n for n, is_given in given.items() if is_given]
        if idle and not self.do_sample:
            raise DataError(f"{idle[0]} has no effect on the likeliest token: do_sample=True")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise DataError(
                f"temperature is a number above 0, got {self.temperature}; do_sample=False takes the likeliest"
            )
        if self.top_k is not None and self.top_k < 1:
            raise DataError(f"top_k is a number of tokens, 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise DataError(f"top_p is a probability above 0, up to 1, got {self.top_p}")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise DataError(f"repetition_penalty is a number above 0, got {self.repetition_penalty}; 1 changes nothing")


def choose(logits: Tensor, so_far: Tensor, how: Sampling, random: torch.Generator | None = None) -> Tensor:
    """Return the next token [batch] for logits [batch, vocabulary] behind ids so far [batch, tokens]. O(vocabulary),
    with top_p O(vocabulary log vocabulary)."""
    scores = logits.float()
    if how.repetition_penalty != 1.0:
        known = scores.gather(1, so_far)
        by = how.repetition_penalty
        scores = scores.scatter(1, so_far, torch.where(known < 0, known * by, known / by))
    if not how.do_sample:
        return scores.argmax(-1)
    scores = scores / how.temperature
    if how.top_k is not None:
        least = scores.topk(min(how.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if how.top_p is not None and how.top_p < 1:
        ordered, places = scores.sort()
        out = ordered.softmax(-1).cumsum(-1) <= 1 - how.top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(1, places, out), -math.inf)
    return scores.softmax(-1).multinomial(1, generator=random)[:, 0]


def stream(
    model: nn.Module | Decoder,
    ids: Tensor,
    *,
    max_new_tokens: int = 128,
    attention_mask: Tensor | None = None,
    seed: int | None = None,
    values: str | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Yield the next token [batch] of each sequence as soon as it is there; see `generate`."""
    strange = [n for n in sampling if n not in Sampling.__dataclass_fields__]
    if strange:
        raise DataError(unknown("option", strange[0], [*OPTIONS, *Sampling.__dataclass_fields__]))
    how = Sampling(**sampling)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise DataError(f"max_new_tokens is a number, 1 or more, got {max_new_tokens!r}")
    if seed is not None and not how.do_sample:
        raise DataError("seed has no effect on the likeliest token: do_sample=True")
    if isinstance(model, Decoder) and values is not None:
        raise DataError("a decoder has its numbers already: give values to rarefy.decoder")
    check_ids(ids)
    made = model if isinstance(model, Decoder) else decoder(model, values=values)
    if attention_mask is not None and attention_mask.shape != ids.shape:
        got = f"{list(ids.shape)}, attention_mask {list(attention_mask.shape)}"
        raise DataError(f"ids are [batch, tokens], and so is attention_mask, got {got}")
    longest = ids.shape[1] + max_new_tokens
    if made.most is not None and longest > made.most:
        raise DataError(
            f"the model knows {made.most} positions: {ids.shape[1]} tokens and {max_new_tokens} new are more"
        )
    random = None if seed is None else torch.Generator().manual_seed(seed)
    yield from made.stream(ids, max_new_tokens, partial(choose, how=how, random=random), attention_mask)


def generate(model: nn.Module | Decoder, ids: Tensor, *, streamer: Any = None, **how: Any) -> Tensor:
    """Return ids [batch, tokens] and what the model writes behind them, up to `max_new_tokens` (128).

    model           a `Decoder`, or a language model, of which one is made first: that takes longer than a short text
    attention_mask  [batch, tokens], 0 where a prompt was filled up on the left
    do_sample, temperature, top_k, top_p, repetition_penalty: as in transformers; `seed` makes draws repeatable
    streamer        its put(ids) is called with the prompt and each new token, its end() at last, as transformers does
    values          of a model: "int8", as in `decoder`
    A sequence ends with the model's end of text; behind it lies padding until all have ended. DataError for options
    that are none, contradict each other or do nothing, and for more tokens than the model has positions.
    """
    steps = stream(model, ids, **how)
    if streamer is not None:
        streamer.put(ids)
    tokens = [ids]
    for token in steps:
        tokens.append(token[:, None])
        if streamer is not None:
            streamer.put(token)
    if streamer is not None:
        streamer.end()
    return torch.cat(tokens, 1)
