"""Calls of compiled models from several threads under ThreadSanitizer.

The kernels are built with it. Their parallel regions run on threads of `threads.cpp`, since the locks of OpenMP, which
torch was built with, are unknown to it. Python and torch are not instrumented: accesses that they make are not seen,
except by functions of the C library, and their locks are.
"""

from __future__ import annotations

import ctypes
import random
import re
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from helpers.compile_models import far
from rarefy.runtime import bindings
from stress.builds import FOLDER, THREADS, run_tool, start_python
from stress.models import MODELS
from stress.soak import INPUTS

CALLERS = 4  # threads of Python
MAX_KERNEL_THREADS = 3  # of each call
SOURCE = Path(__file__).with_name("threads.cpp")


def pool() -> Path:
    """Return the library of threads for parallel regions, built with ThreadSanitizer."""
    library = FOLDER / "threads" / "threads.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        options = ("-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
        run_tool("g++", *options, SOURCE, "-o", library)
    return library


def use_pool(path: str) -> ctypes.CDLL:
    """Let the kernels of this process run parallel regions on the threads of a library."""
    threads = ctypes.CDLL(path)
    bindings.library().rarefy_set_parallel_for(threads.stress_parallel_for, threads.stress_num_threads)
    return threads


def call_models(path: str, names: list[str], seed: int, seconds: float) -> None:
    """Compile models, call each from several threads for so many seconds, and print how many outputs were wrong."""
    threads = use_pool(path)
    for name in names:
        calls, wrong = call_model(threads, name, seed, seconds)
        print(f"{name}: {calls} calls, {wrong} differ", flush=True)


def call_model(pool: ctypes.CDLL, name: str, seed: int, seconds: float) -> tuple[int, int]:
    """Call a model from several threads, whose parallel regions have different numbers of threads of their own.

    Returns:
        The number of calls, and of outputs that differ from those of calls one after the other.
    """
    model, calls, wrong = MODELS[name], [0] * CALLERS, [0] * CALLERS
    compiled, batches = model.compile(), model.inputs(INPUTS, torch.Generator().manual_seed(seed))
    expected = [compiled(**b) for b in batches]
    tolerance = 1e-5 if model.precision is None else 0.01  # sums depend on the number of threads, and then codes do
    compiled.forget()  # threads build programs at the same time
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            pool.stress_set_num_threads(rng.randint(1, MAX_KERNEL_THREADS))
            i = rng.randrange(INPUTS)
            wrong[number] += not far(expected[i], compiled(**batches[i])) <= tolerance
            calls[number] += 1
            if rng.random() < 0.02:
                compiled.forget()

    running = [threading.Thread(target=work, args=(n,)) for n in range(CALLERS)]
    _ = [t.start() for t in running], [t.join() for t in running]
    return sum(calls), sum(wrong)


@dataclass
class Races:
    """What ThreadSanitizer reported: the functions of each report, and how often; and the output of the calls."""

    reports: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    output: str = ""
    code: int = 0

    @property
    def passed(self) -> bool:
        """Return whether all calls ran, with the right outputs and without a report."""
        return (
            not self.code and not self.reports and bool(re.fullmatch(r"(.*: [1-9]\d* calls, 0 differ\n)+", self.output))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        reports = [f"{n}x {key}\n{self.first[key]}" for key, n in self.reports.items()]
        return f"{self.output}{len(reports)} kinds of reports\n" + "\n".join(reports)


def find_races(names: list[str], seconds: float, seed: int = 0) -> Races:
    """Call models in a process of their own, each for so many seconds, and return what ThreadSanitizer reports."""
    code = f"from stress.races import call_models\ncall_models({str(pool())!r}, {names!r}, {seed}, {seconds})"
    process = start_python(THREADS, code)
    output, errors = process.communicate()
    races = parse(errors)
    races.output, races.code = output, process.returncode
    if process.returncode:
        races.output += errors[-3000:]
    return races


def parse(errors: str) -> Races:
    """Return the reports in what a process has written, by the innermost functions of both accesses."""
    races = Races()
    for report in re.findall(r"WARNING: ThreadSanitizer.*?\n={10,}", errors, re.DOTALL):
        frames = re.findall(r"#0 (\S+).*?(\S+)\s*\(", report)
        key = " / ".join(dict.fromkeys(f"{function} {Path(place).name}" for function, place in frames[:2]))
        races.reports[key] += 1
        races.first.setdefault(key, report)
    return races
