"""Run random cases in processes with sanitizers, and collect what they find; `python -m stress sanitize` in tests/.

Three builds of the kernels take turns: with AddressSanitizer and UndefinedBehaviorSanitizer, the same with AVX-512 and
AMX emulated, and with ThreadSanitizer. The emulation checks the masks of loads and stores too, which AddressSanitizer
does not see in the CPU's own. A finding is a report of a sanitizer, a wrong output, an error, or a case that
takes longer than two minutes. It is repeated by its build, case and seed.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rarefy.common.errors import FormatError
from rarefy.runtime import bindings
from stress.builds import EMULATED_SANITIZED, SANITIZED, THREADS, Build, start_python
from stress.kernel_cases import CASES, Case
from stress.program_cases import PROGRAMS

MAX_SECONDS = 120  # of one case
MAX_THREADS = 3  # of a case
NAMES = (*CASES, *PROGRAMS)
BUILDS = {b.name: b for b in (SANITIZED, EMULATED_SANITIZED, THREADS)}
STOP = "report_bugs=1:history_size=7:halt_on_error=1:exitcode=66"  # of ThreadSanitizer
EMULATED_ISAS = ("avx512", "amx")


def usable_isas() -> list[str]:
    """Return the instruction sets with which the loaded kernels run here."""
    before, usable = str(bindings.isa()), []
    for name in bindings.ISAS:
        try:
            bindings.use(name)
            usable.append(name)
        except FormatError:
            continue
    bindings.use(before)
    return usable


def run_case(name: str, seed: int, isas: list[str], set_threads: Callable[[int], Any], steps: Counter[str]) -> str:
    """Run a case with an instruction set and a number of threads that follow from its seed; return the first."""
    settings = random.Random(f"settings {name} {seed}")
    isa, threads = settings.choice(isas), settings.randint(1, MAX_THREADS)
    before = str(bindings.isa())
    bindings.use(isa)
    set_threads(threads)
    case = Case(name, seed)
    case.threads = threads
    try:
        if name in CASES:
            CASES[name][0](case)
        else:
            PROGRAMS[name](case, steps)
    finally:
        bindings.use(before)
    return isa


def work(first: int, seconds: float, names: list[str], isas: list[str], pool: str) -> None:
    """Run cases from the `first` on until the time is over: case i has a name and a seed that follow from i.

    Writes a line of JSON before and after each; a crash shows which one it was.
    """
    set_threads: Callable[[int], Any] = torch.set_num_threads
    if pool:
        from stress.races import use_pool

        set_threads = use_pool(pool).stress_set_num_threads
    usable, end = [i for i in usable_isas() if not isas or i in isas], time.monotonic() + seconds
    i = first
    while time.monotonic() < end:
        seed, at = divmod(i, len(names))
        print(json.dumps({"begin": i}), flush=True)
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        steps, text = Counter[str](), ""
        try:
            run_case(names[at], seed, usable, set_threads, steps)
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
        print(json.dumps({"name": names[at], "seed": seed, "steps": steps, "text": text}), flush=True)
        i += 1
    faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True)
class Finding:
    """What went wrong in a case."""

    build: str
    name: str
    seed: int
    text: str


@dataclass
class Cases:
    """Cases that ran with a build: how many of each name, the steps of their programs, and findings."""

    build: str
    counts: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return whether cases ran and nothing was found."""
        return bool(self.counts) and not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        counts = ", ".join(f"{n:,} {name}" for name, n in self.counts.items())
        steps = f"{self.steps.total():,} steps of programs of {len(self.steps)} kinds"
        lines = [f"{self.build}: {self.counts.total():,} cases, {len(self.findings)} findings; {counts}; {steps}"]
        return "\n".join([*lines, *(f"  {f.name} --seed {f.seed}: {f.text[:3000]}" for f in self.findings)])


def run_build(
    build: Build, seconds: float, first_seed: int = 0, names: tuple[str, ...] = NAMES, max_findings: int = 20
) -> Cases:
    """Run cases with a build for so many seconds, in new processes after crashes."""
    result, at = Cases(build.name), first_seed * len(names)
    pool = ""
    if build is THREADS:
        from stress.races import pool as build_pool

        pool = str(build_pool())
    isas = list(EMULATED_ISAS) if build is EMULATED_SANITIZED else []
    build.library()  # not in the time
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(result.findings) < max_findings:
        left = end - time.monotonic()
        code = f"from stress.sanitize import work\nwork({at}, {left}, {list(names)!r}, {isas!r}, {pool!r})"
        with (
            tempfile.TemporaryFile("w+") as errors,
            start_python(build, code, stderr=errors, TSAN_OPTIONS=STOP) as process,
        ):
            assert process.stdout is not None
            for line in filter(None, map(_record, process.stdout)):
                if "begin" in line:
                    at = line["begin"] + 1
                    continue
                result.counts[line["name"]] += 1
                result.steps.update(line["steps"])
                if line["text"]:
                    result.findings.append(Finding(build.name, line["name"], line["seed"], line["text"]))
            if process.wait():
                errors.seek(0)
                seed, which = divmod(at - 1, len(names))
                result.findings.append(Finding(build.name, names[which], seed, errors.read()[:6000]))
    return result


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        print(line, file=sys.stderr, end="")
        return None
