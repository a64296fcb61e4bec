"""Conditions on the sizes of inputs under which an exported graph is right: their text, parsed and evaluated.

A guard is an expression of whole numbers: names of open sizes, numbers, `+ - * // %`, `min`, `max`, comparisons, `and`,
`or` and `not`, written as Python writes them: "s27 % 4 == 0". Texts come from files too, so they are parsed and walked;
nothing is executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

Sizes = Mapping[str, int]
Evaluate = Callable[[Sizes], int]

MAX_TEXT = 4_000  # characters of a guard
MAX_SIZE = 1 << 62  # of an open size about which nothing is known
BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip
COMPARISONS: dict[type, Callable[[int, int], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
CALLS: dict[str, Callable[..., int]] = {"min": min, "max": max}


@dataclass(frozen=True)
class Guard:
    """A condition on sizes.

    Attributes:
        text: the condition, as a user reads it and as files keep it.
        names: the names of sizes in it.
        evaluate: returns its value for sizes by name; ZeroDivisionError where it divides by 0.
    """

    text: str
    names: frozenset[str]
    evaluate: Evaluate

    def holds(self, sizes: Sizes) -> bool:
        """Return whether the condition holds; one that divides by 0 does not."""
        try:
            return bool(self.evaluate(sizes))
        except ZeroDivisionError:
            return False


@cache
def parse(text: str) -> Guard:
    """Return the guard that a text describes. O(its length).

    Raises:
        ValueError: if the text is no expression of this grammar.

    Example:
        >>> guard = parse("s0 % 4 == 0 and max(s0, s1) > 5")
        >>> guard.holds({"s0": 8, "s1": 2}), guard.holds({"s0": 9, "s1": 2}), sorted(guard.names)
        (True, False, ['s0', 's1'])
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"expected a condition of at most {MAX_TEXT} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        evaluate = _evaluator(tree)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text[:80]!r} is not a condition on sizes") from None
    functions = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in functions}
    return Guard(text, frozenset(names), evaluate)


def _evaluator(node: ast.expr) -> Evaluate:
    """Return a function that evaluates an expression; ValueError for one outside of the grammar."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) <= MAX_SIZE:
        value = int(node.value)
        return lambda sizes: value
    if isinstance(node, ast.Name):
        name = node.id
        return lambda sizes: sizes[name]
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right, function = _evaluator(node.left), _evaluator(node.right), BINARY[type(node.op)]
        return lambda sizes: function(left(sizes), right(sizes))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        operand, negates = _evaluator(node.operand), isinstance(node.op, ast.Not)
        return (lambda sizes: not operand(sizes)) if negates else (lambda sizes: -operand(sizes))
    if isinstance(node, ast.Compare) and all(type(op) in COMPARISONS for op in node.ops):
        operands = [_evaluator(n) for n in (node.left, *node.comparators)]
        return _chain(operands, [COMPARISONS[type(op)] for op in node.ops])
    if isinstance(node, ast.BoolOp):
        parts, combine = [_evaluator(n) for n in node.values], all if isinstance(node.op, ast.And) else any
        return lambda sizes: combine(part(sizes) for part in parts)
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if isinstance(node, ast.Call) and called in CALLS and len(node.args) > 1 and not node.keywords:
        arguments, reduction = [_evaluator(n) for n in node.args], CALLS[called]
        return lambda sizes: reduction(a(sizes) for a in arguments)
    allowed = "names of sizes, whole numbers, + - * // %, min, max, comparisons, and, or, not"
    raise ValueError(f"expected {allowed}, got {ast.unparse(node)[:80]!r}")


def _chain(operands: Sequence[Evaluate], comparisons: Sequence[Callable[[int, int], bool]]) -> Evaluate:
    """Return a function that evaluates `a < b < c`."""
    pairs = list(zip(operands, comparisons, operands[1:]))
    return lambda sizes: all(compare(a(sizes), b(sizes)) for a, compare, b in pairs)
