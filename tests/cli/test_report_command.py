"""`rarefy report`: folders and files, text, JSON and pages, and mistakes."""

import json
import sys
from pathlib import Path

import pytest

import frontier_samples as samples
import rarefy
from conftest import Net, image_batches
from rarefy.search.frontier import frontier_from_dict
from rarefy.search.html_report import frontier_page

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench" / "results" / "frontier.jsonl"
OLD = ROOT / "tests" / "fixtures" / "saved_by_0_1" / "receipt-llama"


@pytest.fixture
def optimized(tmp_path):
    folder = tmp_path / "fast"
    folder.mkdir()
    (folder / "frontier.json").write_text(samples.realistic().to_json(), encoding="utf-8")
    (folder / "receipt.json").write_text('{"name": "also here"}', encoding="utf-8")
    return folder


def test_a_folder_of_a_search(optimized, run):
    ran = run("report", optimized)
    assert ran.code == 0, ran.err
    assert ran.out.strip() == str(samples.realistic()).strip() and samples.realistic().verdict in ran.out
    ran = run("report", optimized, "--json")
    assert frontier_from_dict(json.loads(ran.out)).to_dict() == samples.realistic().to_dict()
    assert run("report", optimized / "receipt.json").out.startswith("Receipt: also here")


def test_a_folder_of_compress(tmp_path, run):
    net = Net()
    receipt = rarefy.compress_(net, {"stages": [{"prune": {"sparsity": 0.5}}]}, image_batches())
    rarefy.save(net, tmp_path / "out", receipt=receipt)
    ran = run("report", tmp_path / "out")
    assert ran.code == 0 and ran.out.strip() == str(receipt).strip()
    file = tmp_path / "page.html"
    ran = run("report", tmp_path / "out", "--html", file, "--json")
    assert json.loads(ran.out) == receipt.to_dict() and f"written to {file}" in ran.err
    assert file.read_text(encoding="utf-8").count("<tr") > len(receipt.sparsity["layers"])


def test_a_folder_of_an_earlier_version(run):
    ran = run("report", OLD)
    assert ran.code == 0 and ran.out.startswith("Receipt: recipe") and "perplexity" in ran.out


def test_a_benchmark(tmp_path, run):
    ran = run("report", BENCH)
    assert ran.code == 0 and "minilm, Intel" in ran.out and "openvino int8" in ran.out
    assert [r["run"] for r in json.loads(run("report", BENCH, "--json").out)][:1] == ["minilm"]
    assert run("report", BENCH, "--html", tmp_path / "b.html").code == 0
    assert (tmp_path / "b.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_page_is_written_whole_and_replaced_by_force_alone(optimized, tmp_path, run):
    file = tmp_path / "report.html"
    ran = run("report", optimized, "--html", file)
    assert ran.code == 0 and ran.out == "" and f"written to {file}" in ran.err
    assert file.read_text(encoding="utf-8") == frontier_page(samples.realistic())
    file.write_text("mine")
    ran = run("report", optimized, "--html", file)
    assert ran.code == 2 and "exists: pass --force, or give another name" in ran.err and file.read_text() == "mine"
    assert run("report", optimized, "--html", file, "--force").code == 0 and len(file.read_text()) > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast", "report.html"]


def test_the_browser_is_opened_on_request(optimized, tmp_path, run, monkeypatch):
    opened, file = tmp_path / "opened", tmp_path / "report.html"
    browser = tmp_path / "browser"
    browser.write_text(f"#!{sys.executable}\nimport sys\nopen({str(opened)!r}, 'w').write(sys.argv[1])\n")
    browser.chmod(0o755)
    monkeypatch.setattr("webbrowser._tryorder", None)  # found again, from BROWSER
    monkeypatch.setattr("webbrowser._browsers", {})
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    assert run("report", optimized, "--html", file).code == 0 and not opened.exists()
    assert run("report", optimized, "--html", file, "--force", "--open").code == 0
    assert opened.read_text() == file.resolve().as_uri()


def test_text_of_a_file_cannot_steer_a_terminal(optimized, run):
    frontier = samples.realistic().to_dict()
    frontier["verdict"] = "\x1b[2J\x1b]0;title\x07done"
    (optimized / "frontier.json").write_text(json.dumps(frontier))
    ran = run("report", optimized)
    assert ran.code == 0 and "\x1b" not in ran.out and "\x07" not in ran.out and "done" in ran.out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("frontier.json", "{", "frontier.json: not JSON: "),
        ("frontier.json", "[" * 100_000, "frontier.json: not JSON: "),
        ("frontier.json", '{"points": [], "schema": 7}', "schema 7 is of a newer Rarefy, this one reads up to 1"),
        ("frontier.json", '{"points": [], "schema": 1}', "frontier: metric is missing: not written by rarefy.optimize"),
        ("receipt.json", '{"name": "r", "other": NaN}', "NaN is not a number of JSON"),
        ("receipt.json", '{"other": 1}', "receipt: unknown field 'other': not a receipt, or of a newer Rarefy"),
        ("bench.jsonl", '{"run": 1}', "bench: line 1 has no quality"),
        ("receipt.json", b"\xff\xfe", "cannot be read as text"),
    ],
)
def test_files_that_are_no_report(name, text, message, tmp_path, run):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    ran = run("report", file)
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1 and ran.out == ""


def test_mistakes(optimized, tmp_path, run):
    ran = run("report", tmp_path / "none")
    assert ran.code == 2 and "no file or folder" in ran.err
    (tmp_path / "empty").mkdir()
    ran = run("report", tmp_path / "empty")
    assert ran.code == 2 and "has neither frontier.json nor receipt.json: expected a folder written by" in ran.err
    for option in ("--open", "--force"):
        ran = run("report", optimized, option)
        assert ran.code == 2 and f"{option} has no effect without --html FILE" in ran.err
    ran = run("report", optimized, "--html", tmp_path)
    assert ran.code == 2 and "is a folder: give the name of a file" in ran.err
    ran = run("report", optimized, "--html", tmp_path / "no" / "page.html")
    assert ran.code == 2 and "cannot write" in ran.err


def test_a_file_that_is_too_large(tmp_path, run):
    file = tmp_path / "receipt.json"
    with file.open("wb") as handle:
        handle.truncate((1 << 26) + 1)
    ran = run("report", file)
    assert ran.code == 2 and "larger than a report can be (64 MiB)" in ran.err
