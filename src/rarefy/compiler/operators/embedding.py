"""Embeddings: rows of a weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler.operators.spec import OpSpec


def embedding(ids: Tensor, w: Tensor) -> Tensor:
    """Return rows of w, [.., features]; ids are [..] int64, w is [rows, features]."""
    return F.embedding(ids, w)


OPERATORS = (OpSpec(reference=embedding, arguments=("tensor", "weight"), own_call=True, packed_formats=("panels",)),)
