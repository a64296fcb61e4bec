"""Paths that a user or a file names: plain files and folders alone, and errors of one line that name the path.

A named pipe, a device or a socket would keep a reader waiting forever. Links to plain files count as these files,
except in `open_plain`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from rarefy.common.errors import ContainerError, RarefyError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
MISSING = (errno.ENOENT, errno.ENOTDIR)
MAX_SHOWN = 200  # characters of a path in messages


def usable_path(path: str | os.PathLike[str], error: type[RarefyError] = ContainerError) -> Path:
    """Return a path of a plain file, of a folder that can be read, or of nothing.

    Raises:
        RarefyError: of the class `error`, for a named pipe, a device or a socket, and for a path that the system
            refuses: a NUL byte, a name that is too long, a loop of links, a folder without the right to read it.

    >>> usable_path("/dev/null")
    Traceback (most recent call last):
    rarefy.common.errors.ContainerError: /dev/null is a device: give a plain file or a folder
    """
    file = Path(path)
    try:
        mode = os.stat(file).st_mode
        if stat.S_ISDIR(mode) and not os.access(file, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as problem:
        if isinstance(problem, OSError) and problem.errno in MISSING:
            return file
        raise error(f"{shown(file)} cannot be read: {_reason(problem)}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise error(f"{shown(file)} is {_kind(mode)}: give a plain file or a folder")
    return file


def plain_file(path: str | os.PathLike[str], error: type[RarefyError] = ContainerError) -> Path:
    """Return the path of a plain file, which can be opened without waiting for anything.

    Raises:
        RarefyError: of the class `error`, for a path of anything else, of nothing, or one that the system refuses.
    """
    file = Path(path)
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as problem:
        raise error(f"{shown(file)} cannot be read: {_reason(problem)}") from None
    if not stat.S_ISREG(mode):
        raise error(f"{shown(file)} cannot be read: it is {_kind(mode)}, expected a plain file")
    return file


def read_text(
    path: str | os.PathLike[str], error: type[RarefyError] = ContainerError, encoding: str = "utf-8-sig"
) -> str:
    """Return the text of a plain file.

    Raises:
        RarefyError: of the class `error`, as `plain_file` does, and where the file cannot be read.
        UnicodeDecodeError: it is not text of this encoding.
    """
    try:
        return plain_file(path, error).read_text(encoding=encoding)
    except OSError as problem:
        raise error(f"{shown(path)} cannot be read: {_reason(problem)}") from None


def open_plain(path: str | os.PathLike[str], *, folder: int | None = None) -> int:
    """Return the handle of a plain file, not of a link, that is open for reading. Nothing is waited for.

    Args:
        path: the file.
        folder: the handle of the folder in which `path` is a name.

    Raises:
        OSError: it is anything else, or cannot be opened.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):  # of which no system has all
        flags |= getattr(os, name, 0)
    handle = os.open(path, flags, dir_fd=folder)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"it is {_kind(mode)}, expected a plain file", str(path))
    return handle


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path as messages show it: printable, and at most 200 characters long."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "no plain file")


def _reason(problem: OSError | ValueError) -> str:
    if isinstance(problem, OSError):
        return problem.strerror or type(problem).__name__
    return "a path cannot have a NUL byte" if "null" in str(problem) else str(problem)
