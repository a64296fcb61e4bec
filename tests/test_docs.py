"""README and docs: Python blocks run, shell blocks name real options, recipes parse, links lead somewhere, tables are
up to date."""

import doctest
import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from conftest import sample
from helpers.marks import slow_case
from rarefy.recipe import parser

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "log.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SLOW = ("embeddings", "generate", "gguf", "large-models", "migrate-deepsparse", "onnx", "transformers")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page, hidden ones in HTML comments too, as (language, text)."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def of_kind(language: str) -> list[Path]:
    return [p for p in PAGES if any(kind == language for kind, _ in blocks(p))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def same_output(text: str, printed: str) -> bool:
    """Return whether two outputs agree: words as in doctests (`...` is anything), numbers within 1 %."""
    number = r"\d+(?:\.\d+)?"
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    pairs = zip(re.findall(number, text), re.findall(number, printed))
    close = "..." in text or all(float(a) == pytest.approx(float(b), rel=0.01) for a, b in pairs)
    blank = [re.sub(number, "0", output) for output in (text, printed)]
    return close and doctest.OutputChecker().check_output(*blank, options)


def test_outputs_are_compared():
    assert same_output("2 layers, 0.998\n", "2 layers, 0.997\n") and same_output("1 ...: x\n", "1 call: x\n")
    assert not same_output("2 layers\n", "3 layers\n") and not same_output("2 layers\n", "2 blocks\n")


def pages_to_run() -> list:
    """Return the pages with Python blocks; those whose blocks take more than a few seconds are slow."""
    return [slow_case(page) if page.stem in SLOW else page for page in of_kind("python")]


@pytest.mark.parametrize("page", pages_to_run(), ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Run the blocks of a page in one namespace and an empty folder; a `text` block after one is what it prints."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'model_folder\("([\w-]+)"\)', page.read_text(encoding="utf-8")):
        sample(name)
    names = {"__name__": page.stem}
    printed = None
    for kind, text in blocks(page):
        if kind == "python":
            with redirect_stdout(io.StringIO()) as output:
                exec(compile(text, name_of(page), "exec"), names)
            printed = output.getvalue()
        elif kind == "text" and printed is not None:
            assert same_output(text, printed), f"the page:\n{text}\nprinted:\n{printed}"
            printed = None


def test_pages_can_be_followed_in_one_folder():
    """Folders that Python examples write have a name of their own on each page, and may be written again."""
    writers: dict[str, set[str]] = {}
    for page in of_kind("python"):
        text = "\n".join(code for kind, code in blocks(page) if kind == "python")
        saved = re.findall(r'rarefy\.save\([^"\n]*"([\w-]+/)"(.*)', text)
        assert all("overwrite=True" in rest for _, rest in saved), name_of(page)
        for folder in {*(name for name, _ in saved), *re.findall(r'resume_dir="([\w-]+/)"', text)}:
            writers.setdefault(folder, set()).add(name_of(page))
        for _, code in (b for b in blocks(page) if b[0] == "sh"):
            assert not {name for name, _ in saved} & set(re.findall(r"--out (\S+)", code)), name_of(page)
    assert len(writers) >= 8 and all(len(pages) == 1 for pages in writers.values()), writers


@pytest.mark.parametrize("page", of_kind("yaml"), ids=name_of)
def test_recipes_parse(page):
    found = [text for kind, text in blocks(page) if kind == "yaml"]
    for text in found:
        whole = text if "stages:" in text else "stages:\n" + text
        assert parser.from_yaml(whole).stages


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's shell blocks as words, without comments, pipes and redirections."""
    lines = [line for kind, text in blocks(page) if kind == "sh" for line in text.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"\s(?:&&|\|)\s", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def options_of(run, command: str, cache: dict[str, set[str]]) -> set[str]:
    if command not in cache:
        result = run(command, "--help")
        assert result.code == 0, f"rarefy has no command {command}"
        cache[command] = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", result.out))
    return cache[command]


@pytest.mark.parametrize("page", of_kind("sh"), ids=name_of)
def test_shell_blocks_name_what_exists(page, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    cache: dict[str, set[str]] = {}
    for words in commands(page):
        if "rarefy" in words[:6] and words[0] in ("rarefy", "torchrun"):
            command, *rest = words[words.index("rarefy") + 1 :]
            given = {word.split("=")[0] for word in rest if word.startswith("-") and len(word) > 1}
            known = set() if command.startswith("-") else options_of(run, command, cache)
            assert command in ("--version", "--help") or given <= known, f"{' '.join(words)}: {given - known}"
        elif words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= set(targets), f"no such target: {' '.join(words)}"
        elif words[:2] == ["python", "-m"]:
            assert words[2] in ("venv", "pytest", "rarefy"), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), f"no such file: {words[1]}"
        elif words[0] == "pip":
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert all(re.search(rf"^{e} = \[", extras, re.MULTILINE) for e in extra.split(",")), words
        else:
            assert words[0] in ("git", "cd", "source", "ruff", "pyright", "OMP_NUM_THREADS=1", "cat", "echo"), words


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in LINK.findall(text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name_of(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(path), f"{name_of(page)} links to {target}#{anchor}: no such heading"


def test_every_page_is_linked():
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target, _ in LINK.findall(page.read_text(encoding="utf-8"))
        if target and not target.startswith("http")
    }
    assert not [name_of(p) for p in PAGES if p.name != "README.md" and p.resolve() not in linked]


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = re.findall(r"\S*\w\S*", text)  # no lines of tables
    assert len(text.splitlines()) <= 150 and len(words) <= 1600
    assert "make demo" in text and "make test" in text


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/troubleshooting.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_named_files_exist(page):
    """A path in backticks, such as `prune/scores.py` or `csrc/`, is one of the repository or of the package."""
    spans = re.findall(r"`([\w./]+/(?:[\w.]*))`", BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8")))
    paths = [s for s in spans if not s.startswith(("~", "out/"))]
    assert not [p for p in paths if not (ROOT / p).exists() and not (ROOT / "src" / "rarefy" / p).exists()]


def prose(page: Path) -> str:
    """Return a page without code, comments, tables, link targets and headings."""
    text = re.sub(r"<!--.*?-->", "", BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "!["))]
    return re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sentences_are_short(page):
    paragraphs = re.split(r"\n\s*\n|\n- |\n\d+\. ", prose(page))
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.:!?;])\s", p.replace("\n", " "))]
    assert not [s for s in sentences if len(s.split()) > 25]


def test_reference_lists_every_public_name():
    import rarefy

    names = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")))
    assert not set(rarefy.__all__) - names - {"__version__"}
