"""Memory of compiled models while they run, against what they need: packed weights, constants, and activations.

    python memory.py                  all cases, a minute
    python memory.py --only minilm
    python memory.py --table          only print what was measured last

MiniLM with 80 % zeros and SmolLM2 in 8 bits, saved and loaded again; SmolLM2 also in the process that made it. Every
measurement has a process of its own, one thread. What Python, torch and Rarefy take before there is a model is taken
off; where a model is made in place, so are transformers and torch.export, by making a tiny one first.
Appends a JSON line a case to results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rarefy
import tables
from rarefy.compiler.executor import Compiled, FusedSubgraph, Lookup
from rarefy.data import builtin
from rarefy.evaluation.profiling import peak_rss
from rarefy.model import hf
from rarefy.runtime.packing import nbytes
from values import keep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "memory.jsonl"
BATCH, TOKENS = 16, 128
PROMPT, WRITTEN = 128, 64  # tokens


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def weights_of(made: Compiled) -> int:
    """Bytes of packed weights, biases and constants, each once."""
    held: dict[int, int] = {}
    for kernel in (k for k in made.kernels.values() if not isinstance(k, Lookup)):  # which shares a product's
        packed, bias = kernel.held
        held[next(t for t in vars(packed).values() if isinstance(t, Tensor)).data_ptr()] = nbytes(packed)
        held |= {} if bias is None else {bias.data_ptr(): bias.nbytes}
    used = {n.name for n in made.exported.graph.nodes if n.op == "placeholder" and n.users}
    held |= {t.data_ptr(): t.nbytes for n, t in made.constants.items() if n in used}
    return sum(held.values())


def plans_of(made: Compiled) -> int:
    """Bytes of the plans that are there."""
    segments = [i for i in made.schedule if isinstance(i, FusedSubgraph)]
    return sum(p.memory.nbytes for s in segments for plans in s.programs.values() for p in plans)


def measured(made: Compiled, run: Callable[[], int], before: int) -> dict[str, Any]:
    """Run, and tell the peak; `run` returns the bytes of what it is given and gives back."""
    gc.collect()
    loaded = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    outputs = run()
    peak = peak_rss() - before
    need = weights_of(made) + plans_of(made) + outputs
    parts = {"weights": weights_of(made), "plans": plans_of(made), "outputs": outputs}
    return {"before": before, "loaded": loaded - before, "peak": peak, **parts, "times": peak / need}


def make(folder: str) -> None:
    """Compile SmolLM2, or MiniLM with 80 % zeros, into a folder of such a name."""
    if Path(folder).name.startswith("smollm2"):
        model = hf.load_folder(builtin.model_folder("smollm2-135m")).float().eval()
        rarefy.save(rarefy.decoder(model, values="int8"), folder)
        return
    model = hf.load_folder(builtin.model_folder("minilm"))
    rarefy.prune_(model, layers="encoder.layer.*", sparsity=0.8)
    model = rarefy.fold_(model).eval()
    rarefy.save(rarefy.compile(model, inputs(2)), folder)


def inputs(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 30000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def minilm(folder: str) -> dict[str, Any]:
    before = resident()
    made: Any = rarefy.load(folder)
    x = inputs(BATCH)

    def run() -> int:
        for _ in range(3):
            out = None
            out = made(**x)
        return sum(t.nbytes for t in [*x.values(), *out.values()])

    return measured(made, run, before)


def smollm2(folder: str) -> dict[str, Any]:
    before = resident()
    return written(rarefy.load(folder), before)


def smollm2_made(_: str) -> dict[str, Any]:
    """A decoder in the process that made it: the model goes first, what it leaves to the allocator is given back."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
    }
    rarefy.decoder(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).eval())
    gc.collect()
    before = resident()
    model = hf.load_folder(builtin.model_folder("smollm2-135m")).float().eval()
    made = rarefy.decoder(model, values="int8")
    del model
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return written(made, before)


def written(made: Any, before: int) -> dict[str, Any]:
    """Read a prompt and write behind it."""

    def run() -> int:
        cache = made.cache(1, PROMPT + WRITTEN)
        token = made(torch.arange(PROMPT)[None] + 100, cache, last=True).argmax(-1)
        for _ in range(WRITTEN):
            token = made(token, cache).argmax(-1)
        return cache.memory.nbytes

    return measured(made.compiled, run, before)


CASES = {"minilm": minilm, "smollm2-135m": smollm2, "smollm2-135m, made here": smollm2_made}


def lines(only: str | None) -> Iterator[dict[str, Any]]:
    for name in [only] if only else CASES:
        with tempfile.TemporaryDirectory() as folder:
            for part in [name] if name.endswith("made here") else ["make", name]:
                words = [sys.executable, __file__, "--part", part, str(Path(folder) / name)]
                ran = subprocess.run(words, check=True, capture_output=True, text=True)
            yield {"model": name, **json.loads(ran.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    hf.no_bars()
    if args.part:
        torch.set_num_threads(1)
        part, folder = args.part
        print(json.dumps(make(folder) if part == "make" else CASES[part](folder)))
        return
    if not args.table:
        keep(RESULTS, [lambda: lines(args.only)])
    tables.show("memory")


if __name__ == "__main__":
    main()
