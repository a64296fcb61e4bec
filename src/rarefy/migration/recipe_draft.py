"""A recipe that is being translated from another tool: its stages, and remarks on differences in meaning."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rarefy.common.errors import RecipeError, nearest, unknown
from rarefy.common.yaml_text import plain, write_yaml

WIDTH = 110
MAX_STEPS = 200  # of a schedule: each step computes all scores
CURVES = ("linear", "cubic")
CLASS_NAME = re.compile(r"[A-Z]\w*$")
WEIGHTED = re.compile(r"Linear|Conv|(?<!Rotary)Embedding|Attention")  # in the names of classes that have layers
TEACHER = "the teacher was your script's: here it is the model before the first stage, or teacher: FOLDER"
Settings = dict[str, Any]


@dataclass
class Stage:
    """A stage of the new recipe, with remarks that become comments."""

    name: str
    settings: Settings = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Modifier:
    """One modifier, algorithm or pruner of the source recipe: its name, settings and location (file and line)."""

    name: str
    settings: Mapping[str, Any]
    where: str = ""
    run: str = ""  # "train" or "oneshot" if the recipe says so
    stage: str = ""  # of a later recipe

    def take(self, **defaults: Any) -> ModifierOptions:
        """Return the settings as options with these defaults; options that nobody reads are reported by `unmapped`."""
        if not isinstance(self.settings, Mapping):
            raise RecipeError(f"{self.name} has settings, as keys and values, got {self.settings!r:.60} [{self.where}]")
        return ModifierOptions(self, dict(self.settings), defaults)


class ModifierOptions:
    """Settings of a modifier that record which of them were read; `unmapped` lists the others."""

    def __init__(self, modifier: Modifier, values: Settings, defaults: Settings):
        self.modifier, self.values, self.defaults, self.used = modifier, values, defaults, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        value = self.values.get(name)
        return self.defaults.get(name) if value is None else value

    def number(self, name: str) -> Any:
        """Return an option that is a number or None; RecipeError otherwise."""
        value = self[name]
        return None if value is None else number(value, self.modifier, name)

    def unmapped(self, *without_effect: str) -> list[str]:
        """Return a remark for each setting that has no counterpart."""
        unused = [k for k in self.values if k not in self.used and k not in without_effect]
        return [f"{self.modifier.name}: no counterpart of {k}: {_short(self.values[k])}" for k in unused]


class Draft:
    """The stages of the new recipe in order, and remarks on the whole."""

    def __init__(self, source: str):
        self.source = source
        self.stages: list[Stage] = []
        self.remarks: list[str] = []

    def add(self, name: str, settings: Settings, remarks: Iterable[str] = ()) -> Stage:
        """Add a stage."""
        self.stages.append(Stage(name, settings, list(remarks)))
        return self.stages[-1]

    def train(self) -> Stage:
        """Return the last stage if it is a train stage, else add one."""
        if not self.stages or self.stages[-1].name != "train":
            self.add("train", {})
        return self.stages[-1]

    def to_yaml(self) -> str:
        """Return the recipe as YAML; each remark is a comment before its stage."""
        if not self.stages:
            raise RecipeError(f"{self.source} has no setting that a recipe supports: {'; '.join(self.remarks)}")
        lines = [f"# from {self.source}, by `rarefy migrate`; comments mark differences in meaning"]
        lines += _comments(self.remarks)
        lines.append("stages:")
        for stage in self.stages:
            lines += _comments(stage.remarks)
            if not stage.settings:
                lines.append(f"- {stage.name}: {{}}")
                continue
            body = write_yaml(plain(stage.settings), WIDTH)
            lines += [f"- {stage.name}:", *(f"    {l}" for l in body.splitlines())]
        return "\n".join(lines) + "\n"


def number(value: Any, modifier: Modifier, name: str) -> Any:
    """Return the value if it is a finite number; RecipeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        near = nearest(name, map(str, modifier.settings)) if value is None else []
        hint = f", and {near[0]!r}, which is no setting" if near and near[0] != name else ""
        raise RecipeError(f"{modifier.name}: expected {name} as a number, got {value!r:.60}{hint} [{modifier.where}]")
    return value


def fraction(value: Any, modifier: Modifier, name: str) -> Any:
    """Return the value if it is a number between 0 and 1; RecipeError otherwise."""
    if not 0 <= number(value, modifier, name) <= 1:
        raise RecipeError(f"{modifier.name}: expected {name} between 0 and 1, got {value:g} [{modifier.where}]")
    return value


def mapping(value: Any, modifier: Modifier, name: str) -> Mapping[str, Any]:
    """Return the value if it is a mapping, {} for None; RecipeError otherwise."""
    if value is not None and not isinstance(value, Mapping):
        raise RecipeError(
            f"{modifier.name}: expected {name} with keys and values, got {value!r:.60} [{modifier.where}]"
        )
    return value or {}


def is_unsupported(
    draft: Draft, modifier: Modifier, tables: Iterable[Iterable[str]], why: Mapping[str, str], what: str, skip: bool
) -> bool:
    """Return whether a modifier has no counterpart and is skipped with a remark.

    Raises RecipeError if it has none and `skip` is false (`why` has the reason), or if its name is unknown.
    """
    names = [n for t in (*tables, why) for n in t]
    if modifier.name not in names:
        raise RecipeError(unknown(what, modifier.name, names, modifier.where))
    if modifier.name not in why:
        return False
    text = f"{modifier.name} has no counterpart: {why[modifier.name]}"
    if not skip:
        raise RecipeError(f"{text} [{modifier.where}]")
    draft.remarks.append(text)
    return True


def shape(pattern: str, sparsity: Any) -> Settings:
    """Return the settings of a pattern, with its sparsity unless the pattern is N:M."""
    return {"pattern": pattern} if ":" in pattern else {"pattern": pattern, "sparsity": sparsity}


def solver(name: str, options: ModifierOptions) -> Settings:
    """Return the settings of a solver, with its damping if given."""
    damping = options.number("dampening_frac" if options["dampening_frac"] is not None else "percdamp")
    return {"name": name} if damping is None else {"name": name, "damping": damping}


def curve(options: ModifierOptions, name: str, stage: Stage) -> str:
    """Return the sparsity schedule of a setting; cubic with a remark if it has no counterpart."""
    text = str(options[name] or "cubic")
    if text not in CURVES:
        stage.remarks.append(f"{options.modifier.name}: {name} {text[:40]} is cubic here")
    return text if text in CURVES else "cubic"


def steps(count: float) -> int:
    """Return the number of steps of a schedule, between 1 and MAX_STEPS."""
    return max(1, min(MAX_STEPS, round(count)))


def end_of_span(options: ModifierOptions, start: float, end: Any, epochs: float) -> float:
    """Return the epoch in which a span ends: the end of training if it is not given."""
    last = epochs if end is None or end < 0 else float(end)
    if last < start:
        modifier = options.modifier
        raise RecipeError(f"{modifier.name} ends at {last:g}, before it starts at {start:g} [{modifier.where}]")
    return last


def note_regrowth(options: ModifierOptions, stage: Stage) -> None:
    """Add a remark if the other tool removed its masks at the end: here zeros stay."""
    if options["leave_enabled"] is False:
        stage.remarks.append(
            f"{options.modifier.name} let zeros grow back at its end (leave_enabled: false): here they stay"
        )


def name_list(value: Any, modifier: Modifier, name: str) -> list[str]:
    """Return a name or a list of names as a list."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or any(not isinstance(n, str) for n in names):
        raise RecipeError(f"{modifier.name}: expected {name} as a list of names, got {value!r:.60} [{modifier.where}]")
    return list(names)


def selectors(value: Any, modifier: Modifier, name: str) -> list[str] | None:
    """Return names of layers or parameters as selectors, or None for all prunable layers.

    Regular expressions of the other tools match a prefix of the name, ours the whole name. The name of a block selects
    all layers in it.
    """
    if value is None:
        return None
    names = name_list(value, modifier, name)
    if any(re.fullmatch(r"__ALL(_PRUNABLE|_QUANTIZABLE)?__", n) for n in names):
        return None
    return [_selector(n) for n in names]


def ignored(options: ModifierOptions) -> tuple[list[str] | None, list[str]]:
    """Return the ignored layers as selectors, without classes that have no weights, and remarks.

    Other tools take the names of activations and norms too; a selector of ours has to match a layer.
    """
    modifier = options.modifier
    names = selectors(options["ignore"], modifier, "ignore") or []
    dropped = [n for n in names if CLASS_NAME.match(n) and not WEIGHTED.search(n)]
    left = [n for n in names if n not in dropped]
    remarks = [f"{modifier.name}: ignored without layers to quantize: {', '.join(dropped)[:80]}"] if dropped else []
    if left:
        remarks.append(
            f"{modifier.name}: of ignored names those that match no layer have to go: {', '.join(left)[:80]}"
        )
    return left or None, remarks


def _selector(name: str) -> str:
    if not name.startswith("re:"):
        return f"{name}.*" if re.search(r"\.\d+$", name) else name
    text = name[3:]
    if text.endswith("$"):
        text = text[:-1]
        return f"re:{text}\\..*" if re.search(r"(\\d[+*]?|\)|\d)$", text) else f"re:{text}"
    return name if text.endswith((".*", "weight", "bias")) else f"re:{text}.*"


def _comments(remarks: Iterable[str]) -> list[str]:
    clean = (re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\uffff]+", " ", r) for r in dict.fromkeys(remarks))
    return [f"# {r}" for r in clean]


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
