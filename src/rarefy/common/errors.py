"""What goes wrong at a user's hand: one family, all `ValueError`, each message says what, got, allowed, nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RarefyError(ValueError):
    """Something the user gave cannot be used; the message says what, and what would do."""


class RecipeError(RarefyError):
    """A recipe (file, dict or option) is wrong; the message names the place."""


class SelectorError(RarefyError):
    """A selector means nothing in this model."""


class PatternError(RarefyError):
    """A pattern, sparsity or scope is impossible."""


class ModelError(RarefyError):
    """The model cannot be worked on: no layers that match, NaN in weights or activations."""


class DataError(RarefyError):
    """Data is missing, too short, or of a shape the model cannot be called with."""


class FormatError(RarefyError):
    """A packed tensor is inconsistent, or a tensor does not fit the format."""


class ContainerError(RarefyError):
    """A saved folder is missing, damaged, hostile, or in the way."""


def first_line(error: BaseException, most: int = 200) -> str:
    """Return what an exception says, cut to its first line, or its class where it says nothing.

    >>> first_line(KeyError()), first_line(OSError("no\\nmore"))
    ('KeyError', 'no')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def nearest(got: str, allowed: Iterable[str], many: int = 1) -> list[str]:
    """Return up to `many` of the allowed words that look like `got`, the likest first.

    >>> nearest("wandda", ["magnitude", "wanda"])
    ['wanda']
    """
    return difflib.get_close_matches(got, list(allowed), n=many, cutoff=0.5)


def unknown(what: str, got: object, allowed: Iterable[str], where: str = "") -> str:
    """Return the message for a word that is not among those allowed.

    >>> unknown("score", "wandda", ["magnitude", "wanda"], "r.yaml, line 3")
    "unknown score 'wandda'; choose from magnitude, wanda (did you mean 'wanda'?) [r.yaml, line 3]"
    """
    words = sorted(allowed)
    near = nearest(str(got), words)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    place = f" [{where}]" if where else ""
    return f"unknown {what} {got!r}; choose from {', '.join(words)}{hint}{place}"
