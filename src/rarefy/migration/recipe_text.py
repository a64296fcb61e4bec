"""Find recipes in files: YAML with or without front matter, Markdown, README files with several fenced recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rarefy.common.errors import RecipeError, nearest
from rarefy.common.plain_file import read_text, usable_path

MAX_BYTES = 256 << 10  # of a file; a recipe in it has at most 64 Ki characters
MARKDOWN = (".md", ".markdown", ".mdx")
FENCE = re.compile(r"[ \t>]{0,16}(`{3,}|~{3,})[ \t]*([\w+-]{0,20})[^`]*$")
LANGUAGES = ("", "yaml", "yml", "markdown", "md")  # of fenced blocks that may hold a recipe
HAS_MODIFIERS = re.compile(r"modifiers[\"']?[ \t]*:")
TOP_KEY = re.compile(r"^\w{0,60}(?:modifiers|_stage):", re.MULTILINE)
LEADING_COMMENT = re.compile(r"\A\s*<!--.*?-->", re.DOTALL)
NAMES = re.compile(r"\b[A-Z]\w{0,60}?Modifier\b")
HINTS = {
    ".py": "is Python code: save the text of its recipe as a .yaml file",
    ".ipynb": "is a notebook: save the text of its recipe as a .yaml file",
    ".onnx": "is a model: rarefy.from_onnx reads it, and checkpoints need no migration",
    ".pt": "is a checkpoint; migrate reads recipes",
    ".pth": "is a checkpoint; migrate reads recipes",
    ".bin": "is a checkpoint; migrate reads recipes",
    ".safetensors": "is a checkpoint; migrate reads recipes",
}


@dataclass(frozen=True)
class RecipeText:
    """A recipe in a file: its YAML, with empty lines before it so that lines keep their numbers, and its first line."""

    text: str
    line: int

    @property
    def modifiers(self) -> str:
        """Return the names of its first modifiers."""
        names = list(dict.fromkeys(NAMES.findall(self.text)))
        return ", ".join([*names[:3], "..."] if len(names) > 3 else names)


def read_file(path: Path) -> str:
    """Return the text of a file; RecipeError if there is none, or if it is too large or not text."""
    if "\n" in str(path):
        raise RecipeError("expected the name of a file, got the text of a recipe: save it to a file")
    usable_path(path, RecipeError)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder: give one of its files, or run `rarefy migrate {path}`, which does all")
    if not path.is_file():
        siblings = [p.name for p in sorted(path.parent.glob("*"))[:1000]] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        hint = f" (did you mean {str(path.with_name(near[0]))!r}?)" if near else ""
        raise RecipeError(f"no file {str(path)!r}{hint}: give a recipe or a config of another tool")
    if path.suffix in HINTS:
        raise RecipeError(f"{path.name} {HINTS[path.suffix]}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise RecipeError(f"{path.name} has {size:,} bytes; a recipe has at most 65,536 characters")
    try:
        return read_text(path, RecipeError)  # with or without a byte order mark, any line ends
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path.name}: a recipe is UTF-8 text; byte {error.start} is not: {error.reason}. Save it as UTF-8"
        ) from None


def find_recipes(text: str, name: str) -> list[RecipeText]:
    """Return the recipes in the text of a file: its front matter, else its fenced blocks, else all of it.

    Empty for Markdown without a recipe.
    """
    lines = text.splitlines()
    front = _front_matter(lines, 0)
    if front is not None:
        return [front]
    is_markdown = Path(name).suffix.lower() in MARKDOWN
    fenced = list(_fenced(lines)) if is_markdown else []
    if fenced or (is_markdown and not TOP_KEY.search(text)):
        return fenced
    comment = LEADING_COMMENT.match(text)  # a licence, say
    rest = text if comment is None else "\n" * comment[0].count("\n") + text[comment.end() :]
    return [RecipeText(rest, 1)]


def choose(recipes: Sequence[RecipeText], block: int | None, name: str) -> RecipeText:
    """Return the only recipe of a file, or the one of this number (from 1); RecipeError if it has to be chosen."""
    if not recipes:
        raise RecipeError(
            f"{name} holds no recipe: expected YAML with modifiers between two lines of ---, or in a block fenced by "
            "``` lines"
        )
    count = len(recipes)
    held = "1 recipe" if count == 1 else f"{count} recipes"
    if block is None and count == 1:
        return recipes[0]
    if block is None:
        listed = "; ".join(f"{n}: line {r.line}, {r.modifiers}" for n, r in enumerate(recipes, 1))
        raise RecipeError(
            f"{name} holds {held}: pass block=NUMBER (shell: pass --block NUMBER) for one of them. {listed}"
        )
    if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= count:
        raise RecipeError(f"block: expected a number from 1 to {count}, since {name} holds {held}; got {block!r}")
    return recipes[block - 1]


def _front_matter(lines: Sequence[str], before: int) -> RecipeText | None:
    """Return the first text with modifiers between two lines of ---, or after the last one; `before` lines go first."""
    marks = [i for i, line in enumerate(lines) if line.rstrip() == "---"]
    for first, last in zip(marks, [*marks[1:], len(lines)]):
        inner = lines[first + 1 : last]
        if any(HAS_MODIFIERS.search(l) for l in inner) and not any(FENCE.match(l) for l in inner):
            return _located(inner, before + first + 1)
    return None


def _fenced(lines: Sequence[str]) -> Iterator[RecipeText]:
    """Yield the fenced blocks of Markdown that hold modifiers under their key."""
    fence, start = None, 0
    for number, line in enumerate(lines):
        match = FENCE.match(line)
        if match is None:
            continue
        if fence is None:
            fence, start = match, number + 1
        elif match[1].startswith(fence[1]) and not match[2]:
            inner = [_undented(l, fence.start(1)) for l in lines[start:number]]
            if fence[2].lower() in LANGUAGES and any(HAS_MODIFIERS.search(l) for l in inner):
                yield _front_matter(inner, start) or _located(inner, start)
            fence = None


def _undented(line: str, width: int) -> str:
    """Return a line without the indentation of its fence, as far as it has one."""
    return line[width:] if not line[:width].strip(" \t>") else line


def _located(lines: Sequence[str], before: int) -> RecipeText:
    return RecipeText("\n" * before + "\n".join(lines) + "\n", before + 1)
