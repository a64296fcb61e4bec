"""Whole models with `accelerate_` against themselves dense, eager, in turns: milliseconds and how many times faster.

    python models.py                  all cases, about three minutes on two quiet cores
    python models.py --only minilm
    python models.py --table          only print what was measured last

Weights are pruned by magnitude: what counts here is time (ResNet-50 has random weights). Writes a JSON line a case to
results/models.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rarefy
from rarefy import samples
from rarefy.model import hf
from rarefy.proof.measure import commit, compare, machine

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "models.jsonl"
TOKENS = 128
PATTERNS = [("unstructured", 0.5), ("unstructured", 0.8), ("unstructured", 0.9), ("4x1", 0.8), ("4x1", 0.9)]
CASES = {"minilm": (1, 16), "resnet50": (1, 16), "smollm2-135m": (1, TOKENS)}  # batches; tokens in a call


def model_of(name: str, batch: int) -> tuple[nn.Module, Any, str, tuple[int, ...]]:
    """Return a model, what it is called with, which layers to prune, and the numbers of inputs of its Linear layers."""
    if name == "resnet50":
        from torchvision.models import resnet50

        return resnet50().eval(), torch.randn(batch, 3, 224, 224), "re:layer.*conv.*|layer.*downsample.*", (batch,)
    model = hf.load_folder(str(samples.model_folder(name))).float().eval()
    size = (batch, TOKENS) if name == "minilm" else (1, batch)
    ids = torch.randint(1000, 20000, size)
    layers = "encoder.layer.*" if name == "minilm" else "model.layers.*"
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, layers, (ids.numel(),)


def case(name: str, batch: int, pattern: str, sparsity: float) -> dict[str, Any]:
    """Return quartiles of the dense and the accelerated model in milliseconds, and how far their outputs are apart."""
    model, x, layers, inputs = model_of(name, batch)
    rarefy.prune_(model, pattern, "magnitude", sparsity, layers=layers)
    rarefy.fold_(model)
    ours = copy.deepcopy(model)
    chosen = rarefy.accelerate_(ours, inputs, x, choices=False)
    call: Callable[[Any], Any] = lambda m: m(**x) if isinstance(x, dict) else m(x)  # noqa: E731
    with torch.no_grad():
        outputs = [o if isinstance(o, torch.Tensor) else o[0] for o in map(call, (model, ours))]
    times = compare({"dense": lambda: call(model), "ours": lambda: call(ours)}, repeats=10 if batch > 1 else 30)
    apart = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    quartiles = {k: [1000 * s for s in (t.low, t.median, t.high)] for k, t in times.items()}
    return {"apart": apart, "layers": chosen.summary["layers that run sparse"], **quartiles}


def table(lines: list[dict[str, Any]]) -> str:
    """Return medians in milliseconds and their ratio; of what was run twice the last counts."""
    names = ("model", "batch", "pattern", "sparsity")
    rows = [f"| {' | '.join([*names, 'dense, ms', 'ours, ms', 'times as fast'])} |", "|---" * 7 + "|"]
    for line in {tuple(l[n] for n in names): l for l in lines}.values():
        dense, ours = line["dense"][1], line["ours"][1]
        cells = [str(line[n]) for n in names] + [f"{dense:.1f}", f"{ours:.1f}", f"{dense / ours:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    for name, batches in {} if args.table else CASES.items():
        for batch in batches if args.only in (None, name) else ():
            for pattern, sparsity in PATTERNS:
                torch.manual_seed(0)
                line = {"model": name, "batch": batch, "pattern": pattern, "sparsity": sparsity}
                line |= {**case(name, batch, pattern, sparsity), "commit": commit(HERE), "machine": machine()}
                with args.out.open("a") as file:
                    print(json.dumps(line), file=file)
                print(table([line]).splitlines()[-1], flush=True)
    if args.table and args.out.is_file():
        print(table([json.loads(l) for l in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
