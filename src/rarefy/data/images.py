"""Images with classes: folders, and data sets of the library datasets, prepared as a model's `ImageConfig` says.

photos/cat/1.jpg, photos/dog/2.png   one folder per class
saved/                               a split that `datasets.Dataset.save_to_disk` wrote
images.parquet                       a table with images as bytes, as data sets of the hub have it
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.common.errors import DataError, first_line
from rarefy.common.extras import install
from rarefy.common.plain_file import plain_file, usable_path
from rarefy.model.image_config import NO_CLASS, ImageConfig, class_ids

IN_MEMORY = 1 << 30  # bytes of prepared images that are held; more are read again in each pass
MAX_PIXELS = 89_478_485  # of one picture: 256 MiB in RGB, the limit from which Pillow warns
MAX_EXPANSION, EXPANSION_SLACK = 64, 1 << 30  # bytes that a byte of a compressed file may become, and of any file
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
DATASET_FILES = ("state.json", "dataset_info.json")  # of a split; of several splits DICT_FILE
DICT_FILE = "dataset_dict.json"

Pair = tuple[Tensor, int]


@dataclass(frozen=True)
class ImageBatches(Sequence[tuple[Tensor, Tensor]]):
    """Batches (images [batch, channels, size, size] in fp32, classes [batch]) that are read when they are needed."""

    read: Callable[[int], Pair]  # an image and its class
    order: tuple[int, ...]
    batch: int

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = index % len(self) * self.batch
        pairs = [self.read(i) for i in self.order[start : start + self.batch]]
        return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))


def transform_of(config: ImageConfig, what: str = "images") -> Callable[[Any], Tensor]:
    """Return the function that prepares a picture of Pillow: [channels, size, size] in fp32.

    It is what timm's `create_transform` and torchvision's presets do with the same numbers.

    Raises:
        DataError: torchvision is not installed.
    """
    try:
        from torchvision import transforms
    except ImportError:
        raise DataError(f"{what}: images need torchvision: {install('vision')}") from None
    mode = transforms.InterpolationMode(config.interpolation)
    resize = (config.resize, config.resize) if config.squash else config.resize
    steps = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=mode),
            transforms.CenterCrop(config.size),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )
    color = {1: "L", 3: "RGB", 4: "RGBA"}.get(len(config.mean))
    if color is None:
        raise DataError(f"{what}: pictures have 1, 3 or 4 channels, the model {len(config.mean)}: give an .npz")
    return lambda image: steps(_in_8_bits(image).convert(color))


def _in_8_bits(image: Any) -> Any:
    """Return a picture of 16-bit gray values in 8 bits: `convert` of Pillow would make all above 255 white."""
    if not image.mode.startswith("I;16"):
        return image
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))


def folder_batches(
    path: Path, config: ImageConfig, *, samples: int | None, batch: int, seed: int, what: str
) -> Sequence[tuple[Tensor, Tensor]]:
    """Return batches of a folder that has one folder of images per class, in seeded order.

    Raises:
        DataError: a class without images, an image that cannot be read, classes that the model does not have.
    """
    transform = transform_of(config, what)
    from torchvision import datasets

    try:
        folder = datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{what}: {path} is no folder of class folders of images: {error}") from None
    classes = class_ids(folder.classes, config, what)

    def read(i: int) -> Pair:
        file, label = folder.samples[i]
        with open(plain_file(file, DataError), "rb") as opened:
            return _decoded(opened.read(), transform, f"{what}: cannot read the image {file}"), classes[label]

    return _batches(read, len(folder), config, samples, batch, seed, f"{what} {path}")


def is_dataset(path: Path) -> bool:
    """Return whether a path is what `datasets.Dataset.save_to_disk` wrote, or a .parquet file."""
    if path.is_file():
        return path.suffix.lower() == ".parquet"
    return (path / DICT_FILE).is_file() or all((path / name).is_file() for name in DATASET_FILES)


def dataset_batches(
    source: Any, config: ImageConfig | None = None, *, samples: int | None = None, batch: int = 8, seed: int = 0,
    what: str = "data",
) -> Sequence[tuple[Tensor, Tensor]]:  # fmt: skip
    """Return batches of a data set of the library datasets that has a column of images.

    Images are decoded here, from the bytes in the data set: no path or address in it is followed.

    Args:
        source: a `datasets.Dataset`, the folder of one, or a .parquet file.
        config: how images are prepared; by default 224 pixels with ImageNet's statistics.
        samples: how many, in seeded order; None: all.
        batch: samples of a batch.
        seed: of the order.
        what: what messages call the data.

    Returns:
        Batches (images in fp32, classes); the class is -100 where there is none.

    Raises:
        DataError: datasets is not installed, no column of images, images that are stored by path.
    """
    config = config or ImageConfig()
    datasets = _library(what)
    data = _opened(source, datasets, what) if isinstance(source, str | Path) else source
    images = [n for n, f in data.features.items() if isinstance(f, datasets.Image)]
    if not images:
        raise DataError(f"{what} {_name(source)} has no column of images; its columns are {', '.join(data.features)}")
    data = data.cast_column(images[0], datasets.Image(decode=False))
    kinds = {n: f for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    label = next(iter(kinds), next((n for n in LABEL_COLUMNS if n in data.features), None))
    classes = class_ids(kinds[label].names, config, what) if label in kinds else None
    transform = transform_of(config, what)

    def read(i: int) -> Pair:
        row = data[i]
        content = (row[images[0]] or {}).get("bytes")
        if not isinstance(content, bytes):
            raise DataError(f"{what}: image {i} is stored by its path: save the data set with its images in it")
        number = NO_CLASS if label is None else _class(row[label], config, f"{what}: image {i}")
        number = classes[number] if classes is not None and number >= 0 else number
        return _decoded(content, transform, f"{what}: cannot read image {i}"), number

    return _batches(read, len(data), config, samples, batch, seed, f"{what} {_name(source)}")


def _class(value: Any, config: ImageConfig, what: str) -> int:
    """Return a class of a data set; NO_CLASS for none, which data sets write as None or a negative number."""
    if value is None:
        return NO_CLASS
    if not isinstance(value, int):
        raise DataError(f"{what} has the class {str(value)[:60]!r}: expected a number; cast the column to a ClassLabel")
    if config.num_classes is not None and value >= config.num_classes:
        raise DataError(f"{what} has the class {value}, but the model's are 0 to {config.num_classes - 1}")
    return value if value >= 0 else NO_CLASS


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__


def _library(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{what}: this data set needs the library datasets: pip install datasets") from None
    return datasets


def _opened(source: str | Path, datasets: Any, what: str) -> Any:
    """Return the data set of a folder or a .parquet file."""
    path = usable_path(source, DataError)
    for file in path.rglob("*"):  # the library would wait for a named pipe
        if not file.is_dir():
            plain_file(file, DataError)
    if (path / DICT_FILE).is_file():
        splits = sorted(p.name for p in path.iterdir() if (p / DATASET_FILES[0]).is_file())
        if not splits:
            raise DataError(f"{what}: {path} lists splits, but holds none: the copy is incomplete")
        raise DataError(f"{what}: {path} holds the splits {', '.join(splits)}: give one of them, {path / splits[0]}")
    try:
        if path.is_file():
            from pyarrow import parquet  # a dependency of datasets

            groups = parquet.ParquetFile(path).metadata
            check_expansion(sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)), path)
            return datasets.Dataset(datasets.table.InMemoryTable(parquet.read_table(path)))
        return datasets.Dataset.load_from_disk(str(path))
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
    except Exception as error:  # each library raises its own errors
        raise DataError(f"{what}: {path} is not readable as a data set: {first_line(error)}") from None


def _decoded(content: bytes, transform: Callable[[Any], Tensor], failed: str) -> Tensor:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content))  # its header alone
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return transform(image)
    except Image.DecompressionBombError:
        raise DataError(f"{failed}: it has more than {MAX_PIXELS:,} pixels: give it in a smaller size") from None
    except Exception as error:  # damaged images make each plugin of Pillow raise its own errors
        unknown = "it is damaged, or of a kind that Pillow does not read"
        raise DataError(f"{failed}: {unknown if 'BytesIO' in str(error) else error}") from None


def check_expansion(expanded: int, path: Path) -> None:
    """Raise DataError where the header of a compressed file announces far more bytes than the file has."""
    limit = MAX_EXPANSION * path.stat().st_size + EXPANSION_SLACK
    if expanded > limit:
        raise DataError(
            f"{path} would become {expanded:,} bytes when it is expanded, at most {limit:,} are read: give fewer "
            "samples, or a file that is not compressed"
        )


def _batches(
    read: Callable[[int], Pair], count: int, config: ImageConfig, samples: int | None, batch: int, seed: int, what: str
) -> Sequence[tuple[Tensor, Tensor]]:
    if not count:
        raise DataError(f"{what} holds no images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    lazy = ImageBatches(read, tuple(order), batch)
    num_bytes = 4 * len(order) * torch.Size(config.shape(1)).numel()
    return list(lazy) if num_bytes <= IN_MEMORY else lazy
