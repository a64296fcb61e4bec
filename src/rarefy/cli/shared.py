"""Shared by all commands: common options, loading models by name, printing results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.common.errors import ModelError, RecipeError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only: no progress bars and no report.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of threads; by default all cores.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output folder that exists.")]
ModelPath = Annotated[
    str, typer.Argument(help="A Hugging Face folder, a folder written by Rarefy, or a built-in name.")
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="bf16 runs linear layers and attention in bfloat16; int8 runs linear layers and convolutions in 8 "
        "bits. Outputs change a little. Default: fp32."
    ),
]


class Ended(SystemExit):
    """Exit of a command that was stopped and has already reported its partial result."""


def source(name: str) -> Path:
    """Return the folder of a path or a built-in name; ModelError with similar names if there is none."""
    from rarefy.common.errors import nearest
    from rarefy.data import builtin

    if name in builtin.MODELS and not Path(name).exists():
        return builtin.model_folder(name)
    if not Path(name).exists():
        siblings = [str(Path(name).with_name(p.name)) for p in Path(name).parent.glob("*") if p.is_dir()]
        near = nearest(name, [*builtin.MODELS, *siblings])
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(
            f"no model folder {name!r} and no built-in model of that name ({', '.join(builtin.MODELS)}){hint}"
        )
    return Path(name)


def load_any(folder: Path) -> tuple[Any, Any]:
    """Return the model, compiled model or decoder in a folder, and its tokenizer or None.

    Raises ModelError if the folder holds none of them. Costs O(weights).
    """
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
        raise ModelError(
            f"{folder} is neither a folder written by Rarefy nor a Hugging Face folder (no config.json){hint}"
        )
    return hf.load_folder(folder), hf.load_tokenizer(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """Return the model in a folder and its tokenizer or None; ModelError if it is compiled or not a model."""
    model, tokenizer = load_any(folder)
    kind = kind_of(model)
    if kind != "model":
        raise ModelError(f"{folder} holds a {kind}: give the folder of what it was compiled from")
    return model, tokenizer


def kind_of(model: Any) -> str:
    """Return "model", "compiled model" or "decoder"."""
    from rarefy.compiler.executor import Compiled
    from rarefy.generation.decoder import Decoder

    return "decoder" if isinstance(model, Decoder) else "compiled model" if isinstance(model, Compiled) else "model"


def files_beside_engine(source: Path) -> dict[str, bytes]:
    """Return the files of a model's folder that a compiled model or decoder needs too: those of its tokenizer."""
    from rarefy.checkpoint.export import side_files

    config = source / "config.json"  # transformers needs it to find the tokenizer class
    return side_files(source) | ({config.name: config.read_bytes()} if config.is_file() else {})


def show(result: Any, as_json: bool, quiet: bool) -> None:
    """Print a report as text or JSON, unless `quiet`."""
    if as_json:
        print(result.to_json())
    elif not quiet:
        print(result)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run the block with this number of threads; RecipeError if the machine has fewer cores."""
    from rarefy.evaluation.profiling import threads

    num_cores = os.cpu_count() or 1
    if count is not None and count > num_cores:
        raise RecipeError(f"--threads {count}: expected at most {num_cores}, the number of cores")
    with threads(count):
        yield
