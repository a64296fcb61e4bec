"""JSON files of others are read whole, as plain data, or refused with one line that names the file."""

import pytest

from rarefy.common.atomic_io import lock_file
from rarefy.common.errors import ContainerError
from rarefy.common.json_text import MAX_DEPTH, parse_json, read_json_file


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "b": [2, 3, 4, 5, 6]}', "30 bytes, at most 20 are read"),
        (b'{"a": "\xff"}', "not JSON: expected text in UTF-8"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b"[1e999]", "1e999 is not a number of JSON, or too large"),
        (b'{"a": 1, "a": 2}', "the key 'a' is written twice: remove one"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON: Unexpected UTF-8 BOM"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
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


def test_depth_is_bounded():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(ContainerError, match="not JSON: lists and objects are nested deeper than 100 levels"):
            parse_json('{"a":' * depth + "1" + "}" * depth)


def test_a_key_that_is_written_twice_is_found_in_linear_time():
    keys = ", ".join(f'"{i}": 0' for i in [*range(200_000), 199_999])
    with pytest.raises(ContainerError, match="the key '199999' is written twice"):
        parse_json("{" + keys + "}")


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
