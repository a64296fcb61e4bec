"""YAML text or plain data -> values that know where they were written. Only words, numbers, lists and keys; no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from rarefy.common.errors import RecipeError

SIZE_LIMIT = 1 << 20
DEPTH_LIMIT = 16  # the parser's time is quadratic in the depth


@dataclass(frozen=True)
class Node:
    """A value and where it was written."""

    value: Any  # scalar, list of Node, or dict of str -> Node
    where: str

    @classmethod
    def of(cls, value: Any, where: str) -> Node:
        if isinstance(value, Mapping):
            return cls({str(k): cls.of(v, f"{where}.{k}") for k, v in value.items()}, where)
        if isinstance(value, list | tuple):
            return cls([cls.of(v, f"{where}[{i}]") for i, v in enumerate(value)], where)
        return cls(value, where)


_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def _from_node(node: yaml.Node, name: str, tags: bool = False) -> Node:
    where = f"{name}, line {node.start_mark.line + 1}"
    if tags and node.tag.startswith("!"):
        tag, node.tag = node.tag, _PLAIN_TAGS[0]
        if isinstance(node, yaml.ScalarNode) and not node.value:
            return Node({tag: Node({}, where)}, where)
        if isinstance(node, yaml.MappingNode):
            return Node({tag: _from_node(node, name, tags)}, where)
        raise RecipeError(f"{tag} is followed by its settings, as keys and values [{where}]")
    foreign = RecipeError(f"tag {node.tag!r} is not part of a recipe: only words, numbers and lists [{where}]")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
        raise foreign
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Node] = {}
        for key, value in node.value:
            line = f"{name}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"a key is a word [{line}]")
            if key.value in found:
                raise RecipeError(f"key {key.value!r} is given twice [{line}]")
            inner = _from_node(value, name, tags)
            found[key.value] = Node(inner.value, line)
        return Node(found, where)
    if isinstance(node, yaml.SequenceNode):
        return Node([_from_node(n, name, tags) for n in node.value], where)
    try:
        if node.tag.endswith(":int") and ":" in node.value:  # YAML 1.1 reads 2:4 as a number to base 60
            return Node(node.value, where)
        return Node(yaml.SafeLoader("").construct_object(node), where)
    except yaml.YAMLError:
        raise foreign from None
    except (ValueError, LookupError, AttributeError, OverflowError) as error:  # `!!int x`, 2024-99-99
        raise RecipeError(f"{node.value[:60]!r} is no {node.tag.rpartition(':')[2]}: {error} [{where}]") from None


def parse(text: str, name: str, foreign: bool = False) -> Node:
    """Return the root of YAML text; RecipeError names the line. `name` is what errors call the text. With `foreign` a
    tag of its own (`!GMPruningModifier`) is read as a key, and single values may be referred to by `*name`.
    """
    if len(text) > SIZE_LIMIT:
        raise RecipeError(f"{name} is {len(text):,} characters long; a recipe has at most {SIZE_LIMIT:,}")
    try:
        depth, single = 0, set()
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent):
                single.add(event.anchor)
            elif isinstance(event, yaml.CollectionStartEvent):
                single.discard(event.anchor)  # what a name means last is what it is
            if isinstance(event, yaml.AliasEvent) and not (foreign and event.anchor in single):
                raise RecipeError(f"{name}: aliases (*name) are not part of a recipe: write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH_LIMIT:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise RecipeError(f"{name}, line {line}: nested deeper than a recipe goes ({DEPTH_LIMIT})")
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise RecipeError(f"{name}, line {line}: not YAML: {error.problem}{hint}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{name}: not YAML: {error}") from None
    if root is None:
        raise RecipeError(f"{name} is empty; a recipe has at least stages")
    return _from_node(root, name, foreign)


def unwrap(node: Node) -> Any:
    """Return plain data."""
    if isinstance(node.value, dict):
        return {k: unwrap(v) for k, v in node.value.items()}
    return [unwrap(v) for v in node.value] if isinstance(node.value, list) else node.value


def plain(value: Any) -> Any:
    """Return mappings as dicts and tuples as lists, all the way down."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def show(value: Any) -> str:
    """Return a value as errors show it."""
    if isinstance(value, dict):
        return f"keys {', '.join(value)}"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)
