"""Options objects: each validates the arguments of a function and is part of the recipe schema and its docs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError, core_schema

from rarefy.common.errors import RarefyError, RecipeError, SelectorError, unknown

Path = tuple[str | int, ...]
Schema = dict[str, Any]

NAMES_SCHEMA: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


class Options(BaseModel):
    """A frozen set of options: unknown names, other types ("0.5" for a number, true for 1) and nan are refused.

    A subclass lists its fields with bounds and descriptions. `Subclass(...)` raises the subclass's `error`, with the
    field, what was expected and what was given; `Subclass.model_validate` raises pydantic's ValidationError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    error: ClassVar[type[RarefyError]] = RecipeError

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = problem_of(error, type(self), values)
            raise (problem.kind or self.error)(problem.for_call()) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # else it runs for nested options too

    def replace(self, **changes: Any) -> Any:
        """Return a copy with other values, validated again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


@contextmanager
def at(*path: str | int) -> Iterator[None]:
    """Name the field to which an error inside the block belongs, in a validator of several fields."""
    try:
        yield
    except RarefyError as error:
        details: Any = {"type": "value_error", "loc": path, "input": None, "ctx": {"error": error}}
        raise ValidationError.from_exception_data("options", [details]) from None


@dataclass(frozen=True, eq=False)  # a table of names has no hash
class OneOf:
    """Annotation of a string that is one of several names."""

    names: Collection[str]
    noun: str = ""  # what a name is called in errors; by default the field

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Schema:
        return {**handler(schema), "enum": list(self.names)}

    def _check(self, value: str) -> str:
        if value not in self.names:
            raise PydanticCustomError("unknown_name", "unknown name", {"noun": self.noun})
        return value


@dataclass(frozen=True)
class Keyed:
    """Annotation of options that are written as `{key: options}`."""

    key: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(self._unwrap, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Schema:
        inner = {self.key: handler(schema)}
        return {"type": "object", "properties": inner, "required": [self.key], "additionalProperties": False}

    def _unwrap(self, value: Any) -> Any:
        if isinstance(value, Options):
            return value
        return {} if value[self.key] is None else value[self.key]


def _as_names(value: Any) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or any(not isinstance(v, str) for v in value):
        raise PydanticCustomError("selector", "not a selector")
    return tuple(value)


class AsTuple:
    """Annotation of a tuple that may be given as a list, or as a single item."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(self._as_tuple, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Schema:
        items = handler(schema)
        return {"anyOf": [items["items"], items]}

    @staticmethod
    def _as_tuple(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) else (value,)


# what callers may give; what fields hold is a tuple
Names = Annotated[str | Sequence[str], PlainValidator(_as_names), WithJsonSchema(NAMES_SCHEMA)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Problem:
    """A validation problem and its place. If the text does not name the field, it is put in front."""

    path: Path
    text: str
    names_subject: bool
    kind: type[RarefyError] | None = None  # of the error that a check raised
    unknown_field: str | None = None

    def for_call(self) -> str:
        """Return the message for a call in Python."""
        return self.text if self.names_subject or not self.path else f"{dotted(self.path)}: {self.text}"


def problem_of(error: ValidationError, options: type[BaseModel], data: Any) -> Problem:
    """Return the first problem of a validation of `data`; unknown fields come first."""
    details = sorted(error.errors(include_url=False), key=lambda d: d["type"] != "extra_forbidden")[0]
    kind, loc, value = details["type"], details["loc"], details["input"]
    context: Any = details.get("ctx", {})
    root = options.model_json_schema()
    path, schema = _walk(root, loc, data)
    alternatives = branches(schema, root)
    field = next((str(part) for part in reversed(path) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        owners = branches(_walk(root, loc[:-1], data)[1], root)
        names = [name for owner in owners for name in owner.get("properties", {})]
        return Problem(path, unknown("field", loc[-1], names), True, unknown_field=str(loc[-1]))
    if kind == "missing":
        return Problem(path, f"{loc[-1]} is required", False)
    if kind == "value_error":
        cause = context["error"]
        return Problem(path, str(cause), True, type(cause) if isinstance(cause, RarefyError) else None)
    if kind == "unknown_name":
        return Problem(
            path,
            unknown(context["noun"] or field, value, [n for a in alternatives for n in a.get("enum", ())]),
            True,
        )
    error_type = SelectorError if kind == "selector" else None
    hint = ""
    if any(a.get("maximum") == 1 for a in alternatives) and isinstance(value, int | float) and 10 <= value <= 100:
        hint = f"; did you mean {value / 100:g}?"
    return Problem(path, f"expected {expectation(schema, root)}, got {show(value)}{hint}", False, error_type)


def dotted(path: Path) -> str:
    """Return a path as people write it.

    >>> dotted(("stages", 0, "prune"))
    'stages[0].prune'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def options_or_name(options: type[Options]) -> Any:
    """Return the type of a field that is a name, or options with that name among them."""
    tag = options.__name__

    def kind(value: Any) -> str:
        return tag if isinstance(value, Mapping | Options) else "<name>"

    return Annotated[Annotated[str, Tag("<name>")] | Annotated[options, Tag(tag)], Discriminator(kind)]


def _walk(root: Schema, loc: Path, data: Any) -> tuple[Path, Schema]:
    """Return the path in the data, and the JSON Schema, of the place that a validation calls `loc`.

    A part of `loc` that is neither a key nor an index of the data names the class of options that was chosen.
    """
    path: list[str | int] = []
    schema = root
    for part in loc:
        is_index = isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        if is_index or (isinstance(data, Mapping) and part in data):
            data = data[part]  # type: ignore[call-overload]
            path.append(part)
        schema = next((s for b in branches(schema, root) if (s := _step(b, part)) is not None), schema)
    return tuple(path), schema


def branches(schema: Schema, root: Schema) -> list[Schema]:
    """Return the alternatives of a schema, null left out, with references resolved."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return branches({**root["$defs"][name], "title": name}, root)
    # pydantic before 2.9 wraps a reference that has a default into allOf
    if options := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return [b for option in options for b in branches(option, root) if b.get("type") != "null"]
    return [schema]


def _step(schema: Schema, part: str | int) -> Schema | None:
    """Return the schema of a key, an index or the class named `part`, None where there is none."""
    if isinstance(part, int):
        return schema.get("items")
    if part in schema.get("properties", {}):
        return schema["properties"][part]
    if schema.get("title") == part:
        return schema
    values = schema.get("additionalProperties")
    return values if isinstance(values, dict) else None


TYPES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a string",
         "object": "keys and values"}  # fmt: skip


def expectation(schema: Schema, root: Schema) -> str:
    """Return what a schema allows, in words.

    >>> expectation({"type": "number", "minimum": 0, "maximum": 1}, {})
    'a number between 0 and 1'
    """
    texts = list(dict.fromkeys(_expectation(b, root) for b in branches(schema, root)))
    lists = {f"a list of {text}": "a list of these" for text in texts}
    return " or ".join(lists.get(text, text) for text in texts)


def _expectation(schema: Schema, root: Schema) -> str:
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema.get("type") == "array":
        return f"a list of {expectation(schema['items'], root)}"
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    bounds = ""
    if low is not None and high is not None:
        bounds = f" between {low:,g} and {high:,g}" if high < 1 << 20 else f" from {low} to {high}"
    elif low is not None and below is None:
        bounds = f" of at least {low:g}"
    else:
        parts = ((low, "at least"), (above, "above"), (high, "at most"), (below, "below"))
        bounds = "".join(f" {text} {value:g}" for value, text in parts if value is not None)
        bounds = (
            bounds.replace(" at most", " and at most").replace(" below", " and below") if above is not None else bounds
        )
    return TYPES.get(schema.get("type", "object"), "another value") + bounds


def show(value: Any) -> str:
    """Return a value as errors show it."""
    if isinstance(value, Mapping):
        return f"keys {', '.join(map(str, value))}"[:200]
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"a list of {len(value)}"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."
