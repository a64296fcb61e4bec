"""`generate` and `stream`: text from a language model on the engine, with the options of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rarefy.common.errors import DataError
from rarefy.common.renamed import renamed_parameters
from rarefy.generation.decoder import Decoder, decoder
from rarefy.generation.options import call_defaults, model_defaults
from rarefy.generation.request import check_ids, check_options, generate_ids, prompts_of, stream_steps


@renamed_parameters(values="precision")
def stream(
    model: nn.Module | Decoder,
    ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    precision: str | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence as soon as it is computed, until all sequences have ended.

    Args:
        model: a `Decoder`, or a language model, from which `decoder` makes one first (seconds to minutes).
        ids: the prompts, int64 [batch, tokens]; or `input_ids`, as tokenizers return them: `**tokenizer(text,
            return_tensors="pt")`.
        attention_mask: [batch, tokens], 0 for padding, which must be on the left, else 1; None without padding.
        precision: of a model: "fp32", "bf16" or "int8", as for `decoder`; an error where `model` is a decoder.
        **options: those of `generate` but for `num_beams` and `logprobs`.

    Yields:
        int64 [texts]; the padding token for sequences that have ended.

    Raises:
        DataError: for an unknown option, options that contradict each other or have no effect, and more tokens than the
            model has positions. It is raised when the first token is asked for.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes)).eval()
        >>> [token.shape for token in stream(model, torch.tensor([[3, 1, 4]]), max_new_tokens=2)]
        [torch.Size([1]), torch.Size([1])]
    """
    ids = prompts_of(ids, options)
    step = _decoder(model, ids, precision, options)
    for each in stream_steps(step, ids, attention_mask=attention_mask, **options):
        yield each.tokens


@renamed_parameters(values="precision")
def generate(
    model: nn.Module | Decoder,
    ids: Tensor | None = None,
    *,
    streamer: Any = None,
    details: bool = False,
    precision: str | None = None,
    **options: Any,
) -> Any:
    """Return prompts with the text that a language model writes after them.

    Args:
        model: a `Decoder`, or a language model, from which `decoder` makes one first (seconds to minutes: make it once
            to generate several texts).
        ids: the prompts, int64 [batch, tokens]; or `input_ids`, as tokenizers return them: `**tokenizer(text,
            return_tensors="pt")`.
        streamer: an object whose put(ids) is called with the prompt and with each new token [batch], and whose end() is
            called at the end, as in transformers.
        details: return a `Generation` with log probabilities and more.
        precision: of a model: "fp32", "bf16" or "int8", as for `decoder`; an error where `model` is a decoder.
        **options: `attention_mask` as for `stream`, and by the names of transformers max_new_tokens, min_new_tokens,
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty, num_beams, num_return_sequences,
            stop_strings, seed, logprobs and more, see `rarefy.generation.options.Options`. What is left out is
            what the model's `generation_config` says; `max_new_tokens` is 128 where it says nothing. Further:
            `generation_config`: one of transformers, in place of the model's.
            `tokenizer`: finds `stop_strings` and follows constraints.
            `logits_processor`, `stopping_criteria`: of transformers, or functions of ids and scores; lists of them too.
            `assistant_model`: a decoder with the same vocabulary that guesses tokens, such as a pruned copy.
            `prompt_cache`: a `PromptCache`, which lets prompts that begin as the last text did be read from there on.
            `json_schema`, `regex`, `grammar`: what each text must follow; needs llguidance, the extra `json`.

    Returns:
        int64 [texts, tokens + new tokens], texts of one prompt in a row. A sequence ends with the model's end-of-text
        token; padding follows until all have ended. With `details` a `Generation`.

    Raises:
        DataError: as `stream` does.
        ModelError: as `rarefy.decoder` does.

    Cost: a pass over all weights for each new token, or for several tokens that are guessed right. Memory: the KV
    cache, 4 bytes for each key and value of each token and layer.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes)).eval()
        >>> generate(model, torch.tensor([[3, 1, 4]]), max_new_tokens=5).shape
        torch.Size([1, 8])
    """
    ids = prompts_of(ids, options)
    step = _decoder(model, ids, precision, options)
    return generate_ids(step, ids, streamer=streamer, details=details, **options)


def _decoder(model: nn.Module | Decoder, ids: Any, precision: str | None, options: dict[str, Any]) -> Decoder:
    """Return the decoder of a call, whose options are checked before a model becomes one."""
    if isinstance(model, Decoder):
        if precision is not None:
            raise DataError("precision is fixed when the decoder is built: pass it to rarefy.compile")
        return model
    config = options.get("generation_config")
    own = model_defaults(getattr(model, "generation_config", None))[0]
    defaults = own if config is None else call_defaults(config)
    check_options({n: v for n, v in options.items() if n != "attention_mask"}, defaults)
    check_ids(ids)
    return decoder(model, precision=precision)
