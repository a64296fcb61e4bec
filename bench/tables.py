"""Write the tables and figures of README.md and docs/ from the records in bench/results/.

    python bench/tables.py            rewrite every generated block and figure
    python bench/tables.py --check    exit with 1 if one is out of date

A generated block stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a key of TABLES.
Of a case that was measured twice on one machine, the last record counts.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import coverage_tables
import figures
import quality_tables
import search_tables
import speed_tables

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end table -->)", re.DOTALL)
TABLES = speed_tables.TABLES | search_tables.TABLES | quality_tables.TABLES | coverage_tables.TABLES


def show(*names: str) -> None:
    """Print tables: what a benchmark script does at its end."""
    print("\n\n".join(TABLES[name]() for name in names))


def pages() -> list[Path]:
    """Return README.md and all pages below docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render(text: str) -> str:
    """Return a page with every generated block written anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a block is out of date")
    arguments = parser.parse_args()
    new = {page: render(page.read_text(encoding="utf-8")) for page in pages()}
    new |= {ROOT / name: draw() for name, draw in figures.FIGURES.items()}
    stale = []
    for path, text in new.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT))
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    if arguments.check and stale:
        raise SystemExit(f"out of date, run python bench/tables.py: {', '.join(map(str, stale))}")


if __name__ == "__main__":
    main()
