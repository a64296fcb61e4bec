"""JSON files of others are read whole, as plain data, or refused with one line that names the file."""

import pytest

from rarefy.common.atomic_io import lock_file
from rarefy.common.errors import ContainerError
from rarefy.common.json_text import parse_json, read_json_file


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "b": [2, 3, 4, 5, 6]}', "30 bytes, at most 20 are read"),
        (b'{"a": "\xff"}', "not JSON: expected text in UTF-8"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (None, "cannot be read: "),
    ],
)
def test_what_is_no_small_json_is_refused(data, message, tmp_path):
    file = tmp_path / "modules.json"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ContainerError, match=message) as error:
        read_json_file(file, 20)
    assert str(file) in str(error.value)


def test_data_are_returned(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8")
    assert read_json_file(tmp_path / "a.json", 20) == {"a": "é"}


def test_locks_of_folders(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "key.json").symlink_to(tmp_path / "mine")
    with pytest.raises(ContainerError, match="key.json is a link: remove it"):
        lock_file(tmp_path / "key.json")
    with pytest.raises(ContainerError, match="cannot write .*absent/key.json: No such file"):
        lock_file(tmp_path / "absent" / "key.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with lock_file(tmp_path / "bytes.json") as lock, pytest.raises(ContainerError, match="not JSON"):
        parse_json(lock.read())
