"""The loop that generates text: read, choose a token, repeat. Guessed tokens are read together and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.generation.kv_cache import Cache
from rarefy.generation.logits import Processor, log_probabilities, process
from rarefy.generation.prompt_cache import PromptCache
from rarefy.generation.stopping import Criterion, ended


class LanguageModel(Protocol):
    """What generates text: see `Decoder`, whose attributes these are."""

    vocab_size: int
    max_tokens: int | None
    eos_tokens: tuple[int, ...]
    pad_token: int
    generation_defaults: dict[str, Any]
    cache_precision: str

    def cache(self, batch: int, capacity: int, mask: Tensor | None = None, cache_precision: str | None = None) -> Cache:
        """Return an empty KV cache."""
        ...

    def __call__(self, ids: Tensor, cache: Cache | None = None, *, last: bool = False) -> Tensor:
        """Return the logits [batch, tokens, vocab_size] of the next tokens, and append these to the cache."""
        ...


class Proposer(Protocol):
    """Guesses the next tokens of one text."""

    def propose(self, ids: Tensor, limit: int) -> Tensor:
        """Return up to `limit` tokens [1, guesses] that may follow the ids so far [1, tokens]."""
        ...

    def accept(self, guesses: int, accepted: int) -> None:
        """Note how many of the last guesses were right."""
        ...


@dataclass(frozen=True)
class Task:
    """What to generate.

    Attributes:
        ids: the prompts, int64 [batch, tokens].
        mask: [batch, tokens], 0 for padding on the left; None without padding.
        texts: number of texts for each prompt, in rows after each other.
        max_new_tokens: most tokens of a text.
        processors: change scores, in this order.
        criteria: end texts.
        do_sample: draw tokens by probability.
        generator: draws; None for torch's own.
        pad_token: follows a text that has ended.
        eos: tokens that end a text; criteria know them too.
        logprobs: how many most likely tokens to return with their log probabilities; None for none.
        proposer: guesses tokens; for a single text.
        cache_precision: of the KV cache; None for the decoder's.
        prompt_cache: what is known of the prompts; None for nothing.
    """

    ids: Tensor
    mask: Tensor | None
    texts: int
    max_new_tokens: int
    processors: Sequence[Processor]
    criteria: Sequence[Criterion]
    do_sample: bool
    generator: torch.Generator | None
    pad_token: int
    eos: tuple[int, ...] = ()
    logprobs: int | None = None
    proposer: Proposer | None = None
    cache_precision: str | None = None
    prompt_cache: PromptCache | None = None


@dataclass(frozen=True)
class Step:
    """The next token of each text.

    Attributes:
        tokens: int64 [rows]; the padding token for texts that have ended.
        ended: whether each text has ended with this token, or before, bool [rows].
        logprobs: log probabilities of the tokens before any processor, [rows]; None unless they were asked for.
        top_tokens: the most likely tokens [rows, count], the most likely first.
        top_logprobs: their log probabilities.
    """

    tokens: Tensor
    ended: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


def pick(scores: Tensor, do_sample: bool, generator: torch.Generator | None = None) -> Tensor:
    """Return the most likely token of each row of scores [rows, vocab_size], or one drawn by probability."""
    if not do_sample:
        return scores.argmax(-1)
    return draw(scores.softmax(-1), generator)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return an index for each row [rows, n], drawn by its probabilities with one random number.

    `Tensor.multinomial` takes n of them, the longest part of a sampled token.
    """
    ends = probabilities.double().cumsum(-1)
    if not bool((ends[:, -1].isfinite() & (ends[:, -1] > 0)).all()):
        raise DataError(
            "no token can be drawn: scores are NaN or infinite, by the model, a processor or the temperature"
        )
    place = torch.rand(len(ends), 1, dtype=torch.float64, generator=generator) * ends[:, -1:]
    return torch.searchsorted(ends, place, right=True)[:, 0]


def generate_steps(decoder: LanguageModel, task: Task) -> Iterator[Step]:
    """Yield the next token of each text until all have ended, or have `max_new_tokens`.

    Right guesses save calls and change nothing: each token is chosen from the logits behind the tokens before it.
    """
    batch, prompt = task.ids.shape
    memory = torch.zeros(batch * task.texts, prompt + task.max_new_tokens, dtype=torch.int64)
    memory[:, :prompt] = task.ids.repeat_interleave(task.texts, 0)
    with prompt_of(decoder, task, memory) as (cache, logits):
        if task.texts > 1:
            cache, logits = cache.repeated(task.texts), logits.repeat_interleave(task.texts, 0)
        yield from _continued(decoder, task, cache, logits, memory)


@contextmanager
def prompt_of(decoder: LanguageModel, task: Task, memory: Tensor) -> Iterator[tuple[Cache, Tensor]]:
    """Read the prompts of a task, or what is not known of them; yield the cache and the logits of the next tokens.

    `memory` [rows, tokens] has the ids so far, and receives those to come: what is kept for the next prompts.
    """
    capacity, padded = memory.shape[1], task.mask is not None and not bool((task.mask == 1).all())
    if task.prompt_cache is not None and padded:
        task.prompt_cache.reused = 0
    if task.prompt_cache is None or padded:
        cache = decoder.cache(len(task.ids), capacity, task.mask, task.cache_precision)
        yield cache, decoder(task.ids, cache, last=True)
        return
    cache = task.prompt_cache.begin(decoder, task.ids, capacity, task.cache_precision)
    try:
        yield cache, decoder(task.ids[:, cache.past :], cache, last=True)
    finally:
        task.prompt_cache.keep(cache, memory[0])


def _continued(decoder: LanguageModel, task: Task, cache: Cache, logits: Tensor, memory: Tensor) -> Iterator[Step]:
    """Yield the tokens behind prompts that were read; `memory` [rows, tokens] begins with them."""
    rows, prompt = len(memory), task.ids.shape[1]
    guesses = torch.empty(rows, 0, dtype=torch.int64)
    finished, count = torch.zeros(rows, dtype=torch.bool), prompt
    while True:
        right = 0
        for i in range(logits.shape[1]):
            tokens, logprobs = _next(task, memory[:, :count], logits[:, i], finished)
            memory[:, count] = tokens
            count += 1
            finished = finished | ended(task.criteria, memory[:, :count])
            yield Step(tokens, finished, *logprobs)
            if count == memory.shape[1] or bool(finished.all()):
                return
            if i == guesses.shape[1] or int(tokens[0]) != int(guesses[0, i]):
                break
            right += 1
            cache.past += 1
        if task.proposer is not None:
            if guesses.shape[1]:
                task.proposer.accept(guesses.shape[1], right)
            guesses = task.proposer.propose(memory[:, :count], memory.shape[1] - count - 1)
        new = torch.cat([memory[:, count - 1 : count], guesses], 1)
        logits = decoder(new, cache, last=not guesses.shape[1])
        cache.past -= guesses.shape[1]  # until they turn out to be right; what follows a wrong one is overwritten


def _next(task: Task, ids: Tensor, logits: Tensor, finished: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the next token of each row, and log probabilities as `Step` holds them where they were asked for."""
    scores = logits.float()
    if task.processors:
        scores = process(task.processors, ids, scores)
        scores = scores.masked_fill(finished[:, None], 0.0)  # any token: padding takes its place
        if not bool((scores > float("-inf")).any(-1).all()):
            raise DataError("no token is left to choose from: fewer tokens must be suppressed or excluded")
    tokens = torch.where(finished, task.pad_token, pick(scores, task.do_sample, task.generator))
    return tokens, () if task.logprobs is None else log_probabilities(logits, tokens, task.logprobs)
