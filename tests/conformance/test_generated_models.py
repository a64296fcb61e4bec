"""Random small models, compiled at one size and called at twenty others: eager's answers, or an error that names a size.

`python tests/helpers/generated_models.py --seeds 17` repeats a seed and prints its model; `--seeds 2000:4000` searches
further.
"""

import pytest

from helpers.compiled_folders import needs_kernels
from helpers.generated_models import describe, search
from rarefy.compiler import branches

CHUNK = 20
pytestmark = needs_kernels


def found_in(seeds: range) -> str:
    """Return the failures of seeds, each with its model; "" where there are none."""
    failures, counts = search(seeds)
    agree, refused = counts["calls that agree"], counts["calls refused"]
    assert agree > refused or failures, f"{agree} calls agree, {refused} are refused: the search sees too little"
    return "\n\n".join(f"seed {seed}: {why}\n{describe(seed).source}" for seed, why in failures.items())


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_hundred_models(monkeypatch, first):
    monkeypatch.setattr(branches, "MAX_BRANCHES", 1)  # each takes an export
    assert not found_in(range(first, first + 20))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_two_thousand_models(monkeypatch, first):
    monkeypatch.setenv("RAREFY_TUNE", "1")
    assert not found_in(range(first, first + CHUNK))
