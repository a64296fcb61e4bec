"""The same commands on machines that lack something: disk space, the right to write, memory, a clock that goes on.

A run ends with a clear error and the old output, or with the new one. When the machine is as it should be, the same
command ends in the same bits as on a machine that lacked nothing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interruption.commands import Job, negative_times
from interruption.kill_runs import End, Runner

FREE = (0.0, 0.6)  # parts of the bytes of the output
MORE_MEMORY = (1 << 20, 1 << 24, 1 << 30)  # bytes above what the process has
PAGE = 4096
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
STEP_BACK = 1000.0  # seconds


@dataclass
class Row:
    """How the runs of a job under one condition ended."""

    condition: str
    job: str
    refused: int = 0
    done: int = 0


class Machines:
    """Runs jobs under conditions, and collects what happens."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.can_mount = _own_mounts()

    def run(self) -> None:
        """Run all jobs under all conditions."""
        for job in self.runner.jobs:
            self.runner.reference(job)
        if self.can_mount:
            for job in self.runner.jobs:
                self.full_disk(job)
        else:
            self.skipped["full disk"] = "no file system can be mounted here: run as root"
        for job in self.runner.jobs:
            self.read_only(job)
            self.little_memory(job)
            self.clock_set_back(job)

    def full_disk(self, job: Job) -> None:
        """Run a job on a disk with less space than it needs."""
        row = self.row("full disk", job)
        with self.mounted():
            self.reset(job)
            needed = sum(map(len, self.runner.reference(job).new.values()))
            for part in FREE:
                self.reset(job)
                self.remount(f"size={_used(self.runner.folder) + int(part * needed) // PAGE * PAGE}")
                end = self.start(job)
                self.remount("size=4g")
                self.check(row, job, end, f"{part:.0%} of the space", ("no space for", "No space left on device"))

    def read_only(self, job: Job) -> None:
        """Run a job in a folder that cannot be written."""
        row, folder = self.row("read-only folder", job), self.runner.folder
        if self.can_mount:
            with self.mounted():
                self.reset(job)
                self.remount("ro")
                end = self.start(job)
                self.remount("rw")
                self.check(row, job, end, "mounted read-only", ("cannot write",))
        elif os.getuid():
            self.reset(job)
            places = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
            for place in places:
                place.chmod(0o555)
            end = self.start(job)
            for place in places:
                place.chmod(0o755)
            self.check(row, job, end, "without the right to write", ("cannot write",))
        else:
            self.skipped["read-only folder"] = "root may write everywhere, and nothing can be mounted here"

    def little_memory(self, job: Job) -> None:
        """Run a job with a limit of its address space, as `ulimit -v` sets it."""
        row = self.row("ulimit -v", job)
        for more in MORE_MEMORY:
            self.reset(job)

            def action(more: int = more) -> None:
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))
                job.run(self.runner.inputs, self.runner.folder, True)

            end = self.runner.child(action).wait()
            self.check(row, job, end, f"{more >> 20} MiB more", ("memory",))

    def clock_set_back(self, job: Job) -> None:
        """Run a job while the clock goes back, among files from the future."""
        row, folder = self.row("clock set back", job), self.runner.folder
        self.reset(job)
        future = time.time() + 1e8
        for file in (*folder.rglob("*"), *self.runner.inputs.rglob("*")):
            os.utime(file, (future, future))

        def action() -> None:
            seconds = time.time()

            def back() -> float:
                nonlocal seconds
                seconds -= STEP_BACK
                return seconds

            time.time, time.time_ns = back, lambda: int(1e9 * back())
            job.run(self.runner.inputs, folder, True)

        end = self.runner.child(action).wait()
        for problem in negative_times(folder / "out"):
            self.runner.add(job, 0, ["clock set back"], f"a time below 0: {problem}", end)
        self.check(row, job, end, "clock set back", ())

    def row(self, condition: str, job: Job) -> Row:
        """Return a new row of the results."""
        self.rows.append(Row(condition, job.name))
        return self.rows[-1]

    def reset(self, job: Job) -> None:
        """Put only the older output into the folder."""
        self.runner.reset(job, True)

    def start(self, job: Job) -> End:
        """Run a job to its end."""
        return self.runner.child(lambda: job.run(self.runner.inputs, self.runner.folder, True)).wait()

    def check(self, row: Row, job: Job, end: End, how: str, messages: tuple[str, ...]) -> None:
        """Check how a run has ended, and that the next one ends in the same bits."""
        runner, known = self.runner, self.runner.reference(job)
        where, now = [row.condition, how], runner.output(job)
        row.done += end.code == 0
        row.refused += end.code != 0
        if end.code and (end.code != 2 or "Traceback" in end.text):
            runner.add(job, 0, where, f"a run ends with {end.code}", end)
        elif end.code and not any(message in end.text for message in messages):
            runner.add(job, 0, where, "the error does not say what was wrong", end)
        if now != (known.old if end.code else known.new) and not (end.code and now == known.new):
            runner.add(job, 0, where, "neither the old output nor the new one", end)
        if end.code:
            runner.check_next(job, 0, where, True)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Run the block with a file system of its own at the folder of the runs."""
        folder = self.runner.folder
        folder.mkdir(exist_ok=True)
        _mount("-t", "tmpfs", "-o", "size=4g", "tmpfs", str(folder))
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    def remount(self, options: str) -> None:
        """Change the file system at the folder of the runs."""
        _mount("-o", f"remount,{options}", str(self.runner.folder))

    def statistics(self) -> str:
        """Return a table of all conditions."""
        lines = [f"{'condition':18}{'command':18}{'refused':>8}{'done':>6}"]
        lines += [f"{r.condition:18}{r.job:18}{r.refused:>8}{r.done:>6}" for r in self.rows]
        return "\n".join([*lines, *(f"{name}: skipped, {why}" for name, why in self.skipped.items())])

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain data."""
        return {"rows": [row.__dict__ for row in self.rows], "skipped": self.skipped}


def _own_mounts() -> bool:
    """Give this process mounts of its own, which end with it; return whether the system lets it."""
    if ctypes.CDLL(None).unshare(NEW_MOUNTS):
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _used(folder: Path) -> int:
    """Return the bytes in use on the file system of a folder."""
    state = os.statvfs(folder)
    return (state.f_blocks - state.f_bfree) * state.f_frsize
