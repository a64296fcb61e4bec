"""What is in the place of a file: a pipe, a device, a folder, a loop of links. No reader waits, and errors are ours."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest

from fuzz.targets import available
from rarefy.common.errors import RarefyError

SECONDS = 20.0  # without a sign of life
QUICK = 3  # files of a target that are replaced


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path.name)


def a_socket(path):
    here = os.open(path.parent, os.O_RDONLY)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


PLACES = {"pipe": pipe, "device": device, "folder": lambda path: path.mkdir(), "loop": loop, "socket": a_socket}


def read_all(target, folder, cases, say):
    """Read each part with one file replaced, and say what each case gives."""
    warnings.simplefilter("ignore")
    for part, name, kind in cases:
        file, aside = folder / name, folder / f"{name}.aside"
        say(f"begin {kind} {name}")
        file.rename(aside)
        try:
            PLACES[kind](file)
            target.read(folder / part)
        except RarefyError as error:
            if "\n" in str(error).strip() and "Traceback" in str(error):
                say(f"failed {kind} {name}: a trace as message")
        except BaseException:
            say(f"failed {kind} {name}: {traceback.format_exc()}".replace("\n", "\x00"))
        finally:
            shutil.rmtree(file, ignore_errors=True) if file.is_dir() and not file.is_symlink() else file.unlink()
            aside.rename(file)


def in_a_process(work):
    """Run `work(say)` in a process; return the lines that it says, the last one of a process that hangs marked so."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read_end)
            work(lambda line: os.write(write_end, f"{line}\n".encode()))
        finally:
            os._exit(0)
    os.close(write_end)
    text, hangs = b"", False
    while not hangs:
        ready, _, _ = select.select([read_end], [], [], SECONDS)
        data = os.read(read_end, 1 << 16) if ready else b""
        text, hangs = text + data, not ready
        if ready and not data:
            break
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(read_end)
    lines = text.decode(errors="replace").splitlines()
    ended = [] if not hangs and os.WIFEXITED(status) else [f"failed, hangs or died: {lines[-1] if lines else ''}"]
    return [*lines, *ended]


def main(root):
    """Print what each target's cases give: in a process of its own, whose forks meet no locked threads."""
    for target in available():
        folder = Path(root) / target.name
        folder.mkdir()
        lines = in_a_process(lambda say, t=target, f=folder: t.make(f))
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        contents = {name: (folder / name).read_bytes() for name in files}
        pairs = [(p, n) for p in target.parts(contents) for n in files if n == p or n.startswith(f"{p}/") or not p]
        step = 1 if os.environ.get("RAREFY_ALL_PLACES") else max(1, len(pairs) // QUICK)
        cases = [(p, n, k) for p, n in pairs[::step] for k in PLACES]
        lines += in_a_process(lambda say, t=target, f=folder, c=cases: read_all(t, f, c, say))
        print(json.dumps([target.name, len(cases), lines]), flush=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", "import sys; from fuzz.test_places import main; main(sys.argv[1])"]
    done = subprocess.run(
        [*command, str(tmp_path_factory.mktemp("places"))],
        cwd=tests, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: (count, lines) for name, count, lines in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("target", available(), ids=lambda target: target.name)
def test_no_reader_waits_for_what_is_no_file(target, outcomes):
    count, lines = outcomes[target.name]
    failed = [line.replace("\x00", "\n") for line in lines if line.startswith("failed")]
    assert not failed, "\n".join(failed)
    assert len([line for line in lines if line.startswith("begin")]) == count > 0
