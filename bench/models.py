"""Models with `accelerate_` beside the dense ones in eager torch, timed alternately: milliseconds and speed-up.

    python models.py                  all cases, about 8 minutes on two idle cores
    python models.py --only minilm
    python models.py --engines        80 % zeros beside other engines with the dense model (peers.py)
    python models.py --table          only print what was measured last

Weights are pruned by magnitude for timing only; the residual networks have random weights. Appends one JSON line per
case to results/models.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rarefy
from peers import call, of_model, settings_of
from rarefy.data import builtin
from rarefy.evaluation.profiling import PAUSE
from rarefy.model import hf
from recording import append, start
from runtime import alternate, keep_memory

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "models.jsonl"
TOKENS = 128
OTHERS = ("onnxruntime fp32", "openvino fp32")
FP32 = [
    ("fp32", "unstructured", 0.5),
    ("fp32", "unstructured", 0.8),
    ("fp32", "unstructured", 0.9),
    ("fp32", "4x1", 0.8),
    ("fp32", "4x1", 0.9),
]
MORE = [("bf16", "unstructured", 0.5), ("bf16", "4x1", 0.8), ("int8", "1x4", 0.8), ("int8", "1x4", 0.9)]
CASES = {  # batch sizes (tokens per call of a language model), and number formats, patterns and sparsities
    "minilm": ((1, 16), FP32 + MORE),
    "smollm2-135m": ((1, TOKENS), FP32 + MORE),
    "resnet50": ((1, 16), FP32),
    "fashion": ((1, 16), FP32),
}


def model_of(name: str, batch: int) -> tuple[nn.Module, Any, str, tuple[int, ...]]:
    """Return a model, its example, the layers to prune, and the batch sizes of its Linear layers."""
    if name in ("resnet50", "vit_b_16", "convnext_tiny"):
        from torchvision import models

        layers = "re:layer.*conv.*|layer.*downsample.*" if name == "resnet50" else "*"
        model = getattr(models, name)().eval()
        if name == "vit_b_16":  # whose head is zero
            nn.init.normal_(model.heads.head.weight, std=0.02)
        return model, torch.randn(batch, 3, 224, 224), layers, (batch,)
    if name == "fashion":
        from vision_net import SmallResNet

        return SmallResNet().eval(), torch.randn(batch, 1, 28, 28), "blocks.*", (batch,)
    model = hf.load_folder(str(builtin.model_folder(name))).float().eval()
    size = (batch, TOKENS) if name == "minilm" else (1, batch)
    ids = torch.randint(1000, 20000, size)
    x: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "minilm":
        return model, x, "encoder.layer.*", (ids.numel(),)
    x |= {"logits_to_keep": 1, "use_cache": False}  # as `generate` calls it for a prompt
    return model, x, "model.layers.*", (batch,)


def case(name: str, batch: int, numbers: str, pattern: str, sparsity: float, others: bool) -> dict[str, Any]:
    """Return quartiles in milliseconds of the dense and the accelerated model, and the difference of their outputs."""
    model, x, layers, inputs = model_of(name, batch)
    rarefy.prune_(model, pattern, "magnitude", sparsity, layers=layers)
    rarefy.fold_(model)
    if numbers == "bf16":
        model = model.bfloat16()
    ours = copy.deepcopy(model)
    chosen = rarefy.accelerate_(ours, inputs, x, precision="int8" if numbers == "int8" else None, tuning_cache=False)
    with torch.no_grad():
        outputs = [call(m, x).float() for m in (model, ours)]
    more = of_model(model, x, [x], OTHERS) if others else {}
    runs = {"dense": lambda: call(model, x), "ours": lambda: call(ours, x)}
    runs |= {name.removesuffix(" fp32"): engine.timed["x"] for name, engine in more.items()}
    quartiles = alternate(runs, 10 if batch > 1 else 30, PAUSE if others else 0.0)
    if others:
        quartiles["settings"] = settings_of(more)
    apart = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    return {"apart": apart, "layers": chosen.summary["layers that run sparse"], **quartiles}


def table(lines: list[dict[str, Any]]) -> str:
    """Return one row per case: medians in milliseconds on the CPU of the last record, and the speed-up.

    int8 compares with dense fp32."""
    lines = [{"numbers": "fp32", **l} for l in lines if l["machine"]["cpu"] == lines[-1]["machine"]["cpu"]]
    names = ("model", "batch", "numbers", "pattern", "sparsity")
    others = ("compiled", *(name.removesuffix(" fp32") for name in OTHERS))
    head = [*names, "dense, ms", "ours, ms", "times as fast", *others]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in {(*(l[n] for n in names), "compiled" in l): l for l in lines}.values():
        dense, ours = line["dense"][1], line["ours"][1]
        cells = [str(line[n]) for n in names] + [f"{dense:.1f}", f"{ours:.1f}", f"{dense / ours:.2f}"]
        cells += [f"{line[n][1]:.1f}" if n in line else "" for n in others]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--engines", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    keep_memory()
    if not args.table:
        start(args.out)
    for name, (batches, plan) in {} if args.table else CASES.items():
        for batch in batches if args.only in (None, name) else ():
            for numbers, pattern, sparsity in plan[1:2] if args.engines else plan:
                torch.manual_seed(0)
                line = {"model": name, "batch": batch, "numbers": numbers, "pattern": pattern, "sparsity": sparsity}
                line |= case(name, batch, numbers, pattern, sparsity, args.engines)
                append(args.out, line)
                print(table([line]).splitlines()[-1], flush=True)
    if args.table and args.out.is_file():
        print(table([json.loads(l) for l in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
