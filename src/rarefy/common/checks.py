"""Checks of arguments, with one wording for what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from rarefy.common.errors import RarefyError


def as_dict(value: Any) -> Any:
    """Return a mapping as a dict; anything else as it is, for the checks of options."""
    return dict(value) if isinstance(value, Mapping) else value


def check_int(name: str, value: Any, minimum: int, error: type[RarefyError] = RarefyError) -> int:
    """Return a whole number; raise `error` for anything else, a bool included, and for a number below `minimum`.

    >>> check_int("samples", 0.5, 1)
    Traceback (most recent call last):
    rarefy.common.errors.RarefyError: samples: expected a whole number of at least 1, got 0.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise error(f"{name}: expected a whole number of at least {minimum}, got {value!r}")
    return int(value)
