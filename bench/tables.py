"""Write the tables and figures of README.md and docs/ from the records in bench/results/.

    python bench/tables.py                 rewrite every generated block and figure
    python bench/tables.py --check         exit with 1 if one is out of date
    python bench/tables.py --stale         list what no page or only docs/ shows, why, and what measures it anew
    python bench/tables.py --all NAME      print tables of all records, with what is against them; without NAME all
    python bench/tables.py --measure       measure what README.md shows at this commit, then rewrite; may be killed
    python bench/tables.py --measure docs  the same for all pages

A generated block stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a key of TABLES.
Of a case that was measured twice on one machine, the last record counts.

provenance.py has the reasons against a record. README.md and its figure show none that has one. Pages below docs/ also
show records that are only older than the code that they time, marked with their commit.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import coverage_tables
import figures
import quality_tables
import search_tables
import speed_tables
from provenance import BENCHMARKS, REASONS, Benchmark, NoHistoryError, benchmark_of, head
from records import RESULTS, NotMeasured, every, receipt, showing

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end table -->)", re.DOTALL)
TABLES = speed_tables.TABLES | search_tables.TABLES | quality_tables.TABLES | coverage_tables.TABLES
IN_DOCS = ("older",)  # what pages below docs/ show with a mark
README_FIGURES = ("docs/results/frontier.svg",)  # README.md shows no such records
README_NEEDS = ("language", "frontier/minilm", "demo", "optimize/smollm2")  # benchmarks of its tables
ONLY_WITH_AMX = ("frontier/minilm, avx512",)
DOCS_NEED = tuple(k for k, b in BENCHMARKS.items() if b.minutes and k not in (*README_NEEDS, *ONLY_WITH_AMX))
MEASURED = ROOT / "bench" / "build" / "measured.json"  # commands that ran to their end: the commit


def block(name: str) -> str:
    """Return a table, or a sentence about what measures it anew."""
    try:
        return TABLES[name]()
    except NotMeasured as error:
        return str(error)


def show(*names: str) -> None:
    """Print tables of all records, with what is against them: what a benchmark script does at its end."""
    try:
        with showing(*REASONS):
            print("\n\n".join(block(name) for name in names))
    except NoHistoryError as error:
        print(f"no table: {error}")


def pages() -> list[Path]:
    """Return README.md and all pages below docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render(text: str, *shown: str) -> str:
    """Return a page with every generated block written anew; records with the reasons `shown` are marked."""
    with showing(*shown):
        return BLOCK.sub(lambda m: f"{m[1]}{block(m[2])}\n{m[3]}", text)


def rendered() -> dict[Path, str]:
    """Return what each page and figure should be."""
    new = {
        page: render(
            page.read_text(encoding="utf-8"), *(() if page.name == "README.md" and page.parent == ROOT else IN_DOCS)
        )
        for page in pages()
    }
    for name, draw in figures.FIGURES.items():
        with showing(*(() if name in README_FIGURES else IN_DOCS)):
            new[ROOT / name] = figures.drawn(draw)
    return new


def stale() -> dict[Benchmark, list[tuple[str, int, tuple[str, ...]]]]:
    """Return the records of each benchmark: file, line, and the reasons against them."""
    found: dict[Benchmark, list[tuple[str, int, tuple[str, ...]]]] = {}
    for file in sorted(RESULTS.glob("*.json*")):
        for row in [receipt(file.stem)] if file.suffix == ".json" else every(file.stem):
            place = (file.name, int(row["place"].rpartition(":")[2] or 0), tuple(row["marks"]))
            found.setdefault(benchmark_of(file.stem, row), []).append(place)
    return found


def print_stale() -> None:
    """Print the list of `--stale`: what README.md needs first."""
    with showing(*REASONS):
        found = stale()
    missing, needed = [], [BENCHMARKS[key] for key in README_NEEDS]
    for benchmark, records in sorted(found.items(), key=lambda item: (item[0] not in needed, item[0].command)):
        minutes = f"{benchmark.minutes} minutes" if benchmark.minutes else "time not known"
        stand = sum(not marks for _, _, marks in records)
        if not stand:
            missing.append(benchmark)
        use = ", for README.md" if benchmark in needed else ""
        print(f"{benchmark.command}\n    {minutes}{use}; {stand} records stand")
        against: dict[tuple[str, str], list[int]] = {}
        for file, line, marks in records:
            if marks:
                against.setdefault((file, ", ".join(marks)), []).append(line)
        for (file, reasons), lines in against.items():
            print(f"    {reasons}: {file} lines {ranges(lines)}")
    print(f"{len(missing)} of {len(found)} benchmarks have no record that stands.")


def measure(keys: Iterable[str]) -> list[str]:
    """Run benchmarks that have not run to their end at this commit; return the commands whose records do not stand."""
    commit, without = head(), []
    for key in keys:
        command, done = BENCHMARKS[key].command, json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
        if done.get(command) == commit and has_standing_record(key, commit):
            print(f"measured already: {command}", flush=True)
            continue
        print(f"{command} ({BENCHMARKS[key].minutes} minutes)", flush=True)
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        ran = subprocess.run(words, cwd=ROOT, check=False)
        if ran.returncode or not has_standing_record(key, commit):
            without.append(command)
            continue
        MEASURED.parent.mkdir(exist_ok=True)
        MEASURED.write_text(json.dumps({**done, command: commit}, indent=1))
    return without


def has_standing_record(key: str, commit: str) -> bool:
    """Return whether a benchmark has a record of a commit with no reason against it."""
    name = key.partition("/")[0]
    with showing(*REASONS):
        rows = every(name) if (RESULTS / f"{name}.jsonl").is_file() else [receipt(name)]
    return any(
        benchmark_of(name, row) == BENCHMARKS[key] and row.get("commit", "")[:12] == commit and not row["marks"]
        for row in rows
    )


def ranges(lines: list[int]) -> str:
    """Return sorted numbers in short.

    >>> ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    parts: list[list[int]] = []
    for line in lines:
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a block is out of date")
    parser.add_argument("--stale", action="store_true", help="list records with a reason against them")
    parser.add_argument(
        "--measure", nargs="?", const="readme", choices=["readme", "docs"], help="measure what is missing"
    )
    parser.add_argument("--all", nargs="*", metavar="NAME", choices=[*TABLES, []], help="print tables of all records")
    arguments = parser.parse_args()
    if arguments.stale:
        return print_stale()
    if arguments.all is not None:
        return show(*(arguments.all or TABLES))
    without = list[str]()
    if arguments.measure:
        without = measure(README_NEEDS if arguments.measure == "readme" else [*README_NEEDS, *DOCS_NEED])
    changed = []
    for path, text in rendered().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            changed.append(path.relative_to(ROOT))
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    if arguments.check and changed:
        raise SystemExit(f"out of date, run python bench/tables.py: {', '.join(map(str, changed))}")
    if without:
        raise SystemExit("no record stands (failed, or the machine was busy); start this again: " + "; ".join(without))


if __name__ == "__main__":
    try:
        main()
    except NoHistoryError as error:
        raise SystemExit(f"tables: {error}") from None
