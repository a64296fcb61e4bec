"""The command compile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.shared import (
    CachePrecision,
    Checkpoint,
    DecoderPrecision,
    Force,
    InputShape,
    Json,
    ModelPath,
    Offline,
    Quiet,
    RandomWeights,
    Threads,
)
from rarefy.common.errors import RecipeError
from rarefy.common.report import Report

Ignore = Annotated[
    list[str] | None,
    typer.Option(help="A layer that stays in fp32, by name or glob; repeat for more. Not for decoders."),
]

PerLayer = Annotated[
    list[str] | None,
    typer.Option(
        help="A layer, by name or glob, and its precision, fp32, bf16, int16 or int8: head=bf16. Repeat for more; the "
        "last one that matches applies. Not for decoders.",
        metavar="LAYER=PRECISION",
    ),
]

MaxError = Annotated[
    float | None,
    typer.Option(
        min=1e-9,
        help="Largest relative distance of outputs from the model's on the example input; by default 0.001 in fp32, "
        "0.1 in bf16, 0.03 in int16, 0.2 in int8 with a warning from 0.1.",
    ),
]


def compile_(
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it appears whole or not at all.")],
    precision: DecoderPrecision = None,
    cache_precision: CachePrecision = None,
    ignore: Ignore = None,
    per_layer: PerLayer = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size of the example input, by default 2. Not for decoders.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Sequence length of the example input, by default 128. Not for decoders.")
    ] = None,
    input_shape: InputShape = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    offline: Offline = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Typical inputs for --precision int8, images, .npz or a built-in name: convolutions get fixed scales "
            "from them, and are faster."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of --data; by default up to 64.")] = None,
    max_error: MaxError = None,
    force: Force = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Language models: do not resume from the state of an earlier run.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a whole model for the engine and save it. rarefy.load reads it without the model's class.

    A language model becomes a decoder for `rarefy generate`; its tokenizer's files are saved with it. It may be larger
    than memory, and a command that was killed continues when it is given again.

    Other transformers models accept other batch sizes and lengths than the example's; so do ONNX files with open sizes.
    What was an ONNX file is then called by the names of its inputs: rarefy.load("fast/").run({"x": array}). Models
    built in Python are compiled in Python: rarefy.save(rarefy.compile(model, example), "out/").

    rarefy compile smollm2-135m --precision int8 --out decoder/

    rarefy compile minilm --out fast/ --tokens 128

    rarefy compile model.onnx --out fast/ --precision int8 --data images.npz --input-shape x=1x3x224x224
    """
    from rarefy.checkpoint.save import save
    from rarefy.checkpoint.streamed_decoder import write_decoder
    from rarefy.common.atomic_io import check_output_folder
    from rarefy.compiler.compile import compile
    from rarefy.generation.decoder import decoder
    from rarefy.generation.kv_cache import check_cache_precision
    from rarefy.model import hf

    check_output_folder(out, force)
    options: dict[str, Any] = {"ignore": ignore, "per_layer": _precisions(per_layer), "max_error": max_error}
    _check_options((precision, *options["per_layer"].values()), data, samples, ignore)
    check_cache_precision(cache := "fp32" if cache_precision is None else cache_precision)
    source = shared.source(model, checkpoint, random_weights, offline, quiet)
    with shared.threads(threads):
        weights = shared.streamed_weights(source)
        if weights is not None:
            _check_decoder_options(batch, tokens, data, ignore or per_layer, input_shape)
            whole = shared.streamed_precision(source, precision)
            compiled: Any
            more: dict[str, Any] = {"overwrite": force, "fresh": fresh, "max_error": max_error}
            compiled, size = write_decoder(weights, Path(str(source)), whole, out, cache, **more)
        else:
            _check_not_fresh(fresh)
            net, tokenizer = shared.load(source, input_shape, batch, tokens)
            net = shared.in_fp32(net)
            if hf.is_causal_lm(net):
                _check_decoder_options(batch, tokens, data, ignore or per_layer)
                shared.check_whole_model(precision)
                compiled = decoder(net, precision=precision, cache_precision=cache, max_error=max_error)
            else:
                _check_no_cache(model, cache_precision)
                example, options["calibrate"] = _inputs(net, tokens, batch, tokenizer, data, samples)
                compiled = compile(net, example, precision=precision, **options)
            receipt = getattr(net, "rarefy_receipt", None)
            size = save(compiled, out, files=shared.files_beside_engine(source), receipt=receipt, overwrite=force)
    shared.show(Report(f"compiled to {out}", (), _summary(compiled, size)), as_json, quiet)


def _summary(compiled: Any, size: int) -> dict[str, Any]:
    """Return what a folder contains, its bytes, and where operators run."""
    kind = shared.kind_of(compiled)
    operators = repr(compiled.compiled if kind == "decoder" else compiled).splitlines()
    return {"contains": f"a {kind}", "bytes": size, "operators": "; ".join(operators)}


def _check_options(
    precisions: tuple[str | None, ...], data: str | None, samples: int | None, ignore: list[str] | None
) -> None:
    """Raise RecipeError for options of `compile` that do not go together; `precisions` are those of all layers."""
    if data is not None and "int8" not in precisions:
        raise RecipeError("--data has no effect: it gives the scales of --precision int8")
    if samples is not None and data is None:
        raise RecipeError("--samples has no effect without --data")
    if ignore and not any(precisions):
        raise RecipeError("--ignore has no effect: it names layers that stay in fp32 beside a --precision")


def _precisions(options: list[str] | None) -> dict[str, str]:
    """Return the precisions that --per-layer gives, by layer; RecipeError for another form."""
    precisions: dict[str, str] = {}
    for option in options or []:
        layer, separator, precision = option.rpartition("=")
        if not (layer and separator and precision):
            raise RecipeError(f"--per-layer: expected a layer and its precision, such as head=bf16, got {option!r}")
        precisions.pop(layer, None)  # the last one applies
        precisions[layer] = precision
    return precisions


def _check_decoder_options(
    batch: int | None, tokens: int | None, data: str | None, own: list[str] | None, shape: list[str] | None = None
) -> None:
    """Raise RecipeError for options of `compile` that decoders do not have."""
    if shape:
        raise RecipeError("--input-shape has no effect: it is for ONNX files")
    if batch or tokens:
        raise RecipeError("--batch and --tokens have no effect: a decoder of a language model takes any")
    if data:
        raise RecipeError("--data has no effect: a decoder of a language model finds scales in each call")
    if own:
        raise RecipeError("--ignore and --per-layer have no effect: all layers of a decoder have the same precision")


def _check_not_fresh(fresh: bool) -> None:
    if fresh:
        raise RecipeError("--fresh has no effect: only language models that are read one weight at a time resume")


def _check_no_cache(model: str, cache_precision: str | None) -> None:
    if cache_precision is not None:
        raise RecipeError(f"--cache-precision has no effect: {model} is no causal language model")


def _inputs(
    net: Any, tokens: int | None, batch: int | None, tokenizer: Any, data: str | None, samples: int | None
) -> tuple[Any, Any]:
    """Return the example input, and the batches on which scales are found."""
    example = example_input(net, tokens, batch, tokenizer)
    if data is None:
        return example, None
    calibrate = _calibration(net, data, samples, tokens, tokenizer)
    return _of_data(example, calibrate[0]), calibrate


def _of_data(example: Any, batch: Any) -> Any:
    """Return samples of a batch of data in place of random ones, where their shapes are those of the example."""
    from rarefy.model.batches import count_samples
    from rarefy.model.forward import describe_batch
    from rarefy.pipeline.speed import resize_batch

    real = resize_batch(batch, count_samples(example))
    return real if describe_batch(real) == describe_batch(example) else example


def _calibration(net: Any, data: str, samples: int | None, tokens: int | None, tokenizer: Any) -> list[Any]:
    """Return the inputs on which scales are found."""
    from rarefy.cli.onnx_files import TOKENS, read_batches
    from rarefy.data.sources import Take
    from rarefy.model.forward import without_targets

    take = Take(samples=samples or 64, need_all=samples is not None, tokens=tokens or TOKENS)
    return [without_targets(b) for b in read_batches(net, data, take, tokenizer, "--data")]


def example_input(net: Any, tokens: int | None, batch: int | None, tokenizer: Any, default_batch: int = 2) -> Any:
    """Return the example input of a transformers model: all inputs that its tokenizer gives and the model accepts.

    For a model of an ONNX file with several inputs a dict too, with one input that tensor.
    """
    import inspect

    import torch

    from rarefy.cli import onnx_files
    from rarefy.evaluation.example_inputs import example_of
    from rarefy.model.batches import FILLED, with_masks
    from rarefy.model.signature import get_signature

    signature = get_signature(net)
    if signature is not None:
        return onnx_files.example(signature, tokens, batch, default_batch)
    max_tokens = getattr(getattr(net, "config", None), "max_position_embeddings", None)
    if tokens and isinstance(max_tokens, int) and tokens > max_tokens:
        raise RecipeError(f"--tokens: expected at most {max_tokens}, the model's number of positions, got {tokens}")
    length = tokens or min(128, max_tokens if isinstance(max_tokens, int) else 128)
    example = example_of(net, length, batch or default_batch)
    if tokens and (isinstance(example, torch.Tensor) or "input_ids" not in example):
        raise RecipeError("--tokens has no effect: the model reads images")
    if isinstance(example, dict) and "input_ids" in example:
        input_names = getattr(tokenizer, "model_input_names", ["attention_mask"])
        parameters = inspect.signature(net.forward).parameters
        example = with_masks(example, [n for n in FILLED if n in input_names and n in parameters])
    return example
