"""Translate a recipe or config of another tool to YAML, with a comment wherever its meaning changes.

Reads SparseML's recipes (YAML or Markdown, legacy tags, stages, variables and arithmetic), llm-compressor's, NNCF's
before version 3, Neural Compressor's `WeightPruningConfig` and configs of torch.ao.pruning. Files
are data: no code in them is run. They have at most 64 KiB.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rarefy.common.errors import RecipeError
from rarefy.migration import llm_compressor, nncf_neural_compressor, sparseml
from rarefy.migration.located_node import Node
from rarefy.migration.recipe_draft import Draft, Modifier
from rarefy.migration.safe_arithmetic import compute

MAX_LENGTH = 64 << 10  # characters of a file
FRONT = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)  # of Markdown
FORMULA = re.compile(r"(?:eval|calc)\((.*)\)$", re.DOTALL)
POWER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")  # a number that YAML 1.1 reads as a word


def translate(source: str | Path | Mapping[str, Any] | list[Any], skip: bool) -> tuple[str, str]:
    """Return (tool, YAML text) for a file or a config as plain data. See `rarefy.migrate`."""
    try:
        tool, draft = _convert(_read(source), skip)
        return tool, draft.to_yaml()
    except ArithmeticError as error:
        raise RecipeError(f"a number is too large to compute with: {error}") from None


def _read(source: Any) -> Node:
    if isinstance(source, Mapping | list | tuple):
        return Node.of(_data(source), "config")
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(f"expected a recipe as a file, a dict or a list, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"no file {str(path)!r}: give a recipe or a config of another tool")
    size = path.stat().st_size
    if size > 4 * MAX_LENGTH:
        raise RecipeError(f"{path.name} has {size:,} bytes; a recipe has at most {MAX_LENGTH:,} characters")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path.name}: a recipe is UTF-8 text") from None
    if len(text) > MAX_LENGTH:
        raise RecipeError(f"{path.name} has {len(text):,} characters; a recipe has at most {MAX_LENGTH:,}")
    if path.suffix == ".json":
        try:
            return Node.of(json.loads(text), path.name)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path.name}: not JSON: {error}") from None
    front = FRONT.match(text)
    if front:
        text = "\n" * text[: front.start(1)].count("\n") + front[1]  # so that lines keep their numbers
    elif path.suffix in (".md", ".markdown"):
        raise RecipeError(f"{path.name}: a Markdown recipe begins with YAML between two lines of ---")
    return Node.of_yaml(text, path.name)


def _data(value: Any, depth: int = 0) -> Any:
    """Return a copy as plain data; RecipeError for anything else."""
    if depth > 16:
        raise RecipeError("the config is nested more than 16 levels deep")
    if isinstance(value, Mapping):
        return {str(k): _data(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_data(v, depth + 1) for v in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise RecipeError(f"expected text, numbers, lists and dicts in a config, got {type(value).__name__}")


def _convert(root: Node, skip: bool) -> tuple[str, Draft]:
    value = root.value
    if isinstance(value, list) and value and all(isinstance(n.value, dict) and "tensor_fqn" in n.value for n in value):
        draft = Draft("a config of torch.ao.pruning")
        nncf_neural_compressor.ao(draft, _plain(root))
        return "torch.ao.pruning", draft
    if isinstance(value, dict) and "compression" in value:
        draft = Draft("a config of NNCF")
        nncf_neural_compressor.nncf(draft, _plain(root), skip)
        return "nncf", draft
    if isinstance(value, dict) and {"pruning_configs", "target_sparsity", "pruning_type"} & set(value):
        draft = Draft("a WeightPruningConfig of Neural Compressor")
        nncf_neural_compressor.inc(draft, _plain(root))
        return "neural-compressor", draft
    if not isinstance(value, dict):
        raise RecipeError(f"not a recipe or config of a known tool: {KNOWN} [{root.where}]")
    names = _variables(root)
    legacy, later = list(_tagged(root, names)), list(_named(root, names))
    if legacy and later:
        raise RecipeError(
            f"{later[0].name} has no tag, but other modifiers have one: two kinds of recipe [{later[0].where}]"
        )
    if not legacy and not later:
        raise RecipeError(f"neither modifiers nor a config of a known tool: {KNOWN} [{root.where}]")
    draft = Draft("a recipe of SparseML" if legacy else "a recipe of SparseML or llm-compressor")
    (sparseml if legacy else llm_compressor).convert(draft, legacy or later, skip)
    return "sparseml" if legacy else "llm-compressor", draft


KNOWN = (
    "SparseML and llm-compressor have keys that end in modifiers, NNCF has compression, Neural Compressor has "
    "pruning_configs, torch.ao.pruning a list with tensor_fqn"
)


def _variables(root: Node) -> Mapping[str, float]:
    """Return the numeric variables of a recipe and its stages, computed ones included."""
    variables: dict[str, Node] = {}
    for name, node in root.value.items():
        if name.endswith("_stage") and isinstance(node.value, dict):
            variables |= {k: v for k, v in node.value.items() if not isinstance(v.value, dict | list)}
        elif not isinstance(node.value, dict | list):
            variables[name] = node
    values = {k: _computed(n, {}) for k, n in variables.items() if not FORMULA.match(str(n.value).strip())}
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    formulas = {
        k: (m[1], n.where)
        for k, n in variables.items()
        if isinstance(n.value, str) and (m := FORMULA.match(n.value.strip()))
    }
    for _ in range(len(formulas)):  # each round computes at least one, or a cycle is left
        for name, (text, where) in list(formulas.items()):
            if not {w for w in re.findall(r"[A-Za-z_]\w*", text)} & set(formulas):
                numbers[name] = compute(text, numbers, where)
                del formulas[name]
    if formulas:
        name, (text, where) = next(iter(formulas.items()))
        raise RecipeError(f"{name} depends on itself: {text[:60]} [{where}]")
    return numbers


def _tagged(root: Node, names: Mapping[str, float]) -> Iterator[Modifier]:
    """Yield the modifiers of legacy recipes: lists of tagged settings under keys that contain `modifiers`."""
    for key, node in root.value.items():
        inner = node.value
        if "modifiers" in key and isinstance(inner, list):
            for item in inner:
                if (
                    not isinstance(item.value, dict)
                    or len(item.value) != 1
                    or not next(iter(item.value)).startswith("!")
                ):
                    raise RecipeError(f"{key} is a list of modifiers such as - !GMPruningModifier [{item.where}]")
                [(tag, settings)] = item.value.items()
                if not isinstance(settings.value, dict):
                    raise RecipeError(f"{tag} is followed by its settings [{settings.where}]")
                yield Modifier(tag.lstrip("!").rpartition(".")[2], _computed(settings, names), item.where)
        elif isinstance(inner, dict) and any("modifiers" in k and isinstance(v.value, list) for k, v in inner.items()):
            yield from _tagged(node, names)


def _named(root: Node, names: Mapping[str, float], run: str = "") -> Iterator[Modifier]:
    """Yield the modifiers of later recipes: settings by name under keys that end in `modifiers`, in stages or not."""
    for key, node in root.value.items():
        inner = node.value
        if key.endswith("modifiers") and isinstance(inner, dict):
            for name, settings in inner.items():
                content = {} if settings.value is None else settings.value
                if not isinstance(content, dict):
                    raise RecipeError(f"{name} has settings, as keys and values [{settings.where}]")
                yield Modifier(name, _computed(Node(content, settings.where), names), settings.where, run)
        elif isinstance(inner, dict) and (key.endswith("_stage") or any(k.endswith("modifiers") for k in inner)):
            kind = inner.get("run_type")
            yield from _named(node, names, str(kind.value) if kind is not None else run)


def _computed(node: Node, names: Mapping[str, float]) -> Any:
    """Return plain data with formulas computed and variables replaced."""
    if isinstance(node.value, dict):
        return {k: _computed(v, names) for k, v in node.value.items()}
    if isinstance(node.value, list):
        return [_computed(v, names) for v in node.value]
    if isinstance(node.value, str):
        text = node.value.strip()
        formula = FORMULA.match(text)
        if formula:
            return compute(formula[1], names, node.where)
        if text.startswith("$") and text[1:] in names:
            return names[text[1:]]
        if POWER.match(text):
            return float(text)
    return node.value


def _plain(node: Node) -> Any:
    return _computed(node, {})
