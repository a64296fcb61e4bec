"""The commands of whole models on the engine: generate, compile, bench."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.shared import Force, Json, ModelPath, Precision, Quiet, Threads
from rarefy.common.errors import ModelError, RecipeError


@dataclass
class Writing:
    """What was written behind a prompt."""

    prompt: list[int]
    text: Any  # of tokens that come
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def add(self, token: int, ends: tuple[int, ...]) -> str:
        """Take the next token, if the text has not ended; return what text it adds."""
        if self.ended:
            return ""
        self.ids.append(token)
        self.ended = token in ends
        self.pieces.append(self.text.add(token))
        return self.pieces[-1]

    def close(self) -> str:
        """Return what is left of the text."""
        self.pieces.append(self.text.rest())
        return self.pieces[-1]


def generate(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder, a folder of ours, one of a decoder, or a built-in name.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What the text follows; - reads standard input. Several make a batch."),
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--ids", help="A prompt as token ids, such as '1 2 3', in place of --prompt.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages: put them into the tokenizer's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write, unless the text ends before: 128, where so many fit.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens by their scores divided by this, above 0: 0.7 is careful, 1 free.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among so many of the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that have this probability.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that are there already become less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens each time.")] = None,
    precision: Precision = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write text with a language model on the engine, as it comes, to standard output.

    The likeliest token is taken, unless one of --temperature, --top-k, --top-p, --seed has them drawn. How fast it was
    goes to standard error. Making a decoder of a model takes half a minute or more: `rarefy compile` does it once.
    Ctrl-C ends the text, which stays, with exit code 130.

    rarefy generate smollm2-135m --prompt "The capital of France is" --max-new-tokens 20

    rarefy generate decoder/ --chat --prompt "Name three rivers." --temperature 0.7 --seed 1

    echo "Bread is made of" | rarefy generate smollm2-135m --prompt - --precision int8
    """
    from rarefy.generation.decoder import decoder
    from rarefy.generation.sampling import Sampling, stream
    from rarefy.generation.tokenization import Text, left_padded

    draws = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    how: dict[str, Any] = {n: v for n, v in draws.items() if v is not None}
    if how or seed is not None:
        how |= {"do_sample": True, "seed": seed}
    how["repetition_penalty"] = repetition_penalty
    if temperature == 0:
        raise RecipeError("--temperature is a number above 0: leave it out for the likeliest token")
    Sampling(**{n: v for n, v in how.items() if n != "seed"})  # says what is wrong before the model is read
    texts = _asked(prompt, ids, chat)
    with shared.threads(threads):
        net, tokenizer = _writer(shared.source(model), precision)
        prompts = _ids(texts, tokenizer, bool(ids), chat, model)
        ready = shared.kind_of(net) == "decoder"
        if not ready and not quiet and sys.stderr.isatty():
            print("making a decoder of the model; rarefy compile makes one that stays", file=sys.stderr)
        made = net if ready else decoder(net.float(), precision=precision)
        written = [Writing(p, Text(tokenizer, p)) for p in prompts]
        given, mask = left_padded(prompts, made.pad_token)
        room = 128 if made.max_tokens is None else min(128, max(1, made.max_tokens - given.shape[1]))
        steps = stream(made, given, max_new_tokens=max_new_tokens or room, attention_mask=mask, **how)
        spent, stopped = _write(steps, written, made.eos_tokens, len(written) == 1 and not as_json)
    _tell(written, spent, as_json, quiet, len(written) > 1)
    if stopped is not None:
        raise shared.Ended(stopped)


def _asked(prompts: list[str] | None, ids: list[str] | None, chat: bool) -> list[str]:
    """The prompts of the command line, standard input read."""
    if prompts and ids:
        raise RecipeError("give --prompt or --ids, not both")
    if not prompts and not ids:
        raise RecipeError("generate needs --prompt TEXT (- reads standard input), or else --ids '1 2 3'")
    if chat and ids:
        raise RecipeError("--chat has no effect on --ids: give --prompt")
    if ids or not prompts:
        return ids or []
    if prompts.count("-") > 1:
        raise RecipeError("standard input is read once: one --prompt - will do")
    return [sys.stdin.read().removesuffix("\n") if p == "-" else p for p in prompts]


def _ids(texts: list[str], tokenizer: Any, listed: bool, chat: bool, model: str) -> list[list[int]]:
    from rarefy.generation.tokenization import encode_prompt, parse_ids

    if listed:
        return [parse_ids(t) for t in texts]
    if tokenizer is None:
        raise ModelError(
            f"{model} has no tokenizer: put its files there, such as tokenizer.json, or give --ids '1 2 3'"
        )
    return [encode_prompt(tokenizer, t, chat) for t in texts]


def _writer(folder: Path, precision: str | None) -> tuple[Any, Any]:
    """What a folder holds that can write, or be made to, and its tokenizer."""
    made, tokenizer = shared.load_any(folder)
    kind = shared.kind_of(made)
    if kind == "compiled model":
        raise ModelError(f"{folder} holds a compiled model, which has no cache: give a language model, or its decoder")
    if kind == "decoder" and precision is not None:
        raise RecipeError(f"--precision has no effect: {folder} holds a decoder, which has its numbers already")
    return made, tokenizer


def _write(
    steps: Iterator[Any], written: list[Writing], ends: tuple[int, ...], aloud: bool
) -> tuple[list[float], int | None]:
    """Take tokens until there are no more or Ctrl-C; return the seconds of each step, and the exit code if stopped."""
    spent: list[float] = []
    stopped = None
    try:
        while True:
            began = time.perf_counter()
            token = next(steps, None)
            if token is None:
                break
            spent.append(time.perf_counter() - began)
            for w, t in zip(written, token.tolist()):
                piece = w.add(t, ends)
                if aloud:
                    print(piece, end="", flush=True)
    except (KeyboardInterrupt, SystemExit) as end:
        stopped = end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 130
    for w in written:
        piece = w.close()
        if aloud:
            print(piece, flush=True)
    return spent, stopped


def _tell(written: list[Writing], spent: list[float], as_json: bool, quiet: bool, several: bool) -> None:
    """Print what was not printed yet, and how fast it was."""
    first, rest = sum(spent[:1]), sum(spent[1:])
    seconds = {"seconds_prefill": first, "seconds_decode": rest}
    rows = [
        {"text": "".join(w.pieces), "ids": w.ids, "prompt_tokens": len(w.prompt), "new_tokens": len(w.ids), **seconds}
        for w in written
    ]
    if as_json:
        print(json.dumps(rows if several else rows[0], indent=1))
        return
    if several:
        for row in rows:
            print(row["text"])
    if not quiet:
        new, read = sum(len(w.ids) for w in written), sum(len(w.prompt) for w in written)
        later = new - sum(1 for w in written if w.ids)
        said = [f"{read} tokens read" + (f", {read / first:.1f} a second" if first else "")]
        said += [f"{new} written" + (f", {later / rest:.1f} a second behind the first" if later and rest else "")]
        print("; ".join(said), file=sys.stderr)


def compile_(
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it appears whole or not at all.")],
    precision: Precision = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples of the example that a model is compiled with, 2. No decoders.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the example, 128. No decoders.")] = None,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a whole model for the engine, and write it: rarefy.load brings it back without the model's class.

    A language model becomes a decoder, with its tokenizer's files beside it, for `rarefy generate`. Other models of
    transformers take batches and lengths other than the example's. Models built in Python are compiled there:
    rarefy.save(rarefy.compile(model, example), "out/").

    rarefy compile smollm2-135m --precision int8 --out decoder/

    rarefy compile minilm --out fast/ --tokens 128
    """
    from rarefy.checkpoint.export import side_files
    from rarefy.checkpoint.save import save
    from rarefy.common.atomic_io import check_output_folder
    from rarefy.common.report import Report
    from rarefy.compiler.compile import compile
    from rarefy.generation.decoder import decoder
    from rarefy.model import hf

    check_output_folder(out, force)
    source = shared.source(model)
    with shared.threads(threads):
        net, tokenizer = shared.load(source)
        net = net.float()
        if hf.is_causal_lm(net):
            if batch or tokens:
                raise RecipeError("--batch and --tokens have no effect: a decoder of a language model takes any")
            made: Any = decoder(net, precision=precision)
        else:
            made = compile(net, _example(net, tokens, batch, tokenizer), precision=precision)
        names = ("config.json",)  # by which transformers knows the tokenizer
        files = side_files(source) | {n: (source / n).read_bytes() for n in names if (source / n).is_file()}
        receipt = getattr(net, "rarefy_receipt", None)
        size = save(made, out, files=files, receipt=receipt, overwrite=force)
    step = made.compiled if hf.is_causal_lm(net) else made
    told = {"holds": f"a {shared.kind_of(made)}", "bytes": size, "runs": "; ".join(repr(step).splitlines())}
    shared.show(Report(f"compiled to {out}", (), told), as_json, quiet)


def _example(net: Any, tokens: int | None, batch: int | None, tokenizer: Any) -> dict[str, Any]:
    """What a model of transformers is compiled with: all that its tokenizer gives and it takes."""
    import inspect

    import torch

    from rarefy.evaluation.example_inputs import example_of

    most = getattr(getattr(net, "config", None), "max_position_embeddings", None)
    if tokens and isinstance(most, int) and tokens > most:
        raise RecipeError(f"--tokens is at most {most}, as many as the model has positions, got {tokens}")
    length = tokens or min(128, most if isinstance(most, int) else 128)
    example = example_of(net, length, batch or 2)
    if tokens and "input_ids" not in example:
        raise RecipeError("--tokens has no effect: the model takes images")
    if "input_ids" in example:
        given = getattr(tokenizer, "model_input_names", ["attention_mask"])
        fill = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
        takes = inspect.signature(net.forward).parameters
        example |= {n: f(example["input_ids"]) for n, f in fill.items() if n in given and n in takes}
    return example


def bench(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder, a folder of ours, compiled or not, or a built-in name.")
    ],
    against: Annotated[str | None, typer.Option(help="A second model, timed in turns with the first.")] = None,
    accelerate: Annotated[
        bool, typer.Option("--accelerate", help="Time it with layers that skip zeros too, where those are faster here.")
    ] = False,
    engine: Annotated[
        bool, typer.Option(help="Time what the engine makes of it too, a decoder or a compiled model, where it can.")
    ] = True,
    precision: Precision = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Length of the input: tokens, or the prompt of a language model.")
    ] = 256,
    new: Annotated[int, typer.Option(min=1, help="Tokens that a language model writes.")] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of forward calls (models without generate).")] = 1,
    repeats: Annotated[int, typer.Option(min=2, help="Repeats after warm-up.")] = 5,
    table: Annotated[
        Path | None,
        typer.Option(help="Write to this JSON file how long each shape of layer takes by format, sparsity and batch."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a model, or several in turns: tokens per second of a language model, milliseconds of a call otherwise.

    Beside the model itself it times what `rarefy compile` would make of it ("engine"; --precision int8: in 8 bits). A
    folder that `rarefy compile` wrote is timed by itself.

    rarefy bench smollm2-135m --precision int8 --tokens 128

    rarefy bench out/ --against smollm2-135m --accelerate
    """
    from rarefy.cli.benchmark import bench_models, engine_of
    from rarefy.common.atomic_io import container_errors, write_text_atomic
    from rarefy.evaluation.example_inputs import example_of, generates
    from rarefy.runtime.accelerate import accelerate_
    from rarefy.runtime.latency_table import latency_table

    if table is not None and (against or accelerate or precision):
        raise RecipeError("--table times layers, not models: leave --against, --accelerate and --precision out")
    if table is not None and (table.is_dir() or not table.resolve().parent.is_dir()):
        raise RecipeError(f"--table {table}: a file to write, in a folder that exists")
    if precision is not None and not engine:
        raise RecipeError("--precision has no effect without the engine: leave --no-engine out")
    with shared.threads(threads):
        net, _ = shared.load_any(shared.source(model))
        kind, named = shared.kind_of(net), {"model": net}
        idle = {"--table": table, "--accelerate": accelerate, "--precision": precision}
        odd = next((n for n, given in idle.items() if given), None) if kind != "model" else None
        if odd is not None:
            raise RecipeError(f"{odd} has no effect: {model} holds a {kind}, which is timed as it is")
        if table is not None:
            sizes = (1, tokens) if generates(net) else (batch * tokens,)
            told = latency_table(net, sizes, example_of(net, tokens, batch), repeats=repeats, progress=not quiet)
            with container_errors(table):
                write_text_atomic(table, told.to_json())
            shared.show(told, as_json, quiet)
            return
        if against:
            named["against"] = shared.load_any(shared.source(against))[0]
        more: dict[str, Any] = {}
        if accelerate:
            fast = named["accelerated"] = copy.deepcopy(net)
            sizes = (1, tokens) if generates(net) else (batch * tokens,)
            told = accelerate_(fast, sizes, example_of(fast, tokens, batch), progress=not quiet)
            more["layers that run sparse"] = told.summary["layers that run sparse"]
            shared.show(told, False, as_json or quiet)
        if engine and kind == "model":
            made, why = engine_of(net, tokens, batch, precision)
            named |= {} if made is None else {"engine": made}
            more |= {"no engine": why} if made is None else {}
        report = bench_models(named, tokens, new, batch, repeats, not quiet)
        shared.show(replace(report, summary={**report.summary, **more}), as_json, quiet)
