"""Quality against time of deployed models: ours and those of other engines, timed in turns in one run.

    python frontier.py                     every point of MiniLM, about 40 minutes on two idle cores
    python frontier.py --only "int8" "1x4 60 %, int8"     some of ours, beside all other engines
    python frontier.py --peers             only the other engines and the dense model
    python frontier.py --table             only print what was measured last

    env RAREFY_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python frontier.py     all engines without AMX

A point is a model as it is deployed: pruned or cut, compiled, in its precision. Quality is that of this very model:
how many of 1,000 descriptions find their article first (R@1), how many of 1,000 passages of the Brown corpus find the
one that follows (R@1), how many passages of half of Brown a logistic regression on the embeddings of the other half
puts into the right one of 15 categories ("categories"), and the mean cosine with the dense model's embeddings. Nothing
of these was used for calibration or training (texts.py). Students of recover.py also run in other engines in 8 bits,
so that what the cut gives and what the engine gives stand apart. Times are of one text of 16 tokens, as searches have,
and of one and of sixteen texts of 128 tokens. Other engines run at the best settings for each of these sizes
(peers.py), with the same calibration. Appends one JSON line per run to results/frontier.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import peers
import rarefy
import tables
import texts
from rarefy.checkpoint import compiled_model
from rarefy.data import builtin
from rarefy.data.text_pairs import token_batches
from rarefy.evaluation.profiling import PAUSE
from rarefy.evaluation.retrieval import embed, recall
from rarefy.formats import container
from rarefy.model import hf
from rarefy.runtime.packing import unpack
from recording import keep
from runtime import alternate, keep_memory

RESULTS = Path(__file__).parent / "results" / "frontier.jsonl"
STUDENTS = Path(__file__).parent / "build" / "students"  # of recover.py
ZOO = Path(__file__).parent.parent / "zoo"  # those of them that the repository holds, as they are deployed
READY = "ready"  # the step, and in place of a precision: a model that is compiled
LAYERS, TOKENS = "encoder.layer.*", 128
SIZES = {"1 x 16": (1, 16), "1 x 128": (1, TOKENS), "16 x 128": (16, TOKENS)}  # texts of a call, and their tokens
REPEATS = {"1 x 16": 100, "1 x 128": 60, "16 x 128": 15}
MLP = {"units": "neuron", "layers": "*.intermediate.*", "score": "obs", "round_to": 32}
HEADS = {"units": "head", "score": "obs"}
ADMM = {"solver": "admm", "layers": LAYERS}
Steps = list[tuple[str, dict[str, Any]]]
# steps that make the model, and the precision in which it is compiled; each step also gets calibration data
POINTS: dict[str, tuple[Steps, str | None]] = {
    "fp32": ([], None),
    "bf16": ([], "bf16"),
    "int16": ([], "int16"),
    "int8": ([], "int8"),
    **{
        f"1x4 {percent} %, int8": ([("prune", {"pattern": "1x4", "sparsity": percent / 100, **ADMM})], "int8")
        for percent in (50, 60, 80)
    },
    **{
        f"{percent} % fewer neurons, int8": ([("cut", {"keep": 1 - percent / 100, **MLP})], "int8")
        for percent in (10, 25, 40)
    },
    **{
        f"{percent} % fewer neurons and heads, int8": (
            [("cut", {"keep": 1 - percent / 100, **MLP}), ("cut", {"keep": 1 - percent / 100, **HEADS})],
            "int8",
        )
        for percent in (10, 25)
    },
}
Encode = Callable[[dict[str, Tensor]], Tensor]
TESTS = {  # of retrieval: pairs of texts, of which the first looks for the second
    "articles": texts.judged_articles,
    "brown": texts.judged_brown,
    "manuals": texts.judged_manuals,
}


def points() -> dict[str, tuple[Steps, str | None]]:
    """Return POINTS, and the students that recover.py has trained: those of zoo/ and those in build/."""
    trained = {f.stem: ([("load", {"folder": STUDENTS / f.stem})], "int8") for f in sorted(STUDENTS.glob("*.json"))}
    notes = {f.parent: json.loads(f.read_text()) for f in sorted(ZOO.glob("*/student.json"))}
    ready = {f"{note['student']}-{note['seed']}": ([(READY, {"folder": f})], READY) for f, note in notes.items()}
    return POINTS | {f"{name}, trained, int8": point for name, point in (ready | trained).items()}


def judge(encode: Encode, tokenizer: Any, want: Tensor | None) -> tuple[dict[str, float], Tensor]:
    """Return R@1 of TESTS, right categories, the mean cosine with embeddings `want`, and the embeddings."""
    result, found = {}, {}
    for name, pairs in TESTS.items():
        found[name] = asked, there = embeddings(encode, tokenizer, pairs())
        result[name] = recall(asked, there)
    result["categories"] = probed(found["brown"][1])
    got = torch.cat([side for sides in found.values() for side in sides])
    return {**result, "cosine": 1.0 if want is None else float((got * want).sum(-1).mean())}, got


def embeddings(encode: Encode, tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Return the embeddings of both sides of pairs of texts."""
    asked, there = (
        embed(lambda **x: encode(x), token_batches([p[side] for p in pairs], tokenizer, tokens=TOKENS))
        for side in (0, 1)
    )
    return asked, there


def probed(passages: Tensor) -> float:
    """Return the accuracy, in percent, of a logistic regression that tells the categories of Brown's passages apart.

    Fitted on every second text; both passages of a text are on the same side.
    """
    fitted = import_module("sklearn.linear_model").LogisticRegression(C=10.0, max_iter=1000)
    classes = [c for c in texts.brown_categories() for _ in range(2)][: len(passages)]
    even = [i for i in range(len(passages)) if i // 2 % 2 == 0]
    odd = [i for i in range(len(passages)) if i // 2 % 2]
    fitted.fit(passages[even].numpy(), [classes[i] for i in even])
    return 100 * fitted.score(passages[odd].numpy(), [classes[i] for i in odd])


def calibration(tokenizer: Any, samples: int, seed: int, length: int = TOKENS) -> list[dict[str, Tensor]]:
    """Return batches of 8 articles that nothing is judged by."""
    whole = [t for t in texts.of_kind("articles") if len(t) > 300]
    random = torch.Generator().manual_seed(seed)
    chosen = [whole[i] for i in torch.randperm(len(whole), generator=random)[:samples]]
    return token_batches(chosen, tokenizer, batch=8, tokens=length)


def example(tokenizer: Any, batch: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Return texts of exactly so many tokens."""
    long = " ".join(t for t in texts.of_kind("articles")[:2000] if len(t) > 300)
    ids = tokenizer(long, return_tensors="pt", add_special_tokens=False)["input_ids"][0, : batch * tokens]
    return {"input_ids": ids.view(batch, tokens), "attention_mask": torch.ones(batch, tokens, dtype=torch.long)}


DO: dict[str, Callable[..., Any]] = {
    "prune": lambda model, data, pattern, **options: rarefy.prune_(model, pattern, data=data, **options),
    "load": lambda model, data, folder: rarefy.load(folder, model=model),
    "cut": lambda model, data, **options: rarefy.cut_(model, data[0], data=data, **options),
}


def unpacked(dense: Any, folder: Path) -> Any:
    """Return a student of zoo/ in PyTorch, for other engines: the weights that are deployed, as fp32 numbers.

    A weight's row has at most 255 multiples of one scale, so that other engines can have the same 8 bits.
    """
    parts = compiled_model.read(container.read(folder))
    weights = parts.constants | {name: unpack(packed) for name, packed in parts.packed.items()}
    model = copy.deepcopy(dense)
    for name, _ in dense.named_parameters():
        module, _, leaf = name.rpartition(".")
        weight = weights[f"p_{name.replace('.', '_').lower()}"]
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return model


def made(dense: Any, steps: Steps, data: list[dict[str, Tensor]]) -> Any:
    """Return a copy of the dense model after these steps, or a model of zoo/, which is compiled."""
    if steps and steps[0][0] == READY:
        return rarefy.load(steps[0][1]["folder"])
    model = copy.deepcopy(dense)
    with torch.enable_grad():
        for name, options in steps:
            DO[name](model, data=data, **options)
    rarefy.fold_(model)
    return model


@torch.no_grad()
def minilm(only: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """Yield one record: quality and quartiles of milliseconds of all points, which took turns."""
    folder = builtin.model_folder("minilm")
    tokenizer, dense = hf.load_tokenizer(folder), hf.load_folder(folder).eval()
    examples = {size: example(tokenizer, *shape) for size, shape in SIZES.items()}
    data = calibration(tokenizer, 128, seed)
    told: dict[str, Any] = {}
    runs: dict[str, dict[str, Callable[[], Any]]] = {size: {} for size in SIZES}
    told["eager"], want = judge(lambda x: dense(**x).last_hidden_state, tokenizer, None)
    for size, x in examples.items():
        runs[size]["eager"] = lambda x=x: dense(**x)
    with TemporaryDirectory() as place:
        file = Path(place) / "model.onnx"
        peers.exported(dense, data[0], file)
        others = peers.engines(file, data, examples)
        for name in [n for n in only if n.endswith(", trained, int8")]:
            steps, _ = points()[name]
            ready = steps[0][0] == READY
            student, file = name.removesuffix(", int8"), Path(place) / f"{name.partition(',')[0]}.onnx"
            cut = unpacked(dense, steps[0][1]["folder"]) if ready else made(dense, steps, data)
            rarefy.export_onnx(cut, data[0], file)
            more = peers.engines(file, data, examples, peers.IN_8_BITS)
            others |= {f"{engine}, {student}": other for engine, other in more.items()}
        for name, other in others.items():
            told[name], _ = judge(other.encode, tokenizer, want)
            print(name, told[name], flush=True)
            for size, run in other.timed.items():
                runs[size][name] = run
        for name in only:
            steps, precision = points()[name]
            began = time.perf_counter()
            model = made(dense, steps, data)
            seconds = time.perf_counter() - began
            fast = rarefy.compile(model, examples["16 x 128"], precision=precision) if precision != READY else model
            told[f"ours, {name}"], _ = judge(lambda x, f=fast: f(**x)[0], tokenizer, want)
            told[f"ours, {name}"]["seconds"] = seconds
            print(name, told[f"ours, {name}"], flush=True)
            for size, x in examples.items():
                runs[size][f"ours, {name}"] = lambda f=fast, x=x: f(**x)
        times = {size: alternate(calls, REPEATS[size], PAUSE) for size, calls in runs.items()}
    limited = os.environ.get("RAREFY_ISA")
    record = {"run": f"minilm, {limited}" if limited else "minilm", "seed": seed, "quality": told}
    yield {**record, "milliseconds": times, "settings": peers.settings_of(others)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=points(), default=list(points()))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    keep_memory()
    if not args.table:
        texts.fetch()
        keep(RESULTS, [lambda s=s: minilm([] if args.peers else args.only, s) for s in args.seeds])
    tables.show("frontier")


if __name__ == "__main__":
    main()
