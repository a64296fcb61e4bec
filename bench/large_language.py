"""Random models of 1.1 and 3 billion weights in Rarefy and in llama.cpp: the same GGUF files, decoded alternately.

    python large_language.py              both models in 8 and 4 bits; 15 minutes, 20 GB of disk
    python large_language.py --only 1.1B
    python large_language.py --table      only print what was measured last

How fast memory can be read is measured between the engines' turns. Appends one JSON line per file to
results/large_language.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import language
import rarefy
import tables
from rarefy.compiler.kernel_selection import EmbeddingKernel
from rarefy.evaluation.profiling import quartiles
from rarefy.model import hf
from rarefy.runtime import bindings
from rarefy.runtime.ceilings import READ
from rarefy.runtime.huge_pages import allocate
from recording import keep

HERE = Path(__file__).parent
RESULTS, FILES = HERE / "results" / "large_language.jsonl", HERE / "build" / "large"
SHAPES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8},
}  # fmt: skip
KINDS = ("Q8_0", "Q4_0")
PROMPT, NEW, ROUNDS = 16, 24, 5
READ_SECONDS, READ_BYTES = 0.2, 1 << 30  # of a measurement of how fast memory is read


def gguf_file(name: str, kind: str) -> Path:
    """Return a random Llama as a GGUF file, written once."""
    file = FILES / f"{name}.{kind}.gguf"
    if not file.exists():
        from transformers import AutoConfig, AutoModelForCausalLM

        FILES.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", vocab_size=32000, tie_word_embeddings=False, **SHAPES[name])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        rarefy.export(model, file, to="gguf", type=kind.lower())
    return file


class Reader:
    """Reads memory: a stand-in for an engine that does nothing else."""

    def __init__(self) -> None:
        self.memory = allocate(READ_BYTES).fill_(1)

    def rate(self) -> float:
        """Return the bytes that all threads read in a second."""
        measure = bindings.library().rarefy_measure_ceiling
        return measure(READ, READ_SECONDS, self.memory.data_ptr(), READ_BYTES)


def reader() -> tuple[Reader, dict[str, Any]]:
    """Return what reads memory, and an empty record."""
    return Reader(), {}


def ours(name: str, kind: str) -> tuple[Any, dict[str, Any]]:
    """Return a decoder of a file, and the bytes that it reads for a token: all but the embedding."""
    made = rarefy.decoder_from_files(gguf_file(name, kind))
    ends = [k for k in made.compiled.kernels.values() if isinstance(k, EmbeddingKernel)]
    embedding = sum(t.nbytes for k in ends for t in k.tensors())
    return language.Ours(made), {"engine": "rarefy", "read": made.compiled.weight_bytes() - embedding}


def llama_cpp(name: str, kind: str) -> tuple[Any, dict[str, Any]]:
    """Return a file in llama.cpp, and the bytes that it reads for a token."""
    file = gguf_file(name, kind)
    model = language.LlamaCpp(file, torch.get_num_threads())
    hidden = SHAPES[name]["hidden_size"]
    embedding = 32000 * hidden // 32 * 34  # in 8 bits in both kinds of files
    return model, {"engine": "llama.cpp", "read": file.stat().st_size - embedding}


def measured(name: str, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the records of both engines on one file."""
    gguf_file(name, kind)
    memory = language.Isolated(reader)
    models = {e: language.Isolated(make, name, kind) for e, make in (("rarefy", ours), ("llama.cpp", llama_cpp))}
    prompt = list(range(100, 100 + PROMPT))
    rates: dict[str, list[float]] = {e: [] for e in models}
    reads: list[float] = []
    for round_ in range(ROUNDS + 1):
        for engine, model in models.items():
            time.sleep(language.PAUSE)
            read = memory.rate()
            rate = model.decode(prompt, NEW)[0]
            if round_:  # the first round warms up
                rates[engine].append(rate)
                reads.append(read)
    for engine, model in models.items():
        q = quartiles(rates[engine])
        yield {"model": name, "file": kind, **model.record, "decode": [q.low, q.median, q.high],
               "memory": statistics.median(reads)}  # fmt: skip
        model.close()
    memory.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    if not args.table:
        keep(RESULTS, [partial(measured, name, kind) for name in args.only for kind in args.kinds])
    tables.show("large-language")


if __name__ == "__main__":
    main()
