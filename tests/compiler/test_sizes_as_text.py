"""Sizes whose text or hash a model's code asks for: torch keeps no guard of them, so they are fixed."""

import functools
import json
import logging

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import OtherSizesError

TABLE = {4: 0, 9: 1, 8: 2}
THIRD = functools.lru_cache(None)(lambda n: n % 3)
TEXTS = {
    "str": lambda x: str(x.shape[1]) == "9",
    "f-string": lambda x: f"{x.shape[1]}" == "9",
    "format": lambda x: format(x.shape[1], ">3d") == "  9",
    "template": lambda x: "{:02d}".format(x.shape[1]) == "09",  # noqa: UP032
    "repr of a sum": lambda x: repr(x.shape[1] + 1) == "10",
    "percent": lambda x: "%s" % x.shape[1] == "9",  # noqa: UP031
    "shape": lambda x: str(x.shape) == "torch.Size([2, 9, 8])",
    "tuple": lambda x: str(tuple(x.shape)[1:]) == "(9, 8)",
    "quotient": lambda x: str(x.shape[1] / 2) == "4.5",
    "comparison": lambda x: str(x.shape[1] > 8) == "True",
    "json": lambda x: json.dumps([int(n) for n in x.shape[1:]]) == "[9, 8]",
    "joined": lambda x: "x".join(map(str, x.shape[1:])) == "9x8",
    "dictionary": lambda x: TABLE.get(x.shape[1], 3) == 1,
    "set": lambda x: x.shape[1] in {9, 12},
    "cached": lambda x: THIRD(x.shape[1]) == 1,
    "hash": lambda x: hash(x.shape[1]) == 9,
}


class AsText(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.condition = TEXTS[name]

    def forward(self, x):
        return x * 2 if self.condition(x) else x - 1


def answers_or_refuses(model, calls, *compiled):
    """Count the calls that each compiled model refuses; all others answer as the model does."""
    refused = [0] * len(compiled)
    for batch in calls:
        for i, fast in enumerate(compiled):
            try:
                torch.testing.assert_close(fast(*batch), model(*batch), rtol=1e-4, atol=1e-5)
            except OtherSizesError:
                refused[i] += 1
    return refused


@pytest.mark.parametrize("name", TEXTS)
def test_a_size_whose_text_or_hash_is_asked_for_is_fixed(name, tmp_path):
    model = AsText(name).eval()
    compiled = rarefy.compile(model, torch.randn(2, 8, 8), tune=False)
    rarefy.save(compiled, tmp_path / "fast")
    loaded = rarefy.load(tmp_path / "fast")
    sizes = [(b, n) for b in (2, 5) for n in (1, 4, 8, 9)]
    refused, by_loaded = answers_or_refuses(model, [(torch.randn(b, n, 8),) for b, n in sizes], compiled, loaded)
    assert not refused and by_loaded


def test_a_layer_by_the_name_of_a_size():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({str(n): nn.Linear(n, 4) for n in (4, 8, 9)})

        def forward(self, x):
            return self.layers[str(x.shape[1])](x)

    model = Layers().eval()
    compiled = rarefy.compile(model, torch.randn(2, 8), tune=False)
    with torch.no_grad():
        assert answers_or_refuses(model, [(torch.randn(3, n),) for n in (4, 8, 9)], compiled) == [0]


def test_what_is_logged_fixes_no_size():
    class Logs(nn.Module):
        def forward(self, x):
            logging.getLogger("rarefy.tests").warning("sizes %s", x.shape)
            return x * 2

    compiled = rarefy.compile(Logs().eval(), torch.randn(2, 8), tune=False)
    assert compiled(torch.ones(3, 9)).shape == (3, 9) and compiled.branches.compiled == []
