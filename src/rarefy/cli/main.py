"""The command line: rarefy compress | optimize | inspect | generate | compile | bench | report | export | doctor ...

Exit codes: 0 done, 1 a check failed, 2 wrong use.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli import (
    bench_command,
    generate_command,
    inference_commands,
    inspect_command,
    migrate_command,
    optimize,
    profile,
    push_command,
    sensitivity,
    shared,
)
from rarefy.cli import report as report_command
from rarefy.cli.shared import Checkpoint, Force, Json, ModelPath, Offline, Quiet, RandomWeights, Threads
from rarefy.common.errors import ModelError, RarefyError, RecipeError, shell_text
from rarefy.common.machine_errors import machine_problem, memory_problem

if TYPE_CHECKING:
    from rarefy.cli.shared import Source

app = typer.Typer(
    name="rarefy",
    help="Makes trained PyTorch models smaller and faster, and proves it.\n\n"
    "Start with: rarefy compress smollm2-135m --recipe smollm2-demo --out out/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Log = Annotated[
    list[str] | None,
    typer.Option(
        help="Also write each epoch's metrics to a JSON lines file, tensorboard:FOLDER, wandb:PROJECT or "
        "mlflow:EXPERIMENT."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the recipe and its data; the recipe's own by default.")]


def _version(value: bool) -> None:
    if value:
        from rarefy.common.version import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    model: ModelPath,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A preset name (see `rarefy recipes`) or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder; it is written completely or not at all.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration data: text, .jsonl, images, .npz, or a built-in name.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out data, in the same forms as --data.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="field=value: replace a field wherever the recipe sets it, such as sparsity=0.4; stage.field=value: "
            "only in this stage or section, such as prune.sparsity=0.4.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the selected layers and the expected size; compute nothing.")
    ] = False,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    offline: Offline = False,
    force: Force = False,
    seed: Seed = None,
    threads: Threads = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory limit, such as 4G, at least 256M: weights stay in their files. For recipes with solvers only."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of resuming a killed run.")] = False,
    log: Log = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the receipt with its table of layers.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model by a recipe, save it, and print the receipt.

    A run with a `train` stage, or a `prune` stage with a solver, saves its state in .OUT.work next to the output.
    After it was killed, the same command resumes it. torchrun --nproc-per-node 2 -m rarefy compress ... shares the work
    among processes; such runs cannot be resumed. Exit code 1: quality fell further than the recipe allows; the folder
    is written all the same.
    """
    from rarefy.common.atomic_io import check_output_folder, parse_bytes

    if verbose and (as_json or quiet):
        raise RecipeError("--verbose has no effect with --json, which has all rows, or with --quiet: leave one out")
    loaded_recipe = _load_recipe(recipe, change, data, eval_data, seed)
    memory_limit = parse_bytes(memory)
    if fresh and not loaded_recipe.solves:
        raise RecipeError(
            f"--fresh has no effect: recipe {loaded_recipe.name} has no prune stage with a solver and no train stage, "
            "so no state is saved"
        )
    if out is None and not dry_run:
        raise RecipeError("compress needs --out FOLDER (or --dry-run)")
    if out is not None:
        check_output_folder(out, force)
    source = shared.source(model, checkpoint, random_weights, offline, quiet)  # may download it
    base = Path(recipe).parent if Path(recipe).is_file() else None
    if dry_run or out is None:
        _dry_run(source, loaded_recipe, base, memory_limit, as_json, quiet)
        return
    run = _Run(source, loaded_recipe, base, out, memory_limit, fresh, force, log, quiet)
    with shared.threads(threads):
        receipt = _compress_and_save(run)
    if receipt is None:  # another process prints it
        return
    shared.show(receipt if as_json or verbose else receipt.summary(), as_json, quiet)
    if not quiet:
        print(f"written to {out}", file=sys.stderr)
    if not receipt.passed:
        print(f"check failed: {receipt.quality['metric']} got worse than the recipe allows", file=sys.stderr)
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Run:
    """One call of `rarefy compress`, checked."""

    source: Source
    recipe: Any
    base: Path | None  # folder of relative paths in the recipe
    out: Path
    memory_limit: int | None
    fresh: bool
    force: bool
    log: list[str] | None
    quiet: bool


def _compress_and_save(run: _Run) -> Any:
    """Compress and save; return the receipt, or None in all processes but the first."""
    from contextlib import nullcontext

    from rarefy.calibration import offload
    from rarefy.checkpoint.save import save
    from rarefy.common.atomic_io import resume_folder
    from rarefy.pipeline.compress import compress_

    with shared.processes() as (rank, num_processes):
        model, tokenizer = shared.load(run.source)
        resumable = run.recipe.solves and num_processes == 1
        state = resume_folder(run.out, run.fresh) if resumable else nullcontext()
        with state as resume_dir, offload.limiting_resident_weights(model, run.memory_limit):
            receipt = compress_(
                model,
                run.recipe,
                tokenizer=tokenizer,
                base=run.base,
                memory=run.memory_limit,
                resume_dir=resume_dir,
                log=run.log if rank == 0 else None,
                progress=not run.quiet and rank == 0,
            )
            if rank != 0:
                return None
            save_options = {"format": run.recipe.save.format, "compress": run.recipe.save.compress}
            files = shared.side_files(run.source)
            save(model, run.out, receipt=receipt, files=files, overwrite=run.force, **save_options)
            return receipt


def _dry_run(
    source: Source, recipe: Any, base: Path | None, memory_limit: int | None, as_json: bool, quiet: bool
) -> None:
    """Check the data that the recipe names, and print what it would do."""
    from rarefy.data.sources import find
    from rarefy.pipeline.dry_run import forecast
    from rarefy.pipeline.run_data import RunData
    from rarefy.pipeline.train_stage import check_stage
    from rarefy.recipe.schema import TrainStage

    named = [(purpose, getattr(recipe.data, purpose, None)) for purpose in ("calibrate", "train", "validate")]
    for purpose, name in [*named, ("data", getattr(recipe.evaluate, "data", None))]:
        if name is not None:
            find(name, base, purpose)
    for stage in recipe.stages:
        if isinstance(stage, TrainStage):
            check_stage(stage, RunData(recipe, None, None, base), None)
    if recipe.cuts:
        _dry_run_with_cuts(source, recipe, base, memory_limit, as_json, quiet)
    else:
        shared.show(forecast(_load_without_weights(source), recipe, memory_limit), as_json, quiet)


app.command()(inspect_command.inspect)
app.command()(optimize.optimize)
app.command()(generate_command.generate)
app.command("compile")(inference_commands.compile_)
app.command()(bench_command.bench)
app.command()(profile.profile)
app.command()(sensitivity.sensitivity)
app.command()(report_command.report)


@app.command()
def export(
    path: Annotated[
        Path,
        typer.Argument(
            help="A folder written by Rarefy; for gguf and pt2 also a Hugging Face folder or a built-in name; for pt2 "
            "also an ONNX file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; for gguf and pt2, the file.")],
    to: Annotated[
        str,
        typer.Option(
            help="hf: a dense folder that transformers loads; safetensors: one dense file; compressed-tensors: a "
            "quantized folder that transformers loads with that package; gguf: a file that llama.cpp loads; pt2: a "
            "file that torch.export.load loads."
        ),
    ] = "hf",
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="For gguf: f32, f16, bf16, q8_0, q4_0 or q4_1. Default: quantized layers as they are, others f16.",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a compressed model as a checkpoint that needs no Rarefy to load."""
    from rarefy.checkpoint.export import export
    from rarefy.common.report import Report
    from rarefy.data import builtin
    from rarefy.evaluation.profiling import folder_bytes
    from rarefy.model import hf

    example: dict[str, Any] = {}
    source: Any = path
    if to == "pt2" and kind is None:
        source, example = _model_and_example(path)
    elif to == "gguf":
        source = Path(str(shared.source(str(path))))
    elif str(path) in builtin.MODELS and not path.exists():
        raise ModelError(
            f"{path} is a built-in model, and export converts folders written by Rarefy: rarefy compress {path} first"
        )
    if to == "onnx":
        raise RecipeError("ONNX files are written in Python: rarefy.export_onnx(model, example, 'model.onnx')")
    if to != "safetensors":
        hf.no_bars()
    export(source, out, to=to, type=kind, overwrite=force, **example)
    num_bytes = out.stat().st_size if out.is_file() else folder_bytes(out, (".safetensors",))
    shared.show(Report(f"exported to {out}", (), {"format": to, "bytes": num_bytes}), as_json, False)


def _model_and_example(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model of a name, and its example input as an option of `export`."""
    from rarefy.cli.inference_commands import example_input

    net, tokenizer = shared.load(shared.source(str(path)))
    return net, {"example": example_input(net, None, None, tokenizer)}


@app.command("recipes")
def recipes_(
    name: Annotated[str | None, typer.Argument(help="Print this recipe instead of the list.")] = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="Show all stages of recipes with their fields and defaults.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print instead the JSON Schema of recipes, for editors.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the built-in recipes, print one, or show all fields that recipes have."""
    from rarefy.common.report import Report
    from rarefy.recipe import parser as recipes

    if (fields or schema) and name is not None:
        raise RecipeError(f"{'--fields' if fields else '--schema'} describes all recipes: leave {name!r} out")
    if schema:
        print(json.dumps(recipes.json_schema(), indent=1))
    elif fields:
        report = Report("fields of recipes", recipes.vocabulary())
        print(report.to_json() if as_json else "\n".join([report.title, *map(_field_text, report.rows)]))
    elif name is None:
        rows = tuple({"recipe": n, "about": recipes.load(n).about} for n in recipes.presets())
        shared.show(Report("recipes", rows), as_json, False)
    elif as_json:
        print(json.dumps(recipes.load(name).to_dict(), indent=1))
    else:
        recipes.load(name)
        print(recipes.presets().get(name, Path(name)).read_text(encoding="utf-8"), end="")


def _field_text(row: Mapping[str, str]) -> str:
    """Return a field of recipes in lines of at most 100 characters."""
    default = f", default {row['default']}" if row["default"] else ""
    texts = (f"{row['where']}: {row['what']}{default}", row["meaning"])
    indents = ("", "    ")
    return "\n".join(
        textwrap.fill(t, 100, initial_indent=i, subsequent_indent="    ") for t, i in zip(texts, indents) if t
    )


app.command()(migrate_command.migrate)
app.command()(push_command.push)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions and CPU features, and how to install what is missing."""
    from rarefy.cli.doctor import examine

    shared.show(examine(), as_json, False)


def main() -> None:
    """Run the command line. User errors print one line and exit with 2, Ctrl-C with 130, SIGTERM with 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that temporary files are removed
    show_elsewhere, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        app(standalone_mode=True)
    except RarefyError as error:
        print(f"rarefy: {memory_problem(error) or shell_text(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        shared.discard_output()
        sys.exit(0)
    except Exception as error:
        problem = machine_problem(error)
        if problem is None:
            raise
        print(f"rarefy: {problem}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and type(sys.stdout).__name__ == "PacifyFlushWrapper":  # typer met such a pipe
            sys.exit(0)
        if isinstance(end, shared.Ended) or (isinstance(end, SystemExit) and end.code not in (130, 143)):
            if end.code == 2 and sys.argv[1:2] == ["compress"]:
                _explain_fields(sys.argv[2:])
            raise
        print("rarefy: interrupted; the output was not written", file=sys.stderr)
        sys.exit(end.code if isinstance(end, SystemExit) else 130)
    finally:
        warnings.showwarning = show_elsewhere
        _leave(sys.exc_info()[1])


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as a line, without the place in the code."""
    print(f"rarefy: warning: {message}", file=sys.stderr)


def _explain_fields(words: Sequence[str]) -> None:
    """Print how to set a field of the recipe that was written as an option of `compress`."""
    from rarefy.recipe import parser as recipes

    options = {o for p in typer.main.get_command(app).commands["compress"].params for o in p.opts}  # type: ignore[attr-defined]
    fields = {row["where"].rpartition(".")[2] for row in recipes.vocabulary()}
    for word, following in zip(words, [*words[1:], ""]):
        option, equals, value = word.partition("=")
        field = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and option not in options and field in fields:
            print(
                f"rarefy: {field} is a field of the recipe: pass --set {field}={value if equals else following}",
                file=sys.stderr,
            )


def _leave(error: BaseException | None) -> None:
    """End a process of torchrun at once: a normal exit would crash while its threads hold Python objects."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
    if error is not None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


PATHS = {
    "data.calibrate",
    "data.train",
    "data.validate",
    "evaluate.data",
    "calibrate",
    "validate",
    "teacher",
    "distill.teacher",
    "train.distill.teacher",
}  # fields of recipes that name files


def _load_recipe(
    recipe: str, pairs: list[str] | None, data: str | None, eval_data: str | None, seed: int | None
) -> Any:
    """Load the recipe with the changes of the command line; paths on the command line are relative to this folder."""
    from rarefy.recipe import parser as recipes
    from rarefy.recipe.schema import Data

    changes: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {pair!r}: expected field=value, such as sparsity=0.4")
        value = recipes.value(text, f"--set {pair!r}")
        changes[key] = _absolute(value) if key in PATHS and isinstance(value, str) else value
    if seed is not None:
        changes["seed"] = seed
    loaded = recipes.load(recipe, **changes)
    if data is not None:
        loaded = loaded.replace(data=(loaded.data or Data(seed=loaded.seed)).replace(calibrate=_absolute(data)))
    if eval_data is not None:
        if loaded.evaluate is None:
            raise RecipeError(
                f"--eval-data has no effect: recipe {loaded.name} does not evaluate; "
                "add --set 'evaluate={metric: perplexity, samples: 64}'"
            )
        loaded = loaded.replace(evaluate=loaded.evaluate.replace(data=_absolute(eval_data)))
    return loaded


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if os.path.exists(source) else source


def _dry_run_with_cuts(
    source: Source, recipe: Any, base: Path | None, memory: int | None, as_json: bool, quiet: bool
) -> None:
    """Print what cuts would remove, and the forecast of the other stages for the remaining model."""
    from rarefy.pipeline.dry_run import forecast
    from rarefy.pipeline.stages import rehearse_cuts_

    model, tokenizer = shared.load(source)
    reports = rehearse_cuts_(model, recipe, tokenizer=tokenizer, base=base)
    expected = forecast(model, recipe, memory)
    expected = replace(expected, title=f"after the cuts: {expected.title}")
    if as_json:
        print(json.dumps({"cuts": [r.to_dict() for r in reports], "forecast": expected.to_dict()}, indent=1))
        return
    for report in (*reports, expected):
        shared.show(report, False, quiet)
        if not quiet:
            print()


def _load_without_weights(source: Source) -> Any:
    from rarefy.checkpoint import pt2_load
    from rarefy.cli import onnx_files
    from rarefy.model import hf

    if not isinstance(source, Path) or onnx_files.is_file(source) or pt2_load.is_file(source):
        return shared.load(source)[0]
    if not hf.is_folder(source):
        raise ModelError(f"{source}: a dry run needs the model's config.json")
    return hf.load_folder(source, meta=True)


if __name__ == "__main__":
    main()
