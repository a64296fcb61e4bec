"""Time models, compiled models and decoders alternately: the work of `rarefy bench`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError, RarefyError, first_line
from rarefy.common.report import Report, three_digits
from rarefy.compiler.compile import compile
from rarefy.compiler.executor import Compiled
from rarefy.compiler.input_checks import InputSpec
from rarefy.compiler.shape_guards import MAX_SIZE
from rarefy.evaluation import profiling
from rarefy.evaluation.example_inputs import example_of, generates
from rarefy.generation.decoder import Decoder, decoder
from rarefy.model import hf
from rarefy.model.forward import split_example
from rarefy.model.image_config import image_config_of
from rarefy.pipeline import engine_evaluation
from rarefy.pipeline.engine_evaluation import decode_step

Subject = nn.Module | Compiled | Decoder


def engine_of(model: nn.Module, tokens: int, batch: int, precision: str | None = None) -> tuple[Subject | None, str]:
    """Return a model on the engine (a decoder for language models), or None and the reason why there is none.

    Costs O(weights), and some seconds for the export.
    """
    is_language_model = generates(model)
    if is_language_model and not hf.is_causal_lm(model):
        return None, f"{type(model).__name__} is an encoder-decoder model, which the engine does not support"
    try:
        plain = all(p.dtype == torch.float32 for p in model.parameters())
        net = model if plain else copy.deepcopy(model).float()
        return (
            decoder(net, precision=precision)
            if is_language_model
            else compile(net, example_of(net, tokens, batch), precision=precision)
        ), ""
    except RarefyError as error:
        return None, str(error)


def bench_models(
    subjects: Mapping[str, Subject], tokens: int, new: int, batch: int, repeats: int, progress: bool
) -> Report:
    """Return one row per model and measurement: tokens/s if all generate text, else milliseconds per forward call.

    Raises ModelError if the texts are longer than a model accepts, or if only some models generate text.
    """
    generate = all(generates_text(s) for s in subjects.values())
    for name, s in subjects.items():
        max_tokens = (
            s.max_tokens
            if isinstance(s, Decoder)
            else getattr(getattr(s, "config", None), "max_position_embeddings", None)
        )
        written = new if generate else 0
        if isinstance(max_tokens, int) and tokens + written > max_tokens:
            more = f" and {new} new ones" if generate else ""
            raise ModelError(f"{name} accepts at most {max_tokens} tokens, got {tokens}{more}")
    timed: dict[str, Any] = {}
    if generate:
        rows = _rates(subjects, tokens, new, repeats, progress)
        timed["timed"] = f"a prompt of {tokens} tokens, then {new} new ones, batch 1"
    else:
        rows = _calls(subjects, tokens, batch, repeats, progress)
    memory = {f"bytes in memory, {n}": resident_bytes(s) for n, s in subjects.items()}
    machine = profiling.machine()
    where = {"cpu": machine["cpu"], "threads": machine["threads"], "load": machine["load"]}
    printed = tuple({k: three_digits(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return Report("bench", tuple(rows), {**timed, **memory, **where}, printed_rows=printed)


def generates_text(subject: Subject) -> bool:
    """Return whether a model or decoder is timed by the text that it generates."""
    return isinstance(subject, Decoder) or (not isinstance(subject, Compiled) and generates(subject))


def _rates(subjects: Mapping[str, Any], tokens: int, new: int, repeats: int, progress: bool) -> list[Mapping[str, Any]]:
    steps = {
        n: decode_step(s, tokens + new) if isinstance(s, Decoder) else profiling.step_of(s) for n, s in subjects.items()
    }
    first = next(iter(subjects.values()))
    vocab_size = first.vocab_size if isinstance(first, Decoder) else first.config.vocab_size
    results = profiling.rates(steps, vocab_size, prompt=tokens, new=new, repeats=repeats, progress=progress)
    return [
        {"what": kind, "of": name, "unit": "tokens/s", **rates[kind]}
        for kind in ("prefill", "decode")
        for name, rates in results.items()
    ]


def _calls(
    subjects: Mapping[str, Any], tokens: int, batch: int, repeats: int, progress: bool
) -> list[Mapping[str, Any]]:
    alone = next((n for n, s in subjects.items() if isinstance(s, Decoder)), None)
    if alone is not None:
        other = next(n for n, s in subjects.items() if not isinstance(s, Decoder))
        raise ModelError(f"{alone} generates text and {other} does not: they cannot be compared")
    fixed = next((s for s in subjects.values() if isinstance(s, Compiled)), None)
    first = next(iter(subjects.values()))
    has_own_example = isinstance(first, nn.Module) and (hf.is_model(first) or image_config_of(first) is not None)
    args, kwargs = (
        split_example(example_of(first, tokens, batch))
        if has_own_example or fixed is None
        else example_for(fixed, tokens, batch)
    )
    input_ids = kwargs.get("input_ids")
    batch_size = next(len(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    size = f"batch {batch_size}" if input_ids is None else f"{len(input_ids)} x {input_ids.shape[1]} tokens"
    runs: dict[str, Callable[[], Any]] = {
        name: partial(s, *args, **_keywords_of(s, kwargs, tokens, batch)) for name, s in subjects.items()
    }
    for name, run in list(runs.items())[1:]:
        _check_runs(name, run)
    rows: list[Mapping[str, Any]] = []
    for name, t in profiling.compare(runs, repeats=repeats, progress=progress).items():
        millis = {"median": 1000 * t.median, "low": 1000 * t.low, "high": 1000 * t.high, "repeats": t.repeats}
        rows.append({"what": f"forward, {size}", "of": name, "unit": "ms", **millis})
    return rows


def _keywords_of(subject: Subject, kwargs: dict[str, Any], tokens: int, batch: int) -> dict[str, Any]:
    """Return the inputs by name: of a compiled model those that it was compiled with, such as a mask."""
    if not isinstance(subject, Compiled) or not kwargs:
        return kwargs
    own = example_for(subject, tokens, batch)[1]
    return {name: kwargs.get(name, value) for name, value in own.items()} or kwargs


def _check_runs(name: str, run: Callable[[], Any]) -> None:
    """Raise ModelError for a model that does not take the inputs of the first one."""
    try:
        with torch.no_grad():
            run()
    except RarefyError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{name} cannot be called with the inputs of the first model: compare models that take the same inputs "
            f"({first_line(error)})"
        ) from error


def example_for(compiled: Compiled, tokens: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) for a compiled model: noise, masks of ones and ids of zero.

    A dynamic size is the batch size in the first dimension, and the number of tokens in others.
    """
    noise = torch.Generator().manual_seed(0)
    known: dict[str, int] = {}
    leaves = []
    for node, want in zip(compiled.exported.inputs, compiled.input_specs):
        if not isinstance(want, InputSpec):
            leaves.append(want)
            continue
        for d, size in enumerate(want.sizes):
            if isinstance(size, str):
                min_size, max_size = compiled.exported.ranges.get(size, (1, MAX_SIZE))
                n = tokens if d else batch
                if n > max_size:
                    raise ModelError(f"{node.name} accepts at most {max_size} {'tokens' if d else 'samples'}, got {n}")
                known.setdefault(size, max(n, min_size))
        shape = [known[s] if isinstance(s, str) else s for s in want.sizes]
        full = 1 if "mask" in node.name or want.dtype == torch.bool else 0
        whole = torch.full(shape, full, dtype=want.dtype)
        leaves.append(torch.randn(shape, generator=noise).to(want.dtype) if want.dtype.is_floating_point else whole)
    return pytree.tree_unflatten(leaves, compiled.exported.in_spec)


def resident_bytes(subject: Subject) -> int:
    """Return the bytes of all weights in memory, shared ones counted once."""
    if isinstance(subject, nn.Module):
        return profiling.resident_bytes(subject)
    return engine_evaluation.resident_bytes(subject)
