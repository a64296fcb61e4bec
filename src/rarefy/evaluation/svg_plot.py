"""Plots of quality against time as SVG elements, in the classes of page.css. Coordinates are linear in the values."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rarefy.evaluation.html_page import Html, element

WIDTH, HEIGHT = 480, 364
LEFT, RIGHT, TOP, BOTTOM = 62, 468, 34, 306  # edges of the frame
CHARACTER = 7.7  # mean width of a character of a label
NAMES = {  # what marks and lines mean, in the order of a legend
    "best": "best",
    "on-front": "on the front",
    "tried": "tried",
    "dense": "dense, fp32",
    "peer": "other engine",
    "front": "front",
    "limit": "target",
    "reference": "quality without a time",
}
Box = tuple[float, float, float, float]  # left, top, right, bottom
Place = tuple[float, float, str]  # x, baseline and anchor of a text
MAX_LABEL = 30  # characters
RADIUS = {"best": 8.0, "on-front": 5.5, "tried": 4.5, "dense": 6.0, "peer": 5.0}


@dataclass(frozen=True)
class Mark:
    """A measured model in a plot.

    Args:
        x: milliseconds.
        y: quality.
        kind: "tried", "on-front" or "best" (circles), "dense" (diamond), "peer" (square).
        tooltip: what is shown for it.
        label: short text beside it; "" for none.
        low: lower quartile of x.
        high: upper quartile of x.
        point: the number of its row in the table.
    """

    x: float
    y: float
    kind: str
    tooltip: str
    label: str = ""
    low: float | None = None
    high: float | None = None
    point: int | None = None


@dataclass(frozen=True)
class Limit:
    """A line across a plot, at a value of "x" or "y"; its kind is "limit" (a target) or "reference"."""

    axis: str
    value: float
    label: str
    kind: str = "limit"


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` at pixel `start` to `high` at pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    def pixel(self, value: float) -> float:
        """Return the coordinate of a value; values beyond the axis are drawn on its end."""
        inside = min(max(value, self.low), self.high)
        return round(self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def holds(self, value: float) -> bool:
        """Return whether a value is on the axis."""
        return self.low <= value <= self.high

    def ticks(self) -> list[float]:
        """Return about five round numbers on the axis.

        >>> Axis(0.0, 23.5, 0, 100).ticks()
        [0.0, 5.0, 10.0, 15.0, 20.0]
        """
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
        count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9)
        first = math.ceil(self.low / step - 1e-9)
        return [float(f"{(first + i) * step:.12g}") for i in range(count + 1)]


def axis_over(values: Iterable[float], start: float, end: float, core: Iterable[float] = ()) -> Axis:
    """Return an axis over values with room at both ends, from 0 where that leaves at least half of it for them.

    Where `core` has values, others do not stretch it to more than four times their range.
    """
    low, high = _range(values)
    core = list(core)
    if core:
        core_low, core_high = _range(core)
        reach = 1.5 * ((core_high - core_low) or abs(core_high) or 1.0)
        low, high = max(low, core_low - reach), min(high, core_high + reach)
    room = 0.07 * ((high - low) or abs(high) or 1.0)
    bottom = 0.0 if 0 <= low <= high / 2 else low - room
    return Axis(bottom, high + room, start, end)


def _range(values: Iterable[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return (ordered[0], ordered[-1]) if ordered else (0.0, 1.0)


def front_line(marks: Sequence[Mark], higher_is_better: bool) -> list[Mark]:
    """Return the marks that no other one beats in both time and quality, the fastest first."""
    sign = 1 if higher_is_better else -1
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x, -sign * m.y)):
        if not best or sign * mark.y > sign * best[-1].y:
            best.append(mark)
    return best


def scatter(
    title: str,
    description: str,
    marks: Sequence[Mark],
    limits: Sequence[Limit] = (),
    x_label: str = "ms per batch",
    y_label: str = "quality",
    higher_is_better: bool = True,
    identifier: str = "",
) -> Html:
    """Return a plot of marks with the front of circles as steps. `identifier` is unique on a page, by default `title`.

    The axis of quality covers the best and the dense model, peers and limits; without a limit also the central three
    quarters of the others. What is far beyond is drawn on the edge, in broken outline.
    """
    circles = [m for m in marks if m.kind in ("tried", "on-front", "best")]
    front = front_line(circles, higher_is_better)
    ends = [end for m in marks for end in (m.low, m.x, m.high) if end is not None]
    x = axis_over([*ends, *_values(limits, "x")], LEFT, RIGHT)
    must = [*(m.y for m in marks if m.kind in ("dense", "peer", "best")), *_values(limits, "y")]
    core = must if _values(limits, "y") else [*_central([m.y for m in circles]), *must]
    y = axis_over([*(m.y for m in marks), *must], BOTTOM, TOP, core)
    outside = sum(not (x.holds(m.x) and y.holds(m.y)) for m in marks)
    places = {limit: _limit_place(limit, x, y, limits) for limit in limits}
    name = "plot-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in identifier or title)
    parts = [
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *_frame(x, y, title, x_label, y_label, higher_is_better),
        *(_limit(limit, x, y, places[limit]) for limit in limits),
        *_front_path(front, x, y),
        *(_whisker(m, x, y) for m in marks if m.low is not None and m.high is not None and y.holds(m.y)),
        *_labels(marks, x, y, [_text_box(*places[limit], text_width(limit.label)) for limit in limits]),
        *(_shape(m, x, y) for m in sorted(marks, key=lambda m: list(RADIUS).index(m.kind), reverse=True)),
    ]
    if outside:
        note = f"{outside} beyond the axes, drawn on the edge"
        parts.append(element("text", note, x=RIGHT, y=HEIGHT - 4, text_anchor="end"))
    return element(
        "svg", *parts, class_="plot", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )  # fmt: skip


def _central(values: Sequence[float]) -> list[float]:
    """Return the three quarters of the values that are nearest to the middle one."""
    middle = sorted(values)[len(values) // 2] if values else 0.0
    return sorted(values, key=lambda v: abs(v - middle))[: math.ceil(0.75 * len(values))]


def legend(kinds: Iterable[str], names: Mapping[str, str] = NAMES) -> Html:
    """Return a list of what these kinds of marks and lines mean."""
    items = []
    for kind in sorted(set(kinds), key=list(NAMES).index):
        is_mark = kind in RADIUS
        shape = (
            symbol(kind, 11, 8, class_=f"mark {kind}") if is_mark else element("line", x2=22, y1=8, y2=8, class_=kind)
        )
        items.append(element("li", element("svg", shape, viewBox="-1 -1 24 18", aria_hidden="true"), names[kind]))
    return element("ul", *items, class_="legend")


def _values(limits: Iterable[Limit], axis: str) -> list[float]:
    return [limit.value for limit in limits if limit.axis == axis]


def _frame(x: Axis, y: Axis, title: str, x_label: str, y_label: str, higher_is_better: bool) -> list[Html]:
    """Return the grid with the numbers of its ticks, and the names of the axes."""
    text = partial(element, "text")
    parts = [text(shortened(title, 52), x=LEFT, y=18, class_="title")]
    for value in y.ticks():
        at = y.pixel(value)
        parts += [
            element("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="grid"),
            text(f"{value:,.10g}", x=LEFT - 6, y=at + 4, text_anchor="end", class_="tick y", data_value=value),
        ]
    for value in x.ticks():
        at = x.pixel(value)
        parts += [
            element("line", x1=at, x2=at, y1=TOP, y2=BOTTOM, class_="grid"),
            text(f"{value:,.10g}", x=at, y=BOTTOM + 17, text_anchor="middle", class_="tick x", data_value=value),
        ]
    middle = (TOP + BOTTOM) / 2
    words = f"{shortened(y_label, 22)} ({'up' if higher_is_better else 'down'} is better)"
    return [
        *parts,
        element("rect", x=LEFT, y=TOP, width=RIGHT - LEFT, height=BOTTOM - TOP, class_="frame"),
        text(f"{shortened(x_label, 34)} (left is faster)", x=(LEFT + RIGHT) / 2, y=BOTTOM + 38, text_anchor="middle"),
        text(words, x=0, y=0, text_anchor="middle", transform=f"translate(16 {middle:g}) rotate(-90)"),
    ]


def _limit(limit: Limit, x: Axis, y: Axis, place: Place) -> Html:
    """Return a line across the plot with its label."""
    at = (x if limit.axis == "x" else y).pixel(limit.value)
    vertical, horizontal = {"x1": at, "x2": at, "y1": TOP, "y2": BOTTOM}, {"x1": LEFT, "x2": RIGHT, "y1": at, "y2": at}
    line = element("line", **(vertical if limit.axis == "x" else horizontal), class_=limit.kind, data_value=limit.value)
    label = element("text", limit.label, x=place[0], y=place[1], text_anchor=place[2], class_=limit.kind)
    return element("g", line, label)


def _limit_place(limit: Limit, x: Axis, y: Axis, limits: Sequence[Limit]) -> Place:
    """Return where the label of a line is: above its right end, or beside its lower end where no other line is."""
    if limit.axis == "y":
        at = y.pixel(limit.value)
        return (RIGHT - 4, at - 4 if at > TOP + 20 else at + 14, "end")
    at = x.pixel(limit.value)
    is_free = all(y.pixel(value) < BOTTOM - 30 for value in _values(limits, "y"))
    baseline = BOTTOM - 6 if is_free else BOTTOM - 46
    return (at - 4, baseline, "end") if at > (LEFT + RIGHT) / 2 else (at + 4, baseline, "start")


def _front_path(front: Sequence[Mark], x: Axis, y: Axis) -> list[Html]:
    """Return the front as steps: the quality of a mark is to be had from its time on, until the next one is better."""
    if not front:
        return []
    (left, top), *others = ((x.pixel(m.x), y.pixel(m.y)) for m in front)
    steps = "".join(f"H{a:g}V{b:g}" for a, b in others)
    return [element("path", d=f"M{left:g} {top:g}{steps}", class_="front")]


def _whisker(mark: Mark, x: Axis, y: Axis) -> Html:
    """Return the line from the lower to the upper quartile of the time."""
    at = y.pixel(mark.y)
    return element("line", x1=x.pixel(mark.low or 0), x2=x.pixel(mark.high or 0), y1=at, y2=at, class_="range")


def _shape(mark: Mark, x: Axis, y: Axis) -> Html:
    """Return a circle, diamond or square with a tooltip."""
    inside = x.holds(mark.x) and y.holds(mark.y)
    common = {
        "class_": f"mark {mark.kind}" + ("" if inside else " beyond"),
        "data_x": mark.x,
        "data_y": mark.y,
        "data_point": mark.point,
    }
    return symbol(mark.kind, x.pixel(mark.x), y.pixel(mark.y), element("title", mark.tooltip), **common)


def symbol(kind: str, x: float, y: float, *children: object, **attributes: object) -> Html:
    """Return the shape of a kind of mark around a place."""
    r = RADIUS[kind]
    if kind == "dense":
        corners = ((x, y - r), (x + r, y), (x, y + r), (x - r, y))
        return element("polygon", *children, points=" ".join(f"{a:g},{b:g}" for a, b in corners), **attributes)
    if kind == "peer":
        square = {"x": round(x - r, 2), "y": round(y - r, 2), "width": 2 * r, "height": 2 * r}
        return element("rect", *children, **square, **attributes)
    return element("circle", *children, cx=x, cy=y, r=r, **attributes)


def _labels(marks: Sequence[Mark], x: Axis, y: Axis, taken: Sequence[Box]) -> list[Html]:
    """Return the labels, each where it covers the least of marks and other labels; important marks choose first."""
    order = ("best", "dense", "peer", "on-front", "tried")
    boxes = list(taken)
    shapes = [_around(x.pixel(m.x), y.pixel(m.y), RADIUS[m.kind]) for m in marks]
    texts = []
    for mark in sorted((m for m in marks if m.label), key=lambda m: order.index(m.kind)):
        words = shortened(mark.label, MAX_LABEL)
        at_x, at_y, gap = x.pixel(mark.x), y.pixel(mark.y), RADIUS[mark.kind] + 4
        width = text_width(words)
        places: list[Place] = [
            (at_x + gap, at_y + 4, "start"),
            (at_x - gap, at_y + 4, "end"),
            (at_x, at_y - gap, "middle"),
            (at_x, at_y + gap + 10, "middle"),
            (at_x + gap - 2, at_y - gap + 2, "start"),
            (at_x + gap - 2, at_y + gap + 8, "start"),
            (at_x - gap + 2, at_y - gap + 2, "end"),
            (at_x - gap + 2, at_y + gap + 8, "end"),
            (at_x + gap + 14, at_y - gap - 10, "start"),
            (at_x + gap + 14, at_y + gap + 20, "start"),
        ]
        costs = [_cost(_text_box(*place, width), boxes, shapes) for place in places]
        place = places[costs.index(min(costs))]
        boxes.append(_text_box(*place, width))
        texts.append(element("text", words, x=place[0], y=place[1], text_anchor=place[2], class_=f"label {mark.kind}"))
    return texts


def _around(x: float, y: float, r: float) -> Box:
    return (x - r, y - r, x + r, y + r)


def _text_box(x: float, y: float, anchor: str, width: float) -> Box:
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    return (left, y - 11, left + width, y + 3)


def _cost(box: Box, texts: Iterable[Box], shapes: Iterable[Box]) -> float:
    """Return the area that a label covers of other texts, more for marks, and much more for what is off the frame."""
    covered = sum(_overlap(box, text) for text in texts) + 4 * sum(_overlap(box, shape) for shape in shapes)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return covered + 20 * (area - _overlap(box, (LEFT, TOP, RIGHT, BOTTOM)))


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def text_width(text: str) -> float:
    """Return about the width of a label in pixels; East Asian characters are twice as wide."""
    return CHARACTER * sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shortened(text: str, length: int) -> str:
    """Return a text of at most `length` characters, with an ellipsis where it was longer.

    >>> shortened("25 % fewer neurons", 6)
    '25 % …'
    """
    return text if len(text) <= length else text[: length - 1] + "…"
