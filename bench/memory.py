"""Memory of running compiled models beside what they need: packed weights, constants, work space and outputs.

    python memory.py                  all cases, one minute
    python memory.py --only minilm
    python memory.py --table          only print what was measure last

MiniLM with 80 % zeros and SmolLM2 in 8 bits are saved and loaded; SmolLM2 also in the process that compiled it. Each
measurement runs in its own process with one thread. The memory of Python, torch and Rarefy before the model is
subtracted. For the model compiled in the process, a tiny one is compiled first, so that transformers and torch.export
are subtracted too. Appends one JSON line per case to results/memory.jsonl.
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
from rarefy.compiler.executor import Compiled
from rarefy.compiler.kernel_selection import EmbeddingKernel
from rarefy.compiler.subgraph import FusedSubgraph
from rarefy.data import builtin
from rarefy.evaluation.profiling import peak_rss
from rarefy.model import hf
from rarefy.runtime.packing import nbytes
from recording import keep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "memory.jsonl"
BATCH, TOKENS = 16, 128
PROMPT, NEW = 128, 64  # tokens


def resident() -> int:
    """Return the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def weights_of(made: Compiled) -> int:
    """Return the bytes of packed weights, biases and constants, each counted once."""
    counted: dict[int, int] = {}
    for kernel in (
        k for k in made.kernels.values() if not isinstance(k, EmbeddingKernel)
    ):  # it shares a linear layer's weight
        packed, bias = kernel.held
        counted[next(t for t in vars(packed).values() if isinstance(t, Tensor)).data_ptr()] = nbytes(packed)
        counted |= {} if bias is None else {bias.data_ptr(): bias.nbytes}
    used = {n.name for n in made.exported.graph.nodes if n.op == "placeholder" and n.users}
    counted |= {t.data_ptr(): t.nbytes for n, t in made.constants.items() if n in used}
    return sum(counted.values())


def plans_of(made: Compiled) -> int:
    """Return the bytes of the work space of all programs."""
    segments = [i for i in made.schedule if isinstance(i, FusedSubgraph)]
    return sum(p.memory.nbytes for s in segments for plans in s.programs.values() for p in plans)


def measure(made: Compiled, run: Callable[[], int], before: int) -> dict[str, Any]:
    """Return the record of a run with its peak. `run` returns the bytes of its inputs and outputs."""
    gc.collect()
    loaded = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    outputs = run()
    peak = peak_rss() - before
    need = weights_of(made) + plans_of(made) + outputs
    parts = {"weights": weights_of(made), "plans": plans_of(made), "outputs": outputs}
    return {"before": before, "loaded": loaded - before, "peak": peak, **parts, "times": peak / need}


def make(folder: str) -> None:
    """Compile SmolLM2, or MiniLM with 80 % zeros, into a folder named after it."""
    if Path(folder).name.startswith("smollm2"):
        model = hf.load_folder(builtin.model_folder("smollm2-135m")).float().eval()
        rarefy.save(rarefy.decoder(model, precision="int8"), folder)
        return
    model = hf.load_folder(builtin.model_folder("minilm"))
    rarefy.prune_(model, layers="encoder.layer.*", sparsity=0.8)
    model = rarefy.fold_(model).eval()
    rarefy.save(rarefy.compile(model, inputs(2)), folder)


def inputs(batch: int) -> dict[str, Tensor]:
    """Return random token ids and their mask."""
    ids = torch.randint(5, 30000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def minilm(folder: str) -> dict[str, Any]:
    """Measure compiled MiniLM loaded from a folder."""
    before = resident()
    made: Any = rarefy.load(folder)
    x = inputs(BATCH)

    def run() -> int:
        for _ in range(3):
            out = None
            out = made(**x)
        return sum(t.nbytes for t in [*x.values(), *out.values()])

    return measure(made, run, before)


def smollm2(folder: str) -> dict[str, Any]:
    """Measure a decoder loaded from a folder."""
    before = resident()
    return measure_decoder(rarefy.load(folder), before)


def smollm2_made(_: str) -> dict[str, Any]:
    """Measure a decoder in the process that compiled it, after the model is deleted and the heap is trimmed."""
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
    made = rarefy.decoder(model, precision="int8")
    del model
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return measure_decoder(made, before)


def measure_decoder(made: Any, before: int) -> dict[str, Any]:
    """Measure a decoder that reads a prompt and generates tokens."""

    def run() -> int:
        cache = made.cache(1, PROMPT + NEW)
        token = made(torch.arange(PROMPT)[None] + 100, cache, last=True).argmax(-1)
        for _ in range(NEW):
            token = made(token, cache).argmax(-1)
        return cache.nbytes

    return measure(made.compiled, run, before)


CASES = {"minilm": minilm, "smollm2-135m": smollm2, "smollm2-135m, made here": smollm2_made}


def lines(only: str | None) -> Iterator[dict[str, Any]]:
    """Yield one record per case."""
    for name in [only] if only else CASES:
        with tempfile.TemporaryDirectory() as folder:
            for part in [name] if name.endswith("made here") else ["make", name]:
                command = [sys.executable, __file__, "--part", part, str(Path(folder) / name)]
                process = subprocess.run(command, check=True, capture_output=True, text=True)
            yield {"model": name, **json.loads(process.stdout.splitlines()[-1])}


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
