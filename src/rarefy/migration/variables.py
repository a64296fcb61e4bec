"""Variables of another tool's recipe: defined in it, given by the caller, or found in a file of the same folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.common.errors import RecipeError, nearest, unknown
from rarefy.common.yaml_text import read_yaml
from rarefy.migration.located_node import Node
from rarefy.migration.recipe_text import MAX_BYTES, read_file
from rarefy.migration.safe_arithmetic import compute, names_in

FORMULA = re.compile(r"(?:eval|calc)\((.*)\)$", re.DOTALL)
POWER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")  # a number that YAML 1.1 reads as a word
MAX_FILES = 50  # of a folder that are searched for variables
NO_VARIABLES = ("version", "run_type")
ARGUMENTS = "recipe_args"  # the key of variables in a training config


@dataclass(frozen=True)
class Variables:
    """The values of variables by name, remarks on where they come from, and the given ones that were of use."""

    values: Mapping[str, Any]
    remarks: tuple[str, ...] = ()
    used: frozenset[str] = frozenset()

    def computed(self, node: Node) -> Any:
        """Return a value as plain data, with formulas computed and variables replaced."""
        return _computed(node, self.values)


NONE = Variables({})


def resolve(root: Node, overrides: Mapping[str, Any], beside: Path | None) -> Variables:
    """Return the variables of a recipe and its stages, computed ones included.

    Args:
        root: the recipe, a mapping.
        overrides: values that replace or add to those of the recipe.
        beside: the recipe's file; missing variables are looked up in the files of its folder.

    Raises:
        RecipeError: for a variable without a value, saying how to give it; for formulas that are no arithmetic.
    """
    nodes = dict(_declared(root))
    declared, missing = tuple(nodes), dict[str, str]()
    for text, where in _formulas(root):
        missing |= {name: where for name in sorted(names_in(text)) if name not in nodes and name not in missing}
    used = frozenset(name for name in overrides if name in nodes or name in missing)
    remarks = [f"{name} = {_short(overrides[name])} was given" for name in overrides if name in used]
    nodes |= {name: Node.of(overrides[name], f"variable {name}") for name in used}
    missing = {name: where for name, where in missing.items() if name not in overrides}
    if missing and beside is not None:
        for name, (node, value) in _in_folder(beside, tuple(missing)).items():
            nodes[name] = node
            remarks.append(f"{name} = {_short(value)} is from {node.where}")
            del missing[name]
    if missing:
        raise RecipeError(_missing_text(missing, (*declared, *(n for n in overrides if n not in used))))
    return Variables(_values(nodes), tuple(remarks), used)


def check_used(overrides: Mapping[str, Any], used: frozenset[str], root: Node) -> None:
    """Raise RecipeError for a given variable that a recipe neither defines nor needs."""
    names = dict.fromkeys([*dict(_declared(root)), *(n for text, _ in _formulas(root) for n in sorted(names_in(text)))])
    for name in overrides:
        if name not in used and not names:
            raise RecipeError(f"variable {name!r} has no effect: the recipe has no variables [{root.where}]")
        if name not in used:
            raise RecipeError(unknown("variable", name, names, root.where))


def _missing_text(missing: Mapping[str, str], known: tuple[str, ...]) -> str:
    """Return the error for variables without a value."""
    names = list(missing)
    near = nearest(names[0], known)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    subject = f"variable {names[0]!r} has" if len(names) == 1 else f"variables {', '.join(map(repr, names))} have"
    python = ", ".join(f"{name!r}: VALUE" for name in names)
    shell = " ".join(f"--set {name}=VALUE" for name in names)
    return (
        f"{subject} no value{hint}: pass variables={{{python}}} (shell: pass {shell}), or write {names[0]}: VALUE in a "
        f"YAML or JSON file of the same folder [{missing[names[0]]}]"
    )


def _declared(root: Node) -> Iterator[tuple[str, Node]]:
    """Yield the variables that a recipe and its stages define: keys with a scalar or a list, but no modifiers."""
    for name, node in root.value.items():
        if isinstance(node.value, dict):
            if name.endswith("_stage"):
                yield from _declared(node)
        elif "modifiers" not in name and name not in NO_VARIABLES:
            yield name, node


def _formulas(node: Node) -> Iterator[tuple[str, str]]:
    """Yield (expression, place) of all formulas in a recipe."""
    if isinstance(node.value, dict | list):
        for inner in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from _formulas(inner)
    elif isinstance(node.value, str) and (match := FORMULA.match(node.value.strip())):
        yield match[1], node.where


def _values(nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Return the values of variables; a formula may use other variables, in any order."""
    values: dict[str, Any] = {}
    formulas: dict[str, tuple[str, str]] = {}
    lists: list[str] = []  # with formulas in them
    for name, node in nodes.items():
        match = FORMULA.match(node.value.strip()) if isinstance(node.value, str) else None
        if match:
            formulas[name] = (match[1].strip(), node.where)
        elif next(_formulas(node), None):
            lists.append(name)
        else:
            values[name] = _computed(node, {})
    while formulas:
        ready = [name for name, (text, _) in formulas.items() if not names_in(text) & set(formulas)]
        if not ready:
            name, (text, where) = next(iter(formulas.items()))
            raise RecipeError(f"{name} depends on itself: {text[:60]} [{where}]")
        for name in ready:
            text, where = formulas.pop(name)
            values[name] = values[text] if text in values else compute(text, values, where)
    return values | {name: _computed(nodes[name], values) for name in lists}


def _computed(node: Node, values: Mapping[str, Any]) -> Any:
    """Return plain data with formulas computed and variables replaced."""
    if isinstance(node.value, dict):
        return {k: _computed(v, values) for k, v in node.value.items()}
    if isinstance(node.value, list):
        return [_computed(v, values) for v in node.value]
    if isinstance(node.value, str):
        text = node.value.strip()
        formula = FORMULA.match(text)
        if formula:
            name = formula[1].strip()  # of a word or a list, say
            return values[name] if name in values else compute(name, values, node.where)
        if text.startswith("$") and text[1:] in values:
            return values[text[1:]]
        if POWER.match(text):
            return float(text)
    return node.value


def _in_folder(recipe: Path, names: tuple[str, ...]) -> dict[str, tuple[Node, Any]]:
    """Return the variables of these names in the YAML and JSON files beside a recipe that are no recipes themselves.

    Raises RecipeError if files give different values.
    """
    definitions: dict[str, tuple[Node, Any]] = {}
    for path in _candidates(recipe):
        try:
            text = read_file(path)
            if not any(name in text for name in names):
                continue
            root = Node.of(json.loads(text), path.name) if path.suffix == ".json" else Node.of_yaml(text, path.name)
        except (RecursionError, ValueError):  # not a file of variables
            continue
        for name, node in _flat(root):
            if name not in names:
                continue
            value = _computed(node, {})
            if name in definitions and definitions[name][1] != value:
                first, other = definitions[name][0].where, node.where
                raise RecipeError(
                    f"{name} is {_short(definitions[name][1])} in {first} and {_short(value)} in {other}: pass "
                    f"variables={{{name!r}: VALUE}} (shell: pass --set {name}=VALUE)"
                )
            definitions.setdefault(name, (node, value))
    return definitions


def _candidates(recipe: Path) -> Iterator[Path]:
    files = (p for p in recipe.parent.iterdir() if p.suffix in (".yaml", ".yml", ".json"))
    for path in sorted(files)[:MAX_FILES]:
        if path.is_file() and not path.samefile(recipe) and path.stat().st_size <= MAX_BYTES:
            yield path


def _flat(root: Node) -> Iterator[tuple[str, Node]]:
    """Yield the variables that a file defines, unless it is a recipe: keys with a scalar or a list, and recipe_args."""
    keys = root.value if isinstance(root.value, dict) else {}
    if any("modifiers" in k or k == "stages" or k.endswith("_stage") for k in keys):
        return
    arguments = keys.get(ARGUMENTS)
    inner = arguments.value if arguments is not None and isinstance(arguments.value, dict) else {}
    for name, node in {**keys, **inner}.items():
        if not isinstance(node.value, dict):
            yield name, node


def given_value(text: str, name: str) -> Any:
    """Return the value of a variable that the command line gives, as YAML reads it.

    >>> given_value("[1, 4]", "mask_type"), given_value("8e-5", "init_lr")
    ([1, 4], 8e-05)
    """
    return read_yaml(text, f"--set {name}").data if text.strip() else ""


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
