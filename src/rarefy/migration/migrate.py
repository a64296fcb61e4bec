"""`migrate`: recipes of other tools become Rarefy recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.common.errors import RarefyError, RecipeError
from rarefy.migration.translate import Request, Translation, translate
from rarefy.recipe.parser import Recipe, from_yaml


@dataclass(frozen=True)
class Migrated:
    """A migrated recipe.

    Args:
        text: the recipe as YAML; comments mark differences in meaning.
        tool: the tool that the source belongs to, such as "sparseml".
        recipe: the parsed recipe.

    Example:
        >>> migrate([{"tensor_fqn": "fc.weight", "sparsity_level": 0.5}]).tool
        'torch.ao.pruning'
    """

    text: str
    tool: str
    recipe: Recipe


def migrate(
    source: str | Path | Mapping[str, Any] | list[Any],
    *,
    skip: bool = False,
    variables: Mapping[str, Any] | None = None,
    block: int | None = None,
) -> Migrated:
    """Translate a recipe or config of another tool.

    No code in a file is run: formulas may only contain numbers, variables and arithmetic.

    Args:
        source: a SparseML recipe (YAML, or Markdown with YAML at its top or in fenced blocks), an llm-compressor
            recipe, an NNCF config before version 3, a `WeightPruningConfig` of Neural Compressor (dict), or a
            torch.ao.pruning config (list).
        skip: whether to leave out what has no counterpart, with a comment, instead of raising.
        variables: values of variables that the recipe uses, in place of its own. A variable without a value is looked
            up in the YAML and JSON files of the same folder.
        block: the number (from 1) of the recipe in a Markdown file with several.

    Returns:
        The recipe and its YAML text.

    Raises:
        RecipeError: with the line, if something is wrong or has no counterpart.

    Example:

    >>> print(migrate([{"tensor_fqn": "fc1.weight", "sparse_block_shape": [1, 4], "zeros_per_block": 2}]).text)
    # from a config of torch.ao.pruning, by `rarefy migrate`; comments mark differences in meaning
    stages:
    # sparsity_level 0.5 left some blocks whole: N:M is the same everywhere here
    - prune:
        layers:
        - fc1.weight
        score: magnitude
        pattern: 2:4
    <BLANKLINE>
    """
    return checked(source, translate(source, Request(skip, variables or {}, block)))


def checked(source: object, done: Translation) -> Migrated:
    """Return a translation as a valid recipe; RecipeError names its source."""
    try:
        return Migrated(done.text, done.tool, from_yaml(done.text, "the migrated recipe"))
    except RarefyError as error:
        name = source if isinstance(source, str | Path) else "this config"
        raise RecipeError(f"{name}: the migrated recipe is not valid: {error}") from None
