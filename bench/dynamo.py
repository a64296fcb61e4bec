"""`torch.compile(model, backend="rarefy")` beside eager torch: 20 models, some with graph breaks, timed alternately.

    python dynamo.py                  all models, about 20 minutes on two idle cores
    python dynamo.py --only swin vit  models whose names begin with these words
    python dynamo.py --precision int8
    python dynamo.py --table          only print what was measured last

The models of tests/zoo.py with random weights: only equality and speed count here. Eager and compiled calls alternate,
each under torch.no_grad(), and the fastest of each counts, which other processes disturbed least. Appends one JSON line
per model to results/dynamo.jsonl: the milliseconds, the distance of the outputs, the seconds of the first calls, the
share of a call that the check of weights takes, and for each graph what ran it and why. Models with graph breaks are
also timed with Dynamo's own backend "eager": its checks between graphs take time that no backend can give back.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import sys
import tempfile
import time
import timeit
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.compiler import tuning
from rarefy.compiler.compile import split_example
from rarefy.integrations import dynamo
from rarefy.integrations.dynamo import weights
from rarefy.model import hf
from rarefy.model.compare import relative_distance
from recording import keep, kept
from records import MIN_SPEEDUP

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "dynamo.jsonl"
sys.path.insert(0, str(HERE.parent / "tests"))
WARMUP = 4  # calls: of blocks of the same code, only the first is compiled at the first call
MIN_REPEATS, MAX_REPEATS, TIMED_SECONDS = 10, 1000, 5.0  # of eager and compiled calls


class Lines(logging.Handler):
    """Keep what the backend says about each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def measure(make: Any, example: Any, precision: str | None, log: Lines) -> dict[str, Any]:
    """Compile a model; return milliseconds of eager and compiled calls, and what ran where."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    log.lines.clear()
    model = make()
    args, kwargs = split_example(example)
    fast = torch.compile(model, backend=dynamo.backend, options={} if precision is None else {"precision": precision})
    with torch.no_grad():
        got = want = tensors(model(*args, **kwargs))
        began = time.perf_counter()
        for _ in range(WARMUP):
            got = tensors(fast(*args, **kwargs))
        seconds = time.perf_counter() - began
        eager, compiled = tuning.alternate(
            lambda: model(*args, **kwargs), lambda: fast(*args, **kwargs), TIMED_SECONDS, MIN_REPEATS, MAX_REPEATS
        )
        check = _seconds_of_checks()
        alone = _dynamo_alone(model, args, kwargs) if len(log.lines) > 1 else {}
    return {
        "speedup": eager / compiled,
        "ms": {"eager": 1e3 * eager, "compiled": 1e3 * compiled},
        "distance": max(map(relative_distance, got, want)),
        "seconds": seconds,
        "graphs": list(log.lines),
        "check_share": check / compiled,
        **alone,
    }


def _seconds_of_checks() -> float:
    """Return the time that the checks of all engines' weights take, the shortest of some."""
    gc.collect()  # engines of earlier models
    guards = [g for g in list(weights._guards) if g.alive]
    watched = [(g, [t for r in g._references if (t := r()) is not None]) for g in guards]
    return sum(min(timeit.repeat(partial(g.is_unchanged, t), number=100, repeat=20)) / 100 for g, t in watched)


def _dynamo_alone(model: Any, args: Any, kwargs: Any) -> dict[str, float]:
    """Return eager torch's time over that of the same graphs in eager torch, called by Dynamo."""
    torch._dynamo.reset()
    graphs = torch.compile(model, backend="eager")
    for _ in range(WARMUP):
        graphs(*args, **kwargs)
    eager, alone = tuning.alternate(
        lambda: model(*args, **kwargs), lambda: graphs(*args, **kwargs), TIMED_SECONDS, MIN_REPEATS, MAX_REPEATS
    )
    return {"dynamo_alone": eager / alone}


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one record per model."""
    log = Lines()
    logger = logging.getLogger(dynamo.__name__)
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    for name, (make, example) in importlib.import_module("zoo").dynamo_cases().items():
        if not options.only or any(name.startswith(o) for o in options.only):
            record = measure(make, example, options.precision, log)
            yield {"model": name, "precision": options.precision, **record}


def table(result: list[dict[str, Any]]) -> str:
    """Return one row per model from its last record, and the models that are slower than eager torch."""
    last = {(l["model"], l["precision"]): l for l in result}.values()
    out = [
        "| model | precision | eager, ms | compiled, ms | over eager | distance | on the engine | warm-up, s | check |"
    ]
    out.append("|---" * 9 + "|")
    for l in last:
        on_engine = sum("): engine" in g for g in l["graphs"])
        row = [l["model"], l["precision"] or "fp32", f"{l['ms']['eager']:.3g}", f"{l['ms']['compiled']:.3g}"]
        row += [
            f"{l['speedup']:.2f}x",
            f"{l['distance']:.0e}",
            f"{on_engine} of {len(l['graphs'])}",
            f"{l['seconds']:.0f}",
            f"{l['check_share']:.2%}" if "check_share" in l else "",
        ]
        out.append(f"| {' | '.join(row)} |")
    slower = [f"{l['model']} {l['speedup']:.2f}x" for l in last if l["speedup"] < MIN_SPEEDUP]
    return "\n".join([*out, "", f"below {MIN_SPEEDUP}x of eager: {', '.join(slower) or 'none'}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--precision", choices=("bf16", "int16", "int8"))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of records")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    if not args.table:
        warnings.simplefilter("ignore")
        torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory() as cache:  # choices are measured in this run
            os.environ["RAREFY_CACHE"] = cache
            if not tuning.is_enabled():
                raise SystemExit("nothing would be timed: unset RAREFY_TUNE, and build the kernels")
            keep(args.results, [lambda: lines(args)])
    print(table(kept(args.results)))


if __name__ == "__main__":
    main()
