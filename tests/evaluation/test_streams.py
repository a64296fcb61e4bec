"""Engines that several threads call at once."""

import threading
import time

import pytest

from rarefy.evaluation.streams import compare_streams


def test_each_stream_calls_in_a_thread_of_its_own_and_engines_take_turns():
    order, threads, busy, most = [], {"a": set(), "b": set()}, [0], [0]
    lock = threading.Lock()

    def call(name):
        def run():
            with lock:
                busy[0] += 1
                most[0] = max(most[0], busy[0])
                threads[name].add(threading.get_ident())
                if not order or order[-1] != name:
                    order.append(name)
            time.sleep(0.005)
            with lock:
                busy[0] -= 1

        return run

    results = compare_streams({"a": [call("a")] * 3, "b": [call("b")] * 2}, seconds=0.03, rounds=2)
    assert order == ["a", "b", "a", "b"] and most[0] == 3 and len(threads["a"]) >= 3
    for name, streams in (("a", 3), ("b", 2)):
        times, rate = results[name]
        assert times.low <= times.median <= times.high and times.repeats >= 2 * streams
        assert times.median >= 0.005 and 0 < rate <= streams / 0.005


def test_a_call_is_longer_than_a_turn():
    times, rate = compare_streams({"a": [lambda: time.sleep(0.02)]}, seconds=0.001, rounds=1)["a"]
    assert times.repeats == 1 and 0 < rate <= 50


def test_what_a_stream_raises_is_raised():
    def broken():
        raise ValueError("no such engine")

    with pytest.raises(ValueError, match="no such engine"):
        compare_streams({"a": [lambda: None, broken]}, seconds=0.01, rounds=1)
