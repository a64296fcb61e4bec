"""Marks for single cases of a test that `make test` leaves to `make test-slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_case(*values: Any, id: str | None = None) -> Any:
    """Return the values of one case, marked slow."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def slow_except(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the values of one argument; those that are not in `quick` are marked slow."""
    values = list(values)
    missing = [value for value in quick if value not in values]
    assert not missing, f"expected quick cases among {values}, got {missing}"
    return [value if value in quick else slow_case(value) for value in values]
