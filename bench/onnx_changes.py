"""ONNX files of many architectures with zeros, in 8 bits, and cut to half and trained: is each faster, and still right?

    python bench/onnx_changes.py                     twenty minutes on two idle cores
    python bench/onnx_changes.py --only resnet18
    python bench/onnx_changes.py --table             only print what was measured last

Files are those of onnx_models.py, of one input. Zeros are the 80 % smallest weights. 8 bits are calibrated on four
random inputs in both engines; ONNX Runtime also tries ranges of each call (peers.py). A cut removes half of all
channels and neurons; a step of SGD follows, the model is exported, and its file is compared with it in ONNX Runtime.
Engines take turns. Weights are random, so distances from the fp32 outputs say how exact an engine is, not how well a
model works. Appends one JSON line for each architecture to results/onnx_changes.jsonl.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
import tables
from onnx_models import CASES, Case, onnx_runtime, reason, write_readable
from peers import errors_alone, in_8_bits, onnxruntime, settings_of
from rarefy.common.errors import RarefyError
from rarefy.evaluation.profiling import PAUSE
from rarefy.model.compare import relative_distance
from recording import keep
from runtime import alternate, keep_memory

RESULTS = Path(__file__).parent / "results" / "onnx_changes.jsonl"
SPARSITY, KEPT, CALIBRATION, REPEATS = 0.8, 0.5, 4, 20

Run = Callable[[tuple[Tensor, ...]], Any]


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def like(x: Tensor, seed: int) -> Tensor:
    """Return a random input of the same kind: pixels, or the tokens of an input in another order."""
    generator = torch.Generator().manual_seed(seed)
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator) * x.std() + x.mean()
    return x[:, torch.randperm(x.shape[1], generator=generator)]


def cut_and_export(module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], folder: Path) -> float:
    """Cut a model to half, train it a step, export it; return how far the file is from it in ONNX Runtime."""
    rarefy.cut_(module, dict(zip(names, inputs)), keep=KEPT)
    module.train()
    first(module(*inputs)).square().mean().backward()
    torch.optim.SGD(module.parameters(), 1e-4).step()
    report = rarefy.export_onnx(module.eval(), inputs, folder / "cut.onnx")
    with torch.no_grad():
        exact = first(module(*inputs))
    run = onnx_runtime(Path(report.path))
    return relative_distance(run(inputs)[0], exact, norm=math.inf)


def compiled_runs(
    load: Callable[[], Any], inputs: tuple[Tensor, ...], batches: list[Any], failed: dict[str, str]
) -> dict[str, Run]:
    """Return the ways in which the engine runs a file; `failed` receives why one does not."""
    sparse = load()
    rarefy.prune_(sparse, "unstructured", "magnitude", SPARSITY)
    rarefy.fold_(sparse)
    ways: dict[str, Callable[[], Any]] = {
        "compiled": lambda: rarefy.compile(load(), inputs),
        "80 % zeros": lambda: rarefy.compile(sparse, inputs),
        "8 bits": lambda: rarefy.compile(load(), inputs, precision="int8", calibrate=batches),
    }
    runs: dict[str, Run] = {}
    for name, make in ways.items():
        try:
            fast = make()
            runs[name] = lambda xs, fast=fast: fast(*xs)
        except RarefyError as error:
            failed[name] = reason(error)
    return runs


def measure(name: str, make: Callable[[bool], Case]) -> Iterator[dict[str, Any]]:
    """Yield the record of one architecture."""
    torch.manual_seed(0)
    model, inputs, names = make(True)
    failed: dict[str, str] = {}
    with TemporaryDirectory() as place, warnings.catch_warnings(), errors_alone():
        warnings.simplefilter("ignore")
        file = Path(place) / "net.onnx"
        write_readable(name, model, inputs, names, file)
        single = tuple(x[:1].contiguous() for x in inputs)
        load = partial(rarefy.from_onnx, file, example=inputs)
        batches = [tuple(like(x, seed) for x in single) for seed in range(CALIBRATION)]
        runs = compiled_runs(load, single, batches, failed)
        examples = {1: dict(zip(names, single))}
        others = {"onnxruntime": onnxruntime({"": lambda: file}, examples)}
        try:
            feeds = [{n: x.numpy() for n, x in zip(names, b)} for b in batches]
            others["onnxruntime, 8 bits"] = onnxruntime(
                in_8_bits(file, feeds), examples, want=others["onnxruntime"].encode(examples[1])
            )
        except RuntimeError as error:
            failed["onnxruntime, 8 bits"] = reason(error)
        runs |= {n: lambda _, call=other.timed[1]: torch.from_numpy(call()) for n, other in others.items()}
        cut: float | str = "not tried"
        try:
            cut = cut_and_export(load(), inputs, names, Path(place))
        except RarefyError as error:
            cut = reason(error)
        with torch.no_grad():
            exact = first(load()(*single))
            distances = {
                n: relative_distance(first(run(single)), exact) for n, run in runs.items() if n != "80 % zeros"
            }
            times = alternate({n: partial(run, single) for n, run in runs.items()}, REPEATS, PAUSE)
    record = {"run": "changed", "model": name, "milliseconds": times, "apart": distances, "failed": failed}
    yield {**record, "cut": cut, "settings": settings_of(others)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), metavar="ARCHITECTURE")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    keep_memory()
    keep(RESULTS, [] if args.table else [partial(measure, name, CASES[name]) for name in args.only])
    tables.show("onnx-changes")


if __name__ == "__main__":
    main()
