"""The table of what `rarefy.optimize` found, and what of it is the search's own share."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable

from provenance import BENCHMARKS
from records import Row, latest, model_name, not_measured, number, per_machine, read, table, tried

MIN_SHARE = 1.05  # times as fast as the even spread, below which two measurements of one model differ as much
MIN_GAIN = 1.0  # points of quality, or percent of perplexity, below which a difference is chance
MIN_GAIN_OF_RECALL = 2.0  # points of R@1

TITLES = {
    "minilm": "MiniLM, R@1 of articles",
    "smollm2": "SmolLM2-135M with weights that were never in 4 bits, perplexity",
    "smollm2-10": "The same SmolLM2-135M, up to 10 % of perplexity lost",
    "efficientnet": "EfficientNet-Lite0, agreement on photographs",
    "fashion": "Small ResNet, accuracy on Fashion-MNIST",
}


def optimize() -> str:
    """What `rarefy.optimize` found, beside the same methods spread evenly and OpenVINO, in one run."""
    sections = []
    for run, title in TITLES.items():
        for trained, words in ((False, ""), (True, ", with training")):
            rows = [r for r in read("optimize", run=run) if bool(r.get("train_minutes")) == trained]
            if rows:
                sections.append(f"### {title}{words}\n\n{per_machine(latest(rows, 'label', 'seed'), _of_machine)}")
            elif not trained:
                sections.append(f"### {title}\n\n{not_measured(BENCHMARKS[f'optimize/{run}'])}")
    return "\n\n".join(sections)


def _of_machine(rows: list[Row]) -> str:
    """Return the table of the first seed, its note, and the search's own share with each seed."""
    row = min(rows, key=lambda r: r["seed"])
    measured = "distance" in row["compared"]["found"]
    sized = "bytes" in row["compared"]["found"]
    compared, times = row["compared"], list(next(iter(row["compared"].values()))["milliseconds"])
    names = {"found": f"found: {_name_of_best(row)}", "uniform": "the same methods, spread evenly, not trained"}
    cells = [
        [model_name(names.get(n) or n), _quality(row, n)]
        + ([f"{c['distance']:.2g}" if "distance" in c else ""] if measured else [])
        + ([f"{c['bytes'] / 1e6:.1f}" if "bytes" in c else ""] if sized else [])
        + [f"{number(c['milliseconds'][b]['median'])} ({times_as_fast(row, 'dense, int8', b, n):.2f}x)" for b in times]
        for n, c in compared.items()
    ]
    limits = ", ".join(f"{k} {v}" for k, v in row["targets"].items() if k != "objective")
    limits = limits.replace(" 1 points", " 1 point")  # as older records have it
    training = f", of which {row['train_minutes']:g} were training" if row.get("train_minutes") else ""
    note = f"{row['tried']} models in {row['seconds'] / 60:.0f} minutes{training}. Limit: {limits}."
    expected, real = row["predicted"], row["measured"]
    if "decode" in times and "disk_bytes" in row:
        note += f" The best takes {row['disk_bytes'] / 1e6:.1f} MB on disk."
    if "loss" in expected:
        ratios = [ms / real["milliseconds"][b] for b, ms in expected["milliseconds"].items()]
        predicted, measured_loss = (_loss(r["loss"], row["targets"]) for r in (expected, real))
        note += f" Predicted of the best: loss {predicted} (measured {measured_loss}), "
        note += f"time {', '.join(f'{r:.2f}' for r in ratios)} of the measured."
    head = ["model", row["metric"]["name"], *(["distance"] if measured else []), *(["MB"] if sized else [])]
    shares = "\n".join(f"- {_share_of(r)}" for r in sorted(rows, key=lambda r: r["seed"]))
    text = f"{table([*head, *(f'{b}, ms' for b in times)], cells)}\n\n{note}"
    settings = tried([{"settings": {n: c["settings"] for n, c in compared.items() if "settings" in c}}])
    text = "\n\n".join(filter(None, [text, settings]))
    return f"{text}\n\nThe search's own share, beside the same methods spread evenly:\n\n{shares}"


def times_as_fast(row: Row, base: str, size: str, name: str = "found") -> float:
    """Return how many times as fast as another model of the same record a model is, at a batch size or phase."""
    other, own = (row["compared"][n]["milliseconds"][size]["median"] for n in (base, name))
    return other / own


def share(row: Row, size: str) -> float:
    """Return how many times as fast the searched model is as the same methods spread evenly; training is left out."""
    return times_as_fast(row, "uniform", size, _searched(row))


def _searched(row: Row) -> str:
    """Return the model that the search alone found."""
    return "found, before training" if "found, before training" in row["compared"] else "found"


def _share_of(row: Row) -> str:
    """Return a sentence: times and quality beside the even spread, and whether the search adds anything."""
    name = _searched(row)
    sizes = list(row["compared"][name]["milliseconds"])
    if _has_no_uniform(row):
        return f"seed {row['seed']}: this run measured no even spread."
    times = " and ".join(f"{share(row, size):.2f}x ({size})" for size in sizes)
    text = f"seed {row['seed']}, {model_name(_name_of_best(row))}: {times} as fast, {row['metric']['name']} "
    text += f"{_quality(row, name)}, even spread {_quality(row, 'uniform')}. "
    judged = ["decode"] if "decode" in sizes else sizes  # what the search was to make fast
    gain, faster = _gain(row, name), statistics.geometric_mean(share(row, s) for s in judged) >= MIN_SHARE
    least = MIN_GAIN_OF_RECALL if "R@1" in row["metric"]["name"] else MIN_GAIN
    if gain <= -least:
        return text + "The quality is worse: the search adds nothing."
    added = [word for word, is_added in (("speed", faster), ("quality", gain >= least)) if is_added]
    return text + f"The search adds {' and '.join(added) or 'nothing'}."


def _gain(row: Row, name: str) -> float:
    """Return how much better a model's quality is than that of the even spread: points, or percent of perplexity."""
    own, even = (row["compared"][n]["quality"] for n in (name, "uniform"))
    if row["metric"]["name"] == "perplexity":
        return 100 * (even / own - 1)
    return (100 if _is_fraction(row) else 1) * (own - even)


def _name_of_best(row: Row) -> str:
    """Return the name of the model that was found; older records say which layers are in fp32 in other words."""
    return re.sub(r" but (.+)$", r", \1 in fp32", row["best"])


def _loss(loss: float, targets: Row) -> str:
    """Return a loss in the unit of its limit."""
    return f"{loss:.3g} points" if "point" in targets.get("max_loss", "") else f"{100 * loss:.3g} %"


def _is_fraction(row: Row) -> bool:
    """Return whether accuracies of a record are fractions, not percent."""
    return row["metric"]["name"] == "accuracy" and row["compared"]["found"]["quality"] <= 1


def _quality(row: Row, name: str) -> str:
    """Return the quality of a model; accuracies in percent."""
    return f"{(100 if _is_fraction(row) else 1) * row['compared'][name]['quality']:.4g}"


def _has_no_uniform(row: Row) -> bool:
    """Return whether a run is of the time when uniform models left the same layers in fp32 as those that were found."""
    found, uniform = row["compared"]["found"], row["compared"]["uniform"]
    return " but " in row["best"] and found.get("distance") == uniform.get("distance")


TABLES: dict[str, Callable[[], str]] = {"optimize": optimize}
