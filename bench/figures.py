"""The figures of docs/, as SVG: quality against speed of SmolLM2-135M and of MiniLM. bench/tables.py writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from provenance import newest_run
from records import NotMeasured, Row, latest, mark, required

WIDTH, HEIGHT, PANEL, TOP, BOTTOM = 960, 380, 400, 60, 330
COLORS = {"llama.cpp": "#c2621a", "rarefy": "#2563a8"}
NAMES = {"8 bits": "8 bits", "4 bits": "4 bits", "50 %, 8 bits": "50 % zeros, 8 bits"}
PERPLEXITIES = (14, 16, 20, 24, 28)  # labels of the logarithmic axis

OURS, OTHERS = COLORS["rarefy"], COLORS["llama.cpp"]
CALL = "16 x 128"  # sixteen texts of 128 tokens
MILLISECONDS = (25, 50, 100, 200, 400)  # labels of the logarithmic axis
RECALL = (53, 54, 55)
SHORT = {
    "narrow-0, trained": "70 % of neurons",
    "narrower-0, trained": "50 % of neurons",
    "narrowest-0, trained": "33 % of neurons",
    "25 % fewer neurons and heads": "25 % cut",
    "25 % fewer neurons": "25 % cut, neurons",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


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


def language() -> str:
    """Return the figure of the newest run of language.py."""
    rows = latest(newest_run(required("language")), "engine", "file")
    rows = [r for r in rows if r["file"] in NAMES or r["file"].startswith("Q")]
    where = f"SmolLM2-135M on {rows[0]['label']}, {rows[0]['threads']} threads, batch 1"
    head = f"{where}. Right is faster, low is better. Blue: Rarefy; orange: llama.cpp."
    parts = [text(20, 24, head), text(20, 42, mark(rows)), text(20, TOP - 2, "perplexity")]
    parts += panel(rows, "decode", "decode, tokens per second", 60, 50)
    parts += panel(rows, "prefill", "prompt of 512 tokens, tokens per second", 530, 500)
    return svg(parts, HEIGHT)


def svg(parts: list[str], height: int) -> str:
    """Return a picture of parts, as wide as all."""
    style = 'font-family="DejaVu Sans, Arial, sans-serif" font-size="13"'
    frame = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {style}>'
    return "\n".join([start, frame, *parts, "</svg>\n"])


def minilm() -> str:
    """Return the figure of MiniLM: how much it finds against the time of a call, one diagram for each machine."""
    last = {r["label"]: r for r in required("frontier", run="minilm")}
    head = f"MiniLM: quality against the time of a call with {CALL} tokens. Left is faster, high is better."
    about = "R@1: mean of both tests, in percent. Blue: Rarefy, orange: the others. Lines: none is better and faster."
    parts = [text(20, 24, head), text(20, 44, about)]
    for number, (label, row) in enumerate(sorted(last.items())):
        parts += recall_panel(row, f"{label}, {row['threads']} threads. {mark([row])}", 90 + 290 * number)
    return svg(parts, len(last) * 290 + 70)


def drawn(draw: Callable[[], str]) -> str:
    """Return a figure, or a line about what measures it anew."""
    try:
        return draw()
    except NotMeasured as error:
        return svg([text(20, 24, str(error).replace("`", ""))], 40)


def recall_panel(row: Row, label: str, top: int) -> list[str]:
    """Return the parts of one diagram of `minilm`, 220 high, below a heading."""
    left, right, bottom = 60, WIDTH - 20, top + 220
    low, high = math.log(20), math.log(620)

    def x_of(milliseconds: float) -> float:
        return left + (math.log(milliseconds) - low) / (high - low) * (right - left)

    def y_of(recall: float) -> float:
        return bottom - (recall - 52.5) / (55.5 - 52.5) * (bottom - top)

    parts = [text(left, top - 10, label)]
    for recall in RECALL:
        parts += [line(left, y_of(recall), right, y_of(recall)), text(left - 8, y_of(recall) + 4, str(recall), "end")]
    for value in MILLISECONDS:
        parts += [line(x_of(value), top, x_of(value), bottom), text(x_of(value), bottom + 18, f"{value} ms", "middle")]
    quality, times = row["quality"], row["milliseconds"].get(CALL) or row["milliseconds"]["16"]
    dense = (quality["eager"]["articles"] + quality["eager"]["brown"]) / 2
    parts += [dashed(left, y_of(dense), right, OURS), text(right, y_of(dense) - 5, "dense model", "end")]
    for ours, color in ((False, OTHERS), (True, OURS)):
        points = sorted(
            (times[name][1], (measured["articles"] + measured["brown"]) / 2, name)
            for name, measured in quality.items()
            if name in times and name.startswith("ours") == ours
        )
        best = -math.inf
        front = [(ms, best := recall) for ms, recall, _ in points if recall > best]
        path = " ".join(f"{x_of(ms):.0f},{y_of(recall):.0f}" for ms, recall in front)
        parts += [f'<polyline points="{path}" fill="none" stroke="{color}"/>']
        for i, (ms, recall, name) in enumerate(points):
            below = 20 + 16 * (i % 2)  # neighbours on two lines
            parts += [f'<circle cx="{x_of(ms):.0f}" cy="{y_of(recall):.0f}" r="5" fill="{color}"/>']
            parts += [text(x_of(ms), y_of(recall) + (-10 if ours else below), short(name), "middle", color)]
    return parts


def dashed(x1: float, y: float, x2: float, color: str) -> str:
    """Return a dashed line from left to right."""
    return f'<line x1="{x1:.0f}" y1="{y:.0f}" x2="{x2:.0f}" y2="{y:.0f}" stroke="{color}" stroke-dasharray="5 5"/>'


def short(name: str) -> str:
    """Return the name of a deployed model for a label."""
    name = name.removeprefix("ours, ")
    for long, label in SHORT.items():
        name = name.replace(long, label)
    return name.replace(", int8", ", 8 bits").replace(" int8", " 8 bits").replace("int8", "8 bits")


FIGURES = {"docs/results/language-models.svg": language, "docs/results/frontier.svg": minilm}
