"""`generate` of transformers on a decoder of the engine: a GenerationConfig as our own options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.generation.decoder import Decoder
from rarefy.generation.options import MODEL_DEFAULTS, SAMPLING, Options
from rarefy.generation.sampling import generate

GUESSES = ("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens")
CHOICES = (
    *(n for n in MODEL_DEFAULTS if n != "max_new_tokens"),
    "num_beams",
    "length_penalty",
    "early_stopping",
    "stop_strings",
)
OURS = ("max_length", "max_new_tokens", "num_return_sequences", *CHOICES, *GUESSES)
OBJECTS = ("logits_processor", "stopping_criteria")
IGNORED = (  # they change nothing here: tokens that the decoder has, how transformers stores its cache and its outputs
    "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation",
    "cache_config", "return_legacy_cache", "disable_compile", "compile_config", "transformers_version",
)  # fmt: skip
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "streamer",
    "token_type_ids",
    "tokenizer",
    "assistant_model",
    "use_model_defaults",
    *OBJECTS,
)


def generate_with(model: Any, decoder: Decoder, inputs: Any, generation_config: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return prompts with the text that a decoder writes after them.

    Args:
        model: the model of transformers, for its defaults.
        decoder: the model on the engine.
        inputs: the prompts, int64 [batch, tokens]; None if they are in `kwargs`.
        generation_config: as `generate` of transformers takes it.
        kwargs: keywords of `generate`.

    Returns:
        int64 [batch * num_return_sequences, tokens + new tokens].

    Raises:
        DataError: for options that the engine does not have.
    """
    config, rest = model._prepare_generation_config(generation_config, **kwargs)
    unknown = [n for n, v in rest.items() if v is not None and n not in (*MODEL_INPUTS, *OBJECTS)]
    changed = _changed(model, config)
    unknown += [n for n in changed if n not in (*OURS, *IGNORED)]
    if unknown:
        raise DataError(
            f"generate on the engine has no {', '.join(unknown)}: leave it out, or use the model in transformers"
        )
    ids = rest.get("input_ids") if inputs is None else inputs
    if ids is None:
        raise DataError("generate needs a prompt: input_ids, int64 [batch, tokens]")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        form = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(f"input_ids: expected int64 [batch, tokens], got {form}")
    mask, copies = rest.get("attention_mask"), config.num_return_sequences or 1
    if copies > 1 and not config.do_sample and (config.num_beams or 1) == 1:
        raise DataError(f"num_return_sequences={copies} needs do_sample=True: the most likely text is one text")
    length = config.max_new_tokens or config.max_length - ids.shape[1]
    if length < 1:
        raise DataError(
            f"the prompt has {ids.shape[1]} tokens, and max_length is {config.max_length}: pass max_new_tokens"
        )
    with torch.no_grad():
        return generate(
            _with_tokens(decoder, config),
            ids,
            max_new_tokens=length,
            attention_mask=mask,
            streamer=rest.get("streamer"),
            num_return_sequences=copies,
            **{n: rest[n] for n in OBJECTS if rest.get(n)},
            **({"tokenizer": rest.get("tokenizer")} if config.stop_strings else {}),
            **_draft(rest.get("assistant_model")),
            **{n: changed[n] for n in GUESSES if n in changed},
            **_choices(config),
        )


def _draft(model: Any) -> dict[str, Any]:
    """Return the option of our `generate` for the model that guesses tokens, {} without one."""
    if model is None:
        return {}
    draft = getattr(model, "engine", model)
    if not isinstance(draft, Decoder):
        raise DataError(
            f"assistant_model: expected a model on the engine, got {type(model).__name__}: pass it to "
            "rarefy.integrations.transformers.compile first"
        )
    return {"assistant_model": draft}


def _changed(model: Any, config: Any) -> dict[str, Any]:
    """Return the options of a config that are not transformers' defaults."""
    plain = type(config)()
    plain.update(**model.generation_config._get_default_generation_params(), defaults_only=True)
    defaults = plain.to_dict()
    names = [n for n in config.to_dict() if not n.startswith("_")]
    return {n: getattr(config, n) for n in names if getattr(config, n) not in (None, False, defaults.get(n))}


def _choices(config: Any) -> dict[str, Any]:
    """Return the options of a config that say how tokens are chosen; those of random choices only with do_sample."""
    values = {n: getattr(config, n, None) for n in CHOICES}
    values = {n: v for n, v in values.items() if v is not None and v != getattr(Options, n)}
    return values if config.do_sample else {n: v for n, v in values.items() if n not in SAMPLING}


def _with_tokens(decoder: Decoder, config: Any) -> Decoder:
    """Return the decoder with a config's end and padding tokens."""
    eos, pad = config.eos_token_id, config.pad_token_id
    eos_tokens = () if eos is None else tuple(int(e) for e in torch.as_tensor(eos).flatten())
    pad = decoder.pad_token if pad is None else int(torch.as_tensor(pad))
    numbers = decoder.vocab_size, decoder.max_tokens, eos_tokens, pad
    return Decoder(decoder.compiled, *numbers, cache_precision=decoder.cache_precision)
