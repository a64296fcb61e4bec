"""Conditions on sizes that torch.export finds while it traces a model, in the grammar of `shape_guards.py`."""

from __future__ import annotations

import ast
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as torch_functions

from rarefy.compiler.shape_guards import MAX_SIZE, parse

TORCH = os.path.dirname(torch.__file__) + os.sep
LAYERS = os.path.join(TORCH, "nn", "")
SYMBOLIC = (os.path.join(TORCH, "__init__.py"), os.path.join(TORCH, "fx", "experimental", ""), __file__)
STANDARD = (os.path.dirname(os.__file__) + os.sep, "<frozen ")  # modules of Python, which format and hash for callers
INSTALLED = tuple(os.path.join(STANDARD[0], n, "") for n in ("site-packages", "dist-packages"))
LOGGING = os.path.join("logging", "__init__.py")  # to which a text is no more than a text
EINOPS = f"{os.sep}einops{os.sep}"  # which asks for hashes of sizes, and does without
NUMBERS = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}  # that stand for numbers while torch traces
RELATIONS = {
    sympy.Eq: "==", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">", sympy.Ge: ">=",
}  # fmt: skip
MAX_FRACTION = 1 << 10  # denominator of a number with which sizes are multiplied or compared: float arithmetic is exact
MAX_FACTOR = 1 << 20


@contextmanager
def recorded_decisions() -> Iterator[list[Any]]:
    """Collect the conditions on sizes that a model's code asks for while torch.export traces it.

    torch takes open sizes to be 2 or more, and keeps no guard of what follows from that: `x.shape[0] == 1` is false for
    it. A compiled model takes sizes of 1 too, so these conditions count. torch's own questions, of strides and
    broadcasting, do not: whether the graph is right at 1 is compared later, see `verify.py`.
    """
    decisions: list[Any] = []
    original = ShapeEnv.evaluate_expr

    def evaluate_expr(self: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
        value = original(self, expression, *args, **kwargs)
        if isinstance(expression, sympy.logic.boolalg.Boolean) and expression.free_symbols and _is_asked_by_model():
            decisions.append(expression if value else sympy.Not(expression))
        return value

    with patch.object(ShapeEnv, "evaluate_expr", evaluate_expr):
        yield decisions


def _is_asked_by_model(on_the_way: tuple[str, ...] = ()) -> bool:
    """Return whether a condition on sizes is evaluated by a model's code, or that of torch's layers.

    on_the_way: files whose code asks for its callers.
    """
    frame = sys._getframe(2)
    path = frame.f_code.co_filename
    while frame.f_back is not None and path.startswith((*SYMBOLIC, *on_the_way)) and not path.startswith(INSTALLED):
        if path.endswith(LOGGING):
            return False
        frame = frame.f_back
        path = frame.f_code.co_filename
    return (not path.startswith(TORCH) or path.startswith(LAYERS)) and EINOPS not in path


@contextmanager
def plain_texts() -> Iterator[None]:
    """Let text and hash of a size be those of its number, where a model's code asks for them, and fix the size.

    torch's text of a size is its symbol, "s27", and it keeps no guard: a layer by the name `str(n)`, or a dictionary by
    size, would be looked up once for all sizes. Sizes that depend on values keep their symbols.
    """

    def plain(kind: type, name: str, original: Callable[..., Any], number: type) -> Any:
        def plain_one(self: Any, *args: Any) -> Any:
            if not self.node.has_hint() or not _is_asked_by_model(STANDARD):
                return original(self, *args)
            return getattr(number, name)(number(self), *args)

        return patch.object(kind, name, plain_one)

    with ExitStack() as stack:
        for kind, number in NUMBERS.items():
            for name in ("__repr__", "__format__", "__hash__"):
                stack.enter_context(plain(kind, name, getattr(kind, name), number))
        yield


def conditions(
    program: Any, inputs: Iterable[Any], decisions: Iterable[Any]
) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Return the ranges of open sizes, and the guards, of a program that torch has just exported. O(guards).

    A size in a guard that the grammar cannot express is fixed to the example's: its guard is "s0 == 8".

    Args:
        program: torch's exported program.
        inputs: what torch recorded for each input.
        decisions: what the model's code asked of sizes, see `recorded_decisions`.

    Raises:
        ValueError: a guard reads a size that no input has.
    """
    dims = [s.node for t in inputs if isinstance(t, Tensor) for s in t.shape if isinstance(s, torch.SymInt)]
    if not dims:
        return {}, ()
    hints = {str(d.expr): int(d.hint) for d in dims if d.expr.is_Symbol}
    torch_ranges = {str(k): (int(v.lower), int(min(v.upper, MAX_SIZE))) for k, v in program.range_constraints.items()}
    ranges = {n: (1 if torch_ranges[n][0] <= 2 else torch_ranges[n][0], torch_ranges[n][1]) for n in hints}
    env = dims[0].shape_env
    texts: dict[str, None] = {}
    for guard in env.guards:
        texts |= dict.fromkeys(_write_guard(_replaced(guard.expr, env.replacements), hints))
    for size in (d.expr for d in dims if not d.expr.is_Symbol):
        if from_torch(size) is None:
            texts |= dict.fromkeys(_write_guard(size, hints))
    for decision in decisions:
        decision = _replaced(decision, env.replacements)
        if {str(s) for s in decision.free_symbols} <= hints.keys():
            text = from_torch(decision)
            names = [] if text else [f"{n} != 1" for n in sorted(map(str, decision.free_symbols))]
            texts |= dict.fromkeys([text] if text else names)
    return ranges, tuple(t for t in texts if parse(t).names and not _is_implied(t, ranges))


def _write_guard(expression: Any, hints: Mapping[str, int]) -> list[str]:
    """Return a condition as text; of one that the grammar cannot express conditions that fix all sizes in it."""
    text, names = from_torch(expression), sorted(map(str, expression.free_symbols))
    if not hints.keys() >= set(names):
        raise ValueError(f"a size of an input depends on {expression}, which is no size of an input")
    if text is None:
        return [f"{n} == {hints[n]}" for n in names]
    return [text]


def _replaced(expression: Any, replacements: Mapping[Any, Any]) -> Any:
    """Return an expression of the sizes that torch kept, where it found some to be equal."""
    for _ in range(len(replacements)):
        new = expression.xreplace(replacements)
        if new == expression:
            break
        expression = new
    return expression


def _is_implied(text: str, ranges: Mapping[str, tuple[int, int]]) -> bool:
    """Return whether a comparison of one size with a number is true in all of its range."""
    parts = text.split(" ")
    if len(parts) != 3 or parts[0] not in ranges or not parts[2].isdigit() or parts[1] not in ("<", "<=", ">", ">="):
        return False
    return all(parse(text).holds({parts[0]: n}) for n in ranges[parts[0]])


def from_torch(expression: Any) -> str | None:
    """Return torch's symbolic expression of sizes in the grammar, None if it cannot be written there.

    >>> s = sympy.Symbol("s0", integer=True, positive=True)
    >>> from_torch(sympy.Eq(torch_functions.Mod(s, 4), 0)), from_torch(s**2 > 9), from_torch(sympy.sqrt(s) > 2)
    ('s0 % 4 == 0', 's0 * s0 > 9', None)
    """
    try:
        return ast.unparse(ast.parse(_write(sympy.sympify(expression)), mode="eval"))
    except _Inexpressible:
        return None


class _Inexpressible(Exception):
    """An expression that the grammar does not have."""


def _write(e: Any) -> str:
    """Return an expression in parentheses, if it is not a name, a number or a call."""
    if e.is_Symbol:
        return str(e)
    if e is sympy.true or e is sympy.false:
        return str(int(e is sympy.true))
    if e.is_Integer:
        return str(int(e))
    if isinstance(e, sympy.Eq | sympy.Ne) and (simpler := _without_minimum(e)) is not None:
        return _write(simpler)
    if type(e) in RELATIONS:
        left, right = _whole_sides(e.lhs, e.rhs)
        return f"({left} {RELATIONS[type(e)]} {right})"
    if isinstance(e, sympy.And | sympy.Or):
        return _joined(f" {'and' if isinstance(e, sympy.And) else 'or'} ", e.args)
    if isinstance(e, sympy.Not):
        return f"(not {_write(e.args[0])})"
    if e.is_Add or e.is_Mul:
        return _joined(" + " if e.is_Add else " * ", e.args)
    if isinstance(e, torch_functions.Max | torch_functions.Min | sympy.Max | sympy.Min):
        name = "max" if "Max" in type(e).__name__ else "min"
        return f"{name}({', '.join(map(_write, e.args))})"
    if isinstance(e, torch_functions.FloorDiv):
        return f"({_write(e.args[0])} // {_write(e.args[1])})"
    if isinstance(e, torch_functions.Mod | torch_functions.PythonMod | sympy.Mod):
        return f"({_write(e.args[0])} % {_write(e.args[1])})"
    if isinstance(e, sympy.Pow | torch_functions.PowByNatural) and 0 < _number(e.args[1]) <= 8:
        return _joined(" * ", [e.args[0]] * _number(e.args[1]))
    if isinstance(e, sympy.Abs):
        return f"max({_write(e.args[0])}, -{_write(e.args[0])})"
    if isinstance(e, torch_functions.CeilDiv):
        return f"(-(-{_write(e.args[0])} // {_write(e.args[1])}))"
    return _rounded(e)


def _without_minimum(e: Any) -> Any:
    """Return `a == min(a, b)` as `a <= b`, None for other comparisons."""
    for a, m in ((e.lhs, e.rhs), (e.rhs, e.lhs)):
        if isinstance(m, torch_functions.Min) and len(m.args) == 2 and a in m.args:
            b = next(x for x in m.args if x != a)
            return a <= b if isinstance(e, sympy.Eq) else a > b
    return None


def _number(e: Any) -> int:
    """Return a positive whole number, 0 for what is none."""
    return max(int(e), 0) if e.is_Integer else 0


def _joined(sign: str, parts: Sequence[Any]) -> str:
    return f"({sign.join(map(_write, parts))})"


def _rounded(e: Any) -> str:
    """Return the integer that a fraction of sizes is rounded to."""
    kinds = (torch_functions.FloorToInt, torch_functions.TruncToInt, torch_functions.CeilToInt)
    if not isinstance(e, kinds):
        raise _Inexpressible
    numerator, denominator = _ratio(e.args[0])
    if isinstance(e, torch_functions.CeilToInt):
        return f"(-(-{numerator} // {denominator}))"
    if isinstance(e, torch_functions.TruncToInt):  # towards 0
        return f"(max({numerator}, 0) // {denominator} - max(-{numerator}, 0) // {denominator})"
    return f"({numerator} // {denominator})"


def _ratio(e: Any) -> tuple[str, str]:
    """Return numerator and denominator of a number that is rounded, or compared with a small fraction.

    A quotient of sizes is rounded by less than its distance from other such numbers, so that the result is exact.
    """
    if isinstance(e, torch_functions.IntTrueDiv):
        divisor = e.args[1]
        if divisor.is_Symbol or 0 < _number(divisor) <= MAX_FACTOR:
            return _write(e.args[0]), _write(divisor)
    numerator, denominator = _fraction(torch_functions.ToFloat(e) if e.is_integer else e)
    return numerator, str(denominator)


def _fraction(e: Any) -> tuple[str, int]:
    """Return numerator and denominator of a number whose float arithmetic is exact: sizes times small fractions."""
    if isinstance(e, torch_functions.ToFloat):
        return _write(e.args[0]), 1
    if isinstance(e, torch_functions.IntTrueDiv) and 0 < _number(e.args[1]) <= MAX_FRACTION:
        divisor = _number(e.args[1])
        if divisor & (divisor - 1) == 0:  # other quotients are rounded
            return _write(e.args[0]), divisor
    if e.is_Float or e.is_Rational:
        numerator, denominator = float(e).as_integer_ratio()
        if denominator <= MAX_FRACTION and abs(numerator) <= MAX_FACTOR * denominator:
            return str(numerator), denominator
    if e.is_Mul or e.is_Add:
        parts = [_fraction(a) for a in e.args]
        common = reduce(operator.mul, (d for _, d in parts))
        if common <= MAX_FRACTION and e.is_Mul:
            return f"({' * '.join(n for n, _ in parts)})", common
        if common <= MAX_FRACTION:
            return f"({' + '.join(f'{n} * {common // d}' for n, d in parts)})", common
    raise _Inexpressible


def _whole_sides(left: Any, right: Any) -> tuple[str, str]:
    """Return both sides of a comparison as whole numbers: each is multiplied by the other side's denominator."""
    if all(side.is_integer or isinstance(side, sympy.logic.boolalg.BooleanAtom) for side in (left, right)):
        return _write(left), _write(right)
    (a, b), (c, d) = _ratio(left), _ratio(right)
    if all(isinstance(side, torch_functions.IntTrueDiv) for side in (left, right)):
        raise _Inexpressible  # two quotients may be rounded to the same number
    return f"({a} * {d})", f"({c} * {b})"
