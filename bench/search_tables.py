"""The table of what `rarefy.optimize` found."""

from __future__ import annotations

import re
from collections.abc import Callable

from records import Row, latest, model_name, number, per_machine, read, table

TITLES = {
    "minilm": "MiniLM, R@1 of articles",
    "smollm2": "SmolLM2-135M with weights that were never in 4 bits, perplexity",
    "smollm2-10": "The same SmolLM2-135M, up to 10 % of perplexity lost",
    "efficientnet": "EfficientNet-Lite0, agreement on photographs",
    "fashion": "Small ResNet, accuracy on Fashion-MNIST",
}


def optimize() -> str:
    """What `rarefy.optimize` found, beside a uniform model of the same methods and OpenVINO, in one run."""

    def make(rows: list[Row]) -> str:
        row = min(rows, key=lambda r: r["seed"])
        measured = "distance" in row["compared"]["found"]
        compared, times = dict(row["compared"]), list(next(iter(row["compared"].values()))["milliseconds"])
        if _has_no_uniform(row):
            del compared["uniform"]
        slow = {b: compared["dense, int8"]["milliseconds"][b]["median"] for b in times}
        names = {"found": f"found: {_name_of_best(row)}", "uniform": "the same methods, uniform, not trained"}
        cells = [
            [model_name(names.get(n) or n), _quality(row, n)]
            + ([f"{c['distance']:.2g}" if "distance" in c else ""] if measured else [])
            + [
                f"{number(c['milliseconds'][b]['median'])} ({slow[b] / c['milliseconds'][b]['median']:.2f}x)"
                for b in times
            ]
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
        head = ["model", row["metric"]["name"], *(["distance"] if measured else []), *(f"{b}, ms" for b in times)]
        return f"{table(head, cells)}\n\n{note}{_other_seeds(rows, row)}"

    sections = []
    for run, title in TITLES.items():
        for trained, words in ((False, ""), (True, ", with training")):
            rows = [r for r in read("optimize", run=run) if bool(r.get("train_minutes")) == trained]
            if rows:
                sections.append(f"### {title}{words}\n\n{per_machine(latest(rows, 'label', 'seed'), make)}")
    return "\n\n".join(sections)


def _name_of_best(row: Row) -> str:
    """Return the name of the model that was found; older records say which layers are in fp32 in other words."""
    return re.sub(r" but (.+)$", r", \1 in fp32", row["best"])


def _loss(loss: float, targets: Row) -> str:
    """Return a loss in the unit of its limit."""
    return f"{loss:.3g} points" if "point" in targets.get("max_loss", "") else f"{100 * loss:.3g} %"


def _quality(row: Row, name: str) -> str:
    """Return the quality of a model; accuracies in percent."""
    percent = row["metric"]["name"] == "accuracy" and row["compared"]["found"]["quality"] <= 1
    return f"{(100 if percent else 1) * row['compared'][name]['quality']:.4g}"


def _has_no_uniform(row: Row) -> bool:
    """Return whether a run is of the time when uniform models left the same layers in fp32 as those that were found."""
    found, uniform = row["compared"]["found"], row["compared"]["uniform"]
    return " but " in row["best"] and found.get("distance") == uniform.get("distance")


def _other_seeds(rows: list[Row], row: Row) -> str:
    """Return what was found with other seeds, beside uniform models."""
    texts = []
    for other in rows:
        found, uniform = other["compared"]["found"], other["compared"]["uniform"]
        if other is not row and "distance" in found and not _has_no_uniform(other):
            ratio = max(uniform["milliseconds"][b]["median"] / t["median"] for b, t in found["milliseconds"].items())
            times = " and ".join(number(t["median"]) for t in found["milliseconds"].values())
            texts.append(
                f"- seed {other['seed']}: {model_name(_name_of_best(other))}. "
                f"Quality {_quality(other, 'found')} (uniform {_quality(other, 'uniform')}), "
                f"distance {found['distance']:.2g} ({uniform['distance']:.2g}), "
                f"{times} ms, up to {ratio:.2f}x as fast as uniform."
            )
    return "\n\n" + "\n".join(["Other seeds:", "", *texts]) if texts else ""


TABLES: dict[str, Callable[[], str]] = {"optimize": optimize}
