"""Measure bytes, FLOPs, latency and tokens/s, with quartiles."""

from __future__ import annotations

import inspect
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rarefy.common.progress import track
from rarefy.model.mha import without_mha_fastpath

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # (ids, cache or None) -> (logits, cache)
PAUSE = 0.08  # seconds between calls of engines: threads of ONNX Runtime spin for 50 ms after a call
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch has no count_nonzero for these types


@dataclass(frozen=True)
class Times:
    """Quartiles in seconds of repeated runs."""

    median: float
    low: float
    high: float
    repeats: int

    def to_dict(self) -> dict[str, float]:
        """Return plain numbers."""
        return asdict(self)


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers in memory; shared storage is counted once.

    >>> resident_bytes(nn.Linear(3, 2))
    32
    """
    tensors = [*model.parameters(), *model.buffers()]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"
    }
    return sum(storages.values())


def folder_bytes(path: str | Path, suffixes: tuple[str, ...] = ("",)) -> int:
    """Return the bytes of the files in a folder (or of one file) whose names end in one of `suffixes`."""
    path = Path(path)
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    return sum(f.stat().st_size for f in files if f.name.endswith(suffixes))


def peak_rss() -> int:
    """Return the peak resident memory of this process in bytes."""
    try:  # getrusage inherits the peak of the parent process
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def flops(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the floating point operations of `run()`: matrix products, convolutions and attention.

    Counted by torch's dispatcher, so functional calls and scaled_dot_product_attention are included. Zeros in dense
    weights count like other values. A multiply-add counts as 2 operations.

    >>> net = nn.Linear(3, 2)
    >>> flops(net, lambda: net(torch.zeros(5, 3)))
    60
    """
    from torch.utils.flop_counter import FlopCounterMode

    # missing in torch's own table, although attention on the CPU runs it
    extra = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=extra)  # type: ignore[arg-type]
    with torch.no_grad(), without_mha_fastpath(), counter:
        run()
    return counter.get_total_flops()


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of two products of shapes [b, h, s, d] x [b, h, t, d]; a causal mask does not reduce them."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def compare(
    runs: Mapping[K, Callable[[], Any]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    progress: bool = False,
    before: Callable[[], Any] = lambda: None,
    pause: float = 0.0,
) -> dict[K, Times]:
    """Time runs alternately after warm-up, so that drift affects all of them equally; return quartiles for each.

    `before` is called before each run and is not timed. During `pause` seconds before each, threads of the others fall
    asleep, and a call that is not timed wakes its own.

    >>> compare({"nothing": lambda: None}, repeats=5)["nothing"].repeats
    5
    """
    seconds: dict[K, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(warmup):
            for run in runs.values():
                run()
        for _ in track(range(repeats), "timing", progress):
            for name, run in runs.items():
                if pause:
                    time.sleep(pause)
                    run()
                before()
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    return {name: quartiles(values) for name, values in seconds.items()}


def fastest_settings(times: Mapping[tuple[K, str], T], seconds: Callable[[T], float]) -> dict[K, tuple[str, T]]:
    """Return the fastest setting of each engine and its times, from those of all engines and settings.

    >>> fastest_settings({("a", "spin"): 2.0, ("a", "sleep"): 1.0, ("b", ""): 3.0}, lambda t: t)
    {'a': ('sleep', 1.0), 'b': ('', 3.0)}
    """
    of_engine: dict[K, dict[str, T]] = {}
    for (name, setting), t in times.items():
        of_engine.setdefault(name, {})[setting] = t
    return {n: min(settings.items(), key=lambda item: seconds(item[1])) for n, settings in of_engine.items()}


def quartiles(seconds: list[float]) -> Times:
    """Return median and quartiles of a list of seconds."""
    if len(seconds) == 1:
        return Times(seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Times(median, low, high, len(seconds))


def decode_and_prefill(
    models: Mapping[str, nn.Module], *, prompt: int = 256, new: int = 24, repeats: int = 5, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Return tokens/s of causal language models at batch size 1, for prefill and decode.

    Uses random token ids, a KV cache and greedy decoding; models are timed alternately. The result is
    `{name: {"prefill": ..., "decode": ..., "token": ...}}` with `tokens_per_second` and its quartiles; see `rates`.
    """
    vocabulary: int = next(iter(models.values())).config.vocab_size  # type: ignore
    steps = {n: step_of(m) for n, m in models.items()}
    return rates(steps, vocabulary, prompt=prompt, new=new, repeats=repeats, progress=progress)


def step_of(model: nn.Module) -> Step:
    """Return a step function for a transformers language model."""
    accepts = inspect.signature(type(model).forward).parameters
    cache = "cache" if "cache" in accepts else "past_key_values"  # the name changed in transformers 5

    def step(ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = model(input_ids=ids, use_cache=True, **({"logits_to_keep": 1} if state is None else {cache: state}))
        new_state = getattr(out, cache, None)
        return out.logits, out.past_key_values if new_state is None else new_state

    return step


def rates(
    steps: Mapping[str, Step], vocabulary: int, *, prompt: int, new: int, repeats: int, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the result of `decode_and_prefill` for step functions, timed alternately; `new` is at least 1.

    "token" is the rate of decoding too, from the median token of each round: short delays by other programs do not
    change it.
    """
    ids = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    spent: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": [], "token": []} for n in steps}
    with torch.no_grad():
        for round_ in track(range(repeats + 1), "tokens per second", progress):
            for name, step in steps.items():
                began = time.perf_counter()
                logits, state = step(ids, None)
                clock = [time.perf_counter()]
                for _ in range(new):
                    logits, state = step(logits[:, -1:].argmax(-1), state)
                    clock.append(time.perf_counter())
                if round_:  # the first round warms up
                    spent[name]["prefill"].append(clock[0] - began)
                    spent[name]["decode"].append(clock[-1] - clock[0])
                    spent[name]["token"].append(statistics.median(b - a for a, b in pairwise(clock)))
    count = {"prefill": prompt, "decode": new, "token": 1}
    return {n: {kind: _rate(quartiles(s), count[kind]) for kind, s in kinds.items()} for n, kinds in spent.items()}


def _rate(t: Times, tokens: int) -> dict[str, float]:
    return {
        "tokens_per_second": tokens / t.median,
        "low": tokens / t.high,
        "high": tokens / t.low,
        "repeats": t.repeats,
    }


def machine() -> dict[str, Any]:
    """Return what timings depend on: the CPU, its vector extensions, threads, load and versions."""
    flags = cpu_flags()
    known = [
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_vbmi2",
        "amx_bf16",
        "asimd",
        "bf16",
        "svebf16",
    ]
    return {
        "cpu": _cpu_name(),
        "extensions": [f for f in known if f in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_flags() -> set[str]:
    """Return the CPU's feature flags as Linux names them; empty if they are unknown."""
    return set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())


@cache
def native_bf16() -> bool:
    """Return whether this CPU has bf16 instructions; without them torch's bf16 can be 50 times slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & cpu_flags())


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run the block with `count` torch threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sparsity_of(tensor: Tensor) -> float:
    """Return the fraction of exact zeros."""
    exotic = (tensor.element_size() == 1 and tensor.is_floating_point()) or tensor.dtype in _UNSIGNED
    countable = (tensor.float() if tensor.is_floating_point() else tensor.to(torch.int64)) if exotic else tensor
    return 1 - int(torch.count_nonzero(countable)) / max(tensor.numel(), 1)


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((l.partition(":")[2].strip() for l in lines if l.partition(":")[0].strip() == key), "")
