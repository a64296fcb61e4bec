"""Builds of the kernels with sanitizers or emulated instruction sets, and processes that load them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).parents[1]
FOLDER = TESTS.parent / "build" / "stress"
SIMDE = Path("/usr/include/simde/x86/avx512.h")  # of Debian's libsimde-dev
MEMORY_SANITIZERS = "address,undefined"
OPTIONS = {  # of the sanitizers, for a process of Python, which frees no memory as it ends
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "report_bugs=1:history_size=7:exitcode=0:second_deadlock_stack=1",
}


@dataclass(frozen=True)
class Build:
    """A build of the kernels.

    Attributes:
        name: of its folder.
        options: of CMake.
        preload: the library of GCC that a process must load first, "" for none.
        needs: a file without which it cannot be built, None for none.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    preload: str = ""
    needs: Path | None = None

    def missing(self) -> str | None:
        """Return why it cannot be built here, None if it can."""
        if sys.platform != "linux" or shutil.which("g++") is None or shutil.which("cmake") is None:
            return "sanitizers need Linux, g++ and cmake"
        if self.needs is not None and not self.needs.exists():
            return f"{self.needs} is missing: install libsimde-dev"
        return None

    def library(self) -> Path:
        """Return the library, built again after a change of csrc/; several processes wait for one."""
        folder = FOLDER / self.name
        folder.mkdir(parents=True, exist_ok=True)
        options = {"CMAKE_CXX_COMPILER": "g++", "RAREFY_STRICT": "ON", **self.options}
        words = [f"-D{name}={value}" for name, value in options.items()]
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            run_tool("cmake", "-S", TESTS.parent, "-B", folder, *words)
            run_tool("cmake", "--build", folder, "--parallel", "2")
        return folder / "_kernels.so"

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that loads the library."""
        if not self.preload:
            return {}
        ran = run_tool("g++", f"-print-file-name={self.preload}")
        return {"LD_PRELOAD": ran.stdout.strip(), **OPTIONS}


SANITIZED = Build("sanitized", {"RAREFY_SANITIZE": MEMORY_SANITIZERS}, "libasan.so")
EMULATED = Build("emulated", {"RAREFY_EMULATE": "ON"}, needs=SIMDE)
EMULATED_SANITIZED = Build(
    "emulated-sanitized", {"RAREFY_SANITIZE": MEMORY_SANITIZERS, "RAREFY_EMULATE": "ON"}, "libasan.so", SIMDE
)
THREADS = Build("threads", {"RAREFY_SANITIZE": "thread"}, "libtsan.so")


def run_tool(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a compiler or CMake; AssertionError with its messages where it fails."""
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return ran


def start_python(build: Build, code: str, stderr: Any = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
    """Start Python in the folder of the tests with a build's kernels, and run code there."""
    start = f"from stress.builds import use_library\nuse_library({str(build.library())!r})\n"
    fixed = {"OMP_NUM_THREADS": "1", "RAREFY_TUNE": "0", "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        [sys.executable, "-c", start + code],
        cwd=TESTS,
        env={**os.environ, **fixed, **build.environment(), **env},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def use_library(path: str) -> None:
    """Load the kernels of a build instead of the installed ones, before anything else has loaded those."""
    from rarefy.runtime import bindings

    bindings.find_spec = lambda name: SimpleNamespace(origin=path)  # type: ignore[assignment]
    assert bindings.missing() is None, bindings.missing()
