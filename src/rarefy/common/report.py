"""Reports: tables that print as text and convert to JSON, returned by functions and commands."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rarefy.common.data_frame import data_frame

SMALLEST = 5e-4  # smaller numbers are printed as powers of ten
SHOWN = 4  # numbers of a name that stands for many
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Report:
    """The result of one operation: rows with the same keys, a summary and notes.

    Args:
        title: what was done, such as "pruned".
        rows: one dict per layer or tensor; all have the same keys.
        summary: totals by name.
        notes: remarks for the user, one sentence each.
        printed_rows: shorter rows to print in place of `rows`; JSON always has all rows.

    Example:
        >>> print(Report("pruned", ({"layer": "fc", "sparsity": 0.5},), {"total": "50.00 %"}))
        pruned
        layer  sparsity
        fc       0.5000
        total: 50.00 %
    """

    title: str
    rows: tuple[Mapping[str, Any], ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    printed_rows: tuple[Mapping[str, Any], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists that JSON can hold."""
        rows = [dict(r) for r in self.rows]
        return {"title": self.title, "rows": rows, "summary": dict(self.summary), "notes": list(self.notes)}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_pandas(self) -> Any:
        """Return all rows as a data frame of pandas, with numbers as they are; DataError where pandas is missing."""
        return data_frame(self.rows)

    def __str__(self) -> str:
        out = io.StringIO()
        print(self.title, file=out)
        if self.rows:
            print(table(self.rows if self.printed_rows is None else self.printed_rows), file=out)
        for key, value in self.summary.items():
            print(f"{key}: {cell_text(value)}", file=out)
        for note in self.notes:
            print(f"note: {note}", file=out)
        return out.getvalue().rstrip("\n")


def group_similar_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """Merge rows that differ only in numbers inside their texts; `many` says how many rows were merged.

    >>> group_similar_rows([{"layer": "h.0.fc", "units": "4 -> 2"}, {"layer": "h.1.fc", "units": "4 -> 2"}], "layer")
    [{'layer': 'h.*.fc', 'many': 2, 'units': '4 -> 2'}]

    Where that gives two rows one name, it has the numbers in place of "*":

    >>> rows = [{"layer": f"h.{i}.fc", "units": "4 -> 2" if i < 2 else "4 -> 3"} for i in range(4)]
    >>> [row["layer"] for row in group_similar_rows(rows, "layer")]
    ['h.{0,1}.fc', 'h.{2,3}.fc']
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(NUMBER.sub("*", v) if isinstance(v, str) else v for v in row.values())
        groups.setdefault(key, []).append(row)
    out = []
    for key, same in groups.items():
        values = dict(zip(same[0], key)) if len(same) > 1 else dict(same[0])
        out.append({name: values.pop(name), "many": len(same), **values})
    names = Counter(row[name] for row in out)
    for row, same in zip(out, groups.values()):
        if names[row[name]] > 1 and isinstance(row[name], str):
            row[name] = _with_numbers([r[name] for r in same])
    return out


def _with_numbers(names: list[str]) -> str:
    """Return names that differ in numbers as one, with the first numbers in braces."""
    pieces = NUMBER.split(names[0])
    columns = [list(dict.fromkeys(column)) for column in zip(*map(NUMBER.findall, names))]
    texts = [
        c[0] if len(c) == 1 else "{" + ",".join([*c[:SHOWN], *(["..."] if len(c) > SHOWN else [])]) + "}"
        for c in columns
    ]
    return "".join(a + b for a, b in zip(pieces, [*texts, ""]))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as an aligned text table; numbers are aligned to the right."""
    rows = list(rows)
    names = list(rows[0])
    cells = [[cell_text(r.get(n)) for n in names] for r in rows]
    width = [max(len(n), *(len(c[i]) for c in cells)) for i, n in enumerate(names)]
    right = [all(isinstance(r.get(n), int | float | None) for r in rows) for n in names]
    lines = [names, *cells]
    texts = ("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, width, right)) for line in lines)
    return "\n".join(t.rstrip() for t in texts)


def cell_text(value: Any) -> str:
    """Return a value as a table prints it: integers with separators, other numbers with four decimals, None as `-`.

    >>> [cell_text(x) for x in (12345, 0.25, 4e-7, 0.0, None)]
    ['12,345', '0.2500', '4.0e-07', '0.0000', '-']
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and 0 < abs(value) < SMALLEST:
        return f"{value:.1e}"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def three_digits(value: float) -> str:
    """Return a number of at least 0 with three significant digits.

    >>> [three_digits(x) for x in (0.012345, 5.0, 27.46, 267.4, 2151.0)]
    ['0.0123', '5.00', '27.5', '267', '2,151']
    """
    exponent = math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(0, 2 - exponent)}f}"
