"""Batches from rows by name: a `datasets.Dataset`, a streaming `IterableDataset`, or any other iterable of dicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError
from rarefy.data.sources import check_tokenizer

TOKENIZED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # columns that are model inputs
Row = Mapping[str, Any]


def batches(
    dataset: Iterable[Row],
    tokenizer: Any = None,
    *,
    image_processor: Any = None,
    column: str | None = None,
    labels: str | None = None,
    batch: int = 8,
    tokens: int = 128,
    samples: int | None = None,
) -> DatasetBatches:
    """Return the rows of a dataset as batches, which every function with `data` or `calibrate` takes.

    Rows are read when the batches are, so streams stay streams. Each pass starts at the first row: shuffle with the
    dataset's own `shuffle(seed=0)`.

    Args:
        dataset: rows by column, such as a `datasets.Dataset` or a streaming `datasets.IterableDataset`. Columns are
            tokenized (`input_ids` and those beside it), text, images, or `pixel_values`.
        tokenizer: the model's tokenizer: for text, and to pad tokenized rows of different lengths.
        image_processor: the model's image processor, for images.
        column: the column of texts or images, by default "text", "sentence" or "image", or the only one of its kind.
        labels: the column that becomes `labels`, for losses; None for no labels.
        batch: rows of a batch.
        tokens: largest number of tokens of a text; the rest is cut off.
        samples: rows to take; None for all.

    Raises:
        DataError: for a dataset that has no rows, lacks the column, or needs a tokenizer or image processor. It is
            raised here for the first row, later for others.

    Cost: the first row is read at once, the others with each pass.

    Example:
        >>> rows = [{"input_ids": [1, 2, 3], "label": 0}, {"input_ids": [4, 5, 6], "label": 1}]
        >>> next(iter(batches(rows, labels="label")))
        {'input_ids': tensor([[1, 2, 3],
                [4, 5, 6]]), 'labels': tensor([0, 1])}
    """
    check_int("batch", batch, 1, DataError)
    check_int("tokens", tokens, 1, DataError)
    if samples is not None:
        check_int("samples", samples, 1, DataError)
    if isinstance(dataset, Mapping):
        raise DataError(f"expected a dataset, got a dict of splits: pass one of them, {', '.join(map(str, dataset))}")
    if not hasattr(dataset, "__iter__") or isinstance(dataset, str | bytes | Tensor):
        raise DataError(f"expected a dataset of rows, such as a datasets.Dataset, got {type(dataset).__name__}")
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("the dataset has no rows")
    if not isinstance(first, Mapping):
        raise DataError(f"expected rows as dicts by column, got {type(first).__name__}")
    kind, name = _kind(first, column)
    if labels is not None and labels not in first:
        columns = ", ".join(map(str, first))
        raise DataError(f"the dataset has no column {labels!r} for labels: its columns are {columns}")
    if kind == "text":
        check_tokenizer(tokenizer, f"the column {name!r}")
        if getattr(tokenizer, "pad_token", "") is None:
            raise DataError("the tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token")
    if kind == "image" and image_processor is None:
        raise DataError(f"the column {name!r} has images: pass image_processor=, that of the model")
    processor = {"text": tokenizer, "tokenized": tokenizer, "image": image_processor}.get(kind)
    return DatasetBatches(dataset, kind, name, labels, processor, batch, tokens, samples)


@dataclass(frozen=True)
class DatasetBatches:
    """Batches of a dataset's rows; iterate over it as often as the dataset allows. See `batches`.

    Attributes:
        dataset: the rows.
        kind: "text", "tokenized", "image" or "pixels".
        column: the column of texts or images.
        labels: the column of labels, or None.
        processor: the tokenizer or image processor, or None.
        batch: rows of a batch.
        tokens: largest number of tokens of a text.
        samples: rows to take, None for all.
    """

    dataset: Iterable[Row]
    kind: str
    column: str
    labels: str | None
    processor: Any
    batch: int
    tokens: int
    samples: int | None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield each batch as a dict of tensors."""
        rows = islice(iter(self.dataset), self.samples)
        number = 0
        for first in rows:
            part = list(chain([first], islice(rows, self.batch - 1)))
            for i, row in enumerate(part, 1):
                self._check(row, number + i)
            number += len(part)
            labels = {} if self.labels is None else {"labels": _stacked("labels", [row[self.labels] for row in part])}
            yield {**self._inputs(part), **labels}

    def _check(self, row: Row, number: int) -> None:
        """Raise DataError for a row that lacks a value of the columns that are read."""
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} of the dataset: expected a dict by column, got {type(row).__name__}")
        missing = next((c for c in (self.column, self.labels) if c is not None and row.get(c) is None), None)
        if missing is not None:
            raise DataError(f"row {number} of the dataset has no {missing!r}: leave such rows out")

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        if self.kind == "text":
            options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self.tokens}
            return dict(self.processor([row[self.column] for row in rows], return_tensors="pt", **options))
        if self.kind == "image":
            images = [_in_colors(row[self.column]) for row in rows]
            return {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}
        if self.kind == "pixels":
            return {"pixel_values": _stacked("pixel_values", [row["pixel_values"] for row in rows])}
        names = [n for n in TOKENIZED if n in rows[0]]
        columns = {n: [torch.as_tensor(row[n])[: self.tokens] for row in rows] for n in names}
        lengths = {len(t) for t in columns["input_ids"]}
        if len(lengths) == 1:
            return {n: _stacked(n, values) for n, values in columns.items()}
        if self.processor is None:
            low, high = min(lengths), max(lengths)
            raise DataError(f"rows have {low} to {high} tokens: pass tokenizer=, which pads them, or batch=1")
        return dict(self.processor.pad(columns, padding=True, return_tensors="pt"))


def _kind(row: Row, column: str | None) -> tuple[str, str]:
    """Return what a row holds, and the column of texts or images."""
    if column is not None and column not in row:
        raise DataError(f"the dataset has no column {column!r}: its columns are {', '.join(map(str, row))}")
    if column is None and "input_ids" in row:
        return "tokenized", "input_ids"
    if column is None and "pixel_values" in row:
        return "pixels", "pixel_values"
    for kind, names in (("text", ("text", "sentence")), ("image", ("image", "img"))):
        usual = [n for n in names if n in row and _is_a(kind, row[n])]
        fitting = [column] if column is not None else usual[:1] or [n for n, v in row.items() if _is_a(kind, v)]
        if len(fitting) == 1 and _is_a(kind, row[fitting[0]]):
            return kind, fitting[0]
    wanted = "texts or images" if column is None else f"texts or images in {column!r}"
    raise DataError(
        f"expected {wanted}: name the column, column=..., or tokenize first; columns are {', '.join(map(str, row))}"
    )


def _is_a(kind: str, value: Any) -> bool:
    if kind == "text":
        return isinstance(value, str)
    return hasattr(value, "convert") and hasattr(value, "size")  # an image of Pillow


def _in_colors(image: Any) -> Any:
    """Return an image in three colors: image processors refuse palettes and transparency."""
    return image if getattr(image, "mode", "RGB") == "RGB" else image.convert("RGB")


def _stacked(name: str, values: Sequence[Any]) -> Tensor:
    """Return values of rows as one tensor: integers as int64, other numbers as fp32."""
    try:
        tensors = [torch.as_tensor(value) for value in values]
        stacked = torch.stack(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the column {name!r} has no numbers of one shape: {str(error).splitlines()[0]}") from None
    return stacked.float() if stacked.is_floating_point() else stacked.to(torch.int64)
