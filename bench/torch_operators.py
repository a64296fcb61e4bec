"""List which operators torch runs in compiled models of tests/zoo.py, and how much of their time lies there.

    python torch_operators.py --only timm.swin timm.maxvit

Every operator of the engine runs natively here, also where torch would be faster. What torch runs cuts native calls:
each of these reads its inputs in the layout of torch and writes its outputs so. A row is an operator with the arguments
that say what kind it is; the share of time is the mean over all models. Prints tables, and writes nothing.
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os
import warnings
from collections import defaultdict
from typing import Any

import torch

import rarefy
from conformance import LIMIT, with_batch, zoo
from rarefy.compiler.compile import split_example
from rarefy.model import hf

TORCH = " (torch)"
NOT_OPERATORS = ("pack", "unpack")  # steps at the ends of native calls


def shares(name: str, cases: dict[str, Any], options: argparse.Namespace) -> dict[str, tuple[int, float]]:
    """Return the number of calls of each torch operator, of native calls' ends, and their shares of a model's time."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    make, x = cases[name]
    model = zoo().half(make())
    if "use_cache" in inspect.signature(model.forward).parameters:
        x = {**x, "use_cache": False}
    x = with_batch(x, options.batch)
    args, kwargs = split_example(x)
    profile = rarefy.compile(model, x, tune=False).profile(*args, **kwargs, repeats=4, warmup=1)
    found: dict[str, tuple[int, float]] = {}
    for row in profile.by_operator():
        if row.operator.endswith(TORCH) or row.operator in NOT_OPERATORS:
            found[row.operator.removesuffix(TORCH)] = (row.count, row.share)
    return found


def isolated(name: str, cases: dict[str, Any], options: argparse.Namespace) -> dict[str, tuple[int, float]] | str:
    """Run `shares` in its own process; return an error as text."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)

    def run() -> None:
        try:
            its.send(shares(name, cases, options))
        except Exception as error:
            its.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=run)
    process.start()
    its.close()
    try:
        return mine.recv() if mine.poll(LIMIT) else f"took longer than {LIMIT} s"
    except EOFError:
        return "the process ended"
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="models whose names begin with these words")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    hf.no_bars()
    torch.set_num_threads(1)  # a process that forked after it started threads hangs
    cases = {**zoo().transformers_cases(), **zoo().timm_cases(), **zoo().held_out_cases(), **zoo().torchvision_cases()}
    models: dict[str, dict[str, tuple[int, float]]] = {}
    for name in (n for n in cases if not args.only or any(n.startswith(o) for o in args.only)):
        found = isolated(name, cases, args)
        if isinstance(found, str):
            print(f"{name}: {found[:160]}", flush=True)
            continue
        models[name] = found
        largest = sorted(found.items(), key=lambda f: -f[1][1])[:6]
        print(f"{name}: {', '.join(f'{n} {op} {100 * share:.1f} %' for op, (n, share) in largest)}", flush=True)
    totals: dict[str, list[tuple[str, int, float]]] = defaultdict(list)
    for name, found in models.items():
        for op, (count, share) in found.items():
            totals[op].append((name, count, share))
    print("\n| operator | models | calls | mean share of time | largest |", "|---" * 5 + "|", sep="\n")
    for op, uses in sorted(totals.items(), key=lambda t: -sum(u[2] for u in t[1])):
        largest = max(uses, key=lambda u: u[2])
        mean = 100 * sum(u[2] for u in uses) / len(models)
        calls = sum(u[1] for u in uses)
        print(f"| {op} | {len(uses)} | {calls} | {mean:.2f} % | {largest[0]} {100 * largest[2]:.0f} % |")


if __name__ == "__main__":
    main()
