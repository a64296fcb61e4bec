"""The plots of a frontier: quality against time, one for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rarefy.common.report import three_digits
from rarefy.evaluation.html_page import Html, element
from rarefy.evaluation.svg_plot import Limit, Mark, legend, scatter
from rarefy.search.report_text import batch_name, kind_of, metric_name, quality_text, time_text, unit

CAPTION = (
    "Each mark is a model as it is deployed; thin lines are quartiles of its time. The line joins the models that no "
    "other one beats at this batch. Numbers are those of the table below."
)


def plots(frontier: Any) -> list[Html]:
    """Return a plot for each batch, and what its marks mean."""
    figures = [element("figure", _plot(frontier, batch)) for batch in frontier.batches]
    kinds = {kind_of(frontier, p) for p in frontier.points if p.quality is not None} | {"dense"}
    lines = (["front"] if frontier.front() else []) + (["limit"] if frontier.limits else [])
    meaning = legend([*kinds, *(["peer"] if frontier.peers else []), *lines])
    return [element("div", *figures, class_="plots"), meaning, element("p", CAPTION, class_="muted")]


def _plot(frontier: Any, batch: str) -> Html:
    metric, scale, best = metric_name(frontier), unit(frontier), frontier.best_point
    marks = [
        _point_mark(frontier, point, i, batch)
        for i, point in enumerate(frontier.points, 1)
        if point.quality is not None and batch in point.milliseconds
    ]
    description = f"{len(marks)} model{'s' * (len(marks) != 1)}, {metric} against milliseconds, {batch_name(batch)}."
    if best is not None and batch in best.milliseconds:
        description += f" The best, {best.name}: {quality_text(frontier, best.quality)} in {time_text(best, batch)} ms."
    references = [("dense", "dense", frontier.dense.quality, frontier.dense.milliseconds)]
    references += [("peer", p["name"], p["quality"], p.get("milliseconds", {})) for p in frontier.peers]
    marks += [
        _mark(frontier, kind, name, name, quality, times[batch])
        for kind, name, quality, times in references
        if quality is not None and batch in times
    ]
    return scatter(
        title=f"{metric}, {batch_name(batch)}",
        description=description,
        marks=marks,
        limits=_limits(frontier, batch),
        x_label=f"milliseconds, {batch_name(batch)}",
        y_label=f"{metric},{scale}" if scale else metric,
        higher_is_better=frontier.metric["higher_is_better"],
    )


def _point_mark(frontier: Any, point: Any, number: int, batch: str) -> Mark:
    kind, name = kind_of(frontier, point), f"{number}. {point.name}"
    label = name if kind == "best" else str(number) if kind == "on-front" else ""
    speed = f" ({point.speedup[batch]:.2f}x)" if batch in point.speedup else ""
    return _mark(frontier, kind, name, label, point.quality, point.milliseconds[batch], speed, number)


def _mark(
    frontier: Any,
    kind: str,
    name: str,
    label: str,
    quality: float,
    time: Mapping[str, float],
    speed: str = "",
    number: int | None = None,
) -> Mark:
    tooltip = f"{name}: {quality_text(frontier, quality)}, {three_digits(time['median'])} ms{speed}"
    return Mark(time["median"], quality, kind, tooltip, label, time.get("low"), time.get("high"), number)


def _limits(frontier: Any, batch: str) -> list[Limit]:
    quality, times = frontier.limits.get("quality"), frontier.limits.get("milliseconds", {})
    across = [] if quality is None else [Limit("y", quality, f"target {quality_text(frontier, quality)}")]
    return across + ([Limit("x", times[batch], f"target {three_digits(times[batch])} ms")] if batch in times else [])
