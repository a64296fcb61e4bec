"""Run Python source of a small subset without exec: statements and expressions as the models of tests use them.

Values may be symbolic sizes of torch.export: conditions, comparisons and loops ask them as Python does.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.MatMult: operator.matmul,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
IN_PLACE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.iadd,
    ast.Sub: operator.isub,
    ast.Mult: operator.imul,
    ast.Div: operator.itruediv,
    ast.FloorDiv: operator.ifloordiv,
}
UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class _Return(Exception):
    def __init__(self, value: Any):
        self.value = value


class _Break(Exception):
    pass


class Program:
    """Functions of a source text, to be called.

    Args:
        source: function definitions. Each may call the others.
        names: what the source may name besides its own functions and variables.

    Example:
        >>> program = Program("def half(n):\\n    return n // 2 if n > 1 else n", {})
        >>> program.call("half", 7)
        3
    """

    def __init__(self, source: str, names: Mapping[str, Any]):
        self.names = dict(names)
        for node in ast.parse(source).body:
            assert isinstance(node, ast.FunctionDef), ast.unparse(node)
            self.names[node.name] = _Function(self, node)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # nothing changes it

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the source by its name."""
        return self.names[name](*args)


class _Function:
    def __init__(self, program: Program, node: ast.FunctionDef):
        self.program, self.node = program, node
        self.parameters = [a.arg for a in node.args.args]

    def __call__(self, *args: Any) -> Any:
        assert len(args) == len(self.parameters), self.node.name
        try:
            _Frame(self.program.names, dict(zip(self.parameters, args))).run(self.node.body)
        except _Return as result:
            return result.value
        return None


class _Frame:
    """The variables of one call."""

    def __init__(self, names: Mapping[str, Any], variables: dict[str, Any]):
        self.names, self.variables = names, variables

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            getattr(self, f"run_{type(statement).__name__}")(statement)

    def run_Expr(self, s: ast.Expr) -> None:
        self.value(s.value)

    def run_Pass(self, s: ast.Pass) -> None:
        pass

    def run_Break(self, s: ast.Break) -> None:
        raise _Break

    def run_Return(self, s: ast.Return) -> None:
        raise _Return(None if s.value is None else self.value(s.value))

    def run_Assign(self, s: ast.Assign) -> None:
        value = self.value(s.value)
        for target in s.targets:
            self.assign(target, value)

    def run_AugAssign(self, s: ast.AugAssign) -> None:
        load = ast.parse(ast.unparse(s.target), mode="eval").body
        self.assign(s.target, IN_PLACE[type(s.op)](self.value(load), self.value(s.value)))

    def run_If(self, s: ast.If) -> None:
        self.run(s.body if self.value(s.test) else s.orelse)

    def run_For(self, s: ast.For) -> None:
        try:
            for item in self.value(s.iter):
                self.assign(s.target, item)
                self.run(s.body)
        except _Break:
            pass

    def run_While(self, s: ast.While) -> None:
        try:
            while self.value(s.test):
                self.run(s.body)
        except _Break:
            pass

    def run_Assert(self, s: ast.Assert) -> None:
        if not self.value(s.test):
            raise AssertionError(self.value(s.msg) if s.msg else "")

    def run_Raise(self, s: ast.Raise) -> None:
        raise self.value(s.exc)

    def run_Try(self, s: ast.Try) -> None:
        (handler,) = s.handlers
        try:
            self.run(s.body)
        except self.value(handler.type):
            self.run(handler.body)

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.variables[target.id] = value
        elif isinstance(target, ast.Tuple):
            for part, item in zip(target.elts, value, strict=True):
                self.assign(part, item)
        elif isinstance(target, ast.Subscript):
            self.value(target.value)[self.value(target.slice)] = value
        else:
            assert isinstance(target, ast.Attribute), ast.unparse(target)
            setattr(self.value(target.value), target.attr, value)

    def value(self, e: ast.expr) -> Any:
        return getattr(self, f"value_{type(e).__name__}")(e)

    def value_Constant(self, e: ast.Constant) -> Any:
        return e.value

    def value_Name(self, e: ast.Name) -> Any:
        return self.variables[e.id] if e.id in self.variables else self.names[e.id]

    def value_Attribute(self, e: ast.Attribute) -> Any:
        return getattr(self.value(e.value), e.attr)

    def value_Subscript(self, e: ast.Subscript) -> Any:
        return self.value(e.value)[self.value(e.slice)]

    def value_Slice(self, e: ast.Slice) -> slice:
        return slice(*(None if part is None else self.value(part) for part in (e.lower, e.upper, e.step)))

    def value_Tuple(self, e: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.items(e.elts))

    def value_List(self, e: ast.List) -> list[Any]:
        return self.items(e.elts)

    def value_Dict(self, e: ast.Dict) -> dict[Any, Any]:
        return {self.value(k): self.value(v) for k, v in zip(e.keys, e.values) if k is not None}

    def value_BinOp(self, e: ast.BinOp) -> Any:
        return BINARY[type(e.op)](self.value(e.left), self.value(e.right))

    def value_UnaryOp(self, e: ast.UnaryOp) -> Any:
        return UNARY[type(e.op)](self.value(e.operand))

    def value_BoolOp(self, e: ast.BoolOp) -> Any:
        stops_at = isinstance(e.op, ast.Or)
        for part in e.values[:-1]:
            value = self.value(part)
            if bool(value) == stops_at:
                return value
        return self.value(e.values[-1])

    def value_Compare(self, e: ast.Compare) -> Any:
        left, result = self.value(e.left), True
        for i, (op, right) in enumerate(zip(e.ops, map(self.value, e.comparators))):
            result = COMPARISONS[type(op)](left, right)
            if i + 1 == len(e.ops) or not result:
                break
            left = right
        return result

    def value_IfExp(self, e: ast.IfExp) -> Any:
        return self.value(e.body if self.value(e.test) else e.orelse)

    def value_Call(self, e: ast.Call) -> Any:
        return self.value(e.func)(*self.items(e.args), **{str(k.arg): self.value(k.value) for k in e.keywords})

    def value_ListComp(self, e: ast.ListComp) -> list[Any]:
        (loop,) = e.generators
        results = []
        for item in self.value(loop.iter):
            self.assign(loop.target, item)
            if all(self.value(test) for test in loop.ifs):
                results.append(self.value(e.elt))
        return results

    def items(self, parts: list[ast.expr]) -> list[Any]:
        items: list[Any] = []
        for part in parts:
            if isinstance(part, ast.Starred):
                items += self.value(part.value)
            else:
                items.append(self.value(part))
        return items
