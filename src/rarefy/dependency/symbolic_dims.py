"""Symbolic dimensions: what a dimension of a tensor consists of, refined while a model is traced.

    Axis   n units without further structure; a locked axis keeps all its units
    Prod   row-major pairs, as `view` merges dimensions: heads x head_dim
    Sum    concatenation, as `cat` joins dimensions: queries, keys, values

A dimension starts as one Axis. If an operator shows that it consists of others (a view splits it, a chunk cuts it), the
axis is replaced in every dimension that holds it. Dimensions that must agree (in an addition or a product) are unified.
In the end, removing unit j of an axis removes the same indices wherever the axis occurs: these are coupled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Axis:
    """Units of a dimension.

    into    what the axis was refined to
    lock    why none of its units can be removed
    kind    what the units are: head, head_dim, ...
    scores  attention sums over them when it compares queries with keys
    notes   what a removal changes besides the units
    """

    __slots__ = ("into", "kind", "lock", "notes", "scores", "size")

    def __init__(self, size: int, lock: str | None = None):
        self.size, self.lock, self.kind = size, lock, ""
        self.into: Expr | None = None
        self.scores = False
        self.notes: set[str] = set()

    def __repr__(self) -> str:
        return f"Axis({self.size}{', locked' if self.lock else ''})"


@dataclass(frozen=True, eq=False)
class Prod:
    """Row-major product of dimensions."""

    of: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Sum:
    """Concatenation of dimensions."""

    of: tuple[Expr, ...]


Expr = Axis | Prod | Sum
ONE = Prod(())


def size(e: Expr) -> int:
    """Return the number of indices of a dimension. O(axes)."""
    if isinstance(e, Axis):
        return e.size
    return math.prod(map(size, e.of)) if isinstance(e, Prod) else sum(map(size, e.of))


def resolve(e: Expr) -> Expr:
    """Return the refined dimension in normal form, in which equal dimensions look equal. O(axes).

    There is no Prod in a Prod, no Sum in a Sum or first in a Prod, and nothing of size 1 in a Prod.
    """
    if isinstance(e, Axis):
        if e.into is None:
            return ONE if e.size == 1 else e
        return resolve(e.into)
    if isinstance(e, Prod):
        factors: list[Expr] = []
        for f in map(resolve, e.of):
            factors += f.of if isinstance(f, Prod) else (f,)
        if len(factors) == 1:
            return factors[0]
        if factors and isinstance(factors[0], Sum):
            head, rest = factors[0], tuple(factors[1:])
            return resolve(Sum(tuple(Prod((t, *rest)) for t in head.of)))
        return Prod(tuple(factors))
    terms: list[Expr] = []
    for t in map(resolve, e.of):
        terms += t.of if isinstance(t, Sum) else (t,)
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def leaves(e: Expr) -> Iterator[Axis]:
    """Yield the axes of a dimension, as often as they occur."""
    e = resolve(e)
    if isinstance(e, Axis):
        yield e
    else:
        for part in e.of:
            yield from leaves(part)


def products(e: Expr) -> Iterator[Prod]:
    """Yield the outermost products in a dimension."""
    e = resolve(e)
    if isinstance(e, Prod):
        yield e
    elif isinstance(e, Sum):
        for part in e.of:
            yield from products(part)


def lock(e: Expr, why: str) -> None:
    """Keep every unit of a dimension."""
    for axis in leaves(e):
        axis.lock = axis.lock or why


def fixed(n: int, why: str = "no parameter decides its size") -> Expr:
    """Return a dimension that keeps its size."""
    return ONE if n == 1 else Axis(n, why)


def is_fixed(e: Expr) -> bool:
    """Return whether every unit is kept."""
    return all(a.lock for a in leaves(e))


class Algebra:
    """Refines dimensions. Dimensions that cannot be expressed are locked."""

    def __init__(self) -> None:
        self.where = ""  # the operator and module being traced, for messages
        self.equal: list[tuple[Expr, Expr]] = []  # pairs of parts that must keep equally many indices

    def clash(self, *es: Expr, parts: tuple[int, int] = (1, 1)) -> tuple[Expr, Expr]:
        """Lock dimensions that do not line up; return two locked dimensions of these sizes instead."""
        why = f"shapes do not line up at {self.where}"
        for e in es:
            lock(e, why)
        return fixed(parts[0], why), fixed(parts[1], why)

    def factor(self, e: Expr, k: int) -> tuple[Expr, Expr]:
        """Return (outer, inner), with `k` outer units, whose product is e."""
        e = resolve(e)
        n = size(e)
        if k == 1:
            return ONE, e
        if k == n:
            return e, ONE
        if n % k:
            return self.clash(e, parts=(k, max(n // k, 1)))
        if isinstance(e, Axis):
            if e.lock:
                return Axis(k, e.lock), Axis(n // k, e.lock)
            outer, inner = Axis(k), Axis(n // k)
            e.into = Prod((outer, inner))
            return outer, inner
        if isinstance(e, Prod):
            passed: list[Expr] = []
            passed_size = 1
            for i, f in enumerate(e.of):
                rest = e.of[i + 1 :]
                needed = k // passed_size if k % passed_size == 0 else 0
                if needed == 1:
                    return Prod(tuple(passed)), Prod((f, *rest))
                s = size(f)
                if needed and needed < s and s % needed == 0:
                    outer, inner = self.factor(f, needed)
                    return Prod((*passed, outer)), Prod((inner, *rest))
                if not needed or needed % s:
                    break
                passed.append(f)
                passed_size *= s
            return self.clash(e, parts=(k, n // k))
        return self._factor_sum(e, n // k)

    def _factor_sum(self, e: Sum, m: int) -> tuple[Expr, Expr]:
        """Factor a sum into rows of m: a term gives whole rows, or several terms together give one."""
        outer: list[Expr] = []
        inner: Expr | None = None
        row: list[Expr] = []
        for term in e.of:
            row.append(term)
            row_size = sum(map(size, row))
            if row_size < m:
                continue
            if row_size % m or (len(row) > 1 and row_size != m):
                break
            outer_part, inner_part = self.factor(term, row_size // m) if len(row) == 1 else (ONE, Sum(tuple(row)))
            outer.append(outer_part)
            if inner is None:
                inner = inner_part
            else:
                self.unify(inner, inner_part)
            row = []
        if row or inner is None:
            return self.clash(e, parts=(size(e) // m, m))
        return Sum(tuple(outer)), inner

    def take(self, e: Expr, k: int) -> tuple[Expr, Expr]:
        """Return (the first k indices, the others)."""
        e = resolve(e)
        n = size(e)
        assert 0 < k < n
        if isinstance(e, Axis):
            if e.lock:
                return Axis(k, e.lock), Axis(n - k, e.lock)
            first, others = Axis(k), Axis(n - k)
            e.into = Sum((first, others))
            return first, others
        if isinstance(e, Sum):
            passed: list[Expr] = []
            for i, term in enumerate(e.of):
                s = size(term)
                if k == 0:
                    return Sum(tuple(passed)), Sum(e.of[i:])
                if k < s:
                    a, b = self.take(term, k)
                    return Sum((*passed, a)), Sum((b, *e.of[i + 1 :]))
                passed.append(term)
                k -= s
        elif e.of:
            m = n // size(e.of[0])
            if k % m == 0:
                a, b = self.take(e.of[0], k // m)
                return Prod((a, *e.of[1:])), Prod((b, *e.of[1:]))
        return self.clash(e, parts=(k, n - k))

    def cut(self, e: Expr, sizes: Sequence[int]) -> list[Expr]:
        """Return consecutive parts of a dimension; parts of equal size keep equally many units."""
        parts, rest = [], e
        for k in sizes[:-1]:
            none = Axis(0, "it has no indices")
            first, rest = (none, rest) if k == 0 else (rest, none) if k == size(rest) else self.take(rest, k)
            parts.append(first)
        parts.append(rest)
        self.equal += [(a, b) for a, b in pairwise(parts) if size(a) == size(b)]
        return parts

    def unify(self, a: Expr, b: Expr) -> None:
        """Make two dimensions the same."""
        a, b = resolve(a), resolve(b)
        if a is b or (isinstance(a, Prod) and isinstance(b, Prod) and not a.of and not b.of):
            return
        if size(a) != size(b):
            self.clash(a, b)
            return None
        if isinstance(b, Axis) and not isinstance(a, Axis):
            a, b = b, a
        if isinstance(a, Axis):
            if a.lock:
                return lock(b, a.lock)
            if isinstance(b, Axis) and b.lock:
                a.lock = b.lock
                return None
            if any(x is a for x in leaves(b)):
                self.clash(a, b)
                return None
            a.into = b
            for axis in leaves(b):
                axis.notes |= a.notes
                axis.scores |= a.scores
                axis.kind = axis.kind or a.kind
            return None
        if isinstance(a, Sum) and isinstance(b, Sum):
            s, t = size(a.of[0]), size(b.of[0])
            if s > t:
                a, b, s, t = b, a, t, s
            first, rest = (b.of[0], Sum(b.of[1:])) if s == t else self.take(b, s)
            self.unify(a.of[0], first)
            return self.unify(Sum(a.of[1:]), rest)
        if isinstance(a, Prod) and isinstance(b, Prod):
            s, t = size(a.of[0]), size(b.of[0])
            if s > t:
                a, b, s, t = b, a, t, s
            first, rest = self.factor(b, s)
            self.unify(a.of[0], first)
            return self.unify(Prod(a.of[1:]), rest)
        if isinstance(a, Sum):
            a, b = b, a
        assert isinstance(a, Prod)
        first, rest = self.factor(b, size(a.of[0]))
        self.unify(a.of[0], first)
        return self.unify(Prod(a.of[1:]), rest)


def kept_mask(e: Expr, keep: Any) -> Tensor:
    """Return which indices of a dimension stay, bool [size]; `keep(axis)` gives the mask of an axis, None for all."""
    e = resolve(e)
    if isinstance(e, Axis):
        mask = keep(e)
        return torch.ones(e.size, dtype=torch.bool) if mask is None else mask
    if isinstance(e, Sum):
        return torch.cat([kept_mask(t, keep) for t in e.of])
    mask = torch.ones(1, dtype=torch.bool)
    for f in e.of:
        mask = (mask[:, None] & kept_mask(f, keep)[None]).flatten()
    return mask


def reordered_indices(e: Expr, order: Any) -> Tensor:
    """Return the indices of a dimension after its axes are reordered, int64 [size].

    `order(axis)` gives the new order of an axis, None for unchanged.
    """
    e = resolve(e)
    if isinstance(e, Axis):
        units = order(e)
        return torch.arange(e.size) if units is None else units
    if isinstance(e, Sum):
        starts = [0, *itertools.accumulate(map(size, e.of))]
        return torch.cat([first + reordered_indices(t, order) for first, t in zip(starts, e.of)])
    out = torch.zeros(1, dtype=torch.int64)
    for f in e.of:
        out = (out[:, None] * size(f) + reordered_indices(f, order)).flatten()
    return out


def unit_of_index(e: Expr, axis: Axis) -> Tensor:
    """Return the unit of `axis` that each index of a dimension belongs to, -1 for none. int64 [size]."""
    e = resolve(e)
    if isinstance(e, Axis):
        return torch.arange(e.size) if e is axis else torch.full((e.size,), -1)
    if isinstance(e, Sum):  # most parts do not contain it
        out, at = torch.full((size(e),), -1), 0
        for part in e.of:
            n = size(part)
            if any(a is axis for a in leaves(part)):
                out[at : at + n] = unit_of_index(part, axis)
            at += n
        return out
    out = torch.full((1,), -1)
    for f in e.of:
        out = torch.maximum(out[:, None], unit_of_index(f, axis)[None]).flatten()
    return out


def num_kept(e: Expr, units_kept: Any) -> int:
    """Return how many indices of a dimension stay; `units_kept(axis)` gives the number, None for all. O(axes)."""
    e = resolve(e)
    if isinstance(e, Axis):
        n = units_kept(e)
        return e.size if n is None else n
    parts = [num_kept(f, units_kept) for f in e.of]
    return math.prod(parts) if isinstance(e, Prod) else sum(parts)
