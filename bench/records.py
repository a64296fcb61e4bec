"""Read the records in bench/results/ that may stand in a page (provenance.py), and write Markdown tables of them.

Needs the standard library and git alone.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from provenance import MAX_LOAD, Benchmark, benchmark_of, case_of, load_of, problems, with_runs

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

_shown: tuple[str, ...] = ()  # reasons of provenance.REASONS for which a record is marked and not left out

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


class NotMeasured(Exception):
    """No record of a table stands."""


@contextmanager
def showing(*reasons: str) -> Iterator[None]:
    """Within the block `read` also returns records with these reasons against them, and tables mark them."""
    global _shown
    before, _shown = _shown, reasons
    try:
        yield
    finally:
        _shown = before


def read(name: str, **wanted: Any) -> list[Row]:
    """Return the records of results/NAME.jsonl that stand and whose fields have the wanted values.

    Each has its machine's label, its place in the file, its run ("run_key") and the reasons against it ("marks"). A
    record of older code does not come back because a later one of its case does not stand.
    """
    rows, later = list[Row](), set[str]()
    for row in reversed(every(name, **wanted)):
        case = f"{row['label']} {case_of(name, row)}"
        if not row["marks"].keys() <= {*_shown}:
            later.add(case)
        elif not ("older" in row["marks"] and case in later):
            rows.append(row)
    return rows[::-1]


def every(name: str, **wanted: Any) -> list[Row]:
    """Return all records of results/NAME.jsonl whose fields have the wanted values, as `read` does."""
    file = RESULTS / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = with_runs(name, [json.loads(line) for line in lines])
    return [
        {
            **row,
            "label": machine(row),
            "threads": row["machine"]["threads"],
            "place": f"{name}.jsonl:{number}",
            "marks": problems(name, row),
        }
        for number, row in enumerate(rows, 1)
        if all(row.get(field) == value for field, value in wanted.items())
    ]


def required(name: str, **wanted: Any) -> list[Row]:
    """Return what `read` does.

    Raises:
        NotMeasured: there is no such record; the message is for the page.
    """
    rows = read(name, **wanted)
    if not rows:
        raise NotMeasured(not_measured(benchmark_of(name, wanted)))
    return rows


def receipt(name: str) -> Row:
    """Return results/NAME.json, the receipt of one run, as `read` returns records.

    Raises:
        NotMeasured: there is none, or it does not stand.
    """
    file = RESULTS / f"{name}.json"
    row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if row is not None:
        row = {"commit": "", "machine": row["settings"]["machine"], **row}
        row |= {"label": machine(row), "threads": row["machine"]["threads"], "place": f"{file.name}:1"}
        row |= {"run_key": name, "run_load": load_of(row)}
        row |= {"marks": problems(name, row)}
    if row is None or not row["marks"].keys() <= {*_shown}:
        raise NotMeasured(not_measured(benchmark_of(name)))
    return row


def not_measured(benchmark: Benchmark) -> str:
    """Return the sentence of a page in place of a table."""
    return f"No record stands: those in `bench/results/` are too old or were disturbed. Measure: `{benchmark.command}`."


def is_quiet(row: Row) -> bool:
    """Return whether times of a record count: other work did not disturb them."""
    return row["run_load"] <= MAX_LOAD


def seconds_of(row: Row, field: str = "seconds") -> str:
    """Return seconds for a table; "" where they were not measured or other work disturbed them."""
    return number(row[field]) if field in row and is_quiet(row) else ""


def mark(rows: Iterable[Row]) -> str:
    """Return a sentence that names the commits of records and what is against them."""
    rows = list(rows)
    texts = [f"Measured at {_commits(rows)}"]
    if older := [r for r in rows if "older" in r["marks"]]:
        some = "" if len(older) == len(rows) else f" ({_commits(older)})"
        texts.append(f"before later changes of this code{some}")
    if loaded := [r for r in rows if "load" in r["marks"]]:
        texts.append(f"at a load of up to {max(r['run_load'] for r in loaded):g}")
    if unknown := [r for r in rows if {"commit", "dirty"} & r["marks"].keys()]:
        texts.append(f"with code that no commit here has ({_commits(unknown)})")
    return f"{', '.join(texts)}."


def _commits(rows: Iterable[Row]) -> str:
    names = list(dict.fromkeys(row.get("commit", "")[:8] or "an unknown commit" for row in rows))
    return ", ".join(names)


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


def tried(rows: Iterable[Row]) -> str:
    """Return a sentence about the settings of other engines, and for which sizes, and how often, each was chosen; ""
    for older records."""
    chosen: dict[str, dict[str, Counter[str]]] = {}  # engine, setting: number of cases by size
    inexact: dict[tuple[str, str], float] = {}  # engine and setting: cosine of those that do not count
    for row in rows:
        for name, settings in row.get("settings", {}).items():
            inexact |= {(model_name(name), s): cosine for s, cosine in settings.get("refused", {}).items()}
            counts = chosen.setdefault(model_name(name), {})
            counts |= {s: Counter() for s in settings["tried"] if s not in counts}
            by_size = settings["setting"] if isinstance(settings["setting"], dict) else {"": settings["setting"]}
            for size, setting in by_size.items():
                counts[setting][size] += 1
    texts = []
    for name, counts in chosen.items():
        if len(counts) > 1:
            used = sorted((s for s in counts if counts[s]), key=lambda s: -counts[s].total())
            sizes = {size for s in used for size in counts[s]}
            cases = (
                ", ".join(used) if len(used) == 1 else ", ".join(f"{s} {_cases(counts[s], len(sizes))}" for s in used)
            )
            notes = {s: f", refused: cosine {inexact[name, s]:.2f}" for s in counts if (name, s) in inexact}
            others = " / ".join(f"{s}{notes.get(s, '')}" for s in counts if s not in used)
            texts.append(f"{name}: {cases}{f' (also tried: {others})' if others else ''}")
    differ = any(sum(map(bool, counts.values())) > 1 for counts in chosen.values())
    head = f"Settings of other engines{', with sizes or the number of cases where they differ' if differ else ''}"
    return f"{head}: {'; '.join(texts)}." if texts else ""


def _cases(counts: Counter[str], sizes: int) -> str:
    """Return for which sizes a setting was chosen; of one size, how often.

    >>> _cases(Counter({"1 x 16": 1, "16 x 128": 2}), 3), _cases(Counter({"1": 3}), 1)
    ('for 1 x 16, 16 x 128 (2)', '3')
    """
    if sizes == 1:
        return str(counts.total())
    return f"for {', '.join(f'{size} ({n})' if n > 1 else size for size, n in counts.items())}"


def per_machine(rows: Iterable[Row], make: Callable[[list[Row]], str]) -> str:
    """Return one table for each machine, under a line that names it, its threads, and the commits of its records."""
    parts = []
    for label, same in by(rows, "label").items():
        threads = "/".join(str(n) for n in sorted({row["threads"] for row in same}))
        plural = "" if threads == "1" else "s"
        parts.append(f"**{label}, {threads} thread{plural}**. {mark(same)}\n\n{make(same)}")
    return "\n\n".join(parts)


def marked(rows: Iterable[Row], text: str) -> str:
    """Return a table that does not depend on the machine, and the commits of its records."""
    return f"{text}\n\n{mark(rows)}"


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
