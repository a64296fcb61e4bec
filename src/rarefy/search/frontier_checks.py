"""Check the data of a file before it becomes a frontier: names and types of fields, and that numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rarefy.common.errors import ContainerError

Check = Callable[[Any], bool]


def check_frontier(data: Any, schema: int) -> None:
    """Raise ContainerError, naming the field, unless the data is a frontier of this schema as plain JSON."""
    if not isinstance(data, Mapping) or not {"schema", "points"} <= set(data):
        raise ContainerError("frontier: not written by rarefy.optimize: expected an object with schema and points")
    version = data["schema"]
    if type(version) is int and version > schema:
        raise ContainerError(
            f"frontier: schema {version} is of a newer Rarefy, this one reads up to {schema}: upgrade it"
        )
    if version != schema:
        raise ContainerError(f"frontier: expected schema {schema}, got {version!r}")
    _check_record({k: v for k, v in data.items() if k != "schema"}, FRONTIER, "")
    _check_record(data["dense"], POINT, "dense.")
    for i, point in enumerate(data["points"]):
        _check_record(point, POINT, f"points[{i}].")
    best = data["best_index"]
    if best is not None and not 0 <= best < len(data["points"]):
        raise ContainerError(f"frontier: best_index {best!r} is not the number of a point")


def _check_record(data: Mapping[str, Any], expected: Mapping[str, tuple[Check, str]], where: str) -> None:
    """Raise ContainerError for a missing, unknown or wrong field; a name that ends with `?` may be missing."""
    names = {name.rstrip("?"): check for name, check in expected.items()}
    missing = [name for name in expected if not name.endswith("?") and name not in data]
    if missing:
        raise ContainerError(f"frontier: {where}{missing[0]} is missing: not written by rarefy.optimize")
    for name, value in data.items():
        if name not in names:
            raise ContainerError(f"frontier: unknown field {where}{name}: of a newer Rarefy, or not of rarefy.optimize")
        check, what = names[name]
        if not check(value):
            raise ContainerError(f"frontier: {where}{name}: expected {what}, got {repr(value)[:80]}")
        if name not in ("dense", "points") and not _is_finite(value):
            raise ContainerError(f"frontier: {where}{name}: a number is not finite, or something is not JSON")


def _is_finite(value: Any) -> bool:
    """Return whether all numbers in plain data are finite, and small enough for a float."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_finite(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return _is_number(value) if type(value) in (int, float) else value is None or isinstance(value, str | bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf and abs(value) <= 1.7e308


def _is_type(*types: type) -> Check:
    return lambda value: type(value) in types


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _each(check: Check) -> Check:
    """Return a check of every value of a mapping."""
    return lambda value: isinstance(value, Mapping) and all(map(check, value.values()))


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


def _is_time(value: Any) -> bool:
    return isinstance(value, Mapping) and "median" in value and all(map(_is_number, value.values()))


def _is_metric(value: Any) -> bool:
    known = isinstance(value, Mapping) and isinstance(value.get("higher_is_better"), bool)
    return known and isinstance(value.get("name"), str) and isinstance(value.get("scale", ""), str)


def _is_prediction(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and _optional(_is_number)(value.get("loss"))
        and _each(_is_number)(value.get("milliseconds", {}))
    )


def _is_peer(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("name"), str)
        and "quality" in value
        and _optional(_is_number)(value["quality"])
        and _each(_is_time)(value.get("milliseconds", {}))
        and _each(_is_number)(value.get("speedup", {}))
    )


def _is_limits(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and _optional(_is_number)(value.get("quality"))
        and _each(_is_number)(value.get("milliseconds", {}))
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


_is_text, _is_mapping = _is_type(str), _is_type(dict)
POINT: dict[str, tuple[Check, str]] = {
    "name": (_is_text, "text"),
    "quality": (_optional(_is_number), "a number or null"),
    "loss": (_optional(_is_number), "a number or null"),
    "milliseconds": (_each(_is_time), "an object of batches, each with a median"),
    "speedup": (_each(_is_number), "an object of numbers"),
    "disk_bytes": (_is_size, "a number of bytes"),
    "memory_bytes": (_is_size, "a number of bytes"),
    "recipe": (_is_mapping, "an object"),
    "precision?": (_optional(_is_text), "text or null"),
    "predicted?": (_is_prediction, "an object of loss and milliseconds"),
    "layers?": (_list_of(_is_mapping), "a list of objects"),
    "seconds?": (_is_number, "a number"),
    "error?": (_is_text, "text"),
    "ignore?": (_list_of(_is_text), "a list of texts"),
    "per_layer?": (_each(_is_text), "an object of texts"),
    "calibrated?": (_is_type(bool), "true or false"),
    "cache_precision?": (_is_text, "text"),
    "checked_loss?": (_optional(_is_number), "a number or null"),
}
FRONTIER: dict[str, tuple[Check, str]] = {
    "metric": (_is_metric, "an object with name and higher_is_better"),
    "targets": (_is_mapping, "an object"),
    "dense": (_is_mapping, "an object"),
    "points": (_list_of(_is_mapping), "a list of objects"),
    "best_index": (_optional(_is_type(int)), "the number of a point or null"),
    "met": (_is_type(bool), "true or false"),
    "verdict": (_is_text, "text"),
    "machine": (_is_mapping, "an object"),
    "seconds": (_is_number, "a number"),
    "finished": (_is_text, "text"),
    "batches": (_list_of(_is_text), "a list of texts"),
    "peers?": (_list_of(_is_peer), "a list of objects with name, quality and milliseconds"),
    "notes?": (_list_of(_is_text), "a list of texts"),
    "model?": (_is_text, "text"),
    "limits?": (_is_limits, "an object of quality and milliseconds"),
}
