"""Quantization, codebooks and low rank: quality, bytes and speed.

    python values.py leave          SmolLM2 trained and rotated, so that its weights leave the 4-bit grid of the package
    python values.py language       that copy, quantized, factorized, pruned: perplexity and bytes of its layers
    python values.py peer --peer VENV/bin/python     llmcompressor on the same copy and batches
    python values.py minilm         MiniLM: description finds article (R@1), cosine with dense embeddings
    python values.py lowrank        MiniLM's wide layers as factors, sized by a clock: each layer's time and the whole
    python values.py fashion        the small ResNet: static INT8, INT4 with training, deep compression
    python values.py decode         tokens/s of that copy, timed alternately
    python values.py --table        only print what was measured last

Appends one JSON line per run to results/values.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import rarefy
import tables
import texts
from rarefy.checkpoint.export import side_files
from rarefy.data import builtin, sources
from rarefy.data.text_pairs import token_batches
from rarefy.evaluation.profiling import compare, decode_and_prefill
from rarefy.evaluation.retrieval import embed, recall
from rarefy.model import hf
from recording import keep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "values.jsonl"
TUNED, LEFT = HERE / "build" / "tuned", HERE / "build" / "left"
BLOCKS = "model.layers.*"
STEPS, LR = 150, 2e-4
Line = dict[str, Any]
GPTQ = {"name": "obs", "asymmetric": 0}  # as published, without errors of earlier layers corrected
# methods as lists of (function, arguments); "data": True stands for the calibration batches
LANGUAGE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "int8": [("quantize", {"weights": "int8"})],
    "int8, inputs too": [("quantize", {"weights": "int8", "activations": "int8"})],
    "int4 by 64, rtn": [("quantize", {"weights": "int4", "group": 64, "fit": "minmax"})],
    "int4 by 64, mse": [("quantize", {"weights": "int4", "group": 64})],
    "int4 by 64, hqq": [("quantize", {"weights": "int4", "group": 64, "fit": "hqq"})],
    "int4 by 64, obs": [("quantize", {"weights": "int4", "group": 64, "solver": GPTQ, "data": True})],
    "int4 by 64, corrected": [("quantize", {"weights": "int4", "group": 64, "solver": "obs", "data": True})],
    "uint4 by 64, rtn": [("quantize", {"weights": "int4", "group": 64, "fit": "minmax", "symmetric": False})],
    "uint4 by 64, obs": [
        ("quantize", {"weights": "int4", "group": 64, "symmetric": False, "solver": GPTQ, "data": True})
    ],
    "50 %": [("prune", {"sparsity": 0.5, "solver": "admm", "data": True})],
    "50 %, int8": [("prune", {"sparsity": 0.5, "solver": "admm", "data": True}), ("quantize", {"weights": "int8"})],
    "2:4 and int4 by 64 at once": [
        ("quantize", {"weights": "int4", "group": 64, "solver": GPTQ, "pattern": "2:4", "data": True})
    ],
    "2:4 and int4 by 64 at once, corrected": [
        ("quantize", {"weights": "int4", "group": 64, "solver": "obs", "pattern": "2:4", "data": True})
    ],
    "2:4, then int4 by 64": [
        ("prune", {"pattern": "2:4", "solver": "obs", "data": True}),
        ("quantize", {"weights": "int4", "group": 64, "solver": GPTQ, "data": True}),
    ],
    "2:4, then int4 by 64, rtn": [
        ("prune", {"pattern": "2:4", "solver": "obs", "data": True}),
        ("quantize", {"weights": "int4", "group": 64}),
    ],
    "svd, 10 % less": [("factorize", {"keep": 0.9})],
    "svd, 20 % less": [("factorize", {"keep": 0.8})],
    "whitened svd, 10 % less": [("factorize", {"keep": 0.9, "data": True})],
    "whitened svd, 20 % less": [("factorize", {"keep": 0.8, "data": True})],
    "codebook of 4 bits": [("share", {"bits": 4, "data": True})],
}
PEERS = {
    "llmcompressor, int4 by 64, GPTQ": ("gptq", "int4"),
    "llmcompressor, int4 by 64, AWQ": ("awq", "int4"),
    "llmcompressor, uint4 by 64, GPTQ": ("gptq", "uint4"),
    "llmcompressor, uint4 by 64, AWQ": ("awq", "uint4"),
}
DO = {"quantize": rarefy.quantize_, "prune": rarefy.prune_, "factorize": rarefy.factorize_, "share": rarefy.share_}
MINILM: dict[str, dict[str, Any]] = {
    "int8, inputs too": {"weights": "int8", "activations": "int8"},
    "int4 by 32": {"weights": "int4", "group": 32},
    "int4 by 32, obs": {"weights": "int4", "group": 32, "solver": GPTQ, "data": True},
    "uint4 by 32, obs": {"weights": "int4", "group": 32, "symmetric": False, "solver": GPTQ, "data": True},
}


def leave() -> Iterator[Line]:
    """Train SmolLM2 briefly on articles, rotate its residual stream, save it, and measure how far its weights are from
    the 4-bit grid of the package.

    Training alone is not enough: 150 steps at 2e-4 leave weights within 0.03 grid steps of the grid (random weights:
    0.25), and at 1.5e-3 the loss rises from 2.4 to 5. A rotation changes all weights and no output.
    """
    source = builtin.model_folder("smollm2-135m")
    tokenizer = hf.load_tokenizer(source)
    model: Any = hf.load_folder(source).float()
    take = sources.Take(samples=2 * STEPS, tokens=512, batch=2, seed=1)
    batches: Any = sources.batches("wiki", take, tokenizer=tokenizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".mlp." in n or ".self_attn." in n}
    if not TUNED.is_dir():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            rarefy.fit_(
                model,
                [b | {"labels": b["input_ids"]} for b in batches],
                optimizer=lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.9, 0.95), weight_decay=0.0),
                lr_schedule="linear",
                seed=0,
                progress=True,
            )
        write(model.to(torch.bfloat16), TUNED, source)
    model = hf.load_folder(TUNED).float()
    told: Line = {"run": "leave", "steps": STEPS, "lr": LR, "tuned": perplexities(model, tokenizer)}
    rotate_(model)
    write(model.to(torch.bfloat16), LEFT, source)
    yield {**told, "far": far(before, model), "rotated": perplexities(hf.load_folder(LEFT).float(), tokenizer)}


def write(model: Any, folder: Path, source: Path) -> None:
    """Save a model with the tokenizer of another folder."""
    model.save_pretrained(folder)
    for name, content in side_files(source).items():
        if name not in ("config.json", "generation_config.json"):
            (folder / name).write_bytes(content)


@torch.no_grad()
def rotate_(model: Any) -> None:
    """Rotate the residual stream of a Llama by a random rotation Q without changing its outputs (QuaRot, Ashkboos 2024,
    section 4). Norm weights move into the next layers; the head gets its own weight."""
    width = model.config.hidden_size
    Q = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double())[0]
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())

    def turn(weight: torch.Tensor, left: bool = False, scale: torch.Tensor | None = None) -> None:
        w = weight.double() if scale is None else weight.double() * scale.double()
        weight.copy_((Q.T @ w if left else w @ Q).float())

    turn(model.model.embed_tokens.weight)
    for block in model.model.layers:
        for norm, behind in (
            (block.input_layernorm, [getattr(block.self_attn, f"{n}_proj") for n in "qkv"]),
            (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
        ):
            for layer in behind:
                turn(layer.weight, scale=norm.weight)
            norm.weight.fill_(1.0)
        turn(block.self_attn.o_proj.weight, left=True)
        turn(block.mlp.down_proj.weight, left=True)
    turn(model.lm_head.weight, scale=model.model.norm.weight)
    model.model.norm.weight.fill_(1.0)


def far(before: dict[str, torch.Tensor], model: Any) -> float:
    """Return the mean distance of weights from the nearest value of their block of 32 before, in grid steps. Random
    weights have 0.25."""
    found = []
    for name, p in model.named_parameters():
        if name in before:
            old = before[name].flatten()[: 32 * 4096].view(-1, 32)
            new = p.detach().float().flatten()[: 32 * 4096].view(-1, 32)
            rows = old.sort(1).values
            steps = rows.diff(dim=1)
            step = torch.where(steps > 1e-6, steps, torch.inf).amin(1, keepdim=True)
            apart = (new[:, :, None] - old[:, None, :]).abs().amin(2) / step
            found.append(apart[torch.isfinite(apart)].clamp(max=0.5).mean())
    return float(torch.stack(found).mean())


def perplexities(model: Any, tokenizer: Any) -> float:
    """Return the perplexity on 24 windows of 512 tokens of held-out articles."""
    from oneshot import quality

    return float(quality(model, None, tokenizer)["articles"] or 0)


def language(only: list[str]) -> Iterator[Line]:
    """Yield perplexity and bytes relative to bf16 of each method on the rotated copy, in fp32."""
    tokenizer = hf.load_tokenizer(LEFT)
    dense = hf.load_folder(LEFT).float()
    take = sources.Take(samples=64, tokens=512, batch=8, seed=0)
    data: Any = sources.batches("wiki", take, tokenizer=tokenizer)
    if not only:
        yield {"run": "language", "way": "dense", "perplexity": perplexities(dense, tokenizer)}
    for way, steps in LANGUAGE.items():
        if only and way not in only:
            continue
        model, began = copy.deepcopy(dense), time.perf_counter()
        for name, options in steps:
            given = {**options, "data": data} if options.get("data") else options
            DO[name](model, layers=BLOCKS, **given)
        seconds = time.perf_counter() - began
        rarefy.fold_(model)
        yield {
            "run": "language", "way": way, "perplexity": perplexities(model, tokenizer), "seconds": seconds,
            "of bf16": share_of_bf16(model),
        }  # fmt: skip


def peer(python: str, only: list[str]) -> Iterator[Line]:
    """Yield the perplexity of llmcompressor, run in its own venv on the same copy and batches."""
    import subprocess
    import tempfile

    from safetensors.torch import load_file, save_file

    tokenizer = hf.load_tokenizer(LEFT)
    batch: Any = sources.batches("wiki", sources.Take(samples=64, tokens=512, batch=64, seed=0), tokenizer=tokenizer)
    for way in only or PEERS:
        method, shape = PEERS[way]
        with tempfile.TemporaryDirectory() as place:
            save_file(batch[0], f"{place}/batches.safetensors")
            words = [str(LEFT), f"{place}/batches.safetensors", method, "64", shape, f"{place}/out"]
            side = [python, str(HERE / "llmcompressor_side.py"), *words]
            ran = subprocess.run(side, stdout=subprocess.PIPE, text=True, check=True)
            model = hf.load_folder(LEFT).float()
            lost = model.load_state_dict(load_file(f"{place}/out/effective.safetensors"), strict=False)
            assert not lost.unexpected_keys and lost.missing_keys == ["lm_head.weight"], lost
            seconds = json.loads(ran.stdout.strip().splitlines()[-1])["seconds"]
            yield {"run": "language", "way": way, "perplexity": perplexities(model, tokenizer), "seconds": seconds}


def share_of_bf16(model: Any) -> float:
    """Return the stored bytes of the compressed layers, relative to bf16."""
    from rarefy.checkpoint.save import pack
    from rarefy.model.masks import folded_state

    model = copy.deepcopy(model).to(torch.bfloat16)
    stored = dense = 0
    for name, packed in pack(model, dict(folded_state(model))):
        if ".layers." in name and name.endswith("_proj.weight"):
            stored += packed.nbytes
            dense += 2 * torch.Size(packed.shape).numel()
        elif ".layers." in name and name.endswith((".down.weight", ".up.weight")):
            stored += packed.nbytes
    if not dense or any(".down." in n for n in model.state_dict()):
        return stored / (2 * sum(p.numel() for n, p in hf.load_folder(LEFT).named_parameters() if "_proj" in n))
    return stored / dense


def retrieval(model: Any, tokenizer: Any) -> tuple[float, torch.Tensor]:
    """Return R@1 of 1,000 descriptions among their articles in percent, and the embeddings."""
    pairs = texts.judged_articles()
    asked, there = (embed(model, token_batches([p[side] for p in pairs], tokenizer)) for side in (0, 1))
    return recall(asked, there), torch.cat([asked, there])


def minilm(only: list[str]) -> Iterator[Line]:
    """Yield R@1 and cosine of quantized MiniLM."""
    source = builtin.model_folder("minilm")
    dense, tokenizer = hf.load_folder(source).eval(), hf.load_tokenizer(source)
    take = sources.Take(samples=64, tokens=256, batch=8, seed=0)
    data: Any = sources.batches("wiki", take, tokenizer=tokenizer)
    hit, want = retrieval(dense, tokenizer)
    yield {"run": "minilm", "way": "dense", "R@1": hit, "cosine": 1.0}
    for way, options in MINILM.items():
        if only and way not in only:
            continue
        model = copy.deepcopy(dense)
        rarefy.quantize_(model, layers="encoder.*", **{**options, "data": data} if options.get("data") else options)
        rarefy.fold_(model)
        hit, got = retrieval(model, tokenizer)
        yield {"run": "minilm", "way": way, "R@1": hit, "cosine": float((got * want).sum(-1).mean())}


WIDE = ["*.intermediate.dense", "encoder.layer.*.output.dense"]


def lowrank() -> Iterator[Line]:
    """Yield times and quality of MiniLM with wide layers factorized to two thirds and half of their time."""
    source = builtin.model_folder("minilm")
    dense, tokenizer = hf.load_folder(source).eval(), hf.load_tokenizer(source)
    take = sources.Take(samples=64, tokens=256, batch=8, seed=0)
    data: Any = sources.batches("wiki", take, tokenizer=tokenizer)
    _, want = retrieval(dense, tokenizer)
    for share in (0.67, 0.5):
        model = copy.deepcopy(dense)
        told = rarefy.factorize_(model, time=share, batch=16 * 128, layers=WIDE, data=data)
        rows = [r for r in told.rows if r["ranks"]]
        took = []
        for row in rows:
            name = row["layer"].removesuffix(".weight")
            wide: Any = dense.get_submodule(name)
            thin: Any = model.get_submodule(name)
            x = torch.randn(16 * 128, wide.in_features)
            t = compare({"dense": lambda: wide(x), "thin": lambda: thin(x)}, repeats=20)  # noqa: B023
            took.append(t["thin"].median / t["dense"].median)
        hit, got = retrieval(model, tokenizer)
        line: Line = {"run": "lowrank", "way": f"wide layers in {share} of their time", "R@1": hit,
                "cosine": float((got * want).sum(-1).mean()), "ranks": ", ".join(r["ranks"] for r in rows),
                "layers": told.summary["layers"], "slowest layer": max(took), "fastest layer": min(took)}  # fmt: skip
        for batch in (1, 16):
            words = {"input_ids": torch.randint(1000, 20000, (batch, 128))}
            t = compare({"dense": lambda: dense(**words), "thin": lambda: model(**words)}, repeats=30)  # noqa: B023
            line |= {f"{k}, {batch} x 128, ms": 1000 * v.median for k, v in t.items()}
        yield line


def fashion(seeds: list[int], only: list[str]) -> Iterator[Line]:
    """Yield static int8, int4 with training, and deep compression (90 % zeros, 16 values, LZMA) of a small ResNet."""
    import tempfile

    from vision import DENSE_EPOCHS, train_dense
    from vision_net import SmallResNet, accuracy, load

    images = load()
    for seed in seeds:
        torch.manual_seed(seed)
        dense = SmallResNet()
        train_dense(dense, images, seed, DENSE_EPOCHS, 0.2)
        dense = plain(dense)
        for way, make in FASHION.items():
            if only and way not in only:
                continue
            with tempfile.TemporaryDirectory() as place:
                model, more = make(copy.deepcopy(dense), images, seed)
                form = {"format": "dense"} if way == "dense" else {"compress": way == "deep compression"}
                size = rarefy.save(model, f"{place}/it", **form)  # type: ignore[arg-type]
                right = accuracy(model, *images[2:])
                yield {"run": "fashion", "seed": seed, "way": way, "accuracy": right, **more, "bytes": size}


def _longer(dense: Any, images: Any, seed: int) -> tuple[Any, Line]:
    from vision import MORE_EPOCHS, train_dense
    from vision_net import accuracy

    longer = copy.deepcopy(dense)
    train_dense(longer, images, seed, MORE_EPOCHS, 0.02)
    return dense, {"trained": accuracy(plain(longer), *images[2:])}


def _static(model: Any, images: Any, seed: int) -> tuple[Any, Line]:
    from vision import data_of

    data = data_of(images, seed)["calibrate"]
    rarefy.quantize_(model, "int8", activations="int8-static", data=data, layers=["Linear", "Conv2d"])
    return model, {}


def _four(model: Any, images: Any, seed: int) -> tuple[Any, Line]:
    from vision import MORE_EPOCHS, train_dense
    from vision_net import accuracy

    rarefy.quantize_(model, "int4", layers=["Linear", "Conv2d"])
    before = accuracy(model, *images[2:])
    train_dense(model, images, seed, MORE_EPOCHS, 0.02)
    return plain(model), {"untrained": before}


def _deep(model: Any, images: Any, seed: int) -> tuple[Any, Line]:
    from vision import data_of

    rarefy.compress_(model, "deep-compression", data_of(images, seed), seed=seed)
    return plain(model), {}


FASHION = {"dense": _longer, "int8, static": _static, "int4, trained": _four, "deep compression": _deep}


def plain(model: Any) -> Any:
    return model.eval().to(memory_format=torch.contiguous_format)


def decode() -> Iterator[Line]:
    """Yield tokens per second of each model on two threads, timed alternately."""
    tokenizer = hf.load_tokenizer(LEFT)
    dense = hf.load_folder(LEFT).to(torch.bfloat16).eval()
    models: dict[str, Any] = {"bf16": dense}
    everything = ["Linear", "Embedding"]
    for way, options, values in (
        ("int8", {"weights": "int8", "layers": everything}, None),
        ("int8, inputs too", {"weights": "int8", "layers": everything}, "int8"),
        ("int4 by 64, int8 head", {"weights": "int4", "group": 64}, None),
        ("int4 by 64, int8 head, inputs too", {"weights": "int4", "group": 64}, "int8"),
    ):
        model = copy.deepcopy(dense)
        rarefy.quantize_(model, **options)
        if "head" in way:
            rarefy.quantize_(model, "int8", layers=["lm_head", "model.embed_tokens"])
        rarefy.fold_(model)
        models[way] = model
        told = rarefy.accelerate_(model, (1,), precision=values, tuning_cache=False)
        yield {"run": "decode", "way": f"{way}: bytes", "bytes": told.summary["bytes in memory after"],
               "perplexity": perplexities(copy.deepcopy(model).eval(), tokenizer)}  # fmt: skip
    for way, rates in decode_and_prefill(models, prompt=64, new=24, repeats=7).items():
        yield {"run": "decode", "way": way, **{k: rates[k]["tokens_per_second"] for k in ("prefill", "decode")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="*",
        choices=["leave", "language", "peer", "minilm", "lowrank", "fashion", "decode", []],
        default=[],
    )
    parser.add_argument("--only", nargs="*", default=[], help="ways")
    parser.add_argument("--peer", help="the python of a venv with llmcompressor 0.14")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    runs: dict[str, Any] = {
        "leave": leave,
        "language": lambda: language(args.only),
        "minilm": lambda: minilm(args.only),
        "lowrank": lowrank,
        "fashion": lambda: fashion(args.seeds, args.only),
        "decode": decode,
        "peer": lambda: peer(args.peer, args.only),
    }
    if "peer" in args.runs and not args.peer:
        parser.error("llmcompressor runs in a venv of its own: give --peer VENV/bin/python")
    keep(RESULTS, (runs[n] for n in args.runs or ([] if args.table else [r for r in runs if r != "peer"])))
    tables.show("quantize-language", "quantize-minilm", "quantize-fashion", "quantize-decode", "low-rank")


if __name__ == "__main__":
    main()
