"""Output folders appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rarefy.common.errors import ContainerError, RecipeError
from rarefy.common.progress import say

INDEX = "rarefy.json"
KEY, PARTIAL = "key.json", "partial"  # beside the stops of a long run
ONCE = ("each.json", "given.json", "loss.json")  # what it found out before its first stop
TRAINING = "training.safetensors"
STOP = re.compile(r"(stop-[0-9]{6}|[0-9a-f]{32})\.safetensors")  # of a walk; a teacher's answer
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")  # never opened, only named
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(file: Path, text: str) -> None:
    """Write a file that a reader sees whole: the old one or the new one. Raises OSError, and leaves nothing behind."""
    write_bytes_whole(file, text.encode())


def write_bytes_whole(file: Path, data: bytes) -> None:
    """The same for bytes."""
    partial = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def check_target(path: str | os.PathLike[str], overwrite: bool = False, marker: str = INDEX) -> None:
    """Raise ContainerError where an output folder is in the way.

    `overwrite` allows for an empty folder, and for one that holds the file `marker` and no folders: nobody's else.
    """
    target = Path(os.path.realpath(path))
    if not target.exists():
        return _check_writable(target)
    if not target.is_dir():
        raise ContainerError(f"{target} is a file; give the name of a folder")
    held = sorted(target.iterdir())
    ours = not held or ((target / marker).is_file() and not any(entry.is_dir() for entry in held))
    if not overwrite or not ours:
        what = "a Rarefy folder" if held else "an empty folder"
        what = what if ours else f"not Rarefy's alone (it holds {held[0].name})"
        hint = "pass overwrite=True (--force), or another name" if ours else "give another name"
        raise ContainerError(f"{target} exists and is {what}; {hint}")


def _check_writable(target: Path) -> None:
    """Make and remove a folder where `target` will be, so that a place that cannot be written costs no work."""
    place = next(folder for folder in target.parents if folder.exists())
    probe = place / f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        if error.errno not in _FULL:  # a full disk is for the writer to name, with what it needs
            raise ContainerError(f"cannot write {target}: {error}; give another name") from None


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, overwrite: bool = False, marker: str = INDEX) -> Iterator[Path]:
    """Give a partial folder beside `path` to write into; on leaving, it becomes `path` in one step.

    Whatever goes wrong, even Ctrl-C, the old state stays and nothing is left behind; only a kill can leave a
    `.name.partial-*` folder, which may be deleted. Raises ContainerError as `check_target` does, and for what the
    system says to making and moving the folder; errors of the writer's own pass as they are (see `blaming`).
    """
    target = Path(os.path.realpath(path))
    with blaming(target):
        check_target(target, overwrite, marker)
    made = [folder for folder in target.parents if not folder.exists()]
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with blaming(target):
            partial.mkdir(parents=True)
        yield partial
        with blaming(target):
            for file in [*partial.iterdir(), partial]:
                sync(file)
            _publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # deepest first; a folder that someone else uses by now stays
            for folder in made:
                folder.rmdir()
        raise
    shutil.rmtree(partial, ignore_errors=True)  # where an old folder was exchanged for the new one


@contextmanager
def work_folder(path: str | os.PathLike[str], fresh: bool = False) -> Iterator[Path]:
    """Give the name of a folder beside `path` for the state of a long run. It is removed when the block ends well, and
    kept when it does not, for the next run to go on from."""
    target = Path(os.path.realpath(path))
    work = target.with_name(f".{target.name}.work")
    new = [p for p in target.parents if not p.exists()]
    if fresh:
        remove_state(work)
    try:
        yield work
    except BaseException:
        if any(f for name in ("stop-*", ONCE[0], TRAINING) for f in work.glob(f"stage-*/{name}")):
            say([f"what was done is kept in {work}, for the same command to go on from there"])
        else:
            remove_state(work)
            with suppress(OSError):  # something else is in one
                for folder in new:
                    folder.rmdir()
        raise
    remove_state(work)


LEAST = 1 << 28  # bytes in which anything can be done


def bytes_of(value: int | str | None) -> int | None:
    """Return bytes as a number: a whole number, or text such as "4G" or "1.5GiB" (K, M, G, T of 1024).

    >>> bytes_of("1.5G")
    1610612736
    """
    if value is None:
        return None
    text = value.strip() if isinstance(value, str) else ""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT])i?B?", text, re.IGNORECASE)
    number = int(float(found[1]) * 1024 ** ("KMGT".index(found[2].upper()) + 1)) if found else value
    if type(number) is not int:
        raise RecipeError(f"memory {value!r}: write bytes as a whole number, or a number with K, M, G or T, such as 4G")
    if number < LEAST:
        raise RecipeError(f"memory {value!r} is too little to work in: at least 256M")
    return number


def path_of(value: str | os.PathLike[str] | None) -> Path | None:
    """Return a folder's path; ContainerError for what is no path."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ContainerError(f"a folder is given by its path, got {value!r}")
    return None if value is None else Path(value).expanduser()


def is_state(name: str) -> bool:
    """Return whether a file of that name is of a long run's state."""
    return name in (KEY, PARTIAL, TRAINING, *ONCE) or STOP.fullmatch(name) is not None


def remove_state(work: Path) -> None:
    """Remove what long runs have put into a folder, and the folder if nothing else is in it."""
    for stage in [p for p in work.glob("stage-*") if p.is_dir() and not p.is_symlink()]:
        for file in stage.iterdir():
            if is_state(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it
            stage.rmdir()
    with suppress(OSError):
        work.rmdir()


@contextmanager
def blaming(target: Path, needed: int = 0) -> Iterator[None]:
    """Say in ContainerError what the system said, whether it came through Python or through safetensors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else 0
        if code not in _FULL:
            raise ContainerError(f"cannot write {target}: {error}; nothing was written") from error
        free = shutil.disk_usage(next(folder for folder in target.parents if folder.exists())).free
        need = f"needed {needed:,} bytes, free {free:,}" if needed else f"{free:,} bytes are free"
        raise ContainerError(f"no space for {target} ({os.strerror(code)}: {need}); nothing was written") from error


def sync(path: Path) -> None:
    """Have a file or folder on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(partial: Path, target: Path) -> None:
    """Put `partial` at `target` in one step; an old folder there is left at `partial`, for the caller to remove."""
    if not target.exists():
        os.rename(partial, target)
    elif not _exchange(partial, target):  # no such call here: the old folder stands aside, whole, until the new is in
        aside = partial.with_name(partial.name.replace(".partial-", ".old-"))
        os.rename(target, aside)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(aside, target)
            raise
        os.rename(aside, partial)
    with suppress(OSError):  # the new folder is in place by now
        sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    try:
        return ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
    except (OSError, AttributeError):
        return False
