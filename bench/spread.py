"""How sure the retrieval figures of frontier.py are: each query's result beside the dense model's, three seeds.

    python spread.py            about 20 minutes on one core; the frontier's texts (texts.py)
    python spread.py --table    only print what was measured last

R@1 of 1,000 queries is a sample. All models answer the same queries, so what counts is how many more queries a model
answers than the dense one. The interval holds 95 % of 10,000 draws of 1,000 queries with replacement (paired
bootstrap). Models that depend on calibration data are made with three seeds. Appends one JSON line per run to
results/spread.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import peers
import rarefy
import tables
import texts
from frontier import READY, TESTS, calibration, embeddings, example, made, points
from rarefy.data import builtin
from rarefy.evaluation.retrieval import ranks
from rarefy.model import hf
from recording import keep

RESULTS = Path(__file__).parent / "results" / "spread.jsonl"
OURS = ["int8", "narrower-0, trained, int8", "narrowest-0, trained, int8"]  # the same with every seed
SEEDED = ["25 % fewer neurons and heads, int8"]
SEEDS, DRAWS = (0, 1, 2), 10_000
Hits = dict[str, Tensor]  # by test: 1 for each query whose text is nearest, else 0


def hits(encode: Callable[[Any], Tensor], tokenizer: Any) -> Hits:
    """Return which queries of each test a model answers."""
    return {name: (ranks(*embeddings(encode, tokenizer, pairs())) == 1).float() for name, pairs in TESTS.items()}


def interval(difference: Tensor) -> list[float]:
    """Return the middle 95 % of the means of draws of as many queries with replacement, in percent."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(difference), (DRAWS, len(difference)), generator=random)
    means = 100 * difference[chosen].mean(1)
    return [round(float(q), 2) for q in torch.quantile(means, torch.tensor([0.025, 0.975]))]


def beside(answered: Hits, dense: Hits) -> dict[str, Any]:
    """Return R@1 of each test, how much it is above the dense model's, and the interval of that, in percent."""
    return {
        name: {
            "recall": 100 * float(answered[name].mean()),
            "gain": 100 * float((answered[name] - dense[name]).mean()),
            "interval": interval(answered[name] - dense[name]),
        }
        for name in answered
    }


@torch.no_grad()
def spread() -> Iterator[dict[str, Any]]:
    """Yield one record for each model and seed."""
    folder = builtin.model_folder("minilm")
    tokenizer, model = hf.load_tokenizer(folder), hf.load_folder(folder).eval()
    dense = hits(lambda x: model(**x).last_hidden_state, tokenizer)
    examples = {"one": example(tokenizer, 1)}
    yield {"name": "eager", "seed": None, **beside(dense, dense)}
    for name in [*OURS, *SEEDED]:
        steps, precision = points()[name]
        for seed in SEEDS if name in SEEDED else (None,):
            small = made(model, steps, calibration(tokenizer, 128, seed or 0))
            fast = small if precision == READY else rarefy.compile(small, examples["one"], precision=precision)
            answered = hits(lambda x, f=fast: f(**x)[0], tokenizer)
            yield {"name": f"ours, {name}", "seed": seed, **beside(answered, dense)}
    for seed in SEEDS:
        data = calibration(tokenizer, 128, seed)
        with TemporaryDirectory() as place:
            file = Path(place) / "model.onnx"
            peers.exported(model, data[0], file)
            for name, engine in peers.engines(file, data, examples, ["openvino int8"]).items():
                settings = peers.settings_of({name: engine})
                yield {"name": name, "seed": seed, "settings": settings,
                       **beside(hits(engine.encode, tokenizer), dense)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    if not args.table:
        texts.fetch()
        keep(RESULTS, [spread])
    tables.show("spread")


if __name__ == "__main__":
    main()
