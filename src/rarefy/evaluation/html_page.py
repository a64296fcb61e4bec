"""One self-contained HTML page: elements that escape their text, tables, and a document that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rarefy.common.report import cell_text
from rarefy.common.version import __version__

VOID = ("meta", "wbr")  # elements without content and end tag
UNPRINTABLE = re.compile(  # control characters, changes of the direction of text, and what UTF-8 does not have
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


class Html(str):
    """Text that is markup already; any other text is escaped when it is put into an element."""


def plain_text(value: object) -> str:
    """Return a value as text without control characters and lone surrogates: they are replaced by a sign.

    >>> plain_text("a\\x00b")
    'a\ufffdb'
    """
    return UNPRINTABLE.sub("\ufffd", str(value))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element: children that are not `Html` are escaped, attributes that are None are left out.

    An underscore in an attribute's name is a hyphen, one at its end is dropped.

    >>> element("a", "x < y", class_="b", data_value='"1"', title=None)
    '<a class="b" data-value="&quot;1&quot;">x &lt; y</a>'
    """
    texts = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(plain_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    start = f"<{name}{''.join(texts)}>"
    return Html(start if name in VOID else f"{start}{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Return the markup of all children, one after the other."""
    return Html("".join(c if isinstance(c, Html) else html.escape(plain_text(c)) for c in children))


def breakable(text: str) -> Html:
    """Return a dotted name that may be broken after its dots.

    >>> breakable("layer.0.fc")
    'layer.<wbr>0.<wbr>fc'
    """
    first, *others = text.split(".")
    return join([first, *(part for other in others for part in (".", element("wbr"), other))])


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: its head.
        content: the text or markup of a cell, from the row.
        value: what the column is sorted by, a number or text; None sorts last. By default the text of the cell.
        numeric: whether cells are numbers, aligned to the right.
        wide: whether cells hold sentences.
    """

    title: str
    content: Callable[[Any], object]
    value: Callable[[Any], object] | None = None
    numeric: bool = False
    wide: bool = False


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[Any],
    row_attributes: Callable[[Any], Mapping[str, object]] = lambda row: {},
    sortable: bool = True,
) -> Html:
    """Return a table with a caption, in a box that scrolls sideways; the first column heads its rows."""
    head = (element("th", c.title, scope="col", class_="number" if c.numeric else None) for c in columns)
    body = (
        element("tr", *(_cell(c, row, i == 0) for i, c in enumerate(columns)), **row_attributes(row)) for row in rows
    )
    parts = element("thead", element("tr", *head)), element("tbody", *body)
    whole = element("table", element("caption", caption), *parts, class_="sortable" if sortable else None)
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)


def _cell(column: Column, row: Any, first: bool) -> Html:
    value = None if column.value is None else column.value(row)
    attributes = {
        "data_value": ("" if value is None else value) if column.value else None,
        "class_": "number" if column.numeric else "text" if column.wide else None,
    }
    content = column.content(row)
    return element("th", content, scope="row", **attributes) if first else element("td", content, **attributes)


def record_table(caption: str, rows: Sequence[Mapping[str, Any]]) -> Html:
    """Return a table of rows with any keys; numbers are aligned to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numbers = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in keys]
    columns = [
        Column(key, lambda r, k=key: cell_text(r.get(k)), (lambda r, k=key: r.get(k)) if number else None, number)
        for key, number in zip(keys, numbers)
    ]
    return table(caption, columns, rows)


def facts(values: Mapping[str, Any]) -> Html:
    """Return names and values as a list of definitions; mappings inside are written as `name, inner name`."""
    pairs = [(name, text) for name, text in _flat(values) if text != ""]
    return element("dl", *(element("div", element("dt", name), element("dd", text)) for name, text in pairs))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}, ")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        else:
            yield name, f"{value:.4g}" if isinstance(value, float) else cell_text(value)


def bars(*fractions: float) -> Html:
    """Return horizontal bars below each other, each as long as its fraction of the width; the text is beside them."""
    height = 100 / len(fractions)
    shapes = (
        element(
            "rect", x=0, y=f"{i * height + 4:g}", width=f"{100 * min(max(f, 0.0), 1.0):.4g}", height=f"{height - 8:g}",
            class_=f"bar-{i}",
        )
        for i, f in enumerate(fractions)
    )  # fmt: skip
    return element("svg", *shapes, class_="bars", viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true")


def tiles(values: Iterable[tuple[str, object, object]]) -> Html:
    """Return a row of key figures: name, value, remark."""
    items = (
        element("li", element("span", name), element("strong", value), element("small", remark))
        for name, value, remark in values
    )
    return element("ul", *items, class_="tiles")


def section(title: str, *children: object) -> Html:
    """Return a section under a heading."""
    return element("section", element("h2", title), *children)


@cache
def _asset(name: str) -> Html:
    return Html(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _source_hash(text: str) -> str:
    """Return the expression by which a policy allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def document(title: str, *children: object) -> str:
    """Return a page that loads nothing: its policy allows its own style and its own script, and no request."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src {_source_hash(style)}; script-src {_source_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content=f"Rarefy {__version__}"),
        element("title", title),
        element("style", style),
    )
    footer = element("footer", f"Written by Rarefy {__version__}. This page loads nothing and sends nothing.")
    body = element("body", element("main", element("h1", title), *children), footer, element("script", script))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
