"""The files of one folder, held open: whoever replaces or removes the folder meanwhile changes nothing for a reader.

`save(overwrite=True)` exchanges whole folders. A reader that opened file after file by its path could take the index of
the old model and the weights of the new one.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rarefy.common.atomic_io import sha256_of
from rarefy.common.errors import ContainerError
from rarefy.common.plain_file import open_plain
from rarefy.formats.index import short

MAX_HELD = 256  # files held open; more are opened again in the same folder, and are missing once that is removed
NO_FILE = (errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.ENXIO)  # of `open_plain` for what is no plain file
BY_HANDLE = os.path.isdir("/proc/self/fd") and os.open in os.supports_dir_fd


class HeldFiles:
    """The plain files of a folder by name, links left out; on systems without /proc, by their paths alone.

    Attributes:
        folder: the path that the folder had when it was opened.
    """

    def __init__(self, folder: Path):
        """Open a folder. Raises OSError."""
        self.folder = folder
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if BY_HANDLE else None
        self._handles: dict[str, int] = {}
        weakref.finalize(self, _close, self._root, self._handles)
        for name in [] if self._root is None else sorted(os.listdir(self._root))[:MAX_HELD]:
            with suppress(OSError):  # a folder, or no plain file
                self.path(name)

    def path(self, name: str) -> Path:
        """Return a path by which a file can be opened as long as this object lives.

        Raises:
            OSError: there is no such plain file.
        """
        if self._root is None:
            os.close(open_plain(self.folder / name))
            return self.folder / name
        if name not in self._handles:
            handle = open_plain(name, folder=self._root)
            if len(self._handles) >= MAX_HELD:
                os.close(handle)
                return Path(f"/proc/self/fd/{self._root}/{name}")
            self._handles[name] = handle
        return Path(f"/proc/self/fd/{self._handles[name]}")

    def checked(self, name: str, known: Mapping[str, Any], verify: bool = True) -> Path:
        """Return what `path` does, of a file that has the `known` bytes and, to `verify`, the hash.

        Raises:
            ContainerError: it is missing, a link or no plain file, or it was altered.
            OSError: it cannot be opened or read.
        """
        file = self.folder / name
        try:
            opened = self.path(name)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            what = "missing" if error.errno == errno.ENOENT else "a link or no plain file"
            raise ContainerError(f"{file}: {what}") from None
        size = opened.stat().st_size
        if size != known["bytes"]:
            raise ContainerError(f"{file}: {size} bytes, expected {short(known['bytes'])}; was it truncated?")
        if verify and sha256_of(opened) != known["sha256"]:
            raise ContainerError(f"{file}: its sha256 is not the one in the index; the file was altered")
        return opened

    def is_current(self) -> bool:
        """Return whether the folder is still the one at its path."""
        if self._root is None:
            return True
        try:
            now, then = os.stat(self.folder), os.fstat(self._root)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (then.st_dev, then.st_ino)


def _close(root: int | None, handles: Mapping[str, int]) -> None:
    for handle in (*([] if root is None else [root]), *handles.values()):
        os.close(handle)
