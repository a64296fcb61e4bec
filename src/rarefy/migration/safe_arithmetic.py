"""The arithmetic that recipes of other tools hold in strings. Text is parsed and computed by these tables; nothing is
ever run: no attributes, no indices, no strings, no calls but these."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from rarefy.common.errors import RecipeError, unknown

LONGEST = 200  # characters
LARGEST = 1e15
PLACES = 15
BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: float(a) ** float(b),  # of whole numbers it could fill the memory
}
UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
CALLS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "abs": abs, "round": lambda x, places=0: _round(x, places), "int": int, "float": float,
    "floor": math.floor, "ceil": math.ceil,
}  # fmt: skip


def compute(text: str, names: Mapping[str, float], where: str) -> float:
    """Return the number that an expression comes to. RecipeError names `where` for all that is no arithmetic.

    >>> compute("max(1, epochs * 0.5) - 1", {"epochs": 30}, "here")
    14.0
    """
    if len(text) > LONGEST:
        raise RecipeError(f"an expression of {len(text):,} characters; at most {LONGEST} are computed [{where}]")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise RecipeError(f"{text[:60]!r} is no arithmetic [{where}]") from None
    try:
        found = _bounded(_number(tree, names, where))
    except (ArithmeticError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{text[:60]!r} cannot be computed: {error} [{where}]") from None
    return found


def _bounded(value: Any) -> Any:
    """A number that more can be computed with, at every step: a whole one could otherwise grow without end."""
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ValueError(f"it comes to {value!r:.60}, which is no number to go by")
    return value


def _round(x: Any, places: Any) -> Any:
    if not -PLACES <= places <= PLACES:
        raise ValueError(f"round takes up to {PLACES} places")
    return round(x, int(places)) if places else round(x)


def _number(node: ast.AST, names: Mapping[str, float], where: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise RecipeError(unknown("variable", node.id, names, where))
        return _bounded(names[node.id])
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = _number(node.left, names, where), _number(node.right, names, where)
        return _bounded(BINARY[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](_number(node.operand, names, where))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS and not node.keywords:
        return CALLS[node.func.id](*(_number(a, names, where) for a in node.args))
    what = "a call" if isinstance(node, ast.Call) else type(node).__name__.lower()
    raise RecipeError(f"arithmetic has numbers, variables, + - * / and {', '.join(CALLS)}; got {what} [{where}]")
