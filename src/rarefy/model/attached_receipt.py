"""The receipt of `rarefy.compress` that a model carries as its attribute `rarefy_receipt`."""

from __future__ import annotations

from torch import nn

from rarefy.model.layers import unwrap


def forget_receipt(model: nn.Module) -> None:
    """Remove a model's receipt, for functions that change the model: it describes the model before."""
    unwrap(model).__dict__.pop("rarefy_receipt", None)
