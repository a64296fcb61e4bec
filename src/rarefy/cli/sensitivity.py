"""The command sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.shared import Checkpoint, InputShape, Json, ModelPath, Offline, Quiet, RandomWeights, Threads
from rarefy.common.atomic_io import container_errors
from rarefy.common.errors import RecipeError

RANDOM_INPUTS = "inputs were random and weights ranked by magnitude: give --data for losses on real inputs"


def sensitivity(
    model: ModelPath,
    data: Annotated[
        str | None,
        typer.Option(help="Text, .jsonl, images, .npz, or a built-in name; without it the inputs are random."),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="distance of the outputs, kl, agreement or similarity with the dense model, which need no labels; "
            "perplexity, accuracy, retrieval."
        ),
    ] = "distance",
    pattern: Annotated[
        list[str] | None, typer.Option(help="Pattern of zeros; repeat for more. Default: unstructured and 2:4.")
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Fraction of zeros; repeat for more. Default: 0.5 and 0.75.")
    ] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Bits of the weights; repeat for more. Default: 8, 4.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Names or globs of layers. Default: all but embeddings and the head.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Names or globs of layers to leave out.")] = None,
    score: Annotated[
        str | None, typer.Option(help="How weights are ranked. Default: wanda with --data, else magnitude.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 8,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of each text, by default 128.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 8,
    input_shape: InputShape = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    offline: Offline = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples and of random scores.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Also write a figure, an .svg file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a figure that exists.")] = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show how much the outputs change if one layer alone is pruned or quantized.

    One row for each layer, one column for each setting. Other weights are not refitted, so a solver loses less than the
    table says; which layers lose most is the same. The model is not changed. The cost is a pass over the samples for
    each layer and setting.

    rarefy sensitivity minilm --data wiki --samples 16 --plot layers.svg

    rarefy sensitivity smollm2-135m --data wiki --layers "model.layers.0.*" --bits 4 --pattern 2:4 --metric kl
    """
    from rarefy.common.atomic_io import write_bytes_atomic
    from rarefy.pipeline.sensitivity import sensitivity as measure
    from rarefy.pipeline.sensitivity_plot import figure

    _check_plot(plot, force)
    _check_needs(data, metric, score)
    with shared.threads(threads):
        net, tokenizer = shared.load(
            shared.source(model, checkpoint, random_weights, offline, quiet), input_shape, None, tokens
        )
        report = measure(
            net,
            _batches(net, tokenizer, data, metric, samples, tokens, batch, seed),
            patterns=pattern or ("unstructured", "2:4"),
            sparsities=sparsity or (0.5, 0.75),
            bits=bits or (8, 4),
            layers=layers,
            ignore=ignore,
            metric=metric,
            score=score or ("magnitude" if data is None else "wanda"),
            seed=seed,
            progress=not quiet,
        )
    if data is None:
        report = replace(report, notes=(*report.notes, RANDOM_INPUTS))
    shared.show(report, as_json, quiet)
    if plot is not None:
        with container_errors(plot):
            write_bytes_atomic(plot, figure(report).encode())


def _check_needs(data: str | None, metric: str, score: str | None) -> None:
    """Raise RecipeError for options that random inputs would make meaningless."""
    from rarefy.prune.scores import SCORES

    if data is not None:
        return
    if metric in ("perplexity", "accuracy") or metric.startswith(("retrieval", "ndcg")):
        raise RecipeError(f"--metric {metric} needs real inputs: give --data FILE")
    if score in SCORES and SCORES[score].needs:
        raise RecipeError(f"--score {score} needs real inputs: give --data FILE, or --score magnitude")


def _check_plot(plot: Path | None, force: bool) -> None:
    """Raise RecipeError, before anything is measured, for a figure that cannot be written."""
    if plot is None:
        if force:
            raise RecipeError("--force has no effect without --plot")
        return
    if not plot.absolute().parent.is_dir():
        raise RecipeError(f"--plot {plot}: there is no folder {plot.parent}: create it, or give another name")
    if plot.suffix.lower() != ".svg":
        raise RecipeError(f"--plot {plot}: expected a name that ends in .svg")
    if plot.is_dir() or (plot.exists() and not force):
        raise RecipeError(f"{plot} exists: pass --force, or give another name")


def _batches(
    net: Any, tokenizer: Any, data: str | None, metric: str, samples: int, tokens: int | None, batch: int, seed: int
) -> Sequence[Any]:
    """Return the batches of the data, pairs of them for retrieval, or random ones where there are no data."""
    from rarefy.cli.inference_commands import example_input
    from rarefy.cli.onnx_files import read_batches
    from rarefy.data import sources
    from rarefy.data.text_pairs import pair_batches
    from rarefy.evaluation.quality import RANKED
    from rarefy.model.batches import split_batch

    if data is None:
        whole = example_input(net, tokens, None, tokenizer, default_batch=samples)
        return split_batch(whole, -(-samples // batch))
    take = sources.Take(samples=samples, tokens=tokens or 128, batch=batch, seed=seed)
    if metric.split("@")[0] in RANKED:
        return list(pair_batches(data, take, tokenizer=tokenizer))
    return read_batches(net, data, take, tokenizer, "--data")
