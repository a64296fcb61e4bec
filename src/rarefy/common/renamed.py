"""Old parameter names: using one is a TypeError that names the new one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_parameters(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that a call with an old parameter name says what the parameter is called now.

    Args:
        **new_names: the new name of each old one.

    Returns:
        A decorator. The decorated function keeps its signature and docstring.

    Raises:
        TypeError: by the decorated function, when it is called with an old name.

    Example:
        >>> @renamed_parameters(work="resume_dir")
        ... def run(resume_dir=None): return resume_dir
        >>> run(work="state")
        Traceback (most recent call last):
        TypeError: run() has no parameter 'work': it is called 'resume_dir' now
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            old: Any = next((name for name in kwargs if name in new_names), None)
            if old is not None:
                name = getattr(function, "__name__", "this function")
                raise TypeError(f"{name}() has no parameter {old!r}: it is called {new_names[old]!r} now")
            return function(*args, **kwargs)

        return call

    return decorate
