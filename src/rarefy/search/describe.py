"""A choice in words, and a row for each part of it: what is done, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rarefy.search import solve
from rarefy.search.deploy import Variant
from rarefy.search.frontier import Point
from rarefy.search.solve import Choice
from rarefy.search.space import BITS, BLOCK, CUTS, EIGHT_BITS, PATTERNS, RANK, Part, bits_at


def describe(choice: Choice, parts: Sequence[Part], variant: Variant) -> str:
    """Return a choice in short, such as "int8, 25 % fewer neurons, 10 % fewer heads"."""
    words = [variant.name]
    for method in dict.fromkeys(p.method for p in parts):
        sizes = [(p.size, choice.amounts.get(p.key, 0.0)) for p in parts if p.method == method]
        every = max(sum(size for size, _ in sizes), 1)
        if method == BITS:
            for amount in sorted({a for _, a in sizes if a}):
                share = sum(size for size, a in sizes if a == amount) / every
                words.append(f"{100 * share:.0f} % in {bits_at(amount)} bits")
        elif share := sum(size * amount for size, amount in sizes) / every:
            words.append(f"{100 * share:.0f} % {_noun(method)}")
    return ", ".join(words)


def _bits(part: Part, amount: float, variant: Variant) -> int:
    """Return the bits of a part's weights."""
    if amount and part.method in (BITS, EIGHT_BITS):
        return bits_at(amount) if part.method == BITS else 8
    return variant.bits(part.name)


def _noun(method: str) -> str:
    """Return what a share of a method is called."""
    if method in (*CUTS, BLOCK):
        return f"fewer {method}s"
    return "fewer weights (low rank)" if method == RANK else f"zeros ({method})"


def rows_of(choice: Choice, parts: Sequence[Part], variant: Variant, base: Point) -> tuple[dict[str, Any], ...]:
    """Return a row for each part: what is done with it, and why.

    Args:
        choice: the amounts.
        parts: all parts.
        variant: the precision.
        base: the dense model in this precision.
    """
    whole = sum(t["median"] for t in base.milliseconds.values()) / len(base.milliseconds)
    rows = []
    for part in parts:
        amount = choice.amounts.get(part.key, 0.0)
        at = part.amounts.index(amount) if amount else None
        means = solve.mean_savings(part)
        cheapest = min(range(len(means)), key=lambda i: part.losses[i] / max(means[i], 1e-12))
        each = part.losses[cheapest] / max(100 * means[cheapest], 1e-9)
        pruned = part.method in PATTERNS
        rows.append({
            "layer": part.name, "choice": part.method if at is not None else "as it is",
            "sparsity": amount if pruned else 0.0,
            "pattern": part.method if pruned else "",
            "bits": _bits(part, amount, variant),
            "kept": f"{part.units_left(amount)} of {part.size}" if part.method in (*CUTS, BLOCK) else "",
            "milliseconds": 0.0 if at is None else whole * means[at],
            "loss": 0.0 if at is None else part.losses[at],
            "why": f"a hundredth of the time costs a loss of {each:.2g} or more",
        })  # fmt: skip
    return tuple(rows)
