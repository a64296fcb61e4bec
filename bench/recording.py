"""Append records of a benchmark to its file, each with its run (provenance.py) and machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import provenance
from rarefy.evaluation.profiling import machine

Line = dict[str, Any]
ENGINES = ("torch", "onnxruntime", "openvino", "nncf", "xllamacpp")  # packages; xllamacpp holds llama.cpp


def start(results: Path) -> Line:
    """Return the run of this process; before its first record of `bench/results/` wait until the machine is quiet."""
    return provenance.begin(wait=results.parent == Path(__file__).parent / "results")


def recorded(line: Line) -> Line:
    """Return a record with its run, machine and the versions of engines."""
    return {**line, **provenance.begin(), "machine": machine(), "versions": versions()}


@cache
def versions() -> dict[str, str]:
    """Return the versions of ENGINES that are installed."""
    found: dict[str, str] = {}
    for name in ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def append(results: Path, line: Line) -> None:
    """Append a record to a file."""
    with results.open("a") as file:
        print(json.dumps(recorded(line)), file=file)


def keep(results: Path, runs: Iterable[Callable[[], Iterable[Line]]]) -> None:
    """Append the records of each run to a file as they are measured."""
    for run in runs:
        start(results)
        for line in run():
            print(line, flush=True)
            append(results, line)


def kept(results: Path) -> list[Line]:
    """Return the records of a file; none if it does not exist."""
    return [json.loads(l) for l in results.read_text().splitlines()] if results.is_file() else []
