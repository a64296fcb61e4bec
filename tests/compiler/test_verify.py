"""Outputs of compiled models beside those of the model: what is an error, and what the model itself does."""

import pytest
import torch
from torch import nn

from rarefy.common.errors import ModelError
from rarefy.compiler.verify import verify


class Rounded(nn.Module):
    """Rounds values finely or coarsely: if finely, rounding errors of the inputs change its outputs by a fifth."""

    def __init__(self, steps):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.steps = nn.Linear(16, 64), steps

    def forward(self, x):
        return 10 + (self.layer(x) * self.steps).round().remainder(8)


class Compiled:
    """A compiled model that sums in another order, and is wrong by an offset."""

    def __init__(self, model, offset=0.0):
        self.model, self.offset, self.notes, self.exported = model, offset, (), self
        self.input_specs, self.ranges, self.guards = [], {}, []

    def __call__(self, x):
        return self.model(x * (1 + 3e-6)) + self.offset


def test_what_rounding_errors_do_to_the_model_is_no_error_of_the_compiled_one():
    x = torch.randn(8, 16)
    fine = Compiled(Rounded(1e6))
    verify(fine.model, fine, (x,), {}, 0.01)
    assert [n for n in fine.notes if n.startswith("outputs differ by") and n.endswith("judge it on data")]
    verify(fine.model, fine, (x,), {}, 0.01)
    assert len(fine.notes) == 1


def test_other_differences_stay_errors():
    x = torch.randn(8, 16)
    for model, offset in ((Rounded(1.0), 2.0), (Rounded(1e6), 40.0)):
        wrong = Compiled(model, offset)
        with pytest.raises(ModelError, match="outputs of the compiled Rounded differ"):
            verify(model, wrong, (x,), {}, 0.01)
        assert wrong.notes == ()
