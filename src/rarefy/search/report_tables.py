"""The tables of a frontier: all points, other engines, and the layers of the best point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from rarefy.common.report import three_digits
from rarefy.evaluation.html_page import Column, Html, bars, breakable, element, join, table
from rarefy.search.report_text import batch_name, kind_of, loss_text, loss_unit, quality_text, size_text

LAYER_KEYS = {  # of a row of a point's layers: the head of its column
    "layer": "layer",
    "choice": "choice",
    "sparsity": "sparsity",
    "pattern": "pattern",
    "bits": "bits",
    "kept": "kept units",
    "milliseconds": "ms",
    "loss": "sensitivity",
    "why": "why",
}
WITH_BARS = ("sparsity", "milliseconds", "loss")
Numbered = tuple[int, Any]  # number in the table and point; 0 is the dense model


def points_table(frontier: Any) -> Html:
    """Return the table of the dense model and all points, numbered as in the plots."""
    unit = loss_unit(frontier)
    columns = [
        Column("model", lambda r: _name(frontier, *r), lambda r: r[0]),
        Column("quality", lambda r: quality_text(frontier, r[1].quality), lambda r: r[1].quality, numeric=True),
        Column(f"loss, {unit}", lambda r: loss_text(frontier, r[1].loss), lambda r: r[1].loss, numeric=True),
        *([_checked(frontier, unit)] if any(p.checked_loss is not None for p in frontier.points) else []),
        *(_time(batch) for batch in frontier.batches),
        Column("MB on disk", lambda r: size_text(r[1].disk_bytes), lambda r: r[1].disk_bytes or None, numeric=True),
        Column("MB in memory", lambda r: size_text(r[1].memory_bytes), lambda r: r[1].memory_bytes or None, True),
        Column("predicted loss", lambda r: loss_text(frontier, _predicted_loss(r)), _predicted_loss, numeric=True),
        *(_predicted_time(batch) for batch in frontier.batches),
        Column("s to make", lambda r: f"{r[1].seconds:,.0f}" if r[1].seconds else "-", lambda r: r[1].seconds, True),
    ]

    def attributes(row: Numbered) -> dict[str, object]:
        number, point = row
        state = "failed" if point.error else "best" if point is frontier.best_point else None
        return {"class_": state, "data_point": number or None}

    count = len(frontier.points)
    caption = f"The dense model and {count} tried model{'s' * (count != 1)}. x: times as fast as the dense model."
    return table(caption, columns, enumerate((frontier.dense, *frontier.points)), attributes)


def peers_table(frontier: Any) -> Html:
    """Return the table of other engines."""

    def time(batch: str) -> Column:
        def median(row: Mapping[str, Any]) -> float | None:
            return row.get("milliseconds", {}).get(batch, {}).get("median")

        return Column(f"ms, {batch_name(batch)}", lambda r: _or_dash(median(r)), median, numeric=True)

    columns = [
        Column("engine", lambda r: r["name"]),
        Column("quality", lambda r: quality_text(frontier, r["quality"]), lambda r: r["quality"], numeric=True),
        *(time(batch) for batch in frontier.batches),
    ]
    return table("Other engines, timed in the same run", columns, frontier.peers)


def _checked(frontier: Any, unit: str) -> Column:
    """Return the column of losses on data that the search has not used."""
    text = f"loss on data held back, {unit}"
    return Column(text, lambda r: loss_text(frontier, r[1].checked_loss), lambda r: r[1].checked_loss, numeric=True)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else three_digits(value)


def _name(frontier: Any, number: int, point: Any) -> Html:
    if number == 0:
        return join(["dense", element("span", "fp32, compiled", class_="tag dense")])
    tag = {"best": "best", "on-front": "front"}.get(kind_of(frontier, point))
    return join(
        [
            f"{number}. {point.name}",
            element("span", tag, class_=f"tag {tag}") if tag else "",
            element("div", f"not made: {point.error}", class_="error") if point.error else "",
        ]
    )


def _time(batch: str) -> Column:
    """Return the column of the time of a batch: median, times as fast, quartiles."""

    def content(row: Numbered) -> object:
        number, point = row
        time = point.milliseconds.get(batch)
        if time is None:
            return "-"
        speed = f" ({point.speedup[batch]:.2f}x)" if number and batch in point.speedup else ""
        lines: list[object] = [f"{three_digits(time['median'])}{speed}"]
        if {"low", "high"} <= set(time):
            quartiles = f"{three_digits(time['low'])}-{three_digits(time['high'])}"
            lines.append(element("div", element("small", quartiles)))
        return join(lines)

    return Column(
        f"ms, {batch_name(batch)}", content, lambda r: r[1].milliseconds.get(batch, {}).get("median"), numeric=True
    )


def _predicted_loss(row: Numbered) -> float | None:
    return row[1].predicted.get("loss")


def _predicted_time(batch: str) -> Column:
    """Return the column of the predicted time of a batch, and by how much the measured one differs from it."""

    def predicted(row: Numbered) -> float | None:
        return row[1].predicted.get("milliseconds", {}).get(batch)

    def content(row: Numbered) -> str:
        expected, time = predicted(row), row[1].milliseconds.get(batch)
        error = f" ({time['median'] / expected - 1:+.0%})" if time is not None and expected else ""
        return f"{_or_dash(expected)}{error}"

    return Column(f"predicted ms, {batch_name(batch)} (error)", content, predicted, numeric=True)


def layers_table(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Return the table of the layers of a point; columns without any value are left out."""
    present = {key for row in rows for key, value in row.items() if value not in (None, "")}
    keys = [key for key in LAYER_KEYS if key in present] + sorted(present - set(LAYER_KEYS))
    return table(f"{len(rows)} layers", [_layer_column(key, rows) for key in keys], rows)


def _layer_column(key: str, rows: Sequence[Mapping[str, Any]]) -> Column:
    """Return a column of layers, with bars for sparsity, time and sensitivity."""
    title, numbers = LAYER_KEYS.get(key, key), [row[key] for row in rows if _is_number(row.get(key))]
    if not numbers or not all(_is_number(row.get(key)) or row.get(key) in (None, "") for row in rows):
        return Column(title, lambda r: breakable(_cell(r.get(key))), wide=key == "why")
    longest = 1.0 if key == "sparsity" else max(numbers)

    def content(row: Mapping[str, Any]) -> object:
        value = row.get(key)
        if not _is_number(value):
            return "-"
        text = f"{value:.1%}" if key == "sparsity" else _number_text(value)
        return join([text, bars(value / longest)]) if key in WITH_BARS and longest > 0 else text

    return Column(title, content, lambda r: r.get(key) if _is_number(r.get(key)) else None, numeric=True)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_text(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"-{three_digits(-value)}" if value < 0 else three_digits(value)


def _cell(value: object) -> str:
    return "-" if value in (None, "") else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
