"""Change files at random and read them in processes of their own; `python -m fuzz` in tests/ is the command.

Each reader of the table in `fuzz.targets` runs in a process of its own, so that a crash is a finding and no end of the
run. A finding is: a process that died, more than 2 s of CPU time, more than 1 GB of memory, an exception that is none
of Rarefy's, a change under a hash that was not noticed. `--target NAME --seed N` repeats one.

A load of the machine is no finding: the least time of three readings counts, and on a slower machine as much more time
as its processor needs for a loop.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from mmap import mmap
from pathlib import Path
from typing import Any

from rarefy.common.errors import RarefyError

MAX_SECONDS = 2.0  # of CPU time for one mutation
READINGS = 3  # of a mutation that took longer
LOOP_SECONDS = 0.018  # of `slowness`, on the AMD EPYC of bench/results
HANG_SECONDS = 12.0  # of CPU time for all readings of one mutation, after which a worker is stopped
HANG_WALL_SECONDS = 120.0
MAX_BYTES = 1 << 30
ROUND_SECONDS = 20.0  # of one target before the next one's turn
PER_PROCESS = 20_000  # mutations, after which a worker is replaced, so that its memory stays small
NO_MEMORY = re.compile("allocate memory|bad_alloc|out of memory|unable to mmap|alloc_cpu", re.IGNORECASE)
SAVED = Path(__file__).parents[2] / "build" / "fuzz"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Change:
    """Files that replace those of the sample, whether a hash covers what was changed, and the part that is read."""

    files: Files
    is_covered: bool = False
    part: str = ""


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        name: of the target.
        make: writes valid files into a folder.
        parts: returns what is read on its own: the paths of files or folders among those files.
        mutate: returns changed files of a part.
        read: reads a part, and returns what identifies the result where hashes cover all of it.
        needs: packages; the target is left out where one is missing.
    """

    name: str
    make: Callable[[Path], None]
    parts: Callable[[Files], list[str]]
    mutate: Callable[[str, Files, random.Random], Change]
    read: Callable[[Path], Any]
    needs: tuple[str, ...] = ()


@dataclass
class Count:
    """What happened to the mutations of a target."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    next_seed: int = 0

    @property
    def total(self) -> int:
        """Return the number of mutations that were read."""
        return self.accepted + self.refused


@dataclass(frozen=True)
class Finding:
    """What went wrong with a mutation; `where` is the innermost line of Rarefy."""

    target: str
    seed: int
    kind: str
    where: str
    text: str
    trace: str = field(default="", compare=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what findings of one defect have in common."""
        return self.target, self.kind, self.where


@dataclass(frozen=True)
class Usage:
    """What a process has used since it began: one call of the system for both."""

    cpu_seconds: float
    peak_bytes: int

    @staticmethod
    def now() -> Usage:
        """Return the usage of this process."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Usage(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


class Sample:
    """The files of a target in a folder, which mutations replace and `restore` brings back."""

    def __init__(self, target: Target, folder: Path):
        self.target, self.folder = target, folder
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.parts = target.parts(self.files)
        self.expected: dict[str, Any] = {}

    def change(self, seed: int) -> Change:
        """Return the mutation of a seed."""
        rng = random.Random(f"{self.target.name} {seed}")
        part = rng.choice(self.parts)
        files = {n: d for n, d in self.files.items() if n == part or n.startswith(f"{part}/") or not part}
        return replace(self.target.mutate(part, files, rng), part=part)

    def write(self, files: Files) -> None:
        """Replace files by new ones: earlier models may still map the old ones."""
        for name, content in files.items():
            file = self.folder / name
            file.unlink(missing_ok=True)
            file.write_bytes(content)

    def restore(self, change: Change) -> None:
        """Undo a change, and remove what the reader has written."""
        self.write({name: self.files[name] for name in change.files})

    def read(self, part: str) -> Any:
        """Return what the reader makes of a part as it is."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.target.read(self.folder / part)

    def read_all(self) -> None:
        """Read all parts unchanged: they are valid, and what is imported late is imported now."""
        self.expected = {part: self.read(part) for part in self.parts}

    def try_seed(self, seed: int, before: Usage) -> tuple[Finding | bool, Usage]:
        """Return whether a mutation was accepted, or what it shows, and what the process has used by then."""
        for _ in range(READINGS):
            outcome, after = self._read_seed(seed, before)
            if not isinstance(outcome, Finding) or outcome.kind != "slow":
                break
            before = Usage.now()
        return outcome, after

    def _read_seed(self, seed: int, before: Usage) -> tuple[Finding | bool, Usage]:
        """Read a mutation once."""
        change = self.change(seed)
        self.write(change.files)
        try:
            result = self.read(change.part)
        except KeyboardInterrupt:
            raise
        except RarefyError as error:
            outcome = _memory_finding(self.target.name, seed, error) or False
        except BaseException as error:  # panics of Rust are no Exception
            outcome = _memory_finding(self.target.name, seed, error) or _raw_finding(self.target.name, seed, error)
        else:
            outcome = True
            if change.is_covered and result != self.expected[change.part]:
                outcome = Finding(self.target.name, seed, "not noticed", "", "a change under a hash was accepted")
        finally:
            self.restore(change)
        after = Usage.now()
        grown, seconds = after.peak_bytes - before.peak_bytes, after.cpu_seconds - before.cpu_seconds
        if not isinstance(outcome, Finding) and grown > MAX_BYTES:
            outcome = Finding(self.target.name, seed, "memory", "", f"{grown >> 20:,} MiB")
        if not isinstance(outcome, Finding) and seconds > MAX_SECONDS and seconds > MAX_SECONDS * slowness():
            outcome = Finding(self.target.name, seed, "slow", "", f"{seconds:.1f} s of CPU time")
        return outcome, after


def slowness() -> float:
    """Return how much more CPU time than on the reference machine a loop needs now, at least 1."""
    before = Usage.now()
    total = 0
    for i in range(1 << 18):
        total += i & 7
    return max(1.0, (Usage.now().cpu_seconds - before.cpu_seconds) / LOOP_SECONDS)


def limit_memory() -> None:
    """Let this process have no more than `MAX_BYTES` beyond what it has."""
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (size + MAX_BYTES, resource.RLIM_INFINITY))


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _where(error: BaseException) -> str:
    """Return the innermost line of Rarefy in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/rarefy/" in f.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else ""


def _memory_finding(name: str, seed: int, error: BaseException) -> Finding | None:
    for inner in _chain(error):
        if isinstance(inner, MemoryError) or NO_MEMORY.search(str(inner)[:2000]):
            trace = "".join(traceback.format_exception(inner))
            return Finding(name, seed, "memory", _where(inner), str(inner)[:200], trace)
    return None


def _raw_finding(name: str, seed: int, error: BaseException) -> Finding:
    trace = "".join(traceback.format_exception(error))[-6000:]
    return Finding(name, seed, type(error).__name__, _where(error), str(error)[:200], trace)


class Progress:
    """What a worker does now, in memory that its parent reads."""

    FORMAT = "<qddqq"

    def __init__(self) -> None:
        self.memory = mmap(-1, 64)

    def set(self, seed: int, used: Usage, accepted: int, refused: int) -> None:
        """Note that a mutation begins."""
        self.memory[: struct.calcsize(self.FORMAT)] = struct.pack(
            self.FORMAT, seed, time.monotonic(), used.cpu_seconds, accepted, refused
        )

    def get(self) -> tuple[int, float, float, int, int]:
        """Return seed, wall clock and CPU time at its begin, accepted and refused mutations."""
        return struct.unpack(self.FORMAT, self.memory[: struct.calcsize(self.FORMAT)])


def _work(sample: Sample, seeds: range, until: float, progress: Progress, log: Path) -> None:
    """Read mutations until a time, one after the other; a finding of memory ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stacks = open(f"{log}.stack", "w")  # noqa: SIM115 (open as long as the process)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    limit_memory()
    accepted = refused = 0
    used = Usage.now()
    progress.set(seeds.start, used, accepted, refused)
    for seed in seeds:
        outcome, used = sample.try_seed(seed, used)
        if isinstance(outcome, Finding):
            with log.open("a") as file:
                file.write(json.dumps(outcome.__dict__) + "\n")
        accepted += outcome is True
        refused += outcome is not True
        progress.set(seed + 1, used, accepted, refused)
        if time.monotonic() > until or (isinstance(outcome, Finding) and outcome.kind == "memory"):
            break


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Runner:
    """Runs targets in turns, and collects what happens."""

    def __init__(self, targets: Iterable[Target], first_seed: int = 0, say: Callable[[str], None] = print):
        self.targets, self.say = list(targets), say
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="rarefy-fuzz-", dir=memory))
        self.counts = {t.name: Count(next_seed=first_seed) for t in self.targets}
        self.findings: dict[tuple[str, str, str], Finding] = {}
        self.repeats: Counter[tuple[str, str, str]] = Counter()
        self.samples: dict[str, Sample] = {}

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.root, ignore_errors=True)

    def sample(self, target: Target) -> Sample:
        """Return the sample of a target, which a process of its own makes: it may start threads."""
        if target.name not in self.samples:
            folder = self.root / target.name / "sample"
            folder.mkdir(parents=True)
            pid = os.fork()
            if not pid:
                _exit_after(lambda: target.make(folder))
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError(f"the sample of {target.name} could not be made")
            self.samples[target.name] = Sample(target, folder)
            self.samples[target.name].read_all()  # here, so that workers find all code imported
        return self.samples[target.name]

    def run(self, minutes: float | None, count: int | None) -> None:
        """Run all targets in turns until the time is over, or each has had `count` mutations."""
        end = None if minutes is None else time.monotonic() + 60 * minutes
        while (end is None or time.monotonic() < end) and any(
            count is None or c.total < count for c in self.counts.values()
        ):
            for target in self.targets:
                left = None if count is None else count - self.counts[target.name].total
                if left is not None and left <= 0:
                    continue
                share = ROUND_SECONDS if end is None else min(ROUND_SECONDS, (end - time.monotonic()))
                if end is not None and share <= 0:
                    return
                self.run_worker(target, time.monotonic() + share, left)

    def run_worker(self, target: Target, until: float, count: int | None) -> None:
        """Run one process of a target until a time, and note how it ends."""
        sample, progress, counted = self.sample(target), Progress(), self.counts[target.name]
        log, first = self.root / target.name / "findings", counted.next_seed
        log.write_bytes(b"")
        seeds = range(first, first + min(PER_PROCESS, count or PER_PROCESS))
        began = time.monotonic()
        pid = os.fork()
        if not pid:
            _exit_after(lambda: _work(sample, seeds, until, progress, log))
        try:
            death, seed = self._wait(pid, progress)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._note(counted, progress, began)
            raise
        self._note(counted, progress, began)
        for line in log.read_text().splitlines():
            self.add(Finding(**json.loads(line)))
        if death:
            stack = Path(f"{log}.stack").read_text()
            frames = re.findall(r'File "([^"]*/rarefy/[^"]*)", line (\d+) in (\S+)', stack)
            ours = [f"{Path(f).name}:{n} {name}" for f, n, name in frames]
            self.add(Finding(target.name, seed, death, ours[0] if ours else "", "", stack[-6000:]))
            change = sample.change(seed)
            sample.restore(change)
            counted.refused += 1
            counted.next_seed = seed + 1

    def _note(self, counted: Count, progress: Progress, began: float) -> None:
        seed, _, _, accepted, refused = progress.get()
        counted.accepted += accepted
        counted.refused += refused
        counted.next_seed = max(seed, counted.next_seed)
        counted.seconds += time.monotonic() - began

    def _wait(self, pid: int, progress: Progress) -> tuple[str, int]:
        """Return how a worker ended, "" when it was done, else "crash (SIGSEGV)" or "hang", and at which seed."""
        hang = None
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
            seed, began, cpu_began, _, _ = progress.get()
            if not began:  # the unchanged files are read, and code with them
                continue
            wall, cpu = time.monotonic() - began, _cpu_seconds(pid) - cpu_began
            if hang is None and (cpu > HANG_SECONDS or wall > HANG_WALL_SECONDS):
                hang = seed
                os.kill(pid, signal.SIGUSR1)
                time.sleep(0.2)
                os.kill(pid, signal.SIGKILL)
        seed = progress.get()[0]
        if hang is not None:  # a worker may have come to an end with it before it was stopped
            return "hang" if seed == hang else "", seed
        if os.WIFSIGNALED(status):
            return f"crash ({signal.Signals(os.WTERMSIG(status)).name})", seed
        return f"crash (exit status {os.WEXITSTATUS(status)})" if status else "", seed

    def add(self, finding: Finding) -> None:
        """Note a finding; the input of the first of its kind is kept."""
        self.repeats[finding.key] += 1
        if finding.key in self.findings:
            return
        self.findings[finding.key] = finding
        folder = SAVED / f"{finding.target}-{finding.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in self.samples[finding.target].change(finding.seed).files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        self.say(
            f"FINDING {finding.kind} in {finding.where or 'no line of Rarefy'}: {finding.text[:200]}\n"
            f"  repeat: --target {finding.target} --seed {finding.seed}; its files are in {folder}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics of all targets by name, and the findings, as plain data."""
        counts = {name: {**c.__dict__, "total": c.total} for name, c in self.counts.items()}
        found = [{**finding.__dict__, "count": self.repeats[key]} for key, finding in self.findings.items()]
        return {"targets": counts, "findings": found}

    def statistics(self) -> str:
        """Return a table of all targets."""
        lines = [f"{'target':24}{'mutations':>11}{'accepted':>10}{'refused':>10}{'findings':>10}{'per second':>12}"]
        total = Count()
        for name, c in self.counts.items():
            found = sum(1 for key in self.findings if key[0] == name)
            rate = c.total / c.seconds if c.seconds else 0.0
            lines.append(f"{name:24}{c.total:>11,}{c.accepted:>10,}{c.refused:>10,}{found:>10}{rate:>12,.0f}")
            total.accepted, total.refused = total.accepted + c.accepted, total.refused + c.refused
            total.seconds += c.seconds
        rate = total.total / total.seconds if total.seconds else 0.0
        lines.append(
            f"{'all':24}{total.total:>11,}{total.accepted:>10,}{total.refused:>10,}{len(self.findings):>10}{rate:>12,.0f}"
        )
        return "\n".join(lines)


def _exit_after(action: Callable[[], None]) -> None:
    """Do something in a forked process and end it, without what the parent would do at its end."""
    try:
        action()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)
    os._exit(0)
