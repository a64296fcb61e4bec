"""Records of benchmarks: their run, the reasons against them, and ratios, which join one run alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # behind tests/, which has a module zoo too

import provenance
import records
import search_tables
import tables


@pytest.fixture
def history():
    """Skip a test of this repository's records where git does not have their commits."""
    try:
        provenance.is_in_history("0" * 12)
    except provenance.NoHistoryError as error:
        pytest.skip(str(error))


@pytest.fixture
def quiet(monkeypatch):
    """Begin a new run in this process, on a machine without load."""
    monkeypatch.setenv(provenance.SHARED_RUN, "")
    monkeypatch.delenv(provenance.SHARED_RUN)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 0.5, 0.5))


MACHINE = {"cpu": "AMD EPYC", "extensions": ["avx2"], "threads": 2, "load": 1.0}


def row(file="8 bits", engine="rarefy", **changes) -> dict:
    values = {"engine": engine, "file": file, "decode": [1.0, 100.0, 2.0], "prefill": [1.0, 600.0, 2.0]}
    return {**values, "bytes": 1, "perplexity": 14.0, "commit": "a" * 12, "machine": MACHINE, **changes}


def new(run_id="1", load=0.2, **changes) -> dict:
    return row(run_id=run_id, started="2026-12-03T00:00:00+00:00", changed=[], load=load, **changes)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Return a function that writes records as results/language.jsonl, of code that nobody has changed."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(provenance, "is_in_history", lambda commit: not commit.startswith("f"))
    monkeypatch.setattr(provenance, "changed_since", lambda commit, paths: "csrc/a.cpp" * commit.startswith("0"))

    def write(*rows):
        (tmp_path / "language.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    return write


# Runs


def test_a_run_is_read_once_and_shared_with_child_processes(quiet, monkeypatch):
    run = provenance.begin()
    assert run["load"] == 0.25 and len(run["run_id"]) == 8 and run["started"].endswith("+00:00")
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    code = "import provenance; print(provenance.begin()['run_id'])"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, check=True)
    assert provenance.begin() == run and child.stdout.strip() == run["run_id"]


def test_another_process_has_another_run(quiet, monkeypatch):
    first = provenance.begin()
    monkeypatch.delenv(provenance.SHARED_RUN)
    assert provenance.begin()["run_id"] != first["run_id"]


def test_a_run_waits_for_the_load_to_fall(quiet, monkeypatch, capsys):
    loads = iter([3.0, 2.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(provenance.time, "sleep", lambda seconds: None)
    assert provenance.begin(wait=True)["load"] == 1.0
    assert capsys.readouterr().out.count("waiting until it is at most 1.5") == 2


def test_a_run_that_does_not_wait_says_what_pages_do_with_it(quiet, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert provenance.begin()["load"] == 3.0
    assert "the load is 3.00, above 1.5: pages will not show the times of this run" in capsys.readouterr().out


def test_kept_records_have_the_run_and_the_commit_of_its_start(quiet, tmp_path):
    import recording

    recording.keep(tmp_path / "new.jsonl", [lambda: iter([{"a": 1}, {"a": 2}])])
    first, second = recording.kept(tmp_path / "new.jsonl")
    assert first["run_id"] == second["run_id"] and first["load"] == 0.25 and first["changed"] == second["changed"]
    assert first["machine"]["cpu"] and (first["a"], second["a"]) == (1, 2)


def test_results_and_pages_make_no_commit_dirty(tmp_path):
    def git(*words):
        words = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(words, check=True, capture_output=True)

    for name in ("bench/results/a.jsonl", "docs/a.md", "README.md", "src/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    for name in ("bench/results/a.jsonl", "docs/a.md", "README.md"):
        (tmp_path / name).write_text("2")
    assert provenance.changed_files(tmp_path) == []
    (tmp_path / "src/a.py").write_text("2")
    (tmp_path / "bench/b.py").write_text("2")
    assert provenance.changed_files(tmp_path) == ["bench/b.py", "src/a.py"]


def test_records_without_a_run():
    """Consecutive ones of one commit and machine are a run, until a case comes again."""
    older = {**MACHINE, "load": 1.4}
    other = {**MACHINE, "threads": 1}
    rows = [
        row("8 bits"),
        row("Q8_0", engine="llama.cpp", commit="a" * 12 + "-dirty", machine=older),
        row("8 bits"),  # again
        row("4 bits", machine=other),
        row("8 bits", commit="b" * 12),
        new("77"),
        row("4 bits", commit="b" * 12),
    ]
    keyed = provenance.with_runs("language", rows)
    numbers = [r["run_key"].rpartition(" ")[2] for r in keyed]
    assert numbers == ["1", "1", "2", "3", "4", "77", "5"]
    assert [r["run_load"] for r in keyed[:3]] == [1.4, 1.4, 1.0]  # the highest of a run


def test_a_ratio_joins_records_of_one_run():
    one, two, three = provenance.with_runs("language", [new("1"), new("1", file="Q8_0"), new("2")])
    assert provenance.ratio({**one, "decode": [0, 150.0, 0]}, two, lambda r: r["decode"][1]) == 1.5
    with pytest.raises(provenance.DifferentRunsError, match=r"run 1, .*8 bits.* and .*run 2, .*measure both in one"):
        provenance.ratio(one, three, lambda r: r["decode"][1])


def test_the_claim_about_zeros_without_avx512(history):
    """Two runs were joined: in the run of the 50 % zeros, prompts are slower than without."""
    rows = [r for r in records.every("language") if r["label"] == "AMD EPYC, AVX2" and r["engine"] == "rarefy"]
    (zeros, *_), dense = [r for r in rows if r["prefill"][1] // 1 == 765], [r for r in rows if r["file"] == "8 bits"]
    (own,) = [r for r in dense if r["run_key"] == zeros["run_key"]]
    assert provenance.ratio(zeros, own, lambda r: r["prefill"][1]) < 1
    with pytest.raises(provenance.DifferentRunsError, match=r"language.jsonl:\d+ .* and language.jsonl:\d+ "):
        provenance.ratio(zeros, dense[-1], lambda r: r["prefill"][1])


def test_tables_refuse_records_of_two_runs(results, monkeypatch):
    import speed_tables

    results(new("1"), new("2", file="Q8_0", engine="llama.cpp"))
    monkeypatch.setattr(speed_tables, "newest_run", lambda rows: rows)
    with pytest.raises(provenance.DifferentRunsError):
        tables.block("language")


def test_a_table_of_tokens_per_second_has_one_run(results):
    results(new("1"), new("1", file="4 bits"), new("2"), new("2", file="Q8_0", engine="llama.cpp"))
    assert "8 bits" in tables.block("language") and "4 bits" not in tables.block("language")


# Reasons


@pytest.mark.parametrize(
    "record, reasons",
    [
        (new(), set()),
        (new(load=1.5), set()),
        (new(load=1.6), {"load"}),
        (row(machine={**MACHINE, "load": 1.6}), {"load"}),
        (new(commit="f" * 12), {"commit"}),
        (new(commit=""), {"commit"}),
        (new() | {"changed": ["src/a.py"]}, {"dirty"}),
        (new(commit="0" * 12), {"older"}),
        (row(commit="0" * 12 + "-dirty", machine={**MACHINE, "load": 2.0}), {"load", "older"}),
    ],
)
def test_reasons_against_a_record(results, record, reasons):
    results(record)
    assert records.every("language")[0]["marks"].keys() == reasons
    assert len(records.read("language")) == (not reasons)
    with records.showing("older"):
        assert len(records.read("language")) == (reasons <= {"older"})


def test_the_load_does_not_matter_where_nothing_is_timed(results):
    rows = provenance.with_runs("oneshot", [{**new(load=9.0), "model": "m", "seconds": 3.0}])
    assert not provenance.problems("oneshot", rows[0]) and records.seconds_of(rows[0]) == ""


def test_one_disturbed_record_refuses_its_run(results):
    results(row("8 bits"), row("4 bits", machine={**MACHINE, "load": 1.7}), row("8 bits", commit="b" * 12))
    assert [r["commit"][0] for r in records.read("language")] == ["b"]


def test_older_code_does_not_come_back(results):
    """A record of older code stays out if a later one of its case does not stand; one of this code stays."""
    results(new("1", commit="0" * 12), new("2", file="4 bits"), new("3", load=3.0), new("3", file="4 bits", load=3.0))
    with records.showing("older"):
        assert [r["file"] for r in records.read("language")] == ["4 bits"]


def test_readme_is_strict_and_docs_mark_older_code(results):
    results(new(commit="0" * 12))
    page = "<!-- table: language -->\nold\n<!-- end table -->\n"
    assert tables.render(page) == page.replace("old", records.not_measured(provenance.BENCHMARKS["language"]))
    marked = tables.render(page, *tables.IN_DOCS)
    assert "Measured at 00000000, before later changes of this code." in marked and "| 100 |" in marked
    assert tables.render(marked, *tables.IN_DOCS) == marked
    results(new(commit="0" * 12), new(commit="a" * 12, file="4 bits"))
    assert "Measured at 00000000, aaaaaaaa, before later changes of this code (00000000)." in tables.render(
        page, *tables.IN_DOCS
    )


def test_a_record_of_an_unknown_benchmark():
    with pytest.raises(KeyError, match="optimize.jsonl has a record of run 'new'; add optimize/new to BENCHMARKS"):
        provenance.benchmark_of("optimize", {"run": "new"})


def test_every_record_has_a_benchmark_whose_files_exist():
    for file in sorted((ROOT / "bench" / "results").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            provenance.benchmark_of(file.stem, json.loads(line))
    paths = {path for benchmark in provenance.BENCHMARKS.values() for path in benchmark.paths}
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize(
    "path, before, after, same",
    [
        ("a.py", 'def f():\n    """One."""\n    return 1\n', "def f():\n\n    return (1)  # two\n", True),
        ("a.py", "x = 1\n", "x = 2\n", False),
        ("a.py", 'x = "a # b"\n', 'x = "a # c"\n', False),
        ("a.py", "no python (\n", "no python )\n", False),
        ("a.cpp", "int a; // one\n/* two\n */ int b;", "int a;\nint b;\n", True),
        ("a.cpp", 'f("// one");', 'f("// two");', False),
        ("a.h", "a  +  b", "a - b", False),
        ("a.txt", "add(a)  # one\n", "# two\nadd(a)\n", False),
        ("a.txt", "add(a)\n", "# two\n\nadd(a)\n", True),
    ],
)
def test_comments_are_no_change_of_code(path, before, after, same):
    assert (provenance.code(path, before) == provenance.code(path, after)) is same


def test_what_has_changed_since_a_commit(monkeypatch):
    before = {"csrc/a.cpp": "1", "csrc/b.h": "2", "csrc/c.md": "3", "src/d.py": "4"}
    now = {**before, "csrc/a.cpp": "5", "csrc/c.md": "6", "src/d.py": "7"}
    texts = {"1": "int a; // one", "5": "int a; // two", "4": "x = 1", "7": "x = 2"}
    monkeypatch.setattr(provenance, "_blobs_of", lambda commit: before)
    monkeypatch.setattr(provenance, "_blobs_now", lambda: now)
    monkeypatch.setattr(provenance, "_code_of_blob", lambda path, blob: provenance.code(path, texts[blob]))
    monkeypatch.setattr(provenance, "_code_now", lambda path: provenance.code(path, texts[now[path]]))
    changed = provenance.changed_since.__wrapped__
    assert changed("", ("csrc",)) == "" and changed("", ("csrc", "src")) == "src/d.py" and changed("", ("sr",)) == ""
    now["csrc/e.h"] = "8"
    assert changed("", ("csrc",)) == "csrc/e.h"  # a new file
    del now["csrc/e.h"], now["csrc/b.h"]
    assert changed("", ("csrc",)) == "csrc/b.h"  # one that is gone


def test_what_has_changed_in_this_repository(history):
    first = provenance._git("rev-list", "--max-parents=0", "HEAD").split()[0]
    assert provenance.changed_since(first, provenance.ENGINE)
    if not provenance.changed_files():
        assert provenance.changed_since("HEAD", provenance.MEASURED) == ""


def test_a_folder_without_history(tmp_path):
    with pytest.raises(provenance.NoHistoryError, match="provenance needs a full clone"):
        provenance._git("rev-list", "HEAD", folder=tmp_path)
    assert provenance._git_or_none("rev-list", "HEAD", folder=tmp_path) == ""


# Pages


def test_tables_are_up_to_date(history):
    script = [sys.executable, str(ROOT / "bench" / "tables.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_stale_table_is_noticed(history):
    text = "<!-- table: train-fashion -->\nold\n<!-- end table -->\n"
    assert "No record stands" in tables.render(text) or "| --- |" in tables.render(text)
    new = tables.render(text, *provenance.REASONS)
    assert new != text and "| --- |" in new and "Measured at " in new
    assert tables.render(new, *provenance.REASONS) == new


def test_tables_of_all_records(history, capsys):
    tables.show(*tables.TABLES)
    printed = capsys.readouterr().out
    assert "llama.cpp is faster: " in printed and "The search adds nothing." in printed
    assert "Where we lose: " in printed and "at a load of up to" in printed


def test_the_list_of_stale_records(history, capsys):
    tables.print_stale()
    printed = capsys.readouterr().out
    minutes = provenance.BENCHMARKS["language"].minutes
    assert (
        f"python bench/language.py\n    {minutes} minutes, for README.md" in printed
        and "language.jsonl lines 1-" in printed
    )
    assert printed.index("for README.md") < printed.index("bench/conformance.py")
    assert tables.ranges([1, 2, 3, 7]) == "1-3, 7"


# The search's own share


def searched(own: float, even: float, quality: tuple[float, float], metric="perplexity") -> dict:
    compared = {
        "uniform": {"quality": quality[1], "milliseconds": {"decode": {"median": even}}},
        "found": {"quality": quality[0], "milliseconds": {"decode": {"median": own}}},
    }
    return {"seed": 1, "best": "int8, 98 % in 5 bits", "metric": {"name": metric}, "compared": compared}


@pytest.mark.parametrize(
    "row, end",
    [
        (
            searched(4.4, 4.5, (16.94, 16.94)),
            "1.02x (decode) as fast, perplexity 16.94, even spread 16.94. {} nothing.",
        ),
        (
            searched(5.7, 5.4, (16.93, 16.93)),
            "0.95x (decode) as fast, perplexity 16.93, even spread 16.93. {} nothing.",
        ),
        (searched(4.0, 5.0, (16.9, 16.9)), "{} speed."),
        (searched(5.0, 5.0, (16.0, 16.9)), "{} quality."),
        (searched(4.0, 5.0, (90.0, 88.0), "accuracy"), "{} speed and quality."),
        (searched(4.0, 5.0, (88.0, 90.0), "accuracy"), "The quality is worse: the search adds nothing."),
        (searched(5.0, 5.0, (62.8, 61.6), "retrieval R@1"), "{} nothing."),
    ],
)
def test_the_share_of_a_search(row, end):
    assert search_tables._share_of(row).endswith(end.format("The search adds"))


def test_training_is_no_share_of_the_search():
    row = searched(2.0, 5.0, (61.0, 62.0), "accuracy")
    row["compared"]["found, before training"] = {"quality": 62.0, "milliseconds": {"decode": {"median": 5.0}}}
    assert search_tables.share(row, "decode") == 1.0 and "adds nothing" in search_tables._share_of(row)
