"""Sparsity patterns: `make_mask(score, pattern, sparsity)` returns masks with exact counts.

A score has the shape [G, K, O, I] of `rarefy.model.layout` (or [O, I], which is one group and one kernel position).

    unstructured     single entries
    N:M              N of every M along the inputs are kept, at each kernel position
    RxC              blocks of R outputs by C inputs, at each kernel position
    row, channel     one output: a row of a Linear, a filter of a convolution
    column           one input at all kernel positions and for all outputs of its group

If M, R or C does not divide a dimension, the last group or block is padded with entries that are pruned first and are
not counted. A group of r < M entries keeps min(N, r) of them, so that a kernel for the padded shape can run the result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.common.errors import PatternError, unknown

SCOPES = ("row", "layer", "global")
NAMED_PATTERNS = ("unstructured", "row", "channel", "column")
REDUCTIONS = {
    "mean": lambda s, n: s.sum(-1) / n,
    "sum": lambda s, n: s.sum(-1),
    "max": lambda s, n: s.amax(-1),
    # squaring would turn the -inf of masked entries into the largest score
    "l2": lambda s, n: torch.where(s.isneginf().any(-1), float("-inf"), (s * s).sum(-1).sqrt()),
}


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; `str` returns it as it was written."""

    kind: str  # unstructured, nm, block, row, column
    a: int = 1  # N of N:M, R of RxC
    b: int = 1  # M of N:M, C of RxC
    text: str = "unstructured"

    def __str__(self) -> str:
        return self.text

    @property
    def fixed_sparsity(self) -> float | None:
        """Return the sparsity that an N:M pattern implies; None for other patterns."""
        return 1 - self.a / self.b if self.kind == "nm" else None


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """Return the Pattern of a string. Raises PatternError, which lists what is allowed.

    >>> parse_pattern("2:4").fixed_sparsity, parse_pattern("4x1").kind
    (0.5, 'block')
    """
    if isinstance(pattern, Pattern):
        return pattern
    text = str(pattern).strip()
    nm, block = re.fullmatch(r"(\d+):(\d+)", text), re.fullmatch(r"(\d+)x(\d+)", text)
    if nm:
        n, m = int(nm[1]), int(nm[2])
        if not 1 <= n < m <= 64:
            raise PatternError(
                f"pattern {text!r} keeps {n} of every {m}: N:M needs 1 <= N < M <= 64, such as "
                f"{_nearest_nm(n, m)} (N counts what is kept)"
            )
        return Pattern("nm", n, m, text)
    if block:
        r, c = int(block[1]), int(block[2])
        if not (r >= 1 and c >= 1 and 2 <= r * c <= 4096):
            raise PatternError(f"pattern {text!r}: a block RxC has 2 to 4096 entries, such as 4x1 or 1x4")
        return Pattern("block", r, c, text)
    if text in NAMED_PATTERNS:
        return Pattern("row" if text == "channel" else text, text=text)
    raise PatternError(unknown("pattern", text, [*NAMED_PATTERNS, "2:4", "4:8", "4x1", "1x4"]) + "; any N:M, any RxC")


def check_sparsity(pattern: Pattern, sparsity: float | None, scope: str | None) -> tuple[float, str]:
    """Return the sparsity and scope to use. Raises PatternError for an impossible combination or one without effect."""
    if scope is not None and scope not in SCOPES:
        raise PatternError(unknown("scope", scope, SCOPES))
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool) and 0 <= sparsity <= 1
    if sparsity is not None and not number:
        percent = isinstance(sparsity, int | float) and 1 < sparsity <= 100
        hint = f"; did you mean {sparsity / 100:g}?" if percent else ""
        raise PatternError(f"expected sparsity between 0 and 1, got {sparsity!r}{hint}")
    if pattern.kind == "nm":
        fixed = pattern.fixed_sparsity
        assert fixed is not None
        if sparsity is not None and abs(sparsity - fixed) > 1e-9:
            raise PatternError(
                f"pattern {pattern} implies sparsity {fixed:g}, got {sparsity:g}: leave sparsity out, "
                "or use a pattern with another ratio"
            )
        if scope is not None:
            raise PatternError(f"pattern {pattern} fixes the count in every group: scope {scope!r} has no effect")
        return fixed, "layer"
    if sparsity is None:
        raise PatternError(f"pattern {str(pattern)!r} needs a sparsity between 0 and 1")
    if pattern.kind in ("row", "column") and scope == "row":
        raise PatternError(
            f"pattern {str(pattern)!r} prunes whole lines: scope 'row' is impossible; use layer or global"
        )
    return float(sparsity), scope or "layer"


def make_mask(
    score: Tensor,
    pattern: str | Pattern,
    sparsity: float | None = None,
    *,
    scope: str | None = None,
    reduce: str | None = None,
) -> Tensor:
    """Return the mask (True = kept) that prunes the smallest scores of one tensor. O(n log n).

    score is [G, K, O, I] or [O, I]; -inf is pruned before everything else. Exactly round(sparsity * entries) are pruned
    if the pattern's units allow it, otherwise the nearest count of whole units. Of equal scores the earlier entry is
    pruned.

    >>> make_mask(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), "2:4")
    tensor([[ True, False, False,  True]])
    """
    return make_masks([score], pattern, sparsity, scope=scope, reduce=reduce)[0]


def make_masks(
    scores: Sequence[Tensor],
    pattern: str | Pattern,
    sparsity: float | None = None,
    *,
    scope: str | None = None,
    reduce: str | None = None,
) -> list[Tensor]:
    """Return a mask for each score, as `make_mask`; scope `global` ranks the units of all tensors together."""
    pattern = parse_pattern(pattern)
    sparsity, scope = check_sparsity(pattern, sparsity, scope)
    if reduce is not None and reduce not in REDUCTIONS:
        raise PatternError(unknown("reduction", reduce, REDUCTIONS))
    if reduce is not None and pattern.kind in ("unstructured", "nm"):
        raise PatternError(f"pattern {pattern} has units of one entry: reduce={reduce!r} has no effect")
    return masks_at_sparsity(scores, pattern, sparsity, scope, reduce or "mean")


def masks_at_sparsity(
    scores: Sequence[Tensor], pattern: Pattern, sparsity: float, scope: str, reduce: str = "mean"
) -> list[Tensor]:
    """Return masks as `make_masks` after its checks, also of an N:M pattern below its final sparsity.

    There, the smallest scores among the entries that the pattern would prune are pruned, so that a schedule ends in the
    pattern.
    """
    full = [s if s.dim() == 4 else s[None, None] for s in scores]
    if pattern.kind == "nm":
        assert pattern.fixed_sparsity is not None
        masks = [_group_mask(s, pattern) for s in full]
        part = sparsity / pattern.fixed_sparsity
        if part < 1:  # prune a part of each layer's candidates
            masks = [_prune_part(s, k, part) for s, k in zip(full, masks)]
        return [k.reshape(s.shape) for s, k in zip(scores, masks)]
    units = [_units(s, pattern, reduce) for s in full]
    if scope == "global":
        flat = torch.cat([u.score.reshape(1, -1) for u in units], 1)
        size = None
        if any(u.size is not None for u in units):
            size = torch.cat([_sizes(u).reshape(1, -1) for u in units], 1)
        parts = _keep_largest(flat, size, sparsity)[0].split([u.score.numel() for u in units])
    elif scope == "row":
        parts = [_keep_rows(u, sparsity) for u in units]
    else:
        parts = [_keep_largest(u.score.reshape(1, -1), _flat(u.size), sparsity)[0] for u in units]
    return [_expand_units(p.reshape(u.score.shape), u, s.shape) for p, u, s in zip(parts, units, scores)]


def mean_per_unit(score: Tensor, pattern: Pattern) -> Tensor:
    """Return every entry's score [G, K, O, I] as the mean over its unit. O(n)."""
    units = _units(score, pattern, "mean")
    return _expand_units(units.score, units, score.shape)


@dataclass(frozen=True)
class _Units:
    """Scores of units [G, K, rows, units per row], and how to expand them to entries."""

    score: Tensor
    size: Tensor | None  # entries of each unit without padding; None = one each
    shape: tuple[int, ...]  # of the entries, [G, K, O, I]
    pattern: Pattern


def _units(s: Tensor, pattern: Pattern, reduce: str) -> _Units:
    shape = s.shape
    s = s.float()
    if pattern.kind == "unstructured":
        return _Units(s, None, shape, pattern)
    if pattern.kind in ("row", "column"):
        lines = s.permute(0, 2, 1, 3) if pattern.kind == "row" else s.permute(0, 3, 1, 2)
        lines = lines.flatten(2)[:, None]
        size = torch.full(lines.shape[:3], lines.shape[3], dtype=torch.int64, device=s.device)
        return _Units(REDUCTIONS[reduce](lines, size.float())[..., None], size[..., None], shape, pattern)
    R, C = pattern.a, pattern.b
    blocks = _tile(s, R, C, 0.0 if reduce != "max" else float("-inf"))
    size = _tile(torch.ones_like(s), R, C, 0.0).sum(-1)
    return _Units(REDUCTIONS[reduce](blocks, size), size.long(), shape, pattern)


def _sizes(u: _Units) -> Tensor:
    return torch.ones_like(u.score, dtype=torch.int64) if u.size is None else u.size


def _flat(size: Tensor | None) -> Tensor | None:
    return None if size is None else size.reshape(1, -1)


def _tile(s: Tensor, R: int, C: int, fill: float) -> Tensor:
    """Return [G, K, O, I] as [G, K, ceil(O/R), ceil(I/C), R*C], padded with `fill`."""
    G, K, O, I = s.shape
    s = F.pad(s, (0, -I % C, 0, -O % R), value=fill)
    return s.reshape(G, K, s.shape[2] // R, R, s.shape[3] // C, C).transpose(3, 4).flatten(4)


def _expand_units(mask: Tensor, u: _Units, shape: tuple[int, ...]) -> Tensor:
    """Return the mask of entries, in the score's shape, for a mask of units."""
    G, _, O, I = u.shape
    if u.pattern.kind == "row":
        mask = mask.reshape(G, 1, O, 1).expand(u.shape)
    elif u.pattern.kind == "column":
        mask = mask.reshape(G, 1, 1, I).expand(u.shape)
    elif u.pattern.kind == "block":
        R, C = u.pattern.a, u.pattern.b
        mask = mask.repeat_interleave(R, 2).repeat_interleave(C, 3)[:, :, :O, :I]
    return mask.reshape(shape).contiguous()


def _keep_largest(score: Tensor, size: Tensor | None, sparsity: float) -> Tensor:
    """Return the mask [L, n] that prunes the smallest units of each line until their entries are nearest to
    sparsity.
    """
    n = score.shape[1]
    if size is None or n == 0:
        return _prune_smallest(score, torch.full((len(score),), round(sparsity * n), device=score.device))
    order = score.argsort(dim=1, stable=True)
    pruned = F.pad(size.gather(1, order).cumsum(1), (1, 0))  # entries pruned after 0, 1, ... n units
    target = torch.round(sparsity * size.sum(1, keepdim=True).double())
    return _prune_smallest(score, (pruned - target).abs().argmin(1))


def _keep_rows(u: _Units, sparsity: float) -> Tensor:
    """Return a mask as `_keep_largest` does, with the same share in every output row.

    What rounding leaves is pruned where it costs least.
    """
    G, K, rows, n = u.score.shape
    if not u.score.numel():
        return torch.ones_like(u.score, dtype=torch.bool)
    score = u.score.permute(0, 2, 1, 3).reshape(G * rows, K * n)
    size = None if u.size is None else u.size.permute(0, 2, 1, 3).reshape(G * rows, K * n)
    width = score.shape[1]
    if size is None:
        counts = torch.full((len(score),), int(sparsity * width + 1e-9), device=score.device)
        missing = round(sparsity * score.numel()) - int(counts.sum())
        step = torch.ones_like(counts)
    else:
        order = score.argsort(dim=1, stable=True)
        pruned = size.gather(1, order).cumsum(1)
        counts = (pruned <= sparsity * size.sum(1, keepdim=True).double() + 1e-9).sum(1)
        pruned_entries = F.pad(pruned, (1, 0)).gather(1, counts[:, None]).sum()
        missing = round(sparsity * int(size.sum())) - int(pruned_entries)
        step = F.pad(size.gather(1, order), (0, 1)).gather(1, counts[:, None])[:, 0]
    cost = _nth_smallest(score, (counts + 1).clamp(max=width))
    rows_by_cost = torch.where(counts < width, cost, float("inf")).argsort(stable=True)
    rows_by_cost = rows_by_cost[counts[rows_by_cost] < width]
    # a unit is taken while at least half of it is still missing
    selected = step[rows_by_cost].cumsum(0) - step[rows_by_cost] / 2 <= missing
    counts[rows_by_cost[selected]] += 1
    return _prune_smallest(score, counts).reshape(G, rows, K, n).permute(0, 2, 1, 3)


def _nth_smallest(score: Tensor, nth: Tensor) -> Tensor:
    """Return the nth smallest score of each line, for nth [L] in 1..n. One selection per distinct nth. O(L n)."""
    values = torch.empty(len(score), dtype=score.dtype, device=score.device)
    for k in nth.unique().tolist():
        lines = nth == k
        values[lines] = score[lines].kthvalue(k, dim=1).values
    return values


def _prune_smallest(score: Tensor, count: Tensor) -> Tensor:
    """Return the mask [L, n] without the `count` [L] smallest of each line; ties prune the earlier entry. O(L n)."""
    if score.shape[1] == 0:
        return torch.ones_like(score, dtype=torch.bool)
    limit = _nth_smallest(score, count.clamp(min=1))[:, None]
    pruned, tied = score < limit, score == limit
    spare = count - pruned.sum(1)  # how many entries equal to the limit are pruned
    if len(score) == 1:
        at = tied[0].nonzero()[: max(0, int(spare)), 0]
        pruned[0, at] = True
    else:
        pruned |= tied & (tied.cumsum(1, dtype=torch.int32) <= spare[:, None])
    return ~(pruned & (count > 0)[:, None])


def _group_mask(s: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask that keeps the N largest of every M along the inputs; -inf is never kept."""
    G, K, O, I = s.shape
    groups = F.pad(s.float(), (0, -I % pattern.b), value=float("-inf")).reshape(-1, pattern.b)
    order = groups.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(pattern.b, device=s.device)[None] < pattern.a
    mask = torch.empty_like(groups, dtype=torch.bool).scatter_(1, order, first.expand_as(groups))
    mask &= groups != float("-inf")
    return mask.reshape(G, K, O, -1)[..., :I].contiguous()


def _prune_part(s: Tensor, mask: Tensor, part: float) -> Tensor:
    """Prune only the smallest `part` of what an N:M mask prunes."""
    rank = torch.where(mask, float("inf"), s.float()).reshape(1, -1)
    share = part * (~mask).sum().item() / mask.numel()
    return _keep_largest(rank, None, share)[0].reshape(mask.shape)


def detect_pattern(tensor: Tensor, axis: int = -1) -> str:
    """Return the first pattern that the zeros fit: 1:4, 2:4, 4:8 along the dimension `axis`, 4x1 or 1x4 blocks.

    >>> import torch
    >>> detect_pattern(torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 0]]))
    '2:4'
    """
    if tensor.dim() < 2 or tensor.numel() == 0:
        return ""
    nonzero = (tensor != 0).movedim(axis, -1).flatten(0, -2)
    for n, m in ((1, 4), (2, 4), (4, 8)):
        if nonzero.shape[1] % m == 0 and int(nonzero.reshape(-1, m).sum(1).max()) <= n:
            return f"{n}:{m}"
    for r, c in ((4, 1), (1, 4)):
        if nonzero.shape[0] % r == 0 and nonzero.shape[1] % c == 0:
            count = nonzero.reshape(nonzero.shape[0] // r, r, nonzero.shape[1] // c, c).sum((1, 3))
            if bool(((count == 0) | (count == r * c)).all()):
                return f"{r}x{c}"
    return "unstructured"


def _nearest_nm(n: int, m: int) -> str:
    return "2:4" if m <= 4 or n < 1 else "4:8" if m > 64 or n >= m else f"{n}:{m}"
