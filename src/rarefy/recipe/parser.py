"""Recipes as YAML, dicts and presets -> `Recipe`. Errors name the file, the line and the field."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rarefy.common.errors import RecipeError, nearest, unknown
from rarefy.common.options import Options, branches, dotted, expectation, problem_of, show
from rarefy.common.plain_file import read_text, usable_path
from rarefy.common.yaml_text import Document, plain, read_yaml
from rarefy.recipe.old_names import FIELDS
from rarefy.recipe.schema import STAGES, Recipe


def vocabulary() -> tuple[dict[str, str], ...]:
    """Return a row for each field of a recipe: its path, type, default and meaning."""
    root = Recipe.model_json_schema()
    rows: list[dict[str, str]] = []

    def add(place: str, schema: dict[str, Any]) -> None:
        """Add the fields of an object, or of the objects that one of them may be."""
        for name, field in schema["properties"].items():
            alternatives = branches(field, root)
            objects = [a for a in alternatives if "properties" in a]
            if len(objects) < len(alternatives):
                default = str(plain(field.get("default", ""))).lower().replace("none", "null")
                values = [a for a in alternatives if "properties" not in a]
                rows.append(
                    {
                        "where": f"{place}.{name}",
                        "what": expectation({"anyOf": values}, root),
                        "default": default,
                        "meaning": field.get("description", ""),
                    }
                )
            for inner in objects:
                method = inner["properties"].get("method", {}).get("const")
                add(f"{place}.{name}" + (f" ({method})" if method else ""), inner)

    for name, options in STAGES.items():
        add(name, root["$defs"][options.__name__])
    for name in ("data", "evaluate", "save"):
        add(name, branches(root["properties"][name], root)[0])
    return tuple(rows)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, by which editors complete and check them."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def folder() -> Path:
    """Return the folder of the recipes that ship with Rarefy."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "recipes"


def presets() -> dict[str, Path]:
    """Return {name: file} of the recipes that ship with Rarefy."""
    return {p.stem: p for p in sorted(folder().glob("*.yaml"))}


def load(source: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> Recipe:
    """Return a recipe.

    Args:
        source: the name of a preset, a YAML file, a dict, or a Recipe.
        **overrides: new values of fields, as `override` reads them.

    Raises:
        RecipeError: naming the file and line (or the path into the dict), what was expected and what was given.

    Example:
        >>> load({"stages": [{"prune": {"pattern": "2:4"}}]}).stages[0].pattern
        '2:4'
    """
    if isinstance(source, Recipe):
        recipe = source
    elif isinstance(source, Mapping):
        recipe = from_dict(source)
    else:
        recipe = _from_file(source)
    return override(recipe, overrides) if overrides else recipe


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of plain data."""
    return _validated(Document("recipe", plain(values), {}))


def from_yaml(text: str, name: str = "recipe") -> Recipe:
    """Return the recipe of YAML text; `name` is what errors call it."""
    return _validated(read_yaml(text, name))


def value(text: str, where: str) -> Any:
    """Return one value as a recipe would read it; a string may begin with a star, as globs do.

    >>> value("0.5", "--set"), value("2:4", "--set"), value("*.mlp.*", "--set")
    (0.5, '2:4', '*.mlp.*')
    """
    return text if text[:1] in ("", "*") else read_yaml(text, where).data


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with other values of fields.

    Args:
        recipe: the recipe, which stays as it is.
        changes: new values by field. `sparsity` replaces every value that is set; a field that is null everywhere is
            set wherever it exists. `prune.sparsity` replaces it in stages of this name only. `data.train` adds a data
            section where there is none.

    Raises:
        RecipeError: for a field that the recipe does not have, or a value that it cannot have.
    """
    values = recipe.to_dict()
    hints: list[str] = []
    added: dict[str, dict[str, Any]] = {}  # what the recipe lacks, by name
    for key, new in changes.items():
        if key in FIELDS:
            raise RecipeError(f"override: {key} is called {FIELDS[key]} now")
        blocks = list(_blocks(values))
        *parents, field = key.split(".")
        matches = [(p, b) for p, b in blocks if field in b and list(p[len(p) - len(parents) :]) == parents]
        if parents:  # `prune.sparsity` is that of a stage, not that of train.prune, unless there is only the latter
            matches = [(p, b) for p, b in matches if list(p) == parents] or matches
        if parents and not matches:
            path = ".".join(parents)
            outer = [b for _, b in blocks if b.get(parents[-1], ...) is None]
            if len(outer) == 1:
                added[path] = outer[0][parents[-1]] = {}
            if path in added:
                added[path][field] = new
                continue
        if not matches:
            names = {name for _, block in blocks for name in block}
            raise RecipeError(unknown("override", key, names, f"recipe {recipe.name}"))
        is_set = [(p, b) for p, b in matches if parents or b[field] is not None]
        if not is_set and len({p for p, _ in matches}) > 1:
            hints.append(f"{'.'.join([*matches[0][0], field])}={show(new)}")
        for _, block in is_set or matches:
            block[field] = new
    try:
        return from_dict(values)
    except RecipeError as error:
        if not hints:
            raise
        raise RecipeError(f"{error}; to set it in one stage, name the stage: {', '.join(hints)}") from None


def _from_file(source: Any) -> Recipe:
    if not isinstance(source, str | os.PathLike):
        stages = ": put stages into {'stages': [...]}" if isinstance(source, list | tuple | Options) else ""
        kinds = "the name of a preset, a YAML file, a dict or a Recipe"
        raise RecipeError(f"recipe: expected {kinds}, got {type(source).__name__}{stages}")
    if "\n" in str(source):
        raise RecipeError("recipe: expected the name of a file, got the YAML text itself: save it to a file")
    known = presets()
    path = known.get(str(source)) or usable_path(source, RecipeError)
    if not path.is_file():
        if path.is_dir():
            raise RecipeError(f"{str(source)!r} is a folder; a recipe is a YAML file or a preset ({', '.join(known)})")
        files = [str(path.with_name(p.name)) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = nearest(str(source), [*known, *files])
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"no recipe file {str(source)!r} and no preset of that name ({', '.join(known)}){hint}")
    try:
        return from_yaml(read_text(path, RecipeError), path.name)
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: a recipe is UTF-8 text") from None


def _validated(document: Document) -> Recipe:
    """Return the recipe of a document; RecipeError with the place of the first problem."""
    try:
        return Recipe.model_validate(document.data)
    except ValidationError as error:
        problem = problem_of(error, Recipe, document.data)
        path = problem.path
        text = problem.text
        if problem.unknown_field is not None:
            name, path = problem.unknown_field, path[:-1]
            text = f"{name} is called {FIELDS[name]} now" if name in FIELDS else text
        place = f"{document.place(problem.path)}: {dotted(path)}".removesuffix(": ")
        raise RecipeError(f"{place}: {text}") from None


def _blocks(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield each dict of nested data with the names that lead to it, stages without their list."""
    for item in values if isinstance(values, list) else ():
        yield from _blocks(item)
    if isinstance(values, dict):
        yield path, values
        for name, item in values.items():
            yield from _blocks(item, (*path, name))
