"""The command generate."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.generate_output import Run, Text, print_results, run_steps
from rarefy.cli.shared import CachePrecision, DecoderPrecision, Json, Offline, Quiet, Threads
from rarefy.common.errors import DataError, ModelError, RecipeError
from rarefy.common.plain_file import read_text

if TYPE_CHECKING:
    from rarefy.cli.shared import Source

DRAWS = ("temperature", "top_k", "top_p", "min_p", "seed")  # options that turn on sampling
SHELL_OPTIONS = {  # what errors call by the name of a Python option, other than name: --name
    "do_sample=False": "--greedy",
    "num_return_sequences": "--n",
    "num_beams": "--beams",
    "prompt_lookup_num_tokens": "--lookup",
    "assistant_model": "--draft",
    "stop_strings": "--stop",
}
WORDS = ("temperature", "logprobs", "regex", "grammar", "seed")  # options that are words as well
OPTIONS = (
    "max_new_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "no_repeat_ngram_size", "length_penalty", "cache_precision", "json_schema", *WORDS,
)  # fmt: skip

Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder, a folder of Rarefy (decoders too), a GGUF file, a built-in name, or ORG/NAME of "
        "the hub."
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        "-p",
        help="The prompt; - reads it from standard input. Several form a batch; texts are numbered.",
    ),
]
Ids = Annotated[
    list[str] | None, typer.Option("--ids", help="A prompt as token ids, such as '1 2 3', instead of --prompt.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Treat prompts as user messages: apply the tokenizer's chat template.")
]
System = Annotated[str | None, typer.Option(help="System message before each prompt; needs --chat.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Largest number of new tokens; by default as the model says, else 128, as far as they fit."
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A string that ends a text; it is not printed; repeat for more."),
]
Greedy = Annotated[
    bool, typer.Option("--greedy", help="Take the most likely token, also where the model's settings sample.")
]
Temperature = Annotated[
    float | None, typer.Option(help="Sample with this temperature, above 0. Lower values are more deterministic.")
]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from the k most likely tokens; 0 for all.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the most likely tokens whose probabilities add up to p.")]
MinP = Annotated[float | None, typer.Option(help="Sample from tokens with at least p times the largest probability.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Values above 1 make tokens that occurred before less likely.")
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Subtract this from scores of tokens that were generated before.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Subtract this from scores of tokens for each time they were generated.")
]
NoRepeatNgramSize = Annotated[int | None, typer.Option(min=1, help="Let so many tokens in a row occur only once.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the sampling.")]
Count = Annotated[int | None, typer.Option("--n", min=1, help="Number of texts for each prompt.")]
Beams = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Beam search with so many beams; their tokens are drawn with options such as --temperature.",
    ),
]
LengthPenalty = Annotated[
    float | None, typer.Option(help="With --beams: above 0 prefers longer texts, below shorter ones.")
]
Logprobs = Annotated[
    int | None,
    typer.Option(min=0, help="With --json: log probabilities of the tokens and of so many most likely ones."),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(help='JSON schema that each text follows: a file, or the schema itself, as {"type": "object"}.'),
]
Regex = Annotated[str | None, typer.Option(help="Regular expression that each text follows.")]
Grammar = Annotated[Path | None, typer.Option(help="File with a grammar in Lark's syntax for each text.")]
Lookup = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Speculative decoding by prompt lookup: guess up to so many tokens from earlier text, 7 for example.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(help="Speculative decoding by a draft model: a smaller model or decoder of the same vocabulary."),
]


def generate(
    model: Model,
    prompt: Prompt = None,
    ids: Ids = None,
    chat: Chat = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    stop: Stop = None,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    no_repeat_ngram_size: NoRepeatNgramSize = None,
    seed: Seed = None,
    n: Count = None,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    logprobs: Logprobs = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    lookup: Lookup = None,
    draft: Draft = None,
    cache_precision: CachePrecision = None,
    precision: DecoderPrecision = None,
    offline: Offline = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text with a language model on the engine and stream it to standard output.

    Decoding is as the model's generation_config says, else greedy. --temperature, --top-k, --top-p, --min-p, --seed and
    --n turn on sampling. The speed is printed on standard error. Building a decoder takes half a minute or more:
    `rarefy compile` does it once and saves it. Ctrl-C stops the generation with exit code 130; the text so far stays.

    rarefy generate smollm2-135m --prompt "The capital of France is" --max-new-tokens 20

    rarefy generate decoder/ --chat --system "Answer briefly." --prompt "Name three rivers." --temperature 0.7 --seed 1

    echo "Bread is made of" | rarefy generate smollm2-135m --prompt - --precision int8

    rarefy generate decoder/ --prompt "A list of rivers:" --stop "." --n 3 --min-p 0.1

    rarefy generate decoder/ --prompt "A person as JSON: " --json-schema person.json

    rarefy generate decoder/ --prompt - --lookup 7 < rows.jsonl
    """
    texts = _read_prompts(prompt, ids, chat)
    _check_effects(system, chat, logprobs, as_json)
    _check_guesses(lookup, draft, len(texts) * (n or 1))
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop_strings": stop or None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "seed": seed,
        "num_return_sequences": n,
        "num_beams": beams,
        "length_penalty": length_penalty,
        "logprobs": logprobs,
        "prompt_lookup_num_tokens": lookup,
        "cache_precision": cache_precision,
        **_constraints(json_schema, regex, grammar),
    }
    options = _explicit(options, greedy, draft)
    with shared.threads(threads):
        language_model, tokenizer = _decoder(model, precision, offline, quiet)
        if draft is not None:
            options["assistant_model"] = _decoder(draft, None, offline, quiet)[0]
        prompts = [p if isinstance(p, list) else _encoded(p, tokenizer, chat, model, system) for p in texts]
        continuations = [Text(p, tokenizer, stop or ()) for p in prompts for _ in range(n or 1)]
        streaming = len(continuations) == 1 and not as_json and beams is None
        with _names_of_the_shell():
            run = _run(language_model, tokenizer, prompts, options, continuations, streaming)
    print_results(run, continuations, streaming, as_json, quiet, n or 1)
    if run.stopped is not None:
        raise shared.Ended(run.stopped)


def _check(condition: bool, message: str) -> None:
    """Raise RecipeError unless a condition holds."""
    if not condition:
        raise RecipeError(message)


def _check_effects(system: str | None, chat: bool, logprobs: int | None, as_json: bool) -> None:
    _check(system is None or chat, "--system has no effect without --chat")
    _check(logprobs is None or as_json, "--logprobs has no effect without --json")


def _check_guesses(lookup: int | None, draft: str | None, count: int) -> None:
    option = "--draft" if draft is not None else "--lookup"
    _check((lookup is None and draft is None) or count == 1, f"{option} works for one text at a time, got {count}")


def _run(
    decoder: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    options: dict[str, Any],
    texts: list[Text],
    streaming: bool,
) -> Run:
    """Generate the texts after prompts of ids."""
    from rarefy.generation.tokenization import left_padded

    ids, mask = left_padded(prompts, decoder.pad_token)
    return run_steps(decoder, ids, {**options, "attention_mask": mask, "tokenizer": tokenizer}, texts, streaming)


def _sampling(options: Mapping[str, Any], greedy: bool) -> dict[str, bool]:
    """Return whether to sample: {} leaves it to the model."""
    draws = [name for name in DRAWS if name in options]
    zero = options.get("temperature") == 0
    _check(not zero, "--temperature: expected a number above 0, got 0; --greedy takes the most likely token")
    if greedy and draws:
        raise RecipeError(f"--{draws[0].replace('_', '-')} has no effect on the most likely token: drop --greedy")
    beams = options.get("num_beams", 1) > 1
    if greedy and options.get("num_return_sequences", 1) > 1 and not beams:
        raise RecipeError("--n would return the same text several times: drop --greedy, or pass --beams")
    if greedy or (beams and not draws):
        return {"do_sample": False}
    return {"do_sample": True} if draws or options.get("num_return_sequences", 1) > 1 else {}


def _explicit(values: Mapping[str, Any], greedy: bool, draft: str | None) -> dict[str, Any]:
    """Return the options that the command line sets, checked before the model is loaded."""
    from rarefy.generation.request import check_options

    options = {name: value for name, value in values.items() if value is not None}
    options |= _sampling(options, greedy)
    with _names_of_the_shell():
        check_options({**options, **({"assistant_model": draft} if draft else {})}, {})
    return options


@contextmanager
def _names_of_the_shell() -> Iterator[None]:
    """Let errors of Python's options call them as the command line does."""
    try:
        yield
    except DataError as error:
        raise DataError(_in_shell(str(error))) from None


def _in_shell(message: str) -> str:
    """Return a message with the names of the command line.

    >>> _in_shell("top_k has no effect: pass num_beams=4")
    '--top-k has no effect: pass --beams=4'
    >>> _in_shell("seed: expected a seed from 0 on")
    '--seed: expected a seed from 0 on'
    """
    shell = {**{name: f"--{name.replace('_', '-')}" for name in OPTIONS}, **SHELL_OPTIONS}
    names = "|".join(rf"\b{re.escape(n)}\b" for n in shell if n not in WORDS)
    words = rf"(?:^|(?<=pass )|(?<=got )|(?<=and ))(?:{'|'.join(WORDS)})\b"
    return re.sub(f"{names}|{words}", lambda match: shell[match[0]], message)


def _constraints(json_schema: str | None, regex: str | None, grammar: Path | None) -> dict[str, str | None]:
    """Return what each text follows, read from files."""
    schema = None if json_schema is None else _schema(json_schema)
    return {
        "json_schema": schema,
        "regex": regex,
        "grammar": None if grammar is None else _file("--grammar", grammar),
    }


def _schema(value: str) -> str:
    return value if value.lstrip().startswith("{") else _file("--json-schema", Path(value))


def _file(option: str, path: Path) -> str:
    try:
        return read_text(path, RecipeError, "utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{option}: {path} cannot be read: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None


def _read_prompts(prompts: list[str] | None, ids: list[str] | None, chat: bool) -> list[str] | list[list[int]]:
    """Return the prompts of the command line as texts, or as ids; `-` is read from standard input."""
    if prompts and ids:
        raise RecipeError("give --prompt or --ids, not both")
    if not prompts and not ids:
        raise RecipeError("generate needs --prompt TEXT (- reads standard input), or else --ids '1 2 3'")
    if chat and ids:
        raise RecipeError("--chat has no effect on --ids: give --prompt")
    if ids or not prompts:
        from rarefy.generation.tokenization import parse_ids

        return [parse_ids(text) for text in ids or []]
    if prompts.count("-") > 1:
        raise RecipeError("standard input can be read only once: give one --prompt -")
    return [_standard_input() if p == "-" else p for p in prompts]


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RecipeError(f"--prompt -: standard input is not UTF-8 text (byte {error.start})") from None


def _encoded(text: str, tokenizer: Any, chat: bool, model: str, system: str | None) -> list[int]:
    from rarefy.generation.tokenization import encode_prompt

    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer: add its files, such as tokenizer.json, or give --ids '1 2 3'")
    return encode_prompt(tokenizer, text, chat, system)


def _decoder(name: str, precision: str | None, offline: bool, quiet: bool) -> tuple[Any, Any]:
    """Return the decoder of a folder, file or built-in model, built where there is none, and its tokenizer.

    Weights are packed one at a time where the model allows it, so that it may be larger than memory.
    """
    from rarefy.checkpoint.streamed_decoder import decoder_of_weights
    from rarefy.generation.decoder import decoder

    source = shared.source(name, offline=offline, quiet=quiet)
    weights = shared.streamed_weights(source)
    if weights is not None and isinstance(source, Path):
        tokenizer = shared.load_tokenizer(source)
        _say_building(quiet)
        return decoder_of_weights(weights, shared.streamed_precision(source, precision)), tokenizer
    net, tokenizer = _load_language_model(source, precision)
    if shared.kind_of(net) == "decoder":
        return net, tokenizer
    shared.check_whole_model(precision)
    _say_building(quiet)
    return decoder(net.float(), precision=precision), tokenizer


def _say_building(quiet: bool) -> None:
    if not quiet and sys.stderr.isatty():
        print("building a decoder; `rarefy compile` builds and saves one", file=sys.stderr)


def _load_language_model(folder: Source, precision: str | None) -> tuple[Any, Any]:
    """Return the language model or decoder in a folder, and its tokenizer."""
    model, tokenizer = shared.load_any(folder)
    kind = shared.kind_of(model)
    if kind == "compiled model":
        raise ModelError(f"{folder} holds a compiled model, which has no KV cache: give a language model or a decoder")
    if kind == "decoder" and precision is not None:
        raise RecipeError(f"--precision has no effect: {folder} holds a decoder, whose precision is fixed")
    return model, tokenizer
