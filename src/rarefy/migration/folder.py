"""Translate all recipes in a folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rarefy.common.atomic_io import container_errors, write_bytes_atomic
from rarefy.common.errors import RarefyError, RecipeError, unknown
from rarefy.migration.migrate import Migrated, checked
from rarefy.migration.recipe_text import HAS_MODIFIERS, MARKDOWN, find_recipes, read_file
from rarefy.migration.translate import Request, translate

SUFFIXES = (".yaml", ".yml", ".json", *MARKDOWN)
CONFIG = re.compile(r"[\"']?(pruning_configs|tensor_fqn)[\"']?[ \t]*:")
NNCF = re.compile(r"[\"']?compression[\"']?[ \t]*:")
MAX_FILES = 10_000


@dataclass(frozen=True)
class FolderEntry:
    """A recipe of a folder.

    Args:
        path: its file, relative to the folder.
        block: its number in a file with several; None for the only one.
        migrated: its translation; None if there is none.
        why_not: the error in place of a translation.
    """

    path: Path
    block: int | None
    migrated: Migrated | None
    why_not: str = ""

    @property
    def name(self) -> str:
        """Return the file, and `#2` for the second recipe in it."""
        return str(self.path) if self.block is None else f"{self.path}#{self.block}"


def migrate_folder(folder: Path, request: Request) -> tuple[FolderEntry, ...]:
    """Return an entry for each recipe in a folder and the folders in it, by name.

    Files without a recipe are left out. A given variable has to be of use to one recipe at least.

    Raises:
        RecipeError: if the folder holds no recipe, or if no recipe has a given variable.
    """
    entries: list[FolderEntry] = []
    used: set[str] = set()
    files = _files(folder)
    for path in files:
        for block in _blocks(path):
            entry, of_use = _entry(folder, path, replace(request, block=block, lenient=True))
            entries.append(entry)
            used |= of_use
    if not entries:
        kinds = ", ".join(SUFFIXES)
        raise RecipeError(f"{folder} holds no recipe of another tool: looked into {len(files):,} files ({kinds})")
    for name in request.variables:
        if name not in used and any(e.migrated for e in entries):
            raise RecipeError(unknown("variable", name, used, str(folder)))
    return tuple(entries)


def write_entries(entries: Sequence[FolderEntry], out: Path, force: bool) -> None:
    """Write the translated recipes to a folder, each under the name of its source with .yaml at the end.

    Raises RecipeError, before anything is written, for a file that exists, unless `force`.
    """
    targets = dict(zip(_targets(entries), entries))
    for target in targets:
        if (out / target).is_dir() or ((out / target).exists() and not force):
            raise RecipeError(f"{out / target} exists: pass --force, or give another folder")
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is a file: --out takes a folder where the source is one")
    for target, entry in targets.items():
        if entry.migrated is not None:
            with container_errors(out / target):
                (out / target).parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomic(out / target, entry.migrated.text.encode())


def _targets(entries: Sequence[FolderEntry]) -> list[Path]:
    """Return a file name for each entry; the old suffix stays in it where two would be equal."""
    short = [e.path.with_suffix(".yaml" if e.block is None else f".{e.block}.yaml") for e in entries]
    counts = Counter(short)
    return [
        s if counts[s] == 1 else e.path.with_name(f"{e.path.name}{'' if e.block is None else f'.{e.block}'}.yaml")
        for s, e in zip(short, entries)
    ]


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold a recipe; hidden ones and links are left out."""
    files = [
        p
        for p in sorted(folder.rglob("*"))
        if p.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and p.is_file()
        and not p.is_symlink()
    ]
    if len(files) > MAX_FILES:
        raise RecipeError(f"{folder} has {len(files):,} files that may hold a recipe; expected at most {MAX_FILES:,}")
    return files


def _blocks(path: Path) -> Iterator[int | None]:
    """Yield the numbers of the recipes in a file, None for the only one."""
    try:
        text = read_file(path)
    except RarefyError:  # large, or not text: no recipe
        return
    if HAS_MODIFIERS.search(text):
        recipes = find_recipes(text, path.name) if path.suffix != ".json" else [None]
        yield from [None] if len(recipes) == 1 else range(1, len(recipes) + 1)
    elif path.suffix.lower() not in MARKDOWN and (CONFIG.search(text) or (NNCF.search(text) and "algorithm" in text)):
        yield None


def _entry(folder: Path, path: Path, request: Request) -> tuple[FolderEntry, frozenset[str]]:
    """Return the translation of one recipe, and the given variables that it has."""
    where = path.relative_to(folder)
    try:
        done = translate(path, request)
        return FolderEntry(where, request.block, checked(path, done)), done.used
    except RarefyError as error:
        return FolderEntry(where, request.block, None, str(error)), frozenset()
