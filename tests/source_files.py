"""The files of the package, as tests of rules go through them."""

from itertools import groupby
from pathlib import Path


def files_by_folder(root: Path) -> dict[str, list[Path]]:
    """Return the Python files of a package by the folder right below it; a file beside the folders is one of its own.

    A test for each folder costs less than one for each file. Folders and files are sorted, since all processes of a
    test run must find the same tests.
    """

    def top(path: Path) -> str:
        return path.relative_to(root).parts[0]

    return {
        folder: list(files) for folder, files in groupby(sorted(root.rglob("*.py"), key=lambda p: (top(p), p)), top)
    }
