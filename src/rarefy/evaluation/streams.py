"""Time engines with several callers at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any

from rarefy.common.progress import track
from rarefy.evaluation.profiling import K, Times, quartiles

Run = Callable[[], Any]


def compare_streams(
    runs: Mapping[K, Sequence[Run]],
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    progress: bool = False,
    pause: float = 0.0,
) -> dict[K, tuple[Times, float]]:
    """Return quartiles of the time of a call, and calls per second, of engines that several threads call at once.

    Engines take turns, so that drift affects all of them equally. In each turn every stream calls in a thread of its
    own, once to warm up, then again and again.

    Args:
        runs: for each engine, by name, a function for each stream.
        seconds: length of a turn, at least one call.
        rounds: turns of each engine.
        progress: show a progress bar.
        pause: seconds before each turn, in which threads of other engines fall asleep.

    >>> times, rate = compare_streams({"sleep": [lambda: time.sleep(0.01)] * 4}, seconds=0.05, rounds=2)["sleep"]
    >>> times.median >= 0.01, rate > 150
    (True, True)
    """
    spent: dict[K, list[float]] = {name: [] for name in runs}
    elapsed = dict.fromkeys(runs, 0.0)
    for _ in track(range(rounds), "timing", progress):
        for name, streams in runs.items():
            time.sleep(pause)
            calls, whole = _turn(streams, seconds)
            spent[name] += calls
            elapsed[name] += whole
    return {name: (quartiles(spent[name]), len(spent[name]) / elapsed[name]) for name in runs}


def _turn(streams: Sequence[Run], seconds: float) -> tuple[list[float], float]:
    """Return the seconds of all calls of a turn, and of the turn."""
    start = Barrier(len(streams))
    with ThreadPoolExecutor(len(streams)) as pool:
        futures = [pool.submit(_stream, run, start, seconds) for run in streams]
    errors = [f.exception() for f in futures]
    error = next((e for e in errors if e is not None and not isinstance(e, BrokenBarrierError)), None)
    if error is not None:
        raise error
    results = [f.result() for f in futures]
    calls = [c for spent, _, _ in results for c in spent]
    return calls, max(end for _, _, end in results) - min(began for _, began, _ in results)


def _stream(run: Run, start: Barrier, seconds: float) -> tuple[list[float], float, float]:
    """Return the seconds of each call of a stream, and when its first began and its last ended."""
    try:
        run()
    except BaseException:
        start.abort()
        raise
    start.wait()
    began = before = time.perf_counter()
    spent: list[float] = []
    while not spent or before - began < seconds:
        run()
        now = time.perf_counter()
        spent.append(now - before)
        before = now
    return spent, began, before
