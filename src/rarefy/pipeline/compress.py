"""`compress_`: a recipe's stages in order, measured before and after. The only file that knows all wings."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration import offload
from rarefy.common.atomic_io import parse_bytes, parse_path
from rarefy.common.errors import DataError, ModelError, RecipeError, unknown
from rarefy.common.renamed import renamed_parameters
from rarefy.common.report import Report
from rarefy.evaluation import profiling
from rarefy.evaluation.example_inputs import example_of
from rarefy.evaluation.receipt import Receipt
from rarefy.lowrank.layer_tying import tie_layers_
from rarefy.lowrank.svd import factorize_
from rarefy.model import distributed, hf
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import select_layers
from rarefy.model.losses import Loss
from rarefy.model.masks import fold_
from rarefy.model.quant_grid import GridParametrization
from rarefy.model.sparsity_pattern import check_sparsity, parse_pattern
from rarefy.pipeline.dry_run import naming, targets
from rarefy.pipeline.engine_evaluation import check_sample, engine_of, sample_of, token_rates
from rarefy.pipeline.measurements import layer_rows, receipt_of, state_of
from rarefy.pipeline.run_data import Given, Labelled, calibrates, needs_of
from rarefy.pipeline.train_stage import check_stage, train_
from rarefy.prune.allocation import GRADIENTS
from rarefy.prune.prune import check_weights, prune_, report
from rarefy.quantization.codebook import share_
from rarefy.quantization.quantize import quantize_
from rarefy.recipe import parser as recipes
from rarefy.runtime.accelerate import accelerate_
from rarefy.runtime.sparse_layers import Sparse
from rarefy.structured.cut import cut_
from rarefy.structured.permutation import permute_
from rarefy.train.sparsity_config import Movement

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@renamed_parameters(work="resume_dir")
def compress_(
    model: nn.Module,
    recipe: str | Path | Mapping[str, Any] | recipes.Recipe,
    data: Iterable[Any] | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    loss: Loss | None = None,
    base: Path | None = None,
    memory: int | str | None = None,
    resume_dir: str | Path | None = None,
    log: str | Path | Sequence[str] | None = None,
    progress: bool = False,
    **overrides: Any,
) -> Receipt:
    """Run a recipe on `model` in place, measure before and after, and return the receipt.

    recipe     preset name, path, dict or Recipe; `overrides` replace its fields of that name (`sparsity=0.4`)
    data       batches for calibration and training, or a dict of "calibrate", "train", "validate" and "evaluate";
               what is not given is read from the paths and names in the recipe
    tokenizer  for text named in the recipe
    memory     bytes or such as "4G" to stay near: weights stay in the files they were loaded from, see `rarefy.prune_`
    resume_dir folder for the state of solvers and training: the same call goes on there after it was killed. It stays
               until you remove it
    log        where the rows of training go besides: a file for JSON lines, `tensorboard:FOLDER`, `wandb:PROJECT`
    loss       callable(output, batch) for gradient scores and training; by default the model's own

    At the end masks are folded into the weights, so the model runs without them; `rarefy.adopt_` takes them up again.
    An error before the first stage leaves the model as it was. Raises the ValueErrors of `rarefy.common.errors`.
    """
    began = time.perf_counter()
    plan = recipes.load(recipe, **overrides)
    memory, resume_dir = parse_bytes(memory), parse_path(resume_dir)
    for target in targets(model, plan, memory, resume_dir):
        with naming(plan, target.number):
            check_weights(target.layers)
    if resume_dir is not None and not plan.solves:
        raise RecipeError(
            f"resume_dir has no effect: recipe {plan.name} has no solver or training, whose state could be kept"
        )
    if resume_dir is not None and distributed.world_size() > 1:
        raise RecipeError("resume_dir keeps the state of one process: leave it out where there are several (torchrun)")
    if log is not None and not plan.trains:
        raise RecipeError(f"log has no effect: recipe {plan.name} has no stage train")
    given = Given(plan, data, tokenizer, base)
    if plan.evaluate and plan.evaluate.decode and not hasattr(model, "generate"):
        raise DataError("evaluate.decode times causal language models; this model has no generate()")
    check_sample(plan, tokenizer)
    _check_data(model, plan, given)
    with offload.limiting_resident_weights(model, memory):
        return _compress(model, plan, given, loss, memory, resume_dir, log, progress, began)


def _compress(
    model: nn.Module,
    plan: recipes.Recipe,
    given: Given,
    loss: Loss | None,
    memory: int | None,
    resume_dir: Path | None,
    log: Any,
    progress: bool,
    began: float,
) -> Receipt:
    held_out = given.batches("evaluate") if plan.evaluate else []
    timed = plan.evaluate is not None and (plan.evaluate.latency or plan.evaluate.decode)
    timed = timed and distributed.rank() == 0  # several at once would time each other
    before = state_of(model, plan, held_out, progress)
    beside = any(isinstance(s, recipes.Factorize) and s.beside for s in plan.stages)
    taught = any(isinstance(s, recipes.Train) and s.distill is not None for s in plan.stages)
    dense, reports = None, list[Report]()
    # what follows is compared with the model whose units stand in the order that they will have
    first = next((i for i, s in enumerate(plan.stages) if not isinstance(s, recipes.Permute)), 0)
    for index, stage in enumerate(plan.stages):
        if index == first and (timed or beside or taught):
            dense = given.before = copy.deepcopy(model)
        options: dict[str, Any] = {"seed": plan.seed + index, "progress": progress}
        if isinstance(stage, recipes.Prune) and stage.solver is not None:
            options |= {
                "memory": memory,
                "resume_dir": None if resume_dir is None else resume_dir / f"stage-{index + 1}",
            }
        if isinstance(stage, recipes.Train):
            options |= {"log": log, "resume_dir": None if resume_dir is None else resume_dir / f"stage-{index + 1}"}
        reports += RUN[type(stage)](model, stage, given, loss, **options)
    rows = layer_rows(reports)
    fold_(model)
    model.rarefy_recipe = plan.to_dict()  # type: ignore[assignment]
    engine = engine_of(model, plan, held_out) if plan.evaluate and plan.evaluate.engine else None
    after = state_of(model, plan, held_out, progress, engine)
    speed: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    if dense is not None and timed:
        with evaluating(model), evaluating(dense):
            models = {"before": dense, "after": model if engine is None else engine}
            if plan.evaluate and plan.evaluate.accelerate:
                models["accelerated"], told = _accelerated(plan, model, held_out, progress)
                reports.append(told)
            speed = _speed(plan, models, held_out, progress)
            if plan.evaluate and plan.evaluate.decode and plan.evaluate.decode.text:
                samples = (sample_of(models, given.tokenizer, plan.evaluate.decode.text),)
    seconds = time.perf_counter() - began
    receipt = receipt_of(plan, model, before, after, rows, speed, reports, seconds, engine, samples)
    model.rarefy_receipt = receipt  # type: ignore[assignment]
    return receipt


def rehearse_(
    model: nn.Module, plan: recipes.Recipe, *, tokenizer: Any = None, base: Path | None = None
) -> list[Report]:
    """Do the cuts of a recipe in place, without repair, by magnitude where a score would have to be computed from data;
    return their reports, which say so. What else the recipe would do can be told of what is left."""
    told = []
    for index, stage in enumerate(plan.stages):
        if not isinstance(stage, recipes.Cut):
            continue
        free = "similarity" if stage.whole else "magnitude"
        reads = calibrates(replace(stage, repair=None))
        options = {**stage.options(), "score": free if reads else stage.score, "repair": True}
        given = Given(plan, None, tokenizer, base)
        if calibrates(stage):
            given.batches("calibrate")
        of = {"layers": stage.layers, "ignore": stage.ignore, "seed": plan.seed + index}
        report = cut_(model, cut_example(model, given), **options, **of)
        notes = (f"by {free}, {stage.score} takes data: other units may go",) if reads else ()
        told.append(replace(report, title="cut, rehearsed", notes=(*notes, *report.notes)))
    return told


def cast_(model: nn.Module, dtype: str) -> Report:
    """Turn parameters and saved buffers of floating point into `bf16`, `fp16` or `fp32` in place.

    Buffers that a model computes for itself and does not save (rotary frequencies) keep their precision.
    Raises ModelError where a weight would overflow.

    >>> net = nn.Linear(2, 2)
    >>> cast_(net, "bf16").summary["bytes"], net.weight.dtype
    (12, torch.bfloat16)
    """
    if dtype not in DTYPES:
        raise RecipeError(unknown("dtype", dtype, DTYPES))
    to = DTYPES[dtype]
    fixed = next((n for n, m in model.named_modules() if isinstance(m, Sparse)), None)
    if fixed is not None:
        raise ModelError(f"{fixed} runs on kernels chosen for its numbers: cast before accelerate_")
    for name, tensor in _floating_state(model):
        if not torch.isfinite(tensor).all() or torch.isfinite(tensor.to(to)).all():
            continue
        raise ModelError(f"{name} has values that {dtype} cannot hold (largest {float(tensor.detach().abs().max()):g})")
    for _, tensor in _floating_state(model):
        tensor.data = tensor.data.to(to)
    model.__dict__.pop("rarefy_receipt", None)  # what it measured is no longer so
    return Report("cast", (), {"dtype": dtype, "bytes": profiling.resident_bytes(model)})


def _floating_state(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """What a cast changes: all but the scales of grids, which would be other grids."""
    scales = {id(m.scale) for m in model.modules() if isinstance(m, GridParametrization)}
    state = model.state_dict(keep_vars=True).items()
    return ((n, t) for n, t in state if isinstance(t, Tensor) and t.is_floating_point() and id(t) not in scales)


def _check_data(model: nn.Module, plan: recipes.Recipe, given: Given) -> None:
    """Read all data before anything is changed, so that a wrong path costs nothing."""
    for stage in plan.stages:
        if calibrates(stage) and callable(given.batches("calibrate")):
            raise DataError("data['calibrate'] is an iterable of batches; a function of the epoch is for training")
        if isinstance(stage, recipes.Train):
            given.batches("train")
            check_stage(stage, given, model)


def _prune(model: nn.Module, s: recipes.Prune, given: Given, loss: Loss | None, **options: Any) -> list[Report]:
    use = "train" if s.allocate in GRADIENTS else s.score  # both need gradients of the loss
    data = Labelled(model, given.batches("calibrate"), use) if calibrates(s) else None
    done = prune_(
        model,
        s.pattern,
        s.score,
        s.sparsity,
        scope=s.scope,
        reduce=s.reduce,
        layers=s.layers,
        ignore=s.ignore,
        data=data,
        solver=s.solver,
        allocate=s.allocate,
        loss=loss,
        **options,
    )
    return [done]


def _train(
    model: nn.Module, s: recipes.Train, given: Given, loss: Loss | None, seed: int, progress: bool, **options: Any
) -> list[Report]:
    done = train_(model, s, given, loss, seed, progress, **options)
    return [*done, *_zeros_of(model, s.prune)]


def _quantize(
    model: nn.Module, s: recipes.Quantize, given: Given, loss: Loss | None, seed: int, progress: bool
) -> list[Report]:
    data = Labelled(model, given.batches("calibrate"), None) if calibrates(s) else None
    done = quantize_(model, **s.options(), layers=s.layers, ignore=s.ignore, data=data, progress=progress)
    return [done, *_zeros_of(model, s)]


def _zeros_of(model: nn.Module, s: Any) -> list[Report]:
    """The table of the zeros that a stage has put in besides its own work."""
    if s is None or s.pattern is None or (isinstance(s, Movement) and s.penalty is not None):
        return []
    pattern = parse_pattern(s.pattern)
    sparsity, _ = check_sparsity(pattern, s.sparsity, None)
    return [report(select_layers(model, s.layers, s.ignore), pattern, sparsity)]


def _factorize(
    model: nn.Module, s: recipes.Factorize, given: Given, loss: Loss | None, seed: int, progress: bool
) -> list[Report]:
    asked = {k: v for k, v in s.options().items() if k != "beside"}
    of = given.before if s.beside else None
    whiten = given.has("calibrate") if s.whiten is None else s.whiten
    data = Labelled(model, given.batches("calibrate"), None) if whiten else None
    options = {"layers": s.layers, "ignore": s.ignore, "data": data, "progress": progress}
    return [factorize_(model, **asked, of=of, **options)]


def _share(
    model: nn.Module, s: recipes.Share, given: Given, loss: Loss | None, seed: int, progress: bool
) -> list[Report]:
    weigh = given.has("calibrate") if s.weigh is None else s.weigh
    data = Labelled(model, given.batches("calibrate"), None) if weigh else None
    of = {"layers": s.layers, "ignore": s.ignore}
    return [share_(model, s.bits, group=s.group, **of, data=data, progress=progress)]


def _tie(model: nn.Module, s: recipes.Tie, given: Given, loss: Loss | None, seed: int, progress: bool) -> list[Report]:
    return [tie_layers_(model, s.every, blocks=s.blocks, average=s.average)]


def _cast(
    model: nn.Module, s: recipes.Cast, given: Given, loss: Loss | None, seed: int, progress: bool
) -> list[Report]:
    return [cast_(model, s.dtype)]


def _cut(model: nn.Module, s: recipes.Cut, given: Given, loss: Loss | None, seed: int, progress: bool) -> list[Report]:
    needs = needs_of(s)
    asked = s.options()
    reads = s.score != "random" if s.whole else bool(needs or asked["repair"])  # else the data is of other stages
    data = None
    if reads and given.has("calibrate"):
        data = Labelled(model, given.batches("calibrate"), "train" if needs == "gradient" else None)
    example = cut_example(model, given)
    options = {"layers": s.layers, "ignore": s.ignore, "data": data, "seed": seed, "progress": progress}
    return [cut_(model, example, **asked, **options, loss=loss if needs == "gradient" else None)]


def cut_example(model: nn.Module, given: Given, what: str = "a cut") -> Any:
    """What a model is called with to see what belongs together: one or two samples of any of the recipe's data, for a
    Hugging Face model without any noise."""
    for purpose in ("calibrate", "evaluate", "train"):
        if given.has(purpose):
            batches: Any = given.batches(purpose)
            first = batches(0) if callable(batches) else batches
            one = next(iter(first), None)  # type: ignore[call-overload]
            if one is not None:
                return _resize(one, 2)
    if hf.is_model(model):
        return example_of(model, 32, 2)
    raise DataError(
        f"{what} runs the model once: give calibrate or evaluate data, or call it from Python with an example"
    )


def _permute(
    model: nn.Module, s: recipes.Permute, given: Given, loss: Loss | None, seed: int, progress: bool
) -> list[Report]:
    data = Labelled(model, given.batches("calibrate"), s.score) if calibrates(s) else None
    options = {"score": s.score, "seconds": s.seconds, "layers": s.layers, "ignore": s.ignore, "data": data}
    example = cut_example(model, given, "permute")
    return [permute_(model, example, s.pattern, **options, loss=loss, seed=seed, progress=progress)]


RUN: dict[type, Callable[..., list[Report]]] = {
    recipes.Prune: _prune,
    recipes.Quantize: _quantize,
    recipes.Factorize: _factorize,
    recipes.Share: _share,
    recipes.Tie: _tie,
    recipes.Train: _train,
    recipes.Permute: _permute,
    recipes.Cut: _cut,
    recipes.Cast: _cast,
}


def _accelerated(plan: recipes.Recipe, model: nn.Module, held_out: Any, progress: bool) -> tuple[nn.Module, Report]:
    """A copy of the model whose layers skip zeros where that is faster, and what that comes to."""
    assert plan.evaluate
    fast, one = copy.deepcopy(model), next(iter(held_out))
    sizes = {1, plan.evaluate.decode.prompt} if plan.evaluate.decode else {1}
    most = max(plan.evaluate.latency.batch) if plan.evaluate.latency else 1
    for size in plan.evaluate.latency.batch if plan.evaluate.latency else ():
        sizes.add(max(t.numel() if t.dim() == 2 and not t.is_floating_point() else size for t in _inputs(one, size)))
    told = accelerate_(fast, sorted(sizes), _resize(one, most), progress=progress)
    sparse, held = told.summary["layers that run sparse"], told.summary["bytes in memory after"]
    note = f"'skipping zeros': {sparse} layers run sparse by accelerate_, where faster here; {held:,} bytes in memory"
    return fast, replace(told, rows=(), notes=(note,))


def _inputs(batch: Any, size: int) -> list[Tensor]:
    """The tensors of a batch of that size that a model is called with."""
    resized = _resize(batch, size)
    return tensors_in(resized[0] if isinstance(resized, tuple) else resized)


def _speed(
    plan: recipes.Recipe, pair: Mapping[str, nn.Module], held_out: Any, progress: bool
) -> tuple[Mapping[str, Any], ...]:
    assert plan.evaluate
    rows: list[Mapping[str, Any]] = []
    if plan.evaluate.decode:
        d = plan.evaluate.decode
        rates = token_rates(pair, prompt=d.prompt, new=d.new, repeats=d.repeats, progress=progress)
        for kind, what in (("prefill", f"prefill of {d.prompt}"), ("decode", f"decode of {d.new}, batch 1")):
            sides = {side: {**r[kind], "median": r[kind]["tokens_per_second"]} for side, r in rates.items()}
            rows.append({"what": what, "unit": "tokens/s", **sides})
    if plan.evaluate.latency:
        for size in plan.evaluate.latency.batch:
            example = _resize(next(iter(held_out)), size)
            runs = {side: partial(call, m, on_device(m, example)) for side, m in pair.items()}
            times = profiling.compare(runs, repeats=plan.evaluate.latency.repeats, progress=progress)
            sides = {k: {n: 1000 * v for n, v in t.to_dict().items() if n != "repeats"} for k, t in times.items()}
            rows.append({"what": f"forward, batch {size}", "unit": "ms", **sides})
    return tuple(rows)


def _resize(batch: Any, size: int) -> Any:
    """Repeat or cut a batch to `size` samples."""
    if isinstance(batch, Tensor):
        return batch.repeat(-(-size // len(batch)), *[1] * (batch.dim() - 1))[:size]
    if hasattr(batch, "keys"):
        return {k: _resize(v, size) for k, v in batch.items()}
    return tuple(_resize(v, size) for v in batch)
