"""Checks of a tokenizer.json before the library tokenizers reads it: it trusts the file, and may end the process.

Some hundred bytes of it can double a text 30 times, or ask for a billion tokens of padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rarefy.common.errors import ContainerError

MAX_GROWTH = 4096  # of a text, in bytes, by all steps that replace parts of it
MAX_STEPS = 2000  # of a tokenizer, which are compared with each other here
MAX_PIECES = 64  # of all templates that put special tokens around texts
MAX_PADDING = 1 << 20  # tokens to which a text is padded
STEPS = (("normalizer", "pre_tokenizer"), ("decoder",))  # those in one group run one after another
TRANSFORMS = {"ByteLevel": 2, "Precompiled": 16}  # growth of other steps; a table of characters has short texts


def check_tokenizer(values: Any, where: str) -> None:
    """Raise ContainerError for a tokenizer.json with which the library could fill the memory or end the process.

    Args:
        values: the plain data of the file.
        where: what errors call it.
    """
    if not isinstance(values, dict):
        return
    _check_merges(values.get("model"), where)
    for parts in STEPS:
        steps = [step for part in parts for step in _steps(values.get(part)) if isinstance(step.get("type"), str)]
        if len(steps) > MAX_STEPS:
            raise ContainerError(
                f"{where}: {' and '.join(parts)}: expected at most {MAX_STEPS:,} steps, got {len(steps):,}"
            )
        growth = _growth(steps)
        if growth > MAX_GROWTH:
            raise ContainerError(
                f"{where}: {' and '.join(parts)}: replacements make a text up to {growth:,.0f} times as long, expected "
                f"at most {MAX_GROWTH:,}"
            )
    templates = [step.get(side) for step in _steps(values.get("post_processor")) for side in ("single", "pair")]
    pieces = sum(len(template) for template in templates if isinstance(template, list | str))
    if pieces > MAX_PIECES:
        raise ContainerError(
            f"{where}: post_processor: expected templates of at most {MAX_PIECES} parts, got {pieces:,}"
        )
    padding = values.get("padding")
    strategy = padding.get("strategy") if isinstance(padding, dict) else None
    fixed = strategy.get("Fixed") if isinstance(strategy, dict) else None
    for tokens in (fixed, padding.get("pad_to_multiple_of") if isinstance(padding, dict) else None):
        if isinstance(tokens, int | float) and tokens > MAX_PADDING:
            raise ContainerError(f"{where}: padding: expected at most {MAX_PADDING:,} tokens, got {tokens:,}")


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a tokenizer in their order, those of sequences too."""
    if isinstance(value, list):
        for part in value:
            yield from _steps(part)
    elif isinstance(value, dict):
        yield value
        for part in value.values():
            if isinstance(part, dict | list):
                yield from _steps(part)


def _growth(steps: list[dict[str, Any]]) -> float:
    """Return how many times as long the steps make a text at most.

    A replacement multiplies what an earlier one inserted if it can match that: a character of its pattern is in it. A
    regular expression can match everything, also nothing between two characters. Other steps change all characters.
    """
    grown: list[tuple[str | None, float]] = [(None, 1.0)]  # what was inserted, None: anything; growth up to there
    for step in steps:
        pattern, content = step.get("pattern"), step.get("content")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        if step.get("type") != "Replace" or not isinstance(content, str):
            grown = [(None, TRANSFORMS.get(step["type"], 1) * max(growth for _, growth in grown))]
        elif isinstance(text, str) and text:
            factor = max(_bytes(content) / _bytes(text), 1.0)
            before = [growth for inserted, growth in grown if inserted is None or set(text) & set(inserted)]
            grown.append((content, factor * max(before)))
        else:
            grown.append((None, (1 + _bytes(content)) * max(growth for _, growth in grown)))
    return max(growth for _, growth in grown)


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _check_merges(model: Any, where: str) -> None:
    """Raise ContainerError unless the second part of each merge begins with the prefix of parts inside a word.

    The library tokenizers cuts as many bytes from it unseen, and ends the process if they end inside a character.
    """
    prefix, merges = (
        model.get(k) if isinstance(model, dict) else None for k in ("continuing_subword_prefix", "merges")
    )
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    seconds = [p[1] if isinstance(p, list) and len(p) == 2 and isinstance(p[1], str) else "" for p in parts]
    wrong = next((p for p, second in zip(parts, seconds) if not second.startswith(prefix)), None)
    if wrong is not None:
        raise ContainerError(
            f"{where}: model.merges: expected second parts that begin with continuing_subword_prefix, {prefix[:80]!r}, "
            f"got {str(wrong)[:80]}"
        )
