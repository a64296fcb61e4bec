"""Messages name extras that pyproject.toml has, and install them by one command."""

import re
from pathlib import Path

import pytest

from rarefy.cli import doctor
from rarefy.common.extras import EXTRAS, install

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
ROOT = Path(__file__).parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_extras_exist():
    assert set(EXTRAS) <= set(DECLARED) and set(doctor.EXTRAS.values()) <= set(EXTRAS)
    for package, extra in doctor.EXTRAS.items():
        names = {re.split("[<>=]", d)[0].replace("_", "-") for d in DECLARED[extra]}
        assert package.replace("_", "-") in names, (package, extra)
    with pytest.raises(KeyError, match="visoin"):
        install("visoin")


def test_all_messages_use_the_one_command():
    sources = [p for p in (ROOT / "src").rglob("*.py") if p.name != "extras.py"]
    texts = {p: p.read_text() for p in sources}
    assert not [p for p, text in texts.items() if re.search(r"rarefy\[\w|\.\[[a-z]+\]['\"]", text)]
    calls = {name for text in texts.values() for name in re.findall(r"\binstall\(['\"]([\w-]+)['\"]\)", text)}
    assert calls and calls <= set(EXTRAS)


def test_the_guides_name_extras_that_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for names in re.findall(r"(?:rarefy|\.)\[([a-z,-]+)\]['\"`]", page.read_text()):
            assert set(names.split(",")) <= set(DECLARED), (page, names)
