"""Evaluate the result of a recipe on the engine: quality, speed and sample text of the model that is timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import RecipeError
from rarefy.compiler.compile import compile
from rarefy.compiler.executor import Compiled
from rarefy.evaluation.profiling import Step, rates, step_of
from rarefy.generation.decoder import Decoder, decoder
from rarefy.generation.sampling import generate
from rarefy.generation.tokenization import encode_prompt
from rarefy.model import hf
from rarefy.model.forward import evaluating, without_targets
from rarefy.recipe.schema import Recipe
from rarefy.runtime.packed_formats import Dense, QuantizedPanels

MAX_SAMPLE_TOKENS = 40
SENTENCE_ENDS = (".", "!", "?")


class EngineModule(nn.Module):
    """A decoder or compiled model behind the interface of `nn.Module`, so that metrics and timers can call it.

    A decoder returns what a language model of transformers does: an object with `logits`, and with `loss` where labels
    are given.

    Args:
        engine: what `rarefy.decoder` or `rarefy.compile` returned.
    """

    def __init__(self, engine: Decoder | Compiled):
        super().__init__()
        self.engine = engine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.engine, Compiled):
            kwargs.pop("labels", None)
            return self.engine(*args, **kwargs)
        return self._output(*args, **kwargs)

    @property
    def is_decoder(self) -> bool:
        """Return whether outputs predict the next token."""
        return not isinstance(self.engine, Compiled)

    @property
    def device(self) -> torch.device:
        """Return the device of inputs and outputs, as a model of transformers does."""
        return torch.device("cpu")

    def _output(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> Any:
        """Return the logits [batch, tokens, vocabulary], and the mean loss of the next tokens that are labels."""
        from transformers.modeling_outputs import CausalLMOutput

        logits, loss = self._logits(input_ids, attention_mask), None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def _logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the logits of texts that are padded on one side or not at all."""
        assert isinstance(self.engine, Decoder)
        if attention_mask is None or bool((attention_mask.diff(dim=1) <= 0).all()):
            attention_mask = None  # attention is causal: padding on the right changes no real token
            if self.engine.cache_precision == "fp32":
                return self.engine(input_ids)
        cache = self.engine.cache(input_ids.shape[0], input_ids.shape[1], attention_mask)
        return self.engine(input_ids, cache)


def engine_of(model: nn.Module, recipe: Recipe, held_out: Any) -> EngineModule:
    """Return the compressed model on the engine, as `evaluate.engine` asks for.

    Args:
        model: the compressed model, masks folded; a copy in fp32 is compiled where its parameters are not.
        recipe: the recipe.
        held_out: the evaluation batches; the first one is the example for `rarefy.compile`.

    Raises:
        ModelError: for a model that the engine cannot run.
    """
    assert recipe.evaluate
    fp32 = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    model = model if fp32 else copy.deepcopy(model).float()
    precision = recipe.evaluate.precision
    with evaluating(model):
        if hf.is_causal_lm(model):
            return EngineModule(decoder(model, precision=precision, max_error=math.inf))  # judged on data
        example = without_targets(next(iter(held_out)))
        return EngineModule(compile(model, example, precision=precision, max_error=math.inf))


def resident_bytes(engine: Decoder | Compiled) -> int:
    """Return the bytes that an engine's weights hold in memory, shared ones once."""
    compiled = engine.compiled if isinstance(engine, Decoder) else engine
    return compiled.weight_bytes()


def skips_zeros(engine: Decoder | Compiled) -> bool:
    """Return whether any kernel of an engine leaves out zeros of its weight."""
    compiled = engine.compiled if isinstance(engine, Decoder) else engine
    return any(not isinstance(k.held[0], QuantizedPanels | Dense) for k in compiled.kernels.values())


def decode_step(engine: Decoder, capacity: int) -> Step:
    """Return a decoder as a step that `profiling.rates` times.

    Args:
        engine: the decoder.
        capacity: tokens that its cache holds.
    """

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache = engine.cache(len(ids), capacity) if state is None else state
        return engine(ids, cache, last=True), cache

    return step


def token_rates(
    models: Mapping[str, nn.Module], *, prompt: int, new: int, repeats: int, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Return tokens per second of causal language models, of transformers and on the engine, timed alternately.

    Args:
        models: models by name, of transformers or `EngineModule`.
        prompt: tokens of the prompt (prefill).
        new: tokens that are decoded, batch 1.
        repeats: rounds after one of warm-up.
        progress: whether to draw a progress bar.

    Returns:
        What `profiling.rates` returns.
    """
    steps: dict[str, Step] = {}
    for name, model in models.items():
        engine = model.engine if isinstance(model, EngineModule) else None
        steps[name] = decode_step(engine, prompt + new) if isinstance(engine, Decoder) else step_of(model)
    vocabulary: int = next(m for m in models.values() if not isinstance(m, EngineModule)).config.vocab_size  # type: ignore
    return rates(steps, vocabulary, prompt=prompt, new=new, repeats=repeats, progress=progress)


def check_sample(recipe: Recipe, tokenizer: Any) -> None:
    """Raise RecipeError where sample text is asked for and there is no tokenizer."""
    text = recipe.evaluate.decode.text if recipe.evaluate and recipe.evaluate.decode else None
    if text is not None and tokenizer is None:
        raise RecipeError("evaluate.decode.text needs a tokenizer: pass tokenizer=, or leave text out")


def sample_of(models: Mapping[str, nn.Module], tokenizer: Any, prompt: str) -> dict[str, str]:
    """Return one sentence that each model writes after the prompt, by greedy decoding.

    Args:
        models: models by name, of transformers or `EngineModule`.
        tokenizer: the models' tokenizer.
        prompt: the text that is continued.

    Returns:
        The texts by the models' names, with the prompt.
    """
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    texts = {"prompt": prompt}
    options: dict[str, Any] = {"max_new_tokens": MAX_SAMPLE_TOKENS, "do_sample": False}
    for name, model in models.items():
        if isinstance(model, EngineModule):
            tokens = generate(model.engine, ids, **options)  # type: ignore[arg-type]
        else:
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
        text = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        texts[name] = first_sentence(text)
    return texts


def first_sentence(text: str) -> str:
    """Return a text up to the end of its first sentence, on one line.

    >>> first_sentence(" a place. It is far")
    'a place.'
    """
    line = " ".join(text.split())
    ends = [i for end in SENTENCE_ENDS if (i := f"{line} ".find(f"{end} ")) >= 0]
    return line[: min(ends) + 1] if ends else line
