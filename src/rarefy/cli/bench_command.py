"""The command bench."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.shared import Checkpoint, InputShape, Json, ModelPath, Offline, Precision, Quiet, RandomWeights, Threads
from rarefy.common.errors import ModelError, RecipeError
from rarefy.common.report import Report

if TYPE_CHECKING:
    from rarefy.cli.shared import Source

TOKENS, REPEATS, NEW = 256, 5, 24  # defaults for models in folders
STREAMS_A_CORE = 4  # at most


@dataclass(frozen=True)
class _Bench:
    """One call of `rarefy bench`; None where an option was not given."""

    model: str
    source: Source
    against: str | None
    accelerate: bool
    engine: bool
    precision: str | None
    tokens: int | None
    new: int | None
    batch: int | None
    input_shape: list[str] | None
    streams: int | None
    repeats: int | None
    table: Path | None
    verbose: bool
    as_json: bool
    quiet: bool


def bench(
    model: ModelPath,
    against: Annotated[
        str | None,
        typer.Option(help="A second model, timed alternately with the first; of an ONNX file a compiled one."),
    ] = None,
    accelerate: Annotated[
        bool,
        typer.Option(
            "--accelerate", help="Also time it with sparse layers where they are faster (rarefy.accelerate_)."
        ),
    ] = False,
    engine: Annotated[
        bool, typer.Option(help="Also time the model on the engine, as a decoder or a compiled model.")
    ] = True,
    precision: Precision = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Input length in tokens, by default 256; for language models the prompt length. Of ONNX files open "
            "lengths, by default 128.",
        ),
    ] = None,
    new: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a language model generates, by default 24.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size of forward calls (not for language models), by default 1."),
    ] = None,
    input_shape: InputShape = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    offline: Offline = False,
    streams: Annotated[
        int | None,
        typer.Option(min=2, help="Of ONNX files: so many callers at once, which share the threads, for throughput."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=2, help="Repeats after warm-up, by default 5; of ONNX files those of a few seconds."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="Write the latency of each layer shape by format, sparsity and batch to this JSON file."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --table.")] = False,
    threads: Threads = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --accelerate, also print what runs each layer.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time models alternately: tokens/s for language models, milliseconds per call otherwise.

    The model is timed in eager torch and on the engine (--precision int8: in 8 bits). A folder that `rarefy
    compile` wrote is timed as it is.

    An ONNX file is timed on the engine in fp32, with --precision in that too, in ONNX Runtime, and in OpenVINO where it
    is installed. Each call takes and returns numpy arrays. The report has the time of a call, samples per second, and
    how far outputs are from those of ONNX Runtime, relative to the largest entry. --streams 4 lets four threads call at
    once. --against times a compiled folder with inputs of the same names, such as that of `rarefy optimize`.

    rarefy bench smollm2-135m --precision int8 --tokens 128

    rarefy bench out/ --against smollm2-135m --accelerate

    rarefy bench model.onnx --precision int8 --input-shape x=1x3x224x224
    """
    from rarefy.cli import onnx_files

    _check_bench_options(against, accelerate, engine, precision, table, force)
    if verbose and (not accelerate or as_json or quiet):
        raise RecipeError("--verbose has no effect without --accelerate, nor with --json or --quiet: leave it out")
    source = shared.source(model, checkpoint, random_weights, offline, quiet)
    options = _Bench(
        model, source, against, accelerate, engine, precision, tokens, new, batch, input_shape, streams,
        repeats, table, verbose, as_json, quiet,
    )  # fmt: skip
    with shared.threads(threads):
        if onnx_files.is_file(options.source):
            _bench_file(options)
        else:
            _bench_folder(options)


def _check_bench_options(
    against: str | None,
    accelerate: bool,
    engine: bool,
    precision: str | None,
    table: Path | None,
    force: bool,
) -> None:
    if table is not None and (against or accelerate or precision):
        raise RecipeError("--table times layers, not models: leave --against, --accelerate and --precision out")
    if table is not None and table.exists() and not force:
        raise RecipeError(f"--table {table}: the file exists: give another name, or --force to replace it")
    if table is not None and (table.is_dir() or not table.resolve().parent.is_dir()):
        raise RecipeError(f"--table {table}: expected the name of a file in an existing folder")
    if precision is not None and not engine:
        raise RecipeError("--precision has no effect without the engine: leave --no-engine out")


def _bench_folder(options: _Bench) -> None:
    """Time the model of a folder."""
    from rarefy.cli.benchmark import bench_models, engine_of, generates_text

    if options.streams:
        raise RecipeError(f"--streams has no effect: {options.model} is no ONNX file")
    net, _ = shared.load_any(options.source, options.input_shape)
    kind = shared.kind_of(net)
    if kind != "model":
        idle = {"--table": options.table, "--accelerate": options.accelerate, "--precision": options.precision}
        name = next((name for name, value in idle.items() if value), None)
        if name is not None:
            raise RecipeError(f"{name} has no effect: {options.model} holds a {kind}, which is timed as it is")
    tokens, batch, repeats = options.tokens or TOKENS, options.batch or 1, options.repeats or REPEATS
    subjects, notes, layers = {"model": net}, dict[str, Any](), None
    if options.against:
        subjects["against"] = _load_second(options)
    generate = all(map(generates_text, subjects.values()))
    if options.batch and generate:
        raise RecipeError("--batch has no effect: language models read and generate one text at a time")
    if options.new and not (generate and options.table is None):
        raise RecipeError("--new has no effect: no text is generated")
    if options.table is not None:
        _write_latency_table(net, tokens, batch, repeats, options.table, options.as_json, options.quiet)
        return
    if options.accelerate:
        subjects["accelerated"], layers = _accelerated(net, tokens, batch, options.quiet)
        notes["layers that run sparse"] = layers.summary["layers that run sparse"]
    if options.engine and kind == "model":
        on_engine, why = engine_of(net, tokens, batch, options.precision)
        if on_engine is None and options.precision:
            raise RecipeError(f"--precision {options.precision}: {why}")
        if on_engine is None:
            notes["no engine"] = why
        else:
            subjects["engine"] = on_engine
    report = bench_models(subjects, tokens, options.new or NEW, batch, repeats, not options.quiet)
    shared.show(replace(report, summary={**report.summary, **notes}), options.as_json, options.quiet)
    if options.verbose:
        print(f"\n{layers}")


def _load_second(options: _Bench) -> Any:
    """Return the model of --against, which is no ONNX file."""
    from rarefy.cli import onnx_files

    source = shared.source(str(options.against), quiet=options.quiet)
    if onnx_files.is_file(source):
        hint = f"give it first, rarefy bench {source} --against {options.model}"
        if onnx_files.is_file(options.source):
            hint = f"rarefy compile {source} --out fast/ makes a folder for --against"
        raise RecipeError(f"--against {source} is an ONNX file: {hint}")
    return shared.load_any(source)[0]


def _bench_file(options: _Bench) -> None:
    """Time an ONNX file in all engines."""
    from rarefy.cli.onnx_benchmark import bench_file

    idle: dict[str, Any] = {"--table": options.table, "--accelerate": options.accelerate, "--new": options.new}
    idle |= {"--no-engine": not options.engine, "--repeats": options.streams and options.repeats}
    name = next((name for name, value in idle.items() if value), None)
    if name is not None:
        reason = "--streams times each engine for some seconds" if name == "--repeats" else "the model is an ONNX file"
        raise RecipeError(f"{name} has no effect: {reason}")
    limit = STREAMS_A_CORE * (os.cpu_count() or 1)
    if (options.streams or 1) > limit:
        raise RecipeError(f"--streams: expected at most {limit}, {STREAMS_A_CORE} for each core, got {options.streams}")
    against = None if options.against is None else (options.against, _load_second(options))
    if against is not None and shared.kind_of(against[1]) != "compiled model":
        raise ModelError(f"{against[0]} holds a {shared.kind_of(against[1])}: give a folder of rarefy compile")
    net, _ = shared.load(options.source, options.input_shape, options.batch, options.tokens)
    sizes, file = (options.tokens, options.batch), Path(str(options.source))
    report = bench_file(
        net, file, options.precision, sizes, against, options.streams or 1, options.repeats, not options.quiet
    )
    shared.show(report, options.as_json, options.quiet)


def _batches(net: Any, tokens: int, batch: int) -> tuple[int, ...]:
    """Return the batch sizes that linear layers see: single tokens and the prompt, or all tokens of a batch."""
    from rarefy.evaluation.example_inputs import generates

    return (1, tokens) if generates(net) else (batch * tokens,)


def _write_latency_table(
    net: Any, tokens: int, batch: int, repeats: int, file: Path, as_json: bool, quiet: bool
) -> None:
    from rarefy.common.atomic_io import container_errors, write_text_atomic
    from rarefy.evaluation.example_inputs import example_of
    from rarefy.runtime.latency_table import latency_table

    sizes = _batches(net, tokens, batch)
    report = latency_table(net, sizes, example_of(net, tokens, batch), repeats=repeats, progress=not quiet)
    with container_errors(file):
        write_text_atomic(file, report.to_json())
    shared.show(report, as_json, quiet)


def _accelerated(net: Any, tokens: int, batch: int, quiet: bool) -> tuple[Any, Report]:
    """Return a copy of the model with sparse layers, and the report of `accelerate_`."""
    from rarefy.evaluation.example_inputs import example_of
    from rarefy.runtime.accelerate import accelerate_

    fast = copy.deepcopy(net)
    return fast, accelerate_(fast, _batches(net, tokens, batch), example_of(fast, tokens, batch), progress=not quiet)
