"""Example inputs for timing a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.model import hf
from rarefy.model.image_config import image_config_of
from rarefy.model.signature import ModelInput, Signature, get_signature

IMAGE_SIZE = 224  # of images whose size is open


def generates(model: Any) -> bool:
    """Return whether a model generates text."""
    return hasattr(model, "generate") and model.can_generate()


def example_of(model: nn.Module, tokens: int, batch: int) -> Any:
    """Return reproducible random inputs for a model with a Hugging Face config or of an ONNX file.

    A dict; for a model of an ONNX file with one input that tensor alone, for one of timm or torchvision images.
    """
    signature = get_signature(model)
    if signature is not None:
        return as_example(signature, random_inputs(signature, tokens, batch))
    noise = torch.Generator().manual_seed(0)
    images = image_config_of(model)
    if images is not None and not hf.is_model(model):
        return torch.randn(images.shape(batch), generator=noise, dtype=torch.float32)
    if not hf.is_model(model):
        raise ModelError(
            f"{type(model).__name__} does not say what it is called with: expected a Hugging Face model, an ONNX file, "
            "or a model of timm or torchvision by name"
        )
    config: Any = model.config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", None) or IMAGE_SIZE
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, getattr(config, "num_channels", None) or 3, height, width)
        return {"pixel_values": torch.randn(shape, generator=noise, dtype=torch.float32)}
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise ModelError(
            f"{type(model).__name__}: its config does not say how many tokens it knows (vocab_size), so there is no "
            "example: load the model in Python and give one"
        )
    return {"input_ids": torch.randint(0, vocab_size, (batch, tokens), generator=noise)}


def as_example(signature: Signature, tensors: dict[str, Tensor]) -> Any:
    """Return tensors by the names of a file's inputs as its model is called with them: one alone, or by parameter."""
    if len(signature.inputs) == 1:
        return tensors[signature.inputs[0].name]
    return {i.parameter: tensors[i.name] for i in signature.inputs}


def random_inputs(signature: Signature, tokens: int, batch: int) -> dict[str, Tensor]:
    """Return reproducible random tensors by the names of a file's inputs; ones for masks."""
    noise = torch.Generator().manual_seed(0)
    shapes = input_shapes(signature, tokens, batch)
    return {i.name: _random(i, shapes[i.name], noise) for i in signature.inputs}


def _random(described: ModelInput, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    if described.dtype.is_floating_point:
        return torch.randn(shape, generator=noise, dtype=torch.float32).to(described.dtype)
    if described.dtype == torch.bool or "mask" in described.name.lower():
        return torch.ones(shape, dtype=described.dtype)
    return torch.randint(0, described.num_values, shape, generator=noise).to(described.dtype)


def input_shapes(signature: Signature, tokens: int, batch: int) -> dict[str, tuple[int, ...]]:
    """Return a shape for each of a file's inputs, by name.

    Open sizes are those of `example_shape`, where it is set. Else the first is the batch; in images the others are
    IMAGE_SIZE, in other inputs the number of tokens. Sizes of one name are equal.

    Raises:
        ModelError: for an input whose number of dimensions is not known.
    """
    known: dict[str, int] = {}
    for i in signature.inputs:
        known |= {d: n for d, n in zip(i.dims or (), i.example_shape or ()) if isinstance(d, str) and d}
    return {i.name: i.example_shape or _filled(i, known, tokens, batch) for i in signature.inputs}


def _filled(described: ModelInput, known: dict[str, int], tokens: int, batch: int) -> tuple[int, ...]:
    """Return the shape of an input with its open sizes filled; sizes with a name are added to those that are known."""
    if described.dims is None:
        raise ModelError(
            f"the file does not tell how many dimensions its input {described.name} has: give --input-shape "
            f"{described.name}=1x3x224x224"
        )
    sizes = []
    for d, size in enumerate(described.dims):
        if isinstance(size, str):
            image = 3 if d == 1 and not described.channels_last else IMAGE_SIZE
            default = batch if d == 0 else image if described.is_image else tokens
            size = known.setdefault(size, default) if size else default
        sizes.append(size)
    return tuple(sizes)
