"""Errors that the machine causes, not the user's files: no memory, no space, no right to read or write."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from mmap import PAGESIZE
from pathlib import Path

from rarefy.common.errors import RarefyError
from rarefy.common.plain_file import shown

NO_MEMORY = re.compile("can(no|')t allocate|out of memory|bad_alloc|failed to map segment|start new thread", re.I)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO)
OF_THE_MACHINE = (*NO_SPACE, *OF_PATHS, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)


def memory_problem(error: BaseException) -> str | None:
    """Return what to do about an error that has too little memory as its cause, or None for another one.

    >>> memory_problem(MemoryError())[:21]
    'out of memory: ask fo'
    >>> memory_problem(KeyError("x")) is None
    True
    """
    lacking = next((e for e in _chain(error) if _lacks_memory(e)), None)
    if lacking is None:
        return None
    return _advice(str(lacking) if isinstance(lacking, MemoryError) and str(lacking) else "out of memory")


def _advice(what: str) -> str:
    limit = _limit()
    more = "" if limit is None else f", or raise the limit (ulimit -v is {limit // 1024})"
    return f"{what}: ask for less at once, such as a smaller batch{more}"


def machine_problem(error: BaseException) -> str | None:
    """Return what the machine lacks and what to do, or None for an error that has other causes.

    >>> machine_problem(OSError(28, "No space left on device", "/tmp/x"))
    '/tmp/x: No space left on device: free some space, or set TMPDIR to a folder on another disk'
    """
    refused = next((e for e in _chain(error) if isinstance(e, OSError) and e.errno in OF_THE_MACHINE), None)
    if refused is None:
        problem = memory_problem(error)
        return _advice("out of memory") if problem is None and _is_at_limit() else problem
    place = f"{shown(str(refused.filename))}: " if refused.filename is not None else ""
    hint = "check the rights, the limits (ulimit -a) and the disk"
    if refused.errno in NO_SPACE:
        hint = "free some space, or set TMPDIR to a folder on another disk"
    elif refused.errno in OF_PATHS:
        hint = "check the path"
    return f"{place}{refused.strerror}: {hint}"


def raise_memory_error(error: BaseException) -> None:
    """Raise MemoryError if too little memory caused an error, so that nobody takes a whole file for a damaged one."""
    if any(map(_lacks_memory, _chain(error))):
        raise MemoryError("out of memory") from error


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return not isinstance(error, RarefyError) and NO_MEMORY.search(str(error)[:2000]) is not None


def _limit() -> int | None:
    """Return the limit of this process's memory in bytes, as `ulimit -v` sets it, or None."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _is_at_limit() -> bool:
    """Return whether 90 % of the limit are used: then Python may raise anything, such as SyntaxError from an import."""
    limit = _limit()
    try:
        return limit is not None and int(Path("/proc/self/statm").read_text().split()[0]) * PAGESIZE > 0.9 * limit
    except MemoryError:
        return True
    except OSError:  # no such file on this system
        return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
