"""The command profile."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.shared import (
    Checkpoint,
    InputShape,
    Json,
    ModelPath,
    Offline,
    Precision,
    Quiet,
    RandomWeights,
    Threads,
)
from rarefy.common.errors import ModelError, RecipeError


def profile(
    model: ModelPath,
    precision: Precision = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size, by default 1.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Sequence length, by default 128; for language models the length of the prompt."),
    ] = None,
    input_shape: InputShape = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    offline: Offline = False,
    rows: Annotated[
        int, typer.Option(min=0, help="Number of steps to print, the most expensive first. JSON has all of them.")
    ] = 15,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed calls.")] = 20,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where the time of a model on the engine goes: each operator, each layer, and what limits it.

    The first table sums by operator, the second lists the most expensive steps. Their times add up to the time of a
    call. `of ceiling %` compares a step with what this machine reaches at best, which is measured: multiply-adds in the
    step's precision, or bytes read. A low percentage in an expensive row is where a faster kernel would help. Times
    grow when other programs run: look at the load.

    A language model is profiled on a prompt and on one token after it. A folder of `rarefy compile` is profiled as it
    is, any other model is compiled first.

    rarefy profile minilm --precision int8 --batch 16

    rarefy profile smollm2-135m --tokens 256 --rows 5
    """
    with shared.threads(threads):
        net, tokenizer = shared.load_any(
            shared.source(model, checkpoint, random_weights, offline, quiet), input_shape, batch, tokens
        )
        kind = shared.kind_of(net)
        if kind != "model" and precision is not None:
            raise RecipeError(f"--precision has no effect: {model} holds a {kind}, which is profiled as it is")
        profiles = _profiles(net, tokenizer, precision, batch, tokens, repeats)
    if as_json:
        print(json.dumps({name: p.to_dict() for name, p in profiles.items()}, indent=1))
    elif not quiet:
        print("\n\n".join(f"{name}: {replace(p, printed_rows=rows)}" for name, p in profiles.items()))


def _profiles(
    net: Any, tokenizer: Any, precision: str | None, batch: int | None, tokens: int | None, repeats: int
) -> dict[str, Any]:
    """Return the profiles of a model, a compiled model or a decoder, by what was called."""
    from rarefy.cli.benchmark import example_for
    from rarefy.cli.inference_commands import example_input
    from rarefy.compiler.compile import compile
    from rarefy.generation.decoder import decoder
    from rarefy.model import hf
    from rarefy.model.forward import split_example

    kind = shared.kind_of(net)
    if kind == "model" and hf.is_causal_lm(net):
        net, kind = decoder(net.float(), precision=precision), "decoder"
    if kind == "decoder":
        return _decoder_profiles(net, batch or 1, tokens or 128, repeats)
    if kind == "compiled model":
        args, kwargs = example_for(net, tokens or 128, batch or 1)
        return {"call": net.profile(*args, repeats=repeats, **kwargs)}
    net = shared.in_fp32(net)
    example = example_input(net, tokens, batch, tokenizer, default_batch=1)
    args, kwargs = split_example(example)
    return {"call": compile(net, example, precision=precision).profile(*args, repeats=repeats, **kwargs)}


def _decoder_profiles(decoder: Any, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Return the profiles of a prompt, and of one token after it."""
    import torch

    if decoder.max_tokens is not None and tokens + 1 > decoder.max_tokens:
        raise ModelError(f"the model accepts at most {decoder.max_tokens} tokens, got {tokens} and a new one")
    ids = torch.randint(0, decoder.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    prompt = decoder.profile(ids, repeats=repeats)
    cache = decoder.cache(batch, tokens + 1)
    decoder(ids, cache, last=True)
    token = decoder.profile(ids[:, :1], cache, repeats=repeats)
    return {f"prompt of {batch} x {tokens} tokens": prompt, "next token": token}
