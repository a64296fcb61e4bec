"""Example inputs for timing a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.model import hf


def generates(model: Any) -> bool:
    """Return whether a model generates text."""
    return hasattr(model, "generate") and model.can_generate()


def example_of(model: nn.Module, tokens: int, batch: int) -> dict[str, Tensor]:
    """Return reproducible random inputs for a model with a Hugging Face config."""
    if not hf.is_model(model):
        raise ModelError("bench needs a model with a Hugging Face config")
    config: Any = model.config
    noise = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        shape = (batch, getattr(config, "num_channels", 3), size, size)
        return {"pixel_values": torch.randn(shape, generator=noise)}
    ids = torch.randint(0, config.vocab_size, (batch, tokens), generator=noise)
    return {"input_ids": ids}
