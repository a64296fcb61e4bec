"""User errors: one family of ValueErrors. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class RarefyError(ValueError):
    """An input cannot be used. The base class of all errors that Rarefy raises for users (`rarefy.common.errors`).

    Example:
        >>> try:
        ...     raise RecipeError("sparsity: expected a number between 0 and 1, got 1.5")
        ... except RarefyError as error:
        ...     print(error)
        sparsity: expected a number between 0 and 1, got 1.5
    """


class RecipeError(RarefyError):
    """A recipe (a file, a dict or an option) is wrong; the message names the file and line."""


class SelectorError(RarefyError):
    """A layer selector matches nothing in this model."""


class PatternError(RarefyError):
    """An option of pruning, quantization, low rank or sparse training is invalid."""


class ModelError(RarefyError):
    """The model or an option cannot be used: NaN in weights or activations, other outputs, or a missing package."""


class OutputsDifferError(ModelError):
    """A compiled model does not return what the model does."""


class DataError(RarefyError):
    """Data is missing, too short, or has a shape that the model does not accept."""


class OtherSizesError(DataError):
    """A compiled model was called with sizes at which the model may take another branch of its code."""


class FormatError(RarefyError):
    """A packed tensor is inconsistent, or a tensor does not fit the format."""


class ContainerError(RarefyError):
    """A saved folder is missing, damaged or malicious, or an output folder exists already."""


def shell_text(message: str) -> str:
    """Return a message as the command line prints it: with the option of the shell in place of that of Python.

    >>> shell_text("out exists; pass overwrite=True (shell: pass --force), or another name")
    'out exists; pass --force, or another name'
    """
    return re.sub(r"\b(pass|take|remove) ((?!\b(pass|take|remove) ).)*? \(shell: ([^()]*)\)", r"\4", message)


def first_line(error: BaseException, max_length: int = 200) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty.

    A line that ends with a colon says nothing alone: the next one follows it.

    >>> first_line(KeyError()), first_line(OSError("no\\nmore")), first_line(OSError("field x:\\n  no number"))
    ('KeyError', 'no', 'field x: no number')
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    text = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return text[:max_length]


def nearest(got: str, allowed: Iterable[str], count: int = 1) -> list[str]:
    """Return up to `count` allowed names that are similar to `got`, the most similar first.

    >>> nearest("wandda", ["magnitude", "wanda"])
    ['wanda']
    """
    return difflib.get_close_matches(got, list(allowed), n=count, cutoff=0.5)


def nearest_paths(got: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` dotted names that are similar to `got`, compared component by component from the first on.

    Empty if no first component is similar. A `*` is similar to everything.

    >>> nearest_paths("encodr.*", ["embeddings.words", "encoder.layer", "pooler"], 1)
    ['encoder.layer']
    """
    components = got.split(".")

    def likeness(name: str) -> list[float]:
        pairs = zip(components, name.split("."))
        return [1.0 if a == "*" else difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs]

    by_name = {name: likeness(name) for name in names}
    similar = [name for name, ratios in by_name.items() if ratios[0] >= 0.5]
    return sorted(similar, key=lambda name: by_name[name], reverse=True)[:count]


def unknown(what: str, got: object, allowed: Iterable[str], where: str = "") -> str:
    """Return the error message for a name that is not allowed.

    >>> unknown("score", "wandda", ["magnitude", "wanda"], "r.yaml, line 3")
    "unknown score 'wandda'; choose from magnitude, wanda (did you mean 'wanda'?) [r.yaml, line 3]"
    """
    names = sorted(allowed)
    near = nearest(str(got), names)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    location = f" [{where}]" if where else ""
    return f"unknown {what} {got!r}; choose from {', '.join(names)}{hint}{location}"
