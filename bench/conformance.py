"""Compile the models of tests/zoo.py, and language models as decoders: compare the outputs with eager torch's, count
the native calls, and list the operators that run in torch.

    python conformance.py                     all models, about half an hour on one core
    python conformance.py --only swin vit     models whose names begin with these words
    python conformance.py --table             only print what was measured last

Half of the weights of Linear and Conv2d layers are set to zero at random: only equality counts here, not quality.
Each model runs in its own process. Appends one JSON line per model to results/conformance.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import rarefy
from rarefy.common.errors import ModelError
from rarefy.compiler.compile import split_example
from rarefy.compiler.executor import Compiled
from rarefy.compiler.verify import distance
from rarefy.model import hf
from rarefy.model.compare import relative_distance
from values import keep, kept

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "conformance.jsonl"
sys.path.insert(0, str(HERE.parent / "tests"))
LIMIT = 120  # seconds per model
NEAR = 1e-3  # largest distance, relative to the norm of the outputs


def zoo() -> Any:
    """Return tests/zoo.py, which builds the models."""
    return importlib.import_module("zoo")


def operator_counts(made: Compiled) -> dict[str, Any]:
    """Return the number of native calls, and counts of native and torch operators, most frequent first."""
    native, ours, rest = made.counts()
    return {"native calls": native, "words": dict(ours.most_common()), "torch": dict(rest.most_common())}


def compiled(model: nn.Module, x: Any) -> dict[str, Any]:
    """Compile a model and compare its outputs with eager torch's."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        x = {**x, "use_cache": False}
    began = time.perf_counter()
    made = rarefy.compile(model, x)
    seconds = time.perf_counter() - began
    far = distance(model, made, *pytree.tree_flatten(split_example(x)))
    return {"distance": far, "seconds": seconds, **operator_counts(made), "notes": list(made.exported.notes)}


def decoded(model: Any, x: Any) -> dict[str, Any]:
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


def one(name: str, cases: dict[str, Any]) -> dict[str, Any]:
    """Return the result of one model: `status` is equal, other (different outputs), refused or crashed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    make, x = cases[name.removesuffix(" as decoder")]
    model = zoo().half(make())
    try:
        result = (decoded if name.endswith(" as decoder") else compiled)(model, x)
    except ModelError as error:
        return {"status": "refused", "error": str(error)}
    except Exception as error:
        return {"status": "crashed", "error": f"{type(error).__name__}: {error}"}
    return {"status": "equal" if result["distance"] <= NEAR else "other", **result}


def isolated(name: str, cases: dict[str, Any]) -> dict[str, Any]:
    """Run `one` in its own process, for at most `LIMIT` seconds."""
    context = multiprocessing.get_context("fork")  # keeps what is imported already
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=lambda: its.send(one(name, cases)))
    process.start()
    its.close()
    try:
        return mine.recv() if mine.poll(LIMIT) else {"status": "slow", "error": f"took longer than {LIMIT} s"}
    except EOFError:
        return {"status": "crashed", "error": "the process ended"}
    finally:
        process.kill()
        process.join()


def lines(only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one record per model, transformers first."""
    language_models = zoo().transformers_cases()
    cases = {**language_models, **zoo().timm_cases(), **zoo().torchvision_cases()}
    names = [*language_models, *(f"{n} as decoder" for n in DECODERS), *(n for n in cases if n not in language_models)]
    for name in names:
        if not only or any(name.startswith(o) for o in only):
            yield {"model": name, **isolated(name, cases)}


DECODERS = ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma")


def table(result: list[dict[str, Any]]) -> str:
    """Return one row per model, from its last record, and the number of models by status."""
    last = {l["model"]: l for l in result}
    out = ["| model | status | distance | native calls | words | most in torch | s |", "|---" * 7 + "|"]
    for name, l in last.items():
        if "error" in l:
            out.append(f"| {name} | {l['status']} | | | | {l['error'].splitlines()[0][:160]} | |")
            continue
        rest = ", ".join(f"{n} {w}" for w, n in list(l["torch"].items())[:3])
        words = ", ".join(f"{n} {w}" for w, n in l["words"].items())
        row = [name, l["status"], f"{l['distance']:.0e}", l["native calls"], words, rest, f"{l['seconds']:.0f}"]
        out.append(f"| {' | '.join(map(str, row))} |")
    counts = Counter(l["status"] for l in last.values())
    return "\n".join([*out, "", ", ".join(f"{n} {s}" for s, n in counts.most_common())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    if not args.table:
        keep(RESULTS, [lambda: lines(args.only)])
    print(table(kept(RESULTS)))


if __name__ == "__main__":
    main()
