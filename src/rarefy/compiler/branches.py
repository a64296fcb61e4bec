"""Compile a model again for sizes at which its code takes another branch, as torch.compile does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import nn

from rarefy.common.errors import DataError, OtherSizesError, first_line
from rarefy.compiler.model_state import attributes, checksums
from rarefy.compiler.other_sizes import MODEL_ERRORS

MAX_BRANCHES = 8  # compiled models beside the first, and attempts that failed

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class Branches:
    """The compiled models for other branches of a model's code, made when a call needs them.

    The model is not kept alive: once it is deleted, or its weights or other attributes have changed, calls outside of
    the first branch are errors. Attributes that the model's own calls change do not count.

    Attributes:
        compiled: the models so far; they have packed weights of their own.
    """

    def __init__(self, model: nn.Module, compile_call: Callable[..., Any]):
        """Note the state of the model, before it is compiled. O(bytes of its tensors).

        Args:
            model: the model.
            compile_call: returns a compiled model for the model, arguments, keywords, and whether sizes stay open.
        """
        self.model, self.compile_call = weakref.ref(model), compile_call
        self.weights, self.attributes = checksums(model), attributes(model)
        self.ignored: set[str] = set()  # attributes that calls of the model change
        self.compiled: list[Any] = []
        self.failures = 0
        self.lock = Lock()

    def __str__(self) -> str:
        return f"compiled again for other branches of its code: {len(self.compiled)} of at most {MAX_BRANCHES}"

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `compile_call` returns; attributes that the model's calls change meanwhile count no longer."""
        compiled = self.compile_call(*args, **kwargs)
        model = self.model()
        after = {} if model is None else attributes(model)
        self.ignored |= {n for n in after.keys() | self.attributes if after.get(n) != self.attributes.get(n)}
        return compiled

    def find(self, call: Call, error: OtherSizesError) -> Any:
        """Return a compiled model that takes a call's arguments and keywords, made now if there is none.

        Raises:
            OtherSizesError: `error`, with the reason why there is none.
        """
        args, kwargs = call
        with self.lock:
            for compiled in self.compiled:
                if takes(compiled, args, kwargs):
                    return compiled
            model = self.model()
            if model is None or self.weights is None:
                raise error
            for count, done in ((len(self.compiled), "it was compiled"), (self.failures, "compiling it failed")):
                if count == MAX_BRANCHES:
                    raise OtherSizesError(f"{error} ({done} again for {count} other branches already)")
            if (changed := self._changed(model)) is not None:
                raise OtherSizesError(f"{error} (the model's {changed} changed, so it is not compiled again)")
            self.compiled.append(self._compile(model, args, kwargs, error))
            return self.compiled[-1]

    def _changed(self, model: nn.Module) -> str | None:
        """Return what has changed in the model since it was compiled, None where nothing has."""
        if checksums(model) != self.weights:
            return "weights have"
        now = attributes(model)
        names = sorted((now.keys() | self.attributes) - self.ignored)
        name = next((n for n in names if now.get(n) != self.attributes.get(n)), None)
        return None if name is None else f"attribute {name!r} has"

    def _compile(self, model: nn.Module, args: Any, kwargs: Any, error: OtherSizesError) -> Any:
        try:
            with torch.autocast("cpu", enabled=False), torch.device("cpu"):  # as outside of the settings of this call
                compiled = self.compile(model, args, kwargs)
                if not takes(compiled, args, kwargs):  # sizes of 1, which open sizes do not include
                    compiled = self.compile(model, args, kwargs, dynamic=False)
        except MODEL_ERRORS as reason:
            self.failures += not isinstance(reason, DataError)  # which a model that cannot be called takes no time for
            raise OtherSizesError(f"{error} (compiling it again failed: {first_line(reason)})") from reason
        return compiled


def takes(compiled: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a compiled model takes these arguments."""
    try:
        compiled.leaves(args, dict(kwargs))
    except DataError:
        return False
    return True
