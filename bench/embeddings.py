"""`encode` of sentence-transformers' MiniLM on the engine, beside its own backends, timed in turns in one run.

    python embeddings.py                                     about 20 minutes on two idle cores
    python embeddings.py --texts 20 --pairs 20 --repeats 1 --out /tmp/embeddings.jsonl      to see that it runs

All models are `SentenceTransformer` objects of the same folder: tokenization, sorting by length and pooling are the
same code. The transformer inside is torch, ONNX Runtime or OpenVINO in 8 bits, or ours. The packages by which
sentence-transformers runs ONNX Runtime and OpenVINO (optimum-onnx 0.1, optimum-intel 2.2) need transformers before 4.58
and 5.6, and cannot be installed beside a current one. So `Driven` calls the runtimes as they do: one graph with open
sizes, numpy arrays in, at the settings that are fastest for a batch of 32 texts of 64 tokens (peers.py), calibrated on
articles.

Texts are 1,000 articles of 8 to 128 tokens, and 50 of them one by one. Quality is that of the very models timed: the
mean cosine with torch's embeddings of these texts, and how many of 1,000 descriptions find their article first (R@1).
Appends one JSON line to results/embeddings.jsonl.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import peers
import tables
import texts
from rarefy.data import builtin
from rarefy.data.text_pairs import token_batches
from rarefy.evaluation.profiling import PAUSE
from rarefy.evaluation.retrieval import recall
from recording import keep
from runtime import alternate, keep_memory

RESULTS = Path(__file__).parent / "results" / "embeddings.jsonl"
SHORTEST, LONGEST = 8, 128  # tokens of a text
SINGLE = 50  # texts that are encoded one by one
BATCH = 32  # the default of encode


class Driven(nn.Module):
    """A transformer that another runtime runs, in the place of the dense one.

    Args:
        config: the dense model's config.
        names: the graph's inputs.
        engine: returns hidden states.
    """

    def __init__(self, config: Any, names: list[str], engine: peers.Engine):
        super().__init__()
        self.config, self.names, self.engine = config, names, engine

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        return {"last_hidden_state": self.engine.encode({name: inputs[name] for name in self.names})}


def models(folder: Path, place: Path, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield models by name, torch first; `settings` receives those of other engines."""
    st: Any = import_module("sentence_transformers")
    ours: Any = import_module("rarefy.integrations.sentence_transformers")
    load = partial(st.SentenceTransformer, str(folder), device="cpu", local_files_only=True)
    dense = load()
    yield "sentence-transformers, torch", dense
    whole = [t for t in texts.of_kind("articles") if len(t) > 300][:96]
    batches = token_batches(whole, dense.tokenizer, batch=8, tokens=LONGEST)
    transformer, file = dense[0].model, place / "model.onnx"
    peers.exported(transformer, batches[0], file)
    typical = {n: values.repeat(BATCH // len(values), 1)[:, : LONGEST // 2] for n, values in batches[0].items()}
    found = peers.engines(file, batches, {"typical": typical}, peers.IN_8_BITS, fixed=False)
    settings |= peers.settings_of(found)
    for engine, title in (("onnxruntime int8", "ONNX Runtime int8"), ("openvino int8", "OpenVINO int8")):
        model = load()
        model[0].model = Driven(transformer.config, list(batches[0]), found[engine])
        yield f"sentence-transformers, {title}", model
    for precision in ("fp32", "int16", "int8"):
        yield f"ours, {precision}", ours.SentenceTransformer(folder, precision)


def mixed(tokenizer: Any, count: int) -> list[str]:
    """Return articles cut to 8 to 128 tokens, any length as often as any other."""
    draw = random.Random(0)
    whole = [t for t in texts.of_kind("articles") if len(t) > 900][-count:]
    lengths = [draw.randint(SHORTEST, LONGEST) - 2 for _ in whole]  # [CLS] and [SEP] are added
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(i[:n]) for i, n in zip(ids, lengths)]


def judge(model: Any, data: list[str], pairs: list[tuple[str, str]], want: Tensor | None) -> tuple[Any, Tensor]:
    """Return the mean cosine with embeddings `want`, R@1 of the pairs, and the embeddings of `data`."""
    got = torch.nn.functional.normalize(model.encode(data, convert_to_tensor=True), dim=-1)
    asked, answers = (
        model.encode([p[side] for p in pairs], normalize_embeddings=True, convert_to_tensor=True) for side in (0, 1)
    )
    cosine = 1.0 if want is None else float((got * want).sum(-1).mean())
    return {"cosine": cosine, "articles": recall(asked, answers)}, got


def encode_each(model: Any, data: list[str]) -> None:
    """Encode texts one by one."""
    for text in data:
        model.encode(text)


def run(count: int, num_pairs: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield one record: quality, and quartiles of milliseconds for all texts and for one text."""
    quality, settings = dict[str, Any](), dict[str, Any]()
    many: dict[str, Callable[[], Any]] = {}
    single: dict[str, Callable[[], Any]] = {}
    want, data = None, list[str]()
    pairs = texts.judged_articles()[:num_pairs]
    with TemporaryDirectory() as place:
        for name, model in models(builtin.model_folder("minilm"), Path(place), settings):
            data = data or mixed(model.tokenizer, count)
            quality[name], got = judge(model, data, pairs, want)
            want = got if want is None else want
            print(name, quality[name], flush=True)
            many[name] = partial(model.encode, data, batch_size=BATCH)
            single[name] = partial(encode_each, model, data[:SINGLE])
        times = alternate(many, repeats, PAUSE)
        each = alternate(single, repeats, PAUSE)
    each = {name: [ms / len(data[:SINGLE]) for ms in quartiles] for name, quartiles in each.items()}
    milliseconds = {"all": times, "one": each}
    record = {"run": "minilm", "texts": len(data), "batch": BATCH, "settings": settings}
    yield {**record, "quality": quality, "milliseconds": milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what was measured last")
    args = parser.parse_args()
    keep_memory()
    if not args.table:
        keep(args.out, [lambda: run(args.texts, args.pairs, args.repeats)])
    tables.show("embeddings")


if __name__ == "__main__":
    main()
