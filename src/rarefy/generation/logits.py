"""Processors of logits: functions of the ids so far [rows, tokens] and scores [rows, vocab_size] that return scores.

They are called as the `LogitsProcessor`s of transformers are, so that both may be mixed, and in its order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.generation.options import Options

Processor = Callable[[Tensor, Tensor], Tensor]
LIKELIEST = 1024  # tokens that are sorted first: a part of the time of all


def penalize_repetition(ids: Tensor, scores: Tensor, penalty: float, starts: Tensor | None = None) -> Tensor:
    """Divide positive scores of tokens that occurred by a penalty, and multiply negative ones (Keskar et al. 2019).

    starts [rows] are the first tokens that are no padding.
    """
    if starts is not None:  # padding is no text: the last token stands in for it
        ids = torch.where(torch.arange(ids.shape[1]) < starts[:, None], ids[:, -1:], ids)
    occurred = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(occurred < 0, occurred * penalty, occurred / penalty))


def penalize_new_tokens(ids: Tensor, scores: Tensor, prompt: int, presence: float, frequency: float) -> Tensor:
    """Subtract `presence` from the scores of tokens that occur behind the prompt, and `frequency` for each time."""
    new = ids[:, prompt:]
    counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones(new.shape, dtype=torch.float32))
    return scores - presence * (counts > 0) - frequency * counts


def ban_repeated_ngrams(ids: Tensor, scores: Tensor, size: int) -> Tensor:
    """Exclude tokens that would repeat `size` tokens in a row. O(tokens)."""
    if ids.shape[1] < size:
        return scores
    windows = ids.unfold(1, size, 1)  # [rows, windows, size]
    last = ids[:, ids.shape[1] - size + 1 :]
    repeated = (windows[..., :-1] == last[:, None]).all(-1)
    row, window = repeated.nonzero(as_tuple=True)
    scores = scores.clone()
    scores[row, windows[row, window, -1]] = -math.inf
    return scores


def exclude(ids: Tensor, scores: Tensor, tokens: Sequence[int], until: int | None = None) -> Tensor:
    """Exclude tokens, until there are so many ids."""
    if until is not None and ids.shape[1] >= until:
        return scores
    return scores.index_fill(1, torch.tensor(tokens, dtype=torch.int64), -math.inf)


def heat(ids: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Divide scores by a temperature."""
    return scores / temperature


def keep_top_k(ids: Tensor, scores: Tensor, k: int) -> Tensor:
    """Exclude all but the k largest scores; equal ones stay together."""
    threshold = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < threshold, -math.inf)


def keep_top_p(ids: Tensor, scores: Tensor, p: float, minimum: int) -> Tensor:
    """Keep the most likely tokens whose probabilities add up to p (Holtzman et al. 2020), at least `minimum` of them.

    O(vocab_size) where some of the likeliest tokens add up to p, else O(vocab_size log vocab_size).
    """
    probabilities, count, size = scores.softmax(-1), max(LIKELIEST, minimum), scores.shape[-1]
    while True:
        likeliest, order = probabilities.topk(min(count, size))
        total = likeliest.cumsum(-1)
        if count >= size or bool((total[:, -1] >= p).all()):
            break
        count = size
    likely = total - likeliest < p  # of what is likelier than a token
    likely[:, :minimum] = True
    remaining = scores.gather(1, order).masked_fill(~likely, -math.inf)
    return torch.full_like(scores, -math.inf).scatter(1, order, remaining)


def keep_min_p(ids: Tensor, scores: Tensor, p: float, minimum: int) -> Tensor:
    """Keep tokens with p times the largest probability (Nguyen et al. 2024), at least `minimum` of them."""
    probabilities = scores.softmax(-1)
    unlikely = probabilities < p * probabilities.amax(-1, keepdim=True)
    likeliest = probabilities.topk(min(minimum, probabilities.shape[-1])).indices
    return scores.masked_fill(unlikely.scatter(1, likeliest, False), -math.inf)


def processors(
    options: Options, eos: Sequence[int], prompt: int, starts: Tensor | None, others: Iterable[Processor] = ()
) -> list[Processor]:
    """Return the processors of options, in the order of transformers.

    Args:
        options: of the call.
        eos: tokens that end a text.
        prompt: tokens of the prompts, padding included.
        starts: first token [rows] of each prompt that is no padding.
        others: processors of the caller, which run before those of random draws.
    """
    o = options
    result: list[Processor] = []
    if o.repetition_penalty != 1.0:
        result.append(partial(penalize_repetition, penalty=o.repetition_penalty, starts=starts))
    if o.presence_penalty or o.frequency_penalty:
        penalties = {"presence": o.presence_penalty, "frequency": o.frequency_penalty}
        result.append(partial(penalize_new_tokens, prompt=prompt, **penalties))
    if o.no_repeat_ngram_size:
        result.append(partial(ban_repeated_ngrams, size=o.no_repeat_ngram_size))
    if o.min_new_tokens and eos:
        result.append(partial(exclude, tokens=eos, until=prompt + o.min_new_tokens))
    if o.suppress_tokens:
        result.append(partial(exclude, tokens=o.suppress_tokens))
    result += [partial(_checked, processor=p) for p in others]
    if not o.do_sample:
        return result
    minimum = 1 if o.num_beams == 1 else max(2, len(eos) + 1)  # a beam search goes on beside texts that end
    if o.temperature != 1.0:
        result.append(partial(heat, temperature=o.temperature))
    if o.top_k:
        result.append(partial(keep_top_k, k=max(o.top_k, minimum)))
    if o.top_p < 1:
        result.append(partial(keep_top_p, p=o.top_p, minimum=minimum))
    if o.min_p:
        result.append(partial(keep_min_p, p=o.min_p, minimum=minimum))
    return result


def process(processors: Iterable[Processor], ids: Tensor, scores: Tensor) -> Tensor:
    """Return scores after all processors."""
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def _checked(ids: Tensor, scores: Tensor, processor: Any) -> Tensor:
    """Call a caller's processor; DataError unless it returns scores of the same shape."""
    result = processor(ids, scores.clone())  # some of transformers' write into what they are passed
    if not isinstance(result, Tensor) or result.shape != scores.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        name = getattr(processor, "__name__", type(processor).__name__)
        raise DataError(f"logits_processor {name}: expected scores {list(scores.shape)}, got {got}")
    return result


def log_probabilities(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log probabilities before any processor.

    Args:
        logits: [rows, vocab_size].
        tokens: the chosen tokens [rows].
        count: number of most likely tokens.

    Returns:
        Of the chosen tokens [rows]; the most likely tokens [rows, count], and theirs.
    """
    scores = logits.float().log_softmax(-1)
    top = scores.topk(min(count, scores.shape[-1]))
    return scores.gather(1, tokens[:, None])[:, 0], top.indices, top.values
