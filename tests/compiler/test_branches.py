"""Models that are compiled again for other branches: which changes of the model forbid it, and which sizes ask for it."""

import functools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import OtherSizesError
from rarefy.compiler import branches


@dataclass
class Options:
    factor: float = 2.0
    names: list = field(default_factory=lambda: ["a"])


class Attributes(nn.Module):
    """Computes with attributes of many kinds, counts its calls, and takes another branch for odd sizes."""

    kind = "class"

    def __init__(self):
        super().__init__()
        self.inner, self.dropout, self.hidden = nn.Sequential(nn.Linear(4, 4)), nn.Dropout(0.1), [nn.Linear(4, 4)]
        self.scale, self.numbers, self.by_name, self.tensor = 2, [1, 2], {"a": [1]}, torch.ones(4)
        self.array, self.options, self.function, self.own = np.ones(4), Options(), lambda x: x, [self]
        self.part, self.shortest, self.calls = functools.partial(max, 1), np.float32(1), 0

    def forward(self, x):
        self.calls += 1
        y = self.inner(self.dropout(x)) * self.scale * self.options.factor * sum(self.numbers) + self.tensor
        return self.function(y) + self.hidden[0](x) if x.shape[1] % 2 else y


def train(model):
    model.dropout.train()


CHANGES = {
    "scale": lambda m: setattr(m, "scale", 3),
    "scale of another type": lambda m: setattr(m, "scale", 2.0),
    "numbers": lambda m: m.numbers.append(3),
    "by_name": lambda m: m.by_name["a"].append(1),
    "tensor": lambda m: m.tensor.mul_(2),
    "array": lambda m: np.multiply(m.array, 2, out=m.array),
    "options": lambda m: setattr(m.options, "factor", 3.0),
    "options inside": lambda m: m.options.names.append("b"),
    "function": lambda m: setattr(m, "function", lambda x: x + 1),
    "hidden": lambda m: m.hidden[0].weight.data.mul_(2),
    "part": lambda m: setattr(m, "part", functools.partial(max, 2)),
    "shortest": lambda m: setattr(m, "shortest", np.float32(2)),
    "dropout.training": train,
    "dropout.p": lambda m: setattr(m.dropout, "p", 0.5),
    "inner.class": lambda m: setattr(m, "inner", nn.ModuleList(m.inner)),
    "inner._forward_hooks": lambda m: m.inner.register_forward_hook(lambda *a: a[-1] * 2),
    "_forward_pre_hooks": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "forward": lambda m: setattr(m, "forward", lambda x: x),
    "more": lambda m: setattr(m, "more", 1),
    "class": lambda m: setattr(Attributes, "kind", "other"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_with_changed_attributes_is_not_compiled_again(name, monkeypatch):
    monkeypatch.setattr(Attributes, "kind", "class")
    model = Attributes().eval()
    compiled = rarefy.compile(model, torch.randn(2, 6, 4), tune=False)
    CHANGES[name](model)
    says = f"the model's attribute '{name.split(' ')[0]}' has changed, so it is not compiled again"
    with pytest.raises(OtherSizesError, match=says):
        compiled(torch.randn(2, 5, 4))


def test_attributes_that_calls_change_do_not_count():
    model = Attributes().eval()
    compiled = rarefy.compile(model, torch.randn(2, 6, 4), tune=False)
    model.scale, x = 2, torch.randn(2, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert compiled.branches.ignored == {"calls"}


def test_inputs_that_broadcast_are_another_branch(tmp_path):
    class Sum(nn.Module):
        def forward(self, x, y):
            return (x + y) * 2

    model = Sum().eval()
    compiled = rarefy.compile(model, (torch.randn(3, 5, 4), torch.randn(3, 5, 4)), tune=False)
    rarefy.save(compiled, tmp_path / "fast")
    loaded = rarefy.load(tmp_path / "fast")
    for sizes in ((1, 5, 4), (3, 1, 4), (1, 1, 4), (7, 1, 4)):
        x, y = torch.randn(7 if sizes[0] in (1, 7) else 3, 5, 4), torch.randn(sizes)
        torch.testing.assert_close(compiled(x, y), model(x, y))
        torch.testing.assert_close(compiled(y, x), model(y, x))
        with pytest.raises(OtherSizesError, match="as in another input, got .*: compile the model with an example of"):
            loaded(x, y)


def test_sizes_at_which_the_model_cannot_run_use_up_no_branches():
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    compiled = rarefy.compile(Sum().eval(), (torch.randn(3, 4), torch.randn(3, 4)), tune=False)
    for n in range(4, 4 + 2 * branches.MAX_BRANCHES):
        with pytest.raises(OtherSizesError, match=f"y: expected a size of 3, as in another input, got {n}.* failed: "):
            compiled(torch.ones(3, 4), torch.ones(n, 4))
    assert compiled(torch.ones(3, 4), torch.ones(1, 4)).shape == (3, 4)
