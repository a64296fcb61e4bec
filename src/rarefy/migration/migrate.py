"""Recipes of withdrawn tools, as recipes of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.common.errors import RarefyError, RecipeError
from rarefy.migration.translate import translate
from rarefy.recipe.parser import Recipe, from_yaml


@dataclass(frozen=True)
class Migrated:
    """A recipe, as the YAML text that says in comments where its meaning changed; `tool` is whose it was."""

    text: str
    tool: str
    recipe: Recipe


def migrate(source: str | Path | Mapping[str, Any] | list[Any], *, skip: bool = False) -> Migrated:
    """Return the recipe that a file of another tool, or a config of one as plain data, amounts to.

    source   SparseML's recipes (YAML, or Markdown with YAML ahead), llm-compressor's, NNCF's before version 3, a
             `WeightPruningConfig` of Neural Compressor as a dict, a config of torch.ao.pruning as a list
    skip     leave out what has no counterpart, with a comment, instead of raising
    Nothing in a file is run: formulas are numbers, variables and + - * /. Raises RecipeError naming what is wrong, the
    line and the nearest thing.

    >>> print(migrate([{"tensor_fqn": "fc1.weight", "sparse_block_shape": [1, 4], "zeros_per_block": 2}]).text)
    # from a config of torch.ao.pruning, by `rarefy migrate`; what changed its meaning is said in comments
    stages:
    # sparsity_level 0.5 left some blocks whole: N:M is the same everywhere here
    - prune:
        layers:
        - fc1.weight
        pattern: '2:4'
    <BLANKLINE>
    """
    tool, text = translate(source, skip)
    try:
        return Migrated(text, tool, from_yaml(text, "the migrated recipe"))
    except RarefyError as error:
        name = source if isinstance(source, str | Path) else "this config"
        raise RecipeError(f"{name} amounts to no recipe: {error}") from None
