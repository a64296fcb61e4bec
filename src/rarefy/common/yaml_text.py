"""YAML 1.2 text as plain data with line numbers: strings, numbers, booleans, null, lists and mappings only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
)
from ruamel.yaml.nodes import ScalarNode

from rarefy.common.errors import RecipeError

MAX_CHARACTERS = 1 << 16
MAX_VALUES = 10_000  # the parser reads so many in half a second; aliases count as often as they repeat a value
MAX_DEPTH = 16
TYPED = ("int", "float", "bool", "null")  # what plain scalars may be besides strings; dates stay strings

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """Plain data, and the line (from 1) of every value by its path of keys and indices."""

    name: str
    data: Any
    lines: Mapping[Path, int]
    remarks: tuple[str, ...] = ()  # on values that do not count, such as those of keys that are written twice

    def place(self, path: Path) -> str:
        """Return where a value is written, or the nearest value around it."""
        path = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines or n == 0)
        return f"{self.name} line {self.lines[path]}" if path in self.lines else self.name


def read_yaml(text: str, name: str, foreign: bool = False) -> Document:
    """Return YAML text as data with line numbers. Nothing in the text is run, and its size and depth are bounded.

    Args:
        text: the text of a recipe.
        name: what errors call it.
        foreign: read recipes of other tools as those read them: a tag (`!GMPruningModifier`) becomes a key, aliases and
            merge keys are replaced by what they repeat, and of a key that is written twice the last value counts.

    Raises:
        RecipeError: naming the line, for text that is not YAML or too large, for tags that name types, and, unless
            `foreign`, for aliases, all tags and duplicate keys.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{name} is {len(text):,} characters long; a recipe has at most {MAX_CHARACTERS:,}")
    builder = _Builder(YAML(typ="safe", pure=True).parse(text), name, foreign)
    try:
        data = builder.document()
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise RecipeError(f"{name} line {line}: not YAML: {error.problem}{hint}") from None
    except (YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None
    return Document(name, data, builder.lines, tuple(builder.remarks))


class _Builder:
    """Converts the events of a parser to plain data in one pass, and records the line of each value."""

    def __init__(self, events: Iterable[Any], name: str, foreign: bool):
        self.events: Iterator[Any] = iter(events)
        self.name, self.foreign = name, foreign
        self.lines: dict[Path, int] = {}
        self.remarks: list[str] = []
        self.anchors: dict[str, tuple[Any, int]] = {}  # what an alias repeats, and the number of values in it
        self.count, self.depth = 0, 0
        self.yaml = YAML(typ="safe", pure=True)

    def document(self) -> Any:
        """Return the data of the only document of the text."""
        data, count = None, 0
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                count += 1
                if count > 1:
                    raise RecipeError(f"{self._place(event)}: not YAML: but found another document")
            elif isinstance(event, NodeEvent):
                data = self._value(event, ())
        if not count:
            raise RecipeError(f"{self.name} is empty; a recipe has at least stages")
        return data

    def _place(self, event: Any) -> str:
        return f"{self.name} line {event.start_mark.line + 1 if event.start_mark else 1}"

    def _value(self, event: Any, path: Path, line: int | None = None) -> Any:
        """Return the data of the node that starts with an event, and note the lines of what is in it."""
        self.lines[path] = line or event.start_mark.line + 1
        before = self.count
        self._spend(1, event)
        if isinstance(event, AliasEvent):
            return self._repeated(event)
        anchor = event.anchor
        if anchor:
            self.anchors[anchor] = (None, -1)  # not yet complete: an alias to it would be a cycle
        tag = self._tag(event)
        data = self._untagged(event, path) if tag is None else {tag: self._settings(event, (*path, tag), tag)}
        if anchor:
            self.anchors[anchor] = (data, self.count - before)
        return data

    def _spend(self, count: int, event: Any) -> None:
        self.count += count
        if self.count > MAX_VALUES:
            raise RecipeError(f"{self._place(event)}: more than {MAX_VALUES:,} values, aliases (*name) written out")

    def _repeated(self, event: Any) -> Any:
        """Return what an alias stands for: the same object, counted once more."""
        place = self._place(event)
        if not self.foreign:
            raise RecipeError(f"{place}: aliases (*name) are not part of a recipe: write the value out")
        if event.anchor not in self.anchors:
            raise RecipeError(f"{place}: *{event.anchor} repeats nothing: no value before it has &{event.anchor}")
        data, count = self.anchors[event.anchor]
        if count < 0:
            raise RecipeError(f"{place}: *{event.anchor} is part of the value that it repeats")
        self._spend(count, event)
        return data

    def _tag(self, event: Any) -> str | None:
        tag: str | None = getattr(event, "tag", None)
        if tag is not None and not (self.foreign and tag.startswith("!")):
            place = self._place(event)
            raise RecipeError(f"{place}: tag {tag!r} is not part of a recipe: only strings, numbers and lists")
        return tag

    def _settings(self, event: Any, path: Path, tag: str) -> Any:
        """Return the mapping after a tag."""
        if isinstance(event, MappingStartEvent):
            self.lines[path] = event.start_mark.line + 1
            return self._untagged(event, path)
        if isinstance(event, ScalarEvent) and not event.value:
            return {}
        raise RecipeError(f"{self._place(event)}: expected the settings of {tag} as keys and values")

    def _untagged(self, event: Any, path: Path) -> Any:
        if isinstance(event, ScalarEvent):
            return self._scalar(event)
        self.depth += isinstance(event, CollectionStartEvent)
        if self.depth > MAX_DEPTH:
            raise RecipeError(f"{self._place(event)}: nested deeper than a recipe may be ({MAX_DEPTH})")
        data = self._mapping(path) if isinstance(event, MappingStartEvent) else self._list(path)
        self.depth -= 1
        return data

    def _scalar(self, event: Any) -> Any:
        tag = str(self.yaml.resolver.resolve(ScalarNode, event.value, event.implicit))
        if tag.rpartition(":")[2] not in TYPED:
            return event.value
        try:
            return self.yaml.constructor.construct_object(ScalarNode(tag, event.value, event.start_mark))
        except (ValueError, OverflowError):  # a number of thousands of digits
            text = f"{event.value[:60]!r} is not a number that can be read"
            raise RecipeError(f"{self._place(event)}: {text}") from None

    def _list(self, path: Path) -> list[Any]:
        data: list[Any] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            data.append(self._value(event, (*path, len(data))))
        return data

    def _mapping(self, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: list[Any] = []
        while not isinstance(key := next(self.events), MappingEndEvent):
            if not isinstance(key, ScalarEvent):
                raise RecipeError(f"{self._place(key)}: expected a string as key")
            self._tag(key)
            if key.anchor:
                self.anchors[key.anchor] = (key.value, 1)
            line = key.start_mark.line + 1
            repeated = key.value in data
            if repeated and not self.foreign:
                raise RecipeError(f"{self._place(key)}: duplicate key {key.value!r}")
            old = data.get(key.value)
            value = self._value(next(self.events), (*path, key.value), line)
            if self.foreign and key.value == "<<" and key.style is None:
                merged += value if isinstance(value, list) else [value]
                self._check_merged(merged, key)
                continue
            data[key.value] = value
            if repeated and value != old:
                self.remarks.append(f"line {line}: {key.value} is written twice; the last value counts")
        for other in merged:  # keys of the mapping itself go first
            data = {**(next(iter(other.values())) if _is_tagged(other) else other), **data}
        return data

    def _check_merged(self, merged: list[Any], key: Any) -> None:
        if not all(isinstance(m, dict) for m in merged):
            raise RecipeError(f"{self._place(key)}: << merges keys and values, got {merged[-1]!r:.60}")


def _is_tagged(data: Mapping[str, Any]) -> bool:
    return len(data) == 1 and next(iter(data)).startswith("!")


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
