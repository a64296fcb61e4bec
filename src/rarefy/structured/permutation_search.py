"""Search the column order of a matrix in which an N:M pattern keeps the largest sum of scores.

S [R, C]   scores; of every M neighbouring entries of a row the N best are kept
P [C, C]   P[i, j] is what the group of column i keeps if column j replaces i: the N - 1 best of the other columns, and
           the better of their Nth and column j. With max(a, b) = (a + b + |a - b|) / 2 the sum over rows is an L1
           distance, so one `cdist` gives the gains of all swaps.

Swaps with the largest gain are made first, those of different groups together. Where no swap gains, a few random swaps
are made and improved again (channel permutation; Pool & Yu, NeurIPS 2021, who search pairs of groups). Wide matrices
are first searched in random subsets of columns, which takes a third of the time.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_GAIN = 1e-6  # of a swap, relative to the mean score that a group keeps
RANDOM_SWAPS = 6  # made at once to leave a local optimum
SUBSET = 128  # columns that are searched together at first
MAX_COLUMNS = 1024  # of matrices that are searched as a whole after that
MIN_ROUND_GAIN = 1e-5  # relative gain below which a round of subsets is the last
PATIENCE = 64  # random restarts without a gain before the search ends


@dataclass(frozen=True)
class ColumnOrder:
    """A column order [C], the number of swaps, and whether the search converged before its time was up."""

    order: Tensor
    swaps: int
    converged: bool


def kept_score(S: Tensor, n: int, m: int) -> float:
    """Return the sum of the scores that N:M keeps. O(R C).

    >>> kept_score(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2)
    6.0
    """
    return float(S.reshape(len(S), -1, m).topk(n, -1).values.sum(dtype=torch.float64))


def search(S: Tensor, n: int, m: int, *, seconds: float, seed: int = 0) -> ColumnOrder:
    """Return an order of the columns of non-negative scores; M must divide their number.

    The same seed gives the same order unless time runs out. O(R C^2) at first, O(R C) a swap.

    >>> result = search(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2, seconds=1.0)
    >>> kept_score(torch.tensor([[4.0, 3.0, 2.0, 1.0]])[:, result.order], 1, 2)
    7.0
    """
    deadline, rng, S = time.perf_counter() + seconds, torch.Generator().manual_seed(seed), S.float()
    result = ColumnOrder(torch.arange(S.shape[1]), 0, True)
    if S.shape[1] > SUBSET:
        result = _search_subsets(S, n, m, deadline, rng)
    if not result.converged or S.shape[1] > MAX_COLUMNS:
        return result
    best = _Groups(S[:, result.order], n, m)
    swaps, no_gain = result.swaps + best.improve(deadline), 0
    while len(best.order) > 1 and no_gain < PATIENCE and time.perf_counter() < deadline:
        candidate = best.copy()
        candidate.shake(rng)
        swaps += candidate.improve(deadline)
        better = float(candidate.scores.sum()) > float(best.scores.sum()) * (1 + MIN_GAIN)
        best, no_gain = (candidate, 0) if better else (best, no_gain + 1)
    return ColumnOrder(result.order[best.order.flatten()], swaps, len(best.order) < 2 or no_gain >= PATIENCE)


def _search_subsets(S: Tensor, n: int, m: int, deadline: float, rng: torch.Generator) -> ColumnOrder:
    """Return an order from swaps within random subsets of the groups, renewed each round while a round gains."""
    groups, swaps = torch.arange(S.shape[1]).view(-1, m), 0
    while True:
        subsets, before, after = [], 0.0, 0.0
        for columns in groups[torch.randperm(len(groups), generator=rng)].split(SUBSET // m):
            if time.perf_counter() < deadline:
                subset = _Groups(S[:, columns.flatten()], n, m)
                before += float(subset.scores.sum())
                swaps += subset.improve(deadline)
                after += float(subset.scores.sum())
                columns = columns.flatten()[subset.order]
            subsets.append(columns)
        groups, timed_out = torch.cat(subsets), time.perf_counter() >= deadline
        if timed_out or after <= before * (1 + MIN_ROUND_GAIN):
            return ColumnOrder(groups.flatten(), swaps, not timed_out)


class _Groups:
    """Groups of M columns.

    order   columns of each group, [C / M, M]
    group   of each column, [C]
    scores  that each group keeps, [C / M]
    P       as at the head of this file
    """

    def __init__(self, S: Tensor, n: int, m: int):
        self.columns, self.n = S.T.contiguous(), n
        count = len(self.columns)
        self.sums = self.columns.sum(1)
        self.order = torch.arange(count).reshape(-1, m)
        self.group = torch.arange(count) // m
        self.scores, self.P = torch.empty(len(self.order)), torch.empty(count, count)
        self.measure(torch.arange(len(self.order)))

    def copy(self) -> _Groups:
        """Return an independent copy; the columns are shared."""
        new = copy.copy(self)
        new.order, new.group, new.scores, new.P = (t.clone() for t in (self.order, self.group, self.scores, self.P))
        return new

    def measure(self, groups: Tensor) -> None:
        """Compute the kept score of groups, and the rows of P of their columns."""
        members, n = self.order[groups], self.n
        x = self.columns[members]  # [groups, M, R]
        self.scores[groups] = x.topk(n, 1).values.sum((1, 2))
        for position in range(members.shape[1]):
            best = x[:, [q for q in range(members.shape[1]) if q != position]].topk(n, 1).values
            first, last, i = best[:, : n - 1].sum((1, 2)), best[:, n - 1], members[:, position]
            self.P[i] = first[:, None] + (last.sum(1)[:, None] + self.sums + torch.cdist(last, self.columns, p=1)) / 2

    def improve(self, deadline: float) -> int:
        """Swap columns as long as that gains and there is time; return the number of swaps."""
        swaps, min_gain = 0, MIN_GAIN * float(self.scores.mean())
        while time.perf_counter() < deadline:
            gain = self.P + self.P.T - self.scores[self.group][:, None] - self.scores[self.group]
            gain.masked_fill_(self.group[:, None] == self.group, 0)
            best, other = gain.max(1)
            pairs, used = [], set[int]()
            for i in best.argsort(descending=True).tolist():
                j = int(other[i])
                a, b = int(self.group[i]), int(self.group[j])
                if best[i] <= min_gain:
                    break
                if a not in used and b not in used:
                    used |= {a, b}
                    pairs.append((i, j))
            if not pairs:
                break
            self.swap(pairs)
            swaps += len(pairs)
        return swaps

    def shake(self, rng: torch.Generator) -> None:
        """Swap random columns of random groups."""
        groups, m = self.order.shape
        chosen = torch.randperm(groups, generator=rng)[: 2 * RANDOM_SWAPS]
        positions = torch.randint(m, (len(chosen),), generator=rng)
        columns = self.order[chosen, positions][: len(chosen) // 2 * 2].reshape(-1, 2)
        self.swap([(int(i), int(j)) for i, j in columns])

    def swap(self, pairs: list[tuple[int, int]]) -> None:
        """Swap pairs of columns, all of different groups."""
        i, j = torch.tensor(pairs).T
        a, b = self.group[i], self.group[j]
        at, to = (self.order[a] == i[:, None]).int().argmax(1), (self.order[b] == j[:, None]).int().argmax(1)
        self.order[a, at], self.order[b, to] = j, i
        self.group[i], self.group[j] = b, a
        self.measure(torch.cat([a, b]))
