"""The order of the columns of a matrix in which an N:M pattern keeps most.

S [R, C]   scores; of every M neighbouring entries of a row the N best are kept
P [C, C]   what the group of column i keeps, were column j in its place: of the others of the group the N - 1 best and
           the better of the Nth and the new one. Their sum over rows is an L1 distance, as
           max(a, b) = (a + b + |a - b|) / 2, so that the gains of all swaps are one `cdist`

Swaps that gain most go first, those of different groups together; where none gains, a few random ones are made and
undone by more swaps (channel permutation of Pool & Yu, NeurIPS 2021, whose groups are searched pair by pair). Of
many columns random parts come first: a third of the time for the same, and for the widest all there is time for.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-6  # of what a group keeps on average: what a swap gains at least
SHAKEN = 6  # random swaps, from which a better order may be found
PART = 128  # columns among which swaps are sought at first
MOST = 1024  # columns of which all are measured against all after that
ENOUGH = 1e-5  # of what is kept: a round among parts that gains less is the last
PATIENCE = 64  # how many times in a row none is


@dataclass(frozen=True)
class ColumnOrder:
    """An order [C] of columns, how many swaps it took, and whether the search ended before its time did."""

    order: Tensor
    swaps: int
    ended: bool


def kept_score(S: Tensor, n: int, m: int) -> float:
    """Return the sum of what N:M keeps of scores. O(R C).

    >>> kept(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2)
    6.0
    """
    return float(S.reshape(len(S), -1, m).topk(n, -1).values.sum(dtype=torch.float64))


def search(S: Tensor, n: int, m: int, *, seconds: float, seed: int = 0) -> ColumnOrder:
    """Return an order of the columns of non-negative scores; M divides their number. The same for the same seed where
    time does not end it. O(R C^2) at first, O(R C) a swap.

    >>> found = search(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2, seconds=1.0)
    >>> kept(torch.tensor([[4.0, 3.0, 2.0, 1.0]])[:, found.order], 1, 2)
    7.0
    """
    until, rng, S = time.perf_counter() + seconds, torch.Generator().manual_seed(seed), S.float()
    found = ColumnOrder(torch.arange(S.shape[1]), 0, True)
    if S.shape[1] > PART:
        found = _parts(S, n, m, until, rng)
    if not found.ended or S.shape[1] > MOST:
        return found
    best = _Groups(S[:, found.order], n, m)
    swaps, idle = found.swaps + best.improve(until), 0
    while len(best.order) > 1 and idle < PATIENCE and time.perf_counter() < until:
        other = best.copy()
        other.shake(rng)
        swaps += other.improve(until)
        better = float(other.kept.sum()) > float(best.kept.sum()) * (1 + LEAST)
        best, idle = (other, 0) if better else (best, idle + 1)
    return ColumnOrder(found.order[best.order.flatten()], swaps, len(best.order) < 2 or idle >= PATIENCE)


def _parts(S: Tensor, n: int, m: int, until: float, rng: torch.Generator) -> ColumnOrder:
    """Swaps within random parts of the groups, other parts each round, until a round gains next to nothing."""
    groups, swaps = torch.arange(S.shape[1]).view(-1, m), 0
    while True:
        parts, was, now = [], 0.0, 0.0
        for part in groups[torch.randperm(len(groups), generator=rng)].split(PART // m):
            if time.perf_counter() < until:
                found = _Groups(S[:, part.flatten()], n, m)
                was += float(found.kept.sum())
                swaps += found.improve(until)
                now += float(found.kept.sum())
                part = part.flatten()[found.order]
            parts.append(part)
        groups, late = torch.cat(parts), time.perf_counter() >= until
        if late or now <= was * (1 + ENOUGH):
            return ColumnOrder(groups.flatten(), swaps, not late)


class _Groups:
    """Groups of M columns: which [C / M, M], in which one each column is [C], what each keeps [C / M], and P."""

    def __init__(self, S: Tensor, n: int, m: int):
        self.columns, self.n = S.T.contiguous(), n
        count = len(self.columns)
        self.sums = self.columns.sum(1)
        self.order = torch.arange(count).reshape(-1, m)
        self.group = torch.arange(count) // m
        self.kept, self.P = torch.empty(len(self.order)), torch.empty(count, count)
        self.measure(torch.arange(len(self.order)))

    def copy(self) -> _Groups:
        """Return the same groups, to be changed apart."""
        new = copy.copy(self)
        new.order, new.group, new.kept, new.P = (t.clone() for t in (self.order, self.group, self.kept, self.P))
        return new

    def measure(self, groups: Tensor) -> None:
        """Measure groups, and what each would keep with another column in the place of one of its own."""
        inside, n = self.order[groups], self.n
        x = self.columns[inside]  # [groups, M, R]
        self.kept[groups] = x.topk(n, 1).values.sum((1, 2))
        for place in range(inside.shape[1]):
            best = x[:, [p for p in range(inside.shape[1]) if p != place]].topk(n, 1).values
            first, last, i = best[:, : n - 1].sum((1, 2)), best[:, n - 1], inside[:, place]
            self.P[i] = first[:, None] + (last.sum(1)[:, None] + self.sums + torch.cdist(last, self.columns, p=1)) / 2

    def improve(self, until: float) -> int:
        """Swap columns as long as that gains anything and there is time; return how often."""
        swaps, least = 0, LEAST * float(self.kept.mean())
        while time.perf_counter() < until:
            gain = self.P + self.P.T - self.kept[self.group][:, None] - self.kept[self.group]
            gain.masked_fill_(self.group[:, None] == self.group, 0)
            best, other = gain.max(1)
            pairs, busy = [], set[int]()
            for i in best.argsort(descending=True).tolist():
                j = int(other[i])
                a, b = int(self.group[i]), int(self.group[j])
                if best[i] <= least:
                    break
                if a not in busy and b not in busy:
                    busy |= {a, b}
                    pairs.append((i, j))
            if not pairs:
                break
            self.swap(pairs)
            swaps += len(pairs)
        return swaps

    def shake(self, rng: torch.Generator) -> None:
        """Swap random columns of random groups."""
        groups, m = self.order.shape
        picked = torch.randperm(groups, generator=rng)[: 2 * SHAKEN]
        places = torch.randint(m, (len(picked),), generator=rng)
        columns = self.order[picked, places][: len(picked) // 2 * 2].reshape(-1, 2)
        self.swap([(int(i), int(j)) for i, j in columns])

    def swap(self, pairs: list[tuple[int, int]]) -> None:
        """Let columns of pairwise different groups take each other's places."""
        i, j = torch.tensor(pairs).T
        a, b = self.group[i], self.group[j]
        at, to = (self.order[a] == i[:, None]).int().argmax(1), (self.order[b] == j[:, None]).int().argmax(1)
        self.order[a, at], self.order[b, to] = j, i
        self.group[i], self.group[j] = b, a
        self.measure(torch.cat([a, b]))
