"""What a cut reports: what is left of each group, and why others stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rarefy.common.report import Report, group_similar_rows
from rarefy.dependency.graph import Group, unsupported_notes
from rarefy.dependency.symbolic_dims import Axis
from rarefy.structured import unit_selection
from rarefy.structured.surgery import Removal

NOT_SELECTED = "not selected"
UNEVEN = "`chunk` needs it to stay equal to a part that cannot be cut"


def cut_report(cut: Any, masks: Mapping[Axis, Tensor], removal: Removal, dry_run: bool, mask_only: bool) -> Report:
    """Return the report of the last step of a cut: a row a group, and what is left of the model."""
    selected = {g.axis for g in cut.groups}
    rows = []
    for g in cut.graph.groups:
        n = int(masks[g.axis].sum()) if g.axis in masks else g.size
        why = "" if g.axis in masks else g.lock or cut.stays.get(g.axis)
        why = why if why is not None else UNEVEN if g.axis in selected else NOT_SELECTED
        why = "the budget keeps all of its units" if not why and n == cut.origin[g.axis] else why
        rows.append(row(g, cut.origin[g.axis], n, why))
    counts = {axis: int(m.sum()) for axis, m in masks.items()}
    summary: dict[str, Any] = {}
    for name, measure in unit_selection.MEASURES.items():
        before, after = cut.whole[name], measure(cut.graph, counts)
        summary[name] = f"{before:,} -> {after:,} ({after / max(before, 1):.3f})"
    if cut.time is not None:
        summary["time"] = f"{cut.time:.3f} of the dense model's, in the timing that chose this cut"
    if removal.repaired:
        summary["repaired"] = f"{len(removal.repaired)} layers and norms"
    notes = unsupported_notes(cut.graph)
    if removal.unseen:
        notes += ("the example's outputs do not depend on the removed units: the cut was not verified",)
    title = "cut: nothing done" if dry_run else "cut: units are zero, none removed" if mask_only else "cut"
    selected_rows = [r for r in rows if r["stays because"] != NOT_SELECTED]
    return Report(title, tuple(rows), summary, notes, tuple(group_similar_rows(selected_rows, "group")))


def row(group: Group, before: int, after: int, why: str) -> dict[str, Any]:
    """Return the report row of a group."""
    others = len(group.notes) - 1
    return {
        "group": group.name, "kind": group.kind, "units": f"{before} -> {after}", "parameters": len(group.members),
        "stays because": why, "note": group.notes[0] + (f" and {others} more" if others else "") if group.notes else "",
    }  # fmt: skip
