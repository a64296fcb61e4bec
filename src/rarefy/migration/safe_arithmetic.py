"""Compute arithmetic expressions that recipes of other tools contain as strings.

The text is parsed and computed by the tables below. No code is run: no attributes, indices, strings or other calls.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from rarefy.common.errors import RecipeError, unknown

MAX_LENGTH = 200  # characters
MAX_VALUE = 1e15
MAX_DIGITS = 15
BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: float(a) ** float(b),  # int powers could fill the memory
}
UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
CALLS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "abs": abs, "round": lambda x, digits=0: _round(x, digits), "int": int, "float": float,
    "floor": math.floor, "ceil": math.ceil,
}  # fmt: skip


def names_in(text: str) -> set[str]:
    """Return the variables in an expression; none if it is too long or not Python.

    >>> sorted(names_in("max(1, epochs * 0.5) - start"))
    ['epochs', 'start']
    """
    try:
        tree = ast.parse(text.strip()[: MAX_LENGTH + 1], mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return set()
    nodes = list(ast.walk(tree))
    called = {id(n.func) for n in nodes if isinstance(n, ast.Call)}
    return {n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in called}


def compute(text: str, names: Mapping[str, Any], where: str) -> float:
    """Return the value of an expression. RecipeError with the location `where` for anything but arithmetic.

    >>> compute("max(1, epochs * 0.5) - 1", {"epochs": 30}, "here")
    14.0
    """
    if len(text) > MAX_LENGTH:
        raise RecipeError(f"the expression has {len(text):,} characters, at most {MAX_LENGTH} are allowed [{where}]")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise RecipeError(f"{text[:60]!r} is not arithmetic [{where}]") from None
    try:
        return _bounded(_number(tree, names, where))
    except RecipeError:
        raise
    except (ArithmeticError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{text[:60]!r} cannot be computed: {error} [{where}]") from None


def _bounded(value: Any) -> Any:
    """Return an intermediate result; ValueError if it is too large (ints could grow without limit)."""
    if isinstance(value, complex) or not abs(value) <= MAX_VALUE:
        raise ValueError(f"the result {value!r:.60} is too large or not real")
    return value


def _round(x: Any, digits: Any) -> Any:
    if not -MAX_DIGITS <= digits <= MAX_DIGITS:
        raise ValueError(f"round takes up to {MAX_DIGITS} digits")
    return round(x, int(digits)) if digits else round(x)


def _number(node: ast.AST, names: Mapping[str, Any], where: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise RecipeError(unknown("variable", node.id, names, where))
        value = names[node.id]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"variable {node.id} is {value!r:.40}; arithmetic takes numbers [{where}]")
        return _bounded(value)
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        lhs, rhs = _number(node.left, names, where), _number(node.right, names, where)
        return _bounded(BINARY[type(node.op)](lhs, rhs))
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](_number(node.operand, names, where))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS and not node.keywords:
        return CALLS[node.func.id](*(_number(a, names, where) for a in node.args))
    what = "a call" if isinstance(node, ast.Call) else type(node).__name__.lower()
    raise RecipeError(f"arithmetic has numbers, variables, + - * / and {', '.join(CALLS)}; got {what} [{where}]")
