"""Checks of arguments say what was expected."""

import pytest

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError


@pytest.mark.parametrize("value", [0, -1, 0.5, 1.0, True, "1", None])
def test_anything_but_a_whole_number_from_the_minimum_on_is_refused(value):
    with pytest.raises(DataError) as error:
        check_int("samples", value, 1, DataError)
    assert str(error.value) == f"samples: expected a whole number of at least 1, got {value!r}"


@pytest.mark.parametrize("value", [1, 2, 1 << 70])
def test_a_whole_number_is_returned(value):
    assert check_int("samples", value, 1) == value
