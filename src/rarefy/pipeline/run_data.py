"""The data of a run, from arguments or from the recipe, and the context that each stage receives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.common.errors import DataError, nearest
from rarefy.data import sources
from rarefy.data.text_pairs import pair_batches
from rarefy.model import hf
from rarefy.model.forward import check_batches
from rarefy.model.image_config import ImageConfig
from rarefy.model.losses import Loss
from rarefy.prune.allocation import NEEDS_DATA
from rarefy.prune.scores import SCORES
from rarefy.quantization.config import QuantizeOptions
from rarefy.recipe.schema import CutStage, FactorizeStage, Recipe, ShareStage, TrainStage
from rarefy.structured.importance import UNIT_SCORES
from rarefy.train.sparsity_config import SecondOrder

PURPOSES = {"calibrate", "train", "validate", "evaluate"}


class RunData:
    """Batches by purpose, from arguments or from the recipe; each source is read once."""

    def __init__(
        self,
        recipe: Recipe,
        data: Any,
        tokenizer: Any = None,
        base: Path | None = None,
        images: ImageConfig | None = None,
    ):
        self.recipe, self.tokenizer, self.base = recipe, tokenizer, base
        self.images = images or ImageConfig()
        if isinstance(data, Mapping):
            wrong = set(data) - PURPOSES
            if wrong:
                names = sorted(map(str, wrong))
                near = nearest(names[0], PURPOSES)
                hint = f" (did you mean {near[0]!r}?)" if near else "; a single batch goes into a list, [batch]"
                raise DataError(f"data has {', '.join(names)}; known are {', '.join(sorted(PURPOSES))}{hint}")
            for purpose, batches in data.items():
                if not callable(batches):
                    check_batches(batches, f"data[{purpose!r}]")
            self._batches = {k: _reusable(v) for k, v in data.items()}
        else:
            if data is not None and not callable(data):
                check_batches(data)
            self._batches = {} if data is None else {k: _reusable(data) for k in ("calibrate", "train")}

    def has(self, purpose: str) -> bool:
        """Return whether there is data for a purpose."""
        return purpose in self._batches or self._named(purpose)[0] is not None

    def batches(self, purpose: str) -> Any:
        """Return the batches for a purpose, loaded when they are first asked for; DataError where there are none."""
        if purpose not in self._batches:
            source, settings = self._named(purpose)
            if source is None:
                raise DataError(
                    f"no {purpose} data: name it in the recipe, or pass data={{{purpose!r}: batches}} "
                    f"(shell: pass {self._option(purpose)})"
                )
            seed = getattr(settings, "seed", 0)
            samples = getattr(
                settings, {"train": "train_samples", "validate": "validate_samples"}.get(purpose, "samples")
            )
            take = sources.Take(
                samples=samples, tokens=settings.tokens, batch=settings.batch, seed=seed, images=self.images
            )
            read = pair_batches if purpose == "evaluate" and settings.metric == "retrieval" else sources.batches
            self._batches[purpose] = read(source, take, tokenizer=self.tokenizer, base=self.base, what=purpose)
        return self._batches[purpose]

    def _option(self, purpose: str) -> str:
        """Return the option of the command line that names the data for a purpose."""
        section = f"data.{purpose}=FILE" if self.recipe.data else f"'data={{{purpose}: FILE}}'"
        return {"calibrate": "--data FILE", "evaluate": "--eval-data FILE"}.get(purpose, f"--set {section}")

    def _named(self, purpose: str) -> tuple[str | None, Any]:
        if purpose == "evaluate":
            e = self.recipe.evaluate
            return (e.data, e) if e else (None, None)
        d = self.recipe.data
        return (getattr(d, purpose), d) if d else (None, None)


def _reusable(batches: Any) -> Any:
    """Return batches that can be iterated several times: an iterator becomes a list."""
    return list(batches) if hasattr(batches, "__next__") else batches


def with_labels(model: nn.Module, batches: Iterable[Any], use: str | None) -> Iterable[Any]:
    """Add labels to token batches for gradients: the model predicts the next token of the text."""
    wants = use == "train" or (use is not None and "gradient" in SCORES[use].needs)
    for batch in batches:
        text = hasattr(batch, "keys") and "input_ids" in batch and "labels" not in batch
        if wants and text and hf.is_causal_lm(model):
            labels, mask = batch["input_ids"], batch.get("attention_mask")
            batch = {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}
        yield batch


class Labelled:
    """Batches that get labels during iteration, so that a shuffling loader shuffles each epoch anew."""

    def __init__(self, model: nn.Module, batches: Any, use: str | None):
        self.model, self.use = model, use
        self.batches = batches if hasattr(batches, "__len__") else list(batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(with_labels(self.model, self.batches, self.use))

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class RunContext:
    """The data and settings of a run that a stage needs in addition to the model and its options."""

    data: RunData
    loss: Loss | None = None
    seed: int = 0
    before: nn.Module | None = None  # the model before the first stage, where a stage needs it
    memory: int | None = None  # bytes to stay near
    resume_dir: Path | None = None  # of this stage
    log: Any = None
    progress: bool = False

    def calibration(self, model: nn.Module, use: str | None = None) -> Labelled:
        """Return the calibration batches, with labels where `use` ("train" or a score) needs a gradient."""
        return Labelled(model, self.data.batches("calibrate"), use)


def needs_calibration(stage: Any) -> bool:
    """Return whether a stage reads calibration data: its solver does, its score, or its repair."""
    if isinstance(stage, TrainStage):
        return needs_calibration(stage.prune) or (stage.quantize is not None and needs_calibration(stage.quantize))
    if isinstance(stage, CutStage):
        return bool(stage.repair or cut_needs(stage))
    if isinstance(stage, QuantizeOptions):
        return stage.solver != "rtn" or stage.activations == "int8-static" or stage.smooth is not None
    if isinstance(stage, FactorizeStage | ShareStage):
        return bool(stage.whiten if isinstance(stage, FactorizeStage) else stage.weigh)
    if isinstance(stage, SecondOrder):
        return True
    score = getattr(stage, "score", None)
    reads = getattr(stage, "solver", None) is not None or getattr(stage, "allocate", None) in NEEDS_DATA
    return reads or (score is not None and bool(SCORES[score].needs))


def cut_needs(stage: CutStage) -> str:
    """Return which data the score of a cut needs: "gradient" (a loss), "inputs" or none."""
    if stage.drops_layers:
        return "gradient" if stage.score == "loss" else ""
    return UNIT_SCORES[stage.unit_score].needs
