"""Translate a recipe or config of another tool to YAML, with a comment wherever its meaning changes.

Reads SparseML's recipes (YAML or Markdown, legacy tags, stages, variables and arithmetic), llm-compressor's, NNCF's
before version 3, Neural Compressor's `WeightPruningConfig` and configs of torch.ao.pruning. Files
are data: no code in them is run. A recipe has at most 64 KiB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rarefy.common.errors import RecipeError, nearest
from rarefy.common.yaml_text import MAX_DEPTH
from rarefy.migration import llm_compressor, nncf_neural_compressor, sparseml
from rarefy.migration.located_node import Node
from rarefy.migration.recipe_draft import Draft, Modifier
from rarefy.migration.recipe_text import choose, find_recipes, read_file
from rarefy.migration.variables import NONE, Variables, check_used, resolve

RENAMED = {  # names of earlier versions
    "GradualKSModifier": "GMPruningModifier",
    "LegacyGMPruningModifier": "GMPruningModifier",
    "ConstantKSModifier": "ConstantPruningModifier",
    "TrainableParamsKSModifier": "TrainableParamsModifier",
    "SparseOPTModifier": "SparseGPTModifier",
    "SparseLlamaModifier": "SparseGPTModifier",
    "FastOBCQModifier": "SparseGPTModifier",
}
ONE_SHOT = ("SparseGPTModifier", "WandaPruningModifier", "GPTQModifier", "SmoothQuantModifier")  # never in training


@dataclass(frozen=True)
class Request:
    """How to translate.

    Args:
        skip: whether to leave out what has no counterpart.
        variables: values of variables of the recipe.
        block: number of the recipe in a file with several.
        lenient: whether a variable may be given that the recipe does not have.
    """

    skip: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    block: int | None = None
    lenient: bool = False


@dataclass(frozen=True)
class Translation:
    """A translated recipe: the tool it belongs to, YAML text, and the given variables that had an effect."""

    tool: str
    text: str
    used: frozenset[str]


def translate(source: str | Path | Mapping[str, Any] | list[Any], request: Request) -> Translation:
    """Return the translation of a file or of a config as plain data. See `rarefy.migrate`."""
    root, path = _read(source, request.block)
    try:
        config = _config(root, request.skip)
        if config is None:
            return _recipe(root, path, request)
        if request.variables and not request.lenient:
            raise RecipeError(f"variables have no effect on a config of {config[0]} [{root.where}]")
        return Translation(config[0], config[1].to_yaml(), frozenset())
    except ArithmeticError as error:
        raise RecipeError(f"a number is too large to compute with: {error}") from None


def _read(source: Any, block: int | None) -> tuple[Node, Path | None]:
    """Return the data of a source, and its file if it is one."""
    if isinstance(source, Mapping | list | tuple):
        return Node.of(plain_data(source), "config"), None
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(f"expected a recipe as a file, a dict or a list, got {type(source).__name__}")
    path = Path(source)
    text = read_file(path)
    if path.suffix == ".json":
        try:
            return Node.of(plain_data(json.loads(text)), path.name), path
        except (ValueError, RecursionError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"{path.name}: not JSON: {error}") from None
    return Node.of_yaml(choose(find_recipes(text, path.name), block, path.name).text, path.name), path


def plain_data(value: Any, depth: int = 0) -> Any:
    """Return a copy as plain data; RecipeError for anything else."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"the config is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {str(k): plain_data(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(v, depth + 1) for v in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise RecipeError(f"expected text, numbers, lists and dicts in a config, got {type(value).__name__}")


def _config(root: Node, skip: bool) -> tuple[str, Draft] | None:
    """Return (tool, draft) of a config; None for a recipe, which is a mapping."""
    value = root.value
    if isinstance(value, list) and value and all(isinstance(n.value, dict) and "tensor_fqn" in n.value for n in value):
        draft = Draft("a config of torch.ao.pruning")
        nncf_neural_compressor.ao(draft, NONE.computed(root))
        return "torch.ao.pruning", draft
    if not isinstance(value, dict):
        raise RecipeError(f"not a recipe or config of a known tool: {KNOWN} [{root.where}]")
    if "compression" in value:
        draft = Draft("a config of NNCF")
        nncf_neural_compressor.nncf(draft, NONE.computed(root), skip)
        return "nncf", draft
    if {"pruning_configs", "target_sparsity", "pruning_type"} & set(value):
        draft = Draft("a WeightPruningConfig of Neural Compressor")
        nncf_neural_compressor.inc(draft, NONE.computed(root))
        return "neural-compressor", draft
    return None


def _recipe(root: Node, path: Path | None, request: Request) -> Translation:
    """Translate a recipe of SparseML or llm-compressor."""
    if isinstance(root.value.get("stages", Node(None, "")).value, list):
        raise RecipeError(f"this is a recipe of Rarefy already: run it with rarefy compress --recipe [{root.where}]")
    if not any("modifiers" in key for key in _keys(root)):
        keys = [key[:40] for key in _keys(root)][:20]
        typos = [f" (did you mean {near[0]!r} by {key!r}?)" for key in keys if (near := nearest(key, ("modifiers",)))]
        hint = typos[0] if typos else ""
        raise RecipeError(f"neither modifiers nor a config of a known tool{hint}: {KNOWN} [{root.where}]")
    overrides = plain_data(request.variables)
    variables = resolve(root, overrides, path)
    if not request.lenient:
        check_used(overrides, variables.used, root)
    tagged, named = list(_tagged(root, variables)), list(_named(root, variables))
    if tagged and named:
        raise RecipeError(
            f"{named[0].name} has no tag, but other modifiers have one: two kinds of recipe [{named[0].where}]"
        )
    if not tagged and not named:
        raise RecipeError(
            f"no modifiers below the keys that end in modifiers: such as - !GMPruningModifier [{root.where}]"
        )
    is_legacy = bool(tagged) and not any(m.name in ONE_SHOT for m in tagged)
    draft = Draft("a recipe of SparseML" if is_legacy else "a recipe of SparseML or llm-compressor")
    draft.remarks += [*root.remarks, *variables.remarks]
    (sparseml if is_legacy else llm_compressor).convert(draft, tagged or named, request.skip)
    return Translation("sparseml" if is_legacy else "llm-compressor", draft.to_yaml(), variables.used)


KNOWN = (
    "SparseML and llm-compressor have keys that end in modifiers, NNCF has compression, Neural Compressor has "
    "pruning_configs, torch.ao.pruning a list with tensor_fqn"
)


def _keys(root: Node) -> Iterator[str]:
    """Yield the keys of a recipe and of its stages."""
    for key, node in root.value.items():
        yield key
        if isinstance(node.value, dict):
            yield from node.value


def _current(name: str) -> str:
    """Return the later name of a modifier."""
    return RENAMED.get(name, name)


def _tagged(root: Node, variables: Variables) -> Iterator[Modifier]:
    """Yield the modifiers of legacy recipes: lists of tagged settings under keys that contain `modifiers`."""
    for key, node in root.value.items():
        inner = node.value
        if "modifiers" in key and isinstance(inner, list):
            for item in inner:
                names = list(item.value) if isinstance(item.value, dict) else []
                if len(names) != 1 or not names[0].startswith("!"):
                    raise RecipeError(f"{key} is a list of modifiers such as - !GMPruningModifier [{item.where}]")
                settings = item.value[names[0]]
                if not isinstance(settings.value, dict):
                    raise RecipeError(f"{names[0]} is followed by its settings [{settings.where}]")
                name = names[0].lstrip("!").rpartition(".")[2]
                yield Modifier(_current(name), variables.computed(settings), item.where)
        elif isinstance(inner, dict) and any("modifiers" in k and isinstance(v.value, list) for k, v in inner.items()):
            yield from _tagged(node, variables)


def _named(root: Node, variables: Variables, run: str = "", stage: str = "") -> Iterator[Modifier]:
    """Yield the modifiers of later recipes: settings by name under keys that end in `modifiers`, in stages or not."""
    for key, node in root.value.items():
        inner = node.value
        if key.endswith("modifiers") and isinstance(inner, dict):
            for name, settings in inner.items():
                content = {} if settings.value is None else settings.value
                if not isinstance(content, dict):
                    raise RecipeError(f"{name} has settings, as keys and values [{settings.where}]")
                values = variables.computed(Node(content, settings.where))
                yield Modifier(_current(name), values, settings.where, run, stage)
        elif isinstance(inner, dict) and (key.endswith("_stage") or any(k.endswith("modifiers") for k in inner)):
            kind = inner.get("run_type")
            yield from _named(node, variables, str(kind.value) if kind is not None else run, key)
