"""`rarefy bench`: models, what the engine makes of them, compiled models and decoders, timed in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError, RarefyError
from rarefy.common.report import Report
from rarefy.compiler.compile import compile
from rarefy.compiler.executor import Compiled, InputSpec
from rarefy.compiler.export import MAX_SIZE
from rarefy.evaluation import profiling
from rarefy.evaluation.example_inputs import example_of, generates
from rarefy.generation.decoder import Decoder, decoder
from rarefy.model import hf
from rarefy.pipeline import engine_evaluation
from rarefy.pipeline.engine_evaluation import decode_step

Subject = nn.Module | Compiled | Decoder


def engine_of(model: nn.Module, tokens: int, batch: int, precision: str | None = None) -> tuple[Subject | None, str]:
    """Return what the engine makes of a model, a decoder of one that writes text, or None and why there is nothing.
    O(weights), and seconds for the export."""
    writes = generates(model)
    if writes and not hf.is_causal_lm(model):
        return None, f"{type(model).__name__} writes with an encoder, for which the engine has no cache"
    try:
        plain = all(p.dtype == torch.float32 for p in model.parameters())
        net = model if plain else copy.deepcopy(model).float()
        return (
            decoder(net, precision=precision)
            if writes
            else compile(net, example_of(net, tokens, batch), precision=precision)
        ), ""
    except RarefyError as error:
        return None, str(error)


def bench_models(
    subjects: Mapping[str, Subject], tokens: int, new: int, batch: int, repeats: int, progress: bool
) -> Report:
    """Return a row a subject and measurement: tokens a second where all write text, else milliseconds a forward call.

    ModelError where a text would be longer than one can read, or where one writes text and another does not.
    """
    for name, s in subjects.items():
        most = (
            s.max_tokens
            if isinstance(s, Decoder)
            else getattr(getattr(s, "config", None), "max_position_embeddings", None)
        )
        if isinstance(most, int) and tokens + new > most:
            raise ModelError(f"{name} reads at most {most} tokens; asked for {tokens} and {new} new ones")
    if all(_writes(s) for s in subjects.values()):
        rows = _rates(subjects, tokens, new, repeats, progress)
    else:
        rows = _calls(subjects, tokens, batch, repeats, progress)
    memory = {f"bytes in memory, {n}": resident_bytes(s) for n, s in subjects.items()}
    here = profiling.machine()
    return Report(
        "bench", tuple(rows), {**memory, "cpu": here["cpu"], "threads": here["threads"], "load": here["load"]}
    )


def _writes(subject: Subject) -> bool:
    return isinstance(subject, Decoder) or (not isinstance(subject, Compiled) and generates(subject))


def _rates(subjects: Mapping[str, Any], tokens: int, new: int, repeats: int, progress: bool) -> list[Mapping[str, Any]]:
    steps = {
        n: decode_step(s, tokens + new) if isinstance(s, Decoder) else profiling.step_of(s) for n, s in subjects.items()
    }
    first = next(iter(subjects.values()))
    many = first.vocab_size if isinstance(first, Decoder) else first.config.vocab_size
    found = profiling.rates(steps, many, prompt=tokens, new=new, repeats=repeats, progress=progress)
    return [
        {"what": kind, "of": name, "unit": "tokens/s", **rates[kind]}
        for kind in ("prefill", "decode")
        for name, rates in found.items()
    ]


def _calls(
    subjects: Mapping[str, Any], tokens: int, batch: int, repeats: int, progress: bool
) -> list[Mapping[str, Any]]:
    alone = next((n for n, s in subjects.items() if isinstance(s, Decoder)), None)
    if alone is not None:
        other = next(n for n, s in subjects.items() if not isinstance(s, Decoder))
        raise ModelError(f"{alone} writes text, and {other} does not: they cannot be timed in turns")
    fixed = next((s for s in subjects.values() if isinstance(s, Compiled)), None)
    first = next(iter(subjects.values()))
    given = isinstance(first, nn.Module) and hf.is_model(first)
    args, kwargs = (
        ((), example_of(first, tokens, batch)) if given or fixed is None else example_for(fixed, tokens, batch)
    )
    many = next(len(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    runs: dict[str, Callable[[], Any]] = {name: partial(s, *args, **kwargs) for name, s in subjects.items()}
    rows: list[Mapping[str, Any]] = []
    for name, t in profiling.compare(runs, repeats=repeats, progress=progress).items():
        millis = {"median": 1000 * t.median, "low": 1000 * t.low, "high": 1000 * t.high, "repeats": t.repeats}
        rows.append({"what": f"forward, batch {many}", "of": name, "unit": "ms", **millis})
    return rows


def example_for(made: Compiled, tokens: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments and keywords that a compiled model can be called with: noise, masks of ones, ids of zero; open
    sizes are the batch where they come first, else tokens."""
    noise = torch.Generator().manual_seed(0)
    known: dict[str, int] = {}
    leaves = []
    for node, want in zip(made.exported.inputs, made.input_specs):
        if not isinstance(want, InputSpec):
            leaves.append(want)
            continue
        for d, size in enumerate(want.sizes):
            if isinstance(size, str):
                least, most = made.exported.ranges.get(size, (1, MAX_SIZE))
                n = tokens if d else batch
                if n > most:
                    raise ModelError(f"{node.name} has room for {most} {'tokens' if d else 'samples'}, asked for {n}")
                known.setdefault(size, max(n, least))
        shape = [known[s] if isinstance(s, str) else s for s in want.sizes]
        full = 1 if "mask" in node.name or want.dtype == torch.bool else 0
        whole = torch.full(shape, full, dtype=want.dtype)
        leaves.append(torch.randn(shape, generator=noise).to(want.dtype) if want.dtype.is_floating_point else whole)
    return pytree.tree_unflatten(leaves, made.exported.in_spec)


def resident_bytes(subject: Subject) -> int:
    """Return the bytes that weights hold in memory, shared ones once."""
    if isinstance(subject, nn.Module):
        return profiling.resident_bytes(subject)
    return engine_evaluation.resident_bytes(subject)
