"""Every Python block of the migration pages runs, those of a page one after another."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs" / "migrate").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_blocks_run(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page.name, "exec"), {"__name__": page.stem})


def test_pages_are_linked():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert PAGES and all(f"docs/migrate/{p.name}" in text for p in PAGES)
