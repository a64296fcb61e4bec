"""The figures of docs/, as SVG: perplexity of SmolLM2-135M against tokens per second. bench/tables.py writes them."""

from __future__ import annotations

import math
from html import escape

from records import Row, latest, read

WIDTH, HEIGHT, PANEL, TOP, BOTTOM = 960, 380, 400, 60, 330
COLORS = {"llama.cpp": "#c2621a", "rarefy": "#2563a8"}
NAMES = {"8 bits": "8 bits", "4 bits": "4 bits", "50 %, 8 bits": "50 % zeros, 8 bits"}
PERPLEXITIES = (14, 16, 20, 24, 28)  # labels of the logarithmic axis


def text(x: float, y: float, words: str, anchor: str = "start", color: str = "#444") -> str:
    """Return a line of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return a line of the grid."""
    return f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="#ddd"/>'


def height_of(perplexity: float) -> float:
    """Return the y of a perplexity in pixels: low is good and stands at the bottom."""
    low, high = math.log(13.5), math.log(30)
    return BOTTOM - (math.log(perplexity) - low) / (high - low) * (BOTTOM - TOP)


def panel(rows: list[Row], phase: str, title: str, left: float, step: int) -> list[str]:
    """Return the parts of one diagram: perplexity against the rate of a phase, decode or prefill."""
    fastest = step * math.ceil(1.05 * max(r[phase][1] for r in rows) / step)
    right = left + PANEL
    parts = [text((left + right) / 2, HEIGHT - 12, title, "middle")]
    for perplexity in PERPLEXITIES:
        y = height_of(perplexity)
        parts += [line(left, y, right, y), text(left - 8, y + 4, str(perplexity), "end")]
    for rate in range(0, fastest + 1, step):
        x = left + rate / fastest * PANEL
        parts += [line(x, TOP, x, BOTTOM), text(x, BOTTOM + 18, f"{rate:,}", "middle")]
    for row in rows:
        x, y, color = left + row[phase][1] / fastest * PANEL, height_of(row["perplexity"]), COLORS[row["engine"]]
        file: str = row["file"]
        name = NAMES.get(file, file)
        parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="{color}"/>']
        anchor = {"Q4_1": "end", "Q8_0": "start"}.get(name, "middle")  # these two are close to each other
        parts += [text(x, y - 10 if row["engine"] == "rarefy" else y + 20, name, anchor, color)]
    return parts


def language(label: str = "Intel Xeon, AMX") -> str:
    """Return the figure of one machine."""
    rows = latest([r for r in read("language") if r["label"] == label], "engine", "file")
    rows = [r for r in rows if r["file"] in NAMES or r["file"].startswith("Q")]
    head = (
        f"SmolLM2-135M on {label}, 2 threads, batch 1. Right is faster, low is better. Blue: Rarefy; orange: llama.cpp."
    )
    parts = [text(20, 24, head), text(20, TOP - 10, "perplexity")]
    parts += panel(rows, "decode", "decode, tokens per second", 60, 50)
    parts += panel(rows, "prefill", "prompt of 512 tokens, tokens per second", 530, 500)
    style = 'font-family="DejaVu Sans, Arial, sans-serif" font-size="13"'
    frame = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>'
    return "\n".join([start, frame, *parts, "</svg>\n"])


FIGURES = {"docs/results/language-models.svg": language}
