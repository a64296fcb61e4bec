"""Conditions on sizes: the grammar, what torch finds, and calls of compiled models at sizes of other branches."""

import gc
import math
import random

import pytest
import sympy
import torch
from torch import nn
from torch.export import Dim, export
from torch.utils._sympy import functions

import rarefy
from rarefy.common.errors import DataError, ModelError, OtherSizesError
from rarefy.compiler import branches
from rarefy.compiler.shape_guards import MAX_TEXT, parse
from rarefy.compiler.torch_guards import from_torch

S, T = (sympy.Symbol(n, integer=True, positive=True) for n in ("s0", "s1"))


# ---- the grammar ----------------------------------------------------------------------------------------------------


def whole(rng, depth):
    """A random expression of whole numbers in Python's own syntax."""
    if depth == 0:
        return rng.choice(["s0", "s1", str(rng.randrange(9))])
    a, b = whole(rng, depth - 1), whole(rng, depth - 1)
    kinds = [f"({a} {op} {b})" for op in ("+", "-", "*", "//", "%")]
    return rng.choice([*kinds, f"min({a}, {b})", f"max({a}, {b})", f"(-{a})"])


def condition(rng, depth):
    if depth == 0:
        return f"{whole(rng, 2)} {rng.choice(['==', '!=', '<', '<=', '>', '>='])} {whole(rng, 1)}"
    a, b = condition(rng, depth - 1), condition(rng, depth - 1)
    return rng.choice([f"({a}) and ({b})", f"({a}) or ({b})", f"not ({a})"])


def test_conditions_are_evaluated_as_python_does():
    rng = random.Random(0)
    for _ in range(400):
        text = condition(rng, rng.randrange(3))
        for sizes in ({"s0": 8, "s1": 3}, {"s0": 1, "s1": 17}, {"s0": 5, "s1": 5}):
            try:
                want = bool(eval(text, {"min": min, "max": max}, sizes))  # the oracle, on our own text
            except ZeroDivisionError:
                want = False
            assert parse(text).holds(sizes) == want, (text, sizes)


@pytest.mark.parametrize(
    "text",
    ["s0 ** 2 > 3", "s0.real == 1", "print(s0)", "[s0 for s0 in s1]", "lambda: 1", "'a' == s0", "s0 / 2 > 1", "min(s0)",
     "s0 is s1", "s0 if s1 else 2", "max(s0, s1, key=s0)", "1.5 < s0", "f'{s0}'", "(s0 := 3) > 1", "s0[0] == 1", "",
     "s0 ==", "(" * 300 + "s0" + ")" * 300, f"s0 == {1 << 63}", "s0 + " * MAX_TEXT + "s0"],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="expected|is not a condition"):
        parse(text)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (sympy.Eq(functions.PythonMod(S - T, 4), 0), "(s0 + -1 * s1) % 4 == 0"),
        (sympy.Eq(S, functions.Min(S, sympy.Integer(512))), "s0 <= 512"),
        (sympy.Ne(S, functions.Min(S, sympy.Integer(512))), "s0 > 512"),
        (functions.IntTrueDiv(S, sympy.Integer(3)) > 2.5, "s0 * 2 > 5 * 3"),
        (sympy.Eq(functions.CeilToInt(functions.IntTrueDiv(S, T)), 2), "-(-s0 // s1) == 2"),
        (sympy.And(S > 3, sympy.Or(sympy.Eq(T, 2), T > 7)), None),
        (functions.Max(S, T) <= 5, "max(s0, s1) <= 5"),
        (sympy.sqrt(S) > 2, None),
        (0.3 * functions.ToFloat(S) > 2.0, None),
    ],
)
def test_conditions_of_torch_as_text(expression, text):
    got = from_torch(expression)
    if isinstance(expression, sympy.And):  # the order of its parts is sympy's
        assert parse(got).holds({"s0": 4, "s1": 2}) and not parse(got).holds({"s0": 4, "s1": 3})
    else:
        assert got == text


# ---- compiled models ------------------------------------------------------------------------------------------------

CONDITIONS = {
    "remainder": lambda x, y: x.shape[1] % 4 == 0,
    "two inputs": lambda x, y: x.shape[1] > y.shape[1],
    "product": lambda x, y: x.shape[0] * x.shape[1] > 20,
    "unequal": lambda x, y: x.shape[0] != 5,
    "elements": lambda x, y: x.numel() % 64 == 0,
    "quotient": lambda x, y: x.shape[1] // y.shape[1] == 1,
    "rounded up": lambda x, y: math.ceil(x.shape[1] / 3) == 3,
    "float": lambda x, y: (x.shape[1] + 1) / 2 > 4,
    "not in the grammar": lambda x, y: x.shape[1] * 0.3 > 2,
    "largest": lambda x, y: max(x.shape[1], y.shape[1]) < 10,
    "and, or": lambda x, y: (x.shape[0] == 2 and x.shape[1] > 6) or y.shape[1] == 9,
    "one of": lambda x, y: x.shape[1] in (8, 9),
    "distance": lambda x, y: abs(x.shape[1] - y.shape[1]) < 3,
    "one": lambda x, y: x.shape[0] == 1,
    "one and another": lambda x, y: x.shape[0] == 1 and x.shape[1] > 9,
    "product of ones": lambda x, y: x.shape[0] * y.shape[0] > 3,
    "helper": lambda x, y: len(x) % 2 == y.size(-1) % 2,
}
SIZES = [(b, n, c, m) for b in (1, 2, 5) for n in (4, 8, 9, 12) for c, m in ((1, 6), (3, 9))]


class Branch(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layer, self.condition = nn.Linear(8, 8), CONDITIONS[name]

    def forward(self, x, y):
        z = self.layer(x)
        return z * 2 + y.sum() if self.condition(x, y) else z - y.mean()


def inputs(b, n, c, m):
    return torch.randn(b, n, 8), torch.randn(c, m)


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_size_takes_its_branch_or_is_refused(name, tmp_path):
    torch.manual_seed(0)
    model = Branch(name).eval()
    compiled = rarefy.compile(model, inputs(2, 8, 3, 6), tune=False)
    rarefy.save(compiled, tmp_path / "fast")
    loaded = rarefy.load(tmp_path / "fast")
    refused = {compiled: 0, loaded: 0}
    with torch.no_grad():
        for sizes in SIZES:
            batch = inputs(*sizes)
            for fast in refused:
                try:
                    torch.testing.assert_close(fast(*batch), model(*batch), rtol=1e-4, atol=1e-5)
                except OtherSizesError as error:
                    assert ".shape[" in str(error) or "is not" in str(error)
                    refused[fast] += 1
    assert refused[compiled] <= refused[loaded] < len(SIZES)
    assert (refused[loaded] > 0) == ("compiled again for other branches" in str(compiled))


def test_the_error_names_the_condition_the_sizes_and_what_to_do(tmp_path):
    rarefy.save(rarefy.compile(Branch("two inputs").eval(), inputs(2, 8, 3, 6), tune=False), tmp_path / "fast")
    says = r"sizes with x.shape\[1\] > y.shape\[1\], got x.shape\[1\] = 4, y.shape\[1\] = 6: compile the model with"
    with pytest.raises(OtherSizesError, match=says):
        rarefy.load(tmp_path / "fast")(*inputs(2, 4, 3, 6))


def test_a_size_that_follows_from_another_is_checked(tmp_path):
    class Double(nn.Module):
        def forward(self, x, y):
            return x + y.repeat(1, 2) if x.shape[1] == 2 * y.shape[1] else x

    compiled = rarefy.compile(Double().eval(), (torch.randn(2, 8), torch.randn(2, 4)), tune=False)
    assert compiled(torch.ones(3, 10), torch.ones(3, 5)).shape == (3, 10)
    rarefy.save(compiled, tmp_path / "fast")
    with pytest.raises(OtherSizesError, match=r"expected x.shape\[1\] == 2 \* y.shape\[1\], got x.shape\[1\] = 9"):
        rarefy.load(tmp_path / "fast")(torch.ones(3, 9), torch.ones(3, 5))


def test_numbers_of_another_type_are_other_constants():
    class Power(nn.Module):
        def forward(self, x, n):
            return x**n

    compiled = rarefy.compile(Power().eval(), (torch.arange(1, 5), 1), tune=False)
    for other in (True, 1.0, 2):
        says = f"n: compiled for 1, got {other}: this argument is no tensor .* with an example that has the other value"
        with pytest.raises(DataError, match=says):
            compiled(torch.arange(1, 5), other)
    with pytest.raises(DataError, match=r"n: compiled for 1, got a tensor float32 \[99, 99\]: "):
        compiled(torch.arange(1, 5), torch.zeros(99, 99))


# ---- other branches -------------------------------------------------------------------------------------------------


def test_numpy_arrays_by_name_take_their_branch():
    model = Branch("remainder").eval()
    compiled = rarefy.compile(model, inputs(2, 8, 3, 6), tune=False)
    x, y = inputs(2, 9, 3, 6)
    got = compiled.run({"x": x.numpy(), "y": y.numpy()})["output_0"]
    torch.testing.assert_close(torch.from_numpy(got), model(x, y).detach(), rtol=1e-4, atol=1e-5)


def test_a_deleted_or_changed_model_is_not_compiled_again():
    model = Branch("remainder").eval()
    compiled = rarefy.compile(model, inputs(2, 8, 3, 6), tune=False)
    model.layer.weight.data[3] += 1
    with pytest.raises(OtherSizesError, match="the model's weights have changed, so it is not compiled again"):
        compiled(*inputs(2, 9, 3, 6))
    del model
    gc.collect()
    with pytest.raises(OtherSizesError, match="compile the model with an example of these sizes"):
        compiled(*inputs(2, 9, 3, 6))


def test_the_number_of_branches_is_bounded(monkeypatch):
    monkeypatch.setattr(branches, "MAX_BRANCHES", 2)

    class Each(nn.Module):
        def forward(self, x):
            return x * sum(i for i in range(12) if x.shape[1] == i)

    compiled = rarefy.compile(Each().eval(), torch.randn(2, 3), tune=False)
    for n in (4, 5, 4, 5):
        x = torch.randn(2, n)
        torch.testing.assert_close(compiled(x), n * x)
    with pytest.raises(OtherSizesError, match="compiled again for 2 other branches already"):
        compiled(torch.randn(2, 6))


def test_a_model_that_fails_at_these_sizes_says_so():
    class Even(nn.Module):
        def forward(self, x):
            if x.shape[1] % 2:
                raise ValueError("an even length is needed")
            return x * 2

    compiled = rarefy.compile(Even().eval(), torch.randn(2, 4), tune=False)
    with pytest.raises(OtherSizesError, match="compiling it again failed: .*an even length is needed"):
        compiled(torch.randn(2, 5))


def test_calibrated_models_are_not_compiled_again():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x):
            return self.conv(x) * (2 if x.shape[0] % 2 else 1)

    x = torch.randn(2, 3, 8, 8)
    compiled = rarefy.compile(Conv().eval(), x, precision="int8", calibrate=[x], tune=False)
    with pytest.raises(OtherSizesError, match="compiled for sizes with x"):
        compiled(torch.randn(3, 3, 8, 8))


# ---- sizes that depend on values --------------------------------------------------------------------------------------


def test_sizes_that_depend_on_values_are_found_in_each_call():
    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) * torch.nonzero(x > 0).shape[0]

    model = Count().eval()
    compiled = rarefy.compile(model, torch.randn(3, 8), tune=False)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "condition", [lambda n: round(n / 3) % 2 == 1, lambda n: n != 1, lambda n: (n + 1) // 3 % 2 == 1]
)
def test_a_size_of_1_is_not_allowed_because_outputs_happen_to_agree(condition):
    """1 takes the other branch, with the same answer on the example."""

    class Positive(nn.Module):
        def forward(self, x):
            x = x.cumsum(1)
            return (x + 5 if condition(x.shape[1]) else x) > 0

    model = Positive().eval()
    compiled = rarefy.compile(model, torch.rand(3, 8), tune=False)
    assert torch.equal(compiled(-torch.ones(3, 1)), model(-torch.ones(3, 1)))  # of another branch
    compiled.branches = None
    with pytest.raises(DataError, match="1 is not 2 or more|only for sizes"):
        compiled(-torch.ones(3, 1))


# ---- outputs ----------------------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """Returns everything that could lie in memory of somebody else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("table", torch.arange(64.0).reshape(8, 8))

    def forward(self, x):
        y, n = self.layer(x), x.shape[0]
        of_values = y, y.clone(), y.view(-1), y.t().contiguous(), y * 1, x.clone(), x, x[:1]
        of_constants = self.table, self.table[:n], self.table.clone(), self.table * 2, self.layer.weight
        z = y.sin()
        of_parts = z.clone(), *z.chunk(2, 1)
        created = torch.tensor([1.0, 2.0]), torch.zeros(3), torch.arange(n), torch.ones(n, 1)
        return *of_values, *of_parts, *of_constants, *created


def memory(t):
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("saved", [False, True])
def test_outputs_belong_to_the_caller(saved, tmp_path):
    model = Outputs().eval()
    compiled = rarefy.compile(model, torch.randn(4, 8), tune=False)
    if saved:
        rarefy.save(compiled, tmp_path / "fast")
        compiled = rarefy.load(tmp_path / "fast")
    earlier = []
    for _ in range(3):
        x = torch.randn(4, 8)
        before = x.clone()
        with torch.no_grad():
            eager = model(x)
            want, got = [t.clone() for t in eager], compiled(x)
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            for i in range(len(got)):
                for j in range(i):
                    assert memory(got[i]) != memory(got[j]) or memory(eager[i]) == memory(eager[j]), (i, j)
            assert not {memory(t) for t in got} & {memory(t) for t in (x, *earlier)}
            earlier += got
            for t in got:
                t.fill_(7)
        assert torch.equal(x, before)


def test_a_program_of_torch_in_memory_keeps_its_conditions():
    model = Branch("remainder").eval()
    dims = ([Dim.AUTO, Dim.AUTO, Dim.STATIC], [Dim.AUTO, Dim.AUTO])
    program = export(model, inputs(2, 8, 3, 6), dynamic_shapes=dims, strict=False)
    compiled = rarefy.compile(program, tune=False)
    batch = inputs(3, 12, 3, 6)
    torch.testing.assert_close(compiled(*batch), model(*batch).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises((OtherSizesError, ModelError), match="% 4 == 0"):
        compiled(*inputs(2, 9, 3, 6))
