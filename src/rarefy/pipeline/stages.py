"""Run one stage of a recipe: call its function with the options and the data that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.common.errors import DataError
from rarefy.common.report import Report
from rarefy.evaluation.example_inputs import example_of
from rarefy.lowrank.layer_tying import TieOptions, run_tie
from rarefy.lowrank.svd import run_factorize
from rarefy.model import hf
from rarefy.model.image_config import image_config_of
from rarefy.model.layers import select_layers
from rarefy.model.signature import get_signature
from rarefy.model.sparsity_pattern import check_sparsity, parse_pattern
from rarefy.pipeline.cast import run_cast
from rarefy.pipeline.run_data import RunContext, RunData, cut_needs, needs_calibration
from rarefy.pipeline.speed import resize_batch
from rarefy.pipeline.train_stage import run_train
from rarefy.prune.allocation import GRADIENTS
from rarefy.prune.options import PruneOptions, ranks_by_inputs
from rarefy.prune.prune import report, run_prune
from rarefy.quantization.codebook import run_share
from rarefy.quantization.config import QuantizeOptions
from rarefy.quantization.quantize import run_quantize
from rarefy.recipe.schema import (
    CastOptions,
    CutStage,
    FactorizeStage,
    Recipe,
    ShareStage,
    StageOptions,
    TrainStage,
)
from rarefy.structured.cut import run_cut
from rarefy.structured.permutation import PermuteOptions, run_permute
from rarefy.train.sparsity_config import Movement


def run_stage(model: nn.Module, stage: StageOptions, context: RunContext) -> list[Report]:
    """Run a stage on a model in place; return the reports of what was done."""
    return RUNNERS[type(stage)](model, stage, context)


def _prune(model: nn.Module, stage: PruneOptions, context: RunContext) -> list[Report]:
    use = "train" if stage.allocate in GRADIENTS else stage.score  # both need gradients of the loss
    reads = needs_calibration(stage) or (ranks_by_inputs(stage) and context.data.has("calibrate"))
    data = context.calibration(model, use) if reads else None
    state = {"memory": context.memory, "resume_dir": context.resume_dir} if stage.solver is not None else {}
    return [run_prune(model, stage, data, loss=context.loss, seed=context.seed, progress=context.progress, **state)]


def _train(model: nn.Module, stage: TrainStage, context: RunContext) -> list[Report]:
    return [*run_train(model, stage, context), *_zeros_report(model, stage.prune)]


def _quantize(model: nn.Module, stage: QuantizeOptions, context: RunContext) -> list[Report]:
    data = context.calibration(model) if needs_calibration(stage) else None
    return [run_quantize(model, stage, data, progress=context.progress), *_zeros_report(model, stage)]


def _zeros_report(model: nn.Module, options: Any) -> list[Report]:
    """Return a report of the zeros that a stage added as a side effect."""
    if options is None or options.pattern is None or (isinstance(options, Movement) and options.penalty is not None):
        return []
    pattern = parse_pattern(options.pattern)
    sparsity, _ = check_sparsity(pattern, options.sparsity, None)
    return [report(select_layers(model, options.layers, options.ignore), pattern, sparsity)]


def _factorize(model: nn.Module, stage: FactorizeStage, context: RunContext) -> list[Report]:
    whiten = context.data.has("calibrate") if stage.whiten is None else stage.whiten
    data = context.calibration(model) if whiten else None
    of = context.before if stage.beside else None
    return [run_factorize(model, stage, data, of=of, progress=context.progress)]


def _share(model: nn.Module, stage: ShareStage, context: RunContext) -> list[Report]:
    weigh = context.data.has("calibrate") if stage.weigh is None else stage.weigh
    data = context.calibration(model) if weigh else None
    return [run_share(model, stage, data, progress=context.progress)]


def _tie(model: nn.Module, stage: TieOptions, context: RunContext) -> list[Report]:
    return [run_tie(model, stage)]


def _cast(model: nn.Module, stage: CastOptions, context: RunContext) -> list[Report]:
    return [run_cast(model, stage)]


def _cut(model: nn.Module, stage: CutStage, context: RunContext) -> list[Report]:
    needs = cut_needs(stage)
    reads = stage.score != "random" if stage.drops_layers else bool(needs or stage.repairs)
    data = None  # where there is data, but not for this stage
    if reads and context.data.has("calibrate"):
        data = context.calibration(model, "train" if needs == "gradient" else None)
    loss = context.loss if needs == "gradient" else None
    example = one_example(model, context.data, "a cut")
    return [run_cut(model, example, stage, data, loss=loss, seed=context.seed, progress=context.progress)]


def _permute(model: nn.Module, stage: PermuteOptions, context: RunContext) -> list[Report]:
    data = context.calibration(model, stage.score) if needs_calibration(stage) else None
    example = one_example(model, context.data, "permute")
    settings = {"loss": context.loss, "seed": context.seed, "progress": context.progress}
    return [run_permute(model, example, stage, data, **settings)]


RUNNERS: dict[type, Callable[..., list[Report]]] = {
    PruneOptions: _prune,
    QuantizeOptions: _quantize,
    FactorizeStage: _factorize,
    ShareStage: _share,
    TieOptions: _tie,
    TrainStage: _train,
    PermuteOptions: _permute,
    CutStage: _cut,
    CastOptions: _cast,
}


def one_example(model: nn.Module, data: RunData, caller: str) -> Any:
    """Return a batch of one or two samples, from the recipe's data or random for a Hugging Face model."""
    for purpose in ("calibrate", "evaluate", "train"):
        if data.has(purpose):
            batches: Any = data.batches(purpose)
            batch = next(iter(batches(0) if callable(batches) else batches), None)  # type: ignore[call-overload]
            if batch is not None:
                return resize_batch(batch, 2)
    if hf.is_model(model) or image_config_of(model) is not None or get_signature(model) is not None:
        return example_of(model, 32, 2)
    raise DataError(
        f"{caller} runs the model once: give calibrate or evaluate data, or call it from Python with an example"
    )


def first_casts(recipe: Recipe) -> int:
    """Return how many stages at the beginning cast a model to fp32; those after them are counted as without them."""
    casts = (isinstance(s, CastOptions) and s.dtype == "fp32" for s in recipe.stages)
    return sum(1 for _ in takewhile(bool, casts))


def rehearse_cuts_(
    model: nn.Module, recipe: Recipe, *, tokenizer: Any = None, base: Path | None = None
) -> list[Report]:
    """Do the cuts of a recipe in place, without repair and by a score that needs no data; return their reports."""
    reports = []
    data = RunData(recipe, None, tokenizer, base, image_config_of(model))
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, CutStage):
            continue
        free = "similarity" if stage.drops_layers else "magnitude"
        reads = needs_calibration(stage.model_copy(update={"repair": None}))
        if needs_calibration(stage):
            data.batches("calibrate")  # a wrong path is found here
        options = stage.model_copy(update={"score": free if reads else stage.score, "repair": True})
        report = run_cut(
            model, one_example(model, data, "a cut"), options, seed=recipe.seed + index - first_casts(recipe)
        )
        notes = (f"by {free}, {stage.score} needs data: other units may go",) if reads else ()
        reports.append(replace(report, title="cut, rehearsed", notes=(*notes, *report.notes)))
    return reports
