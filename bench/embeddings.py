"""`encode` of sentence-transformers' MiniLM on the engine, beside its own backends, timed in turns in one run.

    python embeddings.py                                     about 20 minutes on two idle cores
    python embeddings.py --texts 20 --pairs 20 --repeats 1 --out /tmp/embeddings.jsonl      to see that it runs

All models are `SentenceTransformer` objects of the same folder: tokenization, sorting by length and pooling are the
same code. The transformer inside is torch, ONNX Runtime or OpenVINO in 8 bits, or ours. The packages by which
sentence-transformers runs ONNX Runtime and OpenVINO (optimum-onnx 0.1, optimum-intel 2.2) need transformers before 4.58
and 5.6, and cannot be installed beside a current one. So `Driven` calls the runtimes as they do: one graph with open
sizes, numpy arrays in, no copy of the output. Weights of ONNX Runtime have a scale per channel, its activations are
quantized in each call; OpenVINO is quantized by NNCF for transformers, calibrated on articles. Both get torch's number
of threads.

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

import numpy as np
import torch
from torch import Tensor, nn

import tables
import texts
from peers import exported
from rarefy.data import builtin
from rarefy.data.text_pairs import token_batches
from rarefy.evaluation.retrieval import recall
from recording import keep
from rivals import feed, nncf_int8, onnxruntime_session, openvino_network, quantized_dynamically
from runtime import alternate, keep_memory

RESULTS = Path(__file__).parent / "results" / "embeddings.jsonl"
SHORTEST, LONGEST = 8, 128  # tokens of a text
SINGLE = 50  # texts that are encoded one by one
BATCH = 32  # the default of encode
PAUSE = 0.01  # seconds between runs: threads of most engines spin for about one ms after a call


class Driven(nn.Module):
    """A transformer that another runtime runs, in the place of the dense one.

    Args:
        config: the dense model's config.
        names: the graph's inputs.
        run: returns hidden states for arrays by name.
    """

    def __init__(self, config: Any, names: list[str], run: Callable[[dict[str, Any]], np.ndarray]):
        super().__init__()
        self.config, self.names, self.run = config, names, run

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        arrays = {name: inputs[name].numpy() for name in self.names}
        return {"last_hidden_state": torch.from_numpy(self.run(arrays))}


def models(folder: Path, place: Path) -> Iterator[tuple[str, Any]]:
    """Yield models by name, torch first."""
    st: Any = import_module("sentence_transformers")
    ours: Any = import_module("rarefy.integrations.sentence_transformers")
    load = partial(st.SentenceTransformer, str(folder), device="cpu", local_files_only=True)
    dense = load()
    yield "sentence-transformers, torch", dense
    whole = [t for t in texts.of_kind("articles") if len(t) > 300][:96]
    batches = token_batches(whole, dense.tokenizer, batch=8, tokens=LONGEST)
    transformer, file = dense[0].model, place / "model.onnx"
    exported(transformer, batches[0], file)
    names = list(batches[0])
    session = onnxruntime_session(quantized_dynamically(file))
    network = import_module("openvino").Core().read_model(str(file))
    request = openvino_network(nncf_int8(network, [feed(x) for x in batches]), "int8").create_infer_request()

    def infer(arrays: dict[str, Any]) -> np.ndarray:
        return request.infer(arrays, share_inputs=True, share_outputs=True)[0]

    for name, run in (
        ("sentence-transformers, ONNX Runtime int8", lambda arrays: session.run(None, arrays)[0]),
        ("sentence-transformers, OpenVINO int8", infer),
    ):
        model = load()
        model[0].model = Driven(transformer.config, names, run)
        yield name, model
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
    quality: dict[str, Any] = {}
    many: dict[str, Callable[[], Any]] = {}
    single: dict[str, Callable[[], Any]] = {}
    want, data = None, list[str]()
    pairs = texts.judged_articles()[:num_pairs]
    with TemporaryDirectory() as place:
        for name, model in models(builtin.model_folder("minilm"), Path(place)):
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
    yield {"run": "minilm", "texts": len(data), "batch": BATCH, "quality": quality, "milliseconds": milliseconds}


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
