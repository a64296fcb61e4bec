"""`optimize`: the best model for a loss that is accepted and a speed that is needed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.checkpoint.save import save
from rarefy.common.atomic_io import atomic_folder, check_output_folder, container_errors, parse_path
from rarefy.common.checks import check_int
from rarefy.common.errors import DataError, ModelError, RarefyError, RecipeError
from rarefy.common.progress import say
from rarefy.common.yaml_text import write_yaml
from rarefy.compiler.model_checks import check_module, check_ready
from rarefy.evaluation.profiling import machine
from rarefy.evaluation.quality import Metric, default_metric, metric_of
from rarefy.model import distributed, hf
from rarefy.model.batches import count_samples, slice_batch, tensors_in
from rarefy.model.forward import call, check_batches, evaluating, without_targets
from rarefy.model.layers import Selector, select_layers, unwrap
from rarefy.recipe.schema import Data
from rarefy.runtime import bindings
from rarefy.search.confirmation import INTERRUPTED, confirm, count_evaluated, hold_back, too_few_samples
from rarefy.search.deploy import engine_in
from rarefy.search.frontier import Best, Frontier, Point
from rarefy.search.other_engines import measured_engines, missing_packages
from rarefy.search.recovery import Recovery
from rarefy.search.search import Search
from rarefy.search.several_processes import ProcessError, open_journal
from rarefy.search.stages import CAST
from rarefy.search.targets import DECODE, check_dense, check_points, objective_of, parse_targets
from rarefy.search.task import Task

HELD_OUT = 4  # of so many batches or samples the last is for evaluation where no other data are given
OTHER_ENGINES = 0.5  # of the time at most, for other engines
FRONTIER, RECIPE = "frontier.json", "recipe.yaml"


def optimize(
    model: nn.Module,
    example: Any,
    data: Iterable[Any] | None = None,
    evaluate: str | Callable[[Any], float] | Metric | None = None,
    *,
    max_loss: float | str | None = 0.01,
    speedup: float | None = None,
    latency_ms: float | None = None,
    size_mb: float | None = None,
    memory_mb: float | None = None,
    target: str | None = None,
    batch: int | Sequence[int] | None = None,
    minutes: float = 60.0,
    eval_data: Iterable[Any] | None = None,
    train_minutes: float = 0.0,
    train_data: Iterable[Any] | None = None,
    higher_is_better: bool = True,
    layers: Selector = None,
    ignore: Selector = None,
    resume_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    other_engines: bool = False,
    data_options: Data | None = None,
) -> Frontier:
    """Search for the model that loses least and runs fastest on this machine, within the limits that are given.

    The search joins what Rarefy can do: precisions of the engine, units removed (neurons, heads, channels, whole
    blocks), weights pruned in patterns, low-rank factors, layers in 6, 5 or 4 bits. It measures what each part of the
    model gains and costs, predicts the rest (losses add up, SPDY, Frantar 2022; ZipLM, Kurtic 2023), makes the most
    promising models, measures them as they are deployed, and corrects its predictions. With `train_minutes` the one or
    two models that promise most then learn from the dense one. The model itself is left as it is.

    Args:
        model: the model, in evaluation mode, on the CPU, in fp32.
        example: what it can be called with: a tensor, a dict of inputs by name, or a tuple (inputs, target) as batches
            are. Its length and image size are those that are timed.
        data: batches for calibration, each like the example. Without them only the engine's precisions are tried; with
            a function as `evaluate` also cuts and pruning by the size of weights.
        evaluate: how good a model is: a function of a model that returns a number, a name (perplexity, accuracy,
            retrieval, ndcg@10, similarity, agreement, distance, kl), or None: the perplexity of a language model on
            its data, else how well a model agrees with the dense one. The function gets the model as it is deployed:
            call it as the model itself. It is always in evaluation mode, and has no parameters.
        max_loss: the largest accepted loss: a fraction of the dense model's number (0.01), or text: "1%", or
            "0.5 points" of the number itself; text without a unit means points. At most 0.1 of accuracy and
            similarity, which go from 0 to 1. None: any, with another limit. Where the dense model's number is 0, as
            with kl and distance, points alone mean something.
        speedup: how many times as fast as the dense compiled model it has to be, in every batch.
        latency_ms: instead of speedup: the longest call, in milliseconds; of a language model the time of a token, and
            of a prompt.
        size_mb: largest size of the saved model, in megabytes.
        memory_mb: largest size of its weights in memory, in megabytes.
        target: what is best among the models within all limits: "latency", "loss", "size" or "memory". By default
            latency, or the loss where it has no limit. Of a language model "decode" or "prompt": only the time of a
            token, or of a prompt, is measured and counts.
        batch: batch sizes that are timed, by default 1; not for language models, which decode and read one text.
        minutes: how long the search may take. A step begins only if it fits, by what such steps took before. The dense
            model's measurement always ends. What was measured until then decides.
        eval_data: batches that a named metric measures on; by default the last quarter of the batches of `data`, at
            least one, which are then not calibrated on. A function reads its own data, and all of `data` is calibrated
            on. If the last third of the batches has 100 samples or more, it is held back: the best models are measured
            there once more, and one that keeps the largest loss there too is the result.
        train_minutes: how long models may be trained after the search, in addition to `minutes`: they learn the dense
            model's outputs, so that no labels are needed. 0: nothing is trained.
        train_data: batches to train on, the more the better; by default those of the calibration.
        higher_is_better: of the number that a function returns.
        layers: selectors of layers that may change; by default all but embeddings and head. The head of a language
            model, and its embedding if they are tied, may get fewer bits.
        ignore: selectors of layers that stay as they are, in fp32 too. Language models have one precision for all
            layers: there these layers keep their values and bits alone.
        resume_dir: folder for what was measured: after a kill, the same call continues from there, with more `minutes`
            too. Another model, other data or limits, other threads, versions or machines are refused. A function is
            known by its name and its code, not by what it calls or reads.
        seed: of all random choices.
        progress: say what is measured.
        other_engines: measure the dense model in ONNX Runtime and OpenVINO too, where they are installed, in fp32 and 8
            bits, OpenVINO also in bf16 where the CPU has it. Their points stand in `peers` and in the report. They take
            half of the time at most.
        data_options: a `rarefy.recipe.schema.Data`, which says where recipes of the result find the calibration data.

    With torch.distributed, several processes divide the search; each has to be on a machine of its own, of the same
    kind. The first one reads `resume_dir`, and it alone has `best`.

    Returns:
        A `Frontier`: `best.model` is the best model, compiled, `best.compressed` the torch model behind it, `best.data`
        the batches that its recipe reads; `print` it, or read `points`. `met` says whether it keeps all limits; if none
        does, the nearest is the best.

    Raises:
        RarefyError: for a model, data or limits that do not fit, an evaluation that fails on the dense model, or where
            another process of the search has ended.

    Cost: `minutes` and `train_minutes`. Memory: the dense model, two copies, two compiled models, and six times the
    largest weight; training also takes gradients and the optimizer's state.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8)).eval()
        >>> x = torch.randn(64, 64)
        >>> frontier = optimize(net, x, [x], max_loss="20%", minutes=1)
        >>> frontier.best.model(x).shape
        torch.Size([64, 8])
    """
    inner = unwrap(model)
    check_module(inner)
    if (dtype := check_ready(inner)) != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ModelError(f"expected a model in float32, got {name}: call model.float()")
    limits = {"speedup": speedup, "latency_ms": latency_ms, "size_mb": size_mb, "memory_mb": memory_mb}
    targets = parse_targets(max_loss, objective_of(target, max_loss), **limits)
    seed = check_int("seed", seed, 0, RecipeError)
    if layers is not None or ignore is not None:
        select_layers(inner, layers, ignore)  # raises for a selector without match
    batches = _batch_sizes(batch, inner)
    if targets.objective in DECODE and not hf.is_causal_lm(inner):
        raise RecipeError(f"target {targets.objective!r} is for language models: give 'latency'")
    seconds = _seconds(minutes)
    _check_runs(inner, example, "example")
    calibration, held_out = _split(data, eval_data, evaluate, example)
    if data_options is not None:  # a recipe reads the samples that were calibrated on
        data_options = data_options.model_copy(update={"samples": sum(map(count_samples, calibration)) or None})
    if calibration:
        _check_runs(inner, calibration[0], "data: the model does not run on its first batch")
    recovery = _recovery(inner, train_minutes, train_data, calibration)
    blind = evaluate is None and data is None and eval_data is None
    evaluate = _metric_of_example(inner, example) if blind else evaluate
    used, held_back = hold_back(held_out or [])
    metric = metric_of(evaluate, inner, used if held_out else held_out, higher_is_better=higher_is_better)
    check = metric_of(evaluate, inner, held_back, higher_is_better=higher_is_better) if held_back else None
    targets = check_dense(targets, metric.name)
    if not callable(evaluate) and not isinstance(evaluate, Metric):
        check_points(targets, evaluate or metric.name)
    task = Task(
        inner, example, calibration, metric, targets, batches, seconds, layers, ignore, recovery,
        data_options, seed, progress, other_engines, check, sum(map(count_evaluated, held_out or [])), blind,
    )  # fmt: skip
    try:
        with (
            closing(open_journal(parse_path(resume_dir), task, evaluate, held_out)) as journal, evaluating(inner),
            torch.random.fork_rng(devices=[]), distributed.alone(),
        ):  # fmt: skip
            frontier = _run(Search(task, journal))
    except ProcessError as error:
        raise RarefyError(str(error)) from error
    if frontier.best is not None:
        _cache_keys_again_(frontier.best.compressed, inner)
    return frontier


def _seconds(minutes: Any) -> float:
    """Return checked minutes as seconds."""
    number = isinstance(minutes, Real) and not isinstance(minutes, bool)
    if not number or not 0 < float(minutes) < math.inf:
        raise RecipeError(f"minutes: expected a number above 0, got {minutes!r}")
    return 60 * float(minutes)


def _metric_of_example(model: nn.Module, example: Any) -> str | None:
    """Return the metric for a search without data; None for the default of the model."""
    if hf.is_causal_lm(model):
        return "agreement"  # the example may be no text, whose perplexity would say nothing
    return "similarity" if default_metric(model, [example]) == "agreement" else None  # one sample agrees or not


def _cache_keys_again_(model: nn.Module, dense: nn.Module) -> None:
    """Let a copy of a language model keep keys and values as the model itself does: the search turned that off."""
    for name, module in dense.named_modules():
        if getattr(getattr(module, "config", None), "use_cache", None) is True:
            with suppress(AttributeError, TypeError):  # a block that is gone, an immutable config
                copied: Any = model.get_submodule(name)
                copied.config.use_cache = True


def _run(search: Search) -> Frontier:
    """Run a search to its end, or until Ctrl-C, and return what it found."""
    notes = _without_kernels(search.task.progress)
    dense = search.measure_dense()
    if dense.error:
        raise ModelError(f"the dense model cannot be measured: {dense.error}")
    task, confirmed = search.task, None
    engines: dict[str, Any] = {"rows": [], "notes": []}
    try:
        if task.other_engines:
            engines = _other_engines(search)
        finished = search.run()
        search.add_earlier_points()
        confirmed = confirm(search, search.run_again)
        finished = "interrupted" if INTERRUPTED in confirmed[2] else finished
    except KeyboardInterrupt:
        finished = "interrupted"
        if search.best_models is not None and search.best_models[0] >= len(search.points):
            search.best_models = None  # its point was not added any more
        search.add_earlier_points()
    index, met, more = confirmed or (*task.targets.best(search.points), [])
    notes += [*search.journal.notes, *engines["notes"], *more]
    if search.trouble:
        notes.append(search.trouble)
    if dense.disk_bytes == 0:
        unknown = "sizes of files are unknown, and a folder gets the recipe without a model"
        notes.append(f"models like this one run, but cannot be saved: {unknown}")
    if search.journal.trouble:
        notes.append(search.journal.trouble)
    best = None
    if index is not None and search.journal.rank == 0:
        point = search.points[index]
        model, deployed = search.models_of(index)
        best = Best(engine_in(deployed), model, point, search.data_of(point.recipe))
    if failed := [p for p in search.points if p.error]:
        count = f"{len(failed)} of {len(search.points)} models could not be measured"
        notes.append(f"{count}, the first one: {failed[0].name}: {failed[0].error}")
    notes += too_few_samples(task, dense)
    if task.only_precisions:
        notes.append("there is no data: only precisions were tried, judged on the example; give data to try more")
    if _constant(search.points):
        notes.append(f"{task.metric.name} is the same for all models: the search could not tell them apart")
    verdict = _verdict(search, index, met, finished)
    higher = task.metric.higher_is_better
    described = {"name": task.metric.name, "higher_is_better": higher, "scale": task.metric.scale}
    return Frontier(
        described, task.targets.to_dict(), dense, tuple(search.points), index, met, verdict, machine(),
        search.elapsed(), finished, search.names, tuple(engines["rows"]), tuple(notes),
        limits=task.targets.lines(dense, higher), best=best,
    )  # fmt: skip


def _without_kernels(progress: bool) -> list[str]:
    """Return a note where there are no native kernels, and say it at once."""
    why = bindings.missing()
    if why is None:
        return []
    note = f"there are no native kernels ({why}): models run in torch, where zeros and few bits are no faster"
    if progress:
        say([note])
    return [note]


def _other_engines(search: Search) -> dict[str, Any]:
    """Return what the dense model is and takes in other engines. More time or more packages may give more of them."""
    journal, without = search.journal, "".join(f", without {name}" for name in missing_packages())
    journal.get(f"other engines, of {search.task.seconds:g} s{without}", partial(_measured_engines, search))
    known = [value for key, value in journal.values.items() if key.startswith("other engines, of")]
    return max(reversed(known), key=lambda engines: len(engines["rows"]))


def _measured_engines(search: Search) -> dict[str, Any]:
    task = search.task
    if task.progress:
        say([f"{search.elapsed() / 60:5.1f} min  other engines"])

    def has_time(seconds: float) -> bool:
        return search.elapsed() + seconds <= OTHER_ENGINES * task.seconds

    ours = search.dense_fast
    return measured_engines(task.dense, task.example, task.data, task.metric, search.names, ours, has_time)


def _constant(points: Sequence[Point]) -> bool:
    """Return whether models that differ were all measured as equally good."""
    qualities = {p.quality for p in points if p.quality is not None}
    return len(points) > 3 and len(qualities) == 1


def _verdict(search: Search, index: int | None, met: bool, finished: str) -> str:
    """Return a sentence about the best model, and what blocks the limits where it does not keep them."""
    if index is None:
        return "No model could be made; each point names its error."
    targets, point = search.task.targets, search.points[index]
    speed = ", ".join(f"{s:.2f}x at {n}" if len(point.speedup) > 1 else f"{s:.2f}x" for n, s in point.speedup.items())
    loss, lost = targets.text(abs(point.loss or 0.0)), "gained" if (point.loss or 0.0) < 0 else "lost"
    text = f"{'All limits are kept' if met else 'Not all limits are kept'}: {point.name}, {speed} as fast as the dense "
    text += f"compiled model, {loss} of {search.task.metric.name} {lost}."
    if point.checked_loss is not None:
        loses = "gains" if point.checked_loss < 0 else "loses"
        text += f" On data that the search has not used it {loses} {targets.text(abs(point.checked_loss))}."
    used = {n: u for n, u in targets.limits(point).items() if u > 1}
    if not met and used:
        over = [f"{n} {_by(u)}" for n, u in used.items() if n != "max_loss"]
        if "max_loss" in used:
            over.insert(0, f"max_loss by {targets.text((point.loss or 0.0) - (targets.max_loss or 0.0))}")
        text += f" It is the nearest: it misses {', '.join(over)}. {_blocking(search)}"
    ends = {"time": " The time was over before the search was.", "interrupted": " The search was interrupted."}
    return (text + ends.get(finished, "")).strip()


def _by(used: float) -> str:
    """Return in words how much more than a limit is used.

    >>> _by(1.14), _by(13_500.0)
    ('by 14 %', 'by a factor of 13,500')
    """
    return f"by {100 * (used - 1):.0f} %" if used < 2 else f"by a factor of {float(f'{used:.3g}'):,.10g}"


def _blocking(search: Search) -> str:
    """Return a sentence about the fastest and the least lossy point."""
    measured = [p for p in search.points if p.loss is not None]
    fastest = max(measured, key=lambda p: p.slowest)
    loss = search.task.targets.text(fastest.loss or 0.0)
    return f"The fastest model tried is {fastest.slowest:.2f}x as fast and loses {loss} ({fastest.name})."


def _batch_sizes(batch: int | Sequence[int] | None, model: nn.Module) -> tuple[int, ...]:
    """Return checked batch sizes, by default one of a single sample."""
    sizes: tuple[Any, ...] = (1,)
    if batch is not None:
        sizes = tuple(batch) if isinstance(batch, Iterable) else (batch,)
    if not sizes:
        raise RecipeError("batch: expected batch sizes such as (1, 16), got none")
    sizes = tuple(dict.fromkeys(check_int("batch", b, 1, RecipeError) for b in sizes))
    if sizes != (1,) and hf.is_causal_lm(model):
        raise RecipeError(
            "batch has no effect on language models: they are timed at decoding and reading one text; leave it out"
        )
    return sizes


def _split(data: Any, eval_data: Any, evaluate: Any, example: Any) -> tuple[list[Any], list[Any] | None]:
    """Return batches for calibration and for evaluation, which share none.

    The last quarter of the batches, or of the samples of a single batch, is for evaluation: a recipe that reads fewer
    samples of the same source then reads those of the calibration.
    """
    batches = [] if data is None else _checked(data, "data")
    if callable(evaluate) or isinstance(evaluate, Metric):
        if eval_data is not None:
            raise RecipeError("eval_data has no effect on a function: let it read the data itself, or give a name")
        return batches, None
    if eval_data is not None:
        return batches, _checked(eval_data, "eval_data")
    if len(batches) == 1 and (samples := count_samples(batches[0])) > 1:
        first = samples - max(1, samples // HELD_OUT)
        batches = [slice_batch(batches[0], 0, first), slice_batch(batches[0], first, samples)]
    if len(batches) < 2:
        if evaluate is None:
            return batches, batches or [example]
        raise DataError(f"evaluate={evaluate!r} needs data of its own: give eval_data=, or two samples of data or more")
    count = max(1, len(batches) // HELD_OUT)
    return batches[:-count], batches[-count:]


def _checked(data: Any, what: str) -> list[Any]:
    """Return the batches of data; DataError if there is none, or if inputs hold NaN."""
    check_batches(data, what)
    batches = list(data)
    if not batches:
        raise DataError(f"{what} is empty: give a list of batches, or leave {what} out")
    for i, batch in enumerate(batches):
        if any(bool(t.isnan().any()) for t in tensors_in(without_targets(batch))):
            raise DataError(f"{what}: the inputs of batch {i} hold NaN: expected numbers")
        sizes = [len(t) for t in batch if isinstance(t, torch.Tensor) and t.dim()] if isinstance(batch, tuple) else []
        if len(set(sizes)) > 1:
            raise DataError(
                f"{what}: batch {i} has {sizes[0]} samples and {sizes[1]} targets: expected one for each "
                "sample; give several inputs as a dict"
            )
    return batches


def _check_runs(model: nn.Module, batch: Any, what: str) -> None:
    """Raise DataError unless the model can be called with a batch."""
    try:
        with evaluating(model), torch.no_grad():
            call(model, batch if isinstance(batch, tuple | list) else without_targets(batch))
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def _recovery(model: nn.Module, minutes: float, data: Any, calibration: list[Any]) -> Recovery | None:
    """Return what may be trained, or None. DataError where the model does not run on the first batch."""
    if isinstance(minutes, bool) or not isinstance(minutes, Real) or not 0 <= minutes < math.inf:
        raise RecipeError(f"train_minutes: expected a number of at least 0, got {minutes!r}")
    if data is not None and not minutes:
        raise RecipeError("train_data has no effect without training: give train_minutes")
    if not minutes:
        return None
    batches = calibration if data is None else _checked(data, "train_data")
    if not batches:
        raise DataError("training needs data: give train_data=batches, or data=batches")
    _check_runs(model, batches[0], "train_data: the model does not run on its first batch")
    return Recovery(60 * float(minutes), batches)


def is_not_in_fp32(model: nn.Module) -> bool:
    """Return whether a model has parameters in another floating-point type than fp32."""
    return any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())


def with_cast(needed: bool, frontier: Frontier) -> Frontier:
    """Return a frontier whose recipes first cast the model to fp32, as it was searched, if that is needed."""

    def cast(point: Point) -> Point:
        stages = point.recipe["stages"]
        if stages[:1] == [CAST]:
            return point
        return replace(point, recipe={**point.recipe, "stages": [CAST, *stages]})

    if not needed:
        return frontier
    best = None if frontier.best is None else replace(frontier.best, point=cast(frontier.best.point))
    return replace(frontier, dense=cast(frontier.dense), points=tuple(map(cast, frontier.points)), best=best)


def save_result(
    frontier: Frontier, folder: str | os.PathLike[str], *, overwrite: bool = False, files: Any = None
) -> int:
    """Save the best model with its recipe and all points as a folder that `rarefy.load` reads; return its bytes.

    Args:
        frontier: the result of `optimize`.
        folder: where to; it appears as a whole or not at all.
        overwrite: replace a folder of Rarefy.
        files: more files by name, as bytes.

    Raises:
        ContainerError: if the folder cannot be written.
        ModelError: if no model could be made, or for a frontier without its model: one of a file, or of another
            process than the first.
    """
    check_output_folder(folder, overwrite)
    if frontier.best is None and frontier.best_index is not None:
        raise ModelError("this frontier has no model: of several processes the first one has it, and a file has none")
    if frontier.best is None:
        raise ModelError("no model could be made: there is nothing to save")
    recipe = write_yaml(dict(frontier.best.point.recipe)).encode()
    more = {FRONTIER: (frontier.to_json() + "\n").encode(), RECIPE: recipe, **(files or {})}
    if not frontier.best.point.disk_bytes:
        _save_files({FRONTIER: more[FRONTIER], RECIPE: recipe}, folder, overwrite)
        return 0
    return save(frontier.best.model, Path(folder), files=more, overwrite=overwrite)


def _save_files(files: Mapping[str, bytes], folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Write the files of a result whose model runs, but cannot be saved."""
    with atomic_folder(folder, overwrite=overwrite) as partial_folder:
        for name, content in files.items():
            with container_errors(partial_folder / name):
                (partial_folder / name).write_bytes(content)
