"""A search on several processes (torchrun): steps that do not depend on one another are measured side by side.

Every process runs the same search and takes the same decisions, because all read the same journal and the same clock.
One process measures a step and sends the result to all as JSON. `prefetch` divides the steps that a search is about to
need. While a process measures, it works by itself: the models are small, and times need whole machines.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from rarefy.common.errors import ContainerError, DataError, RarefyError, RecipeError, first_line
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
PATIENCE = 3600.0  # seconds beyond the time of the search after which another process counts as lost
PROCESSES = "processes"  # key of how many candidates are measured at once


class ProcessError(Exception):
    """Raised where another process has failed or is gone: the search cannot go on."""


@dataclass(frozen=True)
class Step:
    """A result that is not in the journal yet: its key, what computes it, and whether it is written to disk."""

    key: str
    compute: Callable[[], Any]
    keep: Callable[[Any], bool]


class MissingSteps(Exception):
    """Raised by a journal that lists steps instead of measuring them."""

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
        DataError: for data that cannot be hashed.
        RecipeError: for processes that search something else, or on other machines.
        ProcessError: where another process has failed or is gone.
    """
    if distributed.world_size() == 1:
        return Journal(folder, {} if folder is None else search_key(task, evaluate, eval_data))
    try:
        settings = search_key(task, evaluate, eval_data)
    except DataError as error:
        raise DataError(str(error).replace("resume_dir needs", "a search on several processes needs")) from error
    seconds = task.seconds + (0.0 if task.recovery is None else task.recovery.seconds)
    return SharedJournal(folder, settings, {"minutes": task.seconds / 60, "other_engines": task.other_engines}, seconds)


def in_groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return the items in groups of a size; the last one may be smaller.

    >>> in_groups("abcde", 2)
    ['ab', 'cd', 'e']
    """
    return [items[i : i + size] for i in range(0, len(items), size)]


def next_choices(
    first: int,
    choices: Sequence[Choice],
    seen: Mapping[int, Point],
    low: int,
    high: int,
    targets: Targets,
    count: int,
) -> list[int]:
    """Return the choices of a line that are measured side by side, in rising order.

    Within a bracket they cut it into equal parts. Before there is one, each is the next choice if those before it keep
    the loss.

    Args:
        first: the next choice of one process, which was not seen.
        choices: the line.
        seen: the points that were measured, by the number of their choice.
        low: the last choice that is known to keep the loss.
        high: the first one that is known not to; the number of choices where none is known.
        targets: the limits.
        count: how many are wanted; fewer where the line has no more.
    """
    result = [first]
    if high >= len(choices):
        while len(result) < count and result[-1] < len(choices) - 1:
            result.append(next_choice(choices, seen, result[-1], len(choices), targets))
    elif count > 1:
        start, part = choices[low].saving, (choices[high].saving - choices[low].saving) / (count + 1)
        cuts = (solve.at_saving(choices, start + part * i) for i in range(1, count + 1))
        result = sorted({min(max(i, low + 1), high - 1) for i in cuts} - seen.keys()) or result
    return result


class SideBySideJournal(Journal):
    """A journal that has steps measured side by side, one in each process."""

    measuring = False  # whether this process computes a step

    def get(self, key: str, compute: Callable[[], Any], keep: Callable[[Any], bool] = lambda value: True) -> Any:
        """Return the result of a key as `Journal.get`; where there is none yet, one process measures it."""
        if key not in self.values:
            if self.measuring:
                raise RuntimeError(f"{key!r} is asked for inside another step, which other processes do not measure")
            step = Step(key, compute, keep)
            if self.collecting:
                raise MissingSteps([step])
            if errors := self._measure([step]):
                raise RarefyError(errors[key])
        return self.values[key]

    def prefetch(self, requests: Iterable[Callable[[], Any]]) -> None:
        """Measure what calls without side effects will `get`, side by side, until they have all they need.

        Requests may prefetch themselves. A request that runs out of time is left out, as is a step that fails: the call
        itself will say so.
        """
        waiting, failed = list(requests), set[str]()
        while waiting:
            steps, position, unfinished = dict[str, Step](), 0, list[Callable[[], Any]]()
            while position < len(waiting) and len(steps) < self.processes:
                missing = {s.key: s for s in self._missing(waiting[position]) if s.key not in failed}
                unfinished += [waiting[position]] if missing else []
                steps, position = steps | missing, position + 1
            waiting = unfinished + waiting[position:]
            if steps and self.collecting:
                raise MissingSteps([*steps.values()])
            if steps:
                failed |= self._measure([*steps.values()][: self.processes]).keys()

    def _missing(self, request: Callable[[], Any]) -> Sequence[Step]:
        """Return the steps that a call asks for before it can go on."""
        outer, self.collecting = self.collecting, True
        try:
            request()
            return []
        except MissingSteps as missing:
            return missing.steps
        except (OutOfTime, RarefyError):
            return []
        finally:
            self.collecting = outer

    def _measure(self, steps: Sequence[Step]) -> dict[str, str]:
        """Measure at most one step in each process and add their results; return the errors of those that failed."""
        raise NotImplementedError


class SharedJournal(SideBySideJournal):
    """The journal of all processes. That of the first one is on disk; the others have the same in memory.

    The clock stands still between two steps, so that all processes read the same time. While a process measures, it
    reads its own. After each step all clocks are set to the latest one.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], options: dict[str, Any], seconds: float):
        """Read the results in the folder of the first process, and lock it.

        Args:
            folder: where the file lies; that of the first process counts.
            settings: what the results depend on, the same in all processes.
            options: what else is the same in all processes; a later search may have others.
            seconds: how long the search may take.

        Raises:
            ContainerError: as `Journal`, in all processes.
            RecipeError: for processes that search something else, or on other machines.
            ProcessError: where another process has failed or is gone.
        """
        import torch.distributed as dist

        self.processes, self.rank = dist.get_world_size(), dist.get_rank()
        self.group: Any = None  # all processes; the default group does until it is there
        self.now, self.offset, self.exchanging = 0.0, 0.0, False
        error, mine = "", json.loads(json.dumps({**settings, **options}))
        try:
            super().__init__(folder if self.rank == 0 else None, settings, self._time)
        except ContainerError as refused:
            super().__init__(None, {}, self._time)
            error = str(refused)
        try:
            known = {"values": self.values, "costs": self.costs, "wall_seconds": self.wall_seconds}
            message = {"error": error, "settings": mine, "host": socket.gethostname()}
            sent = self._exchange(message if self.rank else {**message, **known})
            if sent[0]["error"]:
                raise ContainerError(sent[0]["error"])
            for rank, other in enumerate(sent):
                if differs := [n for n in mine if other["settings"].get(n) != sent[0]["settings"].get(n)]:
                    raise RecipeError(
                        f"process {rank} differs from the first one in {', '.join(differs)}: start all processes with "
                        "the same command, files and threads, on machines of the same kind"
                    )
            self.values, self.costs, self.wall_seconds = (sent[0][name] for name in known)
            if len({other["host"] for other in sent}) < len(sent):
                self.notes.append("several processes measured times on one machine: they may have slowed each other")
            with _lost_processes():  # the default group waits half an hour at most
                self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds + PATIENCE))
            if not self.values:
                self.get(PROCESSES, lambda: self.processes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the folder and the group, unless the group still waits for a message: it would not end."""
        import torch.distributed as dist

        super().close()
        if self.group is not None and not self.exchanging:
            dist.destroy_process_group(self.group)

    def _time(self) -> float:
        return time.perf_counter() + self.offset if self.measuring else self.now

    def _measure(self, steps: Sequence[Step]) -> dict[str, str]:
        began, raised, outcome = self.now, None, dict[str, Any]()
        if self.rank < len(steps):
            outcome, raised = self._outcome(steps[self.rank].compute)
        try:
            sent = self._exchange({"keys": [s.key for s in steps], **outcome})
        finally:
            if raised is not None:
                raise raised
        for rank, other in enumerate(sent):
            if "failure" in other:
                raise ProcessError(f"process {rank} of the search failed: {other['failure']}")
            if other["keys"] != sent[0]["keys"]:
                steps_of_both = f"{sent[0]['keys']} and {other['keys']}"
                raise ProcessError(f"processes 0 and {rank} are at different steps, {steps_of_both}: report it")
        for step, other in zip(steps, sent):
            if "error" not in other:
                self._add(step.key, other["value"], other["seconds"], step.keep, (self.now - began) / len(steps))
        return {step.key: other["error"] for step, other in zip(steps, sent) if "error" in other}

    def _outcome(self, compute: Callable[[], Any]) -> tuple[dict[str, Any], Exception | None]:
        """Return what a computation gives and the seconds that it took, or why it failed, with the exception."""
        self.measuring, began = True, time.perf_counter()
        try:
            value = json.loads(json.dumps(compute(), allow_nan=False))
            return {"value": value, "seconds": time.perf_counter() - began}, None
        except RarefyError as error:
            return {"error": str(error)}, None
        except Exception as error:
            return {"failure": f"{type(error).__name__}: {first_line(error)}"}, error
        finally:
            self.measuring = False

    def _exchange(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the messages of all processes, and set the clock. ProcessError where a process is gone."""
        self.exchanging = True
        with _lost_processes():
            sent = distributed.gather_json({**message, "now": time.perf_counter() + self.offset}, self.group)
        self.exchanging = False
        self.now = max(other["now"] for other in sent)
        self.offset = self.now - time.perf_counter()
        return sent


@contextmanager
def _lost_processes() -> Iterator[None]:
    """Raise ProcessError where the connection to another process breaks."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            "another process of the search has ended, or its machine is gone: its own output says why. To resume, "
            "pass the same resume_dir again (shell: run the same command again)"
        ) from error
