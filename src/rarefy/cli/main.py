"""rarefy compress | inspect | generate | compile | bench | export | recipes | migrate | doctor. Exit codes: 0 done,
1 a check failed, 2 wrong use."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import inference_commands, shared
from rarefy.cli.shared import Force, Json, ModelPath, Quiet, Threads
from rarefy.common.errors import ModelError, RarefyError, RecipeError

app = typer.Typer(
    name="rarefy",
    help="Makes trained PyTorch models smaller and faster, and proves it.\n\n"
    "Start with: rarefy compress smollm2-135m --recipe smollm2-demo --out out/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Seed = Annotated[int | None, typer.Option(help="Seed of the recipe and its data; the recipe's own by default.")]


def _version(shown: bool) -> None:
    if shown:
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
        Path | None, typer.Option("--out", "-o", help="Folder to write; it appears whole or not at all.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration data: text, .jsonl, images, .npz, or a built-in name.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out data, as --data.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="field=value: replace a field of the recipe, e.g. sparsity=0.4.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which layers match and what size to expect; compute nothing.")
    ] = False,
    force: Force = False,
    seed: Seed = None,
    threads: Threads = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory to stay near, from 256M up, such as 4G: weights stay in files. For recipes of solvers alone."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew where a killed run could go on.")] = False,
    log: Annotated[
        list[str] | None,
        typer.Option(
            help="Where each epoch's numbers go besides: a file for JSON lines, tensorboard:FOLDER, wandb:PROJECT."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the receipt with its table of layers.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model by a recipe, write it, and print the receipt.

    A run with a solver or training keeps its state in .OUT.work beside the output, and goes on from there after it was
    killed. torchrun --nproc-per-node 2 -m rarefy compress ... shares the work among processes, and keeps no state.
    Exit code 1 means that quality fell further than the recipe allows; the folder is written all the same.
    """
    from rarefy.common.atomic_io import check_output_folder, parse_bytes

    if verbose and (as_json or quiet):
        raise RecipeError("--verbose has no effect with --json, which has all rows, or with --quiet: leave one out")
    plan = _plan(recipe, change, data, eval_data, seed)
    most = parse_bytes(memory)
    if fresh and not plan.solves:
        what = "has no solver or training, whose state could be kept"
        raise RecipeError(f"--fresh has no effect: recipe {plan.name} {what}")
    source = shared.source(model)
    if dry_run:
        from rarefy.data.sources import find
        from rarefy.pipeline.dry_run import forecast
        from rarefy.pipeline.run_data import RunData
        from rarefy.pipeline.train_stage import check_stage
        from rarefy.recipe.schema import TrainStage

        base = Path(recipe).parent if Path(recipe).is_file() else None
        if out is not None:
            check_output_folder(out, force)
        for purpose, source_ in (
            *((p, plan.data) for p in ("calibrate", "train", "validate")),
            ("data", plan.evaluate),
        ):
            named = getattr(source_, purpose, None)
            if named is not None:
                find(named, base, purpose)
        for stage in plan.stages:
            if isinstance(stage, TrainStage):
                check_stage(stage, RunData(plan, None, None, base), None)
        if plan.cuts:
            _rehearse(source, plan, base, most, as_json, quiet)
        else:
            shared.show(forecast(_skeleton(source), plan, most), as_json, quiet)
        return
    if out is None:
        raise RecipeError("compress needs --out FOLDER (or --dry-run)")
    check_output_folder(out, force)
    from contextlib import nullcontext

    from rarefy.calibration import offload
    from rarefy.checkpoint.export import side_files
    from rarefy.checkpoint.save import save
    from rarefy.common.atomic_io import resume_folder
    from rarefy.pipeline import compress as api

    with shared.threads(threads), _processes() as (rank, many):
        loaded, tokenizer = shared.load(source)
        base = Path(recipe).parent if Path(recipe).is_file() else None
        state = resume_folder(out, fresh) if plan.solves and many == 1 else nullcontext()
        with state as work, offload.limiting_resident_weights(loaded, most):
            told = {"log": log if rank == 0 else None, "progress": not quiet and rank == 0}
            receipt = api.compress_(loaded, plan, tokenizer=tokenizer, base=base, memory=most, resume_dir=work, **told)
            if rank != 0:
                return
            files = side_files(source)
            how = {"format": plan.save.format, "compress": plan.save.compress}
            save(loaded, out, receipt=receipt, files=files, overwrite=force, **how)
    shared.show(receipt if as_json or verbose else receipt.summary(), as_json, quiet)
    if not quiet:
        print(f"written to {out}", file=sys.stderr)
    if not receipt.passed:
        print(f"check failed: {receipt.quality['metric']} got worse than the recipe allows", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(help="A folder of ours, a Hugging Face folder, a .safetensors file, a built-in name.")
    ],
    groups: Annotated[
        bool,
        typer.Option("--groups", help="Show instead which units belong together, and which a cut could remove."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show every tensor of a checkpoint: shape, type, format, sparsity, pattern, bytes."""
    from rarefy.checkpoint.inspect import inspect

    if not groups:
        shared.show(inspect(shared.source(path)), as_json, False)
        return
    from rarefy.dependency import graph
    from rarefy.evaluation.example_inputs import example_of

    model, _ = shared.load(shared.source(path))
    shared.show(graph.groups(model, example_of(model, 32, 2)), as_json, False)


app.command()(inference_commands.generate)
app.command("compile")(inference_commands.compile_)
app.command()(inference_commands.bench)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A folder of ours.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="hf: a dense folder that transformers loads; safetensors: one dense file; compressed-tensors: a "
            "quantized folder that transformers loads with that package."
        ),
    ] = "hf",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a compressed model as a checkpoint that needs no Rarefy to load."""
    from rarefy.checkpoint.export import export
    from rarefy.common.report import Report
    from rarefy.data import builtin
    from rarefy.evaluation.profiling import folder_bytes

    if str(path) in builtin.MODELS and not path.exists():
        raise ModelError(f"{path} is a built-in model, and export writes folders of ours: rarefy compress {path} first")
    export(path, out, to=to, overwrite=force)
    shared.show(
        Report(f"exported to {out}", (), {"format": to, "bytes": folder_bytes(out, (".safetensors",))}), as_json, False
    )


@app.command("recipes")
def recipes_(
    name: Annotated[str | None, typer.Argument(help="Print this recipe instead of the list.")] = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="Show instead all that a recipe can say: stages, their fields, defaults.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print instead the JSON Schema of recipes, for editors.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the recipes that ship with Rarefy, print one, or show all that recipes can say."""
    from rarefy.common.report import Report
    from rarefy.recipe import parser as recipes

    if (fields or schema) and name is not None:
        raise RecipeError(f"{'--fields' if fields else '--schema'} is about all recipes: leave {name!r} out")
    if schema:
        print(json.dumps(recipes.json_schema(), indent=1))
    elif fields:
        shared.show(Report("what a recipe can say", recipes.vocabulary()), as_json, False)
    elif name is None:
        rows = tuple({"recipe": n, "about": recipes.load(n).about} for n in recipes.presets())
        shared.show(Report("recipes", rows), as_json, False)
    elif as_json:
        print(json.dumps(recipes.load(name).to_dict(), indent=1))
    else:
        recipes.load(name)
        print(recipes.presets().get(name, Path(name)).read_text(encoding="utf-8"), end="")


@app.command()
def migrate(
    source: Annotated[Path, typer.Argument(help="A recipe (.yaml, .md) or config (.json) of another tool.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; else it is printed.")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out what has no counterpart, with a comment.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a recipe of another tool into one of ours, with a comment wherever its meaning changed.

    Reads SparseML's recipes (legacy tags, stages, Markdown), llm-compressor's, NNCF configs before version 3, and, as
    JSON or YAML, a WeightPruningConfig of Neural Compressor and configs of torch.ao.pruning. Runs nothing of a file.
    """
    from rarefy.common.atomic_io import write_bytes_atomic
    from rarefy.migration.migrate import migrate as migrate_

    made = migrate_(source, skip=skip)
    if out is not None:
        if out.is_dir() or (out.exists() and not force):
            raise RecipeError(f"{out} exists: pass --force, or give another name")
        write_bytes_atomic(out, made.text.encode())
    if as_json:
        print(json.dumps({"tool": made.tool, "recipe": made.recipe.to_dict(), "yaml": made.text}, indent=1))
    elif out is None:
        print(made.text, end="")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, CPU features, and what is missing and how to get it."""
    from rarefy.cli.doctor import examine

    shared.show(examine(), as_json, False)


def main() -> None:
    """Run the command line; user errors are one line and exit code 2, Ctrl-C is 130, SIGTERM 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that nothing half made is left
    try:
        app(standalone_mode=True)
    except RarefyError as error:
        print(f"rarefy: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, shared.Ended) or (isinstance(end, SystemExit) and end.code not in (130, 143)):
            raise
        print("rarefy: interrupted; nothing was written", file=sys.stderr)
        sys.exit(end.code if isinstance(end, SystemExit) else 130)
    finally:
        _leave(sys.exc_info()[1])


def _leave(error: BaseException | None) -> None:
    """Where processes were joined, end at once: their threads may hold Python objects, and the interpreter's end would
    stop them in the middle (SIGABRT)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
    if error is not None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun has started, if it has; give this one's number and how many there are."""
    rank, many = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if many == 1:
        yield 0, 1
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield rank, many
    dist.barrier()  # none leaves while another still asks it for sums


def _plan(recipe: str, pairs: list[str] | None, data: str | None, eval_data: str | None, seed: int | None) -> Any:
    """The recipe with what the command line changes in it; paths of the command line start here, not at the recipe."""
    from rarefy.recipe import parser as recipes
    from rarefy.recipe.schema import Data

    changes: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {pair!r}: write field=value, such as sparsity=0.4")
        changes[key] = recipes.value(text, f"--set {pair!r}")
    if seed is not None:
        changes["seed"] = seed
    plan = recipes.load(recipe, **changes)
    if data is not None:
        plan = plan.replace(data=(plan.data or Data()).replace(calibrate=_here(data)))
    if eval_data is not None:
        if plan.evaluate is None:
            raise RecipeError(
                f"--eval-data has no effect: recipe {plan.name} does not evaluate; "
                "add --set 'evaluate={metric: perplexity}'"
            )
        plan = plan.replace(evaluate=plan.evaluate.replace(data=_here(eval_data)))
    return plan


def _here(source: str) -> str:
    return str(Path(source).absolute()) if Path(source).exists() else source


def _rehearse(source: Path, plan: Any, base: Path | None, memory: int | None, as_json: bool, quiet: bool) -> None:
    """Show what cuts would take out, and what the other stages would make of the rest."""
    from rarefy.pipeline.dry_run import forecast
    from rarefy.pipeline.stages import rehearse_cuts_

    model, tokenizer = shared.load(source)
    told = rehearse_cuts_(model, plan, tokenizer=tokenizer, base=base)
    expected = forecast(model, plan, memory)
    expected = replace(expected, title=f"after the cuts: {expected.title}")
    if as_json:
        print(json.dumps({"cuts": [r.to_dict() for r in told], "forecast": expected.to_dict()}, indent=1))
        return
    for report in (*told, expected):
        shared.show(report, False, quiet)
        if not quiet:
            print()


def _skeleton(source: Path) -> Any:
    from rarefy.model import hf

    if not hf.is_folder(source):
        raise ModelError(f"{source}: a dry run needs the model's config.json")
    return hf.load_folder(source, meta=True)


if __name__ == "__main__":
    main()
