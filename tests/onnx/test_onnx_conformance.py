"""The ONNX project's own tests of operators: passed, or refused by name, never other numbers."""

import re

import pytest

pytest.importorskip("onnx")

from helpers import onnx_conformance as conformance
from helpers.marks import slow_except

# What is refused, and how the message names it.
REFUSED = (
    "torch has no type for",
    r"operators without a torch module: (ImageDecoder|Loop|Scan|TfIdfVectorizer) ",
    "an If whose condition depends on the inputs is not supported",
)
LEAST_PASSED = 0.95  # of those whose types torch has


PARTS = 4


@pytest.fixture(scope="module")
def cases():
    return conformance.collect()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", slow_except(range(PARTS), 0))
def test_operators_return_what_onnx_expects(cases, part):
    assert len(cases) > 1500
    quarter = cases[part::PARTS]
    outcomes = {case.name: (*conformance.outcome(case), conformance.has_torch_types(case)) for case in quarter}
    wrong = {name: why for name, (what, why, _) in outcomes.items() if what == "wrong"}
    assert not wrong

    unnamed = {
        n: why for n, (what, why, _) in outcomes.items() if what == "refused" and not re.search("|".join(REFUSED), why)
    }
    assert not unnamed
    typed = [what for what, _, has_types in outcomes.values() if has_types]
    assert typed.count("passed") >= LEAST_PASSED * len(typed)
