"""Channel permutation: the share of the magnitudes that a 2:4 mask keeps, before and after, and the change of outputs.

    python permute.py          ResNet-50, MobileNetV2, ViT-B/16, Swin-T (random weights), BERT and Llama (tiny), MiniLM
    python permute.py --table  only print what was measured last

Appends one JSON line per model to results/permute.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
import tables
from rarefy.compat.asp import prune_trained_model
from rarefy.data import builtin
from rarefy.model import hf
from rarefy.model.layers import all_layers
from recording import keep

RESULTS = Path(__file__).parent / "results" / "permute.jsonl"


def pictures(name: str, size: int) -> Callable[[], tuple[nn.Module, Any]]:
    """Return a builder of a torchvision network with BatchNorm statistics of one batch."""

    def make() -> tuple[nn.Module, Any]:
        from torchvision import models

        model = getattr(models, name)(weights=None).train()
        with torch.no_grad():
            model(torch.randn(8, 3, size, size))
            for p in model.parameters():  # a zero head would hide differences
                if not p.any():
                    nn.init.normal_(p, std=0.02)
        return model.eval(), torch.randn(2, 3, size, size)

    return make


def tiny(kind: str) -> tuple[nn.Module, Any]:
    """Return a small transformer with random weights."""
    import transformers as t

    sizes: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"input_ids": torch.randint(0, 1000, (2, 32))}
    if kind == "bert":
        return t.BertModel(t.BertConfig(**sizes, intermediate_size=512)).eval(), ids
    return t.LlamaForCausalLM(t.LlamaConfig(**sizes, intermediate_size=384, use_cache=False)).eval(), ids


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet-50": pictures("resnet50", 224),
    "MobileNetV2": pictures("mobilenet_v2", 224),
    "ViT-B/16": pictures("vit_b_16", 224),
    "Swin-T": pictures("swin_t", 224),
    "BERT, tiny": lambda: tiny("bert"),
    "Llama, tiny": lambda: tiny("llama"),
    "MiniLM": lambda: (
        hf.load_folder(builtin.model_folder("minilm")).eval(),
        {"input_ids": torch.randint(1000, 20000, (2, 32))},
    ),
}


@torch.no_grad()
def outputs(model: nn.Module, example: Any) -> Tensor:
    """Return the first tensor that a model returns."""
    out = model(**example) if isinstance(example, dict) else model(example)
    return out if isinstance(out, Tensor) else out[0]


def permuted(only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one record per model: groups, kept magnitude, change of outputs, seconds, layers exactly 2:4."""
    for name, make in MODELS.items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        model, example = make()
        before, began = outputs(model, example), time.perf_counter()
        report = rarefy.permute_(model, example, seconds=40)
        seconds = time.perf_counter() - began
        apart = float((outputs(model, example) - before).abs().max() / before.abs().max())
        masked = prune_trained_model(model, torch.optim.AdamW(model.parameters()))
        done = {r["layer"] for r in masked.rows}
        layers = [l for l in all_layers(model) if l.full_name in done]
        views = [l.layout.view(l.weight.detach()) != 0 for l in layers]
        exact = [bool((v.reshape(-1, 4).sum(1) == 2).all()) for v in views]
        yield {
            "run": "permute", "model": name, **report.summary, "outputs moved": apart, "seconds": seconds,
            "layers": len(layers), "layers exactly 2:4": sum(exact),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="models")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    keep(RESULTS, [] if args.table else [lambda: permuted(args.only)])
    tables.show("permute")


if __name__ == "__main__":
    main()
