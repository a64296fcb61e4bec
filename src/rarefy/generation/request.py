"""A call of `generate`: its options checked, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError, unknown
from rarefy.generation import logits, speculation, stopping
from rarefy.generation.beam_search import search
from rarefy.generation.constraints import KINDS, Constraint
from rarefy.generation.loop import LanguageModel, Step, Task, generate_steps
from rarefy.generation.options import MAX_NEW_TOKENS, NAMES, Options, call_defaults, resolve
from rarefy.generation.prompt_cache import PromptCache
from rarefy.runtime.native_calls import without_modes

OBJECTS = (
    *("tokenizer", "logits_processor", "stopping_criteria", "generation_config", "assistant_model", "prompt_cache"),
    *KINDS,
)
CALL = ("input_ids", "attention_mask", "precision", *OBJECTS)  # options of `generate` besides those of `Options`


@dataclass(frozen=True)
class Generation:
    """Texts, and how they were generated.

    Attributes:
        sequences: prompts and texts, int64 [texts, tokens + new tokens].
        finish_reasons: why each text ended: "stop" by a token, string, criterion or constraint, or "length".
        logprobs: log probabilities of the generated tokens before any processor, [texts, new tokens]; None unless
            `logprobs` was passed.
        top_tokens: the most likely tokens [texts, new tokens, logprobs], the most likely first.
        top_logprobs: their log probabilities.
        scores: of a beam search, of each text: its log probability by its length to the power `length_penalty`.
        guessed: tokens that were guessed; None without guesses.
        accepted: those that were right.
    """

    sequences: Tensor
    finish_reasons: tuple[str, ...]
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None
    scores: Tensor | None = None
    guessed: int | None = None
    accepted: int | None = None

    @property
    def acceptance(self) -> float | None:
        """Return the share of guessed tokens that were right; None if none were guessed."""
        return self.accepted / self.guessed if self.guessed and self.accepted is not None else None


def stream_steps(decoder: LanguageModel, ids: Tensor | None, **options: Any) -> Iterator[Step]:
    """Yield the next token of each text as `Step`s, which hold log probabilities and whether each text has ended."""
    if options.get("logprobs") is not None:
        raise DataError("logprobs has no effect on a stream of tokens: call generate with details=True")
    request = prepare(decoder, prompts_of(ids, options), **options)
    if request.options.num_beams > 1:
        raise DataError("num_beams: a beam search has no text before it ends; call generate")
    yield from generate_steps(request.decoder, request.task)


@without_modes
def generate_ids(
    decoder: LanguageModel, ids: Tensor | None, *, streamer: Any = None, details: bool = False, **options: Any
) -> Any:
    """Return what `rarefy.generate` does, for a decoder."""
    prompts: Tensor = prompts_of(ids, options)
    if options.get("logprobs") is not None and not details:
        raise DataError("logprobs has no effect on ids alone: pass details=True, too")
    request = prepare(decoder, prompts, **options)
    if request.options.num_beams > 1:
        if streamer is not None:
            raise DataError("streamer: a beam search has no text before it ends; leave one of the two out")
        ids, reasons, scores, _ = search(request.decoder, request.task, request.options)
        return Generation(ids, reasons, scores=scores) if details else ids
    if streamer is not None:
        streamer.put(prompts)
    steps = []
    for step in generate_steps(request.decoder, request.task):
        steps.append(step)
        if streamer is not None:
            streamer.put(step.tokens)
    if streamer is not None:
        streamer.end()
    repeated = prompts.repeat_interleave(request.options.num_return_sequences, 0)
    sequences = torch.cat([repeated, torch.stack([s.tokens for s in steps], 1)], 1)
    return _with_details(sequences, steps, request.task.proposer) if details else sequences


def _with_details(sequences: Tensor, steps: list[Step], proposer: Any) -> Generation:
    reasons = tuple("stop" if end else "length" for end in steps[-1].ended.tolist())
    names = ("logprobs", "top_tokens", "top_logprobs")
    stacked = {n: torch.stack([getattr(s, n) for s in steps], 1) for n in names if getattr(steps[0], n) is not None}
    counts = {} if proposer is None else {"guessed": proposer.guessed, "accepted": proposer.accepted}
    return Generation(sequences, reasons, **stacked, **counts)


@dataclass(frozen=True)
class Request:
    """A checked call: the decoder, what it generates, and the options."""

    decoder: LanguageModel
    task: Task
    options: Options


def prepare(
    decoder: LanguageModel,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Request:
    """Return a checked call of `generate` or `stream`; DataError if it is wrong."""
    config = options.get("generation_config")
    defaults = decoder.generation_defaults if config is None else call_defaults(config)
    resolved, objects = check_options(options, defaults)
    check_ids(ids)
    _check_one_text(resolved, objects, len(ids))
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise DataError(f"attention_mask: expected a tensor of the shape of ids, got {type(attention_mask).__name__}")
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise DataError(
            f"expected attention_mask of the shape of ids, {list(ids.shape)}, got {list(attention_mask.shape)}"
        )
    if attention_mask is not None and bool((attention_mask == 1).all()):
        attention_mask = None  # no padding
    new = _new_tokens(decoder, ids.shape[1], options.get("max_new_tokens"), resolved)
    return Request(decoder, _task(decoder, ids, attention_mask, resolved, objects, new), resolved)


def prompts_of(ids: Tensor | None, options: dict[str, Any]) -> Any:
    """Return the prompts of a call, which tokenizers call `input_ids`; that is taken out of the options."""
    input_ids = options.pop("input_ids", None)
    if ids is not None and input_ids is not None:
        raise DataError("ids and input_ids are two names of the prompts: pass one of them")
    if ids is None and input_ids is None:
        raise DataError("expected prompts: ids, or input_ids as a tokenizer returns them")
    if options.get("token_type_ids") is not None:
        raise DataError("token_type_ids has no effect on these models: leave it out")
    options.pop("token_type_ids", None)
    return input_ids if ids is None else ids


def check_ids(ids: Any) -> None:
    """Raise DataError unless ids are int64 [batch, tokens] with a token."""
    if not isinstance(ids, Tensor):
        raise DataError(f"expected ids as an int64 tensor [batch, tokens], got {type(ids).__name__}")
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise DataError(f"expected ids as int64 [batch, tokens], got {ids.dtype} {list(ids.shape)}")
    if not ids.numel():
        raise DataError(f"the prompt is empty: ids are {list(ids.shape)}")


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Return the options of a call, and those that are objects; DataError if they are wrong or contradict each other.

    Args:
        options: of the call.
        defaults: of the model, see `model_defaults`.
    """
    objects = {n: options[n] for n in OBJECTS if options.get(n) is not None}
    numbers = {n: v for n, v in options.items() if n not in OBJECTS}
    wrong = next((n for n in numbers if n not in NAMES), None)
    if wrong is not None:
        raise DataError(unknown("option", wrong, [*CALL, *NAMES, "streamer", "details"]))
    resolved = resolve(numbers, defaults)
    constraints = [k for k in KINDS if k in objects]
    if len(constraints) > 1:
        raise DataError(f"a text follows one constraint: got {' and '.join(constraints)}")
    if "assistant_model" in objects and resolved.prompt_lookup_num_tokens:
        raise DataError("tokens are guessed one way: pass assistant_model or prompt_lookup_num_tokens, not both")
    without_beams = [*constraints, *(["assistant_model"] if "assistant_model" in objects else [])]
    if without_beams and resolved.num_beams > 1:
        raise DataError(f"{without_beams[0]} has no effect on a beam search: leave one of the two out")
    return resolved, objects


def _check_one_text(options: Options, objects: Mapping[str, Any], batch: int) -> None:
    """Raise DataError if tokens of several texts shall be guessed."""
    names = ["assistant_model"] * ("assistant_model" in objects)
    names += ["prompt_lookup_num_tokens"] * bool(options.prompt_lookup_num_tokens)
    texts = batch * options.num_return_sequences
    if names and texts > 1:
        raise DataError(f"{names[0]} works for one text at a time, got {texts}")


def _new_tokens(decoder: LanguageModel, prompt: int, explicit: int | None, options: Options) -> int:
    """Return how many tokens to generate: those that were asked for, else the model's default as far as they fit."""
    new = options.max_new_tokens or MAX_NEW_TOKENS
    room = new if decoder.max_tokens is None else decoder.max_tokens - prompt
    if explicit is None and room > 0:
        return min(new, room)
    if new > room:
        raise DataError(
            f"the model has {decoder.max_tokens} positions: a prompt of {prompt} tokens and {new} new ones exceed that"
        )
    return new


def _task(
    step: LanguageModel, ids: Tensor, mask: Tensor | None, options: Options, objects: Mapping[str, Any], new: int
) -> Task:
    prompt, rows = ids.shape[1], max(options.num_return_sequences, options.num_beams)
    eos = (*(step.eos_tokens if options.eos_token_id is None else options.eos_token_id), *options.stop_tokens)
    outside = [t for t in (*eos, *options.suppress_tokens) if t >= step.vocab_size]
    if outside:
        raise DataError(f"token ids: expected ids in 0..{step.vocab_size - 1}, got {outside[0]}")
    tokenizer = objects.get("tokenizer")
    processors, criteria = (_callables(n, objects.get(n)) for n in ("logits_processor", "stopping_criteria"))
    for kind in (k for k in KINDS if k in objects):
        constraint = Constraint(kind, objects[kind], tokenizer, step.vocab_size, eos, prompt)
        processors, criteria = [*processors, constraint.exclude], [*criteria, constraint.ends]
    starts = None if mask is None else (mask == 0).sum(1).repeat_interleave(rows, 0)
    proposer = None
    if "assistant_model" in objects:
        speculation.check_draft(step, objects["assistant_model"])
        proposer = speculation.Draft(objects["assistant_model"], options.num_assistant_tokens, prompt + new)
    elif options.prompt_lookup_num_tokens:
        proposer = speculation.Lookup(options.prompt_lookup_num_tokens, options.max_matching_ngram_size)
    return Task(
        ids=ids,
        mask=mask,
        texts=rows,
        max_new_tokens=new,
        processors=logits.processors(options, eos, prompt, starts, processors),
        criteria=stopping.criteria(eos, options.stop_strings, tokenizer, prompt, criteria),
        do_sample=options.do_sample,
        generator=None if options.seed is None else torch.Generator().manual_seed(options.seed),
        pad_token=step.pad_token,
        eos=eos,
        logprobs=options.logprobs,
        proposer=proposer,
        cache_precision=options.cache_precision,
        prompt_cache=_prompt_cache(objects.get("prompt_cache")),
    )


def _prompt_cache(value: Any) -> PromptCache | None:
    if value is not None and not isinstance(value, PromptCache):
        raise DataError(f"prompt_cache: expected a rarefy.PromptCache, got {type(value).__name__}")
    return value


def _callables(name: str, value: Any) -> list[Any]:
    """Return a caller's processors or criteria as a list; DataError if one cannot be called."""
    items = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    wrong = next((i for i in items if not callable(i)), None)
    if wrong is not None:
        raise DataError(f"{name}: expected functions of ids and scores, got {type(wrong).__name__}")
    return items
