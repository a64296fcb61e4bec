"""Whole compiled models beside other engines: milliseconds per call, timed alternately.

    python engine.py                  all cases, about 15 minutes on two idle cores
    python engine.py --only minilm
    python engine.py --backends       the same pruned model by accelerate_, by torch.compile of that, and by compile
    python engine.py --table          only print what was measured last

Rarefy runs the pruned model, also in 8 bits; other engines run the dense one, also in bf16 and 8 bits (rivals.py).
Weights are pruned by magnitude for timing only. Appends one JSON line per case to results/engine.jsonl.
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
from runtime import alternate, keep_memory
from values import keep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engine.jsonl"
CASES = {"minilm": (1, 16), "resnet50": (1, 16)}
PAUSE = 0.005  # seconds between calls: threads of most engines spin for about one ms after a call
VARIANTS = {
    "dense": ("unstructured", 0.0, None),
    "80 %": ("unstructured", 0.8, None),
    "90 %": ("unstructured", 0.9, None),
    "4x1, 80 %": ("4x1", 0.8, None),
    "int8, 4x1, 80 %": ("4x1", 0.8, "int8"),
    "int8, 1x4, 80 %": ("1x4", 0.8, "int8"),
}


def pruned(name: str, batch: int, variant: str) -> tuple[Any, Any, tuple[int, ...]]:
    """Return a model, its example, and the batch sizes of its Linear layers."""
    pattern, sparsity, _ = VARIANTS[variant]
    model, x, layers, inputs = model_of(name, batch)
    if sparsity:
        rarefy.prune_(model, pattern, "magnitude", sparsity, layers=layers)
        rarefy.fold_(model)
    return model, x, inputs


def run(name: str, batch: int) -> dict[str, Any]:
    """Return quartiles in milliseconds of all engines, timed alternately."""
    dense, x, _ = pruned(name, batch, "dense")
    runs: dict[str, Callable[[], Any]] = {"eager, dense": lambda: call(dense, x), **engines(dense, x)}
    for variant, (*_, precision) in VARIANTS.items():
        model, _, _ = pruned(name, batch, variant)
        fast = rarefy.compile(model, x, precision=precision)
        runs[f"ours, {variant}"] = lambda fast=fast: call(fast, x)
    return alternate(runs, 10 if batch > 1 else 40, PAUSE)


def backends(name: str, batch: int) -> dict[str, Any]:
    """Return quartiles of one pruned model by `accelerate_`, by torch.compile of that, and by `compile`."""
    model, x, inputs = pruned(name, batch, "80 %")
    eager = copy.deepcopy(model)
    rarefy.accelerate_(eager, inputs, x, tuning_cache=False)
    inductor = torch.compile(copy.deepcopy(eager))
    plan = rarefy.compile(model, x)
    runs = {"eager": eager, "torch.compile": inductor, "plan": plan}
    return alternate({k: lambda f=f: call(f, x) for k, f in runs.items()}, 10 if batch > 1 else 40, PAUSE)


def lines(only: str | None, variant: Callable[[str, int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one record per model and batch size."""
    for name, batches in CASES.items():
        for batch in batches if only in (None, name) else ():
            torch.manual_seed(0)
            with torch.no_grad():
                yield {"run": variant.__name__, "model": name, "batch": batch, **variant(name, batch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--backends", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    keep_memory()
    if not args.table:
        keep(RESULTS, [lambda: lines(args.only, backends if args.backends else run)])
    tables.show("engine")


if __name__ == "__main__":
    main()
