"""Tables of what compression does to quality: pruning, structured pruning, quantization, low rank, training."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from provenance import ratio
from records import (
    Row,
    by,
    is_quiet,
    latest,
    marked,
    number,
    per_machine,
    percent,
    required,
    seconds_of,
    speedup,
    spread,
    table,
)

# Pruning

METHODS = {
    "dense": "dense model",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "llmcompressor Wanda": "llmcompressor 0.14, Wanda",
    "llmcompressor SparseGPT": "llmcompressor 0.14, SparseGPT",
    "obs fp32": "`obs` (SparseGPT), fp32",
    "obs": "`obs`, forward passes in bf16",
    "wanda + refit": "preset `fast` (Wanda masks, refit)",
    "admm": "preset `balanced` (ADMM)",
    "admm, asymmetric, reconstruct": "preset `best` without its search",
    "admm, asymmetric, reconstruct, search": "preset `best`",
}


def one_shot() -> str:
    """SmolLM2-135M pruned without training: perplexity, seconds and peak memory."""
    rows = latest(required("oneshot", model="smollm2-135m"), "setting", "method", "seed")
    cells = []
    for setting in ("0.5", "2:4", "0.6", "0.7"):
        for method, name in METHODS.items():
            same = [r for r in rows if (r["setting"], r["method"].strip()) == (setting, method)]
            quiet = [r["seconds"] for r in same if is_quiet(r)]
            if same:
                cells.append([
                    "none" if method == "dense" else setting if ":" in setting else percent(float(setting)), name,
                    *(f"{statistics.mean(r[n] for r in same):.2f}" for n in ("articles", "brown")),
                    number(statistics.median(quiet)) if quiet and method != "dense" else "",
                    f"{max(r['peak_rss'] for r in same) / 1e9:.2f}", str(len(same)),
                ])  # fmt: skip
    cells.sort(key=lambda line: line[0] != "none")
    head = ["zeros", "method", "perplexity, articles", "perplexity, Brown", "seconds", "peak RSS, GB", "seeds"]
    return marked(rows, f"**{rows[-1]['label']}, {rows[-1]['threads']} threads**\n\n{table(head, cells)}")


def one_shot_minilm() -> str:
    """MiniLM with half of its weights pruned: mean cosine of its embeddings with the dense model's."""
    rows = latest(required("oneshot", model="minilm"), "method")
    cells = [[METHODS[r["method"].strip()], f"{r['cosine']:.3f}", seconds_of(r)] for r in rows]
    return marked(rows, table(["method, 50 % zeros", "cosine with dense", "seconds"], cells))


def vision() -> str:
    """A small ResNet on Fashion-MNIST by score: accuracy in percent."""
    rows = latest(required("vision"), "run", "score", "seed")

    def cell(run: str, score: str) -> str:
        return spread([100 * r["accuracy"] for r in rows if (r["run"], r["score"]) == (run, score)])

    runs = ("fashion-oneshot-50", "fashion-oneshot-90", "fashion-iterative-90")
    scores = ("magnitude", "taylor", "gradient", "activation")
    head = ["score", "50 %, no training", "90 % at once, then trained", "90 % in steps"]
    dense = f"Dense {cell('dense', '-')}; dense, trained as long as the pruned ones, {cell('dense-longer', '-')}."
    return marked(rows, table(head, [[s, *(cell(run, s) for run in runs)] for s in scores]) + "\n\n" + dense)


def permute() -> str:
    """Channel permutation: share of the magnitudes that a 2:4 mask keeps."""
    rows = latest(required("permute"), "model")
    cells = [
        [
            r["model"],
            r["groups"],
            f"{r['kept before']:.4f}",
            f"{r['kept']:.4f}",
            f"{r['outputs moved']:.0e}",
            seconds_of(r),
        ]
        for r in rows
    ]
    head = ["model", "groups reordered", "kept before", "kept after", "change of outputs", "seconds"]
    return marked(rows, table(head, cells))


# Structured pruning


def _repair(row: Row) -> str:
    """Return how a record's lost units were compensated for: yes, no, or the named parts of it."""
    repair = row.get("repair", "")
    return ", ".join(repair) if isinstance(repair, list) else {True: "yes", False: "no"}.get(repair, "")


def structured_fashion() -> str:
    """A small ResNet cut to a quarter of its FLOPs: accuracy in percent."""
    rows = latest(required("cuts", run="fashion"), "score", "scope", "repair", "seed")
    cells = [
        [r["score"], r.get("scope", ""), _repair(r),
         f"{100 * r['before']:.1f}", f"{100 * r['trained']:.1f}"]
        for r in rows
    ]  # fmt: skip
    return marked(rows, table(["score", "scope", "repair", "after the cut, %", "after 4 epochs, %"], cells))


def structured_language() -> str:
    """SmolLM2-135M without a quarter of its MLP neurons: perplexity."""
    rows = latest(required("cuts", run="language"), "score", "repair")
    cells = [[r["score"], _repair(r), f"{r['articles']:,.1f}", seconds_of(r)] for r in rows]
    return marked(rows, table(["score", "repair", "perplexity", "seconds"], cells))


def structured_resnet50() -> str:
    """ResNet-50 cut to half its FLOPs, eager torch, ms."""

    def make(rows: list[Row]) -> str:
        cells = [
            [
                f"multiples of {r['round_to']}",
                str(r["batch"]),
                f"{r['flops']:.3f}",
                speedup(r["dense"]["median"], r["cut"]["median"]),
            ]
            for r in rows
        ]
        return table(["channels", "images", "FLOPs left", "dense -> cut, ms"], cells)

    return per_machine(latest(required("cuts", run="resnet50"), "round_to", "batch"), make)


def structured_coverage() -> str:
    """All models of torchvision cut to half their channels, by Rarefy and Torch-Pruning."""
    sides = {"rarefy": "Rarefy", "torch-pruning": "Torch-Pruning 1.6.1"}
    rows = latest(required("cut_zoo"), "model", "side")
    last = {(r["model"], r["side"]): r for r in rows}
    names = list(dict.fromkeys(model for model, _ in last))
    ran = {s: {n: last[n, s] for n in names if (n, s) in last and "error" not in last[n, s]} for s in sides}
    both = [n for n in names if all(n in ran[s] for s in sides)]
    exact = {s: [n for n, r in ran[s].items() if r["apart"] <= 1e-4] for s in sides}
    share = {s: statistics.median(ran[s][n]["left"] / ran[s][n]["parameters"] for n in both) for s in sides}
    times = [ratio(ran["torch-pruning"][n], ran["rarefy"][n], _seconds) for n in both if is_quiet(last[n, "rarefy"])]
    cells = [
        ["models tried", *(str(len(names)) for _ in sides)],
        ["models that run after the cut", *(str(len(ran[s])) for s in sides)],
        ["outputs within 1e-4 of the masked model's", *(str(len(exact[s])) for s in sides)],
        [f"share of parameters left, median of the {len(both)} that both cut", *(f"{share[s]:.3f}" for s in sides)],
    ]
    if times:
        cells.append(
            [f"seconds, beside Rarefy, mean of {len(times)}", "1.00", f"{statistics.geometric_mean(times):.2f}"]
        )
    text = table(["torchvision, half of all channels", *sides.values()], cells)
    return marked(rows, f"**{rows[-1]['label']}, 1 thread**\n\n{text}")


def _seconds(row: Row) -> float:
    return row["seconds"]


# Quantization, low rank, codebooks

WAYS = {
    "dense": "dense",
    "int8": "8 bits, a scale per output",
    "int8, inputs too": "the same, inputs in 8 bits too",
    "int4 by 64, rtn": "4 bits, groups of 64, nearest, range",
    "int4 by 64, mse": "4 bits, groups of 64, nearest, least squares",
    "int4 by 64, hqq": "4 bits, groups of 64, nearest, half-quadratic",
    "llmcompressor, int4 by 64, AWQ": "llmcompressor 0.14: 4 bits, groups of 64, AWQ",
    "llmcompressor, int4 by 64, GPTQ": "llmcompressor 0.14: 4 bits, groups of 64, GPTQ",
    "int4 by 64, obs": "4 bits, groups of 64, GPTQ alone (`asymmetric: 0`)",
    "int4 by 64, corrected": "4 bits, groups of 64, GPTQ, earlier layers corrected (`int4`)",
    "uint4 by 64, rtn": "4 bits asymmetric, nearest",
    "uint4 by 64, obs": "4 bits asymmetric, GPTQ alone",
    "50 %": "50 % zeros (ADMM)",
    "50 %, int8": "50 % zeros (ADMM), then 8 bits (`sparse50-int8`)",
    "2:4, then int4 by 64, rtn": "2:4, then 4 bits nearest",
    "2:4, then int4 by 64": "2:4, then 4 bits, GPTQ alone",
    "2:4 and int4 by 64 at once": "2:4 and 4 bits at once, GPTQ alone",
    "2:4 and int4 by 64 at once, corrected": "2:4 and 4 bits at once, earlier layers corrected (`2of4-int4`)",
    "codebook of 4 bits": "16 values per layer (k-means)",
    "svd, 10 % less": "10 % fewer weights, plain SVD",
    "whitened svd, 10 % less": "10 % fewer weights, whitened SVD (`lowrank`)",
    "svd, 20 % less": "20 % fewer weights, plain SVD",
    "whitened svd, 20 % less": "20 % fewer weights, whitened SVD",
}


def quantize_language() -> str:
    """A rotated SmolLM2-135M with fewer bits or values: perplexity and bytes."""
    last = {r["way"]: r for r in required("values", run="language")}
    cells = [
        [name, f"{last[way]['perplexity']:,.2f}", f"{last[way]['of bf16']:.3f}" if "of bf16" in last[way] else "",
         seconds_of(last[way])]
        for way, name in WAYS.items() if way in last
    ]  # fmt: skip
    shown = [last[way] for way in WAYS if way in last]
    return marked(shown, table(["method", "perplexity", "bytes of its layers / bf16", "seconds"], cells))


def quantize_minilm() -> str:
    """MiniLM with fewer bits: retrieval and cosine."""
    names = {"int4 by 32": "4 bits, groups of 32, nearest", "int4 by 32, obs": "4 bits, groups of 32, GPTQ alone"}
    names |= {"uint4 by 32, obs": "4 bits asymmetric, groups of 32, GPTQ alone"}
    names |= {"int8, inputs too": "8 bits, inputs too"}
    rows = latest(required("values", run="minilm"), "way")
    cells = [[names.get(r["way"], r["way"]), f"{r['R@1']:.1f}", f"{r['cosine']:.3f}"] for r in rows]
    return marked(rows, table(["weights", "R@1, %", "cosine with dense"], cells))


def quantize_fashion() -> str:
    """A small ResNet on Fashion-MNIST with fewer bits: accuracy and bytes."""
    rows = latest(required("values", run="fashion"), "way")
    cells = [
        [
            r["way"],
            f"{100 * r['accuracy']:.2f}",
            f"{100 * r['trained']:.2f}" if "trained" in r else "",
            f"{r['bytes']:,}",
        ]
        for r in rows
    ]
    return marked(rows, table(["method", "accuracy, %", "after training, %", "bytes on disk"], cells))


def quantize_decode() -> str:
    """The rotated SmolLM2-135M in eager torch with accelerate_: tokens per second."""

    def make(rows: list[Row]) -> str:
        size = {r["way"].removesuffix(": bytes"): r for r in rows if r["way"].endswith(": bytes")}
        dense = required("values", run="language", way="dense")[-1]["perplexity"]
        cells = [
            [way, f"{size[way]['perplexity']:.2f}" if way in size else f"{dense:.2f} in fp32",
             number(size[way]["bytes"] / 1e6) if way in size else "", number(r["decode"]), number(r["prefill"])]
            for r in rows if "decode" in r and (way := r["way"])
        ]  # fmt: skip
        return table(["weights", "perplexity", "MB in memory", "decode, tokens/s", "prompt, tokens/s"], cells)

    return per_machine(latest(required("values", run="decode"), "label", "way"), make)


def low_rank() -> str:
    """MiniLM's wide layers as low-rank factors: quality and ms."""

    def make(rows: list[Row]) -> str:
        cells = [
            [r["way"], f"{r['R@1']:.1f}", f"{r['cosine']:.3f}"]
            + [speedup(r[f"dense, {n} x 128, ms"], r[f"thin, {n} x 128, ms"]) for n in (1, 16)]
            for r in rows
        ]
        return table(["ranks chosen by time", "R@1, % (dense 61.8)", "cosine", "1 x 128, ms", "16 x 128, ms"], cells)

    return per_machine(latest(required("values", run="lowrank"), "way"), make)


# Training


def train_fashion() -> str:
    """Small ResNets on Fashion-MNIST trained to high sparsity: accuracy in percent."""
    rows = latest([r for r in required("train") if r["run"].startswith("fashion")], "run", "way", "sparsity", "seed")
    cells = []
    for run, same in by(rows, "run").items():
        for (way, sparsity), _ in {(r["way"], r["sparsity"]): r for r in same}.items():
            seeds = [r for r in same if (r["way"], r["sparsity"]) == (way, sparsity)]
            accuracy = spread([r["accuracy"] for r in seeds])
            name = run.removeprefix("fashion").strip(", ") or "8 epochs"
            cells.append(
                [
                    name,
                    f"{seeds[0]['parameters']:,}",
                    way.replace("taught", "with a teacher"),
                    percent(sparsity),
                    accuracy,
                    str(len(seeds)),
                ]
            )
    return marked(rows, table(["run", "parameters", "method", "zeros", "accuracy, %", "seeds"], cells))


def train_language() -> str:
    """SmolLM2-135M pruned and trained for 90 steps with the dense model as teacher: perplexity."""
    rows = [r for r in latest(required("train", run="language"), "way") if r["way"] != "dense"]
    dense = required("train", run="language", way="dense")[-1]["perplexity"]
    cells = [
        [r["way"], f"{dense:.2f}", f"{r['one shot']:.2f}", f"{r['perplexity']:.2f}", seconds_of(r, "training")]
        for r in rows
    ]
    return marked(rows, table(["zeros", "dense", "one shot (ADMM)", "after 90 steps", "seconds of training"], cells))


def train_minilm() -> str:
    """MiniLM with 80 % zeros in 4x1 blocks, trained, on the engine: cosine and ms."""

    def make(rows: list[Row]) -> str:
        cells = [
            [r["way"].replace("taught", "with a teacher"), f"{r['cosine']:.3f}", number(r["training"])]
            + [speedup(r[f"dense, {n} x 128, ms"], r[f"ours, {n} x 128, ms"]) for n in (1, 16)]
            for r in rows
        ]
        head = ["method", "cosine with dense", "training, s", "1 x 128, eager dense -> engine, ms", "16 x 128, ms"]
        return table(head, cells)

    return per_machine(required("train", run="minilm")[-1:], make)


TABLES: dict[str, Callable[[], str]] = {
    "low-rank": low_rank,
    "one-shot": one_shot,
    "one-shot-minilm": one_shot_minilm,
    "permute": permute,
    "quantize-decode": quantize_decode,
    "quantize-fashion": quantize_fashion,
    "quantize-language": quantize_language,
    "quantize-minilm": quantize_minilm,
    "structured-coverage": structured_coverage,
    "structured-fashion": structured_fashion,
    "structured-language": structured_language,
    "structured-resnet50": structured_resnet50,
    "train-fashion": train_fashion,
    "train-language": train_language,
    "train-minilm": train_minilm,
    "vision": vision,
}
