"""The options of text generation. Names and meanings are those of transformers, unless a docstring says otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError, unknown
from rarefy.generation.kv_cache import check_cache_precision

MAX_SEED = (1 << 63) - 1
MAX_NEW_TOKENS = 128  # where neither the caller nor the model says how many
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")  # they have an effect on random draws alone
MODEL_DEFAULTS = (  # what a model's generation_config may set
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "max_new_tokens",
    "suppress_tokens",
)
CALL_DEFAULTS = (  # and what one that is passed to a call may set besides
    *MODEL_DEFAULTS,
    "eos_token_id",
    "stop_strings",
    "num_return_sequences",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "prompt_lookup_num_tokens",
)
# what a generation_config may set that changes texts, that is not supported, and its neutral values
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "bad_words_ids": (),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "begin_suppress_tokens": (),
    "exponential_decay_length_penalty": (),
    "num_beams": (1,),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Options:
    """How text is generated. A model's generation_config has other defaults.

    Attributes:
        max_new_tokens: most tokens to generate; None for 128, or as many as the model has positions for.
        min_new_tokens: tokens before which no text ends by a token that ends texts.
        do_sample: draw by probability; False takes the most likely token.
        temperature: scores are divided by it, above 0.
        top_k: draw among the k most likely tokens; 0 for all.
        top_p: draw among the most likely tokens that together have this probability, above 0, at most 1.
        min_p: draw among tokens with at least this share of the most likely token's probability, 0 to 1.
        repetition_penalty: positive scores of tokens that occurred, in the prompt too, are divided by it, negative ones
            multiplied.
        presence_penalty: subtracted from the scores of tokens that were generated before, as in OpenAI's interface.
        frequency_penalty: the same for each time that they were generated.
        no_repeat_ngram_size: so many tokens in a row occur only once; 0 for no limit.
        suppress_tokens: tokens that are never chosen.
        eos_token_id: tokens that end a text in place of the model's own; an empty list for none.
        stop_tokens: more tokens that end a text.
        stop_strings: strings that end a text as soon as it contains them.
        num_return_sequences: texts for each prompt.
        num_beams: texts that a beam search extends at once; 1 for none.
        length_penalty: of a beam search: sums of log probabilities are divided by length to this power.
        early_stopping: of a beam search: True ends it with `num_beams` whole texts, "never" when no text can become
            better, False when that is unlikely.
        logprobs: return the log probabilities of so many most likely tokens beside those of the chosen ones; None for
            neither.
        prompt_lookup_num_tokens: guess up to so many next tokens from an earlier place with the same last tokens; 0 for
            no guesses.
        max_matching_ngram_size: largest number of last tokens that are looked up for that.
        num_assistant_tokens: tokens that an `assistant_model` guesses at once.
        seed: of the draws.
        cache_precision: of the KV cache, "fp32" or "int8"; None for the decoder's. An `assistant_model` has its own.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] | None = None
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    logprobs: int | None = None
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 5
    seed: int | None = None
    cache_precision: str | None = None

    def __post_init__(self) -> None:
        for name, low in INTEGERS.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low, DataError)
        if self.seed is not None and self.seed > MAX_SEED:
            raise DataError(f"seed: expected at most 2^63 - 1, got {self.seed}")
        for name, (low, high, expected) in NUMBERS.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low < value <= high:
                hint = "; do_sample=False takes the most likely token" if name == "temperature" else ""
                raise DataError(f"{name}: expected {expected}, got {value}{hint}")
        if not isinstance(self.do_sample, bool):
            raise DataError(f"do_sample: expected True or False, got {self.do_sample!r}")
        if self.cache_precision is not None:
            check_cache_precision(self.cache_precision)
        if self.early_stopping not in (True, False, "never"):
            raise DataError(f"early_stopping: expected True, False or 'never', got {self.early_stopping!r}")
        if not all(isinstance(s, str) and s for s in self.stop_strings):
            raise DataError(f"stop_strings: expected strings that are not empty, got {list(self.stop_strings)}")


TINY = 5e-324  # the smallest number above 0
NUMBERS = {  # above the first number, up to the second
    "temperature": (0.0, math.inf, "a number above 0"),
    "top_p": (0.0, 1.0, "a probability above 0, at most 1"),
    "min_p": (-TINY, 1.0, "a probability from 0 to 1"),
    "repetition_penalty": (0.0, math.inf, "a number above 0"),
    "presence_penalty": (-math.inf, math.inf, "a number"),
    "frequency_penalty": (-math.inf, math.inf, "a number"),
    "length_penalty": (-math.inf, math.inf, "a number"),
}
INTEGERS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "logprobs": 0,
    "prompt_lookup_num_tokens": 0,
    "max_matching_ngram_size": 1,
    "num_assistant_tokens": 1,
    "seed": 0,
}
LISTS = ("suppress_tokens", "eos_token_id", "stop_tokens", "stop_strings")
NAMES = tuple(f.name for f in fields(Options))


def resolve(options: Mapping[str, Any], defaults: Mapping[str, Any] = {}) -> Options:
    """Return the options of a call: its own, else the model's, else those that change nothing.

    Args:
        options: of the call; None stands for the default.
        defaults: of the model, see `model_defaults`.

    Raises:
        DataError: if a name is unknown, a value is out of range, or an option has no effect beside the others.
    """
    explicit = {n: _plain(n, v) for n, v in options.items() if v is not None}
    wrong = next((n for n in explicit if n not in NAMES), None)
    if wrong is not None:
        raise DataError(unknown("option", wrong, NAMES))
    resolved = Options(**{**defaults, **explicit})
    unused = [n for n in SAMPLING if n in explicit and explicit[n] != getattr(Options, n, None)]
    if unused and not resolved.do_sample:
        raise DataError(f"{unused[0]} has no effect on the most likely token: pass do_sample=True")
    low, high = explicit.get("min_new_tokens", 0), resolved.max_new_tokens or MAX_NEW_TOKENS
    if low > high:
        raise DataError(f"min_new_tokens: expected at most max_new_tokens, which is {high}, got {low}")
    _check_beams(resolved, explicit)
    return resolved


def _check_beams(options: Options, explicit: Mapping[str, Any]) -> None:
    """Raise DataError if options contradict the number of beams."""
    beams, texts = options.num_beams, options.num_return_sequences
    for name in ("length_penalty", "early_stopping"):
        if name in explicit and beams == 1:
            raise DataError(f"{name} has no effect without a beam search: pass num_beams=4, for example")
    if beams > 1 and texts > beams:
        raise DataError(f"num_return_sequences: a search of {beams} beams returns at most {beams} texts, got {texts}")
    if beams == 1 and texts > 1 and not options.do_sample:
        raise DataError(
            f"num_return_sequences={texts} would return the same text {texts} times: pass do_sample=True, or num_beams"
        )
    if beams > 1 and options.logprobs is not None:
        raise DataError("logprobs has no effect on a beam search: leave one of the two out")
    if beams > 1 and options.prompt_lookup_num_tokens:
        raise DataError("prompt_lookup_num_tokens has no effect on a beam search: leave one of the two out")


def _plain(name: str, value: Any) -> Any:
    """Return a list as a tuple, and a single token or string as a tuple of one."""
    if name not in LISTS:
        return value
    one = str if name == "stop_strings" else int
    items = (value,) if isinstance(value, one) else tuple(value) if isinstance(value, Iterable) else None
    if items is None or (one is int and not all(isinstance(i, int) and i >= 0 for i in items)):
        expected = "a string or a list of them" if one is str else "a token id or a list of them"
        raise DataError(f"{name}: expected {expected}, got {value!r}")
    return items


def checked_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's defaults, lists as tuples; DataError unless they are of MODEL_DEFAULTS and in their ranges."""
    wrong = next((n for n in values if n not in MODEL_DEFAULTS), None)
    if wrong is not None:
        raise DataError(unknown("default of text generation", wrong, MODEL_DEFAULTS))
    defaults = {n: _plain(n, v) for n, v in values.items()}
    Options(**defaults)
    return defaults


def call_defaults(config: Any) -> dict[str, Any]:
    """Return the options that a `generation_config` sets which is passed to a call; DataError for what it cannot set.

    Args:
        config: one of transformers.
    """
    if not hasattr(config, "max_new_tokens"):
        raise DataError(f"generation_config: expected one of transformers, got {type(config).__name__}")
    defaults, notes = model_defaults(config, CALL_DEFAULTS)
    if notes:
        raise DataError(notes[0])
    if getattr(config, "max_length", None) not in (None, 20) and "max_new_tokens" not in defaults:  # 20: its default
        raise DataError("generation_config: max_length is not supported and has no effect: set max_new_tokens")
    return defaults


def model_defaults(config: Any, names: Iterable[str] = MODEL_DEFAULTS) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the options that a `generation_config` of transformers sets, and notes on what of it has no effect.

    Args:
        config: an object with attributes of these names; None and missing ones set nothing.
        names: of the options that it may set.
    """
    defaults: dict[str, Any] = {}
    notes = []
    for name in names:
        value = getattr(config, name, None)
        if value is None or value == getattr(Options, name):
            continue
        try:
            value = _plain(name, value)
            Options(**{name: value})
            defaults[name] = value
        except DataError as error:
            notes.append(f"generation_config: {error}; it has no effect")
    if defaults.get("do_sample") and getattr(config, "temperature", None) == 0:
        del defaults["do_sample"]  # servers read a temperature of 0 as greedy decoding
    for name, neutral in UNSUPPORTED.items():
        value = getattr(config, name, None)
        if name not in names and value is not None and value not in neutral:
            notes.append(f"generation_config: {name} is not supported and has no effect")
    return defaults, tuple(notes)
