"""A short run of `make kill`: commands that are killed, and that run on machines which lack something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interruption import commands

TESTS = Path(__file__).parents[1]
JOBS = ("compress", "optimize", "fit_", "save", "save compressed", "compile decoder", "compile encoder", "push")
CONDITIONS = ("full disk", "read-only folder", "ulimit -v", "clock set back")


def interrupt(place: Path, *options: str) -> tuple[int, dict, str]:
    """Run the command; return its exit status, its figures and what it printed."""
    out = place / "kills.json"
    command = [sys.executable, "-m", "interruption", "--out", str(out), *options]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    printed = done.stdout + done.stderr
    assert out.exists(), printed
    return done.returncode, json.loads(out.read_text()), printed


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    place = tmp_path_factory.mktemp("kills")
    return interrupt(place, "--kills", "9", "--machines", "--job", "fit_", "--job", "save", "--job", "push")


def test_a_killed_run_leaves_the_old_output_or_the_new_one_and_the_next_run_ends_in_the_same_bits(short_run):
    status, figures, printed = short_run
    assert status == 0 and not figures["findings"], printed
    assert {name: row["kills"] >= 3 for name, row in figures["jobs"].items()} == dict.fromkeys(
        ("fit_", "save", "push"), True
    )
    phases = {phase for row in figures["jobs"].values() for phase in row["phases"]}
    assert len(phases) >= 3, printed  # else all kills are at the same place


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_machine_that_lacks_something_loses_nothing(short_run, condition):
    status, figures, printed = short_run
    if condition in figures["machines"]["skipped"]:
        pytest.skip(figures["machines"]["skipped"][condition])
    rows = [row for row in figures["machines"]["rows"] if row["condition"] == condition]
    assert status == 0 and len(rows) == 3, printed
    assert all(row["refused"] + row["done"] >= 1 for row in rows)
    if condition in ("full disk", "read-only folder"):
        assert all(row["refused"] for row in rows), printed  # else the disk was not full
    if condition == "clock set back":
        assert all(row["done"] for row in rows), printed


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_all_commands_are_killed(job, tmp_path):
    status, figures, printed = interrupt(tmp_path, "--kills", "5", "--first-seed", "1000", "--job", job)
    assert status == 0 and not figures["findings"], printed
    assert [row["kills"] for row in figures["jobs"].values()] == [5]


def test_every_job_is_killed():
    assert tuple(job.name for job in commands.JOBS) == JOBS


@pytest.mark.slow
@pytest.mark.parametrize("job", ["compress", "compile", "optimize", "save compressed"])
def test_other_commands_on_machines_that_lack_something(job, tmp_path):
    status, figures, printed = interrupt(tmp_path, "--kills", "0", "--machines", "--job", job)
    assert status == 0 and not figures["findings"], printed
    assert {row["condition"] for row in figures["machines"]["rows"]} >= {"ulimit -v", "clock set back"}
