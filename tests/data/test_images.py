"""Images of folders and of the library datasets: the same pictures, classes and order, and what is wrong with them."""

import io
import struct
import zlib

import pytest
import torch

from rarefy.common.errors import DataError
from rarefy.data import images
from rarefy.data.images import ImageBatches, dataset_batches, transform_of
from rarefy.data.sources import Take, batches
from rarefy.evaluation.metrics import accuracies
from rarefy.model.image_config import ImageConfig

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

SMALL = ImageConfig(size=6, resize=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CLASSES = ["cat", "dog", "emu"]


def pictures() -> list:
    return [Image.new("RGB", (12, 9), (20 * i, 50, 0)) for i in range(9)]


@pytest.fixture
def table():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict({"image": pictures(), "label": [i % 3 for i in range(9)]}, features=features)


def pairs(read) -> list[tuple[int, int]]:
    return [(round(255 * float(x[0, 0, 0]) / 20), int(y)) for xs, ys in read for x, y in zip(xs, ys)]


def test_a_saved_data_set_a_table_and_an_object_are_read_alike(table, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "images.parquet")
    take = Take(samples=7, batch=4, images=SMALL, seed=3)
    expected = pairs(dataset_batches(table, SMALL, samples=7, batch=4, seed=3))
    assert len(expected) == 7 and len(set(expected)) == 7 and all(y == x % 3 for x, y in expected)
    for name in ("saved", "images.parquet"):
        read = batches(name, take, base=tmp_path)
        assert pairs(read) == expected and [len(y) for _, y in read] == [4, 3]


def test_pictures_are_those_of_the_library(table):
    transform = transform_of(SMALL)
    [(x, _)] = dataset_batches(table, SMALL, batch=9, seed=0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(x, torch.stack([transform(table[i]["image"]) for i in order]))


def test_classes_by_name(table):
    model = ImageConfig(size=6, resize=6, num_classes=5, labels=tuple((n,) for n in ["ox", "dog", "emu", "cat", "fly"]))
    [(_, y)] = dataset_batches(table, model, batch=9)
    assert sorted(set(y.tolist())) == [1, 2, 3]


def test_more_than_fits_in_memory_is_read_when_needed(table, monkeypatch):
    whole = dataset_batches(table, SMALL, batch=4)
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    lazy = dataset_batches(table, SMALL, batch=4)
    assert isinstance(lazy, ImageBatches) and isinstance(whole, list) and len(lazy) == 3
    for _ in range(2):
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(lazy, whole))
    assert torch.equal(lazy[-1][0], whole[-1][0]) and len(lazy[1:]) == 2
    with pytest.raises(IndexError):
        lazy[3]


def test_what_is_wrong_with_a_data_set(table, tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    for name, said in (
        ("cut.parquet", "data: .*cut.parquet is not readable as a data set"),
        ("splits", "data: .*splits holds the splits test, train: give one of them, .*splits/test"),
        ("texts", "has no column of images; its columns are text"),
    ):
        with pytest.raises(DataError, match=said):
            batches(name, Take(images=SMALL), base=tmp_path)
    with pytest.raises(DataError, match="is too short: 9 samples, 10 are needed"):
        table.save_to_disk(tmp_path / "saved")
        batches("saved", Take(samples=10, images=SMALL), base=tmp_path)


def test_paths_in_a_data_set_are_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    pictures()[0].save(secret)
    rows = {"image": [{"bytes": None, "path": str(secret)}, {"bytes": None, "path": "https://127.0.0.1/x.png"}]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(DataError, match="image [01] is stored by its path: save the data set with its images in it"):
        dataset_batches(data, SMALL)


def test_a_damaged_picture_and_one_without_class():
    content = io.BytesIO()
    pictures()[0].save(content, "PNG")
    rows = {"image": [{"bytes": content.getvalue(), "path": None}, {"bytes": b"no picture", "path": None}]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(DataError, match="data: cannot read image 1: "):
        dataset_batches(data, SMALL)
    [(_, y)] = dataset_batches(data.select([0]), SMALL)
    assert y.tolist() == [-100]


def test_classes_that_are_no_class_of_the_model(table):
    """Data sets write -1 for an image without class; names in a plain column and numbers too large are refused."""
    model = ImageConfig(size=6, resize=6, num_classes=9)
    plain = table.cast_column("label", datasets.Value("int64"))

    def labelled(labels):
        return plain.remove_columns("label").add_column("label", labels)

    [(_, y)] = dataset_batches(labelled([-1] * 4 + [8] * 5), model, batch=9)
    assert sorted(set(y.tolist())) == [-100, 8]
    with pytest.raises(DataError, match="data: image [0-8] has the class 9, but the model's are 0 to 8"):
        dataset_batches(labelled([9] * 9), model)
    with pytest.raises(DataError, match="image [0-8] has the class 'cat': expected a number; cast the column to a Cl"):
        dataset_batches(labelled(["cat"] * 9), model)


def test_top_5_beside_the_accuracy():
    logits, classes = torch.randn(64, 12), torch.randint(0, 12, (64,))
    got = accuracies(torch.nn.Identity(), [(logits[:40], classes[:40]), (logits[40:], classes[40:])])
    top = logits.topk(5).indices
    assert got["accuracy"] == float((top[:, 0] == classes).float().mean())
    assert abs(got["top-5 accuracy"] - float((top == classes[:, None]).any(1).float().mean())) < 1e-6
    assert list(accuracies(torch.nn.Identity(), [(torch.eye(5), torch.arange(5))])) == ["accuracy"]
    with pytest.raises(DataError, match="none has a class; name folders of images by the model's classes"):
        accuracies(torch.nn.Identity(), [(torch.eye(8), torch.full((8,), -100))])


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow only warns of the first
def test_a_picture_of_billions_of_pixels(side, tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "cat").mkdir()
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "cat" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"1.png: it has more than 89,478,485 pixels: give it in a smaller size"):
        batches(str(tmp_path), Take())
