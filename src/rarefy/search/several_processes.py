"""A search on several processes (torchrun): what does not depend on one another is measured side by side.

Every process runs the same search and takes the same decisions, since all of them read the same journal and the same
clock. What a step needs next is measured by one process and sent to all as JSON. `prefetch` divides the steps that are
known to come. Each process works by itself meanwhile: the models are small, and times need whole machines.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rarefy.common.errors import ContainerError, RarefyError, RecipeError, first_line
from rarefy.model import distributed
from rarefy.search import solve
from rarefy.search.frontier import Point
from rarefy.search.journal import Journal
from rarefy.search.line_search import next_choice
from rarefy.search.points import OutOfTime
from rarefy.search.search_key import search_key
from rarefy.search.solve import Choice
from rarefy.search.targets import Targets
from rarefy.search.task import Task

T = TypeVar("T")
SPARE = 4  # calls for each process that may follow: some of them need nothing new
UNLIKE = 5.0  # a step that takes so many times as long as another one is not measured beside it
PATIENCE = 3600.0  # seconds beyond the time of the search after which another process counts as lost
EDGE = 0.1  # of a bracket, at each end, where no choice is measured beside others
PROCESSES = "processes"  # key of how many candidates a step of a line measures
ERRORS = {c.__name__: c for c in (RarefyError, *RarefyError.__subclasses__())}


class ProcessError(Exception):
    """Raised where another process has failed or is gone: the search cannot go on."""


@dataclass(frozen=True)
class Step:
    """A result that is not in the journal yet.

    Attributes:
        key: its name.
        compute: returns it.
        keep: whether it is written to disk.
        request: the call that asks for it.
    """

    key: str
    compute: Callable[[], Any]
    keep: Callable[[Any], bool]
    request: Callable[[], Any] | None = None


class Missing(Exception):
    """Raised by a journal that only collects steps, in place of measuring them."""

    def __init__(self, steps: Sequence[Step]):
        super().__init__(", ".join(s.key for s in steps))
        self.steps = steps


def open_journal(folder: Path | None, task: Task, evaluate: Any, eval_data: Any) -> Journal:
    """Return the journal of a search: in memory without a folder, shared where several processes search.

    Args:
        folder: where it lies; that of the first process counts.
        task: what is searched.
        evaluate: the user's metric, see `search_key`.
        eval_data: the batches that it measures on, or None.

    Raises:
        ContainerError: for a folder that cannot be written, is in use, or has results of another search.
        RecipeError: for processes that search something else, or on other machines.
    """
    if distributed.world_size() == 1:
        return Journal(folder, {} if folder is None else search_key(task, evaluate, eval_data))
    seconds = task.seconds + (0.0 if task.recovery is None else task.recovery.seconds)
    return SharedJournal(folder, search_key(task, evaluate, eval_data), seconds)


def batches(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """Return the items in groups of so many, the last one with the rest.

    >>> batches("abcde", 2)
    ['ab', 'cd', 'e']
    """
    return [items[i : i + count] for i in range(0, len(items), count)]


def next_choices(
    first: int,
    choices: Sequence[Choice],
    seen: Mapping[int, Point],
    low: int,
    high: int,
    targets: Targets,
    count: int,
) -> list[int]:
    """Return the choices of a line that are measured side by side: the first one alone where it was seen.

    Within a bracket they stand around the first one and cut it into parts, equal ones where the first is in the middle.
    Before there is one, each is the next choice if all before it keep the loss.

    Args:
        first: the next choice of one process.
        choices: the line.
        seen: the points that were measured, by the number of their choice.
        low: the last choice that is known to keep the loss.
        high: the first one that is known not to; the number of choices where none is known.
        targets: the limits.
        count: how many are wanted.
    """
    if count == 1 or first in seen:
        return [first]
    if min(high, len(choices)) == len(choices):
        result = [first]
        while len(result) < count and result[-1] < len(choices) - 1:
            result.append(next_choice(choices, seen, result[-1], len(choices), targets))
        return result
    start, end = choices[low].saving, choices[high].saving
    part = (end - start) / (count + 1)
    margin = EDGE * (end - start) + part * (count - 1) / 2
    middle = min(max(choices[first].saving, start + margin), end - margin)
    wanted = [middle + part * (i - (count - 1) / 2) for i in range(count)]
    inside = (min(max(solve.at_saving(choices, s), low + 1), high - 1) for s in wanted)
    return sorted({i for i in inside if i not in seen} or {first})


@contextmanager
def _lost_processes() -> Iterator[None]:
    """Raise ProcessError where the connection to another process breaks."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            "another process of the search has ended, or its machine is gone: its own output says why. The same "
            "command goes on from what was measured"
        ) from error


class SideBySideJournal(Journal):
    """A journal that collects the steps behind requests, and has them measured so many at once."""

    collecting = False

    def get(self, key: str, compute: Callable[[], Any], keep: Callable[[Any], bool] = lambda value: True) -> Any:
        """Return the result of a key as `Journal.get`; where there is none yet, one process measures it."""
        if key not in self.values:
            step = Step(key, compute, keep)
            if self.collecting:
                raise Missing([step])
            failed = self._measure([step])
            if key in failed:
                name, message = failed[key]
                raise ERRORS.get(name, RarefyError)(message)
        return self.values[key]

    def prefetch(self, requests: Iterable[Callable[[], Any]], spare: Iterable[Callable[[], Any]] = ()) -> None:
        """Measure what calls will `get`, side by side, until they have all they need.

        Requests may prefetch themselves: their steps are collected with the others. A request that runs out of time is
        left out, as is a step that fails: the call itself will say so.
        """
        waiting, failed = list(requests), set[str]()
        while waiting:
            asking = [(r, [s for s in self._missing(r) if s.key not in failed]) for r in waiting]
            waiting = [r for r, steps in asking if steps]
            steps = [*{s.key: s for _, of_request in asking for s in of_request}.values()]
            if self.collecting:
                if steps:
                    raise Missing(steps)
                return
            chunks = batches(sorted(steps, key=self._expected_seconds), self.processes)
            for chunk in chunks:
                if chunk is not chunks[0] and len(chunk) < self.processes:
                    break  # what comes next may fill it
                chunk = [s for s in chunk if chunk is chunks[0] or self._is_missing(s)]
                if len(chunk) < self.processes:
                    spare = list(islice(spare, SPARE * self.processes))
                    more = {s.key: s for r in spare for s in self._missing(r) if s.key not in failed}
                    chunk += [s for s in more.values() if s.key not in {c.key for c in chunk}]
                longest = UNLIKE * self._expected_seconds(chunk[0]) if chunk else 0.0
                chunk = [s for s in chunk if self._expected_seconds(s) <= longest or not longest]  # others wait
                failed |= self._measure(chunk[: self.processes]).keys() if chunk else set()

    def _expected_seconds(self, step: Step) -> float:
        """Return what the last step of a kind took; 0 for the first one."""
        return self.seconds_of(step.key.partition(" ")[0]) or 0.0

    def _is_missing(self, step: Step) -> bool:
        """Return whether a step is still needed, and still fits into the time."""
        return step.request is not None and any(s.key == step.key for s in self._missing(step.request))

    def _missing(self, request: Callable[[], Any]) -> list[Step]:
        """Return the steps that a call asks for before it can go on."""
        outer, self.collecting = self.collecting, True
        try:
            request()
        except Missing as missing:
            return [s if s.request else replace(s, request=request) for s in missing.steps]
        except (OutOfTime, RarefyError):
            pass
        finally:
            self.collecting = outer
        return []

    def _measure(self, steps: Sequence[Step]) -> dict[str, tuple[str, str]]:
        """Measure at most one step in each process and add their results; return the errors of those that failed."""
        raise NotImplementedError


class SharedJournal(SideBySideJournal):
    """The journal of all processes. That of the first one is on disk; the others have the same in memory.

    The clock stands still between two steps, so that all processes read the same time. While a process measures, it
    reads its own, which is set to that of the others after each step.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], seconds: float):
        """Read the results in the folder of the first process, and lock it.

        Args:
            folder: where the file lies; that of the first process counts.
            settings: what the results depend on, the same in all processes.
            seconds: how long the search may take.

        Raises:
            ContainerError: as `Journal`, in all processes.
            RecipeError: for processes that search something else, or on other machines.
        """
        import torch.distributed as dist

        self.processes, self.rank = dist.get_world_size(), dist.get_rank()
        self.now, self.offset, self.measuring = 0.0, 0.0, False
        with _lost_processes():
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds + PATIENCE))
        settings, error = json.loads(json.dumps(settings)), ""
        try:
            super().__init__(folder if self.rank == 0 else None, settings, self._time)
        except ContainerError as refused:
            super().__init__(None, {}, self._time)
            error = str(refused)
        try:
            known = {"values": self.values, "costs": self.costs, "shared": self.shared} if self.rank == 0 else {}
            sent = self._exchange({"error": error, "settings": settings, "host": socket.gethostname(), **known})
            first = sent[0]
            if first["error"]:
                raise ContainerError(first["error"])
            for rank, other in enumerate(sent):
                differs = [n for n in settings if other["settings"].get(n) != first["settings"].get(n)]
                if differs:
                    raise RecipeError(
                        f"process {rank} differs from the first one in {', '.join(differs)}: start all processes with "
                        "the same command, files and threads, on machines of the same kind"
                    )
            self.values, self.costs, self.shared = first["values"], first["costs"], first["shared"]
            hosts = [other["host"] for other in sent]
            if len(set(hosts)) < len(hosts):
                self.notes.append("several processes measured times on one machine: they may have slowed each other")
            if not self.values:
                self.get(PROCESSES, lambda: self.processes)
        except BaseException:
            self.close()
            raise

    def _time(self) -> float:
        return time.perf_counter() + self.offset if self.measuring else self.now

    def _measure(self, steps: Sequence[Step]) -> dict[str, tuple[str, str]]:
        began, mine = self.now, dict[str, Any]()
        if self.rank < len(steps):
            mine = self._measured(steps[self.rank].compute)
        sent = self._exchange({"keys": [s.key for s in steps], **{n: v for n, v in mine.items() if n != "raised"}})
        if "raised" in mine:
            raise mine["raised"]
        failed = {}
        for step, outcome in zip(steps, sent):
            if "error" in outcome:
                failed[step.key] = outcome["error"]
            else:
                self.shared[step.key] = passed = (self.now - began) / len(steps)
                self._add(step.key, outcome["value"], outcome["seconds"], step.keep, shared=passed)
        return failed

    def _measured(self, compute: Callable[[], Any]) -> dict[str, Any]:
        """Return what a computation gives and the seconds that it took, or why it failed."""
        self.measuring, began = True, time.perf_counter()
        try:
            return {"value": json.loads(json.dumps(compute(), allow_nan=False)), "seconds": time.perf_counter() - began}
        except RarefyError as error:
            return {"error": [type(error).__name__, str(error)]}
        except Exception as error:
            return {"failure": f"{type(error).__name__}: {first_line(error)}", "raised": error}
        finally:
            self.measuring = False

    def _exchange(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the messages of all processes, and set the clock.

        Raises:
            ProcessError: where a process has failed, is gone, or is at another step.
        """
        local = time.perf_counter() + self.offset
        with _lost_processes():
            sent = distributed.gather_json({**message, "now": local}, self.group)
        self.now = max(other["now"] for other in sent)
        self.offset = self.now - time.perf_counter()
        for rank, other in enumerate(sent):
            if rank != self.rank and "failure" in other:
                raise ProcessError(f"process {rank} of the search failed: {other['failure']}")
            if other.get("keys") != sent[0].get("keys"):
                steps = " and ".join(str(o.get("keys")) for o in (sent[0], other))
                raise ProcessError(
                    f"processes 0 and {rank} are at different steps, {steps}: report this with the command"
                )
        return sent
