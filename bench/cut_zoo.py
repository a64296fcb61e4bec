"""Cut torchvision's models with Rarefy and Torch-Pruning: which models can be halved, the time, the parameters left,
and whether the outputs equal those of the masked model.

    pip install torch-pruning==1.6.1
    python cut_zoo.py --table

Torch-Pruning is used as its own example for these models does: half of each layer's outputs by magnitude, classifiers
left alone, `hidden_dim` of vision transformers set by hand. Its masked model is built from the groups that it reports.
Appends one JSON line per model and tool to results/cut_zoo.jsonl; one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tables
from recording import append, start

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cut_zoo.jsonl"
sys.path.insert(0, str(HERE.parent / "tests"))
SIDES = ("rarefy", "torch-pruning")
LIMIT = 120  # seconds per model


def call(model: nn.Module, x: Any) -> list[Tensor]:
    """Return all floating point outputs of a model."""
    from rarefy.model.batches import tensors_in

    with torch.no_grad():
        return [t for t in tensors_in(model(**x) if isinstance(x, dict) else model(x)) if t.is_floating_point()]


def without_zeros(want: Tensor, got: Tensor) -> Tensor:
    """Return masked outputs without their zero channels, where the cut removed outputs too."""
    if want.dim() < 2 or want.shape == got.shape:
        return want
    return want[:, want.transpose(0, 1).flatten(1).any(1)]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest output."""
    want = [without_zeros(b, a) for a, b in zip(got, want)] if len(got) == len(want) else want
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in zip(got, want))


def ours(model: nn.Module, x: Any) -> dict[str, Any]:
    """Cut a model with Rarefy and compare it with the masked model."""
    import rarefy
    from rarefy.structured.masked_reference import MaskedReference

    masked = copy.deepcopy(model)
    began = time.perf_counter()
    rarefy.cut_(model, x, keep=0.5)
    seconds = time.perf_counter() - began
    rarefy.cut_(masked, x, keep=0.5, mask_only=True)
    with MaskedReference():
        want = call(masked, x)
    return {"seconds": seconds, "apart": apart(call(model, x), want)}


def theirs(model: Any, x: Any) -> dict[str, Any]:
    """Cut a model with Torch-Pruning and compare it with the masked model."""
    import torch_pruning as tp  # type: ignore
    from torchvision.models import VisionTransformer

    from rarefy.structured.masked_reference import MaskedReference

    masked = copy.deepcopy(model)
    for p in model.parameters():
        p.requires_grad_(True)
    heads: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    if hasattr(model, "head") and isinstance(model.head, nn.Module):
        heads.append(model.head)
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels in (1000, 21)]
    began = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[*heads, *last]
    )
    named = {id(m): n for n, m in model.named_modules()}
    masked_modules = dict(masked.named_modules())
    single = {id(p): n for n, p in model.named_parameters()}
    remaining: dict[str, list[int]] = {}  # indices left of each dimension: groups give positions among those

    def original(name: str, idxs: Any, size: int) -> list[int]:
        """Return the original indices of what a group removes."""
        left = remaining.setdefault(name, list(range(size)))
        gone = {left[i] for i in idxs}
        remaining[name] = [i for i in left if i not in gone]
        return sorted(gone)

    for group in pruner.step(interactive=True) or ():
        for dep, idxs in group:
            module = dep.target.module
            if isinstance(module, nn.Parameter) and id(module) in single:
                token = masked.get_parameter(single[id(module)])
                dim = max(
                    d for d, n in enumerate(token.shape) if n > 1
                )  # class tokens and layer scales have one dimension of interest
                token.data.index_fill_(dim, torch.tensor(original(single[id(module)], idxs, token.shape[dim])), 0)
            elif "out_channels" in getattr(dep.handler, "__name__", str(dep.handler)) and id(module) in named:
                name = named[id(module)]
                _zero(masked_modules[name], original(name, idxs, _outputs(masked_modules[name])))
        group.prune()
    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels  # type: ignore[assignment]
    seconds = time.perf_counter() - began
    got = call(model, x)
    with MaskedReference():
        want = call(masked, x)
    return {"seconds": seconds, "apart": apart(got, want)}


def _outputs(module: nn.Module) -> int:
    return module.embed_dim if isinstance(module, nn.MultiheadAttention) else len(module.weight)  # type: ignore[arg-type]


def _zero(module: nn.Module, rows: Any) -> None:
    """Set outputs of a module to zero."""
    index = torch.tensor(list(rows))
    with torch.no_grad():
        if isinstance(module, nn.MultiheadAttention):
            for part in range(3):
                module.in_proj_weight[index + part * module.embed_dim] = 0
                module.in_proj_bias[index + part * module.embed_dim] = 0
            module = module.out_proj
        for p in module._parameters.values():
            if p is not None:
                p[index] = 0


def one(name: str, side: str) -> dict[str, Any]:
    """Cut one model in this process and return its record."""
    from zoo import torchvision_cases  # type: ignore

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    make, x = torchvision_cases()[name]
    model = make()
    before = sum(p.numel() for p in model.parameters())
    try:
        found = (ours if side == "rarefy" else theirs)(model, x)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
    return {**found, "parameters": before, "left": sum(p.numel() for p in model.parameters())}


def bench(names: list[str]) -> None:
    """Cut each model with each tool, in a process per run, and append the records."""
    start(RESULTS)
    for name in names:
        for side in SIDES:
            command = [sys.executable, __file__, "--one", name, side]
            try:
                process = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
                lines = process.stdout.strip().splitlines()
                found = json.loads(lines[-1]) if process.returncode == 0 and lines else {"error": process.stderr[-200:]}
            except subprocess.TimeoutExpired:
                found = {"error": f"took longer than {LIMIT} s"}
            append(RESULTS, {"model": name, "side": side, **found})
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
            print(name, side, rounded, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="only print what was measured last")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    if not args.table:
        from zoo import torchvision_cases  # type: ignore

        bench(args.models or list(torchvision_cases()))
    tables.show("structured-coverage")


if __name__ == "__main__":
    main()
