"""Compile the models of tests/zoo.py, and language models as decoders: compare the outputs with eager torch's, count
the native calls, list the operators that run in torch, and time the models at several batch sizes against eager torch.

    python conformance.py                     all models, about two hours on two cores
    python conformance.py --again             also those that this commit has records of
    python conformance.py --batches           without times, about half an hour
    python conformance.py --only swin vit     models whose names begin with these words
    python conformance.py --table             only print what was measured last

Half of the weights of Linear and Conv2d layers are set to zero at random: only equality and speed count here, not
quality. For its times a model is compiled for each batch size, with the choices between native and torch operators that
`compile` makes there; eager and compiled calls alternate, and the fastest of each counts, which other processes
disturbed least. Each model runs in its own process. Appends one JSON line per
model to results/conformance.jsonl. A run that was interrupted goes on where it stopped: models that this commit has
records of, with these batch sizes and threads, are skipped.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rarefy
from rarefy.common.errors import ModelError
from rarefy.compiler.compile import split_example
from rarefy.compiler.executor import Compiled
from rarefy.compiler.tuning import alternate
from rarefy.compiler.verify import distance
from rarefy.model import hf
from rarefy.model.compare import relative_distance
from recording import keep, kept, start
from records import eager_speedups

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "conformance.jsonl"
sys.path.insert(0, str(HERE.parent / "tests"))
LIMIT = 120  # seconds per model, and for each batch size that is timed
MIN_REPEATS, MAX_REPEATS, TIMED_SECONDS = 5, 400, 2.0  # of eager and compiled calls at one batch size
NEAR = 1e-3  # largest distance, relative to the norm of the outputs


def zoo() -> Any:
    """Return tests/zoo.py, which builds the models."""
    return importlib.import_module("zoo")


def operator_counts(made: Compiled) -> dict[str, Any]:
    """Return the number of native calls, and counts of native and torch operators, most frequent first."""
    native, ours, rest = made.counts()
    moved = Counter(n.target.__name__ for n in made.exported.torch_nodes)
    return {
        "native calls": native,
        "words": dict(ours.most_common()),
        "torch": dict((rest - moved).most_common()),
        "faster in torch": dict(moved.most_common()),
        "notes": list(made.exported.notes),
    }


def with_batch(x: Any, batch: int) -> Any:
    """Return an example whose tensors have the first sample of another one so many times."""
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t[:1]] * batch), dict(x) if hasattr(x, "keys") else x)


def speed(model: nn.Module, x: Any) -> dict[str, Any]:
    """Compile a model for an example; return milliseconds of eager and compiled calls, and what runs where."""
    began = time.perf_counter()
    made = rarefy.compile(model, x)
    seconds = time.perf_counter() - began
    args, kwargs = split_example(x)
    with torch.no_grad():
        times = alternate(
            lambda: model(*args, **kwargs),
            lambda: made(*args, **kwargs),
            TIMED_SECONDS,
            MIN_REPEATS,
            MAX_REPEATS,
        )
    ms = {name: 1e3 * seconds for name, seconds in zip(("eager", "compiled"), times)}
    far = distance(model, made, *pytree.tree_flatten((args, kwargs)))
    counts = operator_counts(made)
    return {"speedup": ms["eager"] / ms["compiled"], "ms": ms, "distance": far, "seconds": seconds, **counts}


def compiled(model: nn.Module, x: Any, batches: list[int]) -> dict[str, Any]:
    """Compile a model, compare its outputs with eager torch's, and time both."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        x = {**x, "use_cache": False}
    if not batches:
        began = time.perf_counter()
        made = rarefy.compile(model, x, tune=False)
        seconds = time.perf_counter() - began
        far = distance(model, made, *pytree.tree_flatten(split_example(x)))
        return {"distance": far, "seconds": seconds, **operator_counts(made)}
    speeds = {str(b): speed(model, with_batch(x, b)) for b in batches}
    first = next(iter(speeds.values()))
    shared = ("seconds", "native calls", "words", "torch", "notes")
    far = max(s["distance"] for s in speeds.values())
    return {"distance": far, **{n: first[n] for n in shared}, "speed": speeds}


def decoded(model: Any, x: Any, _: list[int]) -> dict[str, Any]:
    """Build a decoder of a language model and compare its logits with eager torch's."""
    began = time.perf_counter()
    made = rarefy.decoder(model)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        want = model(input_ids=x["input_ids"], use_cache=False).logits
    return {
        "distance": relative_distance(made(x["input_ids"]), want),
        "seconds": seconds,
        **operator_counts(made.compiled),
    }


def one(name: str, cases: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the result of one model: `status` is equal, other (different outputs), refused or crashed."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    make, x = cases[name.removesuffix(" as decoder")]
    try:
        model = zoo().half(make())
        result = (decoded if name.endswith(" as decoder") else compiled)(model, x, options.batches)
    except ModelError as error:
        return {"status": "refused", "error": str(error)}
    except Exception as error:
        return {"status": "crashed", "error": f"{type(error).__name__}: {error}"}
    return {"status": "equal" if result["distance"] <= NEAR else "other", **result}


def isolated(name: str, cases: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run `one` in its own process, for at most `LIMIT` seconds, and as many for each batch size."""
    limit = LIMIT * (1 + len(options.batches))
    context = multiprocessing.get_context("fork")  # keeps what is imported already
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=lambda: its.send(one(name, cases, options)))
    process.start()
    its.close()
    try:
        return mine.recv() if mine.poll(limit) else {"status": "slow", "error": f"took longer than {limit} s"}
    except EOFError:
        return {"status": "crashed", "error": "the process ended"}
    finally:
        process.kill()
        process.join()


def is_recorded(name: str, options: argparse.Namespace, records: list[dict[str, Any]]) -> bool:
    """Return whether this commit has a record of a model with these batch sizes and threads."""
    here = start(options.results)
    mine = (r for r in records if r["model"] == name and (r["commit"], r.get("changed")) == (here["commit"], []))
    same_threads = [r for r in mine if r["machine"]["threads"] == options.threads]
    batches = {str(b) for b in options.batches}
    decoder = name.endswith(" as decoder")
    return any(decoder or "error" in r or batches <= r.get("speed", {}).keys() for r in same_threads)


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one record per model, transformers first."""
    records = [] if options.again else kept(options.results)
    torch.set_num_threads(1)  # a process that forked after it started threads hangs
    language_models = zoo().transformers_cases()
    cases = {**language_models, **zoo().timm_cases(), **zoo().held_out_cases(), **zoo().torchvision_cases()}
    torch.set_num_threads(options.threads)  # which the records name
    names = [*language_models, *(f"{n} as decoder" for n in DECODERS), *(n for n in cases if n not in language_models)]
    for name in names:
        wanted = not options.only or any(name.startswith(o) for o in options.only)
        if wanted and not is_recorded(name, options, records):
            yield {"model": name, **isolated(name, cases, options)}


DECODERS = ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma")


def table(result: list[dict[str, Any]]) -> str:
    """Return one row per model, from its last record, the number of models by status, and the speed over eager."""
    last = {l["model"]: l for l in result}
    out = ["| model | status | distance | native calls | words | most in torch | s | over eager |", "|---" * 8 + "|"]
    for name, l in last.items():
        if "error" in l:
            out.append(f"| {name} | {l['status']} | | | | {l['error'].splitlines()[0][:160]} | | |")
            continue
        rest = ", ".join(f"{n} {w}" for w, n in list(l["torch"].items())[:3])
        words = ", ".join(f"{n} {w}" for w, n in l["words"].items())
        row = [name, l["status"], f"{l['distance']:.0e}", l["native calls"], words, rest, f"{l['seconds']:.0f}"]
        row.append(", ".join(f"{b}: {s['speedup']:.2f}x" for b, s in l.get("speed", {}).items()))
        out.append(f"| {' | '.join(map(str, row))} |")
    counts = Counter(l["status"] for l in last.values())
    out += ["", ", ".join(f"{n} {s}" for s, n in counts.most_common())]
    return "\n".join([*out, *(f"{label}: {text}" for label, text in eager_speedups(result).items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="batch sizes that are timed")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--again", action="store_true", help="measure models again that this commit has records of")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of records")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    if not args.table:
        with tempfile.TemporaryDirectory() as cache:  # choices are measured in this run
            os.environ["RAREFY_CACHE"] = cache
            keep(args.results, [lambda: lines(args)])
    print(table(kept(args.results)))


if __name__ == "__main__":
    main()
