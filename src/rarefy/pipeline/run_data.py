"""The data of a run: what was passed, or what the recipe names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.common.errors import DataError, nearest
from rarefy.data import sources
from rarefy.model import hf
from rarefy.model.forward import check_batches
from rarefy.prune.allocation import NEEDS_DATA
from rarefy.prune.scores import SCORES
from rarefy.recipe import parser as recipes
from rarefy.structured.importance import UNIT_SCORES
from rarefy.train.sparsity_config import SecondOrder


class Given:
    """Batches by purpose, from what was passed or from what the recipe names; each read once."""

    def __init__(self, plan: recipes.Recipe, data: Any, tokenizer: Any, base: Path | None):
        self.plan, self.tokenizer, self.base = plan, tokenizer, base
        self.before: nn.Module | None = None  # the model before the first stage, where one needs it
        known = {"calibrate", "train", "validate", "evaluate"}
        if isinstance(data, Mapping):
            wrong = set(data) - known
            if wrong:
                near = nearest(min(wrong), known)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise DataError(f"data has {', '.join(sorted(wrong))}; known are {', '.join(sorted(known))}{hint}")
            for purpose, batches in data.items():
                if not callable(batches):
                    check_batches(batches, f"data[{purpose!r}]")
            self.found = {k: _reusable(v) for k, v in data.items()}
        else:
            if data is not None and not callable(data):
                check_batches(data)
            self.found = {} if data is None else {k: _reusable(data) for k in ("calibrate", "train")}

    def has(self, purpose: str) -> bool:
        """Return whether there is data for a purpose."""
        return purpose in self.found or self._named(purpose)[0] is not None

    def batches(self, purpose: str) -> Any:
        if purpose not in self.found:
            source, settings = self._named(purpose)
            if source is None:
                raise DataError(
                    f"no {purpose} data: name it in the recipe, or pass data={{{purpose!r}: batches}} (shell: --data)"
                )
            seed = getattr(settings, "seed", 0)
            samples = getattr(
                settings, {"train": "train_samples", "validate": "validate_samples"}.get(purpose, "samples")
            )
            take = sources.Take(samples=samples, tokens=settings.tokens, batch=settings.batch, seed=seed)
            self.found[purpose] = sources.batches(source, take, tokenizer=self.tokenizer, base=self.base, what=purpose)
        return self.found[purpose]

    def _named(self, purpose: str) -> tuple[str | None, Any]:
        if purpose == "evaluate":
            e = self.plan.evaluate
            return (e.data, e) if e else (None, None)
        d = self.plan.data
        return (getattr(d, purpose), d) if d else (None, None)


def _reusable(batches: Any) -> Any:
    """Batches are gone through more than once: an iterator, which cannot be, becomes a list."""
    return list(batches) if hasattr(batches, "__next__") else batches


def with_labels(model: nn.Module, batches: Iterable[Any], use: str | None) -> Iterable[Any]:
    """Give token batches their labels where a gradient is wanted: the next token of the text itself."""
    wants = use == "train" or (use is not None and "gradient" in SCORES[use].needs)
    for batch in batches:
        text = hasattr(batch, "keys") and "input_ids" in batch and "labels" not in batch
        if wants and text and hf.is_causal_lm(model):
            labels, mask = batch["input_ids"], batch.get("attention_mask")
            batch = {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}
        yield batch


class Labelled:
    """Batches that get their labels on the way, so that a loader that shuffles shuffles each epoch."""

    def __init__(self, model: nn.Module, batches: Any, use: str | None):
        self.model, self.use = model, use
        self.batches = batches if hasattr(batches, "__len__") else list(batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(with_labels(self.model, self.batches, self.use))

    def __len__(self) -> int:
        return len(self.batches)


def calibrates(prune: Any) -> bool:
    """Return whether a stage reads calibration data: its solver does, its score, or its repair."""
    if isinstance(prune, recipes.Train):
        return calibrates(prune.prune) or (prune.quantize is not None and calibrates(prune.quantize))
    if isinstance(prune, recipes.Cut):
        return bool(prune.repair or needs_of(prune))
    if isinstance(prune, recipes.Quantize):
        return prune.solver != "rtn" or prune.activations == "int8-static" or prune.smooth is not None
    if isinstance(prune, recipes.Factorize | recipes.Share):
        return bool(prune.whiten if isinstance(prune, recipes.Factorize) else prune.weigh)
    if isinstance(prune, SecondOrder):
        return True
    score = getattr(prune, "score", None)
    reads = getattr(prune, "solver", None) is not None or getattr(prune, "allocate", None) in NEEDS_DATA
    return reads or (score is not None and bool(SCORES[score].needs))


def needs_of(s: recipes.Cut) -> str:
    """Return what the score of a cut needs of data: "gradient" (a loss), "inputs", or nothing."""
    if s.whole:
        return "gradient" if s.score == "loss" else ""
    return UNIT_SCORES[s.score or "magnitude"].needs
