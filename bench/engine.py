"""Whole compiled models against what else runs them: milliseconds of one call, all in turns.

    python engine.py                  all cases, about a quarter of an hour on two quiet cores
    python engine.py --only minilm
    python engine.py --vehicles       ours against torch.compile of the same accelerated model, which was the other way
    python engine.py --table          only print what was measured last

Ours run the pruned model, also in 8 bits; the others the dense one, also in bf16 and in 8 bits (rivals.py). Weights are
pruned by magnitude: what counts here is time. Appends a JSON line a case to results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import rarefy
import tables
from models import model_of
from rarefy.model import hf
from rivals import call, engines
from runtime import in_turns, keep_memory
from values import keep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engine.jsonl"
CASES = {"minilm": (1, 16), "resnet50": (1, 16)}
PAUSE = 0.005  # seconds: threads of all engines but ONNX Runtime's look for more work for about one ms after a call
PLANS = {
    "dense": ("unstructured", 0.0, None),
    "80 %": ("unstructured", 0.8, None),
    "90 %": ("unstructured", 0.9, None),
    "4x1, 80 %": ("4x1", 0.8, None),
    "int8, 4x1, 80 %": ("4x1", 0.8, "int8"),
    "int8, 1x4, 80 %": ("1x4", 0.8, "int8"),
}


def pruned(name: str, batch: int, way: str) -> tuple[Any, Any, tuple[int, ...]]:
    """Return a model, what it is called with, and the numbers of inputs of its Linear layers."""
    pattern, sparsity, _ = PLANS[way]
    model, x, layers, inputs = model_of(name, batch)
    if sparsity:
        rarefy.prune_(model, pattern, "magnitude", sparsity, layers=layers)
        rarefy.fold_(model)
    return model, x, inputs


def run(name: str, batch: int) -> dict[str, Any]:
    """Return medians in milliseconds of all ways, in turns."""
    dense, x, _ = pruned(name, batch, "dense")
    runs: dict[str, Callable[[], Any]] = {"eager, dense": lambda: call(dense, x), **engines(dense, x)}
    for way, (*_, values) in PLANS.items():
        model, _, _ = pruned(name, batch, way)
        fast = rarefy.compile(model, x, values=values)
        runs[f"ours, {way}"] = lambda fast=fast: call(fast, x)
    return in_turns(runs, 10 if batch > 1 else 40, PAUSE)


def vehicles(name: str, batch: int) -> dict[str, Any]:
    """The same pruned model by `accelerate_` in eager torch, by torch.compile of that, and by a native plan."""
    model, x, inputs = pruned(name, batch, "80 %")
    eager = copy.deepcopy(model)
    rarefy.accelerate_(eager, inputs, x, tuning_cache=False)
    inductor = torch.compile(copy.deepcopy(eager))
    plan = rarefy.compile(model, x)
    runs = {"eager": eager, "torch.compile": inductor, "plan": plan}
    return in_turns({k: lambda f=f: call(f, x) for k, f in runs.items()}, 10 if batch > 1 else 40, PAUSE)


def lines(only: str | None, way: Callable[[str, int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for name, batches in CASES.items():
        for batch in batches if only in (None, name) else ():
            torch.manual_seed(0)
            with torch.no_grad():
                yield {"run": way.__name__, "model": name, "batch": batch, **way(name, batch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--vehicles", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    keep_memory()
    if not args.table:
        keep(RESULTS, [lambda: lines(args.only, vehicles if args.vehicles else run)])
    tables.show("engine")


if __name__ == "__main__":
    main()
