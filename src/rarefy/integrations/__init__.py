"""Rarefy inside the training loops of other libraries."""

from __future__ import annotations

from rarefy.common.errors import RecipeError
from rarefy.pipeline.train_stage import Sparsifier
from rarefy.train.sparsity_config import Rewind


def refuse_rewind(sparsifier: Sparsifier) -> None:
    """Raise RecipeError for a plan whose learning rate goes back, which another library's schedule does not."""
    if isinstance(sparsifier.plan, Rewind):
        raise RecipeError(
            "rewind sends the learning rate back, and this trainer's schedule does not follow: use rarefy.fit_, or a "
            "loop of your own with sparsifier.lr_progress"
        )
