"""Recipes: YAML or dicts -> frozen dataclasses. All that users write is checked here, and errors name the place.

A recipe lists stages in order; it holds words, numbers and paths, never code. The fields below are the whole language.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from rarefy.common.errors import RarefyError, RecipeError, nearest, unknown
from rarefy.common.located_yaml import Node, parse, plain, show, unwrap
from rarefy.lowrank.svd import asked as asked_factors
from rarefy.model import sparsity_pattern as patterns
from rarefy.prune.solver_config import resolve
from rarefy.quantization.codebook import asked as asked_book
from rarefy.quantization.config import asked as asked_values
from rarefy.recipe.old_names import FIELDS, UNITS
from rarefy.recipe.schema import (
    AT_LEAST_ONE,
    CHOICES,
    FRACTIONS,
    OWN,
    RATES,
    Cast,
    Cut,
    Data,
    Evaluate,
    Factorize,
    Optimizer,
    Permute,
    Prune,
    Quantize,
    Save,
    Share,
    Tie,
    Train,
)
from rarefy.structured.options import BUDGETS, check_cut
from rarefy.structured.permutation import check_permute
from rarefy.train.distill import Distill
from rarefy.train.distill import check as check_distill
from rarefy.train.fit import Steps
from rarefy.train.optimizers import OPTIMIZERS, optimizer_of
from rarefy.train.sparsity_config import SPARSITY_CONFIGS, SparsityConfig, config_class, resolve_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole compression, in order."""

    stages: tuple[Permute | Cut | Prune | Quantize | Factorize | Share | Tie | Train | Cast, ...]
    name: str = "recipe"
    about: str = ""
    data: Data | None = None
    evaluate: Evaluate | None = None
    save: Save = field(default_factory=Save)
    seed: int = 0

    @property
    def solves(self) -> bool:
        """Whether a stage has a solver or trains, and its state can be kept."""
        return any(isinstance(s, Train) or (isinstance(s, Prune) and s.solver is not None) for s in self.stages)

    @property
    def trains(self) -> bool:
        """Whether a stage trains."""
        return any(isinstance(s, Train) for s in self.stages)

    @property
    def cuts(self) -> bool:
        """Whether a stage takes units out."""
        return any(isinstance(stage, Cut) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as plain data, every default written out; `from_dict` reads it back."""
        out = dataclasses.asdict(self)
        names = {cls: name for name, cls in STAGES.items()}
        out["stages"] = [{names[type(s)]: dataclasses.asdict(s)} for s in self.stages]
        return plain(out)

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


STAGES: dict[str, type] = {
    "permute": Permute, "cut": Cut, "prune": Prune, "quantize": Quantize, "factorize": Factorize, "share": Share,
    "tie": Tie, "train": Train, "cast": Cast,
}  # fmt: skip


def vocabulary() -> tuple[dict[str, str], ...]:
    """Return a row for each field of a recipe: where it stands, its type, its default."""
    rows: list[dict[str, str]] = []
    methods = {cls: name for name, cls in SPARSITY_CONFIGS.items()}

    def add(place: str, cls: Any) -> None:
        kinds: dict[str, Any] = typing.get_type_hints(cls)
        for f in fields(cls):
            options = typing.get_args(kinds[f.name]) if isinstance(kinds[f.name], types.UnionType) else (kinds[f.name],)
            inner: list[Any] = [o for o in options if dataclasses.is_dataclass(o)]
            made = f.default_factory is not dataclasses.MISSING
            default = "" if made or f.default is dataclasses.MISSING else str(plain(f.default)).lower()
            default = {"none": "null"}.get(default, default)
            own = next((OWN[c] for c in cls.__mro__ if c in OWN), {})
            allowed = (CHOICES | own).get(f.name) or ()
            words = " | ".join(map(str, allowed)) or str(f.type).replace("tuple[str, ...]", "words").replace(
                " | None", ""
            )
            if not inner:
                rows.append({"where": f"{place}.{f.name}", "what": words, "default": default})
            for option in inner:
                add(f"{place}.{f.name}" + (f" ({methods[option]})" if option in methods else ""), option)

    for name, cls in STAGES.items():
        add(name, cls)
    for f in ("data", "evaluate", "save"):
        add(f, {"data": Data, "evaluate": Evaluate, "save": Save}[f])
    return tuple(rows)


def folder() -> Path:
    """Return the folder of the recipes that ship with Rarefy."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "recipes"


def presets() -> dict[str, Path]:
    """Return {name: file} of the recipes that ship with Rarefy."""
    return {p.stem: p for p in sorted(folder().glob("*.yaml"))}


def load(source: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> Recipe:
    """Return the recipe of a preset name, a YAML file, a dict, or a Recipe; overrides replace the field of that name
    wherever the recipe has it.

    Raises RecipeError naming the file and line (or the path into the dict), what was got, what is allowed.

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
    return _build(Recipe, Node.of(values, "recipe"))


def from_yaml(text: str, name: str = "recipe") -> Recipe:
    """Return the recipe of YAML text; `name` is what errors call it."""
    return _build(Recipe, parse(text, name))


def value(text: str, where: str) -> Any:
    """Return one value as a recipe would read it; a word may begin with a star, as globs do.

    >>> value("0.5", "--set"), value("2:4", "--set"), value("*.mlp.*", "--set")
    (0.5, '2:4', '*.mlp.*')
    """
    return text if text[:1] in ("", "*") else unwrap(parse(text, where))


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with each named field replaced wherever it stands; RecipeError where it stands nowhere."""
    values = recipe.to_dict()
    for key, value in changes.items():
        hits, names = _replace(values, key, value)
        if not hits:
            raise RecipeError(unknown("override", key, names, f"recipe {recipe.name}"))
    return from_dict(values)


def _from_file(source: str | Path) -> Recipe:
    known = presets()
    path = known.get(str(source), Path(source))
    if not path.is_file():
        if path.is_dir():
            raise RecipeError(f"{str(source)!r} is a folder; a recipe is a YAML file or a preset ({', '.join(known)})")
        beside = [str(path.with_name(p.name)) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = nearest(str(source), [*known, *beside])
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"no recipe file {str(source)!r} and no preset of that name ({', '.join(known)}){hint}")
    try:
        return from_yaml(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: a recipe is UTF-8 text") from None


def _build(cls: Any, node: Node) -> Any:
    if not isinstance(node.value, dict):
        raise RecipeError(f"{cls.__name__.lower()}: expected keys and values, got {show(node.value)} [{node.where}]")
    known = {f.name: f for f in fields(cls)}
    for key, value in node.value.items():
        if key not in known:
            if key in FIELDS:
                raise RecipeError(f"{key} is called {FIELDS[key]} now [{value.where}]")
            raise RecipeError(unknown("key", key, known, value.where))
    missing = [
        f.name
        for f in known.values()
        if f.name not in node.value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{cls.__name__.lower()} needs {', '.join(missing)} [{node.where}]")
    kinds = typing.get_type_hints(cls)
    own = next((OWN[c] for c in cls.__mro__ if c in OWN), {})
    choices = {k: v for k, v in (CHOICES | own).items() if v}
    made = {k: _stages(v) if k == "stages" else _value(k, v, kinds[k], choices) for k, v in node.value.items()}
    out = cls(**made)
    _check(out, node)
    return out


def _stages(node: Node) -> tuple[Any, ...]:
    if not isinstance(node.value, list) or not node.value:
        raise RecipeError(
            f"stages is a list such as '- prune: {{sparsity: 0.5}}', got {show(node.value)} [{node.where}]"
        )
    made = []
    for item in node.value:
        if not isinstance(item.value, dict) or len(item.value) != 1:
            raise RecipeError(
                f"a stage is one of {', '.join(STAGES)} with its settings, got {show(item.value)} [{item.where}]"
            )
        [(name, settings)] = item.value.items()
        if name not in STAGES:
            raise RecipeError(unknown("stage", name, STAGES, settings.where))
        made.append(_build(STAGES[name], settings if settings.value is not None else Node({}, settings.where)))
    return tuple(made)


def _value(key: str, node: Node, kind: Any, choices: Mapping[str, tuple[str, ...]]) -> Any:
    """Return the node's value as the annotated type, or raise naming both."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    value = node.value
    if value is None and type(None) in options:
        return None
    if set(SPARSITY_CONFIGS.values()) <= set(options) and isinstance(value, dict):
        return _build(_plan(node), node)
    for option in options:
        if dataclasses.is_dataclass(option):
            if str in options and not isinstance(value, dict):
                continue
            return _build(option, node)
        if typing.get_origin(option) is Literal:
            return value  # the word by which the class was chosen
        if typing.get_origin(option) is Mapping and isinstance(value, dict):
            inner = typing.get_args(option)[1]
            return {k: _value(key, v, inner, choices) for k, v in value.items()}
        if typing.get_origin(option) in (tuple, Sequence):
            inner = typing.get_args(option)[0]
            items = value if isinstance(value, list) else [node]
            return tuple(_value(key, item, inner, choices) for item in items)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if option is float and isinstance(value, str):
            try:
                return float(value)  # YAML 1.1 reads 1e-4, without a dot, as a word
            except ValueError:
                continue
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            if key in choices and not isinstance(value, bool) and value not in choices[key]:
                if key == "units" and value in UNITS:
                    raise RecipeError(f"units {value!r} is called {UNITS[value]!r} now [{node.where}]")
                raise RecipeError(unknown(key, value, choices[key], node.where))
            return value
    words = [_WORDS.get(o, getattr(o, "__name__", str(o)).lower()) for o in options if o is not type(None)]
    raise RecipeError(f"{key}: expected {' or '.join(words)}, got {show(value)} [{node.where}]")


def _plan(node: Node) -> type[SparsityConfig]:
    """The class that `method` names."""
    method = node.value.get("method", Node("gradual", node.where))
    try:
        return config_class(method.value)
    except RarefyError as error:
        raise RecipeError(f"{error} [{method.where}]") from None


_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}


def _check(made: Any, node: Node) -> None:
    """Checks that need more than one type: ranges, and patterns with their sparsity."""

    def place(key: str) -> str:
        return node.value[key].where if key in node.value else node.where

    for f in fields(made):
        value = getattr(made, f.name)
        many = value if isinstance(value, tuple) else (value,)
        if f.name in AT_LEAST_ONE and any(v is not None and v < 1 for v in many):
            raise RecipeError(f"{f.name} is at least 1, got {show(value)} [{place(f.name)}]")
        if f.name in FRACTIONS and isinstance(value, float) and not 0 <= value <= 1:
            raise RecipeError(f"{f.name} is a fraction between 0 and 1, got {value!r} [{place(f.name)}]")
        if f.name in RATES and isinstance(value, float) and not 0 <= value < float("inf"):
            raise RecipeError(f"{f.name} is a number from 0 up, got {value!r} [{place(f.name)}]")
        if f.name == "max_degradation" and isinstance(value, float) and not -1 < value <= 1:
            raise RecipeError(f"max_degradation is a fraction such as 0.15 for 15 %, got {value!r} [{place(f.name)}]")
        if f.name == "seed" and isinstance(value, int) and not 0 <= value < 1 << 32:
            raise RecipeError(f"seed is a whole number from 0 to {(1 << 32) - 1}, got {value} [{place(f.name)}]")
    if isinstance(made, Evaluate) and made.accelerate and not (made.latency or made.decode):
        raise RecipeError(
            f"accelerate has no effect: it is timed by latency or decode, give one [{place('accelerate')}]"
        )
    if isinstance(made, Evaluate) and made.precision is not None and not made.engine:
        raise RecipeError(f"precision has no effect without engine: true [{place('precision')}]")
    if isinstance(made, Evaluate) and made.accelerate and made.engine:
        raise RecipeError(
            f"accelerate times eager torch and engine the engine: leave one of them out [{place('accelerate')}]"
        )
    if isinstance(made, Prune) and made.solver is not None:
        try:
            resolve(made.solver)
        except RarefyError as error:
            raise RecipeError(f"{error} [{place('solver')}]") from None
    if isinstance(made, Cut):
        _check_cut(made, place)
    if isinstance(made, Permute):
        of = {"pattern": made.pattern, "score": made.score, "seconds": made.seconds}
        _naming(lambda: check_permute(**of), tuple(of), "pattern", place)
    if isinstance(made, Quantize):
        _naming(lambda: asked_values(**made.options()), tuple(made.options()), "weights", place)
    if isinstance(made, Share):
        _naming(lambda: asked_book(made.bits, made.group), ("bits", "group"), "bits", place)
    if isinstance(made, Factorize):
        _naming(lambda: asked_factors(**made.options()), tuple(made.options()), "rank", place)
    if isinstance(made, Distill):
        _naming(lambda: check_distill(made), tuple(f.name for f in fields(made)), "logits", place)
    if isinstance(made, Train):
        _check_train(made, place)
    if isinstance(made, Recipe):
        _check_order(made, node)
    if isinstance(made, Optimizer) and made.name not in OPTIMIZERS:
        raise RecipeError(unknown("optimizer", made.name, OPTIMIZERS, place("name")))
    try:
        if isinstance(made, Optimizer):
            optimizer_of(made.name, made.lr, **made.options())
        if isinstance(made, Prune):
            plan = patterns.parse_pattern(made.pattern)
            last, _ = patterns.check_sparsity(plan, made.sparsity, made.scope)
            patterns.make_masks([], plan, None if plan.kind == "nm" else last, reduce=made.reduce)
        if isinstance(made, SparsityConfig):
            resolve_config(made)
    except RarefyError as error:
        names = ("pattern", "sparsity", "scope", "reduce", "steps", "start", "first", *(f.name for f in fields(made)))
        raise RecipeError(f"{error} [{place(next((k for k in names if k in str(error)), 'pattern'))}]") from None


def _check_train(made: Train, place: Any) -> None:
    steps = ("accumulate", "clip", "autocast")
    _naming(lambda: Steps(**{k: getattr(made, k) for k in steps}), steps, "accumulate", place)
    if made.patience is not None and made.validate is None:
        raise RecipeError(f"patience waits for a better epoch: give validate, a metric [{place('patience')}]")


def _check_cut(made: Cut, place: Any) -> None:
    names = (*BUDGETS, "units", "score", "min_keep", "round_to", "steps", "scope", "reduce", "repair")
    _naming(lambda: check_cut(**made.options()), names, "units", place)


def _naming(check: Callable[[], Any], names: Sequence[str], usual: str, place: Callable[[str], str]) -> None:
    """Run a check; add to what it raises the place of the key that its message begins with."""
    try:
        check()
    except RarefyError as error:
        key = next((n for n in names if str(error).removeprefix("unknown ").startswith(n)), usual)
        raise RecipeError(f"{error} [{place(key)}]") from None


def _check_order(made: Recipe, node: Node) -> None:
    """Raise RecipeError for a cut or an order of units of a model that has masks, grids or factors by then, or is
    compared with one whose units stand in another order."""
    last = None
    for i, stage in enumerate(made.stages):
        where = node.value["stages"].value[i].where
        if isinstance(stage, Cut | Permute) and last:
            what = "a cut" if isinstance(stage, Cut) else "permute"
            raise RecipeError(f"{what} comes before a stage {last}, whose work it would not fit [{where}]")
        late = isinstance(stage, Permute) and not all(isinstance(s, Permute) for s in made.stages[:i])
        if late and any(isinstance(s, Train) and s.distill and s.distill.hidden for s in made.stages[i:]):
            raise RecipeError(
                "distill.hidden compares with the model before the first stage, whose units would stand in another "
                f"order: permute first [{where}]"
            )
        if isinstance(stage, Prune | Quantize | Factorize | Share | Train) and not (
            isinstance(stage, Train) and stage.prune is None and stage.quantize is None
        ):
            last = next(name for name, kind in STAGES.items() if isinstance(stage, kind))


def _replace(values: Any, key: str, new: Any) -> tuple[int, set[str]]:
    """Set `key` (or `parent.key`) wherever it stands in nested data; return how often, and all names seen."""
    parent, _, leaf = key.rpartition(".")
    hits, names = 0, set()
    if isinstance(values, dict) and parent and isinstance(values.get(parent), dict) and leaf in values[parent]:
        values[parent][leaf], hits = new, 1
    for item in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        more, seen = _replace(item, key, new)
        hits, names = hits + more, names | seen
    if isinstance(values, dict):
        names |= set(values)
        if key in values:
            values[key], hits = new, hits + 1
    return hits, names
