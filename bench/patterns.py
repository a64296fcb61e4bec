"""Which zeros pay in 8 bits: MiniLM pruned in one shot, pattern by sparsity: R@1 and milliseconds of the same model.

    python patterns.py                      all patterns and instruction sets, about 20 minutes on two idle cores
    python patterns.py --only 1x4 2:4       some patterns
    python patterns.py --table              only print what was measured last

Weights are pruned with solver "admm" on 64 x 256 tokens of articles and compiled with precision "int8". Calls take
turns with the dense model in 8 bits. R@1 is that of the compiled model on the CPU's best instruction set. Appends one
JSON line per case to results/patterns.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import rarefy
import tables
from models import model_of
from peers import call
from rarefy.data import builtin, sources
from rarefy.model import hf
from rarefy.runtime import bindings
from recording import keep
from runtime import alternate, keep_memory
from values import retrieval

RESULTS = Path(__file__).parent / "results" / "patterns.jsonl"
PATTERNS = {p: (0.5, 0.6, 0.8) for p in ("unstructured", "1x4", "1x8", "2x4", "4x4", "4x1")} | {"2:4": (0.5,)}
BATCHES = {1: 40, 16: 12}  # texts of 128 tokens, repeats


def instruction_sets() -> list[str]:
    """Return those with vectors that this CPU has."""
    found, before = [], str(bindings.isa())
    for isa in ("amx", "avx512", "avx2"):
        try:
            bindings.use(isa)
            found.append(isa)
        except rarefy.RarefyError:
            continue
    bindings.use(before)
    return found


def quality(model: Any, tokenizer: Any, want: torch.Tensor | None) -> tuple[dict[str, float], torch.Tensor]:
    """Return R@1 and the mean cosine with the embeddings `want`, and the embeddings."""
    hit, got = retrieval(model, tokenizer)
    return {"R@1": hit, "cosine": 1.0 if want is None else float((got * want).sum(-1).mean())}, got


@torch.no_grad()
def measure(only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one record per pattern and sparsity, the dense model first."""
    folder, layers = builtin.model_folder("minilm"), "encoder.layer.*"
    tokenizer, best = hf.load_tokenizer(folder), str(bindings.isa())
    data: Any = sources.batches("wiki", sources.Take(samples=64, tokens=256, batch=8, seed=0), tokenizer=tokenizer)
    dense, examples = model_of("minilm", 16)[0], {b: model_of("minilm", b)[1] for b in BATCHES}
    isas = instruction_sets()
    compiled = {}
    for isa in isas:
        bindings.use(isa)
        compiled[isa] = rarefy.compile(dense, examples[16], precision="int8")
    bindings.use(best)
    in_fp32, want = quality(dense, tokenizer, None)
    yield {"pattern": "dense", "sparsity": 0.0, "fp32": in_fp32["R@1"], **quality(compiled[best], tokenizer, want)[0]}
    for pattern, sparsities in PATTERNS.items():
        for sparsity in sparsities if not only or pattern in only else ():
            model = copy.deepcopy(dense)
            with torch.enable_grad():
                how: dict[str, Any] = {} if ":" in pattern else {"sparsity": sparsity}
                rarefy.prune_(model, pattern, solver="admm", layers=layers, data=data, **how)
            rarefy.fold_(model)
            line: dict[str, Any] = {"pattern": pattern, "sparsity": sparsity, "milliseconds": {}}
            for isa in isas:
                bindings.use(isa)
                fast = rarefy.compile(model, examples[16], precision="int8")
                if isa == best:
                    line |= quality(fast, tokenizer, want)[0]
                for batch, repeats in BATCHES.items():
                    x = examples[batch]
                    runs = {"dense": lambda x=x, f=compiled[isa]: call(f, x), "pruned": lambda x=x, f=fast: call(f, x)}
                    line["milliseconds"][f"{isa}, {batch}"] = alternate(runs, repeats, 0.003)
            bindings.use(best)
            yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=PATTERNS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    keep_memory()
    if not args.table:
        keep(RESULTS, [lambda: measure(args.only)])
    tables.show("patterns")


if __name__ == "__main__":
    main()
