"""Read what a page shows: its elements, tables and text, and the marks and axes of its plots."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser


def plots_of(page: str) -> list[ET.Element]:
    """Return the plots of a page, parsed as XML."""
    return [ET.fromstring(svg) for svg in re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)]


def marks(plot: ET.Element, shape: str) -> list[ET.Element]:
    return [e for e in plot.iter(shape) if "mark" in e.get("class", "").split()]


def centre(mark: ET.Element) -> tuple[float, float]:
    """Return the middle of a circle, square or diamond."""
    if mark.tag == "circle":
        return float(mark.attrib["cx"]), float(mark.attrib["cy"])
    if mark.tag == "rect":
        x, y, width, height = (float(mark.attrib[k]) for k in ("x", "y", "width", "height"))
        return x + width / 2, y + height / 2
    corners = [tuple(map(float, pair.split(","))) for pair in mark.attrib["points"].split()]
    return sum(c[0] for c in corners) / 4, sum(c[1] for c in corners) / 4


def scale(plot: ET.Element, axis: str):
    """Return the linear function from values to pixels that the first and last tick of an axis define."""
    ticks = [e for e in plot.iter("text") if e.get("class") == f"tick {axis}"]
    shift = 0 if axis == "x" else -4  # the number stands beside its line
    ends = [(float(t.attrib["data-value"]), float(t.attrib[axis]) + shift) for t in (ticks[0], ticks[-1])]
    (a, pixel_a), (b, pixel_b) = ends
    assert len(ticks) >= 2 and a < b
    for tick in ticks:
        assert float(tick.text.replace(",", "")) == float(tick.attrib["data-value"])
    return lambda value: pixel_a + (value - a) / (b - a) * (pixel_b - pixel_a)


class Reader(HTMLParser):
    """Collects elements, the text of each script, cells of tables, and all text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.inside: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag, "elements are closed in their order"

    def handle_data(self, data):
        if self.inside[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.inside[-1:] != ["style"]:
            self.text += data
            if "td" in self.inside or "th" in self.inside:
                self.rows[-1][-1] += data
