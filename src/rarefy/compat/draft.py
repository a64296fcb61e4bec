"""A recipe on its way from another tool: stages with remarks on what changed its meaning, written as YAML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from rarefy.errors import RecipeError, unknown

WIDTH = 110
Settings = dict[str, Any]


@dataclass
class Stage:
    """A stage, and what is to be said of it."""

    name: str
    settings: Settings = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One modifier, algorithm or pruner of the other recipe: its name, its settings, and where it stands."""

    name: str
    settings: Mapping[str, Any]
    where: str = ""
    run: str = ""  # "train" or "oneshot", where the recipe says so

    def take(self, **defaults: Any) -> Taken:
        """Return the settings that a caller knows, with their defaults; it must look at each."""
        if not isinstance(self.settings, Mapping):
            raise RecipeError(f"{self.name} has settings, as keys and values, got {self.settings!r:.60} [{self.where}]")
        return Taken(self, dict(self.settings), defaults)


class Taken:
    """Settings of a part, each to be looked at; what nobody has looked at is told by `left`."""

    def __init__(self, part: Part, given: Settings, defaults: Settings):
        self.part, self.given, self.defaults, self.seen = part, given, defaults, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.seen.add(name)
        value = self.given.get(name)
        return self.defaults.get(name) if value is None else value

    def number(self, name: str) -> Any:
        """Return a number, or None; RecipeError for anything else."""
        value = self[name]
        return None if value is None else number(value, self.part, name)

    def left(self, *without_effect: str) -> list[str]:
        """Return a remark for each setting that has no counterpart."""
        gone = [k for k in self.given if k not in self.seen and k not in without_effect]
        return [f"{self.part.name}: no counterpart of {k}: {_short(self.given[k])}" for k in gone]


class Draft:
    """Stages in order, one of which may train."""

    def __init__(self, source: str):
        self.source = source
        self.stages: list[Stage] = []
        self.remarks: list[str] = []

    def add(self, name: str, settings: Settings, remarks: Iterable[str] = ()) -> Stage:
        """Add a stage."""
        self.stages.append(Stage(name, settings, list(remarks)))
        return self.stages[-1]

    def train(self) -> Stage:
        """Return the last stage if it trains, or a new one that does."""
        if not self.stages or self.stages[-1].name != "train":
            self.add("train", {})
        return self.stages[-1]

    def to_yaml(self) -> str:
        """Return the recipe as YAML, each remark a comment ahead of its stage."""
        if not self.stages:
            raise RecipeError(f"{self.source} asks for nothing that a recipe would do: {'; '.join(self.remarks)}")
        lines = [f"# from {self.source}, by `rarefy migrate`; what changed its meaning is said in comments"]
        lines += _comments(self.remarks, "")
        lines.append("stages:")
        for stage in self.stages:
            lines += _comments(stage.remarks, "")
            if not stage.settings:
                lines.append(f"- {stage.name}: {{}}")
                continue
            body = yaml.safe_dump(_plain(stage.settings), sort_keys=False, width=WIDTH)
            lines += [f"- {stage.name}:", *(f"    {l}" for l in body.splitlines())]
        return "\n".join(lines) + "\n"


def number(value: Any, part: Part, name: str) -> Any:
    """Return a number; RecipeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"{part.name}: {name} is a number, got {value!r:.60} [{part.where}]")
    return value


def mapping(value: Any, part: Part, name: str) -> Mapping[str, Any]:
    """Return keys and values, none for None; RecipeError for anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise RecipeError(f"{part.name}: {name} has keys and values, got {value!r:.60} [{part.where}]")
    return value or {}


def refuse(names: Mapping[str, str], part: Part) -> str:
    """Return what is to be said of a part that has no counterpart."""
    return f"{part.name} has no counterpart: {names[part.name]}"


def known(name: str, tables: Iterable[Iterable[str]], where: str, what: str) -> None:
    """Raise RecipeError for a name in none of these tables."""
    names = [n for t in tables for n in t]
    if name not in names:
        raise RecipeError(unknown(what, name, names, where))


def words(value: Any, part: Part, name: str) -> list[str]:
    """Return a word or a list of words as a list."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or any(not isinstance(w, str) for w in found):
        raise RecipeError(f"{part.name}: {name} is a list of names, got {value!r:.60} [{part.where}]")
    return list(found)


def selectors(value: Any, part: Part, name: str) -> list[str] | None:
    """Return names of layers or parameters as selectors, None where all prunable ones are meant.

    Expressions of the other tools match from the beginning of a name, ours the whole of it; a list of blocks means what
    is in them.
    """
    if value is None:
        return None
    found = words(value, part, name)
    if any(re.fullmatch(r"__ALL(_PRUNABLE|_QUANTIZABLE)?__", w) for w in found):
        return None
    return [_selector(w) for w in found]


def _selector(word: str) -> str:
    if not word.startswith("re:"):
        return f"{word}.*" if re.search(r"\.\d+$", word) else word
    text = word[3:]
    if text.endswith("$"):
        text = text[:-1]
        return f"re:{text}\\..*" if re.search(r"(\\d[+*]?|\)|\d)$", text) else f"re:{text}"
    return word if text.endswith((".*", "weight", "bias")) else f"re:{text}.*"


def _comments(remarks: Iterable[str], indent: str) -> list[str]:
    clean = (re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\uffff]+", " ", r) for r in dict.fromkeys(remarks))
    return [f"{indent}# {r}" for r in clean]


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


Convert = Callable[[Draft, Part], None]
