"""Kill commands at random moments and run them again; `python -m interruption` in tests/ is the command.

Each run is a fork of this process, which has imported everything. It is killed by SIGKILL after a random time, before
a random operation on a file, or shortly after one. Then the output must be the old one or the new one, and the same
command must end in the same bits as a run that nothing interrupted. `--job NAME --seed N` repeats one kill.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rarefy
from helpers.hub_server import Hub
from interruption.commands import REPOSITORY, Files, Job, content, without_times, write_inputs

KINDS = ("after a time", "before a file operation", "after a file operation")
FILE_EVENTS = {
    "open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "os.chmod", "shutil.rmtree",
    "shutil.copyfile", "os.utime", "socket.connect", "http.client.send",
}  # fmt: skip
NO_MEMORY = re.compile("MemoryError|allocate memory|out of memory", re.IGNORECASE)
MAX_DELAY = 0.004  # seconds after a file operation
AGAIN = 0.3  # how many of the runs that go on are killed too
TIMEOUT = 600.0  # seconds, after which a run hangs


@dataclass(frozen=True)
class Kill:
    """A moment: seconds after the begin, or the number of a file operation and seconds after it."""

    kind: str
    seconds: float = 0.0
    operation: int = 0

    def __str__(self) -> str:
        number = f" {self.operation}" if self.operation else ""
        return f"{self.kind}{number}, {1000 * self.seconds:.1f} ms"


@dataclass(frozen=True)
class End:
    """How a run ended: its exit code, negative for a signal, what it printed, and its file operations and seconds."""

    code: int
    text: str
    operations: int
    seconds: float


@dataclass(frozen=True)
class Reference:
    """What a job writes when nothing interrupts it, after how many file operations and seconds."""

    old: Files
    new: Files
    operations: int
    seconds: float


@dataclass(frozen=True)
class Finding:
    """What went wrong after a kill."""

    job: str
    seed: int
    moment: str
    problem: str
    text: str = field(default="", compare=False)


class Child:
    """A run in a process of its own, whose file operations in a folder are counted."""

    def __init__(self, action: Callable[[], Any], folder: Path, log: Path, kill: Kill | None = None):
        self.log, self.kill, self.began = log, kill, time.monotonic()
        self.pipe, to_parent = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            self._run(action, folder, to_parent)
        os.close(to_parent)

    def _run(self, action: Callable[[], Any], folder: Path, to_parent: int) -> None:
        """Do the action in the new process and end it."""
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        count, kill, where = [0], self.kill, str(folder)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in FILE_EVENTS or not _is_change(event, arguments, where):
                return
            count[0] += 1
            if kill is not None and count[0] == kill.operation:
                if kill.kind == KINDS[1]:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(to_parent, b"x")

        sys.addaudithook(audit)
        code = 0
        try:
            action()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except rarefy.RarefyError as error:
            print(f"rarefy: {error}", file=sys.stderr)
            code = 2
        except BaseException as error:
            no_memory = isinstance(error, MemoryError | RuntimeError) and NO_MEMORY.search(repr(error))
            if no_memory and "rarefy/cli" not in traceback.format_exc():  # a call from Python may raise it as it is
                print(f"out of memory: {error}", file=sys.stderr)
                code = 2
            else:
                traceback.print_exc()
                code = 70
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(to_parent, f"{count[0]}\n".encode())
        os._exit(code)

    def wait(self) -> End:
        """Return how the run ends; kill it when its moment has come."""
        kill, text, deadline = self.kill, b"", self.began + TIMEOUT
        if kill is not None and kill.kind == KINDS[0]:
            deadline = self.began + kill.seconds
        while True:
            ready, _, _ = select.select([self.pipe], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.pipe, 64) if ready else b""
            text += data
            if ready and not data:
                break
            if not ready:
                os.kill(self.pid, signal.SIGKILL)
                break
            if text == b"x" and kill is not None:
                deadline = time.monotonic() + kill.seconds
        seconds = time.monotonic() - self.began
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.pipe)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        count = text.removeprefix(b"x").strip()
        said = self.log.read_text(errors="replace")
        return End(code, said, int(count) if count.isdigit() else 0, seconds)


def _is_change(event: str, arguments: tuple[Any, ...], where: str) -> bool:
    """Return whether an audited event changes files below a folder, or talks to the hub."""
    if event.startswith(("socket", "http")):
        return True
    if event == "open" and not (len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & 0o3):
        return False
    return any(os.fsdecode(a).startswith(where) for a in arguments if isinstance(a, str | bytes | os.PathLike))


class Runner:
    """Runs jobs, kills them, and collects what happens."""

    def __init__(self, jobs: Iterable[Job], hub: Hub, say: Callable[[str], None] = print):
        self.jobs, self.hub, self.say = list(jobs), hub, say
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="rarefy-kill-", dir=memory))
        self.root.chmod(0o755)
        self.inputs, self.folder, self.log = self.root / "inputs", self.root / "run", self.root / "log"
        self.inputs.mkdir()
        self.references: dict[str, Reference] = {}
        self.phases: dict[str, Counter[str]] = {job.name: Counter() for job in self.jobs}
        self.kills: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.findings: list[Finding] = []
        self.must_end(self.child(lambda: write_inputs(self.inputs)).wait(), "the inputs")

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.root, ignore_errors=True)

    def child(self, action: Callable[[], Any], kill: Kill | None = None) -> Child:
        """Begin a run."""
        return Child(action, self.folder, self.log, kill)

    def must_end(self, end: End, what: str) -> End:
        """Return how a run ended that must succeed; RuntimeError where it did not."""
        if end.code:
            raise RuntimeError(f"{what}: exit code {end.code}\n{end.text}")
        return end

    def reset(self, job: Job, with_old: bool) -> None:
        """Empty the folder of the runs, and put the older output there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.folder.glob("*"):  # a mounted folder stays itself
            path.unlink()
        self.folder.mkdir(exist_ok=True)
        if job.command == "push":
            self.hub.repositories.pop(REPOSITORY, None)
            shutil.copytree(self.inputs / "result", self.folder / "out")
            if with_old:
                job.old(self.inputs, self.hub)  # type: ignore[arg-type]
        elif with_old:
            shutil.copytree(self.root / f"old {job.name}", self.folder / "out")

    def output(self, job: Job) -> Files | None:
        """Return the files of the output as they are now."""
        if job.command != "push":
            return content(self.folder / "out")
        files = self.hub.repositories.get(REPOSITORY, {}).get("main")
        return {n: without_times(n, d) for n, d in files.items()} if files else None

    def reference(self, job: Job) -> Reference:
        """Return what a job writes; a first run says which modules it imports, so that later ones find them."""
        if job.name in self.references:
            return self.references[job.name]
        modules = self.root / "modules"
        old: Files = {}
        self.reset(job, False)
        if job.command != "push":
            self.must_end(self.child(lambda: job.old(self.inputs, self.folder)).wait(), f"old {job.name}")
            shutil.copytree(self.folder / "out", self.root / f"old {job.name}")
        outputs = list[Files | None]()
        for run in range(3):
            self.reset(job, run == 2)
            if run == 2:
                old = self.output(job) or {}

            def action(last: bool = run == 2) -> None:
                job.run(self.inputs, self.folder, last)
                modules.write_text("\n".join(sys.modules))

            end = self.must_end(self.child(action).wait(), job.name)
            outputs.append(self.output(job))
            for name in modules.read_text().split("\n") if not run else ():
                with suppress(Exception):
                    importlib.import_module(name)
        if not outputs[0] or outputs[0] != outputs[1] or outputs[0] != outputs[2]:
            names = {n for o in outputs for n in o or {} if (o or {})[n] != (outputs[0] or {}).get(n)}
            raise RuntimeError(f"{job.name}: runs that nothing interrupted differ in {sorted(names)}")
        self.references[job.name] = Reference(old, outputs[0], end.operations, end.seconds)
        return self.references[job.name]

    def moment(self, job: Job, rng: random.Random) -> Kill:
        """Return a random moment of a job."""
        known = self.reference(job)
        kind = rng.choice(KINDS) if known.operations else KINDS[0]
        if kind == KINDS[0]:
            return Kill(kind, rng.uniform(0.0, known.seconds))
        delay = 0.0 if kind == KINDS[1] else rng.uniform(0.0, MAX_DELAY)
        return Kill(kind, delay, rng.randint(1, known.operations))

    def try_seed(self, job: Job, seed: int) -> None:
        """Kill a run of a job at the moment of a seed, perhaps the next one too, and let the last one end."""
        rng = random.Random(f"{job.name} {seed}")
        known, with_old = self.reference(job), rng.random() < 0.5
        self.reset(job, with_old)
        moments = list[str]()
        while True:
            kill = self.moment(job, rng)
            end = self.child(lambda: job.run(self.inputs, self.folder, with_old), kill).wait()
            self.kinds[kill.kind] += end.code == -signal.SIGKILL
            self.kills[job.name] += end.code == -signal.SIGKILL
            moments.append(str(kill))
            now = self.output(job)
            phase = self.phase(job, now, with_old, end)
            self.phases[job.name][phase] += 1
            if problem := self.problem_after(job, now, known, with_old, end):
                return self.add(job, seed, moments, problem, end)
            if end.code != -signal.SIGKILL or rng.random() > AGAIN:
                break
        self.check_next(job, seed, moments, with_old)

    def check_next(self, job: Job, seed: int, moments: list[str], with_old: bool) -> None:
        """Run a job to its end, and check that the output is the one of a run that nothing interrupted."""
        known, done = self.reference(job), self.output(job) == self.reference(job).new
        end = self.child(lambda: job.run(self.inputs, self.folder, with_old)).wait()
        refused = done and not with_old and _is_refused(end)
        if end.code and not refused:
            return self.add(job, seed, moments, f"the next run ends with {end.code}", end)
        if self.output(job) != known.new:
            names = _differences(self.output(job), known.new)
            return self.add(job, seed, moments, f"the next run writes something else: {names}", end)
        left = sorted(f.name for f in self.folder.iterdir() if f.name not in ("out", "w"))
        left += [f.name for f in self.folder.glob("out/.*")]
        if left and not refused:
            self.add(job, seed, moments, f"the next run leaves {', '.join(left)}", end)

    def problem_after(self, job: Job, now: Files | None, known: Reference, with_old: bool, end: End) -> str:
        """Return what is wrong after a kill, "" where nothing is."""
        refused = now == known.new and not with_old and _is_refused(end)
        if end.code not in (0, -signal.SIGKILL) and not refused:
            return f"a run ends with {end.code}"
        before = known.old if with_old else None
        if now not in (before, known.new):
            return f"neither the old output nor the new one: {_differences(now, known.new)}"
        if now is not None and job.command == "push" and not with_old and "rarefy.json" not in now:
            return "a part was published"
        return ""

    def phase(self, job: Job, now: Files | None, with_old: bool, end: End) -> str:
        """Return how far a run had come."""
        if end.code != -signal.SIGKILL:
            return "after the end"
        if now == self.references[job.name].new:
            return "after the output was in place"
        if job.command == "push":
            return "card written" if (self.folder / "out" / "README.md").exists() else "before the card"
        names = [f.name for f in self.folder.iterdir()]
        if any(n.startswith(".out.partial-") for n in names):
            return "while the output was written"
        return "with a saved state" if {".out.work", ".out.packing", "w"} & {*names} else "before anything was written"

    def add(self, job: Job, seed: int, moments: list[str], problem: str, end: End) -> None:
        """Note a finding."""
        finding = Finding(job.name, seed, "; ".join(moments), problem, end.text[-3000:])
        self.findings.append(finding)
        self.say(f"FINDING {problem}\n  repeat: --job '{job.name}' --seed {seed} ({finding.moment})\n{finding.text}")

    def run(self, counts: dict[str, int], first_seed: int = 0) -> None:
        """Kill each job so many times."""
        for job in self.jobs:
            seed = first_seed
            while self.kills[job.name] < counts[job.name]:
                self.try_seed(job, seed)
                seed += 1

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        jobs = {
            job.name: {
                "kills": self.kills[job.name],
                "phases": dict(self.phases[job.name]),
                "seconds": self.references[job.name].seconds if job.name in self.references else None,
                "file_operations": self.references[job.name].operations if job.name in self.references else None,
            }
            for job in self.jobs
        }
        return {"jobs": jobs, "kinds": dict(self.kinds), "findings": [f.__dict__ for f in self.findings]}

    def statistics(self) -> str:
        """Return tables of all jobs."""
        lines = [f"{'command':18}{'kills':>6}{'findings':>10}{'seconds':>9}{'file operations':>17}"]
        for name, row in self.to_dict()["jobs"].items():
            found, seconds = sum(f.job == name for f in self.findings), row["seconds"] or 0.0
            lines.append(f"{name:18}{row['kills']:>6}{found:>10}{seconds:>9.2f}{row['file_operations'] or 0:>17}")
            lines += [f"    {phase:36}{count:>4}" for phase, count in sorted(row["phases"].items())]
        moments = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        lines.append(f"{'all':18}{self.kills.total():>6}{len(self.findings):>10}   ({moments})")
        return "\n".join(lines)


def _is_refused(end: End) -> bool:
    """Return whether a run has found its own output in place already, and nobody has said to replace it."""
    return end.code == 2 and "exists and is a Rarefy folder" in end.text


def _differences(a: Files | None, b: Files) -> str:
    """Return which files differ."""
    names = sorted(n for n in {**(a or {}), **b} if (a or {}).get(n) != b.get(n))
    return "no output" if a is None else ", ".join(names[:5])


def shares(jobs: Iterable[Job], kills: int) -> dict[str, int]:
    """Return how many kills each job gets: each command as many, but a search, which takes long, half of it."""
    weights = {job.name: 0.5 if job.command == "optimize" else 1.0 for job in jobs}
    number = Counter(job.command for job in jobs)
    weights = {job.name: weights[job.name] / number[job.command] for job in jobs}
    return {name: max(1, round(kills * w / sum(weights.values()))) for name, w in weights.items()}
