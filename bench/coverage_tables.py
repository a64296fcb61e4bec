"""Tables of what is supported, from records in results/."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from provenance import BENCHMARKS
from records import NotMeasured, Row, by, marked, not_measured, number, read, required, table, tried

MAX_DIFFERENCE = 1e-4  # of the largest output, up to which a model read from a file equals ONNX Runtime


def onnx_totals() -> str:
    """How many of the ONNX project's tests of operators pass."""
    record = required("onnx_conformance")[-1]
    totals = record["totals"]
    count = totals["passed"] + totals["refused"] + totals["wrong"]
    share = 100 * totals["passed"] / count
    rows = [
        ["passed", f"{totals['passed']:,} ({share:.1f} %)"],
        ["refused by name", f"{totals['refused']:,}"],
        ["other outputs", f"{totals['wrong']:,}"],
        ["of types that torch does not have (4 bits and less), refused", f"{totals['no type in torch']:,}"],
    ]
    head = [f"tests of onnx {record['onnx']}, float, integer and bool tensors", "number"]
    return marked([record], table(head, rows))


def onnx_operators() -> str:
    """Which operators are read."""
    operators = required("onnx_conformance")[-1]["operators"]
    passed = [f"{name} ({c['passed']})" for name, c in operators.items() if c["passed"] and not c["refused"]]
    partly = [
        f"{name} ({c['passed']} of {c['passed'] + c['refused']})"
        for name, c in operators.items()
        if c["passed"] and c["refused"]
    ]
    refused = [f"{name} ({c['refused']})" for name, c in operators.items() if not c["passed"]]
    rows = [["all tests pass", ", ".join(passed)], ["some pass", ", ".join(partly)], ["refused", ", ".join(refused)]]
    return table(["", "operators, and how many tests they have"], [row for row in rows if row[1]])


def onnx_models() -> str:
    """How many files of each architecture are read and equal ONNX Runtime, and times where they were measured."""
    lines, ratios, shown = [], [], list[Row]()
    for name, records in by(_files("correct", "speed"), "model").items():
        shown += records
        outcomes = [v for r in records for v in r.get("files", {}).items()]
        files = {k: v for k, v in dict(outcomes).items() if not str(v).startswith("not exported")}
        differences = [v for v in files.values() if isinstance(v, float)]
        equal = sum(d <= MAX_DIFFERENCE for d in differences)
        timed: dict[str, Any] = next((r for r in reversed(records) if r["run"] == "speed"), {})
        if timed and not files:  # the timed file was compared too
            files, differences, equal = {"": 0}, [timed["apart"]], int(timed["apart"] <= MAX_DIFFERENCE)
        cells = [name, f"{equal} of {len(files)}", f"{max(differences, default=math.nan):.1e}"]
        if timed:
            theirs, ours = timed["onnxruntime"][1], timed["compiled"][1]
            ratios.append(theirs / ours)
            cells += [number(theirs), number(ours), f"{theirs / ours:.2f}x"]
        lines.append(cells)
    head = ["architecture", "files that equal ONNX Runtime", "largest difference"]
    if not ratios:
        return marked(shown, table(head, lines))
    lines = [line + [""] * (6 - len(line)) for line in lines]
    mean = f"Geometric mean {statistics.geometric_mean(ratios):.2f}x, least {min(ratios):.2f}x."
    head += ["ONNX Runtime, ms", "compiled, ms", "times as fast"]
    return marked(shown, f"{table(head, lines)}\n\n{mean}\n\n{tried(shown)}".rstrip())


def _files(*runs: str) -> list[Row]:
    """Return the records of files of some runs."""
    rows = [r for r in read("onnx_models") if r["run"] in runs]
    if not rows:
        raise NotMeasured(not_measured(BENCHMARKS[f"onnx_models/{runs[-1]}"]))
    return rows


def onnx_changes() -> str:
    """Times of files with zeros and in 8 bits, and whether their cut models equal their exports."""
    rows, shown = [], list[Row]()
    for name, records in by(required("onnx_changes"), "model").items():
        record = records[-1]
        shown.append(record)
        times, apart = {n: t[1] for n, t in record["milliseconds"].items()}, record["apart"]
        cells = [name, number(times["compiled"])]
        zeros = times.get("80 % zeros")
        cells.append("" if zeros is None else f"{number(zeros)} ({times['compiled'] / zeros:.2f}x)")
        for way, base in (("onnxruntime, 8 bits", None), ("8 bits", "onnxruntime, 8 bits")):
            if way not in times:
                cells.append("")
                continue
            ratio = f", {times[base] / times[way]:.2f}x" if base in times else ""
            cells.append(f"{number(times[way])} ({100 * apart[way]:.1f} % off{ratio})")
        cut = record["cut"]
        rows.append([*cells, f"{cut:.0e}" if isinstance(cut, float) else "no"])
    head = ["architecture", "compiled, ms", "80 % zeros", "ONNX Runtime, 8 bits", "compiled, 8 bits"]
    return marked(shown, f"{table([*head, 'cut to half, trained, exported'], rows)}\n\n{tried(shown)}".rstrip())


def ocr() -> str:
    """Times and quality of the trained files of an OCR system, beside ONNX Runtime's."""
    rows, shown = [], list[Row]()
    for name, records in by(_files("ocr"), "model").items():
        record = records[-1]
        shown.append(record)
        times, quality = record["milliseconds"], record["quality"]
        for way, quartiles in times.items():
            base = times["ONNX Runtime, 8 bits" if "8 bits" in way else "ONNX Runtime"][1]
            ratio = f"{number(quartiles[1])} ({base / quartiles[1]:.2f}x)"
            rows.append([name, way, f"{quality[way]:.1f}", ratio])
    return marked(
        shown, f"{table(['file', 'run by', 'quality, %', 'ms of one image'], rows)}\n\n{tried(shown)}".rstrip()
    )


TABLES: dict[str, Callable[[], str]] = {
    "ocr": ocr,
    "onnx-changes": onnx_changes,
    "onnx-models": onnx_models,
    "onnx-operators": onnx_operators,
    "onnx-totals": onnx_totals,
}
