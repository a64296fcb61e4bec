"""The inputs and outputs of a model as its file describes them: names, types and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

KEY = "rarefy_signature"  # of a graph module's metadata, which its copies keep


@dataclass(frozen=True)
class ModelInput:
    """An input of a model.

    Attributes:
        name: its name in the file.
        parameter: its name in the signature of `forward`.
        dtype: its type.
        dims: its sizes; a name stands for an open one, "" for an open one without a name. None: nothing is known.
        num_values: integers are smaller than that.
        example_shape: the shape that examples have, where the user has given one.
    """

    name: str
    parameter: str
    dtype: torch.dtype
    dims: tuple[int | str, ...] | None
    num_values: int = 2
    example_shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        dims = "..." if self.dims is None else "x".join(str(d or "?") for d in self.dims)
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {dims}"

    @property
    def is_image(self) -> bool:
        """Return whether the input looks like a batch of images."""
        return self.dims is not None and len(self.dims) == 4 and self.dtype.is_floating_point

    @property
    def channels_last(self) -> bool:
        """Return whether the input looks like a batch of images whose last dimension is the color."""
        return self.is_image and self.dims is not None and self.dims[3] in (1, 3) and self.dims[1] not in (1, 3)


@dataclass(frozen=True)
class Signature:
    """The inputs of a model in their order, and the names of its outputs."""

    inputs: tuple[ModelInput, ...]
    outputs: tuple[str, ...]


def set_signature_(module: fx.GraphModule, signature: Signature) -> None:
    """Record the signature of a model that was read from a file."""
    module.meta[KEY] = signature


def get_signature(model: Any) -> Signature | None:
    """Return the signature of a model that was read from a file, None for any other model."""
    meta = model.meta if isinstance(model, fx.GraphModule) else {}
    return meta.get(KEY)
