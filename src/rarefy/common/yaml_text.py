"""YAML 1.2 text as plain data with line numbers: strings, numbers, booleans, null, lists and mappings only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from rarefy.common.errors import RecipeError

MAX_CHARACTERS = 1 << 16  # the parser takes seconds for so many
MAX_DEPTH = 16  # its time grows with the square of the depth
TYPED = ("int", "float", "bool", "null")  # what plain scalars may be besides strings; dates stay strings

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """Plain data, and the line (from 1) of every value by its path of keys and indices."""

    name: str
    data: Any
    lines: Mapping[Path, int]

    def place(self, path: Path) -> str:
        """Return where a value is written, or the nearest value around it."""
        path = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines or n == 0)
        return f"{self.name} line {self.lines[path]}" if path in self.lines else self.name


def read_yaml(text: str, name: str, tags: bool = False) -> Document:
    """Return YAML text as data with line numbers. Nothing in the text is run, and its size and depth are bounded.

    Args:
        text: the text of a recipe.
        name: what errors call it.
        tags: read recipes of other tools: a tag (`!GMPruningModifier`) becomes a key, aliases of scalars are allowed.

    Raises:
        RecipeError: naming the line, for text that is not YAML, and for aliases, tags, duplicate keys and deep nesting.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{name} is {len(text):,} characters long; a recipe has at most {MAX_CHARACTERS:,}")
    try:
        _check_events(YAML(typ="safe", pure=True).parse(text), name, tags)
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise RecipeError(f"{name} line {line}: not YAML: {error.problem}{hint}") from None
    except (YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None
    if root is None:
        raise RecipeError(f"{name} is empty; a recipe has at least stages")
    builder = _Builder(name)
    return Document(name, builder.data(root, ()), builder.lines)


def _check_events(events: Iterable[Any], name: str, tags: bool) -> None:
    """Raise RecipeError for aliases, deep nesting and unknown tags, before any data is built."""
    depth, scalars = 0, set[str | None]()
    for event in events:
        place = f"{name} line {event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, AliasEvent) and not (tags and event.anchor in scalars):
            raise RecipeError(f"{place}: aliases (*name) are not part of a recipe: write the value out")
        if isinstance(event, ScalarEvent):
            scalars.add(event.anchor)
        elif isinstance(event, CollectionStartEvent):
            scalars.discard(event.anchor)  # the last definition of an anchor counts
        if isinstance(event, NodeEvent) and not isinstance(event, AliasEvent):
            tag = getattr(event, "tag", None)
            if tag is not None and not (tags and tag.startswith("!")):
                raise RecipeError(f"{place}: tag {tag!r} is not part of a recipe: only strings, numbers and lists")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{place}: nested deeper than a recipe may be ({MAX_DEPTH})")


class _Builder:
    """Converts YAML nodes to plain data and records the line of each value."""

    def __init__(self, name: str):
        self.name = name
        self.lines: dict[Path, int] = {}
        self.constructor = YAML(typ="safe", pure=True).constructor

    def data(self, node: Node, path: Path, line: int | None = None) -> Any:
        """Return the plain data of a node, and note the lines of what is in it."""
        self.lines[path] = line or node.start_mark.line + 1
        if node.tag.startswith("!"):
            return self._tagged(node, path)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.data(item, (*path, i)) for i, item in enumerate(node.value)]
        if node.tag.rpartition(":")[2] not in TYPED:
            return node.value
        try:
            return self.constructor.construct_object(node)
        except (ValueError, OverflowError):  # a number of thousands of digits
            text = f"{node.value[:60]!r} is not a number that can be read"
            raise RecipeError(f"{self.name} line {node.start_mark.line + 1}: {text}") from None

    def _tagged(self, node: Node, path: Path) -> dict[str, Any]:
        tag, node.tag = node.tag, "tag:yaml.org,2002:map"
        if not isinstance(node, MappingNode) and node.value:
            place = f"{self.name} line {node.start_mark.line + 1}"
            raise RecipeError(f"{place}: expected the settings of {tag} as keys and values")
        inner = self.data(node, (*path, tag)) if isinstance(node, MappingNode) else {}
        return {tag: inner}

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            place = f"{self.name} line {key.start_mark.line + 1}"
            if not isinstance(key, ScalarNode):
                raise RecipeError(f"{place}: expected a string as key")
            if key.value in data:
                raise RecipeError(f"{place}: duplicate key {key.value!r}")
            data[key.value] = self.data(value, (*path, key.value), key.start_mark.line + 1)
        return data


def write_yaml(data: Any, width: int = 110) -> str:
    """Return plain data as YAML text, keys in their order.

    >>> write_yaml({"stages": [{"prune": {"pattern": "2:4", "layers": None}}]})
    'stages:\\n- prune:\\n    pattern: 2:4\\n    layers: null\\n'
    """
    writer, stream = YAML(typ="safe", pure=True), StringIO()
    writer.width, writer.default_flow_style = width, False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(data, stream)
    return stream.getvalue()


def plain(value: Any) -> Any:
    """Return mappings as dicts with string keys and tuples as lists, all the way down."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
