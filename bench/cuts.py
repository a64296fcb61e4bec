"""Structured pruning: what repair recovers, a language model with fewer neurons, a ResNet-50 with half of its FLOPs.

    python cuts.py fashion [--seeds 0 1 2]   a small ResNet at a quarter of its FLOPs: score x repair, then trained
    python cuts.py language                  SmolLM2-135M with three quarters of its MLP neurons: score x repair
    python cuts.py resnet50                  ResNet-50 at half its FLOPs: milliseconds, equality in ONNX Runtime
    python cuts.py --table                   only print what was measured last

Appends one JSON line per run to results/cuts.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rarefy
import tables
from rarefy.evaluation.profiling import compare, flops
from recording import keep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cuts.jsonl"
FASHION = [  # score, scope, repair
    ("magnitude", "layer", False),
    ("magnitude", "layer", True),
    ("taylor", "layer", False),
    ("taylor", "layer", True),
    ("obs", "layer", False),
    ("obs", "layer", True),
    ("taylor", "global", False),
    ("taylor", "global", True),
]
LANGUAGE = [
    ("magnitude", False),
    ("magnitude", True),
    ("taylor", False),
    ("taylor", True),
    ("fluctuation", False),
    ("fluctuation", ["bias"]),
    ("fluctuation", True),
    ("obs", False),
    ("obs", True),
]
Line = dict[str, Any]


def fashion(seeds: list[int]) -> Iterator[Line]:
    """Cut a trained network to a quarter of its FLOPs, then train it as long as the dense one."""
    from vision import DENSE_EPOCHS, MORE_EPOCHS, MORE_LR, data_of, train_dense
    from vision_net import SmallResNet, accuracy, load

    images = load()
    for seed in seeds:
        torch.manual_seed(seed)
        dense = SmallResNet()
        train_dense(dense, images, seed, DENSE_EPOCHS, 0.2)
        dense = contiguous(dense)
        calibrate = data_of(images, seed)["calibrate"]
        longer = copy.deepcopy(dense)
        train_dense(longer, images, seed, MORE_EPOCHS, MORE_LR)
        yield {
            "run": "fashion", "score": "dense", "seed": seed, "before": accuracy(dense, *images[2:]),
            "trained": accuracy(contiguous(longer), *images[2:]),
        }  # fmt: skip
        for score, scope, repair in FASHION:
            model = copy.deepcopy(dense)
            began = time.perf_counter()
            report = rarefy.cut_(model, calibrate[0][0][:2], flops=0.25, score=score, scope=scope, data=calibrate,
                               repair=repair) if repair or score != "magnitude" else rarefy.cut_(
                                   model, calibrate[0][0][:2], flops=0.25, score=score, scope=scope)  # fmt: skip
            seconds = time.perf_counter() - began
            after = accuracy(model, *images[2:])
            train_dense(model, images, seed, MORE_EPOCHS, MORE_LR)
            yield {
                "run": "fashion", "score": score, "scope": scope, "repair": repair, "seed": seed,
                "cut": dict(report.summary), "seconds": seconds, "before": after,
                "trained": accuracy(contiguous(model), *images[2:]),
            }  # fmt: skip


def contiguous(model: nn.Module) -> Any:
    """Return a model for evaluation, without channels_last."""
    return model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def language(seeds: list[int]) -> Iterator[Line]:
    """Remove a quarter of the neurons of every MLP."""
    from oneshot import quality
    from rarefy.data import builtin, sources
    from rarefy.model import hf

    source = builtin.model_folder("smollm2-135m")
    tokenizer = hf.load_tokenizer(source)
    yield {"run": "language", "score": "dense", **quality(hf.load_folder(source).float(), None, tokenizer)}
    for seed in seeds:
        take = sources.Take(samples=64, tokens=512, batch=8, seed=seed)
        batches: Any = sources.batches("wiki", take, tokenizer=tokenizer)
        data = [b | {"labels": b["input_ids"]} for b in batches]
        example = {"input_ids": data[0]["input_ids"][:1, :64]}
        for score, repair in LANGUAGE:
            model = hf.load_folder(source).float()
            options = {"data": data, "repair": repair} if repair or score != "magnitude" else {}
            began = time.perf_counter()
            report = rarefy.cut_(model, example, "neuron", 0.75, layers="*.mlp.gate_proj", score=score, **options)
            seconds = time.perf_counter() - began
            yield {
                "run": "language", "score": score, "repair": repair, "seed": seed, "cut": dict(report.summary),
                "seconds": seconds, "config": model.rarefy_cut["config"], **quality(model, None, tokenizer),  # type: ignore
            }  # fmt: skip


def resnet50(seeds: list[int]) -> Iterator[Line]:
    """Cut ResNet-50 to half its FLOPs, time it alternately with the dense one, and compare with ONNX Runtime."""
    import onnxruntime  # type: ignore
    from torchvision.models import resnet50 as make

    torch.manual_seed(0)
    dense = make(weights=None).eval()
    for round_to in (1, 8, 16, 32):
        cut = copy.deepcopy(dense)
        x = torch.randn(1, 3, 224, 224)
        report = rarefy.cut_(cut, x, flops=0.5, round_to=round_to)
        for batch in (1, 16):
            x = torch.randn(batch, 3, 224, 224)
            runs = {"dense": lambda x=x: dense(x), "cut": lambda x=x, m=cut: m(x)}
            times = compare(runs, repeats=40 if batch == 1 else 12)
            millis = {k: {n: 1000 * v for n, v in t.to_dict().items() if n != "repeats"} for k, t in times.items()}
            share = flops(cut, lambda x=x, m=cut: m(x)) / flops(dense, lambda x=x: dense(x))
            line = {"run": "resnet50", "round_to": round_to, "batch": batch, "told": dict(report.summary)}
            yield {**line, "flops": share, **millis}
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/cut.onnx"
            one = torch.randn(1, 3, 224, 224)
            torch.onnx.export(cut, (one,), path, dynamo=True, external_data=False, verbose=False)
            session = onnxruntime.InferenceSession(path)
            got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: one.numpy()})[0])
            want = cut(one).detach()
            apart = float((got - want).abs().max() / want.abs().max())
        yield {"run": "resnet50 onnx", "round_to": round_to, "apart": apart}


RUNS = {"fashion": fashion, "language": language, "resnet50": resnet50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", choices=[*RUNS, []], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="only print what was measured last")
    args = parser.parse_args()
    keep(RESULTS, [partial(RUNS[name], args.seeds) for name in args.runs or ([] if args.table else RUNS)])
    tables.show("structured-fashion", "structured-language", "structured-resnet50")


if __name__ == "__main__":
    main()
