"""Paths that a user names: what is no plain file, and what the system refuses, is an error of one line."""

import os
import socket

import pytest
import torch
from typer.testing import CliRunner

import rarefy
from rarefy.common.atomic_io import check_output_folder, write_new_file
from rarefy.common.errors import RarefyError
from rarefy.common.machine_errors import machine_problem
from rarefy.common.plain_file import open_plain, plain_file, read_text, usable_path


def pipe(folder, suffix):
    os.mkfifo(folder / f"x{suffix}")
    return folder / f"x{suffix}"


def device(folder, suffix):
    (folder / f"x{suffix}").symlink_to("/dev/zero")
    return folder / f"x{suffix}"


def loop(folder, suffix):
    (folder / f"x{suffix}").symlink_to(folder / f"x{suffix}")
    return folder / f"x{suffix}"


def below_a_file(folder, suffix):
    (folder / "file").write_text("x")
    return folder / "file" / f"x{suffix}"


def below_a_loop(folder, suffix):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop" / f"x{suffix}"


PATHS = {
    "pipe": pipe,
    "device": device,
    "loop": loop,
    "below a loop": below_a_loop,
    "below a file": below_a_file,
    "long": lambda folder, suffix: folder / ("x" * 300 + suffix),
    "longer": lambda folder, suffix: folder / ("x/" * 5000 + suffix),
    "NUL": lambda folder, suffix: f"{folder}/a\0b{suffix}",
    "folder": lambda folder, suffix: (folder / f"x{suffix}").mkdir() or folder / f"x{suffix}",
}


def batches(path):
    from rarefy.data.sources import Take
    from rarefy.data.sources import batches as read

    return read(str(path), Take())


def teacher(path):
    from rarefy.pipeline.train_stage import _teacher_folder

    return _teacher_folder(str(path), None)


def command_line(path):
    from rarefy.cli.shared import load_any, source

    return load_any(source(str(path)))


def weights(path):
    from rarefy.model.weight_files import read_weights

    return read_weights(path)


def page(path):
    from rarefy.cli.report import read_result

    return read_result(path)


def grammar(path):
    from pathlib import Path

    from rarefy.cli.generate_command import _file

    return _file("--grammar", Path(path))


def embedding(path):
    from rarefy.integrations.embedding_folder import resolve

    return resolve(path, None)


def recipe(path):
    from rarefy.recipe import parser

    return parser.load(path)


def gguf(path):
    from rarefy.checkpoint.gguf_load import from_gguf

    return from_gguf(path)


READERS = {
    "load": (rarefy.load, ""),
    "load of a .pt2 file": (rarefy.load, ".pt2"),
    "decoder_from_files": (rarefy.decoder_from_files, ""),
    "decoder_from_files of a GGUF file": (rarefy.decoder_from_files, ".gguf"),
    "from_gguf": (gguf, ".gguf"),
    "inspect": (rarefy.inspect, ""),
    "inspect of a file": (rarefy.inspect, ".safetensors"),
    "from_onnx": (rarefy.from_onnx, ".onnx"),
    "recipe": (recipe, ".yaml"),
    "migrate": (rarefy.migrate, ".yaml"),
    **{f"data{suffix}": (batches, suffix) for suffix in (".txt", ".jsonl", ".npz", ".safetensors", ".parquet")},
    "images": (batches, ""),
    "teacher": (teacher, ""),
    "command line": (command_line, ""),
    "command line, ONNX": (command_line, ".onnx"),
    "weights": (weights, ".pth"),
    "report": (page, ".json"),
    "grammar": (grammar, ".txt"),
    "embedding model": (embedding, ""),
}


CASES = [(r, p) for r in READERS for p in PATHS if (r, p) != ("embedding model", "folder")]  # which it returns


@pytest.mark.parametrize(("reader", "place"), CASES)
def test_readers_name_the_path(reader, place, tmp_path):
    read, suffix = READERS[reader]
    path = PATHS[place](tmp_path, suffix)
    with pytest.raises(RarefyError) as raised:
        read(path)
    text = str(raised.value)
    if place in ("pipe", "device", "loop", "long", "longer", "NUL"):
        expected = {"pipe": "named pipe", "device": "a device", "loop": "symbolic links", "NUL": "NUL byte"}
        assert expected.get(place, "name too long") in text
    assert str(tmp_path) in text
    assert "\n" not in text and "\0" not in text and len(text) < 1000


WRITERS = {
    "save": lambda path: rarefy.save(torch.nn.Linear(2, 2), path),
    "check_output_folder": check_output_folder,
    "write_new_file": lambda path: write_new_file(path, "x"),
    "export_onnx": lambda path: rarefy.export_onnx(torch.nn.Linear(2, 2), torch.zeros(1, 2), path),
}


@pytest.mark.parametrize("place", ["pipe", "loop", "long", "NUL", "below a loop", "below a file"])
@pytest.mark.parametrize("writer", WRITERS)
def test_writers_name_the_path(writer, place, tmp_path):
    path = PATHS[place](tmp_path, ".onnx")
    with pytest.raises(RarefyError) as raised:
        WRITERS[writer](path)
    assert "\n" not in str(raised.value) and "\0" not in str(raised.value)


def test_links_to_plain_files_are_read(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "text" and plain_file(tmp_path / "link") == tmp_path / "link"
    with pytest.raises(OSError, match="symbolic links"):
        open_plain(tmp_path / "link")


def test_open_plain_waits_for_nothing(tmp_path):
    with pytest.raises(OSError, match="named pipe, expected a plain file"):
        open_plain(pipe(tmp_path, ""))
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "s"))
    with pytest.raises(RarefyError, match="is a socket"):
        usable_path(tmp_path / "s")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_folder_without_the_right_to_read_it(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    for path in (tmp_path / "locked", tmp_path / "locked" / "model"):
        with pytest.raises(RarefyError, match="locked.* cannot be read: Permission denied"):
            rarefy.load(path)


def test_commands_print_one_line(tmp_path):
    from rarefy.cli.main import app

    for words in (["inspect", "x" * 300], ["compress", "x", "--recipe", "r" * 300, "--out", str(tmp_path / "o")]):
        result = CliRunner().invoke(app, words)
        assert isinstance(result.exception, RarefyError) and "name too long" in str(result.exception)
    assert machine_problem(OSError(36, "File name too long", "x")) == "x: File name too long: check the path"
