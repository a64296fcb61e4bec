"""A table that prints and converts to JSON: what every command and function hands back."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Report:
    """Rows of equal keys under a title, and lines that sum them up.

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
    shown: tuple[Mapping[str, Any], ...] | None = None  # what is printed of many rows; JSON has all

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists that JSON can hold."""
        rows = [dict(r) for r in self.rows]
        return {"title": self.title, "rows": rows, "summary": dict(self.summary), "notes": list(self.notes)}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        out = io.StringIO()
        print(self.title, file=out)
        if self.rows:
            print(table(self.rows if self.shown is None else self.shown), file=out)
        for key, value in self.summary.items():
            print(f"{key}: {_cell(value)}", file=out)
        for note in self.notes:
            print(f"note: {note}", file=out)
        return out.getvalue().rstrip("\n")


def alike(rows: Iterable[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return one row for those that differ only in numbers within texts, with `many`: how many they are.

    >>> alike([{"layer": "h.0.fc", "units": "4 -> 2"}, {"layer": "h.1.fc", "units": "4 -> 2"}], "layer")
    [{'layer': 'h.*.fc', 'many': 2, 'units': '4 -> 2'}]
    """
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(NUMBER.sub("*", v) if isinstance(v, str) else v for v in row.values())
        found.setdefault(key, []).append(row)
    out = []
    for key, same in found.items():
        values = dict(zip(same[0], key)) if len(same) > 1 else dict(same[0])
        out.append({name: values.pop(name), "many": len(same), **values})
    return out


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as aligned text, numbers to the right."""
    rows = list(rows)
    names = list(rows[0])
    cells = [[_cell(r.get(n)) for n in names] for r in rows]
    width = [max(len(n), *(len(c[i]) for c in cells)) for i, n in enumerate(names)]
    right = [all(isinstance(r.get(n), int | float | None) for r in rows) for n in names]
    lines = [names, *cells]
    texts = ("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, width, right)) for line in lines)
    return "\n".join(t.rstrip() for t in texts)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
