"""Tables of what was timed: language models, whole models, sparse layers, kernels, and the demo's receipt."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable

import search_tables
from provenance import BENCHMARKS, newest_run, ratio
from records import (
    NotMeasured,
    Row,
    by,
    eager_speedups,
    is_quiet,
    latest,
    mark,
    model_name,
    not_measured,
    number,
    per_machine,
    percent,
    read,
    receipt,
    required,
    speedup,
    table,
    tried,
)

# Language models on the engine

WEIGHTS = {
    "Q8_0": "8-bit Q8_0",
    "Q6_K": "6-bit Q6_K",
    "Q4_K_M": "4-bit Q4_K_M",
    "IQ4_NL": "4-bit IQ4_NL",
    "Q4_1": "4-bit Q4_1",
    "Q4_0": "4-bit Q4_0",
    "F32": "fp32",
    "fp32": "fp32",
    "8 bits": "8 bits",
}
WEIGHTS |= {
    "6 bits": "6 bits, groups of 32",
    "4 bits": "4 bits, groups of 32",
    "4 bits, calibrated": "4 bits, groups of 32, GPTQ",
    "50 %, 8 bits": "50 % zeros, 8 bits",
    "70 %, 8 bits": "70 % zeros, 8 bits",
    "Q8_0 file": "the file in Q8_0",
    "Q4_0 file": "the file in Q4_0",
    "Q4_1 file": "the file in Q4_1",
}
FOUR_BITS = ("Q4_0", "Q4_1", "IQ4_NL", "Q4_K_M")
RIVALS = {  # llama.cpp's files of this size: a row of ours is compared with the fastest of them
    "fp32": ("F32",),
    "8 bits": ("Q8_0",),
    "6 bits": ("Q6_K",),
    "4 bits": FOUR_BITS,
    "4 bits, calibrated": FOUR_BITS,
    "Q8_0 file": ("Q8_0",),
    "Q4_0 file": ("Q4_0",),
    "Q4_1 file": ("Q4_1",),
}
NOT_IN_README = ("F32", "fp32", "6 bits", "Q6_K", "Q4_K_M", "4 bits", "50 %, 8 bits", "70 %, 8 bits", "Q8_0 file")


ENGINE_NAMES = {"rarefy": "Rarefy", "llama.cpp": "llama.cpp"}


def _language() -> list[Row]:
    """Return the records of each machine's newest run."""
    runs = [newest_run(same) for same in by(required("language"), "label").values()]
    rows = latest([row for run in runs for row in run], "label", "engine", "file")
    names = list(WEIGHTS)
    return sorted(rows, key=lambda row: (row["label"], row["engine"], names.index(row["file"])))


def _engine_name(row: Row) -> str:
    return f"{'Rarefy' if row['engine'] == 'rarefy' else row['engine']}, {WEIGHTS.get(row['file'], row['file'])}"


def language() -> str:
    """SmolLM2-135M on the engine and on llama.cpp: size, perplexity and tokens per second, with ratios to RIVALS."""

    def make(rows: list[Row]) -> str:
        def speed(row: Row, phase: str) -> str:
            beside = _beside_rivals(row, rows)
            return number(row[phase][1]) + (f" ({beside[phase]:.2f}x)" if beside else "")

        cells = [
            [
                _engine_name(r),
                number(r["bytes"] / 1e6),
                f"{r['perplexity']:.2f}",
                speed(r, "decode"),
                speed(r, "prefill"),
            ]
            for r in rows
        ]
        head = ["engine, weights", "MB", "perplexity", "decode, tokens/s", "prompt of 512, tokens/s"]
        return "\n\n".join(
            filter(None, [table(head, cells), _losses(rows, "llama.cpp is faster"), _zeros(rows), tried(rows)])
        )

    return per_machine(_language(), make)


PHASES = {"decode": "decode", "prefill": "prompts"}


def _speeds(row: Row, base: Row) -> dict[str, float]:
    """Return how many times as fast a record is as another one of its run, by phase."""
    return {title: ratio(row, base, lambda r, p=phase: r[p][1]) for phase, title in PHASES.items()}


def _beside_rivals(row: Row, rows: list[Row]) -> dict[str, float]:
    """Return how many times as fast as llama.cpp's fastest file of its size a row of ours is; {} if there is none."""
    names = RIVALS.get(row["file"], ()) if row["engine"] == "rarefy" else ()
    rivals = [r for r in rows if r["engine"] == "llama.cpp" and r["file"] in names]
    return {p: min(ratio(row, r, lambda r, p=p: r[p][1]) for r in rivals) for p in PHASES} if rivals else {}


def _losses(rows: list[Row], start: str) -> str:
    """Return a paragraph, which starts so, about where llama.cpp is faster in one run; "" if nowhere."""
    losses = [
        f"{WEIGHTS[row['file']]}, {PHASES[phase]} ({times:.2f}x)"
        for row in rows
        for phase, times in _beside_rivals(row, rows).items()
        if times < 1
    ]
    return f"{start}: {'; '.join(losses)}." if losses else ""


def _zeros(rows: list[Row]) -> str:
    """Return a paragraph about zeros beside 8 bits without zeros in one run; "" if one of them was not measured."""
    ours, texts = {r["file"]: r for r in rows if r["engine"] == "rarefy"}, []
    for file in ("50 %, 8 bits", "70 %, 8 bits"):
        if file in ours and "8 bits" in ours:
            gains = " and ".join(f"{x:.2f}x ({t})" for t, x in _speeds(ours[file], ours["8 bits"]).items())
            texts.append(f"{WEIGHTS[file]}: {gains} as fast as without zeros.")
    return " ".join(texts)


def large_language() -> str:
    """Random models of 1.1 and 3 billion weights: tokens a second, and how fast weights are read."""

    def make(rows: list[Row]) -> str:
        cells = [
            [
                f"{r['model']}, {r['file']}",
                ENGINE_NAMES[r["engine"]],
                f"{r['decode'][1]:.1f}",
                f"{r['read'] / 1e9:.2f}",
                f"{(rate := r['read'] * r['decode'][1]) / 1e9:.1f}",
                f"{r['memory'] / 1e9:.1f}",
                percent(rate / r["memory"]),
            ]
            for r in rows
        ]
        head = ["file", "engine", "tokens/s", "GB of a token", "GB/s", "memory, GB/s", "share"]
        return table(head, cells)

    rows = [r for same in by(required("large_language"), "label").values() for r in newest_run(same)]
    return per_machine(rows, make)


TRIED = "Other engines run with the fastest of [several settings](docs/results/{page}.md)."  # below README's tables


def readme() -> str:
    """README's table: the rows of `language` of the machine that was measured last, perplexity beside each speed.

    The sentences below it say how many times as fast as llama.cpp the engine is.
    """
    label = required("language")[-1]["label"]
    rows = [r for r in _language() if r["label"] == label]
    shown = sorted((r for r in rows if r["file"] not in NOT_IN_README), key=lambda r: r["engine"] == "rarefy")
    cells = [
        [_engine_name(r), number(r["bytes"] / 1e6), f"{r['perplexity']:.2f}"]
        + [number(r[phase][1]) for phase in ("decode", "prefill")]
        for r in shown
    ]
    head = ["SmolLM2-135M, engine and weights", "MB", "perplexity", f"{label}: decode, tokens/s", "prompt, tokens/s"]
    below = f"{mark(rows)} {TRIED.format(page='language-models')}"
    return "\n\n".join(filter(None, [table(head, cells), below, _readme_gains(rows, label)]))


def _readme_gains(rows: list[Row], label: str) -> str:
    """Return sentences about the ratios of rows of README's table; "" where one of the rows was not measured."""
    found = {(r["engine"], r["file"]): r for r in rows}
    names = ("Q8_0 file", "Q4_0 file", "Q4_1 file", "8 bits", "4 bits, calibrated")
    beside = [_beside_rivals(found["rarefy", n], rows) if ("rarefy", n) in found else {} for n in names]
    if not all(beside):
        return ""
    eight_file, four_file, odd_file, eight, four = ([f"{x:.1f}x" for x in speeds.values()] for speeds in beside)
    theirs = [found["llama.cpp", n] for n in FOUR_BITS if n != "Q4_1" and ("llama.cpp", n) in found]
    qualities = ", ".join(f"{r['file']} {r['perplexity']:.2f}" for r in theirs)
    return (
        f"- **Beside llama.cpp**: the same Q8_0 file generates text {eight_file[0]} and reads prompts {eight_file[1]} "
        f"as fast, Q4_0 {four_file[0]} and {four_file[1]}. Q4_1, for which llama.cpp has no repacked kernel, is "
        f"{odd_file[0]} and {odd_file[1]}. From PyTorch, 8 bits are {eight[0]} and {eight[1]}. "
        f"In 4 bits, rounded by GPTQ on 16 articles, Rarefy is "
        f"{four[0]} and {four[1]} as fast as the fastest of llama.cpp's 4-bit files. Perplexity: "
        f"{found['rarefy', '4 bits, calibrated']['perplexity']:.2f}; with an importance matrix of the same articles "
        f"{qualities}. These weights were published in Q4_1, so Q4_1 loses nothing here."
        + _losses(rows, "\n- **Where llama.cpp is faster**")
        + _readme_search(label)
    )


def _readme_search(label: str) -> str:
    """Return a sentence about what a search found for the language model on a machine; "" where there was none."""
    rows = [r for r in read("optimize", run="smollm2") if r["label"] == label]
    if not rows:
        return ""
    row = min(latest(rows, "seed"), key=lambda r: r["seed"])
    found, dense = row["compared"]["found"], row["compared"]["dense, fp32"]
    bits = " and ".join(sorted(set(re.findall(r"in (\d) bits", row["best"]))))
    cache = " and an 8-bit KV cache" if "8-bit cache" in row["best"] else ""
    even = search_tables.share(row, "decode")
    return (
        f"\n- **[A search](docs/results/optimize.md)**, on weights never rounded to 4 bits, chose {bits} bits{cache}: "
        f"{search_tables.times_as_fast(row, 'dense, int8', 'decode'):.1f}x as fast as 8 bits, {even:.2f}x as fast as "
        f"the same bits spread evenly. Perplexity: {found['quality']:.2f}, fp32 {dense['quality']:.2f}."
    )


# Whole models

ENGINES = {
    "eager, dense": ("eager torch, fp32", "exact"),
    "compiled": ("torch.compile, fp32", "exact"),
    "onnxruntime": ("ONNX Runtime, fp32", "exact"),
    "openvino": ("OpenVINO, fp32", "exact"),
    "ours, dense": ("Rarefy, dense fp32", "exact"),
    "ours, bf16": ("Rarefy, dense bf16", "cosine"),
    "ours, int8": ("Rarefy, dense 8 bits", "cosine"),
    "openvino bf16": ("OpenVINO, bf16", "cosine"),
    "onnxruntime int8": ("ONNX Runtime, int8", "cosine"),
    "openvino int8": ("OpenVINO, int8", "cosine"),
    "ours, 80 %": ("Rarefy, 80 % zeros, fp32", "timing only"),
    "ours, 90 %": ("Rarefy, 90 % zeros, fp32", "timing only"),
    "ours, 4x1, 80 %": ("Rarefy, 80 % zeros in 4x1 blocks, fp32", "timing only"),
    "ours, int8, 4x1, 80 %": ("Rarefy, 80 % zeros in 4x1 blocks, 8 bits", "timing only"),
    "ours, int8, 1x4, 60 %": ("Rarefy, 60 % zeros in 1x4 blocks, 8 bits", "timing only"),
    "ours, int8, 1x4, 80 %": ("Rarefy, 80 % zeros in 1x4 blocks, 8 bits", "timing only"),
}


ENGINE_CASES = {
    ("minilm", 1): "MiniLM 1 x 128, ms",
    ("minilm", 16): "16 x 128, ms",
    ("resnet50", 1): "ResNet-50 1 image, ms",
    ("resnet50", 16): "16 images, ms",
    ("vit_b_16", 1): "ViT-B/16 1 image, ms",
    ("vit_b_16", 8): "8 images, ms",
    ("convnext_tiny", 1): "ConvNeXt-T 1 image, ms",
    ("convnext_tiny", 8): "8 images, ms",
}


def engine() -> str:
    """Compiled models beside other engines, ms per call."""

    def make(rows: list[Row]) -> str:
        found = {(r["model"], r["batch"]): r for r in rows}
        cases = [case for case in ENGINE_CASES if case in found]
        cells = [
            [name, _quality(key, quality, rows), *(number(found[c][key][1]) if key in found[c] else "" for c in cases)]
            for key, (name, quality) in ENGINES.items()
            if any(key in r for r in rows)
        ]
        text = table(["engine", "quality", *(ENGINE_CASES[c] for c in cases)], cells)
        losses = [loss for case in cases for loss in _engine_losses(found[case])]
        return "\n\n".join(filter(None, [text, f"Where we lose: {'; '.join(losses)}." if losses else "", tried(rows)]))

    return per_machine(latest(required("engine"), "label", "model", "batch"), make)


SAME_PRECISION = {  # engines that a row of ours is compared with
    "ours, dense": ("compiled", "onnxruntime", "openvino"),
    "ours, bf16": ("openvino bf16",),
    "ours, int8": ("onnxruntime int8", "openvino int8"),
}


def _engine_losses(row: Row) -> list[str]:
    """Return where another engine is faster with the same precision in one record."""
    losses = []
    for ours, others in SAME_PRECISION.items():
        best = min((n for n in others if n in row), key=lambda n: row[n][1], default=None)
        if ours in row and best and row[best][1] < row[ours][1]:
            times = " ms, ".join(f"{ENGINES[n][0]} {number(row[n][1])}" for n in (ours, best))
            losses.append(f"{MODELS[row['model']]}, batch {row['batch']}: {times}")
    return losses


def patterns() -> str:
    """MiniLM in 8 bits, pruned in one shot: R@1, and how many times as fast as dense in 8 bits."""

    def make(rows: list[Row]) -> str:
        cases = list(dict.fromkeys(c for r in rows for c in r.get("milliseconds", {})))
        cells = [
            [r["pattern"], f"{100 * r['sparsity']:.0f} %" if r["sparsity"] else "-", f"{r['R@1']:.1f}"]
            + [_times_as_fast(r, c) for c in cases]
            for r in rows
        ]
        heads = [f"{isa}, {batch} x 128" for isa, batch in (c.split(", ") for c in cases)]
        return table(["pattern", "zeros", "R@1, %", *heads], cells)

    return per_machine(latest(required("patterns"), "label", "pattern", "sparsity"), make)


def _times_as_fast(row: Row, case: str) -> str:
    """Return the ratio of medians, and the milliseconds."""
    found = row.get("milliseconds", {}).get(case)
    return f"{found['dense'][1] / found['pruned'][1]:.2f}x ({found['pruned'][1]:.1f} ms)" if found else "1"


RECALLS = {"articles": "R@1 articles", "brown": "R@1 Brown", "manuals": "R@1 manuals"}  # tests of frontier.py


def frontier() -> str:
    """MiniLM as it is deployed: quality of the very model that was timed, and its time."""
    columns = {**RECALLS, "categories": "categories, %", "cosine": "cosine"}
    tables, limited = _frontier("minilm", columns, " x 128"), "minilm, avx512"
    if read("frontier", run=limited):
        tables += f"\n\nAll engines limited to VNNI:\n\n{_frontier(limited, columns, ' x 128')}"
    return tables


def embeddings() -> str:
    """`encode` of sentence-transformers with each engine: quality of the very model that was timed, and texts/s."""

    def make(rows: list[Row]) -> str:
        row = rows[-1]
        quality, times = row["quality"], row["milliseconds"]
        best = {n: _fastest_rival(times[n])[1] for n in ("all", "one")}
        cells = []
        for name, told in quality.items():
            all_ms, one_ms = times["all"][name][1], times["one"][name][1]
            faster = (best["all"] / all_ms, best["one"] / one_ms)
            rate = f"{number(1000 * row['texts'] / all_ms)} ({faster[0]:.2f}x)"
            cells.append(
                [
                    model_name(name),
                    f"{told['cosine']:.4f}",
                    f"{told['articles']:.1f}",
                    rate,
                    f"{number(one_ms)} ({faster[1]:.2f}x)",
                ]
            )
        text = table(["MiniLM", "cosine", "R@1 articles, %", "texts/s", "one text, ms"], cells)
        return f"{text}\n\n{tried([row])}".rstrip()

    return per_machine(latest(required("embeddings"), "label"), make)


def spread() -> str:
    """How many more of the queries each model answers than the dense one, with its interval, for each seed."""

    def gains(same: list[Row], test: str) -> str:
        return "; ".join("{gain:+.1f} ({0:+.1f} to {1:+.1f})".format(*r[test]["interval"], **r[test]) for r in same)

    def make(rows: list[Row]) -> str:
        models = [(name, same) for name, same in by(rows, "name").items() if name != "eager"]
        tests = [test for test in RECALLS if all(test in r for r in rows)]
        cells = [[model_name(name), *(gains(same, test) for test in tests)] for name, same in models]
        return table(["model", *(f"{RECALLS[test]}, beside dense" for test in tests)], cells)

    return per_machine(latest(required("spread"), "label", "name", "seed"), make)


def dynamo() -> str:
    """`torch.compile(backend="rarefy")`: the fastest call of each model beside eager torch's."""

    def make(rows: list[Row]) -> str:
        cells = [
            [
                r["model"].removeprefix("timm."),
                f"{r['ms']['eager']:.2f}",
                f"{r['ms']['compiled']:.2f} ({r['speedup']:.2f}x)",
                f"{r['dynamo_alone']:.2f}x" if "dynamo_alone" in r else "",
            ]
            for r in sorted(rows, key=lambda r: -r["speedup"])
        ]
        return table(["model", "eager, ms", "compiled, ms", "eager graphs by Dynamo"], cells)

    return per_machine(latest(required("dynamo", precision=None), "label", "model"), make)


def frontier_images() -> str:
    """The same of image classifiers."""
    labels = {
        "efficientnet": ("EfficientNet-Lite0", {"agreement": "agreement, %", "probe": "probe, %"}),
        "fashion": ("Small ResNet, Fashion-MNIST", {"accuracy": "accuracy, %"}),
    }
    parts = []
    for run, (title, columns) in labels.items():
        try:
            parts.append(f"### {title}\n\n{_frontier(run, columns)}")
        except NotMeasured as error:
            parts.append(f"### {title}\n\n{error}")
    return "\n\n".join(parts)


def _frontier(run: str, columns: dict[str, str], size: str = "") -> str:
    """Return a table per machine: quality of each deployed model, and its times beside those of the fastest other
    engine in 8 bits."""

    def make(rows: list[Row]) -> str:
        row = rows[-1]
        known = {q: title for q, title in columns.items() if all(q in told for told in row["quality"].values())}
        times = row["milliseconds"]
        best = {batch: _fastest_rival(same) for batch, same in times.items()}
        last = list(times)[-1]
        names = sorted(row["quality"], key=lambda n: times[last][n][1] if n in times[last] else math.inf, reverse=True)
        cells = [
            [model_name(name), *(f"{row['quality'][name][q]:.{3 if q == 'cosine' else 1}f}" for q in known)]
            + [_beside(times[batch].get(name), best[batch]) for batch in times]
            for name in names
        ]
        head = ["model", *known.values(), *(f"{batch}{'' if 'x' in batch else size}, ms" for batch in times)]
        return "\n\n".join(filter(None, [table(head, cells), _model_and_engine(row), tried([row])]))

    return per_machine(latest(required("frontier", run=run), "label"), make)


def _fastest_rival(times: dict[str, list[float]]) -> list[float]:
    """Return the times of the dense model in the fastest engine in 8 bits that is not Rarefy."""
    others = (
        t for name, t in times.items() if "int8" in name and not name.startswith("ours") and "trained" not in name
    )
    return min(others, key=lambda t: t[1])


def _model_and_engine(row: Row) -> str:
    """Return a table of what a student's cut gives and what the engine gives; "" without students in other engines.

    The cut: the dense model over the student, both in the fastest other engine in 8 bits. The engine: the student there
    over the student in Rarefy.
    """
    cells, sizes = [], row["milliseconds"]
    for name in row["quality"]:
        student = name.removeprefix("ours, ").removesuffix(", int8")
        others = [n for n in row["quality"] if n.endswith(f"int8, {student}")]
        if name.startswith("ours") and others:
            cells.append([model_name(student)])
            for times in sizes.values():
                dense, cut = _fastest_rival(times)[1], min(times[n][1] for n in others)
                ours = times[name][1]
                cells[-1].append(f"{dense / cut:.2f}x · {cut / ours:.2f}x = {dense / ours:.2f}x")
    if not cells:
        return ""
    text = "The cut (dense over student, in the fastest other engine) · the engine (student there over student here):"
    return f"{text}\n\n{table(['student in 8 bits', *sizes], cells)}"


def _beside(time: list[float] | None, other: list[float]) -> str:
    """Return a median and how many times as fast as the other it is."""
    return f"{number(time[1])} ({other[1] / time[1]:.2f}x)" if time else ""


def _quality(key: str, quality: str, rows: list[Row]) -> str:
    """Return the smallest cosine of each model with the same weights in eager torch where that is the quality."""
    if quality != "cosine":
        return quality
    cosines: dict[str, float] = {}
    for row in rows:
        if key in row.get("cosines", {}):
            model, cosine = MODELS[row["model"]], row["cosines"][key]
            cosines[model] = min(cosine, cosines.get(model, cosine))
    return ", ".join(f"{model} {cosine:.4f}" for model, cosine in cosines.items()) or "not recorded"


README_ENGINES = (
    "openvino fp32",
    "openvino bf16",
    "onnxruntime int8",
    "openvino int8",
    "openvino int8, narrower-0, trained",
    "openvino int8, narrowest-0, trained",
    "ours, int8",
    "ours, narrower-0, trained, int8",
    "ours, narrowest-0, trained, int8",
)


def readme_minilm() -> str:
    """README's table of MiniLM: engines at their best settings, each with the quality of what was timed."""
    row = required("frontier", run="minilm")[-1]
    best = {batch: _fastest_rival(times) for batch, times in row["milliseconds"].items()}
    tests = [test for test in RECALLS if test in row["quality"]["eager"]]
    cells = [
        [
            model_name(key),
            *(f"{row['quality'][key][q]:.1f}" for q in tests),
            f"{row['quality'][key]['cosine']:.3f}",
            *(_beside(row["milliseconds"][batch][key], time) for batch, time in best.items()),
        ]
        for key in README_ENGINES
        if key in row["quality"]
    ]
    head = [f"MiniLM on {row['label']}", *(f"{RECALLS[test]}, %" for test in tests), "cosine"]
    text = table([*head, *(f"{size} tokens, ms" for size in best)], cells)
    below = f"{mark([row])} {TRIED.format(page='frontier')}"
    return f"{text}\n\n{below}"


def memory() -> str:
    """Resident memory of compiled models, MB."""
    names = {"loaded": "loaded", "peak": "peak", "weights": "weights", "plans": "work space", "outputs": "outputs"}

    def make(rows: list[Row]) -> str:
        cells = [
            [
                r["model"].replace("made here", "compiled in the process"),
                *(number(r[n] / 1e6) for n in names),
                f"{r['times']:.2f}",
            ]
            for r in rows
        ]
        return table(["model", *(f"{n}, MB" for n in names.values()), "peak / (weights + work space + outputs)"], cells)

    return per_machine(latest(required("memory"), "label", "model"), make)


def conformance() -> str:
    """How many architectures compile and return what eager torch returns."""

    def make(every: list[Row]) -> str:
        rows = latest(every, "model")
        equal = [r for r in rows if r["status"] == "equal"]
        others = ", ".join(f"{r['model']} ({r['status']})" for r in rows if r["status"] != "equal") or "none"
        worst = max(r["distance"] for r in equal)
        quiet = [r for r in every if is_quiet(r)]
        speeds = [f"{label.capitalize()}: {text}." for label, text in eager_speedups(quiet).items()]
        counts = table(
            [
                "models tried",
                "outputs equal eager's",
                "largest relative difference",
                "not equal or over the time limit",
            ],
            [[str(len(rows)), str(len(equal)), f"{worst:.1e}", others]],
        )
        return "\n\n".join([counts, *speeds])

    return per_machine(latest(required("conformance"), "label", "model", "threads"), make)


# Sparse layers in eager torch

MODELS = {
    "minilm": "MiniLM",
    "smollm2-135m": "SmolLM2",
    "resnet50": "ResNet-50",
    "vit_b_16": "ViT-B/16",
    "convnext_tiny": "ConvNeXt-T",
    "fashion": "Fashion-MNIST network",
}
UNITS = {"minilm": "x 128 tokens", "smollm2-135m": "token(s)", "resnet50": "image(s)", "fashion": "image(s)"}


def accelerate() -> str:
    """Models run by accelerate_ in eager torch, ms: dense and with zeros skipped."""

    def make(rows: list[Row]) -> str:
        columns = [("fp32", "unstructured", s) for s in (0.5, 0.8, 0.9)] + [("fp32", "4x1", s) for s in (0.8, 0.9)]
        columns += [("int8", "1x4", 0.9), ("bf16", "unstructured", 0.5), ("bf16", "4x1", 0.8)]
        found = {(r["model"], r["batch"], r.get("numbers", "fp32"), r["pattern"], r["sparsity"]): r for r in rows}
        columns = [c for c in columns if any(key[2:] == c for key in found)]
        cells = []
        for model, batch in dict.fromkeys(key[:2] for key in found):
            line = [f"{MODELS[model]}, {batch} {UNITS[model]}"]
            for column in columns:
                r = found.get((model, batch, *column))
                line.append(speedup(r["dense"][1], r["ours"][1]) if r else "")
            cells.append(line)
        names = [f"{p}, {percent(s)}" + ("" if n == "fp32" else f", {n}") for n, p, s in columns]
        return table(["dense -> sparse, ms", *names], cells)

    rows = [r for r in required("models") if "compiled" not in r]  # without other engines' threads in the process
    rows = latest(rows, "label", "model", "batch", "numbers", "pattern", "sparsity")
    return per_machine(rows, make)


def accelerate_engines() -> str:
    """The same dense models on other engines, ms; ours at 80 % in eager torch."""

    def make(rows: list[Row]) -> str:
        cells = [
            [f"{MODELS[r['model']]}, {r['batch']} {UNITS[r['model']]}"]
            + [number(r[n][1]) if n in r else "" for n in ("ours", "compiled", "onnxruntime", "openvino")]
            for r in rows
        ]
        head = ["ms", "Rarefy, eager torch, 80 % zeros", "torch.compile", "ONNX Runtime", "OpenVINO"]
        return f"{table(head, cells)}\n\n{tried(rows)}".rstrip()

    rows = [r for r in read("models") if "compiled" in r]
    if not rows:
        raise NotMeasured(not_measured(BENCHMARKS["models/engines"]))
    return per_machine(latest(rows, "label", "model", "batch"), make)


def kernels() -> str:
    """Speed-up of sparse kernels over torch's dense ones: geometric mean over shapes."""

    def make(rows: list[Row]) -> str:
        cells = []
        keys = ("format", "kind", "pattern", "batch")
        sparsities = sorted({r["sparsity"] for r in rows})
        for key in dict.fromkeys(tuple(r[k] for k in keys) for r in rows):
            line = [str(part) for part in key]
            for s in sparsities:
                ratios = [
                    r["dense"][1] / r["ours"][1] for r in rows if (*(r[k] for k in keys), r["sparsity"]) == (*key, s)
                ]
                line.append(f"{math.exp(statistics.mean(map(math.log, ratios))):.2f}x" if ratios else "")
            cells.append(line)
        head = ["storage", "number format", "pattern", "batch"]
        return table([*head, *(percent(s) for s in sparsities)], cells)

    rows = [r for r in required("runtime") if r["format"] != "overhead"]
    return per_machine(latest(rows, "label", "format", "kind", "shape", "batch", "pattern", "sparsity"), make)


def demo() -> str:
    """The receipt of `make demo`."""
    row = receipt("demo")
    quality, disk, settings = row["quality"], row["disk"], row["settings"]
    lines = [
        ("perplexity", f"{quality['before']:.2f}", f"{quality['after']:.2f}", f"{quality['change']:+.1%}"),
        ("bytes on disk", f"{disk['before']:,}", f"{disk['after']:,}", f"{disk['after'] / disk['before']:.2f}x"),
    ]
    for item in row["speed"]:
        before, after = (item[side]["tokens_per_second"] for side in ("before", "after"))
        lines.append((f"{item['what']}, {item['unit']}", number(before), number(after), f"{after / before:.2f}x"))
        if "accelerated" in item:
            after = item["accelerated"]["tokens_per_second"]
            lines.append(("  with sparse layers", number(before), number(after), f"{after / before:.2f}x"))
    text = "\n".join(f"{a:<32} {b:>14} {c:>14} {d:>8}" for a, b, c, d in [("", "before", "after", "change"), *lines])
    pruned = f"{row['sparsity']['achieved']:.0%} of the weights zero, ".replace("%", " %")
    where = f"{row['label']}, {row['threads']} thread(s), {settings['seconds']:.0f} s"
    sides = f"Before: eager torch, fp32, slow at single tokens. After: the engine, {pruned}8 bits."
    return f"```\n{text}\n```\n\n{sides} {where}. {mark([row])}"


TABLES: dict[str, Callable[[], str]] = {
    "accelerate": accelerate,
    "accelerate-engines": accelerate_engines,
    "conformance": conformance,
    "patterns": patterns,
    "demo": demo,
    "embeddings": embeddings,
    "engine": engine,
    "frontier": frontier,
    "frontier-images": frontier_images,
    "spread": spread,
    "dynamo": dynamo,
    "kernels": kernels,
    "language": language,
    "large-language": large_language,
    "memory": memory,
    "readme": readme,
    "readme-minilm": readme_minilm,
}
