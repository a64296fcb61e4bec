"""`rarefy optimize`: the best model for a loss that is accepted and a speed that is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.inference_commands import example_input
from rarefy.cli.shared import Checkpoint, Force, InputShape, Json, ModelPath, Offline, Quiet, RandomWeights, Threads
from rarefy.common.errors import RecipeError

Evaluated = Annotated[
    str | None,
    typer.Option(
        help="What is measured: perplexity, accuracy, retrieval, retrieval@10, ndcg@10, similarity, agreement, "
        "distance, kl. By default the perplexity of language models on data; else how well the model agrees with the "
        "dense one, which needs no labels."
    ),
]
EvalData = Annotated[
    str | None,
    typer.Option(
        help="Data to measure on, in the same forms; of retrieval texts, or pairs as .jsonl with query "
        "and text. By default up to 512 samples of --data, which are not calibrated on; of little data and of language "
        "models the last quarter."
    ),
]
CalibrationData = Annotated[
    str | None, typer.Option(help="Calibration data: text, .jsonl, images, .npz, or a built-in name.")
]
MaxLoss = Annotated[
    str,
    typer.Option(
        help="Largest accepted loss. 1%: of the dense model's number. 0.5: points of that number; accuracy goes from 0 "
        "to 1, so a percentage point is 0.01. any: no limit, with another one such as --speedup."
    ),
]
LongestCall = Annotated[
    float | None, typer.Option(help="Longest call, in milliseconds; of language models a token and a prompt.")
]
TrainMinutes = Annotated[
    float,
    typer.Option(min=0, help="Minutes of training after the search: the best models learn from the dense one."),
]
TrainData = Annotated[
    str | None,
    typer.Option(
        help="Data to train on; no labels are read. By default the samples that are calibrated on, or all of "
        "--data where --eval-data is given."
    ),
]
TimedBatch = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Batch size that is timed; repeat the option for more. Not for language models."),
]
Changing = Annotated[
    list[str] | None,
    typer.Option(help="Layers that may change: a name, a glob (model.layers.0.*) or a class; repeat for more."),
]
Staying = Annotated[
    list[str] | None,
    typer.Option(
        help="A layer that is not changed and stays in fp32 (of language models: has the precision of all layers, but "
        "is not cut, pruned or given fewer bits); repeat for more."
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Samples of --data; by default up to 128 to calibrate on. Without --eval-data the last "
        "quarter is for evaluation.",
    ),
]
RANKED = ("retrieval", "ndcg")  # metrics that read pairs of texts
CALIBRATED, EVALUATED = 128, 512  # samples of --data, where nothing else is said


def optimize(
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write: the best model, its recipe, all points.")],
    data: CalibrationData = None,
    evaluate: Evaluated = None,
    eval_data: EvalData = None,
    max_loss: MaxLoss = "1%",
    speedup: Annotated[float | None, typer.Option(help="Times as fast as the dense model compiled in fp32.")] = None,
    latency_ms: LongestCall = None,
    size_mb: Annotated[float | None, typer.Option(help="Largest saved model, in megabytes.")] = None,
    memory_mb: Annotated[float | None, typer.Option(help="Largest weights in memory, in megabytes.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="What is best: latency (default), loss, size, memory; of texts also decode, prompt."),
    ] = None,
    batch: TimedBatch = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of texts; by default 128, of language models 512.")
    ] = None,
    input_shape: InputShape = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    offline: Offline = False,
    samples: Samples = None,
    eval_samples: Annotated[int | None, typer.Option(min=1, help="Samples of --eval-data; by default all.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the search may take.")] = 60.0,
    train: TrainMinutes = 0.0,
    train_data: TrainData = None,
    train_samples: Annotated[int | None, typer.Option(min=1, help="Samples to train on; by default all.")] = None,
    layers: Changing = None,
    ignore: Staying = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random choices.")] = 0,
    other_engines: Annotated[
        bool, typer.Option("--other-engines", help="Measure ONNX Runtime and OpenVINO too, where they are installed.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of resuming a killed search.")] = False,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for the model that runs fastest on this machine within the loss you accept, and save it.

    Tries the precisions of the engine, fewer neurons, heads, channels and blocks, zeros in patterns, low rank, and
    fewer bits for layers and heads of language models. It measures each model as it is deployed, and keeps to the
    time. The output folder holds the compiled model (rarefy.load, rarefy bench), recipe.yaml, which makes the torch
    model again (rarefy compress MODEL --recipe OUT/recipe.yaml), and frontier.json with every model that was tried.

    rarefy optimize minilm --data a.txt --evaluate retrieval --eval-data b.txt --max-loss 1% --minutes 30 -o fast/

    Ctrl-C ends the search and saves the best model so far. After a kill, the same command goes on; after Ctrl-C or the
    end of the minutes it does so with --force. torchrun --nnodes 2 ... -m rarefy optimize ... divides the search among
    machines of the same kind. Exit code 1: no model keeps all limits; the nearest one is saved.
    """
    from rarefy.common.atomic_io import UNFINISHED, check_output_folder, resume_folder
    from rarefy.search.optimize import is_not_in_fp32, optimize, save_result, with_cast
    from rarefy.search.targets import objective_of, parse_targets

    limits: dict[str, Any] = {"speedup": speedup, "latency_ms": latency_ms, "size_mb": size_mb, "memory_mb": memory_mb}
    parse_targets(_limit(max_loss), objective_of(target, _limit(max_loss)), **limits)
    with shared.processes() as (rank, _):
        check_output_folder(out, force or rank > 0)  # of several processes the first one writes
        source = shared.source(model, checkpoint, random_weights, offline, quiet)
        with shared.threads(threads):
            net, tokenizer = shared.load(source, input_shape, max(batch) if batch else None, tokens)
            cast, net = is_not_in_fp32(net), shared.in_fp32(net).eval()
            inputs = _inputs(net, tokenizer, data, evaluate, eval_data, tokens, samples, eval_samples, seed, batch)
            training = _training(net, tokenizer, inputs, data, eval_data, train, train_data, train_samples)
            with nullcontext() if rank else resume_folder(out, fresh) as state:
                frontier = with_cast(cast, replace(optimize(
                    net, inputs["example"], inputs["data"], evaluate, max_loss=_limit(max_loss), target=target,
                    batch=batch or inputs["batch"], minutes=minutes, eval_data=inputs["eval_data"], layers=layers,
                    ignore=ignore, seed=seed, resume_dir=state and state / "stage-search", progress=not quiet,
                    other_engines=other_engines, **training, **limits,
                ), model=model))  # fmt: skip
                if frontier.best is not None:
                    save_result(frontier, out, overwrite=force, files=shared.files_beside_engine(source))
                if state is not None and frontier.finished != "done":
                    (state / UNFINISHED).touch()
        _show(frontier, out, as_json, quiet, rank)
    if not frontier.met:
        raise typer.Exit(1)


def _show(frontier: Any, out: Path, as_json: bool, quiet: bool, rank: int) -> None:
    """Print the result in the first process. Exit after Ctrl-C: the other processes are not waited for."""
    if not rank:
        shared.show(frontier, as_json, quiet)
        if frontier.best is not None and not quiet:
            print(f"written to {out}", file=sys.stderr)
        if not frontier.met:
            print(f"check failed: {frontier.verdict}", file=sys.stderr)
    if frontier.finished == "interrupted":
        raise typer.Exit(int(not frontier.met))


def _limit(text: str) -> str | None:
    """Return the limit of loss, or None for "any"."""
    return None if text == "any" else text


def _place(source: str) -> str:
    """Return the absolute path of a file or folder, so that recipes find it anywhere; a built-in name as it is."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def _training(
    net: Any, tokenizer: Any, inputs: dict[str, Any], data: str | None, eval_data: str | None, minutes: float,
    train_data: str | None, samples: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the options of training, with the recipe's section about all data."""
    from rarefy.cli.onnx_files import read_batches
    from rarefy.data.sources import Take

    options = inputs["options"]
    if not minutes:
        for name, value in (("--train-data", train_data), ("--train-samples", samples)):
            if value is not None:
                raise RecipeError(f"{name} has no effect without training: give --train MINUTES")
        return {"data_options": options}
    source = train_data or (data if eval_data is not None else None)
    if source is None:
        if samples is not None:
            raise RecipeError("--train-samples has no effect on the calibration data: give --train-data or --eval-data")
        if options is not None:  # the samples that are not for evaluation
            options = options.model_copy(update={"train": options.calibrate})
        return {"data_options": options, "train_minutes": minutes}
    first = options or inputs["settings"]
    take = Take(samples=samples, tokens=first.tokens, batch=first.batch, seed=first.seed)
    read = read_batches(net, source, take, tokenizer, "--train-data")
    options = first.model_copy(update={"train": _place(source)})
    return {"data_options": options, "train_minutes": minutes, "train_data": read}


def _inputs(
    net: Any, tokenizer: Any, data: str | None, evaluate: str | None, eval_data: str | None, tokens: int | None,
    samples: int | None, eval_samples: int | None, seed: int, batch: list[int] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the example, the batches for calibration and evaluation, and the recipe's section about the first."""
    from rarefy.cli.onnx_files import read_batches
    from rarefy.common.errors import DataError, unknown
    from rarefy.data.sources import Take
    from rarefy.data.text_pairs import pair_batches
    from rarefy.evaluation.quality import METRIC_NAMES
    from rarefy.model import hf
    from rarefy.model.batches import count_samples
    from rarefy.recipe.schema import Data

    kinds = {name.partition("@")[0] for name in METRIC_NAMES}
    if evaluate is not None and evaluate.partition("@")[0] not in kinds:
        raise DataError(unknown("metric", evaluate, METRIC_NAMES))
    ranked = evaluate is not None and evaluate.partition("@")[0] in RANKED
    if ranked and eval_data is None:
        raise RecipeError(f"--evaluate {evaluate} needs texts or pairs of its own: give --eval-data FILE")
    if data is None and eval_data is None and evaluate is not None:
        raise RecipeError(f"--evaluate {evaluate} needs data: give --data or --eval-data")
    for name, value, source, needed in (
        ("--samples", samples, data, "--data"), ("--eval-samples", eval_samples, eval_data, "--eval-data"),
    ):  # fmt: skip
        if value is not None and source is None:
            raise RecipeError(f"{name} has no effect without data: give {needed}")
    length, size = (512, 8) if hf.is_causal_lm(net) else (128, 32)
    length = tokens or length
    example = example_input(net, tokens, max(batch) if batch else None, tokenizer, default_batch=1)
    result: dict[str, Any] = {"example": example, "data": None, "eval_data": None, "options": None}
    result["batch"] = None if hf.is_causal_lm(net) else count_samples(example)
    settings = result["settings"] = Data(samples=samples or CALIBRATED, tokens=length, batch=size, seed=seed)
    for_both = samples is None and eval_data is None and not hf.is_causal_lm(net)
    if data is not None:
        count = samples or CALIBRATED + (EVALUATED if for_both else 0)
        take = Take(samples=count, need_all=samples is not None, tokens=length, batch=size, seed=seed)
        result["data"] = read_batches(net, data, take, tokenizer, "--data")
        if for_both:
            result["data"], result["eval_data"] = _to_calibrate_and_to_evaluate(result["data"])
        read = sum(map(count_samples, result["data"]))
        result["options"] = settings.model_copy(update={"calibrate": _place(data), "samples": read})
    if eval_data is not None:
        take = Take(samples=eval_samples, tokens=length, batch=50 if ranked else 8, seed=seed)
        if ranked:
            result["eval_data"] = pair_batches(eval_data, take, tokenizer=tokenizer, what="--eval-data")
        else:
            result["eval_data"] = read_batches(net, eval_data, take, tokenizer, "--eval-data")
    if not hf.is_causal_lm(net):
        names = ("data", "eval_data")
        result |= {n: [_with_inputs_of(example, b) for b in result[n]] for n in names if result[n] is not None}
    return result


def _to_calibrate_and_to_evaluate(batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any] | None]:
    """Return the first batches and the others; all and None where the others are less than a quarter."""
    from itertools import accumulate

    from rarefy.model.batches import count_samples

    ends = [*accumulate(map(count_samples, batches))]
    first = sum(end <= CALIBRATED for end in ends)
    if not first or ends[-1] - ends[first - 1] < ends[-1] / 4:
        return batches, None
    return batches[:first], batches[first:]


def _with_inputs_of(example: Any, batch: Any) -> Any:
    """Return a batch of texts, or a pair of such, with the masks that the example has: no padding, one segment."""
    from rarefy.model.batches import with_masks

    if isinstance(batch, tuple):
        return tuple(_with_inputs_of(example, part) for part in batch)
    if not isinstance(batch, dict) or not isinstance(example, dict) or "input_ids" not in batch:
        return batch
    return with_masks(batch, [*example])
