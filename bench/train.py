"""Training of pruned models: the quality it recovers, by method, with and without a teacher.

    python train.py fashion --seeds 0 1      the small ResNet at 95 % and 98 %, each method; a cut student
    python train.py language                 SmolLM2 at 2:4 and 60 %: one shot, then a short distillation
    python train.py minilm                   MiniLM at 80 % in 4x1 blocks, SquareHead; cosine with dense, speed
    python train.py --table                  only print what was measured last

Appends one JSON line per run to results/train.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import rarefy
import tables
from rarefy.data import builtin, sources
from rarefy.evaluation.profiling import compare
from rarefy.model import hf
from rarefy.train.fit import Steps
from rarefy.train.optimizers import optimizer_of
from recording import keep
from values import perplexities, plain

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "train.jsonl"
Line = dict[str, Any]
EPOCHS, LR = 8, 0.1
STEM = {"ignore": ["stem*"], "scope": "global"}
PLANS: dict[str, Any] = {
    "gradual magnitude": rarefy.Gradual(steps=30, end=0.5, **STEM),
    "gradual taylor": rarefy.Gradual(steps=30, end=0.5, score="taylor", **STEM),
    "movement": rarefy.Movement(steps=30, end=0.5, **STEM),
    "second-order (oBERT)": rarefy.SecondOrder(steps=10, end=0.5, gradients=256, **STEM),
    "rigl": rarefy.Rigl(steps=60, ignore=["stem*"], allocate="erk"),
    "alternate (AC/DC)": rarefy.Alternate(cycles=3, end=0.4, **STEM),
    "admm": rarefy.Admm(steps=100, end=0.6, **STEM),
    "rewind": rarefy.Rewind(rounds=3, **STEM),
}


def begun(seed: int, width: int) -> Any:
    """Return the dense network that all runs of a seed start from, trained once for DENSE_EPOCHS."""
    from safetensors.torch import load_file, save_file

    from vision import DENSE_EPOCHS, train_dense
    from vision_net import SmallResNet, load

    torch.manual_seed(seed)
    model = SmallResNet(width=width)
    file = HERE / "build" / f"fashion-{seed}{'' if width == 1 else f'-{width}x'}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model
    train_dense(model, load(), seed, DENSE_EPOCHS, 0.2)
    file.parent.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    return model


def fashion_one(task: tuple[str, float, int, int, int]) -> Line:
    """Return the record of one network: dense or pruned by a method, with or without a teacher."""
    from vision import SGD, data_of, fast
    from vision_net import accuracy, load

    way, sparsity, seed, width, epochs = task
    images, began, model = load(), time.perf_counter(), begun(seed, width)
    teacher = copy.deepcopy(model)
    data, plan, teach = data_of(images, seed), None, None
    name, _, taught = way.partition(", ")
    with fast(model), fast(teacher):
        if name == "student":
            rarefy.cut_(model, data["calibrate"][0][0][:2], parameters=0.1, data=data["calibrate"])
        elif name != "dense":
            plan = type(PLANS[name])(**{**PLANS[name].__dict__, "sparsity": sparsity})
        if taught:
            teach = rarefy.Distiller(
                model, teacher.eval(), rarefy.Distill(temperature=4.0, task=0.3), example=data["calibrate"][0]
            )
        rarefy.fit_(
            model, data["train"], epochs=epochs, optimizer=optimizer_of("sgd", LR, **SGD), lr_schedule="one-cycle",
            prune=plan, calibrate=data["calibrate"], distill=teach, seed=seed,
        )  # fmt: skip
    rarefy.fold_(model)
    right = accuracy(plain(model), *images[2:])
    run = (
        "fashion"
        + (f", {width} times as wide" if width != 1 else "")
        + (f", {epochs} epochs" if epochs != EPOCHS else "")
    )
    return {
        "run": run,
        "way": way, "sparsity": sparsity, "seed": seed, "accuracy": 100 * right,
        "parameters": sum(p.numel() for p in model.parameters()), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def fashion(seeds: list[int], only: list[str], sparsity: list[float], width: int, epochs: int) -> Iterator[Line]:
    """Yield the records of all methods, sparsities and seeds; one process with one thread per core."""
    ways = [("dense", 0.0)]
    ways += [(name, s) for s in sparsity for name in (*PLANS, "gradual magnitude, taught")]
    ways += [("student", 0.0), ("student, taught", 0.0)]
    ways = [w for w in ways if not only or w[0] in only]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        list(pool.map(begun, seeds, [width] * len(seeds)))
        yield from pool.map(fashion_one, [(w, p, s, width, epochs) for w, p in ways for s in seeds])


LANGUAGE = {
    "2:4": {"pattern": "2:4", "solver": "admm"},
    "60 %": {"sparsity": 0.6, "solver": "admm"},
}
STEPS, TOKENS = 90, 512


def language(only: list[str]) -> Iterator[Line]:
    """Prune in one shot, then train with the dense model as teacher on the calibration corpus."""
    source = builtin.model_folder("smollm2-135m")
    tokenizer = hf.load_tokenizer(source)
    dense = hf.load_folder(source).float()
    few: Any = sources.batches("wiki", sources.Take(samples=64, tokens=512, batch=8, seed=0), tokenizer=tokenizer)
    many: Any = sources.batches(
        "wiki", sources.Take(samples=2 * STEPS, tokens=TOKENS, batch=2, seed=1), tokenizer=tokenizer
    )
    taught = [b | {"labels": b["input_ids"]} for b in many]
    yield {"run": "language", "way": "dense", "perplexity": perplexities(dense, tokenizer)}
    for way, how in LANGUAGE.items():
        if only and way not in only:
            continue
        model, began = copy.deepcopy(dense), time.perf_counter()
        rarefy.prune_(model, layers="model.layers.*", data=few, **how)
        shot, first = time.perf_counter() - began, perplexities(model, tokenizer)
        began = time.perf_counter()
        plan = rarefy.Distill(task=1.0, logits=1.0, hidden="squarehead", hidden_weight=0.5)
        distiller = rarefy.Distiller(model, dense, plan, example=many[0])
        steps = Steps(autocast="bf16", clip=1.0)
        rarefy.fit_(
            model, taught, distill=distiller, optimizer=optimizer_of("adamw", 3e-4, weight_decay=0.0),
            lr_schedule="one-cycle", steps=steps, seed=0, progress=True,
        )  # fmt: skip
        distiller.close()
        rarefy.fold_(model)
        yield {
            "run": "language", "way": way, "one shot": first, "perplexity": perplexities(model, tokenizer),
            "seconds": shot, "training": time.perf_counter() - began, "steps": STEPS,
        }  # fmt: skip


def minilm() -> Iterator[Line]:
    """Prune MiniLM to 80 % in 4x1 blocks, train its hidden states, and time it on the engine. The trained model stays
    in build/minilm."""
    from oneshot import article_embeddings

    source = builtin.model_folder("minilm")
    dense, tokenizer = hf.load_folder(source).eval(), hf.load_tokenizer(source)
    folder = HERE / "build" / "minilm"
    if not folder.is_dir():
        model, seconds = learn(copy.deepcopy(dense), tokenizer)
        rarefy.save(model, folder)
        (HERE / "build" / "minilm.txt").write_text(str(seconds))
    model, want = rarefy.load(folder).eval(), article_embeddings(dense, tokenizer)
    cosine = float((article_embeddings(model, tokenizer) * want).sum(-1).mean())
    seconds = float((HERE / "build" / "minilm.txt").read_text())
    line: Line = {"run": "minilm", "way": "4x1, 80 %, taught", "cosine": cosine, "training": seconds}
    for batch in (1, 16):
        words = {"input_ids": torch.randint(1000, 20000, (batch, 128))}
        fast = rarefy.compile(model, words)
        times = compare({"dense": lambda: dense(**words), "ours": lambda: fast(**words)}, repeats=30)  # noqa: B023
        line |= {f"{k}, {batch} x 128, ms": 1000 * t.median for k, t in times.items()}
    yield line


def pieces(tokenizer: Any, epoch: int, batch: int = 16, words: int = 90) -> list[Any]:
    """Return batches of pieces of the training articles, with the encoder's first and last token.

    Odd epochs cut the articles at other places. A batch holds pieces of about the same length."""
    chance, texts = torch.Generator().manual_seed(1000 + epoch), []
    for text in builtin.wiki(False):
        w = text.split()
        first = int(torch.randint(0, words, (), generator=chance)) if len(w) > words and epoch % 2 else 0
        cut = [w[:first], *(w[i : i + words] for i in range(first, len(w), words))]
        texts += [" ".join(p) for p in cut if len(p) > 20]
    order = torch.randperm(len(texts), generator=chance).tolist()
    near = [sorted(order[i : i + 32 * batch], key=lambda j: len(texts[j])) for i in range(0, len(order), 32 * batch)]
    picked = [n[i : i + batch] for n in near for i in range(0, len(n) - batch + 1, batch)]
    how: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    mixed = torch.randperm(len(picked), generator=chance).tolist()
    return [dict(tokenizer([texts[j] for j in picked[i]], **how)) for i in mixed]


def learn(dense: Any, tokenizer: Any) -> tuple[Any, float]:
    """Prune with block reconstruction, then train all blocks on the dense model's hidden states. Return the model and
    the seconds."""
    model, began = copy.deepcopy(dense), time.perf_counter()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0  # the teacher has no dropout either
    for m in (model, dense):
        m.set_attn_implementation("eager")  # trains faster here
    model.embeddings.requires_grad_(False)  # half of all weights, none of them pruned
    solver = rarefy.Solver(name="admm", asymmetric=0.5, reconstruct=2)
    how: dict[str, Any] = {"layers": "encoder.layer.*", "solver": solver, "allocate": "errors"}
    first = pieces(tokenizer, 0)
    rarefy.prune_(model, "4x1", sparsity=0.8, data=first[:64], **how)
    plan = rarefy.Distill(task=0.0, logits=0.0, hidden="squarehead")
    distiller = rarefy.Distiller(model, dense, plan, example=first[0])
    rarefy.fit_(
        model, lambda e: pieces(tokenizer, e), epochs=7, distill=distiller, seed=0, lr_schedule="one-cycle",
        steps=Steps(autocast="bf16", clip=1.0), optimizer=optimizer_of("adamw", 1e-3, weight_decay=0.0), progress=True,
    )  # fmt: skip
    distiller.close()
    return rarefy.fold_(model).eval(), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", choices=["fashion", "language", "minilm", []], default=[])
    parser.add_argument("--only", nargs="*", default=[], help="ways")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--width", type=int, default=1, help="of the small ResNet, as a multiple")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the nets' further training, dense ones' too")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    runs: dict[str, Any] = {
        "fashion": lambda: fashion(args.seeds, args.only, args.sparsity, args.width, args.epochs),
        "language": lambda: language(args.only), "minilm": minilm,
    }  # fmt: skip
    keep(RESULTS, (runs[n] for n in args.runs or ([] if args.table else runs)))
    tables.show("train-fashion", "train-language", "train-minilm")


if __name__ == "__main__":
    main()
