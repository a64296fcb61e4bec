"""`generate` and `stream`: text from a language model on the engine, with the sampling options of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError, unknown
from rarefy.common.renamed import renamed_parameters
from rarefy.generation.decoder import Decoder, check_ids, decoder

OPTIONS = ("max_new_tokens", "attention_mask", "seed", "precision")  # of `stream`, besides those of `Sampling`


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names and meanings are those of transformers.

    Attributes:
        do_sample: draw by probability; False takes the most likely token.
        temperature: scores are divided by it, above 0.
        top_k: draw among the k most likely tokens; None for all.
        top_p: draw among the most likely tokens that together have this probability, above 0, at most 1; None for all.
        repetition_penalty: positive scores of tokens that occurred are divided by it, negative ones multiplied.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        changed = {
            "temperature": self.temperature != 1.0,
            "top_k": self.top_k is not None,
            "top_p": self.top_p is not None,
        }
        unused = [n for n, is_changed in changed.items() if is_changed]
        if unused and not self.do_sample:
            raise DataError(f"{unused[0]} has no effect on the most likely token: pass do_sample=True")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise DataError(
                f"temperature: expected a number above 0, got {self.temperature}; "
                "do_sample=False takes the most likely token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise DataError(f"top_k: expected a number of tokens from 1 up, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise DataError(f"top_p: expected a probability above 0, at most 1, got {self.top_p}")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise DataError(f"repetition_penalty: expected a number above 0, got {self.repetition_penalty}")


def choose(logits: Tensor, so_far: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Return the next token [batch]. O(vocab_size), with top_p O(vocab_size log vocab_size).

    Args:
        logits: [batch, vocab_size].
        so_far: the ids before, [batch, tokens].
        sampling: how to choose.
        generator: draws random numbers; None for torch's own.
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1.0:
        occurred, penalty = scores.gather(1, so_far), sampling.repetition_penalty
        scores = scores.scatter(1, so_far, torch.where(occurred < 0, occurred * penalty, occurred / penalty))
    if not sampling.do_sample:
        return scores.argmax(-1)
    scores = scores / sampling.temperature
    if sampling.top_k is not None:
        threshold = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = scores.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        unlikely[:, -1] = False
        scores = scores.masked_fill(unlikely.scatter(1, order, unlikely), -math.inf)
    return scores.softmax(-1).multinomial(1, generator=generator)[:, 0]


@renamed_parameters(values="precision")
def stream(
    model: nn.Module | Decoder,
    ids: Tensor,
    *,
    max_new_tokens: int = 128,
    attention_mask: Tensor | None = None,
    seed: int | None = None,
    precision: str | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence as soon as it is computed, until all sequences have ended.

    Args:
        model: a `Decoder`, or a language model, from which `decoder` makes one first (seconds to minutes).
        ids: the prompts, int64 [batch, tokens].
        max_new_tokens: most tokens to yield.
        attention_mask: [batch, tokens], 0 for padding, which must be on the left, else 1; None without padding.
        seed: makes sampling repeatable; needs do_sample=True.
        precision: of a model: "int8", as for `decoder`.
        **sampling: do_sample, temperature, top_k, top_p, repetition_penalty, as in transformers.

    Yields:
        int64 [batch]; the padding token for sequences that have ended.

    Raises:
        DataError: for an unknown option, options that contradict each other or have no effect, and more tokens than the
            model has positions. It is raised when the first token is asked for.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes)).eval()
        >>> [token.shape for token in stream(model, torch.tensor([[3, 1, 4]]), max_new_tokens=2)]
        [torch.Size([1]), torch.Size([1])]
    """
    known = [f.name for f in fields(Sampling)]
    unknown_options = [n for n in sampling if n not in known]
    if unknown_options:
        raise DataError(unknown("option", unknown_options[0], [*OPTIONS, *known]))
    options = Sampling(**sampling)
    check_int("max_new_tokens", max_new_tokens, 1, DataError)
    if seed is not None and not options.do_sample:
        raise DataError("seed has no effect on the most likely token: pass do_sample=True")
    if isinstance(model, Decoder) and precision is not None:
        raise DataError("precision is fixed when the decoder is built: pass it to rarefy.decoder")
    check_ids(ids)
    step = model if isinstance(model, Decoder) else decoder(model, precision=precision)
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise DataError(
            f"expected attention_mask of the shape of ids, {list(ids.shape)}, got {list(attention_mask.shape)}"
        )
    if step.max_tokens is not None and ids.shape[1] + max_new_tokens > step.max_tokens:
        raise DataError(
            f"the model has {step.max_tokens} positions: a prompt of {ids.shape[1]} tokens and {max_new_tokens} new "
            "ones exceed that"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    yield from step.stream(ids, max_new_tokens, partial(choose, sampling=options, generator=generator), attention_mask)


@renamed_parameters(values="precision")
def generate(model: nn.Module | Decoder, ids: Tensor, *, streamer: Any = None, **options: Any) -> Tensor:
    """Return prompts with the text that a language model writes after them.

    Args:
        model: a `Decoder`, or a language model, from which `decoder` makes one first (seconds to minutes: make it once
            to generate several texts).
        ids: the prompts, int64 [batch, tokens].
        streamer: an object whose put(ids) is called with the prompt and with each new token [batch], and whose end() is
            called at the end, as in transformers.
        **options: those of `stream`: max_new_tokens (128), attention_mask, seed, precision, do_sample, temperature,
            top_k, top_p, repetition_penalty.

    Returns:
        int64 [batch, tokens + new tokens]. A sequence ends with the model's end-of-text token; padding follows until
        all have ended.

    Raises:
        DataError: as `stream` does.

    Cost: a pass over all weights for each new token. Memory: the KV cache, 4 bytes for each key and value of each
    token and layer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes)).eval()
        >>> generate(model, torch.tensor([[3, 1, 4]]), max_new_tokens=5).shape
        torch.Size([1, 8])
    """
    steps = stream(model, ids, **options)
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
