"""A receipt as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rarefy.common.report import three_digits
from rarefy.evaluation.html_page import (
    Column,
    Html,
    bars,
    breakable,
    document,
    element,
    facts,
    join,
    record_table,
    section,
    table,
    tiles,
)
from rarefy.evaluation.receipt import SIDES, Receipt, damaged_receipts


def receipt_page(receipt: Receipt) -> str:
    """Return a page of a receipt: quality, bytes and speed before and after, layers, stages, notes and the machine.

    Args:
        receipt: what `compress_` returned, or `receipt_from_dict` read.

    Returns:
        The text of an HTML file that loads nothing.

    Raises:
        ContainerError: a field of a receipt from a file is missing or of another type.
    """
    with damaged_receipts():
        return _page(receipt)


def _page(receipt: Receipt) -> str:
    settings = {k: v for k, v in receipt.settings.items() if k != "machine"}
    return document(
        f"Receipt: {receipt.name}",
        _verdict(receipt.quality),
        tiles(_key_figures(receipt)),
        section("Before and after", _comparison(receipt)) if receipt.rows() else "",
        section("Layers", _layers(receipt.sparsity["layers"])) if receipt.sparsity.get("layers") else "",
        section("Samples", *map(_sample, receipt.samples)) if receipt.samples else "",
        section("Stages", *map(_stage, receipt.stages)) if receipt.stages else "",
        notes(receipt.notes),
        section("Machine", facts(settings), machine_facts(receipt.settings.get("machine"))) if settings else "",
    )


def verdict(kind: str, label: str, sentence: str) -> Html:
    """Return the sentence on top of a page; `kind` is "good", "bad" or "plain"."""
    return element("p", element("strong", label), sentence, class_=f"verdict {kind}", role="status")


def notes(sentences: tuple[str, ...]) -> object:
    """Return a section of remarks, or nothing."""
    return section("Notes", element("ul", *(element("li", s) for s in sentences), class_="notes")) if sentences else ""


def machine_facts(machine: Any) -> object:
    """Return what is known of the machine, or nothing."""
    return facts(machine) if isinstance(machine, Mapping) else ""


def _verdict(quality: Mapping[str, Any]) -> Html:
    if not quality:
        return verdict("plain", "Not evaluated.", "The recipe measures no quality.")
    change = (
        f"{quality['metric']} went from {quality['before']:.4g} to {quality['after']:.4g} ({quality['change']:+.1%})"
    )
    if quality.get("allowed") is None:
        return verdict("plain", "Measured.", f"{change}; the recipe sets no limit.")
    passed = quality["passed"]
    label = "Within the limit." if passed else "Over the limit."
    return verdict("good" if passed else "bad", label, f"{change}; the recipe allows {quality['allowed']:.0%} worse.")


def _key_figures(receipt: Receipt) -> list[tuple[str, object, object]]:
    figures: list[tuple[str, object, object]] = []
    if quality := receipt.quality:
        figures.append((quality["metric"], f"{quality['after']:.4g}", f"before: {quality['before']:.4g}"))
    for name, sizes in (("on disk", receipt.disk), ("in memory", receipt.memory)):
        if sizes:
            smaller = sizes["before"] / max(sizes["after"], 1)
            figures.append((name, _megabytes(sizes["after"]), f"before: {_megabytes(sizes['before'])}, {smaller:.2f}x"))
    if receipt.sparsity:
        figures.append(("zeros in pruned layers", f"{receipt.sparsity['achieved']:.1%}", "of their weights"))
    for row in receipt.speed:
        for side, remark in (("after", ""), ("accelerated", ", skipping zeros")):
            if side in row:
                before, after = (f"{three_digits(row[s]['median'])} {row['unit']}" for s in (SIDES[0], side))
                text = f"before: {before}, {_times_faster(row, side):.2f}x as fast"
                figures.append((f"{row['what']}{remark}", after, text))
    return figures


def _megabytes(count: float) -> str:
    return f"{three_digits(count / 1e6)} MB"


def _times_faster(row: Mapping[str, Any], side: str) -> float:
    ratio = row[side]["median"] / row["before"]["median"]
    return ratio if row["unit"].endswith("/s") else 1 / ratio


def _comparison(receipt: Receipt) -> Html:
    """Return the rows of the printed receipt, with bars for those that have two numbers."""

    def pair(row: Mapping[str, str]) -> object:
        before, after = (_number(row[side]) for side in SIDES)
        largest = max(before or 0.0, after or 0.0)
        if before is None or after is None or largest <= 0:
            return ""
        return element("div", bars(before / largest, after / largest), class_="pair")

    columns = [
        Column("measured", lambda r: r["measured"].strip()),
        *(Column(side, lambda r, s=side: r[s], numeric=True) for side in SIDES),
        Column("change", lambda r: r["change"], numeric=True),
        Column("before above after", pair),
    ]
    return table("Medians, with quartiles in brackets", columns, receipt.rows(), sortable=False)


def _number(text: str) -> float | None:
    """Return the number with which a text begins; None where it does not.

    >>> _number("1,234 (1,200-1,300)"), _number("asked 50.00%")
    (1234.0, None)
    """
    first = text.split(" ")[0].replace(",", "").rstrip("%")
    try:
        return float(first)
    except ValueError:
        return None


def _layers(rows: list[Mapping[str, Any]]) -> Html:
    largest = max((row["dense_bytes"] for row in rows), default=1) or 1
    columns = [
        Column("layer", lambda r: breakable(r["layer"])),
        Column("shape", lambda r: r["shape"]),
        Column("pattern", lambda r: r["pattern"]),
        Column("asked", lambda r: f"{r['asked']:.2%}", lambda r: r["asked"], numeric=True),
        Column(
            "sparsity", lambda r: join([f"{r['sparsity']:.2%}", bars(r["sparsity"])]), lambda r: r["sparsity"], True
        ),
        Column("stored as", lambda r: r["format"]),
        Column("bytes, dense", lambda r: f"{r['dense_bytes']:,}", lambda r: r["dense_bytes"], numeric=True),
        Column(
            "bytes", lambda r: join([f"{r['bytes']:,}", bars(r["bytes"] / largest)]), lambda r: r["bytes"], numeric=True
        ),
    ]
    return table(f"{len(rows)} layers", columns, rows)


def _sample(sample: Mapping[str, Any]) -> Html:
    texts = {side: sample[side] for side in SIDES if side in sample}
    return element("div", element("h3", f"{sample['prompt']} …"), facts(texts))


def _stage(stage: Mapping[str, Any]) -> Html:
    summary = facts(stage["summary"]) if stage["summary"] else ""
    rows = [row for row in stage["rows"] if isinstance(row, Mapping)]
    listing = element("details", element("summary", f"{len(rows)} rows"), record_table(stage["title"], rows))
    remarks = element("ul", *(element("li", note) for note in stage.get("notes", ())), class_="notes")
    parts = [summary, listing if rows else "", remarks if stage.get("notes") else ""]
    return element("div", element("h3", stage["title"]), *parts)
