"""Results of a search on disk."""

import json
import os

import pytest

from rarefy.common.atomic_io import remove_resume_state
from rarefy.common.errors import ContainerError, shell_text
from rarefy.search.journal import Journal

SETTINGS = {"metric": "accuracy", "batches": (1, 16)}


def values_of(folder):
    """Return the results that the next process finds."""
    journal = Journal(folder, SETTINGS)
    journal.close()
    return journal.values


def test_results_are_computed_once(tmp_path):
    calls = []
    journal = Journal(tmp_path / "work", SETTINGS)
    for _ in range(2):
        assert journal.get("a", lambda: calls.append(1) or {"x": (1, 2)}) == {"x": [1, 2]}
    journal.close()
    again = Journal(tmp_path / "work", SETTINGS)
    assert again.get("a", lambda: calls.append(2)) == {"x": [1, 2]} and calls == [1]
    assert again.seconds == pytest.approx(journal.seconds)
    again.close()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_an_incomplete_last_line_is_cut_off(tmp_path, cut):
    journal = Journal(tmp_path, SETTINGS)
    journal.get("a", lambda: 1)
    journal.get("b", lambda: "x" * 40)
    journal.close()
    file = journal.file
    file.write_bytes(file.read_bytes()[:-cut])
    again = Journal(tmp_path, SETTINGS)
    assert again.values == {"a": 1}
    assert again.get("b", lambda: 3) == 3
    again.close()
    assert values_of(tmp_path) == {"a": 1, "b": 3}


def test_a_file_without_a_whole_line_is_begun_anew(tmp_path):
    (tmp_path / "search.jsonl").write_bytes(b'{"sett')
    assert values_of(tmp_path) == {}


def test_results_of_another_search_are_refused(tmp_path):
    Journal(tmp_path, SETTINGS).close()
    with pytest.raises(
        ContainerError, match=r"belongs to another search \(metric differ\): pass another resume_dir"
    ) as e:
        Journal(tmp_path, {**SETTINGS, "metric": "perplexity"})
    assert shell_text(str(e.value)).endswith("give another --out, or --fresh to start again")


@pytest.mark.parametrize("text", ["[]\n", "{}\nx\n", json.dumps({"settings": {}}) + "\n[1]\n", "\xff\n"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "search.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ContainerError, match="was not written by rarefy.optimize"):
        Journal(tmp_path, {})


def test_results_that_are_not_kept_are_computed_again_by_the_next_process(tmp_path):
    journal = Journal(tmp_path, SETTINGS)
    assert [journal.get("a", lambda: "failed", keep=lambda v: v != "failed") for _ in range(2)] == ["failed"] * 2
    journal.close()
    again = Journal(tmp_path, SETTINGS)
    assert again.values == {} and again.get("a", lambda: "good", keep=lambda v: v != "failed") == "good"
    again.close()
    assert values_of(tmp_path) == {"a": "good"}


def test_the_last_step_of_a_kind_says_what_the_next_one_takes():
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    journal = Journal(None, {}, clock=lambda: next(times))
    for key in ("loss of a x", "loss of b x", "time of b"):
        journal.get(key, lambda: 0)
    assert journal.seconds == 7.0
    assert journal.seconds_of("loss of a", "loss of") == 1.0 and journal.seconds_of("loss of c", "loss of") == 2.0
    assert journal.seconds_of("score") is None and journal.seconds_of("score", "time of") == 4.0


def test_two_searches_do_not_share_a_folder(tmp_path):
    first = Journal(tmp_path, SETTINGS)
    with pytest.raises(ContainerError, match="is in use by another run; wait for it, or give another name"):
        Journal(tmp_path, SETTINGS)
    first.close()
    assert values_of(tmp_path) == {}


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ContainerError, match="file is a file: give the name of a folder"):
        Journal(tmp_path / "file", SETTINGS)
    with pytest.raises(ContainerError, match="cannot write .*below: Not a directory"):
        Journal(tmp_path / "file" / "below", SETTINGS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
def test_on_a_full_disk_results_stay_in_memory(tmp_path):
    journal = Journal(tmp_path, SETTINGS)
    journal.close()
    journal.opened = open("/dev/full", "a")  # noqa: SIM115
    assert journal.get("a", lambda: 1) == 1 and journal.get("b", lambda: 2) == 2
    assert journal.values == {"a": 1, "b": 2}
    assert "search.jsonl cannot be written (No space left on device)" in journal.trouble
    journal.close()


def test_the_state_of_trainings_is_removed_with_that_of_the_search(tmp_path):
    work = tmp_path / ".out.work"
    stage = work / "stage-search" / "training-0123" / "stage-2"
    for folder, name in ((stage, "training.safetensors"), (stage, "key.json"), (stage.parent.parent, "search.jsonl")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    answers = stage.with_name("stage-2-answers")
    answers.mkdir()
    (answers / f"{'0' * 32}.safetensors").write_bytes(b"x")
    remove_resume_state(work)
    assert not work.exists()
