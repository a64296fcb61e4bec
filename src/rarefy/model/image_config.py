"""How images are prepared for a model, and what its classes are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.common.errors import DataError, ModelError, nearest

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
MAX_PIXELS, MAX_CHANNELS, MAX_CLASSES = 1 << 14, 64, 1 << 20
NO_CLASS = -100  # the label that losses and metrics leave out
ATTRIBUTE = "rarefy_images"  # of a model that knows its images


@dataclass(frozen=True)
class ImageConfig:
    """How images are prepared for a model: resized, cropped in the center, scaled to 0..1, normalized.

    Attributes:
        size: height and width of the input, in pixels.
        resize: pixels of the shorter side before the crop; with `squash` of both sides.
        squash: whether both sides are resized alike, which changes the proportions.
        interpolation: one of INTERPOLATIONS.
        mean: mean of each channel; their number is that of the channels.
        std: standard deviation of each channel.
        num_classes: number of the model's classes; None: not known.
        labels: names of each class, where they are known. They are not saved.

    Example:
        >>> ImageConfig(size=28, resize=28, mean=(0.5,), std=(0.5,)).shape(batch=2)
        (2, 1, 28, 28)
    """

    size: int = 224
    resize: int = 224
    squash: bool = False
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    num_classes: int | None = None
    labels: tuple[tuple[str, ...], ...] = ()

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Return the shape of a batch: batch, channels, height, width."""
        return batch, len(self.mean), self.size, self.size

    def to_dict(self) -> dict[str, Any]:
        """Return all but the labels as plain data."""
        fields = {n: getattr(self, n) for n in ("size", "resize", "squash", "interpolation", "num_classes")}
        return {**fields, "mean": list(self.mean), "std": list(self.std)}


def image_config_from_dict(data: Any) -> ImageConfig:
    """Return what `ImageConfig.to_dict` returned; ModelError for anything else.

    Example:
        >>> image_config_from_dict(ImageConfig(size=96).to_dict()).size
        96
    """
    if not isinstance(data, dict) or set(data) != set(ImageConfig().to_dict()):
        raise ModelError(f"images: expected the fields {', '.join(ImageConfig().to_dict())}, got {str(data)[:100]}")
    for name, limit in (("size", MAX_PIXELS), ("resize", MAX_PIXELS), ("num_classes", MAX_CLASSES)):
        value = data[name]
        known = type(value) is int and 1 <= value <= limit
        if not known and not (name == "num_classes" and value is None):
            raise ModelError(f"images.{name}: expected a whole number from 1 to {limit}, got {str(value)[:60]}")
    numbers = [data["mean"], data["std"]]
    if any(not isinstance(n, list) or not all(_is_number(v) for v in n) for n in numbers):
        raise ModelError("images.mean and images.std: expected lists of finite numbers")
    if len(data["mean"]) != len(data["std"]) or not 1 <= len(data["mean"]) <= MAX_CHANNELS or min(data["std"]) <= 0:
        raise ModelError("images.mean and images.std: expected one number for each channel, std above 0")
    if data["interpolation"] not in INTERPOLATIONS or type(data["squash"]) is not bool:
        raise ModelError(f"images.interpolation: expected one of {', '.join(INTERPOLATIONS)}; squash: true or false")
    return ImageConfig(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def image_config_of(model: Any) -> ImageConfig | None:
    """Return how images are prepared for a model, None where it does not say."""
    config = getattr(model, ATTRIBUTE, None)
    return config if isinstance(config, ImageConfig) else None


def set_image_config_(model: Any, config: ImageConfig) -> None:
    """Record how images are prepared for a model."""
    setattr(model, ATTRIBUTE, config)


def class_ids(names: Sequence[str], config: ImageConfig, what: str) -> list[int]:
    """Return the model's class for each class of a data set, given by its names in their order.

    As many classes as the model has: their order is the model's. Fewer: they are looked up by number or by name.
    Where no name is known, each is NO_CLASS: the images have no labels.

    Args:
        names: the data's classes, sorted, such as the names of folders.
        config: the model's images.
        what: what messages call the data.

    Raises:
        DataError: more classes than the model has, or some names known and others not.

    Example:
        >>> animals = ImageConfig(num_classes=3, labels=(("ox",), ("emu",), ("cat", "n02121808")))
        >>> class_ids(["cat", "ox"], animals, "data")
        [2, 0]
    """
    if config.num_classes is None or len(names) == config.num_classes:
        return list(range(len(names)))
    if len(names) > config.num_classes:
        raise DataError(
            f"{what} has {len(names)} classes, and the model {config.num_classes}: give data of the model's classes"
        )
    if all(n.isdecimal() and n.isascii() and int(n) < config.num_classes for n in names):
        return [int(n) for n in names]
    index = {alias.lower(): i for i, aliases in enumerate(config.labels) for alias in aliases}
    ids = [index.get(n.lower(), NO_CLASS) for n in names]
    unknown = [n for n, i in zip(names, ids) if i == NO_CLASS]
    if unknown and len(unknown) < len(names):
        near = nearest(unknown[0].lower(), index)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"{what}: {unknown[0]!r} is no class of the model{hint}: name all classes, or give the number of each"
        )
    return ids
