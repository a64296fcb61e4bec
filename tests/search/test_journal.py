"""Results of a search on disk."""

import json

import pytest

from rarefy.common.errors import ContainerError
from rarefy.search.journal import Journal

SETTINGS = {"metric": "accuracy", "batches": (1, 16)}


def test_results_are_computed_once(tmp_path):
    calls = []
    journal = Journal(tmp_path / "work", SETTINGS)
    for _ in range(2):
        assert journal.get("a", lambda: calls.append(1) or {"x": (1, 2)}) == {"x": [1, 2]}
    again = Journal(tmp_path / "work", SETTINGS)
    assert again.get("a", lambda: calls.append(2)) == {"x": [1, 2]} and calls == [1]
    assert again.seconds == pytest.approx(journal.seconds)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_an_incomplete_last_line_is_cut_off(tmp_path, cut):
    journal = Journal(tmp_path, SETTINGS)
    journal.get("a", lambda: 1)
    journal.get("b", lambda: "x" * 40)
    file = journal.file
    file.write_bytes(file.read_bytes()[:-cut])
    again = Journal(tmp_path, SETTINGS)
    assert again.values == {"a": 1}
    assert again.get("b", lambda: 3) == 3
    assert Journal(tmp_path, SETTINGS).values == {"a": 1, "b": 3}


def test_a_file_without_a_whole_line_is_begun_anew(tmp_path):
    (tmp_path / "search.jsonl").write_bytes(b'{"sett')
    assert Journal(tmp_path, SETTINGS).values == {}


def test_results_of_another_search_are_refused(tmp_path):
    Journal(tmp_path, SETTINGS)
    with pytest.raises(ContainerError, match=r"belongs to another search \(metric differ\): give another folder"):
        Journal(tmp_path, {**SETTINGS, "metric": "perplexity"})


@pytest.mark.parametrize("text", ["[]\n", "{}\nx\n", json.dumps({"settings": {}}) + "\n[1]\n", "\xff\n"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "search.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ContainerError, match="was not written by rarefy.optimize"):
        Journal(tmp_path, {})
