"""The table of what `rarefy.optimize` found."""

from __future__ import annotations

from collections.abc import Callable

from records import Row, latest, number, per_machine, read, table

TITLES = {
    "minilm": "MiniLM, R@1 of articles",
    "smollm2": "SmolLM2-135M off its 4-bit grid, perplexity",
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
        names = {"found": f"found: {row['best']}", "uniform": "the same methods, uniform, not trained"}
        cells = [
            [names.get(n, n), f"{c['quality']:.4g}"]
            + ([f"{c['distance']:.2g}" if "distance" in c else ""] if measured else [])
            + [
                f"{number(c['milliseconds'][b]['median'])} ({slow[b] / c['milliseconds'][b]['median']:.2f}x)"
                for b in times
            ]
            for n, c in compared.items()
        ]
        limits = ", ".join(f"{k} {v}" for k, v in row["targets"].items() if k != "objective")
        training = f", {row['train_minutes']:g} of them of training" if row.get("train_minutes") else ""
        note = f"{row['tried']} models in {row['seconds'] / 60:.0f} minutes{training}; limit: {limits}."
        expected, real = row["predicted"], row["measured"]
        if "loss" in expected:
            ratios = [ms / real["milliseconds"][b] for b, ms in expected["milliseconds"].items()]
            note += f" Predicted of the best: loss {expected['loss']:.3g} (measured {real['loss']:.3g}), "
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
            texts.append(
                f"seed {other['seed']}: {found['quality']:.4g} (uniform {uniform['quality']:.4g}), distance "
                f"{found['distance']:.2g} ({uniform['distance']:.2g}), {ratio:.2f}x as fast"
            )
    return f" Other seeds, found and uniform: {'; '.join(texts)}." if texts else ""


TABLES: dict[str, Callable[[], str]] = {"optimize": optimize}
