"""A recipe on its way from another tool: stages with remarks on what changed its meaning, written as YAML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from rarefy.common.errors import RecipeError, unknown
from rarefy.common.located_yaml import plain

WIDTH = 110
MOST_STEPS = 200  # of a schedule: each looks at all weights
CURVES = ("linear", "cubic")
TEACHER = "the teacher was your script's: here it is the model before the first stage, or teacher: FOLDER"
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
        lines += _comments(self.remarks)
        lines.append("stages:")
        for stage in self.stages:
            lines += _comments(stage.remarks)
            if not stage.settings:
                lines.append(f"- {stage.name}: {{}}")
                continue
            body = yaml.safe_dump(plain(stage.settings), sort_keys=False, width=WIDTH)
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


def refused(
    draft: Draft, part: Part, tables: Iterable[Iterable[str]], why: Mapping[str, str], what: str, skip: bool
) -> bool:
    """Return whether a part has no counterpart, for a reason in `why`, and is left out with a remark as `skip` wants;
    else RecipeError, as for a name in none of the `tables` either."""
    names = [n for t in (*tables, why) for n in t]
    if part.name not in names:
        raise RecipeError(unknown(what, part.name, names, part.where))
    if part.name not in why:
        return False
    text = f"{part.name} has no counterpart: {why[part.name]}"
    if not skip:
        raise RecipeError(f"{text} [{part.where}]")
    draft.remarks.append(text)
    return True


def shape(pattern: str, sparsity: Any) -> Settings:
    """Return the settings of a pattern, and of its sparsity where N:M does not say it."""
    return {"pattern": pattern} if ":" in pattern else {"pattern": pattern, "sparsity": sparsity}


def solver(name: str, taken: Taken) -> Settings:
    """Return the settings of a solver that may be damped."""
    damping = taken.number("dampening_frac")
    return {"name": name} if damping is None else {"name": name, "damping": damping}


def curve(taken: Taken, name: str, stage: Stage) -> str:
    """Return the schedule that rises as a setting says, or nearly so, which is then said."""
    text = str(taken[name] or "cubic")
    if text not in CURVES:
        stage.remarks.append(f"{taken.part.name}: {name} {text[:40]} is cubic here")
    return text if text in CURVES else "cubic"


def steps(count: float) -> int:
    """Return how often a schedule looks at the weights."""
    return max(1, min(MOST_STEPS, round(count)))


def ends(taken: Taken, start: float, end: Any, epochs: float) -> float:
    """Return where a span ends that begins at `start`: with training, where it does not say."""
    last = epochs if end is None or end < 0 else float(end)
    if last < start:
        part = taken.part
        raise RecipeError(f"{part.name} ends at {last:g}, before it starts at {start:g} [{part.where}]")
    return last


def grows_back(taken: Taken, stage: Stage) -> None:
    """Say that zeros stay which the other tool let go at the end."""
    if taken["leave_enabled"] is False:
        stage.remarks.append(f"{taken.part.name} let zeros grow back at its end (leave_enabled: false): here they stay")


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


def _comments(remarks: Iterable[str]) -> list[str]:
    clean = (re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\uffff]+", " ", r) for r in dict.fromkeys(remarks))
    return [f"# {r}" for r in clean]


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
