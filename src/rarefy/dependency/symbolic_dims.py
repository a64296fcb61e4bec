"""What a dimension of a tensor consists of: an algebra of axes, refined while a model is traced.

    Axis          n units that nothing else is known of; a locked axis keeps all its units
    Prod          row-major pairs, as `view` merges dimensions: heads x head dimension
    Sum           one after the other, as `cat` joins them: queries, keys, values

A dimension starts as one Axis. Where an operator shows that it is more (a view splits it, a chunk cuts it), the axis
is replaced by what it was found to be, in every dimension that holds it. Where two dimensions must agree (an addition,
a product), they are made the same. At the end, removing unit j of an axis removes the same indices wherever the axis
occurs: that is what "coupled" means.
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
    """Units of a dimension. `into`: what it was found to be; `lock`: why none of its units may go; `scores`: attention
    sums over them when it compares queries with keys."""

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
    of: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Sum:
    of: tuple[Expr, ...]


Expr = Axis | Prod | Sum
ONE = Prod(())


def size(e: Expr) -> int:
    """Return how many indices a dimension has. O(axes)."""
    if isinstance(e, Axis):
        return e.size
    return math.prod(map(size, e.of)) if isinstance(e, Prod) else sum(map(size, e.of))


def resolve(e: Expr) -> Expr:
    """Return what is known now, in the form where equal things look equal: no Prod in a Prod, no Sum in a Sum or at the
    head of a Prod, nothing of size 1 in a Prod. O(axes)."""
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
    """Yield the axes that a dimension consists of now, each time that they occur."""
    e = resolve(e)
    if isinstance(e, Axis):
        yield e
    else:
        for part in e.of:
            yield from leaves(part)


def products(e: Expr) -> Iterator[Prod]:
    """Yield the products in a dimension, the outermost."""
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
    """The refinements. `clash` is told of what cannot be expressed: all that takes part is locked."""

    def __init__(self) -> None:
        self.where = ""  # what is being traced, for reasons
        self.equal: list[tuple[Expr, Expr]] = []  # parts that must keep the same number of indices

    def clash(self, *es: Expr, parts: tuple[int, int] = (1, 1)) -> tuple[Expr, Expr]:
        """Lock what does not line up; return two locked dimensions of these sizes in place of what was wanted."""
        why = f"shapes do not line up at {self.where}"
        for e in es:
            lock(e, why)
        return fixed(parts[0], why), fixed(parts[1], why)

    def factor(self, e: Expr, k: int) -> tuple[Expr, Expr]:
        """Return (outer, inner) with `k` outer units, so that e is their product."""
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
            left: list[Expr] = []
            have = 1
            for i, f in enumerate(e.of):
                rest = e.of[i + 1 :]
                want = k // have if k % have == 0 else 0
                if want == 1:
                    return Prod(tuple(left)), Prod((f, *rest))
                s = size(f)
                if want and want < s and s % want == 0:
                    outer, inner = self.factor(f, want)
                    return Prod((*left, outer)), Prod((inner, *rest))
                if not want or want % s:
                    break
                left.append(f)
                have *= s
            return self.clash(e, parts=(k, n // k))
        return self._factor_sum(e, n // k)

    def _factor_sum(self, e: Sum, m: int) -> tuple[Expr, Expr]:
        """Rows of m out of a sum: each term gives whole rows, or some terms together give one."""
        outer: list[Expr] = []
        inner: Expr | None = None
        row: list[Expr] = []
        for term in e.of:
            row.append(term)
            have = sum(map(size, row))
            if have < m:
                continue
            if have % m or (len(row) > 1 and have != m):
                break
            one, two = self.factor(term, have // m) if len(row) == 1 else (ONE, Sum(tuple(row)))
            outer.append(one)
            if inner is None:
                inner = two
            else:
                self.unify(inner, two)
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
            left: list[Expr] = []
            for i, term in enumerate(e.of):
                s = size(term)
                if k == 0:
                    return Sum(tuple(left)), Sum(e.of[i:])
                if k < s:
                    a, b = self.take(term, k)
                    return Sum((*left, a)), Sum((b, *e.of[i + 1 :]))
                left.append(term)
                k -= s
        elif e.of:
            m = n // size(e.of[0])
            if k % m == 0:
                a, b = self.take(e.of[0], k // m)
                return Prod((a, *e.of[1:])), Prod((b, *e.of[1:]))
        return self.clash(e, parts=(k, n - k))

    def cut(self, e: Expr, sizes: Sequence[int]) -> list[Expr]:
        """Return the parts of a dimension, one after the other; equal ones keep equal numbers of units."""
        parts, rest = [], e
        for k in sizes[:-1]:
            none = Axis(0, "it has no indices")
            first, rest = (none, rest) if k == 0 else (rest, none) if k == size(rest) else self.take(rest, k)
            parts.append(first)
        parts.append(rest)
        self.equal += [(a, b) for a, b in pairwise(parts) if size(a) == size(b)]
        return parts

    def unify(self, a: Expr, b: Expr) -> None:
        """Make two dimensions one and the same."""
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
    """Return which indices of a dimension stay, bool [size], where `keep` gives the units of an axis that do (or
    None for all)."""
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
    """Return the indices of a dimension when the units of its axes stand in the order that `order` gives (or None for
    as they are). int64 [size]."""
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
    """Return which unit of `axis` each index of a dimension belongs to, -1 for none. int64 [size]."""
    e = resolve(e)
    if isinstance(e, Axis):
        return torch.arange(e.size) if e is axis else torch.full((e.size,), -1)
    if isinstance(e, Sum):  # most parts have none of it
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


def num_kept(e: Expr, left: Any) -> int:
    """Return how many indices of a dimension stay, where `left` gives the number of units of an axis that do (or None
    for all). O(axes)."""
    e = resolve(e)
    if isinstance(e, Axis):
        n = left(e)
        return e.size if n is None else n
    parts = [num_kept(f, left) for f in e.of]
    return math.prod(parts) if isinstance(e, Prod) else sum(parts)
