"""Field names and values of recipes that were renamed: saved recipes are translated, recipes of users are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rarefy.structured.options import RENAMED_KINDS

FIELDS = {"at_most_worse": "max_degradation", "least": "min_keep"}
UNITS = RENAMED_KINDS


def upgrade(recipe: Any) -> Any:
    """Return a saved recipe (plain data) with the names of today.

    >>> upgrade({"cut": {"least": 0.1, "units": ["head dimension"]}})
    {'cut': {'min_keep': 0.1, 'units': ['head_dim']}}
    """
    if isinstance(recipe, list):
        return [UNITS.get(v, v) if isinstance(v, str) else upgrade(v) for v in recipe]
    if not isinstance(recipe, Mapping):
        return recipe
    return {FIELDS.get(k, k): upgrade(v) for k, v in recipe.items()}
