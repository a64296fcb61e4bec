"""A file of a benchmark, JSON lines with quality and time of several models and engines, as text and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rarefy.common.errors import ContainerError
from rarefy.common.json_text import parse_json
from rarefy.common.report import table as text_table
from rarefy.common.report import three_digits
from rarefy.evaluation.html_page import Column, Html, document, element, join, section, table
from rarefy.evaluation.receipt_page import machine_facts, verdict
from rarefy.evaluation.svg_plot import NAMES, Limit, Mark, front_line, legend, scatter

OURS = "ours"  # what the names of Rarefy's models begin with
LOWER_IS_BETTER = ("perplexity", "loss", "error", "kl")
NO_METRICS = ("seconds",)  # what else is recorded beside the quality of a model
LEGEND = {**NAMES, "tried": "Rarefy", "on-front": "Rarefy, on its front"}


@dataclass(frozen=True)
class BenchRun:
    """One run of a benchmark.

    Args:
        run: its name.
        quality: model -> metric -> value.
        milliseconds: batch -> model -> lower quartile, median, upper quartile.
        machine: where it was measured.
        commit: of the measured version.
    """

    run: str
    quality: Mapping[str, Mapping[str, float]]
    milliseconds: Mapping[str, Mapping[str, Sequence[float]]]
    machine: Mapping[str, Any]
    commit: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of all metrics, the one of the plots first."""
        names = dict.fromkeys(metric for values in self.quality.values() for metric in values)
        return tuple(name for name in names if name not in NO_METRICS)

    def median(self, model: str, batch: str) -> float | None:
        """Return the median milliseconds of a model, None where it was not timed."""
        times = self.milliseconds[batch].get(model)
        return None if times is None else times[1]


@dataclass(frozen=True)
class Bench:
    """The last run of each name on each machine in a file of a benchmark, and how many lines the file has."""

    runs: tuple[BenchRun, ...]
    count: int

    def to_json(self) -> str:
        """Return the runs as JSON text."""
        return json.dumps([vars(run) for run in self.runs], indent=1)

    def __str__(self) -> str:
        return "\n\n".join(f"{_title(run)}\n{text_table(_rows(run))}" for run in self.runs)


def bench_from_lines(text: str) -> Bench:
    """Return a benchmark from JSON lines with run, quality and milliseconds; ContainerError for anything else."""
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ContainerError("bench: the file is empty: expected JSON lines with run, quality and milliseconds")
    runs = [_run(parse_json(line, f"bench: line {i}"), i) for i, line in lines]
    latest = {(run.run, json.dumps([run.machine.get(k) for k in ("cpu", "extensions")])): run for run in runs}
    return Bench(tuple(latest.values()), len(runs))


def _run(data: Any, line: int) -> BenchRun:
    """Return a line as a run, or raise ContainerError."""
    keys = ("run", "quality", "milliseconds")
    if not isinstance(data, Mapping) or not set(keys) <= set(data):
        missing = keys if not isinstance(data, Mapping) else [key for key in keys if key not in data]
        raise ContainerError(f"bench: line {line} has no {missing[0]}: expected run, quality and milliseconds")
    quality, times, machine = data["quality"], data["milliseconds"], data.get("machine", {})
    if not quality:
        raise ContainerError(f"bench: line {line}: quality has no models: nothing was measured")
    if not (_is_nested(quality) and all(_is_number(v) for values in quality.values() for v in values.values())):
        raise ContainerError(f"bench: line {line}: quality: expected numbers by model and metric")
    if not (_is_nested(times) and all(_is_quartiles(t) for models in times.values() for t in models.values())):
        raise ContainerError(f"bench: line {line}: milliseconds: expected three quartiles by batch and model")
    if not isinstance(machine, Mapping):
        raise ContainerError(f"bench: line {line}: machine: expected an object")
    return BenchRun(str(data["run"]), quality, times, machine, str(data.get("commit", "")))


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # parse_json reads finite ones only


def _is_quartiles(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _title(run: BenchRun) -> str:
    return f"{run.run}, {run.machine['cpu']}" if "cpu" in run.machine else run.run


def _rows(run: BenchRun) -> list[dict[str, str]]:
    return [
        {
            "model": model,
            **{metric: f"{values[metric]:.4g}" if metric in values else "-" for metric in run.metrics},
            **{f"batch {b}, ms": _or_dash(run.median(model, b)) for b in run.milliseconds},
        }
        for model, values in run.quality.items()
    ]


def _or_dash(value: float | None) -> str:
    return "-" if value is None else three_digits(value)


# the page


def bench_page(bench: Bench) -> str:
    """Return a page of a benchmark: for each run a plot for each batch, and a table.

    Args:
        bench: what `bench_from_lines` read.

    Returns:
        The text of an HTML file that loads nothing.
    """
    older = bench.count - len(bench.runs)
    words = f"{len(bench.runs)} runs. " + (f"{older} earlier runs of the same names are left out." if older else "")
    sections = [_section(run, i) for i, run in enumerate(bench.runs, 1)]
    return document("Benchmark: quality against time", verdict("plain", "Measured.", words), *sections)


def _section(run: BenchRun, number: int) -> Html:
    figures = [element("figure", _plot(run, batch, number)) for batch in run.milliseconds] if run.metrics else []
    kinds = [_kind(model) for model in run.quality if any(model in m for m in run.milliseconds.values())]
    lines = ["front"] * any(kind == "tried" for kind in kinds) + ["reference"] * bool(_untimed(run))
    shown = [*kinds, *lines, *(["on-front"] if "tried" in kinds else [])]
    columns = [
        Column("model", lambda r: r),
        *(_quality_column(run, metric) for metric in run.metrics),
        *(_time_column(run, batch) for batch in run.milliseconds),
    ]
    return section(
        _title(run),
        element("div", *figures, class_="plots"),
        legend(shown, LEGEND),
        table(f"Quality and milliseconds of {len(run.quality)} models", columns, run.quality),
        machine_facts({**run.machine, **({"commit": run.commit} if run.commit else {})}),
    )


def _plot(run: BenchRun, batch: str, number: int) -> Html:
    metric, times = run.metrics[0], run.milliseconds[batch]
    up = not metric.lower().startswith(LOWER_IS_BETTER)
    marks = [
        _mark(model, values[metric], times[model])
        for model, values in run.quality.items()
        if model in times and metric in values
    ]
    front = front_line([mark for mark in marks if mark.kind == "tried"], up)
    marks = [
        replace(m, kind="on-front") if m in front else m if m.kind == "peer" else replace(m, label="") for m in marks
    ]
    levels = [Limit("y", values[metric], model, "reference") for model, values in _untimed(run) if metric in values]
    return scatter(
        title=f"{run.run}, batch {batch}",
        description=f"{len(marks)} models, {metric} against milliseconds of a batch of {batch}.",
        marks=marks,
        limits=levels,
        x_label=f"milliseconds, batch {batch}",
        y_label=metric,
        higher_is_better=up,
        identifier=f"run-{number}-batch-{batch}",
    )


def _mark(model: str, quality: float, quartiles: Sequence[float]) -> Mark:
    low, median, high = quartiles
    tooltip = f"{model}: {quality:.4g}, {three_digits(median)} ms"
    return Mark(median, quality, _kind(model), tooltip, model.removeprefix(f"{OURS}, "), low, high)


def _kind(model: str) -> str:
    return "tried" if model.startswith(OURS) else "peer"


def _untimed(run: BenchRun) -> list[tuple[str, Mapping[str, float]]]:
    """Return the models that have a quality and no time, such as the dense model in eager mode."""
    return [(m, values) for m, values in run.quality.items() if not any(m in t for t in run.milliseconds.values())]


def _quality_column(run: BenchRun, metric: str) -> Column:
    def value(model: str) -> float | None:
        return run.quality[model].get(metric)

    return Column(metric, lambda m: "-" if value(m) is None else f"{value(m):.4g}", value, numeric=True)


def _time_column(run: BenchRun, batch: str) -> Column:
    def content(model: str) -> object:
        quartiles = run.milliseconds[batch].get(model)
        if quartiles is None:
            return "-"
        low, median, high = map(three_digits, quartiles)
        return join([median, element("div", element("small", f"{low}-{high}"))])

    return Column(f"ms, batch {batch}", content, lambda m: run.median(m, batch), numeric=True)
