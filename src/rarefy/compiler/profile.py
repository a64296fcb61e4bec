"""Where the time of a compiled model's calls goes: each operator and layer, and the ceiling that limits it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError
from rarefy.common.report import table
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.program import Program
from rarefy.compiler.step_costs import Cost, call_cost, step_cost
from rarefy.compiler.step_structs import NAMES
from rarefy.compiler.subgraph import SingleOp
from rarefy.evaluation.profiling import flops
from rarefy.runtime import bindings
from rarefy.runtime.ceilings import Ceilings, ceilings
from rarefy.runtime.huge_pages import last_cache

WAITING, STARTING, PYTHON = "wait for threads", "start threads", "Python"  # rows for what no operator accounts for
MAX_THREADS = 256  # of the native code
PRINTED_ROWS = 15


@dataclass(frozen=True)
class ProfileRow:
    """One step of a native program, one call of torch, or the time that neither accounts for.

    Attributes:
        operator: its name; with "(torch)" where torch runs it.
        layer: the layer in the model, or the node where no layer is known.
        sizes: the shapes, as text.
        weights: precision and format of the packed weight.
        milliseconds: of a call of the model; the mean of all threads.
        share: of the time of a call, 0 to 1.
        operations: of a call; 2 for each multiply-add of the dense product.
        executed: operations that are left where zeros and hidden keys are skipped.
        bytes_moved: bytes of weights, inputs and outputs in a call.
        limit: the nearest ceiling: fp32, bf16, int16 or int8 (multiply-adds), memory or cache (bytes); "" where none is
            known.
        min_milliseconds: the time at that ceiling.
        count: number of steps and calls.
    """

    operator: str
    layer: str
    sizes: str
    weights: str
    milliseconds: float
    share: float
    operations: int = 0
    executed: int = 0
    bytes_moved: int = 0
    limit: str = ""
    min_milliseconds: float = 0.0
    count: int = 1

    @property
    def gops(self) -> float:
        """Return the executed operations per second, in billions."""
        return self.executed / self.milliseconds / 1e6 if self.milliseconds else 0.0

    @property
    def gbytes(self) -> float:
        """Return the bytes read and written per second, in billions."""
        return self.bytes_moved / self.milliseconds / 1e6 if self.milliseconds else 0.0

    @property
    def ceiling_percent(self) -> float | None:
        """Return how much of the nearest ceiling is reached, in percent; None where none is known."""
        return 100 * self.min_milliseconds / self.milliseconds if self.limit and self.milliseconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and text."""
        rates = {"gops": self.gops, "gbytes": self.gbytes, "ceiling_percent": self.ceiling_percent}
        return {**asdict(self), **rates}


@dataclass(frozen=True)
class Profile:
    """Where the time of a call goes; `print` it, or read `rows`.

    Attributes:
        rows: in the order in which they run; the last ones are what no operator accounts for.
        milliseconds: the whole time of a call. The rows add up to it.
        repeats: number of timed calls.
        threads: number of threads.
        load: processes that ran or waited on this machine in the last minute. Above the number of cores, times are too
            long.
        ceilings: what this machine reaches at best; None without native kernels.
        printed_rows: number of rows to print.
    """

    rows: tuple[ProfileRow, ...]
    milliseconds: float
    repeats: int
    threads: int
    load: float
    ceilings: Ceilings | None
    printed_rows: int = PRINTED_ROWS

    def by_operator(self) -> tuple[ProfileRow, ...]:
        """Return the sums of all rows of each operator, the most expensive first."""
        groups: dict[str, list[ProfileRow]] = {}
        for row in self.rows:
            groups.setdefault(row.operator, []).append(row)
        return tuple(sorted((_sum_of(rows) for rows in groups.values()), key=lambda r: -r.milliseconds))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and text."""
        return {
            "milliseconds": self.milliseconds,
            "repeats": self.repeats,
            "threads": self.threads,
            "load": self.load,
            "ceilings": None if self.ceilings is None else self.ceilings.to_dict(),
            "operators": [r.to_dict() for r in self.by_operator()],
            "rows": [r.to_dict() for r in self.rows],
        }

    def to_json(self) -> str:
        """Return the profile as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{self.milliseconds:.3f} ms a call, mean of the middle half of {self.repeats} calls; "
            f"{self.threads} threads, load {self.load}",
            "",
            _table(self.by_operator(), ("operator", "count")),
        ]
        costly = sorted(self.rows, key=lambda r: -r.milliseconds)[: self.printed_rows]
        if costly:
            lines += ["", _table(costly, ("operator", "layer", "sizes", "weights"))]
        if len(costly) < len(self.rows):
            lines.append(f"... and {len(self.rows) - len(costly)} more rows")
        if self.ceilings is not None:
            c = self.ceilings
            compute = ", ".join(f"{n} {getattr(c, n) / 1e9:,.0f}" for n in ("fp32", "bf16", "int16", "int8"))
            read = f"memory {c.memory / 1e9:.1f}, L2 cache {c.cache / 1e9:.1f} GB/s"
            lines += ["", f"measured ceilings ({c.isa}, {c.threads} threads): {compute} GOP/s; {read}"]
        return "\n".join(lines)


def _sum_of(rows: Sequence[ProfileRow]) -> ProfileRow:
    """Return one row for all rows of an operator, with what limits them for most of their time."""
    names = ("milliseconds", "share", "operations", "executed", "bytes_moved", "min_milliseconds", "count")
    sums = {n: sum(getattr(r, n) for r in rows) for n in names}
    limited: dict[str, float] = {}
    for r in rows:
        limited[r.limit] = limited.get(r.limit, 0.0) + (r.milliseconds if r.limit else 0.0)
    limit = max(limited, key=lambda name: limited[name])
    return replace(rows[0], layer="", sizes="", weights="", limit=limit, **sums)


def _table(rows: Iterable[ProfileRow], texts: Sequence[str]) -> str:
    """Return rows as a text table: some attributes as they are, then times and rates."""
    cells = []
    for r in rows:
        percent = r.ceiling_percent
        numbers = {
            "ms": f"{r.milliseconds:.3f}",
            "time %": f"{100 * r.share:.1f}",
            "GOP/s": f"{r.gops:,.1f}" if r.executed else "",
            "GB/s": f"{r.gbytes:.1f}" if r.bytes_moved else "",
            "of ceiling %": "" if percent is None else f"{percent:.0f}",
        }
        cells.append({**{n: getattr(r, n) for n in texts}, **numbers, "ceiling": r.limit})
    for name in ("ms", "time %", "GOP/s", "GB/s", "of ceiling %"):
        width = max(len(name), *(len(c[name]) for c in cells))
        for c in cells:
            c[name] = c[name].rjust(width)
    return table(cells)


# ---- recording ------------------------------------------------------------------------------------------------------


class Recorder:
    """Receives the time of each part of one call of a compiled model, in nanoseconds.

    Attributes:
        programs: each run of a native program: the program, the nanoseconds of each thread and step, busy and waiting
            [threads, steps, 2], those of the native call, and the tokens in the KV cache before it.
        calls: nanoseconds of each call outside of programs.
        costs: what those calls compute and move, if asked for.
    """

    def __init__(self, describe: bool = False):
        """Args: describe: also find the costs of calls outside of programs, which makes the call slower."""
        self.describe = describe
        self.programs: list[tuple[Program, Tensor, int, int]] = []
        self.calls: dict[Node, int] = {}
        self.costs: dict[Node, Cost] = {}

    def seconds_of_nodes(self) -> dict[Node, float]:
        """Return the seconds of each node of the graph, without waiting: in programs the mean of all threads."""
        spent = {node: ns / 1e9 for node, ns in self.calls.items()}
        for program, times, _, _ in self.programs:
            for node, ns in zip(program.sources, times[..., 0].double().mean(0).tolist()):
                spent[node] = spent.get(node, 0.0) + ns / 1e9
        return spent

    def run_program(self, program: Program, inputs: Mapping[Node, Any], cache: Any) -> list[Tensor]:
        """Run a native program; return its outputs."""
        times = torch.zeros(min(torch.get_num_threads(), MAX_THREADS), len(program.steps), 2, dtype=torch.int64)
        out = program.run(inputs, cache, times)
        self.programs.append((program, times, program.native_ns, 0 if cache is None else cache.past))
        return out

    def run_single(self, call: SingleOp, lookup: Callable[[Node], Any]) -> list[Tensor]:
        """Run an operator with a native call of its own; return its output."""
        node = call.nodes[0]
        began = perf_counter_ns()
        out = call.run(lookup)
        self.calls[node] = perf_counter_ns() - began
        if self.describe:
            self.costs[node] = call_cost(node, lookup(node.args[0]), out, 0, call.kernel)
        return out

    def run_torch(self, node: Node, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the function of a node in torch; return its output."""
        if self.describe:
            outputs: list[Any] = []
            operations = flops(nn.Module(), lambda: outputs.append(function(*args, **kwargs)))
            self.costs[node] = call_cost(node, (args, kwargs), outputs[0], operations)
            return outputs[0]
        began = perf_counter_ns()
        out = function(*args, **kwargs)
        self.calls[node] = perf_counter_ns() - began
        return out


def profile_calls(
    call: Callable[[Recorder], Any], layers: Mapping[Node, str], weight_bytes: int, repeats: int, warmup: int
) -> Profile:
    """Return the profile of calls of a compiled model.

    Args:
        call: calls the model with a recorder.
        layers: the layer of each node.
        weight_bytes: bytes of the model's weights, which are read from memory if the last cache cannot hold them.
        repeats: number of timed calls.
        warmup: number of calls before those.

    Raises:
        DataError: if repeats or warmup are too small.
    """
    check_int("repeats", repeats, 1, DataError)
    check_int("warmup", warmup, 0, DataError)
    described = Recorder(describe=True)
    call(described)
    for _ in range(warmup):
        call(Recorder())
    samples: list[tuple[int, Recorder]] = []
    for _ in range(repeats):
        recorder = Recorder()
        began = perf_counter_ns()
        call(recorder)
        samples.append((perf_counter_ns() - began, recorder))
    samples.sort(key=lambda s: s[0])
    middle = samples[repeats // 4 : repeats - repeats // 4]  # means add up, medians do not
    best = None if bindings.missing() is not None else ceilings()
    rows = _Rows(layers, described.costs, _Roofline(best, weight_bytes), len(middle))
    for nanoseconds, recorder in middle:
        rows.add(nanoseconds, recorder)
    total = sum(nanoseconds for nanoseconds, _ in middle) / len(middle) / 1e6
    load = round(os.getloadavg()[0], 2)
    return Profile(rows.finish(total), total, repeats, torch.get_num_threads(), load, best)


class _Rows:
    """Sums the times of several calls for each step, and makes rows of them."""

    def __init__(self, layers: Mapping[Node, str], costs: Mapping[Node, Cost], roofline: _Roofline, calls: int):
        self.layers, self.costs, self.roofline, self.calls = layers, costs, roofline, calls
        self.steps: dict[Program, list[float]] = {}  # busy nanoseconds of each step, in all calls
        self.runs: dict[Program, list[int]] = {}  # tokens in the cache before each run
        self.others: dict[Node, int] = {}
        self.rest = dict.fromkeys((WAITING, STARTING, PYTHON), 0.0)

    def add(self, nanoseconds: int, recorder: Recorder) -> None:
        """Add a call of so many nanoseconds."""
        python = nanoseconds - sum(recorder.calls.values())
        for program, times, native, past in recorder.programs:
            busy, waiting = (times[..., i].sum(0).double() / len(times) for i in (0, 1))
            before = self.steps.get(program, [0.0] * len(busy))
            self.steps[program] = [a + b for a, b in zip(before, busy.tolist())]
            self.runs.setdefault(program, []).append(past)
            self.rest[WAITING] += float(waiting.sum())
            self.rest[STARTING] += native - float(busy.sum() + waiting.sum())
            python -= native
        for node, spent in recorder.calls.items():
            self.others[node] = self.others.get(node, 0) + spent
        self.rest[PYTHON] += python

    def finish(self, total: float) -> tuple[ProfileRow, ...]:
        """Return the rows of a mean call of `total` milliseconds."""
        rows: list[ProfileRow] = []
        for program, times in self.steps.items():
            runs = self.runs[program]
            for i, (step, _, _) in enumerate(program.steps):
                node, cost = program.sources[i], step_cost(program, i, runs[0])
                row = self._row(NAMES[step.op], self._layer(node), times[i], total, cost)
                rows.append(self._with_rates(row, cost, len(runs) / self.calls, program.memory.nbytes))
        for node, spent in self.others.items():
            cost = self.costs[node]
            name = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
            row = self._row(name if cost.weights else f"{name} (torch)", self._layer(node), spent, total, cost)
            rows.append(self._with_rates(row, cost, 1.0, 0))
        return (*rows, *(self._row(name, "", spent, total, Cost()) for name, spent in self.rest.items()))

    def _layer(self, node: Node) -> str:
        return self.layers.get(node) or node.name

    def _row(self, operator: str, layer: str, nanoseconds: float, total: float, cost: Cost) -> ProfileRow:
        milliseconds = nanoseconds / self.calls / 1e6
        return ProfileRow(operator, layer, cost.sizes, cost.weights, milliseconds, milliseconds / total)

    def _with_rates(self, row: ProfileRow, cost: Cost, runs: float, memory: int) -> ProfileRow:
        """Return a row with the operations, bytes and limit of so many runs a call."""
        limit, seconds = self.roofline.limit(cost, memory)
        return replace(
            row,
            operations=round(runs * cost.operations),
            executed=round(runs * cost.executed),
            bytes_moved=round(runs * (cost.weight_bytes + cost.activation_bytes)),
            limit=limit,
            min_milliseconds=1000 * runs * seconds,
        )


class _Roofline:
    """Finds the ceiling that limits a step: multiply-adds, or bytes of weights or activations."""

    def __init__(self, best: Ceilings | None, weight_bytes: int):
        self.best, self.weight_bytes = best, weight_bytes

    def limit(self, cost: Cost, memory: int) -> tuple[str, float]:
        """Return the nearest ceiling and the seconds at it; "" and 0 where none is known.

        memory are the bytes of activations that a program keeps. How fast they are read depends on how many they are,
        as do the model's weights.
        """
        if self.best is None:
            return "", 0.0
        seconds: dict[str, float] = {}
        if cost.precision:
            seconds[cost.precision] = cost.executed / getattr(self.best, cost.precision)
        for moved, size in ((cost.weight_bytes, self.weight_bytes), (cost.activation_bytes, memory)):
            name = "memory" if size > last_cache() else "cache"
            seconds[name] = max(seconds.get(name, 0.0), moved / self.best.read_rate(size))
        name = max(seconds, key=lambda n: seconds[n])
        return (name, seconds[name]) if seconds[name] else ("", 0.0)
