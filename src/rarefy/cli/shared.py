"""Shared by all commands: common options, loading models by name, printing results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.common.errors import ModelError, RecipeError
from rarefy.common.plain_file import usable_path

if TYPE_CHECKING:
    from rarefy.model.vision import VisionName

    Source = Path | VisionName

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only: no progress bars and no report.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of threads; by default as torch decides.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output folder that Rarefy wrote, or an empty one.")]
ModelPath = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder, a folder written by Rarefy, an ONNX, GGUF or .pt2 file, a built-in name, "
        "timm/NAME, torchvision/NAME, or a model of the hub, ORG/NAME."
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Weights of a model of timm or torchvision: a .safetensors or .pth file."),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Build a model of timm or torchvision with random weights.")
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use no network: models of the hub come from the cache. HF_HUB_OFFLINE=1 too.")
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME=SIZES",
        help="Sizes of an input of an ONNX or .pt2 file, as x=1x3x224x224; repeat the option for more. Default: those "
        "of the file. Sizes that it leaves open are --batch and --tokens; heights and widths of images are 224.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="bf16 runs linear layers and attention in bfloat16; int16 (not for language models) runs linear layers "
        "and convolutions in 16-bit integers; int8 runs them in 8 bits. Outputs change a little. Without: fp32."
    ),
]
DecoderPrecision = Annotated[
    str | None,
    typer.Option(
        help="bf16 runs linear layers and attention in bfloat16; int8 runs linear layers and convolutions in 8 "
        "bits. Language models also: int6 and int5, with a scale for 32 inputs; int4, with a zero point too. Other "
        "models also: int16, linear layers and convolutions in 16-bit integers. Outputs change a little. Default: "
        "fp32; of GGUF files their own, int8 if they are quantized."
    ),
]
CachePrecision = Annotated[
    str | None,
    typer.Option(help="Precision of the KV cache: fp32, or int8 for a quarter of its memory and faster long texts."),
]


FILES = (".onnx", ".pt2", ".gguf")  # endings of files that hold one model


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Join the process group that torchrun started, if any; yield this process's rank and the number of processes."""
    rank, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1:
        yield 0, 1
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield rank, num_processes
    with suppress(RuntimeError):  # a process that has failed says so itself
        dist.barrier()  # other processes may still need this one for a reduction


class Ended(SystemExit):
    """Exit of a command that was stopped and has already reported its partial result."""


def source(
    name: str,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    offline: bool = False,
    quiet: bool = False,
) -> Source:
    """Return the folder or ONNX file of a path, the folder of a built-in name or of a model of the hub, or the name of
    a model of timm or torchvision.

    What exists here comes before names of the hub, and a path in a folder that exists is no such name.

    Args:
        name: the path or name.
        checkpoint: the value of --checkpoint.
        random_weights: whether --random-weights was given.
        offline: whether --offline was given.
        quiet: whether downloads show no progress bar.

    Raises:
        ModelError: there is none; the message has similar names.
        RecipeError: --checkpoint or --random-weights with a model that is not of timm or torchvision.
    """
    from rarefy.data import builtin
    from rarefy.model import hub
    from rarefy.model.vision import parse_vision_name

    vision = None if usable_path(name, ModelError).exists() else parse_vision_name(name)
    if vision is not None:
        options: dict[str, Any] = {"checkpoint": checkpoint, "random": random_weights, "offline": offline}
        return replace(vision, progress=not quiet, **options)
    for option, value in (("--checkpoint", checkpoint), ("--random-weights", random_weights)):
        if value:
            raise RecipeError(
                f"{option} has no effect: {name} is no model of timm or torchvision, such as timm/resnet50"
            )
    if Path(name).exists():
        return Path(name)
    if name in builtin.MODELS:
        return builtin.model_folder(name)
    hub_name = hub.parse_hub_name(name)
    if hub_name is None or Path(name).parent.is_dir():
        raise _no_such_model(name)
    return hub.download(hub_name, offline=offline, progress=not quiet)


def _no_such_model(name: str) -> ModelError:
    """Return the error for a name that is none, with a similar one."""
    from rarefy.common.errors import nearest
    from rarefy.data import builtin

    siblings = [
        str(Path(name).with_name(p.name)) for p in Path(name).parent.glob("*") if p.is_dir() or p.suffix in FILES
    ]
    near = nearest(name, [*builtin.MODELS, *siblings])
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if name.endswith(FILES):
        return ModelError(f"no file {name!r}{hint}")
    return ModelError(
        f"no model folder {name!r} and no built-in model of that name ({', '.join(builtin.MODELS)}){hint}"
    )


def load_any(
    folder: Source, input_shape: list[str] | None = None, batch: int | None = None, tokens: int | None = None
) -> tuple[Any, Any]:
    """Return the model, compiled model or decoder in a folder, of a file or of a name, and its tokenizer or None.

    Args:
        folder: the folder, the file, or the name.
        input_shape: values of --input-shape.
        batch: the batch on which an ONNX file is compared with ONNX Runtime.
        tokens: the length of texts on which it is compared.

    Raises:
        ModelError: if the folder holds none of them.
        RecipeError: for --input-shape with a folder.
    """
    from rarefy.checkpoint import gguf_tokenizer, legacy_layouts, pt2_load
    from rarefy.checkpoint.gguf_load import from_gguf
    from rarefy.checkpoint.load import load as load_folder
    from rarefy.cli import onnx_files
    from rarefy.common.atomic_io import INDEX, PICKLE_SUFFIXES
    from rarefy.formats import gguf_file
    from rarefy.model import hf
    from rarefy.model.vision import load_named

    if not isinstance(folder, Path):
        if input_shape:
            raise RecipeError(f"--input-shape has no effect: {folder} is no ONNX or .pt2 file")
        return load_named(folder), None
    if gguf_file.is_file(folder):
        if input_shape:
            raise RecipeError(f"--input-shape has no effect: {folder} is no ONNX or .pt2 file")
        hf.no_bars()
        return from_gguf(folder), gguf_tokenizer.load(folder)
    if onnx_files.is_file(folder):
        return onnx_files.load(folder, input_shape, batch, tokens), _tokenizer_beside(folder)
    if pt2_load.is_file(folder):
        return onnx_files.with_example_shapes(load_folder(folder), input_shape), _tokenizer_beside(folder)
    if input_shape:
        raise RecipeError(f"--input-shape has no effect: {folder} is no ONNX or .pt2 file")
    if (folder / INDEX).is_file():  # a decoder needs no transformers
        return load_folder(folder), hf.load_tokenizer(folder)
    hf.no_bars()
    if legacy_layouts.is_compressed(folder):
        return load_folder(folder), hf.load_tokenizer(folder)
    if not hf.is_folder(folder):
        hint = "; a pickle is never opened: load it in Python and call rarefy.compress_"
        hint = hint if folder.suffix in PICKLE_SUFFIXES else ""
        raise ModelError(
            f"{folder} is neither a folder written by Rarefy nor a Hugging Face folder (no config.json){hint}"
        )
    return hf.load_folder(folder), hf.load_tokenizer(folder)


def load_tokenizer(source: Path) -> Any:
    """Return the tokenizer of a folder or a GGUF file, or None where there is none."""
    from rarefy.checkpoint import gguf_tokenizer
    from rarefy.formats import gguf_file
    from rarefy.model import hf

    return gguf_tokenizer.load(source) if gguf_file.is_file(source) else hf.load_tokenizer(source)


def _tokenizer_beside(file: Path) -> Any:
    """Return the tokenizer in the folder of a file, None where there is none that loads."""
    from rarefy.model import hf

    if find_spec("transformers") is None:
        return None
    with suppress(ModelError):  # few commands need it, and they say so
        return hf.load_tokenizer(file.parent)
    return None


def load(
    folder: Source, input_shape: list[str] | None = None, batch: int | None = None, tokens: int | None = None
) -> tuple[Any, Any]:
    """Return the model in a folder, of an ONNX file or of a name, and its tokenizer or None; see `load_any`.

    Raises ModelError if it is compiled or not a model.
    """
    model, tokenizer = load_any(folder, input_shape, batch, tokens)
    kind = kind_of(model)
    if kind != "model":
        raise ModelError(f"{folder} holds a {kind}: give the folder of what it was compiled from")
    return model, tokenizer


def kind_of(model: Any) -> str:
    """Return "model", "compiled model" or "decoder"."""
    from rarefy.compiler.executor import Compiled
    from rarefy.generation.decoder import Decoder

    return "decoder" if isinstance(model, Decoder) else "compiled model" if isinstance(model, Compiled) else "model"


def streamed_weights(source: Source) -> Any:
    """Return the weights of a language model that can be packed one at a time, None for anything else."""
    from rarefy.checkpoint.streamed_decoder import streamed_weights
    from rarefy.cli import onnx_files
    from rarefy.model import hf

    if not isinstance(source, Path) or onnx_files.is_file(source) or find_spec("transformers") is None:
        return None
    hf.no_bars()
    return streamed_weights(source)


def streamed_precision(source: Source, precision: str | None) -> str | None:
    """Return the precision with which weights of a language model are packed: by default that of a GGUF file, and fp32
    for folders, in which layers that were quantized stay as they are. ModelError for another precision."""
    from rarefy.checkpoint.streamed_decoder import check_choice
    from rarefy.formats import gguf_file

    check_choice(precision)
    return precision or (None if isinstance(source, Path) and gguf_file.is_file(source) else "fp32")


def check_whole_model(precision: str | None) -> None:
    """Raise RecipeError for a precision that a decoder of a model in memory does not have."""
    from rarefy.checkpoint.streamed_decoder import ROUNDED

    if precision in ROUNDED:
        raise RecipeError(
            f"--precision {precision} rounds weights while they are read one at a time, which this model does not "
            "support: use int8, or quantize it with `rarefy compress` first"
        )


def in_fp32(model: Any) -> Any:
    """Return a model in fp32; one of an ONNX file as it is, because its inputs have the types of the file."""
    from rarefy.model.signature import get_signature

    return model.float() if get_signature(model) is None else model


def side_files(source: Source) -> dict[str, bytes]:
    """Return the files that are written beside a compressed model: of its tokenizer, and where it came from."""
    from rarefy.checkpoint.engine_files import model_files
    from rarefy.checkpoint.origin import origin_files

    return model_files(source) if isinstance(source, Path) else origin_files(source)


def files_beside_engine(source: Source) -> dict[str, bytes]:
    """Return the files of a model's folder that a compiled model or decoder needs too: those of its tokenizer, and
    where it came from."""
    from rarefy.checkpoint.engine_files import engine_files

    return engine_files(source) if isinstance(source, Path) else side_files(source)


def show(result: Any, as_json: bool, quiet: bool) -> None:
    """Print a report as text or JSON, unless `quiet`. A closed pipe ends the text, not the command: its exit code
    tells what was found."""
    text = result.to_json() if as_json else "" if quiet else str(result)
    try:
        if text:
            print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Send standard output nowhere: the reader of its pipe has closed it, and a flush at the end would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run the block with this number of threads; RecipeError if the machine has fewer cores."""
    from rarefy.evaluation.profiling import threads

    num_cores = os.cpu_count() or 1
    if count is not None and count > num_cores:
        raise RecipeError(f"--threads {count}: expected at most {num_cores}, the number of cores")
    with threads(count):
        yield
