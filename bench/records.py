"""Read the records in bench/results/ and write Markdown tables of them. Needs the standard library alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

# Records store the CPU's name and its extensions. Both EPYC generations with AVX-512 store the same; docs/log.md
# tells which commits were measured on the Zen 5.
ZEN5_COMMITS = ("e93d509",)


def machine(row: Row) -> str:
    """Return a label of the machine of a record: vendor and instruction set, so that two EPYCs stay apart."""
    record = row["machine"]
    name, flags = record["cpu"], set(record["extensions"])
    vendor = next((v for v in ("Intel Xeon", "AMD EPYC") if v.split()[-1] in name), name)
    if vendor == "AMD EPYC" and row["commit"].startswith(ZEN5_COMMITS):
        vendor = "AMD EPYC (Zen 5)"
    if "amx_bf16" in flags:
        return f"{vendor}, AMX"
    if "avx512_vnni" in flags:
        return f"{vendor}, AVX-512 VNNI"
    return f"{vendor}, {'AVX2' if 'avx2' in flags else 'portable kernels'}"


def read(name: str, **wanted: Any) -> list[Row]:
    """Return the records of results/NAME.jsonl whose fields have the wanted values, each with its machine's label."""
    rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if all(row.get(field) == value for field, value in wanted.items())]
    return [{**row, "label": machine(row), "threads": row["machine"]["threads"]} for row in rows]


def latest(rows: Iterable[Row], *fields: str) -> list[Row]:
    """Return the last record of each combination of fields, in order of first appearance."""
    return list({json.dumps([row.get(field) for field in fields]): row for row in rows}.values())


def by(rows: Iterable[Row], field: str) -> dict[Any, list[Row]]:
    """Return rows grouped by a field, in order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get(field), []).append(row)
    return groups


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


NAMES = {  # of models and engines in records
    "ours, ": "Rarefy, ",
    "onnxruntime ": "ONNX Runtime, ",
    "openvino ": "OpenVINO, ",
    "narrow-0, trained": "30 % fewer neurons, 25 % fewer heads, trained",
    "narrower-0, trained": "50 % fewer neurons, 33 % fewer heads, trained",
    "narrowest-0, trained": "67 % fewer neurons, 50 % fewer heads, trained",
    "int8": "8 bits",
    "int4": "4 bits",
}


def model_name(name: str) -> str:
    """Return the name of a deployed model for a table.

    >>> model_name("ours, narrower-0, trained, int8"), model_name("eager")
    ('Rarefy, 50 % fewer neurons, 33 % fewer heads, trained, 8 bits', 'eager torch, fp32')
    """
    if name == "eager":
        return "eager torch, fp32"
    for recorded, title in NAMES.items():
        name = name.replace(recorded, title)
    return name


def per_machine(rows: Iterable[Row], make: Callable[[list[Row]], str]) -> str:
    """Return one table for each machine, under a line that names it and its threads."""
    parts = []
    for label, same in by(rows, "label").items():
        threads = "/".join(str(n) for n in sorted({row["threads"] for row in same}))
        plural = "" if threads == "1" else "s"
        parts.append(f"**{label}, {threads} thread{plural}**\n\n{make(same)}")
    return "\n\n".join(parts)


def number(value: float) -> str:
    """Return a number with two or three significant digits: 0.27, 5.2, 87.4, 266, 2,151."""
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def percent(fraction: float) -> str:
    """Return a fraction as percent: 50 %."""
    return f"{100 * fraction:.0f} %"


def speedup(dense: float, ours: float) -> str:
    """Return two times and their ratio: 27.5 -> 7.1 (3.87x)."""
    return f"{number(dense)} -> {number(ours)} ({dense / ours:.2f}x)"


def spread(values: Sequence[float]) -> str:
    """Return a mean, with the standard deviation where there are several values."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


MIN_SPEEDUP = 0.98  # over eager, below which a model counts as slower


def eager_speedups(result: list[Row]) -> dict[str, str]:
    """Return the geometric mean of speed over eager, the slowest model, and how many are below 0.98, for each batch
    size and number of threads. The last record of a model counts."""
    by_batch: dict[str, dict[str, float]] = {}
    for l in sorted(result, key=lambda l: l["machine"]["threads"]):
        threads = l["machine"]["threads"]
        for batch, s in l.get("speed", {}).items():
            label = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
            by_batch.setdefault(label, {})[l["model"]] = s["speedup"]
    texts = {}
    for batch, found in by_batch.items():
        mean = statistics.geometric_mean(found.values())
        slowest, slower = min(found, key=lambda n: found[n]), sum(s < MIN_SPEEDUP for s in found.values())
        texts[batch] = (
            f"{mean:.2f}x as fast as eager torch (geometric mean of {len(found)} models), at least "
            f"{found[slowest]:.2f}x ({slowest}), {slower} below {MIN_SPEEDUP}x"
        )
    return texts
