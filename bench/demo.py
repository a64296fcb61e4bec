"""Run the demo and keep its receipt, with its run and machine, as the one that README.md shows: `make bench-demo`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tables
from recording import recorded, start

RESULTS = Path(__file__).parent / "results" / "demo.json"
OUT = Path(__file__).parents[1] / "build" / "demo"
COMMAND = ["-m", "rarefy", "compress", "smollm2-135m", "--recipe", "smollm2-demo", "--out", str(OUT), "--force"]


def main() -> None:
    start(RESULTS)
    subprocess.run([sys.executable, *COMMAND], check=True)
    receipt = recorded(json.loads((OUT / "receipt.json").read_text(encoding="utf-8")))
    RESULTS.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    tables.show("demo")


if __name__ == "__main__":
    main()
