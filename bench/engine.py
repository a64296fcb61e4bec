"""Whole compiled models beside other engines: milliseconds per call, timed alternately.

    python engine.py                  all cases, about 15 minutes on two idle cores
    python engine.py --only minilm
    python engine.py --backends       the same pruned model by accelerate_, by torch.compile of that, and by compile
    python engine.py --table          only print what was measured last

Rarefy runs the dense and the pruned model, also in bf16 and 8 bits; other engines run the dense one (peers.py).
Weights are pruned by magnitude for timing only, and those of image models are random. Images are crops of photographs,
texts are articles. 8 bits: images have scales from calibration on other crops, on all engines. Texts have those of each
call in Rarefy. Appends one JSON line per case to results/engine.jsonl, with the cosine of each output and that of
the same weights in eager torch, and what compile left to torch as a whole.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import frontier
import photos
import rarefy
import tables
from models import model_of
from peers import call, cosine, of_model, settings_of
from rarefy.data import builtin
from rarefy.evaluation.profiling import PAUSE
from rarefy.model import hf
from recording import keep
from runtime import alternate, keep_memory

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engine.jsonl"
CASES = {"minilm": (1, 16), "resnet50": (1, 16), "vit_b_16": (1, 8), "convnext_tiny": (1, 8)}
CALIBRATION = 64  # images, or texts
DENSE = {
    "dense": ("unstructured", 0.0, None),
    "bf16": ("unstructured", 0.0, "bf16"),
    "int8": ("unstructured", 0.0, "int8"),
}
VARIANTS = DENSE | {
    "80 %": ("unstructured", 0.8, None),
    "90 %": ("unstructured", 0.9, None),
    "4x1, 80 %": ("4x1", 0.8, None),
    "int8, 4x1, 80 %": ("4x1", 0.8, "int8"),
    "int8, 1x4, 60 %": ("1x4", 0.6, "int8"),
    "int8, 1x4, 80 %": ("1x4", 0.8, "int8"),
}
PRUNED = ("minilm", "resnet50")


def pruned(name: str, batch: int, variant: str) -> tuple[Any, Any, tuple[int, ...]]:
    """Return a model, its example, and the batch sizes of its Linear layers."""
    pattern, sparsity, _ = VARIANTS[variant]
    model, x, layers, inputs = model_of(name, batch)
    if sparsity:
        rarefy.prune_(model, pattern, "magnitude", sparsity, layers=layers)
        rarefy.fold_(model)
    return model, x, inputs


def compiled(model: Any, x: Any, precision: str | None, data: list[Any]) -> Any:
    """Return the compiled model, with static scales of images in 8 bits."""
    if precision != "int8" or isinstance(x, dict):
        return rarefy.compile(model, x, precision=precision)
    return rarefy.compile(model, x, precision=precision, calibrate=data)


def real_inputs(name: str, batch: int) -> tuple[Any, list[Any]]:
    """Return an input of a model, and batches for calibration: other photographs, or other texts."""
    if name != "minilm":
        return photos.crops(batch, judged=True), list(photos.crops(CALIBRATION, judged=False).split(1))
    tokenizer = hf.load_tokenizer(builtin.model_folder(name))
    return frontier.example(tokenizer, batch), frontier.calibration(tokenizer, CALIBRATION, 0)


def run(name: str, batch: int) -> dict[str, Any]:
    """Return quartiles in milliseconds of all engines, timed alternately, and the cosines of their outputs."""
    dense = pruned(name, batch, "dense")[0]
    x, data = real_inputs(name, batch)
    others = {n.removesuffix(" fp32"): engine for n, engine in of_model(dense, x, data).items()}
    want = call(dense, x)
    cosines = {key: cosine(engine.encode(x), want) for key, engine in others.items()}
    runs: dict[str, Callable[[], Any]] = {"eager, dense": lambda: call(dense, x)}
    runs |= {key: engine.timed["x"] for key, engine in others.items()}
    left: dict[str, list[str]] = {}
    for variant, (*_, precision) in (VARIANTS if name in PRUNED else DENSE).items():
        model, _, _ = pruned(name, batch, variant)
        fast = compiled(model, x, precision, data)
        key = f"ours, {variant}"
        cosines[key] = cosine(call(fast, x), call(model, x))
        if notes := [n for n in fast.exported.notes if "all in torch" in n]:
            left[key] = notes
        runs[key] = lambda fast=fast: call(fast, x)
    about = {"cosines": cosines, "left to torch": left, "settings": settings_of(others)}
    return {**about, **alternate(runs, 10 if batch > 1 else 40, PAUSE)}


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
