"""Files of weights that other programs wrote: .safetensors, and .pth or .pt of torch, read without running code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError, first_line
from rarefy.common.plain_file import usable_path

SUFFIXES = (".safetensors", ".pth", ".pt")
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys under which training scripts save weights
PREFIXES = re.compile(r"^(?:_orig_mod\.|module\.)+")  # of torch.compile and of data parallel training


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name.

    A .pth file is read by `torch.load(weights_only=True)`, which builds tensors and plain containers only. Where a
    training script saved more, its weights are taken, averaged ones first. Prefixes of wrappers are removed.

    Args:
        path: the file.

    Raises:
        ModelError: no such file, another ending, a damaged file, or one that needs code.

    Example:
        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/weights.pth"
        >>> torch.save({"state_dict": {"module.w": torch.ones(2)}, "epoch": 3}, file)
        >>> read_weights(file)
        {'w': tensor([1., 1.])}
    """
    file = usable_path(path, ModelError)
    if not file.is_file():
        raise ModelError(f"no file of weights {str(file)!r}")
    if file.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{file}: expected weights as {', '.join(SUFFIXES)}")
    loaded = _safetensors(file) if file.suffix.lower() == ".safetensors" else _torch(file)
    for key in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ModelError(f"{file} holds no weights: expected tensors by name, as torch.save(model.state_dict()) writes")
    return {PREFIXES.sub("", str(name)): t for name, t in loaded.items()}


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:  # the library raises its own errors
        raise ModelError(f"{file} is not readable as .safetensors: {first_line(error)}") from None


def _torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes torch raise anything
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise ModelError(
                f"{file} holds more than tensors, which would run code: save its weights alone, "
                "torch.save(model.state_dict(), FILE), or as .safetensors"
            ) from None
        raise ModelError(
            f"{file} is no file of weights that torch.save wrote ({first_line(error)}): give .pth or .safetensors"
        ) from None
