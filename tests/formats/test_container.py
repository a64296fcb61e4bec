"""Containers: whole or not at all on the way out, nothing believed on the way in."""

from __future__ import annotations

import gc
import hashlib
import json
import lzma
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.folders import SHARD, edit_compressed_index, edit_index, sample, seal
from helpers.folders import small_container as small
from rarefy.common import atomic_io
from rarefy.common.errors import ContainerError
from rarefy.formats import container, held_files
from rarefy.formats.container import INDEX, read, write
from rarefy.formats.sparse_encodings import FORMATS, Packed, encode


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def edit_parts(folder: Path, **parts: torch.Tensor) -> None:
    tensors = load_file(folder / SHARD)
    save_file({**tensors, **{name.replace("__", "."): t for name, t in parts.items()}}, folder / SHARD)
    seal(folder)


# what comes back


def test_every_format_comes_back_by_name_and_by_alias(tmp_path):
    index = small(tmp_path / "m", files={"config.json": b"{}"})
    saved = read(tmp_path / "m")
    assert saved.names == [*FORMATS, "scalar", "empty"] and saved.aliases == {"tied": "csr"}
    assert saved.meta == {"recipe": [1, None, "x"]}
    assert index == saved.index == json.loads((tmp_path / "m" / INDEX).read_text())
    for format in FORMATS:
        assert torch.equal(saved.tensor(format, expect_shape=(6, 8)), sample(format))
        assert saved.packed(format).format == format
        assert saved.packed(format).nbytes == encode(sample(format), format).nbytes
    assert torch.equal(saved.tensor("tied"), sample())
    assert saved.tensor("scalar") == 3.0 and saved.tensor("empty").shape == (0, 4)
    assert (tmp_path / "m" / "config.json").read_bytes() == b"{}"
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_nothing_to_store_is_a_container_too(tmp_path):
    write(tmp_path / "m", [])
    assert read(tmp_path / "m").names == []


def test_tensors_are_drawn_one_at_a_time_into_several_shards(tmp_path):
    """Every shard keeps under its limit, and a buffer that the caller uses again does no harm."""
    buffer, drawn = torch.zeros(256), []

    def stream():
        for i in range(10):
            drawn.append(len([*tmp_path.glob(".*partial*/*.safetensors")]))
            yield f"layer.{i}.weight", encode(buffer.fill_(i), "dense")

    index = write(tmp_path / "m", stream(), shard_bytes=3000)
    assert len(index["shards"]) == 5 and drawn == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    saved = read(tmp_path / "m")
    assert all(bool((saved.tensor(f"layer.{i}.weight") == i).all()) for i in range(10))


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    index = write(tmp_path / "m", [(str(i), encode(torch.ones(100), "dense")) for i in range(3)], shard_bytes=1)
    assert len(index["shards"]) == 3


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    x = torch.arange(8.0)
    write(tmp_path / "m", [("a", encode(x, "dense")), ("b", encode(x[:4], "dense")), ("c", encode(x, "dense"))])
    assert torch.equal(read(tmp_path / "m").tensor("b"), x[:4])


def test_files_are_as_readable_as_the_user_wants_them(tmp_path):
    small(tmp_path / "m")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "m" / SHARD).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folders_on_the_way_are_made_and_a_link_is_followed(tmp_path):
    small(tmp_path / "a" / "b" / "m")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "m")
    small(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "link").names


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two steps"])
def test_overwrite_puts_the_new_folder_in_place_of_the_old(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic_io, "_exchange", lambda a, b: False)
    small(tmp_path / "m", files={"old.txt": b"old"})
    write(tmp_path / "m", [("new", encode(torch.ones(2), "dense"))], overwrite=True)
    assert read(tmp_path / "m").names == ["new"] and sorted(tree(tmp_path)) == [f"m/{INDEX}", f"m/{SHARD}"]
    (tmp_path / "empty").mkdir()
    small(tmp_path / "empty", overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "m"]


# what stays as it was


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("mine"), OSError(2, "mine"), MemoryError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_half_way_leaves_everything_as_it_was(tmp_path, error, overwrite):
    if overwrite:
        small(tmp_path / "deep" / "m")
    before = tree(tmp_path)

    def stream():
        yield "a", encode(torch.ones(100), "dense")
        yield "b", encode(torch.ones(100), "dense")
        raise error

    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind):  # the caller's own error, not one of ours
        write(tmp_path / "deep" / "m", stream(), shard_bytes=100, overwrite=overwrite)
    assert tree(tmp_path) == before and (overwrite or not any(tmp_path.iterdir()))


def test_a_failure_between_the_two_steps_puts_the_old_folder_back(tmp_path, monkeypatch):
    small(tmp_path / "m")
    before, rename, calls = tree(tmp_path), os.rename, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError(5, "broken disk")
        rename(a, b)

    monkeypatch.setattr(atomic_io, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ContainerError, match=r"cannot write .*m: .*broken disk; nothing was written"):
        write(tmp_path / "m", [], overwrite=True)
    assert tree(tmp_path) == before and len(calls) == 3


def rarefy_folder(at: Path) -> None:
    small(at)


def user_folder(at: Path) -> None:
    at.mkdir()
    (at / "thesis.tex").write_text("years of work")


def project_folder(at: Path) -> None:
    small(at)
    (at / "src").mkdir()
    (at / "src" / "main.py").write_text("")


@pytest.mark.parametrize(
    "make, overwrite, message",
    [
        (
            rarefy_folder,
            False,
            "exists and is a Rarefy folder; pass overwrite=True .shell: pass --force., or another name",
        ),
        (
            Path.mkdir,
            False,
            "exists and is an empty folder; pass overwrite=True .shell: pass --force., or another name",
        ),
        (user_folder, True, "exists and is not only Rarefy's .it contains thesis.tex.; give another name"),
        (project_folder, True, "exists and is not only Rarefy's"),
        (Path.touch, True, "is a file; give the name of a folder"),
    ],
)
def test_what_is_in_the_way_stays_untouched(tmp_path, make, overwrite, message):
    make(tmp_path / "m")
    before = tree(tmp_path)
    with pytest.raises(ContainerError, match=message):
        small(tmp_path / "m", overwrite=overwrite)
    assert tree(tmp_path) == before


def test_a_file_as_parent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ContainerError, match=r"cannot write .*Not a directory.*; give another name"):
        small(tmp_path / "file" / "m")
    assert tree(tmp_path) == {"file": b""}


ONE = encode(torch.ones(1), "dense")


@pytest.mark.parametrize(
    "tensors, options, message",
    [
        ([("", ONE)], {}, "tensor name '' must be 1 to 1024 printable characters"),
        ([("a\nb", ONE)], {}, r"tensor name 'a\\nb' must be"),
        ([("\ud800", ONE)], {}, "must be 1 to 1024 printable characters"),
        ([("a" * 1025, ONE)], {}, r"tensor name 'a+\.\.\. must be"),
        ([(3, ONE)], {}, "tensor name 3 must be"),
        ([("a", ONE), ("a", ONE)], {}, "tensor 'a' was given twice"),
        ([("a", Packed("dense", (2,), torch.int8, ONE.parts, {}))], {}, "tensor 'a': dense: part 'values' is float32"),
        ([("a", ONE)], {"aliases": {"b": "c"}}, "alias 'b' -> 'c' must map a new name to a stored one"),
        ([("a", ONE)], {"aliases": {"b": "a", "c": "b"}}, "alias 'c' -> 'b' must map"),
        ([("a", ONE)], {"aliases": {"a": "a"}}, "alias 'a' -> 'a' must map"),
        ([], {"meta": {"loss": float("nan")}}, "meta must be strict JSON: .*store NaN and infinity as null"),
        ([], {"meta": {"path": Path("x")}}, "meta must be strict JSON: .*PosixPath"),
        ([], {"meta": {"x": "y" * container.INDEX_BYTES}}, "meta takes .* bytes of JSON, at most 67,108,864"),
        ([], {"files": {"../x": b""}}, r"file name '../x' must be letters, digits, . _ - and not one of Rarefy's own"),
        ([], {"files": {"/etc/x": b""}}, "file name '/etc/x' must be"),
        ([], {"files": {INDEX: b""}}, "file name 'rarefy.json' must be .* not one of Rarefy's own"),
        ([], {"files": {SHARD: b""}}, "file name 'weights-00001.safetensors' must be"),
        ([], {"files": {"x": "text"}}, "file 'x' is str, must be bytes"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, options, message):
    with pytest.raises(ContainerError, match=message):
        write(tmp_path / "m", tensors, **options)
    assert not any(tmp_path.iterdir())


FULL_DISK = """
import sys, pathlib, torch
from rarefy.common.errors import ContainerError
from rarefy.common import atomic_io
from rarefy.formats import container, held_files
from rarefy.formats.sparse_encodings import encode
root = pathlib.Path(sys.argv[1])
container.write(root / "old", [("a", encode(torch.ones(9), "dense"))])
big = encode(torch.rand(2**16), "dense")
def tensors(n):
    yield from ((str(i), big) for i in range(n))
class Roomy:
    free = 2**40
for n, blind in ((9, False), (9, True), (2, True)):  # seen beforehand; found by safetensors; found by a file beside
    if blind:
        container.shutil.disk_usage = lambda path: Roomy
    for name in ("old", "deep/new"):
        try:
            files = {"big.bin": bytes(700_000)} if n == 2 else {}
            container.write(root / name, tensors(n), files=files, overwrite=True, shard_bytes=2**18)
            sys.exit("it was written")
        except ContainerError as error:
            print(error)
    assert [f.name for f in root.iterdir()] == ["old"], list(root.iterdir())
    assert container.read(root / "old").names == ["a"]
"""


@pytest.mark.parametrize("how", [["unshare", "-Urm"], ["unshare", "-m"]], ids=["user namespace", "as root"])
def test_a_disk_that_is_really_full(tmp_path, how):
    mount = [*how, "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    env = {**os.environ, "PYTHONPATH": str(Path(container.__file__).parents[2])}
    ran = subprocess.run([*mount, sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("No space left on device: needed") == ran.stdout.count("nothing was written") == 6
    assert ran.stdout.count("no space for") == 6 and "needed 262,144 bytes, free " in ran.stdout


def test_a_file_size_limit_counts_as_no_space(tmp_path):
    code = (
        "import resource, sys, torch; from rarefy.formats import container, sparse_encodings\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "container.write(sys.argv[1] + '/m', [('a', sparse_encodings.encode(torch.ones(999), 'dense'))])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(container.__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-B", "-c", code, tmp_path], capture_output=True, text=True, env=env)
    assert "ContainerError: no space for" in ran.stderr and "File too large" in ran.stderr, ran.stderr
    assert not any(tmp_path.iterdir())


# what is not believed


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: None, r"is not a Rarefy folder: it does not exist \(did you mean 'model.old'\?\)"),
        (lambda f: f.mkdir(), "is not a Rarefy folder: it is empty"),
        (lambda f: f.touch(), "is not a Rarefy folder: it is a file"),
        (
            lambda f: (f.mkdir(), (f / "config.json").touch()),
            "it looks like a Hugging Face folder: `rarefy compress` takes it",
        ),
        (
            lambda f: (f.mkdir(), (f / "config.json").write_text('{"quant_method": "rarefy"}')),
            "its rarefy.json is missing, without which its weights cannot be read; copy the whole folder",
        ),
        (lambda f: (f.mkdir(), (f / "weights.bin").touch()), r"it holds weights.bin\.\.\."),
        (lambda f: (f.mkdir(), (f / INDEX).symlink_to("x")), "its rarefy.json is a link or no plain file; copy"),
        (lambda f: (f.mkdir(), os.mkfifo(f / INDEX)), "its rarefy.json is a link or no plain file"),
    ],
)
def test_what_is_there_instead_is_said(tmp_path, make, message):
    (tmp_path / "model.old").mkdir()
    make(tmp_path / "model")
    with pytest.raises(ContainerError, match=message):
        read(tmp_path / "model")


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ContainerError, match="it is a file, probably a pickle, which Rarefy never opens"):
        read(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"a": NaN}', "not JSON: NaN is not a number of JSON"),
        ('{"a": 1e999}', "not JSON: 1e999 is not a number of JSON"),
        ("9" * 9999, "not JSON"),
        ("[" * 200_000, "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[]", 'must be an object with "format": "rarefy"'),
        ('{"format": "rarefy", "schema": true}', 'a whole number "schema"'),
        ('{"format": "rarefy", "schema": 3}', "schema 3 is written by a newer Rarefy; this one reads schema 1 to 2"),
        ('{"format": "rarefy", "schema": 0}', "schema 0 is unknown"),
        ('{"format": "rarefy", "schema": 1}', r"is \['format', 'schema'\], must be an object with format, schema, sha"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, message):
    small(tmp_path / "m")
    (tmp_path / "m" / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ContainerError, match=message):
        read(tmp_path / "m")


def test_an_index_of_great_length_is_not_read(tmp_path):
    small(tmp_path / "m")
    os.truncate(tmp_path / "m" / INDEX, 2**40)  # sparse: takes no disk
    with pytest.raises(ContainerError, match="1,099,511,627,776 bytes, at most 67,108,864 are read"):
        read(tmp_path / "m")


def put(*way):
    """A change of the index: the value at the end of `way`, which is keys and the value."""

    def change(index):
        for key in way[:-2]:
            index = index[key]
        index[way[-2]] = way[-1]

    return change


CSR, KNOWN = ("tensors", "csr"), {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(
    "change, message",
    [
        (put("extra", 1), "must be an object with format, schema, sha256, shards, tensors, aliases, meta"),
        (put("shards", []), r"shards is \[\], must be dict"),
        (put("meta", 3), "meta is 3, must be dict"),
        (put("shards", "../evil", KNOWN), "shard '../evil' must be named like weights-00001.safetensors"),
        (put("shards", "/etc/passwd", KNOWN), "shard '/etc/passwd' must be named like"),
        (put("shards", "..\\weights-00001.safetensors", KNOWN), "must be named like"),
        (put("shards", SHARD + "\n", KNOWN), "must be named like"),
        (put("shards", SHARD, "bytes", "1"), "shard weights-00001.safetensors: bytes is '1', must be int"),
        (put("shards", SHARD, "bytes", True), "bytes is True, must be int"),
        (put("shards", SHARD, "bytes", 10**4000), r"bytes, expected 10+\.\.\.; was it truncated"),
        (put("shards", SHARD, {}), r"shard weights-00001.safetensors: is \[\], must be an object with sha256, bytes"),
        (put("shards", SHARD, "sha256", "0" * 64), "its sha256 is not the one in the index; the file was altered"),
        (put("shards", "weights-00002.safetensors", KNOWN), "weights-00002.safetensors: missing"),
        (put("tensors", "", {}), "tensor name '' must be 1 to 1024 printable characters"),
        (put("tensors", "a\0", {}), r"tensor name 'a\\x00' must be"),
        (put("tensors", "x", []), r"tensor 'x': is \[\], must be an object with format, shape, dtype, extra, parts"),
        (put(*CSR, "format", "cssr"), r"unknown format 'cssr'; .*did you mean 'csr'"),
        (put(*CSR, "format", ["csr"]), r"format is \['csr'\], must be str"),
        (put(*CSR, "dtype", "floot32"), r"unknown dtype 'floot32'; .*did you mean 'float32'"),
        (put(*CSR, "shape", [-6, 8]), r"tensor 'csr': shape \[-6, 8\] must be at most 16 sizes from 0 to 2\*\*48"),
        (put(*CSR, "shape", [2**49, 8]), "must be at most 16 sizes from 0"),
        (put(*CSR, "shape", [1] * 17), "must be at most 16 sizes from 0"),
        (put(*CSR, "shape", [6.0, 8]), r"shape \[6.0, 8\] must be"),
        (put(*CSR, "shape", [True, 8]), r"shape \[True, 8\] must be"),
        (put(*CSR, "extra", None), "extra is None, must be dict"),
        (put(*CSR, "parts", {}), r"tensor 'csr': parts \[\] are not those of csr"),
        (put(*CSR, "parts", "col", 1), "part col: is 1, must be an object with shard, key"),
        (put(*CSR, "parts", "col", "key", 1), "part col: key is 1, must be str"),
        (put(*CSR, "parts", "col", "shard", "../x"), "part col is in '../x', which is not a listed shard"),
        (
            put(*CSR, "parts", "col", "key", "nope"),
            "weights-00001.safetensors: holds no 'nope', part col of tensor 'csr'",
        ),
        (put("aliases", "tied", "nothing"), "alias 'tied' -> 'nothing' must map a new name to a stored one"),
        (put("aliases", {"a": "b", "b": "a"}), "alias 'a' -> 'b' must map"),
        (put("aliases", {"a": "b", "b": "csr"}), "alias 'a' -> 'b' must map"),
        (put("aliases", {"csr": "csc"}), "alias 'csr' -> 'csc' must map"),
        (put("aliases", {"a": ["csr"]}), r"alias 'a' -> \['csr'\] must map"),
        (put("aliases", {"": "csr"}), "tensor name '' must be"),
    ],
)
def test_an_index_that_lies(tmp_path, change, message):
    small(tmp_path / "m")
    edit_index(tmp_path / "m", change)
    with pytest.raises(ContainerError, match=message):
        read(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        put("meta", "recipe", [1, None, "y"]),
        put(*CSR, "extra", {"axis": 0}),
        put("aliases", "other", "csr"),
        put("sha256", "0" * 64),
    ],
)
def test_a_changed_number_that_fits_is_noticed(tmp_path, change):
    small(tmp_path / "m")
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    (tmp_path / "m" / INDEX).write_text(json.dumps(index, indent=3, sort_keys=True))
    assert read(tmp_path / "m").names  # the layout of the JSON does not matter
    change(index)
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    for verify in (True, False):
        with pytest.raises(ContainerError, match="its sha256 does not match its contents; the file was altered"):
            read(tmp_path / "m", verify=verify)


def test_an_index_of_schema_1_has_no_hash(tmp_path):
    small(tmp_path / "m")
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    del index["sha256"]
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ContainerError, match="must be an object with format, schema, sha256"):
        read(tmp_path / "m")
    (tmp_path / "m" / INDEX).write_text(json.dumps({**index, "schema": 1}))
    assert torch.equal(read(tmp_path / "m").tensor("tied"), sample())


def cut_short(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def flip_a_bit(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)


def link_out(shard: Path) -> None:
    shard.rename(shard.parent.parent / "elsewhere")
    shard.symlink_to("../elsewhere")


@pytest.mark.parametrize(
    "harm, message",
    [
        (Path.unlink, f"{SHARD}: missing"),
        (cut_short, "bytes, expected .*; was it truncated"),
        (flip_a_bit, "its sha256 is not the one in the index"),
        (link_out, f"{SHARD}: a link or no plain file"),
    ],
)
def test_a_shard_that_was_harmed(tmp_path, harm, message):
    small(tmp_path / "m")
    harm(tmp_path / "m" / SHARD)
    with pytest.raises(ContainerError, match=message):
        read(tmp_path / "m")


def test_without_verify_only_the_hash_is_skipped(tmp_path):
    small(tmp_path / "m")
    flip_a_bit(tmp_path / "m" / SHARD)
    assert read(tmp_path / "m", verify=False).names
    cut_short(tmp_path / "m" / SHARD)
    with pytest.raises(ContainerError, match="was it truncated"):
        read(tmp_path / "m", verify=False)


def header(entries: dict | bytes, body: bytes = bytes(64), length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


F32 = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        header({}, length=2**63),
        header({}, length=2**30),
        header(b"not json"),
        header(b"[" * 9999),
        header({"a": F32, "b": {**F32, "data_offsets": [16, 48]}}),  # overlapping
        header({"a": F32, "b": {**F32, "data_offsets": [40, 72]}}),  # a hole, and past the end
        header({"a": {**F32, "shape": [9]}}),
        header({"a": {**F32, "shape": [-8]}}),
        header({"a": {**F32, "shape": [2**62, 2**62]}}),
        header({"a": {**F32, "dtype": "F33"}}),
        header({"a": {**F32, "data_offsets": [32, 0]}}),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_a_malformed_safetensors_file(tmp_path, data):
    small(tmp_path / "m")
    (tmp_path / "m" / SHARD).write_bytes(data)
    seal(tmp_path / "m")
    with pytest.raises(ContainerError, match=f"{SHARD}: not a valid safetensors file: "):
        read(tmp_path / "m")


@pytest.mark.parametrize(
    "parts, name, message",
    [
        ({"csr__col": torch.full((20,), 8, dtype=torch.uint16)}, "csr", "'col' is uint16 .20., must be uint16"),
        (
            {"csr__crow": torch.tensor([0, 9, 2, 3, 4, 5, 6], dtype=torch.int32)},
            "csr",
            "'crow' must start at 0, end at",
        ),
        ({"csr__values": torch.zeros(2, 2)}, "csr", "part 'values' is float32 .2, 2., must be float32"),
        ({"dense__values": torch.zeros(3, 3)}, "dense", r"'values' is float32 \[3, 3\], must be float32 \[6, 8\]"),
        ({"dense__values": torch.zeros(6, 8, dtype=torch.int32)}, "dense", r"is int32 \[6, 8\], must be float32"),
        ({"bitmask__mask": torch.full((6,), 255, dtype=torch.uint8)}, "bitmask", r"must be float32 \[48\]"),
        ({"nm__index": torch.full((6,), 255, dtype=torch.uint8)}, "nm", "'index' does not fit the values"),
    ],
)
def test_parts_that_lie_under_a_right_hash(tmp_path, parts, name, message):
    small(tmp_path / "m")
    edit_parts(tmp_path / "m", **parts)
    saved = read(tmp_path / "m")
    for get in (saved.packed, saved.tensor):
        with pytest.raises(ContainerError, match=f"tensor {name!r}: {name}.*{message}"):
            get(name)


def test_an_index_out_of_range_under_a_right_hash(tmp_path):
    small(tmp_path / "m")
    col = load_file(tmp_path / "m" / SHARD)["csr.col"].to(torch.int32)
    col[-1] = 8
    edit_parts(tmp_path / "m", csr__col=col.to(torch.uint16))
    with pytest.raises(ContainerError, match="tensor 'csr': csr: part 'col' must stay within 0 and 7"):
        read(tmp_path / "m").tensor("csr")


def test_numbers_of_a_format_are_checked_with_the_tensor(tmp_path):
    small(tmp_path / "m")
    edit_index(tmp_path / "m", put("tensors", "nm", "extra", {"n": 2, "m": 1000, "axis": 1}))
    with pytest.raises(ContainerError, match="tensor 'nm': nm: m is 1000, must be a whole number from 1 to 64"):
        read(tmp_path / "m").packed("nm")


def test_a_small_file_does_not_become_a_huge_tensor(tmp_path):
    """An all-zero CSR is a few bytes of any width; only a caller who knows the shape gets it."""
    write(tmp_path / "m", [("zero", encode(torch.zeros(2, 2**19), "csr"))])
    saved = read(tmp_path / "m")
    for get in (saved.packed, saved.tensor):
        with pytest.raises(ContainerError, match=r"12 bytes would become 4,194,304; pass expect_shape=.2, 524288. if"):
            get("zero")
        get("zero", expect_shape=(2, 2**19))
    edit_index(tmp_path / "m", put("tensors", "zero", "shape", [2, 2**48]))
    with pytest.raises(ContainerError, match="would become"):
        read(tmp_path / "m").tensor("zero")
    with pytest.raises(ContainerError, match="is impossible"):
        read(tmp_path / "m").tensor("zero", expect_shape=(2, 2**48))


def test_a_shape_that_is_not_the_expected_one(tmp_path):
    small(tmp_path / "m")
    with pytest.raises(ContainerError, match=r"tensor 'tied' has shape \[6, 8\], expected \[8, 6\]"):
        read(tmp_path / "m").tensor("tied", expect_shape=(8, 6))


def test_a_name_that_is_not_there(tmp_path):
    small(tmp_path / "m")
    with pytest.raises(ContainerError, match="no tensor 'bitmsk'; did you mean 'bitmask'"):
        read(tmp_path / "m").packed("bitmsk")


def test_a_folder_that_is_removed_after_reading(tmp_path):
    small(tmp_path / "m")
    saved = read(tmp_path / "m")
    expected = read(tmp_path / "m").tensor("csr")
    shutil.rmtree(tmp_path / "m")
    assert torch.equal(saved.tensor("csr"), expected) and not saved.files.is_current()


def test_no_file_stays_open_after_its_container(tmp_path):
    small(tmp_path / "m")

    def is_open():
        return any(str(tmp_path) in os.path.realpath(f) for f in Path("/proc/self/fd").iterdir())

    saved = read(tmp_path / "m")
    kept = [saved.packed(name) for name in saved.names]
    assert is_open()
    del saved
    gc.collect()
    assert kept and not is_open()


def shards(folder, value):
    tensors = [(n, encode(torch.full((3, 3), value), "dense")) for n in "abc"]
    container.write(folder, tensors, overwrite=True, shard_bytes=1)


@pytest.mark.parametrize("held", [256, 1])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_folder_that_is_replaced_while_it_is_read(at, verify, held, tmp_path, monkeypatch):
    """The index of one save and the shards of another: a model that nobody saved."""
    shards(tmp_path / "m", 1.0)
    opened, calls = held_files.open_plain, []

    def replace(*args, **options):
        calls.append(1)
        if len(calls) == at:
            shards(tmp_path / "m", 2.0)
        return opened(*args, **options)

    monkeypatch.setattr(held_files, "open_plain", replace)
    monkeypatch.setattr(held_files, "MAX_HELD", held)  # others are opened again
    saved = read(tmp_path / "m", verify=verify)
    try:
        values = {saved.tensor(n)[0, 0].item() for n in saved.names}
    except ContainerError as error:  # removed with the old folder before it was opened again
        assert held == 1 and len(calls) >= at and "No such file" in str(error)
    else:
        assert len(values) == 1 and values <= {1.0, 2.0}


def test_a_folder_that_is_replaced_all_the_time(tmp_path, monkeypatch):
    shards(tmp_path / "m", 1.0)
    opened = held_files.open_plain

    def replace(name, **options):
        shards(tmp_path / "m", 2.0)
        return opened(name, **options)

    monkeypatch.setattr(held_files, "open_plain", replace)
    with pytest.raises(ContainerError, match="m was replaced 10 times while it was read: load it when that has ended"):
        read(tmp_path / "m")


def test_a_decompression_bomb_with_matching_index_is_refused(tmp_path):
    folder = tmp_path / "out"
    container.write(folder, [("w", encode(torch.eye(2), "dense"))], compress=True)
    shard, raw = folder / "weights-00001.safetensors.xz", 1 << 26
    shard.write_bytes(lzma.compress(bytes(raw)))

    def vouch_for_the_shard(index):
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        index["shards"][shard.name] = {"raw": raw, "bytes": shard.stat().st_size, "sha256": digest}
        index["tensors"]["w"]["shape"] = [1 << 40]

    edit_compressed_index(folder, vouch_for_the_shard)
    with pytest.raises(ContainerError, match="decompresses to 67108864 bytes, at most"):
        container.read(folder)


def test_a_shard_of_zeros_is_stored_uncompressed(tmp_path):
    container.write(tmp_path / "out", [("w", encode(torch.zeros(4 << 20), "dense"))], compress=True)
    assert (tmp_path / "out/weights-00001.safetensors").is_file()
    assert not container.read(tmp_path / "out").tensor("w", (4 << 20,)).any()
