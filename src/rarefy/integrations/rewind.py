"""What a recipe may not ask for in the training loops of other libraries."""

from __future__ import annotations

from rarefy.common.errors import RecipeError
from rarefy.pipeline.train_stage import Sparsifier
from rarefy.train.sparsity_config import Rewind


def refuse_rewind(sparsifier: Sparsifier) -> None:
    """Raise RecipeError for `rewind`: other trainers cannot follow its learning rate."""
    if isinstance(sparsifier.config, Rewind):
        raise RecipeError(
            "rewind resets the learning rate, which this trainer's schedule cannot follow: use rarefy.fit_, or your "
            "own loop with sparsifier.lr_progress"
        )
