"""A short run of `make fuzz`: every reader of the table, always the same mutations."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.targets import TARGETS

TESTS = Path(__file__).parents[1]


def fuzz(place: Path, *options: str) -> tuple[int, dict, str]:
    """Run the command; return its exit status, its statistics and what it printed."""
    out = place / "fuzz.json"
    command = [sys.executable, "-m", "fuzz", "--out", str(out), *options]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    return done.returncode, json.loads(out.read_text()), done.stdout + done.stderr


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    return fuzz(tmp_path_factory.mktemp("fuzz"), "--count", "60")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_changed_files_are_read_or_refused(target, short_run):
    """Never a crash, a hang, more than 1 GB, an exception that is none of Rarefy's, or a change under a hash."""
    for name in target.needs:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    _, result, printed = short_run
    assert not [f for f in result["findings"] if f["target"] == target.name], printed
    count = result["targets"][target.name]
    assert count["total"] == 60, printed
    assert count["accepted"] > 0  # else the mutations are too wild to test anything beyond a parser


@pytest.mark.slow
def test_changed_files_for_five_minutes(tmp_path):
    status, result, printed = fuzz(tmp_path, "--minutes", "5", "--first-seed", "60")
    assert status == 0 and not result["findings"], printed
