"""What the commands of the command line share: their common options, models by name, results on standard output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.common.errors import ModelError, RecipeError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no report; errors and files only.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads for torch; by default all cores.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output folder that exists.")]
ModelPath = Annotated[str, typer.Argument(help="A Hugging Face folder, a folder of ours, or a built-in name.")]
Precision = Annotated[
    str | None,
    typer.Option(help="int8 runs linear layers and convolutions in 8 bits; outputs change a little. Default: fp32."),
]


class Ended(SystemExit):
    """The end of a command that was stopped, and has said itself what there is of its work."""


def source(name: str) -> Path:
    """Return the folder of a path or a built-in name; ModelError with the nearest where there is none."""
    from rarefy.common.errors import nearest
    from rarefy.data import builtin

    if name in builtin.MODELS and not Path(name).exists():
        return builtin.model_folder(name)
    if not Path(name).exists():
        beside = [str(Path(name).with_name(p.name)) for p in Path(name).parent.glob("*") if p.is_dir()]
        near = nearest(name, [*builtin.MODELS, *beside])
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(
            f"no model folder {name!r} and no built-in model of that name ({', '.join(builtin.MODELS)}){hint}"
        )
    return Path(name)


def load_any(folder: Path) -> tuple[Any, Any]:
    """Return what a folder holds, a model, a compiled one or a decoder, and its tokenizer or None; ModelError for what
    is none. O(weights)."""
    from rarefy.checkpoint import legacy_layouts
    from rarefy.checkpoint.load import load as load_folder
    from rarefy.common.atomic_io import INDEX, PICKLE_SUFFIXES
    from rarefy.model import hf

    if (folder / INDEX).is_file():  # a decoder needs no transformers
        return load_folder(folder), hf.load_tokenizer(folder)
    hf.no_bars()
    if legacy_layouts.is_compressed(folder):
        return load_folder(folder), hf.load_tokenizer(folder)
    if not hf.is_folder(folder):
        hint = "; a pickle is never opened: load it in Python and call rarefy.compress_"
        hint = hint if folder.suffix in PICKLE_SUFFIXES else ""
        hint = "; rarefy.from_onnx reads it in Python" if folder.suffix == ".onnx" else hint
        raise ModelError(f"{folder} is neither a folder of ours nor a Hugging Face folder (no config.json){hint}")
    return hf.load_folder(folder), hf.load_tokenizer(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """Return a folder's model and its tokenizer or None; ModelError for what is none, or compiled already."""
    model, tokenizer = load_any(folder)
    kind = kind_of(model)
    if kind != "model":
        raise ModelError(f"{folder} holds a {kind}: give the folder of what it was compiled from")
    return model, tokenizer


def kind_of(made: Any) -> str:
    """Return "model", "compiled model" or "decoder"."""
    from rarefy.compiler.executor import Compiled
    from rarefy.generation.decoder import Decoder

    return "decoder" if isinstance(made, Decoder) else "compiled model" if isinstance(made, Compiled) else "model"


def show(result: Any, as_json: bool, quiet: bool) -> None:
    """Print a report, as JSON if asked for."""
    if as_json:
        print(result.to_json())
    elif not quiet:
        print(result)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with so many threads; RecipeError for more than there are cores."""
    from rarefy.evaluation.profiling import threads

    most = os.cpu_count() or 1
    if count is not None and count > most:
        raise RecipeError(f"--threads {count}: this machine has {most} cores; more threads only wait for each other")
    with threads(count):
        yield
