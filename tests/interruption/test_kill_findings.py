"""The smallest case of each defect that `make kill` and runs on machines without space or memory have found."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import rarefy
from rarefy.calibration import resume
from rarefy.checkpoint import packed_store, push
from rarefy.cli import main as command_line
from rarefy.common import atomic_io, machine_errors
from rarefy.common.errors import ContainerError
from rarefy.formats import container

LEFT = ".out.partial-123-0123abcd"
KEY = {"epochs": 1}


class Killed(BaseException):
    """Ends a run in the middle, as a kill does."""


def linear(value: float) -> torch.nn.Linear:
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, value)
    return net


# ---- leftovers of killed runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_next_run_removes_what_a_killed_one_has_left(is_folder, tmp_path):
    """They stayed for ever, each as large as the model."""
    left = tmp_path / LEFT
    (left.mkdir(), (left / "weights.safetensors").touch()) if is_folder else left.touch()
    others = [
        tmp_path / name for name in (".out.partial-mine", ".other.partial-123-0123abcd", "out.partial-1-0123abcd")
    ]
    for other in others:
        other.mkdir()
    (tmp_path / ".out.partial-1-00000000").symlink_to(others[0])
    rarefy.save(linear(1), tmp_path / "out") if is_folder else atomic_io.write_new_file(tmp_path / "out", "text")
    assert not left.exists() and all(other.is_dir() for other in others)


def test_the_folder_of_a_run_that_goes_on_stays(tmp_path):
    with atomic_io.atomic_folder(tmp_path / "out") as partial:
        rarefy.save(linear(2), tmp_path / "out")
        assert partial.is_dir()
        with pytest.raises(ContainerError, match="exists"):
            atomic_io.check_output_folder(tmp_path / "out")
        assert partial.is_dir()
        (partial / atomic_io.INDEX).touch()
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_taken_for_a_leftover_before_its_lock_is_made_again(tmp_path, monkeypatch):
    real, taken = atomic_io._lock, []

    def lock(path, wait=False):
        if wait and not taken:
            taken.append(path)
            atomic_io.remove_leftovers(tmp_path / "out")  # another run, in between
        return real(path, wait)

    monkeypatch.setattr(atomic_io, "_lock", lock)
    rarefy.save(linear(1), tmp_path / "out")
    assert taken and [f.name for f in tmp_path.iterdir()] == ["out"]


def test_an_old_output_that_was_moved_aside_comes_back(tmp_path, monkeypatch):
    """Without renameat2, a kill between two renames left no output at all."""
    rarefy.save(linear(1), tmp_path / "out")
    real = os.rename

    def rename(a, b):
        real(a, b)
        if ".old-" in str(b):
            raise Killed

    monkeypatch.setattr(atomic_io, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(Killed):
        rarefy.save(linear(2), tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ContainerError, match="exists and is a Rarefy folder; pass overwrite"):
        rarefy.save(linear(2), tmp_path / "out")
    assert rarefy.load(tmp_path / "out", torch.nn.Linear(2, 2)).weight[0, 0] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


# ---- saved states -------------------------------------------------------------------------------------------------


def state_of_a_run(work: Path) -> None:
    state = resume.open_state(work / "stage-1", KEY)
    state.compute_once("each", lambda: [1])
    for stop in range(3):
        state.write(stop, resume.StepState({"w": torch.full((2,), float(stop))}, {}, []))
    state.close()


@pytest.mark.parametrize("count", range(5))
def test_a_kill_while_the_state_is_removed_leaves_an_earlier_state(count, tmp_path, monkeypatch):
    """The key could go first: the next run refused the state, which had no key."""
    state_of_a_run(tmp_path)
    real, removed = Path.unlink, []

    def unlink(self, missing_ok=False):
        if len(removed) == count:
            raise Killed
        removed.append(self.name)
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(map(self.joinpath, os.listdir(self)))))
    with pytest.raises(Killed):
        atomic_io.remove_resume_state(tmp_path)
    monkeypatch.undo()
    state = resume.open_state(tmp_path / "stage-1", KEY)
    assert state.num_done == max(3 - count, 0)
    assert (tmp_path / "stage-1" / "each.json").exists() == (count < 4)
    state.close()


@pytest.mark.parametrize("part", [0, 1, 9])
def test_a_key_that_was_written_in_part(part, tmp_path):
    """It was refused as the state of another run."""
    text = json.dumps(KEY, sort_keys=True, indent=1)
    (tmp_path / "key.json").write_text(text[:part])
    resume.open_state(tmp_path, KEY).close()
    assert (tmp_path / "key.json").read_text() == text


def test_weights_without_a_key_are_packed_again(tmp_path):
    """A kill could remove the key first: weights of another precision were then taken for those of this run."""
    work = tmp_path / ".out.packing"
    work.mkdir()
    (work / "packed-00000.safetensors").write_bytes(b"of another precision")
    with packed_store.packed_store(tmp_path / "out", KEY, False, False):
        assert [f.name for f in work.iterdir()] == ["key.json"]


def test_packed_weights_are_removed_before_their_key(tmp_path, monkeypatch):
    removed, real = [], Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda self, missing_ok=False: (removed.append(self.name), real(self, missing_ok))
    )
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(map(self.joinpath, os.listdir(self)))))
    with packed_store.packed_store(tmp_path / "out", KEY, False, False) as store:
        (store.folder / "packed-00000.safetensors").touch()
    assert removed == ["packed-00000.safetensors", "key.json"]


def test_a_push_that_was_killed_after_its_card_can_be_repeated(tmp_path):
    """The card of the first push made the licence an error."""
    rarefy.save(linear(1), tmp_path / "out")
    text = push.write_card(tmp_path / "out", "me/x", "mit").read_text()
    assert push.write_card(tmp_path / "out", "me/x", "mit").read_text() == text
    with pytest.raises(ContainerError, match="README.md exists, so that the licence has no effect"):
        push.write_card(tmp_path / "out", "me/x", "apache-2.0")


# ---- full disks and folders that cannot be written ----------------------------------------------------------------


def test_a_full_disk_is_not_filled_by_a_state_that_was_not_written(tmp_path, monkeypatch):
    state = resume.open_state(tmp_path, KEY)

    def save_file(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(resume, "save_file", save_file)
    with pytest.raises(ContainerError, match="no space for .* needed 8 bytes, free"):
        state.write(0, resume.StepState({"w": torch.ones(2)}, {}, []))
    assert [f.name for f in tmp_path.iterdir()] == ["key.json"]
    state.close()


@pytest.mark.parametrize("which", ["resume", "packed_store"])
def test_a_key_that_does_not_fit_on_the_disk(which, tmp_path, monkeypatch):
    """Closing the file raised the error once more, without its place; the lock stayed."""
    module = {"resume": resume, "packed_store": packed_store}[which]
    real = module.lock_file
    opened = []

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            self.file.close()
            self.flush()

    monkeypatch.setattr(module, "lock_file", lambda file: opened.append(Full(real(file))) or opened[-1])
    with pytest.raises(ContainerError, match=rf"no space for {tmp_path}.*No space left on device"):
        if which == "resume":
            resume.open_state(tmp_path / "w", KEY)
        else:
            with packed_store.packed_store(tmp_path / "out", KEY, False, False):
                raise AssertionError("no key was written")
    assert opened[0].file.closed


def test_an_output_that_cannot_be_replaced_is_found_before_the_work(tmp_path, monkeypatch):
    """A place that is read-only was found only where there was no older output."""
    rarefy.save(linear(1), tmp_path / "out")

    def mkdir(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ContainerError, match="cannot write .*out: Read-only file system; give another name"):
        atomic_io.check_output_folder(tmp_path / "out", True)


# ---- too little memory --------------------------------------------------------------------------------------------


def no_memory(*_, **__):
    raise SafetensorError("Cannot allocate memory (os error 12)")


def test_a_whole_file_is_not_called_damaged_where_there_is_no_memory(tmp_path, monkeypatch):
    """The error told to remove the state of a long run."""
    rarefy.save(linear(1), tmp_path / "out")
    state_of_a_run(tmp_path)
    (tmp_path / "packed-00000.safetensors").touch()
    for module in (container, resume, packed_store):
        monkeypatch.setattr(module, "safe_open", no_memory)
    with pytest.raises(MemoryError, match="out of memory"):
        container.read(tmp_path / "out")
    state = resume.open_state(tmp_path / "stage-1", KEY)
    with pytest.raises(MemoryError):
        state.read(0)
    state.close()
    with pytest.raises(MemoryError):
        packed_store.PackedStore(tmp_path).hold("w", lambda: None)


def test_errors_of_the_machine_are_lines(monkeypatch, capsys):
    def wrapped():
        try:
            raise MemoryError
        except MemoryError:
            raise ContainerError("x is damaged: remove it") from None

    def raises(error):
        raise error

    for action, text in (
        (lambda: raises(MemoryError()), "rarefy: out of memory: ask for less at once, such as a smaller batch"),
        (wrapped, "rarefy: out of memory: ask for less at once"),
        (lambda: raises(ImportError("x.so: failed to map segment from shared object")), "rarefy: out of memory: ask"),
        (lambda: raises(RuntimeError("can't start new thread")), "rarefy: out of memory: ask"),
        (
            lambda: raises(OSError(errno.ENOSPC, "No space left on device", "/tmp/x")),
            "rarefy: /tmp/x: No space left on",
        ),
        (
            lambda: raises(PermissionError(errno.EACCES, "Permission denied", "/x")),
            "rarefy: /x: Permission denied: check",
        ),
    ):
        monkeypatch.setattr(command_line, "app", lambda standalone_mode, action=action: action())
        with pytest.raises(SystemExit) as end:
            command_line.main()
        printed = capsys.readouterr().err
        assert end.value.code == 2 and printed.startswith(text) and printed.count("\n") == 1
    monkeypatch.setattr(command_line, "app", lambda standalone_mode: raises(SyntaxError("expected ':'")))
    with pytest.raises(SyntaxError):
        command_line.main()
    monkeypatch.setattr(machine_errors, "_is_at_limit", lambda: True)  # when Python raises anything
    with pytest.raises(SystemExit):
        command_line.main()
    assert capsys.readouterr().err.startswith("rarefy: out of memory: ask")


@pytest.mark.parametrize("kibibytes", [150_000, pytest.param(600_000, marks=pytest.mark.slow)])
def test_a_process_that_may_not_have_the_memory_to_begin(kibibytes, tmp_path):
    """Importing torch fails, with errors of many kinds."""
    words = f"ulimit -v {kibibytes}; exec {sys.executable} -m rarefy.cli.main compile minilm -o {tmp_path}/out"
    ran = subprocess.run(
        ["sh", "-c", words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 2 and f"(ulimit -v is {kibibytes})" in ran.stderr and not any(tmp_path.iterdir())
    assert ran.stderr.startswith("rarefy: out of memory: ask for less at once")


def test_a_locked_leftover_is_of_a_run_that_lives(tmp_path):
    left = tmp_path / LEFT
    left.mkdir()
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    atomic_io.remove_leftovers(tmp_path / "out")
    assert left.exists()
    os.close(handle)
    atomic_io.remove_leftovers(tmp_path / "out")
    assert not left.exists()
