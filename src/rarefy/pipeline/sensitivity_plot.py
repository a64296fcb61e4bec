"""The report of `sensitivity` as a figure: the loss of each layer, a line for each setting. SVG, without libraries."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from rarefy.common.report import Report
from rarefy.pipeline.sensitivity import label_of

WIDTH, HEIGHT, LEFT, TOP, RIGHT = 960, 420, 70, 50, 210
NAMES_HEIGHT = 170  # of the layers' names below the diagram
COLORS = ("#2563a8", "#c2621a", "#2f855a", "#a3348f", "#8a6d1d", "#b02a37", "#4b5563", "#0e7490")
MAX_NAMES = 60


def figure(report: Report) -> str:
    """Return an SVG: layers from left to right, in the model's order, and their losses, on a logarithmic axis if all
    are positive. Points have the exact loss as a tooltip.

    Args:
        report: what `sensitivity` returned.
    """
    layers = list(dict.fromkeys(row["layer"] for row in report.rows))
    series: dict[str, dict[str, float]] = {}
    for row in report.rows:
        if row["loss"] is not None:
            series.setdefault(label_of(dict(row)), {})[row["layer"]] = row["loss"]
    losses = [loss for points in series.values() for loss in points.values()]
    axis = _Axis(losses)
    step = (WIDTH - LEFT - RIGHT) / max(len(layers) - 1, 1)
    x_of = {name: LEFT + i * step for i, name in enumerate(layers)}
    title = f"loss of each layer alone, {report.summary['metric']}"
    parts = [_text(LEFT, 24, title), *axis.grid_lines()]
    every = math.ceil(len(layers) / MAX_NAMES)
    parts += [_name(x_of[name], name) for name in layers[::every]]
    for i, (label, points) in enumerate(series.items()):
        parts += _line(label, [(x_of[n], axis.y(v), f"{n}, {label}: {v:.4g}") for n, v in points.items()], i)
    style = 'font-family="DejaVu Sans, Arial, sans-serif" font-size="12"'
    height = HEIGHT + NAMES_HEIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {style}>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *parts, "</svg>\n"])


class _Axis:
    """The vertical axis: logarithmic where all losses are positive, else linear."""

    def __init__(self, losses: list[float]):
        self.logarithmic = bool(losses) and min(losses) > 0
        values = [math.log10(v) for v in losses] if self.logarithmic else [*losses, 0.0]
        low, high = min(values), max(values)
        if self.logarithmic:
            low, high = math.floor(low), math.ceil(high)
        self.low, self.high = low, high if high > low else low + 1

    def y(self, loss: float) -> float:
        """Return the height of a loss in pixels from the top."""
        value = math.log10(loss) if self.logarithmic else loss
        return HEIGHT - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP)

    def grid_lines(self) -> list[str]:
        """Return the grid lines with their labels."""
        count = min(8, self.high - self.low) if self.logarithmic else 5
        ticks = [self.low + i * (self.high - self.low) / count for i in range(int(count) + 1)]
        if self.logarithmic:
            ticks = sorted({round(t) for t in ticks})
        lines = list[str]()
        for tick in ticks:
            loss = 10.0**tick if self.logarithmic else tick
            y = self.y(loss)
            lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
            lines.append(_text(LEFT - 8, y + 4, f"{loss:.3g}", "end"))
        return lines


def _line(label: str, points: list[tuple[float, float, str]], index: int) -> list[str]:
    """Return the line and the points of one setting, and its entry of the legend."""
    color = COLORS[index % len(COLORS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>']
    for x, y, tip in points:
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"><title>{escape(tip)}</title></circle>')
    y = TOP + 18 * index
    parts.append(f'<circle cx="{WIDTH - RIGHT + 24}" cy="{y}" r="4" fill="{color}"/>')
    parts.append(_text(WIDTH - RIGHT + 34, y + 4, label, color=color))
    return parts


def _name(x: float, name: str) -> str:
    """Return the name of a layer below the axis, written downwards; of long names the end."""
    short = name if len(name) <= 28 else f"…{name[-27:]}"
    turned = f'transform="rotate(-60 {x:.1f} {HEIGHT + 14})"'
    return (
        f'<text x="{x:.1f}" y="{HEIGHT + 14}" text-anchor="end" fill="#444" font-size="9" {turned}>'
        f"{escape(short)}<title>{escape(name)}</title></text>"
    )


def _text(x: float, y: float, text: Any, anchor: str = "start", color: str = "#444") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}">{escape(str(text))}</text>'
