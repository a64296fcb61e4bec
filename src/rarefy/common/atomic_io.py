"""Write files and folders atomically: a reader sees the old version or the new one, never a part."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rarefy.common.errors import ContainerError, RecipeError
from rarefy.common.json_text import read_json_file
from rarefy.common.plain_file import plain_file, usable_path
from rarefy.common.progress import say

INDEX = "rarefy.json"
KEY_FILE, PARTIAL = "key.json", "partial"  # next to the saved states of a long run
SETUP_FILES = ("each.json", "given.json", "loss.json")  # results computed before the first saved state
TRAINING_FILE = "training.safetensors"
UNFINISHED = "unfinished"  # marks the state of a run that wrote a result before its end
MODEL_MEASURED = b'{"key": "point '  # begins the record of a model in a search's file
SEARCH_FILE = "search.jsonl"
STATE_FILE = re.compile(r"(stop-[0-9]{6}|[0-9a-f]{32})\.safetensors")  # sequential calibration; cached teacher outputs
UNFINISHED_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # what safetensors writes to first; a kill leaves it
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")  # never opened, only named in errors
MODULES = "modules.json"  # of a sentence-transformers model: names the folders of its modules, such as 1_Pooling
MAX_MODULES_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text_atomic(file: Path, text: str) -> None:
    """Write a text file atomically. Raises OSError, and then leaves nothing behind."""
    write_bytes_atomic(file, text.encode())


def write_bytes_atomic(file: Path, data: bytes) -> None:
    """Write bytes to a file atomically. Raises OSError, and then leaves nothing behind."""
    with atomic_file(file) as partial:
        partial.write_bytes(data)


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield an empty temporary file next to `file` to write into; on exit it replaces `file` in one step."""
    with _temporary(file, Path.touch) as partial:
        yield partial
        os.replace(partial, file)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to an output; it is removed on exit."""
    with _temporary(target, lambda folder: folder.mkdir(parents=True)) as partial:
        yield partial


@contextmanager
def _temporary(target: Path, make: Callable[[Path], Any]) -> Iterator[Path]:
    """Yield a temporary file or folder next to an output, and remove it on exit if it is still there.

    It is locked as long as this process lives: by that other runs know that no killed process has left it behind.
    """
    remove_leftovers(target)
    partial, handle = None, -1
    try:
        while partial is None or not partial.exists():  # until no other run took it for a leftover before the lock
            partial = _partial_name(target)
            make(partial)
            with suppress(FileNotFoundError):
                handle = _lock(partial, wait=True)
        yield partial
    finally:
        if partial is not None:
            _remove(partial)
        if handle >= 0:
            os.close(handle)


def _partial_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def _lock(path: Path, wait: bool = False) -> int:
    """Return the handle of a file or folder that is locked until it is closed; OSError if it is gone or, unless this
    is to `wait`, in use. Where the file system has no locks, only who waits gets a handle."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError) as error:
        if not wait:
            os.close(handle)
            raise OSError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK)) from error
    return handle


def _remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes have left next to an output: temporary files and folders that nobody has locked.

    An old output that a killed process had moved aside goes back to its place, if there is no new one. O(files there).
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-[0-9]+-[0-9a-f]{{8}}")
    with suppress(OSError):
        for path in [p for p in target.parent.iterdir() if name.fullmatch(p.name)]:
            with suppress(OSError):
                handle = _lock(path)
                try:
                    if ".old-" in path.name and not os.path.lexists(target):
                        os.rename(path, target)
                    else:
                        _remove(path)
                finally:
                    os.close(handle)


def write_new_file(path: str | os.PathLike[str], text: str, overwrite: bool = False) -> Path:
    """Write a text file atomically and return its path; ContainerError where it exists or cannot be written."""
    file = usable_path(path)
    if file.is_dir():
        raise ContainerError(f"{file} is a folder: give the name of a file")
    if file.exists() and not overwrite:
        raise ContainerError(f"{file} exists: pass overwrite=True (shell: pass --force), or give another name")
    with container_errors(file):
        write_text_atomic(file, text)
    return file


WITHOUT_MODEL = {"frontier.json", "recipe.yaml"}  # of a search whose models cannot be saved


def check_output_folder(path: str | os.PathLike[str], overwrite: bool = False, marker: str = INDEX) -> None:
    """Raise ContainerError if an output folder cannot be created or replaced; remove what killed runs left beside it.

    With `overwrite`, an existing folder may be replaced if it is empty, if it contains the file `marker` and no
    subfolders but those of modules of sentence-transformers, or is the result of a search without its model.
    """
    target = Path(os.path.realpath(usable_path(path)))
    remove_leftovers(target)
    if not target.exists():
        return _check_writable(target)
    if not target.is_dir():
        raise ContainerError(f"{target} is a file; give the name of a folder")
    entries = sorted(target.iterdir())
    modules = _module_folders(target)
    foreign = [entry for entry in entries if entry.is_dir() and not _is_module_folder(entry, modules)]
    marked = (target / marker).is_file() or {entry.name for entry in entries} == WITHOUT_MODEL
    ours = not entries or (marked and not foreign)
    if not overwrite or not ours:
        what = "a Rarefy folder" if entries else "an empty folder"
        what = what if ours else f"not only Rarefy's (it contains {(foreign or entries)[0].name})"
        hint = "pass overwrite=True (shell: pass --force), or another name" if ours else "give another name"
        raise ContainerError(f"{target} exists and is {what}; {hint}")
    _check_writable(target)


def _module_folders(target: Path) -> set[str]:
    """Return the names of folders in an output folder that modules.json names; none if it is damaged."""
    try:
        value = read_json_file(target / MODULES, MAX_MODULES_BYTES)
    except ContainerError:
        return set()
    entries = value if isinstance(value, list) else []
    return {e["path"] for e in entries if isinstance(e, dict) and isinstance(e.get("path"), str)}


def _is_module_folder(entry: Path, modules: set[str]) -> bool:
    """Return whether a folder is that of a module or of a compiled model, with files alone in it."""
    ours = entry.name in modules or (entry.name == "rarefy" and (entry / INDEX).is_file())
    return ours and not entry.is_symlink() and not any(inner.is_dir() for inner in entry.iterdir())


def _check_writable(target: Path) -> None:
    """Create and remove a folder next to `target`, so that a read-only location is found before any work is done."""
    parent = next(folder for folder in target.parents if folder.exists())
    probe = _partial_name(parent / target.name)
    try:
        probe.mkdir()
        with suppress(FileNotFoundError):  # another run took it for a leftover
            probe.rmdir()
    except OSError as error:
        if error.errno not in _FULL:  # a full disk is reported by the writer, which knows the bytes needed
            raise ContainerError(f"cannot write {target}: {_reason(error)}; give another name") from None


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False, marker: str = INDEX) -> Iterator[Path]:
    """Yield a temporary folder next to `path` to write into; on exit it becomes `path` in one step.

    On any error, Ctrl-C included, the old folder stays and the temporary one is removed. Only a killed process can
    leave a `.name.partial-*` folder behind, which the next run to `path` removes. Raises ContainerError as
    `check_output_folder` does, and for system errors while creating or renaming the folder. Errors raised inside the
    block pass unchanged.
    """
    target = Path(os.path.realpath(usable_path(path)))
    with container_errors(target):
        check_output_folder(target, overwrite, marker)
    new_folders = [folder for folder in target.parents if not folder.exists()]
    try:
        with ExitStack() as stack:
            with container_errors(target):
                partial = stack.enter_context(folder_beside(target))
            yield partial
            with container_errors(target):
                for file in [*partial.rglob("*"), partial]:
                    sync(file)
                _publish(partial, target)
    except BaseException:
        with suppress(OSError):  # deepest first; a folder that another process uses stays
            for folder in new_folders:
                folder.rmdir()
        raise


@contextmanager
def resume_folder(path: str | os.PathLike[str], fresh: bool = False) -> Iterator[Path]:
    """Yield the path of a folder next to `path` for the state of a long run.

    The folder is removed when the block succeeds. When it fails, or has put a file UNFINISHED into it, the folder
    stays, so that the next run can resume. ContainerError if a run that goes on shall start again.
    """
    target = Path(os.path.realpath(usable_path(path)))
    work = target.with_name(f".{target.name}.work")
    new = [p for p in target.parents if not p.exists()]
    if fresh:
        if _in_use(work):
            raise ContainerError(f"{work} is in use by another run; wait for it, or give another name")
        remove_resume_state(work)
    try:
        yield work
    except BaseException:
        if _in_use(work):
            pass  # the other one goes on
        elif _has_progress(work):
            say([f"progress is saved in {work}: run the same command again to resume"])
        else:
            remove_resume_state(work)
            with suppress(OSError):  # something else is in one
                for folder in new:
                    folder.rmdir()
        raise
    if (work / UNFINISHED).exists():
        (work / UNFINISHED).unlink()
        say([f"progress is saved in {work}: run the same command with --force and more time to go on"])
    else:
        remove_resume_state(work)


def _has_progress(work: Path) -> bool:
    """Return whether a run could go on from a folder: a search without a measured model is no progress."""
    if any(f for name in ("stop-*", SETUP_FILES[0], TRAINING_FILE) for f in work.glob(f"stage-*/{name}")):
        return True
    return any(MODEL_MEASURED in file.read_bytes() for file in work.glob(f"stage-*/{SEARCH_FILE}"))


def _in_use(work: Path) -> bool:
    """Return whether another process has its state in a folder."""
    places = ("stage-*", "stage-*/training-*/stage-*")
    try:
        for file in (f for p in places for name in (SEARCH_FILE, KEY_FILE) for f in work.glob(f"{p}/{name}")):
            lock_file(file).close()
    except ContainerError:
        return True
    return False


def lock_file(file: Path) -> Any:
    """Return a file that is open to read and append, and locked until it is closed; ContainerError if it is in use."""
    if file.is_symlink():  # it would be emptied and written
        raise ContainerError(f"{file} is a link: remove it, or give another name")
    if os.path.lexists(file):
        plain_file(file)
    with container_errors(file):
        opened = open(file, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (open as long as the run)
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no file locks on this system
        pass
    except OSError:
        opened.close()
        raise ContainerError(f"{file.parent} is in use by another run; wait for it, or give another name") from None
    opened.seek(0)
    return opened


def unlock_file(opened: Any) -> None:
    """Close a file that `lock_file` returned; what a full disk has refused to take is dropped."""
    with suppress(OSError):
        opened.close()


MIN_MEMORY = 1 << 28  # bytes


def parse_bytes(value: int | str | None) -> int | None:
    """Return a number of bytes from an int or from text such as "4G" or "1.5GiB" (K, M, G, T are powers of 1024).

    >>> parse_bytes("1.5G")
    1610612736
    """
    if value is None:
        return None
    text = value.strip() if isinstance(value, str) else ""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT])i?B?", text, re.IGNORECASE)
    number = int(float(match[1]) * 1024 ** ("KMGT".index(match[2].upper()) + 1)) if match else value
    if type(number) is not int:
        raise RecipeError(
            f"memory: expected bytes as a whole number, or a number with K, M, G or T such as 4G, got {value!r}"
        )
    if number < MIN_MEMORY:
        raise RecipeError(f"memory: expected at least 256M, got {value!r}")
    return number


def parse_path(value: str | os.PathLike[str] | None) -> Path | None:
    """Return a folder as a Path with `~` expanded; ContainerError if it is not a path."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ContainerError(f"expected the path of a folder, got {value!r}")
    return None if value is None else Path(value).expanduser()


def is_resume_file(name: str) -> bool:
    """Return whether a file of that name belongs to the state of a long run."""
    names = (KEY_FILE, PARTIAL, TRAINING_FILE, SEARCH_FILE, *SETUP_FILES)
    return name in names or any(p.fullmatch(name) for p in (STATE_FILE, UNFINISHED_SAFETENSORS))


def remove_resume_state(work: Path) -> None:
    """Remove the saved state of long runs from a folder, and the folder itself if nothing else is in it.

    The last state goes first and the key of the run last, so that a kill leaves an earlier state of the same run.
    """
    for stage in [p for p in work.glob("stage-*") if p.is_dir() and not p.is_symlink()]:
        for nested in [p for p in stage.glob("training-*") if not p.is_symlink()]:  # of a search
            remove_resume_state(nested)
        names = [f.name for f in stage.iterdir() if is_resume_file(f.name)]
        for name in sorted(names, key=lambda name: (name != KEY_FILE, name not in SETUP_FILES, name), reverse=True):
            (stage / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it
            stage.rmdir()
    with suppress(OSError):
        work.rmdir()


@contextmanager
def container_errors(target: Path, needed: int = 0) -> Iterator[None]:
    """Raise system errors inside the block, from Python or safetensors, as ContainerError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        match = re.search(r"(?:os error|code:) (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(match[1]) if match else 0
        if code not in _FULL:
            raise ContainerError(f"cannot write {target}: {_reason(error)}; nothing was written") from error
        free = shutil.disk_usage(next(folder for folder in target.parents if folder.exists())).free
        need = f"needed {needed:,} bytes, free {free:,}" if needed else f"{free:,} bytes are free"
        raise ContainerError(f"no space for {target} ({os.strerror(code)}: {need}); nothing was written") from error


def _reason(error: Exception) -> str:
    """Return what the system says, without the name of a temporary file."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(partial: Path, target: Path) -> None:
    """Rename `partial` to `target` in one step; an old folder at `target` is moved to `partial`."""
    if not target.exists():
        os.rename(partial, target)
    elif not _exchange(partial, target):  # without renameat2 the old folder is renamed first
        aside = partial.with_name(partial.name.replace(".partial-", ".old-"))
        handle = _lock(target, wait=True)  # else another run would move it back
        try:
            os.rename(target, aside)
            try:
                os.rename(partial, target)
            except BaseException:
                os.rename(aside, target)
                raise
        finally:
            os.close(handle)
        os.rename(aside, partial)
    with suppress(OSError):  # the new folder is already in place
        sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders by renameat2(2); return whether the system could."""
    AT_FDCWD, RENAME_EXCHANGE = -100, 2
    try:
        return ctypes.CDLL(None).renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        return False
