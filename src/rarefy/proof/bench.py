"""`rarefy bench`: time one or two models in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import ModelError
from rarefy.model import hf
from rarefy.model.stats import call
from rarefy.proof import measure
from rarefy.proof.report import Report


def bench_models(
    models: Mapping[str, nn.Module], tokens: int, new: int, batch: int, repeats: int, progress: bool
) -> Report:
    """Return a row a model and measurement: tokens a second where it can generate, else milliseconds a forward call."""
    rows = []
    for name, model in models.items():
        config = getattr(model, "config", None)
        most = getattr(config, "max_position_embeddings", None)
        if isinstance(most, int) and tokens + new > most:
            raise ModelError(f"{name} reads at most {most} tokens; asked for {tokens} and {new} new ones")
    if all(generates(m) for m in models.values()):
        found = measure.decode_and_prefill(models, prompt=tokens, new=new, repeats=repeats, progress=progress)
        for kind in ("prefill", "decode"):
            rows += [{"what": kind, "of": name, "unit": "tokens/s", **rates[kind]} for name, rates in found.items()]
    else:
        example = example_of(next(iter(models.values())), tokens, batch)
        runs = {name: (lambda m=m: call(m, example)) for name, m in models.items()}
        for name, t in measure.compare(runs, repeats=repeats, progress=progress).items():
            millis = {"median": 1000 * t.median, "low": 1000 * t.low, "high": 1000 * t.high, "repeats": t.repeats}
            rows.append({"what": f"forward, batch {batch}", "of": name, "unit": "ms", **millis})
    memory = {f"bytes in memory, {n}": measure.resident_bytes(m) for n, m in models.items()}
    here = measure.machine()
    return Report(
        "bench", tuple(rows), {**memory, "cpu": here["cpu"], "threads": here["threads"], "load": here["load"]}
    )


def generates(model: Any) -> bool:
    """Return whether a model writes text."""
    return hasattr(model, "generate") and model.can_generate()


def example_of(model: nn.Module, tokens: int, batch: int) -> dict[str, Tensor]:
    """Return what a model with a Hugging Face config can be called with: noise, always the same."""
    if not hf.is_model(model):
        raise ModelError("bench needs a model with a Hugging Face config")
    config: Any = model.config
    noise = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        shape = (batch, getattr(config, "num_channels", 3), size, size)
        return {"pixel_values": torch.randn(shape, generator=noise)}
    ids = torch.randint(0, config.vocab_size, (batch, tokens), generator=noise)
    return {"input_ids": ids}
