"""Where a record comes from, and whether it may stand in a page. Needs the standard library and git alone.

A process that measures has a run: an id, when it began, the commit, files changed since that commit, and the load,
all read before the first record is written (`begin`). Processes that it starts share its run.

A record is refused for one of four reasons (`problems`):

    commit  its commit is not in the history of this one, so nobody can look up what was timed
    dirty   source files had changes that no commit has
    load    it has times, and the load average was above MAX_LOAD when its run began
    older   code that it ran has changed since (`changed_since`); comments, docstrings and blank lines do not count

Records before 2 December 2026 have no run. Consecutive records of a file count as one if benchmark, commit, machine and
torch are equal and no case comes twice. Their load was read when each was written, so the benchmark's own threads are
in it. The highest of a run counts for all of its records: without those that were disturbed, the others would be a
selection. Their "-dirty" says nothing, since the file of results caused it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]

MAX_LOAD = 1.5  # of the minute before a run: other work on the machine makes times worthless
WAIT_SECONDS = 240  # for the load to fall, after another benchmark
REASONS = ("commit", "dirty", "load", "older")
SHARED_RUN = "RAREFY_BENCH_RUN"  # environment variable: the run of a parent process, in JSON

MEASURED = ("src", "csrc", "bench", "zoo", "recipes", "tests/zoo.py", "CMakeLists.txt", "pyproject.toml")

ENGINE = ("csrc", "CMakeLists.txt", "src/rarefy/compiler", "src/rarefy/runtime")
DECODER = (*ENGINE, "src/rarefy/generation", "src/rarefy/formats")
TIMING = ("bench/runtime.py", "src/rarefy/evaluation/profiling.py")
PEERS = ("bench/peers.py", *TIMING, "src/rarefy/onnx/runtimes.py", "src/rarefy/onnx/engines.py")
TEXTS = ("bench/texts.py", "src/rarefy/evaluation/retrieval.py", "src/rarefy/data/text_pairs.py")
PRUNING = ("src/rarefy/prune", "src/rarefy/calibration")
CUTTING = ("src/rarefy/structured", "src/rarefy/dependency")
QUANTIZING = ("src/rarefy/quantization", "src/rarefy/calibration")


class NoHistoryError(Exception):
    """The folder is no git repository, or a shallow one."""


class DifferentRunsError(Exception):
    """Two records of different runs were to be compared."""


@dataclass(frozen=True)
class Benchmark:
    """What measures a file of records anew.

    Attributes:
        command: the command, in the repository's folder.
        minutes: what it takes on two idle cores; None: not known.
        paths: files and folders whose code it runs.
        timed: whether times are what it is for; otherwise only its columns of seconds depend on the load.
        case: fields that are different in all records of a run.
    """

    command: str
    minutes: int | None
    paths: tuple[str, ...]
    timed: bool = True
    case: tuple[str, ...] = ()


def _script(
    name: str, arguments: str, minutes: int | None, *paths: str, timed: bool = True, case: Sequence[str] = ()
) -> Benchmark:
    command = f"python bench/{name}.py {arguments}".strip()
    return Benchmark(command, minutes, (f"bench/{name}.py", *paths), timed, tuple(case))


_FRONTIER = (*ENGINE, *PEERS, *TEXTS, *CUTTING)
_IMAGES = (*ENGINE, *PEERS, *QUANTIZING, "bench/photos.py", "bench/vision_net.py")
_OPTIMIZE = (*ENGINE, *PEERS, "src/rarefy/search", *CUTTING, *PRUNING, "src/rarefy/quantization")
_MODELS = ("model", "batch", "numbers", "pattern", "sparsity")
_KERNELS = ("format", "kind", "shape", "batch", "pattern", "sparsity")
_WITHOUT_AMX = "env RAREFY_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python bench/frontier.py"

BENCHMARKS: dict[str, Benchmark] = {  # by file in results/, or FILE/RUN where a run has a command of its own
    "conformance": _script("conformance", "", 120, *ENGINE, "tests/zoo.py", timed=False, case=("model", "threads")),
    "cut_zoo": _script("cut_zoo", "", 30, *CUTTING, "tests/zoo.py", timed=False, case=("model", "side")),
    "cuts/fashion": _script("cuts", "fashion", 20, *CUTTING, timed=False),
    "cuts/language": _script("cuts", "language", 30, *CUTTING, timed=False),
    "cuts/resnet50": _script("cuts", "resnet50", 10, *CUTTING, case=("run", "round_to", "batch")),
    "cuts/resnet50 onnx": _script("cuts", "resnet50", 10, *CUTTING, timed=False),
    "demo": Benchmark("make bench-demo", 6, (*DECODER, *PRUNING, "recipes/smollm2-demo.yaml", "bench/demo.py")),
    "dynamo": _script("dynamo", "", 20, *ENGINE, "src/rarefy/integrations", "tests/zoo.py", case=("model",)),
    "embeddings": _script("embeddings", "", 20, *ENGINE, *PEERS, *TEXTS, "src/rarefy/integrations"),
    "engine": _script("engine", "", 30, *ENGINE, *PEERS, "bench/photos.py", case=("model", "batch")),
    "frontier/minilm": _script("frontier", "", 60, *_FRONTIER),
    "frontier/minilm, avx512": Benchmark(_WITHOUT_AMX, 60, ("bench/frontier.py", *_FRONTIER)),
    "frontier/efficientnet": _script("frontier_images", "efficientnet", 15, *_IMAGES),
    "frontier/fashion": _script("frontier_images", "fashion", 20, *_IMAGES),
    "language": _script("language", "", 25, *DECODER, *QUANTIZING, case=("engine", "build", "file")),
    "large_language": _script("large_language", "", 15, *DECODER, case=("model", "file", "engine")),
    "memory": _script("memory", "", 1, *DECODER, timed=False, case=("model",)),
    "models": _script("models", "", 8, "csrc", "src/rarefy/runtime", *TIMING, case=_MODELS),
    "models/engines": _script("models", "--engines", 10, "csrc", "src/rarefy/runtime", *PEERS, case=_MODELS),
    "oneshot": _script("oneshot", "", None, *PRUNING, timed=False, case=("model", "method", "setting", "seed")),
    "onnx_changes": _script("onnx_changes", "", 35, *ENGINE, *PEERS, "src/rarefy/onnx", *CUTTING, case=("model",)),
    "onnx_conformance": _script("onnx_conformance", "", 1, "src/rarefy/onnx", timed=False),
    "onnx_models/correct": _script("onnx_models", "--correct", None, *ENGINE, "src/rarefy/onnx", timed=False),
    "onnx_models/speed": _script("onnx_models", "--speed", 25, *ENGINE, *PEERS, "src/rarefy/onnx", case=("model",)),
    "onnx_models/ocr": _script("ocr", "", 10, *ENGINE, *PEERS, "src/rarefy/onnx", case=("model",)),
    "patterns": _script("patterns", "", 20, *ENGINE, *PRUNING, case=("pattern", "sparsity")),
    "permute": _script("permute", "", 5, "src/rarefy/prune", timed=False),
    "runtime": _script("runtime", "", 5, "csrc", "CMakeLists.txt", "src/rarefy/runtime", *TIMING, case=_KERNELS),
    "speculation": _script("speculation", "", 2, *DECODER),
    "spread": _script("spread", "", 20, *_FRONTIER, timed=False, case=("name", "seed")),
    "train/fashion": _script("train", "fashion --seeds 0 1", None, "src/rarefy/train", *PRUNING, timed=False),
    "train/language": _script("train", "language", 60, "src/rarefy/train", *PRUNING, timed=False),
    "train/minilm": _script("train", "minilm", 90, *ENGINE, "src/rarefy/train", *PRUNING),
    "values/decode": _script("values", "decode", 5, "csrc", "src/rarefy/runtime", *QUANTIZING, case=("way",)),
    "values/fashion": _script("values", "fashion", None, *QUANTIZING, timed=False),
    "values/language": _script("values", "language", None, *QUANTIZING, *PRUNING, timed=False),
    "values/leave": _script("values", "leave", 15, "src/rarefy/train", timed=False),
    "values/lowrank": _script("values", "lowrank", 10, "src/rarefy/lowrank", case=("way",)),
    "values/minilm": _script("values", "minilm", 5, *QUANTIZING, *TEXTS, timed=False),
    "vision": Benchmark("make bench-vision", 15, ("bench/vision.py", "bench/vision_net.py", *PRUNING), timed=False),
} | {
    f"optimize/{run}": _script("optimize", run, minutes, *_OPTIMIZE)
    for run, minutes in {"minilm": 30, "smollm2": 45, "smollm2-10": 45, "efficientnet": 20, "fashion": 15}.items()
}  # fmt: skip


def benchmark_of(name: str, row: Mapping[str, Any] = {}) -> Benchmark:
    """Return the benchmark of a record of results/NAME.jsonl; without a record, the first one of that file.

    Raises:
        KeyError: the file or its run has no entry in BENCHMARKS.
    """
    run = str(row.get("run", ""))
    if name == "train" and run.startswith("fashion"):
        run = "fashion"  # the network's width and the number of epochs follow
    if name == "models" and "compiled" in row:
        run = "engines"
    for key in (f"{name}/{run}", name):
        if key in BENCHMARKS:
            return BENCHMARKS[key]
    if not row:
        return next(b for key, b in BENCHMARKS.items() if key.startswith(f"{name}/"))
    raise KeyError(f"{name}.jsonl has a record of run {run!r}; add {name}/{run} to BENCHMARKS of bench/provenance.py")


# Runs


def begin(wait: bool = False) -> Row:
    """Return the run of this process: run_id, started, commit, changed, load.

    Everything is read at the first call, which comes before the first record. Child processes share the run through the
    environment.

    Args:
        wait: whether to wait until the load is at most MAX_LOAD, WAIT_SECONDS at the longest.
    """
    if SHARED_RUN not in os.environ:
        end = time.monotonic() + WAIT_SECONDS
        while wait and (load := os.getloadavg()[0]) > MAX_LOAD and time.monotonic() < end:
            print(f"the load is {load:.2f}; waiting until it is at most {MAX_LOAD}", flush=True)
            time.sleep(20)
        load = os.getloadavg()[0]
        if load > MAX_LOAD:
            print(f"the load is {load:.2f}, above {MAX_LOAD}: pages will not show the times of this run", flush=True)
        run = {
            "run_id": secrets.token_hex(4),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": head(),
            "changed": changed_files(),
            "load": round(load, 2),
        }
        os.environ[SHARED_RUN] = json.dumps(run)
    return json.loads(os.environ[SHARED_RUN])


def head() -> str:
    """Return twelve digits of the commit that is checked out; "" outside of a repository."""
    return _git_or_none("rev-parse", "--short=12", "HEAD").strip()


def changed_files(folder: Path = ROOT) -> list[str]:
    """Return source files that differ from the commit or are not in it. Records, pages and figures do not count."""
    paths = [p for p in MEASURED if (folder / p).exists()]
    status = _git_or_none("status", "--porcelain", "-uall", "--", *paths, ":!bench/results", ":!*.md", folder=folder)
    return sorted(line[3:] for line in status.splitlines())


def with_runs(name: str, rows: Iterable[Row]) -> list[Row]:
    """Return the records of a file, each with "run_key", which is the run's id or a number, and "run_load".

    The rule for records without an id is in the docstring of this module.
    """
    keyed, number, last, cases = list[Row](), 0, "", set[str]()
    for row in rows:
        if "run_id" in row:
            keyed.append({**row, "run_key": row["run_id"]})
            last = ""
            continue
        machine, benchmark = {k: v for k, v in row["machine"].items() if k != "load"}, benchmark_of(name, row)
        same = json.dumps([benchmark.command, row["commit"].removesuffix("-dirty"), machine], sort_keys=True)
        case = case_of(name, row)
        if same != last or not benchmark.case or case in cases:
            number, cases = number + 1, set()
        last = same
        cases.add(case)
        keyed.append({**row, "run_key": f"{name}, inferred run {number}"})
    loads: dict[str, float] = {}
    for row in keyed:
        loads[row["run_key"]] = max(loads.get(row["run_key"], 0.0), load_of(row))
    return [{**row, "run_load": loads[row["run_key"]]} for row in keyed]


def case_of(name: str, row: Row) -> str:
    """Return what a record of results/NAME.jsonl is about: its benchmark, and the fields of `Benchmark.case`."""
    benchmark = benchmark_of(name, row)
    values = [row["machine"]["threads"] if field == "threads" else row.get(field) for field in benchmark.case]
    return json.dumps([benchmark.command, *values])


def ratio(row: Row, base: Row, value: Callable[[Row], float]) -> float:
    """Return a value of a record over that of another record of the same run.

    This is the one way in which tables compare two records.

    Raises:
        DifferentRunsError: the records are of different runs.
    """
    if row["run_key"] != base["run_key"]:
        raise DifferentRunsError(
            f"expected two records of one run, got {describe(row)} and {describe(base)}: measure both in one process"
        )
    return value(row) / value(base)


def newest_run(rows: Sequence[Row]) -> list[Row]:
    """Return the records of the run that was written last."""
    return [r for r in rows if r["run_key"] == rows[-1]["run_key"]]


def describe(row: Row) -> str:
    """Return where a record stands, of which run and commit it is, and its short fields."""
    kinds = (str, int)
    own = {k: v for k, v in row.items() if isinstance(v, kinds) and k not in (*_ABOUT, "commit", "load", "changed")}
    return f"{row.get('place', 'a record')} (run {row['run_key']}, commit {row['commit']}, {json.dumps(own)})"


_ABOUT = ("run_id", "run_key", "run_load", "started", "place", "label", "threads", "file name")


# Reasons


def problems(name: str, row: Row) -> dict[str, str]:
    """Return the reasons why pages do not show a record, each with a sentence about it; {} for one that stands.

    Raises:
        NoHistoryError: git cannot tell.
    """
    found, benchmark = {}, benchmark_of(name, row)
    commit = row.get("commit", "").removesuffix("-dirty")
    if not commit:
        found["commit"] = "the record names no commit"
    elif not is_in_history(commit):
        found["commit"] = f"commit {commit} is not in the history of this one"
    if changed := row.get("changed"):
        found["dirty"] = f"files had changes that no commit has: {', '.join(changed)}"
    if benchmark.timed and (load := row["run_load"]) > MAX_LOAD:
        found["load"] = f"the load was {load:g}, at most {MAX_LOAD} is expected"
    if "commit" not in found and (path := changed_since(commit, benchmark.paths)):
        found["older"] = f"{path} has changed since commit {commit[:8]}"
    return found


def load_of(row: Row) -> float:
    """Return the load of a record: that at the start of its run, or of records without a run at their writing."""
    return row["load"] if "run_id" in row else row["machine"]["load"]


def is_in_history(commit: str) -> bool:
    """Return whether a commit is HEAD or one of its ancestors; of records 12 hexadecimal digits are compared."""
    return commit[:12] in _history()


@cache
def _history() -> frozenset[str]:
    if _git("rev-parse", "--is-shallow-repository").strip() != "false":
        raise NoHistoryError("this clone is shallow, so commits of records are not in it: run git fetch --unshallow")
    return frozenset(line[:12] for line in _git("rev-list", "HEAD").splitlines())


@cache
def changed_since(commit: str, paths: tuple[str, ...]) -> str:
    """Return the first file below some paths that a commit has with other code than the working tree; "" if none."""
    before, now = _blobs_of(commit), _blobs_now()
    below = sorted(path for path in before.keys() | now.keys() if _is_below(path, paths))
    for path in below:
        if path not in before or path not in now:
            return path
    for path in below:
        if before[path] != now[path] and _code_of_blob(path, before[path]) != _code_now(path):
            return path
    return ""


def _is_below(path: str, paths: Iterable[str]) -> bool:
    return not path.endswith(".md") and any(path == p or path.startswith(f"{p}/") for p in paths)


@cache
def _blobs_of(commit: str) -> dict[str, str]:
    """Return the id of each file of a commit, by path."""
    lines = _git("ls-tree", "-r", commit, "--", *MEASURED).splitlines()
    return {path: about.split()[2] for about, path in (line.split("\t") for line in lines)}


@cache
def _blobs_now() -> dict[str, str]:
    """Return the id that git would give each source file of the working tree, by path."""
    paths = _git("ls-files", "--cached", "--others", "--exclude-standard", "--", *MEASURED).splitlines()
    contents = {p: (ROOT / p).read_bytes() for p in set(paths) if (ROOT / p).is_file()}
    return {p: hashlib.sha1(b"blob %d\0" % len(c) + c, usedforsecurity=False).hexdigest() for p, c in contents.items()}


@cache
def _code_of_blob(path: str, blob: str) -> str:
    return code(path, _git("cat-file", "blob", blob))


@cache
def _code_now(path: str) -> str:
    return code(path, (ROOT / path).read_text(encoding="utf-8", errors="replace"))


_COMMENTS = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)


def code(path: str, text: str) -> str:
    """Return a file without what has no effect when it runs: comments, docstrings, line breaks.

    >>> code("a.py", '"About."\\nx = 1  # one') == code("a.py", "x = 1\\n\\n")
    True
    """
    if path.endswith(".py"):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return text
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [n for n in body if not _is_text(n)]  # type: ignore[attr-defined]
        return ast.dump(tree)
    if path.endswith((".cpp", ".h", ".hpp")):
        return " ".join(_COMMENTS.sub(lambda m: m[1] or " ", text).split())
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _git(*arguments: str, folder: Path = ROOT) -> str:
    try:
        ran = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoHistoryError(f"git does not run here ({error}): provenance needs git and a full clone") from error
    if ran.returncode:
        raise NoHistoryError(
            f"git {arguments[0]} fails in {folder} ({ran.stderr.strip()}): provenance needs a full clone"
        )
    return ran.stdout


def _git_or_none(*arguments: str, folder: Path = ROOT) -> str:
    """Return what git prints; "" outside of a repository, whose records pages refuse."""
    try:
        return _git(*arguments, folder=folder)
    except NoHistoryError:
        return ""
