"""`compress_`: run a recipe's stages in order, and measure the model before and after."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.calibration import offload
from rarefy.common.atomic_io import parse_bytes, parse_path
from rarefy.common.errors import DataError, RecipeError
from rarefy.common.progress import say
from rarefy.common.renamed import renamed_parameters
from rarefy.common.report import Report
from rarefy.evaluation.quality import metric_of
from rarefy.evaluation.receipt import Receipt
from rarefy.model import distributed
from rarefy.model.forward import evaluating
from rarefy.model.image_config import image_config_of
from rarefy.model.losses import Loss
from rarefy.model.masks import fold_
from rarefy.pipeline.dry_run import stage_in_errors, targets
from rarefy.pipeline.engine_evaluation import EngineModule, check_sample, engine_of, sample_of
from rarefy.pipeline.measurements import EAGER, callable_batches, engine_name, layer_rows, receipt_of, state_of
from rarefy.pipeline.run_data import RunContext, RunData, needs_calibration
from rarefy.pipeline.runtimes import check_runtimes, measured_runtimes
from rarefy.pipeline.speed import accelerated_copy, measure_speed
from rarefy.pipeline.stages import first_casts, run_stage
from rarefy.pipeline.train_stage import check_stage
from rarefy.prune.prune import check_weights
from rarefy.recipe.parser import load
from rarefy.recipe.schema import FactorizeStage, PermuteOptions, Recipe, TrainStage


@renamed_parameters(work="resume_dir")
def compress_(
    model: nn.Module,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    data: Iterable[Any] | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    loss: Loss | None = None,
    base: str | Path | None = None,
    memory: int | str | None = None,
    resume_dir: str | Path | None = None,
    log: str | Path | Sequence[str] | None = None,
    progress: bool = False,
    **overrides: Any,
) -> Receipt:
    """Run a recipe on a model in place, and measure the model before and after.

    At the end masks are folded into the weights, so the model runs without them; `rarefy.adopt_` restores them.

    Args:
        model: the model to compress.
        recipe: name of a preset, path of a YAML file, dict, or Recipe.
        data: batches for calibration and training, or a dict of "calibrate", "train", "validate" and "evaluate". What
            is not given is read from the paths and names in the recipe.
        tokenizer: for text that the recipe names.
        loss: for gradient scores and training, a function of (output, batch) or a criterion (logits, target); see
            `rarefy.fit_`.
        base: folder that relative paths in the recipe start from.
        memory: bytes, or text such as "4G", at least "256M", to stay near: weights stay in the files they were loaded
            from, see `rarefy.prune_`. For recipes whose stages are all `prune` with a solver; needs `resume_dir`.
        resume_dir: folder for the state of `prune` stages with a solver and of `train` stages: after a kill, the same
            call continues from there. It stays until you remove it.
        log: where each epoch's numbers go too: a file for JSON lines, "tensorboard:FOLDER", "wandb:PROJECT",
            "mlflow:EXPERIMENT".
        progress: show progress bars.
        **overrides: new values of the recipe's fields, such as `sparsity=0.4`, wherever it sets them;
            `**{"prune.sparsity": 0.4}` names the stage.

    Returns:
        The receipt: quality, bytes, sparsity and speed before and after, and the reports of all stages.

    Raises:
        RarefyError: for a recipe, model or data that do not fit. An error before the first stage leaves the model
            unchanged.

    Example:
        >>> net = nn.Linear(8, 8)
        >>> receipt = compress_(net, {"stages": [{"prune": {"sparsity": 0.5}}]})
        >>> receipt.sparsity["achieved"], int((net.weight == 0).sum())
        (0.5, 32)
    """
    started = time.perf_counter()
    loaded = load(recipe, **overrides)
    memory, resume_dir = parse_bytes(memory), parse_path(resume_dir)
    _check_recipe(model, loaded, memory, resume_dir, log)
    run_data = RunData(loaded, data, tokenizer, parse_path(base), image_config_of(model))
    _check_data(model, loaded, run_data)
    context = RunContext(run_data, loss, memory=memory, log=log, progress=progress)
    with offload.limiting_resident_weights(model, memory):
        return _run(model, loaded, context, resume_dir, started)


def _check_recipe(model: nn.Module, recipe: Recipe, memory: int | None, resume_dir: Path | None, log: Any) -> None:
    """Raise for stages that do not fit this model and options without effect, before any data is read."""
    for target in targets(model, recipe, memory, resume_dir):
        with stage_in_errors(recipe, target.number):
            check_weights(target.layers)
    if resume_dir is not None and not recipe.solves:
        raise RecipeError(
            f"resume_dir has no effect: recipe {recipe.name} has neither a prune stage with a solver nor a train "
            "stage, whose state could be kept"
        )
    if resume_dir is not None and distributed.world_size() > 1:
        raise RecipeError("resume_dir supports a single process only: leave it out with torchrun")
    if log is not None and not recipe.trains:
        raise RecipeError(f"log has no effect: recipe {recipe.name} has no stage train")


def _check_data(model: nn.Module, recipe: Recipe, data: RunData) -> None:
    """Read all data before anything is changed, so that a wrong path costs nothing."""
    if recipe.evaluate and recipe.evaluate.decode and not hasattr(model, "generate"):
        raise DataError("evaluate.decode times causal language models; this model has no generate()")
    if recipe.evaluate and recipe.evaluate.decode:
        wanted, limit = recipe.evaluate.decode, getattr(model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and wanted.prompt + wanted.new > limit:
            raise DataError(
                f"evaluate.decode: the model has {limit} positions, got prompt {wanted.prompt} and new {wanted.new}: "
                "give less"
            )
    check_runtimes(recipe.evaluate, model)
    check_sample(recipe, data.tokenizer)
    for stage in recipe.stages:
        if needs_calibration(stage) and callable(data.batches("calibrate")):
            raise DataError(
                "data['calibrate']: expected an iterable of batches; a function of the epoch is for training"
            )
        if isinstance(stage, TrainStage):
            data.batches("train")
            check_stage(stage, data, model)


def _run(model: nn.Module, recipe: Recipe, context: RunContext, resume_dir: Path | None, started: float) -> Receipt:
    """Run the stages, measure, and return the receipt."""
    evaluate, progress = recipe.evaluate, context.progress
    held_out = context.data.batches("evaluate") if evaluate else []
    timed = evaluate is not None and bool(evaluate.latency or evaluate.decode)
    timed = timed and distributed.rank() == 0  # several at once would time each other
    if evaluate and evaluate.samples is None and progress and hasattr(held_out, "__len__"):
        hint = "; evaluate.samples=24 reads less" if evaluate.data is not None else ""
        say([f"evaluating all {len(held_out)} batches, before and after{hint}"])
    metric = metric_of(evaluate.metric, model, held_out, progress=progress) if evaluate else None
    before = state_of(model, metric, held_out)
    reports, dense = run_stages(model, recipe, context, resume_dir, timed)
    rows = layer_rows(reports)
    fold_(model)
    model.rarefy_recipe = recipe.to_dict()  # type: ignore[assignment]
    batches = callable_batches(held_out)
    engine = engine_of(model, recipe, batches) if evaluate and evaluate.engine else None
    after = state_of(model, metric, held_out, engine)
    speed: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    if dense is not None and timed:
        speed, samples, more = _timed(recipe, dense, model, engine, batches, context)
        reports += more
    runtimes: tuple[Mapping[str, Any], ...] = ()
    if evaluate and evaluate.runtimes and distributed.rank() == 0:
        assert metric
        subject = (engine_name(recipe), engine) if engine else (EAGER, model)
        runtimes, notes = measured_runtimes(model, evaluate, metric, batches, subject, after["quality"])
        reports.append(Report("runtimes", notes=notes))
    seconds = time.perf_counter() - started
    receipt = receipt_of(recipe, model, before, after, rows, speed, reports, seconds, engine, samples, runtimes)
    model.rarefy_receipt = receipt  # type: ignore[assignment]
    return receipt


def run_stages(
    model: nn.Module, recipe: Recipe, context: RunContext, resume_dir: Path | None = None, keep_dense: bool = False
) -> tuple[list[Report], nn.Module | None]:
    """Run the stages in order; return their reports, and a copy of the dense model where one is needed."""
    for stage in recipe.stages:
        keep_dense |= isinstance(stage, FactorizeStage) and stage.beside
        keep_dense |= isinstance(stage, TrainStage) and stage.distill is not None
    # a model that is cast to fp32 first is as if loaded so; later comparisons need it in the permuted order
    casts = first_casts(recipe)
    others = (i for i, s in enumerate(recipe.stages) if i >= casts and not isinstance(s, PermuteOptions))
    first = next(others, 0)
    dense, reports = None, list[Report]()
    for index, stage in enumerate(recipe.stages):
        if index == first and keep_dense:
            dense = copy.deepcopy(model)
        folder = None if resume_dir is None else resume_dir / f"stage-{index + 1}"
        seed = recipe.seed + max(index - casts, 0)
        reports += run_stage(model, stage, replace(context, seed=seed, before=dense, resume_dir=folder))
    return reports, dense


def _timed(
    recipe: Recipe,
    dense: nn.Module,
    model: nn.Module,
    engine: EngineModule | None,
    held_out: Any,
    context: RunContext,
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...], list[Report]]:
    """Return rows of speed, sample texts, and the report of an accelerated copy where the recipe wants one."""
    evaluate, progress, reports = recipe.evaluate, context.progress, list[Report]()
    assert evaluate
    with evaluating(model), evaluating(dense):
        models = {"before": dense, "after": model if engine is None else engine}
        if evaluate.accelerate:
            models["accelerated"], report = accelerated_copy(evaluate, model, held_out, progress)
            reports.append(report)
        speed = measure_speed(evaluate, models, held_out, progress)
        samples = ()
        if evaluate.decode and evaluate.decode.text:
            samples = (sample_of(models, context.data.tokenizer, evaluate.decode.text),)
    return speed, samples, reports
