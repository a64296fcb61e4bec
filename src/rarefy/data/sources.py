"""Read batches from a path or a built-in name, as given on the command line or in a recipe.

articles.txt, articles.jsonl    text, or one {"text": ...} per line, cut into token windows  -> {"input_ids"};
                                for encoders each begins and ends with the tokens that the tokenizer adds to a text
images/                         one folder of images per class (needs the vision extra)      -> (images, classes)
saved/, images.parquet          images of the library datasets                               -> (images, classes)
x.npz, x.safetensors            tensors with a common first dimension                        -> dict, or (x, y)
wiki, fashion-mnist             built-in data (`rarefy.data.builtin`); the suffix `-test` gives the held-out part
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.common.errors import DataError, nearest
from rarefy.common.plain_file import read_text, usable_path
from rarefy.data import builtin
from rarefy.data.images import check_expansion, dataset_batches, folder_batches, is_dataset
from rarefy.model.image_config import ImageConfig

DEFAULT_IMAGES = ImageConfig()  # 224 pixels, statistics of ImageNet
Batch = dict[str, Tensor] | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Take:
    """How many samples to read from a source, and how to preprocess them."""

    samples: int | None = None  # windows of text, or images; None = all
    need_all: bool = True  # whether fewer samples than these are an error
    tokens: int = 512
    batch: int = 8
    seed: int = 0
    images: ImageConfig = DEFAULT_IMAGES


def batches(
    source: str, take: Take, *, tokenizer: Any = None, base: Path | None = None, what: str = "data"
) -> Sequence[Batch]:
    """Return the batches of a source; the same arguments always give the same batches, fewer samples the first of them.

    `base` is the folder of relative paths. Raises DataError if the path does not exist (similar names are suggested),
    the text is too short, the file is not of its type, or text comes without a tokenizer.
    """
    path = find(source, base, what)
    if path is None:
        name, test = source.removesuffix("-test"), source.endswith("-test")
        if name == "wiki":
            return _text(builtin.wiki(test), take, tokenizer, f"{what} {source}")
        return _tensors(dict(zip("xy", builtin.fashion_mnist(test))), take, f"{what} {source}")
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return _images(path, take, what)
    with read_errors(path, what):
        loaded = READERS[path.suffix.lower()](path)
    if isinstance(loaded, list):
        return _text(loaded, take, tokenizer, f"{what} {path}")
    return _tensors(loaded, take, f"{what} {path}")


def find(source: str, base: Path | None = None, what: str = "data") -> Path | None:
    """Return the path of a source, or None for installed built-in data; DataError if it is neither."""
    if source in builtin.DATA:
        builtin.find(source.removesuffix("-test"))
        return None
    path = usable_path(source if base is None else base / source, DataError)
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(source, [*names, *builtin.DATA], 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise DataError(
            f"{what}: no file {str(path)!r} and no built-in data of that name ({', '.join(builtin.DATA)}){hint}"
        )
    if is_dataset(path):
        return path
    if path.is_dir() and not any(entry.is_dir() for entry in path.iterdir()):
        raise DataError(f"{what}: the folder {str(path)!r} has no subfolders: expected one folder of images per class")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise DataError(
            f"{what}: cannot read {path.name!r}; known are {', '.join(READERS)}, .parquet and folders of images"
        )
    return path


@contextmanager
def read_errors(path: Path, what: str) -> Iterator[None]:
    """Raise DataError for what the reader of a damaged file raises."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each reader raises its own errors
        objects = "it is damaged, or holds Python objects, which are not read: save arrays of numbers"
        said = f": {objects if 'pickle' in str(error) else error}"  # numpy names allow_pickle, which is not used
        raise DataError(f"{what}: {path} is not readable as {path.suffix.lower()}{said}") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line of a file of JSON objects; blank lines are skipped."""
    # only line feeds end a line: other separators may stand inside a JSON string
    for number, line in enumerate(read_text(path, DataError).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, {{...}}, got {line[:60]!r}")
        yield number, row


def _read_lines(path: Path) -> list[str]:
    documents = []
    for number, row in json_lines(path):
        if not isinstance(row.get("text"), str):
            raise DataError(f'{path}, line {number}: expected {{"text": "..."}}, got {json.dumps(row)[:60]!r}')
        documents.append(row["text"])
    return documents


def _read_npz(path: Path) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):  # else numpy says what is wrong
        with zipfile.ZipFile(path) as archive:
            check_expansion(sum(e.file_size for e in archive.infolist()), path)
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


READERS = {
    ".txt": lambda path: [read_text(path, DataError)],
    ".jsonl": _read_lines,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def check_tokenizer(tokenizer: Any, what: str) -> None:
    """Raise DataError if there is no tokenizer for data that are text."""
    if tokenizer is None:
        raise DataError(
            f"{what} is text and needs the model's tokenizer: use a model folder that has one, or pass tokenizer=..."
        )


def _text(documents: list[str], take: Take, tokenizer: Any, what: str) -> list[Batch]:
    """Cut text into windows: documents in seeded order, joined by blank lines; a single text is shuffled."""
    check_tokenizer(tokenizer, what)
    order = torch.Generator().manual_seed(take.seed)
    before, after = special_tokens(tokenizer)
    if take.tokens <= len(before) + len(after):
        before, after = [], []
    size = take.tokens - len(before) - len(after)  # of text
    max_tokens = None if take.samples is None or len(documents) == 1 else take.samples * size
    ids: list[int] = []
    for text in _encoded(documents, order, tokenizer):
        ids.extend(text)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    count = len(ids) // size
    if not any(text.strip() for text in documents):
        raise DataError(f"{what} is empty: give a file with text")
    if count < ((take.need_all and take.samples) or 1):
        raise DataError(f"{what} {_too_short(what, len(ids), count, take)}")
    windows = torch.tensor([[*before, *ids[i * size : (i + 1) * size], *after] for i in range(count)])
    if len(documents) == 1:
        windows = windows[torch.randperm(count, generator=order)]
    windows = windows[: take.samples]
    return [{"input_ids": part} for part in windows.split(take.batch)]


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that an encoder's tokenizer puts before and after a text, such as [CLS] and [SEP].

    Returns:
        Two lists; they are empty for tokenizers without a token for classification, as those of decoders.
    """
    if getattr(tokenizer, "cls_token_id", None) is None:
        return [], []
    plain, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    return ([], []) if not plain or not starts else (whole[: starts[0]], whole[starts[0] + len(plain) :])


def _too_short(what: str, num_tokens: int, count: int, take: Take) -> str:
    """Return the message for a text of `count` windows, with the number of samples or tokens that it has.

    `what` is the purpose of the data, such as "train", or the command's option, such as "--eval-data".
    """
    size = "1 token makes" if num_tokens == 1 else f"{num_tokens:,} tokens make"
    needed = take.samples or 1
    text = (
        f"is too short: {size} {count} windows of {take.tokens}; {needed} {'is' if needed == 1 else 'are'} needed "
        f"({needed * take.tokens:,} tokens): give more text"
    )
    tokens = (1 << (num_tokens // needed).bit_length()) // 2  # a power of two that fits
    field, value = ("samples", count) if count else ("tokens", tokens)
    if not count and tokens <= 1:
        return text
    if what.startswith("--"):
        return f"{text}, or pass {what.split()[0].removesuffix('data') if count else '--'}{field} {value}"
    purpose = what.split()[0]
    section = "evaluate." if purpose == "evaluate" else "data."
    of_purpose = f"{purpose}_" if count and purpose in ("train", "validate") else ""
    return f"{text}, or pass {field}={value} (shell: pass --set {section}{of_purpose}{field}={value})"


def _encoded(documents: list[str], order: torch.Generator, tokenizer: Any) -> Iterator[list[int]]:
    indices = torch.randperm(len(documents), generator=order).tolist()
    for start in range(0, len(indices), 64):
        texts = [documents[i] + "\n\n" for i in indices[start : start + 64]]
        # verbose=False: no warning about texts longer than the context, they are cut into windows
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _tensors(loaded: dict[str, Tensor], take: Take, what: str) -> list[Batch]:
    """Return the first samples in seeded order."""
    if not loaded:
        raise DataError(f"{what} holds no tensors")
    loaded = {n: _to_common_dtype(t) for n, t in loaded.items()}
    lengths = {name: len(t) if t.dim() else 0 for name, t in loaded.items()}
    count = min(lengths.values())
    if len(set(lengths.values())) > 1 or count == 0:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in loaded.items())
        raise DataError(f"{what}: tensors need the same first dimension, more than 0; got {shapes}")
    _check_count(count, take, what)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(take.seed))
    parts = order[: take.samples].split(take.batch)
    if set(loaded) == {"x", "y"}:
        return [(loaded["x"][p], loaded["y"][p]) for p in parts]
    return [{n: t[p] for n, t in loaded.items()} for p in parts]


def _to_common_dtype(tensor: Tensor) -> Tensor:
    """Convert float64 to fp32 and integers to int64, the types that layers and losses take."""
    if tensor.is_floating_point():
        return tensor.float() if tensor.dtype == torch.float64 else tensor
    return tensor if tensor.dtype == torch.bool else tensor.to(torch.int64)


def _check_count(count: int, take: Take, what: str) -> None:
    """Raise DataError for fewer samples than are needed."""
    if take.samples is not None and take.need_all and count < take.samples:
        fewer = f": give more, or set samples to {count}" if count else ""
        raise DataError(f"{what} is too short: {count:,} samples, {take.samples:,} are needed{fewer}")


def _images(path: Path, take: Take, what: str) -> Sequence[Batch]:
    """Return the batches of images in a folder or of a data set."""
    options: dict[str, Any] = {"samples": take.samples, "batch": take.batch, "seed": take.seed, "what": what}
    read = (dataset_batches if is_dataset(path) else folder_batches)(path, take.images, **options)
    _check_count(len(read) * take.batch - take.batch + len(read[-1][0]), take, f"{what} {path}")
    return read
