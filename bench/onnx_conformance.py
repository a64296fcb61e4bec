"""Run the ONNX project's own tests of operators through `from_onnx`, and record which pass.

    python bench/onnx_conformance.py

Appends one JSON line to results/onnx_conformance.jsonl: for each operator how many tests pass, how many are refused and
why. Needs the extra `onnx`. About a minute.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recording import keep

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "onnx_conformance.jsonl"
sys.path.insert(0, str(HERE.parent / "tests"))


def run() -> Iterator[dict[str, Any]]:
    """Yield the record of all tests."""
    import onnx

    conformance = importlib.import_module("helpers.onnx_conformance")
    counts: dict[str, dict[str, Any]] = defaultdict(lambda: {"passed": 0, "refused": 0, "wrong": 0, "why": ""})
    totals = {
        "passed": 0,
        "refused": 0,
        "wrong": 0,
        "no type in torch": 0,
        "expanded, passed": 0,
        "expanded, refused": 0,
    }
    for case in conformance.collect():
        what, why = conformance.outcome(case)
        if not conformance.has_torch_types(case):
            totals["no type in torch"] += 1
            continue
        totals[what] += 1
        if case.expanded:
            totals[f"expanded, {what}"] += 1
            continue
        operator = counts[case.operator]
        operator[what] += 1
        operator["why"] = why or operator["why"]
    yield {"run": "onnx", "onnx": onnx.__version__, "totals": totals, "operators": dict(sorted(counts.items()))}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    keep(RESULTS, [run])
