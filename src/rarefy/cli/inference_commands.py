"""The commands generate and compile."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.shared import Force, InputShape, Json, ModelPath, Precision, Quiet, Threads
from rarefy.common.errors import ModelError, RecipeError
from rarefy.common.report import Report


@dataclass
class Continuation:
    """The tokens and text generated after one prompt."""

    prompt: list[int]
    text: Any  # decodes tokens incrementally
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def add(self, token: int, eos_tokens: tuple[int, ...]) -> str:
        """Add the next token unless the text has ended; return the text it adds."""
        if self.ended:
            return ""
        self.ids.append(token)
        self.ended = token in eos_tokens
        self.pieces.append(self.text.add(token))
        return self.pieces[-1]

    def close(self) -> str:
        """Return the rest of the text, held back until its last character was complete."""
        self.pieces.append(self.text.rest())
        return self.pieces[-1]


def generate(
    model: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder, a folder of Rarefy (decoders too), or a built-in name."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The prompt; - reads it from standard input. Several form a batch; texts are numbered.",
        ),
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--ids", help="A prompt as token ids, such as '1 2 3', instead of --prompt.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat prompts as user messages: apply the tokenizer's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Largest number of new tokens; by default 128, or as many as fit.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sample with this temperature, above 0. Lower values are more deterministic.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens whose probabilities add up to p.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Values above 1 make tokens that occurred before less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    precision: Precision = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text with a language model on the engine and stream it to standard output.

    Decoding is greedy, unless --temperature, --top-k, --top-p or --seed is given, which turns on sampling. The speed is
    printed on standard error. Building a decoder takes half a minute or more: `rarefy compile` does it once and saves
    it. Ctrl-C stops the generation with exit code 130; the text so far stays.

    rarefy generate smollm2-135m --prompt "The capital of France is" --max-new-tokens 20

    rarefy generate decoder/ --chat --prompt "Name three rivers." --temperature 0.7 --seed 1

    echo "Bread is made of" | rarefy generate smollm2-135m --prompt - --precision int8
    """
    from rarefy.generation.decoder import decoder
    from rarefy.generation.sampling import Sampling, stream
    from rarefy.generation.tokenization import Text, left_padded

    sampling_options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options: dict[str, Any] = {n: v for n, v in sampling_options.items() if v is not None}
    if options or seed is not None:
        options |= {"do_sample": True, "seed": seed}
    options["repetition_penalty"] = repetition_penalty
    if temperature == 0:
        raise RecipeError("--temperature: expected a number above 0, got 0; leave it out for greedy decoding")
    Sampling(**{n: v for n, v in options.items() if n != "seed"})  # fails before the model is loaded
    texts = _read_prompts(prompt, ids, chat)
    with shared.threads(threads):
        net, tokenizer = _load_language_model(shared.source(model), precision)
        prompts = _ids(texts, tokenizer, bool(ids), chat, model)
        ready = shared.kind_of(net) == "decoder"
        if not ready and not quiet and sys.stderr.isatty():
            print("building a decoder; `rarefy compile` builds and saves one", file=sys.stderr)
        language_model = net if ready else decoder(net.float(), precision=precision)
        continuations = [Continuation(p, Text(tokenizer, p)) for p in prompts]
        input_ids, mask = left_padded(prompts, language_model.pad_token)
        room = 128
        if language_model.max_tokens is not None:
            room = min(128, max(1, language_model.max_tokens - input_ids.shape[1]))
        steps = stream(language_model, input_ids, max_new_tokens=max_new_tokens or room, attention_mask=mask, **options)
        spent, stopped = _run_steps(
            steps, continuations, language_model.eos_tokens, len(continuations) == 1 and not as_json
        )
    _print_results(continuations, spent, as_json, quiet, len(continuations) > 1)
    if stopped is not None:
        raise shared.Ended(stopped)


def _read_prompts(prompts: list[str] | None, ids: list[str] | None, chat: bool) -> list[str]:
    """Return the prompts of the command line; `-` is read from standard input."""
    if prompts and ids:
        raise RecipeError("give --prompt or --ids, not both")
    if not prompts and not ids:
        raise RecipeError("generate needs --prompt TEXT (- reads standard input), or else --ids '1 2 3'")
    if chat and ids:
        raise RecipeError("--chat has no effect on --ids: give --prompt")
    if ids or not prompts:
        return ids or []
    if prompts.count("-") > 1:
        raise RecipeError("standard input can be read only once: give one --prompt -")
    return [sys.stdin.read().removesuffix("\n") if p == "-" else p for p in prompts]


def _ids(texts: list[str], tokenizer: Any, listed: bool, chat: bool, model: str) -> list[list[int]]:
    from rarefy.generation.tokenization import encode_prompt, parse_ids

    if listed:
        return [parse_ids(t) for t in texts]
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer: add its files, such as tokenizer.json, or give --ids '1 2 3'")
    return [encode_prompt(tokenizer, t, chat) for t in texts]


def _load_language_model(folder: Path, precision: str | None) -> tuple[Any, Any]:
    """Return the language model or decoder in a folder, and its tokenizer."""
    model, tokenizer = shared.load_any(folder)
    kind = shared.kind_of(model)
    if kind == "compiled model":
        raise ModelError(f"{folder} holds a compiled model, which has no KV cache: give a language model or a decoder")
    if kind == "decoder" and precision is not None:
        raise RecipeError(f"--precision has no effect: {folder} holds a decoder, whose precision is fixed")
    return model, tokenizer


def _run_steps(
    steps: Iterator[Any], continuations: list[Continuation], eos_tokens: tuple[int, ...], streaming: bool
) -> tuple[list[float], int | None]:
    """Read tokens until the end or Ctrl-C; return the seconds of each step, and the exit code if it was stopped."""
    spent: list[float] = []
    stopped = None
    try:
        while True:
            began = time.perf_counter()
            token = next(steps, None)
            if token is None:
                break
            spent.append(time.perf_counter() - began)
            for w, t in zip(continuations, token.tolist()):
                began_text = any(w.pieces)
                piece = w.add(t, eos_tokens)
                if streaming:
                    print(piece if began_text else piece.lstrip(" "), end="", flush=True)
    except (KeyboardInterrupt, SystemExit) as end:
        stopped = end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 130
    for w in continuations:
        piece = w.close()
        if streaming:
            print(piece, flush=True)
    return spent, stopped


def _print_results(
    continuations: list[Continuation], spent: list[float], as_json: bool, quiet: bool, several: bool
) -> None:
    """Print the texts that were not streamed, and the speed."""
    first, rest = sum(spent[:1]), sum(spent[1:])
    seconds = {"seconds_prefill": first, "seconds_decode": rest}
    rows = [
        {"text": "".join(w.pieces), "ids": w.ids, "prompt_tokens": len(w.prompt), "new_tokens": len(w.ids), **seconds}
        for w in continuations
    ]
    if as_json:
        print(json.dumps(rows if several else rows[0], indent=1))
        return
    if several:
        for number, row in enumerate(rows, 1):
            print(f"[{number}]{row['text']}" if row["text"].startswith(" ") else f"[{number}] {row['text']}")
    if not quiet:
        empty = [number for number, row in enumerate(rows, 1) if not row["text"].strip()]
        if empty:
            which = f" for prompt {', '.join(map(str, empty))}" if several else ""
            print(f"no text was generated{which}: the model ended at once; --chat may help", file=sys.stderr)
        new, read = sum(len(w.ids) for w in continuations), sum(len(w.prompt) for w in continuations)
        later = new - sum(1 for w in continuations if w.ids)
        lines = [f"prompt: {read} tokens" + (f", {read / first:.1f} tokens/s" if first else "")]
        lines += [
            f"generated: {new} tokens" + (f", {later / rest:.1f} tokens/s after the first" if later and rest else "")
        ]
        print("; ".join(lines), file=sys.stderr)


def compile_(
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it appears whole or not at all.")],
    precision: Precision = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A layer that stays in fp32, by name or glob; may be given several times. Not for decoders."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size of the example input, by default 2. Not for decoders.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Sequence length of the example input, by default 128. Not for decoders.")
    ] = None,
    input_shape: InputShape = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Typical inputs for --precision int8, images, .npz or a built-in name: convolutions get fixed scales "
            "from them, and are faster."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of --data; by default up to 64.")] = None,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a whole model for the engine and save it. rarefy.load reads it without the model's class.

    A language model becomes a decoder for `rarefy generate`; its tokenizer's files are saved with it. Other
    transformers models accept other batch sizes and lengths than the example's; so do ONNX files with open sizes. What
    was an ONNX file is then called by the names of its inputs: rarefy.load("fast/").run({"x": array}). Compile models
    that are built in Python there: rarefy.save(rarefy.compile(model, example), "out/").

    rarefy compile smollm2-135m --precision int8 --out decoder/

    rarefy compile minilm --out fast/ --tokens 128

    rarefy compile model.onnx --out fast/ --precision int8 --data images.npz --input-shape x=1x3x224x224
    """
    from rarefy.checkpoint.save import save
    from rarefy.common.atomic_io import check_output_folder
    from rarefy.compiler.compile import compile
    from rarefy.generation.decoder import decoder
    from rarefy.model import hf

    check_output_folder(out, force)
    if data is not None and precision != "int8":
        raise RecipeError("--data has no effect: it gives the scales of --precision int8")
    if samples is not None and data is None:
        raise RecipeError("--samples has no effect without --data")
    if ignore and precision is None:
        raise RecipeError("--ignore has no effect: it names layers that stay in fp32 beside --precision int8 or bf16")
    source = shared.source(model)
    with shared.threads(threads):
        net, tokenizer = shared.load(source, input_shape, batch, tokens)
        net = shared.in_fp32(net)
        if hf.is_causal_lm(net):
            if batch or tokens:
                raise RecipeError("--batch and --tokens have no effect: a decoder of a language model takes any")
            if data:
                raise RecipeError("--data has no effect: a decoder of a language model finds scales in each call")
            if ignore:
                raise RecipeError("--ignore has no effect: all layers of a decoder have the same precision")
            compiled: Any = decoder(net, precision=precision)
        else:
            example = example_input(net, tokens, batch, tokenizer)
            calibrate = None if data is None else _calibration(net, data, samples, tokens, tokenizer)
            example = example if calibrate is None else _of_data(example, calibrate[0])
            compiled = compile(net, example, precision=precision, ignore=ignore, calibrate=calibrate)
        files = shared.files_beside_engine(source)
        receipt = getattr(net, "rarefy_receipt", None)
        size = save(compiled, out, files=files, receipt=receipt, overwrite=force)
    step = compiled.compiled if hf.is_causal_lm(net) else compiled
    summary = {
        "contains": f"a {shared.kind_of(compiled)}",
        "bytes": size,
        "operators": "; ".join(repr(step).splitlines()),
    }
    shared.show(Report(f"compiled to {out}", (), summary), as_json, quiet)


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
    from rarefy.model.signature import get_signature

    signature = get_signature(net)
    if signature is not None:
        return onnx_files.example(signature, tokens, batch, default_batch)
    max_tokens = getattr(getattr(net, "config", None), "max_position_embeddings", None)
    if tokens and isinstance(max_tokens, int) and tokens > max_tokens:
        raise RecipeError(f"--tokens: expected at most {max_tokens}, the model's number of positions, got {tokens}")
    length = tokens or min(128, max_tokens if isinstance(max_tokens, int) else 128)
    example = example_of(net, length, batch or default_batch)
    if tokens and "input_ids" not in example:
        raise RecipeError("--tokens has no effect: the model reads images")
    if "input_ids" in example:
        input_names = getattr(tokenizer, "model_input_names", ["attention_mask"])
        fill = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
        parameters = inspect.signature(net.forward).parameters
        example |= {n: f(example["input_ids"]) for n, f in fill.items() if n in input_names and n in parameters}
    return example
